"""The layers of a ViT as Flax NNX modules: patch embedding, attention, MLP, block, pooling.

Parameters are float32; `dtype` is the computation's. Without a key nothing is dropped.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vit_scale.models import platforms
from vit_scale.models.attention import attend, weights
from vit_scale.models.rotary import Rotation, random_frequencies

# Return the rotation of queries and keys, given the learned frequencies of a block, if it has any.
Rope = Callable[[Array | None], Rotation]


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes that a name such as "S" stands for."""

    width: int
    depth: int
    heads: int
    mlp: int
    swiglu: bool = False  # the MLP is gated


def drop(x: Array, rate: float | Array, key: Array, shape: tuple[int, ...]) -> Array:
    """Apply dropout, one draw per entry of `shape`, which broadcasts to `x`.

    Draws have 16 bits, so that one 32-bit random number makes two: generating them took a third of
    a training step. The rate is exact to 1/65536.
    """
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)))
    draws = jax.lax.bitcast_convert_type(words, jnp.uint16)
    draws = draws.reshape(*shape[:-1], -1)[..., : shape[-1]]
    factors = jnp.where(draws >= rate * 2**16, 1.0 / (1.0 - rate), 0.0)  # faster than dividing x
    return (x * factors).astype(x.dtype)


class Projection(nnx.Module):
    """An einsum with kernel and bias, which keeps attention's heads as an axis.

    nnx.Einsum draws a random key for its bias, which would change all later layers' initial values.
    """

    def __init__(self, equation: str, kernel, bias, init: Callable, dtype, rngs: nnx.Rngs):
        self.equation, self.dtype = equation, dtype
        self.kernel = nnx.Param(init(rngs.params(), kernel))
        if bias is not None:
            self.bias = nnx.Param(jnp.zeros(bias))

    def __call__(self, x: Array) -> Array:
        out = jnp.einsum(self.equation, x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return out + self.bias[...].astype(self.dtype) if hasattr(self, "bias") else out


# Xavier of the matrix that all heads' kernels form together.
_xavier = nnx.initializers.variance_scaling
HEADS_INIT = _xavier(1.0, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2))
OUT_INIT = _xavier(1.0, "fan_avg", "uniform", in_axis=(0, 1), out_axis=2)


