"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), pre-LN, as a Flax module.

Scanned and unrolled blocks (`model.scan`) have the same initial values and compute the same
function. Unrolled, the last block computes only the tokens that the heads read: with [CLS] that is
a sixth of its work, and fewer dropout draws.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from vit_scale.models import rotary, stems
from vit_scale.models.layers import (
    AttentionPool,
    Block,
    PatchEmbed,
    Rope,
    drop,
    keep_patches,
    kept_patches,
    make_norm,
    new_head,
    random_patches,
)
from vit_scale.models.position_embeddings import sincos2d
from vit_scale.models.spec import shape
from vit_scale.models.stacked_blocks import remat_policy, stacked_blocks, unstacked


def identity(x: Array) -> Array:
    return x


class ViT(nnx.Module):
    """Map images to class logits; `cfg` is a config's `model` block, `image` (height, width).

    `constrain` is applied to the tokens before the first and after every block.
    """

    def __init__(
        self,
        cfg: ConfigDict,
        image: tuple[int, int],
        rngs: nnx.Rngs,
        constrain: Callable = identity,
    ):
        self.shape, self.constrain = shape(cfg, image), constrain
        self.scan, self.remat = cfg.scan, remat_policy(cfg.remat)
        self.dropout, self.drop_path = cfg.dropout, cfg.drop_path
        self.first_drop_path = cfg.drop_path if cfg.drop_path_uniform else 0.0
        self.nearest_grid = cfg.nearest_grid
        self.posemb_kind, self.patch_drop, self.rope_cfg = cfg.posemb, cfg.patch_drop, None
        if cfg.rope != "none":
            self.rope_cfg = rotary.settings(cfg)
        size = self.shape.size
        if stem := self.shape.stem:
            self.stem: Any = stems.stem_module(stem, self.shape.patch, cfg, rngs, constrain)
            self.embed = PatchEmbed(cfg, stem.patch, size, rngs, stem.channels)
        else:
            self.embed = PatchEmbed(cfg, self.shape.patch, size, rngs)
        if cfg.posemb == "learned":
            init = nnx.initializers.normal(0.02)
            self.posemb = nnx.Param(init(rngs.params(), (*self.shape.grid, size.width)))
        if self.shape.class_token:  # with its position embedding, whose sum is one vector
            self.cls = nnx.Param(jnp.zeros((size.width,)))
        if cfg.distilled:
            self.dist = nnx.Param(jnp.zeros((size.width,)))
        if self.shape.registers:
            small = nnx.initializers.normal(1e-6)
            self.registers = nnx.Param(small(rngs.params(), (self.shape.registers, size.width)))
        # Traced and compiled once for all blocks, also where they are unrolled.
        stacked = stacked_blocks(cfg, size, rngs)
        self.blocks: Any = stacked if cfg.scan else nnx.Dict(unstacked(stacked))
        if cfg.final_norm:
            self.norm = make_norm(cfg, size.width, rngs)
        if cfg.pre_norm:
            self.pre_norm = make_norm(cfg, size.width, rngs)
        if cfg.pool == "map":
            self.pool = AttentionPool(cfg, size, rngs)
        if not cfg.classes:
            return
        if cfg.representation:
            self.representation = nnx.Linear(self.shape.pooled, cfg.representation, rngs=rngs)
        self.head = new_head(cfg.representation or self.shape.pooled, cfg, rngs)
        if cfg.distilled:
            self.head_dist = new_head(size.width, cfg, rngs)

    def __call__(
        self, images: Float[Array, "b H W 3"], key: Array | None = None
    ) -> Float[Array, "b c"]:
        """Return float32 logits; with a distillation token, the mean of both heads'.

        Without classes they are the pooled features. Dropout and drop path are on with a key, and
        off without one.
        """
        logits, distilled = self.heads(images, key)
        return logits if distilled is logits else (logits + distilled) / 2

    def heads(
        self,
        images: Float[Array, "b H W 3"],
        key: Array | None,
        mask: Bool[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
        """Return float32 logits of the head that learns from labels and of the distillation head.

        Without a distillation token they are the same array. `mask` selects the examples that enter
        the batch statistics of a hybrid's stem.
        """
        tokens = x = self.encode(images, key, mask, read=self.shape.read)
        with jax.named_scope("head"):
            x = self.pool_tokens(x, None if key is None else jax.random.split(key, 3)[2])
            x = x.astype(jnp.float32)
            if not hasattr(self, "head"):
                return x, x
            if self.shape.representation:
                x = jnp.tanh(self.representation(x))
            logits = self.head(x)
            if not self.shape.distilled:
                return logits, logits
            return logits, self.head_dist(tokens[:, 1].astype(jnp.float32))

    def encode(
        self,
        images: Float[Array, "b H W 3"],
        key: Array | None = None,
        mask: Bool[Array, "b"] | None = None,
        read: int | None = None,
        patches: Int[Array, "b m"] | None = None,
        hidden: tuple[Bool[Array, "b p"], Float[Array, "d"]] | None = None,
    ) -> Float[Array, "b n d"]:
        """Return the tokens after the last block and the final norm, unless that is `fc_norm`'s.

        Args:
          images: normalised pixels.
          key: of dropout, drop path, and random positions; None: they are off.
          mask: the examples that enter the batch statistics of a hybrid's stem.
          read: compute only so many of the first tokens in the last block; None: all.
          patches: the patches to encode, in rising order; None: all, or those that model.patch_drop
            keeps.
          hidden: which patches are replaced by a vector, which their positions are added to.
        """
        embed_key, blocks_key, _ = (None,) * 3 if key is None else jax.random.split(key, 3)
        x, kept, before = self.tokens(images, mask, hidden), None, self.shape.before
        if embed_key is not None and self.dropout:
            x = drop(x, self.dropout, embed_key, x.shape)
        if patches is None and embed_key is not None and self.patch_drop:
            count = kept_patches(x.shape[1] - before, self.patch_drop)
            draw = jax.random.fold_in(embed_key, 1)
            patches = random_patches(draw, x.shape[0], x.shape[1] - before, count)
        if patches is not None:
            x, kept = keep_patches(x, before, patches)
        rope = self.rope(None if embed_key is None else jax.random.fold_in(embed_key, 2), kept)
        x = self.transform(x, blocks_key, rope, read)[:, :read]
        return self.norm(x) if hasattr(self, "norm") and not self.shape.fc_norm else x

    def features(
        self, images: Float[Array, "b H W 3"], kind: str = "pooled", layer: int | None = None
    ) -> Float[Array, "b f"]:
        """Return one float32 vector for each image; training does not use this method.

        Args:
          images: normalised pixels.
          kind: `pooled` (by model.pool), `cls`, `mean` (of the patch tokens), or `cls_mean`
            (both, concatenated).
          layer: the block whose tokens are taken, counted from 0, or from the end if negative, with
            the final norm; None: the last.
        """
        x, rope = self.tokens(images), self.rope(None, None)
        for block in self.layers()[: None if layer is None else layer % self.shape.size.depth + 1]:
            x = self.constrain(block(x, rope=rope))
        if hasattr(self, "norm") and not (self.shape.fc_norm and kind == "pooled"):
            x = self.norm(x)
        if kind == "pooled":
            return self.pool_tokens(x, None).astype(jnp.float32)
        mean = x[:, self.shape.before :].mean(axis=1)
        vectors = {"cls": x[:, 0], "mean": mean}
        parts = [vectors[part] for part in kind.split("_")]
        return jnp.concatenate(parts, axis=-1).astype(jnp.float32)

    def pool_tokens(self, x: Float[Array, "b n d"], key: Array | None) -> Float[Array, "b p"]:
        """Return what the head reads of the tokens that `encode` returns."""
        x = self.pooled(x, key)
        return self.norm(x) if hasattr(self, "norm") and self.shape.fc_norm else x

    def pooled(self, x: Float[Array, "b n d"], key: Array | None) -> Float[Array, "b p"]:
        """Return one vector for each image: of width 2 d for [CLS] beside the mean of patches."""
        before, registers = self.shape.before, self.shape.registers
        match self.shape.pool:
            case "cls":
                return x[:, 0]
            case "gap":
                return x[:, before:].mean(axis=1)
            case "cls_gap":  # the linear head of DINOv2
                return jnp.concatenate([x[:, 0], x[:, before:].mean(axis=1)], axis=-1)
        if registers:  # attention pooling
            x = jnp.concatenate([x[:, : before - registers], x[:, before:]], axis=1)
        return self.pool(x, key)

    def rope(self, key: Array | None, kept: Array | None) -> Rope | None:
        """Return the rotary positions of all blocks, of the tokens `kept` [b, m], or of all.

        With a key, the coordinates change at random as the config says.
        """
        shape, cfg = self.shape, self.rope_cfg
        if cfg is None:
            return None
        positions: Any = rotary.coordinates(cfg, shape.grid)
        if key is not None and (cfg.rope_shift or cfg.rope_jitter or cfg.rope_rescale):
            positions = rotary.augmented(cfg, jnp.asarray(positions, jnp.float32), key)

        def learned(frequencies: Array | None) -> rotary.Rotation:
            turn = rotary.mixed_rotation(jnp.asarray(frequencies), positions, shape.before)
            return turn if kept is None else turn.keep(kept)

        if cfg.rope == "mixed":
            return learned
        fixed = rotary.rotation(cfg, positions, shape.before, shape.size.width // shape.size.heads)
        fixed = fixed if kept is None else fixed.keep(kept)
        return lambda _: fixed

    @jax.named_scope("patch_embedding")
    def tokens(
        self,
        images: Float[Array, "b H W 3"],
        mask: Bool[Array, "b"] | None = None,
        hidden: tuple[Bool[Array, "b p"], Float[Array, "d"]] | None = None,
    ) -> Float[Array, "b n d"]:
        """Return [CLS], the distillation token and registers, if any, then the patches row by row.

        All but registers include their position embeddings. The distillation token is DeiT's
        (Touvron et al. 2021, arXiv 2012.12877). `mask` and `hidden` are those of `encode`.
        """
        if self.nearest_grid and self.shape.pixels != images.shape[1:3]:
            resized = (images.shape[0], *self.shape.pixels, images.shape[3])
            images = jax.image.resize(images, resized, "linear", antialias=True)
        with jax.named_scope("stem"):
            x = self.stem(images, mask) if self.shape.stem else images
        position = self.positions()
        cls = [self.cls[...]] if self.shape.class_token else []
        dist = [self.dist[...]] if self.shape.distilled else []
        registers = list(self.registers[...]) if self.shape.registers else []
        x = self.embed(x, position, before=[*cls, *dist, *registers])
        if hidden is not None:
            which, vector = hidden
            instead = (vector + position.reshape(-1, vector.shape[-1])).astype(x.dtype)
            patches = jnp.where(which[..., None], instead, x[:, self.shape.before :])
            x = jnp.concatenate([x[:, : self.shape.before], patches], axis=1)
        return self.pre_norm(x) if hasattr(self, "pre_norm") else x

    def positions(self) -> Float[Array, "h w d"]:
        """Return the position embeddings of the patches."""
        grid, width = self.shape.grid, self.shape.size.width
        match self.posemb_kind:
            case "learned":
                return self.posemb[...]
            case "sincos2d":
                return sincos2d(grid, width)
        return jnp.zeros((*grid, width))

    def transform(
        self,
        x: Float[Array, "b n d"],
        key: Array | None,
        rope: Rope | None = None,
        read: int | None = None,
    ) -> Float[Array, "b n d"]:
        """Return the tokens after the last block; unrolled, only the first `read` of them."""
        depth, x = self.shape.size.depth, self.constrain(x)
        rates = jnp.linspace(self.first_drop_path, self.drop_path, depth)
        keys = None if key is None else jax.random.split(key, depth)
        if self.scan:
            graph, stacked = nnx.split(self.blocks)

            @jax.named_scope("blocks")
            def step(x, layer):
                params, rate, key = layer
                return self.constrain(nnx.merge(graph, params)(x, rate, key, rope=rope)), None

            return jax.lax.scan(self.remat(step, prevent_cse=False), x, (stacked, rates, keys))[0]
        for i in range(depth):
            graph, params = nnx.split(self.blocks[str(i)])

            first = read if i == depth - 1 else None

            @jax.named_scope(f"block_{i:02}")
            def block(x, params, rate, key, graph=graph, first=first):
                return self.constrain(nnx.merge(graph, params)(x, rate, key, first, rope))

            x = self.remat(block)(x, params, rates[i], None if keys is None else keys[i])
        return x

    def attention(
        self, images: Float[Array, "b H W 3"], reduce: Callable
    ) -> tuple[Any, Float[Array, "b n"]]:
        """Return attention weights for inspection; training does not use this method.

        Args:
          images: normalised pixels.
          reduce: is called with each block's weights, float32 [b, k, n, n]: those of all blocks
            together would be gigabytes.

        Returns:
          The results of `reduce`, stacked over blocks, and each final token's share in the pooled
          vector, which sums to 1 over tokens.
        """
        x, rope, reduced = self.tokens(images), self.rope(None, None), []
        for block in self.layers():
            reduced.append(reduce(block.attention.weights(block.norm1(x), rope)))
            x = block(x, rope=rope)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *reduced), self.shares(x)

    def shares(self, x: Float[Array, "b n d"]) -> Float[Array, "b n"]:
        """Return each final token's share in the pooled vector."""
        b, n, _ = x.shape
        before, registers = self.shape.before, self.shape.registers
        patches = jnp.zeros((b, n)).at[:, before:].set(1 / (n - before))
        match self.shape.pool:
            case "cls":  # and the distillation token, whose logits are half of the mean
                heads = 1 + self.shape.distilled
                return jnp.zeros((b, n)).at[:, :heads].set(1 / heads)
            case "gap":
                return patches
            case "cls_gap":
                return (patches + jnp.zeros((b, n)).at[:, 0].set(1)) / 2
        x = self.norm(x) if hasattr(self, "norm") else x
        read = np.delete(np.arange(n), slice(before - registers, before))
        return jnp.zeros((b, n)).at[:, read].set(self.pool.weights(x[:, read]).mean(axis=1))

    def layers(self) -> list[Block]:
        """Return the blocks in order, unstacked if they are scanned."""
        depth = self.shape.size.depth
        if self.scan:
            return list(unstacked(self.blocks).values())
        return [self.blocks[str(i)] for i in range(depth)]
