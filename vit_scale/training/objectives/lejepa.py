"""LeJEPA (Balestriero & LeCun 2025, arXiv 2511.08544): crops agree, and vectors are Gaussian.

There is no teacher, no prototype and no schedule. A sketched test of normality keeps the vectors
from collapsing, so the whole loss has one hyper-parameter.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from ml_collections import ConfigDict

from vit_scale.augment.multi_crop import multi_crop
from vit_scale.config import image_size
from vit_scale.models.build import Model, part
from vit_scale.models.flops import training_flops
from vit_scale.models.parameters import OBJECTIVE
from vit_scale.models.projection_heads import Projector
from vit_scale.training.objectives.crop_encoder import (
    count_crop_macs,
    make_crop_encoder,
    plain_model,
)
from vit_scale.training.objectives.objective import Objective

LARGEST, KNOTS = 3.0, 17  # of the frequencies at which characteristic functions are compared


def lejepa(model: Model, cfg: ConfigDict, teacher: Callable | None = None) -> Objective:
    """Learn vectors of crops that agree, and are isotropic Gaussian over the batch.

        (1 - weight) * agreement + weight * normality

    of `cfg.lejepa.weight`; the vectors are projected by an MLP with batch normalisation over all
    crops of the global batch, also where the gradient is accumulated.
    """
    j = cfg.lejepa
    encoder = make_crop_encoder(model, cfg)
    projector = part(lambda rngs: Projector(model.shape.pooled, j.hidden, j.width, j.layers, rngs))

    def prepare(batch, key):
        return multi_crop(batch, key, cfg, image_size(cfg)) | {"mask": batch["mask"]}

    def loss(params, examples, key):
        zeros = jnp.zeros(len(examples["mask"]))
        embeddings = jnp.concatenate(encoder(params, examples, key), axis=1)
        outputs = {"loss": zeros, "mask": examples["mask"], "statistics": {}}
        return zeros.sum(), outputs | {"embeddings": embeddings}

    def coupled(params, embeddings, mask, key):
        b, v, width = embeddings.shape
        rows = jnp.repeat(mask, v)
        own = params[OBJECTIVE]["projector"]
        vectors = projector.apply(own, embeddings.reshape(b * v, width), rows).reshape(b, v, -1)
        measures = {
            "disagreement": disagreement(vectors, mask, cfg.views.globals),
            "normality": normality(vectors, mask, key, j.slices),
        }
        value = (1 - j.weight) * measures["disagreement"] + j.weight * measures["normality"]
        return value, measures

    return Objective(
        prepare,
        loss,
        coupled=coupled,
        init=lambda key: {"projector": projector.init(key)},
        count_flops=functools.partial(_count_flops, cfg),
    )


def disagreement(
    vectors: Float[Array, "b v e"], mask: Bool[Array, "b"], large: int
) -> Float[Array, ""]:
    """Return the mean squared distance, per dimension, to the mean of the `large` first crops."""
    centre = vectors[:, :large].mean(1, keepdims=True)
    per_example = jnp.square(vectors - centre).mean((1, 2))
    return (mask * per_example).sum() / jnp.maximum(mask.sum(), 1)


def normality(
    vectors: Float[Array, "b v e"], mask: Bool[Array, "b"], key: PRNGKeyArray, slices: int
) -> Float[Array, ""]:
    """Return SIGReg: how far the vectors of each crop are from an isotropic Gaussian.

    The statistic of Epps and Pulley (1983), of projections on random directions: the squared
    difference of the characteristic functions, integrated by the trapezoidal rule, times the number
    of vectors; the mean over directions and crops.
    """
    directions = jax.random.normal(key, (vectors.shape[-1], slices))
    return sliced_statistic(vectors, mask, directions)


def sliced_statistic(
    vectors: Float[Array, "b v e"], mask: Bool[Array, "b"], directions: Float[Array, "e s"]
) -> Float[Array, ""]:
    """Return `normality` along these directions, of any length."""
    directions /= jnp.linalg.norm(directions, axis=0)
    count = jnp.maximum(mask.sum(), 1)
    weight = (mask / count)[:, None, None]
    frequencies = jnp.linspace(0, LARGEST, KNOTS)
    gaussian = jnp.exp(-jnp.square(frequencies) / 2)
    ends = jnp.ones(KNOTS).at[jnp.array([0, -1])].set(0.5)
    trapezoids = 2 * LARGEST / (KNOTS - 1) * ends * gaussian  # of both signs of the frequency
    projected = jnp.einsum("bve,es->bvs", vectors, directions, precision="highest")

    def add(total, at):
        frequency, expected, share = at
        real = (weight * jnp.cos(frequency * projected)).sum(0)
        imaginary = (weight * jnp.sin(frequency * projected)).sum(0)
        error = jnp.square(real - expected) + jnp.square(imaginary)
        return total + share * error.mean(), None

    # One frequency at a time: all of them together are 17 times the memory of the projections.
    rows = (frequencies, gaussian, trapezoids)
    return count * jax.lax.scan(jax.checkpoint(add), jnp.float32(0), rows)[0]


def _count_flops(cfg: ConfigDict) -> int:
    """Return the FLOPs of training on one image: of its crops, and of the projector."""
    model, plain = plain_model(cfg)
    v, j = cfg.views, cfg.lejepa
    widths = [model.shape.pooled, *[j.hidden] * (j.layers - 1), j.width, j.slices]
    products = sum(a * b for a, b in itertools.pairwise(widths))
    crops = sum(count_crop_macs(make_crop_encoder(model, plain), plain))
    return training_flops(crops + (v.globals + v.locals) * products)
