"""Goodput: the share of a run's wall time that trained it, and where the rest went.

RUN/goodput.json has one entry per attempt; an attempt begins with the command, and again with each
rollback to an earlier checkpoint. An entry holds its time range, its step range, the seconds of
each phase, the CPU seconds of process 0, and the exit code. Steps that a later attempt repeats
count as lost, as does the time between attempts. The term is Google's (ML Productivity Goodput,
2024).
"""

import contextlib
import json
import pathlib
import resource
import time
from collections.abc import Sequence

from vit_scale.storage import files

FILE = "goodput.json"
TRAIN = "train"  # the phase that is productive


def cpu_seconds() -> float:
    """Return the CPU time of this process, and of its child processes that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


class Ledger:
    """The account of this attempt, kept in the run's file by process 0."""

    def __init__(self, run: pathlib.Path, clock=time.time, cpu_clock=cpu_seconds):
        self._file, self._clock, self._cpu_clock = run / FILE, clock, cpu_clock
        self._attempts = read(run)
        self._begin(0)

    def _begin(self, step: int) -> None:
        now, self._cpu_began = self._clock(), self._cpu_clock()
        times = {"began": now, "seen": now, "cpu": 0.0, "seconds": {}}
        self._attempts.append({**times, "start": step, "step": step, "code": None})

    def begin_at(self, step: int) -> None:
        """Set the first step of this attempt; if it has made steps already, begin a new attempt."""
        this = self._attempts[-1]
        if this["step"] > this["start"]:
            self._begin(step)
        else:
            this["start"] = this["step"] = step

    def add(self, phase: str, seconds: float, step: int) -> None:
        """Add `seconds` spent in `phase`, up to `step`."""
        this = self._attempts[-1]
        this["seconds"][phase] = this["seconds"].get(phase, 0.0) + seconds
        this["seen"], this["step"] = self._clock(), max(this["step"], step)
        this["cpu"] = self._cpu_clock() - self._cpu_began

    def end(self, code: int) -> None:
        """Record the exit code."""
        self._attempts[-1]["code"] = code
        self.write()

    def write(self) -> None:
        """Write the file; ignore storage errors, since the next write includes everything."""
        with contextlib.suppress(OSError):
            files.write(self._file, json.dumps({"attempts": self._attempts}).encode())


def read(run: pathlib.Path) -> list[dict]:
    """Return a run's attempts, oldest first; none where the file is missing or damaged."""
    try:
        return list(json.loads((run / FILE).read_text())["attempts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def summarise(attempts: Sequence[dict]) -> dict:
    """Divide the wall time, from the first attempt's start to the last's end, by its use.

    Returns {"goodput": productive / wall, "wall": seconds, "productive": seconds, "attempts": n,
    "recomputed_steps": n, "cpu": CPU seconds, "lost": {"recomputed steps": seconds, "between
    attempts": seconds, "compile": seconds, ...}}. "lost" has every phase but training, and no entry
    that is 0; "cpu" is None where an attempt did not record it.
    """
    wall = attempts[-1]["seen"] - attempts[0]["began"]
    lost: dict[str, float] = {}
    productive, recomputed = 0.0, 0

    def lose(what: str, seconds: float) -> None:
        lost[what] = lost.get(what, 0.0) + seconds

    for i, this in enumerate(attempts):
        later = min((a["start"] for a in attempts[i + 1 :]), default=this["step"])
        steps = this["step"] - this["start"]
        again = max(0, this["step"] - max(later, this["start"]))
        trained = this["seconds"].get(TRAIN, 0.0)
        wasted = trained * again / steps if steps else trained
        recomputed += again
        productive += trained - wasted
        lose("recomputed steps", wasted)
        for phase, seconds in this["seconds"].items():
            if phase != TRAIN:
                lose(phase, seconds)
        if i:
            lose("between attempts", max(0.0, this["began"] - attempts[i - 1]["seen"]))
    cpu = [this.get("cpu") for this in attempts]
    return {
        "goodput": productive / wall if wall > 0 else 0.0,
        "wall": wall,
        "productive": productive,
        "attempts": len(attempts),
        "recomputed_steps": recomputed,
        "cpu": sum(cpu) if None not in cpu else None,
        "lost": {what: seconds for what, seconds in sorted(lost.items()) if seconds > 0},
    }


def format_summary(summary: dict) -> str:
    """Format a summary as two lines for people."""
    lost = sorted(summary["lost"].items(), key=lambda pair: -pair[1])
    parts = ", ".join(f"{what} {duration(seconds)}" for what, seconds in lost)
    attempts = f"{summary['attempts']} attempt{'s' if summary['attempts'] > 1 else ''}"
    return (
        f"goodput {100 * summary['goodput']:.1f} % of {duration(summary['wall'])} in {attempts}, "
        f"{summary['recomputed_steps']:,} steps recomputed\nlost: {parts or 'nothing'}"
    )


def duration(seconds: float) -> str:
    """Format seconds as "2 h 5 min", "3 min 20 s" or "4.1 s"."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
