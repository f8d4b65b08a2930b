"""Match a model's outputs to a set's classes by name, never by their number alone.

The same names in another order are mapped, different names refused. If one side has no names, the
order is assumed to be the same, and a line on stderr says so.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vit_scale.augment.random_crop import Draws
from vit_scale.data.sources import Batch, Source, labels_of
from vit_scale.errors import UserError, nearest

MODES = ("names", "order")  # of init.classes
SHOWN = 3  # names of each side in an error message


class Match(NamedTuple):
    """The output for each class of a set."""

    outputs: tuple[int, ...] | None = None  # None: output i is class i
    line: str = ""  # what was assumed or mapped, if anything


def match(
    outputs: Sequence[str], classes: Sequence[str], mode: str = "names", ids: Sequence[str] = ()
) -> Match:
    """Match the `outputs` of a model to as many `classes` of a set.

    `mode` is init.classes; `ids` are the set's folder names if its classes are shown by other
    names. Raises UserError if the names differ.
    """
    if mode not in MODES:
        raise UserError(f"init.classes={mode!r} is unknown; {nearest(mode, MODES)}")
    outputs, classes = tuple(outputs), tuple(classes)
    if mode == "order" and outputs != classes:
        return Match(None, f"assuming the {len(outputs)} outputs in order: init.classes=order")
    for spell, how in ((_normalised, "name"), (_first_synonym, "first synonym")):
        for names in (classes, tuple(ids)):
            if list(map(spell, outputs)) == list(map(spell, names)):  # a name may occur twice
                return Match()
            if mapping := _mapping(outputs, names, spell):
                return Match(mapping, f"mapping the model's classes, in another order, by {how}")
    for who, names in (("the model's outputs", outputs), ("the set's classes", classes)):
        if is_numbered(names):
            return Match(
                None,
                f"assuming that output i is class i of the set, {classes[0]} to {classes[-1]}: "
                f"{who} have no names",
            )
    only, others = sorted(set(outputs) - set(classes)), sorted(set(classes) - set(outputs))
    if not only and not others:
        twice = sorted({name for name in outputs if outputs.count(name) > 1})
        raise UserError(
            f"the model has the set's classes in another order, and {_some(twice)} more than once: "
            "rename them, or set --config.init.classes=order if the order is the same"
        )
    raise UserError(
        f"the model's classes are not the set's: {_some(only)} only in the model, {_some(others)} "
        "only in the set; rename them, or set --config.init.classes=order if the order is the same"
    )


def is_numbered(names: Sequence[str]) -> bool:
    """Return whether the classes are named 0, 1, 2, ..."""
    return tuple(names) == tuple(map(str, range(len(names))))


def _normalised(name: str) -> str:
    """Return the name in NFC: accents may be encoded as separate characters."""
    return unicodedata.normalize("NFC", name)


def _first_synonym(name: str) -> str:
    """Return "tench" for "tench, Tinca tinca", and "crane" for "crane (n02012849)".

    Data sets use the first of WordNet's words or all; class_names.py appends the id of duplicates.
    """
    name = re.sub(r" \(n\d{8}\)$", "", _normalised(name))
    return name.split(",")[0].strip().lower().replace("_", " ")


def _mapping(
    outputs: Sequence[str], names: Sequence[str], spell: Callable[[str], str]
) -> tuple[int, ...] | None:
    """Return the output of each name, or None unless both sides have the same, each once."""
    positions = {spell(name): i for i, name in enumerate(outputs)}
    spelled = [spell(name) for name in names]
    if (
        len(positions) != len(outputs)
        or set(positions) != set(spelled)
        or len(spelled) != len(positions)
    ):
        return None
    return tuple(positions[name] for name in spelled)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(map(repr, names[:SHOWN]))}{more}"


def align(source: Source, outputs: Sequence[str], mode: str = "names") -> tuple[Source, str]:
    """Relabel a source as the `outputs` of a model; return it and a line on what was assumed.

    Raises UserError if the classes differ. A source with another number of classes is unchanged.
    """
    if len(outputs) != len(source.classes):
        return source, ""
    matched = match(outputs, source.classes, mode, getattr(source, "ids", ()))
    line = f"{source.name}: {matched.line}" if matched.line else ""
    return (Relabelled(source, outputs, matched.outputs) if matched.outputs else source), line


class Relabelled:
    """A source whose labels are a model's outputs: label i becomes `outputs[i]`."""

    def __init__(self, source: Source, classes: Sequence[str], outputs: Sequence[int]):
        self.name, self.size, self.decodes = source.name, source.size, source.decodes
        self.crops = getattr(source, "crops", False)
        self.recorded: dict[str, object] = getattr(source, "recorded", {})
        self.classes = tuple(classes)
        self.targets = len(self.classes) if getattr(source, "targets", 0) else 0
        self._source, self._outputs = source, np.array(outputs, np.int32)

    def __len__(self) -> int:
        return len(self._source)

    def labels(self, indices: Int[np.ndarray, "m"]) -> np.ndarray:
        labels = labels_of(self._source, indices)
        return self._reordered(labels) if self.targets else self._outputs[labels]

    def _reordered(self, targets: Float[np.ndarray, "n t"]) -> Float[np.ndarray, "n c"]:
        reordered = np.zeros((len(targets), self.targets), np.float32)
        reordered[:, self._outputs] = targets
        return reordered

    def read(self, indices: Int[np.ndarray, "n"], *draws: Sequence[Draws]) -> Batch:
        batch = self._source.read(indices, *draws)
        if "target" in batch:
            batch["target"] = self._reordered(batch["target"])
        return {**batch, "label": np.where(batch["mask"], self._outputs[batch["label"]], 0)}
