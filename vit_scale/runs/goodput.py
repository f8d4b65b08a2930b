"""Goodput: the share of a run's wall time that trained it, and where the rest went.

RUN/goodput.json holds one entry for each attempt, that is each time the command was run, or went
back to an earlier checkpoint: when it began and was last seen, from which step to which, and the
seconds of each phase. Steps that a later attempt did again count as lost, and so does the time in
between. The term is Google's (ML Productivity Goodput, 2024).
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Sequence

from vit_scale.storage import files

FILE = "goodput.json"
TRAIN = "train"  # the phase that is productive


class Ledger:
    """The entry of this attempt, written whole into the run's file. Only process 0 has one."""

    def __init__(self, run: pathlib.Path, clock=time.time):
        self._file, self._clock = run / FILE, clock
        self._attempts = read(run)
        self._begin(0)

    def _begin(self, step: int) -> None:
        now = self._clock()
        self._attempts.append(
            {"began": now, "seen": now, "start": step, "step": step, "seconds": {}, "code": None}
        )

    def begin_at(self, step: int) -> None:
        """Steps begin here: of this attempt if it has made none, else of a new one."""
        this = self._attempts[-1]
        if this["step"] > this["start"]:
            self._begin(step)
        else:
            this["start"] = this["step"] = step

    def add(self, phase: str, seconds: float, step: int) -> None:
        """`seconds` more were spent in `phase`, up to `step`."""
        this = self._attempts[-1]
        this["seconds"][phase] = this["seconds"].get(phase, 0.0) + seconds
        this["seen"], this["step"] = self._clock(), max(this["step"], step)

    def end(self, code: int) -> None:
        self._attempts[-1]["code"] = code
        self.write()

    def write(self) -> None:
        """Never in the way: what can't be written is written the next time, or lost."""
        with contextlib.suppress(OSError):
            files.write(self._file, json.dumps({"attempts": self._attempts}).encode())


def read(run: pathlib.Path) -> list[dict]:
    """The attempts of a run, oldest first; none where the file is missing or damaged."""
    try:
        return list(json.loads((run / FILE).read_text())["attempts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def summarise(attempts: Sequence[dict]) -> dict:
    """Of the wall time from the first attempt's beginning to the last's end, in seconds.

    {"goodput": productive / wall, "wall": ..., "productive": ..., "attempts": ...,
     "recomputed_steps": ..., "lost": {"compile": ..., "recomputed": ..., "between attempts": ...}}
    """
    wall = attempts[-1]["seen"] - attempts[0]["began"]
    lost: dict[str, float] = {}
    productive, recomputed = 0.0, 0

    def lose(what: str, seconds: float) -> None:
        lost[what] = lost.get(what, 0.0) + seconds

    for i, this in enumerate(attempts):
        later = min((a["start"] for a in attempts[i + 1 :]), default=this["step"])
        steps, again = (
            this["step"] - this["start"],
            max(0, this["step"] - max(later, this["start"])),
        )
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
    return {
        "goodput": productive / wall if wall > 0 else 0.0,
        "wall": wall,
        "productive": productive,
        "attempts": len(attempts),
        "recomputed_steps": recomputed,
        "lost": {what: seconds for what, seconds in sorted(lost.items()) if seconds > 0},
    }


def text(summary: dict) -> str:
    """Two lines for people."""
    lost = sorted(summary["lost"].items(), key=lambda pair: -pair[1])
    parts = ", ".join(f"{what} {duration(seconds)}" for what, seconds in lost)
    attempts = f"{summary['attempts']} attempt{'s' if summary['attempts'] > 1 else ''}"
    return (
        f"goodput {100 * summary['goodput']:.1f} % of {duration(summary['wall'])} in {attempts}, "
        f"{summary['recomputed_steps']:,} steps done again\nlost: {parts or 'nothing'}"
    )


def duration(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
