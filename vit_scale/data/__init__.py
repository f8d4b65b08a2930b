"""Where images come from: sets of them, parts of sets by name, and batches by step.

`open_split` gives a source, a random-access set; `train_batches` and `eval_batches` read it in
Grain pipelines. A new kind of set is one module with a `source(cfg.data, name)` and one entry here.
"""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_scale.data import cifar, folder, fractal, records
from vit_scale.data.images import decoded_size
from vit_scale.data.pipeline import eval_batches, in_memory, train_batches
from vit_scale.data.sources import Batch, InMemory, Slice, Source, checksum, cut, split_name
from vit_scale.errors import UserError, nearest

__all__ = [
    "Batch",
    "InMemory",
    "Slice",
    "Source",
    "checksum",
    "delivered_size",
    "describe",
    "eval_batches",
    "open_split",
    "train_batches",
]


class Set(NamedTuple):
    splits: tuple[str, ...]  # the whole sets that it has
    source: Callable[[ConfigDict, str], Source]  # opens one
    size: Callable[[ConfigDict], tuple[int, int]]  # (height, width) of its images, unopened


def _fractal_size(cfg: ConfigDict) -> tuple[int, int]:
    return cfg.fractal.resolution, cfg.fractal.resolution


SETS = {  # by data.name
    "cifar10": Set(("train", "test"), cifar.source, lambda cfg: (32, 32)),
    "fractal": Set(("train", "test"), fractal.source, _fractal_size),
    "folder": Set(("train", "test", "val", "validation"), folder.source, decoded_size),
    "array_record": Set(("train", "test", "val", "validation"), records.source, decoded_size),
}


def find(cfg: ConfigDict) -> Set:
    """The set that a data block names. Raises UserError for an unknown one."""
    if cfg.name not in SETS:
        raise UserError(f"data.name={cfg.name!r} is unknown; {nearest(cfg.name, SETS)}")
    return SETS[cfg.name]


def delivered_size(cfg: ConfigDict) -> tuple[int, int]:
    """(height, width) in pixels of the images in a batch, known without opening the set."""
    return find(cfg).size(cfg)


def open_split(cfg: ConfigDict, split: str) -> Source:
    """The set, or the part of one, that `split` names: `test`, `train[:45000]`, `train[98%:]`.

    A part is cut from one fixed shuffled order of the set, so that it holds all classes; parts that
    share a bound are disjoint. `cfg` is the configuration's data block. Raises UserError naming the
    valid names, the file that is missing or broken, or the label that is none of the classes.
    """
    given = find(cfg)
    source = cut(given.source(cfg, split_name(split, given.splits)), split)
    return in_memory(source, cfg.workers) if cfg.memory and source.decodes else source


def describe(source: Source) -> dict[str, object]:
    """What a report says about a source: its name, its size, its classes, its images' size."""
    return {
        "name": source.name,
        "images": len(source),
        "classes": len(source.classes),
        "height": source.size[0],
        "width": source.size[1],
    }
