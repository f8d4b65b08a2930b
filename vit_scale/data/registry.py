"""Where images come from: sets of them, parts of sets by name, and batches by step.

`open_split` gives a source, a random-access set; `train_batches` and `eval_batches` read it in
Grain pipelines. A new kind of set is one module with a `source(cfg.data, name)` and one entry here.
"""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_scale.augment.view import View, view
from vit_scale.data import array_record, cifar, fractal, image_folder
from vit_scale.data.decode import EncodedImages, decoded_size
from vit_scale.data.image_files import say
from vit_scale.data.loader import in_memory
from vit_scale.data.sources import Source
from vit_scale.data.splits import ORDERS, Slice, cut, split_name
from vit_scale.errors import UserError, nearest


class Set(NamedTuple):
    splits: tuple[str, ...]  # the whole sets that it has
    source: Callable[[ConfigDict, str], Source]  # opens one
    size: Callable[[ConfigDict], tuple[int, int]]  # (height, width) of its images, unopened


def _fractal_size(cfg: ConfigDict) -> tuple[int, int]:
    return cfg.fractal.resolution, cfg.fractal.resolution


SETS = {  # by data.name
    "cifar10": Set(("train", "test"), cifar.source, lambda cfg: (32, 32)),
    "fractal": Set(("train", "test"), fractal.source, _fractal_size),
    "folder": Set(("train", "test", "val", "validation"), image_folder.source, decoded_size),
    "array_record": Set(("train", "test", "val", "validation"), array_record.source, decoded_size),
}


def find(cfg: ConfigDict) -> Set:
    """The set that a data block names. Raises UserError for an unknown one."""
    if cfg.name not in SETS:
        raise UserError(f"data.name={cfg.name!r} is unknown; {nearest(cfg.name, SETS)}")
    return SETS[cfg.name]


def delivered_size(cfg: ConfigDict) -> tuple[int, int]:
    """(height, width) in pixels of the images in a batch, known without opening the set."""
    return find(cfg).size(cfg)


def are_files(cfg: ConfigDict) -> bool:
    """Whether the set that a data block names is of encoded images, which are decoded to a size."""
    return find(cfg).size is decoded_size


def views(cfg: ConfigDict, files: bool) -> tuple[View, View]:
    """Evaluation's view in two parts, of which one crops: of a file that is decoded, on the device.

    `cfg` is the whole configuration. `files`: the set is one of files, which are cropped where they
    are decoded; images in memory are cropped on the device.
    """
    seen = view(cfg.eval)
    whole = seen._replace(crop=1.0)
    return (seen, whole) if files else (whole, seen)


def open_split(cfg: ConfigDict, split: str, seen: View | None = None) -> Source:
    """The set, or the part of one, that `split` names: `test`, `train[:45000]`, `train[98%:]`.

    A part is cut from one fixed shuffled order of the set, so that it holds all classes; parts that
    share a bound are disjoint, also in another storage of the same set. `cfg` is the
    configuration's data block, `seen` evaluation's view of files; without one they are decoded as
    for training. Raises UserError naming the valid names, the file that is missing or broken, or
    the label that is none of the classes.
    """
    given = find(cfg)
    if cfg.slices not in ORDERS:
        raise UserError(f"data.slices={cfg.slices!r} is unknown; {nearest(cfg.slices, ORDERS)}")
    whole = given.source(cfg, split_name(split, given.splits))
    if seen and isinstance(whole, EncodedImages):
        whole.view = seen
    source = cut(whole, split, cfg.slices)
    if isinstance(source, Slice) and whole.decodes and source.by != cfg.slices:
        say(
            f"{whole.name} was packed before packs held the names of their images: its slices are "
            "by position, of other images than those of its folder; pack it anew for the same ones"
        )
    if not (cfg.memory and source.decodes):
        return source
    held = in_memory(source, cfg.workers)
    held.recorded, held.ids = getattr(source, "recorded", {}), getattr(source, "ids", ())
    return held


def describe(source: Source) -> dict[str, object]:
    """What a run says about a source: its name, its size, its classes, its images' size.

    And what tells whether it is still the same, where that is cheap to know: a fingerprint of the
    names and labels of its images; of a part of a set, how large that is, and how it was cut.
    """
    return {
        "name": source.name,
        "images": len(source),
        "classes": len(source.classes),
        "height": source.size[0],
        "width": source.size[1],
        **getattr(source, "recorded", {}),
    }
