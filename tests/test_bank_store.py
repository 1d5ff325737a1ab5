"""The bank of keys and values on disk: the contract of ``Bank``, on real files and a real database."""

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_os.errors import StoreError
from memory_os.protocols import KV
from memory_os.stores import kvfile, manifest
from memory_os.stores.bank import SegmentBank
from memory_os.stores.sqlite import SqliteStore
from memory_os.types import BankOptions, NewSegment

ALICE, BOB = ("acme", "alice"), ("acme", "bob")
LAYERS, HEADS, DIM = 3, 2, 8
LAYER = 1


def make_kv(seed: int, n_tokens: int = 6, *, dtype=torch.bfloat16, surprisal: float | None = None) -> KV:
    """Random keys and values; a channel of the keys is far larger than the others, as it is in real models."""
    random = torch.Generator().manual_seed(seed)
    shape = (LAYERS, HEADS, n_tokens, DIM)
    keys, values = (torch.randn(shape, generator=random) for _ in range(2))
    keys[..., 3] *= 50
    return KV(tuple(range(seed, seed + n_tokens)), keys.to(dtype), values.to(dtype), surprisal)


def same(one: KV, other: KV) -> bool:
    return (
        one.ids == other.ids
        and torch.equal(one.keys.float(), other.keys.float())
        and torch.equal(one.values.float(), other.values.float())
        and one.surprisal == other.surprisal
    )


@pytest.fixture
def store(tmp_path):
    opened = SqliteStore(tmp_path / "memory.db", count_tokens=len)
    yield opened
    opened.close()


def bank_of(store: SqliteStore, **options) -> SegmentBank:
    return SegmentBank(store.database, manifest.bank_folder(store.path), BankOptions(**options))


def add(store: SqliteStore, n: int, namespace=ALICE) -> list[str]:
    """Store ``n`` segments; gives back their ids."""
    return [segment.id for segment in store.append(namespace, [NewSegment(f"text {i}", "s") for i in range(n)])]


def files(store: SqliteStore) -> list[Path]:
    return sorted(path for path in manifest.bank_folder(store.path).rglob("*") if path.is_file())


def files_of(store: SqliteStore, id_: str) -> list[Path]:
    """The files of a segment's entries."""
    stem = hashlib.sha256(id_.encode()).hexdigest()[:32]
    return [path for path in files(store) if path.name.startswith(stem) and path.suffix == ".safetensors"]


def spoil(path: Path) -> None:
    """Change one byte in the middle of the tensors."""
    content = bytearray(path.read_bytes())
    content[-20] ^= 0x40
    path.write_bytes(content)


# -- what goes in comes out --------------------------------------------------------------------------------------------


def test_float16_gives_back_what_went_in_also_after_closing(store):
    a, b = add(store, 2)
    given_in = {a: make_kv(1, 6, surprisal=2.5), b: make_kv(2, 9)}
    bank = bank_of(store)
    assert bank.put(ALICE, "f", given_in, LAYER) == []
    bank.close()
    reopened = SqliteStore(store.path, count_tokens=len)
    for again in (bank, bank_of(reopened)):
        found = again.get(ALICE, "f", [b, a])
        assert list(found) == [b, a]
        assert all(same(found[id_], given_in[id_]) for id_ in given_in)
        assert found[a].keys.dtype == found[a].values.dtype == torch.float16
        assert again.entries(ALICE, "f") == {a: 6, b: 9}
        again.close()
    reopened.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_int8_is_as_near_as_its_scales_allow(store, dtype):
    [a] = add(store, 1)
    kv = make_kv(3, 40, dtype=dtype)
    kv.keys[0, 0, :, 2] = 0  # a channel and a token without anything in them
    kv.values[1, 1, 5] = 0
    bank = bank_of(store, dtype="int8")
    bank.put(ALICE, "f", {a: kv}, LAYER)
    found = bank.get(ALICE, "f", [a])[a]
    assert found.keys.dtype == torch.float16
    for stored, exact, dim in ((found.keys, kv.keys, 2), (found.values, kv.values, 3)):
        largest = exact.float().abs().amax(dim, keepdim=True)
        # half a step, and what float16 rounds away of the number and its scale
        assert bool(((stored.float() - exact.float()).abs() <= largest * (0.5 / 127 + 2.0**-10)).all())
        assert not torch.equal(stored.float(), exact.float())
    # with one scale for a token, the large channel would have cost the others all but a few of their bits
    others = kv.keys[..., [0, 1, 4, 5]].float()
    assert (found.keys[..., [0, 1, 4, 5]].float() - others).abs().max() < 0.02
    assert bool((found.keys[0, 0, :, 2] == 0).all())
    assert bool((found.values[1, 1, 5] == 0).all())


