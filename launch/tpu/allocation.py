"""The machine of a run: made or taken over, waited for until it is READY, known to be no more."""

import dataclasses
import math
from collections.abc import Callable

from launch.tpu import clock as clocks
from launch.tpu import gcloud
from launch.tpu.billing import Billing
from launch.tpu.cloud_tpu import TRIES, CloudTpu, Status, refuse
from launch.tpu.exit_codes import INFRASTRUCTURE, NO_CAPACITY, REFUSED, USAGE, Stop
from launch.tpu.flags import seconds
from launch.tpu.gcloud import ApiError
from launch.tpu.plan import Plan

POLL = 15  # seconds between looks at a machine that is to come
REPAIR = 1200  # seconds that a machine may take to recover
RENEW = 3600  # seconds between saying that the machine is wanted
EXISTS_DELAYS = (5, 30, 60, 120, 300)  # seconds to wait where there is one, and it isn't seen
ROTATION = (30, 60, 120, 300, 600)  # seconds to wait after a stockout


class Gone(Exception):
    """The machine is no more, or will not come back."""


class Allocation:
    """The run's slices. `pause` waits, and raises where somebody wants the launcher to end.

    `made`: by this launcher, so that nothing trains there which it does not know of. `fresh`: no
    look has found it READY yet. `claim` is called when it is, or is to be, this run's; `rescue`
    with the last look before one is removed that may still train.
    """

    def __init__(
        self, plan: Plan, cloud: CloudTpu, billing: Billing, pause: Callable[[float], None]
    ):
        self.plan, self.cloud, self.billing, self.pause = plan, cloud, billing, pause
        self.clock, self.journal = cloud.clock, cloud.journal
        self.zone, self.shortages, self.refusals, self.created = 0, 0, 0, False
        self.fresh = True
        self.requested = False  # for one, with no answer yet that says what came of it
        self.claim: Callable[[], None] = lambda: None
        self.rescue: Callable[[Status], None] = lambda status: None
        self.checked_at = self.renewed = self.clock.now()

    def acquire(self) -> Status:
        """Return when it is READY. Raises Stop for what waiting does not mend."""
        self.find_zone()
        began = sick = self.clock.now()
        said = ""
        while True:
            status = self.cloud.status()
            if status.kind == "not_ours" or (status.kind != "absent" and not self.cloud.owned):
                self.adopt(status)
            self.fresh = self.fresh and status.kind in ("absent", "waiting", "failed")
            if status.kind not in ("recovering", "unhealthy"):
                sick = self.clock.now()
            if status.detail != said and status.kind != "absent":
                said = status.detail
                waited = clocks.text(self.clock.now() - began)
                self.journal.say("acquire", f"{self.cloud.tpu.name}: {said} ({waited})")
            # One that was there already may train, whatever its health is said to be.
            if status.kind == "ready" or (status.kind == "unhealthy" and not self.created):
                self.billing.begin(status.created)
                self.journal.state["zone"] = self.cloud.tpu.zone
                self.journal.save()
                self.renew(since=began)  # while it waited, there was nothing to label
                return status
            self._advance(status, began, sick)

    def find_zone(self) -> None:
        """The machine may be in any of the zones: ours is looked for before one is made."""
        if self.cloud.owned or len(self.plan.zones) == 1:
            return
        for number, zone in enumerate(self.plan.zones):
            self.cloud.tpu = dataclasses.replace(self.cloud.tpu, zone=zone)
            if self.cloud.status().kind != "absent":
                self.zone = number
                return
        self.cloud.tpu = dataclasses.replace(self.cloud.tpu, zone=self.plan.zones[self.zone])

    def _advance(self, status: Status, began: float, sick: float) -> None:
        """Do what the state of the machine asks for, and wait a little."""
        existing, now = self.plan.args.existing, self.clock.now()
        if existing and status.kind in ("absent", "gone", "failed", "not_ours"):
            raise Stop(REFUSED, f"TPU VM {self.plan.name} can't be used: {status.detail}")
        if status.kind == "absent":
            self.billing.end()
            self.claim()
            self.request(began)
        elif status.kind == "failed":
            reason = gcloud.error(status.detail)
            self.remove()
            self.no_capacity(reason, began)
        elif status.kind == "gone":
            self.remove()
        elif status.kind in ("recovering", "unhealthy") and now - sick > REPAIR:
            if existing:
                raise Stop(INFRASTRUCTURE, f"{status.detail} for {clocks.text(now - sick)}")
            self.rescue(status)
            self.remove()
        self.renew()
        self.check_queue(began)
        self.billing.check(self.plan.args.max_hours, self.plan.args.max_cost)
        self.pause(2 if status.kind == "absent" else POLL)

    def request(self, began: float) -> None:
        """Have it made; where there is one, the next look says whose."""
        self.requested = True
        try:
            created = self.cloud.create()
        except ApiError as error:
            self.requested = error.kind == "transient"
            self.no_capacity(error, began)
            return
        except Stop:
            self.requested = False
            raise
        self.requested = False
        self.cloud.owned = self.created = created
        self.refusals = 0 if created else self.refusals + 1
        if self.refusals > len(EXISTS_DELAYS):
            raise Stop(
                USAGE,
                f"there is a TPU {self.plan.name} in {self.cloud.tpu.zone} that can't be seen: "
                "give another --name",
            )
        if not created:
            self.pause(EXISTS_DELAYS[self.refusals - 1])

    def adopt_requested(self) -> None:
        """Own what was made though no answer has said so, if there is such a one. Raises Stop."""
        if self.requested and not self.cloud.owned:
            self.cloud.owned = self.cloud.is_ours(self.cloud.status(patience=3).labels)

    def renew(self, since: float = math.inf) -> None:
        """Say now and then that the machine is wanted; `since`: what was said is as old as that."""
        if self.cloud.owned and self.clock.now() - min(self.renewed, since) > RENEW:
            self.renewed = self.clock.now()
            self.cloud.renew()

    def adopt(self, status: Status) -> None:
        """Take over the machine that is there, if it is this run's. Raises Stop for another's."""
        if self.plan.args.existing:
            self.claim()
            return
        run = status.labels.get("run", "")
        if status.labels.get("managed-by") != "vit_scale":
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
        self.cloud.owned = self.created = False  # what is there is looked at first
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
            status = self.cloud.status(patience)
            if status.kind in ("gone", "failed", "recovering", "not_ours"):
                raise Gone(status.detail)
            if status.kind != "absent":
                return
            self.clock.sleep(5)
        raise Gone(f"{status.detail} any more")

    def is_ready(self) -> bool:
        """Whether the machine is known to be there; raises Gone where it is known not to be.

        Where the cloud can't be asked, training goes on without this launcher.
        """
        self.checked_at = self.clock.now()
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
        self.billing.end()
