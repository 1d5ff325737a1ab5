"""A real Chroma server that dies, hangs, refuses, loses and is shared: nothing is lost, and everything is told."""

import http.client
import http.server
import json
import logging
import ssl
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from memory_os import Memory
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.build import open_database
from memory_os.errors import ConfigError, StoreError
from memory_os.stores.chroma_server import ChromaServerIndex, read_address
from memory_os.stores.records import Records
from memory_os.types import NewSegment

ALICE = ("alice",)
F = "hash-64-v1"
SECRET = "tok-4711-secret"


def opened(path, server, **options) -> Memory:
    return Memory.open(path, vectors=getattr(server, "url", server), **{"embedder": "hash", **options})


def until(what, seconds=120):
    """Wait for what comes by itself."""
    for _ in range(seconds * 20):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def notes_of(scope) -> str:
    return " ".join(scope.context("Where is the kite?", budget=600).trace.notes)


def equal(memory) -> bool:
    """Whether the server holds exactly what the rows hold."""
    names = memory.parts.store.namespaces(emptied=True)
    return not any(any(memory.parts.index.differences(ns, deep=True).values()) for ns in names)


# -- the address -------------------------------------------------------------------------------------------------------


def test_an_address_is_read_and_shows_no_token():
    address = read_address(f"chroma+https://:{SECRET}@db.example:8443/?tenant=t%201&database=d", {"CHROMA_TOKEN": "x"})
    assert (address.host, address.port, address.tls) == ("db.example", 8443, True)
    assert (address.tenant, address.database, address.token) == ("t 1", "d", SECRET)
    assert SECRET not in f"{address} {address!r}"
    assert read_address("chroma+http://h", {"CHROMA_TOKEN": "x"}).token == "x"
    assert [read_address(f"chroma+{s}://[::1]", {}).port for s in ("http", "https")] == [8000, 443]
    assert str(read_address("chroma+http://[::1]", {})) == "[::1]:8000"


@pytest.mark.parametrize(
    "url",
    ["chroma+http://", "chroma+http://h:port", "chroma+http://h/a/path", "chroma+http://h/?tenants=t", "chroma+h://"],
)
def test_a_url_that_cannot_be_used_is_one_error_without_the_token(tmp_path, url):
    url = url.replace("://", f"://:{SECRET}@", 1)
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path / "memory.db", url)
    assert "chroma+http://HOST:PORT" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_config_shows_no_token(capsys):
    from memory_os.cli.main import app

    for words in (["config"], ["config", "--json"]):
        with pytest.raises(SystemExit):
            app([*words, "--vectors", f"chroma+http://:{SECRET}@localhost:1"])
        shown = capsys.readouterr().out
        assert SECRET not in shown
        assert "***@localhost:1" in shown


def test_the_command_uses_a_server(tmp_path, chroma_server, capsys, monkeypatch):
    from memory_os.cli.main import app

    with Memory.open(tmp_path / "memory.db", embedder="hash") as memory:
        memory.namespace("default").add("The kite is under the bed.")
    monkeypatch.setenv("MEMOS_EMBEDDER", "hash")
    for words in (["search", "kite", "--json"], ["doctor", "--json"]):
        with pytest.raises(SystemExit) as left:
            app([*words, "--store", str(tmp_path / "memory.db"), "--vectors", chroma_server.url])
        assert left.value.code == 0
    found, checked = capsys.readouterr().out.split("]\n{", 1)
    assert "under the bed" in found
    assert json.loads("{" + checked)["found"]["pending_deliveries"] == 0