def test_int8_takes_about_half_and_reaches_the_end_of_float16(store):
    a, b = add(store, 2)
    large = replace(make_kv(4, 200), keys=torch.full((LAYERS, HEADS, 200, DIM), 65504.0))
    sizes = []
    for dtype in ("float16", "int8"):
        bank = bank_of(store, dtype=dtype)
        bank.put(ALICE, dtype, {a: large, b: make_kv(5, 200)}, LAYER)
        sizes.append(files_of(store, b)[0].stat().st_size if dtype == "float16" else files(store)[-1].stat().st_size)
        assert bank.get(ALICE, dtype, [a])[a].keys.isfinite().all()
        assert bank.get(ALICE, dtype, [a])[a].keys.max() > 65000
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_float16_cannot_hold_is_refused_and_nothing_is_changed(store, dtype):
    a, b = add(store, 2)
    too_large = make_kv(1)
    too_large.values[0, 0, 0, 0] = 70000
    bank = bank_of(store, dtype=dtype)
    with pytest.raises(StoreError, match=r"float16, which ends at 65504; these are torch\.bfloat16 and reach 7"):
        bank.put(ALICE, "f", {a: make_kv(2), b: too_large}, LAYER)
    assert files(store) == []
    assert bank.entries(ALICE, "f") == {}
    with pytest.raises(StoreError, match="5 tokens: they do not belong together"):
        bank.put(ALICE, "f", {a: replace(make_kv(2), ids=(1, 2, 3, 4, 5))}, LAYER)
    assert bank.put(ALICE, "f", {a: make_kv(2)}, LAYER) == []
    assert len(files(store)) == 1


def test_the_folder_is_made_with_the_first_entry(store):
    folder = manifest.bank_folder(store.path)
    bank = bank_of(store)
    assert bank.get(ALICE, "f", ["x"]) == bank.entries(ALICE, "f") == {}
    assert bank.status(ALICE, "f") == (0, 0, 0, 0)
    assert bank.search(ALICE, "f", np.ones((1, HEADS, DIM), np.float32), 3) == []
    assert (bank.check(), bank.repair()) == ([], 0)
    assert bank.put(ALICE, "f", {"nobody": make_kv(1)}, LAYER) == ["nobody"]
    assert bank.put(ALICE, "f", {}, LAYER) == []
    bank.drop(ALICE)
    assert not folder.exists()
    [a] = add(store, 1)
    bank.put(ALICE, "f", {a: make_kv(1)}, LAYER)
    assert folder.is_dir()
    bank.drop(ALICE)
    assert files(store) == []
    assert bank.get(ALICE, "f", [a]) == {}


def test_an_entry_is_replaced(store):
    [a] = add(store, 1)
    bank = bank_of(store)
    bank.put(ALICE, "f", {a: make_kv(1, 6)}, LAYER)
    assert same(bank.get(ALICE, "f", [a])[a], make_kv(1, 6))
    assert bank.put(ALICE, "f", {a: make_kv(2, 8)}, LAYER) == []
    assert same(bank.get(ALICE, "f", [a])[a], make_kv(2, 8))
    assert bank.status(ALICE, "f")[:2] == (1, 8)
    assert len(files(store)) == 1


def test_an_id_may_hold_anything(store):
    ids = ["../../up", "a/b", "..", "x" * 300, "nul\t:*?", "é世"]
    store.append(ALICE, [NewSegment("t", "s", id=id_) for id_ in ids])
    bank = bank_of(store)
    assert bank.put(ALICE, "f", {id_: make_kv(n) for n, id_ in enumerate(ids)}, LAYER) == []
    assert all(same(kv, make_kv(ids.index(id_))) for id_, kv in bank.get(ALICE, "f", ids).items())
    assert len(files(store)) == len(bank.get(ALICE, "f", ids)) == len(ids)
    assert {path.parent.name for path in files(store)} == {"1"}
    assert store.delete({ALICE: ids}).counts["bank"] == len(ids)
    assert files(store) == []


# -- what is not given back --------------------------------------------------------------------------------------------


def test_another_fingerprint_or_form_is_never_given_back(store):
    a, b = add(store, 2)
    bank = bank_of(store)
    bank.put(ALICE, "f", {a: make_kv(1), b: make_kv(2)}, LAYER)
    assert set(bank.get(ALICE, "f", [a, b])) == {a, b}
    query = np.ones((1, HEADS, DIM), np.float32)
    assert bank.search(ALICE, "f", query, 3)
    for other, fingerprint in ((bank, "g"), (bank_of(store, dtype="int8"), "f"), (bank_of(store, chunk_tokens=2), "f")):
        assert other.get(ALICE, fingerprint, [a, b]) == other.entries(ALICE, fingerprint) == {}
        assert other.search(ALICE, fingerprint, query, 3) == []
        status = other.status(ALICE, fingerprint)
        assert (status.n_segments, status.n_stale) == (2, 2)
    assert bank.status(ALICE, "f").n_stale == 0
    bank.put(ALICE, "g", {a: make_kv(3)}, LAYER)
    assert same(bank.get(ALICE, "g", [a])[a], make_kv(3))
    assert same(bank.get(ALICE, "f", [a])[a], make_kv(1))


def test_a_file_of_another_model_is_refused_whatever_the_row_says(store):
    [a] = add(store, 1)
    bank = bank_of(store)
    bank.put(ALICE, "f", {a: make_kv(1)}, LAYER)
    assert set(bank.get(ALICE, "f", [a])) == {a}
    with sqlite3.connect(store.path) as raw:
        raw.execute("UPDATE bank SET fingerprint = replace(fingerprint, 'f ', 'g ')")
    raw.close()
    assert "another model" in bank.check()[0]
    assert bank.get(ALICE, "g", [a]) == {}
    assert (files(store), bank.entries(ALICE, "g")) == ([], {})


