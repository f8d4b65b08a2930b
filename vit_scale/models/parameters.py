"""Name, count and rearrange a model's parameters, a nested dict of arrays.

Names joined by "/" ("blocks/mlp/up/kernel") are stable: sharding rules, weight decay, freezing and
checkpoints refer to them. Batch normalisation's running statistics are leaves of the same dict.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

OBJECTIVE = "objective"  # what an objective trains besides the model; no part of the model

# The matrices of the blocks and of attention pooling: their input and output axes, counted from the
# end. A leading layer axis (stacked blocks) means one matrix per layer.
MATRICES = {
    r"(query|key|value)/kernel$": ((-3,), (-2, -1)),  # d k e
    r"out/kernel$": ((-3, -2), (-1,)),  # k e d
    r"mlp/(up|gate|down)/kernel$": ((-2,), (-1,)),  # d f, f d
}

# The convolutions of stems and convnets: all that an output pixel sees, to its channels.
CONVOLUTIONS = {r"conv[^/]*(/\d+)?/kernel$": ((-4, -3, -2), (-1,))}  # s s i o


def name_of(path: tuple) -> str:
    """Return "blocks/mlp/up/kernel" for a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree) -> dict:
    """Return {"blocks/mlp/up/kernel": leaf, ...} of any tree, in jax's order of leaves."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Map `function(name, leaf)` over the leaves of a tree."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(name_of(path), leaf), tree)


def is_statistic(name: str) -> bool:
    """Return whether a leaf is a running statistic of batch normalisation, which isn't trained."""
    return name.rpartition("/")[2] in ("mean", "variance")


def parameters(tree) -> list:
    """Return the leaves that are not statistics, in jax's order."""
    return [leaf for name, leaf in named(tree).items() if not is_statistic(name)]


def of_model(params: dict) -> dict:
    """Return the parameters without those that belong to the objective."""
    if OBJECTIVE not in params:
        return params
    return {name: leaf for name, leaf in params.items() if name != OBJECTIVE}


def unite(params: dict, others: dict) -> dict:
    """Return the leaves of both nested dicts; where both have one, it is that of `others`."""
    return params | {
        name: unite(params.get(name, {}), new) if isinstance(new, dict) else new
        for name, new in others.items()
    }


def select(params: dict, keep: Callable[[str], bool], prefix: str = "") -> dict:
    """Return the part of a nested dict whose leaves have names that `keep` accepts."""
    chosen = {
        name: select(leaf, keep, f"{prefix}{name}/") if isinstance(leaf, dict) else leaf
        for name, leaf in params.items()
        if isinstance(leaf, dict) or keep(prefix + name)
    }
    return {name: leaf for name, leaf in chosen.items() if not isinstance(leaf, dict) or leaf}


def count(params) -> int:
    """Return the number of parameters, statistics excluded, of arrays or ShapeDtypeStructs."""
    return sum(math.prod(leaf.shape) for leaf in parameters(params))


def stop_frozen(trained: dict, params: dict) -> dict:
    """Return the parameters, with no gradient to those that are False in `trained`."""
    frozen = jax.lax.stop_gradient(params)
    return jax.tree.map(lambda own, x, y: x if own else y, trained, params, frozen)


def without_layer_scale(leaves: dict) -> dict:
    """Return named leaves with LayerScale multiplied into the layers before it; the same function.

    LayerScale: Touvron et al. 2021, arXiv 2103.17239.
    """
    folded = dict(leaves)
    for name, layer in (("scale1", "attention/out"), ("scale2", "mlp/down")):
        for key in leaves:
            if not (key.startswith("blocks/") and key.endswith(f"/{name}")):
                continue
            scale = folded.pop(key)
            for leaf in ("kernel", "bias"):
                target = key.removesuffix(name) + f"{layer}/{leaf}"
                if target in folded:
                    ones = (1,) * (folded[target].ndim - scale.ndim)
                    shape = (*scale.shape[:-1], *ones, scale.shape[-1])
                    folded[target] = folded[target] * scale.reshape(shape)
    return folded


def stack(params: dict) -> dict:
    """Convert parameters of unrolled blocks to those of scanned ones; others are unchanged."""
    blocks = params.get("blocks", {})
    if "0" not in blocks:
        return params
    layers = [blocks[str(i)] for i in range(len(blocks))]
    return {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack(params: dict) -> dict:
    """Convert parameters of scanned blocks to those of unrolled ones; others are unchanged."""
    blocks = params.get("blocks", {})
    if "0" in blocks or not blocks:
        return params
    depth = jax.tree.leaves(blocks)[0].shape[0]
    layers = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(depth)}
    return {**params, "blocks": layers}
