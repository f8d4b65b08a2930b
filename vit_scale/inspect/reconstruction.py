"""What a masked autoencoder predicts of an image's hidden patches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.models.parameters import OBJECTIVE
from vit_scale.training.objectives.masked_autoencoder import (
    EPSILON,
    draw_hidden,
    hidden_patches,
    make_decoder,
    patch_count,
    reconstruct,
    targets,
)

SEED = 0  # of which patches are hidden
GREY = 0.5  # of hidden patches, as they are shown


class Reconstructions(NamedTuple):
    """Images to be shown, in [0, 1], and the objective's loss of each."""

    images: Float[np.ndarray, "b H W 3"]
    visible: Float[np.ndarray, "b H W 3"]  # hidden patches are grey
    predicted: Float[np.ndarray, "b H W 3"]  # visible patches are the image's
    losses: Float[np.ndarray, "b"]
    hidden: float  # share of the patches


def reconstruct_images(run: InspectedRun, images: UInt8[np.ndarray, "b h w 3"]) -> Reconstructions:
    """Predict hidden patches of images; which are hidden depends on an image's index only.

    A prediction of normalised patches is shown with the mean and variance of the true ones.
    """
    model, cfg, patch = run.model, run.cfg, run.model.shape.patch
    decoder, count = make_decoder(model, cfg), hidden_patches(cfg, model)
    patches = draw_hidden(jax.random.key(SEED), len(images), patch_count(model), count)

    @jax.jit
    def compute(params, images):
        pixels = run.pixels(images)
        predicted = reconstruct(model, decoder, params, pixels, patches)
        target = targets(pixels, patches.hidden, patch, cfg.mae.normalise)
        losses = jnp.square(predicted - target).mean((1, 2))
        if cfg.mae.normalise:
            true = targets(pixels, patches.hidden, patch, normalise=False)
            spread = jnp.sqrt(true.var(-1, ddof=1, keepdims=True) + EPSILON)
            predicted = predicted * spread + true.mean(-1, keepdims=True)
        return pixels, with_patches(pixels, patches.hidden, predicted), losses

    params = {**run.params, OBJECTIVE: run.owned}
    pixels, predicted, losses = jax.device_get(compute(params, jnp.asarray(images)))
    shown = run.denormalise(pixels)
    grey = jnp.full((*patches.hidden.shape, patch**2 * 3), GREY)
    visible = np.asarray(with_patches(jnp.asarray(shown), patches.hidden, grey))
    share = count / patch_count(model)
    return Reconstructions(shown, visible, run.denormalise(predicted), losses, share)


def with_patches(
    images: Float[Array, "b H W 3"], numbers: Array, pixels: Float[Array, "b m p"]
) -> Float[Array, "b H W 3"]:
    """Replace patches of images, by number, by pixels (row, column, channel)."""
    b, height, width, _ = images.shape
    patch = round((pixels.shape[-1] / 3) ** 0.5)
    h, w = height // patch, width // patch
    every = jnp.broadcast_to(jnp.arange(h * w), (b, h * w))
    whole = targets(images, every, patch, normalise=False)
    whole = whole.at[jnp.arange(b)[:, None], numbers].set(pixels)
    grid = whole.reshape(b, h, w, patch, patch, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, 3)
