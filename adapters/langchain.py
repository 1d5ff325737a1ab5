"""Memory in LangChain's own parts: retriever, vector store, chat model, tools, and chat history.

They need ``langchain-core`` only. For agents see ``middleware.py``, for LangGraph's store ``langgraph.py``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uuid_utils
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables.config import ensure_config
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from pydantic import Field

from memory_os.adapters.chat_history import MemoryChatHistory
from memory_os.adapters.chat_llm import ChatLLM
from memory_os.adapters.chat_model import MemoryChatModel
from memory_os.adapters.configurable import AMemory, Labels, labels_of, memory_of, pinned
from memory_os.adapters.langchain_models import LangChainEmbedder, LangChainLLM
from memory_os.adapters.tools import memory_tools
from memory_os.errors import ConfigError, InvalidInputError
from memory_os.memory import NO_LIMIT, Memory
from memory_os.redact import digest_of
from memory_os.types import NewSegment, Segment

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

DOCUMENT = "document:"
"""With this begins the key of a document's segment, so that no other key can be taken for it."""


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

    memory: AMemory
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
    """A segment with its provenance, and metadata of its own beside it.

    Where names clash, provenance has the name, and what was stored stands whole under ``stored``.
    """
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
    if told.keys() & segment.metadata.keys():
        told["stored"] = dict(segment.metadata)
    content = segment.text if text is None else text
    return Document(id=segment.id, page_content=content, metadata={**segment.metadata, **told})


class MemoryVectorStore(VectorStore):
    """A namespace's records by embedding alone: what is added are documents of memory, which recall finds as well.

    Scores are cosines, higher is better. Adding under an id that is known replaces what was there.

    :param memory: what ``Memory.open`` or ``AsyncMemory.open`` gives; its embedder is the one that is used.
    :param namespace: labels; without it each run names its own: ``config={"configurable": {"namespace": (...)}}``.
    :param session: what this store's documents are kept under. Ids are unique in it, and ``delete`` deletes in it.
    """

    def __init__(
        self, memory: Memory | AsyncMemory, *, namespace: Sequence[str] | None = None, session: str = "documents"
    ) -> None:
        self.memory = memory_of(memory)
        self.session = session
        self.namespace = pinned(namespace)

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

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Store texts as documents, all or none; see ``add_documents``."""
        listed = list(texts)
        if metadatas and len(metadatas) != len(listed):
            raise InvalidInputError(f"there are {len(metadatas)} metadatas for {len(listed)} texts; give one for each")
        documents = [
            Document(page_content=text, metadata=metadata)
            for text, metadata in zip(listed, metadatas or [{}] * len(listed), strict=True)
        ]
        return self.add_documents(documents, ids=ids)

    def add_documents(
        self, documents: Iterable[Document], *, ids: Sequence[str | None] | None = None, **kwargs: Any
    ) -> list[str]:
        """Store documents, all or none; their ids, made where neither ``ids`` nor the document has one.

        :raises InvalidInputError: for ids of another number, an empty text, or metadata that is no JSON.
        """
        listed = list(documents)
        if ids is not None and len(ids) != len(listed):
            raise InvalidInputError(f"there are {len(ids)} ids for {len(listed)} documents; give one for each")
        given = ids if ids is not None else [None] * len(listed)
        names = [id_ or document.id or str(uuid_utils.uuid7()) for id_, document in zip(given, listed, strict=True)]
        self._scope().replace_many(
            [
                NewSegment(
                    document.page_content,
                    self.session,
                    kind="document",
                    metadata=document.metadata,
                    key=self._key(name),
                )
                for name, document in zip(names, listed, strict=True)
            ]
        )
        return names

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete documents, and what is derived from them; ids that are not there are passed over.

        :param ids: of documents, or of their segments; all documents of this store if not given.
        :raises ConfigError: for one id in place of a list.
        """
        if isinstance(ids, str):
            raise ConfigError(f"delete takes a list of ids; write [{ids!r}]")
        scope = self._scope()
        if ids is None:
            found = scope.session(self.session).history(NO_LIMIT)
        else:
            found = list(scope.lookup(name for id_ in ids for name in (self._key(id_), id_)).values())
        if mine := {segment.id for segment in found if self._id_in_store(segment) is not None}:
            scope.forget(*mine)
        return True

    def _key(self, id_: str) -> str:
        return DOCUMENT + json.dumps([self.session, self._kept(id_)])

    def _kept(self, id_: str) -> str:
        """The id as it can be kept: its digest, where it holds what is to be redacted."""
        key = DOCUMENT + json.dumps([self.session, id_])
        return id_ if self.memory.parts.store.redacted(key) == key else digest_of(id_)

    def _id_in_store(self, segment: Segment) -> str | None:
        """The id under which this store has added it; ``None`` for any other record."""
        if not (segment.key or "").startswith(DOCUMENT):
            return None
        session, id_ = json.loads(str(segment.key).removeprefix(DOCUMENT))
        return str(id_) if session == self.session else None

    def _plain(self, segment: Segment) -> Document:
        """A record as it was added."""
        id_ = self._id_in_store(segment)
        return Document(
            id=segment.id if id_ is None else id_, page_content=segment.text, metadata=dict(segment.metadata)
        )

    # -- read ------------------------------------------------------------------------------------------------------

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents that exist, in the order of their ids."""
        found = self._scope().lookup(name for id_ in ids for name in (self._key(id_), id_))
        there = [found.get(self._key(id_)) or found.get(id_) for id_ in ids]
        documents = [self._plain(segment) for segment in there if segment]
        kept = {*ids, *map(self._kept, ids)}
        return [document for document in documents if document.id in kept]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The ``k`` nearest documents.

        :param filter: a dictionary of metadata that they must have, or a function of a document.
        """
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> list[tuple[Document, float]]:
        """The ``k`` nearest documents with their cosines."""
        return [(self._plain(hit.segment), hit.score) for hit in self._nearest(query, k, **kwargs)]

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """The ``k`` documents nearest to a vector of the memory's embedder."""
        return [self._plain(hit.segment) for hit in self._nearest(embedding, k, **kwargs)]

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
        return [self._plain(hits[n].segment) for n in chosen]

    def _nearest(
        self,
        query: str | list[float],
        k: int,
        filter: Mapping[str, Any] | Callable[[Document], bool] | None = None,
    ) -> list[Hit]:
        if not (filter is None or callable(filter) or isinstance(filter, Mapping)):
            raise ConfigError(f"filter is metadata that documents must have, or a function of one, not {filter!r}")

        def accepted(segment: Segment) -> bool:
            if callable(filter):
                return filter(self._plain(segment))
            told = segment.metadata
            return all(name in told and told[name] == value for name, value in (filter or {}).items())

        return self._scope().nearest(query, k=k, where=None if filter is None else accepted, complete=True)

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
