"""Memory in LangChain's own parts: retriever, vector store, chat model, tools, and chat history.

They need ``langchain-core`` only. For agents see ``middleware.py``, for LangGraph's store ``langgraph.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import uuid_utils
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables.config import ensure_config
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from pydantic import BeforeValidator, Field

from memory_os.adapters.chat_history import MemoryChatHistory
from memory_os.adapters.chat_llm import ChatLLM
from memory_os.adapters.chat_model import MemoryChatModel
from memory_os.adapters.configurable import labels_of, opened
from memory_os.adapters.langchain_models import LangChainEmbedder, LangChainLLM
from memory_os.adapters.tools import memory_tools
from memory_os.errors import ConfigError, InvalidInputError
from memory_os.memory import Memory
from memory_os.types import NewSegment, Segment, as_namespace

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
    from langchain_core.runnables import RunnableConfig

    from memory_os.aio import AsyncMemory
    from memory_os.memory import Scope
    from memory_os.protocols import Embedder
    from memory_os.types import Hit

__all__ = [
    "ChatLLM",
    "LangChainEmbedder",
    "LangChainLLM",
    "MemoryChatHistory",
    "MemoryChatModel",
    "MemoryEmbeddings",
    "MemoryRetriever",
    "MemoryVectorStore",
    "memory_tools",
]

Opened = Annotated[Memory, BeforeValidator(opened)]
Labels = Annotated[
    tuple[str, ...] | None, BeforeValidator(lambda given: None if given is None else as_namespace(given))
]

DOCUMENT = "document:"
"""What a document's id has before it in the key of its segment, so that no other key can be taken for it."""


class MemoryRetriever(BaseRetriever):
    """What memory holds for a query, as documents.

    Their ids are those of the segments; their metadata says who said it, when, and why it was found, and can be written
    as JSON. With ``k`` the best come first; with ``budget_tokens`` they are what the memory's controller would put into
    a context, in the order in which they were said.

    :param memory: what ``Memory.open`` or ``AsyncMemory.open`` gives.
    :param namespace: labels; without it each call names its own: ``config={"configurable": {"namespace": (...)}}``.
    :param k: how many documents; fewer only where the namespace holds fewer. Also ``invoke(..., k=8)``.
    :param budget_tokens: in place of ``k``, most tokens of all texts together, in the memory's tokenizer. Also
        ``invoke(..., budget_tokens=500)``.
    """

    memory: Opened
    namespace: Labels = None
    k: int = Field(default=4, ge=1)
    budget_tokens: int | None = Field(default=None, ge=1)

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """The documents for a query.

        :raises NamespaceError: if neither the retriever nor the call names a namespace.
        """
        return super().invoke(input, config, **kwargs, given=ensure_config(config))

    async def ainvoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """The documents for a query.

        :raises NamespaceError: if neither the retriever nor the call names a namespace.
        """
        return await super().ainvoke(input, config, **kwargs, given=ensure_config(config))

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        budget_tokens: int | None = None,
        given: RunnableConfig | None = None,
    ) -> list[Document]:
        scope = self.memory.namespace(*labels_of(self.namespace, given))
        if k is not None and budget_tokens is not None:
            raise ConfigError("give the retriever either k or budget_tokens, not both")
        budget = self.budget_tokens if budget_tokens is None and k is None else budget_tokens
        if budget is not None:
            return self._within(scope, query, budget)
        hits = scope.search(query, k=self.k if k is None else k)
        return [_as_document(hit.segment, hit.score, hit.contributions) for hit in hits]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return await asyncio.to_thread(
            self._get_relevant_documents, query, run_manager=run_manager.get_sync(), **kwargs
        )

    def _within(self, scope: Scope, query: str, budget: int) -> list[Document]:
        """What the controller would show, no more tokens of text than ``budget``, joined by blank lines."""
        context = scope.context(query, memory_tokens=budget)
        entries = {entry.segment_id: entry for entry in context.ledger}
        found = [
            (entries[segment.id], segment, text) for segment, text in zip(context.segments, context.shown, strict=True)
        ]
        count = self.memory.parts.counter.count_text
        while found and count("\n\n".join(text for _, _, text in found)) > budget:  # what stands in a fence costs more
            found.remove(max(found, key=lambda each: each[0].rank))
        return [
            _as_document(segment, entry.score, entry.contributions, text, form=str(entry.form), n_tokens=entry.n_tokens)
            for entry, segment, text in found
        ]


def _as_document(
    segment: Segment, score: float, contributions: Mapping[str, float], text: str | None = None, **more: Any
) -> Document:
    """A segment with its provenance; metadata of its own stands beside it, under its own names."""
    told = {
        "namespace": list(segment.namespace),
        "session": segment.session,
        "seq": segment.seq,
        "kind": segment.kind,
        "role": segment.role,
        "speaker": segment.who,
        "date": segment.created_at.isoformat(),
        "score": score,
        "contributions": dict(contributions),
        **({"source": segment.source} if segment.source else {}),
        **({"offset": list(segment.offset)} if segment.offset else {}),
        **more,
    }
    return Document(
        id=segment.id, page_content=segment.text if text is None else text, metadata={**segment.metadata, **told}
    )


