"""Import external weights: build the config, parameters and class names of a model from a file.

The format is detected by its keys, the config is inferred, and every array is checked against the
parameters of that model, so that none is left over, missing or of another shape.
"""

import contextlib
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
from vit_scale.pretrained.canonicalize import canonicalize
from vit_scale.pretrained.hints import NO_HINTS, Hints
from vit_scale.pretrained.infer_config import convention, infer_config
from vit_scale.pretrained.key_mapping import POSITIONS, Arrays, WeightFormat, to_params
from vit_scale.pretrained.metadata import Metadata
from vit_scale.pretrained.read_metadata import read_metadata
from vit_scale.pretrained.rotary_channels import reorder
from vit_scale.pretrained.state_dicts import select_state_dict
from vit_scale.pretrained.validate_arrays import (
    check_finite,
    check_keys,
    check_shapes,
    select_floats,
)
from vit_scale.pretrained.weight_files import find_weight_file, read_arrays

PROJECTION = "the head is the projection to the space that images and texts share: no classifier"
TOKENS = ("cls", "dist")  # in the order of their rows of position embeddings, then registers


class ImportedModel(NamedTuple):
    """A model of this project with external weights; `notes` say what was ignored or assumed."""

    cfg: ConfigDict
    model: Model
    params: dict
    classes: tuple[str, ...]  # empty without a head: then the head is zero, with one class
    notes: tuple[str, ...]


def import_weights(source: pathlib.Path, hints: Hints = NO_HINTS) -> ImportedModel:
    """Import a weight file, or a folder as timm and Hugging Face write it.

    Raises UserError, naming arrays by their keys in the file, if the file can't be read, its format
    is unknown, an array is not finite, or arrays are missing, unexpected or of the wrong shape.
    """
    file = find_weight_file(source)
    everything = read_arrays(file)
    state_dict = select_state_dict(file, everything, hints.format, hints.tree)
    fmt = state_dict.format
    arrays, ignored = select_floats(file, state_dict)
    check_finite(file, state_dict)
    title = f"{source}: {len(arrays)} arrays, format {fmt.title} (init.dialect={fmt.name})"
    notes = [title, *state_dict.notes, *ignored]
    metadata = read_metadata(fmt, file, hints.architecture)
    with _prefix_errors(file):
        arrays, changes = canonicalize(fmt, arrays)
        check_keys(fmt, arrays)
        keys = frozenset(state_dict.arrays)
        usual = convention(fmt, keys | frozenset(everything))
        _check_architecture(fmt, keys, metadata)
        cfg, leading, assumptions = infer_config(fmt, arrays, metadata, hints, keys, usual)
        model = build(cfg.model, config.image_size(cfg))
        shapes = jax.eval_shape(unstack, model.abstract_params)
        check_shapes(fmt, arrays, model, shapes, leading)
        order = metadata.channels or usual.channels
        params = _build_params(fmt, arrays, model, shapes, leading, order, cfg.model.pool_heads)
    notes += changes
    stored = fmt.stored_params(arrays)
    if fmt.sincos_temperature and POSITIONS not in stored:
        grid = " x ".join(map(str, model.shape.grid))
        notes.append(f"no position embeddings are stored: using fixed sin-cos ones, {grid} patches")
    notes += metadata.notes
    notes += _patch_note(cfg, metadata.image_size)
    classes = _class_names(file, metadata, cfg.model.classes) if "head/bias" in stored else ()
    if classes and fmt.projection:
        classes = tuple(f"dimension {i}" for i in range(len(classes)))
        notes.append(PROJECTION)
    elif classes and not metadata.classes:
        assumptions += (f"classes are numbered 0 to {len(classes) - 1}",)
    if assumptions:
        notes.append(f"assuming, as the file does not say: {', '.join(assumptions)}")
    return ImportedModel(cfg, model, params, classes, tuple(notes))


def _patch_note(cfg: ConfigDict, stated: tuple[int, int] | None) -> list[str]:
    """A note on a stated image size that the patches don't divide."""
    size = config.image_size(cfg)
    if not stated or stated == size or max(s - n for s, n in zip(stated, size, strict=True)) <= 0:
        return []
    (h, w), (rows, columns) = stated, size
    return [
        f"its images are {h} x {w} px, of which the patches cover {rows} x {columns}: here images "
        "are resized to that, where the library leaves out the rest"
    ]


def _check_architecture(fmt: WeightFormat, keys: frozenset[str], metadata: Metadata) -> None:
    """Raise UserError for keys of a model whose function only its architecture's name tells."""
    if metadata.channels:
        return
    for group in fmt.needs_architecture:
        matching = [[key for key in keys if re.search(pattern, key)] for pattern in group]
        if all(matching):
            raise UserError(
                f"it has {min(matching[0])}: the arrays of such a model don't tell whether "
                "positions are rotary; give the folder with its config.json, or timm's name of the "
                "architecture: --config.init.architecture=eva02_base_patch14_224"
            )


@contextlib.contextmanager
def _prefix_errors(file: pathlib.Path) -> Iterator[None]:
    """Prefix error messages with the path of the file."""
    try:
        yield
    except (UserError, TypeError) as error:  # TypeError: a config field gets another type
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error


def _class_names(file: pathlib.Path, metadata: Metadata, count: int) -> tuple[str, ...]:
    classes = metadata.classes or numbered_classes(count)
    if len(classes) != count:
        raise UserError(
            f"{file}: the metadata names {len(classes)} classes, but the head has {count} outputs"
        )
    return classes


def numbered_classes(count: int) -> tuple[str, ...]:
    """The names "0", "1", ... of classes whose names are unknown."""
    return tuple(map(str, range(count)))


def _build_params(
    fmt: WeightFormat,
    arrays: Arrays,
    model: Model,
    shapes: dict,
    leading: int,
    order: str,
    pool_heads: int | None,
) -> dict:
    """The parameter tree with stacked blocks; `shapes` is the same tree with unrolled ones."""
    size, grid = model.shape.size, model.shape.grid
    params = to_params(fmt, arrays, size.depth, size.heads, pool_heads)
    params = reorder(params, order)
    if POSITIONS in params:
        rows = params[POSITIONS]
        present = [token for token in TOKENS if token in params]
        for token, row in zip(present, rows[:leading], strict=False):
            params[token] = params[token] + row  # our tokens include their positions
        if leading > len(present):
            params["registers"] = params["registers"] + rows[len(present) : leading]
        params[POSITIONS] = rows[leading:].reshape(*grid, -1)
    elif fmt.sincos_temperature:
        params[POSITIONS] = np.asarray(
            sincos2d(grid, size.width, fmt.sincos_temperature(size.width))
        )
    leaves = [
        params.get(name, np.zeros(leaf.shape, np.float32)) for name, leaf in named(shapes).items()
    ]
    return stack(jax.tree.unflatten(jax.tree.structure(shapes), leaves))
