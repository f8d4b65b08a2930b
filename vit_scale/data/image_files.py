"""List the images below a folder, and count the other files.

An image is a file with the extension of a format that the installed Pillow decodes. Hidden files
and folders, and those of operating systems and tools, are ignored at every depth; all others are
counted, so that images in an unsupported format are noticed.
"""

import collections
import errno
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, features

from vit_scale.data.decode import Corrupt
from vit_scale.distributed import multihost
from vit_scale.errors import RESUMABLE, UserError, printable
from vit_scale.storage import paths
from vit_scale.storage.errors import exit_code

# Errors of this machine at this moment, not of a file.
PASSING = (errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# The extensions that runs older than `data.listing` list.
COMMON = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
# Pillow opens these, but needs another program or library to decode them.
UNDECODABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # some builds lack these
# Hidden like names with a leading dot; in lower case.
HIDDEN = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@tmp"),  # network disks
    *("__macosx", "network trash folder", "temporary items"),  # macOS, and zips of it
    *("$recycle.bin", "system volume information", "recycler"),  # Windows
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found", "__pycache__"),
}


@functools.cache
def extensions() -> tuple[str, ...]:
    """Return the extensions, such as ".jpg", of all formats that this Pillow decodes, sorted."""
    Image.preinit()  # so that common formats stay the first that Pillow tries
    formats = Image.registered_extensions()
    lacking = {name for name, library in OPTIONAL.items() if not features.check(library)}
    decoded = {*Image.OPEN, "MPO"} - UNDECODABLE - lacking  # an MPO is opened as a JPEG
    return tuple(sorted(extension for extension, name in formats.items() if name in decoded))


def is_hidden(name: str) -> bool:
    """Return whether a file or folder belongs to an operating system or a tool."""
    return name.startswith(".") or name.lower() in HIDDEN


class SkippedFiles:
    """Files that are not images, counted by extension."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.first = ""

    def add(self, file: str) -> None:
        self.first = self.first or file
        self.counts[Path(file).suffix.lower() or "no extension"] += 1

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {n:,}" for name, n in self.counts.most_common(8))
        total = self.counts.total()
        are = "1 file is not an image" if total == 1 else f"{total:,} files are not images"
        return f"{are} that Pillow {Image.__version__} decodes: {counts} (first: {self.first})"

    def hint(self) -> str:
        """Return the end of an error message about a folder without images."""
        return f"; {self}" if self.counts else ""


def is_image(name: str, common: bool = False) -> bool:
    """Return whether a file name has an image's extension; `common` as for `image_names`."""
    return name.lower().endswith(COMMON if common else extensions())


def image_names(
    folder: Path, skipped: SkippedFiles, common: bool = False, prefix: str = ""
) -> Iterator[str]:
    """Yield the names of the images in and below `folder`, sorted, each after `prefix`.

    Other files are added to `skipped`. `common` is the behaviour of runs older than `data.listing`:
    nine extensions, and hidden folders as well.
    """
    for name, is_folder in paths.entries(folder):
        if is_folder and (common or not is_hidden(name)):
            yield from image_names(folder / name, skipped, common, f"{prefix}{name}/")
        elif is_folder or is_hidden(name):
            continue
        elif is_image(name, common):
            yield prefix + name
        else:
            skipped.add(prefix + name)


@functools.cache
def print_once(line: str) -> None:
    """Print a line on stderr, once per process, as a set is opened for each of its splits."""
    if multihost.is_first():
        print(f"vit-scale: {printable(line)}", file=sys.stderr, flush=True)


def read_image_file(path: Path) -> bytes:
    """Read a file. Raises Corrupt where it is missing, and UserError where storage fails.

    A bucket that does not answer, or a machine without memory, says nothing of the image: to leave
    it out would make batches depend on such moments.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise read_error(error, path) from error


def read_error(error: OSError, path: Path, shard: bool = False) -> Corrupt | UserError:
    """Return what to raise where a file of one image, or a `shard` of many, cannot be read."""
    missing = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    fails = missing if shard else paths.in_bucket(path) and not missing
    if fails or error.errno in PASSING:
        code = RESUMABLE if error.errno in PASSING else exit_code(error)
        return UserError(f"cannot read {path}: {error.strerror or error}", code)
    return Corrupt(error.strerror or str(error))


def check_readable(shard: Path) -> None:
    """Raise UserError where it is storage that fails, after a reader that does not tell has."""
    try:
        with shard.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise read_error(error, shard, shard=True) from error
