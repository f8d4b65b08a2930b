"""The teacher of a distillation: the model of any run, which sees the pixels that the student sees.

Its parameters are not part of the student's checkpoints. It is identified by `distill.checksum`,
the checksum of the manifest of the teacher's checkpoint, which holds a fingerprint of every array.
The checksum is filled in when a run begins and belongs to the run's config: resuming with another
teacher is refused. The teacher's folder may move, and using the student doesn't need it.
"""

import copy
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_scale import checkpoint, config
from vit_scale.checkpoint.integrity import with_checksum as signed
from vit_scale.distributed.mesh import devices_of
from vit_scale.distributed.sharding import shard, shardings
from vit_scale.errors import UserError
from vit_scale.models.build import Model, build
from vit_scale.pretrained import load
from vit_scale.storage import paths


class Teacher(NamedTuple):
    """A teacher without its parameters."""

    logits: Callable  # (params, the student's images [b, H, W, 3]) -> logits [b, c]
    params: Any  # of jax.ShapeDtypeStruct, with shardings
    classes: tuple[str, ...]
    folder: pathlib.Path  # RUN/checkpoints/STEP
    checksum: str
    macs: int  # of the forward pass of one image


def with_checksum(cfg: ConfigDict) -> ConfigDict:
    """Return `cfg` with `distill.checksum` filled in, where the objective has a teacher.

    Raises UserError where there is no such teacher, or `distill.checksum` is of another one.
    """
    if cfg.objective != "distillation" or not cfg.distill.teacher:
        return cfg
    cfg = copy.deepcopy(cfg)
    cfg.distill.checksum = _read_manifest(cfg)[2]
    return cfg


def _read_manifest(cfg: ConfigDict) -> tuple[pathlib.Path, dict, str]:
    """Locate the teacher's checkpoint and return (its folder, the run's description, checksum)."""
    folder = load.locate_checkpoint(paths.parse(cfg.distill.teacher))
    content = checkpoint.read_manifest(folder)
    checksum = signed(content)["checksum"]
    if cfg.distill.checksum not in ("", checksum):
        raise UserError(
            f"distill.teacher={folder} has the checksum {checksum}, "
            f"not distill.checksum={cfg.distill.checksum}: it is another teacher"
        )
    return folder, content["description"], checksum


def open_teacher(cfg: ConfigDict, mesh, constrain: Callable) -> Teacher | None:
    """Open the teacher of a config, without its parameters; None for other objectives.

    `constrain` shards the tokens between blocks, as for `build`.

    Raises UserError where there is no such teacher, where it has another number of classes than the
    student, or another checksum than `distill.checksum`.
    """
    if cfg.objective != "distillation":
        return None
    folder, description, checksum = _read_manifest(cfg)
    teacher = load.with_supported_attention(
        config.from_json(description["config"]), devices_of(mesh)
    )
    if teacher.model.classes != cfg.model.classes:
        raise UserError(
            f"distill.teacher={cfg.distill.teacher} has {teacher.model.classes} classes, "
            f"the student model.classes={cfg.model.classes}"
        )
    model = build(teacher.model, config.image_size(teacher), constrain)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.abstract_params,
        shardings(model.abstract_params, mesh),
    )
    logits = make_logits(model, teacher, cfg)
    return Teacher(logits, params, tuple(description["classes"]), folder, checksum, model.macs)


def make_logits(model: Model, teacher: ConfigDict, student: ConfigDict) -> Callable:
    """Make the teacher a function of the student's augmented images.

    Pixels are normalised again where the two configs differ, and resized, as in evaluation, where
    the teacher has another image size.
    """
    ours, theirs = student.augment, teacher.augment
    size = config.image_size(teacher)

    def logits(params, images: Float[Array, "b H W 3"]) -> Float[Array, "b c"]:
        if (ours.mean, ours.std) != (theirs.mean, theirs.std):
            pixels = images * jnp.array(ours.std) + jnp.array(ours.mean)
            images = (pixels - jnp.array(theirs.mean)) / jnp.array(theirs.std)
        if images.shape[1:3] != size:
            shape = (images.shape[0], *size, 3)
            images = jax.image.resize(images, shape, "linear", antialias=True)
        return model.apply(params, images)

    return logits


def restore_params(teacher: Teacher | None) -> tuple:
    """Return what the train step takes after state and batch: (the teacher's parameters,) or ()."""
    if teacher is None:
        return ()
    params = load.load_model(teacher.folder).params
    return (shard(params, jax.tree.map(lambda leaf: leaf.sharding, teacher.params)),)


def check_teacher_classes(teacher: Teacher | None, classes: tuple[str, ...]) -> None:
    """Raise UserError where the teacher's outputs are not the student's `classes`, in order."""
    if teacher is None or teacher.classes == classes:
        return
    pairs = zip(teacher.classes, classes, strict=True)
    at = next(i for i, (one, other) in enumerate(pairs) if one != other)
    raise UserError(
        f"{teacher.folder}: class {at} of the teacher is {teacher.classes[at]!r}, "
        f"of the student {classes[at]!r}: they must be the same, in the same order"
    )
