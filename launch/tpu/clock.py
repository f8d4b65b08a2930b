"""Time, as the launcher knows it: tests make it run faster, or stand still."""

import os
import threading
import time


class Clock:
    """LAUNCH_TIME_SCALE=0.01 makes a hundred seconds of waiting last one."""

    def __init__(self):
        self.scale = float(os.environ.get("LAUNCH_TIME_SCALE", "1"))
        self.wake = threading.Event()  # set by a signal: who sleeps looks up

    def now(self) -> float:
        """Seconds, of no particular beginning."""
        return time.monotonic() / self.scale

    def wall(self) -> float:
        """Seconds that go on while this machine sleeps, as money does."""
        return time.time() / self.scale

    def sleep(self, seconds: float) -> None:
        """Sleep, or less where `wake` is set."""
        self.wake.wait(seconds * self.scale)

    def limit(self, seconds: float) -> float:
        """The real time that a process may take which is given `seconds`."""
        return max(seconds * self.scale, min(seconds, float(os.environ.get("LAUNCH_LEAST", 5))))


def text(seconds: float) -> str:
    """Such as 02:04:09."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
