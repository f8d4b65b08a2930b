"""Fit the parameters of one ViT to another: every leaf is accounted for, or nothing is done.

The head is replaced where the classes differ, and then pretraining's representation layer before it
goes too; position embeddings are resampled to the new grid (ViT paper, section 3.2), blocks are
stacked or unstacked. What can't be placed is refused, with both sides listed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_scale.data.class_mapping import MODES, Match, match
from vit_scale.errors import UserError, nearest
from vit_scale.models.parameters import named, stack, unstack
from vit_scale.models.position_embeddings import resample

HEAD = ("head/kernel", "head/bias", "head_dist/kernel", "head_dist/bias")
POSITIONS = "posemb"
REPRESENTATION = ("representation/kernel", "representation/bias")
HEADS = ("auto", "keep", "new")  # of init.head
# Fields that no parameter shows, and that change what the parameters compute.
TRAINED_WITH = (
    *("model.gelu", "model.norm_epsilon", "model.pool", "model.fc_norm"),
    *("augment.mean", "augment.std"),
)


class Adaptation(NamedTuple):
    """What became of one parameter."""

    name: str
    shape: tuple[int, ...]
    action: str


def adapt(
    source: dict,
    target: dict,
    method: str,
    same_classes: bool,
    outputs: Sequence[int] | None = None,
) -> tuple[dict, list[Adaptation]]:
    """`target` with every leaf that `source` can give, and what was done for each.

    `source` and `target` are parameter trees; `target`'s own values stay only in a replaced head.
    A head that is kept gets its `outputs` in this order, where there is one. Raises UserError,
    listing both sides, if any other leaf of either has no counterpart.
    """
    source = stack(source) if "0" not in target.get("blocks", {}) else unstack(source)
    given, wanted = named(source), named(target)
    placed, rows, unplaced = {}, [], []
    for name, leaf in wanted.items():
        if name in HEAD and not same_classes:
            placed[name], action = leaf, "new: the classes differ"
        elif name in REPRESENTATION and not same_classes and name not in given:
            placed[name], action = leaf, "new: it belongs to the head"
        elif name not in given:
            unplaced.append(f"{name} {leaf.shape} is not in the source")
            continue
        elif given[name].shape == leaf.shape and name in HEAD and outputs is not None:
            placed[name] = given[name][..., np.array(outputs)]
            action = "kept, in the order of the set's classes"
        elif given[name].shape == leaf.shape:
            placed[name], action = given[name], "kept"
        elif name == POSITIONS and given[name].shape[2] == leaf.shape[2]:
            grids = [f"{h} x {w}" for h, w in (given[name].shape[:2], leaf.shape[:2])]
            placed[name] = resample(given[name], leaf.shape[:2], method)
            action = f"resampled {grids[0]} -> {grids[1]}, {method}"
        else:
            unplaced.append(f"{name}: source {given[name].shape}, model {leaf.shape}")
            continue
        rows.append(Adaptation(name, tuple(leaf.shape), action))
    for name in given.keys() - wanted:
        if name in REPRESENTATION and not same_classes:
            rows.append(
                Adaptation(name, tuple(given[name].shape), "left: it belongs to the old head")
            )
        else:
            unplaced.append(f"{name} {given[name].shape} has no place in the model")
    if unplaced:
        raise UserError(f"the pretrained parameters don't fit: {'; '.join(sorted(unplaced))}")
    leaves = [jnp.asarray(placed[name], leaf.dtype) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), leaves), rows


def adaptation_table(rows: Sequence[Adaptation]) -> str:
    """The placements as aligned lines."""
    width = max(len(row.name) for row in rows)
    shapes = [" x ".join(map(str, row.shape)) for row in rows]
    shape_width = max(map(len, shapes))
    return "\n".join(
        f"{row.name:{width}}  {text:{shape_width}}  {row.action}"
        for row, text in zip(rows, shapes, strict=True)
    )


def match_head(
    given: Sequence[str],
    wanted: Sequence[str],
    head: str,
    mode: str = "names",
    ids: Sequence[str] = (),
) -> Match | None:
    """How the source's head, of the classes `given`, is kept for the classes `wanted`; None: not.

    `head` is init.head, `mode` init.classes, `ids` other names of the wanted classes. By itself it
    is kept where the classes are the same, in any order, and where nobody named them and there are
    as many. Raises UserError where it can't be.
    """
    if head not in HEADS:
        raise UserError(f"init.head={head!r} is unknown; {nearest(head, HEADS)}")
    if head == "keep" and len(given) != len(wanted):
        raise UserError(
            f"init.head=keep: the source has {len(given)} classes, the model {len(wanted)}"
        )
    if head == "new" or not given or len(given) != len(wanted):
        return None
    try:
        return match(given, wanted, mode, ids)
    except UserError as error:
        if head == "keep" or mode not in MODES:
            raise UserError(f"init.head={head}: {error}") from error
        return None


def mismatched_settings(source: ConfigDict, cfg: ConfigDict) -> list[str]:
    """Lines about what the source was trained with and `cfg` has otherwise."""
    found = []
    for field in TRAINED_WITH:
        block, name = field.split(".")
        given, wanted = source[block][name], cfg[block][name]
        if given != wanted:
            found.append(f"the source was trained with {field}={given}; this config has {wanted}")
    return found
