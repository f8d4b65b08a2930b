"""Paths with {split}, ranges and globs, which name the files of a set that is split over many."""

import fnmatch
import itertools
import re
from pathlib import Path

from vit_scale.storage import paths

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
SPLIT = "{split}"


def expand(pattern: str) -> list[Path]:
    """Return the files that a path with {000..146}, *, ? or [abc] in its last part names."""
    if match := RANGE.search(pattern):
        first, last = match.groups()
        numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
        before, after = pattern[: match.start()], pattern[match.end() :]
        return list(itertools.chain.from_iterable(expand(before + n + after) for n in numbers))
    path = paths.parse(pattern)
    try:
        names = paths.sizes(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path.parent / name for name in sorted(names) if fnmatch.fnmatchcase(name, path.name)]


def find_files(path: str, split: str, suffix: str) -> list[Path]:
    """Return the files of one split: of a pattern with {split}, or SPLIT*SUFFIX in a folder."""
    if SPLIT in path:
        return expand(path.replace(SPLIT, split))
    if path.endswith(suffix):
        return expand(path) if split == "train" else []
    return expand(f"{path}/{split}*{suffix}") or expand(f"{path}/{split}/*{suffix}")
