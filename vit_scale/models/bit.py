"""BiT's ResNets, the stems of the published hybrids (Kolesnikov et al. 2020, arXiv 1912.11370).

    R     the root block alone: a 7x7 convolution and max-pooling, of stride 4 together
    R26   2, 2, 2 and 2 bottleneck blocks, of stride 32
    R50   3, 4, 6 and 3 bottleneck blocks, of stride 32; with patches of an odd multiple of 16
          pixels 3, 4 and 9 blocks, of stride 16 (ViT paper, section 4.1)

Group normalisation after standardised convolutions: no statistics of a batch. As in Google's ViT,
blocks are those of He et al. 2016 (arXiv 1512.03385), the last ReLU after the sum, with the stride
in the 3x3 convolution; BiT's own classifiers have pre-activation blocks.

Google's code and timm, which has Google's weights, differ in what they add to variances, by up to
1e-2 of the logits where kernels have become small: `model.stem_epsilon`, of which an imported file
has its library's.

Published names: R50+B/16 (Dosovitskiy et al. 2021), R26+S/32 and R50+L/32 (Steiner et al. 2021,
arXiv 2106.10270). What the latter call R+Ti/16 is R+Ti/32 here: its 8 x 8 patches are of features
at a quarter of the image's resolution, which makes 49 patches of 224 px.
"""

from collections.abc import Callable, Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_scale.models.convolution import (
    Epsilons,
    GroupNorm,
    Mask,
    StandardizedConvolution,
    max_pool_overlapping,
)

STAGES: dict[str, tuple[int, ...]] = {"R": (), "R26": (2, 2, 2, 2), "R50": (3, 4, 6, 3)}
R50_STRIDE_16 = (3, 4, 9)
EPSILONS = {
    "google": Epsilons(deviation=1e-5, variance=0.0, norm=1e-6),
    "timm": Epsilons(deviation=0.0, variance=1e-8, norm=1e-5),
}
WIDTH = 64  # channels of the root block, and of the first stage's 3x3 convolutions


def stages(name: str, patch: int) -> tuple[int, ...]:
    """Return the blocks per stage of the stem `name` before patches of `patch` pixels."""
    return R50_STRIDE_16 if name == "R50" and patch % 32 else STAGES[name]


def stride(stages: Sequence[int]) -> int:
    """Return the pixels of the image per pixel of the feature map."""
    return 4 * 2 ** max(len(stages) - 1, 0)


def channels(stages: Sequence[int]) -> int:
    """Return the channels of the feature map."""
    return WIDTH * 2 ** (len(stages) + 1) if stages else WIDTH


class Bottleneck(nnx.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions; it begins as the identity and a ReLU."""

    def __init__(self, channels: tuple[int, int], stride: int, cfg: ConfigDict, rngs: nnx.Rngs):
        before, after = channels
        inner, epsilons = after // 4, EPSILONS[cfg.stem_epsilon]
        self.conv1 = StandardizedConvolution(1, (before, inner), cfg, epsilons, rngs)
        self.norm1 = GroupNorm(inner, epsilons.norm)
        self.conv2 = StandardizedConvolution(3, (inner, inner), cfg, epsilons, rngs, stride)
        self.norm2 = GroupNorm(inner, epsilons.norm)
        self.conv3 = StandardizedConvolution(1, (inner, after), cfg, epsilons, rngs)
        self.norm3 = GroupNorm(after, epsilons.norm, scale=0.0)
        self.projects = before != after
        if self.projects:
            self.shortcut_conv = StandardizedConvolution(1, channels, cfg, epsilons, rngs, stride)
            self.shortcut_norm = GroupNorm(after, epsilons.norm)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = jax.nn.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        shortcut = self.shortcut_norm(self.shortcut_conv(x)) if self.projects else x
        return jax.nn.relu(shortcut + y)


class Features(nnx.Module):
    """Map images to a feature map; `constrain` is applied after the root and each block."""

    def __init__(self, stages: Sequence[int], cfg: ConfigDict, rngs: nnx.Rngs, constrain: Callable):
        self.blocks_per_stage, self.constrain = tuple(stages), constrain
        epsilons = EPSILONS[cfg.stem_epsilon]
        self.conv = StandardizedConvolution(7, (3, WIDTH), cfg, epsilons, rngs, stride=2)
        self.norm = GroupNorm(WIDTH, epsilons.norm)
        built, before = {}, WIDTH
        for stage, count in enumerate(stages):
            after, blocks = channels(stages[: stage + 1]), {}
            for block in range(count):
                stride = 2 if stage and not block else 1
                blocks[str(block)] = Bottleneck((before, after), stride, cfg, rngs)
                before = after
            built[str(stage)] = nnx.Dict(blocks)
        self.stages = nnx.Dict(built)

    def __call__(self, images: Float[Array, "b H W 3"], mask: Mask) -> Float[Array, "b h w c"]:
        """Return the feature map; no example depends on others, so `mask` has no effect."""
        x = jax.nn.relu(self.norm(self.conv(images)))
        x = self.constrain(max_pool_overlapping(x))
        for stage, count in enumerate(self.blocks_per_stage):
            for block in range(count):
                x = self.constrain(self.stages[str(stage)][str(block)](x))
        return x
