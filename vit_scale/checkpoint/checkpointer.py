"""Checkpoints of a run, by Orbax: written asynchronously, the newest and the best kept.

A checkpoint is the parameters, their average if there is one, the optimizer's state, and a manifest
(integrity.py): the resolved config, the class names, and the fingerprint of every array. With the
step, which is its folder's name, that is all there is to remember. All of it appears at once, when
it is whole. It is read back onto any devices, and never without being verified (folder.py);
parameters alone can be read without the optimizer that made them.

What was measured of a checkpoint comes later, and lies beside its arrays in `selection.json`.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from vit_scale.checkpoint.integrity import MANIFEST, manifest, signed
from vit_scale.checkpoint.io import (
    FOLDER,
    SELECTION,
    compare,
    folders,
    read_manifest,
    read_part,
    selection,
    steps,
)
from vit_scale.distributed import multihost
from vit_scale.errors import RESUMABLE, UserError
from vit_scale.storage import files, paths
from vit_scale.storage.errors import user_errors

ASIDE = "damaged"  # the folder of a run in which damaged checkpoints are kept
TREES = ("params", "ema", "opt_state")


def score(metrics: Mapping[str, float] | None) -> float:
    """What "best" means: accuracy on the selection split, higher is better.

    NaN, and nothing measured, are the worst: a NaN would hide the true best.
    """
    value = (metrics or {}).get("accuracy", -math.inf)
    return -math.inf if math.isnan(value) else value


class Checkpoints:
    """The `checkpoints` folder of a run; a context manager that waits for what is being written.

    `keep` newest checkpoints stay, and the best one. Raises UserError where the disk refuses.
    """

    def __init__(self, run: pathlib.Path, keep: int = 2):
        self.run = paths.parse(run).absolute()
        self.folder = self.run / FOLDER
        self._metrics: dict[int, dict] = {}
        self._unreadable: set[int] = set()  # steps of which nobody knows whether they are the best
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(self, max(keep, 1)),
            save_decision_policy=managers.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        with _disk_errors(self.folder):
            self._manager = _Manager(os.fspath(self.folder), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        with _disk_errors(self.folder):
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest finished step."""
        return multihost.agree(self._manager.latest_step())

    @property
    def ranked(self) -> list[int]:
        """The steps that were measured, the highest accuracy on the selection split first."""
        steps = [s for s in self._manager.all_steps() if self.metrics(s)]
        return multihost.agree(sorted(steps, key=self._rank, reverse=True))

    @property
    def best(self) -> int | None:
        """The first of `ranked`."""
        return next(iter(self.ranked), None)

    def _rank(self, step: int) -> tuple[float, int]:
        return score(self.metrics(step)), step

    def metrics(self, step: int) -> dict:
        """What was measured at this step; empty if nothing was.

        A damaged file is named, and counts as nothing: it must not end a run that doesn't need it.
        Raises UserError where storage can't be read.
        """
        if step not in self._metrics:
            try:
                self._metrics[step] = selection(self.folder / str(step))
            except UserError as error:
                if error.code == RESUMABLE:
                    raise
                self._unreadable.add(step)
                print(f"vit-scale: {error}; it can't be the best", file=sys.stderr, flush=True)
                self._metrics[step] = {}
        return self._metrics[step]

    def save(self, step: int, trees: Mapping, description: dict) -> None:
        """Start writing a checkpoint of {"params": ..., "opt_state": ..., "ema": ... or None}."""
        given = {name: trees[name] for name in TREES if trees[name] is not None}
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in given.items()}
        items[MANIFEST] = ocp.args.JsonSave(manifest(step, description, given))
        self._check_workdir()
        with _disk_errors(self.folder):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write what was measured of the checkpoint of `step`, once that is on disk."""
        self.wait()
        with multihost.together():
            if multihost.is_first():
                text = json.dumps(signed({"step": step, "metrics": dict(metrics)}))
                with _disk_errors(self.folder):
                    files.write(self.folder / str(step) / SELECTION, text.encode())
        self._metrics[step] = dict(metrics)

    def restore(self, step: int, target: Mapping) -> dict:
        """The trees of a step, those that `target` has, shaped and placed as its leaves.

        The leaves are ShapeDtypeStructs with shardings. Raises UserError, on all hosts, for a
        checkpoint of another model and for a damaged one.
        """
        path = self.folder / str(step)
        wanted = {name: target[name] for name in TREES if target[name] is not None}
        with multihost.together():  # one that can't read leaves no other comparing
            content, trees = read_manifest(path), read_part(path, wanted)
        compare(path, content, trees)
        return trees

    def recover(self, target: Mapping, order: list[int] | None = None) -> tuple[int, dict] | None:
        """The first step of `order` that is whole, and its trees; None if `order` is empty.

        Unless it is given, `order` is that of time, the newest first. Those before it that are
        damaged are named, and moved to the run's folder `damaged`: once a whole one is found, for
        without one nothing is touched. Raises UserError then, and where storage can't be read.
        """
        if order is None:
            # In a bucket one that was never finished has its name as well: Orbax removes it.
            listed = steps if paths.in_bucket(self.run) else folders
            order = multihost.agree(sorted(listed(self.run), reverse=True))
        damage = {}
        for step in order:
            try:
                with multihost.together():
                    selection(self.folder / str(step))
                trees = self.restore(step, target)
            except UserError as error:
                if error.code == RESUMABLE:
                    raise
                damage[step] = str(error)
                continue
            self._set_aside(damage)
            return step, trees
        if damage:
            raise UserError(
                f"no checkpoint of {self.run} can be used ({'; '.join(damage.values())}); repair "
                f"them, or give another --workdir, or delete {self.folder} to start over"
            )
        return None

    def _set_aside(self, damage: Mapping[int, str]) -> None:
        with multihost.together():
            for step, line in damage.items() if multihost.is_first() else ():
                place = unused(self.run / ASIDE / str(step))
                with _disk_errors(self.folder):
                    files.move_folder(self.folder / str(step), place)
                print(f"vit-scale: {line}; moved to {place}", file=sys.stderr, flush=True)
        if damage:
            self._metrics.clear()
            self._unreadable.clear()
            self._manager.reload()

    def check(self) -> None:
        """Raise what a save in the background met, as UserError."""
        with _disk_errors(self.folder):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Return once everything is on disk."""
        with _disk_errors(self.folder):
            self._manager.wait_until_finished()

    def _check_workdir(self) -> None:
        """Orbax would make a deleted folder again, and write half a run."""
        with multihost.together():
            if multihost.is_first() and not paths.in_bucket(self.run) and not self.run.is_dir():
                raise UserError(
                    f"workdir {self.run} was deleted while training in it; run the same command "
                    "again to begin anew",
                    RESUMABLE,
                )


