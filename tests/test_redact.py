"""With ``redact``, no secret reaches a byte of the store, a trace, a log or an export, by whatever way it comes in."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_os import ConfigError, InvalidInputError, Memory, NewSegment
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.redact import cleaned, secrets
from memory_os.types import LLMCall

# put together here, so that no scanner of this repository takes them for real ones
TAIL = "abcdefghij" + "ABCDEFGHIJ" + "0123456789"
PEM = "-----BEGIN RSA PRIVATE " + f"KEY-----\nMIIE{TAIL}\n{TAIL}==\n-----END RSA PRIVATE " + "KEY-----"
SECRETS = {
    "private-key": (PEM, TAIL),
    "anthropic-key": ("sk-ant-" + f"api03-{TAIL}",) * 2,
    "openai-key": ("sk-" + f"proj-{TAIL}",) * 2,
    "aws-key": ("AKIA" + "IOSFODNN7EXAMPLE",) * 2,
    "google-key": ("AIza" + f"{TAIL}_1234",) * 2,
    "github-token": ("ghp_" + f"{TAIL}abcdef",) * 2,
    "slack-token": ("xoxb-" + "123456789012-abcdefGHIJKL",) * 2,
    "stripe-key": ("sk_live_" + "abcdefghijklmnop1234",) * 2,
    "huggingface-token": ("hf_" + f"{TAIL}abcd",) * 2,
    "jwt": ("eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",) * 2,
    "authorization": ("Authorization: Bearer " + "Zm9vYmFyMTIzNDU2Nzg5MA", "Zm9vYmFyMTIzNDU2Nzg5MA"),
    "url-password": ("postgres://anna:" + "s3cr3t-pass@db.example/app", "s3cr3t-pass"),
    "password": ("the password" + '="correct horse 77"', "correct horse 77"),
    "card": ("4111 1111" + " 1111 1111",) * 2,
}  # fmt: skip
TOLD = " and ".join(text for text, _ in SECRETS.values())
BARE = [secret for _, secret in SECRETS.values()]


def found_in(data: bytes) -> list[str]:
    """The kinds of the secrets in these bytes, also where JSON escapes what they hold."""
    return [kind for kind, (_, secret) in SECRETS.items() if secret.encode() in data]


def bytes_of(folder) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def use_everything(memory: Memory, folder) -> None:
    """Secrets by every way into a memory."""
    alice = memory.namespace("alice")
    session = alice.session("one")
    session.add(
        TOLD, speaker=BARE[1], metadata={BARE[2]: [BARE[3], {"password": "correct horse 77"}], "n": 4111111111111111}
    )
    session.add_many([NewSegment(TOLD, "one", source=BARE[4], key=f"message:{BARE[5]}")])
    alice.replace_many([NewSegment(TOLD, "one", key=f"other:{BARE[5]}")])
    reply = session.chat(f"Keep this: {TOLD}")
    assert reply.segment is not None
    with pytest.raises(Exception, match="fails"):
        session.chat(f"Now it fails: {TOLD}")
    alice.confirm(reply.segment.seq, answer=TOLD)
    alice.context(TOLD, record=True)
    (folder / "notes.md").write_text(f"# Keys\n\n{TOLD}\n")
    alice.ingest(folder / "notes.md")
    assert alice.ingest(folder / "notes.md")[0] == 0
    (folder / "chat.jsonl").write_text(json.dumps({"content": TOLD, "name": BARE[6], "extra": {BARE[7]: BARE[8]}}))
    alice.ingest(folder / "chat.jsonl")
    alice.summarize(folder / "notes.md")
    alice.items.put(("keys",), "all", {"text": TOLD, BARE[1]: 4111111111111111}, texts=[("text", TOLD)])
    (folder / "notes.md").unlink()
    (folder / "chat.jsonl").unlink()


def replies(messages) -> str:
    """An LLM that repeats what it is shown, secrets and all."""
    if "fails" in messages[-1]["content"]:
        raise RuntimeError(f"it fails with {TOLD}")
    return f"I keep {TOLD}"


def run(folder, **options) -> None:
    folder.mkdir()
    llm = ScriptedLLM(replies, context_window=100_000)
    with Memory.open(
        folder / "memory.db", llm=llm, embedder="hash", controller="scm", reply_tokens=9000, **options
    ) as m:
        use_everything(m, folder)
        # in the turn itself the LLM sees what the user writes
        assert any(TOLD in call.messages[-1]["content"] for call in llm.calls)
        m.namespace("alice").export(folder / "export.jsonl")
        (folder / "before_close").write_bytes(bytes_of(folder))  # the log of the database among it


def test_no_secret_reaches_a_byte_of_the_store_a_log_or_an_export(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    run(tmp_path / "redacted", redact=True)
    written = bytes_of(tmp_path / "redacted")
    assert found_in(written) == []
    assert b"4111111111111111" not in written
    assert found_in(caplog.text.encode()) == []
    for kind in SECRETS:
        assert f"[REDACTED:{kind}]".encode() in written
    # an import of what was written without is redacted as well
    run(tmp_path / "plain")
    with Memory.open(tmp_path / "imported.db", embedder="hash", redact=True) as memory:
        stored, _ = memory.namespace("alice").import_(tmp_path / "plain" / "export.jsonl")
        assert stored > 5
        assert memory.namespace("alice").import_(tmp_path / "plain" / "export.jsonl")[0] == 0
    assert found_in(b"".join(path.read_bytes() for path in tmp_path.glob("imported.db*"))) == []


def test_without_redaction_every_one_of_them_is_there(tmp_path):
    """The scan above can find something."""
    run(tmp_path / "plain")
    assert found_in(bytes_of(tmp_path / "plain")) == list(SECRETS)


KEY_LINES = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(25)]
LONG_PEM = "\n".join(["-----BEGIN RSA PRIVATE " + "KEY-----", *KEY_LINES, "-----END RSA PRIVATE " + "KEY-----"])


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "chat.jsonl"])
def test_a_secret_that_is_longer_than_a_passage_or_stands_where_it_is_cut_is_redacted_whole(tmp_path, name):
    text = f"# Keys\n\nBefore.\n\n{LONG_PEM}\n\nAfter.\n\n{'x' * 780} {BARE[5]} {'y' * 900}\n"
    file = tmp_path / name
    file.write_text(json.dumps({"content": text}) if name == "chat.jsonl" else text)
    with Memory.open(tmp_path / "m.db", embedder="hash", redact=True) as memory:
        alice = memory.namespace("alice")
        stored, _ = alice.ingest(file)
        assert alice.ingest(file) == (0, stored)
        assert memory.scan_for(*KEY_LINES, *KEY_LINES[1::2], BARE[5][:30], BARE[5][-30:]) == {}
        kept = alice.history(99)
    whole = secrets(text)
    assert [s.text for s in kept if s.offset] == [whole[slice(*s.offset)] for s in kept if s.offset]
    for words in ("Before.", "After.", "[REDACTED:private-key]", "[REDACTED:github-token]"):
        assert words in "".join(s.text for s in kept)


def test_a_function_of_ones_own_sees_a_document_before_it_is_cut(tmp_path):
    (tmp_path / "notes.txt").write_text("x" * 795 + "Zanzibar and more")
    own = {"redact": lambda text: text.replace("Zanzibar", "[place]")}
    with Memory.open(tmp_path / "m.db", embedder="hash", **own) as memory:
        memory.namespace("alice").ingest(tmp_path / "notes.txt")
        assert "".join(s.text for s in memory.namespace("alice").history()) == "x" * 795 + "[place] and more"


def test_a_key_that_was_cut_off_takes_no_prose_along():
    head = "\n".join(LONG_PEM.splitlines()[:4])
    assert secrets(f"{head}\nabc") == "[REDACTED:private-key]"
    assert secrets(f"{head}\n\nThen we went home.") == "[REDACTED:private-key]\n\nThen we went home."
    told = f"It begins with {head.splitlines()[0]} and then come lines. {'And so on. ' * 9}"
    assert secrets(told).endswith(" and then come lines. " + "And so on. " * 9)


def test_a_secret_that_is_streamed_in_pieces_is_redacted_whole(tmp_path):
    class Letters(ScriptedLLM):
        def generate(self, messages, *, max_tokens, stop=()):
            yield from f"It is {BARE[2]}, as said."

    with Memory.open(tmp_path / "m.db", llm=Letters([]), embedder="hash", redact=True) as memory:
        reply = memory.namespace("alice").chat("What is the key?")
        assert BARE[2] in reply.text
        assert reply.segment.text == "It is [REDACTED:openai-key], as said."


def test_what_is_marked_as_repeated_is_marked_in_the_redacted_text(tmp_path):
    fact = "The cat Miso sleeps all day on the blue chair in the hall."
    with Memory.open(tmp_path / "m.db", llm=ScriptedLLM([f"{BARE[2]} {fact}"]), embedder="hash", redact=True) as memory:
        memory.namespace("alice").session("told").add(fact)
        said = memory.namespace("alice").chat("Where does the cat sleep?").segment
    [part] = said.metadata["derived"]["parts"]
    assert said.text[slice(*part["span"])] == fact.rstrip(".")


def test_names_that_hold_a_secret_are_refused_and_nothing_is_stored(tmp_path):
    with Memory.open(tmp_path / "m.db", llm=ScriptedLLM(["x"]), embedder="hash", redact=True) as memory:
        alice = memory.namespace("alice")
        for act in (
            lambda: alice.session(BARE[2]).add("hello"),
            lambda: alice.session(BARE[2]).chat("hello"),
            lambda: alice.add_many([NewSegment("hello", "s"), NewSegment("hello", "s", id=BARE[2])]),
            lambda: alice.items.put((BARE[2],), "k", {}),
            lambda: alice.items.put(("p",), BARE[2], {}),
        ):
            with pytest.raises(InvalidInputError, match="use another one") as caught:
                act()
            assert BARE[2] not in str(caught.value)
        assert alice.stats()["segments"] == alice.stats()["items"] == 0


def test_a_key_made_of_a_secret_still_stores_once(tmp_path):
    with Memory.open(tmp_path / "m.db", embedder="hash", redact=True) as memory:
        alice = memory.namespace("alice")
        new = NewSegment("hello", "s", key=f"message:{BARE[2]}")
        assert len(alice.add_many([new])) == 1
        assert alice.add_many([new]) == []
        assert alice.lookup([new.key])[new.key].text == "hello"
        assert alice.replace_many([new])[0].seq == 1


def test_a_function_of_ones_own(tmp_path):
    with Memory.open(tmp_path / "m.db", embedder="hash", redact=lambda text: text.replace("Miso", "[cat]")) as memory:
        assert memory.namespace("alice").add("Miso is grey", metadata={"Miso": "Miso"}).text == "[cat] is grey"
    with pytest.raises(ConfigError, match="True, False or a function"):
        Memory.open(tmp_path / "m.db", embedder="hash", redact="yes")
    with Memory.open(tmp_path / "m.db", embedder="hash", redact=lambda _: None) as memory:
        with pytest.raises(ConfigError, match="give back a text"):
            memory.namespace("alice").add("hello")
        assert memory.namespace("alice").stats()["segments"] == 1


def test_the_command_takes_the_setting(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from memory_os.cli.main import app

    monkeypatch.setenv("MEMOS_REDACT", "true")
    (tmp_path / "notes.txt").write_text(TOLD)
    flags = ["--store", str(tmp_path / "m.db"), "--embedder", "hash"]
    assert CliRunner().invoke(app, ["ingest", str(tmp_path / "notes.txt"), *flags]).exit_code == 0
    assert found_in(b"".join(path.read_bytes() for path in tmp_path.glob("m.db*"))) == []


def test_every_string_of_everything_that_is_stored_is_looked_at(tmp_path):
    """Whatever fields a trace, an item, a segment, a summary or scores have: each holds a secret of its own."""
    n = iter(range(10**6))
    planted = []

    def key() -> str:
        planted.append(f"ghp_{next(n):040d}")
        return planted[-1]

    def filled(value):
        if isinstance(value, Enum):
            return value
        if isinstance(value, str):
            return key()
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        if isinstance(value, Mapping):
            return {key(): filled(inner) for inner in value.values()}
        if is_dataclass(value):
            return replace(value, **{f.name: filled(getattr(value, f.name)) for f in fields(value)})
        return value

    with Memory.open(tmp_path / "m.db", llm=ScriptedLLM(lambda _: "Noted."), embedder="hash", redact=True) as memory:
        alice, store = memory.namespace("alice"), memory.parts.store
        told = alice.add("The boat is blue.")
        alice.session("two").chat("The boat?")
        trace = replace(
            alice.confirm(answer="blue", evidence=[told.id]), error="e", notes=("n",), cited=("c",),
            calls=(LLMCall("p", "v", "a", 1, 1),), flash=("f",), query_id="q", reply_id="r", llm="l",
        )  # fmt: skip
        trace = replace(trace, ledger=tuple(replace(entry, flags=("x",)) for entry in trace.ledger))
        assert trace.ledger
        store.save_trace(replace(filled(trace), namespace=trace.namespace))
        names = [f.name for f in fields(trace)]
        assert len(planted) > len(names)
        alice.items.put(("p",), "k", {key(): key(), "list": [{key(): [key()]}]}, texts=[(key(), key())])
        new = NewSegment(key(), "s", speaker=key(), source=key(), key=key(), metadata={key(): [key(), {key(): key()}]})
        [segment] = alice.add_many([new])
        assert alice.add_many([new]) == []
        store.put_summary(alice.labels, segment.id, "method", key())
        epoch = store.vector_epoch(alice.labels, "")[0]
        store.put_scores(alice.labels, {"k": {key(): key()}}, epoch=epoch)
        assert store.read_scores(alice.labels, ["k"]) != {}
        assert memory.scan_for(*planted) == {}
        alice.forget(segment.id)
        assert store.forgotten(alice.labels, [new]) == 1
        assert memory.scan_for(*planted) == {}


def test_names_that_become_equal_are_numbered_and_no_value_is_lost():
    names = [f"ghp_{n:040d}" for n in range(3)]
    mark = "[REDACTED:github-token]"
    left = cleaned({**dict.fromkeys(names, "x"), f"{mark} 2": "y"}, secrets)
    assert left == {mark: "x", f"{mark} 3": "x", f"{mark} 4": "x", f"{mark} 2": "y"}


@pytest.mark.parametrize(
    "value",
    [
        {"password": ["hunter2222"]},
        {"password": {"value": "hunter2222"}},
        {"name": "password", "value": "hunter2222"},
        {"secrets": [{"api_key": [{"text": "hunter2222"}]}]},
        {"password": 22222222},
        {"card": 4111111111111111.0},
        {"lines": LONG_PEM.splitlines()},
        {"lines": LONG_PEM.splitlines()[:4]},
    ],
)  # fmt: skip
def test_a_secret_is_found_in_whatever_structure_it_stands(value):
    left = json.dumps(cleaned(value, secrets))
    assert "[REDACTED:" in left
    assert not any(secret in left for secret in ("hunter", "2222", "1111", *KEY_LINES))
    assert cleaned(json.loads(left), secrets) == json.loads(left)


@pytest.mark.parametrize(
    "value",
    [
        {"password": {"type": "string", "description": "What you log in with"}, "n": 4111111111111112, "x": 1.5},
        {"name": "colour", "value": "blue"},
        {"lines": ["one", "two", ""], "password": None, "api_key": True, "text": "hello", "max": 1e300},
        {"max_tokens": 4096, "tokens": 12345678, "created": 1700000000.25},
    ],
)  # fmt: skip
def test_ordinary_data_is_left_as_it_is(value):
    assert cleaned(value, secrets) == value


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("line\\n{}", "line\\n[REDACTED:github-token]"),
        ("token%3D{}", "token%3D[REDACTED:github-token]"),
        ("token\\u003d{}", "token\\u003d[REDACTED:github-token]"),
        ('{{\\"password\\": \\"hunter2222\\"}}', '{{\\"password\\": \\"[REDACTED:password]\\"}}'),
        ('password: "abc\ndefgh", and so on', 'password: "[REDACTED:password]", and so on'),
        ('password: "abc\nand so on', 'password: "[REDACTED:password]\nand so on'),
        ("http://user:p@ss/word@host/x", "http://user:[REDACTED:url-password]@host/x"),
        ("http://user:pass@host/x?a=b@c", "http://user:[REDACTED:url-password]@host/x?a=b@c"),
    ],
)  # fmt: skip
def test_escaped_and_broken_text(text, left):
    key = f"ghp_{7:040d}"
    assert secrets(text.format(key)) == left.format(key)


def test_a_document_whose_id_looks_like_a_secret_is_found_and_deleted(tmp_path):
    from memory_os.adapters.langchain import MemoryVectorStore

    with Memory.open(tmp_path / "m.db", embedder="hash", redact=True) as memory:
        store = MemoryVectorStore(memory, namespace=("a",))
        number = BARE[-1].replace(" ", "")
        assert store.add_texts(["one", "two"], ids=[number, "plain"]) == [number, "plain"]
        store.add_texts(["three"], ids=[number])
        assert [document.page_content for document in store.get_by_ids([number])] == ["three"]
        assert memory.scan_for(number) == {}
        store.delete([number])
        assert [segment.text for segment in memory.namespace("a").history()] == ["two"]
        store.add_texts(["four"], ids=[number])
        store.delete()
        assert memory.namespace("a").history() == []


# -- the forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SECRETS)
def test_each_form_is_found_wherever_it_stands(kind):
    text, secret = SECRETS[kind]
    for around in ("{}", "see: {}.", "({})", "东京{} 。", '{{"a": "{}"}}', "\n{}\n"):
        left = secrets(around.format(text))
        assert secret not in left
        assert f"[REDACTED:{kind}]" in left
        assert secrets(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "My password is the name of my cat, and that is my secret: nobody knows.",
        "Use https://example.com:8080/@user and mail to anna@example.com: it is her token of love.",
        "0191e7a2-8c3b-7f11-9d4e-426614174000 4111 1111 1111 1112 1234567890123456 2023-05-08 13:56:00",
        "def f(password: str, api_key=None): sk-learn ghp_ hf_hub AKIA eyJ xoxo Bearer of news",
        "Call +47 411 11 111, order 5555-5555, ISBN 978-3-16-148410-0.",
    ],
)  # fmt: skip
def test_ordinary_text_is_left_as_it_is(text):
    assert secrets(text) == text


def test_real_conversations_and_books_are_left_as_they_are(shared_data):
    def texts(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from texts(inner)

    everything = [*texts(json.loads((shared_data / "locomo_dev.json").read_text("utf-8")))]
    everything.append((shared_data / "jane_eyre.txt").read_text("utf-8"))
    assert [text for text in everything if "[REDACTED" in secrets(text)] == []


PIECES = [
    *"aA1 -_.:/@=\"'\n",
    "sk-",
    "eyJ",
    "://",
    "4111",
    "password",
    "bearer ",
    *(text for text, _ in SECRETS.values()),
]


@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_once_is_enough(text):
    assert secrets(secrets(text)) == secrets(text)
