"""Convolutional networks for 32 px, to measure a ViT by, and stems for hybrids: only mathematics.

    cnn                   the slides' baseline: three times (conv, conv, pool, norm), two dense
                          layers; 5.9M parameters
    resnet20, resnet56    He et al. 2016 (arXiv 1512.03385), section 4.2: 16, 32 and 64 channels,
                          shortcuts without parameters
    resnet18              the paper's table 1 with a 3x3 stem and no pooling, as everybody trains it
                          on 32 px: what papers on small ViTs compare with

Their layers, and what becomes of batch normalisation's statistics, are in convolution.py.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_scale.errors import UserError
from vit_scale.models import flops
from vit_scale.models.convolution import BatchNorm, Convolution, Mask, halve, linear


@dataclasses.dataclass(frozen=True)
class CNNSize:
    """`width` is the first convolution's channels, `mlp` the first dense layer's width."""

    width: int
    mlp: int
    shrinks: ClassVar[int] = 8  # pixels of the image to a pixel of the last feature map

    def macs(self, image: tuple[int, int], classes: int) -> int:
        return flops.cnn_macs(image, self.width, self.mlp, classes)


@dataclasses.dataclass(frozen=True)
class ResNetSize:
    """`depth` counts layers: 2 a block, `stages` times as many blocks, the first and the head."""

    width: int
    depth: int
    stages: int
    projection: bool  # shortcuts to more channels are 1x1 convolutions (option B), or padded (A)

    @property
    def blocks(self) -> int:
        return (self.depth - 2) // (2 * self.stages)

    @property
    def shrinks(self) -> int:
        return 2 ** (self.stages - 1)

    @property
    def channels(self) -> int:
        return self.width * self.shrinks

    def feature_macs(self, image: tuple[int, int]) -> int:
        return flops.resnet_macs(image, self.width, self.blocks, self.stages, self.projection)

    def macs(self, image: tuple[int, int], classes: int) -> int:
        return self.feature_macs(image) + self.channels * classes


SIZES: dict[str, CNNSize | ResNetSize] = {
    "cnn": CNNSize(32, 1024),
    "resnet20": ResNetSize(16, 20, 3, projection=False),
    "resnet56": ResNetSize(16, 56, 3, projection=False),
    "resnet18": ResNetSize(64, 18, 4, projection=True),
}
FIELDS = ("width", "depth", "mlp")  # of a `model` block that replace a size's
R20 = ResNetSize(16, 20, 3, projection=False)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a `model` block and an image size (height, width in pixels) come to."""

    size: CNNSize | ResNetSize
    image: tuple[int, int]
    tokens: ClassVar[int] = 0

    def macs(self, classes: int) -> int:
        """Multiply-accumulates of one image's forward pass."""
        return self.size.macs(self.image, classes)


def shape(cfg: ConfigDict, image: tuple[int, int]) -> Shape:
    """Resolve `cfg.variant`, one of SIZES, and its overrides.

    Raises UserError, with the arithmetic where the numbers don't fit.
    """
    size, name = SIZES[cfg.variant], cfg.variant
    known = {field.name for field in dataclasses.fields(size)}
    for field in FIELDS:
        if cfg[field] is not None:
            if field not in known:
                raise UserError(f"model.{field}={cfg[field]} means nothing to {name}: leave it out")
            size = dataclasses.replace(size, **{field: cfg[field]})
    if min(size.width, cfg.classes) < 1 or (isinstance(size, CNNSize) and size.mlp < 2):
        raise UserError(f"{size}, {cfg.classes} classes: too small")
    check_depth(size)
    for axis, pixels in zip(("height", "width"), image, strict=True):
        if pixels < size.shrinks or pixels % size.shrinks:
            raise UserError(
                f"image {axis} {pixels} is not divisible by {size.shrinks}, by which {name} "
                "shrinks it"
            )
    return Shape(size, image)


def check_depth(size: CNNSize | ResNetSize) -> None:
    if isinstance(size, ResNetSize) and (
        size.blocks < 1 or size.depth != 2 * size.stages * size.blocks + 2
    ):
        raise UserError(
            f"model.depth={size.depth} is not {2 * size.stages} n + 2, for a ResNet of "
            f"{size.stages} stages of n blocks"
        )


# What both have


def numbered(modules: Iterable[nnx.Module]) -> nnx.Dict:
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})


def new_head(width: int, cfg: ConfigDict, rngs: nnx.Rngs) -> nnx.Linear:
    """Zero, as the ViT's: the first loss is log(classes)."""
    return nnx.Linear(width, cfg.classes, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)


class Classifier(nnx.Module):
    """Images in, float32 class logits out; `place` gets the feature maps between its parts."""

    def __call__(
        self, images: Float[Array, "b H W 3"], key: Array | None = None, mask: Mask = None
    ) -> Float[Array, "b c"]:
        raise NotImplementedError

    def heads(self, images, key: Array | None, mask: Mask) -> tuple[Array, Array]:
        """What learns from labels, and what from a teacher: the same."""
        logits = self(images, key, mask)
        return logits, logits


# The slides' CNN


