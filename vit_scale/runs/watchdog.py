"""The watchdog: heartbeats, time limits, and the account of where the time goes.

The train loop reports its phase (`phase`) and its progress (`beat`). A thread then

- writes RUN/heartbeats/PROCESS.json every few seconds: step, phase, time, and final status;
- ends the process where another host has failed or sends no heartbeat, and names that host;
- keeps RUN/goodput.json up to date (goodput.py).

A second thread ends the process, with the stacks of all threads, where a phase makes no progress
for too long. It touches no storage, which may be what hangs.

A process that the watchdog ends exits 42, or with the code of the host that failed; rerunning the
same command resumes from the last checkpoint. SIGUSR1 prints the stacks of all threads and changes
nothing. A launcher that sets VIT_SCALE_HEARTBEAT=FILE, on a local disk, gets each heartbeat there
as well.
"""

import contextlib
import faulthandler
import json
import math
import os
import pathlib
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
from ml_collections import ConfigDict

from vit_scale.distributed import multihost
from vit_scale.distributed.preemption import STOPPED
from vit_scale.errors import FAILED, RESUMABLE
from vit_scale.runs import goodput
from vit_scale.storage import files, paths

FOLDER = "heartbeats"
DISK, BUCKET = 1, 15  # seconds between heartbeats
LAST_WORDS = 10  # seconds for the final status to be written, before the process ends without
MISSED = 5  # heartbeats that a host may miss, after a failure here, before it counts as the cause
# The limit of the `watchdog` block that applies to a phase; in any other phase `step` does.
LIMITS = {"compile": "compile", "start": "storage", "restore": "storage", "checkpoint": "storage"}


class Watchdog:
    """A context manager around one process's training in the run folder `run`.

    `limits` is the config's watchdog block: seconds without progress, 0 for no limit.
    """

    def __init__(self, run: pathlib.Path, limits: ConfigDict):
        self.run, self.limits = run, limits
        self.step, self._phase, self._progress = 0, "start", time.monotonic()
        self._ledger = goodput.Ledger(run) if multihost.is_first() else None
        self._recorded, self._lock = time.monotonic(), threading.Lock()
        self.every = BUCKET if paths.in_bucket(run) else max(DISK, jax.process_count() / 8)
        self.attempt = multihost.broadcast(
            secrets.token_hex(4)
        )  # tells old heartbeats from new ones
        self._peers = Peers(self) if multihost.has_peers() else None
        self._code: int | None = None  # of the process's exit, once that is known
        self._message = ""
        self._ended = threading.Event()
        stored: list[Callable[[], None]] = [self.record_time, self.write_heartbeat]
        if self._ledger:
            stored.append(self._ledger.write)
        if peers := self._peers:
            stored.append(lambda: peers.check(limits.peer))
        self._threads = [
            threading.Thread(target=self._loop, args=tasks, daemon=True)
            for tasks in (stored, [self._check_limit])
        ]

    def __enter__(self) -> "Watchdog":
        global _current
        with contextlib.suppress(ValueError, OSError):  # a notebook has no such stream
            faulthandler.register(signal.SIGUSR1, sys.__stderr__ or sys.stderr, all_threads=True)
        (self.run / FOLDER).mkdir(parents=True, exist_ok=True)
        self.write_heartbeat()
        for thread in self._threads:
            thread.start()
        _current = self
        return self

    def __exit__(self, kind, error, trace) -> None:
        global _current
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=10)
        _current = None
        self.record_time()
        if self._code is None:
            self._code = 0 if error is None else getattr(error, "code", FAILED)
            self._message = "" if error is None else str(error)
        self.write_heartbeat()
        if self._ledger:
            self._ledger.end(self._code)

    @contextlib.contextmanager
    def report_failure(self) -> Iterator[None]:
        """Write an exception from inside as final status, for other hosts, before any cleanup."""
        try:
            yield
        except BaseException as error:
            if self._peers and isinstance(error, jax.errors.JaxRuntimeError):
                self._peers.find_cause()  # does not return if another host is the cause
            self._code, self._message = getattr(error, "code", FAILED), str(error)
            self.write_heartbeat()
            raise

    def enter_phase(self, phase: str) -> str:
        """Begin a phase, and return the previous one."""
        self.record_time()
        previous, self._phase, self._progress = self._phase, phase, time.monotonic()
        return previous

    def beat(self, step: int | None = None) -> None:
        """Report progress, up to `step`."""
        self._progress = time.monotonic()
        self.step = self.step if step is None else step

    def begin_at(self, step: int) -> None:
        """Report that steps begin at `step`, after a start or a rollback."""
        self.record_time()
        self.beat(step)
        if self._ledger:
            self._ledger.begin_at(step)

    def record_time(self) -> None:
        """Add the time since the last call to the account of the current phase."""
        with self._lock:
            now = time.monotonic()
            if self._ledger:
                self._ledger.add(self._phase, now - self._recorded, self.step)
            self._recorded = now

    def write_heartbeat(self) -> None:
        """Write the heartbeat, with the final status if there is one; ignore storage errors."""
        content = {
            "run": str(self.run),
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "phase": self._phase,
            "step": self.step,
            "code": self._code,
            "words": self._message,
        }
        targets = [self.run / FOLDER / f"{jax.process_index()}.json"]
        if launchers := os.environ.get("VIT_SCALE_HEARTBEAT"):  # first: the run's storage may hang
            targets.insert(0, pathlib.Path(launchers))
        for target in targets:
            with contextlib.suppress(OSError):
                files.write(target, json.dumps(content).encode())

    def _loop(self, *tasks: Callable[[], None]) -> None:
        """Run every task periodically, whatever another one raises: else a hang goes unnoticed."""
        reported: set[str] = set()
        while not self._ended.wait(self.every):
            for task in tasks:
                try:
                    task()
                except Exception as error:  # noqa: BLE001
                    self._report_once(error, reported)

    def _report_once(self, error: Exception, reported: set[str]) -> None:
        """Print an error of the watchdog's own thread, once per type."""
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        if type(error).__name__ not in reported:
            reported.add(type(error).__name__)
            with contextlib.suppress(OSError, ValueError):
                text = f"vit-scale: error in the watchdog, which keeps running ({line})"
                print(text, file=sys.stderr, flush=True)

    def _check_limit(self) -> None:
        idle, name = time.monotonic() - self._progress, LIMITS.get(self._phase, "step")
        if self.limits[name] and idle > self.limits[name]:
            with contextlib.suppress(ValueError, OSError):
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
            self.exit_process(
                f"no progress for {idle:.0f} s in phase {self._phase}, after step {self.step} "
                f"(limit: watchdog.{name}={self.limits[name]:g} s); all stacks are printed above"
            )

    def exit_process(self, message: str, code: int = RESUMABLE) -> NoReturn:
        """End the process at once, from any thread, with `message` as its final status."""
        line = f"vit-scale: {message}; rerun the same command to resume"
        print(line, file=sys.stderr, flush=True)
        self._code, self._message = code, message
        hung = threading.Timer(LAST_WORDS, os._exit, (code,))
        hung.daemon = True
        hung.start()
        self.write_heartbeat()
        if self._ledger:
            self._ledger.end(code)
        os._exit(code)


