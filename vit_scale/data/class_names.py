"""Show class folders named by WordNet ids as words, if a list beside them has the words."""

import collections
import re
from pathlib import Path

# (file, separator): Tiny ImageNet's list, and ImageNet's on Kaggle.
LISTS = (("words.txt", "\t"), ("LOC_synset_mapping.txt", " "))


def readable(folder: Path, classes: tuple[str, ...], common: bool = False) -> tuple[str, ...]:
    """Return the class names, replaced by their first synonym in a list in `folder`, if any.

    Two ids may share it (a crane flies, a crane lifts): then the id is appended. `common` is the
    behaviour of runs older than `data.listing`: names without a list are cut at a comma.
    """
    words = _words(folder, set(classes))
    if common:
        words = {name: words.get(name, name) for name in classes}
    first = {key: text.split(",")[0].strip() or key for key, text in words.items()}
    shown = [first.get(name, name) for name in classes]
    times = collections.Counter(shown)
    named = tuple(
        name if times[name] == 1 or key not in first else f"{name} ({key})"
        for name, key in zip(shown, classes, strict=True)
    )
    return named if len(set(named)) == len(classes) or common else classes


def _words(folder: Path, names: set[str]) -> dict[str, str]:
    words: dict[str, str] = {}
    for file, separator in LISTS:
        if (folder / file).is_file():
            pairs = (line.partition(separator) for line in read_lines(folder / file))
            words |= {key: _decoded(text) for key, _, text in pairs if key in names}
    return words


def _decoded(text: str) -> str:
    """Decode as Windows-1252 what was not UTF-8."""
    if text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text):
        return text
    return text.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text in UTF-8 or UTF-16, with or without a BOM, and any line breaks.

    Bytes that are not UTF-8 become surrogates, as in Python's file names.
    """
    data = file.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", errors="replace")
    else:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    return re.split(r"\r\n|\r|\n", text)
