"""Pack a set of image files, in any storage, into ArrayRecord shards (array_record.py reads them).

The files' bytes, labels, splits and names stay what they are, so slices and held-out examples are
those of the set that is packed. A shard gets its name when it is complete, so that rerunning an
interrupted command resumes. `index.json` has the contents of a finished set.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.data.array_record import INDEX, TARGETS, VERSION, read_index
from vit_scale.data.encoded_images import CHOICES, EncodedImages
from vit_scale.data.registry import SETS, are_files, open_split
from vit_scale.data.shards import Shard, write_errors, write_shards
from vit_scale.data.sources import MissingSplit
from vit_scale.data.statistics import target_rows
from vit_scale.data.targets import CLASS, CLASSES, NONE
from vit_scale.errors import USAGE, UserError, nearest
from vit_scale.storage import files, paths

SHARD = 2048  # images per shard, 230 MB of ImageNet
QUALITY = 95  # of images that are reduced
ORDER = 20201022  # seed of the shuffled order: all packs of a set are the same
FIELDS = ("data.image_column", "data.label_column", "data.target")  # that describe what is packed
SAMPLE = 16  # images that identify a set without names


def pack(
    source: str | Path,
    out: str | Path,
    workers: int | None = None,
    on_corrupt: str = "fail",
    shard: int = SHARD,
    shorter_side: int = 0,
    quality: int = QUALITY,
    overrides: Sequence[str] = (),
) -> dict[str, int]:
    """Pack a set of image files into ArrayRecord shards of `shard` images in `out`.

    Every image is decoded once, to find corrupt ones. Finished shards are not written again, so
    rerunning an interrupted pack resumes it.

    Args:
      source: an image folder, or "NAME:PATH" of a set in another storage, such as "tar:DIR".
      out: the folder of the packed set.
      workers: number of processes; None: one per core.
      on_corrupt: "fail" raises UserError for an unreadable image, "skip" leaves it out.
      shard: images per shard.
      shorter_side: pixels to which the shorter side of larger images is reduced; 0: store the files
        byte for byte.
      quality: of the JPEGs that reduced images become, 1 to 100.
      overrides: of the data block, such as "data.label_column=coarse".

    Returns:
      The number of packed images of each split, and of skipped ones as "skipped".

    Raises:
      UserError: a set that cannot be read, an unreadable image, a failed write, or another set in
        `out`.
    """
    _check(on_corrupt, shorter_side, quality)
    cfg, out = _data_block(str(source), overrides), paths.parse(out)
    splits = _open_splits(cfg, on_corrupt)
    reduced = (shorter_side, quality) if shorter_side else ()
    index = {
        "version": VERSION,
        "of": _fingerprint(cfg, splits, shard, on_corrupt, *reduced),
        "classes": splits["train"].classes,
    }
    if cfg.target != CLASS:
        index |= {"version": TARGETS, "target": cfg.target}
    _claim(out, index)
    plan = {
        name: _shards(out, name, images, shard, on_corrupt == "skip", *reduced)
        for name, images in splits.items()
    }
    packed = write_shards([s for shards in plan.values() for s in shards], workers)
    _finish(out, index, splits, plan, packed)
    counts = {name: sum(len(packed[s.file]) for s in shards) for name, shards in plan.items()}
    return counts | {"skipped": sum(map(len, splits.values())) - sum(counts.values())}


def _check(on_corrupt: str, shorter_side: int, quality: int) -> None:
    """Raise UserError for arguments of `pack` that can't work, or would be ignored."""
    if on_corrupt not in CHOICES:
        raise UserError(f"on_corrupt={on_corrupt!r} is unknown; {nearest(on_corrupt, CHOICES)}")
    if shorter_side < 0 or not 1 <= quality <= 100:
        raise UserError(
            f"--shorter-side {shorter_side} must be at least 0, and --quality {quality} 1 to 100"
        )
    if quality != QUALITY and not shorter_side:
        line = f"--quality {quality} is of images that are reduced: give --shorter-side"
        raise UserError(line, USAGE)


def _data_block(source: str, overrides: Sequence[str]) -> ConfigDict:
    """Return the data block of "NAME:PATH", or of the image folder PATH."""
    name, colon, path = source.partition(":")
    if name not in SETS or not colon:
        if colon and not path.startswith("//") and not Path(source).exists():
            raise UserError(f"{source}: data set {name!r} is unknown; {nearest(name, SETS)}")
        name, path = "folder", source
    cfg = config.override(config.base(), overrides).data
    cfg.update({"name": name, "path": path})
    if cfg.target == NONE:
        raise UserError(
            "data pack needs labels: data.target=none reads images without any, from a folder"
        )
    if not are_files(cfg):
        raise UserError(f"{name} is not a set of image files: it is read into memory as it is")
    return cfg


