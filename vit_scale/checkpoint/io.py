"""Reading of one checkpoint's folder, with verification.

Everything that is read is compared with the manifest (integrity.py). An error becomes one line that
tells damage from storage that can't be reached.
"""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from vit_scale.checkpoint.integrity import (
    MANIFEST,
    Damaged,
    check_arrays,
    check_checksum,
    with_checksum,
)
from vit_scale.errors import RESUMABLE, STORAGE, UserError
from vit_scale.models.parameters import select, unite
from vit_scale.storage import paths
from vit_scale.storage.errors import one_line

FOLDER = "checkpoints"
EXTENDED = "extended"  # folder of a run: what it was before it was extended to more steps
BASE = "base"  # folder of a run, and entry of a manifest: frozen parameters that are stored once
PARAMETERS = {"params", "ema"}  # the trees that frozen parameters are part of
SELECTION = "selection.json"
COMMITTED = "commit_success.txt"  # Orbax's name
# What tensorstore reports where storage is unreachable or access is denied: nothing is damaged.
REFUSALS = (
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
    "RESOURCE_EXHAUSTED",
)


def all_steps(run: pathlib.Path) -> list[int]:
    """List the steps that have a folder in a run, finished or not, oldest first."""
    folder = paths.parse(run) / FOLDER
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if entry.name.isdigit())


def finished_steps(run: pathlib.Path) -> list[int]:
    """List the finished steps of a run, oldest first."""
    folder = paths.parse(run) / FOLDER
    return [step for step in all_steps(run) if _is_finished(folder / str(step))]


def _is_finished(folder: pathlib.Path) -> bool:
    """Tell whether a checkpoint is complete: on disk it is renamed then, a bucket gets a marker."""
    if paths.in_bucket(folder):
        return (folder / COMMITTED).is_file()
    return (folder / MANIFEST).is_dir()


def read_selection(path: pathlib.Path) -> dict:
    """Return the metrics recorded in the checkpoint folder `path`; {} if there are none."""
    file = path / SELECTION
    if not file.is_file():
        return {}
    with _damage(path):
        content = check_checksum(json.loads(file.read_text()))
        if str(content["step"]) != path.name:
            raise Damaged(f"its {SELECTION} belongs to step {content['step']}")
    return content["metrics"]


def read_description(path: pathlib.Path) -> dict:
    """Return the description of the run in a checkpoint: {"config": ..., "classes": ..., ...}."""
    return read_manifest(path)["description"]


def read_manifest(path: pathlib.Path) -> dict:
    """Return {"step": ..., "description": ..., "arrays": {name: fingerprint}} of a checkpoint."""
    with _damage(path):
        content = check_checksum(_restore(path, {MANIFEST: ocp.args.JsonRestore()})[MANIFEST])
        if str(content["step"]) != path.name:
            raise Damaged(f"its manifest belongs to step {content['step']}")
    return content


class Part(NamedTuple):
    """Arrays as they were read from a folder, to be compared with its manifest."""

    path: pathlib.Path
    manifest: Mapping
    trees: dict
    tree: str = ""  # that the base's parameters are part of: params or ema; empty: no base


def read(path: pathlib.Path, target: Mapping) -> dict:
    """Return the trees of `target` from a checkpoint folder, with its shapes and shardings.

    Onto devices of this host only; `Checkpoints.restore` reads on several hosts.
    """
    return verified(read_unverified(path, target))


def read_unverified(path: pathlib.Path, target: Mapping) -> list[Part]:
    """Read this host's part of the trees of `target`, without comparing fingerprints.

    What the checkpoint leaves out is read from the run's base, once for each tree that has it.
    """
    manifest = read_manifest(path)
    if BASE not in manifest:
        return [Part(path, manifest, _read_trees(path, target))]
    folder, base = _read_base(path, manifest)
    frozen = {name.removeprefix("params/") for name in base["arrays"]}
    own, others = dict(target), {}
    for tree in PARAMETERS & own.keys():
        own[tree] = select(target[tree], lambda name: name not in frozen)
        others[tree] = select(target[tree], lambda name: name in frozen)
    parts = [Part(path, manifest, _read_trees(path, own))]
    for tree, shapes in others.items():
        if shapes:
            parts.append(Part(folder, base, _read_trees(folder, {"params": shapes}), tree))
    return parts


