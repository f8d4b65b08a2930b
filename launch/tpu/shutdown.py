"""End a run: handle interrupts, keep or delete the machine, print the final status.

Only a machine that the launcher created is deleted, and never under a training that it cannot
reach. A requested end is an Interrupted, raised where the launcher waits.
"""

import json
import signal
import sys
import time
from dataclasses import dataclass

from launch.tpu.allocation import Allocation
from launch.tpu.billing import Billing
from launch.tpu.clock import Clock
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.flags import seconds
from launch.tpu.gcloud import ApiError
from launch.tpu.journal import Journal, print_line
from launch.tpu.plan import Plan

WINDOW = 3  # seconds in which a second Ctrl-C stops the run
# Results after which the machine may be worth inspecting: --on-failure applies.
INSPECTABLE = (Exit.FAILED, Exit.SETUP_FAILED, Exit.CRASH_LOOP, Exit.TPU_HELD)


class Interrupted(Exception):
    """The user wants this launcher to end, and with `stop` the training too."""

    def __init__(self, stop: bool, keep: bool = False):
        super().__init__("stop" if stop else "detach")
        self.stop, self.keep = stop, keep


@dataclass
class Shutdown:
    """The end of a run, and what leads to it."""

    plan: Plan
    clock: Clock
    journal: Journal
    billing: Billing
    machine: Allocation | None  # None if the workers are on this machine
    watcher: str  # the launcher's ID
    signals: int = 0  # received so far
    workers_known: bool = False  # whether it is known what trains on them

    # --- interrupts

    def handle_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame) -> None:
        self.signals += 1
        self.clock.wake.set()

    def check_interrupt(self, training: bool) -> None:
        """Raise Interrupted after a signal, or after the verb `stop` in another terminal.

        `training`: an attempt is running and can continue without this launcher.
        """
        request = self.plan.folder / "stop"
        if request.exists():
            keep = request.read_text().strip() == "keep"
            request.unlink()
            raise Interrupted(stop=True, keep=keep)
        if not self.signals:
            return
        self.clock.wake.clear()
        choice = self.plan.args.on_interrupt or ("detach" if training else "stop")
        if not self.responsible:
            choice = "detach"
        if choice == "detach" and training and self.signals == 1:
            price = "" if self.plan.price is None else f", ${self.plan.price:.2f}/h"
            self.journal.say(
                "detach",
                f"still running{price}; rerun the same command to resume watching; to stop it, "
                f"press Ctrl-C again or run `launch/tpu_vm.sh stop --name {self.plan.name}`",
            )
            time.sleep(WINDOW * min(1.0, self.clock.scale * 10))
        raise Interrupted(stop=choice == "stop" or self.signals > 1)

    # --- the machine

    @property
    def owned(self) -> bool:
        """Whether there is a machine that the launcher created."""
        return self.machine is not None and self.machine.cloud.owned

    @property
    def responsible(self) -> bool:
        """Whether this launcher may delete the machine: not under a training it cannot reach."""
        if self.machine is None:
            return self.workers_known
        waits = self.machine.fresh and (self.owned or self.machine.requested)
        return self.workers_known or self.machine.created or waits

    def apply_policy(self, code: Exit) -> bool:
        """Keep or delete the machine as requested; return whether it was deleted."""
        policy = self.plan.args.on_success if code == Exit.DONE else "delete"
        if code in INSPECTABLE:
            policy = self.plan.args.on_failure
        word, _, duration = policy.partition(":")
        if word == "delete" or (duration and self.keep(seconds(duration))):
            return self.release()
        return False

    def keep(self, duration: float) -> bool:
        """Keep the machine for `duration` seconds; return whether to delete it then."""
        if not self.owned:
            return False
        until = time.strftime("%H:%M", time.localtime(time.time() + duration))
        self.journal.say(
            "keep", f"machine kept until {until}: rerun the command to use it, or Ctrl-C to delete"
        )
        self.journal.save()
        self.journal.release_lock()
        report = self.clock.now() + duration
        while self.clock.now() < report and not self.signals:
            if self.journal.watcher():
                self.journal.say("keep", "another launcher has adopted it")
                return False
            self.clock.sleep(min(5, report - self.clock.now()))
        self.clock.wake.clear()
        locked, state = self.journal.acquire_lock(), self.journal.state
        return locked and state.get("sitter", state["watcher"]) == self.watcher

    def release(self) -> bool:
        """Delete the machine; return whether it is gone. A failure is printed, not raised."""
        if not (self.machine and self.responsible):
            return False
        try:
            cloud = self.machine.cloud
            if self.machine.requested and not cloud.owned:  # the request was never answered
                cloud.owned = cloud.is_ours(cloud.status(patience=3).labels)
            if not cloud.owned:
                return False
            self.machine.remove()
            return True
        except (Stop, ApiError) as error:
            self.journal.say("delete", f"NOT deleted: {error}")
            return False

    def report(self, code: Exit, line: str, deleted: bool) -> int:
        """Record the result and print it as one JSON line; return `code`."""
        self.billing.end()
        state = self.journal.state
        state["result"] = code
        self.journal.save()
        machine = "deleted" if deleted else "none"
        if self.machine and not deleted and (self.owned or self.plan.args.existing):
            tpu, price = self.machine.cloud.tpu, self.plan.price
            rate = "unknown price" if price is None else f"${price:.2f}/h"
            machine = f"kept ({tpu.name}, {tpu.zone}, {rate})"
        result = {
            "run": self.plan.run,
            "result": line if code == Exit.INTERRUPTED else code.result,
            "code": code,
            "steps": max(state["progress"].values(), default=0),
            "attempts": state["attempt"],
            "cost_usd": self.billing.cost,
            "cloud": machine,
        }
        if code not in (Exit.DONE, Exit.INTERRUPTED):
            result["cause"] = self.journal.redact(line)
        self.journal.write("end", **result)
        self.journal.release_lock()
        print_line(json.dumps(result), sys.stdout)
        return code
