"""Machine hours and cost of a run, over all launchers that have watched it."""

import datetime

from launch.tpu.clock import Clock
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.journal import Journal

RESUME = "rerun the same command to resume"


class Billing:
    """Meters a machine from `begin` to `end`; the journal keeps the sum over all launchers."""

    def __init__(self, price: float | None, clock: Clock, journal: Journal):
        self.price, self.clock, self.journal = price, clock, journal
        self._since: float | None = None

    def begin(self, created: str = "") -> None:
        """Start metering a machine created at `created`, which may have run unwatched before."""
        if self._since is not None:
            return
        self._since = self.clock.wall()
        if created and created != self.journal.state.get("metered"):
            self.journal.state["metered"] = created
            self.journal.state["metered_from"] = self.journal.state["billed"]
        booked = self.journal.state["billed"] - self.journal.state.get("metered_from", 0.0)
        if created:  # unwatched hours are billed too
            self._since -= max(0.0, age(created) / self.clock.scale - booked)

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

    def check(self, hours: float, cost: float) -> None:
        """Raise Stop if a limit is reached; 0 means none."""
        if hours and self.hours >= hours:
            raise Stop(Exit.LIMIT_REACHED, f"--max-hours {hours:g} reached; {RESUME}")
        if cost and (self.cost or 0) >= cost:
            raise Stop(Exit.LIMIT_REACHED, f"--max-cost {cost:g} reached; {RESUME}")


def age(created: str) -> float:
    """Return the seconds since a time such as 2026-11-21T20:15:00.123Z; 0 if it is malformed."""
    try:
        moment = datetime.datetime.strptime(created[:19] + "+0000", "%Y-%m-%dT%H:%M:%S%z")
    except ValueError:
        return 0.0
    return max(0.0, datetime.datetime.now(datetime.timezone.utc).timestamp() - moment.timestamp())
