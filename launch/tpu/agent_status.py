"""Parse what `agent.sh status` prints."""

import json
from typing import NamedTuple

from launch.tpu.gcloud import Result


class AgentStatus(NamedTuple):
    """A worker's answer; times are seconds on the worker's clock."""

    state: str  # absent | running | ended | lost
    attempt: int
    code: int | None
    ended: float | None
    now: float
    stopped: bool  # the attempt was asked to stop
    free_gb: int
    watcher: str  # the launcher that watches the run, as HOST:PID:ID
    watched_at: float  # when that launcher last called; 0 for never
    command: str  # of the trainer, unquoted
    heartbeat: dict | None  # None before the first
    log_offset: int
    log_size: int
    log: bytes  # from the requested offset


def parse(result: Result) -> AgentStatus | None:
    """Parse the answer; None if the call failed or its answer is incomplete."""
    head, complete, log = result.out.partition(b"#STATUS ")[2].partition(b"\n#LOG\n")
    if result.code or not complete:
        return None
    return AgentStatus(**json.loads(head.decode(errors="replace"), strict=False), log=log)
