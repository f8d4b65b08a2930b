"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), pre-LN: only mathematics.

Flax NNX defines the modules; `build` turns them into two pure functions over a nested dict of
parameters, which is all that the rest of the project sees. Names joined by "/"
("blocks/mlp/up/kernel") are stable: sharding rules, weight decay, freezing and checkpoints are
written against them.

Scanned and unrolled blocks (`model.scan`) start from the same values and compute the same function;
`stack` and `unstack` convert between their two layouts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_scale.errors import UserError, nearest
from vit_scale.posemb import sincos2d


@dataclasses.dataclass(frozen=True)
class Size:
    width: int
    depth: int
    heads: int
    mlp: int


SIZES = {
    "Ti": Size(192, 12, 3, 768),  # DeiT (Touvron et al. 2021)
    "S": Size(384, 12, 6, 1536),  # DeiT
    "B": Size(768, 12, 12, 3072),  # ViT, table 1
    "L": Size(1024, 24, 16, 4096),  # ViT, table 1
}
CHOICES = {
    "pool": ("cls", "gap", "map"),
    "posemb": ("learned", "sincos2d"),
    "dtype": ("float32", "bfloat16"),
    "attention": ("xla", "cudnn"),
}
NORM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a `model` block and an image size (height, width in pixels) come to."""

    size: Size
    patch: int
    grid: tuple[int, int]
    pool: str

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] + (self.pool == "cls")


def shape(cfg: ConfigDict, image: tuple[int, int]) -> Shape:
    """Resolve `cfg.variant` and its overrides for images of (height, width) pixels.

    Raises UserError for an unknown size, and with the arithmetic where the numbers don't fit.
    """
    match = re.fullmatch(r"(\w+)/(\d+)", cfg.variant)
    if not match or match[1] not in SIZES:
        hint = nearest(cfg.variant.split("/")[0], SIZES)
        raise UserError(f"model.variant={cfg.variant!r} is not SIZE/PATCH such as S/16; {hint}")
    given = {f: cfg[f] for f in ("width", "depth", "heads", "mlp") if cfg[f] is not None}
    size, patch = dataclasses.replace(SIZES[match[1]], **given), int(match[2])
    if min(*dataclasses.astuple(size), patch, cfg.classes) < 1:
        raise UserError(f"{size}, patch {patch}, {cfg.classes} classes: each must be at least 1")
    if size.width % size.heads:
        raise UserError(f"model width {size.width} is not divisible by {size.heads} heads")
    for axis, pixels in zip(("height", "width"), image, strict=True):
        if pixels % patch:
            raise UserError(
                f"image {axis} {pixels} is not divisible by the patch of {patch} pixels"
            )
    grid = (image[0] // patch, image[1] // patch)
    if min(grid) < 2:
        raise UserError(
            f"{image[0]} x {image[1]} pixels / patch {patch} is a grid of {grid[0]} x {grid[1]} "
            "tokens; at least 2 x 2 are needed: raise data.resolution or take a smaller patch"
        )
    for field, valid in CHOICES.items():
        if cfg[field] not in valid:
            raise UserError(
                f"model.{field}={cfg[field]!r} is unknown; {nearest(cfg[field], valid)}"
            )
    for field in ("dropout", "drop_path"):
        if not 0 <= cfg[field] < 1:
            raise UserError(f"model.{field}={cfg[field]} must be at least 0 and below 1")
    return Shape(size, patch, grid, cfg.pool)


def drop(x: Array, rate: float | Array, key: Array, shape: tuple[int, ...]) -> Array:
    """Dropout with one draw per entry of `shape`, which broadcasts to x; keeps the expectation.

    A draw has 16 bits, so that one 32-bit random number serves two: random numbers were a third of
    a training step with dropout. The rate is exact to 1/65536.
    """
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)))
    draws = jax.lax.bitcast_convert_type(words, jnp.uint16)
    draws = draws.reshape(*shape[:-1], -1)[..., : shape[-1]]
    return jnp.where(draws >= rate * 2**16, x / (1.0 - rate), 0.0).astype(x.dtype)


class Projection(nnx.Module):
    """An einsum with kernel and bias, so that attention keeps its heads as an axis of their own."""

    def __init__(self, equation: str, kernel, bias, init: Callable, dtype, rngs: nnx.Rngs):
        self.equation, self.dtype = equation, dtype
        self.kernel = nnx.Param(init(rngs.params(), kernel))
        self.bias = nnx.Param(jnp.zeros(bias))

    def __call__(self, x: Array) -> Array:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return jnp.einsum(self.equation, x.astype(self.dtype), kernel) + bias


# Xavier over each head-split matrix as if it stood alone; axis "s" of the fused q, k, v is a batch.
_xavier = nnx.initializers.variance_scaling
QKV_INIT = _xavier(1.0, "fan_avg", "uniform", in_axis=0, out_axis=(2, 3), batch_axis=1)
OUT_INIT = _xavier(1.0, "fan_avg", "uniform", in_axis=(0, 1), out_axis=2)


class Attention(nnx.Module):
    def __init__(self, cfg: ConfigDict, size: Size, rngs: nnx.Rngs):
        d, k = size.width, size.heads
        self.implementation = cfg.attention
        self.qkv = Projection(
            "bnd,dske->bnske", (d, 3, k, d // k), (3, k, d // k), QKV_INIT, cfg.dtype, rngs
        )
        self.out = Projection("bnke,ked->bnd", (k, d // k, d), (d,), OUT_INIT, cfg.dtype, rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)
        return self.out(jax.nn.dot_product_attention(q, k, v, implementation=self.implementation))


class MLP(nnx.Module):
    def __init__(self, cfg: ConfigDict, size: Size, rngs: nnx.Rngs):
        self.dropout = cfg.dropout
        options = {
            "kernel_init": nnx.initializers.xavier_uniform(),
            "bias_init": nnx.initializers.normal(1e-6),  # as Google's ViT
            "dtype": jnp.dtype(cfg.dtype),
            "rngs": rngs,
        }
        self.up = nnx.Linear(size.width, size.mlp, **options)
        self.down = nnx.Linear(size.mlp, size.width, **options)

    def __call__(self, x: Float[Array, "b n d"], key: Array | None = None) -> Float[Array, "b n d"]:
        x = jax.nn.gelu(self.up(x), approximate=False)
        if key is not None and self.dropout:
            x = drop(x, self.dropout, key, x.shape)
        return self.down(x)


def layer_norm(cfg: ConfigDict, size: Size, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(size.width, epsilon=NORM_EPSILON, dtype=jnp.dtype(cfg.dtype), rngs=rngs)


class Block(nnx.Module):
    def __init__(self, cfg: ConfigDict, size: Size, rngs: nnx.Rngs):
        self.dropout, self.drop_path = cfg.dropout, cfg.drop_path
        self.norm1 = layer_norm(cfg, size, rngs)
        self.attention = Attention(cfg, size, rngs)
        self.norm2 = layer_norm(cfg, size, rngs)
        self.mlp = MLP(cfg, size, rngs)

    def __call__(
        self, x: Float[Array, "b n d"], drop_path: float | Array = 0.0, key: Array | None = None
    ) -> Float[Array, "b n d"]:
        """`drop_path` is this block's rate; without a key nothing is dropped."""
        keys = [None] * 5 if key is None else list(jax.random.split(key, 5))
        x = x + self.branch(self.attention(self.norm1(x)), drop_path, keys[0], keys[1])
        return x + self.branch(self.mlp(self.norm2(x), keys[2]), drop_path, keys[3], keys[4])

    def branch(self, x: Array, drop_path, dropout_key, path_key) -> Array:
        if dropout_key is not None and self.dropout:
            x = drop(x, self.dropout, dropout_key, x.shape)
        if path_key is not None and self.drop_path:
            x = drop(x, drop_path, path_key, (x.shape[0], 1, 1))
        return x


