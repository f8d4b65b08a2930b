"""Checkpoints of a run, by Orbax: written asynchronously, the newest and the best kept.

A checkpoint is the parameters, their average if there is one, the optimizer's state and a
description (the resolved config, the class names): with the step, which is its folder's name, that
is all there is to remember. It is read back onto any devices; parameters alone can be read without
the optimizer that made them.
"""

import contextlib
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from vit_scale import hosts, paths
from vit_scale.errors import UserError

FOLDER = "checkpoints"
TREES = ("params", "ema", "opt_state")
DESCRIPTION = "description"
COMMITTED = "commit_success.txt"  # Orbax's name


def score(metrics: Mapping[str, float] | None) -> float:
    """What "best" means: accuracy on the selection split, higher is better.

    NaN, and nothing measured, are the worst: a NaN would hide the true best from Orbax.
    """
    value = (metrics or {}).get("accuracy", -math.inf)
    return -math.inf if math.isnan(value) else value


class Checkpoints:
    """The `checkpoints` folder of a run; a context manager that waits for what is being written.

    `keep` newest checkpoints stay, and the best one. Raises UserError where the disk refuses.
    """

    def __init__(self, run: pathlib.Path, keep: int = 1):
        self.folder = paths.path(run).absolute() / FOLDER
        policy = managers.AnyPreservationPolicy(
            [
                managers.LatestN(max(keep, 1)),
                managers.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=score,  # without it, Orbax does not store the metrics
            best_mode="max",
            save_decision_policy=managers.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        with _disk_errors(self.folder):
            self._manager = ocp.CheckpointManager(os.fspath(self.folder), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        with _disk_errors(self.folder):
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest finished step."""
        return hosts.agree(self._manager.latest_step())

    @property
    def best(self) -> int | None:
        """The step with the highest accuracy on the selection split, if one was measured."""
        steps = [s for s in self._manager.all_steps() if self.metrics(s)]
        return hosts.agree(max(steps, key=lambda s: (score(self.metrics(s)), s), default=None))

    def metrics(self, step: int) -> dict:
        """What was measured at this step; empty if nothing was."""
        return dict(self._manager.metrics(step) or {})

    def save(self, step: int, trees: Mapping, description: dict, metrics: dict | None) -> None:
        """Start writing a checkpoint of {"params": ..., "opt_state": ..., "ema": ... or None}."""
        items = {
            name: ocp.args.StandardSave(trees[name]) for name in TREES if trees[name] is not None
        }
        items[DESCRIPTION] = ocp.args.JsonSave(description)
        with _disk_errors(self.folder):
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, target: Mapping) -> dict:
        """The trees of a step, those that `target` has, shaped and placed as its leaves.

        The leaves are ShapeDtypeStructs with shardings. Raises UserError for a checkpoint of
        another model and for a damaged one.
        """
        wanted = {name: target[name] for name in TREES if target[name] is not None}
        return read(self.folder / str(step), wanted)

    def wait(self) -> None:
        """Return once everything is on disk."""
        with _disk_errors(self.folder):
            self._manager.wait_until_finished()


def steps(run: pathlib.Path) -> list[int]:
    """The finished steps in a run's folder, oldest first."""
    folder = paths.path(run) / FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(f.name) for f in found if f.name.isdigit() and _is_finished(f))


def _is_finished(folder: pathlib.Path) -> bool:
    """On disk a checkpoint gets its name when it is whole; in a bucket, a file that says so."""
    if paths.in_bucket(folder):
        return (folder / COMMITTED).is_file()
    return (folder / DESCRIPTION).is_dir()


def description(path: pathlib.Path) -> dict:
    """What the checkpoint folder `path` says of itself: {"config": ..., "classes": ..., ...}."""
    return _read(path, {DESCRIPTION: ocp.args.JsonRestore()})[DESCRIPTION]


def read(path: pathlib.Path, target: Mapping) -> dict:
    """The named trees of the checkpoint folder `path`, shaped and placed as `target`'s leaves."""
    return _read(path, {name: ocp.args.StandardRestore(tree) for name, tree in target.items()})


def _read(path: pathlib.Path, items: Mapping) -> dict:
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                os.fspath(path.absolute()), args=ocp.args.Composite(**items)
            )
        return {name: restored[name] for name in items}
    except (ValueError, KeyError, OSError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint {path} does not fit or is damaged: {line}") from error


def holds_average(path: pathlib.Path) -> bool:
    """Whether the checkpoint folder `path` has an average of the parameters."""
    return (path / "ema").is_dir()


@contextlib.contextmanager
def _disk_errors(folder: pathlib.Path) -> Iterator[None]:
    """Turns what a full, read-only or missing disk or bucket makes of Orbax into one line."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        known = ("RESOURCE_EXHAUSTED", "No space left", paths.SCHEME)
        if paths.reason(error) or any(part in text for part in known):
            # The system's reason stands last, after what it was that could not be written.
            reason = re.search(r"([^:\"]+) \[os_error_code", text)
            text = reason[1].strip() if reason else text[:300]
            raise UserError(
                f"cannot write or read {folder}: {text}; free space or repair it, and run "
                "the same command again: the checkpoints before this one are untouched"
            ) from error
        raise
