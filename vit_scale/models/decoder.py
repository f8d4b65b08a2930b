"""The decoder of a masked autoencoder (He et al. 2022, arXiv 2111.06377): from tokens to pixels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vit_scale.models.layers import Size, make_norm
from vit_scale.models.position_embeddings import sincos2d
from vit_scale.models.spec import Shape
from vit_scale.models.stacked_blocks import remat_policy, stacked_blocks
from vit_scale.models.vit import identity

PLAIN = {  # a decoder's blocks are those of the first ViT, but for the encoder's norm and GELU
    "dropout": 0.0,
    "drop_path": 0.0,
    "layer_scale": 0.0,
    "rope": "none",
    "qk_norm": "none",
    "attention_norm": False,
    "mlp_norm": False,
    "qkv_bias": True,
    "proj_bias": True,
}


class Decoder(nnx.Module):
    """Predict the pixels of hidden patches from the tokens of the others.

    `cfg` is the config's `model` block, `size` the decoder's, `shape` the encoder's.
    """

    def __init__(
        self,
        cfg: ConfigDict,
        size: Size,
        shape: Shape,
        rngs: nnx.Rngs,
        constrain: Callable = identity,
    ):
        cfg = cfg.copy_and_resolve_references()
        cfg.update(PLAIN)
        self.shape, self.width = shape, size.width
        self.constrain, self.remat = constrain, remat_policy(cfg.remat)
        options: dict[str, Any] = {"kernel_init": nnx.initializers.xavier_uniform(), "rngs": rngs}
        options["dtype"] = jnp.dtype(cfg.dtype)
        self.project = nnx.Linear(shape.size.width, size.width, **options)
        self.mask_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (size.width,)))
        self.blocks = stacked_blocks(cfg, size, rngs)
        self.norm = make_norm(cfg, size.width, rngs)
        self.predict = nnx.Linear(size.width, shape.patch**2 * 3, **options)

    def __call__(
        self,
        tokens: Float[Array, "b n d"],
        visible: Int[Array, "b v"],
        hidden: Int[Array, "b m"],
    ) -> Float[Array, "b m p"]:
        """Return float32 predictions of the pixels (row, column, channel) of the hidden patches.

        Args:
          tokens: the encoder's, of what is before the patches, and of the visible patches.
          visible: the numbers of the visible patches, in the order of their tokens.
          hidden: those of all other patches.
        """
        before, (b, m) = self.shape.before, hidden.shape
        x = self.project(tokens)
        mask = jnp.broadcast_to(self.mask_token[...].astype(x.dtype), (b, m, self.width))
        order = jnp.argsort(jnp.concatenate([visible, hidden], axis=1), axis=1)
        patches = jnp.concatenate([x[:, before:], mask], axis=1)
        patches = jnp.take_along_axis(patches, order[..., None], axis=1)
        positions = sincos2d(self.shape.grid, self.width).reshape(-1, self.width)
        patches += positions.astype(x.dtype)
        x = self.transform(jnp.concatenate([x[:, :before], patches], axis=1))
        x = jnp.take_along_axis(x, (hidden + before)[..., None], axis=1)
        return self.predict(self.norm(x)).astype(jnp.float32)

    def transform(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Return the tokens after the last block."""
        graph, stacked = nnx.split(self.blocks)

        @jax.named_scope("decoder")
        def step(x, params):
            return self.constrain(nnx.merge(graph, params)(x)), None

        return jax.lax.scan(self.remat(step, prevent_cse=False), self.constrain(x), stacked)[0]