class MemoryVectorStore(VectorStore):
    """A namespace's records by embedding alone: what is added are documents of memory, which recall finds as well.

    Scores are cosines, higher is better. Adding under an id that is known replaces what was there.

    :param memory: what ``Memory.open`` or ``AsyncMemory.open`` gives; its embedder is the one that is used.
    :param namespace: labels; without it each run names its own: ``config={"configurable": {"namespace": (...)}}``.
    :param session: what the documents are kept under, and what ``delete()`` without ids removes.
    """

    def __init__(
        self, memory: Memory | AsyncMemory, *, namespace: Sequence[str] | None = None, session: str = "documents"
    ) -> None:
        self.memory = opened(memory)
        self.session = session
        self.namespace = None if namespace is None else labels_of(namespace)

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        path: str | Path | None = None,
        namespace: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> MemoryVectorStore:
        """Open the memory at a path with these embeddings and add the texts; ``store.memory.close()`` when done.

        :raises ConfigError: without a path.
        """
        if path is None:
            raise ConfigError('name the file to keep the texts in: from_texts(..., path="memory.db", namespace=(...))')
        store = cls(Memory.open(path, embedder=embedding), namespace=namespace, **kwargs)
        try:
            store.add_texts(texts, metadatas, ids=ids)
        except BaseException:
            store.memory.close()
            raise
        return store

    @property
    def embeddings(self) -> Embeddings:
        """The memory's embedder, as LangChain's embeddings."""
        embedder = self.memory.parts.embedder
        return embedder.embeddings if isinstance(embedder, LangChainEmbedder) else MemoryEmbeddings(embedder)

    def _scope(self) -> Scope:
        return self.memory.namespace(*labels_of(self.namespace))

    # -- write -----------------------------------------------------------------------------------------------------

    def add_documents(self, documents: list[Document], *, ids: list[str] | None = None, **kwargs: Any) -> list[str]:
        """Store documents, all or none; their ids, made where neither ``ids`` nor the document has one.

        :raises InvalidInputError: for ids of another number, an empty text, or metadata that is no JSON.
        """
        if ids is not None and len(ids) != len(documents):
            raise InvalidInputError(f"there are {len(ids)} ids for {len(documents)} documents; give one for each")
        given: Sequence[str | None] = ids if ids is not None else [None] * len(documents)
        names = [id_ or document.id or str(uuid_utils.uuid7()) for id_, document in zip(given, documents, strict=True)]
        self._scope().replace_many(
            [
                NewSegment(
                    document.page_content,
                    self.session,
                    kind="document",
                    metadata=document.metadata,
                    key=DOCUMENT + name,
                )
                for name, document in zip(names, documents, strict=True)
            ]
        )
        return names

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete documents, and what is derived from them; ids that are not there are passed over.

        :param ids: all documents of this store if not given; other records of the namespace stay.
        """
        scope = self._scope()
        if ids is not None:
            if found := {segment.id for segment in scope.lookup(_keys(ids)).values() if _id_of(segment) in ids}:
                scope.forget(*found)
        elif scope.session(self.session).history(1):
            scope.forget(session=self.session)
        return True

    # -- read ------------------------------------------------------------------------------------------------------

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents that exist, in the order of their ids."""
        found = {_id_of(segment): segment for segment in self._scope().lookup(_keys(ids)).values()}
        return [_plain(found[id_]) for id_ in ids if id_ in found]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The ``k`` nearest documents.

        :param filter: a dictionary of metadata that they must have, or a function of a document.
        """
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> list[tuple[Document, float]]:
        """The ``k`` nearest documents with their cosines."""
        return [(_plain(hit.segment), hit.score) for hit in self._nearest(query, k, **kwargs)]

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """The ``k`` documents nearest to a vector of the memory's embedder."""
        return [_plain(hit.segment) for hit in self._nearest(embedding, k, **kwargs)]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Of the ``fetch_k`` nearest documents ``k`` that are also unlike each other."""
        vector = self.memory.parts.embedder.embed_query(query).tolist()
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, **kwargs)

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Of the ``fetch_k`` documents nearest to a vector ``k`` that are also unlike each other."""
        import numpy as np

        hits = self._nearest(embedding, fetch_k, **kwargs)
        if not hits:
            return []
        vectors = self.memory.parts.embedder.embed_documents([hit.segment.text for hit in hits])
        chosen = maximal_marginal_relevance(np.asarray(embedding), list(vectors), k=k, lambda_mult=lambda_mult)
        return [_plain(hits[n].segment) for n in chosen]

    def _nearest(
        self,
        query: str | list[float],
        k: int,
        filter: Mapping[str, Any] | Callable[[Document], bool] | None = None,
    ) -> list[Hit]:
        return self._scope().nearest(query, k=k, where=None if filter is None else _where(filter))

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: min(1.0, max(0.0, cosine))


class MemoryEmbeddings(Embeddings):
    """An embedder of memory_os as LangChain's embeddings."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Unit vectors of stored text."""
        vectors: list[list[float]] = self.embedder.embed_documents(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The unit vector of a question."""
        vector: list[float] = self.embedder.embed_query(text).tolist()
        return vector


def _keys(ids: Iterable[str]) -> list[str]:
    """Under what the records with these ids may be: documents by key, all others by the segment's own id."""
    return [name for id_ in ids for name in (DOCUMENT + id_, id_)]


def _id_of(segment: Segment) -> str:
    key = segment.key or ""
    return key.removeprefix(DOCUMENT) if key.startswith(DOCUMENT) else segment.id


def _plain(segment: Segment) -> Document:
    """A record as it was added."""
    return Document(id=_id_of(segment), page_content=segment.text, metadata=dict(segment.metadata))


def _where(filter: Mapping[str, Any] | Callable[[Document], bool]) -> Callable[[Segment], bool]:
    if callable(filter):
        return lambda segment: filter(_plain(segment))
    return lambda segment: all(
        name in segment.metadata and segment.metadata[name] == value for name, value in filter.items()
    )