def test_nothing_crosses_a_namespace(store):
    for namespace in (ALICE, BOB):
        store.append(namespace, [NewSegment("t", "s", id="same")])  # as an import into another namespace gives
    [only_bobs] = add(store, 1, BOB)
    bank = bank_of(store)
    bank.put(ALICE, "f", {"same": make_kv(1), only_bobs: make_kv(9)}, LAYER)
    query = np.ones((1, HEADS, DIM), np.float32)
    assert set(bank.entries(ALICE, "f")) == {"same"}
    assert bank.get(BOB, "f", ["same"]) == bank.entries(BOB, "f") == {}
    assert bank.search(BOB, "f", query, 3) == []
    bank.put(BOB, "f", {"same": make_kv(2), only_bobs: make_kv(3)}, LAYER)
    assert same(bank.get(ALICE, "f", ["same"])["same"], make_kv(1))
    assert same(bank.get(BOB, "f", ["same"])["same"], make_kv(2))
    assert set(bank.get(ALICE, "f", ["same", only_bobs])) == {"same"}
    assert [id_ for id_, _ in bank.search(ALICE, "f", query, 3)] == ["same"]
    assert {id_ for id_, _ in bank.search(BOB, "f", query, 3)} == {"same", only_bobs}
    assert store.delete({ALICE: ["same"]}).counts["bank"] == 1
    assert bank.get(ALICE, "f", ["same"]) == {}
    assert set(bank.get(BOB, "f", ["same", only_bobs])) == {"same", only_bobs}
    bank.drop(ALICE)
    assert bank.status(BOB, "f").n_segments == 2
    bank.drop(BOB)
    assert (bank.status(BOB, "f").n_segments, files(store)) == (0, [])


