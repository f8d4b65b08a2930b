"""Rollbacks: where a run that diverged went back to a checkpoint, and which batches it left out.

RUN/rollbacks.json makes the batch of a step a function of (seed, step) and that file, so a resumed
run repeats the uninterrupted one.
"""

import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vit_scale.distributed import multihost
from vit_scale.runs.json_files import read_json, write_json

FILE = "rollbacks.json"


class Rollback(NamedTuple):
    """The run diverged up to step `diverged`, and went on from the checkpoint of step `step`."""

    step: int
    diverged: int


def read(run: pathlib.Path) -> list[Rollback]:
    """Return a run's rollbacks, oldest first."""
    path = run / FILE
    return [Rollback(**entry) for entry in read_json(path)["rollbacks"]] if path.exists() else []


def agree(run: pathlib.Path) -> list[Rollback]:
    """Return a run's rollbacks as process 0 reads them; every process must call it.

    On a network file system another process may not see the file for a while.
    """
    mine = read(run) if multihost.is_first() else []
    return [Rollback(*one) for one in multihost.broadcast(mine)]


def write(run: pathlib.Path, rollbacks: Sequence[Rollback]) -> None:
    """Replace the list of a run's rollbacks."""
    write_json(run / FILE, {"rollbacks": [entry._asdict() for entry in rollbacks]})


def batch_ranges(
    rollbacks: Sequence[Rollback], start: int, stop: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (first, last, shift): steps [first, last) train with the batches of step + shift."""
    bounds = sorted({start, stop, *(r.step for r in rollbacks if start < r.step < stop)})
    for first, last in itertools.pairwise(bounds):
        yield first, last, sum(r.diverged - r.step for r in rollbacks if r.step <= first)
