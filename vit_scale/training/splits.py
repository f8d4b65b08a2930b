"""The splits of the data that a run trains on, selects by, and reports on."""

from typing import NamedTuple

from ml_collections import ConfigDict

from vit_scale.augment.random_crop import random_crop
from vit_scale.augment.view import view
from vit_scale.data import Source, open_split


class Splits(NamedTuple):
    """Data sets of one run; None where the config names none."""

    train: Source
    selection: Source | None  # chooses the best checkpoint
    final: Source | None  # reported at the end


def open_splits(cfg: ConfigDict) -> Splits:
    """Open the splits that the config names. Raises UserError where one can't be opened."""
    seen = view(cfg.eval)
    return Splits(
        train=open_split(cfg.data, cfg.data.train, crop=random_crop(cfg.augment)),
        selection=open_split(cfg.data, cfg.eval.split, seen) if cfg.eval.split else None,
        final=open_split(cfg.data, cfg.eval.final, seen) if cfg.eval.final else None,
    )


def class_ids(source: Source) -> tuple[str, ...]:
    """Return the names of the class folders, where the classes are shown under other names."""
    return getattr(source, "ids", ())
