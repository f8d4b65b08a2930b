"""Run a training from start to finish: acquire, prepare, start, watch, retry, release.

It may be stopped anywhere and resumed by rerunning the same command: each step first checks what
exists, and adopts it. shutdown.py handles interrupts and what becomes of the machine.
"""

import os
import re
import secrets
import socket
import threading
import traceback

from launch.tpu import worker_commands
from launch.tpu.allocation import POLL, Allocation, Gone
from launch.tpu.attempt import Attempt
from launch.tpu.billing import Billing
from launch.tpu.clock import Clock
from launch.tpu.cloud_tpu import CloudTpu, Status
from launch.tpu.diagnosis import Cause, decide
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.journal import Journal
from launch.tpu.plan import Plan
from launch.tpu.provision import Provisioner
from launch.tpu.shutdown import Interrupted, Shutdown
from launch.tpu.transport import AGENT, AgentStatus, GcloudWorkers, Workers, last_error

WATCH = 30  # seconds between status checks of a machine that trains
LEASE = 300  # seconds for which another machine's launcher is taken to watch the run
ANSWER_TRIES = 4  # status calls to a worker before a run is adopted without its answer


class Launcher:
    """Launches `plan`; `cloud` is None if the workers are on this machine."""

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
        self.training = False  # an attempt was started or adopted, and has not ended
        self.machine = Allocation(plan, cloud, self.billing, self.pause) if cloud else None
        self.watcher = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.shutdown = Shutdown(plan, clock, journal, self.billing, self.machine, self.watcher)
        if self.machine:
            self.machine.rescue = self.rescue

    # --- the run

    def run(self) -> int:
        """Run until done; return the exit code. The last line printed is a JSON object."""
        self.shutdown.handle_signals()
        if self.journal.state["arguments"] != self.plan.arguments:  # another training
            self.journal.state.update(arguments=self.plan.arguments, progress={})
        self.journal.state.update(failures=[], restarts=0, result=None)
        self.journal.state["watcher"] = self.watcher
        self.journal.state.pop("sitter", None)  # the same, of an earlier launcher
        self.journal.save()
        try:
            self.train()
            code, line = Exit.DONE, "all workers have finished"
        except Stop as stop:
            code, line = stop.code, str(stop)
        except Interrupted as interrupted:
            return self.interrupted(interrupted)
        except Exception as error:  # noqa: BLE001, a bug must not leave a machine behind
            return self.crash(error)
        return self.conclude(code, line)

    def crash(self, error: Exception) -> int:
        """After a bug in the launcher, release the machine unless this run may train on it."""
        self.journal.say("bug", traceback.format_exc())
        may_train = self.training and not (self.machine and self.machine.fresh)
        if may_train:
            self.journal.say("detach", "training continues; rerun the same command to resume")
        deleted = False if may_train else self.shutdown.release()
        return self.shutdown.report(Exit.SETUP_FAILED, f"bug in the launcher: {error!r}", deleted)

    def train(self) -> None:
        """Run attempts until one finishes the training. Raises Stop."""
        while True:
            before = dict(self.journal.state["progress"])
            try:
                self.acquire()
                cause = self.run_attempt()
            except Gone as gone:
                cause = Cause("preempted", None, str(gone), "gone")
                if self.attempt:
                    self.journal.state["settled"] = self.attempt.number
            except Stop as stop:
                ours = self.machine and self.machine.created and self.journal.state["attempt"]
                if stop.code != Exit.INFRASTRUCTURE or not ours:
                    raise  # a run that has trained replaces a machine that can't be prepared
                cause = Cause("infra", None, str(stop), "preparation")
            if cause.kind == "done":
                return
            self.journal.say("event", f"attempt {self.journal.state['attempt']}: {cause.text}")
            progress = self.record_progress()
            progressed = any(step > before.get(run, 0) for run, step in progress.items())
            args = self.plan.args
            retry = decide(
                self.journal.state, cause, progressed, args.max_failures, args.max_restarts
            )
            self.journal.save()
            if retry.recreate and self.machine and self.machine.cloud.owned:
                self.journal.say("event", "replacing the machine")
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
        """Wait; raise Interrupted if the user asks for it."""
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
        """Acquire the workers. Raises Gone, Stop or Interrupted."""
        if self.machine:
            status = self.machine.acquire()
            self.workers = self.workers_of(status)
        self.provisioner = Provisioner(
            self.plan, self.workers, self.clock, self.journal, self.check, self.pause
        )

    def workers_of(self, status: Status) -> Workers:
        assert self.machine
        return GcloudWorkers(self.machine.cloud.tpu, status.hosts, self.clock, self._record)

    def rescue(self, status: Status) -> None:
        """Let a training that may run on a broken machine save before the machine is removed."""
        number = self.journal.state["attempt"]
        if number and status.hosts:
            self.journal.say("stop", f"attempt {number}: saving, if possible")
            self.workers = self.workers_of(status)
            self.new_attempt(number).stop(self.plan.args.grace)

    def _record(self, argv: list[str]) -> None:
        if f"{AGENT} status" not in argv[-1]:  # of which there are thousands an hour
            self.journal.write("gcloud", argv=argv)

    def check(self) -> None:
        """Raise Gone if the machine no longer exists."""
        if self.machine:
            self.machine.check()

    def is_ready(self) -> bool:
        """Return whether the workers' machine is known to exist."""
        return self.machine is None or self.machine.is_ready()

    # --- attempts

    def run_attempt(self) -> Cause:
        """Adopt the running attempt or start the next; return why it ended."""
        self.provisioner.upload()
        self.arm_reaper()
        self.attempt = attempt = self.find_attempt()
        self.shutdown.workers_known, self.training = True, attempt is not None
        if attempt is None:
            if self.workers.count < self.plan.hosts:
                few = f"{self.workers.count} workers, not {self.plan.hosts}; check --type"
                raise Stop(Exit.INFRASTRUCTURE, f"{self.plan.name}: it has {few}")
            self.prepare()
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
            self.journal.say("train", f"attempt {number} started on {count}/{count} workers")
        cause = self.watch(attempt)
        self.training = False
        self.journal.state["settled"] = attempt.number
        self.record_progress()
        return cause

    def new_attempt(self, number: int) -> Attempt:
        return Attempt(self.plan, self.workers, number, self.clock, self.journal, self.watcher)

    def find_attempt(self) -> Attempt | None:
        """Return the workers' current attempt, unless it is over and accounted for."""
        results = self.provisioner.retry_on_all(
            "status",
            range(self.workers.count),
            lambda i: self.workers.agent(i, "status", self.plan.run, "last"),
        )
        for worker, result in results.items():
            if AgentStatus.parse(result) is None:
                raise Stop(Exit.INFRASTRUCTURE, f"[w{worker:02}] gave no valid answer to `status`")
        replies = [reply for result in results.values() if (reply := AgentStatus.parse(result))]
        self.check_watcher(replies[0])
        number, state = max(reply.attempt for reply in replies), self.journal.state
        state["attempt"] = max(state["attempt"], number)
        running = any(reply.state == "running" for reply in replies)
        commands = [reply.command for reply in replies if reply.attempt == number]
        same = all(is_command(command, self.plan.arguments) for command in commands)
        if running and not same:
            keep = f"launch/tpu_vm.sh stop --keep --name {self.plan.name}"
            line = f"attempt {number} still trains ({commands[0]}); to stop it: {keep}"
            raise Stop(Exit.USAGE, line)
        if number == 0 or (not running and (number <= state.get("settled", 0) or not same)):
            return None
        attempt = self.new_attempt(number)
        self.poll_until_known(attempt)
        if started_in_part(attempt):
            self.journal.say("train", f"attempt {number} had not started on every worker: stopped")
            attempt.stop(0)
            return None
        if all(view.stopped for view in attempt.views) and all(view.over for view in attempt.views):
            return None  # the user had stopped it, and resumes it now
        self.journal.say("train", f"attempt {number} already exists: adopted")
        return attempt

    def poll_until_known(self, attempt: Attempt) -> None:
        """Poll until every worker has answered, a few times at most; silence proves nothing."""
        for number in range(ANSWER_TRIES):
            attempt.poll()
            if all(view.state != "unknown" for view in attempt.views):
                return
            self.check()
            self.pause(5 * (number + 1))

    def check_watcher(self, reply: AgentStatus) -> None:
        """Raise Stop if a launcher on another machine watches this run."""
        other = reply.watcher and reply.watcher.split(":")[0] != socket.gethostname()
        if other and (reply.now - reply.watched_at) / self.clock.scale < LEASE:
            wait = f"stop it there and wait {LEASE // 60} minutes"
            raise Stop(Exit.USAGE, f"{reply.watcher} watches this run: {wait}")

    def arm_reaper(self) -> None:
        """Arm worker 0 to delete the machine if it is forgotten. A failure is only recorded."""
        if self.machine and self.shutdown.owned and self.plan.args.orphan:
            line = worker_commands.reap(self.plan, self.machine.cloud.tpu)
            result = self.workers.shell(0, line, b"", 60)
            if result.code:
                self.journal.write("reap", error=last_error(result.err))

    def prepare(self) -> None:
        """Prepare the workers, and keep telling worker 0 that the run is watched."""
        done = threading.Event()

        def renew() -> None:
            while True:
                self.workers.agent(0, "lease", self.plan.run, self.watcher)
                if done.wait(LEASE / 4 * self.clock.scale):
                    return

        threading.Thread(target=renew, daemon=True).start()
        try:
            self.provisioner.prepare()
        finally:
            done.set()

    def watch(self, attempt: Attempt) -> Cause:
        """Follow the attempt to its end and return the cause. Raises Gone, Stop or Interrupted."""
        while True:
            attempt.poll()
            self.record_progress()
            if not attempt.stopping and all(view.stopped for view in attempt.views):
                raise Interrupted(stop=True, keep=True)  # stopped by another command, which deletes
            cause = attempt.find_cause(self.is_ready)
            if cause:
                if cause.kind != "done":
                    self.is_ready()
                return cause
            self.check_machine(attempt)
            self.pause(10)

    def check_machine(self, attempt: Attempt) -> None:
        """Check limits, and the node now and then, sooner if a worker does not answer."""
        self.billing.check(self.plan.args.max_hours, self.plan.args.max_cost)
        if self.machine:
            silent = any(view.error for view in attempt.views)
            if self.clock.now() - self.machine.checked_at > (POLL if silent else WATCH):
                self.is_ready()
            self.machine.renew()

    # --- end

    def interrupted(self, interrupted: Interrupted) -> int:
        if not interrupted.stop:
            return self.shutdown.report(Exit.INTERRUPTED, "detached", deleted=False)
        self.shutdown.signals = 0  # these are being handled
        self.clock.wake.clear()
        if self.attempt:
            self.journal.say("stop", f"attempt {self.attempt.number}: saving, then stopping")
            self.end_attempt(self.attempt)
        if interrupted.keep and self.shutdown.owned:
            self.workers.agent(0, "disarm", self.plan.run)
        deleted = False if interrupted.keep else self.shutdown.release()
        return self.shutdown.report(Exit.INTERRUPTED, "stopped", deleted)

    def end_attempt(self, attempt: Attempt) -> None:
        attempt.stop(self.plan.args.grace)
        attempt.fetch_logs()
        self.journal.state["settled"] = attempt.number
        self.record_progress()

    def conclude(self, code: Exit, line: str) -> int:
        """Report why it ended, and keep or delete the machine as requested."""
        if code != Exit.DONE:
            self.journal.say("cause", line)
        if self.attempt and any(not view.over for view in self.attempt.views):
            if code == Exit.NOT_PERMITTED:  # training continues: only this launcher lost access
                return self.shutdown.report(code, line, deleted=False)
            self.end_attempt(self.attempt)
        return self.shutdown.report(code, line, self.shutdown.apply_policy(code))


def is_command(command: str, arguments: list[str]) -> bool:
    """Return whether an attempt's command, if it has one, has these arguments, on any worker."""
    command = re.sub(r" --(coordinator|process|processes)=\S+", "", command).strip()
    return command in ("", " ".join(["vit-scale", *arguments]))


def started_in_part(attempt: Attempt) -> bool:
    """Return whether some workers have not started it, and no worker has made a step."""
    states = {view.state for view in attempt.views}
    return "absent" in states and "unknown" not in states and not any(attempt.steps.values())
