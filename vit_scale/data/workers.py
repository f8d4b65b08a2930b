"""Processes that decode: how they end with their parent, and why one of them ended, in one line.

Grain hands a worker's batches over in shared memory, on Linux in /dev/shm. Where that is small (64
MiB in Docker and in Kubernetes, if nothing else is said) a worker that writes to it is killed by
SIGBUS. Guaranteed: what is too small by arithmetic is refused before anything is read; a
worker that is killed, by that or by the kernel for want of memory, is a UserError which names the
cause, and an end after which a run can be resumed.
"""

import concurrent.futures
import contextlib
import errno
import multiprocessing
import multiprocessing.spawn
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from vit_scale.errors import RESUMABLE, UserError

SHARED = "/dev/shm"
READ_AHEAD = 2  # batches made while the device computes, of each worker or of the one thread
# A worker has so many waiting, and one in hand; the thread that reads it here has as many again.
HELD = 2 * (READ_AHEAD + 1)
LARGER = "give it more (docker run --shm-size=4g; in Kubernetes an emptyDir of medium Memory)"
FEWER = "--config.data.workers=0, or smaller batches"
TERM = signal.SIGTERM.value
Item = TypeVar("Item")
Result = TypeVar("Result")
GRAINS_NAME = "grain-process-prefetch"  # how the names of its processes begin
GRAINS = re.compile(r"terminated unexpectedly with exit code (-?\d+)")


def spawn_without_main() -> None:
    """Let Grain's workers start without importing the program that trains.

    Python would import it in each, where a script without `if __name__ == "__main__"` trains again.
    Grain sends what a worker needs by cloudpickle, which takes the program's own classes along.
    """
    original = multiprocessing.spawn.get_preparation_data
    if hasattr(original, "without_main"):
        return

    def prepare(name: str) -> dict:
        prepared = original(name)
        if name.startswith(GRAINS_NAME):
            prepared.pop("init_main_from_path", None)
            prepared.pop("init_main_from_name", None)
        return prepared

    prepare.without_main = True  # type: ignore[attr-defined]
    multiprocessing.spawn.get_preparation_data = prepare


def attach_to_parent(*_: int) -> None:
    """Tie a worker process to its parent: it works while a stopped run saves, and ends with it.

    Ctrl-C and a cluster's SIGTERM reach the whole group of processes, but only the training process
    may act on them: it still needs batches until it has saved. Its SIGKILL reaches nobody else, and
    would leave workers behind.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def room() -> tuple[int, int] | None:
    """The bytes of shared memory, in all and free; None where it has no limit of its own."""
    try:
        found = os.statvfs(SHARED)
    except OSError:
        return None
    size = found.f_frsize * found.f_blocks
    return (size, found.f_frsize * found.f_bavail) if size else None


def held(workers: int, batches: int) -> int:
    """How many batches `workers` may have in shared memory at once, of so many in all."""
    return min(batches, workers * HELD)


def check_room(needed: int, workers: int, largest: int) -> None:
    """Raises UserError where `needed` bytes of batches, each up to `largest`, don't fit."""
    there = room()
    if there and needed > there[1]:
        raise UserError(
            f"data.workers={workers} hand over batches of up to {_mb(largest)} through {SHARED}, "
            f"{_mb(needed)} at a time; it has {_mb(there[0])}, of which {_mb(there[1])} are free: "
            f"{LARGER}, {FEWER}",
            RESUMABLE,
        )


@contextlib.contextmanager
def one_line(workers: int, batch: int) -> Iterator[None]:
    """Turns the end of one of `workers`, each with batches of `batch` bytes, into a UserError.

    What a worker raises by itself stays what it is.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if reason := _reason(error, workers, batch):
            raise UserError(reason, RESUMABLE) from error
        raise


def _reason(error: Exception, workers: int, batch: int) -> str | None:
    """What ended a worker, and what to do; None where the error says nothing of that."""
    if isinstance(error, MemoryError):
        return f"a data worker ran out of memory; {_less(workers)}"
    if isinstance(error, OSError):
        return _full(workers, batch) if is_of_shared_memory(error) else None
    found = GRAINS.search(str(error))
    if not found:
        return None
    code = int(found[1])
    if code == -signal.SIGBUS:
        return f"a data worker was killed by SIGBUS: {_full(workers, batch)}"
    return f"a data worker {ended(code)}; {_less(workers)}"


def is_of_shared_memory(error: OSError) -> bool:
    """Whether this is of shared memory, or of a semaphore in it, and not of a file on a disk."""
    full = error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)
    return full and (error.filename is None or str(error.filename).startswith("/psm_"))


def ended(code: int | None) -> str:
    """How a process with this exit code ended: what was done to it, by whom where that is known."""
    if code is None:
        return "ended without a word"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if -code == signal.SIGKILL:
        name += ", as the kernel's OOM killer does where memory runs out"
    return f"was killed by {name}"


def run_all(
    work: Callable[[Item], Result], items: Sequence[Item], processes: int | None
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, work(item)) as they get ready, from processes; one a core if no number is given.

    The first failure stops the rest. Raises UserError where a process is killed.
    """
    spawn = multiprocessing.get_context("spawn")
    children: list[multiprocessing.process.BaseProcess] = []
    try:
        with concurrent.futures.ProcessPoolExecutor(
            processes, spawn, _end_pool_with_parent
        ) as pool:
            try:
                jobs = {pool.submit(work, item): item for item in items}
                children = multiprocessing.active_children()
                for job in concurrent.futures.as_completed(jobs):
                    yield jobs[job], job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        codes = [child.exitcode for child in children if child.exitcode not in (0, None, -TERM)]
        raise UserError(
            f"a process {ended(codes[0] if codes else None)}; give the machine or container more "
            f"memory, or fewer than {len(children)} --workers, and run the same command again",
            RESUMABLE,
        ) from error
    except OSError as error:
        if is_of_shared_memory(error):
            raise UserError(
                f"{SHARED}{_size()} is full, and processes need a little of it: {LARGER}", RESUMABLE
            ) from error
        raise


def _end_pool_with_parent() -> None:
    """Leave Ctrl-C to the parent; the pool itself ends its processes by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _full(workers: int, batch: int) -> str:
    return (
        f"{SHARED}{_size()} is full: {workers} workers hand over batches of {_mb(batch)} through "
        f"it, up to {workers * HELD} at a time; {LARGER}, {FEWER}"
    )


def _size() -> str:
    there = room()
    return f" ({_mb(there[0])}, {_mb(there[1])} free now)" if there else ""


def _less(workers: int) -> str:
    fewer = f"fewer than --config.data.workers={workers} (0: none)"
    return f"give the machine or container more memory, {fewer}, or smaller batches"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
