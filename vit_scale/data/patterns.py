"""Paths with {split}, ranges and globs, which name the files of a set that is split over many."""

import fnmatch
import itertools
import re
from pathlib import Path

from vit_scale.errors import UserError
from vit_scale.storage import paths

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
SPLIT = "{split}"


def expand(pattern: str, complete: bool = True) -> list[Path]:
    """Return the files of one folder that a path with {000..146}, *, ? or [abc] names.

    Raises UserError for a range that names several folders, and, if it has to be `complete`, for
    one of which only some numbers have a file.
    """
    names = _numbered(pattern)
    parents = {name.rpartition("/")[0] for name in names}
    if len(parents) > 1:
        raise UserError(f"{pattern} names several folders; put the files of a split into one")
    parent = paths.parse(names[0]).parent
    try:
        present = sorted(paths.sizes(parent))
    except (FileNotFoundError, NotADirectoryError):
        return []
    matched = [fnmatch.filter(present, name.rpartition("/")[2]) for name in names]
    if complete and any(matched) and not all(matched):
        missing = names[matched.index([])]
        raise UserError(f"{missing} of {pattern} is missing; copy it again, or correct the range")
    return [parent / name for name in itertools.chain.from_iterable(matched)]


def _numbered(pattern: str) -> list[str]:
    """Return the pattern with each number of its ranges."""
    match = RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise UserError(f"{match[0]} in {pattern} ends before it begins: give {{{last}..{first}}}")
    numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    before, after = pattern[: match.start()], pattern[match.end() :]
    return list(itertools.chain.from_iterable(_numbered(before + n + after) for n in numbers))


def find_files(path: str, split: str, suffix: str) -> list[Path]:
    """Return the files of one split: of a pattern with {split}, or SPLIT*SUFFIX in a folder.

    A range is that of the training set: other splits may have fewer files.
    """
    if SPLIT in path:
        return expand(path.replace(SPLIT, split), complete=split == "train")
    if path.endswith(suffix):
        return expand(path) if split == "train" else []
    found = expand(f"{path}/{split}*{suffix}") or expand(f"{path}/{split}/*{suffix}")
    if split == "val":  # of which `validation` is no file
        found = [file for file in found if not file.name.startswith("validation")]
    return found
