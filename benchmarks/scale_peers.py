"""The systems that ``memos bench scale`` measures: us and the peers, each behind the same few verbs.

A peer's packages are imported when it is opened; none of them is a dependency.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from memory_os.benchmarks.scale_data import LookUp

if TYPE_CHECKING:
    from memory_os.protocols import Matrix

__all__ = ["ON_SERVER", "PEERS", "SYSTEMS", "System"]


class System:
    """What stores texts by namespace and finds them again.

    :param folder: where it may keep files; its name is this run's alone.
    :param url: of a database server, for a system that needs one.
    """

    persistent: ClassVar[bool] = True
    package: ClassVar[str] = ""
    modules: ClassVar[tuple[str, ...]] = ()

    def __init__(self, folder: Path, url: str = "") -> None:
        self.folder, self.url = folder, url
        self.encoder = LookUp()
        self.context: Callable[[str, str], object] | None = None
        self.nearest: Callable[[str, str, int], list[float]] | None = None

    @classmethod
    def check(cls) -> None:
        """:raises ImportError: if its packages are not installed."""
        for module in cls.modules:
            importlib.import_module(module)

    def open(self) -> None:
        """Begin, or go on with what the folder holds."""
        raise NotImplementedError

    def add(self, name: str, texts: list[str], vectors: Matrix) -> dict[str, float]:
        """Store texts in a namespace; seconds by part of the work, where there are parts."""
        raise NotImplementedError

    def search(self, name: str, query: str, k: int) -> Sequence[object]:
        """The ``k`` best of a namespace."""
        raise NotImplementedError

    def settle(self, names: Sequence[str]) -> None:
        """Do now what the first search would do."""

    def bytes_on_disk(self) -> int:
        """What it keeps, in bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def close(self) -> None:
        """Let go of everything."""


class MemoryOS(System):
    """Ours, on SQLite."""

    def open(self) -> None:
        """Open the database."""
        from memory_os import Memory

        self._memory = Memory.open(self._place(), embedder=self.encoder, vectors=self._vectors)
        self._n = 0
        self.context = lambda name, query: self._memory.namespace(*self._labels(name)).context(query, budget=1024)
        self.nearest = lambda name, query, k: [
            cosine
            for _, cosine in self._memory.parts.index.search(self._labels(name), self.encoder.embed_query(query), k)
        ]

    _vectors = "exact"

    def _place(self) -> Path | str:
        return self.folder / "memory.db"

    def _labels(self, name: str) -> tuple[str, ...]:
        return (name,)

    def add(self, name: str, texts: list[str], vectors: Matrix) -> dict[str, float]:
        """Two durable steps: the records with their lexical entries, and their vectors."""
        from memory_os import NewSegment

        new = [NewSegment(text, f"s{(self._n + i) // 20}") for i, text in enumerate(texts)]
        self._n += len(new)
        start = time.perf_counter()
        stored = self._memory.namespace(*self._labels(name)).add_many(new, embed=False)
        between = time.perf_counter()
        fingerprint = self.encoder.fingerprint
        ids = [segment.id for segment in stored]
        self._memory.parts.store.put_vectors(self._labels(name), fingerprint, ids, vectors)
        return {"records": between - start, "vectors": time.perf_counter() - between}

    def search(self, name: str, query: str, k: int) -> Sequence[object]:
        """``Scope.search``."""
        return self._memory.namespace(*self._labels(name)).search(query, k=k)

    def settle(self, names: Sequence[str]) -> None:
        """Write the files of vectors."""
        for name in names:
            self._memory.parts.index.sync(self._labels(name))

    def close(self) -> None:
        """Close the memory."""
        self._memory.close()


class OnPostgres(MemoryOS):
    """Ours, in a PostgreSQL database: each run in namespaces of its own, which stay there."""

    def open(self) -> None:
        """Open the database."""
        super().open()
        self._before = self._size()

    def _place(self) -> Path | str:
        return self.url

    def _labels(self, name: str) -> tuple[str, ...]:
        return (self.folder.name, name)

    def bytes_on_disk(self) -> int:
        """By how much the database grew since it was opened."""
        return self._size() - self._before

    def _size(self) -> int:
        store: Any = self._memory.parts.store
        return int(store.database.size_bytes())


class OnPgvector(OnPostgres):
    """The same, searched by pgvector."""

    _vectors = "pgvector"


class Chroma(System):
    """LangChain's Chroma, in a folder."""

    package = "langchain-chroma"
    modules = ("langchain_chroma",)

    def open(self) -> None:
        """Open the collections when they are used."""
        from chromadb.config import Settings

        self._settings = Settings(anonymized_telemetry=False, is_persistent=True, persist_directory=str(self.folder))
        self._stores: dict[str, Any] = {}

    def _store(self, name: str) -> Any:
        if name not in self._stores:
            self._stores[name] = importlib.import_module("langchain_chroma").Chroma(
                f"collection-{name}", embedding_function=_Lists(self.encoder), client_settings=self._settings,
                persist_directory=str(self.folder), collection_metadata={"hnsw:space": "cosine"},
            )  # fmt: skip
        return self._stores[name]

    def add(self, name: str, texts: list[str], vectors: Matrix) -> dict[str, float]:
        """``add_texts``."""
        self._store(name).add_texts(texts)
        return {}

    def search(self, name: str, query: str, k: int) -> Sequence[object]:
        """``similarity_search_with_score``."""
        found: list[object] = self._store(name).similarity_search_with_score(query, k=k)
        self.nearest = self._nearest
        return found

    def _nearest(self, name: str, query: str, k: int) -> list[float]:
        return [1.0 - float(distance) for _, distance in self._store(name).similarity_search_with_score(query, k=k)]


