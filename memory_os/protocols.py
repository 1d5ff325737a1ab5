"""The seams: what the turn asks of stores, models and controllers, in the turn's own words.

Conventions that hold for every implementation, kept by the contract tests: scores are higher-is-better; vectors are
float32 of unit length; results come best first, ties by the smaller ``seq``; empty in, empty out; every method may be
called from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from memory_os.types import (
    BankOptions,
    CachedPrompt,
    Candidate,
    Certainty,
    Decision,
    Form,
    Kind,
    Message,
    Namespace,
    NewSegment,
    Segment,
    Trace,
)

if TYPE_CHECKING:
    from datetime import datetime

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from memory_os.archive import Archive

    Ints = NDArray[np.int64]
    Vector = NDArray[np.float32]
    Matrix = NDArray[np.float32]
    Matrix3 = NDArray[np.float32]

__all__ = [
    "KV",
    "LLM",
    "Bank",
    "BankStatus",
    "CachingLLM",
    "CitingController",
    "Controller",
    "Deleted",
    "Embedder",
    "EmbedderPool",
    "FlashController",
    "Item",
    "ItemChange",
    "ItemPath",
    "ItemStore",
    "Job",
    "KeptIndex",
    "LexicalIndex",
    "MemoryView",
    "Profiles",
    "QuestionScoringLLM",
    "QueueStatus",
    "Reading",
    "RecordStore",
    "ScoringLLM",
    "SizedLLM",
    "State",
    "StructuredLLM",
    "SummarizingController",
    "TokenCounter",
    "TokenEmbedder",
    "TokenQuery",
    "VectorIndex",
    "VectorRows",
    "VectorSource",
    "WorkQueue",
    "WorkerStatus",
    "vectors_of",
]


class TokenCounter(Protocol):
    """Counts tokens as one target model does."""

    @property
    def name(self) -> str:
        """The model or encoding that is counted for."""

    @property
    def exact(self) -> bool:
        """``False`` when the count is an approximation; the trace then says so."""

    def count_text(self, text: str) -> int:
        """Tokens of ``text`` alone, special tokens read as plain text."""

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Tokens of the whole rendered prompt: chat template, wrappers, tool schemas and generation cue included."""


@runtime_checkable
class LLM(TokenCounter, Protocol):
    """A chat model. It raises ``LLMError`` for a failure of its own and nothing else."""

    @property
    def context_window(self) -> int:
        """Most tokens of prompt and reply together."""

    def generate(self, messages: Sequence[Message], *, max_tokens: int, stop: Sequence[str] = ()) -> Iterator[str]:
        """Yield the reply piece by piece, at most ``max_tokens`` tokens, ending before any of ``stop``.

        Closing the iterator stops the model.
        """


@runtime_checkable
class StructuredLLM(LLM, Protocol):
    """An LLM that can be held to a JSON schema."""

    def generate_structured(self, messages: Sequence[Message], schema: Mapping[str, Any], *, max_tokens: int) -> str:
        """The whole reply, JSON after the schema; one that reached ``max_tokens`` may be cut off.

        :param schema: a JSON schema whose top is an object, with a ``title``.
        :raises CapabilityError: if this model, or the server behind it, turns out not to offer it.
        """


@runtime_checkable
class SizedLLM(LLM, Protocol):
    """An LLM that tells how large it is."""

    def n_parameters(self) -> int:
        """How many parameters it has."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an LLM expects after it has read a segment, a question, and the beginning of the answer.

    :param next_token: log-probabilities (nats) of the next token, in any order: of the whole vocabulary, or of the
        likeliest tokens only.
    :param complete: whether they are those of the whole vocabulary.
    :param question: log-probability (nats) of each token of the question after the segment, where it was asked for.
    """

    next_token: Vector
    complete: bool
    question: Vector | None = None


@runtime_checkable
class ScoringLLM(LLM, Protocol):
    """An LLM that shows its probabilities (XL3M)."""

    def fingerprint(self) -> str:
        """Changes whenever readings of before and after must not be compared."""

    def read(self, segments: Sequence[str], question: str, stem: str) -> Iterator[Reading]:
        """One reading for each segment, in order: the segment, the question, and the answer as far as ``stem``.

        :param stem: how the answer begins, up to where it would say what is asked for; may be empty.
        """


@runtime_checkable
class QuestionScoringLLM(ScoringLLM, Protocol):
    """A scoring LLM that also shows how likely a given text is."""

    def read_question(self, segments: Sequence[str], question: str, stem: str) -> Iterator[Reading]:
        """As ``read``, with ``Reading.question``."""