DAMAGES = {
    "a byte": (spoil, "does not match its checksum"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-8]), "has another size"),
    "empty": (lambda path: path.write_bytes(b""), "has another size"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("resident", [False, True], ids=["cold", "resident"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_entry_is_named_by_check_then_left_out_and_removed(store, kind, resident, caplog):
    damage, said = DAMAGES[kind]
    a, b = add(store, 2)
    bank = bank_of(store)
    bank.put(ALICE, "f", {a: make_kv(1), b: make_kv(2)}, LAYER)
    if resident:
        assert set(bank.get(ALICE, "f", [a, b])) == {a, b}
    assert bank.check() == []
    path = files_of(store, a)[0]
    damage(path)
    [fault] = bank.check()
    assert fault.startswith(f"{path.parent.name}/{path.name} ")
    assert said in fault
    assert not caplog.records
    assert set(bank.get(ALICE, "f", [a, b])) == {b}
    assert said in caplog.text
    assert str(path) in caplog.text
    assert files(store) == [files_of(store, b)[0]]
    assert bank.entries(ALICE, "f") == {b: 6}
    assert bank.check() == []
    bank.put(ALICE, "f", {a: make_kv(1)}, LAYER)
    assert same(bank.get(ALICE, "f", [a])[a], make_kv(1))


def test_repair_removes_what_check_finds_and_nothing_else(store):
    a, b, c, d = add(store, 4)
    bank = bank_of(store)
    bank.put(ALICE, "f", {id_: make_kv(n) for n, id_ in enumerate((a, b, c, d))}, LAYER)
    spoil(files_of(store, a)[0])
    folder = files_of(store, b)[0].parent
    (folder / "stray.safetensors").write_bytes(b"x")
    (folder.parent / "99").mkdir()
    (folder.parent / "99" / files_of(store, b)[0].name).write_bytes(b"x")  # of a namespace that does not exist
    leftover, fresh = folder / f"{files_of(store, c)[0].stem}.0.tmp", folder / f"{files_of(store, d)[0].stem}.0.tmp"
    for path in (leftover, fresh):
        path.write_bytes(b"x")
    os.utime(leftover, (0, 0))
    with sqlite3.connect(store.path) as raw:  # without foreign keys
        raw.execute("DELETE FROM segments WHERE id = ?", (c,))
    raw.close()
    faults = bank.check()
    assert len(faults) == 5
    assert sum("belongs to no entry" in fault for fault in faults) == 3
    assert sum("checksum" in fault for fault in faults) == 1
    assert sum("a segment that does not exist" in fault for fault in faults) == 1
    assert bank.check() == faults
    assert bank.repair() == 5
    assert bank.check() == []
    assert files(store) == sorted([files_of(store, b)[0], fresh, *files_of(store, d)])
    assert set(bank.get(ALICE, "f", [a, b, c, d])) == {b, d}


# -- forgetting --------------------------------------------------------------------------------------------------------


def test_forgetting_takes_files_and_rows_also_of_other_fingerprints_and_those_without_a_row(store):
    kept, gone = add(store, 2)
    bank = bank_of(store)
    for fingerprint in ("f", "g"):
        bank.put(ALICE, fingerprint, {kept: make_kv(1), gone: make_kv(2)}, LAYER)
    one = files_of(store, gone)[0]
    aside = one.with_suffix(".1.tmp")
    aside.write_bytes(b"written aside")
    (one.parent / one.name.replace(".", ".0", 1)).write_bytes(b"without a row")
    assert store.stats(ALICE)["bank"] == 4
    assert len(files(store)) == 6
    assert store.delete({ALICE: [gone]}).counts["bank"] == 4
    assert files(store) == files_of(store, kept)
    assert len(files(store)) == 2
    assert store.stats(ALICE)["bank"] == 2
    assert set(bank.get(ALICE, "f", [kept, gone])) == {kept}
    assert [id_ for id_, _ in bank.search(ALICE, "f", np.ones((1, HEADS, DIM), np.float32), 9)] == [kept]
    assert bank.check() == []


def test_forgetting_counts_an_entry_whose_file_is_missing(store):
    [a] = add(store, 1)
    bank_of(store).put(ALICE, "f", {a: make_kv(1)}, LAYER)
    files(store)[0].unlink()
    assert store.delete({ALICE: [a]}).counts["bank"] == 1


@pytest.mark.parametrize("when", [0, 1], ids=["before its file is written", "after"])
def test_a_segment_that_is_forgotten_during_put_leaves_nothing(store, monkeypatch, when):
    a, b = add(store, 2)
    bank = bank_of(store)
    encode, encoded = kvfile.encode, []

    def forget_then_encode(kv, *rest):
        if len(encoded) == when:
            assert store.delete({ALICE: [a]}).counts["bank"] == when  # the file that is written aside is found
        encoded.append(kv)
        return encode(kv, *rest)

    monkeypatch.setattr(kvfile, "encode", forget_then_encode)
    assert bank.put(ALICE, "f", {a: make_kv(1), b: make_kv(2)}, LAYER) == [a]
    assert len(encoded) == 2
    assert files(store) == files_of(store, b)
    assert set(bank.entries(ALICE, "f")) == {b}
    assert bank.check() == []


def test_what_is_dropped_during_put_stays_dropped(store, monkeypatch):
    a, b = add(store, 2)
    bank = bank_of(store)
    encode, encoded = kvfile.encode, []

    def drop_then_encode(kv, *rest):
        if encoded:
            bank.drop(ALICE)
        encoded.append(kv)
        return encode(kv, *rest)

    monkeypatch.setattr(kvfile, "encode", drop_then_encode)
    assert bank.put(ALICE, "f", {a: make_kv(1), b: make_kv(2)}, LAYER) == [a]
    assert set(bank.entries(ALICE, "f")) == {b}
    assert bank.check() == []


def test_a_forget_that_fails_says_so_and_forgets_nothing(store, monkeypatch):
    [a] = add(store, 1)
    bank = bank_of(store)
    bank.put(ALICE, "f", {a: make_kv(1)}, LAYER)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with pytest.raises(StoreError, match=r"cannot delete .*Permission denied; check the permissions"):
            store.delete({ALICE: [a]})
    assert [segment.id for segment in store.scan(ALICE)] == [a]
    assert set(bank.get(ALICE, "f", [a])) == {a}


def test_what_another_process_removed_is_let_go_of(store):
    a, b = add(store, 2)
    bank = bank_of(store)
    bank.put(ALICE, "f", {a: make_kv(1), b: make_kv(2)}, LAYER)
    bank.get(ALICE, "f", [a, b])
    path = str(files_of(store, a)[0])
    maps = Path("/proc/self/maps")
    assert not maps.exists() or path in maps.read_text()
    store.delete({ALICE: [a]})
    assert set(bank.entries(ALICE, "f")) == {b}
    assert {key[2] for key in bank._resident} == {b}
    assert not maps.exists() or path not in maps.read_text()


@pytest.mark.parametrize("way", ["evicted", "damaged", "dropped"])
def test_what_leaves_the_bank_leaves_memory(store, way):
    a, b = add(store, 2)
    bank = bank_of(store, max_tokens=6)
    bank.put(ALICE, "f", {a: make_kv(1)}, LAYER)
    assert bank.search(ALICE, "f", np.ones((1, HEADS, DIM), np.float32), 1)
    assert bank.get(ALICE, "f", [a])
    assert [key[2] for key in bank._resident] == [key[2] for key in bank._verified] == [a]
    if way == "evicted":
        assert bank.put(ALICE, "f", {b: make_kv(2)}, LAYER) == [a]
    elif way == "damaged":
        spoil(files_of(store, a)[0])
        assert bank.get(ALICE, "f", [a]) == {}
    else:
        bank.drop(ALICE)
        assert bank._tables == {}
    assert not bank._resident
    assert not bank._verified


# -- bounds ------------------------------------------------------------------------------------------------------------


@contextmanager
def temporary_store():
    with tempfile.TemporaryDirectory() as folder:
        opened = SqliteStore(Path(folder) / "memory.db", count_tokens=len)
        try:
            yield opened
        finally:
            opened.close()


@settings(max_examples=12)
@given(
    st.sampled_from(["fifo", "lru", "surprisal"]),
    st.sampled_from([{"max_tokens": 20}, {"max_bytes": 6000}]),
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 8)), min_size=1, max_size=4), max_size=6),
)
def test_the_bounds_hold_after_every_put(policy, bound, stream):
    with temporary_store() as store:
        ids = add(store, 10)
        options = {"policy": policy, **bound}
        bank = bank_of(store, **options)
        expected = {}  # of first in, first out: the newest, as many as fit
        for puts in stream:
            new = {ids[n]: make_kv(n, n_tokens, surprisal=float(n * 7 % 5)) for n, n_tokens in puts}
            before = set(bank.entries(ALICE, "f"))
            missing = bank.put(ALICE, "f", new, LAYER)
            after = bank.entries(ALICE, "f")
            status = bank.status(ALICE, "f")
            assert status.n_tokens <= bank.options.max_tokens
            assert status.n_bytes <= bank.options.max_bytes
            assert len(files(store)) == len(after) == status.n_segments
            on_disk = sum(path.stat().st_size for path in files(store))
            assert on_disk < status.n_bytes == on_disk + chunk_bytes(store)
            assert set(missing) == (before | set(new)) - set(after)
            if policy == "fifo" and "max_tokens" in bound:
                merged = expected | {id_: len(kv.ids) for id_, kv in new.items()}
                expected = newest(merged, ids, bound["max_tokens"])
                assert after == expected
            bank.get(ALICE, "f", [ids[n] for n, _ in puts])
        assert bank.check() == []


