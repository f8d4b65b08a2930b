"""Apply operations, such as a policy's, to each image of a batch, one image after another.

An image runs only the operations that were drawn for it. Under `vmap` it would run all of them, and
RandAugment would take as long as the model.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from vit_scale.augment import colour, policies, warp
from vit_scale.augment.policies import Policy
from vit_scale.distributed.sharding import BATCH


class Operand(NamedTuple):
    """What an operation needs besides the image."""

    argument: Float[Array, ""]
    numbers: Float[Array, "2"]  # drawn from [0, 1)
    policy: Policy

    @property
    def cubic(self) -> Array | bool | None:
        """How to interpolate, as warp.py has it."""
        choices = {"nearest": None, "bilinear": False, "bicubic": True}
        return choices.get(self.policy.interpolation, self.numbers[0] < 0.5)


def _shear(image: UInt8[Array, "3 h w"], x: Operand, slide: Callable, offset: float):
    """Move each row or column of pixels by argument * (its number + offset)."""
    lines = image.shape[1 if slide is warp.slide_rows else 2]
    return slide(image, x.argument * (jnp.arange(lines) + offset), x.policy.fill, x.cubic)


def _translate(image: UInt8[Array, "3 h w"], x: Operand, slide: Callable):
    return slide(image, x.argument[None], x.policy.fill, x.cubic)


# TensorFlow shears about the centre of the first pixel, Pillow about its corner.
OPERATIONS: dict[str, Callable] = {
    "identity": lambda image, x: image,
    "autocontrast": lambda image, x: colour.autocontrast(image),
    "equalize": lambda image, x: colour.equalize(image),
    "invert": lambda image, x: colour.invert(image),
    "posterize": lambda image, x: colour.posterize(image, x.argument),
    "solarize": lambda image, x: colour.solarize(image, x.argument),
    "solarize_add": lambda image, x: colour.solarize_add(image, x.argument),
    "brightness": lambda image, x: colour.brightness(image, x.argument),
    "colour": lambda image, x: colour.colour(image, x.argument),
    "contrast": lambda image, x: colour.contrast(image, x.argument),
    "sharpness": lambda image, x: colour.sharpness(image, x.argument),
    "hue": lambda image, x: colour.hue(image, x.argument),
    "grey": lambda image, x: colour.grey(image),
    "blur": lambda image, x: colour.blur(image, x.argument),
    "cutout": lambda image, x: colour.cutout(image, x.argument, x.numbers),
    "colour_tf": lambda image, x: colour.colour_tf(image, x.argument),
    "contrast_tf": lambda image, x: colour.contrast_tf(image, x.argument),
    "sharpness_tf": lambda image, x: colour.sharpness_tf(image, x.argument),
    "rotate": lambda image, x: warp.rotate(image, x.argument, x.policy.fill, x.cubic),
    "shear_x": lambda image, x: _shear(image, x, warp.slide_rows, 0.5),
    "shear_y": lambda image, x: _shear(image, x, warp.slide_columns, 0.5),
    "shear_x_tf": lambda image, x: _shear(image, x, warp.slide_rows, 0.0),
    "shear_y_tf": lambda image, x: _shear(image, x, warp.slide_columns, 0.0),
    "translate_x": lambda image, x: _translate(image, x, warp.slide_rows),
    "translate_y": lambda image, x: _translate(image, x, warp.slide_columns),
}


def draw_operations(key: PRNGKeyArray, b: int, made: list[Policy]) -> list[dict[str, Array]]:
    """Draw each policy's operations for `b` images: of policies.draw, arrays [b, layers].

    An image's draws depend on the key and its position in the batch.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(b))
    drawn = []
    for number, policy in enumerate(made):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        drawn.append(jax.vmap(functools.partial(policies.draw, policy))(own))
    return drawn


def apply_operations(
    images: UInt8[Array, "b h w 3"], drawn: list[dict[str, Array]], made: list[Policy]
) -> UInt8[Array, "b h w 3"]:
    """Apply the operations of `draw_operations`, each device to its own images.

    The devices are those of the mesh in context (jax.sharding.use_abstract_mesh), if there is one.
    """

    def each(planes: UInt8[Array, "b 3 h w"], drawn: list) -> UInt8[Array, "b 3 h w"]:
        return jax.lax.map(lambda x: _apply(x[0], x[1], made), (planes, drawn))

    if not jax.sharding.get_abstract_mesh().empty:
        each = jax.shard_map(each, in_specs=(BATCH, BATCH), out_specs=BATCH, check_vma=False)
    return each(images.transpose(0, 3, 1, 2), drawn).transpose(0, 2, 3, 1)


def _apply(
    image: UInt8[Array, "3 h w"], drawn: list[dict[str, Array]], made: list[Policy]
) -> UInt8[Array, "3 h w"]:
    for policy, layers in zip(made, drawn, strict=True):
        image, _ = jax.lax.scan(functools.partial(_layer, policy), image, layers)
    return image


def _layer(policy: Policy, image: UInt8[Array, "3 h w"], x: dict) -> tuple[Array, None]:
    operand = Operand(x["argument"], x["numbers"], policy)
    branches = [
        lambda image, apply=OPERATIONS[argument.operation]: apply(image, operand)
        for argument in policy.arguments
    ]

    def apply(image: UInt8[Array, "3 h w"]) -> UInt8[Array, "3 h w"]:
        return jax.lax.switch(x["operation"], branches, image)

    if policy.skips:
        return jax.lax.cond(x["operation"] < 0, lambda image: image, apply, image), None
    return apply(image), None
