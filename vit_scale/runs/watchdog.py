"""What this process is doing, for those who watch it: heartbeats, time limits, and the time's use.

The loop says which phase it is in (`phase`) and that it gets on (`beat`). A thread then

- writes RUN/heartbeats/PROCESS.json every few seconds: step, phase, time, and last words;
- ends the process, with the stacks of all threads, where a phase gets nowhere for too long;
- ends it as well, and names the other one, where another host failed or is not heard from;
- keeps RUN/goodput.json up to date (goodput.py).

A process ended here exits 42, or as the host that failed did: the same command resumes from the
last checkpoint. SIGUSR1 prints the stacks of all threads, and nothing else happens.
A launcher that gives VIT_SCALE_HEARTBEAT=FILE, on a disk, finds each heartbeat there as well.
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
MISSED = 5  # heartbeats that a host may miss when something has failed, before it is blamed
# Which limit of the `watchdog` block holds in a phase; in any other, `step`.
LIMITS = {"compile": "compile", "start": "storage", "restore": "storage", "checkpoint": "storage"}


class Watch:
    """A context manager around one process's training in the run folder `run`.

    `limits` is the config's watchdog block, in seconds without progress; 0 is no limit.
    """

    def __init__(self, run: pathlib.Path, limits: ConfigDict):
        self.run, self.limits = run, limits
        self.step, self._phase, self._progress = 0, "start", time.monotonic()
        self._ledger = goodput.Ledger(run) if multihost.is_first() else None
        self._booked, self._lock = time.monotonic(), threading.Lock()
        self.every = BUCKET if paths.in_bucket(run) else max(DISK, jax.process_count() / 8)
        self.attempt = multihost.agree(secrets.token_hex(4))  # no earlier heartbeat counts
        self._others = Others(self) if multihost.is_several() else None
        self._code: int | None = None
        self._words = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> "Watch":
        global _current
        with contextlib.suppress(ValueError, OSError):  # a notebook has no such stream
            faulthandler.register(signal.SIGUSR1, sys.__stderr__ or sys.stderr, all_threads=True)
        (self.run / FOLDER).mkdir(parents=True, exist_ok=True)
        self.write()
        self._thread.start()
        _current = self
        return self

    def __exit__(self, kind, error, trace) -> None:
        global _current
        self._ended.set()
        self._thread.join(timeout=10)
        _current = None
        self.book()
        if self._code is None:
            self._code = 0
        self.write()
        if self._ledger:
            self._ledger.end(self._code)

    @contextlib.contextmanager
    def last_words(self) -> Iterator[None]:
        """What ends what is inside is told to the other hosts, before anything is tidied up."""
        try:
            yield
        except BaseException as error:
            if self._others and isinstance(error, jax.errors.JaxRuntimeError):
                self._others.blame()  # does not return where another host is the cause
            self._code, self._words = getattr(error, "code", FAILED), str(error)
            self.write()
            raise

    def enter(self, phase: str) -> str:
        """Begin a phase; returns the one before."""
        self.book()
        before, self._phase, self._progress = self._phase, phase, time.monotonic()
        return before

    def beat(self, step: int | None = None) -> None:
        """There was progress, up to `step`."""
        self._progress = time.monotonic()
        self.step = self.step if step is None else step

    def begin_at(self, step: int) -> None:
        """Steps begin here: after a start, or a step back to a checkpoint."""
        self.book()
        self.beat(step)
        if self._ledger:
            self._ledger.begin_at(step)

    def book(self) -> None:
        """Put the time since the last call to the account of the phase."""
        with self._lock:
            now = time.monotonic()
            if self._ledger:
                self._ledger.add(self._phase, now - self._booked, self.step)
            self._booked = now

    def write(self) -> None:
        """The heartbeat, with the last words if there are any. Never in the way."""
        content = {
            "run": str(self.run),
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "phase": self._phase,
            "step": self.step,
            "code": self._code,
            "words": self._words,
        }
        places = [self.run / FOLDER / f"{jax.process_index()}.json"]
        if launchers := os.environ.get("VIT_SCALE_HEARTBEAT"):
            places.append(pathlib.Path(launchers))
        for file in places:
            with contextlib.suppress(OSError):
                files.write(file, json.dumps(content).encode())

    def _loop(self) -> None:
        """Do each of it again and again, whatever the others raise: without it a hang lasts."""
        parts: list[Callable[[], None]] = [self.book, self.write]
        if self._ledger:
            parts.append(self._ledger.write)
        parts.append(self._check_limit)
        if others := self._others:
            parts.append(lambda: others.check(self.limits.peer))
        told: set[str] = set()
        while not self._ended.wait(self.every):
            for part in parts:
                try:
                    part()
                except Exception as error:  # noqa: BLE001
                    self._complain(error, told)

    def _complain(self, error: Exception, told: set[str]) -> None:
        """Say once what goes wrong in the watchdog's thread, which goes on."""
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        if type(error).__name__ not in told:
            told.add(type(error).__name__)
            with contextlib.suppress(OSError, ValueError):
                text = f"vit-scale: the watchdog had a problem ({line}), and goes on"
                print(text, file=sys.stderr, flush=True)

    def _check_limit(self) -> None:
        idle, name = time.monotonic() - self._progress, LIMITS.get(self._phase, "step")
        if self.limits[name] and idle > self.limits[name]:
            with contextlib.suppress(ValueError, OSError):
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
            self.end(
                f"no progress for {idle:.0f} s in phase {self._phase}, after step {self.step}; the "
                f"limit is watchdog.{name}={self.limits[name]:g} s; the stacks are above"
            )

    def end(self, line: str, code: int = RESUMABLE) -> NoReturn:
        """End the process here and now, from any thread."""
        print(f"vit-scale: {line}; rerun the same command to resume", file=sys.stderr, flush=True)
        self._code, self._words = code, line
        self.write()
        if self._ledger:
            self._ledger.end(code)
        os._exit(code)


