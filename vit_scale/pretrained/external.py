"""Other people's weights as a model of ours: config, parameters, class names.

The dialect is recognised by its names, wherever they lie in the file, and the config follows
(configure.py); then every array is compared with what such a model has to have, so that nothing is
left over, missing or of another shape.
"""

import contextlib
import math
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.errors import UserError
from vit_scale.models.build import Model, build
from vit_scale.models.parameters import named, stack, unstack
from vit_scale.models.position_embeddings import sincos2d
from vit_scale.pretrained import metadata, param_trees, weight_files
from vit_scale.pretrained.infer_config import (
    NO_HINTS,
    Hints,
    configure,
    depth_of,
    names_of,
    simplified,
)
from vit_scale.pretrained.key_mapping import (
    POSITIONS,
    Arrays,
    WeightFormat,
    read,
    rules_of,
    spelled,
    write,
)
from vit_scale.pretrained.param_trees import some

HEAD = ("head/kernel", "head/bias", "head_dist/kernel", "head_dist/bias")
# Names of what other models have, and what that is.
OTHERS = (
    (r"reg_token|register_token", "register tokens"),
    (r"\.[qk]_norm\.", "norms of queries and keys"),
    (r"relative_position|rel_pos|rope", "relative or rotary positions"),
    (r"\.w12\.|\.fc1_[gx]\.|\.w3\.", "SwiGLU"),
    (r"norm_pre|pre_layernorm", "a norm before the blocks"),
    (r"lora_", "LoRA, which is to be merged first"),
)
TOKENS = ("cls", "dist")  # in the order of their positions


class Foreign(NamedTuple):
    """Weights as a model of ours, and lines that say what was found and what was believed."""

    cfg: ConfigDict
    model: Model
    params: dict
    classes: tuple[str, ...]  # none where there is no head: then it is zero, of one class
    notes: tuple[str, ...]


def load(place: pathlib.Path, hints: Hints = NO_HINTS) -> Foreign:
    """The model in a file, or in a folder as timm and Hugging Face write it.

    Raises UserError in one line for a file that can't be read, a dialect that isn't known, an array
    that is not finite, and arrays that are missing, left over or of the wrong shape, in the names
    of the file.
    """
    file = weight_files.file_in(place)
    tree = param_trees.select(file, weight_files.read(file), hints.format, hints.tree)
    dialect = tree.dialect
    arrays, others = floating(file, dialect, tree)
    check_finite(file, tree)
    lines = [f"{place}: {len(arrays)} arrays of {dialect.text} (init.dialect={dialect.name})"]
    lines += [*tree.notes, *others]
    known = metadata.read(dialect, file)
    with _about(file):
        arrays, notes = simplified(dialect, arrays)
        check_names(dialect, arrays)
        names = frozenset(tree.arrays)
        cfg, before, assumed = configure(dialect, arrays, known, hints, names)
        model = build(cfg.model, config.image_size(cfg))
        shapes = jax.eval_shape(lambda key: unstack(model.init(key)), jax.random.key(0))
        _check(dialect, arrays, model, shapes, before)
        params = _params(dialect, arrays, model, shapes, before)
    lines += notes
    if dialect.table and POSITIONS not in names_of(dialect, arrays):
        grid = " x ".join(map(str, model.shape.grid))
        lines.append(f"no positions are stored: they are the fixed table, of {grid} patches")
    has_head = "head/bias" in names_of(dialect, arrays)
    classes = (known.classes or numbered(cfg.model.classes)) if has_head else ()
    if has_head and len(classes) != cfg.model.classes:
        raise UserError(
            f"{file}: {len(classes)} classes are named beside a head of {cfg.model.classes}"
        )
    if has_head and not known.classes:
        assumed += (f"classes are numbered 0 to {len(classes) - 1}",)
    if assumed:
        lines.append(f"assuming, as the file does not say: {', '.join(assumed)}")
    return Foreign(cfg, model, params, classes, tuple(lines))


def check_names(dialect: WeightFormat, arrays: Arrays) -> None:
    """Raises UserError for an array that no rule places, before anything else is blamed.

    Where a rule places none of them, it is the dialect that is wrong.
    """
    placed = {rule.theirs for rule in rules_of(dialect, depth_of(dialect, arrays))}
    extra = sorted(arrays.keys() - placed)
    if extra and len(extra) < len(arrays):
        reasons = [text for mark, text in OTHERS if any(re.search(mark, name) for name in extra)]
        why = f" ({', '.join(reasons)}: in no model of this project)" if reasons else ""
        raise UserError(
            f"it is no {dialect.name} ViT of this project: no place for: {some(extra)}{why}"
        )


