"""Worker processes: their shared memory, their end with the parent, and errors when one dies.

Grain passes batches from workers in shared memory, on Linux in /dev/shm. If that is small (64 MiB
is the default in Docker and Kubernetes), a worker that writes to it is killed by SIGBUS.
Guarantees: shared memory that is too small is refused before anything is read; a worker that is
killed, for that reason or by the kernel's OOM killer, raises a UserError with the cause and the
exit code of a resumable run.
"""

import concurrent.futures
import contextlib
import errno
import functools
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
READ_AHEAD = 2  # batches that a worker or thread prepares while the device computes
# Per worker: those waiting and one in progress, and as many in the thread that reads from it.
IN_FLIGHT = 2 * (READ_AHEAD + 1)
LARGER = "increase it (docker run --shm-size=4g; Kubernetes: an emptyDir with medium: Memory)"
FEWER = "or set --config.data.workers=0, or use smaller batches"
TERM = signal.SIGTERM.value
Item = TypeVar("Item")
Result = TypeVar("Result")
GRAIN_NAME = "grain-process-prefetch"  # prefix of its processes' names
GRAIN_EXIT = re.compile(r"terminated unexpectedly with exit code (-?\d+)")


def spawn_without_main() -> None:
    """Keep Grain's workers from importing the main module.

    A script without `if __name__ == "__main__"` would train again in each of them. Grain sends what
    a worker needs by cloudpickle, including classes of the main module.
    """
    original = multiprocessing.spawn.get_preparation_data
    if hasattr(original, "without_main"):
        return

    def prepare(name: str) -> dict:
        prepared = original(name)
        if name.startswith(GRAIN_NAME):
            prepared.pop("init_main_from_path", None)
            prepared.pop("init_main_from_name", None)
        return prepared

    prepare.without_main = True  # type: ignore[attr-defined]
    multiprocessing.spawn.get_preparation_data = prepare


def attach_to_parent(*_: int) -> None:
    """Make a worker process ignore signals and end with its parent.

    Ctrl-C and a cluster's SIGTERM reach the whole process group, but the training process needs
    batches until it has saved. If it is killed by SIGKILL, its workers must not stay behind.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def shared_memory() -> tuple[int, int] | None:
    """Return the total and free bytes of shared memory; None if it has no limit of its own."""
    try:
        status = os.statvfs(SHARED)
    except OSError:
        return None
    size = status.f_frsize * status.f_blocks
    return (size, status.f_frsize * status.f_bavail) if size else None


def in_flight(workers: int, batches: int) -> int:
    """Return how many of `batches` may be in shared memory at once."""
    return min(batches, workers * IN_FLIGHT)


def check_shared_memory(needed: int, workers: int, largest: int) -> None:
    """Raise UserError unless `needed` bytes of batches, each up to `largest`, fit."""
    memory = shared_memory()
    if memory and needed > memory[1]:
        raise UserError(
            f"data.workers={workers} pass batches of up to {_mb(largest)} through {SHARED}, "
            f"{_mb(needed)} at a time; it has {_mb(memory[0])}, {_mb(memory[1])} free: "
            f"{LARGER}, {FEWER}",
            RESUMABLE,
        )


@contextlib.contextmanager
def user_errors(workers: int, batch: int) -> Iterator[None]:
    """Turn the death of one of `workers`, which pass batches of `batch` bytes, into a UserError.

    Exceptions that are raised in a worker pass unchanged.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if reason := _reason(error, workers, batch):
            raise UserError(reason, RESUMABLE) from error
        raise


def _reason(error: Exception, workers: int, batch: int) -> str | None:
    """Return why a worker died, and what to do; None if the error does not say that one did."""
    if isinstance(error, MemoryError):
        return f"a data worker ran out of memory; {_advice(workers)}"
    if isinstance(error, OSError):
        return _full(workers, batch) if is_shared_memory_full(error) else None
    match = GRAIN_EXIT.search(str(error))
    if not match:
        return None
    code = int(match[1])
    if code == -signal.SIGBUS:
        return f"a data worker was killed by SIGBUS: {_full(workers, batch)}"
    return f"a data worker {describe_exit(code)}; {_advice(workers)}"


def is_shared_memory_full(error: OSError) -> bool:
    """Return whether shared memory or a semaphore failed for lack of space, not a file on disk."""
    full = error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)
    return full and (error.filename is None or str(error.filename).startswith("/psm_"))


def describe_exit(code: int | None) -> str:
    """Describe how a process with this exit code ended."""
    if code is None:
        return "ended without an exit code"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if -code == signal.SIGKILL:
        name += ", as by the kernel's OOM killer when memory runs out"
    return f"was killed by {name}"


def thread_map(
    work: Callable[[Item], Result], items: Sequence[Item], threads: int
) -> Iterator[Result]:
    """Yield work(item) of each item in order, computed by so many threads of this process."""
    if threads <= 1 or len(items) <= 1:
        return map(work, items)
    return _pool(os.getpid(), threads).map(work, items)


@functools.cache
def _pool(process: int, threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """Return the threads of this process; a forked one has none of its parent's."""
    return concurrent.futures.ThreadPoolExecutor(threads, "decode")


def parallel_map(
    work: Callable[[Item], Result], items: Sequence[Item], processes: int | None
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, work(item)) in order of completion, computed by `processes` or one per core.

    The first failure cancels the rest. Raises UserError if a process is killed.
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
        exit_ = describe_exit(codes[0] if codes else None)
        raise UserError(
            f"a process {exit_}; give the machine or container more "
            f"memory, or use fewer --workers than {len(children)}, and rerun the same command",
            RESUMABLE,
        ) from error
    except OSError as error:
        if is_shared_memory_full(error):
            raise UserError(
                f"{SHARED}{_size()} is full, and processes need some of it: {LARGER}", RESUMABLE
            ) from error
        raise


def _end_pool_with_parent() -> None:
    """Ignore Ctrl-C, and end with the parent; the pool ends its processes by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _full(workers: int, batch: int) -> str:
    return (
        f"{SHARED}{_size()} is full: {workers} workers pass batches of {_mb(batch)} through "
        f"it, up to {workers * IN_FLIGHT} at a time; {LARGER}, {FEWER}"
    )


def _size() -> str:
    memory = shared_memory()
    return f" ({_mb(memory[0])}, {_mb(memory[1])} free now)" if memory else ""


def _advice(workers: int) -> str:
    fewer = f"use fewer workers than --config.data.workers={workers}"
    return f"give the machine or container more memory, {fewer}, or use smaller batches"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