def newest(sizes: dict[str, int], order: list[str], room: int) -> dict[str, int]:
    kept = {}
    for id_ in sorted(sizes, key=order.index, reverse=True):
        if sum(kept.values()) + sizes[id_] > room:
            break
        kept[id_] = sizes[id_]
    return dict(reversed(kept.items()))


def chunk_bytes(store: SqliteStore) -> int:
    with sqlite3.connect(store.path) as raw:
        total = raw.execute("SELECT coalesce(sum(length(chunks)), 0) FROM bank").fetchone()[0]
    raw.close()
    return total


def test_what_would_leave_at_once_is_not_written(store, monkeypatch):
    old, *new, large = add(store, 5)
    bank = bank_of(store, max_tokens=18)
    written = []
    encode = kvfile.encode
    monkeypatch.setattr(kvfile, "encode", lambda kv, *rest: written.append(len(kv.ids)) or encode(kv, *rest))
    assert bank.put(ALICE, "f", {id_: make_kv(n, 6) for n, id_ in enumerate(new)}, LAYER) == []
    assert written == [6, 6, 6]
    assert bank.put(ALICE, "f", {old: make_kv(8, 5)}, LAYER) == [old]
    assert bank.put(ALICE, "f", {large: make_kv(9, 19)}, LAYER) == [large]
    assert written == [6, 6, 6]
    assert list(bank.entries(ALICE, "f")) == new
    assert len(files(store)) == 3
    assert bank.put(ALICE, "f", {large: make_kv(9, 7)}, LAYER) == new[:2]
    assert written == [6, 6, 6, 7]
    assert list(bank.entries(ALICE, "f")) == [new[2], large]
    assert files(store) == sorted([files_of(store, new[2])[0], files_of(store, large)[0]])


def test_one_larger_than_the_bytes_is_not_written_and_moves_nothing(store):
    a, b = add(store, 2)
    bank = bank_of(store, max_bytes=4000)
    assert bank.put(ALICE, "f", {a: make_kv(1, 6), b: make_kv(2, 60)}, LAYER) == [b]
    assert bank.put(ALICE, "f", {b: make_kv(2, 60)}, LAYER) == [b]
    assert set(bank.entries(ALICE, "f")) == {a}
    # an entry whose tensors fit and whose file does not
    at_the_edge = kvfile.least_bytes(make_kv(2, 6), "float16") + 64 + 100
    assert bank_of(store, max_bytes=at_the_edge).put(ALICE, "f", {b: make_kv(2, 6)}, LAYER) == [b, a]
    assert files(store) == []


def test_entries_of_another_model_leave_first(store):
    a, b, c = add(store, 3)
    bank = bank_of(store, max_tokens=12)
    bank.put(ALICE, "old", {b: make_kv(1), c: make_kv(2)}, LAYER)
    assert bank.put(ALICE, "new", {a: make_kv(3)}, LAYER) == [b]  # older than what it displaces
    assert bank.status(ALICE, "new")[::3] == (2, 1)
    assert bank.put(ALICE, "new", {c: make_kv(4)}, LAYER) == []
    assert (bank.entries(ALICE, "new"), bank.entries(ALICE, "old")) == ({a: 6, c: 6}, {})
    assert len(files(store)) == 2


def test_bounds_that_were_lowered_hold_with_the_next_put(store):
    ids = add(store, 4)
    bank_of(store).put(ALICE, "f", {id_: make_kv(n) for n, id_ in enumerate(ids)}, LAYER)
    smaller = bank_of(store, max_tokens=12)
    assert smaller.put(ALICE, "f", {}, LAYER) == ids[:2]
    assert list(smaller.entries(ALICE, "f")) == ids[2:]


def test_lru_keeps_what_was_used_and_only_lru_writes_when_it_is_read(store):
    ids = add(store, 3)
    for policy, survivors in (("lru", [ids[0], ids[2]]), ("fifo", ids[1:])):
        bank = bank_of(store, policy=policy, max_tokens=12)
        bank.put(ALICE, policy, {id_: make_kv(n) for n, id_ in enumerate(ids[:2])}, LAYER)
        add(store, 1)  # the namespace moves on
        writes = count_writes(store)
        bank.get(ALICE, policy, [ids[0]])
        assert writes() == (1 if policy == "lru" else 0)
        bank.get(ALICE, policy, [ids[0]])
        assert writes() == (1 if policy == "lru" else 0)  # used in the same turn again: nothing to note
        bank.put(ALICE, policy, {ids[2]: make_kv(2)}, LAYER)
        assert list(bank.entries(ALICE, policy)) == survivors
        bank.drop(ALICE)


