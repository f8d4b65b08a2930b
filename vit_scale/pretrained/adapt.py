"""Adapt the parameters of one ViT to another; every leaf is accounted for, or nothing is adapted.

The head is replaced if the classes differ, and the representation layer before it with it. Position
embeddings are resampled to the new grid (ViT paper, section 3.2), the patch embedding to another
patch size; blocks are stacked or unstacked. Where one side has LayerScale or biases and the other
has not, the source is rewritten to the same function. Anything else that differs is an error that
lists both sides.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_scale.data.class_mapping import MODES, Match, match
from vit_scale.errors import UserError, nearest
from vit_scale.models.parameters import named, stack, unstack, without_layer_scale
from vit_scale.models.patch_embeddings import resample_patches
from vit_scale.models.position_embeddings import resample
from vit_scale.pretrained.key_mapping import HEAD, POSITIONS

PATCHES = "embed/kernel"
REPRESENTATION = ("representation/kernel", "representation/bias")
HEADS = ("auto", "keep", "new")  # of init.head
# Settings that change what the same parameters compute.
SETTINGS = (
    *("model.gelu", "model.norm_epsilon", "model.pool", "model.fc_norm", "model.rope"),
    *("model.rope_temperature", "model.rope_reference", "model.rope_offset", "model.posemb"),
    *("model.stem_epsilon", "augment.mean", "augment.std", "regression.mean", "regression.std"),
)


class Adaptation(NamedTuple):
    """What `adapt` did with one parameter."""

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
    """Return `target` with the values of `source`, and what was done with each parameter.

    Args:
      source: parameter tree to take values from.
      target: parameter tree with the structure, shapes and dtypes to return; its values are used
        for a replaced head only.
      method: how position embeddings are resampled, `cubic` or `corners`.
      same_classes: keep the head; else it is replaced.
      outputs: for each output of the target, the output of the source's head; None: in order.

    Raises:
      UserError: a parameter of either side has no counterpart; all of them are listed.
    """
    source = stack(source) if "0" not in target.get("blocks", {}) else unstack(source)
    available, required = named(source), named(target)
    folded = _has_layer_scale(available) and not _has_layer_scale(required)
    if folded:
        available = without_layer_scale(available)
    adapted, rows, problems = {}, [], []
    for name, leaf in required.items():
        if not same_classes and name in HEAD:
            value, action = leaf, "new: the classes differ"
        elif not same_classes and name in REPRESENTATION and name not in available:
            value, action = leaf, "new: part of the head"
        elif name not in available and _kernel_of(name) in available:
            value, action = jnp.zeros(leaf.shape, leaf.dtype), "new: zero, the source has no bias"
        elif name not in available and _is_layer_scale(name):
            value, action = (
                jnp.ones(leaf.shape, leaf.dtype),
                "new: one, as without LayerScale",
            )
        else:
            value, action = _adapt_leaf(name, available.get(name), leaf.shape, method, outputs)
        if folded and re.search(r"^blocks/.*(attention/out|mlp/down)/", name):
            action += ", times LayerScale"
        if value is None:
            problems.append(action)
            continue
        adapted[name] = jnp.asarray(value, leaf.dtype)
        rows.append(Adaptation(name, tuple(leaf.shape), action))
    for name in available.keys() - required:
        shape = tuple(available[name].shape)
        if name in (*HEAD, *REPRESENTATION) and not same_classes:
            rows.append(Adaptation(name, shape, "dropped: part of the old head"))
        else:
            problems.append(f"{name} {shape} is not in the model")
    if problems:
        raise UserError(
            f"the pretrained parameters don't fit the model: {'; '.join(sorted(problems))}"
        )
    leaves = [adapted[name] for name in required]
    return jax.tree.unflatten(jax.tree.structure(target), leaves), rows


def _has_layer_scale(leaves: dict) -> bool:
    return any(map(_is_layer_scale, leaves))


def _is_layer_scale(name: str) -> bool:
    return bool(re.search(r"^blocks/(\d+/)?scale[12]$", name))


def _kernel_of(bias: str) -> str:
    """The kernel beside a bias, whose absence is a bias of zero; "" for other leaves."""
    return bias.removesuffix("bias") + "kernel" if bias.endswith("/bias") else ""


def _adapt_leaf(
    name: str, value: Any, shape: tuple[int, ...], method: str, outputs: Sequence[int] | None
) -> tuple[Any, str]:
    """(a leaf in the target's shape, what was done), or (None, why it doesn't fit)."""
    if value is None:
        return None, f"{name} {shape} is not in the source"
    if value.shape == shape and name in HEAD and outputs is not None:
        return value[..., np.array(outputs)], "kept, reordered to the data set's classes"
    if value.shape == shape:
        return value, "kept"
    if name == POSITIONS and value.shape[2] == shape[2]:
        old, new = (f"{h} x {w}" for h, w in (value.shape[:2], shape[:2]))
        return resample(value, (shape[0], shape[1]), method), f"resampled {old} -> {new}, {method}"
    if name == PATCHES and value.shape[2:] == shape[2:]:
        old, new = (f"{h} x {w}" for h, w in (value.shape[:2], shape[:2]))
        resized = resample_patches(value, (shape[0], shape[1]))
        return resized, f"resampled {old} -> {new}, FlexiViT's PI-resize"
    return None, f"{name}: source {value.shape}, model {shape}"


def adaptation_table(rows: Sequence[Adaptation]) -> str:
    """Format adaptations as aligned lines: name, shape, action."""
    width = max(len(row.name) for row in rows)
    shapes = [" x ".join(map(str, row.shape)) for row in rows]
    shape_width = max(map(len, shapes))
    return "\n".join(
        f"{row.name:{width}}  {text:{shape_width}}  {row.action}"
        for row, text in zip(rows, shapes, strict=True)
    )


def match_head(
    source_classes: Sequence[str],
    classes: Sequence[str],
    head: str,
    mode: str = "names",
    ids: Sequence[str] = (),
) -> Match | None:
    """How the outputs of the source's head map to `classes`; None if the head is replaced.

    `head` is init.head, `mode` init.classes, `ids` alternative names of `classes`. With head=auto,
    the head is kept if both sides have the same names, in any order, or as many classes of which
    one side is unnamed. Raises UserError if init.head=keep can't be honoured.
    """
    if head not in HEADS:
        raise UserError(f"init.head={head!r} is unknown; {nearest(head, HEADS)}")
    if head == "keep" and len(source_classes) != len(classes):
        raise UserError(
            f"init.head=keep: the source has {len(source_classes)} classes, the model "
            f"{len(classes)}"
        )
    if head == "new" or not source_classes or len(source_classes) != len(classes):
        return None
    try:
        return match(source_classes, classes, mode, ids)
    except UserError as error:
        if head == "keep" or mode not in MODES:
            raise UserError(f"init.head={head}: {error}") from error
        return None


def mismatched_settings(source: ConfigDict, cfg: ConfigDict) -> list[str]:
    """A line for each setting of `cfg` that changes what the source's parameters compute."""
    lines = []
    for field in SETTINGS:
        block, name = field.split(".")
        old, new = source[block][name], cfg[block][name]
        if old != new:
            lines.append(f"the source was trained with {field}={old}; this config has {new}")
    return lines
