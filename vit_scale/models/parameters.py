"""A model's parameters as the nested dict that they are: their names, their number, their layouts.

Names joined by "/" ("blocks/mlp/up/kernel") are stable: sharding rules, weight decay, freezing and
checkpoints are written against them. Running statistics of batch normalisation are leaves of the
same dict.
"""

import math

import jax
import jax.numpy as jnp


def named(tree) -> dict:
    """{"blocks/mlp/up/kernel": leaf, ...}, sorted as jax sorts them."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def measured(name: str) -> bool:
    """Whether a leaf is a running statistic: measured by batch normalisation, not trained."""
    return name.rpartition("/")[2] in ("mean", "variance")


def parameters(tree) -> list:
    """The leaves of a tree of parameters but for statistics, in jax's order."""
    return [leaf for name, leaf in named(tree).items() if not measured(name)]


def with_statistics(params: dict, statistics: dict) -> dict:
    """`params` with the leaves of `statistics`, a part of the same tree, in their places."""
    return params | {
        name: with_statistics(params[name], new) if isinstance(new, dict) else new
        for name, new in statistics.items()
    }


def count(params) -> int:
    """Number of parameters, of arrays or of their shapes; statistics are none."""
    return sum(math.prod(leaf.shape) for leaf in parameters(params))


def stack(params: dict) -> dict:
    """Parameters of unrolled blocks, laid out for scanned ones; others are returned as they are."""
    blocks = params.get("blocks", {})
    if "0" not in blocks:
        return params
    layers = [blocks[str(i)] for i in range(len(blocks))]
    return {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack(params: dict) -> dict:
    """The inverse of `stack`."""
    blocks = params.get("blocks", {})
    if "0" in blocks or not blocks:
        return params
    depth = jax.tree.leaves(blocks)[0].shape[0]
    layers = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(depth)}
    return {**params, "blocks": layers}