class Others:
    """The other hosts, as their heartbeats show them."""

    def __init__(self, watch: Watch):
        self.watch, self._lock = watch, threading.Lock()
        self._versions: dict[int, object] = {}
        self._heard = dict.fromkeys(range(jax.process_count()), time.monotonic())
        del self._heard[jax.process_index()]

    def check(self, patience: float) -> None:
        """End this process where another one has failed, or was not heard from for `patience`."""
        if self.watch._code is not None:
            return  # it ends already, and says why itself
        with self._lock, contextlib.suppress(OSError):
            versions = paths.versions(self.watch.run / FOLDER)
            for number in self._heard:
                version = versions.get(f"{number}.json")
                if version is not None and version != self._versions.get(number):
                    self._versions[number] = version
                    self._hear(number)
                silent = time.monotonic() - self._heard[number]
                if patience and silent > patience:
                    last = self._read(number)
                    self.watch.end(
                        f"process {number} ({last.get('host', 'unknown')}) was not heard from for "
                        f"{silent:.0f} s, last in phase {last.get('phase', 'start')} after step "
                        f"{last.get('step', 0)}: it was killed, is frozen, or is cut off"
                    )

    def _hear(self, number: int) -> None:
        said = self._read(number)
        if said.get("attempt") != self.watch.attempt:
            return
        # One that has ended well has nothing more to say; nor has one that stopped by SIGTERM, for
        # then all stop, and this one may still be writing what all of them have saved.
        ended = said["code"] == 0 or said["words"].startswith(STOPPED)
        self._heard[number] = math.inf if ended else time.monotonic()
        # One that stops because of another says so as well: the cause is looked for there.
        if not ended and said["code"] and not said["words"].startswith("process "):
            self.watch.end(f"process {number} ({said['host']}): {said['words']}", said["code"])

    def _read(self, number: int) -> dict:
        try:
            return json.loads((self.watch.run / FOLDER / f"{number}.json").read_text())
        except (OSError, ValueError):
            return {}

    def blame(self) -> None:
        """Wait for the host that is the cause of what happened here; return if there is none."""
        patience = MISSED * self.watch.every
        until = time.monotonic() + 2 * patience
        while time.monotonic() < until:
            self.check(patience)
            time.sleep(self.watch.every / 4)


_current: Watch | None = None


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Say that what is inside is the phase `name`. Nothing is said where nobody watches."""
    watch = _current
    before = watch.enter(name) if watch else ""
    try:
        yield
    finally:
        if watch:
            watch.enter(before)


def beat(step: int | None = None) -> None:
    """Say that there was progress, up to `step`."""
    if _current:
        _current.beat(step)