class InMemory(System):
    """LangGraph's InMemoryStore."""

    persistent = False
    package = "langgraph"
    modules: ClassVar[tuple[str, ...]] = ("langgraph.store.memory",)

    def open(self) -> None:
        """An empty store."""
        from langgraph.store.memory import InMemoryStore

        self._store: Any = InMemoryStore(index=_index(self.encoder))
        self._n = 0

    def add(self, name: str, texts: list[str], vectors: Matrix) -> dict[str, float]:
        """``batch`` of puts."""
        from langgraph.store.base import PutOp

        self._store.batch([PutOp((name,), str(self._n + i), {"text": text}) for i, text in enumerate(texts)])
        self._n += len(texts)
        return {}

    def search(self, name: str, query: str, k: int) -> Sequence[object]:
        """``search`` by meaning."""
        found: list[Any] = self._store.search((name,), query=query, limit=k)
        self.nearest = lambda name, query, k: [
            float(item.score) for item in self._store.search((name,), query=query, limit=k)
        ]
        return found


class Sqlite(InMemory):
    """LangGraph's SqliteStore."""

    persistent = True
    package = "langgraph-checkpoint-sqlite"
    modules = ("langgraph.store.sqlite", "sqlite_vec")

    def open(self) -> None:
        """Open the database."""
        import sqlite3

        from langgraph.store.sqlite import SqliteStore

        # a Python whose sqlite3 cannot load sqlite-vec: the same from the package pysqlite3-binary
        own = hasattr(sqlite3.Connection, "enable_load_extension")
        driver: Any = sqlite3 if own else importlib.import_module("pysqlite3")
        self._connection = driver.connect(str(self.folder / "store.db"), check_same_thread=False, isolation_level=None)
        self._store = SqliteStore(self._connection, index=_index(self.encoder))
        self._store.setup()
        self._n = 0

    def close(self) -> None:
        """Close the database."""
        self._connection.close()


class Mem0(System):
    """mem0 with ``infer=False``: no LLM takes part. Its default store, Qdrant in a folder."""

    package = "mem0ai"
    modules = ("mem0", "langchain")

    def open(self) -> None:
        """Open the memory."""
        os.environ["MEM0_TELEMETRY"] = "False"
        os.environ["MEM0_DIR"] = str(self.folder / "mem0")
        os.environ.setdefault("OPENAI_API_KEY", "no-llm-takes-part")
        config = {
            "vector_store": {
                "provider": "qdrant",
                "config": {
                    "collection_name": "scale", "path": str(self.folder / "qdrant"), "on_disk": True,
                    "embedding_model_dims": self.encoder.dimension,
                },
            },
            "embedder": {"provider": "langchain", "config": {"model": _embeddings(self.encoder)}},
            "history_db_path": str(self.folder / "history.db"),
        }  # fmt: skip
        self._memory: Any = importlib.import_module("mem0").Memory.from_config(config)

    def add(self, name: str, texts: list[str], vectors: Matrix) -> dict[str, float]:
        """``add`` of the texts as messages of one call."""
        for start in range(0, len(texts), 100):
            messages = [{"role": "user", "content": text} for text in texts[start : start + 100]]
            self._memory.add(messages, user_id=name, infer=False)
        return {}

    def search(self, name: str, query: str, k: int) -> Sequence[object]:
        """``search``."""
        found: list[object] = self._memory.search(query, top_k=k, filters={"user_id": name}, threshold=0.0)["results"]
        return found

    def close(self) -> None:
        """Close Qdrant, which owns its folder."""
        self._memory.vector_store.client.close()


class _Lists:
    """LangChain's form of an embedder: lists of numbers."""

    def __init__(self, encoder: LookUp) -> None:
        self._encoder = encoder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        # LangGraph's SqliteStore embeds the JSON of the whole value, whatever the fields
        plain = [json.loads(text)["text"] if text.startswith('{"text"') else text for text in texts]
        found: list[list[float]] = self._encoder.embed_documents(plain).tolist()
        return found

    def embed_query(self, text: str) -> list[float]:
        found: list[float] = self._encoder.embed_query(text).tolist()
        return found


def _embeddings(encoder: LookUp) -> Any:
    from langchain_core.embeddings import Embeddings

    return type("LookUpEmbeddings", (_Lists, Embeddings), {})(encoder)


def _index(encoder: LookUp) -> Any:
    return {"dims": encoder.dimension, "embed": _embeddings(encoder), "fields": ["text"]}


PEERS: dict[str, type[System]] = {
    "chroma": Chroma, "langgraph-memory": InMemory, "langgraph-sqlite": Sqlite, "mem0": Mem0,
}  # fmt: skip
ON_SERVER: dict[str, type[System]] = {"memory_os on PostgreSQL": OnPostgres, "memory_os on pgvector": OnPgvector}
SYSTEMS: dict[str, type[System]] = {"memory_os": MemoryOS, **ON_SERVER, **PEERS}