def to_heads(tokens: str, cfg: ConfigDict, size: Size, rngs: nnx.Rngs) -> Projection:
    """Return the projection to queries, keys or values; `tokens` are the input's axes, "bn" or "n".

    They have a kernel each: with a fused one a TPU copies the whole result to take it apart.
    """
    d, k = size.width, size.heads
    equation, bias = f"{tokens}d,dke->{tokens}ke", (k, d // k) if cfg.qkv_bias else None
    return Projection(equation, (d, k, d // k), bias, HEADS_INIT, cfg.dtype, rngs)


def from_heads(cfg: ConfigDict, size: Size, rngs: nnx.Rngs) -> Projection:
    d, k = size.width, size.heads
    bias = (d,) if cfg.proj_bias else None
    return Projection("bnke,ked->bnd", (k, d // k, d), bias, OUT_INIT, cfg.dtype, rngs)


class Attention(nnx.Module):
    def __init__(self, cfg: ConfigDict, size: Size, rngs: nnx.Rngs):
        self.implementation, self.logits = cfg.attention, cfg.logits
        self.query = to_heads("bn", cfg, size, rngs)
        self.key = to_heads("bn", cfg, size, rngs)
        self.value = to_heads("bn", cfg, size, rngs)
        self.out = from_heads(cfg, size, rngs)
        self.normed = cfg.qk_norm != "none"
        if self.normed:  # Dehghani et al. 2023
            width = size.width // size.heads
            self.query_norm = make_norm(cfg, width, rngs, cfg.qk_norm)
            self.key_norm = make_norm(cfg, width, rngs, cfg.qk_norm)
        if cfg.attention_norm:
            self.norm = make_norm(cfg, size.width, rngs)
        if cfg.rope == "mixed":
            width, temperature = size.width // size.heads, cfg.rope_temperature
            drawn = random_frequencies(rngs.params(), size.heads, width, temperature)
            self.frequencies = nnx.Param(drawn)

    def __call__(
        self, x: Float[Array, "b n d"], first: int | None = None, rope: Rope | None = None
    ) -> Float[Array, "b m d"]:
        """Return the output of the `first` m tokens, or of all; each attends to all tokens."""
        q, k = self.queries_and_keys(x, first, rope)
        out = attend(q, k, self.value(x), self.logits, self.implementation)
        if hasattr(self, "norm"):  # over all heads (Fang et al. 2023)
            out = self.norm(out.reshape(*out.shape[:2], -1)).reshape(out.shape)
        return self.out(out)

    def queries_and_keys(
        self, x: Float[Array, "b n d"], first: int | None = None, rope: Rope | None = None
    ) -> tuple[Float[Array, "b m k e"], Float[Array, "b n k e"]]:
        """Return the queries [b, m, k, e] of the `first` m tokens, and the keys of all."""
        q, k = self.query(x[:, :first]), self.key(x)
        if self.normed:
            q, k = self.query_norm(q), self.key_norm(k)
        if rope is not None:
            rotate = rope(self.frequencies[...] if hasattr(self, "frequencies") else None)
            q, k = rotate.first(first)(q), rotate(k)
        return q, k

    def weights(
        self, x: Float[Array, "b n d"], rope: Rope | None = None
    ) -> Float[Array, "b k n n"]:
        """Return each head's attention weights; row i is what token i attends to."""
        q, k = self.queries_and_keys(x, rope=rope)
        return weights(q, k, self.logits)


class MLP(nnx.Module):
    def __init__(self, cfg: ConfigDict, size: Size, rngs: nnx.Rngs):
        self.dropout, self.gelu, self.gated = cfg.dropout, cfg.gelu, size.swiglu
        options = {
            "kernel_init": nnx.initializers.xavier_uniform(),
            "bias_init": nnx.initializers.normal(1e-6),  # as Google's ViT
            "dtype": jnp.dtype(cfg.dtype),
            "use_bias": cfg.proj_bias,
            "dot_general": platforms.tokens_times_kernel,
            "rngs": rngs,
        }
        self.up = nnx.Linear(size.width, size.mlp, **options)
        self.down = nnx.Linear(size.mlp, size.width, **options)
        if self.gated:
            self.gate = nnx.Linear(size.width, size.mlp, **options)
        if cfg.mlp_norm:
            self.norm = make_norm(cfg, size.mlp, rngs)

    def __call__(self, x: Float[Array, "b n d"], key: Array | None = None) -> Float[Array, "b n d"]:
        if self.gated:  # SwiGLU
            x = jax.nn.silu(self.gate(x)) * self.up(x)
        elif self.gelu == "quick":  # OpenAI's CLIP
            x = self.up(x)
            x = x * jax.nn.sigmoid(1.702 * x)
        else:
            x = platforms.gelu(self.up(x), approximate=self.gelu == "tanh")
        if hasattr(self, "norm"):  # Fang et al. 2023, arXiv 2303.11331
            x = self.norm(x)
        if key is not None and self.dropout:
            x = drop(x, self.dropout, key, x.shape)
        return self.down(x)


NORMS = {"layernorm": nnx.LayerNorm, "rmsnorm": nnx.RMSNorm}


def make_norm(cfg: ConfigDict, width: int, rngs: nnx.Rngs, kind: str = "") -> Any:
    """Return a norm over `width` features: of `kind`, or of model.norm."""
    norm = NORMS[kind or cfg.norm]
    return norm(width, epsilon=cfg.norm_epsilon, dtype=jnp.dtype(cfg.dtype), rngs=rngs)


class Block(nnx.Module):
    def __init__(self, cfg: ConfigDict, size: Size, rngs: nnx.Rngs):
        self.dropout, self.drop_path = cfg.dropout, cfg.drop_path
        self.norm1 = make_norm(cfg, size.width, rngs)
        self.attention = Attention(cfg, size, rngs)
        self.norm2 = make_norm(cfg, size.width, rngs)
        self.mlp = MLP(cfg, size, rngs)
        if cfg.layer_scale:
            self.scale1 = nnx.Param(jnp.full((size.width,), float(cfg.layer_scale)))
            self.scale2 = nnx.Param(jnp.full((size.width,), float(cfg.layer_scale)))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        drop_path: float | Array = 0.0,
        key: Array | None = None,
        first: int | None = None,
        rope: Rope | None = None,
    ) -> Float[Array, "b m d"]:
        """Return the `first` m tokens after this block, or all of them.

        `drop_path` is this block's rate of stochastic depth.
        """
        keys = [None] * 5 if key is None else list(jax.random.split(key, 5))
        with jax.named_scope("attention"):
            attended = self.attention(self.norm1(x), first, rope)
            x = x[:, :first] + self.branch("scale1", attended, drop_path, keys[0], keys[1])
        with jax.named_scope("mlp"):
            added = self.mlp(self.norm2(x), keys[2])
            return x + self.branch("scale2", added, drop_path, keys[3], keys[4])

    def branch(self, scale: str, x: Array, drop_path, dropout_key, path_key) -> Array:
        """Return what is added to the residual stream; `scale` names the branch's LayerScale."""
        if dropout_key is not None and self.dropout:
            x = drop(x, self.dropout, dropout_key, x.shape)
        if hasattr(self, scale):  # Touvron et al. 2021, arXiv 2103.17239
            x = x * getattr(self, scale)[...].astype(x.dtype)
        if path_key is not None and self.drop_path:
            x = drop(x, drop_path, path_key, (x.shape[0], 1, 1))
        return x


def kept_patches(count: int, rate: float) -> int:
    """Return how many of `count` patches remain in training: at least one."""
    return max(1, int(count * (1 - rate)))


def random_patches(key: Array, b: int, count: int, kept: int) -> Int[Array, "b m"]:
    """Draw `kept` of `count` patches for each of `b` images, in rising order."""
    order = jnp.argsort(jax.random.uniform(key, (b, count)), axis=1)
    return jnp.sort(order[:, :kept], axis=1)


def keep_patches(
    x: Float[Array, "b n d"], before: int, patches: Int[Array, "b p"]
) -> tuple[Float[Array, "b m d"], Int[Array, "b m"]]:
    """Keep some of each image's patches and the `before` tokens before them.

    As timm and FLIP (Li et al. 2023, arXiv 2212.00794). Returns the tokens and their indices.
    """
    tokens = jnp.pad(patches + before, ((0, 0), (before, 0)))
    tokens = tokens.at[:, :before].set(jnp.arange(before))
    return jnp.take_along_axis(x, tokens[..., None], axis=1), tokens


def new_head(width: int, cfg: ConfigDict, rngs: nnx.Rngs) -> nnx.Linear:
    """Return the classification head; its kernel is 0, so all classes are equally likely."""
    bias, zeros = nnx.initializers.constant(cfg.head_bias), nnx.initializers.zeros_init()
    return nnx.Linear(width, cfg.classes, kernel_init=zeros, bias_init=bias, rngs=rngs)


class PatchEmbed(nnx.Module):
    """The patch embedding, written as a matrix product, plus position embeddings."""

    def __init__(self, cfg: ConfigDict, patch: int, size: Size, rngs: nnx.Rngs, channels: int = 3):
        p, d = patch, size.width
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        self.patch = p
        self.dtype = jnp.dtype(cfg.dtype)
        self.kernel = nnx.Param(init(rngs.params(), (p, p, channels, d)))
        if cfg.patch_bias:
            self.bias = nnx.Param(jnp.zeros((d,)))

    def __call__(
        self,
        images: Float[Array, "b H W c"],
        position: Float[Array, "h w d"],
        before: Sequence[Float[Array, "d"]] = (),
    ) -> Float[Array, "b n d"]:
        """Return the tokens `before`, which are the same for all images, then patches row by row.

        The former are computed as patches of zeros plus a vector: to concatenate them afterwards
        would copy all tokens, forward and backward.
        """
        b, height, width, channels = images.shape
        p, d, m = self.patch, position.shape[-1], len(before)
        position = position.reshape(-1, d)
        patches = images.astype(self.dtype).reshape(b, height // p, p, width // p, p, channels)
        patches = patches.transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, channels * p * p)
        patches = jnp.pad(patches, ((0, 0), (m, 0), (0, 0)))
        kernel = self.kernel[...].astype(self.dtype).transpose(2, 0, 1, 3).reshape(-1, d)
        if hasattr(self, "bias"):
            position = position + self.bias[...]
        added = jnp.concatenate([*(token[None] for token in before), position])
        return (patches @ kernel + added).astype(self.dtype)


class AttentionPool(nnx.Module):
    """Pooling by a learned query that attends to its tokens (Lee et al. 2019), as in big_vision.

    Its MLP is not gated, and has no norm inside.
    """

    def __init__(self, cfg: ConfigDict, size: Size, rngs: nnx.Rngs):
        heads, mlp = cfg.pool_heads or size.heads, cfg.pool_mlp or size.mlp
        size = dataclasses.replace(size, heads=heads, mlp=mlp, swiglu=False)
        cfg = cfg.copy_and_resolve_references()
        cfg.mlp_norm = False
        self.implementation, self.logits = cfg.attention, cfg.logits
        init = nnx.initializers.xavier_uniform()
        self.probe = nnx.Param(init(rngs.params(), (1, size.width)))
        self.query = to_heads("n", cfg, size, rngs)
        self.key = to_heads("bn", cfg, size, rngs)
        self.value = to_heads("bn", cfg, size, rngs)
        self.out = from_heads(cfg, size, rngs)
        self.norm = make_norm(cfg, size.width, rngs)
        self.mlp = MLP(cfg, size, rngs)

    def __call__(self, x: Float[Array, "b n d"], key: Array | None) -> Float[Array, "b d"]:
        k, v = self.key(x), self.value(x)
        x = self.out(attend(self.probes(k), k, v, self.logits, self.implementation))
        return (x + self.mlp(self.norm(x), key))[:, 0]

    def probes(self, k: Float[Array, "b n k e"]) -> Float[Array, "b 1 k e"]:
        return jnp.broadcast_to(self.query(self.probe[...]), (k.shape[0], 1, *k.shape[2:]))

    def weights(self, x: Float[Array, "b n d"]) -> Float[Array, "b k n"]:
        """Return each head's attention weights over the tokens."""
        k = self.key(x)
        return weights(self.probes(k), k, self.logits)[:, :, 0]
