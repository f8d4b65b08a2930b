"""The tests' own cache of compiled programs: what a killed process leaves is never read."""

import os
import time
import zlib

import pytest

from tests.conftest import LONGEST, ROOT
from tests.helpers.program_cache import LIFETIME, ProgramCache


@pytest.fixture
def program(monkeypatch) -> bytes:
    """A complete entry; this test does not depend on which of its formats jax writes."""
    monkeypatch.setattr("jax._src.compilation_cache.decompress_executable", zlib.decompress)
    return zlib.compress(os.urandom(1000))


def test_complete_entries_are_shared_and_others_removed(tmp_path, program):
    first, second = ProgramCache(tmp_path), ProgramCache(tmp_path)
    assert first.session != second.session and first.store == second.store
    (first.session / "a-cache").write_bytes(program)
    (first.session / "b-cache").write_bytes(program[:-20])
    first.give()
    assert os.listdir(first.session) == ["a-cache"]
    second.take()
    assert os.listdir(second.session) == ["a-cache"]
    assert (second.session / "a-cache").read_bytes() == program
    (second.session / "b-cache").write_bytes(program)
    second.give()
    first.close()
    second.close()
    third = ProgramCache(tmp_path)
    third.take()
    assert sorted(os.listdir(third.session)) == ["a-cache", "b-cache"]


def test_what_is_old_is_removed(tmp_path, program):
    cache = ProgramCache(tmp_path)
    left = ProgramCache(tmp_path).session
    for name in ("old", "new"):
        (cache.store / f"{name}-cache").write_bytes(program)
    then = time.time() - LIFETIME - 1
    os.utime(left, (then, then))
    os.utime(cache.store / "old-cache", (then, then))
    cache.prune()
    assert sorted(os.listdir(cache.store)) == ["new-cache", cache.session.name]


def test_the_longest_files_exist():
    assert [file for file in LONGEST if not (ROOT / "tests" / file).is_file()] == []
