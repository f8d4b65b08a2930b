"""Decide whether, when and on which machine to retry after a failure.

Only progress justifies cost: a failure counts unless the run got further than before, even if the
trainer says that it can resume. Preemptions do not count; --max-hours and --max-cost bound them.
"""

from typing import NamedTuple

from launch.tpu.diagnosis import Cause
from launch.tpu.exit_codes import Exit, Stop

DELAYS = (10, 30, 120, 300)  # seconds before the next attempt, by failures in a row
USER_KINDS = ("user", "fatal")  # kinds that would recur on another machine


class Retry(NamedTuple):
    delay: float  # seconds
    recreate: bool  # the machine


def decide(state: dict, cause: Cause, progressed: bool, failures: int, restarts: int) -> Retry:
    """Return how to retry after an attempt ended with `cause`. Raises Stop to give up.

    Args:
      state: the journal's, where failures and restarts are counted.
      progressed: whether the run got further than before.
      failures: limit of consecutive failures without progress.
      restarts: limit of restarts for causes outside the training.
    """
    if progressed:
        state["failures"] = []
    if cause.kind == "fatal":
        raise Stop(Exit.FAILED, cause.text)
    if cause.kind == "input":
        raise Stop(Exit.BAD_INPUT, cause.text)
    if cause.kind == "preempted":
        state["restarts"] += 1
        _check_restarts(state, cause, restarts)
        return Retry(DELAYS[0], recreate=False)  # the allocation replaces the machine
    state["failures"].append(f"{cause.kind} {cause.signature}")
    row = state["failures"]
    if len(row) >= failures:
        if cause.kind == "busy":
            raise Stop(Exit.TPU_HELD, cause.text)
        if len(set(row[-failures:])) == 1 and failures > 1:
            raise Stop(Exit.CRASH_LOOP, f"{failures} times in a row without progress: {cause.text}")
        raise Stop(Exit.FAILED if cause.kind == "user" else Exit.INFRASTRUCTURE, cause.text)
    if cause.kind not in USER_KINDS:
        state["restarts"] += 1
        _check_restarts(state, cause, restarts)
    infra_failures = sum(not entry.startswith("user ") for entry in row)
    delay = 0 if cause.kind == "port" else DELAYS[min(len(row), len(DELAYS)) - 1]
    return Retry(delay, cause.kind not in USER_KINDS and infra_failures >= 2)


def _check_restarts(state: dict, cause: Cause, restarts: int) -> None:
    if state["restarts"] > restarts:
        raise Stop(Exit.INFRASTRUCTURE, f"--max-restarts {restarts} reached: {cause.text}")
