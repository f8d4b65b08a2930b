"""Classes as words, where a list beside the folders maps them; any other name stays what it is."""

import collections
import re
from pathlib import Path

# WordNet ids to words: Tiny ImageNet's list, and ImageNet's on Kaggle.
LISTS = (("words.txt", "\t"), ("LOC_synset_mapping.txt", " "))


def readable(folder: Path, classes: tuple[str, ...], common: bool = False) -> tuple[str, ...]:
    """The classes, each by the first word that a list in `folder` has for it, if one does.

    Two ids may share a first word (a crane flies, a crane lifts): the id tells them apart.
    `common`: as runs have it that are older than `data.listing`, of a name without a list what is
    before its comma.
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


def _words(folder: Path, wanted: set[str]) -> dict[str, str]:
    words: dict[str, str] = {}
    for file, separator in LISTS:
        if (folder / file).is_file():
            pairs = (line.partition(separator) for line in read_lines(folder / file))
            words |= {key: _decoded(text) for key, _, text in pairs if key in wanted}
    return words


def _decoded(text: str) -> str:
    """`text`, of Windows' Western encoding where it is no UTF-8."""
    if text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text):
        return text
    return text.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def read_lines(file: Path) -> list[str]:
    """The lines of a text that any system wrote: with or without a BOM, in UTF-8, UTF-16 or others.

    A byte of another encoding becomes what Python has for it in the name of a file.
    """
    data = file.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", errors="replace")
    else:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    return re.split(r"\r\n|\r|\n", text)
