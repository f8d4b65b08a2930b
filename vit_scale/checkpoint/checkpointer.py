"""A run's checkpoints: written asynchronously by Orbax, keeping the newest and the best.

A checkpoint is the parameters, their moving average if there is one, the optimizer's state, and a
manifest (integrity.py): the resolved config, the class names, and the fingerprint of every array.
The step is its folder's name. All of it appears at once, when it is complete. It is restored onto
any devices, and always verified (io.py); parameters can be read without the optimizer's state.

Frozen parameters may be stored once, in RUN/base/0, which has a manifest too. Checkpoints leave
them out then, and have the checksum of that manifest in their own.

The metrics of a checkpoint are measured later, and written beside its arrays in `selection.json`.
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

from vit_scale.checkpoint.integrity import MANIFEST, make_manifest, with_checksum
from vit_scale.checkpoint.io import (
    BASE,
    FOLDER,
    PARAMETERS,
    SELECTION,
    all_steps,
    finished_steps,
    read_manifest,
    read_selection,
    read_unverified,
    verified,
)
from vit_scale.distributed import multihost
from vit_scale.errors import RESUMABLE, UserError
from vit_scale.models.parameters import named, select
from vit_scale.storage import files, paths
from vit_scale.storage.errors import user_errors

DAMAGED = "damaged"  # where a run keeps checkpoints that failed verification
TREES = ("params", "ema", "opt_state", "objective")


def score(metrics: Mapping[str, Any] | None, main: str = "accuracy") -> float:
    """Return what the best checkpoint maximises: the metric `main` on the selection split.

    NaN and missing metrics rank last; a NaN would otherwise hide the best.
    """
    value = (metrics or {}).get(main, -math.inf)
    return -math.inf if math.isnan(value) else value


class Checkpoints:
    """A run's folder of checkpoints; a context manager that waits for pending writes.

    The `keep` newest checkpoints are preserved, the best one, by its metric `main`, and that of the
    step `always`. Raises UserError where storage fails.
    """

    def __init__(
        self,
        run: pathlib.Path,
        keep: int = 2,
        main: str = "accuracy",
        always: int | None = None,
    ):
        self._main, self.always = main, always
        self.run = paths.parse(run).absolute()
        self.folder = self.run / FOLDER
        self._metrics: dict[int, dict] = {}
        self._frozen: set[str] = set()  # names of the parameters in RUN/base
        self._base: dict[str, str] = {}  # what the manifests say of it
        self._unreadable: set[int] = set()  # steps whose metrics are damaged: any may be the best
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(self, max(keep, 1)),
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

    def find_latest(self) -> int | None:
        """Return the newest finished step, as process 0 sees it. Every process must call this."""
        return multihost.broadcast(self._manager.latest_step())

    def rank(self) -> list[int]:
        """Return the measured steps, the best first, as process 0 sees them.

        Every process must call this.
        """
        steps = [step for step in self._manager.all_steps() if self.read_metrics(step)]
        return multihost.broadcast(sorted(steps, key=self._score, reverse=True))

    def find_best(self) -> int | None:
        """Return the first step of `rank`."""
        return next(iter(self.rank()), None)

    def _score(self, step: int) -> tuple[float, int]:
        return score(self.read_metrics(step), self._main), step

    def read_metrics(self, step: int) -> dict:
        """Return the metrics recorded for a step; {} if there are none.

        A damaged file is reported and counts as none: it must not end a run that doesn't need it.
        Raises UserError where storage can't be read.
        """
        if step not in self._metrics:
            try:
                self._metrics[step] = read_selection(self.folder / str(step))
            except UserError as error:
                if error.code == RESUMABLE:
                    raise
                self._unreadable.add(step)
                print(
                    f"vit-scale: {error}; it cannot be selected as best",
                    file=sys.stderr,
                    flush=True,
                )
                self._metrics[step] = {}
        return self._metrics[step]

    def save(self, step: int, trees: Mapping, description: dict) -> None:
        """Start writing a checkpoint of {"params": ..., "opt_state": ..., "ema": ... or None}.

        `trees` may also have the state of an "objective".
        """
        trees = {name: trees[name] for name in TREES if trees.get(name) is not None}
        for name in PARAMETERS & trees.keys() if self._frozen else ():
            trees[name] = select(trees[name], lambda leaf: leaf not in self._frozen)
        self._check_workdir()
        with _disk_errors(self.folder):
            self._manager.save(step, args=_items(step, trees, description, **self._base))

    def store_base(self, frozen: dict, description: Mapping, new: bool) -> None:
        """Store the parameters `frozen` in RUN/base; the checkpoints to come leave them out.

        What is stored there already is kept, unless the run is `new`, without any checkpoint.
        """
        folder = self.run / BASE
        options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)
        with _disk_errors(folder), _Manager(os.fspath(folder), options=options) as manager:
            stored = multihost.broadcast(0 in manager.all_steps())
            if stored and new:
                manager.delete(0)
            if new or not stored:
                manager.save(0, args=_items(0, {"params": frozen}, description))
            manager.wait_until_finished()
        with multihost.shared_errors():
            manifest = read_manifest(folder / "0")
        self._base = {BASE: with_checksum(manifest)["checksum"]}
        self._frozen = set(named(frozen))

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of the checkpoint of `step`, after waiting until it is on disk."""
        self.wait()
        with multihost.shared_errors():
            if multihost.is_first():
                text = json.dumps(with_checksum({"step": step, "metrics": dict(metrics)}))
                with _disk_errors(self.folder):
                    files.write(self.folder / str(step) / SELECTION, text.encode())
        self._metrics[step] = dict(metrics)

    def restore(self, step: int, target: Mapping) -> dict:
        """Return the trees of a step that `target` has, with its shapes and shardings.

        Leaves of `target` are ShapeDtypeStructs. Raises UserError, on all hosts, for a checkpoint
        of a different model and for a damaged one.
        """
        path = self.folder / str(step)
        target = {name: target[name] for name in TREES if target.get(name) is not None}
        with multihost.shared_errors():  # a host that can't read must not leave others comparing
            parts = read_unverified(path, target)
        return verified(parts)

    def recover(self, target: Mapping, order: list[int] | None = None) -> tuple[int, dict] | None:
        """Return the first intact step of `order` and its trees; None if `order` is empty.

        `order` defaults to the newest first. Damaged checkpoints before the intact one are reported
        and moved to the run's folder `damaged`. Raises UserError, and moves nothing, where none is
        intact or storage can't be read.
        """
        if order is None:
            # In a bucket an unfinished checkpoint has its final name already: Orbax removes it.
            list_steps = finished_steps if paths.in_bucket(self.run) else all_steps
            order = multihost.broadcast(sorted(list_steps(self.run), reverse=True))
        damage = {}
        for step in order:
            try:
                trees = self.restore(step, target)
            except UserError as error:
                if error.code == RESUMABLE:
                    raise
                damage[step] = str(error)
                continue
            self._move_damaged(damage)
            return step, trees
        if damage:
            raise UserError(
                f"no checkpoint of {self.run} can be restored ({'; '.join(damage.values())}); "
                f"repair one, use another --workdir, or delete {self.folder} to start over"
            )
        return None

    def _move_damaged(self, damage: Mapping[int, str]) -> None:
        with multihost.shared_errors():
            for step, line in damage.items() if multihost.is_first() else ():
                target = unused_path(self.run / DAMAGED / str(step))
                with _disk_errors(self.folder):
                    files.move_folder(self.folder / str(step), target)
                print(f"vit-scale: {line}; moved to {target}", file=sys.stderr, flush=True)
        if damage:
            self._metrics.clear()
            self._unreadable.clear()
            self._manager.reload()

    def check(self) -> None:
        """Raise an error of a background save as UserError."""
        with _disk_errors(self.folder):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait until everything is on disk."""
        with _disk_errors(self.folder):
            self._manager.wait_until_finished()

    def _check_workdir(self) -> None:
        """Raise UserError for a deleted workdir, which Orbax would silently recreate."""
        with multihost.shared_errors():
            if multihost.is_first() and not paths.in_bucket(self.run) and not self.run.is_dir():
                raise UserError(
                    f"workdir {self.run} was deleted during training; rerun the same command to "
                    "start over",
                    RESUMABLE,
                )


def _items(step: int, trees: Mapping, description: Mapping, **more: str) -> ocp.args.Composite:
    """Return what Orbax writes of a checkpoint: its trees and its manifest."""
    items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items[MANIFEST] = ocp.args.JsonSave(make_manifest(step, description, trees, **more))
    return ocp.args.Composite(**items)


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, except that it does not ask jax about preemption.

    jax announces a preemption at one sync point only, the one after the highest number that any
    host has asked about. `preemption.requested` numbers its own calls; Orbax asks with the step,
    which would move the announcement to a number that `requested` never asks about.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class _NewestAndBest(managers.PreservationPolicy):
    """Preserve the newest checkpoints, that of `always`, and the best by the recorded metrics.

    A checkpoint whose metrics can't be read might be the best, so it is preserved.
    """

    def __init__(self, checkpoints: Checkpoints, newest: int):
        self.checkpoints, self.newest = checkpoints, newest

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [info.step for info in checkpoints]
        measured = [step for step in steps[:-1] if self.checkpoints.read_metrics(step)]
        preserved = {*steps[-self.newest :], *self.checkpoints._unreadable}
        preserved.add(self.checkpoints.always)
        if measured:
            preserved.add(max(measured, key=self.checkpoints._score))
        return [step in preserved for step in steps]


def unused_path(path: pathlib.Path) -> pathlib.Path:
    """Return `path`, with a number appended to its name if it exists already."""
    names = [path.name, *(f"{path.name}-{i}" for i in range(1, 1000))]
    return next(p for p in (path.with_name(name) for name in names) if not p.exists())


def _disk_errors(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    return user_errors(
        f"cannot write or read {folder}",
        "free space or repair it, and rerun the same command to resume: the checkpoints before "
        "this one are untouched",
        RESUMABLE,
        quoted=True,
    )
