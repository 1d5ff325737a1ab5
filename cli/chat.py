"""``memos chat``: a session in the terminal that remembers across days."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, ClassVar, TypeVar

from memory_os.cli import render
from memory_os.cli.common import (
    Budget,
    Controller,
    Embedder,
    Json,
    Llm,
    Namespace,
    Session,
    Store,
    Tokenizer,
    Vectors,
    old_history,
    opened,
)

if TYPE_CHECKING:
    from memory_os.config import Settings
    from memory_os.memory import Scope
    from memory_os.types import Reply

__all__ = ["Chat", "chat"]

T = TypeVar("T")
REMEMBERED = 200
"""So many of the session's last segments are looked through for what the arrow keys bring back."""


def chat(
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    session: Session = None,
    budget: Budget = None,
    tokenizer: Tokenizer = None,
    llm: Llm = None,
    embedder: Embedder = None,
    vectors: Vectors = None,
    controller: Controller = None,
) -> None:
    """Talk to an LLM that remembers. Close it, come back another day, and go on.

    Example: memos chat --namespace acme/alice

    JSON, an object a reply: {"text", "n_tokens", "segments" (their numbers), "evidence" (quotes: {"seq", "span",
    "quote", "date", "speaker", "cited"}), "calls" (of the LLM besides it), "trace"}
    """
    flags = {
        "store": store, "namespace": namespace, "session": session, "budget": budget, "tokenizer": tokenizer,
        "llm": llm, "embedder": embedder, "vectors": vectors, "controller": controller,
    }  # fmt: skip
    with opened(flags, llm=True, writes=True) as (_, scope, settings):
        if scope.session_name is None:
            scope = scope.session("default")
        if sys.stdin.isatty() and sys.stdout.isatty():
            _banner(scope, settings)
            lines = _edited_lines(scope)
        else:
            lines = (line.rstrip("\n") for line in sys.stdin)
        Chat(scope, budget=settings.budget, json=json).run(lines)


def _banner(scope: Scope, settings: Settings) -> None:
    talk = render.talk()
    counts = scope.stats()
    count = counts["segments"]
    where = render.plain(f"{settings.namespace} in {settings.store}", "bold")
    talk.print(f"[bold]memos[/] remembers {render.count_of(count)} of", where, soft_wrap=True)
    talk.print(render.plain(f"session {scope.session_name}, LLM {settings.llm}, controller {settings.controller}"))
    if counts["pending"]:
        talk.print(render.plain(_pending(counts["pending"])))
    if old := old_history():
        told = f"{old} holds what was typed here before, and is not used any more: delete it."
        talk.print(render.plain(told, "yellow"), soft_wrap=True)
    talk.print("[dim]/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.[/]\n")


def _pending(n: int) -> str:
    return f"{n} still to be embedded, in the background; until then those are found by their words only"


def _edited_lines(scope: Scope) -> Iterator[str]:
    """Lines typed at a prompt with editing, completion of commands, and the session's earlier turns as its history.

    Those are in the store anyway, redacted where that is on, and go when they are forgotten: no second file has them.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import InMemoryHistory

    words = WordCompleter([f"/{name}" for name in Chat.COMMANDS], sentence=True)
    turns = [each for each in scope.history(REMEMBERED) if each.kind == "turn" and each.role == "user"]
    said = [each.text for each in turns if "\n" not in each.text]
    prompt: PromptSession[str] = PromptSession(
        history=InMemoryHistory(said), completer=words, complete_while_typing=False
    )
    while True:
        try:
            yield prompt.prompt("you> ")
        except KeyboardInterrupt:
            continue  # a line that was begun is dropped, as in a shell
        except EOFError:
            return


@contextmanager
def _held_back(note: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block; a second one leaves the program at once.

    Models are loaded inside: an import that is interrupted stays broken, and so would every later answer.
    """
    pressed = 0

    def hold(*_: object) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise SystemExit(130)
        note("stopping as soon as the model is loaded; Ctrl-C again leaves")

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


