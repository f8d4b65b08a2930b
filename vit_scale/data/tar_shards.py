"""Tar shards in WebDataset's layout, read in any order by an index of their members.

An example is the members that share a name up to its first dot: an image, and its label, a number
in NAME.cls or the "label" of NAME.json, which may also be a list (data.target). Without labels, the
first folder of NAME is the class. `index_shards` reads the headers once and writes SPLIT.index.npz
beside the shards; after that an example is one read of its bytes, on disk or in a bucket, there
through a cache.
"""

import copy
import functools
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict
from tqdm import tqdm

from vit_scale.data.class_names import read_lines, readable
from vit_scale.data.decode import Corrupt
from vit_scale.data.encoded_images import EncodedImages, Label
from vit_scale.data.example_ids import Examples
from vit_scale.data.image_files import (
    SkippedFiles,
    is_hidden,
    is_image,
    print_once,
    read_error,
)
from vit_scale.data.image_folder import FOLDERS
from vit_scale.data.patterns import SPLIT, find_files
from vit_scale.data.sources import MissingSplit
from vit_scale.data.targets import CLASS, VALUE, Rows, Targets, class_names, make_targets, rows_of
from vit_scale.data.workers import parallel_map
from vit_scale.errors import UserError
from vit_scale.storage import files, paths
from vit_scale.storage.errors import DAMAGED, user_errors
from vit_scale.storage.ranges import RangeReader

VERSION, TARGETS = 1, 2  # of an index; the second has labels that are no single class
BLOCK = tarfile.BLOCKSIZE
END = tarfile.RECORDSIZE  # bytes to read at a time of what follows the members
MOST_CLASSES = 1_000_000  # a larger number is an id
CLASSES = "classes.txt"  # beside the shards: the name of each label, a line each
TAR = ".tar"
INDEX_IT = "run `vit-scale data index {path}`"


class Member(NamedTuple):
    """An image in a shard."""

    file: str  # its name
    offset: int  # of its bytes in the shard
    length: int
    label: int | str | float | list | None  # a number, a class folder, a target, or unknown


class TarShards(EncodedImages):
    """The images of one split."""

    def __init__(
        self, name: str, shards: list[Path], classes: tuple[str, ...], index: dict, cfg: ConfigDict
    ):
        super().__init__(name, classes, cfg)
        self._shards, self._index = shards, index
        self._ranges = RangeReader(shards, cfg.cache)
        if cfg.target == CLASS:
            self._set_labels(index["labels"])
        else:
            rows = _rows(index, cfg.target, shards[0])
            self._set_labels(make_targets(rows, cfg.target, self.classes, self.location))

    def __len__(self) -> int:
        return len(self._labels)

    @functools.cached_property
    def examples(self) -> Examples:  # type: ignore[override]
        return self._identified(self._index["files"])

    def encoded(self, index: int) -> tuple[bytes, Label]:
        shard, offset, length = (
            int(self._index[column][index]) for column in ("shard", "offset", "length")
        )
        try:
            data = self._ranges.read(shard, offset, length)
        except OSError as error:
            raise read_error(error, self._shards[shard], shard=True) from error
        if len(data) != length:
            raise Corrupt(f"the shard ends after {len(data)} of {length} bytes")
        return data, self._label_of(index)

    def part(self, positions: Int[np.ndarray, "n"]) -> "TarShards":
        part = copy.copy(self)
        columns = ("shard", "offset", "length", "files")
        part._index = {column: self._index[column][positions] for column in columns}
        labels = self._labels
        part._labels = labels.part(positions) if isinstance(labels, Targets) else labels[positions]
        return part

    def location(self, index: int) -> str:
        member = self._index["files"][index].decode(errors="backslashreplace")
        return f"{self._shards[int(self._index['shard'][index])]} ({member})"