def stored_shapes(path: pathlib.Path, prefix: str, sharding: jax.sharding.Sharding) -> dict:
    """Return the shapes of the arrays in a checkpoint whose names begin with `prefix`, nested.

    `prefix` is a tree and what is in it, such as "params/objective/", and not part of the result.
    """
    shapes: dict = {}
    manifest = read_manifest(path)
    arrays = dict(manifest["arrays"])
    if BASE in manifest:
        tree = prefix.partition("/")[0]
        for name, fingerprint in _read_base(path, manifest)[1]["arrays"].items():
            arrays[name.replace("params", tree, 1)] = fingerprint
    for name, fingerprint in arrays.items():
        if name.startswith(prefix):
            dtype, _, sizes = fingerprint.partition(" ")[0].removesuffix("]").partition("[")
            leaf: Any = jax.ShapeDtypeStruct(
                tuple(int(size) for size in sizes.split(",") if size), dtype, sharding=sharding
            )
            for part in reversed(name.removeprefix(prefix).split("/")):
                leaf = {part: leaf}
            shapes = unite(shapes, leaf)
    return shapes


def verified(parts: list[Part]) -> dict:
    """Return the trees of all parts; raise UserError, on all hosts alike, for a damaged one."""
    trees: dict = {}
    for part in parts:
        with _damage(part.path):
            check_arrays(part.manifest, part.trees)
        trees = unite(trees, {part.tree: part.trees["params"]} if part.tree else part.trees)
    return trees


def _read_base(path: pathlib.Path, manifest: Mapping) -> tuple[pathlib.Path, dict]:
    """Return the folder of the frozen parameters that a checkpoint was written with; its manifest.

    Raises UserError if it is missing or another.
    """
    run = path.parent.parent
    folder = run / BASE / "0"
    if not folder.is_dir() and run.parent.name == EXTENDED:  # the longer run has them
        folder = run.parent.parent / BASE / "0"
    if not folder.is_dir():
        raise UserError(
            f"checkpoint {path} needs the frozen parameters in {folder}, which is missing: copy "
            "the run's whole folder"
        )
    base = read_manifest(folder)
    checksum = with_checksum(base)["checksum"]
    if checksum != manifest[BASE]:
        raise UserError(
            f"{folder} has the checksum {checksum}, checkpoint {path} was written with "
            f"{manifest[BASE]}: it is of another run"
        )
    return folder, base


def _read_trees(path: pathlib.Path, target: Mapping) -> dict:
    with _damage(path):
        items = {name: ocp.args.StandardRestore(tree) for name, tree in target.items()}
        return _restore(path, items)


def verify(path: pathlib.Path) -> int:
    """Read and verify the whole checkpoint folder `path`; return the number of its arrays.

    Raises UserError where it is damaged.
    """
    manifest = read_manifest(path)
    read_selection(path)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    trees = {name.partition("/")[0] for name in manifest["arrays"]}
    for tree in sorted(trees):  # one at a time: together they may not fit in memory
        with _damage(path), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            metadata = checkpointer.metadata(os.fspath(path.absolute() / tree)).item_metadata
            if metadata is None:
                raise Damaged(f"the metadata of {tree} can't be read")
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
                metadata.tree,
            )
        read(path, {tree: shapes})
    return len(manifest["arrays"])


def _restore(path: pathlib.Path, items: Mapping) -> dict:
    """Restore this host's part of `items`, without waiting for others: one host may fail alone."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"read-{me}"
    )
    with ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
        ),
        multiprocessing_options=alone,
    ) as checkpointer:
        restored = checkpointer.restore(
            os.fspath(path.absolute()), args=ocp.args.Composite(**items)
        )
    return {name: restored[name] for name in items}


def has_ema(path: pathlib.Path) -> bool:
    """Tell whether a checkpoint holds a moving average of the parameters."""
    return any(name.startswith("ema/") for name in read_manifest(path)["arrays"])


@contextlib.contextmanager
def _damage(path: pathlib.Path) -> Iterator[None]:
    """Turn errors of reading a checkpoint into one line; a damaged file may raise any type."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        line = one_line(error)
        refused = isinstance(error, OSError) and error.errno in (
            *STORAGE,
            errno.EACCES,
            errno.EPERM,
        )
        if refused or any(word in line for word in REFUSALS):
            raise UserError(f"cannot read checkpoint {path}: {line}", RESUMABLE) from error
        raise UserError(f"checkpoint {path} is damaged or of a different model: {line}") from error
