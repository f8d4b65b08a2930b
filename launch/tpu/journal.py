"""The launcher's record of a run, in runs/tpu/RUN of this clone, and its messages to the terminal.

    launch.json    the request, and where each value came from
    journal.jsonl  every transition and every command, with the time
    state.json     attempts, progress, failures, billed seconds
    a3/w00.log     the log of worker 0 in attempt 3; a3/cause.txt says why it ended
    lock           held by the one launcher that watches the run

Every line goes through `redact`, so no secret is written or printed. A closed terminal or a full
disk does not end a run: what cannot be written is dropped.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import sys
import time
from typing import IO, TextIO

# CSI and OSC sequences, other control characters, and those that reverse the reading direction.
CODES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)


class Terminal:
    """A stream without escape codes: workers and the cloud must not control the terminal."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(CODES.sub("", text).encode(errors="replace").decode())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def print_line(text: str, stream: TextIO) -> None:
    """Print a line; if the stream is closed, drop this line and all later ones."""
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
            "arguments": None,  # of vit-scale
            "attempt": 0,
            "progress": {},  # {run folder: highest step}
            "failures": [],  # signatures of consecutive failures without progress
            "restarts": 0,
            "billed": 0.0,  # seconds
            "zone": "",
            "result": None,
        }
        with contextlib.suppress(OSError, ValueError):
            self.state.update(json.loads((folder / "state.json").read_text()))

    def redact(self, text: str) -> str:
        for pattern in self.redacted:  # by as many bytes: logs are read by offset
            text = re.sub(pattern, lambda m: "*" * len(m[0].encode(errors="surrogateescape")), text)
        return text

    def say(self, what: str, text: str) -> None:
        """Print a line for the user, and record it."""
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
        """Replace a file atomically; return whether that succeeded."""
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
        """Become the launcher that watches this run; False if another process already does."""
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
        with contextlib.suppress(OSError, ValueError):  # it may have changed meanwhile
            self.state.update(json.loads((self.folder / "state.json").read_text()))
        return True

    def release_lock(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def watcher(self) -> str:
        """Return the PID of the launcher on this machine that watches the run, or ""."""
        with contextlib.suppress(OSError), (self.folder / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                return file.read().strip() or "unknown"
        return ""