def _open_splits(cfg: ConfigDict, on_corrupt: str) -> dict[str, EncodedImages]:
    """Open the labelled splits of a set, of which `train` must be one."""
    splits: dict[str, EncodedImages] = {}
    for name in ("train", "val", "test"):
        if name not in SETS[cfg.name].splits:
            continue
        try:
            split = open_split(cfg, name)
        except MissingSplit:
            if name == "train":
                raise
            continue
        assert isinstance(split, EncodedImages)
        if split.name in {other.name for other in splits.values()}:
            continue  # without a test set, `test` is the validation set
        if split.examples is None and on_corrupt == "skip":
            raise UserError(
                f"{split.name} has no names of its images, so leaving out corrupt ones would move "
                "the others to other slices: pack it with --on-corrupt fail"
            )
        splits[name] = split
    return splits


def _shards(
    out: Path, name: str, images: EncodedImages, size: int, skip: bool, *reduced: int
) -> list[Shard]:
    """Divide the images into shards, each of which is a random sample.

    Without names they stay in order, by which they are sliced.
    """
    order = np.arange(len(images))
    if images.examples is not None:
        order = np.random.RandomState(ORDER).permutation(len(images))
    parts = np.split(order, range(size, len(order), size))
    return [
        Shard(
            out / f"{name}-{number:05d}-of-{len(parts):05d}.array_record",
            images.part(part),
            part,
            skip,
            *reduced,
        )
        for number, part in enumerate(parts)
    ]


def _fingerprint(
    cfg: ConfigDict, splits: dict[str, EncodedImages], shard: int, on_corrupt: str, *reduced: int
) -> str:
    """Identify the images and options of a pack. That of a folder never changes: packs resume."""
    train = splits["train"]
    options = (shard, on_corrupt, getattr(train, "ids", train.classes), *reduced)
    if cfg.name != "folder":
        options = (cfg.name, cfg.target, *options)
    digest = hashlib.sha256(repr(options).encode())
    for name, images in splits.items():
        digest.update(name.encode())
        if images.examples is not None:
            digest.update(b"\n".join(images.examples.files.tolist()))
            digest.update(images.examples.labels.tobytes())
            continue
        digest.update(str(len(images)).encode())
        for index in np.unique(np.linspace(0, len(images) - 1, SAMPLE).astype(np.int64)).tolist():
            data, label = images.encoded(index)
            digest.update(data + np.asarray(label).tobytes())
    return digest.hexdigest()


def _claim(out: Path, index: dict) -> None:
    """Mark `out` as the pack of this set, or raise UserError if it is another set's."""
    existing = read_index(out)
    if existing is None and not any(out.glob("*.array_record")):
        out.mkdir(parents=True, exist_ok=True)
        _write_index(out, index | {"finished": False, "splits": {}})
        return
    earlier = existing is not None and existing["version"] < VERSION
    if existing is None or existing["of"] != index["of"]:
        why = ", or was begun by an earlier version, which listed other files" if earlier else ""
        raise UserError(f"{out} has shards of other images or options{why}; pack into a new folder")
    if earlier and existing["finished"]:  # names would change the slices of existing runs
        raise UserError(
            f"{out} was packed by an earlier version, without image names, and can be used as it "
            "is; to add the names, pack into a new folder"
        )


def _finish(
    out: Path,
    index: dict,
    splits: dict[str, EncodedImages],
    plan: dict[str, list[Shard]],
    packed: dict[Path, np.ndarray],
) -> None:
    """Write the names of the images, and the index of a complete set."""
    positions = {
        name: np.concatenate([shard.positions[packed[shard.file]] for shard in shards])
        for name, shards in plan.items()
    }
    names = {
        name: _write_examples(out, name, images, positions[name], index.get("target"))
        for name, images in splits.items()
        if images.examples is not None
    }
    stored = paths.sizes(out)
    contents = {
        name: [
            {"file": s.file.name, "images": len(packed[s.file]), "bytes": stored[s.file.name]}
            for s in shards
        ]
        for name, shards in plan.items()
    }
    examples = {name: {"file": file, "bytes": stored[file]} for name, file in names.items()}
    _write_index(out, index | {"finished": True, "splits": contents, "examples": examples})


def _write_index(out: Path, index: dict) -> None:
    files.write(out / INDEX, json.dumps(index, indent=1).encode())


def _write_examples(
    out: Path, name: str, images: EncodedImages, positions: np.ndarray, target: str | None
) -> str:
    """Write the file name and label of each record of a split; return the name of the file.

    With a `target`, which the records have too, its statistics need not read them.
    """
    assert images.examples is not None
    content, file = io.BytesIO(), out / f"{name}-examples.npz"
    listed = {"files": images.examples.files, "labels": images.examples.labels}
    listed = {key: values[positions] for key, values in listed.items()}
    if target:
        rows = target_rows(images, positions, target == CLASSES)
        listed |= {"target_flat": rows.flat, "target_ends": rows.ends}
    np.savez_compressed(content, **listed)  # type: ignore[arg-type]
    with write_errors(file):
        files.write(file, content.getvalue())
    return file.name
