"""Stems of hybrids: the networks before the patch embedding (ViT paper, section 3.1).

C        3x3 convolutions of stride 2 (Xiao et al. 2021)
CCT      the tokenizer of the Compact Convolutional Transformer (Hassani et al. 2021)
CNN      convolutions, max pooling and residual convolutions; not the network `cnn`
R20      ResNet-20 without its head (He et al. 2016)
R, ...   BiT's ResNets, those of the published hybrids (bit.py)
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_scale.errors import UserError
from vit_scale.models import bit
from vit_scale.models.convnets import RESNET20, ResNetFeatures
from vit_scale.models.convolution import (
    BatchNorm,
    Convolution,
    Mask,
    in_order,
    max_pool,
    max_pool_overlapping,
    numbered,
)


class ConvStem(nnx.Module):
    """3x3 convolutions with stride 2, doubling the channels up to the token width.

    Xiao et al. 2021 (arXiv 2106.14881); the last layer there, a 1x1 convolution, is the embedding.
    """

    def __init__(self, patch: int, width: int, cfg: ConfigDict, rngs: nnx.Rngs):
        channels = stem_channels(patch, width)
        pairs = list(zip((3, *channels), channels, strict=False))
        self.convs = numbered(Convolution(3, pair, cfg, rngs, stride=2) for pair in pairs)
        self.norms = numbered(BatchNorm(c) for c in channels)

    def __call__(self, images: Float[Array, "b H W 3"], mask: Mask) -> Float[Array, "b h w c"]:
        x = images
        for conv, norm in zip(in_order(self.convs), in_order(self.norms), strict=True):
            x = jax.nn.relu(norm(conv(x), mask))
        return x


class ConvTokenizer(nnx.Module):
    """3x3 convolutions, each with ReLU and 3x3 max pooling of stride 2: 64 channels, then `width`.

    As in the Compact Convolutional Transformer (Hassani et al. 2021, arXiv 2104.05704), whose
    pooled features are its tokens; here the patch embedding, a product, follows.
    """

    def __init__(self, patch: int, width: int, cfg: ConfigDict, rngs: nnx.Rngs):
        layers = patch.bit_length() - 1
        channels = [3, *[TOKENIZER_CHANNELS] * (layers - 1), width]
        self.convs = numbered(Convolution(3, c, cfg, rngs) for c in itertools.pairwise(channels))

    def __call__(self, images: Float[Array, "b H W 3"], mask: Mask) -> Float[Array, "b h w c"]:
        x = images
        for conv in in_order(self.convs):
            x = max_pool_overlapping(jax.nn.relu(conv(x)), (1, 0))
        return x


class PooledStage(nnx.Module):
    """A convolution, max pooling, and a residual convolution: half the image, more channels."""

    def __init__(self, channels: tuple[int, int], cfg: ConfigDict, rngs: nnx.Rngs):
        self.conv1 = Convolution(3, channels, cfg, rngs)
        self.norm1 = BatchNorm(channels[1])
        self.conv2 = Convolution(3, (channels[1], channels[1]), cfg, rngs)
        self.norm2 = BatchNorm(channels[1])

    def __call__(self, x: Float[Array, "b h w i"], mask: Mask) -> Float[Array, "b h2 w2 o"]:
        x = jax.nn.relu(self.norm1(max_pool(self.conv1(x)), mask))
        return x + jax.nn.relu(self.norm2(self.conv2(x), mask))


class PooledStem(nnx.Module):
    """Stages of 3x3 convolutions and max pooling, doubling the channels up to the token width.

    Its parts are those of networks for fast training on CIFAR-10: pooling before normalisation,
    which then has a quarter of the work (Jordan 2024, arXiv 2404.00498), and a residual convolution
    (Page's ResNet-9, where it is two, in some stages). It is not the network `cnn`.
    """

    def __init__(self, patch: int, width: int, cfg: ConfigDict, rngs: nnx.Rngs):
        channels = (3, *stem_channels(patch, width))
        self.stages = numbered(PooledStage(c, cfg, rngs) for c in itertools.pairwise(channels))

    def __call__(self, images: Float[Array, "b H W 3"], mask: Mask) -> Float[Array, "b h w c"]:
        x = images
        for stage in in_order(self.stages):
            x = stage(x, mask)
        return x


TOKENIZER_CHANNELS = 64


def stem_channels(patch: int, width: int) -> list[int]:
    """Return the channels after each of the halvings of a ConvStem or PooledStem."""
    halvings = patch.bit_length() - 1
    return [width >> (halvings - 1 - i) for i in range(halvings)]


class Halving(NamedTuple):
    """A stem of which each layer or stage halves the image."""

    module: Callable[..., nnx.Module]
    doubles: bool  # the channels, up to the token width
    batch_norm: bool


HALVING = {
    "C": Halving(ConvStem, doubles=True, batch_norm=True),
    "CCT": Halving(ConvTokenizer, doubles=False, batch_norm=False),
    "CNN": Halving(PooledStem, doubles=True, batch_norm=True),
}
STEMS = (*HALVING, "R20", *bit.STAGES)


@dataclasses.dataclass(frozen=True)
class Stem:
    """The stem of a variant NAME+SIZE/PATCH."""

    name: str
    patch: int  # pixels of its feature map per token; PATCH are pixels of the image
    channels: int  # of its feature map
    stages: tuple[int, ...] = ()  # residual blocks per stage of a BiT ResNet

    @property
    def batch_norm(self) -> bool:
        """Whether it has batch normalisation, whose statistics only training updates."""
        return self.name == "R20" or (self.name in HALVING and HALVING[self.name].batch_norm)

    @property
    def is_bit(self) -> bool:
        """Whether it is a ResNet of BiT, as the published hybrids have."""
        return self.name in bit.STAGES


def stem(name: str, patch: int, width: int) -> Stem:
    """Resolve a hybrid's stem. Raises UserError if `patch` or the token width does not fit."""
    if name in bit.STAGES:
        stages = bit.stages(name, patch)
        if patch % bit.stride(stages):
            raise UserError(
                f"patch size {patch} is not divisible by {bit.stride(stages)}, the stride of "
                f"{name}+"
            )
        return Stem(name, patch // bit.stride(stages), bit.channels(stages), stages)
    if name == "R20":
        if patch % RESNET20.stride:
            raise UserError(
                f"patch size {patch} is not divisible by {RESNET20.stride}, the stride of R20+"
            )
        return Stem(name, patch // RESNET20.stride, RESNET20.channels)
    halvings = patch.bit_length() - 1
    if patch < 2 or patch != 2**halvings:
        raise UserError(
            f"{name}+ needs a patch size 2^n, not {patch}: each of its n layers halves the image"
        )
    if HALVING[name].doubles and width % 2 ** (halvings - 1):
        raise UserError(
            f"{name}+ needs a width divisible by 2^(n - 1) = {2 ** (halvings - 1)}, not {width}: "
            f"its channels double n - 1 = {halvings - 1} times"
        )
    return Stem(name, 1, width)


def stem_module(
    stem: Stem, patch: int, cfg: ConfigDict, rngs: nnx.Rngs, constrain: Callable
) -> nnx.Module:
    """Return the module that maps (images [b, H, W, 3], mask) to [b, h, w, stem.channels]."""
    if stem.name in bit.STAGES:
        return bit.Features(stem.stages, cfg, rngs, constrain)
    if stem.name == "R20":
        return ResNetFeatures(RESNET20, cfg, rngs, constrain)
    return HALVING[stem.name].module(patch, stem.channels, cfg, rngs)
