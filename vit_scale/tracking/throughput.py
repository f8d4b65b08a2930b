"""How fast training is: what a run reports as its speed holds neither compilation nor pauses."""

import contextlib
from collections.abc import Callable, Iterator


class Speed:
    """A stopwatch over steps, read once per log interval, and good to one step of it.

    Args:
      batch: images per step, over all devices and hosts.
      mfu: from images per second to model FLOPs utilisation, or None.
      clock: the time in seconds.
    """

    def __init__(
        self, batch: int, mfu: Callable[[float], float | None], clock: Callable[[], float]
    ):
        self._batch, self._mfu, self._clock = batch, mfu, clock
        self._opened = clock()
        self._step: int | None = None
        self._began = self._waited = self._paused = 0.0
        self._all_steps, self._all_seconds = 0, 0.0

    @property
    def running(self) -> bool:
        return self._step is not None

    @property
    def seconds(self) -> float:
        """Since the stopwatch was made, everything included."""
        return self._clock() - self._opened

    @property
    def images_per_second(self) -> float | None:
        """Over all laps; None before the first full one."""
        return self._batch * self._all_steps / self._all_seconds if self._all_seconds > 0 else None

    def start(self, step: int) -> None:
        """The device has just finished `step`: count from here."""
        self._step, self._began = step, self._clock()
        self._waited = self._paused = 0.0

    @contextlib.contextmanager
    def timing(self, wait: bool) -> Iterator[None]:
        """Count what happens inside as waiting for data, or as a pause."""
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            if wait:
                self._waited += seconds
            else:
                self._paused += seconds

    def lap(self, step: int) -> dict[str, float]:
        """The device has just finished `step`: the figures since the last lap; a new one begins.

        Only `seconds` where no step was timed.
        """
        figures = {"seconds": self.seconds}
        if self._step is None or step == self._step:
            return figures
        steps, seconds = step - self._step, self._clock() - self._began - self._paused
        if seconds > 0:
            self._all_steps += steps
            self._all_seconds += seconds
            rate = self._batch * steps / seconds
            mfu = self._mfu(rate)
            figures["images_per_second"] = rate
            figures["step_seconds"] = seconds / steps
            figures["data_wait_fraction"] = self._waited / seconds
            figures |= {} if mfu is None else {"mfu": mfu}
        self.start(step)
        return figures
