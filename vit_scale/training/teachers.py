"""The teacher of a distillation: the model of any run, which sees what the student sees.

Its parameters are no part of the student's checkpoints. What identifies it is: `distill.checksum`,
of the manifest of the teacher's checkpoint, which holds the fingerprint of every array
(integrity.py). It is filled in when a run begins, and belongs to the run's config: resumed with
another teacher, the run is refused. Where the teacher lies may change, and whoever uses the student
doesn't need it.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_scale import checkpoint, config
from vit_scale.checkpoint.integrity import with_checksum
from vit_scale.distributed.mesh import devices_of
from vit_scale.distributed.sharding import shard, shardings
from vit_scale.errors import UserError
from vit_scale.models.build import Model, build
from vit_scale.pretrained import load as weights
from vit_scale.storage import paths

OBJECTIVE = "distillation"


class Teacher(NamedTuple):
    logits: Callable  # (params, the student's images [b, H, W, 3]) -> logits [b, c]
    params: Any  # of jax.ShapeDtypeStruct, with shardings
    classes: tuple[str, ...]
    folder: pathlib.Path  # RUN/checkpoints/STEP
    checksum: str


def find(cfg: ConfigDict, mesh, put: Callable) -> Teacher | None:
    """The teacher of a config, without its parameters; None where the objective has none.

    `put` is `build`'s `place`. Raises UserError where there is none to be found, where it has
    another number of classes than the student, or is not the one of `distill.checksum`.
    """
    source = cfg.distill.teacher
    if cfg.objective != OBJECTIVE:
        if source:
            raise UserError(
                f"distill.teacher={source} has nothing to teach: objective={cfg.objective}, "
                f"not {OBJECTIVE}"
            )
        return None
    if not source:
        raise UserError(f"objective={OBJECTIVE} needs --config.distill.teacher=RUN")
    folder = weights.locate_checkpoint(paths.parse(source))
    content = checkpoint.read_manifest(folder)
    checksum, about = with_checksum(content)["checksum"], content["description"]
    if cfg.distill.checksum not in ("", checksum):
        raise UserError(
            f"distill.teacher={folder} has the checksum {checksum}, "
            f"not distill.checksum={cfg.distill.checksum}: it is another teacher"
        )
    given = weights.with_supported_attention(config.from_json(about["config"]), devices_of(mesh))
    if given.model.classes != cfg.model.classes:
        raise UserError(
            f"distill.teacher={source} has {given.model.classes} classes, "
            f"the student model.classes={cfg.model.classes}"
        )
    model = build(given.model, config.image_size(given), put)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh),
    )
    return Teacher(logits_of(model, given, cfg), params, tuple(about["classes"]), folder, checksum)


def logits_of(model: Model, teacher: ConfigDict, student: ConfigDict) -> Callable:
    """The teacher as a function of the student's augmented images, in its own normalisation.

    Where it sees another size, the same pixels are resized as they are for its evaluation.
    """
    given, wanted = student.augment, teacher.augment
    size = config.image_size(teacher)

    def logits(params, images: Float[Array, "b H W 3"]) -> Float[Array, "b c"]:
        if (given.mean, given.std) != (wanted.mean, wanted.std):
            pixels = images * jnp.array(given.std) + jnp.array(given.mean)
            images = (pixels - jnp.array(wanted.mean)) / jnp.array(wanted.std)
        if images.shape[1:3] != size:
            shape = (images.shape[0], *size, 3)
            images = jax.image.resize(images, shape, "linear", antialias=True)
        return model.apply(params, images)

    return logits


def load(teacher: Teacher | None) -> tuple:
    """What a training step is given beside state and batch: the teacher's parameters, if any."""
    if teacher is None:
        return ()
    params = weights.load_model(teacher.folder).params
    return (shard(params, jax.tree.map(lambda leaf: leaf.sharding, teacher.params)),)


def check_classes(teacher: Teacher | None, classes: tuple[str, ...]) -> None:
    """Raises UserError where the teacher's outputs are not the student's `classes`, in order."""
    if teacher is None or teacher.classes == classes:
        return
    pairs = zip(teacher.classes, classes, strict=True)
    at = next(i for i, (one, other) in enumerate(pairs) if one != other)
    raise UserError(
        f"{teacher.folder}: class {at} of the teacher is {teacher.classes[at]!r}, "
        f"of the student {classes[at]!r}: they must be the same, in the same order"
    )
