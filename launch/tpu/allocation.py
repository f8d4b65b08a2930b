"""The machine of a run: made or taken over, waited for until it is READY, known to be no more."""

import dataclasses
import math
from collections.abc import Callable

from launch.tpu import clock as clocks
from launch.tpu import gcloud
from launch.tpu.billing import Meter
from launch.tpu.cloud_tpu import TRIES, Cloud, Look, refuse
from launch.tpu.exit_codes import INFRASTRUCTURE, NO_CAPACITY, REFUSED, USAGE, Stop
from launch.tpu.flags import seconds
from launch.tpu.gcloud import ApiError
from launch.tpu.plan import Plan

LOOK = 15  # seconds between looks at a machine that is to come
REPAIR = 1200  # seconds that a machine may take to recover
RENEW = 3600  # seconds between saying that the machine is wanted
AGAIN = (5, 30, 60, 120, 300)  # seconds to wait where there is one, and it isn't seen
ROTATION = (30, 60, 120, 300, 600)  # seconds to wait after a stockout


class Gone(Exception):
    """The machine is no more, or will not come back."""


class Machine:
    """The run's slices. `pause` waits, and raises where somebody wants the launcher to end.

    `made`: by this launcher, so that nothing trains there which it does not know of. `fresh`: no
    look has found it READY yet. `claim` is called when it is, or is to be, this run's; `rescue`
    with the last look before one is removed that may still train.
    """

    def __init__(self, plan: Plan, cloud: Cloud, meter: Meter, pause: Callable[[float], None]):
        self.plan, self.cloud, self.meter, self.pause = plan, cloud, meter, pause
        self.clock, self.journal = cloud.clock, cloud.journal
        self.zone, self.shortages, self.refusals, self.made = 0, 0, 0, False
        self.fresh = True
        self.asked = False  # for one, with no answer yet that says what came of it
        self.claim: Callable[[], None] = lambda: None
        self.rescue: Callable[[Look], None] = lambda look: None
        self.looked = self.renewed = self.clock.now()

    def acquire(self) -> Look:
        """Return when it is READY. Raises Stop for what waiting does not mend."""
        self.find_zone()
        began = sick = self.clock.now()
        said = ""
        while True:
            look = self.cloud.look()
            if look.kind == "foreign" or (look.kind != "absent" and not self.cloud.owned):
                self.check_ours(look)
            self.fresh = self.fresh and look.kind in ("absent", "waiting", "failed")
            if look.kind not in ("sick", "unhealthy"):
                sick = self.clock.now()
            if look.detail != said and look.kind != "absent":
                said = look.detail
                waited = clocks.text(self.clock.now() - began)
                self.journal.say("acquire", f"{self.cloud.tpu.name}: {said} ({waited})")
            # One that was there already may train, whatever its health is said to be.
            if look.kind == "ready" or (look.kind == "unhealthy" and not self.made):
                self.meter.begin(look.created)
                self.journal.state["zone"] = self.cloud.tpu.zone
                self.journal.save()
                self.renew(since=began)  # while it waited, there was nothing to label
                return look
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
        if existing and look.kind in ("absent", "gone", "failed", "foreign"):
            raise Stop(REFUSED, f"TPU VM {self.plan.name} can't be used: {look.detail}")
        if look.kind == "absent":
            self.meter.end()
            self.claim()
            self.ask(began)
        elif look.kind == "failed":
            reason = gcloud.error(look.detail)
            self.remove()
            self.no_capacity(reason, began)
        elif look.kind == "gone":
            self.remove()
        elif look.kind in ("sick", "unhealthy") and now - sick > REPAIR:
            if existing:
                raise Stop(INFRASTRUCTURE, f"{look.detail} for {clocks.text(now - sick)}")
            self.rescue(look)
            self.remove()
        self.renew()
        self.check_queue(began)
        self.meter.check(self.plan.args.max_hours, self.plan.args.max_cost)
        self.pause(2 if look.kind == "absent" else LOOK)

    def ask(self, began: float) -> None:
        """Have it made; where there is one, the next look says whose."""
        self.asked = True
        try:
            made = self.cloud.create()
        except ApiError as error:
            self.asked = error.kind == "transient"
            self.no_capacity(error, began)
            return
        except Stop:
            self.asked = False
            raise
        self.asked = False
        self.cloud.owned = self.made = made
        self.refusals = 0 if made else self.refusals + 1
        if self.refusals > len(AGAIN):
            raise Stop(
                USAGE,
                f"there is a TPU {self.plan.name} in {self.cloud.tpu.zone} that can't be seen: "
                "give another --name",
            )
        if not made:
            self.pause(AGAIN[self.refusals - 1])

    def find_asked(self) -> None:
        """Own what was made though no answer has said so, if there is such a one. Raises Stop."""
        if self.asked and not self.cloud.owned:
            self.cloud.owned = self.cloud.is_ours(self.cloud.look(patience=3).labels)

    def renew(self, since: float = math.inf) -> None:
        """Say now and then that the machine is wanted; `since`: what was said is as old as that."""
        if self.cloud.owned and self.clock.now() - min(self.renewed, since) > RENEW:
            self.renewed = self.clock.now()
            self.cloud.renew()

    def check_ours(self, look: Look) -> None:
        """Take over the machine that is there, if it is this run's. Raises Stop for another's."""
        if self.plan.args.existing:
            self.claim()
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
        self.claim()
        self.cloud.owned = True
        self.renewed = self.clock.now() - RENEW - 1  # what is taken over may be about to expire
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
        self.cloud.owned = self.made = False  # what is there is looked at first
        self.fresh = True
        self.check_queue(began)
        self.pause(wait if self.zone == 0 else 2)

    def check_queue(self, began: float) -> None:
        limit = self.plan.args.valid_until
        waited = self.clock.now() - began
        if limit and waited > seconds(limit):
            raise Stop(NO_CAPACITY, f"no machine in {clocks.text(waited)} (--valid-until {limit})")

    def check(self, patience: int = TRIES) -> None:
        """Raises Gone where the machine is no more: 404 counts when it is said thrice."""
        for _ in range(3):
            look = self.cloud.look(patience)
            if look.kind in ("gone", "failed", "sick", "foreign"):
                raise Gone(look.detail)
            if look.kind != "absent":
                return
            self.clock.sleep(5)
        raise Gone(f"{look.detail} any more")

    def is_ready(self) -> bool:
        """Whether the machine is known to be there; raises Gone where it is known not to be.

        Where the cloud can't be asked, training goes on without this launcher.
        """
        self.looked = self.clock.now()
        try:
            self.check(patience=2)
        except Stop as stop:
            if stop.code != INFRASTRUCTURE:
                raise
            self.journal.write("offline", error=str(stop))
            return False
        return True

    def remove(self) -> None:
        self.cloud.delete()
        self.fresh = True
        self.meter.end()
