"""An embedder that fails fails no write, so that nobody stores it twice; reads go by words, and say so."""

import logging

import pytest

from memory_os import Memory
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.types import NewSegment

NOTE = "the embedder failed (ConnectionError: the embedder is away): recall went by words alone"


class Away(HashEmbedder):
    """Fails while it is down, in whatever it is asked."""

    down = True

    def embed_documents(self, texts):
        self._check()
        return super().embed_documents(texts)

    def embed_query(self, text):
        self._check()
        return super().embed_documents([text])[0]

    def _check(self) -> None:
        if self.down:
            raise ConnectionError("the embedder is away")


def said(messages) -> str:
    return "Noted."


@pytest.fixture
def memory(tmp_path):
    with Memory.open(tmp_path / "memory.db", embedder=Away(64), llm=ScriptedLLM(said)) as memory:
        yield memory


WRITES = {
    "add": lambda scope, file: scope.add("The door code is 4711."),
    "add_many": lambda scope, file: scope.add_many([NewSegment("The door code is 4711.", "s")]),
    "replace_many": lambda scope, file: scope.replace_many([NewSegment("The door code is 4711.", "s", key="k")]),
    "ingest": lambda scope, file: scope.ingest(file),
    "context": lambda scope, file: scope.context("The door code is 4711.", record=True),
    "put": lambda scope, file: scope.items.put(("p",), "k", {"n": 1}, texts=[("n", "The door code is 4711.")]),
    "chat": lambda scope, file: scope.chat("The door code is 4711."),
    "summarize": lambda scope, file: scope.summarize(file),
}


@pytest.mark.parametrize("verb", WRITES)
def test_what_is_stored_is_acknowledged(memory, tmp_path, verb, caplog):
    (tmp_path / "notes.txt").write_text("The door code is 4711.\n")
    scope = memory.namespace("a")
    with caplog.at_level(logging.WARNING, "memory_os"):
        WRITES[verb](scope, tmp_path / "notes.txt")
    assert "ConnectionError" in caplog.text
    assert "the embedder is away" not in caplog.text  # its words may repeat the text
    stored = [segment.text.strip() for segment in scope.history()]
    assert stored.count("The door code is 4711.") == (verb != "put")
    assert memory.pending() == {("a",): max(1, len(stored))}
    memory.parts.embedder.down = False
    assert scope.nearest("door code", k=9) or verb == "put"
    assert scope.items.search(query="door code") or verb != "put"
    assert memory.pending() == {}
    assert not any(memory.check().values())


@pytest.mark.parametrize("controller", ["auto", "scm", "alr2"])
def test_reads_go_by_words_and_say_so(tmp_path, controller):
    embedder = Away(64)
    embedder.down = False
    with Memory.open(tmp_path / "memory.db", embedder=embedder, llm=ScriptedLLM(said), controller=controller) as memory:
        scope = memory.namespace("a")
        scope.add("The door code is 4711. The gate is green.")
        scope.add_many([NewSegment(f"A kite flies at {n}. It lands at noon.", "s") for n in range(20)])
        embedder.down = True
        assert NOTE in scope.context("What is the door code?").trace.notes
        assert NOTE in scope.chat("What is the door code?").trace.notes
        assert "4711" in scope.context("What is the door code?").text or controller != "auto"


def test_search_goes_by_words_with_a_warning_and_nearest_raises(memory, caplog):
    memory.parts.embedder.down = False
    scope = memory.namespace("a")
    scope.add_many([NewSegment(f"kite number {n}", "s") for n in range(20)])
    vector = memory.parts.embedder.embed_query("kite").tolist()
    memory.parts.embedder.down = True
    with caplog.at_level(logging.WARNING, "memory_os"):
        assert scope.search("number 7")[0].segment.text == "kite number 7"
    assert "the embedder failed (ConnectionError): recall went by words alone" in caplog.text
    with pytest.raises(ConnectionError):
        scope.nearest("kite")
    scope.add("a boat")
    with pytest.raises(ConnectionError):  # what has no vector would not be found, and nobody would know
        scope.nearest(vector)
    with pytest.raises(ConnectionError):
        scope.items.search(query="kite")


def test_ranks_are_fused_without_it(memory, monkeypatch):
    import memory_os.recall

    monkeypatch.setattr(memory_os.recall, "MAX_SEGMENTS", 2)
    scope = memory.namespace("a")
    scope.add_many([NewSegment(f"kite number {n}", "s") for n in range(20)])
    context = scope.context("number 7")
    assert NOTE in context.trace.notes
    assert "kite number 7" in context.text
