"""Why an attempt ended: one worker is the cause; others end because of it, and say more.

The cause is the earliest end that is not collateral. What says so is a table, read from the top;
the trainer's own last words (watch.py) are believed before its exit code.
"""

import re
from typing import NamedTuple

from launch.tpu.exit_codes import DIVERGED, DONE, RESUMABLE, TPU_HELD, TRAINER_USAGE

# (pattern in the log's last lines, kind, needs another code than 0)
SIGNATURES = (
    (
        r"already in use by process with pid|libtpu multi-process lockfile"
        r"|/dev/vfio/\d+\)?: Device or resource busy",
        "busy",
    ),
    (r"Failed to start RPC server", "port"),
    (r"No space left on device|Disk quota exceeded", "disk"),
    (r"RESOURCE_EXHAUSTED.*(hbm|memory)", "user"),
)
# What a worker says that ends because of another one.
COLLATERAL = (
    r"PollForError|Barrier timed out|Gloo .*failed|Polled an error from coordination service"
    r"|Connection closed by peer|Connection reset by peer|heartbeat timeout"
    r"|vit-scale: process \d+[ :(]|did not all meet within"
)
# What every worker says where their code, data or folders differ, in its own words or in another's:
# a mistake that no other machine mends.
DISAGREE = r"would train something else than process 0|is not the same folder on process \d+"
NOISE = re.compile(r"^\s*$|^\s+at |^\*\*\*|^I\d{4} |^W\d{4} |rerun the same command to resume$")


class WorkerExit(NamedTuple):
    """How one worker's attempt ended."""

    worker: int
    code: int | None  # None: it vanished, or had to be stopped
    at: float  # seconds of the launcher's clock
    tail: str  # last lines of its log
    message: str = ""  # of its heartbeat
    stopped: bool = False  # by the launcher, after the others had ended
    reason: str = ""  # what the launcher saw, where it speaks for the worker


class Cause(NamedTuple):
    kind: str  # done | user | fatal | input | infra | busy | port | disk | preempted | resumable
    worker: int | None
    line: str
    signature: str  # the same for the same failure

    @property
    def text(self) -> str:
        return self.line if self.worker is None else f"[w{self.worker:02}] {self.line}"


def last_line(tail: str) -> str:
    """The line that says why: the trainer's own, else the last of a traceback, else the last."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", tail) if not NOISE.search(line)]
    own = [line for line in lines if line.startswith("vit-scale: ")]
    if own:
        return own[-1]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    if raised:
        return raised[-1]
    return lines[-1] if lines else ""


def is_mismatch(end: WorkerExit) -> bool:
    """Whether it ended because the hosts have not the same code, config, data or folder."""
    if end.code in (None, DONE, RESUMABLE):
        return False
    return bool(re.search(DISAGREE, f"{end.message}\n{last_line(end.tail)}"))


def is_collateral(end: WorkerExit) -> bool:
    if is_mismatch(end) and not end.reason:
        return False  # also where another one has found it out
    if end.stopped or end.code == 134 or end.message.startswith("process "):
        return True
    if end.code in (None, DONE, RESUMABLE, DIVERGED) and not end.message:
        return bool(re.search(COLLATERAL, end.tail)) and end.code == RESUMABLE
    return bool(re.search(COLLATERAL, last_line(end.tail)))


def classify(end: WorkerExit) -> str:
    if end.code == TPU_HELD:
        return "busy"
    if end.code in (DIVERGED, TRAINER_USAGE):
        return "fatal"
    if is_mismatch(end):
        return "input"
    for pattern, found in SIGNATURES:
        if end.code != 0 and re.search(pattern, end.tail):
            return found
    if end.code == RESUMABLE:
        return "resumable"
    if end.code is None or end.code == 0 or end.code >= 127:
        return "infra"
    return "user"


def diagnose(ends: list[WorkerExit]) -> Cause:
    """The cause of an attempt's end, from how every worker of it ended."""
    if all(end.code == 0 for end in ends):
        return Cause("done", None, "all workers have finished", "done")
    failed = [end for end in ends if end.code != 0 or end.reason]
    own = [end for end in failed if not is_collateral(end)]
    # All stop together for a signal: who got it is no failure. Any other end was before that.
    own = [end for end in own if end.code != RESUMABLE] or own
    first = min(own or failed, key=lambda end: end.at)
    found = classify(first) if own else "infra"
    message = first.reason or first.message or last_line(first.tail) or "it said nothing"
    line = f"{_describe_exit(first)}: {message}"
    return Cause(found, first.worker, line, signature(first.code, message))


def _describe_exit(end: WorkerExit) -> str:
    if end.code is None:
        return "lost"
    if end.code > 128:
        return f"killed by signal {end.code - 128}"
    return f"exit code {end.code}"


def signature(code: int | None, line: str) -> str:
    """The same for the same failure: numbers and addresses differ from one time to the next."""
    return f"{code}: " + re.sub(r"0x[0-9a-f]+|\d+", "N", line)[:200]
