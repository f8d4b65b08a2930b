"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), pre-LN: only mathematics.

Flax NNX defines the modules; `build`, where the kind of model is chosen, turns them into pure
functions over a nested dict of parameters (parameters.py), which is all that the rest of the
project sees.

Scanned and unrolled blocks (`model.scan`) start from the same values and compute the same function.
Unrolled, the last block computes only the tokens that the heads read: with [CLS] that is a sixth of
its work, and fewer draws of dropout.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from vit_scale.errors import UserError, nearest
from vit_scale.models import convnets
from vit_scale.models.layers import AttentionPool, Block, PatchEmbed, drop, layer_norm
from vit_scale.models.position_embeddings import sincos2d
from vit_scale.models.spec import resolve, shape


def _as_is(x: Array) -> Array:
    return x


class ViT(nnx.Module):
    """Images in, class logits out: of a `model` block, for images of (height, width) pixels.

    `place` gets the tokens that enter and leave a block, and returns them.
    """

    def __init__(
        self, cfg: ConfigDict, image: tuple[int, int], rngs: nnx.Rngs, place: Callable = _as_is
    ):
        self.shape, self.place = shape(cfg, image), place
        self.scan, self.remat = cfg.scan, remat_policy(cfg.remat)
        self.dropout, self.drop_path = cfg.dropout, cfg.drop_path
        self.learned = cfg.posemb == "learned"
        size = self.shape.size
        if stem := self.shape.stem:
            self.stem: Any = convnets.stem_module(stem, self.shape.patch, cfg, rngs, place)
            self.embed = PatchEmbed(cfg, stem.patch, size, rngs, stem.channels)
        else:
            self.embed = PatchEmbed(cfg, self.shape.patch, size, rngs)
        if self.learned:
            init = nnx.initializers.normal(0.02)
            self.posemb = nnx.Param(init(rngs.params(), (*self.shape.grid, size.width)))
        if self.shape.class_token:  # its position is part of it: one vector, not a sum of two
            self.cls = nnx.Param(jnp.zeros((size.width,)))
        if cfg.distilled:
            self.dist = nnx.Param(jnp.zeros((size.width,)))
        layers = rngs.split(size.depth)
        if cfg.scan:
            self.blocks: Any = nnx.vmap(lambda layer: Block(cfg, size, layer))(layers)
        else:
            self.blocks = nnx.Dict(
                {
                    str(i): Block(cfg, size, jax.tree.map(lambda x, i=i: x[i], layers))
                    for i in range(size.depth)
                }
            )
        self.norm = layer_norm(cfg, size, rngs)
        if cfg.pool == "map":
            self.pool = AttentionPool(cfg, size, rngs)
        if cfg.representation:
            self.representation = nnx.Linear(size.width, cfg.representation, rngs=rngs)
        zeros, width = nnx.initializers.zeros_init(), cfg.representation or size.width
        self.head = nnx.Linear(width, cfg.classes, kernel_init=zeros, rngs=rngs)
        if cfg.distilled:
            self.head_dist = nnx.Linear(size.width, cfg.classes, kernel_init=zeros, rngs=rngs)

    def __call__(
        self, images: Float[Array, "b H W 3"], key: Array | None = None
    ) -> Float[Array, "b c"]:
        """Float32 logits. Dropout and drop path are on with a key, and off without one."""
        return Outputs(*self.heads(images, key), {}).prediction

    def heads(
        self,
        images: Float[Array, "b H W 3"],
        key: Array | None,
        mask: Bool[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
        """Float32 logits of what learns from labels, and of what learns from a teacher.

        They are the same without a distillation token. The mask is for a stem's statistics.
        """
        embed_key, blocks_key, pool_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = self.tokens(images, mask)
        if embed_key is not None and self.dropout:
            x = drop(x, self.dropout, embed_key, x.shape)
        tokens = x = self.transform(x, blocks_key)[:, : self.shape.read]
        if not self.shape.fc_norm:
            tokens = x = self.norm(x)
        match self.shape.pool:
            case "cls":
                x = x[:, 0]
            case "gap":
                x = x[:, self.shape.before :].mean(axis=1)
            case "map":
                x = self.pool(x, pool_key)
        if self.shape.fc_norm:
            x = self.norm(x)
        x = x.astype(jnp.float32)
        if self.shape.representation:
            x = jnp.tanh(self.representation(x))
        logits = self.head(x)
        if not self.shape.distilled:
            return logits, logits
        return logits, self.head_dist(tokens[:, 1].astype(jnp.float32))

    def tokens(
        self, images: Float[Array, "b H W 3"], mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b n d"]:
        """Patches with their positions, row by row, after [CLS] where there is one.

        A distillation token comes after [CLS] (DeiT: Touvron et al. 2021, arXiv 2012.12877).
        """
        x = self.stem(images, mask) if self.shape.stem else images
        position = (
            self.posemb[...] if self.learned else sincos2d(self.shape.grid, self.shape.size.width)
        )
        cls = [self.cls[...]] if self.shape.class_token else []
        dist = [self.dist[...]] if self.shape.distilled else []
        return self.embed(x, position, before=[*cls, *dist])

    def transform(self, x: Float[Array, "b n d"], key: Array | None) -> Float[Array, "b n d"]:
        """The tokens after the last block; unrolled, only those that are read."""
        depth, x = self.shape.size.depth, self.place(x)
        rates = jnp.linspace(0.0, self.drop_path, depth)
        keys = None if key is None else jax.random.split(key, depth)
        if self.scan:
            graph, stacked = nnx.split(self.blocks)

            def step(x, layer):
                params, rate, key = layer
                return self.place(nnx.merge(graph, params)(x, rate, key)), None

            return jax.lax.scan(self.remat(step, prevent_cse=False), x, (stacked, rates, keys))[0]
        for i in range(depth):
            graph, params = nnx.split(self.blocks[str(i)])

            first = self.shape.read if i == depth - 1 else None

            def block(x, params, rate, key, graph=graph, first=first):
                return self.place(nnx.merge(graph, params)(x, rate, key, first))

            x = self.remat(block)(x, params, rates[i], None if keys is None else keys[i])
        return x

    def attention(
        self, images: Float[Array, "b H W 3"], see: Callable
    ) -> tuple[Any, Float[Array, "b n"]]:
        """What the tokens attend to, for looking inside; a training step never comes here.

        The first is `see(weights)` of each block, stacked: all weights of all blocks, float32
        [b, k, n, n] each, are gigabytes. The second is the share of each last token in the pooled
        vector; it sums to 1.
        """
        x, seen = self.tokens(images), []
        for block in self.layers():
            seen.append(see(block.attention.weights(block.norm1(x))))
            x = block(x)
        b, n, _ = x.shape
        match self.shape.pool:
            case "cls":  # and the distillation token, whose head has half a say
                heads = 1 + self.shape.distilled
                pooled = jnp.zeros((b, n)).at[:, :heads].set(1 / heads)
            case "gap":
                before = self.shape.before
                pooled = jnp.zeros((b, n)).at[:, before:].set(1 / (n - before))
            case "map":
                pooled = self.pool.weights(self.norm(x)).mean(axis=1)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen), pooled

    def layers(self) -> list[Block]:
        """The blocks, in order, one by one also where they are stacked."""
        depth = self.shape.size.depth
        if not self.scan:
            return [self.blocks[str(i)] for i in range(depth)]
        graph, stacked = nnx.split(self.blocks)
        return [
            nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in range(depth)
        ]


def remat_policy(name: str) -> Callable:
    """`jax.checkpoint` with the named policy: `none` saves everything, `full` only the inputs.

    Raises UserError for a name that jax.checkpoint_policies does not have.
    """
    if name == "none":
        return lambda function, **_: function
    if name == "full":
        return jax.checkpoint
    named = {n for n in dir(jax.checkpoint_policies) if not n.startswith("_")}
    if name not in named:
        raise UserError(
            f"model.remat={name!r} is unknown; {nearest(name, {'none', 'full'} | named)}"
        )
    return functools.partial(jax.checkpoint, policy=getattr(jax.checkpoint_policies, name))


class Outputs(NamedTuple):
    """Of a forward pass in training."""

    logits: Float[Array, "b c"]  # to learn from labels
    distilled: Float[Array, "b c"]  # to learn from a teacher: of the distillation token, if any
    statistics: dict  # what batch normalisation has measured, as in the parameters; {} without it

    @property
    def prediction(self) -> Float[Array, "b c"]:
        """The mean of both heads' logits, as DeiT's code and timm have it."""
        if self.distilled is self.logits:
            return self.logits
        return (self.logits + self.distilled) / 2


@dataclasses.dataclass(frozen=True)
class Model:
    """Pure functions over a nested dict of float32 parameters (and of running statistics)."""

    init: Callable  # (key) -> params
    apply: Callable  # (params, images [b, H, W, 3], key or None) -> logits [b, c]
    train: Callable  # (params, images [b, H, W, 3], key, mask [b]) -> Outputs
    shape: Any  # Shape, or convnets.Shape
    # (params, images, see) -> (see(weights [b, k, n, n]) of each block, stacked; share of each last
    # token in the pooled vector [b, n]), as `ViT.attention`; None where there is no attention.
    attention: Callable | None = None


def build(cfg: ConfigDict, image: tuple[int, int], place: Callable = _as_is) -> Model:
    """The model of a `model` block for images of (height, width) pixels.

    `place` says where the tokens between blocks live, as a sharding constraint does.
    Raises UserError where the block makes no model; allocates nothing.
    """
    resolved = resolve(cfg, image)
    network: Callable = convnets.network if isinstance(resolved, convnets.Shape) else ViT

    def make(key):
        return network(cfg, image, nnx.Rngs(params=key), place)

    graph = nnx.graphdef(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def init(key):
        return nnx.to_pure_dict(nnx.state(make(key), nnx.Any(nnx.Param, nnx.BatchStat)))

    def apply(params, images, key=None):
        return nnx.merge(graph, params)(images, key)

    def train(params, images, key, mask):
        merged = nnx.merge(graph, params)
        logits, distilled = merged.heads(images, key, mask)
        return Outputs(logits, distilled, nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat)))

    def attention(params, images, see):
        return nnx.merge(graph, params).attention(images, see)

    return Model(init, apply, train, resolved, attention if network is ViT else None)
