"""Fit the parameters of one ViT to another: every leaf is accounted for, or nothing is done.

The head is replaced where the classes differ, position embeddings are resampled to the new grid
(ViT paper, section 3.2), blocks are stacked or unstacked. What can't be placed is refused, with
both sides listed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit_scale.errors import UserError
from vit_scale.model import named, stack, unstack
from vit_scale.posemb import resample

HEAD = ("head/kernel", "head/bias", "head_dist/kernel", "head_dist/bias")
POSITIONS = "posemb"


class Placement(NamedTuple):
    """What became of one parameter."""

    name: str
    shape: tuple[int, ...]
    action: str


def adapt(
    source: dict, target: dict, method: str, same_classes: bool
) -> tuple[dict, list[Placement]]:
    """`target` with every leaf that `source` can give, and what was done for each.

    `source` and `target` are parameter trees; `target`'s own values stay only in a replaced head.
    Raises UserError, listing both sides, if any other leaf of either has no counterpart.
    """
    source = stack(source) if "0" not in target.get("blocks", {}) else unstack(source)
    given, wanted = named(source), named(target)
    placed, rows, unplaced = {}, [], []
    for name, leaf in wanted.items():
        if name in HEAD and not same_classes:
            placed[name], action = leaf, "new: the classes differ"
        elif name not in given:
            unplaced.append(f"{name} {leaf.shape} is not in the source")
            continue
        elif given[name].shape == leaf.shape:
            placed[name], action = given[name], "kept"
        elif name == POSITIONS and given[name].shape[2] == leaf.shape[2]:
            grids = [f"{h} x {w}" for h, w in (given[name].shape[:2], leaf.shape[:2])]
            placed[name] = resample(given[name], leaf.shape[:2], method)
            action = f"resampled {grids[0]} -> {grids[1]}, {method}"
        else:
            unplaced.append(f"{name}: source {given[name].shape}, model {leaf.shape}")
            continue
        rows.append(Placement(name, tuple(leaf.shape), action))
    unplaced += [
        f"{name} {given[name].shape} has no place in the model" for name in given.keys() - wanted
    ]
    if unplaced:
        raise UserError(f"the pretrained parameters don't fit: {'; '.join(sorted(unplaced))}")
    leaves = [jnp.asarray(placed[name], leaf.dtype) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), leaves), rows


def table(rows: Sequence[Placement]) -> str:
    """The placements as aligned lines."""
    width = max(len(row.name) for row in rows)
    shapes = [" x ".join(map(str, row.shape)) for row in rows]
    shape_width = max(map(len, shapes))
    return "\n".join(
        f"{row.name:{width}}  {text:{shape_width}}  {row.action}"
        for row, text in zip(rows, shapes, strict=True)
    )
