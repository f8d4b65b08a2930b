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
    heartbeat: dict | None  # None if it is half written
    log: bytes  # from the requested offset
    log_offset: int
    log_size: int


def parse(result: Result) -> AgentStatus | None:
    """Parse the answer; None if the call failed or its answer is incomplete."""
    _, marker, answer = result.out.partition(b"#STATUS ")
    head, has_log, log = answer.partition(b"\n#LOG ")
    if result.code or not marker or not has_log:
        return None
    status, *lines = head.decode(errors="replace").split("\n")
    values = dict(word.partition("=")[::2] for word in status.split())
    rest = {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}
    watcher, _, watched_at = rest.get("#SITTER", "").strip().partition(" ")
    sizes, _, log = log.partition(b"\n")
    offset, size = map(int, sizes.split())
    try:
        heartbeat = json.loads(rest.get("#HEARTBEAT") or "{}")
    except ValueError:
        heartbeat = None
    return AgentStatus(
        state=values["state"],
        attempt=int(values["attempt"]),
        code=int(values["rc"]) if values["rc"] else None,
        ended=float(values["ended"]) if values["ended"] else None,
        now=float(values["now"]),
        stopped=values["stopped"] == "1",
        free_gb=int(values["free_gb"]),
        watcher=watcher,
        watched_at=float(watched_at or 0),
        heartbeat=heartbeat,
        log=log,
        log_offset=offset,
        log_size=size,
    )
