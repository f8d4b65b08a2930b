"""Preemption: on SIGTERM training stops at the next safe point, saves, and exits 42 (resumable).

Clouds send SIGTERM before they take a machine away, and so does a person who wants a run to stop.
Inside `deferred` the signal is recorded, and every long loop calls `check`. With several hosts a
signal to one of them suffices: jax makes all of them stop at the same call. A second SIGTERM ends
the process at once; with several hosts a third, as the first may reach one while it is saving.
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
    """Raised where training stops because of SIGTERM."""

    def __init__(self, where: str):
        super().__init__(f"{STOPPED} {where}; rerun the same command to resume", RESUMABLE)


_received = 0
_deferred = False
_sync_points = itertools.count()  # every host must use the same numbers


def install() -> None:
    """Handle SIGTERM from now on. Outside `deferred` it ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        return  # a notebook's thread: only the main thread may handle signals
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _handle)
    # Python runs signal handlers between bytecode instructions: not while XLA compiles.
    threading.Thread(target=_exit_at_second_signal, args=(read,), daemon=True).start()


def _handle(number, frame) -> None:
    global _received
    _received += 1
    if not _deferred:
        # There is nothing to save yet. An exception might be raised inside an extension's import,
        # which replaces it, or inside a library that swallows it.
        os.write(2, f"vit-scale: {Preempted('before training began')}\n".encode())
        os._exit(RESUMABLE)


def _exit_at_second_signal(signals: int) -> None:
    count = 0
    while count < 2:
        count += os.read(signals, 64).count(signal.SIGTERM)
    _exit_at_once()


def _exit_at_once() -> NoReturn:
    print("vit-scale: second SIGTERM: exiting without saving", file=sys.stderr, flush=True)
    os._exit(RESUMABLE)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Record SIGTERM for `check` instead of exiting."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def requested() -> bool:
    """Tell whether to stop here. All hosts must call it equally often; all get the same answer."""
    from vit_scale.distributed import multihost

    if not multihost.has_peers():
        return _received > 0
    from jax.experimental import multihost_utils

    stop = multihost_utils.reached_preemption_sync_point(next(_sync_points))
    if stop:  # until now jax handled the signal, and only recorded it; the thread counts from here
        signal.signal(signal.SIGTERM, lambda *_: None)
    return stop


def check(where: str) -> None:
    """Raise Preempted if SIGTERM was received. Call where stopping loses nothing."""
    if requested():
        raise Preempted(where)
