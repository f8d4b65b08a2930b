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
from launch.tpu.allocation import LOOK, Gone, Machine
from launch.tpu.attempt import Attempt, last
from launch.tpu.billing import Meter
from launch.tpu.clock import Clock
from launch.tpu.cloud_tpu import Cloud, Look
from launch.tpu.diagnosis import Cause
from launch.tpu.exit_codes import AUTH, DONE, INTERRUPTED, SETUP, USAGE, Stop
from launch.tpu.journal import Journal
from launch.tpu.plan import Plan
from launch.tpu.provision import Preparation
from launch.tpu.shutdown import Ending, Interrupted
from launch.tpu.transport import GcloudWorkers, Workers

WATCH = 30  # seconds between looks at a machine that trains
LEASE = 300  # seconds for which a launcher on another machine that watched is respected
ASKED = 4  # times that a worker is asked how a run is, before it is taken up without its answer


class Launcher:
    """`cloud` is None where the workers are of this machine."""

    def __init__(
        self,
        plan: Plan,
        cloud: Cloud | None,
        workers: Workers | None,
        clock: Clock,
        journal: Journal,
    ):
        self.plan, self.clock, self.journal = plan, clock, journal
        self.workers = workers or Workers()
        self.meter = Meter(plan.price, clock, journal)
        self.attempt: Attempt | None = None
        self.trains = False  # an attempt was begun or taken up, and has not been seen to end
        self.machine = Machine(plan, cloud, self.meter, self.pause) if cloud else None
        self.sitter = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.ending = Ending(plan, clock, journal, self.meter, self.machine, self.sitter)
        if self.machine:
            self.machine.rescue = self.rescue

    # --- the whole

    def run(self) -> int:
        """Run to an end; its exit code. The last line printed is a JSON object."""
        self.ending.listen()
        self.journal.state.update(failures=[], restarts=0, result=None, sitter=self.sitter)
        self.journal.save()
        try:
            self.to_the_end()
            code, line = DONE, "all workers have finished"
        except Stop as stop:
            code, line = stop.code, str(stop)
        except Interrupted as interrupted:
            return self.interrupted(interrupted)
        except Exception as error:  # noqa: BLE001, whatever it is, the machine is dealt with
            return self.give_up(error)
        return self.finish(code, line)

    def give_up(self, error: Exception) -> int:
        """A mistake in here leaves no machine, but where an attempt of this run may train on it."""
        self.journal.say("bug", traceback.format_exc())
        may_train = self.trains and not (self.machine and self.machine.fresh)
        if may_train:
            self.journal.say("detach", "what trains goes on: the same command takes it up")
        deleted = False if may_train else self.ending.release()
        return self.ending.end(SETUP, f"a mistake in the launcher: {error!r}", deleted)

    def to_the_end(self) -> None:
        """Attempts, until one has trained to the end. Raises Stop."""
        while True:
            before = dict(self.journal.state["progress"])
            try:
                self.acquire()
                found = self.one_attempt()
            except Gone as gone:
                found = Cause("preempted", None, str(gone), "gone")
                if self.attempt:
                    self.journal.state["settled"] = self.attempt.number
            if found.kind == "done":
                return
            self.journal.say("event", f"attempt {self.journal.state['attempt']}: {found.text}")
            progress = self.note_progress()
            progressed = any(step > before.get(run, 0) for run, step in progress.items())
            args = self.plan.args
            again = retry_policy.decide(
                self.journal.state, found, progressed, args.max_failures, args.max_restarts
            )
            self.journal.save()
            if again.recreate and self.machine and self.machine.cloud.owned:
                self.journal.say("event", "the machine is replaced")
                self.machine.remove()
            self.attempt = None
            self.pause(again.delay)

    def note_progress(self) -> dict[str, int]:
        progress = self.journal.state["progress"]
        for run, step in (self.attempt.steps if self.attempt else {}).items():
            progress[run] = max(step, progress.get(run, 0))
        self.meter.book()
        self.journal.save()
        return progress

    def pause(self, delay: float) -> None:
        """Wait, and raise Interrupted where somebody asks for it."""
        until = self.clock.now() + delay
        while True:
            training = self.attempt is not None and not self.attempt.stopping
            self.ending.check_interrupt(training)
            left = until - self.clock.now()
            if left <= 0:
                return
            self.clock.sleep(min(left, 10))

    # --- the machine

    def acquire(self) -> None:
        """Have workers, and know how to call them. Raises Gone, Stop or Interrupted."""
        if self.machine:
            look = self.machine.acquire()
            self.workers = self.workers_of(look)
            if self.workers.count != self.plan.hosts:
                found = f"{self.workers.count} workers are there, {self.plan.hosts} were expected"
                self.journal.say("acquire", found)
        self.preparation = Preparation(
            self.plan, self.workers, self.clock, self.journal, self.check, self.pause
        )

    def workers_of(self, look: Look) -> Workers:
        assert self.machine
        return GcloudWorkers(self.machine.cloud.tpu, look.hosts, self.clock, self._record)

    def rescue(self, look: Look) -> None:
        """Have what may train on a sick machine save, before that is removed."""
        number = self.journal.state["attempt"]
        if number and look.hosts:
            self.journal.say("stop", f"attempt {number}: saving, if it can")
            self.workers = self.workers_of(look)
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

    def one_attempt(self) -> Cause:
        """Take up the attempt that is there, or make the next; why it ended."""
        self.preparation.reach()
        self.watch_over()
        self.attempt = attempt = self.find_attempt()
        self.ending.knows, self.trains = True, attempt is not None
        if attempt is None:
            with self.lease():
                self.preparation.prepare()
            number = self.journal.state["attempt"] + 1
            self.journal.state["attempt"] = number
            self.journal.save()
            self.attempt = attempt = self.new_attempt(number)
            self.trains = True
            refused = attempt.start()
            if refused:
                self.trains = False
                self.journal.state["settled"] = number
                self.check()
                return refused
            count = self.workers.count
            self.journal.say("train", f"attempt {number} started on {count}/{count}")
        found = self.babysit(attempt)
        self.trains = False
        self.journal.state["settled"] = attempt.number
        self.note_progress()
        return found

    def new_attempt(self, number: int) -> Attempt:
        return Attempt(self.plan, self.workers, number, self.clock, self.journal, self.sitter)

    def find_attempt(self) -> Attempt | None:
        """The attempt that the workers have, unless it is over and accounted for."""
        results = self.preparation.on_every(
            "status",
            range(self.workers.count),
            lambda i: self.workers.agent(i, "status", self.plan.run, "last"),
        )
        heads = [result.out.decode(errors="replace") for result in results.values()]
        numbers = [int(head.partition("attempt=")[2].split()[0]) for head in heads]
        self.check_sitter(heads[0])
        number, state = max(numbers), self.journal.state
        state["attempt"] = max(state["attempt"], number)
        running = any("state=running" in head for head in heads)
        if number == 0 or (number <= state.get("settled", 0) and not running):
            return None
        attempt = self.new_attempt(number)
        self.ask_all(attempt)
        if began_in_part(attempt):
            self.journal.say("train", f"attempt {number} had not started everywhere: ended")
            attempt.stop(0)
            return None
        if all(view.stopped for view in attempt.views) and all(view.over for view in attempt.views):
            return None  # somebody had stopped it, and wants it to go on now
        self.journal.say("train", f"attempt {number} is there already: taken over")
        return attempt

    def ask_all(self, attempt: Attempt) -> None:
        """How it is, on all workers if they answer: who does not is no proof of anything."""
        for number in range(ASKED):
            attempt.poll()
            if all(view.state != "unknown" for view in attempt.views):
                return
            self.check()
            self.pause(5 * (number + 1))

    def check_sitter(self, head: str) -> None:
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

    def watch_over(self) -> None:
        """Have worker 0 delete the machine where it is forgotten; that it can't is no failure."""
        if self.machine and self.ending.owned and self.plan.args.orphan:
            line = worker_commands.reap(self.plan, self.machine.cloud.tpu)
            result = self.workers.shell(0, line, b"", 60)
            if result.code:
                self.journal.write("reap", error=last(result.err))

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Say to worker 0 all the while that somebody watches: what is done may take long."""
        ended = threading.Event()

        def renew() -> None:
            while True:
                self.workers.agent(0, "lease", self.plan.run, self.sitter)
                if ended.wait(LEASE / 4 * self.clock.scale):
                    return

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def babysit(self, attempt: Attempt) -> Cause:
        """Follow the attempt to its end. Raises Gone, Stop or Interrupted."""
        said = ""
        while True:
            attempt.poll()
            self.note_progress()
            if attempt.stopping or not all(view.stopped for view in attempt.views):
                found = attempt.judge(self.is_ready)
            else:
                raise Interrupted(stop=True, keep=True)  # by another command, which deletes
            if found:
                if found.kind != "done":
                    self.is_ready()
                return found
            said = self.say_progress(attempt, said)
            self.look_after(attempt)
            self.pause(10)

    def say_progress(self, attempt: Attempt, said: str) -> str:
        steps = [view.heartbeat.get("step", 0) for view in attempt.views]
        phases = sorted({view.heartbeat.get("phase", "start") for view in attempt.views})
        line = f"step {max(steps)}, {'/'.join(phases)}"
        if line != said:
            self.journal.write("progress", step=max(steps), phases=phases, cost=self.meter.cost)
        return line

    def look_after(self, attempt: Attempt) -> None:
        """The node, now and then, and at once where a worker does not answer."""
        self.meter.check(self.plan.args.max_hours, self.plan.args.max_cost)
        now = self.clock.now()
        silent = any(view.error for view in attempt.views)
        if self.machine and now - self.machine.looked > (LOOK if silent else WATCH):
            self.is_ready()
        if self.machine:
            self.machine.renew()

    # --- the end

    def interrupted(self, interrupted: Interrupted) -> int:
        if not interrupted.stop:
            return self.ending.end(INTERRUPTED, "detached", deleted=False)
        self.ending.forget()
        if self.attempt:
            self.journal.say("stop", f"attempt {self.attempt.number}: saving, then ending")
            self.end_attempt(self.attempt)
        if interrupted.keep and self.ending.owned:
            self.workers.agent(0, "disarm", self.plan.run)
        deleted = False if interrupted.keep else self.ending.release()
        return self.ending.end(INTERRUPTED, "stopped", deleted)

    def end_attempt(self, attempt: Attempt) -> None:
        attempt.stop(self.plan.args.grace)
        attempt.catch_up()
        self.journal.state["settled"] = attempt.number
        self.note_progress()

    def finish(self, code: int, line: str) -> int:
        """Say why it ended, and leave the machine as it was asked for."""
        if code != DONE:
            self.journal.say("cause", line)
        if self.attempt and any(not view.over for view in self.attempt.views):
            if code == AUTH:  # it trains on: only this launcher is shut out
                return self.ending.end(code, line, deleted=False)
            self.end_attempt(self.attempt)
        return self.ending.end(code, line, self.ending.leave(code))


def began_in_part(attempt: Attempt) -> bool:
    """Whether all say that it has not begun everywhere, so that nobody has made a step."""
    states = {view.state for view in attempt.views}
    return "absent" in states and "unknown" not in states and not any(attempt.steps.values())
