"""Heads that self-supervised objectives train on top of a backbone, and drop afterwards."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vit_scale.models.platforms import gelu

EPSILON = 1e-5  # of batch normalisation, as in torch


class PrototypeHead(nnx.Module):
    """DINO's head (Caron et al. 2021, arXiv 2104.14294): an MLP, a unit vector, prototypes.

    The prototypes are unit vectors too: torch's weight norm, with its magnitudes fixed at 1.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        bottleneck: int,
        prototypes: int,
        layers: int,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        widths, self.exact = [width, *[hidden] * (layers - 1), bottleneck], dtype == "float32"
        small = nnx.initializers.truncated_normal(0.02)
        self.layers = nnx.Dict(
            {
                str(i): nnx.Linear(*pair, kernel_init=small, dtype=jnp.dtype(dtype), rngs=rngs)
                for i, pair in enumerate(itertools.pairwise(widths))
            }
        )
        # Uniform in +-1 / sqrt(inputs), as torch's linear layers.
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.prototypes = nnx.Linear(
            bottleneck,
            prototypes,
            use_bias=False,
            kernel_init=init,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n c"]:
        """Return the cosine of each vector with each prototype, as float32.

        The product is in float32 unless the model computes in bfloat16.
        """
        for i in range(len(self.layers)):
            x = self.layers[str(i)](x)
            x = x if i == len(self.layers) - 1 else gelu(x, approximate=False)
        kernel = unit(self.prototypes.kernel[...], axis=0)
        precision = "highest" if self.exact else None
        return jnp.matmul(unit(x.astype(jnp.float32)), kernel, precision=precision)


class Projector(nnx.Module):
    """An MLP with batch normalisation, as LeJEPA's, of the statistics of the batch it gets."""

    def __init__(self, width: int, hidden: int, out: int, layers: int, rngs: nnx.Rngs):
        widths = [width, *[hidden] * (layers - 1), out]
        pairs = list(itertools.pairwise(widths))
        # Without a bias before a normalisation, which would subtract it.
        last = len(pairs) - 1
        self.layers = nnx.Dict(
            {str(i): nnx.Linear(*p, use_bias=i == last, rngs=rngs) for i, p in enumerate(pairs)}
        )
        self.scales = nnx.Dict(
            {str(i): nnx.Param(jnp.ones(n)) for i, (_, n) in enumerate(pairs[:-1])}
        )
        self.shifts = nnx.Dict(
            {str(i): nnx.Param(jnp.zeros(n)) for i, (_, n) in enumerate(pairs[:-1])}
        )

    def __call__(self, x: Float[Array, "n d"], mask: Bool[Array, "n"]) -> Float[Array, "n e"]:
        """Project float32 vectors; those outside `mask` don't enter the statistics."""
        weight = (mask / jnp.maximum(mask.sum(), 1))[:, None]
        for i in range(len(self.layers)):
            x = self.layers[str(i)](x)
            if i < len(self.layers) - 1:
                mean = (weight * x).sum(0)
                variance = (weight * jnp.square(x - mean)).sum(0)
                x = (x - mean) * jax.lax.rsqrt(variance + EPSILON)
                x = jax.nn.relu(x * self.scales[str(i)][...] + self.shifts[str(i)][...])
        return x


def unit(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Scale to Euclidean length 1 along an axis; 0 stays 0, with a finite gradient."""
    squares = jnp.square(x).sum(axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