@dataclass(frozen=True, slots=True)
class KV:
    """Keys and values of a text in every layer of a frozen model.

    :param ids: the text's tokens.
    :param keys: before rotation, ``[layers, kv_heads, tokens, head_dim]``.
    :param values: of the same shape.
    :param surprisal: mean surprisal of the tenth of its tokens that were least expected, nats; ``None`` where it was
        not asked for.
    """

    ids: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor
    surprisal: float | None = None


@runtime_checkable
class CachingLLM(LLM, Protocol):
    """An LLM whose keys and values can be kept and injected (LongMem, training-free)."""

    def search_layer(self) -> int:
        """The layer whose keys tell best what a query is about, counted from 0."""

    def kv_fingerprint(self, prompt: CachedPrompt) -> str:
        """Changes whenever keys and values of before no longer fit: weights, tokenizer, RoPE, template, beginning.

        :raises CapabilityError: if this model's keys and values cannot be moved, or too much is lost by it.
        """

    def encode_kv(self, prompt: CachedPrompt, *, surprisal: bool = False) -> Iterator[KV]:
        """Keys and values of each line, in order, computed after the prompt's beginning alone."""

    def query_keys(self, text: str, layer: int) -> Matrix3:
        """What the tokens of a query look for: queries before rotation, ``[tokens, kv_heads, head_dim]`` float32."""

    def count_cached(self, prompt: CachedPrompt) -> int:
        """Tokens of the whole prompt, the cached ones included."""

    def generate_cached(
        self, prompt: CachedPrompt, memory: Sequence[KV], *, max_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """As ``generate``, with each line's keys and values in place of its text."""

    def continuations(self, prompt: CachedPrompt, memory: Sequence[KV], texts: Sequence[str]) -> list[float]:
        """How likely each text is to come next, as log-probability in nats, summed over its tokens."""


class BankStatus(NamedTuple):
    """What a namespace has in the bank.

    :param n_stale: entries of another model, system prompt or form; they leave first.
    """

    n_segments: int
    n_tokens: int
    n_bytes: int
    n_stale: int


class Bank(Protocol):
    """The bounded cache of keys and values by segment: derived, and rebuilt from the records at will.

    ``fingerprint`` is ``CachingLLM.kv_fingerprint``; entries under another one are never given back.
    """

    @property
    def options(self) -> BankOptions:
        """Its bounds and form."""

    def entries(self, namespace: Namespace, fingerprint: str) -> dict[str, int]:
        """``{segment id: tokens}`` of what is there, in the order of ``seq``."""

    def get(self, namespace: Namespace, fingerprint: str, ids: Sequence[str]) -> dict[str, KV]:
        """Those that are there and whole; a damaged one is removed. Counts as use."""

    def put(self, namespace: Namespace, fingerprint: str, entries: Mapping[str, KV], layer: int) -> list[str]:
        """Store, and let go what is over the bounds; gives back the ids that are not, or no longer, there.

        What would leave again at once is not written. Segments that do not exist are passed over.

        :param layer: whose keys are searched.
        """

    def search(self, namespace: Namespace, fingerprint: str, queries: Matrix3, k: int) -> list[tuple[str, float]]:
        """The ``k`` segments to which the tokens of a query attend most, with their share of the attention, in 0 to 1.

        Each token and head finds its ``k_chunks`` best chunks by inner product with the mean key.

        :param queries: ``CachingLLM.query_keys``.
        """

    def status(self, namespace: Namespace, fingerprint: str) -> BankStatus:
        """What is there now."""

    def release(self, namespace: Namespace) -> None:
        """Let go of what is in memory of segments that are gone."""

    def drop(self, namespace: Namespace) -> None:
        """Remove everything of the namespace."""

    def check(self) -> list[str]:
        """Faults of the whole bank: damaged entries, and files that belong to none. Read-only."""

    def repair(self) -> int:
        """Remove what ``check`` finds; gives back how much that was."""

    def close(self) -> None:
        """Let go of files and memory."""


class Embedder(Protocol):
    """Turns text into vectors."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever vectors of before and after must not be compared."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def embed_documents(self, texts: Sequence[str]) -> Matrix:
        """Vectors of stored text, shape ``[len(texts), dimension]``."""

    def embed_query(self, text: str) -> Vector:
        """Vector of a question, shape ``[dimension]``."""


@dataclass(frozen=True, slots=True)
class TokenQuery:
    """A question as late interaction needs it.

    :param vector: as ``Embedder.embed_query`` gives it.
    :param tokens: unit vectors of the tokens that carry meaning, ``[n, token_dimension]``.
    :param spans: where each of them stands in the text, as character offsets.
    """

    vector: Vector
    tokens: Matrix
    spans: tuple[tuple[int, int], ...]


@runtime_checkable
class TokenEmbedder(Protocol):
    """An embedder that also gives a vector for every token that carries meaning, for late interaction.

    A stored token vector is int8, its direction alone means something; ``token_dimension`` bytes each.
    """

    @property
    def token_dimension(self) -> int:
        """Length of a token's vector; 0 where this model gives none."""

    def embed_documents_by_token(self, texts: Sequence[str]) -> tuple[Matrix, list[bytes]]:
        """``embed_documents``, and each text's token vectors, ``[n, token_dimension]`` int8 in C order."""

    def embed_query_by_token(self, text: str) -> TokenQuery:
        """``embed_query``, with the vectors of its tokens."""

    def reads(self, text: str) -> bool:
        """Whether the model knows the script of the text; what it makes of one that it does not know is noise."""


def vectors_of(embedder: Embedder, texts: Sequence[str]) -> tuple[Matrix, list[bytes] | None]:
    """The texts' vectors, ``[len(texts), dimension]``, and their tokens' where the embedder gives any."""
    if isinstance(embedder, TokenEmbedder):
        return embedder.embed_documents_by_token(texts)
    return embedder.embed_documents(texts), None


class VectorRows(NamedTuple):
    """Rows of vectors, in the order in which they were added.

    :param rows: their numbers, rising, and never given twice.
    :param ids: of their segments, as ``seqs``.
    :param vectors: ``[n, dimension]``.
    """

    rows: NDArray[np.int64]
    ids: list[str]
    seqs: list[int]
    vectors: Matrix


class VectorSource(Protocol):
    """Where a vector index reads the rows that it is a projection of."""

    @property
    def id(self) -> str:
        """A name of the store that no other has, but for copies of it."""

    def namespaces(self, *, emptied: bool = False) -> list[Namespace]:
        """All that hold anything, in alphabetical order; with ``emptied`` also those that held something once."""

    def vector_epoch(self, namespace: Namespace, fingerprint: str) -> tuple[int, int]:
        """``(epoch, last)``: the epoch changes when rows went away or changed; ``last`` grows when rows are added."""

    def read_vectors(
        self, namespace: Namespace, fingerprint: str, after: int = 0
    ) -> tuple[list[str], list[int], Matrix, int]:
        """``(segment ids, seqs, vectors [n, dimension], last)`` of the rows added after ``after``."""

    def count_vectors(self, namespace: Namespace, fingerprint: str) -> int:
        """How many rows there are."""

    def vectors_of(
        self, namespace: Namespace, fingerprint: str, ids: Sequence[str]
    ) -> tuple[list[str], list[int], Matrix]:
        """``(segment ids, seqs, vectors)`` of the rows of these segments, of those that have one, in no order."""

    def read_vector_rows(self, namespace: Namespace, fingerprint: str, after: int, limit: int) -> VectorRows:
        """The first ``limit`` rows after row ``after``, with their numbers."""

    def vector_rows(self, namespace: Namespace, fingerprint: str) -> NDArray[np.int64]:
        """The numbers of all rows that there are, rising."""


class VectorIndex(Protocol):
    """Nearest segments by cosine. A projection of the vector rows: it may be dropped at any time and heals itself.

    One that can do less well than its name says tells so, for the latest search of this thread, by an attribute
    ``notes``.
    """

    def search(
        self, namespace: Namespace, vector: Vector, k: int, *, upto: int | None = None
    ) -> list[tuple[str, float]]:
        """The ``k`` best ``(segment id, cosine)`` among segments with ``seq <= upto``."""

    def similarities(self, namespace: Namespace, vector: Vector, ids: Sequence[str]) -> Vector:
        """The cosines of these segments, in their order, as of the last search; 0 for one that has no vector."""

    def ids(self, namespace: Namespace) -> set[str]:
        """What the index holds now, without bringing it up to date first; for verification."""

    def sync(self, namespace: Namespace) -> None:
        """Bring the index up to date with the rows; ``search`` does so by itself."""

    def drop(self, namespace: Namespace) -> None:
        """Forget everything of the namespace; the next search rebuilds it."""

    def purge(self, namespaces: Collection[Namespace] | None) -> bool:
        """After rows of these (or of any) namespaces were forgotten: leave nothing of them in the index.

        Whether it has a folder of files beside the database, and nothing of them is there now. One that is kept
        elsewhere says by ``KeptIndex.owing`` what could not be done.
        """

    def close(self) -> None:
        """Release files and locks."""


@runtime_checkable
class KeptIndex(Protocol):
    """A ``VectorIndex`` that is kept outside the process, and so may differ from the rows."""

    @property
    def owing(self) -> bool:
        """Whether it may still hold what was forgotten; that is taken out by itself, by this process or the next."""

    def differences(self, namespace: Namespace, *, deep: bool = False) -> dict[str, list[str]]:
        """Ids of segments: ``missing``, ``extra`` and ``wrong`` ones, and ``undelivered`` yet, which is no fault.

        :param deep: compare the vectors themselves, and not only their checksums.
        :raises StoreError: if the index cannot be read.
        """

    def mend(self, namespace: Namespace, *, deep: bool = False) -> None:
        """Make the index equal to the rows.

        :raises StoreError: if the index cannot be written.
        """


class LexicalIndex(Protocol):
    """Best segments by their words, in any language."""

    def search(self, namespace: Namespace, text: str, k: int, *, upto: int | None = None) -> list[tuple[str, float]]:
        """The ``k`` best ``(segment id, score)`` among segments with ``seq <= upto``."""


class State(NamedTuple):
    """Where a namespace stands.

    :param epoch: changes when rows went away or were replaced.
    :param last_seq: the highest ``seq`` ever given.
    :param last_segment: grows when segments are added.
    :param last_vector: grows when vectors under the fingerprint are added.
    :param n_pending: how many vectors under the fingerprint are still to be made.
    :param n_stale: of how many of these there is a vector, by another embedder.
    """

    epoch: int
    last_seq: int
    n_segments: int
    last_segment: int
    last_vector: int
    n_pending: int
    n_stale: int


class Profiles(NamedTuple):
    """What recall keeps in memory of segments: a column a property, in the order of ``seq``.

    :param rows: grow with ``seq``; none is ever given twice.
    :param who: said it.
    :param days: event time as a proleptic ordinal, UTC.
    :param n_terms: entries in the lexical index, with repeats.
    :param asks: whether the text ends with a question mark.
    :param replies: whether the assistant said it.
    :param timed: whether one of its terms is of ``lexical.TIME_TERMS``.
    :param repeats: of the echoes, by place, ids of the segments that they repeat (``echo``).
    """

    rows: Ints
    ids: Sequence[str]
    seqs: Sequence[int]
    sessions: Sequence[str]
    who: Sequence[str]
    days: Sequence[int]
    n_tokens: Sequence[int]
    n_terms: Sequence[int]
    asks: Sequence[bool]
    replies: Sequence[bool]
    timed: Sequence[bool]
    repeats: Mapping[int, tuple[str, ...]]


class Deleted(NamedTuple):
    """What a deletion deleted, and what is due of it.

    :param counts: rows by place.
    :param gone: its text, in pieces that are looked for in the files; ``None`` where it is too much or not known.
    :param mark: by which the store knows that its files may still hold some of it; 0 where nothing was deleted.
    :param alone: whether they hold nothing of what was deleted before.
    """

    counts: dict[str, int]
    gone: Collection[bytes] | None
    mark: int
    alone: bool


class RecordStore(VectorSource, LexicalIndex, Protocol):
    """The source of truth. A method that returns has made its change durable; one that raises has changed nothing."""

    def append(self, namespace: Namespace, segments: Sequence[NewSegment], *, restore: bool = False) -> list[Segment]:
        """Store in the order given, with their lexical entries; leaves out segments whose ``key`` or ``id`` is known.

        Left out is also what was forgotten under this ``key`` or ``id``, and a summary of what was. Gives back the
        segments that were stored, in order.

        :param restore: store also what was forgotten.
        """

    def forgotten(self, namespace: Namespace, segments: Sequence[NewSegment]) -> int:
        """How many of these were forgotten, or sum up what was, and are not stored by ``append``."""

    def replace(self, namespace: Namespace, segments: Sequence[NewSegment]) -> list[Segment]:
        """Store segments, each with a key, in place of what is under their keys; those that say the same stay.

        The others are deleted as ``delete`` does, in the same transaction, and get a new ``seq``. Gives back what is
        under the keys now, in order; of several with one key the last is stored. What was forgotten is stored again,
        and what is replaced leaves no tombstone.
        """

    def redacted(self, text: str) -> str:
        """The text as it would be stored: without secrets, where the store takes them out."""

    def get(self, namespace: Namespace, ids: Iterable[str]) -> dict[str, Segment]:
        """The segments that exist, by id."""

    def find(self, namespace: Namespace, ref: str | int) -> Segment | None:
        """The segment with this ``seq``; for text with this id, or if there is none and it is a number this ``seq``."""

    def by_key(self, namespace: Namespace, keys: Iterable[str]) -> dict[str, Segment]:
        """The segments that exist, by the key they were stored under."""

    def with_summaries(self, namespace: Namespace, ids: Sequence[str]) -> list[str]:
        """These ids, and those of every summary that was made of them or shown them, through all levels."""

    def tail(
        self,
        namespace: Namespace,
        n: int,
        *,
        session: str | None = None,
        upto: int | None = None,
        kind: Kind | None = None,
    ) -> list[Segment]:
        """The last ``n`` segments (of the session, of the kind) with ``seq <= upto``, in the order of ``seq``."""

    def scan(self, namespace: Namespace, *, session: str | None = None, after: int = 0) -> Iterator[Segment]:
        """Every segment (of the session) with ``seq > after``, in the order of ``seq``."""

    def last_seq(self, namespace: Namespace) -> int:
        """The highest ``seq`` ever given in the namespace; 0 if it is empty."""

    def ids(
        self,
        namespace: Namespace,
        *,
        session: str | None = None,
        after: datetime | None = None,
        before: datetime | None = None,
    ) -> list[str]:
        """The ids of all segments (of the session) with event times in ``[after, before)``, in the order of ``seq``."""

    def delete(
        self,
        going: Mapping[Namespace, Sequence[str]],
        *,
        everything: bool = False,
        preview: bool = False,
        bury: bool = True,
    ) -> Deleted:
        """Delete segments and the summaries of them for good, with all that is derived from either, in one transaction.

        Their ids and keys (of summaries the ids) leave tombstones: ``append`` leaves them out from then on. Traces of
        other turns lose the words that may quote them. The files may hold it all until ``scrub``.

        :param everything: all that the namespaces hold, whatever segments are named.
        :param preview: only count.
        :param bury: leave tombstones; otherwise what is stored again, comes back.
        """

    def scrub(self, deleted: Deleted | None, *, index_purged: bool, patience_s: float = 5) -> bool:
        """Leave nothing in the store's files of what was deleted; whether that is so now.

        If not (another process reads what was before), it is done at ``close`` or at the next open.

        :param deleted: ``None`` for what earlier deletions left to be done.
        :param index_purged: what ``VectorIndex.purge`` said.
        :param patience_s: so long, at most, other processes that read are waited for.
        """

    def files_with(self, texts: Iterable[str]) -> dict[str, list[str]]:
        """The files of the store in which any of these texts stands, in UTF-8 or as JSON escapes it, with the texts.

        A database server's files are not looked at.
        """

    def still_held(self, texts: Iterable[str]) -> set[str]:
        """Those of the texts that something stored has in it, in any namespace."""

    def pending(
        self, namespace: Namespace, fingerprint: str, limit: int, *, newest: bool = False, stale: bool = True
    ) -> list[Segment]:
        """Segments whose vector under ``fingerprint`` is still to be made, oldest first.

        :param newest: newest first.
        :param stale: also those that have one by another embedder.
        """

    def count_pending(self, namespace: Namespace, fingerprint: str) -> int:
        """How many vectors are still to be made."""

    def put_vectors(
        self,
        namespace: Namespace,
        fingerprint: str,
        ids: Sequence[str],
        vectors: Matrix,
        tokens: Sequence[bytes] | None = None,
    ) -> int:
        """Store vectors (and token vectors) and strike the work off the pending list; how many were not there.

        They take the place of another embedder's; one that is there under the same fingerprint stays.
        """

    def state(self, namespace: Namespace, fingerprint: str) -> State:
        """Where the namespace stands now; what is kept in memory of it is brought up to date by this."""

    def read_profiles(self, namespace: Namespace, after: int = 0) -> Profiles:
        """What recall keeps in memory of the segments added after row ``after``."""

    def postings(self, namespace: Namespace, terms: Iterable[str]) -> dict[str, Ints]:
        """The rows (as in ``Profiles``) in which each of these terms stands, rising, each as often as it does there."""

    def read_tokens(self, namespace: Namespace, fingerprint: str, after: int = 0) -> list[tuple[int, bytes]]:
        """``(seq, token vectors)`` of the vector rows added after row ``after``, where there are any."""

    def read_summaries(self, namespace: Namespace, ids: Sequence[str], method: str) -> dict[str, str]:
        """The summaries by this method that there are, by segment id."""

    def put_summary(self, namespace: Namespace, id_: str, method: str, text: str) -> None:
        """Store a segment's summary, replacing one by the same method, and strike the work off the list."""

    def list_for_summary(self, namespace: Namespace, ids: Sequence[str]) -> None:
        """Put segments on the durable list of those to be summarised."""

    def listed_for_summary(self, namespace: Namespace, limit: int) -> list[Segment]:
        """Segments still to be summarised, oldest first."""

    def last_activations(self, namespace: Namespace) -> dict[int, int]:
        """``{seq of a segment: seq of the query in whose context it last stood}``, by the recorded turns' traces."""

    def read_scores(self, namespace: Namespace, keys: Sequence[str]) -> dict[str, Any]:
        """What was kept under these keys, of what is there."""

    def put_scores(self, namespace: Namespace, values: Mapping[str, Any], *, epoch: int) -> None:
        """Keep what an LLM made of texts, by key, as JSON: derived, bounded, and gone when anything is forgotten.

        :param epoch: of the namespace when the texts were read; nothing is kept if it is another one now.
        """

    def save_trace(self, trace: Trace, *, restore: bool = False) -> None:
        """Store a trace, or replace the one with its id; notes what it activated, if its turn was recorded.

        Nothing is stored of a turn that was forgotten, nor of words that may quote what was.

        :param restore: store a trace of no segment also if it was forgotten.
        """

    def load_trace(self, namespace: Namespace, ref: str | int | None) -> Trace | None:
        """The trace with this id, or of the turn with this query or reply (id or ``seq``); the newest for ``None``."""

    def traces(self, namespace: Namespace) -> Iterator[Trace]:
        """Every trace of the namespace, oldest first."""

    def stats(self, namespace: Namespace, fingerprint: str | None = None) -> dict[str, Any]:
        """Counts of what the namespace holds.

        :param fingerprint: ``pending`` then counts vectors of another embedder as well, those of items included.
        """

    def check(self, fingerprint: str) -> dict[str, list[str]]:
        """Faults of the whole store by kind, each with the numbers of the rows concerned; empty where well."""

    def repair(self, fingerprint: str) -> dict[str, int]:
        """Mend what ``check`` finds, putting vectors to be made on the pending list; counts by kind."""

    def check_deep(
        self,
        fingerprint: str,
        dimension: int,
        token_dimension: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, list[str]]:
        """What ``check`` does not look at, row by row; ``wrong_vectors`` and others by the numbers of the rows."""

    def repair_deep(self, faults: Mapping[str, Sequence[str]]) -> None:
        """Mend what ``check_deep`` found and is derived, putting vectors to be made on the pending list."""

    def snapshot(self) -> AbstractContextManager[None]:
        """All that this thread reads meanwhile, items included, is of one moment; writers go on."""

    def close(self) -> None:
        """Release the database."""


class Job(NamedTuple):
    """A piece of derived work that a worker has claimed.

    :param task: ``vector`` or ``summary``, of a segment, or ``item``, the vector of an item's text.
    :param number: the namespace's, in the database.
    :param row: the segment's or the text's, in the database.
    :param of: the segment, or the text.
    """

    task: str
    namespace: Namespace
    number: int
    row: int
    of: Segment | str


class WorkerStatus(NamedTuple):
    """A worker that is alive.

    :param name: its host and process.
    :param seen_at: when it last finished or began something.
    :param claimed: how much it has claimed now.
    :param done: how much it has done since it started.
    :param per_second: how much it did a second, of late.
    """

    name: str
    started_at: datetime
    seen_at: datetime
    claimed: int
    done: int
    per_second: float


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """What is to be done, in all namespaces, claimed or not, and who is at it.

    :param vectors: of segments, those of another embedder included; ``items``: of items' texts, likewise.
    :param summaries: segments listed to be summarised.
    :param oldest: the id of the segment that waits longest for its first vector.
    """

    vectors: int
    items: int
    summaries: int
    oldest: str | None
    workers: tuple[WorkerStatus, ...]

    @property
    def oldest_at(self) -> datetime | None:
        """When that was first stored, by its id; ``None`` where ids are not ours."""
        from datetime import UTC, datetime
        from uuid import UUID

        try:
            oldest = UUID(self.oldest or "")
        except ValueError:
            return None
        return datetime.fromtimestamp((oldest.int >> 80) / 1000, UTC) if oldest.version == 7 else None


class WorkQueue(Protocol):
    """Derived work, taken by any number of processes that do not do the same."""

    def shift(self, name: str) -> AbstractContextManager[int]:
        """Be a worker until this is left, or the process ends, however it ends: then its claims are void. Its number.

        :param name: that others see.
        """

    def take(
        self, worker: int, task: str, fingerprint: str, limit: int, *, only: Namespace | None = None, stale: bool = True
    ) -> list[Job]:
        """Claim up to so many pieces of work that nobody is at; none where there are no more.

        Namespaces have their turns, batch by batch, so that a bulk load in one keeps no other waiting.

        :param fingerprint: of the embedder.
        :param only: of this namespace.
        :param stale: once nothing lacks a vector, also what has one of another embedder.
        """

    def release(self, worker: int, jobs: Sequence[Job], *, done: int = 0, per_second: float = 0.0) -> None:
        """Give up claims: what is not done by now is anybody's.

        :param done: so many more are; for ``status``, as ``per_second`` is.
        """

    def status(self, fingerprint: str) -> QueueStatus:
        """What is to be done, and who is at it."""

    def length(self) -> int:
        """How many segments have no vector at all."""


class EmbedderPool(Protocol):
    """Texts in, vectors out, in this process or in many."""

    def embed(self, batches: Iterable[Sequence[str]]) -> Iterator[tuple[Matrix, list[bytes] | None]]:
        """The vectors of each batch, and its token vectors where the embedder gives any, in the order of the batches.

        Takes a few batches ahead of what it gives back.
        """

    def close(self) -> None:
        """End what it started."""


class MemoryView(Protocol):
    """What a controller may see of the memory, and ask, while it decides."""

    @property
    def candidates(self) -> Sequence[Candidate]:
        """What recall offers, best score first. Recall runs when this is read for the first time."""

    @property
    def archive(self) -> Archive:
        """Every turn outside flash memory; see ``offer``."""

    @property
    def n_archived(self) -> int:
        """How many segments there are outside flash memory."""

    @property
    def flash(self) -> Sequence[Segment]:
        """The recent turns that enter the context anyway."""

    @property
    def flash_tokens(self) -> int:
        """What flash memory takes of the prompt."""

    @property
    def llm(self) -> LLM | None:
        """The wrapped LLM, if there is one."""

    @property
    def now(self) -> datetime:
        """Event time of the query."""

    @property
    def offered(self) -> Sequence[Candidate]:
        """Every candidate that was read or offered so far: each needs a verdict."""

    def offer(
        self, segment: Segment, score: float, signals: Mapping[str, float], contributions: Mapping[str, float]
    ) -> Candidate:
        """Make a segment of the archive a candidate, with the controller's own score; it then needs a verdict."""

    def attended(self, k: int) -> Sequence[Candidate]:
        """The ``k`` segments of the bank to which the query's tokens attend most, best first; each needs a verdict.

        Its share of attention is the signal ``attention``, also of those that recall offered.
        """

    def cost(self, segment: Segment, form: Form, text: str) -> int:
        """Tokens of the segment in the context with this text in place of its own."""

    def cost_of_dates(self, segments: Sequence[Segment]) -> int:
        """Tokens of the lines with the dates of these segments."""

    def search(self, query: str, k: int) -> Sequence[Candidate]:
        """What recall finds for another query, best first, outside flash memory; each then needs a verdict."""

    def frequencies(self, terms: Iterable[str]) -> Mapping[str, int]:
        """In how many segments each term of the lexical index stands."""

    def similarities(self, texts: Sequence[str]) -> Sequence[float]:
        """How near each text is to the query: the cosine of their embeddings."""

    def ask(
        self,
        purpose: str,
        prompt: str,
        *,
        max_tokens: int,
        read: Callable[[str], str],
        schema: Mapping[str, Any] | None = None,
    ) -> str:
        """Ask the LLM and give back its answer as ``read`` reads it; asked once a turn, and noted in the trace.

        The answer of a model that fails is empty, and the trace says so.

        :param schema: of the answer, for models that can be held to one; others are asked without.
        :raises CapabilityError: if there is no LLM.
        """

    def summary(self, segment: Segment, *, by_llm: bool) -> str:
        """A segment's summary, made now if there is none yet; its own text where a summary would not be shorter."""

    def windows(self, size: int, overlap: int) -> Iterator[tuple[Segment, ...]]:
        """All that was stored outside flash memory, summaries left out, as runs of neighbouring segments.

        Each run has at most ``size`` of the LLM's tokens, or is one segment, and begins with the last segments of the
        one before, at most ``overlap`` tokens of them.
        """

    def stem(self, how: str) -> str:
        """How an answer to the query begins, noted in the trace; empty where there is no telling.

        :param how: ``"rules"``, ``"llm"``, ``"auto"`` (the LLM where rules do not know the form), ``"none"``.
        """

    def certainties(
        self, windows: Sequence[Sequence[Segment]], stem: str, *, with_question: bool
    ) -> Sequence[Certainty]:
        """What the LLM's certainty says of each window; computed once for a text, a query and a model.

        :raises CapabilityError: if the LLM cannot score.
        """


ItemPath = tuple[str, ...]
"""Where in a namespace an item lies: labels, compared one by one and literally; an item's has at least one."""


@dataclass(frozen=True, slots=True)
class Item:
    """A mutable JSON value under a path and a key, as it was when it was read.

    :param ttl: so many minutes after it was last put or refreshed it expires; ``None`` for never.
    :param score: cosine of the query and the nearest of its texts; ``None`` without a query or without texts.
    """

    path: ItemPath
    key: str
    value: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    ttl: float | None = None
    expires_at: datetime | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class ItemChange:
    """What is to stand under a path and a key from now on.

    :param value: ``None`` deletes the item.
    :param texts: ``(field, text)`` of what is searched by meaning.
    :param created_at: only set by an import, which keeps the times of the export; the other times likewise.
    """

    path: ItemPath
    key: str
    value: Mapping[str, Any] | None
    texts: tuple[tuple[str, str], ...] = ()
    ttl: float | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    expires_at: datetime | None = None


class ItemStore(Protocol):
    """Items, in the same database as the records. What has expired at ``now`` is as good as deleted for every read."""

    def apply(self, namespace: Namespace, changes: Sequence[ItemChange], *, now: datetime) -> None:
        """Make all changes, or none; of several to one item the last. Also deletes what has expired.

        An item that is replaced keeps ``created_at``, and its ``updated_at`` grows, even where the clock went back.
        """

    def merge(
        self, namespace: Namespace, changes: Sequence[ItemChange], *, now: datetime, restore: bool = False
    ) -> tuple[int, int]:
        """As ``apply`` for an import: what is as new here stays, what has expired or was forgotten stays out.

        ``(stored, left out as forgotten)``; what ``apply`` puts is no longer taken for forgotten.

        :param restore: store also what was forgotten.
        """

    def get(self, namespace: Namespace, addresses: Iterable[tuple[ItemPath, str]], *, now: datetime) -> list[Item]:
        """The items that exist under these paths and keys, each once, in no order."""

    def search(
        self,
        namespace: Namespace,
        prefix: ItemPath,
        *,
        now: datetime,
        limit: int,
        offset: int = 0,
        accept: Callable[[dict[str, Any]], bool] | None = None,
        vector: Vector | None = None,
        fingerprint: str = "",
    ) -> list[Item]:
        """The items whose path begins with these labels and whose value is accepted, the latest updated first.

        With the vector of a query those that have vectors come first, by the best cosine of their texts.
        """

    def paths(self, namespace: Namespace, *, now: datetime) -> list[ItemPath]:
        """Every path that holds an item, once, in order."""

    def keys(
        self, namespace: Namespace, path: ItemPath, *, now: datetime, prefix: str, after: str | None, limit: int
    ) -> list[str]:
        """The keys under exactly this path that begin with ``prefix``, in order, from the first after ``after`` on."""

    def count(self, namespace: Namespace, *, now: datetime) -> int:
        """How many items there are."""

    def refresh(self, namespace: Namespace, found: Iterable[Item], *, now: datetime) -> None:
        """Have the items that expire begin their time anew; those that changed since they were read are left alone."""

    def sweep(self, namespace: Namespace, *, now: datetime) -> int:
        """Delete what has expired; how many items that was."""

    def pending(self, namespace: Namespace, fingerprint: str, limit: int) -> list[tuple[int, str]]:
        """``(row, text)`` of texts whose vector under ``fingerprint`` is still to be made, those without any first."""

    def count_pending(self, namespace: Namespace, fingerprint: str) -> int:
        """How many such texts there are."""

    def put_vectors(self, namespace: Namespace, fingerprint: str, rows: Sequence[int], vectors: Matrix) -> None:
        """Store the vectors of texts; rows that are gone by now are passed over."""

    def read_vectors(self, namespace: Namespace, fingerprint: str) -> tuple[list[int], list[str], Matrix]:
        """``(rows, texts, vectors)`` of the texts that have one, in the order of rows; for ``doctor``."""

    def scan(self, namespace: Namespace, *, now: datetime) -> Iterator[ItemChange]:
        """Every item with all that is recorded of it, as the change that makes it, in the order of creation."""


class Controller(Protocol):
    """Decides activations from candidates."""

    @property
    def name(self) -> str:
        """The name by which it is chosen."""

    @property
    def needs(self) -> tuple[type, ...]:
        """Capability protocols that the LLM must satisfy; checked where things are wired."""

    def decide(self, query: str, memory: MemoryView, budget: int) -> Decision:
        """One verdict per candidate that was read or offered; ``budget`` is the tokens left for lines of memory.

        The packer enforces it.
        """


@runtime_checkable
class FlashController(Protocol):
    """A controller that also decides what flash memory is; ``Options.flash_turns`` then counts for nothing."""

    @property
    def looks_back(self) -> int:
        """How many of the session's latest segments it is to be shown."""

    def flash(self, recent: Sequence[Segment], memory: MemoryView) -> Sequence[Segment]:
        """Of the session's latest segments those to keep in context, in order; a text may be its summary."""


@runtime_checkable
class CitingController(Protocol):
    """A controller whose quotes are to be cited: citations of anything else are taken out of the reply."""

    def instruction(self, query: str) -> str:
        """What is added to the system prompt: how to answer from the quotes, and how to cite them."""


@runtime_checkable
class SummarizingController(Protocol):
    """A controller that wants summaries by the LLM made ahead, after the reply."""

    def wants_summary(self, segment: Segment, llm: LLM | None) -> bool:
        """Whether the new segment is long enough for a summary."""
