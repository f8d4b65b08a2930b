"""Layers of convolutional networks: convolution, batch and group normalisation, pooling.

Parameters and statistics are float32; `dtype` is the computation's.

Batch normalisation's running statistics are leaves `mean` and `variance` beside `scale` and `bias`,
in the one tree that is saved, averaged and loaded, but no gradient updates them. With a mask,
statistics are those of the unmasked examples of the global batch, on any mesh, and update the
running ones; without a mask the running ones are used.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from vit_scale.models.platforms import by_platform

EPSILON = 1e-5  # added to the variance
MOMENTUM = 0.9  # of the running statistics; both as He et al.'s, and torch's
PATCH_VALUES = 300_000  # of a convolution's patches that a CPU core's cache holds beside the rest
HE = nnx.initializers.he_normal()  # He et al. 2015, for ReLU
Mask = Bool[Array, "b"] | None


def convolve(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "s s i o"],
    stride: int,
    pad: tuple[int, int],
) -> Float[Array, "b h2 w2 o"]:
    """Convolve images that are padded by `pad` pixels of zeros before and after either axis.

    On a CPU the gradient with respect to the kernel is made of products of patches with the
    output's gradient: XLA's convolution for it takes several times as long.
    """

    def plain(x, kernel):
        window, padding = (stride, stride), [pad, pad]
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, window, padding, dimension_numbers=numbers)

    def backward(args, grad):
        x, kernel = args
        grad_kernel = kernel_gradient(x, grad, kernel.shape[0], stride, pad)
        return jax.vjp(plain, x, kernel)[1](grad)[0], grad_kernel.astype(kernel.dtype)

    by_patches = jax.custom_vjp(plain)
    by_patches.defvjp(lambda *args: (plain(*args), args), backward)
    return by_platform(by_patches, plain)(x, kernel)


def kernel_gradient(
    x: Float[Array, "b h w i"],
    grad: Float[Array, "b h2 w2 o"],
    side: int,
    stride: int,
    pad: tuple[int, int],
) -> Float[Array, "s s i o"]:
    """Return the gradient of a convolution's kernel, in float32, from that of its output.

    Only so many examples at a time that their patches stay in a core's cache: twice as fast as all
    at once.
    """
    shape = side, side, x.shape[-1], grad.shape[-1]

    def add(total, x, grad):
        columns = patches(x, side, stride, pad)
        product = jnp.einsum("bhwp,bhwo->po", columns, grad, preferred_element_type=jnp.float32)
        return total + product.reshape(shape)

    values = math.prod(grad.shape[1:3]) * math.prod(shape[:3])  # of an example's patches
    # `few` is the major axis, which keeps the sharding of the examples.
    few = _divisor(len(x), max(PATCH_VALUES // values, jax.device_count()))
    parts = [y.reshape(few, -1, *y.shape[1:]) for y in (x, grad)]

    def step(number, total):
        return add(total, *(y[:, number] for y in parts))

    return jax.lax.fori_loop(0, len(x) // few, step, jnp.zeros(shape))


def _divisor(number: int, most: int) -> int:
    return max(divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0)


def patches(
    x: Float[Array, "b h w i"], side: int, stride: int, pad: tuple[int, int]
) -> Float[Array, "b h2 w2 p"]:
    """Return the side x side x i values that each output pixel of a convolution sees."""
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    height, width = (x.shape[axis] - side for axis in (1, 2))
    shifts = itertools.product(range(side), repeat=2)
    return jnp.concatenate(
        [x[:, i : height + i + 1 : stride, j : width + j + 1 : stride] for i, j in shifts], axis=-1
    )


def same_padding(side: int, stride: int) -> tuple[int, int]:
    """Return TensorFlow's "SAME" padding of an axis that the stride divides: (before, after)."""
    total = max(side - stride, 0)
    return total // 2, total - total // 2


class Convolution(nnx.Module):
    """A square convolution, padded by as much before as after, to the image's size by the stride.

    nnx.Conv draws a random key for its bias, which would change all later layers' initial values.
    """

    def __init__(self, side: int, channels: tuple[int, int], cfg, rngs, stride=1, bias=False):
        self.stride, self.pad, self.dtype = stride, (side // 2,) * 2, jnp.dtype(cfg.dtype)
        self.kernel = nnx.Param(HE(rngs.params(), (side, side, *channels)))
        if bias:
            self.bias = nnx.Param(jnp.zeros(channels[1]))
        self.biased = bias

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        kernel = self.kernel[...].astype(self.dtype)
        x = convolve(x.astype(self.dtype), kernel, self.stride, self.pad)
        return x + self.bias[...].astype(self.dtype) if self.biased else x


class Epsilons(NamedTuple):
    """What keeps the scaling of kernels and of groups of channels from dividing by zero."""

    deviation: float  # added to a kernel's standard deviation
    variance: float  # to its variance
    norm: float  # to the variance of a group


class StandardizedConvolution(nnx.Module):
    """A square convolution by a kernel of mean 0 and variance 1, with "SAME" padding.

    Weight standardisation (Qiao et al. 2019, arXiv 1903.10520), in float32, of each output channel.
    """

    def __init__(
        self, side: int, channels: tuple[int, int], cfg, epsilons: Epsilons, rngs, stride=1
    ):
        self.stride, self.pad, self.epsilons = stride, same_padding(side, stride), epsilons
        self.dtype = jnp.dtype(cfg.dtype)
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (side, side, *channels)))

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        kernel = self.kernel[...]
        centred = kernel - kernel.mean((0, 1, 2))
        variance = jnp.square(centred).mean((0, 1, 2)) + self.epsilons.variance
        kernel = centred / (jnp.sqrt(variance) + self.epsilons.deviation)
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.pad)


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He 2018, arXiv 1803.08494) of 32 groups of channels, in float32."""

    groups = 32

    def __init__(self, channels: int, epsilon: float, scale: float = 1.0):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.full(channels, scale))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        grouped = x.astype(jnp.float32).reshape(*x.shape[:3], self.groups, -1)
        centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(centred).mean((1, 2, 4), keepdims=True)
        y = (centred * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


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


def max_pool_overlapping(
    x: Float[Array, "b h w c"], pad: tuple[int, int] = (0, 1)
) -> Float[Array, "b h2 w2 c"]:
    """Max-pool 3 x 3 pixels with stride 2, of images of even size.

    `pad` is the padding before and after each axis: TensorFlow's "SAME", or (1, 0) as torch's
    windows, which are centred on the even pixels.
    """
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)), constant_values=-jnp.inf)
    rows = jnp.maximum(jnp.maximum(x[:, :-1:2], x[:, 1::2]), x[:, 2::2])
    return jnp.maximum(jnp.maximum(rows[:, :, :-1:2], rows[:, :, 1::2]), rows[:, :, 2::2])


def linear(channels: tuple[int, int], cfg: ConfigDict, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(*channels, kernel_init=HE, dtype=jnp.dtype(cfg.dtype), rngs=rngs)


def numbered(modules: Iterable[nnx.Module]) -> nnx.Dict:
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})


def in_order(modules: nnx.Dict) -> Iterator:
    """Yield the values of a `numbered` dict by number; its own order is that of text: 0, 1, 10."""
    return (modules[str(i)] for i in range(len(modules)))