# -- outages -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_outage_is_told_survived_and_healed_by_itself(tmp_path, own_chroma, caplog):
    with opened(tmp_path / "memory.db", own_chroma, llm=ScriptedLLM(["Under the bed.", "Still there."])) as memory:
        scope = memory.namespace("alice").session("monday")
        kite = scope.add("The kite is under the bed.")
        assert scope.nearest("kite", k=1)[0].segment.id == kite.id
        assert "Chroma" not in notes_of(scope)
        own_chroma.kill()
        assert "Chroma server" in notes_of(scope)
        boat = scope.add("The boat is in the harbour.")
        assert scope.nearest("The boat is in the harbour.", k=1)[0].segment.id == boat.id
        assert boat.id in {hit.segment.id for hit in scope.search("boat")}
        assert "cannot be reached" in " ".join(scope.chat("Where is the kite?").trace.notes)
        assert memory.check()["index_unreachable"]
        with pytest.raises(StoreError, match="try again when it is back"):
            memory.parts.index.ids(ALICE)
        own_chroma.start()
        until(lambda: "Chroma" not in notes_of(scope))
        scope.context("kite", budget=600)
        assert equal(memory)
        assert not any(memory.check(deep=True).values())
    assert "cannot be reached" in caplog.text
    assert "is back" in caplog.text


@pytest.mark.slow
def test_a_server_that_hangs_is_waited_for_once_and_not_at_every_call(tmp_path, own_chroma):
    with opened(tmp_path / "memory.db", own_chroma) as memory:
        scope = memory.namespace("alice")
        scope.add("The kite is under the bed.")
        assert "Chroma" not in notes_of(scope)
        own_chroma.freeze()
        assert "does not answer in time" in notes_of(scope)
        quick = memory.parts.index._quick
        memory.parts.index._quick = None  # who asked it now would fail, and say so
        assert all("does not answer in time" in notes_of(scope) for _ in range(3))
        memory.parts.index._quick = quick
        own_chroma.thaw()
        until(lambda: "Chroma" not in notes_of(scope))


@pytest.mark.slow
def test_opened_while_the_server_is_away_and_closed_before_it_is_back(tmp_path, own_chroma):
    own_chroma.kill()
    with opened(tmp_path / "memory.db", own_chroma) as memory:
        scope = memory.namespace("alice")
        first = scope.add("The kite is under the bed.")
        assert "Chroma" in notes_of(scope)
    own_chroma.start()
    with opened(tmp_path / "memory.db", own_chroma) as memory:
        scope = memory.namespace("alice")
        assert scope.nearest("kite", k=1)[0].segment.id == first.id
        assert "Chroma" not in notes_of(scope)
        assert equal(memory)


@pytest.mark.slow
def test_what_was_forgotten_during_an_outage_leaves_the_server_when_it_is_back(tmp_path, own_chroma):
    path = tmp_path / "memory.db"
    with opened(path, own_chroma) as memory:
        gone, late, kept = (memory.namespace("alice").add(f"The kite number {n}.") for n in range(3))
        memory.parts.index.sync(ALICE)
        assert memory.namespace("alice").forget(gone.id)["unfinished"] == 0
        assert memory.parts.index.ids(ALICE) == {late.id, kept.id}
        own_chroma.kill()
        assert memory.namespace("alice").forget(late.id)["unfinished"] == 1
        assert {hit.segment.id for hit in memory.namespace("alice").nearest("kite")} == {kept.id}
    own_chroma.start()
    with opened(path, own_chroma) as memory:  # another process, say, that never looks into this namespace
        until(lambda: memory.parts.index.ids(ALICE) == {kept.id})
        own_chroma.kill()
        assert memory.namespace("alice").forget(everything=True)["unfinished"] == 1
        own_chroma.start()
        until(lambda: not memory.parts.index._away)  # while it stays open
        assert memory.parts.index.ids(ALICE) == set()


def test_what_another_forgot_without_the_server_is_taken_out_at_the_next_open(tmp_path, chroma_server):
    path = tmp_path / "memory.db"
    with opened(path, chroma_server) as memory:
        gone = memory.namespace("alice").add("The kite.")
        memory.parts.index.sync(ALICE)
    with Memory.open(path, embedder="hash") as memory:
        memory.namespace("alice").forget(gone.id)
    with opened(path, chroma_server) as memory:
        until(lambda: memory.parts.index.ids(ALICE) == set())


# -- sharing -----------------------------------------------------------------------------------------------------------

