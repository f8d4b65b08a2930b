"""One attempt of a run: start it on all workers or none, follow it, find out why it ended.

Each call goes to one worker and may fail: an unreachable worker is not a dead one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from launch.tpu import gcloud, secret, worker_commands
from launch.tpu.clock import Clock
from launch.tpu.diagnosis import Cause, WorkerExit, diagnose, last_line
from launch.tpu.exit_codes import Agent, Trainer
from launch.tpu.journal import Journal
from launch.tpu.plan import Plan
from launch.tpu.transport import AgentStatus, Workers, free_port, last_error, on_all

LOST, MISSED = 180, 3  # seconds, and status calls, without an answer from a worker of a READY node
PATIENCE = 60  # seconds the others have to exit once one has exited with 0 or 42
TAIL = 64_000  # characters of each log kept for the diagnosis
LONGEST_LINE = 200_000  # bytes


@dataclass
class View:
    """What one worker last reported, and when, on the launcher's clock."""

    worker: int
    state: str = "unknown"  # absent | running | ended | lost | unknown
    code: int | None = None
    ended: float = 0.0
    heartbeat: dict = field(default_factory=dict)
    beat: float = 0.0  # when the heartbeat last changed
    moved: float = 0.0  # when its step or phase last changed
    seen: float = 0.0
    offset: int = 0
    size: int = 0
    tail: str = ""
    stopped: bool = False
    error: str = ""
    missed: int = 0  # consecutive status calls without an answer

    @property
    def over(self) -> bool:
        return self.state in ("ended", "lost")