def source(cfg: ConfigDict, name: str) -> TarShards:
    """Open the split `name` (train, val, validation, test) of the shards at cfg.path.

    Without a test set, `test` is the validation set. Raises UserError for shards that are missing,
    truncated, or newer than their index, and for a label outside the classes.
    """
    for candidate in FOLDERS[name]:
        if shards := find_files(cfg.path, candidate, TAR):
            break
    else:
        raise MissingSplit(_no_shards(cfg.path, name))
    index = _read_index(shards, candidate, cfg.path)
    train = index
    if candidate != "train" and (others := find_files(cfg.path, "train", TAR)):
        train = _read_index(others, "train", cfg.path)
    folder = shards[0].parent
    shards = [folder / shard for shard in index["shards"].tolist()]  # in the index's order
    if cfg.target == CLASS and ("flat" in index or "flat" in train):
        raise UserError(
            f"{folder}: it has lists or fractions: set --config.data.target=classes or value"
        )
    if ("folders" in index) != ("folders" in train):
        one, other = ("class folders", "labels of their own")[:: 1 if "folders" in index else -1]
        raise UserError(f"{folder}: {candidate} has {one}, and train {other}: label both alike")
    classes = _class_names(folder, train, cfg.target)
    if "folders" in index and index is not train:  # numbered by this split's own folders
        index = _renumbered(index, train, shards[0])
    return TarShards(f"{folder.name} {candidate}", shards, classes, index, cfg)


def _no_shards(path: str, name: str) -> str:
    if SPLIT in path or path.endswith(TAR):
        return f"no shard of split {name!r} matches data.path={path}; correct the pattern"
    return f"{path} has no shards of split {name!r}; expected {name}*.tar or {name}/*.tar in it"


def _rows(index: dict, kind: str, where: Path) -> Rows:
    """Return the labels of an index as rows, of names if they are class folders."""
    if "flat" in index:
        flat = index["flat"]
        return Rows(index["names"][flat] if "names" in index else flat, index["ends"])
    if "folders" in index and kind == VALUE:
        raise UserError(f"{where}: its labels are class folders; data.target=value needs numbers")
    return Rows(index["labels"], np.arange(1, len(index["labels"]) + 1))


def _class_names(folder: Path, train: dict, kind: str) -> tuple[str, ...]:
    if kind == VALUE:
        return class_names(_rows(train, kind, folder), kind)
    if "folders" in train:
        return readable(folder, tuple(train["folders"].tolist()))
    if (folder / CLASSES).is_file():
        return tuple(line for line in read_lines(folder / CLASSES) if line)
    return class_names(_rows(train, kind, folder), kind)


def _renumbered(index: dict, train: dict, shard: Path) -> dict:
    """Number the classes as in the training set. Raises UserError for one that it lacks."""
    numbers = {name: number for number, name in enumerate(train["folders"].tolist())}
    own = index["folders"].tolist()
    if unknown := sorted(set(own) - set(numbers)):
        raise UserError(f"{shard}: class {unknown[0]!r} is not in the training shards")
    table = np.array([numbers[name] for name in own], np.int32)
    return index | {"labels": table[index["labels"]]}


def index_file(shards: list[Path], name: str) -> Path:
    return shards[0].parent / f"{name}.index.npz"


