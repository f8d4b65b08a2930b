"""The data sets by name, and `open_split`, which opens one.

To add a data set, write a module with a function `source(cfg.data, split)` that returns a `Source`,
and add an entry to SETS.
"""

import copy
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_scale.augment.random_crop import CROPS, MultiCrop, RandomCrop, file_crop
from vit_scale.augment.view import View, view
from vit_scale.data import (
    array_record,
    array_sets,
    cifar,
    fractal,
    hugging_face,
    image_folder,
    listed_images,
    photo_sets,
    tar_shards,
    tfds_sets,
    unlabelled_images,
)
from vit_scale.data.balanced import SAMPLINGS
from vit_scale.data.encoded_images import EncodedImages, decoded_size
from vit_scale.data.image_files import print_once
from vit_scale.data.loader import in_memory
from vit_scale.data.mixtures import Mixture, relabel
from vit_scale.data.real_labels import with_real_labels
from vit_scale.data.sources import Source
from vit_scale.data.splits import ORDERS, Slice, are_disjoint, cut, split_name
from vit_scale.data.targets import CLASS, KINDS, NONE, VALUE
from vit_scale.errors import UserError, nearest

# Sets that can have several classes or numbers.
TARGETED = ("array_record", "folder", "huggingface", "tar")


class DataSet(NamedTuple):
    """How to open one kind of data set; all functions take the config's data block."""

    splits: tuple[str, ...]
    source: Callable[[ConfigDict, str], Source]  # opens a split
    size: Callable[[ConfigDict], tuple[int, int]]  # (height, width) of the images


def _fractal_size(cfg: ConfigDict) -> tuple[int, int]:
    return cfg.fractal.resolution, cfg.fractal.resolution


def _folder(cfg: ConfigDict, split: str) -> Source:
    """Open folders of classes, the files that a listing labels, or all files without labels."""
    module = {CLASS: image_folder, NONE: unlabelled_images}.get(cfg.target, listed_images)
    return module.source(cfg, split)


