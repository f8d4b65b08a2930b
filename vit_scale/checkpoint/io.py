"""One checkpoint's folder: whether it is finished, what is in it, read and verified.

Every reading compares what came with what was written (integrity.py). What reading meets becomes
one line: damage, or storage that can't be reached, in which case nothing is damaged.
"""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator, Mapping

import jax
import orbax.checkpoint as ocp

from vit_scale.checkpoint.integrity import MANIFEST, Damaged, check_arrays, check_signed
from vit_scale.errors import RESUMABLE, STORAGE, UserError
from vit_scale.storage import paths
from vit_scale.storage.errors import one_line

FOLDER = "checkpoints"
SELECTION = "selection.json"
COMMITTED = "commit_success.txt"  # Orbax's name
# What tensorstore says where storage can't be reached or doesn't let us: nothing is damaged then.
REFUSALS = (
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
    "RESOURCE_EXHAUSTED",
)


def folders(run: pathlib.Path) -> list[int]:
    """The steps that have a folder in a run, whole or not, oldest first."""
    folder = paths.parse(run) / FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(f.name) for f in found if f.name.isdigit())


def steps(run: pathlib.Path) -> list[int]:
    """The finished steps in a run's folder, oldest first."""
    folder = paths.parse(run) / FOLDER
    return [step for step in folders(run) if _is_finished(folder / str(step))]


def _is_finished(folder: pathlib.Path) -> bool:
    """On disk a checkpoint gets its name when it is whole; in a bucket, a file that says so."""
    if paths.in_bucket(folder):
        return (folder / COMMITTED).is_file()
    return (folder / MANIFEST).is_dir()


def selection(path: pathlib.Path) -> dict:
    """What was measured of the checkpoint folder `path`; empty if nothing was."""
    file = path / SELECTION
    if not file.is_file():
        return {}
    with _damage(path):
        content = check_signed(json.loads(file.read_text()))
        if str(content["step"]) != path.name:
            raise Damaged(f"{SELECTION} is of step {content['step']}")
    return content["metrics"]


def description(path: pathlib.Path) -> dict:
    """What the checkpoint folder `path` says of itself: {"config": ..., "classes": ..., ...}."""
    return read_manifest(path)["description"]


def read_manifest(path: pathlib.Path) -> dict:
    """{"step": ..., "description": ..., "arrays": {name: fingerprint}} of a checkpoint folder."""
    with _damage(path):
        content = check_signed(_restore(path, {MANIFEST: ocp.args.JsonRestore()})[MANIFEST])
        if str(content["step"]) != path.name:
            raise Damaged(f"it is of step {content['step']}")
    return content


def read(path: pathlib.Path, target: Mapping) -> dict:
    """The named trees of the checkpoint folder `path`, shaped and placed as `target`'s leaves.

    On devices of this host: of several hosts' `Checkpoints.restore` takes care.
    """
    content, trees = read_manifest(path), read_part(path, target)
    compare(path, content, trees)
    return trees


def read_part(path: pathlib.Path, target: Mapping) -> dict:
    """What this host holds of the named trees, not compared yet."""
    with _damage(path):
        items = {name: ocp.args.StandardRestore(tree) for name, tree in target.items()}
        return _restore(path, items)


def compare(path: pathlib.Path, content: Mapping, trees: dict) -> None:
    """Raises UserError where `trees` are not what the manifest describes; on all hosts at once."""
    with _damage(path):
        check_arrays(content, trees)


def verify(path: pathlib.Path) -> int:
    """Read all of the checkpoint folder `path`; the number of its arrays.

    Raises UserError where it is damaged.
    """
    content = read_manifest(path)
    selection(path)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    written = {name.partition("/")[0] for name in content["arrays"]}
    for tree in sorted(written):  # one at a time: all may not fit
        with _damage(path), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            found = checkpointer.metadata(os.fspath(path.absolute() / tree)).item_metadata
            if found is None:
                raise Damaged(f"what {tree} says of itself can't be read")
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
                found.tree,
            )
        read(path, {tree: shapes})
    return len(content["arrays"])


def _restore(path: pathlib.Path, items: Mapping) -> dict:
    """What this host holds of some items. It waits for no other host: one may fail alone."""
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


def holds_average(path: pathlib.Path) -> bool:
    """Whether the checkpoint folder `path` has an average of the parameters."""
    return any(name.startswith("ema/") for name in read_manifest(path)["arrays"])


@contextlib.contextmanager
def _damage(path: pathlib.Path) -> Iterator[None]:
    """Turns what reading a checkpoint meets into one line; broken files raise just anything."""
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
        raise UserError(f"checkpoint {path} does not fit or is damaged: {line}") from error
