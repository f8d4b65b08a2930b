"""The launcher's clock, which tests run faster or stop."""

import os
import threading
import time


class Clock:
    """Monotonic and wall time. LAUNCH_TIME_SCALE=0.01 makes a wait of 100 s take one."""

    def __init__(self):
        self.scale = float(os.environ.get("LAUNCH_TIME_SCALE", "1"))
        self.wake = threading.Event()  # set by a signal: interrupts sleep

    def now(self) -> float:
        """Seconds from an arbitrary origin."""
        return time.monotonic() / self.scale

    def wall(self) -> float:
        """Seconds of wall time, which also pass while this machine is suspended."""
        return time.time() / self.scale

    def sleep(self, seconds: float) -> None:
        """Sleep for `seconds`, or until `wake` is set."""
        self.wake.wait(seconds * self.scale)

    def limit(self, seconds: float) -> float:
        """Convert a time limit of `seconds` into real seconds for a subprocess."""
        return max(seconds * self.scale, min(seconds, float(os.environ.get("LAUNCH_LEAST", 5))))


def elapsed(seconds: float) -> str:
    """Format seconds as 02:04:09."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
