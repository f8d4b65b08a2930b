"""What a run's launcher remembers and says: runs/tpu/RUN on this machine, and the terminal.

    launch.json    what was asked for, and where each value came from
    journal.jsonl  every transition and every command, with the time
    state.json     attempts, progress, failures, money
    a3/w00.log     what worker 0 printed in attempt 3; a3/cause.txt why it ended
    lock           held by the one launcher that watches the run

No secret is written or printed: every line goes through `hide`. A terminal that is gone and a full
disk are no reason to leave a run: what can't be said or noted is not.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import sys
import time
from typing import IO, TextIO


def print_line(text: str, stream: TextIO) -> None:
    """Print a line; where nobody reads any more, neither this nor what comes is an error."""
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Journal:
    def __init__(self, folder: pathlib.Path, quiet: bool = False):
        self.folder = folder
        self.quiet = quiet
        self.redacted: list[str] = []
        self._lock: IO | None = None
        self.state: dict = {
            "attempt": 0,
            "progress": {},  # {run folder: highest step}
            "failures": [],  # signatures of those in a row without progress
            "restarts": 0,
            "billed": 0.0,  # seconds
            "zone": "",
            "result": None,
        }
        with contextlib.suppress(OSError, ValueError):
            self.state.update(json.loads((folder / "state.json").read_text()))

    def redact(self, text: str) -> str:
        for value in self.redacted:
            text = text.replace(value, "*" * len(value))  # as long: logs have offsets
        return text

    def say(self, what: str, text: str) -> None:
        """A line for the user, which is journalled as well."""
        text = self.redact(text)
        if not self.quiet:
            print_line(f"{what:8} {text}", sys.stderr)
        self.write(what, text=text)

    def print_log(self, worker: int, text: str) -> None:
        if not self.quiet:
            print_line(self.redact(f"[w{worker:02}] {text}"), sys.stderr)

    def write(self, what: str, **content) -> None:
        line = self.redact(json.dumps({"time": round(time.time(), 3), "what": what, **content}))
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "journal.jsonl").open("a") as file:
                file.write(line + "\n")

    def save(self) -> None:
        self.put("state.json", json.dumps(self.state, indent=1))

    def put(self, name: str, text: str) -> bool:
        """A whole file, or the old one; whether it is the new one."""
        file = self.folder / name
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(self.redact(text))
            os.replace(partial, file)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            return False
        return True

    def log_file(self, attempt: int, worker: int) -> pathlib.Path:
        file = self.folder / f"a{attempt}" / f"w{worker:02}.log"
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def add_log(self, attempt: int, worker: int, text: str) -> None:
        with contextlib.suppress(OSError), self.log_file(attempt, worker).open("ab") as file:
            file.write(text.encode(errors="surrogateescape"))

    def read_log(self, attempt: int, worker: int) -> str:
        with contextlib.suppress(OSError):
            return self.log_file(attempt, worker).read_text(errors="replace")
        return ""

    def acquire_lock(self) -> bool:
        """Become the one that watches this run; False where another process of this machine is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._lock = file
        with contextlib.suppress(OSError, ValueError):  # it may have changed since it was read
            self.state.update(json.loads((self.folder / "state.json").read_text()))
        return True

    def release_lock(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def watcher(self) -> str:
        """The process that watches this run on this machine, or nothing."""
        with contextlib.suppress(OSError), (self.folder / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                return file.read().strip() or "unknown"
        return ""