def _read_index(shards: list[Path], name: str, path: str) -> dict[str, np.ndarray]:
    """Read the index of a split's shards, and check it against them. Raises UserError."""
    file, again = index_file(shards, name), INDEX_IT.format(path=path)
    if not file.is_file():
        raise UserError(f"{shards[0].parent} has no index of its {name} shards; {again}")
    with (
        user_errors(f"cannot read {file}", again, also=DAMAGED),
        np.load(io.BytesIO(file.read_bytes())) as stored,
    ):
        index = dict(stored)
        version = int(index["version"])
    if version not in (VERSION, TARGETS):
        raise UserError(f"{file} has version {version}, not {VERSION} or {TARGETS}; {again}")
    sizes = paths.sizes(shards[0].parent)
    known = dict(zip(index["shards"].tolist(), index["sizes"].tolist(), strict=True))
    for shard in shards:
        if shard.name not in known:
            raise UserError(f"{file} does not know {shard.name}; {again}")
        if sizes[shard.name] != known[shard.name]:
            raise UserError(
                f"{shard} has {sizes[shard.name]} bytes, and its index is of one with "
                f"{known[shard.name]}: copy it again, or {again}"
            )
        if not paths.in_bucket(shard) and shard.stat().st_mtime > file.stat().st_mtime:
            raise UserError(f"{shard} is newer than its index; {again}")
    if len(known) != len(shards):
        missing = sorted(known.keys() - {shard.name for shard in shards})
        raise UserError(f"{shards[0].parent / missing[0]} is missing; copy it again, or {again}")
    return index


def index_shards(path: str, workers: int | None = None) -> dict[str, int]:
    """Index the tar shards at `path`, a folder or a pattern; return the images of each split.

    Headers are read by `workers` processes, one per core by default. An index is written when it is
    complete. Raises UserError for a path without shards, a truncated shard, or one without labels.
    """
    splits = {name: find_files(path, name, TAR) for name in ("train", *FOLDERS)}
    splits = {name: shards for name, shards in splits.items() if shards}
    if not splits:
        raise UserError(_no_shards(path, "train"))
    total = sum(map(len, splits.values()))
    counts = {}
    with tqdm(total=total, desc="index", unit="shard", disable=None) as bar:
        for name, shards in splits.items():
            members: dict[Path, list[Member]] = {}
            for shard, images in parallel_map(read_members, shards, workers):
                members[shard] = images
                bar.update()
            index = _make_index(shards, members)
            content = io.BytesIO()
            np.savez_compressed(content, **index)  # type: ignore[arg-type]
            files.write(index_file(shards, name), content.getvalue())
            counts[name] = len(index["labels"])
    return counts


def _make_index(shards: list[Path], members: dict[Path, list[Member]]) -> dict[str, np.ndarray]:
    rows = [(number, m) for number, shard in enumerate(shards) for m in members[shard]]
    sizes = paths.sizes(shards[0].parent)
    index = {
        "version": np.array(VERSION),
        "shards": np.array([shard.name for shard in shards]),
        "sizes": np.array([sizes[shard.name] for shard in shards], np.int64),
        "shard": np.array([number for number, _ in rows], np.int32),
        "offset": np.array([m.offset for _, m in rows], np.int64),
        "length": np.array([m.length for _, m in rows], np.int64),
        "files": np.array([m.file.encode("utf-8", "surrogateescape") for _, m in rows]),
    }
    return index | _labels(shards, rows)


def _labels(shards: list[Path], rows: list[tuple[int, Member]]) -> dict[str, np.ndarray]:
    """Return the labels, and the class folders or names that they number. Raises UserError."""
    if not rows:
        raise UserError(f"{shards[0]} has no images")
    kinds = {type(m.label) for _, m in rows}
    if kinds == {int}:
        return {"labels": np.array([m.label for _, m in rows], np.int32)}
    if kinds == {str}:
        folders = sorted({str(m.label) for _, m in rows})
        numbers = {name: number for number, name in enumerate(folders)}
        labels = np.array([numbers[str(m.label)] for _, m in rows], np.int32)
        return {"labels": labels, "folders": np.array(folders)}
    if kinds <= {int, float, list}:
        return _targets(rows)
    shard, member = next((s, m) for s, m in rows if type(m.label) in (str, type(None)))
    raise UserError(
        f"{shards[shard]} ({member.file}) has no label; each image needs a NAME.cls with a number, "
        'a NAME.json with a "label", or every image a class folder'
    )


