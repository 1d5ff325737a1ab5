"""Nearest segments by a Chroma server, which many processes and machines may share; without it, exactly by the rows.

Nothing waits for a server that is away: after the first failure searches go to the exact index, and say so, while a
thread tries the server again, delivers what it missed, and hands searches back to it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from memory_os.errors import ConfigError, MemoryOSError, StoreError
from memory_os.stores.chroma_collections import Collections, TooMuch, cosines_of
from memory_os.stores.exact import ExactIndex
from memory_os.types import Namespace

if TYPE_CHECKING:
    import httpx

    from memory_os.protocols import Vector, VectorSource

__all__ = ["Address", "ChromaServerIndex", "read_address"]

log = logging.getLogger(__name__)

T = TypeVar("T")

INLINE = 500
"""So many vectors are delivered, or compared, while a search waits; more in the background."""
CONNECT_S = 2.0
QUICK_S = 5.0
"""So long a search waits for an answer, once; it then goes to the exact index."""
PATIENT_S = 60.0
LONGEST_PAUSE_S = 15.0
"""Between two tries of a server that is away."""
LAST_PATIENCE_S = 20.0
SCHEMES = {"chroma+http": 8000, "chroma+https": 443}
FORM = "write chroma+http://HOST:PORT or chroma+https://HOST:PORT, with ?tenant=NAME&database=NAME where needed"
BEHIND = "vectors are still on their way to the Chroma server at {}; until they are there, they are searched exactly"
AWAY = "{}; vectors are searched exactly, by the database's rows, until it is back"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Chroma server is, and what is ours on it."""

    host: str
    port: int
    tls: bool
    tenant: str
    database: str
    token: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """The token as proxies expect it, and as Chroma's own cloud does."""
        return {"Authorization": f"Bearer {self.token}", "X-Chroma-Token": self.token} if self.token else {}


def read_address(url: str, environment: Mapping[str, str]) -> Address:
    """The parts of ``chroma+http://[:TOKEN@]HOST[:PORT][/?tenant=T&database=D]``.

    :param environment: where ``CHROMA_TOKEN`` is looked for if the URL holds no token.
    :raises ConfigError: for a URL of another form; it is not shown, as it may hold a token.
    """
    try:
        parts = urlsplit(url)
        default_port = SCHEMES[parts.scheme]
        host, port = parts.hostname, parts.port or default_port
        named = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except (KeyError, ValueError):
        raise ConfigError(f"the Chroma server's URL cannot be read; {FORM}") from None
    if not host or parts.path not in ("", "/") or parts.fragment:
        raise ConfigError(f"the Chroma server's URL names no host, or more than a host; {FORM}")
    tenant, database = named.pop("tenant", "default_tenant"), named.pop("database", "default_database")
    if named:
        raise ConfigError(f"the Chroma server's URL has an unknown part {min(named)!r}; {FORM}")
    token = unquote(parts.password or "") or environment.get("CHROMA_TOKEN", "")
    if not (token.isascii() and token.isprintable()):
        raise ConfigError("the Chroma server's token has characters that no header can carry; see CHROMA_TOKEN")
    host = f"[{host}]" if ":" in host else host
    return Address(host, port, parts.scheme == "chroma+https", tenant, database, token)


class _Away(Exception):
    """The server cannot be used now; says why."""


