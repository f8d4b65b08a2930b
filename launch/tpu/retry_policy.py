"""Whether to start again after a failure, when, and on which machine.

Money is spent on progress: a failure after which the run got further is no failure in a row, and
one that changes nothing is, also where the trainer says that it can go on. A preemption is no
failure; --max-hours and --max-cost bound those.
"""

from typing import NamedTuple

from launch.tpu.diagnosis import Cause
from launch.tpu.exit_codes import BAD_INPUT, CRASH_LOOP, FAILED, INFRASTRUCTURE, TPU_HELD, Stop

DELAYS = (10, 30, 120, 300)  # seconds before the next attempt, by failures in a row
USER_KINDS = ("user", "fatal")  # kinds that another machine would repeat


class Retry(NamedTuple):
    delay: float
    recreate: bool  # the machine


def decide(state: dict, cause: Cause, progressed: bool, failures: int, restarts: int) -> Retry:
    """What follows an attempt's end; keeps count in `state`. Raises Stop where it was the last.

    `failures` are allowed in a row without progress, `restarts` in all for what is not the
    training's fault.
    """
    if progressed:
        state["failures"] = []
    if cause.kind == "fatal":
        raise Stop(FAILED, cause.text)
    if cause.kind == "input":
        raise Stop(BAD_INPUT, cause.text)
    if cause.kind == "preempted":
        state["restarts"] += 1
        _check_restarts(state, cause, restarts)
        return Retry(DELAYS[0], recreate=False)  # who looks at the machine replaces it
    state["failures"].append(f"{cause.kind} {cause.signature}")
    row = state["failures"]
    if len(row) >= failures:
        if cause.kind == "busy":
            raise Stop(TPU_HELD, cause.text)
        if len(set(row[-failures:])) == 1 and failures > 1:
            raise Stop(CRASH_LOOP, f"{failures} times in a row without progress: {cause.text}")
        raise Stop(FAILED if cause.kind == "user" else INFRASTRUCTURE, cause.text)
    if cause.kind not in USER_KINDS:
        state["restarts"] += 1
        _check_restarts(state, cause, restarts)
    infra_failures = sum(not entry.startswith("user ") for entry in row)
    delay = 0 if cause.kind == "port" else DELAYS[min(len(row), len(DELAYS)) - 1]
    return Retry(delay, cause.kind not in USER_KINDS and infra_failures >= 2)


def _check_restarts(state: dict, cause: Cause, restarts: int) -> None:
    if state["restarts"] > restarts:
        raise Stop(INFRASTRUCTURE, f"restarted {restarts} times already: {cause.text}")
