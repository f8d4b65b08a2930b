"""What happens to a run whose loss or gradient is not finite: skipped, taken back, or ended.

A step that meets a NaN or an infinity updates nothing (program.py) and is counted here. After more
of them in a row than `divergence.patience`, the parameters themselves are taken to be spoilt: the
run goes back to its last checkpoint, and trains on with the batches after those. What was left out
is written in RUN/rollbacks.json, so that a batch is still a function of (seed, step) and that file,
and a resumed run repeats the undisturbed one (law 1). While steps are skipped nothing is saved, so
a checkpoint is never of a run that is going wrong.
"""

import collections
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vit_scale.errors import DIVERGED, UserError
from vit_scale.runs.run_folder import read_json, write_json

FILE = "rollbacks.json"
BEHIND = 2  # steps that the device may be ahead of the question how they went


class Rollback(NamedTuple):
    """The run diverged up to step `diverged`, and went on from the checkpoint of step `step`."""

    step: int
    diverged: int


class Diverged(Exception):
    """Too many steps in a row were not finite, the last of them `step`."""

    def __init__(self, step: int, count: int):
        super().__init__(f"{count} steps in a row were not finite, the last of them {step}")
        self.step = step


class Guard:
    """Counts the steps in a row that were not finite, a little behind the device."""

    def __init__(self, cfg: ConfigDict):
        self._cfg, self._count = cfg, 0
        self._pending: collections.deque = collections.deque()

    def __call__(self, step: int, nonfinite) -> None:
        """Take the flag of `step`, on the device. Raises Diverged, for an earlier step."""
        if self._cfg.skip:
            self._pending.append((step, nonfinite))
            self._settle(BEHIND)

    def is_sound(self) -> bool:
        """Whether the last step was finite; waits for it. Raises Diverged."""
        self._settle(0)
        return self._count == 0

    def _settle(self, behind: int) -> None:
        while len(self._pending) > behind:
            step, flag = self._pending.popleft()
            self._count = self._count + 1 if np.asarray(flag) else 0
            if self._count > self._cfg.patience:
                raise Diverged(step, self._count)


def read(run: pathlib.Path) -> list[Rollback]:
    """The rollbacks of a run, in their order."""
    path = run / FILE
    return [Rollback(**entry) for entry in read_json(path)["rollbacks"]] if path.exists() else []


def write(run: pathlib.Path, rollbacks: Sequence[Rollback]) -> None:
    write_json(run / FILE, {"rollbacks": [entry._asdict() for entry in rollbacks]})


def parts(rollbacks: Sequence[Rollback], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, shift): the steps [first, last) train with the batches of step + shift."""
    turns = sorted({start, stop, *(r.step for r in rollbacks if start < r.step < stop)})
    for first, last in itertools.pairwise(turns):
        yield first, last, sum(r.diverged - r.step for r in rollbacks if r.step <= first)


def give_up(error: Diverged, rollbacks: Sequence[Rollback]) -> UserError:
    """The end of a run that diverges again and again."""
    before = ", ".join(f"step {r.diverged} (back to {r.step})" for r in rollbacks)
    return UserError(
        f"diverged: {error}" + (f", after rollbacks at {before}" if before else "") + "; try a "
        "lower optim.lr, a longer optim.warmup or optim.clip=1, in another --workdir",
        DIVERGED,
    )
