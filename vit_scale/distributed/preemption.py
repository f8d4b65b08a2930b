"""SIGTERM as a request: training stops at the next safe point, saves, and exits 42 (resumable).

A machine that is about to be taken away, and a person who wants it back, say so by SIGTERM. While a
run is `deferred`, the signal is noted, and every loop that can last asks `check`. With several
hosts, one that got it is enough: jax brings all of them to stop at the same question. A second
SIGTERM ends the process at once.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from vit_scale.errors import RESUMABLE, UserError

STOPPED = "stopped by SIGTERM"


class Preempted(UserError):
    """Stopped by SIGTERM; rerun the same command to resume."""

    def __init__(self, where: str):
        super().__init__(f"{STOPPED} {where}; rerun the same command to resume", RESUMABLE)


_received = 0
_deferred = False
_questions = itertools.count()  # the same number is the same question on every host


def install() -> None:
    """Take SIGTERM over, for the life of this process. Outside of `deferred` it ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        return  # in a notebook's thread: signals are not ours
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _handle)
    # Python runs handlers between its own instructions: never while something is being compiled.
    threading.Thread(target=_end_at_the_second, args=(read,), daemon=True).start()


def _handle(number, frame) -> None:
    global _received
    _received += 1
    if not _deferred:
        # No exception: it would be raised inside of anything, such as an extension's beginning,
        # which makes another one of it, or a library that catches all. Nothing is to be saved yet.
        os.write(2, f"vit-scale: {Preempted('before training began')}\n".encode())
        os._exit(RESUMABLE)


def _end_at_the_second(signals: int) -> None:
    count = 0
    while count < 2:
        count += os.read(signals, 64).count(signal.SIGTERM)
    _exit_at_once()


def _exit_at_once(*_) -> NoReturn:
    print("vit-scale: a second SIGTERM: ended without saving", file=sys.stderr, flush=True)
    os._exit(RESUMABLE)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Note SIGTERM for `check`, instead of acting on it."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def requested() -> bool:
    """Whether to stop here: asked as often, in the same order, on all hosts, all get one answer."""
    from vit_scale.distributed import multihost

    if not multihost.is_several():
        return _received > 0
    from jax.experimental import multihost_utils

    stop = multihost_utils.reached_preemption_sync_point(next(_questions))
    if stop:  # until now the signal was jax's, which only takes note of it
        signal.signal(signal.SIGTERM, _exit_at_once)
    return stop


def check(where: str) -> None:
    """Raises Preempted if it is time to stop, and nothing here is lost by it."""
    if requested():
        raise Preempted(where)