class Attempt:
    def __init__(
        self,
        plan: Plan,
        workers: Workers,
        number: int,
        clock: Clock,
        journal: Journal,
        watcher: str,
    ):
        self.plan, self.workers, self.number = plan, workers, number
        self.clock, self.journal, self.watcher = clock, journal, watcher
        now = clock.now()
        self.began, self.first_step = now, False
        self.views = [View(i, beat=now, moved=now, seen=now) for i in range(workers.count)]
        for view in self.views:
            file = journal.log_file(number, view.worker)
            view.offset = file.stat().st_size if file.exists() else 0
        self.failed_at: float | None = None
        self.stopping = False
        self.stopped: set[int] = set()  # workers that did not exit by themselves
        self.reasons: dict[int, str] = {}

    # --- start and stop

    def start(self) -> Cause | None:
        """Start it on every worker; on failure stop all of them and return the cause."""
        answers = on_all(range(self.workers.count), self._send_secrets)
        port = worker_commands.port(self.plan.run, self.number)
        port = free_port() if self.plan.target == "local" else port
        if all(answer is None for answer in answers.values()):
            answers = on_all(range(self.workers.count), lambda i: self._start(i, port))
        refused = {worker: answer for worker, answer in answers.items() if answer}
        if not refused:
            return None
        self.stop(0)
        worker, (kind, line) = min(refused.items(), key=lambda item: item[1][0] != "busy")
        return Cause(kind, worker, f"did not start: {line}", f"start {kind}")

    def _send_secrets(self, worker: int) -> tuple[str, str] | None:
        if not self.plan.secrets:
            return None
        content = secret.encode(self.plan.secrets)
        return self._ask(worker, worker_commands.agent_command("secrets", self.plan.run), content)

    def _start(self, worker: int, port: int) -> tuple[str, str] | None:
        mine = [word.format(worker=worker) for word in self.workers.arguments(port)]
        return self._ask(worker, worker_commands.start(self.plan, self.number, port, mine))

    def _ask(self, worker: int, line: str, stdin: bytes = b"") -> tuple[str, str] | None:
        """Call an idempotent verb of the agent, up to three times; return (kind, error) or None."""
        for _ in range(3):
            result = self.workers.shell(worker, line, stdin, 90)
            if result.code == 0:
                return None
            error = last_error(result.err)
            if result.code == Agent.TPU_HELD:
                return "busy", error
            if result.code == Agent.BUSY and "stopped" in error:
                break
            self.clock.sleep(3)
        return "infra", error

    def stop(self, grace: float) -> None:
        """Stop it on every worker, with `grace` seconds to save; return once it has ended."""
        self.stopping = True
        seconds = max(1, round(grace * self.clock.scale)) if grace else 0
        words = ("stop", self.plan.run, self.number, seconds)
        unasked = list(range(self.workers.count))
        until = self.clock.now() + grace + 30
        while True:  # idempotent: workers that were not reached are asked again
            answers = on_all(unasked, lambda i: self.workers.agent(i, *words))
            self.stopped |= {i for i, reply in answers.items() if b"nothing runs" not in reply.out}
            unasked = [i for i, reply in answers.items() if reply.code]
            self.poll()
            left = any(view.state in ("running", "unknown") for view in self.views)
            if not left or self.clock.now() >= until:
                break
            self.clock.sleep(3)
        if grace and left:
            self.stop(0)

    # --- follow

    def poll(self) -> None:
        for worker, lines in on_all(range(self.workers.count), self._poll).items():
            for line in lines:
                self.journal.print_log(worker, line)

    def fetch_logs(self) -> None:
        """Fetch the rest of the logs of an attempt that is over."""
        for _ in range(100):
            if all(view.offset >= view.size for view in self.views if view.over):
                return
            self.poll()

    def _poll(self, worker: int) -> list[str]:
        """Call `status` on one worker; return the new complete lines of its log."""
        view, now = self.views[worker], self.clock.now()
        words = ("status", self.plan.run, self.number, view.offset, self.watcher)
        result = self.workers.agent(worker, *words)
        reply = AgentStatus.parse(result)
        if reply is None:
            view.error = last_error(result.err)
            limited = re.search(gcloud.RATE_LIMIT, result.err, re.I)  # by the API, not the worker
            view.missed += not limited
            return []
        self._update(view, reply, now)
        return self._read_log(view, reply)

    def _update(self, view: View, reply: AgentStatus, now: float) -> None:
        view.seen, view.error, view.missed = now, "", 0
        view.state, view.stopped = reply.state, reply.stopped
        if view.state == "ended" and reply.code is not None:
            view.code = reply.code
        if view.over:
            ended = reply.now if reply.ended is None else reply.ended
            view.ended = now - (reply.now - ended) / self.clock.scale
        if reply.heartbeat is None:
            return
        old, view.heartbeat = view.heartbeat, reply.heartbeat
        if view.heartbeat != old:
            view.beat = now
        if any(view.heartbeat.get(key) != old.get(key) for key in ("step", "phase")):
            view.moved = now

    def _read_log(self, view: View, reply: AgentStatus) -> list[str]:
        offset, log, view.size = reply.log_offset, reply.log, reply.log_size
        if view.size < offset:  # a new machine's log
            view.offset = 0
            self.journal.log_file(self.number, view.worker).unlink(missing_ok=True)
            return []
        whole = log if view.over and offset + len(log) >= view.size else b""
        if not whole:  # complete lines, so that a secret is redacted in one piece
            whole = log[: log.rfind(b"\n") + 1] or (log if len(log) > LONGEST_LINE else b"")
        if offset and not view.tail:
            view.tail = self.journal.read_log(self.number, view.worker)
        text = self.journal.redact(whole.decode(errors="surrogateescape"))
        self.journal.add_log(self.number, view.worker, text)
        view.offset += len(whole)
        view.tail = (view.tail + text)[-TAIL:]
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        return [line for line in lines if line.strip()]

    # --- the result

    @property
    def steps(self) -> dict[str, int]:
        """{run folder: highest step}; the stages of a config are separate runs."""
        furthest: dict[str, int] = {}
        for view in self.views:
            run, step = view.heartbeat.get("run", ""), int(view.heartbeat.get("step") or 0)
            if view.heartbeat:
                furthest[run] = max(step, furthest.get(run, 0))
        return furthest

    def find_cause(self, is_ready: Callable[[], bool]) -> Cause | None:
        """Return why it ended, once nothing is left running; None while it runs.

        `is_ready` tells whether the machine exists; an unreachable API is no proof that it does.
        """
        now, over = self.clock.now(), [view for view in self.views if view.over]
        if len(over) == len(self.views):
            return self.finish()
        bad = [view for view in over if view.code not in (Trainer.DONE, Trainer.RESUMABLE)]
        if bad:
            self.stop(min(10, self.plan.args.grace))
            return self.finish()
        if over:
            self.failed_at = now if self.failed_at is None else self.failed_at
            patience = self.plan.args.grace if any(v.code for v in over) else PATIENCE
            if now - self.failed_at > patience:
                for view in over:
                    if view.code == 0:
                        self.reasons[view.worker] = "it exited with 0 while others kept running"
                self.stop(min(10, self.plan.args.grace))
                return self.finish()
        return self._check_unreachable(now, is_ready) or self._check_stalled()

    def _check_unreachable(self, now: float, is_ready: Callable[[], bool]) -> Cause | None:
        for view in self.views:
            silent = view.missed >= MISSED and now - view.seen > LOST
            if silent and not view.over and is_ready():
                self.reasons[view.worker] = f"unreachable for {now - view.seen:.0f} s: {view.error}"
                self.stop(10)
                return self.finish()
        return None

    def _check_stalled(self) -> Cause | None:
        """Stop everything if a worker is frozen, or all wait for one that makes no progress.

        Durations end at a worker's last answer, so an unreachable worker is never called stalled.
        """
        args = self.plan.args
        running = [view for view in self.views if view.state == "running"]
        self.first_step = self.first_step or any(view.heartbeat.get("step") for view in running)
        for view in running:
            silent = view.seen - view.beat
            if view.heartbeat and silent > args.stall_timeout:
                return self._end_stalled(view, f"frozen: no heartbeat for {silent:.0f} s")
        # The worker that hangs is behind: the others are one step further, and wait.
        for view in sorted(running, key=lambda v: (v.heartbeat.get("step", 0), v.moved)):
            idle = view.seen - view.moved
            if view.heartbeat.get("phase") == "train" and idle > args.stall_timeout:
                return self._end_stalled(view, f"hangs: no step for {idle:.0f} s")
            if not self.first_step and view.seen - self.began > args.first_step_timeout:
                waited = view.seen - self.began
                return self._end_stalled(view, f"no first step in {waited:.0f} s")
        return None

    def _end_stalled(self, view: View, reason: str) -> Cause:
        phase, step = view.heartbeat.get("phase", "start"), view.heartbeat.get("step", 0)
        self.reasons[view.worker] = f"{reason}, in phase {phase} after step {step}; see its log"
        self.workers.agents("stacks", self.plan.run, self.number)
        self.clock.sleep(5)
        self.stop(10)
        return self.finish()

    def finish(self) -> Cause:
        """Return the cause of the end, and write it to the run's folder."""
        self.fetch_logs()
        ends = [self._worker_exit(view) for view in self.views]
        cause = diagnose(ends)
        rows = "\n".join(
            f"[w{end.worker:02}] code {end.code}, "
            + (end.reason or end.message or last_line(end.tail))
            + " (stopped)" * end.stopped
            for end in ends
        )
        self.journal.put(f"a{self.number}/cause.txt", f"{cause.kind}: {cause.text}\n\n{rows}\n")
        return cause

    def _worker_exit(self, view: View) -> WorkerExit:
        reason = self.reasons.get(view.worker, "")
        stopped = not reason and view.worker in self.stopped
        if not reason and not stopped and view.state in ("lost", "absent"):
            reason = "its processes vanished: the VM restarted, or they were killed"
        # It was stopped: its exit code says nothing about the cause.
        code = None if view.worker in self.reasons and view.worker in self.stopped else view.code
        at = -1.0 if view.worker in self.reasons else view.ended
        message = str(view.heartbeat.get("words") or "")
        return WorkerExit(view.worker, code, at, view.tail[-8000:], message, stopped, reason)
