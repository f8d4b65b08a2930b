"""Sets of encoded image files, which are decoded and cropped as they are read."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from vit_scale.augment.random_crop import Draws, MultiCrop, RandomCrop
from vit_scale.data.decode import TRAINING, Corrupt, decode, decode_crops
from vit_scale.data.example_ids import Examples
from vit_scale.data.sources import Batch, check_labels, empty_batch
from vit_scale.data.targets import Targets
from vit_scale.data.workers import thread_map
from vit_scale.errors import UserError, nearest

CHOICES = ("fail", "skip")  # of data.on_corrupt
Label = int | Float[np.ndarray, "t"]  # a class, or a target (targets.py)
DECODERS = ("turbo", "pillow")  # of data.decoder


def decoded_size(cfg: ConfigDict) -> tuple[int, int]:
    """Return the (height, width) at which files are decoded: data.load, else the model's input."""
    width = cfg.width or cfg.resolution
    if not cfg.load:
        return cfg.resolution, width
    return cfg.load, cfg.load if cfg.square else max(1, round(cfg.load * width / cfg.resolution))


class EncodedImages:
    """A source of image files, which subclasses locate by `encoded` and `location`."""

    decodes = True
    view = TRAINING  # how images are cropped without draws
    # How they are cropped for training, if not on the device.
    crop: RandomCrop | MultiCrop | None = None
    examples: Examples | None = None  # the examples' identity, if known
    _labels: np.ndarray | Targets  # of all examples, in sources that have them at hand
    targets = 0  # the length of the vectors that it has instead of labels

    def __init__(self, name: str, classes: Sequence[str], cfg: ConfigDict):
        for field, valid in (("on_corrupt", CHOICES), ("decoder", DECODERS)):
            if cfg[field] not in valid:
                hint = nearest(cfg[field], valid)
                raise UserError(f"data.{field}={cfg[field]!r} is unknown; {hint}")
        self.name = name
        self.classes = tuple(classes)
        self.size = decoded_size(cfg)
        self._skip = cfg.on_corrupt == "skip"
        self._decoder, self._threads = cfg.decoder, cfg.threads
        self._exif = cfg.exif

    def __len__(self) -> int:
        raise NotImplementedError

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "examples"}  # workers need no names

    @property
    def recorded(self) -> dict[str, object]:
        return {"fingerprint": self.examples.fingerprint()} if self.examples else {}

    @property
    def crops(self) -> bool:
        return self.crop is not None

    @property
    def multi_crop(self) -> MultiCrop | None:
        return self.crop if isinstance(self.crop, MultiCrop) else None

    def encoded(self, index: int) -> tuple[bytes, Label]:
        """Return the file's bytes and the label of one example. Raises Corrupt."""
        raise NotImplementedError

    def _set_labels(self, labels: np.ndarray | Targets) -> None:
        """Keep the labels of all examples. Raises UserError for one outside the classes."""
        if isinstance(labels, Targets):
            self._labels, self.targets = labels, labels.length
        else:
            self._labels = check_labels(labels, self.classes, self.name)

    def _label_of(self, index: int) -> Label:
        labels = self._labels
        return labels.vector(index) if isinstance(labels, Targets) else int(labels[index])

    def labels(self, indices: Int[np.ndarray, "m"]) -> np.ndarray:
        """Return the labels or targets at `indices`; images are read where they are not at hand."""
        stored = getattr(self, "_labels", None)
        if isinstance(stored, Targets):
            return stored.vectors(indices)
        if stored is None and not self.targets and self.examples:
            stored = self.examples.labels
        if stored is not None:
            return np.asarray(stored)[indices]
        return np.stack([np.asarray(self.encoded(index)[1]) for index in indices.tolist()])

    def _identified(self, names: np.ndarray) -> Examples:
        """Return the examples of these names; a target counts by its hash."""
        labels = self._labels
        return Examples(names, labels.hashes() if isinstance(labels, Targets) else labels)

    def location(self, index: int) -> str:
        """Return the file and the position of one example, for error messages."""
        raise NotImplementedError

    def part(self, positions: Int[np.ndarray, "n"]) -> "EncodedImages | Part":
        """Return the examples at `positions`, as small as they can be sent to a process."""
        return Part(self, positions)

    def read(self, indices: Int[np.ndarray, "n"], draws: Sequence[Draws] = ()) -> Batch:
        n = len(indices)
        batch = empty_batch(self, n)

        def read(slot: int) -> None:
            index = int(indices[slot])
            try:
                data, label = self.encoded(index)
                self._decode(batch, slot, data, draws[slot] if draws else None)
            except Corrupt as error:
                if self._skip:
                    return
                raise UserError(
                    f"cannot read {self.location(index)}: {error}; replace it, "
                    "or skip such images with --config.data.on_corrupt=skip"
                ) from error
            batch["target" if self.targets else "label"][slot] = label
            batch["mask"][slot] = True

        for _ in thread_map(read, range(n), self._threads):
            pass
        return batch

    def _decode(self, batch: Batch, slot: int, data: bytes, draws: Draws | None) -> None:
        """Write the pixels of one file into a batch."""
        if self.crop is None or draws is None:
            batch["image"][slot] = decode(data, self.size, self.view, self._exif)
            return
        crop, options = self.crop, (draws, self._exif, self._decoder)
        if not isinstance(crop, MultiCrop):
            (batch["image"][slot],) = decode_crops(data, [(crop, self.size)], *options)
            return
        crops = decode_crops(data, crop.sized(self.size), *options)
        batch["image"][slot] = crops[: crop.globals]
        if crop.locals:
            batch["local"][slot] = crops[crop.globals :]


class Part:
    """The encoded images at some positions of a source."""

    def __init__(self, source: EncodedImages, positions: Int[np.ndarray, "n"]):
        self._source, self._positions = source, positions
        self.targets = source.targets

    def __len__(self) -> int:
        return len(self._positions)

    def encoded(self, index: int) -> tuple[bytes, Label]:
        return self._source.encoded(int(self._positions[index]))

    def location(self, index: int) -> str:
        return self._source.location(int(self._positions[index]))