class Peers:
    """The other hosts, as known from their heartbeats."""

    def __init__(self, watchdog: Watchdog):
        self.watchdog, self._lock = watchdog, threading.Lock()
        self._versions: dict[int, object] = {}
        self._last_seen = dict.fromkeys(range(jax.process_count()), time.monotonic())
        del self._last_seen[jax.process_index()]

    def check(self, limit: float) -> None:
        """End this process if another has failed, or has sent no heartbeat for `limit` seconds."""
        if self.watchdog._code is not None:
            return  # this process is ending already, and reports its own reason
        with self._lock, contextlib.suppress(OSError):
            versions = paths.versions(self.watchdog.run / FOLDER)
            for number in self._last_seen:
                version = versions.get(f"{number}.json")
                if version is not None and version != self._versions.get(number):
                    self._versions[number] = version
                    self._receive(number)
                silent = time.monotonic() - self._last_seen[number]
                if limit and silent > limit:
                    last = self._read(number)
                    self.watchdog.exit_process(
                        f"process {number} ({last.get('host', 'unknown')}) has sent no heartbeat "
                        f"for {silent:.0f} s (last: phase {last.get('phase', 'start')}, step "
                        f"{last.get('step', 0)}): it was killed, hangs, or lost its network"
                    )

    def _receive(self, number: int) -> None:
        heartbeat = self._read(number)
        if heartbeat.get("attempt") != self.watchdog.attempt:
            return
        code, message = heartbeat["code"], heartbeat["words"]
        # A process that finished sends no more heartbeats. Nor does one that stopped by SIGTERM:
        # then all stop, and this one may still be writing the checkpoint that all share.
        finished = code == 0 or message.startswith(STOPPED)
        self._last_seen[number] = math.inf if finished else time.monotonic()
        # A process that ended because of another one names it: the cause is that other one.
        if not finished and code and not message.startswith("process "):
            self.watchdog.exit_process(f"process {number} ({heartbeat['host']}): {message}", code)

    def _read(self, number: int) -> dict:
        try:
            return json.loads((self.watchdog.run / FOLDER / f"{number}.json").read_text())
        except (OSError, ValueError):
            return {}

    def find_cause(self) -> None:
        """Wait for a host whose failure explains an error here; return if there is none."""
        limit = MISSED * self.watchdog.every
        until = time.monotonic() + 2 * limit
        while time.monotonic() < until:
            self.check(limit)
            time.sleep(self.watchdog.every / 4)


_current: Watchdog | None = None


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Report that the code inside is the phase `name`; do nothing without a watchdog."""
    watchdog = _current
    previous = watchdog.enter_phase(name) if watchdog else ""
    try:
        yield
    finally:
        if watchdog:
            watchdog.enter_phase(previous)


def beat(step: int | None = None) -> None:
    """Report progress, up to `step`; do nothing without a watchdog."""
    if _current:
        _current.beat(step)
