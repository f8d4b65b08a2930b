"""Blocks whose arrays have a first axis of all blocks, and what the backward pass keeps of them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from vit_scale.errors import UserError, nearest
from vit_scale.models.layers import Block, Size


def stacked_blocks(cfg: ConfigDict, size: Size, rngs: nnx.Rngs) -> Block:
    """Return `size.depth` blocks as one, whose arrays have a first axis of all of them.

    They are traced and compiled once.
    """
    return nnx.vmap(lambda layer: Block(cfg, size, layer))(rngs.split(size.depth))


def unstacked(blocks: Block) -> dict[str, Block]:
    """Return the blocks by number, of one whose arrays have a first axis of all blocks."""
    graph, state = nnx.split(blocks)
    leaves, structure = jax.tree.flatten(state)
    # Without the barrier a compiler computes each slice by itself, and may round it differently.
    leaves = jax.lax.optimization_barrier(leaves)
    layers = zip(*map(jnp.unstack, leaves), strict=True)
    return {
        str(i): nnx.merge(graph, jax.tree.unflatten(structure, layer))
        for i, layer in enumerate(layers)
    }


# Of jax.checkpoint_policies; the others make policies of names or of memories.
POLICIES = {
    *("everything_saveable", "nothing_saveable", "dots_saveable", "checkpoint_dots"),
    *("dots_with_no_batch_dims_saveable", "checkpoint_dots_with_no_batch_dims"),
}


def remat_policy(name: str) -> Callable:
    """Return jax.checkpoint with a named policy: `none` saves everything, `full` only the inputs.

    Every other name is one of POLICIES. Raises UserError for unknown ones.
    """
    if name == "none":
        return lambda function, **_: function
    if name == "full":
        return jax.checkpoint
    if name not in POLICIES:
        hint = nearest(name, {"none", "full", *POLICIES})
        raise UserError(f"model.remat={name!r} is unknown; {hint}")
    return functools.partial(jax.checkpoint, policy=getattr(jax.checkpoint_policies, name))
