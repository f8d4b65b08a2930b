"""Other people's weights as a model of ours: config, parameters, class names.

The dialect is recognised by its names. What the arrays tell (sizes, heads, pooling) is taken from
them, what they don't from what stands beside them, else from the dialect's convention; then every
array is compared with what such a model has to have, so that nothing is left over, missing or of
another shape.
"""

import contextlib
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.errors import UserError, nearest
from vit_scale.model import Model, build
from vit_scale.parameters import named, stack, unstack
from vit_scale.posemb import sincos2d
from vit_scale.pretrained import about, files
from vit_scale.pretrained.about import About
from vit_scale.pretrained.dialects import DIALECTS
from vit_scale.pretrained.rules import (
    BLOCK,
    POSITIONS,
    Arrays,
    Dialect,
    read,
    rules_of,
    scaled,
    spelled,
    write,
)
from vit_scale.shape import SIZES

SHOWN = 6  # names in an error, of a hundred that may be wrong
RESOLUTION = 224  # pixels, where positions are not stored and nobody says
Size = tuple[int, int]


class Hints(NamedTuple):
    """What to believe where neither the arrays nor what stands beside them tells."""

    dialect: str = ""
    heads: int | None = None
    image: Size | None = None  # height and width in pixels


NO_HINTS = Hints()


class Foreign(NamedTuple):
    """Weights as a model of ours, and lines that say what was found and what was believed."""

    cfg: ConfigDict
    model: Model
    params: dict
    classes: tuple[str, ...]  # none where there is no head: then it is zero, of one class
    lines: tuple[str, ...]


def load(place: pathlib.Path, hints: Hints = NO_HINTS) -> Foreign:
    """The model in a file, or in a folder as timm and Hugging Face write it.

    Raises UserError in one line for a file that can't be read, a dialect that isn't known, and
    arrays that are missing, left over or of the wrong shape, in the names of the file.
    """
    file = files.file_in(place)
    stored = files.read(file)
    dialect = recognise(file, stored, hints.dialect)
    arrays, elsewhere = spelled(dialect, stored)
    lines = [f"{place}: {len(arrays)} arrays of {dialect.text} (init.dialect={dialect.name})"]
    if elsewhere:
        lines.append(f"left aside, no parameters: {_some(elsewhere)}")
    known = about.read(dialect, file)
    with _about(file):
        arrays, scales = scaled(dialect, arrays, _depth(dialect, arrays))
        if scales:
            lines.append(f"LayerScale is multiplied into the layers before it: {scales} arrays")
        cfg = configure(dialect, arrays, known, hints)
        model = build(cfg.model, config.image_size(cfg))
        shapes = jax.eval_shape(lambda key: unstack(model.init(key)), jax.random.key(0))
        _check(dialect, arrays, model, shapes)
        params = _params(dialect, arrays, model, shapes)
    if dialect.table and POSITIONS not in _names(dialect, arrays):
        grid = " x ".join(map(str, model.shape.grid))
        lines.append(f"no positions are stored: they are the fixed table, of {grid} patches")
    if not (dialect.augment or known.augment):
        lines.append(
            "nothing says how its pixels were normalised: believed is "
            f"augment.mean={cfg.augment.mean} and augment.std={cfg.augment.std}"
        )
    has_head = "head/bias" in _names(dialect, arrays)
    classes = (known.classes or numbered(cfg.model.classes)) if has_head else ()
    if has_head and len(classes) != cfg.model.classes:
        raise UserError(
            f"{file}: {len(classes)} classes are named beside a head of {cfg.model.classes}"
        )
    return Foreign(cfg, model, params, classes, tuple(lines))