def count_writes(store: SqliteStore):
    """How many write transactions there were since."""
    begun = []
    write = type(store.database).write

    def counted():
        begun.append(1)
        return write(store.database)

    store.database.write = counted
    return lambda: len(begun)


@pytest.mark.parametrize(("decay", "survivor"), [(1.0, 0), (0.5, 1)])
def test_surprisal_fades_with_age(store, decay, survivor):
    """3.0 nats three segments ago against 2.0 one ago: 3 > 2, but 3 * 0.5 ** 3 < 2 * 0.5 ** 1."""
    ids = add(store, 4)
    bank = bank_of(store, policy="surprisal", decay=decay, max_tokens=12)
    old, unknown, newer = (make_kv(n, surprisal=s) for n, s in enumerate((3.0, None, 2.0)))
    bank.put(ALICE, "f", {ids[0]: old, ids[2]: newer}, LAYER)
    assert bank.put(ALICE, "f", {ids[1]: unknown}, LAYER) == [ids[1]]  # counts as no surprise
    assert bank.put(ALICE, "f", {ids[3]: make_kv(5, surprisal=9.0)}, LAYER) == [ids[2 - 2 * survivor]]
    assert list(bank.entries(ALICE, "f")) == [ids[2 * survivor], ids[3]]


def test_resident_memory_is_bounded_and_the_least_recently_used_leaves(store):
    ids = add(store, 4)
    size = kvfile.least_bytes(make_kv(0), "float16")
    for room, kept in ((2 * size, 2), (size - 1, 0), (0, 0), (9 * size, 4)):
        bank = bank_of(store, resident_bytes=room)
        bank.put(ALICE, "f", {id_: make_kv(n) for n, id_ in enumerate(ids)}, LAYER)
        assert len(bank.get(ALICE, "f", ids)) == 4
        assert sum(loaded.n_bytes for loaded in bank._resident.values()) == kept * size <= room
        for id_ in (ids[2], ids[0]):
            assert same(bank.get(ALICE, "f", [id_])[id_], make_kv(ids.index(id_)))
        if kept == 2:
            assert [key[2] for key in bank._resident] == [ids[2], ids[0]]
            bank.put(ALICE, "f", {ids[1]: make_kv(1, 30)}, LAYER)
            assert bank.get(ALICE, "f", [ids[1]])  # too large to stay, so nothing leaves for it
            assert [key[2] for key in bank._resident] == [ids[2], ids[0]]
        bank.close()
        assert not bank._resident


def test_a_file_is_read_whole_only_once(store, monkeypatch):
    [a] = add(store, 1)
    bank = bank_of(store, resident_bytes=0)
    bank.put(ALICE, "f", {a: make_kv(1)}, LAYER)
    verified = []
    check = kvfile.problem
    monkeypatch.setattr(kvfile, "problem", lambda *args: verified.append(args[0]) or check(*args))
    for _ in range(3):
        assert set(bank.get(ALICE, "f", [a])) == {a}
    assert len(verified) == 1
    os.utime(files_of(store, a)[0], (1, 1))
    assert set(bank.get(ALICE, "f", [a])) == {a}
    assert len(verified) == 2


# -- search ------------------------------------------------------------------------------------------------------------


def brute_force(entries: dict[str, KV], queries: np.ndarray, k_chunks: int, chunk_tokens: int) -> dict[str, float]:
    """What the docstring of ``Bank.search`` says, chunk by chunk."""
    shares = dict.fromkeys(entries, 0.0)
    n_tokens, n_heads, dim = queries.shape
    for token in range(n_tokens):
        for head in range(n_heads):
            scored = []
            for id_, kv in entries.items():
                keys = kv.keys[LAYER, head].float().numpy()
                for start in range(0, len(keys), chunk_tokens):
                    mean = keys[start : start + chunk_tokens].mean(axis=0).astype(np.float16).astype(np.float64)
                    scored.append((float(queries[token, head] @ mean) / dim**0.5, id_))
            best = sorted(scored, reverse=True)[:k_chunks]
            whole = sum(np.exp(score - best[0][0]) for score, _ in best)
            for score, id_ in best:
                shares[id_] += float(np.exp(score - best[0][0])) / whole / (n_tokens * n_heads)
    return shares


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(("k_chunks", "chunk_tokens"), [(3, 4), (1, 1), (1000, 5)])
def test_search_equals_brute_force(store, dtype, k_chunks, chunk_tokens):
    ids = add(store, 6)
    # lengths with and without a remainder, and shorter than a chunk
    entries = {id_: make_kv(n, length) for n, (id_, length) in enumerate(zip(ids, (8, 9, 3, 15, 1, 4), strict=True))}
    entries = {id_: replace(kv, keys=kv.keys / 8) for id_, kv in entries.items()}
    bank = bank_of(store, dtype=dtype, k_chunks=k_chunks, chunk_tokens=chunk_tokens)
    bank.put(ALICE, "f", entries, LAYER)
    queries = np.random.default_rng(0).standard_normal((70, HEADS, DIM)).astype(np.float32)
    found = bank.search(ALICE, "f", queries, 99)
    expected = {id_: share for id_, share in brute_force(entries, queries, k_chunks, chunk_tokens).items() if share}
    assert dict(found) == pytest.approx(expected, abs=1e-4)
    assert found == sorted(found, key=lambda pair: -pair[1])
    assert sum(dict(found).values()) == pytest.approx(1.0)
    assert bank.search(ALICE, "f", queries, 2) == found[:2]
    assert bank.search(ALICE, "f", queries, 0) == bank.search(ALICE, "f", queries[:0], 5) == []


