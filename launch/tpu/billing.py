"""What a run has cost: the hours of its machines, as far as this and the cloud's notes know."""

import datetime

from launch.tpu.clock import Clock
from launch.tpu.exit_codes import LIMIT, Stop
from launch.tpu.journal import Journal


class Billing:
    """Counts from `begin` to `end`, over all of a run's launchers: the journal keeps the sum."""

    def __init__(self, price: float | None, clock: Clock, journal: Journal):
        self.price, self.clock, self.journal = price, clock, journal
        self._since: float | None = None

    def begin(self, created: str = "") -> None:
        """The machine is there; it may have been before, unwatched."""
        if self._since is not None:
            return
        self._since = self.clock.wall()
        if created and created != self.journal.state.get("metered"):
            self.journal.state["metered"] = created
            self.journal.state["metered_from"] = self.journal.state["billed"]
        known = self.journal.state["billed"] - self.journal.state.get("metered_from", 0.0)
        if created:  # hours that nobody watched count as well
            self._since -= max(0.0, age(created) / self.clock.scale - known)

    def book(self) -> None:
        if self._since is not None:
            now = self.clock.wall()
            self.journal.state["billed"] += max(0.0, now - self._since)
            self._since = now

    def end(self) -> None:
        self.book()
        self._since = None

    @property
    def hours(self) -> float:
        self.book()
        return self.journal.state["billed"] / 3600

    @property
    def cost(self) -> float | None:
        return None if self.price is None else round(self.hours * self.price, 2)

    @property
    def text(self) -> str:
        cost = self.cost
        return f"{self.hours:.2f} h" + ("" if cost is None else f", ${cost:.2f}")

    def check(self, hours: float, cost: float) -> None:
        """Raises Stop at a limit; 0 is none."""
        if hours and self.hours >= hours:
            raise Stop(LIMIT, f"--max-hours {hours:g} is reached; rerun the same command to resume")
        if cost and (self.cost or 0) >= cost:
            raise Stop(LIMIT, f"--max-cost {cost:g} is reached; rerun the same command to resume")


def age(created: str) -> float:
    """Seconds since a time such as 2026-11-21T20:15:00.123456789Z; 0 for what is none."""
    try:
        moment = datetime.datetime.strptime(created[:19] + "+0000", "%Y-%m-%dT%H:%M:%S%z")
    except ValueError:
        return 0.0
    return max(0.0, datetime.datetime.now(datetime.timezone.utc).timestamp() - moment.timestamp())