def _targets(rows: list[tuple[int, Member]]) -> dict[str, np.ndarray]:
    """Return labels that are lists or fractions, of which earlier versions read none."""
    flat, ends = rows_of([m.label for _, m in rows], lambda index: rows[index][1].file)
    columns = {"version": np.array(TARGETS), "labels": np.full(len(rows), -1, np.int32)}
    if flat.dtype.kind == "U":
        columns["names"], flat = np.unique(flat, return_inverse=True)
    return columns | {"flat": flat, "ends": ends}


def read_members(shard: Path) -> list[Member]:
    """Return the images of a shard. Raises UserError if it is truncated or not a tar file."""
    advice = "copy or write it again"
    broken = (tarfile.TarError, EOFError, *DAMAGED)
    with user_errors(f"cannot index {shard}", advice, also=broken), paths.stream(shard) as stream:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            skipped = SkippedFiles()
            members = list(_examples(tar, shard, skipped))
            end = tar.offset
        stream.seek(end)
        rest = stream.read(END)
        if len(rest) < BLOCK:
            raise EOFError(
                f"it ends at byte {end + len(rest)}, without the mark of a tar file's end"
            )
        while rest and not any(rest):
            rest = stream.read(END)
        if rest:
            raise EOFError("more follows its end, which would not be read (tar --concatenate)")
    if skipped.counts:
        print_once(f"{shard}: {skipped}; skipped")
    return members


def _examples(tar: tarfile.TarFile, shard: Path, skipped: SkippedFiles) -> Iterator[Member]:
    def key(info: tarfile.TarInfo) -> str:
        folder, slash, name = info.name.removeprefix("./").rpartition("/")
        return folder + slash + name.partition(".")[0]

    def has_content(info: tarfile.TarInfo) -> bool:
        parts = info.name.removeprefix("./").split("/")
        return not info.isdir() and not any(map(is_hidden, parts))

    for name, group in itertools.groupby(filter(has_content, tar), key):
        image, labels, files = None, {}, []
        for info in group:
            file = info.name.removeprefix("./")
            suffix = file[file.rindex(".") :].lower() if "." in file else ""
            files.append(file)
            if not info.isfile():
                raise UserError(
                    f"{shard}: {file} is no file, but a link or another kind of member: write the "
                    "shard again, with what it stands for (tar --dereference --hard-dereference)"
                )
            if suffix in (".cls", ".json"):
                labels[file] = _label(tar, info, shard, suffix)
            elif is_image(file):
                if image:
                    raise UserError(f"{shard}: {image.file} and {file} are images of one example")
                image = Member(file, info.offset_data, info.size, None)
        label = _only(labels, shard)
        if label is not None and not image:
            raise UserError(
                f"{shard}: {', '.join(files)} is an example with a label and no image that "
                "Pillow reads: convert the image, or leave the example out"
            )
        if not image:
            for file in files:
                skipped.add(file)
        else:
            folder = name.partition("/")[0] if "/" in name else None
            yield image._replace(label=folder if label is None else label)


def _only(labels: dict[str, int | float | list | None], shard: Path):
    """Return the label in an example's files, None without one. Raises UserError for two."""
    known = {file: label for file, label in labels.items() if label is not None}
    (file, label), *others = known.items() or [("", None)]
    for other, different in others:
        if different != label:
            raise UserError(f"{shard}: {file} has the label {label}, and {other} {different}")
    return label


def _label(
    tar: tarfile.TarFile, info: tarfile.TarInfo, shard: Path, suffix: str
) -> int | float | list | None:
    member = tar.extractfile(info)
    text = member.read() if member else b""
    try:
        value = json.loads(text)
        if suffix == ".json":
            value = value.get("label") if isinstance(value, dict) else None
        if value is None or (type(value) is int and 0 <= value < MOST_CLASSES):
            return value
        if suffix == ".json" and type(value) in (int, float, list):
            return float(value) if type(value) is int else value
    except ValueError:
        pass
    raise UserError(
        f"{shard} ({info.name}) has no label that is a number below {MOST_CLASSES:,}, but "
        f"{text[:40]!r}"
    )
