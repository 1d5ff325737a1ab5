"""Files of vectors: the search over them is that over every row, whatever the data, and what is forgotten goes."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_os.build import open_database
from memory_os.errors import StoreError
from memory_os.memory import Memory
from memory_os.protocols import VectorRows
from memory_os.stores import exact
from memory_os.stores.exact import ExactIndex
from memory_os.stores.records import Records
from memory_os.stores.vectorfile import Filed, Unreadable, VectorFile, owned
from memory_os.types import NewSegment

A, F, RUN = ("alice",), "model-a", 64


@pytest.fixture(autouse=True)
def small_runs(monkeypatch):
    monkeypatch.setattr(exact, "RUN", RUN)


@pytest.fixture
def store(tmp_path):
    opened = Records(open_database(tmp_path / "memory.db"), count_tokens=len)
    yield opened
    opened.close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "memory.db.vectors"


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def vectors(seed, n, d, *, shape="clusters"):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, d))
    if shape == "clusters":
        rows = rows * np.exp(-np.arange(d) / 12) + 0.5 * rng.standard_normal((5, d))[rng.integers(0, 5, n)]
    elif shape == "copies":
        rows = rows[rng.integers(0, 3, n)]
    return unit(rows)


def add(store, rows, fingerprint=F):
    segments = store.append(A, [NewSegment(f"t{i}", "s") for i in range(len(rows))])
    store.put_vectors(A, fingerprint, [s.id for s in segments], rows)
    return [s.id for s in segments]


def forget(store, ids, *indexes):
    """As ``memory_os.forget`` does: whether nothing is left."""
    deleted = store.delete({A: ids})
    purged = [index.purge([A] if deleted.alone else None) for index in indexes]
    return store.scrub(deleted, index_purged=any(purged))


def files(folder):
    return sorted(folder.rglob("*.vectors"))


@given(
    seed=st.integers(0, 99),
    shape=st.sampled_from(["clusters", "noise", "copies"]),
    k=st.sampled_from([1, 3, 10, 70, 500]),
    d=st.sampled_from([8, 40, 96]),
    share=st.sampled_from([0.3, 1.0]),
)
def test_the_search_of_a_file_misses_nothing(tmp_path_factory, seed, shape, k, d, share):
    rows = vectors(seed, 300, d, shape=shape)
    found = VectorRows(np.arange(1, 301), [f"id{i}" for i in range(300)], list(range(1, 301)), rows)
    file = VectorFile.write(tmp_path_factory.mktemp("v") / "a.vectors", found, after=0, epoch=0)
    query, upto = vectors(seed + 1000, 1, d)[0], int(300 * share)
    cosines = np.einsum("ij,j->i", rows, query)[:upto]
    places, near = Filed([file]).near(query, k, -np.inf, upto)
    assert places.max() < upto
    floor = np.sort(cosines)[-min(k, upto)]
    assert set(np.flatnonzero(cosines >= floor)) <= set(places.tolist())
    assert np.array_equal(near, cosines[places])


def test_a_row_that_is_near_by_what_its_code_leaves_out_is_found(tmp_path):
    rng = np.random.default_rng(0)
    rows = unit(np.hstack([rng.standard_normal((300, 32)), 0.2 * rng.standard_normal((300, 64))]))
    found = VectorRows(np.arange(1, 301), [f"id{i}" for i in range(300)], list(range(1, 301)), rows)
    file = VectorFile.write(tmp_path / "a.vectors", found, after=0, epoch=0)
    assert file._codes.shape == (300, 32)
    for j in range(0, 300, 20):
        query = np.concatenate([0.02 * rows[j - 1, :32], rows[j, 32:]])
        query = unit(query[None])[0]
        places, cosines = Filed([file]).near(query, 1, -np.inf, None)
        assert places[np.argmax(cosines)] == np.argmax(rows @ query) == j


@pytest.mark.parametrize("shape", ["clusters", "noise", "copies"])
@pytest.mark.parametrize("upto", [None, 100, 210])
def test_with_files_and_without_them_the_answer_is_the_same(store, folder, shape, upto):
    rows = vectors(3, 5 * RUN + 17, 48, shape=shape)
    ids = add(store, rows)
    index = ExactIndex(store, fingerprint=F, folder=folder)
    for query in vectors(4, 4, 48, shape=shape):
        cosines = np.einsum("ij,j->i", rows, query)[:upto]
        for k in (1, 7, 90, 999):
            best = np.lexsort((np.arange(len(cosines)), -cosines))[:k]
            found = index.search(A, query, k, upto=upto)
            assert [id_ for id_, _ in found] == [ids[i] for i in best]
            assert [cosine for _, cosine in found] == cosines[best].tolist()
        whole = np.einsum("ij,j->i", rows, query)
        np.testing.assert_array_equal(index.similarities(A, query, [*ids, "none"]), [*whole, 0.0])
    assert len(files(folder)) == 5
    assert index.ids(A) == set(ids)


def test_a_fresh_process_reads_only_the_rows_after_the_files(store, folder, monkeypatch):
    rows = vectors(5, 3 * RUN + 5, 32)
    ids = add(store, rows)
    ExactIndex(store, fingerprint=F, folder=folder).sync(A)
    read = []
    real = Records.read_vector_rows
    monkeypatch.setattr(
        Records, "read_vector_rows", lambda *args: read.append(len((found := real(*args)).rows)) or found
    )
    again = ExactIndex(store, fingerprint=F, folder=folder)
    assert again.search(A, rows[7], 1)[0][0] == ids[7]
    assert read == [1, 5]  # first the last one of the files


@pytest.mark.parametrize("kept", [0, RUN + 9])
def test_files_of_another_store_that_was_here_or_of_a_later_state_are_made_anew(store, folder, tmp_path, kept):
    before, later, own = (vectors(seed, 3 * RUN, 32) for seed in (5, 6, 7))
    ids = add(store, before[:kept])
    with closing(sqlite3.connect(tmp_path / "memory.db")) as raw:
        raw.execute(f"VACUUM INTO '{tmp_path / 'backup.db'}'")
    add(store, later)
    ExactIndex(store, fingerprint=F, folder=folder).sync(A)
    assert files(folder)
    with closing(Records(open_database(tmp_path / "backup.db"), count_tokens=len)) as restored:
        ids += add(restored, own)
        for _ in range(2):
            index = ExactIndex(restored, fingerprint=F, folder=folder)
            for n, row in enumerate([*before[:kept], *own]):
                assert index.search(A, row, 1)[0][0] == ids[n]
    assert files(folder)


def test_what_is_forgotten_leaves_the_files(store, folder):
    rows = vectors(6, 2 * RUN + 5, 32)
    ids = add(store, rows)
    index, other = (ExactIndex(store, fingerprint=F, folder=folder) for _ in range(2))
    index.sync(A)
    other.sync(A)
    gone = [3, 70, 2 * RUN + 1]
    assert forget(store, [ids[i] for i in gone], index)
    held = b"".join(path.read_bytes() for path in files(folder))
    for i in gone:
        assert rows[i].tobytes() not in held
        assert ids[i].encode() not in held
    assert rows[4].tobytes() in held
    for each in (index, other, ExactIndex(store, fingerprint=F, folder=folder)):
        assert {id_ for id_, _ in each.search(A, rows[3], 999)} == set(ids) - {ids[i] for i in gone}
    assert forget(store, ids, index)
    assert files(folder) == []


def test_a_forgetting_that_was_cut_short_is_made_good_when_the_store_is_next_opened(store, folder, tmp_path):
    rows = vectors(7, 2 * RUN, 32)
    ids = add(store, rows)
    ExactIndex(store, fingerprint=F, folder=folder).sync(A)
    store.delete({A: [ids[9]]})  # and the process ends here
    store.database._disconnect()
    assert rows[9].tobytes() in files(folder)[0].read_bytes()
    again = Records(open_database(tmp_path / "memory.db"), count_tokens=len)  # by one who has no use for vectors
    assert rows[9].tobytes() not in b"".join(path.read_bytes() for path in files(folder))
    assert {id_ for id_, _ in ExactIndex(again, fingerprint=F, folder=folder).search(A, rows[9], 999)} == {
        *ids[:9], *ids[10:],
    }  # fmt: skip
    again.close()


def test_a_search_takes_out_of_the_files_what_is_gone(store, folder):
    rows = vectors(7, RUN, 32)
    ids = add(store, rows)
    ExactIndex(store, fingerprint=F, folder=folder).sync(A)
    store.delete({A: [ids[9]]})
    assert ids[9] not in {id_ for id_, _ in ExactIndex(store, fingerprint=F, folder=folder).search(A, rows[9], 99)}
    assert rows[9].tobytes() not in files(folder)[0].read_bytes()


def test_files_of_another_embedder_are_weeded_too(store, folder):
    rows, others = vectors(20, RUN, 32), vectors(21, RUN + 3, 16)
    ids = add(store, rows)
    ExactIndex(store, fingerprint=F, folder=folder).sync(A)
    more = add(store, others, "model-b")  # a store in the midst of a change
    ExactIndex(store, fingerprint="model-b", folder=folder).sync(A)
    assert len(files(folder)) == 2
    assert forget(store, [ids[5], more[7]])
    held = b"".join(path.read_bytes() for path in files(folder))
    assert rows[5].tobytes() not in held
    assert others[7].tobytes() not in held
    assert rows[6].tobytes() in held
    assert others[8].tobytes() in held
    assert forget(store, ids)
    [left] = files(folder)
    assert others[8].tobytes() in left.read_bytes()


def test_while_another_process_writes_there_it_is_unfinished_and_done_when_the_store_is_closed(store, folder):
    rows = vectors(22, RUN, 32)
    ids = add(store, rows)
    index = ExactIndex(store, fingerprint=F, folder=folder)
    index.sync(A)
    deleted = store.delete({A: ids[:1]})
    with owned(index._place(A), 0):
        assert not store.scrub(deleted, index_purged=False, patience_s=0)
        assert rows[0].tobytes() in files(folder)[0].read_bytes()
    store.close()
    assert rows[0].tobytes() not in files(folder)[0].read_bytes()


def test_what_is_forgotten_while_a_file_is_about_to_be_written_is_not_in_it(store, folder, monkeypatch):
    rows = vectors(23, RUN, 32)
    ids = add(store, rows)
    index = ExactIndex(store, fingerprint=F, folder=folder)
    filed = index._file

    def late(*args):
        monkeypatch.setattr(index, "_file", filed)
        assert forget(store, ids[:1])  # by another process: there is no file yet
        monkeypatch.setattr(VectorFile, "bury", lambda *_: pytest.fail("it was written"))
        filed(*args)

    monkeypatch.setattr(index, "_file", late)
    assert ids[0] not in {id_ for id_, _ in index.search(A, rows[0], 999)}
    assert files(folder) == []


def test_a_file_of_rows_that_were_added_meanwhile_is_not_taken_for_one_of_rows_that_are_gone(
    store, folder, monkeypatch
):
    ids = add(store, vectors(25, 1, 32))
    rows, more = vectors(26, RUN, 32), []
    ExactIndex(store, fingerprint=F, folder=folder)._place(A).mkdir(parents=True)
    read = store.database._vector_rows

    def slowly():
        found = read()
        more.extend(add(store, rows))
        ExactIndex(store, fingerprint=F, folder=folder).sync(A)  # another process's
        return found

    monkeypatch.setattr(store.database, "_vector_rows", slowly)
    assert forget(store, ids)
    [left] = files(folder)
    assert rows[4].tobytes() in left.read_bytes()
    assert ExactIndex(store, fingerprint=F, folder=folder).search(A, rows[4], 1)[0][0] == more[4]


def test_files_that_another_process_deleted_are_made_anew_once_something_is_forgotten(store, folder):
    rows = vectors(24, 2 * RUN, 32)
    ids = add(store, rows)
    here, other = (ExactIndex(store, fingerprint=F, folder=folder) for _ in range(2))
    here.sync(A)
    other.drop(A)
    assert here.search(A, rows[3], 1)[0][0] == ids[3]
    store.delete({A: ids[:1]})
    assert {id_ for id_, _ in here.search(A, rows[3], 999)} == set(ids[1:])
    assert ids[0] not in here.ids(A)


def test_files_that_another_process_wrote_are_looked_at_when_something_is_forgotten(store, folder):
    rows = vectors(8, RUN - 1, 32)
    ids = add(store, rows)
    here = ExactIndex(store, fingerprint=F, folder=folder)
    here.sync(A)  # no file yet
    ids += add(store, vectors(9, 3, 32))
    ExactIndex(store, fingerprint=F, folder=folder).sync(A)  # writes one
    assert forget(store, [ids[2]], here)
    assert rows[2].tobytes() not in files(folder)[0].read_bytes()


def test_vectors_made_anew_take_the_place_of_the_former_ones(store, folder):
    rows = vectors(10, RUN + 4, 32)
    ids = add(store, rows)
    index = ExactIndex(store, fingerprint=F, folder=folder)
    index.sync(A)
    store.put_vectors(A, "model-b", ids, vectors(11, len(ids), 16))
    store.put_vectors(A, F, ids, rows)  # the epoch is the same
    for each in (index, ExactIndex(store, fingerprint=F, folder=folder)):
        found = each.search(A, rows[0], 999)
        assert sorted(id_ for id_, _ in found) == sorted(ids)


@pytest.mark.parametrize("harm", ["cut", "overwritten", "emptied"])
def test_a_file_that_is_not_whole_is_made_anew(store, folder, harm):
    rows = vectors(12, 2 * RUN, 32)
    ids = add(store, rows)
    ExactIndex(store, fingerprint=F, folder=folder).sync(A)
    [path] = [path for path in files(folder) if path.name.endswith("-0.vectors")]
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-64], "overwritten": b"x" * 40 + whole[40:], "emptied": b""}[harm])
    with pytest.raises(Unreadable):
        VectorFile(path)
    assert ExactIndex(store, fingerprint=F, folder=folder).search(A, rows[1], 1)[0][0] == ids[1]


def test_files_are_private_and_dropped_with_the_index(store, folder):
    add(store, vectors(13, RUN, 32))
    index = ExactIndex(store, fingerprint=F, folder=folder)
    index.sync(A)
    [path] = files(folder)
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    assert "alice" not in str(path.relative_to(folder))
    index.drop(A)
    assert files(folder) == []
    index.sync(A)
    assert len(files(folder)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_where_no_file_can_be_written_vectors_stay_in_memory(store, folder, caplog):
    folder.mkdir(mode=0o500)
    rows = vectors(14, RUN, 32)
    ids = add(store, rows)
    assert ExactIndex(store, fingerprint=F, folder=folder).search(A, rows[1], 1)[0][0] == ids[1]
    assert "cannot be written" in caplog.text


def test_a_file_in_the_place_of_the_folder_is_told_of_and_nothing_is_lost(store, folder, caplog):
    folder.write_text("")
    rows = vectors(14, RUN, 32)
    ids = add(store, rows)
    assert ExactIndex(store, fingerprint=F, folder=folder).search(A, rows[1], 1)[0][0] == ids[1]
    assert "cannot be written" in caplog.text


def test_what_cannot_be_taken_out_is_unfinished_and_no_search_goes_over_it(store, folder, monkeypatch, caplog):
    rows = vectors(15, RUN, 32)
    ids = add(store, rows)
    index = ExactIndex(store, fingerprint=F, folder=folder)
    index.sync(A)
    monkeypatch.setattr(VectorFile, "bury", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert not forget(store, ids[:1], index)
    assert "Permission denied" in caplog.text
    with pytest.raises(StoreError, match="cannot be written"):
        index.search(A, rows[0], 1)


HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_while_another_process_writes_rows_stay_in_memory(store, folder):
    rows = vectors(16, RUN, 32)
    ids = add(store, rows)
    index = ExactIndex(store, fingerprint=F, folder=folder)
    place = index._place(A)
    place.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(place / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert index.search(A, rows[1], 1)[0][0] == ids[1]
        assert files(folder) == []
        holder.stdin.close()
    add(store, vectors(17, 1, 32))
    index.sync(A)
    assert len(files(folder)) == 1


def test_least_used_namespaces_are_let_go(store, monkeypatch):
    monkeypatch.setattr(exact, "MAX_BYTES", 20_000)
    index = ExactIndex(store, fingerprint=F)
    names = [(f"n{i}",) for i in range(9)]
    for name in names:
        segments = store.append(name, [NewSegment(f"t{i}", "s") for i in range(10)])
        store.put_vectors(name, F, [s.id for s in segments], vectors(1, 10, 64))
        index.sync(name)
    held = [name for name in names if index.ids(name)]
    assert held == names[-len(held) :]
    assert 1 <= len(held) < 9
    assert len(index.search(names[0], vectors(1, 1, 64)[0], 99)) == 10


def test_a_memory_with_files_gives_the_same_context_and_forgets(tmp_path):
    path = Path(tmp_path / "memory.db")
    new = [
        NewSegment(f"Turn {i} about {['cats', 'dogs', 'boats'][i % 3]} and number {i * 7}.", "s") for i in range(150)
    ]
    contexts = []
    for runs in (10_000, RUN):
        exact.RUN = runs
        with Memory.open(path, embedder="hash") as memory:
            scope = memory.namespace("a")
            if not scope.history(1):
                scope.add_many(new)
            contexts.append(scope.context("Which number was about dogs 77?", budget=400).text)
    assert contexts[0] == contexts[1]
    with Memory.open(path, embedder="hash") as memory:
        assert files(Path(f"{path}.vectors"))
        assert memory.namespace("a").forget(4, verify=True)["residue"] == 0
