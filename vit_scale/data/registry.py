"""The data sets by name, and `open_split`, which opens one.

To add a data set, write a module with a function `source(cfg.data, split)` that returns a `Source`,
and add an entry to SETS.
"""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_scale.augment.random_crop import CROPS, RandomCrop
from vit_scale.augment.view import View, view
from vit_scale.data import array_record, cifar, fractal, image_folder, tar_shards
from vit_scale.data.encoded_images import EncodedImages, decoded_size
from vit_scale.data.image_files import print_once
from vit_scale.data.loader import in_memory
from vit_scale.data.sources import Source
from vit_scale.data.splits import ORDERS, Slice, cut, split_name
from vit_scale.errors import UserError, nearest


class DataSet(NamedTuple):
    """How to open one kind of data set; all functions take the config's data block."""

    splits: tuple[str, ...]
    source: Callable[[ConfigDict, str], Source]  # opens a split
    size: Callable[[ConfigDict], tuple[int, int]]  # (height, width) of the images


def _fractal_size(cfg: ConfigDict) -> tuple[int, int]:
    return cfg.fractal.resolution, cfg.fractal.resolution


FILE_SPLITS = ("train", "test", "val", "validation")
SETS = {  # by data.name
    "cifar10": DataSet(("train", "test"), cifar.source, lambda cfg: (32, 32)),
    "fractal": DataSet(("train", "test"), fractal.source, _fractal_size),
    "folder": DataSet(FILE_SPLITS, image_folder.source, decoded_size),
    "array_record": DataSet(FILE_SPLITS, array_record.source, decoded_size),
    "tar": DataSet(FILE_SPLITS, tar_shards.source, decoded_size),
}


def data_set(cfg: ConfigDict) -> DataSet:
    """Return the entry that a data block names. Raises UserError for an unknown name."""
    if cfg.name not in SETS:
        raise UserError(f"data.name={cfg.name!r} is unknown; {nearest(cfg.name, SETS)}")
    return SETS[cfg.name]


def delivered_size(cfg: ConfigDict) -> tuple[int, int]:
    """Return the (height, width) of a set's images without opening it."""
    return data_set(cfg).size(cfg)


def are_files(cfg: ConfigDict) -> bool:
    """Return whether a data block names a set of image files, which are decoded to a given size."""
    return data_set(cfg).size is decoded_size


def views(cfg: ConfigDict, files: bool) -> tuple[View, View]:
    """Split evaluation's view into (decoding's, the device's), of which only one crops.

    `cfg` is the whole config. Image files are cropped when they are decoded, images in memory on
    the device.
    """
    cropped = view(cfg.eval)
    whole = cropped._replace(crop=1.0)
    return (cropped, whole) if files else (whole, cropped)


def check_crop(cfg: ConfigDict) -> None:
    """Raise UserError if augment.crop crops image files and the data block has none to crop.

    `cfg` is the whole config.
    """
    crop, data = cfg.augment.crop, cfg.data
    if crop not in CROPS:
        return
    if not are_files(data):
        why = (
            f"data.name={data.name} is in memory: set augment.crop=resized, which the step computes"
        )
    elif data.memory:
        why = "data.memory decodes each only once: set data.memory=False, or augment.crop=resized"
    elif data.load:
        why = f"it decodes them to the model's size, not to data.load={data.load}: set data.load=0"
    else:
        return
    raise UserError(f"augment.crop={crop} crops image files each time they are read, and {why}")


def open_split(
    cfg: ConfigDict, split: str, file_view: View | None = None, crop: RandomCrop | None = None
) -> Source:
    """Open a data set, or a part of one: `test`, `train[:45000]`, `train[98%:]` (see splits.py).

    Args:
      cfg: the config's data block.
      split: the name.
      file_view: how image files are cropped when they are decoded; None: not.
      crop: how they are cropped instead for training (`train_batches`); None: not.

    Raises:
      UserError: an unknown name, a missing or damaged file, or a label outside the classes.
    """
    entry = data_set(cfg)
    if cfg.slices not in ORDERS:
        raise UserError(f"data.slices={cfg.slices!r} is unknown; {nearest(cfg.slices, ORDERS)}")
    whole = entry.source(cfg, split_name(split, entry.splits))
    if file_view and isinstance(whole, EncodedImages):
        whole.view = file_view
    if isinstance(whole, EncodedImages):
        whole.crop = crop
    source = cut(whole, split, cfg.slices)
    if isinstance(source, Slice) and whole.decodes and source.by != cfg.slices:
        print_once(
            f"{whole.name} was packed without image names, by an earlier version: it is sliced by "
            "position, so that its slices are not those of the folder; pack it again to change that"
        )
    if not (cfg.memory and source.decodes):
        return source
    copy = in_memory(source, cfg.workers)
    copy.recorded, copy.ids = getattr(source, "recorded", {}), getattr(source, "ids", ())
    return copy


def describe(source: Source) -> dict[str, object]:
    """Return the metadata of a source that a run saves: name, number of images, classes, size.

    To detect changes there are also, if cheap, a fingerprint of the images' names and labels, and
    for a part of a set the set's size and how it was cut.
    """
    return {
        "name": source.name,
        "images": len(source),
        "classes": len(source.classes),
        "height": source.size[0],
        "width": source.size[1],
        **getattr(source, "recorded", {}),
    }