class CNNStage(nnx.Module):
    def __init__(self, channels: tuple[int, int, int], cfg: ConfigDict, rngs: nnx.Rngs):
        self.conv1 = Convolution(3, channels[:2], cfg, rngs, bias=True)
        self.conv2 = Convolution(3, channels[1:], cfg, rngs, bias=True)
        self.norm = BatchNorm(channels[2])

    def __call__(self, x: Float[Array, "b h w i"], mask: Mask) -> Float[Array, "b h2 w2 o"]:
        x = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))
        return self.norm(halve(x), mask)


class CNN(Classifier):
    def __init__(self, size: CNNSize, image, cfg: ConfigDict, rngs: nnx.Rngs, place: Callable):
        w, mlp, self.place = size.width, size.mlp, place
        channels = ((3, w, 2 * w), (2 * w, 4 * w, 4 * w), (4 * w, 8 * w, 8 * w))
        self.stages = numbered(CNNStage(c, cfg, rngs) for c in channels)
        pixels = image[0] * image[1] // size.shrinks**2
        widths = ((pixels * 8 * w, mlp), (mlp, mlp // 2))
        self.dense = numbered(linear(pair, cfg, rngs) for pair in widths)
        self.head = new_head(mlp // 2, cfg, rngs)

    def __call__(self, images, key=None, mask=None):
        x = self.place(images)
        for stage in self.stages.values():
            x = self.place(stage(x, mask))
        x = x.reshape(x.shape[0], -1)
        for dense in self.dense.values():
            x = jax.nn.relu(dense(x))
        return self.head(x.astype(jnp.float32))


# ResNet


class ResNetBlock(nnx.Module):
    """The basic block, its ReLU after the sum. A stride of 2 makes twice as many channels."""

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
    def __init__(self, size: ResNetSize, cfg: ConfigDict, rngs: nnx.Rngs, place: Callable):
        self.place = place
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
        x = self.place(jax.nn.relu(self.norm(self.conv(images), mask)))
        for block in self.layers.values():
            x = self.place(block(x, mask))
        return x


class ResNet(Classifier):
    def __init__(self, size: ResNetSize, cfg: ConfigDict, rngs: nnx.Rngs, place: Callable):
        self.features = ResNetFeatures(size, cfg, rngs, place)
        self.head = new_head(size.channels, cfg, rngs)

    def __call__(self, images, key=None, mask=None):
        x = self.features(images, mask).astype(jnp.float32)
        return self.head(x.mean((1, 2)))


def network(cfg: ConfigDict, image: tuple[int, int], rngs: nnx.Rngs, place: Callable) -> Classifier:
    size = shape(cfg, image).size
    if isinstance(size, CNNSize):
        return CNN(size, image, cfg, rngs, place)
    return ResNet(size, cfg, rngs, place)


# Stems: what a hybrid has before its patches (ViT paper, section 3.1)


class ConvStem(nnx.Module):
    """3x3 convolutions of stride 2, of twice as many channels each, up to the token width.

    Xiao et al. 2021 (arXiv 2106.14881), whose last layer, a 1x1 convolution, is the embedding.
    """

    def __init__(self, patch: int, width: int, cfg: ConfigDict, rngs: nnx.Rngs):
        channels = stem_channels(patch, width)
        pairs = list(zip((3, *channels), channels, strict=False))
        self.convs = numbered(Convolution(3, pair, cfg, rngs, stride=2) for pair in pairs)
        self.norms = numbered(BatchNorm(c) for c in channels)

    def __call__(self, images: Float[Array, "b H W 3"], mask: Mask) -> Float[Array, "b h w c"]:
        x = images
        for conv, norm in zip(self.convs.values(), self.norms.values(), strict=True):
            x = jax.nn.relu(norm(conv(x), mask))
        return x


def stem_channels(patch: int, width: int) -> list[int]:
    """Of each convolution of a ConvStem that makes one pixel of `patch` x `patch`."""
    halvings = patch.bit_length() - 1
    return [width >> (halvings - 1 - i) for i in range(halvings)]


@dataclasses.dataclass(frozen=True)
class Stem:
    """`name`+SIZE/PATCH: PATCH pixels of the image to a token, `patch` of the feature map's."""

    name: str
    patch: int
    channels: int
    macs: int  # of one image's forward pass


STEMS = {"C": "a convolutional stem", "R20": "ResNet-20 without its head"}


def stem(name: str, patch: int, width: int, image: tuple[int, int]) -> Stem:
    """What stands before the patches of a hybrid. Raises UserError where `patch` does not fit."""
    if name == "R20":
        if patch % R20.shrinks:
            raise UserError(f"R20+ shrinks images by {R20.shrinks}, which does not divide {patch}")
        return Stem(name, patch // R20.shrinks, R20.channels, R20.feature_macs(image))
    halvings = patch.bit_length() - 1
    if patch < 2 or patch != 2**halvings or width % 2 ** (halvings - 1):
        raise UserError(
            f"C+ halves images to one pixel a patch, and width {width} as often but once: the "
            f"patch {patch} must be a power of 2 for which both work out"
        )
    return Stem(name, 1, width, flops.stem_macs(image, stem_channels(patch, width)))


def stem_module(
    given: Stem, patch: int, cfg: ConfigDict, rngs: nnx.Rngs, place: Callable
) -> nnx.Module:
    """(images [b, H, W, 3], mask) -> features [b, h, w, given.channels]."""
    if given.name == "R20":
        return ResNetFeatures(R20, cfg, rngs, place)
    return ConvStem(patch, given.channels, cfg, rngs)
