"""Compiled programs, shared by all processes of the tests and kept for the next run of the tests.

jax's persistent cache writes an entry in place: a training that is killed leaves half of one, and
another process may read it meanwhile. Each pytest process, with the trainings that it starts, has a
session folder of its own for that reason. Complete entries move between it and the store by hard
links, which appear whole or not at all.

An entry is named by a hash of the program, the compiler's options and versions, so that a stale
one is never read. The store is of one jaxlib and of one processor's instructions.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import tempfile
import time

LIFETIME = 14 * 24 * 3600  # seconds; then an entry is compiled again: the store stays small
ENTRIES = "*-cache"


class ProgramCache:
    """A session's folder of compiled programs below `top`, and the store that it shares."""

    def __init__(self, top: pathlib.Path):
        version = importlib.metadata.version("jaxlib")
        self.store = top / f"programs-{version}-{processor()}"
        self.store.mkdir(parents=True, exist_ok=True)
        self.session = pathlib.Path(tempfile.mkdtemp(prefix="session-", dir=self.store))

    def take(self) -> None:
        """Link what others have compiled into the session's folder."""
        have = set(os.listdir(self.session))
        for entry in self.store.glob(ENTRIES):
            if entry.name not in have:
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    os.link(entry, self.session / entry.name)

    def give(self) -> None:
        """Link what this session has compiled into the store; remove what is incomplete."""
        known = set(os.listdir(self.store))
        for entry in self.session.glob(ENTRIES):
            if entry.name in known:
                continue
            if complete(entry):
                with contextlib.suppress(FileExistsError):
                    os.link(entry, self.store / entry.name)
            else:
                entry.unlink()

    def prune(self) -> None:
        """Remove old entries, and the folders that sessions left behind when they were killed."""
        for path in self.store.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LIFETIME:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        shutil.rmtree(self.session, ignore_errors=True)


def complete(entry: pathlib.Path) -> bool:
    """Return whether an entry can be decompressed: both of jax's formats say so when cut short."""
    from jax._src.compilation_cache import decompress_executable

    try:
        decompress_executable(entry.read_bytes())
    except Exception:  # noqa: BLE001  zlib.error or ZstdError
        return False
    return True


def processor() -> str:
    """Return a digest of the instructions of this machine's processor."""
    features = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(features.encode()).hexdigest()[:8]