def test_equal_segments_are_found_in_the_order_of_seq(store):
    ids = add(store, 60)
    bank = bank_of(store, k_chunks=999)
    bank.put(ALICE, "f", {id_: make_kv(n % 3, 4) for n, id_ in reversed(list(enumerate(ids)))}, LAYER)
    found = [id_ for id_, _ in bank.search(ALICE, "f", np.ones((2, HEADS, DIM), np.float32), 60)]
    assert {tuple(found[start : start + 20]) for start in (0, 20, 40)} == {tuple(ids[n::3]) for n in range(3)}


def test_search_reads_only_what_is_new(store, monkeypatch):
    a, b, c = add(store, 3)
    bank = bank_of(store)
    asked = []
    read_chunks = manifest.read_chunks
    monkeypatch.setattr(manifest, "read_chunks", lambda *args: asked.append(args[2]) or read_chunks(*args))
    query = np.ones((1, HEADS, DIM), np.float32)
    for new in ([a], [b, c], [], [b]):
        bank.put(ALICE, "f", {id_: make_kv(len(asked)) for id_ in new}, LAYER)
        bank.search(ALICE, "f", query, 3)
    rows = manifest_rows(store)
    assert asked == [[rows[a]], [rows[b], rows[c]], [], [rows[b]]]


def manifest_rows(store: SqliteStore) -> dict[str, int]:
    with store.database.read() as connection:
        return {entry.id: entry.segment_pk for entry in manifest.read_all(connection)}


def test_search_sees_at_once_what_another_instance_writes_replaces_and_removes(store):
    a, b, c = add(store, 3)
    here, there = bank_of(store, k_chunks=99), bank_of(store)
    queries = np.random.default_rng(0).standard_normal((4, HEADS, DIM)).astype(np.float32) / 8
    state: dict[str, KV] = {}

    def agrees() -> bool:
        found = dict(here.search(ALICE, "f", queries, 9))
        return found == pytest.approx(brute_force(state, queries, 99, 4), abs=1e-4) and set(found) == set(state)

    assert agrees()
    for id_, kv in ((c, make_kv(1, 5)), (a, make_kv(2, 9)), (b, make_kv(3, 4)), (a, make_kv(4, 6))):
        there.put(ALICE, "f", {id_: kv}, LAYER)
        state[id_] = kv
        assert agrees()
    store.delete({ALICE: [b]})
    del state[b]
    assert agrees()
    there.drop(ALICE)
    assert here.search(ALICE, "f", queries, 9) == []
    state = {a: make_kv(6), c: make_kv(7)}
    there.put(ALICE, "f", state, LAYER)
    assert agrees()
    there.put(ALICE, "f", state, LAYER + 1)  # the same keys and values, searched by another layer
    assert not agrees()
    state = {id_: replace(kv, keys=kv.keys.roll(-1, 0)) for id_, kv in state.items()}
    assert agrees()


# -- at the same time, and cut off -------------------------------------------------------------------------------------


def test_threads_put_get_and_search_at_the_same_time(store):
    ids = add(store, 24)
    bank = bank_of(store, max_tokens=60)
    errors: list[BaseException] = []

    def work(part: int) -> None:
        try:
            for start in range(0, 24, 4):
                chosen = ids[start : start + 4]
                bank.put(ALICE, "f", {id_: make_kv(ids.index(id_)) for id_ in chosen}, LAYER)
                for id_, kv in bank.get(ALICE, "f", ids).items():
                    assert same(kv, make_kv(ids.index(id_)))
                bank.search(ALICE, "f", np.ones((2, HEADS, DIM), np.float32), 3)
                assert bank.status(ALICE, "f").n_tokens <= 60
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert bank.check() == []
    assert list(bank.entries(ALICE, "f")) == ids[-10:]
    assert len(files(store)) == 10


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from memory_os.protocols import KV
from memory_os.stores import kvfile, manifest
from memory_os.stores.bank import SegmentBank
from memory_os.stores.sqlite import SqliteStore
from memory_os.types import BankOptions

store = SqliteStore(Path(sys.argv[1]), count_tokens=len)
bank = SegmentBank(store.database, manifest.bank_folder(store.path), BankOptions())
ids = [segment.id for segment in store.scan(("acme", "alice"))]

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "placed":
    manifest.write = kill
else:
    Path.replace = kill