class ChromaServerIndex:
    """``VectorIndex`` on a Chroma server. Safe for any number of processes; see ``chroma_collections``.

    :param source: where the rows are.
    :param fingerprint: the embedder whose vectors are indexed.
    :raises ConfigError: if the server refuses the token, or knows no such tenant or database. One that is away is none.
    """

    def __init__(self, source: VectorSource, *, fingerprint: str, address: Address) -> None:
        import chromadb  # noqa: F401  # may be missing

        self._source = source
        self._fingerprint = fingerprint
        self.address = address
        self._exact = ExactIndex(source, fingerprint=fingerprint)
        self._quick: Collections | None = None
        self._patient: Collections | None = None
        self._open = ExitStack()
        self._away = ""  # why searches do not go to the server; empty while they do
        self._due: dict[Namespace, None] = {}  # what the thread is to bring up to date
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._told = threading.local()
        self._pid: int | None = os.getpid()
        try:
            self._connect()
            owed = self._tried(lambda: self._collections.owed())
        except _Away as away:
            self._leave(str(away))
        except BaseException:
            self._open.close()
            raise
        else:
            self._later(*owed)

    # -- searching -------------------------------------------------------------------------------------------------

    def search(
        self, namespace: Namespace, vector: Vector, k: int, *, upto: int | None = None
    ) -> list[tuple[str, float]]:
        """The ``k`` best ``(segment id, cosine)``: that HNSW finds, or of all while the server is away or behind."""
        self._check_owner()
        note = self._away and AWAY.format(self._away)
        if not note:
            try:
                found = self._tried(lambda: self._collections.nearest(namespace, vector, k, upto, most=INLINE))
            except TooMuch:
                self._later(namespace)
            except _Away as away:
                self._leave(str(away), namespace)
                note = AWAY.format(away)
            else:
                self._told.note = ""
                return found
        else:
            self._later(namespace)
        self._told.note = note or BEHIND.format(self.address)
        return self._exact.search(namespace, vector, k, upto=upto)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the latest search of this thread did less well than by the server."""
        note = getattr(self._told, "note", "")
        return (note,) if note else ()

    def similarities(self, namespace: Namespace, vector: Vector, ids: Sequence[str]) -> Vector:
        """The cosines of these segments, in their order; 0 for one that has no vector."""
        self._check_owner()
        return cosines_of(self._source, self._fingerprint, namespace, vector, ids)

    # -- keeping in step -------------------------------------------------------------------------------------------

    def sync(self, namespace: Namespace) -> None:
        """Deliver what the server lacks; where it is away, it will be."""
        self._reach((namespace,), lambda patient: patient.synced(namespace))

    def purge(self, namespaces: Collection[Namespace] | None) -> bool:
        """Take out of the server what was forgotten, or have that done once it is back: see ``owing``.

        ``False``, as none of its files are here, and it knows nothing of another index's.
        """
        self._check_owner()
        self._exact.purge(namespaces)
        try:
            self._reach(namespaces or (), lambda patient: patient.purge(namespaces))
        except MemoryOSError as error:
            self._leave(str(error), *(namespaces or ()))
        return False

    @property
    def owing(self) -> bool:
        """Whether the server is away, and may hold what was forgotten: what is no row is taken out when it is back."""
        return bool(self._away)

    def _reach(self, namespaces: Collection[Namespace], work: Callable[[Collections], object]) -> None:
        self._check_owner()
        if not self._away:
            try:
                self._tried(lambda: work(self._patiently))
            except _Away as away:
                self._leave(str(away), *namespaces)
            else:
                return
        self._later(*namespaces)

    def _check_owner(self) -> None:
        """Connections and threads are of the process that opened them, until it closes them."""
        if self._pid is None:
            raise StoreError(f"the index on {self.address} was closed; open the memory again: Memory.open")
        if self._pid != os.getpid():
            raise StoreError(
                f"the connections to the Chroma server at {self.address} belong to the process that opened them, and "
                "this one was forked from it; open a memory of its own after the fork: Memory.open"
            )

    def ids(self, namespace: Namespace) -> set[str]:
        """What the server holds now.

        :raises StoreError: if it is away.
        """
        return set(self._asked(lambda patient: patient.held(namespace)))

    def differences(self, namespace: Namespace, *, deep: bool = False) -> dict[str, list[str]]:
        """How the collection differs from the rows; see ``KeptIndex``."""
        return self._asked(lambda patient: patient.differences(namespace, deep=deep))

    def mend(self, namespace: Namespace, *, deep: bool = False) -> None:
        """Make the collection equal to the rows."""
        self._asked(lambda patient: patient.mend(namespace, deep=deep))

    def drop(self, namespace: Namespace) -> None:
        """Delete the collection; the next search rebuilds it.

        :raises StoreError: if the server is away.
        """
        self._exact.drop(namespace)
        self._asked(lambda patient: patient.drop(namespace))

    def _asked(self, work: Callable[[Collections], T]) -> T:
        """What needs the server itself."""
        self._check_owner()
        try:
            if self._patient is None:
                self._connect()
            return self._tried(lambda: work(self._patiently))
        except _Away as away:
            self._leave(str(away))
            raise StoreError(f"{away}; try again when it is back") from away

    # -- the server ------------------------------------------------------------------------------------------------

    @property
    def _collections(self) -> Collections:
        assert self._quick is not None, "connected, or away"
        return self._quick

    @property
    def _patiently(self) -> Collections:
        assert self._patient is not None, "connected, or away"
        return self._patient

    def _connect(self) -> None:
        """Ask whether what is ours is there, then make the clients.

        :raises ConfigError: if it never will be, with this address.
        """
        import httpx

        place = f"/tenants/{quote(self.address.tenant, '')}/databases/{quote(self.address.database, '')}"
        url = f"{'https' if self.address.tls else 'http'}://{self.address}/api/v2"

        def probe() -> httpx.Response:
            timeout = httpx.Timeout(QUICK_S, connect=CONNECT_S)
            return httpx.get(url + place, headers=self.address.headers, timeout=timeout)

        try:
            answer = self._tried(probe)
        except _Away as away:
            if "CERTIFICATE_VERIFY_FAILED" not in str(away.__cause__):
                raise
            raise ConfigError(
                f"the certificate of the Chroma server at {self.address} is not trusted; name the authority's file in "
                "SSL_CERT_FILE"
            ) from away
        if answer.status_code in (401, 403):
            raise ConfigError(
                f"the Chroma server at {self.address} refuses us ({answer.status_code}); give it the right token by "
                "CHROMA_TOKEN or in the URL, and a tenant and a database that the token is for"
            )
        if answer.status_code == 404 and "not found" in answer.text.lower() and "error" in answer.text:
            raise ConfigError(
                f"the Chroma server at {self.address} has no database {self.address.database!r} of a tenant "
                f"{self.address.tenant!r}; create it there, or name another by ?tenant=NAME&database=NAME"
            )
        if answer.status_code >= 500 or answer.status_code == 429:
            raise _Away(f"the Chroma server at {self.address} answers with an error ({answer.status_code})")
        if answer.status_code != 200 or "json" not in answer.headers.get("content-type", ""):
            raise ConfigError(
                f"what answers at {self.address} is no Chroma server that speaks API v2 ({answer.status_code}); "
                "name another host or port, or update it"
            )
        quick, patient = (self._tried(partial(self._client, seconds)) for seconds in (QUICK_S, PATIENT_S))
        owner = self._source.id
        self._quick = Collections(self._source, self._fingerprint, quick, owner=owner)
        self._patient = Collections(self._source, self._fingerprint, patient, owner=owner)

    def _client(self, seconds: float) -> Any:
        import chromadb
        import httpx
        from chromadb.config import Settings

        address = self.address
        client: Any = chromadb.HttpClient(
            address.host, address.port, address.tls, address.headers, Settings(anonymized_telemetry=False),
            address.tenant, address.database,
        )  # fmt: skip
        # Chroma's client waits for ever, has no setting for it, and leaves its connections open when it is closed
        for part in (client, client._admin_client):
            session: httpx.Client = part._server._session
            session.timeout = httpx.Timeout(seconds, connect=CONNECT_S)
            self._open.callback(session.close)
        self._open.callback(client.close)
        return client

    def _tried(self, work: Callable[[], T]) -> T:
        """The work's result. A connection that broke is tried once more: the server may have been started anew.

        :raises _Away: for whatever goes wrong there. Of what the server says only numbers and names of errors are
            told: it may repeat what it was sent.
        """
        import httpx
        from tenacity import retry as retrying
        from tenacity import retry_if_exception_type, stop_after_attempt, wait_fixed

        again = retrying(
            retry=retry_if_exception_type((httpx.NetworkError, httpx.RemoteProtocolError)),
            stop=stop_after_attempt(2), wait=wait_fixed(0.05), reraise=True,
        )  # fmt: skip
        try:
            return again(work)()
        except (MemoryOSError, TooMuch, _Away):
            raise
        except Exception as error:  # whatever Chroma's client raises, a bare Exception among them
            raise _Away(f"the Chroma server at {self.address} {_why(error)}") from error

    # -- while it is away ------------------------------------------------------------------------------------------

    def _leave(self, why: str, *due: Namespace) -> None:
        """Stop asking the server; a thread tries it again."""
        if not self._away:
            log.warning(AWAY.format(why))
        with self._lock:
            self._away = why
        self._later(*due, start=True)

    def _later(self, *due: Namespace, start: bool = False) -> None:
        """Have these brought up to date in the background."""
        with self._lock:
            self._due.update(dict.fromkeys(due))
            if self._thread is None and (due or start) and not self._stop.is_set():
                self._thread = threading.Thread(target=self._work, name="memory_os chroma", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        """Bring the server up to date, as often as it takes; then hand searches back to it."""
        from tenacity import (
            RetryError,
            Retrying,
            retry_if_exception_type,
            sleep_using_event,
            stop_when_event_set,
            wait_random_exponential,
        )

        try:
            for attempt in Retrying(
                retry=retry_if_exception_type((_Away, MemoryOSError)),
                wait=wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE_S),
                sleep=sleep_using_event(self._stop), stop=stop_when_event_set(self._stop),
            ):  # fmt: skip
                with attempt:
                    self._catch_up()
        except RetryError:  # told to stop: the rows say what is still to be delivered
            with self._lock:
                self._thread = None

    def _catch_up(self) -> None:
        try:
            if self._patient is None:
                self._connect()
            patient = self._patiently
            if self._away:
                self._later(*self._tried(patient.owed))
            while not self._stop.is_set():
                with self._lock:
                    namespace = next(iter(self._due), None)
                    if namespace is None:
                        if self._away:
                            log.warning("the Chroma server at %s is back", self.address)
                        self._away, self._thread = "", None
                        return
                self._tried(partial(patient.synced, namespace))
                self._exact.drop(namespace)
                with self._lock:
                    self._due.pop(namespace, None)
        except (_Away, MemoryOSError) as error:
            with self._lock:
                self._away = str(error)
            raise

    def close(self) -> None:
        """Let go of the server, after what is being delivered; the rows say what is left.

        Nothing if that was done, or is another process's to do.
        """
        if self._pid != os.getpid():
            return
        self._pid = None
        self._stop.set()
        thread = self._thread
        if thread is not None:
            thread.join(LAST_PATIENCE_S)
        self._open.close()
        self._exact.close()


def _why(error: BaseException) -> str:
    """What went wrong, without any words of the server's."""
    import httpx
    from chromadb.errors import ChromaError

    cause = error if isinstance(error, httpx.HTTPError) else error.__context__
    if isinstance(error, ChromaError):
        return f"refuses what it was asked ({error.name()})"
    if isinstance(cause, httpx.TimeoutException):
        return "does not answer in time"
    if isinstance(cause, httpx.HTTPStatusError):
        return f"answers with an error ({cause.response.status_code})"
    if isinstance(cause, httpx.TransportError):
        return f"cannot be reached ({type(cause).__name__})"
    return f"cannot be used ({type(error).__name__})"
