"""Where images come from: sets of them, parts of sets by name, and batches by step.

`open_split` gives a source, a random-access set; `train_batches` and `eval_batches` read it in
Grain pipelines. A new kind of set is one module with a `source(cfg.data, name)` and one entry here.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_scale.data import cifar, folder, fractal, records
from vit_scale.data.pipeline import eval_batches, in_memory, train_batches
from vit_scale.data.sources import Batch, InMemory, Slice, Source, cut, split_name
from vit_scale.errors import UserError, nearest

__all__ = [
    "Batch",
    "InMemory",
    "Slice",
    "Source",
    "describe",
    "eval_batches",
    "open_split",
    "train_batches",
]


# Of each data.name: the whole sets that it has, and what opens one.
SETS: dict[str, tuple[tuple[str, ...], Callable[[ConfigDict, str], Source]]] = {
    "cifar10": (("train", "test"), cifar.source),
    "fractal": (("train", "test"), fractal.source),
    "folder": (("train", "test", "val", "validation"), folder.source),
    "array_record": (("train", "test", "val", "validation"), records.source),
}


def open_split(cfg: ConfigDict, split: str) -> Source:
    """The set, or the part of one, that `split` names: `test`, `train[:45000]`, `train[98%:]`.

    A part is cut from one fixed shuffled order of the set, so that it holds all classes; parts that
    share a bound are disjoint. `cfg` is the configuration's data block. Raises UserError naming the
    valid names, the file that is missing or broken, or the label that is none of the classes.
    """
    if cfg.name not in SETS:
        raise UserError(f"data.name={cfg.name!r} is unknown; {nearest(cfg.name, SETS)}")
    valid, opener = SETS[cfg.name]
    source = cut(opener(cfg, split_name(split, valid)), split)
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