FILE_SPLITS = ("train", "test", "val", "validation")
SETS = {  # by data.name
    "cifar10": DataSet(("train", "test"), cifar.source, lambda cfg: (32, 32)),
    "cifar100": DataSet(("train", "test"), cifar.source100, lambda cfg: (32, 32)),
    "mnist": DataSet(("train", "test"), array_sets.mnist, lambda cfg: (28, 28)),
    "fashion_mnist": DataSet(("train", "test"), array_sets.mnist, lambda cfg: (28, 28)),
    "svhn": DataSet(("train", "test"), array_sets.svhn, lambda cfg: (32, 32)),
    "stl10": DataSet(("train", "test"), array_sets.stl10, lambda cfg: (96, 96)),
    "flowers102": DataSet(("train", "val", "test"), photo_sets.flowers102, decoded_size),
    "pets": DataSet(("train", "test"), photo_sets.pets, decoded_size),
    "food101": DataSet(("train", "test"), photo_sets.food101, decoded_size),
    "imagenette": DataSet(("train", "val", "test"), photo_sets.imagenette, decoded_size),
    "imagewoof": DataSet(("train", "val", "test"), photo_sets.imagewoof, decoded_size),
    "tiny_imagenet": DataSet(("train", "val", "test"), photo_sets.tiny_imagenet, decoded_size),
    "fractal": DataSet(("train", "test"), fractal.source, _fractal_size),
    "folder": DataSet(FILE_SPLITS, _folder, decoded_size),
    "array_record": DataSet(FILE_SPLITS, array_record.source, decoded_size),
    "tar": DataSet(FILE_SPLITS, tar_shards.source, decoded_size),
    "huggingface": DataSet(FILE_SPLITS, hugging_face.source, decoded_size),
    "tfds": DataSet(FILE_SPLITS, tfds_sets.source, decoded_size),
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
    if memory := [part.name for part in parts(data) if not are_files(part)]:
        why = f"data.name={memory[0]} is in memory: set augment.crop=resized, for the step"
    elif data.memory:
        why = "data.memory decodes each only once: set data.memory=False, or augment.crop=resized"
    elif data.load:
        why = f"it decodes them to the model's size, not to data.load={data.load}: set data.load=0"
    else:
        return
    raise UserError(f"augment.crop={crop} crops image files each time they are read, and {why}")


def open_split(
    cfg: ConfigDict,
    split: str,
    file_view: View | None = None,
    crop: RandomCrop | MultiCrop | None = None,
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
    if cfg.target not in KINDS:
        raise UserError(f"data.target={cfg.target!r} is unknown; {nearest(cfg.target, KINDS)}")
    if cfg.target != CLASS and cfg.name not in TARGETED:
        raise UserError(
            f"data.name={cfg.name} has one class an image; data.target={cfg.target} needs "
            f"{', '.join(TARGETED)}"
        )
    if cfg.target == NONE and cfg.name != "folder":
        raise UserError(
            f"data.target=none is of image files in a folder: data.name={cfg.name} has labels, "
            "which objectives without labels ignore"
        )
    whole = entry.source(cfg, split_name(split, entry.splits))
    if file_view and isinstance(whole, EncodedImages):
        whole.view = file_view
    if isinstance(whole, EncodedImages):
        whole.crop = crop
    source = cut(whole, split, cfg.slices)
    if isinstance(source, Slice) and whole.decodes and source.by != cfg.slices:
        print_once(
            f"{whole.name} has no names of its images (a set without them, or packed by an earlier "
            "version): it is sliced by position, and its slices are not those of another storage"
        )
    if not (cfg.memory and source.decodes):
        return source
    loaded = in_memory(source, cfg.workers)
    loaded.recorded, loaded.ids = getattr(source, "recorded", {}), getattr(source, "ids", ())
    return loaded


def share_images(cfg: ConfigDict, one: str, other: str) -> bool:
    """Return whether two splits of the set that a data block names share images, or may.

    `val`, `validation` and `test` may be one set, of files without a test set: it is opened, if it
    is here.
    """
    if not are_disjoint(one, other):
        return True
    entry = data_set(cfg)
    names = [split_name(split, entry.splits) for split in (one, other)]
    if names[0] == names[1] or "train" in names:
        return False
    try:
        first, second = (entry.source(cfg, name).name for name in names)
    except UserError:
        return False
    return first == second and not are_disjoint(one, other.replace(names[1], names[0], 1))


def open_training(cfg: ConfigDict) -> Source:
    """Open the set that a config trains on: data.train, or the sets of data.mixture.

    `cfg` is the whole config. Raises UserError as `open_split` does, and for sets that cannot be
    mixed.
    """
    crop, data = file_crop(cfg), cfg.data
    if data.sampling not in SAMPLINGS:
        hint = nearest(data.sampling, SAMPLINGS)
        raise UserError(f"data.sampling={data.sampling!r} is unknown; {hint}")
    if data.sampling == "balanced" and data.mixture:
        raise UserError(
            "data.sampling=balanced cannot be combined with data.mixture, whose weights say how "
            "often each set is visited"
        )
    if not data.mixture:
        return open_split(data, data.train, crop=crop)
    sources = [open_split(part, data.train, crop=crop) for part in parts(data)]
    weights = [weight for _, weight in data.mixture]
    mixture = Mixture(sources, weights, numbers=data.target == VALUE)
    if data.batch < (least := len(sources) * (len(sources) - 1)):
        raise UserError(
            f"data.batch={data.batch} is too small for the {len(sources)} sets of data.mixture: it "
            f"must be at least {least}"
        )
    if data.repeats > 1:
        raise UserError(f"data.repeats={data.repeats} cannot be combined with data.mixture")
    epochs = mixture.epochs(cfg.steps, data.batch)
    shares = (f"{name} {count:.2f} epochs" for name, count in epochs)
    print_once(f"mixture in {cfg.steps:,} steps: {', '.join(shares)}")
    return mixture


def open_evaluation(
    cfg: ConfigDict, split: str, classes: Sequence[str], real: str | os.PathLike | None = None
) -> Source:
    """Open a split to evaluate on, cropped as the config's eval block says.

    Of a model that was trained on data.mixture, whose `classes` are those of several sets, it is
    labelled by them; without any, for a model without a head, as it is. `real` is a file of ReaL
    labels (real_labels.py). Raises UserError as
    `open_split` does, and for a class that is not among them.
    """
    source = open_split(cfg.data, split, view(cfg.eval))
    if real:
        source = with_real_labels(source, real)
    return relabel(source, classes) if cfg.data.mixture and classes else source


def pinned(cfg: ConfigDict) -> ConfigDict:
    """Return the config with the sets on Hugging Face's hub as NAME@REVISION, as they are now.

    Raises UserError for a set that cannot be found.
    """
    cfg, prefix = copy.deepcopy(cfg), "huggingface:"

    def pin(entry):
        if not isinstance(entry, tuple) or not str(entry[0]).startswith(prefix):
            return entry
        return (prefix + hugging_face.pinned(entry[0].removeprefix(prefix)), *entry[1:])

    if cfg.data.name == "huggingface":
        cfg.data.path = hugging_face.pinned(cfg.data.path)
    cfg.data.mixture = tuple(map(pin, cfg.data.mixture))
    return cfg


def parts(cfg: ConfigDict) -> list[ConfigDict]:
    """Return the data block of each set of data.mixture, or of the one set.

    An entry is ("NAME:PATH", weight), or ("NAME", weight) for a set at data.path. Raises UserError
    for an entry of another form.
    """
    blocks = []
    for entry in cfg.mixture or [(f"{cfg.name}:{cfg.path}", 1.0)]:
        named = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
        if not named or not isinstance(entry[1], int | float):
            raise UserError(
                f'data.mixture has {entry!r}, which must be ("NAME:PATH", weight), such as '
                '("folder:DIR", 0.7)'
            )
        name, _, path = entry[0].partition(":")
        block = copy.deepcopy(cfg)
        block.update({"name": name, "path": path or cfg.path, "mixture": ()})
        blocks.append(block)
    return blocks


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