class Chat:
    """The conversation loop: lines in, replies out. A line that begins with ``/`` is a command.

    :param scope: the session that is talked in.
    :param budget: most tokens of a prompt.
    """

    COMMANDS: ClassVar = {
        "why": "[TURN]   the ledger of a turn, by default the last: every candidate, and why",
        "memory": "         what is remembered, and what the last answer was shown of it",
        "evidence": "[SEGMENT] the quotes behind the last answer (controller alr2), or one of them in its place",
        "confirm": "[ANSWER] the last answer is right, or this is: for memos export-alr2",
        "search": "QUERY    find segments",
        "forget": "SEGMENT  delete a segment, by its number or id",
        "budget": "[N]      show the tokens of the last prompt by part, or set a new limit",
        "session": "[NAME]   show the session's name, or go on in another one",
        "export": "FILE     write the namespace as JSONL",
        "help": "         this list",
        "quit": "         leave",
    }

    NEEDS: ClassVar = {"search": "say what to look for:", "forget": "name a segment:", "export": "name a file:"}

    def __init__(self, scope: Scope, *, budget: int, json: bool = False) -> None:
        self.scope = scope
        self.budget = budget
        self.json = json
        self.last: Reply | None = None
        self._loaded = False
        self._out = render.out()
        self._talk = render.talk()

    def run(self, lines: Iterator[str]) -> None:
        """Take line after line until they end or one says /quit."""
        from memory_os.errors import MemoryOSError

        for line in lines:
            text = line.strip()
            if not text:
                continue
            if text in ("/quit", "/exit"):
                return
            try:
                if text.startswith("/"):
                    self.command(text)
                else:
                    self.say(text)
            except MemoryOSError as error:  # one line, and the conversation goes on
                self._note(str(error), "red")
            except KeyboardInterrupt:  # in a command; say() has its own
                self._note("stopped", "yellow")
            if self._talk.is_terminal:
                self._talk.print()

    def say(self, text: str) -> None:
        """One turn: print the reply as it comes. Ctrl-C stops it and keeps what was said."""
        self.last = None  # if this turn does not end well, /why must not show the one before it
        stream = self.scope.stream(text, budget=self.budget)
        try:
            first = self._waiting(stream.__next__, loads=not self._loaded)
            self._loaded = True
            if not self.json:
                self._write(first)
            for piece in stream:
                if not self.json:
                    self._write(piece)
        except KeyboardInterrupt:
            stream.close()
            if not self.json:
                self._write("\n")
            self._note("stopped; what was said so far is remembered", "yellow")
            return
        except StopIteration:
            pass  # an empty reply
        self.last = stream.reply
        if self.json:
            render.print_json(
                {
                    "text": self.last.text,
                    "n_tokens": self.last.context.n_tokens,
                    "segments": [segment.seq for segment in self.last.context.segments],
                    "evidence": [render.evidence_to_dict(each) for each in self.last.evidence],
                    "calls": len(self.last.trace.calls),
                    "trace": self.last.trace.id,
                }
            )
        else:
            self._write("\n")
            for each in self.last.evidence:
                if each.cited:
                    self._note(render.evidence_line(each))

    def _waiting(self, work: Callable[[], T], *, loads: bool) -> T:
        spinner = self._talk.status("thinking", spinner="dots") if self._talk.is_terminal else nullcontext()
        with _held_back(self._note) if loads else nullcontext(), spinner:
            return work()

    def _write(self, text: str) -> None:
        sys.stdout.write(render.printable(text))
        sys.stdout.flush()

    def _note(self, text: str, style: str = "dim") -> None:
        self._talk.print(render.plain(text, style), soft_wrap=True)

    def command(self, line: str) -> None:
        """Do what a slash command says."""
        name, _, rest = line[1:].partition(" ")
        if name not in self.COMMANDS:
            self._note(f"there is no /{name}; /help lists what there is", "yellow")
            return
        if not rest.strip() and name in self.NEEDS:
            self._note(f"{self.NEEDS[name]} /{name} {self.COMMANDS[name].split()[0]}", "yellow")
            return
        getattr(self, f"_{name}")(rest.strip())

    def _why(self, turn: str) -> None:
        trace, _ = self.scope.why(turn or (self.last.trace.id if self.last else None))
        for note in render.trace_notes(trace):
            self._out.print(render.plain(note), soft_wrap=True)
        self._out.print(render.ledger_table(trace, self.scope.segment))

    def _memory(self, _: str) -> None:
        counts = self.scope.stats()
        held = render.count_of(counts["segments"])
        self._out.print(f"{held} in {counts['sessions']} sessions, {counts['tokens']} tokens")
        if counts["pending"]:
            self._out.print(render.plain(_pending(counts["pending"])))
        if self.last:
            self._out.print(render.plain(self.last.context.text or "The last answer needed nothing of it."))

    def _evidence(self, ref: str) -> None:
        if self.last is None or not self.last.evidence:
            self._note("the last answer rests on no quotes; memos chat --controller alr2 shows its evidence", "yellow")
            return
        if not ref:
            for each in self.last.evidence:
                self._out.print(render.plain(render.evidence_line(each), "" if each.cited else "dim"), soft_wrap=True)
            return
        segment = self.scope.segment(ref.strip("[]").removeprefix("#"))
        spans = [each.span for each in self.last.evidence if each.segment_id == segment.id]
        self._out.print(render.segments_table([segment]))
        self._out.print(render.marked(segment.text, spans), soft_wrap=True)

    def _confirm(self, answer: str) -> None:
        if self.last is None:
            self._note("there is no answer to confirm yet", "yellow")
            return
        self.scope.confirm(self.last.trace.id, answer=answer or None)
        self._note("confirmed; memos export-alr2 writes confirmed turns as training data")

    def _search(self, query: str) -> None:
        hits = self._waiting(lambda: self.scope.search(query), loads=True)
        if hits:
            self._out.print(render.hits_table(hits))
        else:
            self._note("nothing found")

    def _forget(self, ref: str) -> None:
        counts = self.scope.forget(*ref.split())
        self._out.print(f"Forgot {render.count_of(counts['segments'])}.")

    def _budget(self, number: str) -> None:
        if number:
            if not number.isdecimal() or int(number) < 1:
                self._note("a budget is a number of tokens, such as /budget 1000", "yellow")
                return
            self.budget = int(number)
        self._out.print(f"At most {self.budget} tokens a prompt.")
        if self.last:
            line = "The last one: " + render.account_line(self.last.context.account)
            self._out.print(render.plain(line), soft_wrap=True)

    def _session(self, name: str) -> None:
        if name:
            self.scope, self.last = self.scope.session(name), None
        self._out.print(render.plain(f"Session {self.scope.session_name}."))

    def _export(self, file: str) -> None:
        # the whole namespace, as the command memos export does
        count = self.scope.whole().export(file)
        self._out.print(render.plain(f"Wrote {render.count_of(count)} to {file}."))

    def _help(self, _: str) -> None:
        for name, about in self.COMMANDS.items():
            self._out.print(f"  /{name:<8} {about}", markup=False)
