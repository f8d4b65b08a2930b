"""A run from beginning to end: acquire, prepare, start, watch; again after what passes; release.

It may be ended anywhere and begun again with the same command: each step looks at what there is
before it does anything, and what is there already is taken over. shutdown.py says what asks for an
end, and what becomes of the machine.
"""

import contextlib
import os
import secrets
import socket
import threading
import traceback
from collections.abc import Iterator

from launch.tpu import retry_policy, worker_commands
from launch.tpu.allocation import POLL, Allocation, Gone
from launch.tpu.attempt import Attempt, last_error_line
from launch.tpu.billing import Billing
from launch.tpu.clock import Clock
from launch.tpu.cloud_tpu import CloudTpu, Status
from launch.tpu.diagnosis import Cause
from launch.tpu.exit_codes import AUTH, DONE, INTERRUPTED, SETUP, USAGE, Stop
from launch.tpu.journal import Journal
from launch.tpu.plan import Plan
from launch.tpu.provision import Provisioner
from launch.tpu.shutdown import Interrupted, Shutdown
from launch.tpu.transport import GcloudWorkers, Workers

WATCH = 30  # seconds between looks at a machine that trains
LEASE = 300  # seconds for which a launcher on another machine that watched is respected
ANSWER_TRIES = (
    4  # times that a worker is asked how a run is, before it is taken up without its answer
)