ones = torch.ones(3, 2, 5, 8)
bank.put(("acme", "alice"), "f", {id_: KV((1, 2, 3, 4, 5), ones, ones) for id_ in ids[1:]}, 1)
"""


@pytest.mark.parametrize("where", ["aside", "placed"])
def test_a_put_that_is_killed_leaves_a_bank_that_works_and_a_stray_that_is_found(store, where):
    a, b, c = add(store, 3)
    bank = bank_of(store)
    bank.put(ALICE, "f", {a: make_kv(1), b: make_kv(2)}, LAYER)
    done = subprocess.run([sys.executable, "-c", CHILD, str(store.path), where], timeout=120)
    assert done.returncode == -signal.SIGKILL
    # b's new file may be in the place of its old one, whose checksum its row has
    intact = {a, b} if where == "aside" else {a}
    if where == "aside":
        assert len(files(store)) == 4
        assert bank.check() == []  # it could still be being written
        for path in files(store):
            os.utime(path, (1, 1))
    faults = bank.check()
    assert len(faults) == 2
    assert sum("belongs to no entry" in fault for fault in faults) == (2 if where == "aside" else 1)
    assert set(bank.get(ALICE, "f", [a, b, c])) == intact
    assert bank.repair() == (2 if where == "aside" else 1)  # get removed the other
    assert bank.check() == []
    assert len(files(store)) == len(intact)
    assert bank.put(ALICE, "f", {b: make_kv(2), c: make_kv(3)}, LAYER) == []
    assert set(bank.get(ALICE, "f", [a, b, c])) == {a, b, c}


def test_forgetting_takes_the_file_that_a_killed_put_left(store):
    _, b, c = add(store, 3)
    done = subprocess.run([sys.executable, "-c", CHILD, str(store.path), "placed"], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(files(store)) == 2
    assert store.stats(ALICE)["bank"] == 0
    assert store.delete({ALICE: [b]}).counts["bank"] == 1
    assert files(store) == files_of(store, c)


def test_a_put_whose_transaction_fails_takes_its_files_along(store, monkeypatch):
    a, b = add(store, 2)
    bank = bank_of(store)
    bank.put(ALICE, "f", {a: make_kv(1)}, LAYER)

    def full(*_):
        raise StoreError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "write", full)
        with pytest.raises(StoreError, match="disk is full"):
            bank.put(ALICE, "f", {b: make_kv(2)}, LAYER)
    assert files(store) == files_of(store, a)
    assert bank.check() == []


def test_a_bank_that_cannot_be_written_says_so(store):
    [a] = add(store, 1)
    manifest.bank_folder(store.path).write_text("in the way")
    bank = bank_of(store)
    with pytest.raises(StoreError, match="cannot write"):
        bank.put(ALICE, "f", {a: make_kv(1)}, LAYER)
    assert bank.entries(ALICE, "f") == {}


def test_an_entry_that_is_replaced_while_it_is_read_is_no_damage(store, monkeypatch):
    [a] = add(store, 1)
    bank, other = bank_of(store), bank_of(store)
    bank.put(ALICE, "f", {a: make_kv(0)}, LAYER)
    verify, seeds = kvfile.problem, iter(range(1, 9))

    def replace_then_verify(*args):
        other.put(ALICE, "f", {a: make_kv(next(seeds))}, LAYER)
        return verify(*args)

    with monkeypatch.context() as patched:
        patched.setattr(kvfile, "problem", replace_then_verify)
        assert bank.check() == []
        assert bank.repair() == 0
        assert bank.get(ALICE, "f", [a]) == {}
    assert same(bank.get(ALICE, "f", [a])[a], make_kv(3))


@pytest.mark.parametrize("use", ["get", "check", "repair"])
def test_an_entry_that_was_gone_for_a_moment_is_no_damage(store, monkeypatch, use):
    [a] = add(store, 1)
    bank, other = bank_of(store), bank_of(store)
    bank.put(ALICE, "f", {a: make_kv(1)}, LAYER)
    content = files(store)[0].read_bytes()
    verify, looked = kvfile.problem, []

    def verify_while_it_is_gone(*args):
        if looked:
            return verify(*args)
        other.drop(ALICE)
        looked.append(verify(*args))
        other.put(ALICE, "f", {a: make_kv(1)}, LAYER)
        return looked[0]

    with monkeypatch.context() as patched:
        patched.setattr(kvfile, "problem", verify_while_it_is_gone)
        patched.setattr(kvfile, "encode", lambda *_: content)  # the same checksum again
        found = {"get": lambda: bank.get(ALICE, "f", [a]), "check": bank.check, "repair": bank.repair}[use]()
    assert looked == ["is missing"]
    assert not found
    assert same(bank.get(ALICE, "f", [a])[a], make_kv(1))


def test_what_is_being_put_in_its_place_is_no_stray(store, monkeypatch):
    [a] = add(store, 1)
    bank = bank_of(store)
    placed, checked = threading.Event(), []
    write = manifest.write

    def slow(*args):
        placed.set()
        threads[0].join(timeout=0.3)  # check must wait for this transaction
        write(*args)

    def look() -> None:
        placed.wait(10)
        checked.append(bank.check())

    threads = [threading.Thread(target=look)]
    monkeypatch.setattr(manifest, "write", slow)
    threads[0].start()
    bank.put(ALICE, "f", {a: make_kv(1)}, LAYER)
    threads[0].join()
    assert checked == [[]]
