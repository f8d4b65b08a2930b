"""Ranges of objects on the local disk: they are what was stored, and the size is kept."""

import logging
import multiprocessing
import os
import pickle
import shutil
import time

import numpy as np
import pytest

from vit_scale.storage import cache, range_cache
from vit_scale.storage.range_cache import RangeCache

MIB = 2**20
SPREAD = 100_000  # bytes between the ranges of `content`


def content(number: int, length: int = 50_000) -> bytes:
    return np.random.RandomState(number).bytes(length)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(range_cache, "SPARE", 0)
    return cache.folder("ranges")


def used(folder) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


def test_a_range_is_what_was_stored_also_for_another_process(folder):
    ours = RangeCache(1)
    for number in range(20):
        ours.put("gs://b/a#1", number * SPREAD, content(number))
    theirs = pickle.loads(pickle.dumps(RangeCache(1)))
    for number in reversed(range(20)):
        assert theirs.get("gs://b/a#1", number * SPREAD, 50_000) == content(number)
    for other in (
        ("gs://b/a#2", 0, 50_000),  # another generation
        ("gs://b/a#1", 1, 50_000),
        ("gs://b/a#1", 0, 49_999),
        ("gs://b/a#1", 20 * SPREAD, 50_000),
    ):
        assert theirs.get(*other) is None
    assert len(list(folder.iterdir())) == 1 and used(folder) < 20 * (50_000 + 3 * 4096)


def test_neighbouring_small_ranges_are_apart():
    ours, offsets = RangeCache(1), range(64, 64 + 67 * 100, 67)
    for offset in offsets:
        ours.put("a", offset, content(offset, 67))
    assert [ours.get("a", offset, 67) for offset in offsets] == [content(o, 67) for o in offsets]


def test_a_range_that_was_not_stored_completely_is_none(folder):
    """Its process was killed, or the machine failed before the bytes were on the disk."""
    ours = RangeCache(1)
    ours.put("a", SPREAD, content(1))
    (file,) = folder.iterdir()
    with file.open("r+b") as stream:
        stream.write(content(0))  # a range at 0, without its description
        stream.seek(SPREAD + 30_000)
        stream.write(bytes(4096))
    assert ours.get("a", 0, 50_000) is None and ours.get("a", SPREAD, 50_000) is None
    for number in range(2):
        ours.put("a", number * SPREAD, content(number))
        assert ours.get("a", number * SPREAD, 50_000) == content(number)


def test_what_does_not_fit_is_not_stored_and_what_is_in_use_stays(folder, monkeypatch):
    monkeypatch.setattr(range_cache, "PAUSE", 0.0)
    ours = RangeCache(MIB / 2**30)
    for number in range(40):
        ours.put(f"{number % 4}", number * SPREAD, content(number))
    present = [
        number
        for number in range(40)
        if ours.get(f"{number % 4}", number * SPREAD, 50_000) is not None
    ]
    assert present == list(range(len(present))) and 15 <= len(present) < 20
    assert MIB * 3 // 4 < used(folder) <= MIB


def test_old_objects_make_room_the_oldest_first(folder, monkeypatch):
    monkeypatch.setattr(range_cache, "PAUSE", 0.0)
    ours, now = RangeCache(MIB / 2**30), time.time()
    for number in range(4):
        for part in range(4):
            ours.put(f"{number}", part * SPREAD, content(part))
        os.utime(ours._file(f"{number}"), (now, now - (2 + number) * range_cache.IN_USE))
    again = RangeCache(MIB / 2**30)
    assert again.get("3", 0, 50_000)  # which uses the oldest
    for part in range(4):
        again.put("new", part * SPREAD, content(part))
    kept = [name for name in ("0", "1", "2", "3", "new") if again.get(name, 0, 50_000)]
    assert kept == ["0", "1", "3", "new"] and used(folder) <= MIB


def test_some_of_the_disk_stays_free_and_writing_is_tried_again(folder, monkeypatch):
    monkeypatch.setattr(range_cache, "SPARE", 2 * range_cache.GIB)
    free = [2 * range_cache.GIB + 1000]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free[0]))
    clock = [0.0]
    monkeypatch.setattr(range_cache.time, "monotonic", lambda: clock[0])
    ours = RangeCache(1)
    ours.put("a", 0, content(0))
    assert ours.get("a", 0, 50_000) is None
    free[0] += MIB
    for passed, stored in ((range_cache.PAUSE - 1, False), (range_cache.PAUSE + 1, True)):
        clock[0] = passed
        ours.put("a", 0, content(0))
        assert (ours.get("a", 0, 50_000) is not None) == stored


def test_a_disk_that_fails_costs_the_cache_and_one_line(folder, monkeypatch, caplog):
    monkeypatch.setattr(range_cache, "PAUSE", 0.0)
    ours, write = RangeCache(1), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:1000], at))
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            ours.put("a", number * SPREAD, content(number))
    (record,) = caplog.records
    assert f"cannot cache in {folder} what is read from the bucket: 1000 of 50000" in record.message
    monkeypatch.undo()
    assert [ours.get("a", number * SPREAD, 50_000) for number in range(3)] == [None] * 3
    folder.parent.mkdir(exist_ok=True)
    blocked = RangeCache(1)
    blocked._folder = folder / next(folder.iterdir()) / "ranges"  # below a file
    blocked.put("a", 0, content(0))
    assert blocked.get("a", 0, 50_000) is None


def _exercise(seed: int) -> int:
    """Read 300 ranges through the cache, in an order of this process; return how many were hits."""
    ours, hits = RangeCache(1), 0
    for number in np.random.RandomState(seed).permutation(300) % 60:
        key, offset = f"{number % 3}", int(number) * SPREAD
        stored = ours.get(key, offset, 50_000)
        assert stored in (None, content(number))
        hits += stored is not None
        if stored is None:
            ours.put(key, offset, content(number))
    return hits


def test_processes_share_the_cache(folder):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        hits = pool.map(_exercise, range(3))
    assert sum(hits) >= 3 * 300 - 3 * 60 and _exercise(9) == 300
    assert len(list(folder.iterdir())) == 3