class Launcher:
    """`cloud` is None where the workers are of this machine."""

    def __init__(
        self,
        plan: Plan,
        cloud: CloudTpu | None,
        workers: Workers | None,
        clock: Clock,
        journal: Journal,
    ):
        self.plan, self.clock, self.journal = plan, clock, journal
        self.workers = workers or Workers()
        self.billing = Billing(plan.price, clock, journal)
        self.attempt: Attempt | None = None
        self.training = False  # an attempt was begun or taken up, and has not been seen to end
        self.machine = Allocation(plan, cloud, self.billing, self.pause) if cloud else None
        self.watcher = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.shutdown = Shutdown(plan, clock, journal, self.billing, self.machine, self.watcher)
        if self.machine:
            self.machine.rescue = self.rescue

    # --- the whole

    def run(self) -> int:
        """Run to an end; its exit code. The last line printed is a JSON object."""
        self.shutdown.handle_signals()
        self.journal.state.update(failures=[], restarts=0, result=None)
        self.journal.state["sitter"] = self.watcher
        self.journal.save()
        try:
            self.train()
            code, line = DONE, "all workers have finished"
        except Stop as stop:
            code, line = stop.code, str(stop)
        except Interrupted as interrupted:
            return self.interrupted(interrupted)
        except Exception as error:  # noqa: BLE001, whatever it is, the machine is dealt with
            return self.crash(error)
        return self.conclude(code, line)

    def crash(self, error: Exception) -> int:
        """A mistake in here leaves no machine, but where an attempt of this run may train on it."""
        self.journal.say("bug", traceback.format_exc())
        may_train = self.training and not (self.machine and self.machine.fresh)
        if may_train:
            self.journal.say("detach", "what trains goes on: the same command takes it up")
        deleted = False if may_train else self.shutdown.release()
        return self.shutdown.report(SETUP, f"a mistake in the launcher: {error!r}", deleted)

    def train(self) -> None:
        """Attempts, until one has trained to the end. Raises Stop."""
        while True:
            before = dict(self.journal.state["progress"])
            try:
                self.acquire()
                found = self.run_attempt()
            except Gone as gone:
                found = Cause("preempted", None, str(gone), "gone")
                if self.attempt:
                    self.journal.state["settled"] = self.attempt.number
            if found.kind == "done":
                return
            self.journal.say("event", f"attempt {self.journal.state['attempt']}: {found.text}")
            progress = self.record_progress()
            progressed = any(step > before.get(run, 0) for run, step in progress.items())
            args = self.plan.args
            retry = retry_policy.decide(
                self.journal.state, found, progressed, args.max_failures, args.max_restarts
            )
            self.journal.save()
            if retry.recreate and self.machine and self.machine.cloud.owned:
                self.journal.say("event", "the machine is replaced")
                self.machine.remove()
            self.attempt = None
            self.pause(retry.delay)

    def record_progress(self) -> dict[str, int]:
        progress = self.journal.state["progress"]
        for run, step in (self.attempt.steps if self.attempt else {}).items():
            progress[run] = max(step, progress.get(run, 0))
        self.billing.book()
        self.journal.save()
        return progress

    def pause(self, delay: float) -> None:
        """Wait, and raise Interrupted where somebody asks for it."""
        until = self.clock.now() + delay
        while True:
            training = self.attempt is not None and not self.attempt.stopping
            self.shutdown.check_interrupt(training)
            left = until - self.clock.now()
            if left <= 0:
                return
            self.clock.sleep(min(left, 10))

    # --- the machine

    def acquire(self) -> None:
        """Have workers, and know how to call them. Raises Gone, Stop or Interrupted."""
        if self.machine:
            status = self.machine.acquire()
            self.workers = self.workers_of(status)
            if self.workers.count != self.plan.hosts:
                found = f"{self.workers.count} workers are there, {self.plan.hosts} were expected"
                self.journal.say("acquire", found)
        self.provisioner = Provisioner(
            self.plan, self.workers, self.clock, self.journal, self.check, self.pause
        )

    def workers_of(self, status: Status) -> Workers:
        assert self.machine
        return GcloudWorkers(self.machine.cloud.tpu, status.hosts, self.clock, self._record)

    def rescue(self, status: Status) -> None:
        """Have what may train on a sick machine save, before that is removed."""
        number = self.journal.state["attempt"]
        if number and status.hosts:
            self.journal.say("stop", f"attempt {number}: saving, if it can")
            self.workers = self.workers_of(status)
            self.new_attempt(number).stop(self.plan.args.grace)

    def _record(self, argv: list[str]) -> None:
        self.journal.write("gcloud", argv=argv)

    def check(self) -> None:
        """Raises Gone where the machine is no more."""
        if self.machine:
            self.machine.check()

    def is_ready(self) -> bool:
        """Whether the workers' machine is known to be there."""
        return self.machine is None or self.machine.is_ready()

    # --- attempts

    def run_attempt(self) -> Cause:
        """Take up the attempt that is there, or make the next; why it ended."""
        self.provisioner.reach()
        self.arm_reaper()
        self.attempt = attempt = self.find_attempt()
        self.shutdown.workers_known, self.training = True, attempt is not None
        if attempt is None:
            with self.lease():
                self.provisioner.prepare()
            number = self.journal.state["attempt"] + 1
            self.journal.state["attempt"] = number
            self.journal.save()
            self.attempt = attempt = self.new_attempt(number)
            self.training = True
            refused = attempt.start()
            if refused:
                self.training = False
                self.journal.state["settled"] = number
                self.check()
                return refused
            count = self.workers.count
            self.journal.say("train", f"attempt {number} started on {count}/{count}")
        found = self.watch(attempt)
        self.training = False
        self.journal.state["settled"] = attempt.number
        self.record_progress()
        return found

    def new_attempt(self, number: int) -> Attempt:
        return Attempt(self.plan, self.workers, number, self.clock, self.journal, self.watcher)

    def find_attempt(self) -> Attempt | None:
        """The attempt that the workers have, unless it is over and accounted for."""
        results = self.provisioner.retry_on_all(
            "status",
            range(self.workers.count),
            lambda i: self.workers.agent(i, "status", self.plan.run, "last"),
        )
        heads = [result.out.decode(errors="replace") for result in results.values()]
        numbers = [int(head.partition("attempt=")[2].split()[0]) for head in heads]
        self.check_watcher(heads[0])
        number, state = max(numbers), self.journal.state
        state["attempt"] = max(state["attempt"], number)
        running = any("state=running" in head for head in heads)
        if number == 0 or (number <= state.get("settled", 0) and not running):
            return None
        attempt = self.new_attempt(number)
        self.poll_until_known(attempt)
        if started_in_part(attempt):
            self.journal.say("train", f"attempt {number} had not started everywhere: ended")
            attempt.stop(0)
            return None
        if all(view.stopped for view in attempt.views) and all(view.over for view in attempt.views):
            return None  # somebody had stopped it, and wants it to go on now
        self.journal.say("train", f"attempt {number} is there already: taken over")
        return attempt

    def poll_until_known(self, attempt: Attempt) -> None:
        """How it is, on all workers if they answer: who does not is no proof of anything."""
        for number in range(ANSWER_TRIES):
            attempt.poll()
            if all(view.state != "unknown" for view in attempt.views):
                return
            self.check()
            self.pause(5 * (number + 1))

    def check_watcher(self, head: str) -> None:
        """Raises Stop where a launcher on another machine watches this run."""
        words = head.partition("#SITTER ")[2].splitlines()[:1]
        if not words or not words[0].strip():
            return
        who, asked = words[0].split()
        now = float(head.partition("now=")[2].split()[0])
        mine = who.split(":")[0] == socket.gethostname()
        if not mine and (now - float(asked)) / self.clock.scale < LEASE:
            raise Stop(
                USAGE,
                f"{who} watches this run; when it has ended, wait {LEASE // 60} minutes",
            )

    def arm_reaper(self) -> None:
        """Have worker 0 delete the machine where it is forgotten; that it can't is no failure."""
        if self.machine and self.shutdown.owned and self.plan.args.orphan:
            line = worker_commands.reap(self.plan, self.machine.cloud.tpu)
            result = self.workers.shell(0, line, b"", 60)
            if result.code:
                self.journal.write("reap", error=last_error_line(result.err))

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Say to worker 0 all the while that somebody watches: what is done may take long."""
        ended = threading.Event()

        def renew() -> None:
            while True:
                self.workers.agent(0, "lease", self.plan.run, self.watcher)
                if ended.wait(LEASE / 4 * self.clock.scale):
                    return

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def watch(self, attempt: Attempt) -> Cause:
        """Follow the attempt to its end. Raises Gone, Stop or Interrupted."""
        said = ""
        while True:
            attempt.poll()
            self.record_progress()
            if attempt.stopping or not all(view.stopped for view in attempt.views):
                found = attempt.find_cause(self.is_ready)
            else:
                raise Interrupted(stop=True, keep=True)  # by another command, which deletes
            if found:
                if found.kind != "done":
                    self.is_ready()
                return found
            said = self.report_progress(attempt, said)
            self.check_machine(attempt)
            self.pause(10)

    def report_progress(self, attempt: Attempt, said: str) -> str:
        steps = [view.heartbeat.get("step", 0) for view in attempt.views]
        phases = sorted({view.heartbeat.get("phase", "start") for view in attempt.views})
        line = f"step {max(steps)}, {'/'.join(phases)}"
        if line != said:
            self.journal.write("progress", step=max(steps), phases=phases, cost=self.billing.cost)
        return line

    def check_machine(self, attempt: Attempt) -> None:
        """The node, now and then, and at once where a worker does not answer."""
        self.billing.check(self.plan.args.max_hours, self.plan.args.max_cost)
        now = self.clock.now()
        silent = any(view.error for view in attempt.views)
        if self.machine and now - self.machine.checked_at > (POLL if silent else WATCH):
            self.is_ready()
        if self.machine:
            self.machine.renew()

    # --- the end

    def interrupted(self, interrupted: Interrupted) -> int:
        if not interrupted.stop:
            return self.shutdown.report(INTERRUPTED, "detached", deleted=False)
        self.shutdown.reset_signals()
        if self.attempt:
            self.journal.say("stop", f"attempt {self.attempt.number}: saving, then ending")
            self.end_attempt(self.attempt)
        if interrupted.keep and self.shutdown.owned:
            self.workers.agent(0, "disarm", self.plan.run)
        deleted = False if interrupted.keep else self.shutdown.release()
        return self.shutdown.report(INTERRUPTED, "stopped", deleted)

    def end_attempt(self, attempt: Attempt) -> None:
        attempt.stop(self.plan.args.grace)
        attempt.fetch_logs()
        self.journal.state["settled"] = attempt.number
        self.record_progress()

    def conclude(self, code: int, line: str) -> int:
        """Say why it ended, and leave the machine as it was asked for."""
        if code != DONE:
            self.journal.say("cause", line)
        if self.attempt and any(not view.over for view in self.attempt.views):
            if code == AUTH:  # it trains on: only this launcher is shut out
                return self.shutdown.report(code, line, deleted=False)
            self.end_attempt(self.attempt)
        return self.shutdown.report(code, line, self.shutdown.apply_policy(code))


def started_in_part(attempt: Attempt) -> bool:
    """Whether all say that it has not begun everywhere, so that nobody has made a step."""
    states = {view.state for view in attempt.views}
    return "absent" in states and "unknown" not in states and not any(attempt.steps.values())
