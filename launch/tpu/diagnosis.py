"""Diagnose why an attempt ended, and decide whether, when and on which machine to retry.

One worker is the cause, the others exit because of it: the cause is the earliest exit that is not
collateral. Tables of log signatures are read from the top; the trainer's own final message, in its
heartbeat, outranks its exit code.
"""

import re
from typing import NamedTuple

from launch.tpu.exit_codes import Agent, Exit, Stop, Trainer

DELAYS = (10, 30, 120, 300)  # seconds before the next attempt, by failures in a row

# (pattern in the end of the log, kind), unless the exit code is 0
SIGNATURES = (
    (r"already in use by process with pid|libtpu multi-process lockfile", "busy"),
    (r"/dev/vfio/\d+\)?: Device or resource busy", "busy"),
    (r"Failed to start RPC server", "port"),
    (r"No space left on device|Disk quota exceeded", "disk"),
    (r"RESOURCE_EXHAUSTED.*(hbm|memory)", "user"),
)
# Messages of a worker that exits because of another one.
COLLATERAL = (
    r"PollForError|Barrier timed out|Gloo .*failed|Polled an error from coordination service"
    r"|Connection closed by peer|Connection reset by peer|heartbeat timeout"
    r"|vit-scale: process \d+[ :(]|processes connected within"
)
# Messages of every worker if code, data or folders differ between hosts, its own or another's: a
# restart cannot help.
DISAGREE = (
    r"hosts disagree: process \d+ differs from process 0|is not the same folder on process \d+"
)
# A message of the trainer that refuses to resume: its config or data has changed.
CHANGED = (
    r"workdir \S.* (holds a run (with (a )?different|that began with different|of \d.* can't be "
    r"extended)|has no checkpoint up to step) "
)
NOISE = re.compile(r"^\s*$|^\s+at |^\*\*\*|^I\d{4} |^W\d{4} |rerun the same command to resume$")


class WorkerExit(NamedTuple):
    """How the attempt ended on one worker."""

    worker: int
    code: int | None  # None: it vanished or had to be stopped
    at: float  # seconds, launcher's clock
    tail: str  # end of its log
    message: str = ""  # final message of the trainer, from its heartbeat
    stopped: bool = False  # by the launcher, after another worker had ended
    reason: str = ""  # what the launcher observed, if that decides


class Cause(NamedTuple):
    kind: str  # done | user | fatal | input | infra | busy | port | disk | preempted | resumable
    worker: int | None
    line: str
    signature: str  # equal for equal failures

    @property
    def text(self) -> str:
        return self.line if self.worker is None else f"[w{self.worker:02}] {self.line}"


def last_line(tail: str) -> str:
    """Return the trainer's last message, else the last exception, else the last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", tail) if not NOISE.search(line)]
    own = [line for line in lines if line.startswith("vit-scale: ")]
    if own:
        return own[-1]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    if raised:
        return raised[-1]
    return lines[-1] if lines else ""


def is_mismatch(end: WorkerExit) -> bool:
    """Return whether it exited because code, config, data or folder differ between hosts."""
    return end.code not in (None, Trainer.DONE, Trainer.RESUMABLE) and says(end, DISAGREE)


def says(end: WorkerExit, pattern: str) -> bool:
    return bool(re.search(pattern, f"{end.message}\n{last_line(end.tail)}"))


def is_collateral(end: WorkerExit) -> bool:
    if is_mismatch(end) and not end.reason:
        return False  # even if another worker detected it
    if end.stopped or end.code == 134 or end.message.startswith("process "):
        return True
    if end.code in (None, Trainer.DONE, Trainer.RESUMABLE, Trainer.DIVERGED) and not end.message:
        return bool(re.search(COLLATERAL, end.tail)) and end.code == Trainer.RESUMABLE
    return bool(re.search(COLLATERAL, last_line(end.tail)))


def classify(end: WorkerExit) -> str:
    if end.code == Agent.TPU_HELD:
        return "busy"
    if end.code in (Trainer.DIVERGED, Trainer.USAGE) or says(end, CHANGED):
        return "fatal"
    if is_mismatch(end):
        return "input"
    for pattern, kind in SIGNATURES:
        if end.code != 0 and re.search(pattern, end.tail):
            return kind
    if end.code == Trainer.RESUMABLE:
        return "resumable"
    if end.code is None or end.code == 0 or end.code >= 127:
        return "infra"
    return "user"


def diagnose(ends: list[WorkerExit]) -> Cause:
    """Return the cause of an attempt's end, given every worker's exit."""
    if all(end.code == 0 for end in ends):
        return Cause("done", None, "all workers have finished", "done")
    failed = [end for end in ends if end.code != 0 or end.reason]
    own = [end for end in failed if not is_collateral(end)]
    # A signal to one worker stops all with RESUMABLE: any other exit is the cause.
    own = [end for end in own if end.code != Trainer.RESUMABLE] or own
    first = min(own or failed, key=lambda end: end.at)
    kind = classify(first) if own else "infra"
    message = first.reason or first.message or last_line(first.tail) or "no message"
    line = f"{_describe_exit(first)}: {message}"
    if says(first, CHANGED):
        line += "; or rerun with --fresh, which trains in a new folder on the same machine"
    return Cause(kind, first.worker, line, signature(first.code, message))


def _describe_exit(end: WorkerExit) -> str:
    if end.code is None:
        return "lost"
    if end.code > 128:
        return f"killed by signal {end.code - 128}"
    return f"exit code {end.code}"


def signature(code: int | None, line: str) -> str:
    """Return the message without numbers and addresses, which differ between equal failures."""
    return f"{code}: " + re.sub(r"0x[0-9a-f]+|\d+", "N", line)[:200]


class Retry(NamedTuple):
    delay: float  # seconds
    recreate: bool  # the machine


def decide(state: dict, cause: Cause, progressed: bool, failures: int, restarts: int) -> Retry:
    """Return how to retry after an attempt ended with `cause`. Raises Stop to give up.

    Only progress justifies cost: a failure counts unless the run got further than before, even if
    the trainer says that it can resume. Preemptions do not; --max-hours and --max-cost bound them.

    Args:
      state: the journal's, where failures and restarts are counted.
      progressed: whether the run got further than before.
      failures: limit of consecutive failures without progress.
      restarts: limit of restarts for causes outside the training.
    """
    if progressed:
        state["failures"] = []
    if cause.kind in ("fatal", "input"):
        raise Stop(Exit.FAILED if cause.kind == "fatal" else Exit.BAD_INPUT, cause.text)
    row, preempted = state["failures"], cause.kind == "preempted"
    if not preempted:
        row.append(f"{cause.kind} {cause.signature}")
    if not preempted and len(row) >= failures:
        if cause.kind == "busy":
            raise Stop(Exit.TPU_HELD, cause.text)
        if len(set(row[-failures:])) == 1 and failures > 1:
            raise Stop(Exit.CRASH_LOOP, f"{failures} times in a row without progress: {cause.text}")
        raise Stop(Exit.FAILED if cause.kind == "user" else Exit.INFRASTRUCTURE, cause.text)
    if cause.kind != "user":
        state["restarts"] += 1
        if state["restarts"] > restarts:
            raise Stop(Exit.INFRASTRUCTURE, f"--max-restarts {restarts} reached: {cause.text}")
    if preempted:
        return Retry(DELAYS[0], recreate=False)  # the allocation replaces the machine
    infra_failures = sum(not entry.startswith("user ") for entry in row)
    delay = 0 if cause.kind == "port" else DELAYS[min(len(row), len(DELAYS)) - 1]
    return Retry(delay, cause.kind != "user" and infra_failures >= 2)
