"""The facade: ``Memory`` owns a store and its models; ``Scope`` has the verbs on a namespace or a session in it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event
from typing import IO, TYPE_CHECKING, Any, Self

from memory_os.backlog import STEP
from memory_os.derive import BATCH, catch_up, deferrable
from memory_os.errors import CapabilityError, ConfigError, InvalidInputError, StoreError, UnknownNameError
from memory_os.forget import Retention, Selection, expire, forget, ids_in, with_summaries
from memory_os.ingest import batched, check_text, parse_time, read_segments, up_to_the_fault, with_keys
from memory_os.items import Items
from memory_os.limits import (
    MAX_SEQ,
    MAX_SOURCE_CHARS,
    MAX_TEXT_CHARS,
    as_ref,
    check_count,
    check_name,
    checked_metadata,
    checked_segment,
    is_storable,
    open_file,
)
from memory_os.protocols import ItemChange
from memory_os.redact import redactor
from memory_os.trace import Finding, explain, knows_less
from memory_os.transfer import export_lines, read_records, replace_file
from memory_os.turn import Options, Parts, marks_of, prepare, run_turn
from memory_os.types import (
    BankOptions,
    Confirmation,
    Context,
    Conversation,
    Hit,
    Kind,
    Namespace,
    NewSegment,
    Outcome,
    Reply,
    Role,
    Segment,
    Stored,
    Trace,
    as_namespace,
)

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings
    from langchain_core.language_models import BaseChatModel

    from memory_os.address import DatabaseUrl
    from memory_os.aligned import AlignedReport
    from memory_os.bank import LLMBank
    from memory_os.examples import Examples
    from memory_os.protocols import (
        LLM,
        BankStatus,
        Controller,
        Embedder,
        EmbedderPool,
        QueueStatus,
        TokenCounter,
        Vector,
        WorkQueue,
    )
    from memory_os.summarize import Summary
    from memory_os.worker import Worked, Worker

__all__ = ["DEFAULT_SESSION", "Memory", "Scope", "Stream"]

DEFAULT_SESSION = "default"
NO_LIMIT = 2**53
ROLES = ("user", "assistant", "system", "tool")
KINDS = ("turn", "document", "note")
MOST_WORKERS = 1000
JUDGES = ("user", "gold", "judge")


class Memory:
    """A store and the models that read it. Read and write through ``namespace(...)``.

    >>> from memory_os.adapters.scripted import ScriptedLLM
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Memory.open(folder + "/memory.db", llm=ScriptedLLM(["Noted."]), embedder="hash") as memory:
    ...         reply = memory.namespace("alice").session("monday").chat("My cat is called Miso.")
    >>> reply.text
    'Noted.'
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @classmethod
    def open(
        cls,
        path: str | Path | DatabaseUrl,
        *,
        llm: str | LLM | BaseChatModel | None = None,
        embedder: str | Embedder | Embeddings = "minilm",
        vectors: str = "exact",
        controller: str | Controller = "auto",
        controller_options: Mapping[str, Any] | None = None,
        tokenizer: str | TokenCounter | None = None,
        bank: BankOptions | None = None,
        retention_days: float | None = None,
        redact: bool | Callable[[str], str] = False,
        derive: str = "here",
        max_pending: int | None = None,
        telemetry: bool = False,
        **options: Any,
    ) -> Self:
        """Open the database at a path (or ``sqlite:///`` URL), creating it if it is missing; or a PostgreSQL database.

        That is named by ``postgresql+psycopg://USER:PASSWORD@HOST/NAME``, and gets its tables when it is first opened.
        It has no bank of keys and values: a controller that needs one is refused.

        :param llm: ``"smollm2"``, ``"hf:NAME"``, ``"URL#MODEL"``, ``"provider:model"`` or an object, a LangChain chat
            model among them; for every verb that generates or reads.
        :param embedder: ``"minilm"``, ``"st:NAME"``, ``"hash"``, ``"provider:model"`` or an object, LangChain's
            ``Embeddings`` among them.
        :param vectors: ``"exact"``, ``"chroma"`` (embedded), in PostgreSQL ``"pgvector"``, or a Chroma server:
            ``"chroma+https://HOST:PORT"``, with ``?tenant=NAME&database=NAME`` where needed and its token in
            ``CHROMA_TOKEN``.
        :param controller: ``"auto"``, ``"scm"``, ``"xl3m"``, another name of the README's table, or an object.
        :param tokenizer: whose tokens the budget counts: an encoding or model name; by default the LLM's own, and
            without an LLM cl100k_base.
        :param bank: bounds and form of the bank of cached keys and values, for controllers that use it.
        :param retention_days: keep nothing older, by event time, in any namespace. What is older already is not taken
            in; what becomes older is forgotten now, at ``close``, and in between when something is stored, at most once
            an hour. For good, as ``forget`` does, but it can be stored again under another policy. Items stay. Nothing
            is forgotten, and a warning logged, where the clock has jumped: by it, nothing was written for a year but
            in the last day.
        :param redact: take secrets (keys, tokens, passwords, card numbers) out of all that is stored from now on, by
            their form, or by a function from text to text. The LLM still sees what the user writes in this turn. Names
            cannot be redacted: of a session, an id, or an item's path or key that holds one an error says so.
        :param derive: ``"here"``, or ``"workers"``: vectors and summaries are left to ``memos worker`` processes (or
            ``work``), and what has no vector yet is found by its words; traces say so.
        :param max_pending: with ``"workers"``: while more segments than this have no vector, in all namespaces,
            ``add``, ``add_many``, ``replace_many``, ``ingest`` and ``import_`` wait before they store, and raise
            ``BacklogFullError`` where nothing has happened for a minute. A turn of ``chat`` is always stored.
        :param telemetry: tell OpenTelemetry of every turn, in numbers and names, never in texts: docs/observability.md.
        :param options: fields of ``Options``: ``budget``, ``reply_tokens``, ``flash_turns``, ``system``.
        :raises ConfigError: for a name or option that cannot be used, a missing extra among them.
        :raises StoreError: if the database cannot be opened, or is of a newer version.
        """
        from memory_os.build import build_parts

        try:
            checked = Options(**options)
        except TypeError as error:
            raise ConfigError(f"Memory.open: {error}".replace("Options.__init__() ", "")) from error
        check_name(checked.system, "system prompt", most=MAX_TEXT_CHARS)
        retention = Retention(retention_days) if retention_days is not None else None
        memory = cls(
            build_parts(
                path,
                llm=llm,
                embedder=embedder,
                vectors=vectors,
                controller=controller,
                controller_options=controller_options or {},
                tokenizer=tokenizer,
                options=checked,
                bank=bank or BankOptions(),
                retention=retention,
                redact=redactor(redact),
                derive=derive,
                max_pending=max_pending,
                telemetry=telemetry,
            )
        )
        memory.parts.keep_to_retention(always=True)
        return memory

    def namespace(self, *labels: str) -> Scope:
        """The verbs on one namespace.

        :raises NamespaceError: for no label or one that cannot be used.
        """
        return Scope(self.parts, as_namespace(labels))

    def namespaces(self) -> list[Namespace]:
        """All that hold anything."""
        return self.parts.store.namespaces()

    def pending(self) -> dict[Namespace, int]:
        """How many vectors each namespace still lacks, of segments and of items; those that lack none are left out.

        After a change of embedder that is all of them. They are made in the background once a namespace is used.
        """
        if self.parts.vectors is None:
            raise ConfigError("this memory was put together without a backlog of vectors; Memory.open makes one")
        counts = {namespace: self.parts.vectors.count(namespace) for namespace in self.namespaces()}
        return {namespace: n for namespace, n in counts.items() if n}

    def expire(self, days: float, *, preview: bool = False, verify: bool = False) -> dict[str, int]:
        """Forget what is older than so many days in every namespace; see ``Scope.expire``."""
        return expire(self.parts, self.namespaces(), days, preview=preview, verify=verify)

    def scan_for(self, *texts: str) -> dict[str, list[str]]:
        """``{file: texts}``: in which files of the store any of these texts stands, byte by byte, whatever holds it.

        Looked for in UTF-8 and as JSON escapes it, in the database, its log and its copies, the bank, and the files
        of vectors and of Chroma. What is stored is found, of course: this is to see that what was forgotten is not.
        The files of a database server are not looked at, and a warning says so: its pages, log and backups are its
        administrator's.
        """
        return self.parts.store.files_with([check_text(text) for text in texts])

    def work(
        self,
        *,
        stop: Event | None = None,
        until_idle: bool = True,
        batch: int = STEP,
        summaries: bool = True,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> Worked:
        """Be a worker: make vectors that are missing, in every namespace, and summaries that are listed.

        Any number of processes may do so at once, on any machine that reaches the database; what one has taken another
        leaves alone, until that one has ended. What it had under way is then made by another.

        :param stop: set it, from another thread or a signal's handler, to have this end after what is under way.
        :param until_idle: end where there is nothing left that nobody is at; otherwise wait for more.
        :param batch: how many texts are embedded at a time.
        :param summaries: whether summaries are made, if there is an LLM.
        :param progress: called with ``(vectors, summaries, done a second)`` whenever some are durable.
        :raises ConfigError: for a batch that is none.
        :raises StoreError: if the store fails five times in a row, where ``until_idle``; otherwise it is tried again.
        :raises EmbedderError: likewise, if the embedder does.
        """
        from memory_os.worker import Inline

        parts = self.parts
        llm = parts.llm if summaries else None
        worker = _worker(parts, Inline(parts.embedder), llm=llm, batch=batch, progress=progress)
        return worker.run(stop or Event(), until_idle=until_idle)

    def queue(self) -> QueueStatus:
        """What is left to be derived in all namespaces, and which workers are at it."""
        return _queue(self.parts).status(self.parts.embedder.fingerprint)

    def check(
        self, *, deep: bool = False, progress: Callable[[str, int, int], None] | None = None
    ) -> dict[str, list[str]]:
        """What is wrong with the store, by kind; empty lists where all is well. Read-only.

        :param deep: also look at every row: what is derived is made again and compared, of vectors a sample.
        :param progress: called with ``(what is looked at, done, of so many)``.
        """
        from memory_os.doctor import check, check_deep

        return check(self.parts) | (check_deep(self.parts, progress) if deep else {})

    def repair(self, progress: Callable[[int], None] | None = None, *, deep: bool = False) -> dict[str, int]:
        """Rebuild what is derived and missing or wrong; counts by kind of what was found.

        :param progress: called with the number of vectors made so far.
        :param deep: also what ``check(deep=True)`` finds.
        """
        from memory_os.doctor import repair

        return repair(self.parts, progress, deep=deep)

    def close(self) -> None:
        """Release the database and the index; work that is pending is taken up when the memory is next used."""
        self.parts.keep_to_retention(always=True)
        if self.parts.vectors:
            self.parts.vectors.close()
        if self.parts.backlog:
            self.parts.backlog.close()
        if self.parts.telemetry:
            self.parts.telemetry.close()
        if self.parts.bank:
            self.parts.bank.close()
        self.parts.index.close()
        self.parts.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Scope:
    """One namespace, or one session in it: every verb reads and writes this namespace and nothing else.

    :param session: where ``add`` and ``chat`` write, and whose latest turns are flash memory. Without one, writes go to
        the session ``default`` and reads span the whole namespace. Recall always spans the whole namespace.
    """

    def __init__(self, parts: Parts, namespace: Namespace, session_name: str | None = None) -> None:
        self._parts = parts
        self.labels = namespace
        self.session_name = session_name

    def session(self, name: str) -> Scope:
        """The same verbs on one session of the namespace."""
        check_name(check_text(name), "session")
        return Scope(self._parts, self.labels, name)

    def whole(self) -> Scope:
        """The same verbs on the whole namespace."""
        return Scope(self._parts, self.labels)

    @property
    def items(self) -> Items:
        """Mutable JSON values under a path and a key, beside the segments: what LangGraph's long-term store keeps.

        They belong to the whole namespace, whatever the session, and recall does not see them.
        """
        parts = self._parts
        if parts.items is None:
            raise ConfigError("this memory was put together without a store of items; Memory.open makes one")
        return Items(parts.items, parts.embedder, self.labels, parts.vectors, leaves_work=parts.leaves_work)

    # -- write -----------------------------------------------------------------------------------------------------

    def add(
        self,
        text: str,
        *,
        role: Role = "user",
        speaker: str | None = None,
        kind: Kind = "turn",
        created_at: datetime | str | None = None,
        metadata: Mapping[str, Any] | None = None,
        reply_to: Context | None = None,
    ) -> Segment:
        """Store one segment; it is durable when this returns.

        An embedder that fails fails no write: a warning is logged, and the vector is made with the next one.

        :param created_at: when it was said; now, if not given.
        :param reply_to: the context that this is the model's reply to: what it repeats of that is marked, so that
            it is no new memory, and the turn's trace, where it was recorded, names the reply.
        :raises InvalidInputError: for text that cannot be stored, an unknown role or kind, or a time that is older than
            the memory's ``retention_days``.
        :raises UnknownNameError: if ``reply_to`` is of another namespace.
        """
        if role not in ROLES:
            raise InvalidInputError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
        if kind not in KINDS:
            raise InvalidInputError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
        marks: dict[str, Any] = {}
        if reply_to is not None:
            if role != "assistant":
                raise InvalidInputError(f'a reply is not of the role {role!r}; say role="assistant"')
            if reply_to.trace.namespace != self.labels:
                raise UnknownNameError("turn", reply_to.trace.id, hint="it is of another namespace")
            marks = marks_of(self._parts, check_text(text), reply_to)
        new = NewSegment(
            check_text(text),
            self.session_name or DEFAULT_SESSION,
            role=role,
            speaker=speaker,
            kind=kind,
            created_at=parse_time(created_at) if created_at is not None else None,
            metadata={**checked_metadata(metadata or {}), **marks},
        )
        self._check_age(new)
        [segment] = self.add_many([new])
        if reply_to is not None and (trace := self._parts.store.load_trace(self.labels, reply_to.trace.id)):
            self._parts.store.save_trace(replace(trace, reply_id=segment.id, outcome=Outcome.ANSWERED))
        return segment

    def add_many(self, segments: Sequence[NewSegment], *, restore: bool = False, embed: bool = True) -> list[Segment]:
        """Store several at once, in order, with their vectors; gives back those that were not stored before.

        Those that are older than the memory's ``retention_days`` are left out.

        :param restore: store also those whose id or key was forgotten; otherwise they are left out.
        :param embed: whether the vectors are made now; otherwise they are pending until the next recall.
        :raises InvalidInputError: for one that cannot be stored; none of them was.
        """
        return self._add_many(segments, restore=restore, embed=embed, waits=True)

    def _add_many(
        self, segments: Sequence[NewSegment], *, restore: bool, embed: bool, waits: bool = False
    ) -> list[Segment]:
        check_count(len(segments))
        fresh = self._fresh([checked_segment(new) for new in segments])
        if waits and self._parts.bound:
            self._parts.bound.wait(len(fresh))
        stored = self._parts.store.append(self.labels, fresh, restore=restore)
        if embed:
            with deferrable():
                self._parts.catch_up(self.labels, stored)
        self._parts.keep_to_retention()
        return stored

    def _fresh(self, segments: Sequence[NewSegment]) -> list[NewSegment]:
        """Those that the memory's retention does not keep out."""
        policy = self._parts.retention
        return [new for new in segments if policy is None or not policy.is_old(new.created_at)]

    def _check_age(self, *segments: NewSegment) -> None:
        policy = self._parts.retention
        if policy and len(self._fresh(segments)) < len(segments):
            raise InvalidInputError(
                f"this memory keeps nothing older than {policy.days} days (retention_days), and its time is before that"
            )

    def replace_many(self, segments: Sequence[NewSegment]) -> list[Segment]:
        """Store several by their keys, in order: one whose key is known takes the place of what is under it.

        What is there unchanged stays as it is. All are stored, or none; gives back all of them.

        :raises InvalidInputError: for a segment without a key, text or metadata that cannot be stored, or one that is
            older than the memory's ``retention_days``.
        """
        check_count(len(segments))
        for new in segments:
            if not new.key:
                raise InvalidInputError("a segment without a key cannot take the place of another; give it one")
        checked = [checked_segment(new) for new in segments]
        self._check_age(*checked)
        if self._parts.bound:
            self._parts.bound.wait(len(checked))
        stored = self._parts.store.replace(self.labels, checked)
        self._parts.index.sync(self.labels)
        with deferrable():
            self._parts.catch_up(self.labels, stored)
        self._parts.keep_to_retention()
        return stored

    def ingest(
        self,
        source: str | Path | IO[bytes],
        *,
        format: str | None = None,
        name: str | None = None,
        pick: str | None = None,
        restore: bool = False,
        progress: Callable[[int, int, int], None] | None = None,
        workers: int = 0,
        ray: bool = False,
        made: Callable[[int, int, float], None] | None = None,
    ) -> Stored:
        """Store a file: text, Markdown, or a chat in JSON or JSONL; ``(stored, already there)``.

        Running it again, also after an interruption or an error, adds nothing twice.

        :param source: a path, or a seekable binary stream.
        :param format: ``text``, ``markdown`` or ``chat``; guessed from the name's ending if not given.
        :param name: the identity of the source; the absolute path if not given.
        :param pick: of a file with several conversations, the one with this id.
        What is older than the memory's ``retention_days`` is not stored, and ``.too_old`` counts it.

        :param restore: store also what was forgotten here; otherwise it stays so, and ``.forgotten`` counts it.
        :param progress: called with ``(stored, already there, total)`` before the first batch and after each one is
            durable; the file is then read once more, beforehand, to know the total.
        :param workers: store all of it first; then so many processes of this machine make the namespace's vectors.
            They are spawned: a script does this under ``if __name__ == "__main__":``.
        :param ray: so many actors of a Ray cluster (``RAY_ADDRESS``; else one on this machine) in place of processes.
        :param made: called with ``(vectors, 0, vectors a second)`` whenever those of the workers are durable.
        :raises ConfigError: for workers that cannot be, or an embedder that cannot be sent to other processes.
        :raises InvalidInputError: with the line; what came before it is stored.
        """
        if not (isinstance(workers, int) and 0 <= workers <= MOST_WORKERS):
            raise ConfigError(f"workers are a whole number from 0 to {MOST_WORKERS}, not {workers!r}")
        pool: EmbedderPool | None = None
        if ray or workers:
            from memory_os.build import make_pool

            parts = self._parts
            if parts.make_embedder is None:
                raise ConfigError("this memory has no way to make its embedder once more; Memory.open gives it one")
            pool = make_pool(parts.make_embedder, parts.embedder.fingerprint, workers or 1, ray=ray)
        total, done = 0, Stored(0, 0)
        if progress:
            total = sum(len(batch) for batch in up_to_the_fault(self._read(source, format, name, pick)))
            progress(*done, total)
        for batch in batched(self._read(source, format, name, pick)):
            done = self._stored(batch, restore, done, embed=pool is None)
            if progress:
                progress(*done, total)
        if pool is not None:
            try:
                _worker(self._parts, pool, only=self.labels, progress=made).run(Event(), until_idle=True)
            finally:
                pool.close()
            return done
        with deferrable():
            self._parts.catch_up(self.labels, most=BATCH)  # what an interrupted run left
        return done

    def _stored(self, segments: Sequence[NewSegment], restore: bool, before: Stored, *, embed: bool = True) -> Stored:
        """Store these; what became of them, added to what became of those before."""
        fresh = self._fresh(segments)
        add = self.add_many if embed else self._add_many  # what embeds them itself waits for nobody
        n_new = len(add(fresh, restore=restore, embed=embed))
        out = 0 if n_new == len(fresh) else self._parts.store.forgotten(self.labels, fresh)
        stored, known = before
        too_old = before.too_old + len(segments) - len(fresh)
        return Stored(stored + n_new, known + len(fresh) - n_new - out, before.forgotten + out, too_old)

    def summarize(
        self,
        source: str | Path | IO[bytes],
        *,
        format: str | None = None,
        name: str | None = None,
        pick: str | None = None,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> Summary:
        """Store a file as ``ingest`` does, and summarise it, however long it is.

        Every summary is stored as a segment, so that search finds it, and can be traced with ``sources``. Running it
        again, also after an interruption or an error, asks the LLM for nothing that is there.

        :param progress: called with ``(level, summaries there, summaries of this level)``.
        :raises ConfigError: if there is no LLM.
        :raises LLMError: if the model fails; what it said before is stored.
        """
        from memory_os.summarize import Summarizer

        parts = self._parts
        if parts.llm is None:
            raise ConfigError(
                'a summary needs an LLM: open the memory with llm="smollm2", "URL#MODEL", "provider:model" or an object'
            )
        self.ingest(source, format=format, name=name, pick=pick)
        # by key: the file as it is now, whatever else was stored of it before
        keys = [segment.key for segment in self._read(source, format, name, pick) if segment.key]
        stored = parts.store.by_key(self.labels, keys)
        passages = [stored[key] for key in keys if key in stored]
        if parts.backlog:
            parts.backlog.pause()
        return Summarizer(parts.store, parts.embedder, parts.llm, self.labels, progress).run(passages)

    def read(
        self,
        document: str | Path | IO[bytes],
        question: str,
        *,
        name: str | None = None,
        budget: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Answer a question about a document of any size, by XL3M: all of it is read, the best of it enters.

        The document is streamed and not stored, nor is the question; kept are scores under digests, and the beginning
        of the answer where the LLM made it. Run again, also after an interruption, nothing is scored twice, of the
        last 200,000 segments of the namespace.

        :param document: a path, or a seekable binary stream, which is read from its beginning; UTF-8 text.
        :param name: of the document, in the context; the path if not given.
        :param budget: most tokens of the prompt.
        :param progress: called with ``(bytes read, bytes in all)``.
        :param options: of ``Xl3mController``, such as ``{"score": "entropy", "segment_tokens": 256}``. The score is
            ``"hybrid"`` where the LLM tells how likely a question is, which finds more; else the paper's entropy.
        :raises CapabilityError: if the LLM does not show its probabilities.
        :raises InvalidInputError: for a document that is empty or no text.
        :raises LLMError: if the model fails; what it scored before is kept.
        """
        from memory_os.build import check_llm, make_controller
        from memory_os.protocols import QuestionScoringLLM
        from memory_os.read import read_document

        check_text(question)
        if name is not None:
            check_name(name, "name", most=MAX_SOURCE_CHARS)
        if "mode" in (options or {}):
            raise ConfigError("a document is always read from beginning to end: leave out the option mode")
        score = "hybrid" if isinstance(self._parts.llm, QuestionScoringLLM) else "entropy"
        controller = make_controller("xl3m-scan", {"score": score, **(options or {})})
        check_llm(controller, self._parts.llm)
        parts = replace(self._parts, controller=controller)
        with ExitStack() as stack:
            if isinstance(document, str | Path):
                stream, when = stack.enter_context(open_file(document)), _changed(document)
            else:
                stream, when = document, datetime.now(UTC)
            return read_document(
                parts,
                self.labels,
                stream,
                question,
                name=name or (str(document) if isinstance(document, str | Path) else "document"),
                when=when,
                budget=self._parts.options.budget if budget is None else budget,
                progress=progress,
            )

    def sources(self, ref: str | int) -> list[Segment]:
        """The stored passages that a summary was made of, in the order of ``seq``.

        :raises UnknownNameError: if there is no such segment, or it is no summary.
        """
        from memory_os.summarize import sources_of

        summary = self.segment(ref)
        if summary.kind != "summary":
            raise UnknownNameError("summary", str(ref), hint="it is a segment, but not a summary")
        return sources_of(self._parts.store, self.labels, summary)

    def _read(
        self, source: str | Path | IO[bytes], format: str | None, name: str | None, pick: str | None
    ) -> Iterator[NewSegment]:
        read = partial(read_segments, format=format, pick=pick, redact=self._parts.store.redacted)
        if isinstance(source, str | Path):
            with open_file(source) as stream:
                path = Path(source).expanduser().absolute()
                label = name or str(path)
                check_name(label, "source's name", most=MAX_SOURCE_CHARS)
                session = self.session_name or path.stem
                yield from with_keys(read(stream, name=str(source), session=session), label)
            return
        label = name or "-"
        check_name(label, "source's name", most=MAX_SOURCE_CHARS)
        source.seek(0)
        yield from with_keys(read(source, name=label, session=self.session_name or DEFAULT_SESSION), label)

    def forget(
        self,
        *refs: str | int,
        session: str | None = None,
        everything: bool = False,
        after: datetime | str | None = None,
        before: datetime | str | None = None,
        query: str | None = None,
        k: int | None = None,
        preview: bool = False,
        verify: bool = False,
    ) -> dict[str, int]:
        """Delete segments for good, with all that was derived from them; counts by place.

        Chosen in one of four ways: by id or ``seq``; a session, a time range, or both; a query; everything in the
        namespace. On a session, a time range is of this session; everything else is of the namespace. Summaries that
        were made of them go as well, and what traces of other turns may quote of them; replies that repeat them are
        segments of their own, and stay. Items go with everything only: they belong to no session.

        What is forgotten stays so: by ids and keys, of which digests are kept, ``add_many``, ``ingest`` and
        ``import_`` leave it out, unless told to restore it. When this returns, no file of the store holds the text; if
        ``unfinished`` is 1, another process was reading it, and it is done when the store is closed or opened again; or
        a Chroma server could not be reached, from which it is taken out once it is back.

        :param after: event times from this one on.
        :param before: event times up to, and without, this one.
        :param query: the ``k`` segments that ``search`` finds best for it; see ``would_forget``.
        :param preview: only count.
        :param verify: also read every file of the store for the text, of at least 8 bytes: ``residue`` is how many
            files hold some that nothing stored has in it, ``still_held`` how many of the texts something stored has.
        :raises UnknownNameError: if a segment or the session does not exist; nothing was deleted.
        :raises ConfigError: for none or several of the ways, or a time range in which nothing can be.
        """
        ids = self._chosen(Selection(refs, session, everything, after, before, query, k))
        return forget(self._parts, {self.labels: ids}, everything=everything, preview=preview, verify=verify)

    def would_forget(
        self,
        *refs: str | int,
        session: str | None = None,
        everything: bool = False,
        after: datetime | str | None = None,
        before: datetime | str | None = None,
        query: str | None = None,
        k: int | None = None,
    ) -> list[Segment]:
        """The segments that ``forget`` would delete, summaries among them, in the order of ``seq``."""
        ids = self._chosen(Selection(refs, session, everything, after, before, query, k))
        going = self._parts.store.get(self.labels, with_summaries(self._parts, self.labels, ids))
        return sorted(going.values(), key=lambda segment: segment.seq)

    def _chosen(self, selection: Selection) -> list[str]:
        if selection.session is not None:
            check_name(selection.session, "session")
        if selection.refs:
            return [self.segment(ref).id for ref in selection.refs]
        if selection.query is not None and selection.k is not None:
            return [hit.segment.id for hit in self.search(selection.query, k=selection.k)]
        if selection.session is None and not selection.everything:  # a time range
            selection = replace(selection, session=self.session_name)
        return ids_in(self._parts, self.labels, selection)

    def expire(self, days: float, *, preview: bool = False, verify: bool = False) -> dict[str, int]:
        """Forget what is older than so many days, by event time, in the whole namespace; counts by place.

        Items have a time to live of their own, and stay. What went by its age may be stored again; to keep it out, open
        the memory with ``retention_days``.

        :param preview: only count.
        :param verify: as for ``forget``.
        :raises ConfigError: for a number of days that cannot be.
        """
        return expire(self._parts, [self.labels], days, preview=preview, verify=verify)

    def export(self, file: str | Path | IO[str]) -> int:
        """Write the namespace (or the session) as JSONL, lossless, as it is now; gives back the number of segments.

        Traces and items go with a whole namespace only. An existing file is replaced when the export is complete.
        """
        count = 0

        def counted() -> Iterator[Segment]:
            nonlocal count
            for segment in self._parts.store.scan(self.labels, session=self.session_name):
                count += 1
                yield segment

        traces: Iterable[Trace] = () if self.session_name else self._parts.store.traces(self.labels)
        items = () if self.session_name or self._parts.items is None else self.items.scan()
        lines = (line + "\n" for line in export_lines(counted(), traces, items))
        with self._parts.store.snapshot():
            if isinstance(file, str | Path):
                replace_file(Path(file).expanduser(), lines)
            else:
                file.writelines(lines)
        return count

    def export_alr2(
        self,
        file: str | Path | IO[str],
        *,
        context_tokens: int | Sequence[int] = 4096,
        stages: Sequence[str] = ("retrieve", "reason"),
        exclude: Iterable[str] | str | Path = (),
        split: str = "train",
        seed: int = 0,
    ) -> AlignedReport:
        """Write the namespace's confirmed turns as training data for both stages of ALR², as JSONL of chats.

        Each record is verified on its final text; turns whose evidence does not hold give none, and are counted.
        An existing file is replaced when the export is complete.

        :param context_tokens: most tokens of the sentences that a ``retrieve`` record lists, in the tokenizer that the
            memory was opened with; of several lengths each is used equally often.
        :param exclude: questions that must not be trained on, or the SHA-256 of their text without regard to case and
            white space (``aligned.question_hash``); or the path of a file with one a line.
        :param split: what the records say they are for.
        :param seed: decides which other segments stand beside the evidence; the same gives the same file.
        :raises ConfigError: if no turn is confirmed; nothing is written.
        """
        from memory_os.aligned import Exporter

        parts = self._parts
        with parts.store.snapshot():
            confirmed = [trace for trace in parts.store.traces(self.labels) if trace.confirmation]
            if not confirmed:
                raise ConfigError(
                    "no turn of this namespace is confirmed; say which answers are right: memos confirm TURN"
                )
            exporter = Exporter(
                parts.store.scan(self.labels),
                parts.counter,
                system=parts.options.system,
                context_tokens=context_tokens,
                stages=stages,
                exclude=_lines(exclude) if isinstance(exclude, str | Path) else exclude,
                split=split,
                seed=seed,
            )
            if isinstance(file, str | Path):
                replace_file(Path(file).expanduser(), exporter.lines(confirmed))
            else:
                file.writelines(exporter.lines(confirmed))
        return exporter.report

    def import_(
        self,
        file: str | Path | Iterable[str],
        *,
        restore: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Stored:
        """Store an export in this namespace, ids and times kept; ``(stored, already there)``.

        ``seq`` is kept in an empty namespace; elsewhere the segments follow those that are there. An item that is as
        new here stays, and so does the trace of a turn that was confirmed since. What is older than the memory's
        ``retention_days`` is left out, and ``.too_old`` counts it. Only segments are counted.

        :param restore: store also what was forgotten here; otherwise it stays so, and ``.forgotten`` counts it, items
            too.
        :raises InvalidInputError: with the line; what came before it is stored, and importing again doubles nothing.
        """
        done, policy = Stored(0, 0), self._parts.retention
        for batch in batched(read_records(file)):
            done = self._stored([record for record in batch if isinstance(record, NewSegment)], restore, done)
            for record in batch:
                if isinstance(record, Trace) and not (policy and policy.is_old(record.created_at)):
                    self._import_trace(record, restore)
            changes = [record for record in batch if isinstance(record, ItemChange)]
            if changes:
                out = self.items.merge(changes, restore=restore)[1]
                done = Stored(*done, done.forgotten + out, done.too_old)
            if progress:
                progress(*done)
        return done

    def _import_trace(self, trace: Trace, restore: bool) -> None:
        known = self._parts.store.load_trace(self.labels, trace.id)
        if known is None or known.id != trace.id or not knows_less(trace, known):
            self._parts.store.save_trace(replace(trace, namespace=self.labels), restore=restore)

    # -- read ------------------------------------------------------------------------------------------------------

    def context(
        self,
        query: str,
        *,
        budget: int | None = None,
        memory_tokens: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        conversation: Conversation | None = None,
        record: bool = False,
        asked: Segment | None = None,
    ) -> Context:
        """Choose what enters the model's context for a query, for callers who run the model themselves.

        :param budget: most tokens of ``context.messages``, in the tokenizer that the memory was opened with.
        :param memory_tokens: most tokens of what is recalled, its fence included; alone, it is the only limit.
        :param tools: tool schemas that will be sent along; they are counted.
        :param conversation: the caller's own prompt around the query, in place of the memory's system prompt and
            flash memory; it is counted, and its turns are not recalled again.
        :param record: also store the query as the user's turn, and the trace, as ``chat`` does. Otherwise nothing
            is stored, and asking again gives the same context. ``add(..., reply_to=context)`` then adds the reply.
        :param asked: the query's own segment, where the caller has stored it: only the trace is then to be stored.
        :raises BudgetError: if the fixed parts alone are over the budget.
        :raises UnknownNameError: if ``asked`` is of another namespace.
        :raises ConfigError: for ``memory_tokens`` below 1, or a conversation with a controller whose memory enters as
            keys and values.
        """
        check_text(query)
        if memory_tokens is not None and memory_tokens < 1:
            raise ConfigError(f"memory_tokens must be at least 1, not {memory_tokens}")
        if asked is not None and asked.namespace != self.labels:
            raise UnknownNameError("segment", asked.id, hint="it is of another namespace")
        limit = self._parts.options.budget if budget is None else budget
        if budget is None and memory_tokens is not None:
            limit = NO_LIMIT
        if record and asked is None:
            asked = self.add(query)
        with self._parts.clock("context", self.labels) as clock:
            context = prepare(
                self._parts,
                self.labels,
                self.session_name,
                query,
                budget=limit,
                tools=tools,
                asked=asked,
                clock=clock,
                conversation=conversation,
                memory_tokens=memory_tokens,
            )
            clock.result(context.trace)
        if asked:
            self._parts.store.save_trace(context.trace)
        return context

    def answered(self, turn: str | int, reply: str | int) -> Trace:
        """Say which stored segment is the reply to a recorded turn, so that ``why`` and ``confirm`` know it.

        :param turn: as in ``why``.
        :param reply: id or ``seq`` of the reply's segment.
        :raises UnknownNameError: if there is no such turn or segment.
        """
        trace = replace(self._trace(turn), reply_id=self.segment(reply).id, outcome=Outcome.ANSWERED)
        self._parts.store.save_trace(trace)
        return trace

    def search(self, query: str, *, k: int = 10) -> list[Hit]:
        """The ``k`` best segments of the namespace for a query, best first, with every signal.

        Replies that repeat what is stored come after all others. Where the embedder fails, a warning is logged and
        words alone decide; ``context`` and ``chat`` note it in the trace, and ``nearest`` raises.
        """
        check_text(query)
        if k < 1:
            raise ConfigError(f"k must be at least 1, not {k}")
        parts = self._parts
        with deferrable():
            parts.catch_up(self.labels)
        recalled = parts.recall(self.labels, query, k=k)
        return [*recalled.hits, *recalled.echoes][:k]

    def nearest(
        self,
        query: str | Sequence[float],
        *,
        k: int = 10,
        where: Callable[[Segment], bool] | None = None,
        complete: bool = False,
    ) -> list[Hit]:
        """The ``k`` segments of the namespace nearest to a query by embedding alone, best first.

        :param query: a text, or a vector of the memory's embedder; its length does not matter.
        :param where: only segments of which this is true.
        :param complete: make all vectors that are missing first, however many (see ``Memory.pending``); otherwise
            segments whose vector is still being made are not found.
        :raises InvalidInputError: for a vector of another dimension.
        """
        if k < 1:
            raise ConfigError(f"k must be at least 1, not {k}")
        parts = self._parts
        with deferrable(StoreError):
            if complete:
                catch_up(parts.store, parts.embedder, self.labels)
            else:
                parts.catch_up(self.labels)
        if isinstance(query, str):
            vector = parts.embedder.embed_query(check_text(query))
        else:
            vector = _as_unit(query, parts.embedder.dimension)
        hits: list[Hit] = []
        seen: set[str] = set()
        n = k
        while True:  # wider until enough of them are wanted, or there are no more
            found = [(id_, cosine) for id_, cosine in parts.index.search(self.labels, vector, n) if id_ not in seen]
            segments = parts.store.get(self.labels, [id_ for id_, _ in found])
            for id_, cosine in found:
                if id_ in segments and (where is None or where(segments[id_])):
                    hits.append(Hit(segments[id_], cosine, {"dense": cosine}))
            seen.update(id_ for id_, _ in found)
            if len(hits) >= k or len(seen) < n:
                return hits[:k]
            n *= 4

    def why(self, turn: str | int | None = None, *, expect: str | int | None = None) -> tuple[Trace, Finding | None]:
        """The trace of a turn, and where an expected segment was lost.

        :param turn: a trace's id, or the id or ``seq`` of the turn's query or reply; the latest turn if not given.
        :param expect: id or ``seq`` of a segment.
        :raises UnknownNameError: if there is no such turn.
        """
        trace = self._trace(turn)
        if expect is None:
            return trace, None
        ref = as_ref(expect, "segment")
        return trace, explain(trace, str(ref), self._parts.store.find(self.labels, ref))

    def _trace(self, turn: str | int | None) -> Trace:
        ref = None if turn is None else as_ref(turn, "turn")
        trace = self._parts.store.load_trace(self.labels, ref)
        if trace is None and ref is None:
            raise UnknownNameError("turn", "latest", hint="no turn was answered in this namespace yet")
        if trace is None:
            raise UnknownNameError("turn", str(ref), hint="name a turn that was answered here; see: memos history")
        return trace

    def confirm(
        self,
        turn: str | int | None = None,
        *,
        answer: str | None = None,
        by: str = "user",
        evidence: Sequence[str | int] | None = None,
    ) -> Trace:
        """Say that a turn's answer is right, or tell the right one; gives back the trace, which keeps it.

        Confirming again replaces what was said before.

        :param turn: as in ``why``; the latest turn if not given.
        :param answer: the right answer, ``""`` where memory does not hold it; the reply if not given.
        :param by: who says so: ``"user"``, ``"gold"`` (a label) or ``"judge"`` (a model).
        :param evidence: ids or ``seq`` of the segments that it follows from; those that the reply cites if not given.
        :raises ConfigError: if there is neither a reply nor an answer, or the evidence cannot be one.
        :raises UnknownNameError: if there is no such turn or segment.
        """
        if by not in JUDGES:
            raise ConfigError(f"an answer is confirmed by one of {', '.join(JUDGES)}, not {by!r}")
        trace = self._trace(turn)
        if answer is None:
            reply = self._parts.store.get(self.labels, [trace.reply_id or ""]).get(trace.reply_id or "")
            if reply is None:
                raise ConfigError("this turn has no reply to confirm; tell the right answer: answer=..., or --answer")
            answer = reply.text
        ids = None
        if evidence is not None:
            ids = tuple(dict.fromkeys(self.segment(ref).id for ref in evidence))
            if not {trace.query_id, trace.reply_id}.isdisjoint(ids):
                raise ConfigError("a turn is no evidence of itself; name the segments that its answer follows from")
            if not answer.strip():
                raise ConfigError("an answer that memory does not hold has no evidence; leave out one of the two")
        told = Confirmation(by, check_text(answer) if answer.strip() else "", datetime.now(UTC), ids)
        confirmed = replace(trace, confirmation=told)
        self._parts.store.save_trace(confirmed)
        return confirmed

    def history(self, n: int = 20) -> list[Segment]:
        """The last ``n`` segments of the session (or of the namespace), oldest first.

        :raises ConfigError: for ``n`` below 1.
        """
        if n < 1:
            raise ConfigError(f"n must be at least 1, not {n}")
        return self._parts.store.tail(self.labels, min(n, MAX_SEQ), session=self.session_name)

    def segment(self, ref: str | int) -> Segment:
        """The segment with this id or ``seq``.

        :raises UnknownNameError: if the namespace holds none.
        """
        segment = self._parts.store.find(self.labels, as_ref(ref, "segment"))
        if segment is None:
            raise UnknownNameError("segment", str(ref), hint="name it by its id or its number, as search shows them")
        return segment

    def lookup(self, refs: Iterable[str]) -> dict[str, Segment]:
        """The segments with these ids or keys, by what they were asked for by; those that do not exist are left out."""
        wanted = [ref for ref in dict.fromkeys(refs) if is_storable(ref)]
        return self._parts.store.get(self.labels, wanted) | self._parts.store.by_key(self.labels, wanted)

    def stats(self) -> dict[str, Any]:
        """Counts of what the namespace holds."""
        return self._parts.store.stats(self.labels, self._parts.embedder.fingerprint)

    # -- the bank of cached keys and values --------------------------------------------------------------------------

    def bank_status(self) -> BankStatus:
        """What the namespace has in the bank, for this LLM and system prompt.

        :raises CapabilityError: if the LLM's keys and values cannot be kept, or none was named.
        """
        return self._bank().status(self.labels)

    def fill_bank(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Compute keys and values of the newest segments that the bank has room for; how many were computed.

        A turn does so for what it needs and for what was said in it; this is for what was there before. Stopped, it
        goes on where it was.

        :param progress: called with ``(segments computed, segments to compute)`` after each batch is durable.
        :raises CapabilityError: as ``bank_status``.
        :raises LLMError: if the model fails; what it computed before is kept.
        """
        return self._bank().fill(self.labels, progress)

    def drop_bank(self) -> None:
        """Remove all of the namespace from the bank; it is computed again when it is needed."""
        if self._parts.bank:
            self._parts.bank.drop(self.labels)

    def examples(self, input_name: str, label_name: str, *, labels: Sequence[str], k: int = 20) -> Examples:
        """Labelled examples of one task, kept in this namespace, and the labels of other texts by those nearest.

        :param input_name: what a text is called in the prompt, such as ``"Review"``.
        :param label_name: what its label is called, such as ``"Sentiment"``.
        :param labels: all that there are, in the words that the LLM is to say.
        :param k: most examples that stand before a text.
        :raises ConfigError: for names or labels that cannot be used.
        :raises CapabilityError: if the LLM's keys and values cannot be kept, or none was named.
        """
        from memory_os.examples import Examples

        return Examples(self._parts, self.labels, input_name, label_name, labels=labels, k=k)

    def _bank(self) -> LLMBank:
        bank = self._parts.llm_bank
        if bank is None:
            raise CapabilityError("longmem-free", "CachingLLM", 'llm="smollm2"')
        return bank

    # -- talk ------------------------------------------------------------------------------------------------------

    def chat(self, query: str, *, speaker: str | None = None, budget: int | None = None) -> Reply:
        """One whole turn; both sides of it are stored.

        :raises LLMError: if the model fails; the query and the trace are stored.
        """
        stream = self.stream(query, speaker=speaker, budget=budget)
        for _ in stream:
            pass
        return stream.reply

    def stream(self, query: str, *, speaker: str | None = None, budget: int | None = None) -> Stream:
        """One whole turn, piece by piece: iterate for the text, then read ``.reply``."""
        check_text(query)
        if speaker is not None:
            check_name(speaker, "speaker")
        session = self.session_name or DEFAULT_SESSION
        return Stream(self._turn(run_turn(self._parts, self.labels, session, query, speaker=speaker, budget=budget)))

    def _turn(self, turn: Generator[str, None, Reply]) -> Generator[str, None, Reply]:
        """The turn; what has become too old goes after it, when all of it is stored."""
        try:
            return (yield from turn)
        finally:
            self._parts.keep_to_retention()


class Stream:
    """A reply on its way: an iterator of text pieces. ``close`` interrupts the model; what it said is stored."""

    def __init__(self, turn: Generator[str, None, Reply]) -> None:
        self._turn = turn
        self._reply: Reply | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        try:
            return next(self._turn)
        except StopIteration as end:
            if end.value is not None:
                self._reply = end.value
            raise StopIteration from None

    def close(self) -> None:
        """Interrupt the turn."""
        self._turn.close()

    @property
    def reply(self) -> Reply:
        """The whole reply.

        :raises ConfigError: before the stream has ended.
        """
        if self._reply is None:
            raise ConfigError("the reply is there when the stream has ended; iterate it to its end first")
        return self._reply


def _queue(parts: Parts) -> WorkQueue:
    if parts.queue is None:
        raise ConfigError("this memory was put together without a queue of work; Memory.open makes one")
    return parts.queue


def _worker(parts: Parts, pool: EmbedderPool, **how: Any) -> Worker:
    from memory_os.worker import Worker

    return Worker(_queue(parts), parts.store, parts.items, pool, parts.embedder.fingerprint, **how)


def _as_unit(numbers: Sequence[float], dimension: int) -> Vector:
    import numpy as np

    vector = np.asarray(numbers, dtype=np.float32)
    if vector.shape != (dimension,) or not np.isfinite(vector).all():
        raise InvalidInputError(f"a query vector has {dimension} finite numbers here, not the shape {vector.shape}")
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector


def _lines(path: str | Path) -> list[str]:
    with open_file(path) as stream:
        try:
            return stream.read().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InvalidInputError("not UTF-8", source=str(path)) from error


def _changed(path: str | Path) -> datetime:
    return datetime.fromtimestamp(Path(path).expanduser().stat().st_mtime, UTC)
