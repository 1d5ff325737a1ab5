"""One contract suite for every vector index, against brute force over the same rows."""

import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest

from memory_os.build import open_database
from memory_os.stores import pgvector
from memory_os.stores.chroma import ChromaIndex
from memory_os.stores.chroma_collections import Collections
from memory_os.stores.chroma_server import ChromaServerIndex, read_address
from memory_os.stores.exact import ExactIndex
from memory_os.stores.pgvector import PgVectorIndex
from memory_os.stores.records import Records
from memory_os.types import NewSegment

ALICE, BOB = ("alice",), ("bob",)
F = "model-a"


KINDS = ["exact", "chroma", "server", "exact on postgres", "server on postgres", "pgvector", "pgvector by its graph"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def store(kind, request, tmp_path):
    place = tmp_path / "memory.db"
    if kind not in ("exact", "chroma", "server"):
        server = request.getfixturevalue("postgres_server")
        place = server.url(server.new())
    opened = Records(open_database(place), count_tokens=len)
    yield opened
    opened.close()


@pytest.fixture
def make_index(kind, request, store, tmp_path, monkeypatch):
    opened = []
    if kind == "pgvector by its graph":
        monkeypatch.setattr(pgvector, "EXACT_UP_TO", 0)

    def make():
        if kind == "chroma":
            index = ChromaIndex(store, fingerprint=F, folder=tmp_path / "chroma")
        elif kind.startswith("server"):
            address = read_address(request.getfixturevalue("chroma_server").url, {})
            index = ChromaServerIndex(store, fingerprint=F, address=address)
        elif kind.startswith("pgvector"):
            index = PgVectorIndex(store.database, fingerprint=F)
        else:
            index = ExactIndex(store, fingerprint=F)
        opened.append(index)
        return index

    yield make
    for index in opened:
        assert not getattr(index, "notes", ()), "the server was not used"
        index.close()


def unit(rng, n, d=24):
    rows = rng.standard_normal((n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def add(store, namespace, rows, fingerprint=F):
    segments = store.append(namespace, [NewSegment(f"t{i}", "s") for i in range(len(rows))])
    store.put_vectors(namespace, fingerprint, [s.id for s in segments], rows)
    return [s.id for s in segments]


def test_search_equals_brute_force(store, make_index):
    rng = np.random.default_rng(7)
    rows = unit(rng, 120)
    ids = add(store, ALICE, rows)
    index = make_index()
    for query in unit(rng, 5):
        scores = rows @ query
        best = np.argsort(-scores, kind="stable")[:10]
        found = index.search(ALICE, query, 10)
        assert [id_ for id_, _ in found] == [ids[i] for i in best]
        np.testing.assert_allclose([score for _, score in found], scores[best], atol=1e-5)


def test_empty_in_empty_out(store, make_index):
    index = make_index()
    assert index.search(ALICE, np.ones(24, dtype=np.float32), 5) == []
    add(store, ALICE, unit(np.random.default_rng(0), 2))
    assert index.search(ALICE, np.ones(24, dtype=np.float32), 0) == []
    assert len(index.search(ALICE, np.ones(24, dtype=np.float32), 50)) == 2


def test_rows_added_later_are_found_and_deleted_ones_are_gone(store, make_index):
    rng = np.random.default_rng(1)
    index = make_index()
    first = add(store, ALICE, unit(rng, 5))
    assert {id_ for id_, _ in index.search(ALICE, unit(rng, 1)[0], 99)} == set(first)
    rows = unit(rng, 40)
    later = add(store, ALICE, rows)
    assert index.search(ALICE, rows[3], 1)[0][0] == later[3]
    store.delete({ALICE: [later[3]]})
    assert later[3] not in {id_ for id_, _ in index.search(ALICE, rows[3], 99)}
    index.sync(ALICE)
    assert index.ids(ALICE) == {*first, *later} - {later[3]}


def test_upto_bounds_the_search_and_ties_go_to_the_smaller_seq(store, make_index):
    row = unit(np.random.default_rng(2), 1)
    ids = add(store, ALICE, np.repeat(row, 6, axis=0))
    index = make_index()
    assert [id_ for id_, _ in index.search(ALICE, row[0], 6, upto=4)] == ids[:4]


def test_what_comes_after_upto_takes_nobodys_place(store, make_index):
    rng = np.random.default_rng(6)
    query = unit(rng, 1)[0]
    near = query + 0.01 * rng.standard_normal((90, 24)).astype(np.float32)
    far = unit(rng, 10)
    ids = add(store, ALICE, np.concatenate([far, near / np.linalg.norm(near, axis=1, keepdims=True)]))
    found = make_index().search(ALICE, query, 5, upto=10)
    assert [id_ for id_, _ in found] == [ids[i] for i in np.argsort(-(far @ query), kind="stable")[:5]]


def test_a_folder_of_another_store_that_was_here_is_brought_to_this_one(tmp_path):
    for name in ("before.db", "after.db"):
        rows = unit(np.random.default_rng(len(name)), 40)
        with closing(Records(open_database(tmp_path / name), count_tokens=len)) as store:
            ids = add(store, ALICE, rows)
            with closing(ChromaIndex(store, fingerprint=F, folder=tmp_path / "chroma")) as index:
                assert index.search(ALICE, rows[7], 5)[0][0] == ids[7]
                assert index.ids(ALICE) == set(ids)


def test_a_collection_that_finds_too_few_is_asked_no_other_way_without_a_bound(tmp_path, monkeypatch):
    rows = unit(np.random.default_rng(1), 80)
    with closing(Records(open_database(tmp_path / "memory.db"), count_tokens=len)) as store:
        ids = add(store, ALICE, rows)
        found = Collections._found
        monkeypatch.setattr(Collections, "_found", lambda *told: found(*told)[:3])
        with closing(ChromaIndex(store, fingerprint=F, folder=tmp_path / "chroma")) as index:
            assert index.search(ALICE, rows[7], 5)[0][0] == ids[7]


def test_namespaces_and_fingerprints_stay_apart(store, make_index):
    rng = np.random.default_rng(3)
    rows = unit(rng, 4)
    mine, others = add(store, ALICE, rows), add(store, BOB, rows)
    stale = add(store, ALICE, unit(rng, 2, d=8), fingerprint="model-b")
    index = make_index()
    found = {id_ for id_, _ in index.search(ALICE, rows[0], 99)}
    assert found == set(mine)
    assert not found & {*others, *stale}


def test_a_dropped_index_rebuilds_itself(store, make_index):
    rows = unit(np.random.default_rng(4), 8)
    ids = add(store, ALICE, rows)
    index = make_index()
    index.sync(ALICE)
    index.drop(ALICE)
    index.drop(ALICE)
    assert index.ids(ALICE) == set()
    assert index.search(ALICE, rows[5], 1)[0][0] == ids[5]


def test_an_index_opened_again_catches_up(store, make_index):
    rng = np.random.default_rng(5)
    rows = unit(rng, 6)
    index = make_index()
    first = add(store, ALICE, rows[:3])
    index.sync(ALICE)
    index.close()
    more = add(store, ALICE, rows[3:])
    store.delete({ALICE: [first[0]]})
    again = make_index()
    assert {id_ for id_, _ in again.search(ALICE, rows[0], 99)} == {*first[1:], *more}


SECOND_OWNER = """
import sys
from pathlib import Path
from memory_os.errors import StoreLockedError
from memory_os.stores.chroma import ChromaIndex
try:
    ChromaIndex(None, fingerprint="f", folder=Path(sys.argv[1]))
except StoreLockedError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chroma"])
def test_a_second_owner_of_an_embedded_chroma_is_told_so(store, tmp_path):
    command = [sys.executable, "-c", SECOND_OWNER, str(tmp_path / "chroma")]
    index = ChromaIndex(store, fingerprint=F, folder=tmp_path / "chroma")
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "vectors='exact'" in second.stderr
    index.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