WORKER = """
import sys
from memory_os import Memory
path, url, name = sys.argv[1:]
with Memory.open(path, embedder="hash", vectors=url) as memory:
    scope = memory.namespace("alice").session(name)
    for n in range(30):
        segment = scope.add(f"{name} flew the kite number {n}.")
        found = {hit.segment.id for hit in scope.nearest(segment.text, k=10)}  # some texts have the same vector
        assert segment.id in found, "what one has written one finds"
        if n % 5 == 4:
            scope.forget(segment.id)
        if n % 10 == 9:
            scope.context("Where is the kite?", budget=500)
"""


@pytest.mark.slow
def test_processes_that_write_and_forget_at_once_leave_the_server_equal_to_the_rows(tmp_path, chroma_server):
    path = tmp_path / "memory.db"
    with opened(path, chroma_server):
        pass
    command = [sys.executable, "-c", WORKER, str(path), chroma_server.url]
    workers = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in ("ana", "ben", "cyd")]
    for worker in workers:
        _, said = worker.communicate(timeout=500)
        assert worker.returncode == 0, said
    with opened(path, chroma_server) as memory:
        memory.namespace("alice").nearest("kite")
        assert memory.namespace("alice").stats()["segments"] == 3 * 24
        assert equal(memory)


def test_forgetting_leaves_nothing_under_another_embedder_and_nothing_half_made(tmp_path, chroma_server):
    path = tmp_path / "memory.db"
    with opened(path, chroma_server) as memory:
        one, other = memory.namespace("alice").add("The kite."), memory.namespace("bob").add("The boat.")
        for namespace in (ALICE, ("bob",)):
            memory.parts.index.sync(namespace)
        mine = collection_of(memory.parts.index, chroma_server).name
    with opened(path, chroma_server, embedder=HashEmbedder(96)) as memory:
        half = memory.parts.index._collections._collection(ALICE)  # and killed before anything was claimed
        half.upsert(ids=[one.id], embeddings=[[1.0] * 96], metadatas=[{"seq": 1, "sum": 1}])
    with opened(path, chroma_server, embedder=HashEmbedder(32)) as memory:
        assert memory.namespace("alice").forget(one.id)["unfinished"] == 0
        there = {each.name for each in chroma_server.client().list_collections(limit=1000)}
        assert not there & {mine, half.name}
        memory.parts.index.purge(None)
    with opened(path, chroma_server) as memory:
        assert memory.parts.index.ids(("bob",)) == {other.id}  # another namespace's stays


def test_what_is_forgotten_with_a_server_leaves_an_embedded_index_too(tmp_path, chroma_server):
    path = tmp_path / "memory.db"
    with opened(path, "chroma") as memory:
        one = memory.namespace("alice").add("The kite.")
        memory.parts.index.sync(ALICE)
    with opened(path, chroma_server) as memory:
        assert memory.namespace("alice").forget(one.id)["unfinished"] == 0
    assert {each.name for each in (tmp_path / "memory.db.chroma").iterdir()} == {"owner.lock"}


@pytest.fixture
def store(tmp_path):
    store = Records(open_database(tmp_path / "memory.db"), count_tokens=len)
    yield store
    store.close()


@pytest.fixture
def index(store, chroma_server):
    index = ChromaServerIndex(store, fingerprint=F, address=read_address(chroma_server.url, {}))
    yield index
    index.close()


