"""A run from beginning to end: acquire, prepare, start, watch; again after what passes; release.

It may be ended anywhere and begun again with the same command: each step looks at what there is
before it does anything, and what is there already is taken over.
"""

import dataclasses
import json
import os
import secrets
import signal
import socket
import time

from launch.tpu import budget, gcloud, script
from launch.tpu import clock as clocks
from launch.tpu.attempt import Attempt, last
from launch.tpu.classify import Cause
from launch.tpu.clock import Clock
from launch.tpu.cloud import TRIES, Cloud, Look, refuse
from launch.tpu.codes import (
    AUTH,
    BAD_INPUT,
    CRASH_LOOP,
    DONE,
    FAILED,
    INFRASTRUCTURE,
    INTERRUPTED,
    NO_CAPACITY,
    REFUSED,
    RESULTS,
    SETUP,
    TPU_HELD,
    USAGE,
    Stop,
)
from launch.tpu.flags import seconds
from launch.tpu.gcloud import ApiError
from launch.tpu.journal import Journal
from launch.tpu.meter import Meter
from launch.tpu.plan import Plan
from launch.tpu.transport import GcloudWorkers, Workers, on_all

LOOK = 15  # seconds between looks at a machine that is to come
WATCH = 30  # ... at one that trains
REPAIR = 1200  # seconds that a machine may take to recover
RENEW = 3600  # seconds between saying that the machine is wanted
LEASE = 300  # seconds for which a launcher on another machine that watched is respected
WINDOW = 3  # seconds for a second Ctrl-C, which stops
ROTATION = (30, 60, 120, 300, 600)  # seconds to wait after a stockout
KEPT = (
    FAILED,
    BAD_INPUT,
    SETUP,
    CRASH_LOOP,
    TPU_HELD,
)  # ends after which a look is worth its price


class Gone(Exception):
    """The machine is no more, or will not come back."""


