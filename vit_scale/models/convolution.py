"""Layers of convolutional networks: convolution, batch normalisation, pooling.

Parameters and statistics are float32; `dtype` is the computation's.

Batch normalisation's running statistics are leaves `mean` and `variance` beside `scale` and `bias`,
in the one tree that is saved, averaged and loaded, but no gradient updates them. With a mask,
statistics are those of the unmasked examples of the global batch, on any mesh, and update the
running ones; without a mask the running ones are used.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

EPSILON = 1e-5  # added to the variance
MOMENTUM = 0.9  # of the running statistics; both as He et al.'s, and torch's
HE = nnx.initializers.he_normal()  # He et al. 2015, for ReLU
Mask = Bool[Array, "b"] | None


class Convolution(nnx.Module):
    """A square convolution, padded to keep the image's size up to the stride.

    nnx.Conv draws a random key for its bias, which would change all later layers' initial values.
    """

    def __init__(self, side: int, channels: tuple[int, int], cfg, rngs, stride=1, bias=False):
        self.stride, self.pad, self.dtype = stride, side // 2, jnp.dtype(cfg.dtype)
        self.kernel = nnx.Param(HE(rngs.params(), (side, side, *channels)))
        if bias:
            self.bias = nnx.Param(jnp.zeros(channels[1]))
        self.biased = bias

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            (self.stride, self.stride),
            [(self.pad, self.pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x + self.bias[...].astype(self.dtype) if self.biased else x


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe & Szegedy 2015), in float32 whatever `dtype` is.

    nnx.BatchNorm calls the variance `var`, and moves the running statistics to NaN when no example
    is unmasked.
    """

    def __init__(self, channels: int):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.variance = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x: Float[Array, "b h w c"], mask: Mask = None) -> Float[Array, "b h w c"]:
        wide = x.astype(jnp.float32)
        if mask is None:
            mean, variance = self.mean[...], self.variance[...]
        else:
            mean, variance = self.measure(wide, mask)
        factor = self.scale[...] * jax.lax.rsqrt(variance + EPSILON)
        return ((wide - mean) * factor + self.bias[...]).astype(x.dtype)

    def measure(self, x: Float[Array, "b h w c"], mask: Bool[Array, "b"]):
        """Return the unmasked examples' mean and biased variance; update the running ones."""
        weight = mask / (jnp.maximum(mask.sum(), 1) * x.shape[1] * x.shape[2])
        weight = weight[:, None, None, None]
        mean, square = ((weight * y).sum((0, 1, 2)) for y in (x, x * x))
        variance = jnp.maximum(square - mean * mean, 0)
        step = jnp.where(mask.any(), 1 - MOMENTUM, 0.0)
        self.mean[...] += step * (mean - self.mean[...])
        self.variance[...] += step * (variance - self.variance[...])
        return mean, variance


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Max-pool 2 x 2 pixels. Equal maxima share the gradient; nnx.max_pool gives it to one."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def linear(channels: tuple[int, int], cfg: ConfigDict, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(*channels, kernel_init=HE, dtype=jnp.dtype(cfg.dtype), rngs=rngs)