class _Manager(ocp.CheckpointManager):
    """Orbax's, which does not ask jax whether this machine is about to be taken away.

    jax answers yes at one number only, one after the highest it was asked with: preemption.py
    counts its questions, and Orbax's, with the step, would move the answer to where nobody asks.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class _Kept(managers.PreservationPolicy):
    """The newest, and the best by what `record` wrote, which Orbax knows nothing of.

    What can't be read of a checkpoint says nothing about it: it stays.
    """

    def __init__(self, checkpoints: Checkpoints, newest: int):
        self.checkpoints, self.newest = checkpoints, newest

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [info.step for info in checkpoints]
        measured = [step for step in steps[:-1] if self.checkpoints.metrics(step)]
        kept = {*steps[-self.newest :], *self.checkpoints._unreadable}
        if measured:
            kept.add(max(measured, key=self.checkpoints._rank))
        return [step in kept for step in steps]


def unused(place: pathlib.Path) -> pathlib.Path:
    """`place`, or with a number after its name where there is one already."""
    names = [place.name, *(f"{place.name}-{i}" for i in range(1, 1000))]
    return next(p for p in (place.with_name(name) for name in names) if not p.exists())


def _disk_errors(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    return user_errors(
        f"cannot write or read {folder}",
        "free space or repair it, and rerun the same command to resume: the checkpoints before "
        "this one are untouched",
        RESUMABLE,
        quoted=True,
    )