class Interrupted(Exception):
    """Somebody wants this launcher to end; `stop`: and the training with it."""

    def __init__(self, stop: bool, keep: bool = False):
        super().__init__("stop" if stop else "detach")
        self.stop, self.keep = stop, keep


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
        self.plan, self.cloud, self.clock, self.journal = plan, cloud, clock, journal
        self.workers = workers or Workers()
        self.meter = Meter(plan.price, clock, journal)
        self.attempt: Attempt | None = None
        self.signals = 0
        # Whether the machine is its to delete: not that of a training which it can't reach.
        self.responsible = False
        self.zone, self.shortages = 0, 0
        self.sitter = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.looked = self.renewed = clock.now()

    # --- the whole

    def run(self) -> int:
        """Run to an end; its exit code. The last line printed is a JSON object."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self.journal.state.update(failures=[], restarts=0, result=None, sitter=self.sitter)
        self.journal.save()
        try:
            self.to_the_end()
            code, line = DONE, "all workers have finished"
        except Stop as stop:
            code, line = stop.code, str(stop)
        except Interrupted as interrupted:
            return self.interrupted(interrupted)
        except Exception as error:  # the machine must not be left because of a mistake in here
            self.journal.write("bug", error=repr(error))
            self._quietly_release()
            raise
        return self.finish(code, line)

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
            again = budget.decide(
                self.journal.state, found, progressed, args.max_failures, args.max_restarts
            )
            self.journal.save()
            if again.recreate and self.cloud and self.cloud.owned:
                self.journal.say("event", "the machine is replaced")
                self.remove()
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
            self.check_interrupt()
            left = until - self.clock.now()
            if left <= 0:
                return
            self.clock.sleep(min(left, 10))

    # --- the machine

    def acquire(self) -> None:
        """Return with workers that answer. Raises Gone, or Stop for what waiting does not mend."""
        if self.cloud is None:
            return
        self.find_zone()
        began = sick = self.clock.now()
        said = ""
        while True:
            look = self.cloud.look()
            if look.kind != "absent" and not self.cloud.owned:
                self.check_ours(look)
            if look.kind != "sick":
                sick = self.clock.now()
            if look.detail != said and look.kind != "absent":
                said = look.detail
                waited = clocks.text(self.clock.now() - began)
                self.journal.say("acquire", f"{self.cloud.tpu.name}: {said} ({waited})")
            if look.kind == "ready":
                self.meter.begin(look.created)
                self.meet(look)
                return
            self._advance(look, began, sick)

    def find_zone(self) -> None:
        """The machine may be in any of the zones: ours is looked for before one is made."""
        if self.cloud.owned or len(self.plan.zones) == 1:
            return
        for number, zone in enumerate(self.plan.zones):
            self.cloud.tpu = dataclasses.replace(self.cloud.tpu, zone=zone)
            if self.cloud.look().kind != "absent":
                self.zone = number
                return
        self.cloud.tpu = dataclasses.replace(self.cloud.tpu, zone=self.plan.zones[self.zone])

    def _advance(self, look: Look, began: float, sick: float) -> None:
        """Do what the state of the machine asks for, and wait a little."""
        existing, now = self.plan.args.existing, self.clock.now()
        if existing and look.kind in ("absent", "gone", "failed"):
            raise Stop(REFUSED, f"TPU VM {self.plan.name} can't be used: {look.detail}")
        if look.kind == "absent":
            try:
                self.cloud.create()
                self.cloud.owned = self.responsible = True
            except ApiError as error:
                self.no_capacity(error, began)
        elif look.kind == "failed":
            error = gcloud.error(look.detail)
            self.remove()
            if error.kind not in ("stockout", "transient"):
                raise refuse(error)
            self.no_capacity(error, began)
        elif look.kind == "gone":
            self.remove()
        elif look.kind == "sick" and now - sick > REPAIR:
            if existing:
                raise Stop(INFRASTRUCTURE, f"{look.detail} for {clocks.text(now - sick)}")
            self.remove()
        self.check_queue(began)
        self.meter.check(self.plan.args.max_hours, self.plan.args.max_cost)
        self.pause(2 if look.kind == "absent" else LOOK)

    def check_ours(self, look: Look) -> None:
        """Take over the machine that is there, if it is this run's. Raises Stop for another's."""
        if self.plan.args.existing:
            return
        run = look.labels.get("run", "")
        if look.labels.get("managed-by") != "vit_scale":
            raise Stop(
                USAGE,
                f"there is a TPU {self.plan.name} that this program has not made: "
                "give another --name, or --existing to use it as it is",
            )
        if run != self.plan.run:
            raise Stop(
                USAGE,
                f"TPU {self.plan.name} is of run {run}, with another config or workdir: give "
                f"another --name, or end that one: launch/tpu_vm.sh delete --name {self.plan.name}",
            )
        self.cloud.owned = True
        self.journal.say("acquire", f"{self.plan.name} is there already: taken over")

    def no_capacity(self, error: ApiError, began: float) -> None:
        """After a stockout: the next zone, or the same one later. Raises Stop for what is none."""
        if error.kind not in ("stockout", "transient"):
            raise refuse(error)
        zones = self.plan.zones
        if error.kind == "stockout":  # after any other error it may have been made all the same
            self.zone = (self.zone + 1) % len(zones)
        wait = ROTATION[min(self.shortages // len(zones), len(ROTATION) - 1)]
        self.shortages += 1
        self.journal.say("acquire", f"{self.cloud.tpu.zone}: {error}; next: {zones[self.zone]}")
        self.cloud.tpu = dataclasses.replace(self.cloud.tpu, zone=zones[self.zone])
        self.cloud.owned = False  # what is there is looked at first
        self.check_queue(began)
        self.pause(wait if self.zone == 0 else 2)

    def check_queue(self, began: float) -> None:
        limit = self.plan.args.valid_until
        waited = self.clock.now() - began
        if limit and waited > seconds(limit):
            raise Stop(NO_CAPACITY, f"no machine in {clocks.text(waited)} (--valid-until {limit})")

    def meet(self, look: Look) -> None:
        """Have an answer of every worker, and the agent there. Raises Gone."""
        self.workers = GcloudWorkers(self.cloud.tpu, look.hosts, self.clock, self._record)
        if self.workers.count != self.plan.hosts:
            self.journal.say(
                "acquire",
                f"{self.workers.count} workers are there, {self.plan.hosts} were expected",
            )
        self.journal.state["zone"] = self.cloud.tpu.zone
        self.journal.save()

    def _record(self, argv: list[str]) -> None:
        self.journal.write("gcloud", argv=argv)

    # --- the code on the workers

    def reach(self) -> None:
        """The code and the agent are on every worker. Raises Gone or Stop.

        The first connection of all changes the node's metadata, and two at once get in each other's
        way: worker 0 comes first.
        """
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        file = script.code_file(self.plan)
        if not file.exists():
            for old in self.plan.folder.glob("*.tgz"):
                old.unlink()
            file.write_bytes(self.plan.code.data)
        self.on_every("reach", [0], self._reach)
        self.on_every("reach", range(1, self.workers.count), self._reach)

    def _reach(self, worker: int) -> gcloud.Result:
        result = self.workers.shell(worker, script.prime(self.plan.code.sha), b"", 90)
        if result.code:
            return result
        files = [str(script.AGENT)]
        if b"have" not in result.out:
            files.append(str(script.code_file(self.plan)))
        result = self.workers.copy(worker, files, script.INCOMING, 600)
        return result if result.code else self.workers.shell(worker, script.install(), b"", 60)

    def on_every(self, what: str, workers, call, tries: int = 4) -> dict[int, gcloud.Result]:
        """Have all do it, again where it fails. Raises Gone, or Stop with the worker's own line."""
        left, results = list(workers), {}
        for number in range(tries):
            results |= on_all(left, call)
            left = [worker for worker in left if results[worker].code]
            if not left:
                return results
            codes = {results[worker].code for worker in left}
            for worker in left:
                self.journal.write(
                    what,
                    worker=worker,
                    code=results[worker].code,
                    error=results[worker].err[-4000:],
                )
            self.check_machine()
            if codes & {70, 71} and number:
                break
            self.pause(10 * (number + 1))
        worker = left[0]
        line = f"{what}: [w{worker:02}] {last(results[worker].err)}"
        if results[worker].code in (65, 70, 71):
            raise Stop(SETUP, line)
        error = gcloud.error(results[worker].err)
        if error.kind in ("agent", "auth", "permission"):
            raise refuse(error)
        raise Stop(INFRASTRUCTURE, line)

    def check_machine(self, patience: int = TRIES) -> None:
        """Raises Gone where the machine is no more: 404 counts when it is said thrice."""
        if self.cloud is None:
            return
        for _ in range(3):
            look = self.cloud.look(patience)
            if look.kind in ("gone", "failed", "sick"):
                raise Gone(look.detail)
            if look.kind != "absent":
                return
            self.clock.sleep(5)
        raise Gone(f"{look.detail} any more")

    def prepare(self) -> None:
        """One environment, the same on every worker. Raises Stop with the odd one's name."""
        count, began = self.workers.count, self.clock.now()
        line = script.prepare(self.plan)

        def call(worker):
            return self.workers.shell(worker, line, b"", 1800)

        prints = self.fingerprints(self.on_every("prepare", range(count), call, tries=3))
        if odd := self.odd(prints):
            self.journal.say("prepare", f"[w{odd[0]:02}] differs, once more: {odd[1]}")
            prints |= self.fingerprints(self.on_every("prepare", [odd[0]], call, tries=2))
            if odd := self.odd(prints):
                raise Stop(SETUP, f"[w{odd[0]:02}] differs from the others: {odd[1]}")
        found = prints[0]
        shown = ", ".join(
            f"{key} {found[key]}" for key in ("python", "jax", "libtpu") if key in found
        )
        took = clocks.text(self.clock.now() - began)
        self.journal.say("prepare", f"{count}/{count} workers alike: {shown} ({took})")

    def fingerprints(self, results: dict[int, gcloud.Result]) -> dict[int, dict]:
        found = {}
        for worker, result in results.items():
            _, marked, text = result.out.decode(errors="replace").partition("#FINGERPRINT ")
            if not marked:
                raise Stop(SETUP, f"prepare: [w{worker:02}] no fingerprint: {last(result.err)}")
            found[worker] = json.loads(text.splitlines()[0])
        return found

    def odd(self, prints: dict[int, dict]) -> tuple[int, str] | None:
        """The worker that is not like most, and in what."""
        texts = [json.dumps(found, sort_keys=True) for found in prints.values()]
        usual = json.loads(max(texts, key=texts.count))
        for worker, found in sorted(prints.items()):
            differs = [key for key in usual if usual[key] != found.get(key)]
            if differs:
                return worker, ", ".join(f"{k} {found.get(k)} not {usual[k]}" for k in differs)
        return None

    # --- attempts

    def one_attempt(self) -> Cause:
        """Take up the attempt that is there, or make the next; why it ended."""
        self.reach()
        self.attempt = attempt = self.find_attempt()
        self.responsible = True
        if attempt is None:
            self.prepare()
            number = self.journal.state["attempt"] + 1
            self.journal.state["attempt"] = number
            self.journal.save()
            self.attempt = attempt = self.new_attempt(number)
            refused = attempt.start()
            self.watch_over()
            if refused:
                self.journal.state["settled"] = number
                self.check_machine()
                return refused
            count = self.workers.count
            self.journal.say("train", f"attempt {number} started on {count}/{count}")
        found = self.babysit(attempt)
        self.journal.state["settled"] = attempt.number
        self.note_progress()
        return found

    def new_attempt(self, number: int) -> Attempt:
        return Attempt(self.plan, self.workers, number, self.clock, self.journal, self.sitter)

    def find_attempt(self) -> Attempt | None:
        """The attempt that the workers have, unless it is over and accounted for."""
        results = self.on_every(
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
        attempt.poll()
        states = [view.state for view in attempt.views]
        if any(state in ("absent", "unknown") for state in states):
            self.journal.say("train", f"attempt {number} had not started everywhere: ended")
            attempt.stop(0)
            return None
        if all(view.stopped for view in attempt.views) and all(view.over for view in attempt.views):
            return None  # somebody had stopped it, and wants it to go on now
        self.journal.say("train", f"attempt {number} is there already: taken over")
        return attempt

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
        if self.cloud and self.cloud.owned and self.plan.args.orphan:
            result = self.workers.shell(0, script.reap(self.plan), b"", 60)
            if result.code:
                self.journal.write("reap", error=last(result.err))

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

    def is_ready(self) -> bool:
        """Whether the machine is known to be there; raises Gone where it is known not to be.

        Where the cloud can't be asked, training goes on without this launcher.
        """
        self.looked = self.clock.now()
        try:
            self.check_machine(patience=2)
        except Stop as stop:
            if stop.code != INFRASTRUCTURE:
                raise
            self.journal.write("offline", error=str(stop))
            return False
        return True

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
        if self.cloud and now - self.looked > (LOOK if silent else WATCH):
            self.is_ready()
        if self.cloud and self.cloud.owned and now - self.renewed > RENEW:
            self.renewed = now
            self.cloud.renew()

    # --- the end

    def _on_signal(self, number, frame) -> None:
        self.signals += 1
        self.clock.wake.set()

    def check_interrupt(self) -> None:
        """Raises Interrupted after a signal, and after `stop` in another terminal."""
        request = self.plan.folder / "stop"
        if request.exists():
            keep = request.read_text().strip() == "keep"
            request.unlink()
            raise Interrupted(stop=True, keep=keep)
        if not self.signals:
            return
        self.clock.wake.clear()
        training = self.attempt is not None and not self.attempt.stopping
        choice = self.plan.args.on_interrupt or ("detach" if training else "stop")
        if not self.responsible:
            choice = "detach"
        if choice == "detach" and training and self.signals == 1:
            price = "" if self.plan.price is None else f", ${self.plan.price:.2f}/h"
            self.journal.say(
                "detach",
                f"still running{price}: the same command takes it up, `launch/tpu_vm.sh stop "
                f"--name {self.plan.name}` ends it, and Ctrl-C does so now",
            )
            time.sleep(WINDOW * min(1.0, self.clock.scale * 10))
        raise Interrupted(stop=choice == "stop" or self.signals > 1)

    def interrupted(self, interrupted: Interrupted) -> int:
        if not interrupted.stop:
            return self.end(INTERRUPTED, "detached", deleted=False)
        self.signals = 0
        self.clock.wake.clear()
        if self.attempt:
            self.journal.say("stop", f"attempt {self.attempt.number}: saving, then ending")
            self.end_attempt()
        deleted = False if interrupted.keep else self._quietly_release()
        return self.end(INTERRUPTED, "stopped", deleted)

    def end_attempt(self) -> None:
        self.attempt.stop(self.plan.args.grace)
        self.attempt.catch_up()
        self.journal.state["settled"] = self.attempt.number
        self.note_progress()

    def finish(self, code: int, line: str) -> int:
        """Say why it ended, and leave the machine as it was asked for."""
        if code != DONE:
            self.journal.say("cause", line)
        running = self.attempt and any(not view.over for view in self.attempt.views)
        if running and code == AUTH:  # it trains on: only this launcher is shut out
            return self.end(code, line, deleted=False)
        if running:
            self.end_attempt()
        policy = self.plan.args.on_success if code == DONE else "delete"
        if code in KEPT:
            policy = self.plan.args.on_failure
        word, _, duration = policy.partition(":")
        deleted = False
        if word == "delete" or (duration and self.keep(seconds(duration))):
            deleted = self._quietly_release()
        return self.end(code, line, deleted)

    def keep(self, duration: float) -> bool:
        """Keep the machine a while for another try; whether it is to be deleted then."""
        if not (self.cloud and self.cloud.owned):
            return False
        until = time.strftime("%H:%M", time.localtime(time.time() + duration))
        self.journal.say(
            "keep", f"the machine is kept until {until}: run the command again, or Ctrl-C to delete"
        )
        self.journal.save()
        self.journal.give_up()
        self.attempt = None
        end = self.clock.now() + duration
        while self.clock.now() < end and not self.signals:
            if self.journal.watcher():
                self.journal.say("keep", "another launcher has taken it over")
                return False
            self.clock.sleep(min(5, end - self.clock.now()))
        self.clock.wake.clear()
        return self.journal.take() and self.journal.state.get("sitter") == self.sitter

    def remove(self) -> None:
        self.cloud.delete()
        self.meter.end()

    def _quietly_release(self) -> bool:
        """Delete the machine; whether it is gone. A failure is said, and no reason to go on."""
        if self.cloud is None or not self.cloud.owned or not self.responsible:
            return False
        try:
            self.remove()
            return True
        except (Stop, ApiError) as error:
            self.journal.say("delete", f"NOT deleted: {error}")
            return False

    def end(self, code: int, line: str, deleted: bool) -> int:
        """The last line, for programs."""
        self.meter.end()
        state = self.journal.state
        state["result"] = code
        self.journal.save()
        there = "none"
        if self.cloud:
            there = "deleted" if deleted else self.kept()
        result = {
            "run": self.plan.run,
            "result": line if code == INTERRUPTED else RESULTS[code],
            "code": code,
            "steps": max(state["progress"].values(), default=0),
            "attempts": state["attempt"],
            "cost_usd": self.meter.cost,
            "cloud": there,
        }
        if code not in (DONE, INTERRUPTED):
            result["cause"] = self.journal.hide(line)
        self.journal.write("end", **result)
        self.journal.give_up()
        print(json.dumps(result), flush=True)
        return code

    def kept(self) -> str:
        if not self.cloud.owned and not self.plan.args.existing:
            return "none"
        price = "unknown price" if self.plan.price is None else f"${self.plan.price:.2f}/h"
        return f"kept ({self.cloud.tpu.name}, {self.cloud.tpu.zone}, {price})"
