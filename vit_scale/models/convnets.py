"""Convolutional networks for 32 px images, as baselines for ViTs.

    cnn                   (conv, conv, pool, norm) three times, then two dense layers; 5.9M
                          parameters
    resnet20, resnet56    He et al. 2016 (arXiv 1512.03385), section 4.2: 16, 32 and 64 channels,
                          shortcuts without parameters
    resnet18              table 1 of that paper with a 3x3 stem and no pooling, the usual variant
                          for 32 px and the one that papers on small ViTs compare with

The layers, and batch normalisation's statistics, are in convolution.py; the stems of hybrids in
stems.py.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_scale.errors import UserError
from vit_scale.models.convolution import (
    BatchNorm,
    Convolution,
    Mask,
    in_order,
    linear,
    max_pool,
    numbered,
)
from vit_scale.models.layers import new_head


@dataclasses.dataclass(frozen=True)
class CNNSize:
    """The CNN's sizes: channels of the first convolution, and width of the first dense layer."""

    width: int
    mlp: int
    stride: ClassVar[int] = 8  # pixels of the image per pixel of the last feature map


@dataclasses.dataclass(frozen=True)
class ResNetSize:
    """A ResNet's sizes; `depth` counts layers: 2 per block, the first convolution, and the head."""

    width: int
    depth: int
    stages: int
    projection: bool  # shortcuts to more channels: 1x1 convolutions (option B), else zeros (A)

    @property
    def blocks(self) -> int:
        """Residual blocks per stage."""
        return (self.depth - 2) // (2 * self.stages)

    @property
    def stride(self) -> int:
        """Pixels of the image per pixel of the last feature map."""
        return 2 ** (self.stages - 1)

    @property
    def channels(self) -> int:
        return self.width * self.stride


