"""Throughput: the speed of training without compilation and pauses."""

import contextlib
from collections.abc import Callable, Iterator


class Speed:
    """A stopwatch over steps, read once per log interval, accurate to one step of it.

    `batch` is the number of images per step over all hosts, `mfu` maps images per second to model
    FLOPs utilisation or None, `clock` is the time in seconds.
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
        """Whether a first step has been timed."""
        return self._step is not None

    @property
    def seconds(self) -> float:
        """Wall time since the stopwatch was made."""
        return self._clock() - self._opened

    @property
    def images_per_second(self) -> float | None:
        """Mean over all laps; None before the first."""
        return self._batch * self._all_steps / self._all_seconds if self._all_seconds > 0 else None

    def start(self, step: int) -> None:
        """Start timing now, when the device has just finished `step`."""
        self._step, self._began = step, self._clock()
        self._waited = self._paused = 0.0

    @contextlib.contextmanager
    def timing(self, wait: bool) -> Iterator[None]:
        """Count the time inside as waiting for data (`wait`), or else as a pause."""
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
        """End a lap now, when the device has just finished `step`; return its figures.

        Without a timed step that is `seconds` only.
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
