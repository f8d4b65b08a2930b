"""Which files below a folder are images, and what is left out: one answer for all that list them.

An image is a file with an extension of a format that the installed Pillow decodes. Hidden files and
folders, and those that a system keeps for itself, are passed over at every depth; any other file is
counted, so that what a format that Pillow lacks would cost is said.
"""

import collections
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, features

from vit_scale.distributed import multihost
from vit_scale.errors import printable
from vit_scale.storage import paths

# What is listed for runs that are older than `data.listing`.
COMMON = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
# Pillow opens these, and decodes them only with a program or a library beside it.
UNDECODABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # some builds lack these
# Whatever begins with a dot is hidden; these are, too. In lower case.
HIDDEN = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@tmp"),  # network disks
    *("__macosx", "network trash folder", "temporary items"),  # macOS, and zips of it
    *("$recycle.bin", "system volume information", "recycler"),  # Windows
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found", "__pycache__"),
}


@functools.cache
def extensions() -> tuple[str, ...]:
    """Those of every format that Pillow decodes here, such as ".jpg", sorted."""
    Image.preinit()  # first, so that the usual formats stay the first that are tried
    formats = Image.registered_extensions()
    lacking = {name for name, library in OPTIONAL.items() if not features.check(library)}
    decoded = {*Image.OPEN, "MPO"} - UNDECODABLE - lacking  # an MPO is opened as a JPEG
    return tuple(sorted(ending for ending, name in formats.items() if name in decoded))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a system's or a tool's, not the user's."""
    return name.startswith(".") or name.lower() in HIDDEN


class LeftOut:
    """Files that are no images, by extension."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.first = ""

    def add(self, file: str) -> None:
        self.first = self.first or file
        self.counts[Path(file).suffix.lower() or "no extension"] += 1

    def __str__(self) -> str:
        each = ", ".join(f"{ending} {count:,}" for ending, count in self.counts.most_common(8))
        total = self.counts.total()
        are = "1 file is no image" if total == 1 else f"{total:,} files are no images"
        return f"{are} that Pillow {Image.__version__} reads here: {each} (first: {self.first})"

    def instead(self) -> str:
        """What there is instead of images, to end an error with."""
        return f"; {self}" if self.counts else ""


def images(
    folder: Path, left_out: LeftOut, common: bool = False, prefix: str = ""
) -> Iterator[str]:
    """The images in `folder` and below it, by name, each after `prefix`; the rest is `left_out`.

    `common`: as runs list them that are older than `data.listing`: nine extensions, and hidden
    folders as well.
    """
    for name, is_folder in paths.entries(folder):
        if is_folder and (common or not is_hidden(name)):
            yield from images(folder / name, left_out, common, f"{prefix}{name}/")
        elif is_folder or is_hidden(name):
            continue
        elif name.lower().endswith(COMMON if common else extensions()):
            yield prefix + name
        else:
            left_out.add(prefix + name)


@functools.cache
def say(line: str) -> None:
    """Print a line about a set on stderr, once in a program: a set is opened for each split."""
    if multihost.is_first():
        print(f"vit-scale: {printable(line)}", file=sys.stderr, flush=True)