RESNET20 = ResNetSize(16, 20, 3, projection=False)
SIZES: dict[str, CNNSize | ResNetSize] = {
    "cnn": CNNSize(32, 1024),
    "resnet20": RESNET20,
    "resnet56": ResNetSize(16, 56, 3, projection=False),
    "resnet18": ResNetSize(64, 18, 4, projection=True),
}
FIELDS = ("width", "depth", "mlp")  # of a `model` block; override those of a size


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size that a `model` block resolves to."""

    size: CNNSize | ResNetSize
    tokens: ClassVar[int] = 0


def shape(cfg: ConfigDict, image: tuple[int, int]) -> Shape:
    """Resolve `cfg.variant`, one of SIZES, and its overrides.

    Raises UserError for values that do not fit together or to images of (height, width) pixels.
    """
    size, name = SIZES[cfg.variant], cfg.variant
    fields = {field.name for field in dataclasses.fields(size)}
    for field in FIELDS:
        if cfg[field] is not None:
            if field not in fields:
                raise UserError(f"model.{field}={cfg[field]} does not apply to {name}: remove it")
            size = dataclasses.replace(size, **{field: cfg[field]})
    if min(size.width, cfg.classes) < 1 or (isinstance(size, CNNSize) and size.mlp < 2):
        raise UserError(
            f"{name} with {size} and model.classes={cfg.classes} is too small: width and classes "
            "must be at least 1, mlp at least 2"
        )
    _check_depth(size)
    for axis, pixels in zip(("height", "width"), image, strict=True):
        if pixels < size.stride or pixels % size.stride:
            raise UserError(
                f"image {axis} {pixels} is not divisible by {size.stride}, the stride of {name}"
            )
    return Shape(size)


def _check_depth(size: CNNSize | ResNetSize) -> None:
    if isinstance(size, ResNetSize) and (
        size.blocks < 1 or size.depth != 2 * size.stages * size.blocks + 2
    ):
        raise UserError(
            f"model.depth={size.depth} must be {2 * size.stages} n + 2: {size.stages} stages of "
            "n blocks"
        )


# Shared parts


class Classifier(nnx.Module):
    """Map images to float32 class logits; `constrain` is applied to the feature maps in between."""

    head: nnx.Linear

    def __call__(
        self, images: Float[Array, "b H W 3"], key: Array | None = None, mask: Mask = None
    ) -> Float[Array, "b c"]:
        return self.head(self.pooled(images, mask))

    def pooled(self, images: Float[Array, "b H W 3"], mask: Mask = None) -> Float[Array, "b d"]:
        """Return what the head reads, in float32."""
        raise NotImplementedError

    def heads(self, images, key: Array | None, mask: Mask) -> tuple[Array, Array]:
        """Return the logits twice, as those of a ViT without a distillation token."""
        logits = self(images, key, mask)
        return logits, logits


# CNN


class CNNStage(nnx.Module):
    def __init__(self, channels: tuple[int, int, int], cfg: ConfigDict, rngs: nnx.Rngs):
        self.conv1 = Convolution(3, channels[:2], cfg, rngs, bias=True)
        self.conv2 = Convolution(3, channels[1:], cfg, rngs, bias=True)
        self.norm = BatchNorm(channels[2])

    def __call__(self, x: Float[Array, "b h w i"], mask: Mask) -> Float[Array, "b h2 w2 o"]:
        x = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))
        return self.norm(max_pool(x), mask)


class CNN(Classifier):
    def __init__(self, size: CNNSize, image, cfg: ConfigDict, rngs: nnx.Rngs, constrain: Callable):
        w, mlp, self.constrain = size.width, size.mlp, constrain
        channels = ((3, w, 2 * w), (2 * w, 4 * w, 4 * w), (4 * w, 8 * w, 8 * w))
        self.stages = numbered(CNNStage(c, cfg, rngs) for c in channels)
        pixels = image[0] * image[1] // size.stride**2
        widths = ((pixels * 8 * w, mlp), (mlp, mlp // 2))
        self.dense = numbered(linear(pair, cfg, rngs) for pair in widths)
        self.head = new_head(mlp // 2, cfg, rngs)

    def pooled(self, images, mask=None):
        x = self.constrain(images)
        for number, stage in enumerate(in_order(self.stages)):
            with jax.named_scope(f"stage_{number:02}"):
                x = self.constrain(stage(x, mask))
        x = x.reshape(x.shape[0], -1)
        for dense in in_order(self.dense):
            x = jax.nn.relu(dense(x))
        return x.astype(jnp.float32)


# ResNet


class ResNetBlock(nnx.Module):
    """The basic residual block, with the last ReLU after the sum."""

    def __init__(self, channels: tuple[int, int], stride: int, projection: bool, cfg, rngs):
        self.stride, self.more = stride, channels[1] - channels[0]
        self.conv1 = Convolution(3, channels, cfg, rngs, stride)
        self.norm1 = BatchNorm(channels[1])
        self.conv2 = Convolution(3, (channels[1], channels[1]), cfg, rngs)
        self.norm2 = BatchNorm(channels[1])
        self.projects = projection and self.more > 0
        if self.projects:
            self.shortcut_conv = Convolution(1, channels, cfg, rngs, stride)
            self.shortcut_norm = BatchNorm(channels[1])

    def __call__(self, x: Float[Array, "b h w i"], mask: Mask) -> Float[Array, "b h2 w2 o"]:
        y = jax.nn.relu(self.norm1(self.conv1(x), mask))
        y = self.norm2(self.conv2(y), mask)
        return jax.nn.relu(y + self.shortcut(x.astype(y.dtype), mask))

    def shortcut(self, x, mask: Mask):
        if self.projects:
            return self.shortcut_norm(self.shortcut_conv(x), mask)
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, [(0, 0)] * 3 + [(0, self.more)])


class ResNetFeatures(nnx.Module):
    def __init__(self, size: ResNetSize, cfg: ConfigDict, rngs: nnx.Rngs, constrain: Callable):
        self.constrain = constrain
        self.conv = Convolution(3, (3, size.width), cfg, rngs)
        self.norm = BatchNorm(size.width)
        rows = [(stage, block) for stage in range(size.stages) for block in range(size.blocks)]
        blocks = []
        for stage, block in rows:
            begins = stage > 0 and block == 0
            c = size.width * 2**stage
            channels, stride = (c // 2 if begins else c, c), 2 if begins else 1
            blocks.append(ResNetBlock(channels, stride, size.projection, cfg, rngs))
        self.layers = numbered(blocks)

    def __call__(self, images: Float[Array, "b H W 3"], mask: Mask) -> Float[Array, "b h w c"]:
        x = self.constrain(jax.nn.relu(self.norm(self.conv(images), mask)))
        for number, block in enumerate(in_order(self.layers)):
            with jax.named_scope(f"block_{number:02}"):
                x = self.constrain(block(x, mask))
        return x


class ResNet(Classifier):
    def __init__(self, size: ResNetSize, cfg: ConfigDict, rngs: nnx.Rngs, constrain: Callable):
        self.features = ResNetFeatures(size, cfg, rngs, constrain)
        self.head = new_head(size.channels, cfg, rngs)

    def pooled(self, images, mask=None):
        return self.features(images, mask).astype(jnp.float32).mean((1, 2))


def network(
    cfg: ConfigDict, image: tuple[int, int], rngs: nnx.Rngs, constrain: Callable
) -> Classifier:
    size = shape(cfg, image).size
    if isinstance(size, CNNSize):
        return CNN(size, image, cfg, rngs, constrain)
    return ResNet(size, cfg, rngs, constrain)
