"""Wiring: names to objects. The only file that knows every folder, and every name a user can choose by."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from memory_os.address import DatabaseUrl, is_server, without_password
from memory_os.backlog import Backlog, Made, VectorBacklog
from memory_os.bound import Bound
from memory_os.derive import embed
from memory_os.errors import CapabilityError, ConfigError, StoreError, UnknownNameError
from memory_os.items import Items
from memory_os.limits import as_ref
from memory_os.migration import Migration
from memory_os.protocols import CachingLLM, KeptIndex
from memory_os.telemetry import Telemetry
from memory_os.turn import Options, Parts
from memory_os.types import BankOptions, Namespace

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings
    from langchain_core.language_models import BaseChatModel

    from memory_os.forget import Retention
    from memory_os.protocols import LLM, Controller, Embedder, EmbedderPool, RecordStore, TokenCounter, VectorIndex
    from memory_os.redact import Redact
    from memory_os.stores.backend import Backend, Opening

__all__ = [
    "CONTROLLERS",
    "EMBEDDERS",
    "VECTORS",
    "build_parts",
    "check_llm",
    "make_controller",
    "make_embedder",
    "make_llm",
    "make_pool",
    "migrate",
    "open_database",
    "tokenizer_of",
]


def _auto(options: Mapping[str, Any]) -> Controller:
    from memory_os.controllers.auto import AutoController

    return AutoController(**options)


def _recency(options: Mapping[str, Any]) -> Controller:
    from memory_os.controllers.recency import RecencyController

    return RecencyController(**options)


def _scm(options: Mapping[str, Any]) -> Controller:
    from memory_os.controllers.scm import ScmController

    return ScmController(**options)


def _scm_paper(options: Mapping[str, Any]) -> Controller:
    from memory_os.controllers.scm import ScmController

    return ScmController.paper(**options)


def _scm_repo(options: Mapping[str, Any]) -> Controller:
    from memory_os.controllers.scm import ScmController

    return ScmController.repo(**options)


def _xl3m(options: Mapping[str, Any]) -> Controller:
    from memory_os.controllers.xl3m import Xl3mController

    return Xl3mController(**options)


def _xl3m_scan(options: Mapping[str, Any]) -> Controller:
    from memory_os.controllers.xl3m import Xl3mController

    return Xl3mController.scan(**options)


def _alr2(options: Mapping[str, Any]) -> Controller:
    from memory_os.controllers.alr2 import Alr2Controller

    return Alr2Controller(**options)


def _longmem_free(options: Mapping[str, Any]) -> Controller:
    from memory_os.controllers.longmem import LongMemFreeController

    return LongMemFreeController(**options)


def _exact(store: RecordStore, fingerprint: str, path: Path | None) -> VectorIndex:
    from memory_os.stores.exact import ExactIndex
    from memory_os.stores.vectorfile import folder_of

    return ExactIndex(store, fingerprint=fingerprint, folder=folder_of(path) if path else None)


def _chroma(store: RecordStore, fingerprint: str, path: Path | None) -> VectorIndex:
    from memory_os.stores.chroma import ChromaIndex, folder_of

    assert path
    return ChromaIndex(store, fingerprint=fingerprint, folder=folder_of(path))


def _pgvector(store: RecordStore, fingerprint: str, path: Path | None) -> VectorIndex:
    from memory_os.stores.pgvector import PgVectorIndex
    from memory_os.stores.postgres import Postgres
    from memory_os.stores.records import Records

    assert isinstance(store, Records)
    assert isinstance(store.database, Postgres)
    return PgVectorIndex(store.database, fingerprint=fingerprint)


def _chroma_server(store: RecordStore, fingerprint: str, url: str) -> VectorIndex:
    from memory_os.stores.chroma_server import ChromaServerIndex, read_address

    return ChromaServerIndex(store, fingerprint=fingerprint, address=read_address(url, os.environ))


def _minilm() -> Embedder:
    from memory_os.adapters.sentence_transformer import SentenceTransformerEmbedder

    return SentenceTransformerEmbedder("minilm")


def _hash() -> Embedder:
    from memory_os.adapters.scripted import HashEmbedder

    return HashEmbedder()


CONTROLLERS: dict[str, Callable[[Mapping[str, Any]], Controller]] = {
    "auto": _auto, "recency": _recency, "scm": _scm, "scm-paper": _scm_paper, "scm-repo": _scm_repo,
    "xl3m": _xl3m, "xl3m-scan": _xl3m_scan, "alr2": _alr2,
    "longmem-free": _longmem_free,
}  # fmt: skip
ASKING = ("scm", "scm-paper", "scm-repo", "xl3m", "xl3m-scan", "alr2", "longmem-free")
"""Controllers that use the LLM, where there is one, before it replies."""
VECTORS: dict[str, Callable[[RecordStore, str, Path | None], VectorIndex]] = {
    "exact": _exact,
    "chroma": _chroma,
    "pgvector": _pgvector,
}
MOST_PENDING = 10**12
CHROMA_SERVER = ("chroma+http://", "chroma+https://")
EMBEDDERS: dict[str, Callable[[], Embedder]] = {"minilm": _minilm, "hash": _hash}

ADAPTERS_WITH = {
    "LLM": "llm='smollm2'", "ScoringLLM": "HuggingFaceLLM", "QuestionScoringLLM": "HuggingFaceLLM",
    "CachingLLM": "HuggingFaceLLM",
}  # fmt: skip


def build_parts(
    path: str | Path | DatabaseUrl,
    *,
    llm: str | LLM | BaseChatModel | None,
    embedder: str | Embedder | Embeddings,
    vectors: str,
    controller: str | Controller,
    controller_options: Mapping[str, Any],
    tokenizer: str | TokenCounter | None,
    options: Options,
    bank: BankOptions,
    retention: Retention | None = None,
    redact: Redact | None = None,
    derive: str = "here",
    max_pending: int | None = None,
    telemetry: bool = False,
) -> Parts:
    """Make the collaborators of a turn. Models are loaded when they are first used.

    :raises ConfigError: for a name that is not known or a package that is missing; nothing was created.
    :raises StoreError: if the database cannot be opened.
    """
    for what, name in (("LLM", llm), ("embedder", embedder), ("controller", controller), ("tokenizer", tokenizer)):
        if isinstance(name, str):
            as_ref(name, what)
    if derive not in ("here", "workers"):
        raise UnknownNameError("place to derive", derive, ("here", "workers"))
    if max_pending is not None and derive != "workers":
        raise ConfigError(
            'max_pending bounds what waits for workers: open the memory with derive="workers", or without'
        )
    if max_pending is not None and not (isinstance(max_pending, int) and 1 <= max_pending <= MOST_PENDING):
        raise ConfigError(f"max_pending is a whole number from 1 to {MOST_PENDING}, not {max_pending!r}")
    address = database_address(path)
    chosen_llm = make_llm(llm) if isinstance(llm, str) else _own_llm(llm)
    chosen_controller = make_controller(controller, controller_options) if isinstance(controller, str) else controller
    check_llm(chosen_controller, chosen_llm)
    chosen_embedder = make_embedder(embedder) if isinstance(embedder, str) else _own_embedder(embedder)
    _check_vectors(vectors, address)
    _check_place(chosen_controller, address)
    counter = _counter(tokenizer, chosen_llm)
    if CachingLLM in chosen_controller.needs and counter is not chosen_llm:
        raise ConfigError(f"controller {chosen_controller.name!r} counts in the LLM's own tokens; leave out tokenizer")

    from memory_os.adapters.tokenizers import TiktokenCounter
    from memory_os.stores.bank import SegmentBank
    from memory_os.stores.items import ItemRows
    from memory_os.stores.queue import Queue
    from memory_os.stores.records import Records

    @cache  # read when the first text is stored
    def tokens() -> TiktokenCounter:
        return TiktokenCounter("cl100k_base")

    database = open_database(address)
    store = Records(
        database,
        count_tokens=lambda text: tokens().count_text(text),
        count_many=lambda texts: tokens().count_texts(texts),
        redact=redact,
    )
    try:
        index = _index(vectors, store, chosen_embedder.fingerprint, address)
    except BaseException:
        store.close()
        raise
    items = ItemRows(database, redact=redact)
    queue = Queue(database)
    folder = database.bank_folder

    def count_missing(namespace: Namespace) -> int:
        fingerprint = chosen_embedder.fingerprint
        return store.count_pending(namespace, fingerprint) + items.count_pending(namespace, fingerprint)

    def make_missing(namespace: Namespace, most: int, newest: bool) -> Made:
        if todo := store.pending(namespace, chosen_embedder.fingerprint, most, newest=newest):
            return Made(len(todo), embed(store, chosen_embedder, namespace, todo))
        made = Items(items, chosen_embedder, namespace).catch_up(limit=most)
        return Made(made, made)

    again = partial(make_embedder, embedder) if isinstance(embedder, str) else partial(_itself, chosen_embedder)

    def count_all_missing() -> int:
        left = queue.status(chosen_embedder.fingerprint)
        return left.vectors + left.items

    return Parts(
        store, index, chosen_embedder, chosen_controller, counter, chosen_llm, options,
        vectors=VectorBacklog(count_missing, make_missing),
        backlog=Backlog(store), bank=SegmentBank(database, folder, bank) if folder else None,
        items=items, retention=retention, queue=queue, leaves_work=derive == "workers",
        bound=Bound(queue, max_pending) if max_pending is not None else None,
        make_embedder=again,
        telemetry=Telemetry(store.id, count_all_missing) if telemetry else None,
    )  # fmt: skip


def database_address(path: str | Path | DatabaseUrl) -> Path | DatabaseUrl:
    """The file that a path or a ``sqlite:///`` URL names, or the server's database.

    :raises StoreError: for the URL of a database that cannot be used.
    """
    text = path.url if isinstance(path, DatabaseUrl) else str(path)
    if is_server(text):
        return DatabaseUrl(text)
    if "://" in text:
        scheme, _, rest = text.partition("://")
        if scheme != "sqlite" or not rest.startswith("/"):
            raise StoreError(
                f"cannot open {without_password(text)}: give a file's path, sqlite:///path, or "
                "postgresql+psycopg://USER:PASSWORD@HOST/NAME"
            )
        text = rest[1:]
    if not text:
        raise ConfigError("no database named; give a file's path, such as memory.db")
    if text == ":memory:":
        raise StoreError("memory is kept in a file: give its path; for a trial, one in a temporary folder")
    try:
        text.encode()
        file = Path(text).expanduser().absolute()
        with suppress(FileNotFoundError, NotADirectoryError):
            file.stat()
    except (OSError, ValueError, RuntimeError) as error:  # too long; a NUL or no UTF-8; a home that is nobody's
        raise StoreError(f"cannot open {text[:200]!r}: {error}; name another file") from error
    return file


def open_database(path: str | Path | DatabaseUrl, opening: Opening | None = None) -> Backend:
    """The database at an address, with its tables.

    :param opening: what for; to be used, if left out.
    :raises StoreError: if it cannot be opened.
    """
    from memory_os.stores.backend import Opening

    address, opening = database_address(path), opening or Opening.USE
    if isinstance(address, DatabaseUrl):
        from memory_os.stores.postgres import Postgres

        return Postgres(address.url, opening)
    from memory_os.stores.database import Database

    return Database(address, opening)


def migrate(
    source: str | Path | DatabaseUrl,
    dest: str | Path | DatabaseUrl,
    *,
    vectors: str | None = None,
    verify_only: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Migration:
    """Bring all that a store holds into another one, which is empty, and compare the two: ``memos migrate``.

    Interrupted at any moment, it goes on when it is called again; until it has ended, nobody can open DEST as a memory.
    The source is read as of the moment of the call, and is not changed.

    :param source: a file's path or a server's URL, as for ``Memory.open``; it must have the newest schema.
    :param dest: the same; with the source itself only the index is made.
    :param vectors: make this index of the copy at once, and see that it holds every vector: as for ``Memory.open``.
    :param verify_only: compare, and write nothing; what differs stands in the result.
    :param progress: called with ``(what is done, so much of it, of so much)``.
    :raises ConfigError: for an index that is not known, is not one of such a database, or is asked for with
        ``verify_only``; for a source that is ``dest`` too, where no index is asked for.
    :raises StoreError: if the source is not there, if it holds what DEST cannot, if DEST holds anything else, or if
        they differ in the end. What was copied stays for the next call.
    """
    here, there = database_address(source), database_address(dest)
    if vectors is not None:
        if verify_only:
            raise ConfigError("--verify-only writes nothing, and so makes no index; leave out --vectors, or run both")
        _check_vectors(vectors, there)
    same = _is_same(here, there)
    if same and vectors is None:
        raise ConfigError(f"{there} is SOURCE and DEST; name another, or the index that is to be made of it: --vectors")

    from memory_os.stores.backend import Opening
    from memory_os.stores.copying import Copy, compare, count_left
    from memory_os.stores.portable import check_portable

    if same and vectors is not None:
        with closing(open_database(there, Opening.READ)) as store:  # it has to be there
            return Migration(store.place, store.place, index=_make_index(store, there, vectors, progress))
    with closing(open_database(here, Opening.READ)) as ours, ours.snapshot():
        if verify_only:
            with closing(open_database(there, Opening.READ)) as theirs:
                tables, differences = compare(ours, theirs, progress)
            return Migration(ours.place, theirs.place, tables, differences, count_left(ours))
        check_portable(ours, to_server=isinstance(there, DatabaseUrl))
        with closing(open_database(there, Opening.FILL)) as theirs:
            copy = Copy(theirs, ours)
            copy.begin()
            copy.fill(progress)
            tables = copy.verify(progress)
            n_vectors = None if vectors is None else _make_index(theirs, there, vectors, progress)
            copy.finish()
            return Migration(ours.place, theirs.place, tables, left=count_left(ours), index=n_vectors)


def _is_same(here: Path | DatabaseUrl, there: Path | DatabaseUrl) -> bool:
    """Whether both name one database, as far as that can be told: a file may have other names, and links to it."""
    if isinstance(here, Path) and isinstance(there, Path) and here.exists() and there.exists():
        return here.samefile(there)
    return here == there


def _make_index(
    database: Backend,
    address: Path | DatabaseUrl,
    vectors: str,
    progress: Callable[[str, int, int], None] | None,
) -> int:
    """Make an index of all vectors that the commonest embedder of the store made, and see that it holds them.

    :return: how many these are.
    """
    from memory_os.stores.records import Records

    store = Records(database, count_tokens=len)  # nothing is stored
    fingerprint = store.main_fingerprint()
    if fingerprint is None:
        return 0
    index = _index(vectors, store, fingerprint, address)
    total = 0
    try:
        names = store.namespaces(emptied=True)
        for n, namespace in enumerate(names, start=1):
            n_vectors = store.count_vectors(namespace, fingerprint)
            if isinstance(index, KeptIndex):
                index.mend(namespace)
                wrong = any(index.differences(namespace).values())
            else:
                index.sync(namespace)
                wrong = len(index.ids(namespace)) != n_vectors
            if wrong:
                raise StoreError(
                    f"the index {without_password(vectors)} does not hold the {n_vectors} vectors of "
                    f"{'/'.join(namespace)}; see that nothing else writes to it, and run it again"
                )
            total += n_vectors
            if progress:
                progress("namespaces in the index", n, len(names))
    finally:
        index.close()
    return total


def _index(vectors: str, store: RecordStore, fingerprint: str, address: Path | DatabaseUrl) -> VectorIndex:
    """The index of this name over a store."""
    if vectors in VECTORS:
        return VECTORS[vectors](store, fingerprint, address if isinstance(address, Path) else None)
    return _chroma_server(store, fingerprint, vectors)


def _check_vectors(vectors: str, address: Path | DatabaseUrl) -> None:
    """Make sure that there is such an index for this sort of database; before anything is opened."""
    if vectors not in VECTORS and not vectors.startswith(CHROMA_SERVER):
        shown = vectors if "://" not in vectors else vectors.partition("://")[0]  # the rest may hold a token
        raise UnknownNameError("vector index", shown, VECTORS, "or chroma+http://HOST:PORT for a Chroma server")
    if vectors == "pgvector" and isinstance(address, Path):
        raise ConfigError(
            "vectors='pgvector' needs a PostgreSQL database: open postgresql+psycopg://USER:PASSWORD@HOST/NAME"
        )
    if vectors == "chroma" and isinstance(address, DatabaseUrl):
        raise ConfigError(
            "vectors='chroma' keeps a folder beside the database's file, and a server has none; "
            "choose 'exact', 'pgvector' or a Chroma server"
        )


def _check_place(controller: Controller, address: Path | DatabaseUrl) -> None:
    """Make sure that the controller works with this sort of database; before anything is opened."""
    if CachingLLM in controller.needs and isinstance(address, DatabaseUrl):
        raise ConfigError(
            f"controller {controller.name!r} keeps keys and values in files beside the database, and a server has no "
            "such place; open a file's path, or choose another controller"
        )


def check_llm(controller: Controller, llm: LLM | None) -> None:
    """Make sure that the LLM has what the controller needs.

    :raises CapabilityError: if it has not.
    """
    for capability in controller.needs:
        if not isinstance(llm, capability):
            adapter = ADAPTERS_WITH.get(capability.__name__, "no adapter here")
            raise CapabilityError(controller.name, capability.__name__, adapter)


def make_controller(name: str, options: Mapping[str, Any]) -> Controller:
    """The controller of this name.

    :raises ConfigError: for an unknown name or option.
    """
    if name not in CONTROLLERS:
        raise UnknownNameError("controller", name, CONTROLLERS)
    try:
        return CONTROLLERS[name](options)
    except TypeError as error:
        raise ConfigError(f"controller {name!r} does not take these options: {error}") from error


def make_embedder(name: str) -> Embedder:
    """The embedder of this name, not loaded yet.

    :raises UnknownNameError: for a name that is no embedder's.
    :raises ConfigError: if LangChain cannot set it up.
    """
    if name in EMBEDDERS:
        return EMBEDDERS[name]()
    if name.startswith("st:"):
        from memory_os.adapters.sentence_transformer import SentenceTransformerEmbedder

        return SentenceTransformerEmbedder(name.removeprefix("st:"))
    if ":" in name:
        from memory_os.adapters.langchain_models import LangChainEmbedder

        return LangChainEmbedder.from_string(name)
    hint = "or st:NAME for any sentence-transformers model or folder, or provider:model through LangChain"
    raise UnknownNameError("embedder", name, EMBEDDERS, hint)


def _itself(embedder: Embedder) -> Embedder:
    return embedder


def make_pool(make: Callable[[], Embedder], fingerprint: str, workers: int, *, ray: bool) -> EmbedderPool:
    """So many processes of this machine that embed, or actors of a Ray cluster.

    :raises ConfigError: for fewer than 1, or an embedder that cannot be sent to them.
    :raises MissingExtraError: without the package ray.
    """
    if ray:
        from memory_os.adapters.ray_pool import RayPool

        return RayPool(make, fingerprint, workers)
    from memory_os.adapters.processes import ProcessPool

    return ProcessPool(make, fingerprint, workers)


def make_llm(name: str) -> LLM:
    """The LLM of this name, not loaded yet.

    :raises UnknownNameError: for a name that is no LLM's.
    :raises ConfigError: for a server's URL that cannot be used or names no model.
    """
    if name == "smollm2" or name.startswith("hf:"):
        from memory_os.adapters.huggingface import HuggingFaceLLM

        return HuggingFaceLLM(name.removeprefix("hf:"))
    if _is_url(name):
        from memory_os.adapters.openai_compatible import OpenAICompatibleLLM

        return OpenAICompatibleLLM(*_url_and_model(name))
    if ":" in name:
        from memory_os.adapters.langchain_models import LangChainLLM

        return LangChainLLM.from_string(name)
    raise _unknown_llm(name)


def _own_llm(llm: LLM | BaseChatModel | None) -> LLM | None:
    """A LangChain chat model as an LLM; anything else as it is."""
    langchain = sys.modules.get("langchain_core.language_models")  # who has such an object has imported it
    if langchain and isinstance(llm, langchain.BaseChatModel):
        from memory_os.adapters.langchain_models import LangChainLLM

        return LangChainLLM(llm)
    return cast("LLM | None", llm)


def _own_embedder(embedder: Embedder | Embeddings) -> Embedder:
    """LangChain embeddings as an embedder; anything else as it is."""
    langchain = sys.modules.get("langchain_core.embeddings")
    if langchain and isinstance(embedder, langchain.Embeddings):
        from memory_os.adapters.langchain_models import LangChainEmbedder

        return LangChainEmbedder(embedder)
    return cast("Embedder", embedder)


def tokenizer_of(llm: str) -> str:
    """The name by which an LLM's tokens are counted without making the LLM: a name for ``Memory.open(tokenizer=)``.

    :raises UnknownNameError: for a name that is no LLM's.
    :raises ConfigError: for a server's URL that names no model.
    """
    if llm == "smollm2" or llm.startswith("hf:"):
        return llm
    if _is_url(llm):
        return _url_and_model(llm)[1]
    provider, colon, model = llm.partition(":")
    if not (provider and colon and model):
        raise _unknown_llm(llm)
    return model


def _is_url(llm: str) -> bool:
    return llm.lower().startswith(("http://", "https://"))


def _url_and_model(llm: str) -> tuple[str, str]:
    """The parts of ``URL#MODEL``."""
    url, _, model = llm.partition("#")
    if not model:  # the URL is not shown: it may hold a password
        raise ConfigError("the LLM's URL names no model; write URL#MODEL, such as http://localhost:8000/v1#qwen2.5")
    return url, model


def _unknown_llm(name: str) -> UnknownNameError:
    hint = (
        "or hf:NAME for a transformers model or folder, URL#MODEL for a server that speaks OpenAI's protocol, "
        "or provider:model through LangChain"
    )
    return UnknownNameError("LLM", name, ["smollm2"], hint)


def _counter(tokenizer: str | TokenCounter | None, llm: LLM | None) -> TokenCounter:
    """A named tokenizer wins, then the LLM's own, then cl100k_base."""
    if tokenizer is None:
        if llm is not None:
            return llm
        tokenizer = "cl100k_base"
    if not isinstance(tokenizer, str):
        return tokenizer
    if tokenizer == "smollm2" or tokenizer.startswith("hf:"):
        return make_llm(tokenizer)
    from memory_os.adapters.tokenizers import counter_for

    return counter_for(tokenizer)