@contextlib.contextmanager
def _about(file: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (UserError, TypeError) as error:  # a TypeError: a field of another type
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error


def numbered(count: int) -> tuple[str, ...]:
    """The names of classes that nobody named."""
    return tuple(map(str, range(count)))


def recognise(file: pathlib.Path, arrays: Mapping[str, Any], forced: str = "") -> Dialect:
    """The dialect of this name, or else the first whose mark is there. Raises UserError."""
    if forced:
        if forced not in DIALECTS:
            raise UserError(f"init.dialect={forced!r} is unknown; {nearest(forced, DIALECTS)}")
        return DIALECTS[forced]
    for dialect in DIALECTS.values():
        if any(re.search(dialect.mark, name) for name in arrays):
            return dialect
    raise UserError(
        f"{file}: its names are of no dialect that is known ({', '.join(DIALECTS)}): "
        f"{_some(sorted(arrays))}"
    )


def configure(dialect: Dialect, arrays: Arrays, known: About, hints: Hints) -> ConfigDict:
    """The config of the model that these arrays are of. Raises UserError."""
    first = _first(dialect, arrays)
    patch, width = first["embed/kernel"].shape[1::2]
    mlp = first["blocks/0/mlp/up/kernel"].shape[1]
    depth = _depth(dialect, arrays)
    heads = _heads(dialect, first, known, hints, (width, depth, mlp))
    cfg = config.base()
    cfg.model.update(about.variant(width, depth, heads, mlp, patch))
    cfg.model.update({**dialect.model, **known.model, "heads": cfg.model.heads})
    cfg.model.pool = "cls" if "cls" in first else "map" if "pool/probe" in first else "gap"
    if known.model.get("pool", cfg.model.pool) != cfg.model.pool:
        raise UserError(
            f"it is pooled by {known.model['pool']}, and its arrays are those of pooling by "
            f"{cfg.model.pool}: no model here does that"
        )
    if "representation/bias" in first:
        cfg.model.representation = len(first["representation/bias"])
    cfg.model.classes = len(first["head/bias"]) if "head/bias" in first else 1
    cfg.augment.update({**dialect.augment, **known.augment})
    rows = len(first[POSITIONS]) if POSITIONS in first else None
    said, hinted = (
        (size[0] // patch, size[1] // patch) if size else None
        for size in (known.image, hints.image)
    )
    grid = _grid(rows, cfg.model.pool == "cls", said, hinted, patch)
    cfg.data.resolution = grid[0] * patch
    cfg.data.width = grid[1] * patch if grid[1] != grid[0] else None
    return cfg


def _first(dialect: Dialect, arrays: Arrays) -> Arrays:
    """Our parameters outside the blocks and of the first, those that are there.

    Where heads are fused in an array, they are one head here.
    """
    first = read(dialect, arrays, 1, 1)
    rules = {name: rule.theirs for rule in rules_of(dialect, 1) for name in rule.parts}
    axes = {"embed/kernel": 4, "blocks/0/mlp/up/kernel": 2, "blocks/0/attention/query/kernel": 3}
    for name, count in axes.items():
        if name not in first:
            raise UserError(
                f"{rules[name]} is missing: it is damaged, or of another dialect than "
                f"{dialect.name}; it has {_some(sorted(arrays))}"
            )
        if first[name].ndim != count:
            raise UserError(f"{rules[name]} has the wrong shape, {arrays[rules[name]].shape}")
    return first


def _names(dialect: Dialect, arrays: Mapping[str, Any]) -> set[str]:
    """Our names of what is there, outside the blocks and of the first."""
    return {name for rule in rules_of(dialect, 1) if rule.theirs in arrays for name in rule.parts}


def _depth(dialect: Dialect, arrays: Mapping[str, Any]) -> int:
    patterns = [
        re.escape(rule.theirs).replace(re.escape(BLOCK), r"(\d+)")
        for rule in dialect.rules
        if BLOCK in rule.theirs
    ]
    found = (re.fullmatch(pattern, name) for pattern in patterns for name in arrays)
    return 1 + max((int(match[1]) for match in found if match), default=0)


def _heads(
    dialect: Dialect, first: Arrays, known: About, hints: Hints, size: tuple[int, int, int]
) -> int:
    """The arrays' axis of heads, else what is known of them, else those of such a size."""
    query = "blocks/0/attention/query/kernel"
    if any(rule.parts == (query,) and rule.layout == "same" for rule in rules_of(dialect, 1)):
        return first[query].shape[1]
    if heads := known.model.get("heads") or hints.heads:
        return heads
    for usual in SIZES.values():
        if size == (usual.width, usual.depth, usual.mlp):
            return usual.heads
    raise UserError(
        f"width {size[0]}, depth {size[1]} and MLP {size[2]} are no usual size, and nothing tells "
        "how many heads there are: give --config.model.heads to train or convert"
    )


def _check(dialect: Dialect, arrays: Arrays, model: Model, shapes: dict) -> None:
    """Raises UserError, in the file's names, unless these are the arrays of such a model."""
    whole = _expected(dialect, arrays, model, named(shapes))
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
            + "; ".join(f"{text}: {_some(names)}" for text, names in parts.items() if names)
        )


def _expected(dialect: Dialect, arrays: Arrays, model: Model, shapes: dict) -> Arrays:
    """Arrays of the shapes that such a model has in the file, which take no memory."""
    there = _names(dialect, arrays)
    optional = {"head/kernel", "head/bias", *([POSITIONS] if dialect.table else [])} - there
    ours = {
        name: np.broadcast_to(np.float32(0), leaf.shape)
        for name, leaf in shapes.items()
        if name not in optional
    }
    expected = write(dialect, ours, model.shape.size.depth)
    stored = {rule.parts: rule.theirs for rule in dialect.rules}[(POSITIONS,)]
    if stored in expected and stored in arrays:  # with [CLS]'s row or without: `_grid` has checked
        rows = (1, *arrays[stored].shape[1:2], model.shape.size.width)
        expected[stored] = np.broadcast_to(np.float32(0), rows)
    return expected


def _params(dialect: Dialect, arrays: Arrays, model: Model, shapes: dict) -> dict:
    """Our tree of parameters, with stacked blocks; `shapes` has them unrolled."""
    size, grid = model.shape.size, model.shape.grid
    ours = read(dialect, arrays, size.depth, size.heads)
    if POSITIONS in ours:
        rows = ours[POSITIONS]
        if len(rows) > math.prod(grid):  # [CLS]'s position comes first; ours has it in it
            ours["cls"], rows = ours["cls"] + rows[0], rows[1:]
        ours[POSITIONS] = rows.reshape(*grid, -1)
    elif dialect.table:
        table = sincos2d(grid, size.width, dialect.table(size.width))
        ours[POSITIONS] = np.asarray(table)
    leaves = [
        ours.get(name, np.zeros(leaf.shape, np.float32)) for name, leaf in named(shapes).items()
    ]
    return stack(jax.tree.unflatten(jax.tree.structure(shapes), leaves))


def _some(names: Sequence[str]) -> str:
    """The names, or the first of many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _grid(rows: int | None, cls: bool, said: Size | None, hinted: Size | None, patch: int) -> Size:
    """The patches (rows, columns) that so many positions are of.

    What stands beside the arrays is believed, else that they are square. A hint comes last: it may
    be the size that is wanted, with as many patches as the one that they were trained at.
    """
    if rows is None:
        return said or hinted or (RESOLUTION // patch, RESOLUTION // patch)
    counts = (rows, rows - 1) if cls else (rows,)
    sides = [math.isqrt(count) for count in counts]
    square = [(side, side) for side, count in zip(sides, counts, strict=True) if side**2 == count]
    for grid in (said, *square, hinted):
        if grid and math.prod(grid) in counts:
            return grid
    raise UserError(
        f"{rows} positions are no square grid; give the size in pixels that it was trained at: "
        "--config.data.resolution=HEIGHT --config.data.width=WIDTH"
    )
