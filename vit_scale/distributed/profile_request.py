"""SIGUSR2 asks a running job for a profile of its next steps (tracking/profiler.py).

The signal is blocked in this process, and so in every process that it starts, because cluster tools
send it to all of a job's processes: its default action would end data workers. A thread waits for
it.
"""

import signal
import threading

_requested = threading.Event()


def install() -> None:
    """Take SIGUSR2 as a request from now on. Call before other threads begin: they inherit it."""
    if threading.current_thread() is not threading.main_thread():
        return  # a notebook's thread: only the main thread may handle signals
    signal.signal(signal.SIGUSR2, lambda *_: _requested.set())  # in threads that don't block it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    while True:
        signal.sigwait({signal.SIGUSR2})
        _requested.set()


def take() -> bool:
    """Tell whether a profile was requested since the last call."""
    requested = _requested.is_set()
    if requested:
        _requested.clear()
    return requested