def floating(
    file: pathlib.Path, dialect: WeightFormat, tree: param_trees.Tree
) -> tuple[Arrays, list[str]]:
    """The arrays by the names of the dialect's rules, and a line about counters and the like.

    Raises UserError for a parameter that is no floating-point array, such as a quantized one.
    """
    arrays = spelled(dialect, tree.arrays)
    placed = {rule.theirs for rule in rules_of(dialect, depth_of(dialect, arrays))}
    others = [name for name, x in arrays.items() if x.dtype.kind != "f"]
    if quantized := [name for name in others if name in placed]:
        kind = arrays[quantized[0]].dtype
        raise UserError(
            f"{file}: {tree.prefix}{quantized[0]} is of {kind}, not of floats: a quantized or "
            "otherwise packed model can't be read; take the one that it was made of"
        )
    line = [f"left aside, no floats: {some(others)}"] if others else []
    return {name: x for name, x in arrays.items() if name not in others}, line


def check_finite(file: pathlib.Path, tree: param_trees.Tree) -> None:
    """Raises UserError that names an array with a NaN or an infinity, and how many there are."""
    floats = {name: x for name, x in tree.arrays.items() if x.dtype.kind == "f"}
    wrong = [name for name, x in floats.items() if not np.isfinite(x).all()]
    if wrong:
        array = tree.arrays[wrong[0]]
        bad = np.flatnonzero(~np.isfinite(array))
        more = f", and {len(wrong) - 1} more arrays hold such values" if wrong[1:] else ""
        raise UserError(
            f"{file}: {tree.prefix}{wrong[0]} is not finite: {array.flat[bad[0]]} at position "
            f"{bad[0]}, {bad.size} of its {array.size} values{more}; it overflowed in half "
            "precision, diverged or is damaged: take another checkpoint of it"
        )


@contextlib.contextmanager
def _about(file: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (UserError, TypeError) as error:  # a TypeError: a field of another type
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error


def numbered(count: int) -> tuple[str, ...]:
    """The names of classes that nobody named."""
    return tuple(map(str, range(count)))


def _check(dialect: WeightFormat, arrays: Arrays, model: Model, shapes: dict, before: int) -> None:
    """Raises UserError, in the file's names, unless these are the arrays of such a model."""
    whole = _expected(dialect, arrays, model, named(shapes), before)
    expected = {name: array.shape for name, array in whole.items()}
    missing = sorted(expected.keys() - arrays)
    extra = sorted(arrays.keys() - expected)
    wrong = [
        f"{name} {arrays[name].shape}, not {shape}"
        for name, shape in sorted(expected.items())
        if name in arrays and arrays[name].shape != shape
    ]
    parts = {"missing": missing, "no place for": extra, "wrong shape": wrong}
    if any(parts.values()):
        raise UserError(
            f"it is no whole {dialect.name} ViT of this project: "
            + "; ".join(f"{text}: {some(names)}" for text, names in parts.items() if names)
        )


def _expected(
    dialect: WeightFormat, arrays: Arrays, model: Model, shapes: dict, before: int
) -> Arrays:
    """Arrays of the shapes that such a model has in the file, which take no memory."""
    there = names_of(dialect, arrays)
    heads = {name for name in HEAD if "head/bias" not in there}  # both, or none
    optional = heads | ({POSITIONS} - there if dialect.table else set())
    ours = {
        name: np.broadcast_to(np.float32(0), leaf.shape)
        for name, leaf in shapes.items()
        if name not in optional
    }
    expected = write(dialect, ours, model.shape.size.depth)
    stored = {rule.parts: rule.theirs for rule in dialect.rules}[(POSITIONS,)]
    if stored in expected:  # with the rows of other tokens, or without
        rows = math.prod(model.shape.grid) + before
        expected[stored] = np.broadcast_to(np.float32(0), (1, rows, model.shape.size.width))
    return expected


def _params(dialect: WeightFormat, arrays: Arrays, model: Model, shapes: dict, before: int) -> dict:
    """Our tree of parameters, with stacked blocks; `shapes` has them unrolled."""
    size, grid = model.shape.size, model.shape.grid
    ours = read(dialect, arrays, size.depth, size.heads)
    if POSITIONS in ours:
        rows = ours[POSITIONS]
        for token, row in zip(TOKENS, rows[:before], strict=False):  # ours have it in them
            ours[token] = ours[token] + row
        ours[POSITIONS] = rows[before:].reshape(*grid, -1)
    elif dialect.table:
        table = sincos2d(grid, size.width, dialect.table(size.width))
        ours[POSITIONS] = np.asarray(table)
    leaves = [
        ours.get(name, np.zeros(leaf.shape, np.float32)) for name, leaf in named(shapes).items()
    ]
    return stack(jax.tree.unflatten(jax.tree.structure(shapes), leaves))
