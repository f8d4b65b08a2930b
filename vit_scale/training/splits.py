"""The splits of the data that a run trains on, selects by, and reports on."""

from typing import NamedTuple

from ml_collections import ConfigDict

from vit_scale.data import Source, open_evaluation, open_training


class Splits(NamedTuple):
    """Data sets of one run; None where the config names none."""

    train: Source
    selection: Source | None  # chooses the best checkpoint
    final: Source | None  # reported at the end
    bank: Source | None = None  # the neighbours of eval.probe=knn


def open_splits(cfg: ConfigDict) -> Splits:
    """Open the splits that the config names. Raises UserError where one can't be opened."""
    train, e = open_training(cfg), cfg.eval
    evaluated = (e.split or e.final) and e.probe
    return Splits(
        train,
        *(
            open_evaluation(cfg, split, train.classes) if split else None
            for split in (e.split, e.final, (e.bank or cfg.data.train) if evaluated else "")
        ),
    )


def class_ids(source: Source) -> tuple[str, ...]:
    """Return the names of the class folders, where the classes are shown under other names."""
    return getattr(source, "ids", ())
