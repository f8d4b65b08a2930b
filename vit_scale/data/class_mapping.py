"""Whether a model's outputs are a set's classes: by their names, never by their number alone.

The same names in another order are mapped, other names refused. Where one side has no names, their
order is believed, and a line says so.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vit_scale.data.sources import Batch, Source
from vit_scale.errors import UserError, nearest

MODES = ("names", "order")  # of init.classes
SHOWN = 3  # names of each side in a refusal


class Match(NamedTuple):
    """Which output stands for each class of a set: all in order where it is None."""

    outputs: tuple[int, ...] | None = None
    line: str = ""  # what was believed or done; empty where there is nothing to say


def match(
    outputs: Sequence[str], classes: Sequence[str], mode: str = "names", ids: Sequence[str] = ()
) -> Match:
    """How as many `outputs` of a model go with the `classes` of a set.

    `mode` is init.classes; `ids` are the names of the set's folders, where its classes have others.
    Raises UserError for other names.
    """
    if mode not in MODES:
        raise UserError(f"init.classes={mode!r} is unknown; {nearest(mode, MODES)}")
    outputs, classes = tuple(outputs), tuple(classes)
    if mode == "order" and outputs != classes:
        return Match(None, f"{len(outputs)} outputs are the set's classes in order: init.classes")
    for spell, how in ((_as_it_is, "name"), (_first_synonym, "the first of each one's names")):
        for names in (classes, tuple(ids)):
            if list(map(spell, outputs)) == list(map(spell, names)):  # a name may occur twice
                return Match()
            if found := _mapped(outputs, names, spell):
                return Match(found, f"the set has the model's classes in another order: by {how}")
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
            "rename them, or give --config.init.classes=order if they are the same in this order"
        )
    raise UserError(
        f"the model's classes are not the set's: {_some(only)} are the model's alone, "
        f"{_some(others)} the set's; rename them, or give --config.init.classes=order if they "
        "are the same in this order"
    )


def is_numbered(names: Sequence[str]) -> bool:
    """Whether nobody named these classes."""
    return tuple(names) == tuple(map(str, range(len(names))))


def _as_it_is(name: str) -> str:
    """The name: an accent may be a character of its own, and looks the same."""
    return unicodedata.normalize("NFC", name)


def _first_synonym(name: str) -> str:
    """`tench` of "tench, Tinca tinca": data sets show the first of WordNet's words, or all.

    Ours adds the id where two have the same: "crane (n02012849)".
    """
    name = re.sub(r" \(n\d{8}\)$", "", _as_it_is(name))
    return name.split(",")[0].strip().lower().replace("_", " ")


def _mapped(
    outputs: Sequence[str], names: Sequence[str], spell: Callable[[str], str]
) -> tuple[int, ...] | None:
    """The output of each name, where both sides have the same, each once."""
    places = {spell(name): i for i, name in enumerate(outputs)}
    spelled = [spell(name) for name in names]
    if len(places) != len(outputs) or set(places) != set(spelled) or len(spelled) != len(places):
        return None
    return tuple(places[name] for name in spelled)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(map(repr, names[:SHOWN]))}{more}"


def align(source: Source, outputs: Sequence[str], mode: str = "names") -> tuple[Source, str]:
    """The source with its labels as the `outputs` of a model, and what was believed or done.

    Raises UserError where its classes are others. Another number of them is left as it is.
    """
    if len(outputs) != len(source.classes):
        return source, ""
    found = match(outputs, source.classes, mode, getattr(source, "ids", ()))
    line = f"{source.name}: {found.line}" if found.line else ""
    return (Relabelled(source, outputs, found.outputs) if found.outputs else source), line


class Relabelled:
    """A source whose labels are a model's outputs: label i becomes `outputs[i]`."""

    def __init__(self, source: Source, classes: Sequence[str], outputs: Sequence[int]):
        self.name, self.size, self.decodes = source.name, source.size, source.decodes
        self.classes = tuple(classes)
        self._source, self._outputs = source, np.array(outputs, np.int32)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Int[np.ndarray, "n"]) -> Batch:
        batch = self._source.read(indices)
        return {**batch, "label": np.where(batch["mask"], self._outputs[batch["label"]], 0)}
