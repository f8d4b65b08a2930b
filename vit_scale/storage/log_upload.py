"""Copy a growing log to its run's bucket, where it outlives the machine and whoever watches.

    python -m vit_scale.storage.log_upload LOG --workdir gs://BUCKET/RUN [the trainer's arguments]

launch/agent.sh runs this beside the trainer, whose exit code appears in the log's folder as `rc`
when it has ended. The log becomes aATTEMPT/HOST.PART.log: parts of PART bytes, of which the
newest KEEP remain, without what the pattern in VIT_SCALE_REDACT matches, which launch/tpu/secret.py
makes of the secrets.
"""

import contextlib
import os
import pathlib
import re
import socket
import sys
import time
from collections.abc import Sequence

from vit_scale.errors import UserError
from vit_scale.storage import files, paths

EVERY, RETRY = 60, 5  # seconds between uploads, and between tries of the last one
TRIES = 5  # of the last one, for which launch/agent.sh waits half a minute
PART, KEEP = 8 << 20, 8  # bytes, parts
NOTHING = rb"(?!)"  # the pattern that never matches


class LogUpload:
    """The parts of `log` in the folder `target`; `save` uploads what has been added."""

    def __init__(self, log: pathlib.Path, target: pathlib.Path, name: str, redacted: str = ""):
        self.log, self.target, self.name = log, target, name
        self.redacted = re.compile(redacted.encode(errors="surrogateescape") or NOTHING)
        self.start = self.part = self.saved = 0  # current part: offset, number, bytes uploaded

    def save(self, last: bool = False) -> None:
        """Upload the complete lines of the current part, and go on to the next. Raises OSError."""
        while True:
            with self.log.open("rb") as stream:
                stream.seek(self.start)
                text = stream.read(PART)
            full = len(text) == PART
            if full or not last:  # a part ends with a line, so that no secret is cut in two
                text = text[: text.rfind(b"\n") + 1] or text * full
            if len(text) > self.saved:
                text = self.redacted.sub(lambda match: b"*" * len(match[0]), text)
                files.write(self._path(self.part), text)
                self.saved = len(text)
            if not full:
                return
            self.start, self.saved, self.part = self.start + len(text), 0, self.part + 1
            if self.part > KEEP:
                self._path(self.part - KEEP - 1).unlink(missing_ok=True)

    def _path(self, part: int) -> pathlib.Path:
        return self.target / f"{self.name}.{part:03}.log"


def main(log: str, arguments: Sequence[str]) -> None:
    workdir = arguments[arguments.index("--workdir") + 1]
    numbers = [word.partition("=")[2] for word in arguments if word.startswith("--process=")]
    name = "-".join([socket.gethostname(), *numbers])
    upload, tries = None, 0  # of the last upload
    while tries < TRIES:
        last = wait_for(pathlib.Path(log).with_name("rc"), EVERY)
        tries += last
        with contextlib.suppress(OSError, UserError):  # the bucket doesn't answer: try again
            if upload is None:
                folder = paths.parse(workdir) / "logs" / f"a{os.environ.get('ATTEMPT', '1')}"
                redacted = os.environ.get("VIT_SCALE_REDACT", "")
                upload = LogUpload(pathlib.Path(log), folder, name, redacted)
            upload.save(last)
            if last:
                return
        if last:
            time.sleep(RETRY)


def wait_for(file: pathlib.Path, seconds: float) -> bool:
    """Wait for `file`, up to `seconds`; return whether it exists."""
    until = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.5)
    return file.exists()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