class PatchEmbed(nnx.Module):
    """A strided convolution written as the matmul that it is."""

    def __init__(self, cfg: ConfigDict, shape: Shape, rngs: nnx.Rngs):
        p, d = shape.patch, shape.size.width
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        self.patch = p
        self.dtype = jnp.dtype(cfg.dtype)
        self.kernel = nnx.Param(init(rngs.params(), (p, p, 3, d)))
        self.bias = nnx.Param(jnp.zeros((d,)))

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w d"]:
        b, height, width, channels = images.shape
        p = self.patch
        patches = images.astype(self.dtype).reshape(b, height // p, p, width // p, p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // p, width // p, -1)
        kernel = self.kernel[...].astype(self.dtype).reshape(p * p * channels, -1)
        return patches @ kernel + self.bias[...].astype(self.dtype)


class AttentionPool(nnx.Module):
    """One learned probe attends to all tokens (Lee et al. 2019), then an MLP, as in big_vision."""

    def __init__(self, cfg: ConfigDict, size: Size, rngs: nnx.Rngs):
        d, k = size.width, size.heads
        self.implementation = cfg.attention
        self.probe = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (1, d)))
        init = _xavier(1.0, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2))
        kv_init, shape = QKV_INIT, (d, 2, k, d // k)
        self.query = Projection("nd,dke->nke", (d, k, d // k), (k, d // k), init, cfg.dtype, rngs)
        self.kv = Projection("bnd,dske->bnske", shape, shape[1:], kv_init, cfg.dtype, rngs)
        self.out = Projection("bnke,ked->bnd", (k, d // k, d), (d,), OUT_INIT, cfg.dtype, rngs)
        self.norm = layer_norm(cfg, size, rngs)
        self.mlp = MLP(cfg, size, rngs)

    def __call__(self, x: Float[Array, "b n d"], key: Array | None) -> Float[Array, "b d"]:
        k, v = jnp.moveaxis(self.kv(x), 2, 0)
        q = jnp.broadcast_to(self.query(self.probe[...]), (x.shape[0], 1, *k.shape[2:]))
        x = self.out(jax.nn.dot_product_attention(q, k, v, implementation=self.implementation))
        return (x + self.mlp(self.norm(x), key))[:, 0]


class ViT(nnx.Module):
    """Images in, class logits out: of a `model` block, for images of (height, width) pixels."""

    def __init__(self, cfg: ConfigDict, image: tuple[int, int], rngs: nnx.Rngs):
        self.shape = shape(cfg, image)
        self.scan, self.remat = cfg.scan, remat_policy(cfg.remat)
        self.dropout, self.drop_path = cfg.dropout, cfg.drop_path
        self.learned = cfg.posemb == "learned"
        size = self.shape.size
        self.embed = PatchEmbed(cfg, self.shape, rngs)
        if self.learned:
            init = nnx.initializers.normal(0.02)
            self.posemb = nnx.Param(init(rngs.params(), (*self.shape.grid, size.width)))
        if cfg.pool == "cls":  # its position is part of it: one vector, not a sum of two
            self.cls = nnx.Param(jnp.zeros((size.width,)))
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
        zeros = nnx.initializers.zeros_init()
        self.head = nnx.Linear(size.width, cfg.classes, kernel_init=zeros, rngs=rngs)

    def __call__(
        self, images: Float[Array, "b H W 3"], key: Array | None = None
    ) -> Float[Array, "b c"]:
        """Float32 logits. Dropout and drop path are on with a key, and off without one."""
        embed_key, blocks_key, pool_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = self.tokens(images)
        if embed_key is not None and self.dropout:
            x = drop(x, self.dropout, embed_key, x.shape)
        x = self.norm(self.transform(x, blocks_key))
        match self.shape.pool:
            case "cls":
                x = x[:, 0]
            case "gap":
                x = x.mean(axis=1)
            case "map":
                x = self.pool(x, pool_key)
        return self.head(x.astype(jnp.float32))

    def tokens(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b n d"]:
        """Patches with their positions, row by row, after [CLS] where there is one."""
        x = self.embed(images)
        b, h, w, d = x.shape
        position = self.posemb[...] if self.learned else sincos2d((h, w), d)
        x = (x + position.astype(x.dtype)).reshape(b, h * w, d)
        if self.shape.pool == "cls":
            cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (b, 1, d))
            x = jnp.concatenate([cls, x], axis=1)
        return x

    def transform(self, x: Float[Array, "b n d"], key: Array | None) -> Float[Array, "b n d"]:
        depth = self.shape.size.depth
        rates = jnp.linspace(0.0, self.drop_path, depth)
        keys = None if key is None else jax.random.split(key, depth)
        if self.scan:
            graph, stacked = nnx.split(self.blocks)

            def step(x, layer):
                params, rate, key = layer
                return nnx.merge(graph, params)(x, rate, key), None

            return jax.lax.scan(self.remat(step, prevent_cse=False), x, (stacked, rates, keys))[0]
        for i in range(depth):
            graph, params = nnx.split(self.blocks[str(i)])

            def block(x, params, rate, key, graph=graph):
                return nnx.merge(graph, params)(x, rate, key)

            x = self.remat(block)(x, params, rates[i], None if keys is None else keys[i])
        return x


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


@dataclasses.dataclass(frozen=True)
class Model:
    """Two pure functions over a nested dict of float32 parameters."""

    init: Callable  # (key) -> params
    apply: Callable  # (params, images [b, H, W, 3], key or None) -> logits [b, c]
    shape: Shape


def build(cfg: ConfigDict, image: tuple[int, int]) -> Model:
    """The model of a `model` block for images of (height, width) pixels.

    Raises UserError where the block makes no model; allocates nothing.
    """
    resolved = shape(cfg, image)

    def make(key):
        return ViT(cfg, image, nnx.Rngs(params=key))

    graph = nnx.graphdef(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def init(key):
        return nnx.to_pure_dict(nnx.state(make(key), nnx.Param))

    def apply(params, images, key=None):
        return nnx.merge(graph, params)(images, key)

    return Model(init, apply, resolved)


def named(tree) -> dict:
    """{"blocks/mlp/up/kernel": leaf, ...}, sorted as jax sorts them."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def count(params) -> int:
    """Number of parameters, of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def stack(params: dict) -> dict:
    """Parameters of unrolled blocks, laid out for scanned ones; those are returned as they are."""
    blocks = params["blocks"]
    if "0" not in blocks:
        return params
    layers = [blocks[str(i)] for i in range(len(blocks))]
    return {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack(params: dict) -> dict:
    """The inverse of `stack`."""
    blocks = params["blocks"]
    if "0" in blocks:
        return params
    depth = jax.tree.leaves(blocks)[0].shape[0]
    layers = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(depth)}
    return {**params, "blocks": layers}
