"""A run's TPU slices: request or adopt them, wait until READY, notice when they are gone."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from launch.tpu import gcloud
from launch.tpu.billing import Billing
from launch.tpu.clock import elapsed
from launch.tpu.cloud_tpu import TRIES, CloudTpu, Status, refuse
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.gcloud import ApiError
from launch.tpu.plan import Plan

POLL = 15  # seconds between status checks while waiting for a machine
LATE = 300  # seconds until a READY machine must list all of its workers
REPAIR = 1200  # seconds a machine may take to recover
RENEW = 3600  # seconds between renewals of the expiry label
EXISTS_DELAYS = (5, 30, 60, 120, 300)  # seconds to wait while the name exists, but not its status
ROTATION = (30, 60, 120, 300, 600)  # seconds to wait after a stockout


class Gone(Exception):
    """The machine is gone, or will not come back."""


@dataclass
class Allocation:
    """The run's slices in the cloud."""

    plan: Plan
    cloud: CloudTpu
    billing: Billing
    pause: Callable[[float], None]  # raises Interrupted when the user asks the launcher to end
    # Called once the machine is, or is about to be, this run's.
    claim: Callable[[], None] = lambda: None
    # Called with the last status before removing a machine that may still be training.
    rescue: Callable[[Status], None] = lambda status: None
    created: bool = False  # by this launcher, so no unknown training runs on it
    requested: bool = False  # a creation request is unanswered; the machine may exist
    fresh: bool = True  # it has not been READY yet
    zone: int = 0  # index in the plan's zones
    shortages: int = 0
    refusals: int = 0

    def __post_init__(self) -> None:
        self.clock, self.journal = self.cloud.clock, self.cloud.journal
        self.checked_at = self.renewed = self.clock.now()

    def acquire(self) -> Status:
        """Return once it is READY. Raises Stop if waiting cannot help."""
        self.find_zone()
        began = sick = self.clock.now()
        shown = ""
        while True:
            status = self.expect_all(self.cloud.status())
            if status.kind == "not_ours" or (status.kind != "absent" and not self.cloud.owned):
                self.adopt(status)
            self.fresh = self.fresh and status.kind in ("absent", "waiting", "failed")
            if status.kind not in ("recovering", "unhealthy", "short"):
                sick = self.clock.now()
            if status.detail != shown and status.kind != "absent":
                shown = status.detail
                waited = elapsed(self.clock.now() - began)
                self.journal.say("acquire", f"{self.cloud.tpu.name}: {shown} ({waited})")
            late = status.kind == "short" and self.clock.now() - sick > LATE
            # A machine that already existed may be training, whatever the API reports of it.
            adopted = not (self.created or self.plan.args.existing)
            if status.kind == "ready" or (adopted and (status.kind == "unhealthy" or late)):
                self.billing.begin(status.created)
                self.journal.state["zone"] = self.cloud.tpu.zone
                self.journal.save()
                self.renew(since=began)  # there was nothing to label while it waited
                return status
            self._advance(status, began, sick)

    def expect_all(self, status: Status) -> Status:
        """Say if it has other than its type's number of workers; of kind short, if fewer."""
        count, expected = sum(number for _, number in status.hosts), self.plan.hosts
        if status.kind not in ("ready", "unhealthy") or count == expected:
            return status
        kind = "short" if count < expected else status.kind
        return status._replace(kind=kind, detail=f"it has {count} workers, not {expected}")

    def find_zone(self) -> None:
        """Look for this run's machine in all zones before one is created."""
        if self.cloud.owned or len(self.plan.zones) == 1:
            return
        for number, zone in enumerate(self.plan.zones):
            self.cloud.tpu = dataclasses.replace(self.cloud.tpu, zone=zone)
            if self.cloud.status().kind != "absent":
                self.zone = number
                return
        self.cloud.tpu = dataclasses.replace(self.cloud.tpu, zone=self.plan.zones[self.zone])

    def _advance(self, status: Status, began: float, sick: float) -> None:
        """Act on the machine's status, then wait."""
        existing, now = self.plan.args.existing, self.clock.now()
        if existing and status.kind in ("absent", "gone", "failed", "not_ours"):
            raise Stop(Exit.REFUSED, f"TPU VM {self.plan.name} is unusable: {status.detail}")
        if status.kind == "absent":
            self.billing.end()
            if self.created and self.fresh and not self.cloud.tpu.queue:  # asynchronously created
                for _ in range(3):  # a 404 must repeat to count
                    self.clock.sleep(5)
                    if self.cloud.status().kind != "absent":
                        return
                self.no_capacity(ApiError("stockout", "its creation came to nothing"), began)
            self.claim()
            self.request(began)
        elif status.kind == "failed":
            reason = gcloud.error(status.detail)
            self.remove()
            self.no_capacity(reason, began)
        elif status.kind == "gone":
            self.remove()
        elif status.kind == "short" and (existing or now - sick > LATE):
            raise Stop(Exit.INFRASTRUCTURE, f"{self.plan.name}: {status.detail}; check --type")
        elif status.kind in ("recovering", "unhealthy") and now - sick > REPAIR:
            if existing:
                raise Stop(Exit.INFRASTRUCTURE, f"{status.detail} for {elapsed(now - sick)}")
            self.rescue(status)
            self.remove()
        self.renew()
        self.check_queue(began)
        self.billing.check(self.plan.args.max_hours, self.plan.args.max_cost)
        self.pause(2 if status.kind == "absent" else POLL)

    def request(self, began: float) -> None:
        """Request creation. If the name is taken, the next status check says by whom."""
        self.requested = True
        self.journal.state["zone"] = self.cloud.tpu.zone  # where `delete` looks for it
        self.journal.save()
        try:
            created = self.cloud.create()
        except ApiError as error:
            self.requested = error.kind == "transient"
            self.no_capacity(error, began)
            return
        self.requested = False
        self.cloud.owned = self.created = created
        self.refusals = 0 if created else self.refusals + 1
        if self.refusals > len(EXISTS_DELAYS):
            taken = f"a TPU named {self.plan.name} exists in {self.cloud.tpu.zone}"
            raise Stop(Exit.USAGE, f"{taken} but cannot be described: choose another --name")
        if not created:
            self.pause(EXISTS_DELAYS[self.refusals - 1])

    def renew(self, since: float = math.inf) -> None:
        """Renew the expiry label once an hour; it was last set before `since`, if given."""
        if self.cloud.owned and self.clock.now() - min(self.renewed, since) > RENEW:
            self.renewed = self.clock.now()
            self.cloud.renew()

    def adopt(self, status: Status) -> None:
        """Adopt an existing machine if it belongs to this run. Raises Stop otherwise."""
        if self.plan.args.existing:
            self.claim()
            return
        run, problem = status.labels.get("run", ""), ""
        if status.labels.get("managed-by") != "vit_scale":
            problem = "exists and was not created by this launcher: choose another --name, or use "
            problem += "it as it is with --existing"
        elif run != self.plan.run:
            problem = f"belongs to run {run}, not to {self.plan.run}: choose another --name, or "
            problem += f"delete that machine: launch/tpu_vm.sh delete --name {self.plan.name}"
        if problem:
            raise Stop(Exit.USAGE, f"TPU {self.plan.name} {problem}")
        self.claim()
        self.cloud.owned = True
        self.renewed = self.clock.now() - RENEW - 1  # an adopted machine may be about to expire
        self.journal.say("acquire", f"{self.plan.name} already exists: adopted")

    def no_capacity(self, error: ApiError, began: float) -> None:
        """After a stockout, go on to the next zone. Raises Stop for any lasting error."""
        if error.kind not in ("stockout", "transient"):
            raise refuse(error)
        zones = self.plan.zones
        if error.kind == "stockout":  # after any other error it may exist anyway
            self.zone = (self.zone + 1) % len(zones)
        wait = ROTATION[min(self.shortages // len(zones), len(ROTATION) - 1)]
        self.shortages += 1
        self.journal.say("acquire", f"{self.cloud.tpu.zone}: {error}; trying {zones[self.zone]}")
        self.cloud.tpu = dataclasses.replace(self.cloud.tpu, zone=zones[self.zone])
        self.cloud.owned = self.created = False  # until its status is known
        self.fresh = True
        self.check_queue(began)
        self.pause(wait if self.zone == 0 else 2)

    def check_queue(self, began: float) -> None:
        limit = self.plan.args.valid_until
        waited = self.clock.now() - began
        if limit and waited > limit:
            raise Stop(Exit.NO_CAPACITY, f"no machine within {elapsed(waited)}: --valid-until")

    def check(self, patience: int = TRIES) -> None:
        """Raise Gone if the machine no longer exists. A 404 must repeat three times to count."""
        for _ in range(3):
            status = self.cloud.status(patience)
            if status.kind in ("gone", "failed", "recovering", "not_ours"):
                raise Gone(status.detail)
            if status.kind != "absent":
                return
            self.clock.sleep(5)
        raise Gone(status.detail)

    def is_ready(self) -> bool:
        """Return whether the machine is known to exist. Raises Gone if it is known not to.

        If the API cannot be reached, training continues without this launcher.
        """
        self.checked_at = self.clock.now()
        try:
            self.check(patience=2)
        except Stop as stop:
            if stop.code != Exit.INFRASTRUCTURE:
                raise
            self.journal.write("offline", error=str(stop))
            return False
        return True

    def remove(self) -> None:
        self.cloud.delete()
        self.fresh = True
        self.billing.end()
