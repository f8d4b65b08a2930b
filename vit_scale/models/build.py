"""Build a model from a config's `model` block, as pure functions over its parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_scale.errors import UserError
from vit_scale.models import convnets, flops, spec
from vit_scale.models.layers import Block, kept_patches
from vit_scale.models.vit import ViT, identity


class Encoded(NamedTuple):
    """Images as vectors, for objectives that learn without a classification head."""

    pooled: Float[Array, "b p"]  # what a head would read, in float32
    tokens: Float[Array, "b n d"]  # after the last block, and the final norm unless it is fc_norm's


class Outputs(NamedTuple):
    """The result of a forward pass in training."""

    logits: Float[Array, "b c"]  # of the head that learns from labels
    distilled: Float[Array, "b c"]  # of the distillation token's head; `logits` without one
    statistics: dict  # batch normalisation's running statistics, updated; {} without any

    @property
    def prediction(self) -> Float[Array, "b c"]:
        """The mean of both heads' logits, as in DeiT's code and timm."""
        if self.distilled is self.logits:
            return self.logits
        return (self.logits + self.distilled) / 2


class Part(NamedTuple):
    """A module as pure functions, for what an objective trains besides the model."""

    init: Callable  # (key) -> params
    apply: Callable  # (params, *arguments) -> what the module returns


def part(make: Callable[[nnx.Rngs], nnx.Module]) -> Part:
    """Build the module that `make` returns. Nothing is allocated."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(params=jax.random.key(0)))))

    def init(key):
        return arrays(make(nnx.Rngs(params=key)))

    def apply(params, *arguments):
        return nnx.merge(graph, params)(*arguments)

    return Part(init, apply)


@dataclasses.dataclass(frozen=True)
class Model:
    """Pure functions over a nested dict of float32 parameters and running statistics."""

    init: Callable  # (key) -> params
    abstract_params: dict  # what `init` returns, as jax.ShapeDtypeStruct
    apply: Callable  # (params, images [b, H, W, 3], key or None) -> logits [b, c]
    train: Callable  # (params, images [b, H, W, 3], key, mask [b]) -> Outputs
    # (params, images, kind, layer) -> features [b, f], as `ViT.features`.
    features: Callable
    shape: Any  # spec.Shape or convnets.Shape
    # (params, images, reduce) -> as `ViT.attention`; None for a model without attention.
    attention: Callable | None
    # (params, images, key, patches, hidden, tokens) -> Encoded, as `ViT.encode`; not of a convnet.
    # With tokens=False only what is pooled is computed of them.
    encode: Callable
    constrain: Callable  # shards the tokens between blocks
    count_macs: Callable[[bool], int]  # (training)

    def outputs(
        self, params: dict, images: Float[Array, "b H W 3"], flip: bool
    ) -> Float[Array, "b c"]:
        """Return the outputs of images; with `flip` their mean with those of mirrored images."""
        outputs = self.apply(params, images)
        return (outputs + self.apply(params, images[:, :, ::-1])) / 2 if flip else outputs

    @functools.cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one image's forward pass; traced at the first use."""
        return self.count_macs(False)

    @functools.cached_property
    def training_macs(self) -> int:
        """The same of one image in training, where patches may be dropped."""
        return self.count_macs(True)


def build(cfg: ConfigDict, image: tuple[int, int], constrain: Callable = identity) -> Model:
    """Build the model of a `model` block for images of (height, width) pixels.

    `constrain` is applied to the activations between blocks, for a sharding constraint. Nothing is
    allocated. Raises UserError if the block is invalid or does not fit the image.
    """
    shape = spec.resolve(cfg, image)
    network: Callable = ViT if isinstance(shape, spec.Shape) else convnets.network

    def make(key):
        return network(cfg, image, nnx.Rngs(params=key), constrain)

    abstract = nnx.eval_shape(lambda: make(jax.random.key(0)))
    graph, abstract_params = nnx.graphdef(abstract), arrays(abstract)

    def init(key):
        return arrays(make(key))

    def apply(params, images, key=None):
        return nnx.merge(graph, params)(images, key)

    def train(params, images, key, mask):
        merged = nnx.merge(graph, params)
        logits, distilled = merged.heads(images, key, mask)
        return Outputs(logits, distilled, nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat)))

    def attention(params, images, reduce):
        return nnx.merge(graph, params).attention(images, reduce)

    def encode(params, images, key=None, patches=None, hidden=None, tokens=True):
        if not isinstance(shape, spec.Shape):
            raise UserError(f"{cfg.variant} has no tokens to encode")
        merged = nnx.merge(graph, params)
        read = None if tokens else shape.read
        encoded = merged.encode(images, key, read=read, patches=patches, hidden=hidden)
        pool_key = None if key is None else jax.random.split(key, 3)[2]
        return Encoded(merged.pool_tokens(encoded, pool_key).astype(jnp.float32), encoded)

    def features(params, images, kind="pooled", layer=None):
        merged = nnx.merge(graph, params)
        if isinstance(shape, spec.Shape):
            return merged.features(images, kind, layer)
        if kind != "pooled" or layer is not None:
            raise UserError(f"{cfg.variant} has pooled features only, not {kind} of layer {layer}")
        return merged.pooled(images)

    common = init, abstract_params, apply, train, features, shape
    if isinstance(shape, spec.Shape):
        macs = functools.partial(_vit_macs, cfg, image, shape)
        return Model(*common, attention, encode, constrain, macs)

    def forward_macs(training):
        return _forward_macs(build(cfg, image), image)

    return Model(*common, None, encode, constrain, forward_macs)


def arrays(module: nnx.Module) -> dict:
    """Return a module's parameters and running statistics as a nested dict."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat)))


def _forward_macs(model: Model, image: tuple[int, int], key: Array | None = None) -> int:
    pixels = jax.ShapeDtypeStruct((1, *image, 3), jnp.float32)
    return flops.count_macs(model.apply, model.abstract_params, pixels, key)


def _vit_macs(cfg: ConfigDict, image: tuple[int, int], shape: spec.Shape, train: bool) -> int:
    """Count what the heads need, however the blocks are laid out, rematerialised or implemented.

    That is an unrolled model, whose last block computes only the tokens that the heads read. To be
    fast, a model of that block alone is traced, and one of the other blocks, which are all alike.
    """
    cfg = cfg.copy_and_resolve_references()
    cfg.update({"depth": 1, "scan": False, "remat": "none", "attention": "xla"})
    cfg.update({"dropout": 0.0, "drop_path": 0.0, "nearest_grid": False})
    shallow, patches = build(cfg, shape.pixels), shape.tokens - shape.before
    dropping = train and cfg.patch_drop
    macs = _forward_macs(shallow, shape.pixels, jax.random.key(0) if dropping else None)
    kept = kept_patches(patches, cfg.patch_drop) if dropping else patches
    # The embedding multiplies a patch of zeros for each token before the patches: only to be fast.
    macs -= shape.before * shallow.abstract_params["embed"]["kernel"].size
    tokens = jax.ShapeDtypeStruct((1, shape.before + kept, shape.size.width), jnp.float32)
    block = nnx.eval_shape(lambda: Block(cfg, shape.size, nnx.Rngs(0)))
    graph, params = nnx.split(block)
    per_block = flops.count_macs(lambda p, x: nnx.merge(graph, p)(x), params, tokens)
    return macs + (shape.size.depth - 1) * per_block
