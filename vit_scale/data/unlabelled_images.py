"""Image files without labels: every image in and below DIR/train, or DIR if it has no splits.

For objectives that need none (data.target=none). Folders in it, of classes or not, don't matter.
"""

import os

import numpy as np
from ml_collections import ConfigDict

from vit_scale.data import image_files
from vit_scale.data.image_folder import FOLDERS, ImageFolder, Listing
from vit_scale.data.sources import MissingSplit
from vit_scale.errors import UserError, printable
from vit_scale.storage import paths

ALL = ("image",)  # the one class, which every image has


def source(cfg: ConfigDict, split: str) -> ImageFolder:
    """Open every image of a split, or for `train` of a folder without splits.

    Raises UserError for a folder that is missing or has no images.
    """
    top, skipped = paths.parse(cfg.path), image_files.SkippedFiles()
    folders = [top / name for name in FOLDERS[split]]
    if split == "train" and not any(
        (top / name).is_dir() for names in FOLDERS.values() for name in names
    ):
        folders = [top]
    root = next((folder for folder in folders if folder.is_dir()), None)
    if root is None:
        raise MissingSplit(f"{top} has no folder {' or '.join(FOLDERS[split])}: check data.path")
    names = list(image_files.image_names(root, skipped, cfg.listing == "common"))
    if not names:
        raise UserError(f"{root} has no images{skipped.hint()}")
    if skipped.counts:
        image_files.print_once(f"{root}: {skipped}; skipped")
    files = np.array([os.fsencode(name) for name in names])
    listing = Listing(root, files, np.zeros(len(files), np.int32), ALL)
    title = top.resolve().name + (f" {root.name}" if root != top else "")
    return ImageFolder(printable(title), ALL, listing, cfg)