def fill(store, n, namespace=ALICE):
    rows = np.random.default_rng(n).standard_normal((n, 24)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ids = [s.id for s in store.append(namespace, [NewSegment(f"t{i}", "s") for i in range(n)])]
    store.put_vectors(namespace, F, ids, rows)
    return ids, rows


def collection_of(index, chroma_server):
    name = index._collections._name(ALICE)
    return chroma_server.client().get_collection(name, embedding_function=None)


def test_a_vector_delivered_late_and_one_that_was_lost_are_seen_by_the_next_search(store, index, chroma_server):
    ids, rows = fill(store, 6)
    index.search(ALICE, rows[0], 3)
    theirs = collection_of(index, chroma_server)
    store.delete({ALICE: [ids[5]]})
    index.search(ALICE, rows[0], 3)
    theirs.upsert(ids=[ids[5]], embeddings=rows[5:], metadatas=[{"seq": 6, "sum": 1}])  # a slow process's
    assert ids[5] not in {id_ for id_, _ in index.search(ALICE, rows[5], 6)}
    assert index.ids(ALICE) == set(ids[:5])
    theirs.delete(ids=[ids[2]])
    assert index.search(ALICE, rows[2], 1)[0][0] == ids[2]
    theirs.modify(metadata={"epoch": 0, "last": 1})  # an older claim over a newer one
    assert index.search(ALICE, rows[2], 1)[0][0] == ids[2]
    assert not any(index.differences(ALICE, deep=True).values())


def test_an_upsert_that_comes_after_the_deletion_is_undone_by_who_sent_it(store, index, chroma_server):
    """Between reading its rows and delivering them another process forgets one of them, and delivers that."""
    ids, _ = fill(store, 4)
    other = ChromaServerIndex(store, fingerprint=F, address=read_address(chroma_server.url, {}))
    read = store.read_vectors

    def slowly(*args):
        found = read(*args)
        store.read_vectors = read
        store.delete({ALICE: [ids[1]]})
        other.sync(ALICE)
        return found

    store.read_vectors = slowly
    index.sync(ALICE)
    assert other.ids(ALICE) == {ids[0], ids[2], ids[3]}
    other.close()


def test_who_lists_late_takes_out_nothing_that_another_delivered(store, index, chroma_server):
    """Rows are read after what is held was listed: else what came in between would look deleted, and be deleted."""
    ids, _ = fill(store, 4)
    index.sync(ALICE)
    store.delete({ALICE: [ids[0]]})  # both compare everything now
    other = ChromaServerIndex(store, fingerprint=F, address=read_address(chroma_server.url, {}))
    until(lambda: not other._due)
    store.delete({ALICE: [ids[1]]})
    read, more = store.read_vectors, []

    def slowly(*args):
        found = read(*args)
        store.read_vectors = read
        more.extend(fill(store, 3)[0])
        other.sync(ALICE)
        return found

    store.read_vectors = slowly
    index.sync(ALICE)
    assert other.ids(ALICE) == {*ids[2:], *more}
    other.close()


def test_the_doctor_counts_and_mends_what_is_missing_extra_and_wrong(tmp_path, chroma_server):
    with opened(tmp_path / "memory.db", chroma_server) as memory:
        scope = memory.namespace("alice")
        ids = [scope.add(f"The kite number {n} is red.").id for n in range(6)]
        assert len(memory.check()["pending_deliveries"]) == 6
        scope.nearest("kite")
        theirs = collection_of(memory.parts.index, chroma_server)
        vector = theirs.get(ids=[ids[0]], include=["embeddings"])["embeddings"][0]
        theirs.delete(ids=[ids[1]])
        theirs.upsert(ids=["nobody's"], embeddings=[vector])  # as many as before
        theirs.update(ids=[ids[2]], metadatas=[{"sum": 1}])
        theirs.update(ids=[ids[3]], embeddings=[-np.asarray(vector)])
        found = memory.check()
        assert (found["index"], found["index_missing"], found["index_wrong"]) == (["nobody's"], [ids[1]], [ids[2]])
        assert memory.check(deep=True)["index_wrong"] == sorted(ids[2:4])
        counts = memory.repair(deep=True)
        assert (counts["index"], counts["index_missing"], counts["index_wrong"]) == (1, 1, 2)
        assert not any(memory.check(deep=True).values())


def test_two_stores_on_one_server_keep_apart(tmp_path, chroma_server):
    with opened(tmp_path / "a.db", chroma_server) as ours, opened(tmp_path / "b.db", chroma_server) as theirs:
        mine = ours.namespace("alice").add("The kite.")
        other = theirs.namespace("alice").add("The boat.")
        assert [h.segment.id for h in ours.namespace("alice").nearest("kite")] == [mine.id]
        assert [h.segment.id for h in theirs.namespace("alice").nearest("kite")] == [other.id]
        assert ours.parts.index.ids(ALICE) == {mine.id}
        theirs.namespace("alice").forget(everything=True)
        assert [h.segment.id for h in ours.namespace("alice").nearest("kite")] == [mine.id]
        assert ours.parts.index.ids(ALICE) == {mine.id}


def test_more_than_one_waits_for_is_delivered_in_the_background(store, index):
    ids, rows = fill(store, 700)
    assert index.search(ALICE, rows[5], 1)[0][0] == ids[5]
    assert "on their way" in index.notes[0]
    until(lambda: index.search(ALICE, rows[5], 1) and not index.notes)
    assert index.search(ALICE, rows[5], 1)[0][0] == ids[5]


# -- who may -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(chroma_server):
    """The server behind a proxy that asks for a token, as in production: Chroma's own checks none."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != f"Bearer {self.server.token}":
                status, kind, answer = 401, "text/plain", f"no: {dict(self.headers)}".encode()  # tells what it was sent
            else:
                upstream = http.client.HTTPConnection("127.0.0.1", chroma_server.port)
                upstream.request(self.command, self.path, body, {"Content-Type": "application/json"})
                response = upstream.getresponse()
                status, kind, answer = response.status, response.getheader("Content-Type"), response.read()
                upstream.close()
            self.send_response(status)
            self.send_header("Content-Type", kind or "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = do_DELETE = pass_on

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.token, server.block_on_close = SECRET, False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_token_opens_the_door_and_is_shown_nowhere(tmp_path, guarded, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    place = f"127.0.0.1:{guarded.server_port}"
    for url in (f"chroma+http://{place}", f"chroma+http://:wrong-{SECRET}@{place}"):
        with pytest.raises(ConfigError, match="refuses us \\(401\\)") as caught:
            opened(tmp_path / "memory.db", url)
        assert SECRET not in f"{caught.value!r} {caught.value.__cause__!r}"
    monkeypatch.setenv("CHROMA_TOKEN", SECRET)
    with opened(tmp_path / "memory.db", f"chroma+http://{place}") as memory:
        scope = memory.namespace("alice")
        scope.add("The kite is under the bed.")
        assert "Chroma" not in notes_of(scope)
        told = [repr(memory.parts.index), repr(memory.parts), json.dumps(scope.stats(), default=str)]
        guarded.token = "another"  # revoked while it is open
        context = scope.context("Where is the kite?", budget=600, record=True)
        assert "Chroma server" in " ".join(context.trace.notes)
        told += [repr(context.trace), *memory.parts.index.notes, repr(memory.check())]
        assert "(401)" in " ".join(told)
        guarded.token = SECRET
        until(lambda: "Chroma" not in notes_of(scope))
    assert SECRET not in " ".join(told)
    assert SECRET not in caplog.text


@pytest.mark.parametrize("part", ["?tenant=nobody", "?database=none"])
def test_a_tenant_or_database_that_is_not_there_is_one_error(tmp_path, chroma_server, part):
    with pytest.raises(ConfigError, match="has no database"):
        opened(tmp_path / "memory.db", f"{chroma_server.url}/{part}")


def test_what_is_no_chroma_server_is_one_error(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(ConfigError, match="is no Chroma server"):
            opened(tmp_path / "memory.db", f"chroma+http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def test_over_tls_the_certificate_must_be_trusted(tmp_path, guarded, monkeypatch):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    guarded.socket = tls.wrap_socket(guarded.socket, server_side=True)
    url = f"chroma+https://:{SECRET}@localhost:{guarded.server_port}"
    with pytest.raises(ConfigError, match="certificate"):
        opened(tmp_path / "memory.db", url)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    with opened(tmp_path / "memory.db", url) as memory:
        memory.namespace("alice").add("The kite.")
        assert "Chroma" not in notes_of(memory.namespace("alice"))
