"""The masked autoencoder (He et al. 2022, arXiv 2111.06377): predict hidden patches from the rest.

The encoder sees the visible patches only, a quarter of them by default, which is what makes it
fast. The decoder belongs to the objective, and is no part of the model.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from vit_scale.augment.pipeline import train_images
from vit_scale.config import image_size
from vit_scale.models.build import Model, Part, part
from vit_scale.models.decoder import Decoder
from vit_scale.models.flops import count_macs, training_flops
from vit_scale.models.layers import Size
from vit_scale.models.parameters import OBJECTIVE, of_model
from vit_scale.training.objectives.crop_encoder import plain_model
from vit_scale.training.objectives.objective import Objective, example_weights

EPSILON = 1e-6  # of the normalisation of a patch's pixels, as in MAE
MASKING = 0x6D61736B  # folded into the step's key


class Hidden(NamedTuple):
    """The patches of each image, by number in rising order."""

    visible: Int[Array, "b v"]
    hidden: Int[Array, "b m"]


def masked_autoencoder(model: Model, cfg: ConfigDict, teacher: Callable | None = None) -> Objective:
    """Predict the pixels of hidden patches, each normalised by its own mean and variance.

    The loss is the mean squared error over the pixels of the hidden patches. They are drawn for
    each example by (seed, step, position in the global batch).
    """
    size, count = image_size(cfg), hidden_patches(cfg, model)
    decoder = make_decoder(model, cfg)

    def prepare(batch, key):
        images, _ = train_images(batch, key, cfg.augment, size, classes=1)
        draw = jax.random.fold_in(key, MASKING)
        patches = draw_hidden(draw, len(images), patch_count(model), count)
        weight = example_weights(batch["mask"])
        examples = {"image": images, "mask": batch["mask"], "weight": weight}
        return examples | patches._asdict()

    def loss(params, examples, key):
        patches = Hidden(examples["visible"], examples["hidden"])
        predicted = reconstruct(model, decoder, params, examples["image"], patches, key)
        target = targets(examples["image"], patches.hidden, model.shape.patch, cfg.mae.normalise)
        losses = jnp.square(predicted - target).mean((1, 2))
        outputs = {"loss": losses, "mask": examples["mask"], "statistics": {}}
        return (losses * examples["weight"]).sum(), outputs

    return Objective(
        prepare,
        loss,
        init=lambda key: {"decoder": decoder.init(key)},
        count_flops=functools.partial(_count_flops, cfg),
    )


def make_decoder(model: Model, cfg: ConfigDict) -> Part:
    """Build the decoder of a config's `mae` block for the images of `model`."""
    m = cfg.mae
    size = Size(m.width, m.depth, m.heads, m.mlp or 4 * m.width)
    return part(lambda rngs: Decoder(cfg.model, size, model.shape, rngs, model.constrain))


def reconstruct(
    model: Model,
    decoder: Part,
    params: dict,
    images: Float[Array, "b H W 3"],
    patches: Hidden,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "b m p"]:
    """Predict the pixels of the hidden patches, which `targets` are, from the visible ones."""
    encoded = model.encode(of_model(params), images, key, patches.visible)
    return decoder.apply(params[OBJECTIVE]["decoder"], encoded.tokens, *patches)


def draw_hidden(key: PRNGKeyArray, b: int, patches: int, hidden: int) -> Hidden:
    """Draw which of its `patches` are hidden of each image.

    An image's draw depends on the key and its position in the batch.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(b))
    noise = jax.vmap(lambda k: jax.random.uniform(k, (patches,)))(keys)
    order = jnp.argsort(noise, axis=1)
    visible = patches - hidden
    return Hidden(*(jnp.sort(part, axis=1) for part in (order[:, :visible], order[:, visible:])))


def targets(
    images: Float[Array, "b H W 3"], hidden: Int[Array, "b m"], patch: int, normalise: bool
) -> Float[Array, "b m p"]:
    """Return the pixels (row, column, channel) of patches, normalised patch by patch if asked."""
    b, height, width, _ = images.shape
    pixels = images.reshape(b, height // patch, patch, width // patch, patch, 3)
    pixels = pixels.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch**2 * 3)
    pixels = jnp.take_along_axis(pixels, hidden[..., None], axis=1)
    if not normalise:
        return pixels
    mean = pixels.mean(-1, keepdims=True)
    return (pixels - mean) / jnp.sqrt(pixels.var(-1, ddof=1, keepdims=True) + EPSILON)


def patch_count(model: Model) -> int:
    """Return the number of patches of an image."""
    rows, columns = model.shape.grid
    return rows * columns


def hidden_patches(cfg: ConfigDict, model: Model) -> int:
    """Return how many patches of an image are hidden."""
    patches = patch_count(model)
    return patches - int(patches * (1 - cfg.mae.mask))


def _count_flops(cfg: ConfigDict) -> int:
    """Return the FLOPs of training on one image: encoder and decoder, forward and backward."""
    model, plain = plain_model(cfg)
    decoder, size = make_decoder(model, plain), image_size(cfg)
    hidden = hidden_patches(cfg, model)
    draw = functools.partial(draw_hidden, b=1, patches=patch_count(model), hidden=hidden)
    patches = jax.eval_shape(draw, jax.random.key(0))
    own = jax.eval_shape(decoder.init, jax.random.key(0))
    params = {**model.abstract_params, OBJECTIVE: {"decoder": own}}
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    forward = functools.partial(reconstruct, model, decoder)
    return training_flops(count_macs(forward, params, images, patches))
