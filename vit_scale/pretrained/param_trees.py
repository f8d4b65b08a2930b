"""Which of a file's arrays are the model: under whatever wraps them, and of several the one meant.

Trainers save a state dict under any key, in other modules, beside its average, its teacher or its
optimizer. All names of a file are one flat list here ("state_dict.module.backbone.cls_token"), and
a model is where the patch embedding of a known format lies: what comes before that is its prefix.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vit_scale.errors import UserError, nearest
from vit_scale.pretrained.formats import FORMATS
from vit_scale.pretrained.key_mapping import Arrays, WeightFormat
from vit_scale.pretrained.weight_files import SHARD

SHOWN = 6  # names in a line, of a hundred that there may be
# Parts of a prefix, and why that model is taken of several. The first that is there is.
PREFERRED = (
    ("state_dict_ema", "as timm does"),
    ("model_ema", "as timm and DeiT do"),
    (r"(.*_)?(ema|averaged?|swa)(_.*)?", "the average"),
    ("teacher", "as DINO, iBOT and DINOv2 do"),
    ("base_encoder|encoder_q", "as MoCo does"),
    ("state_dict", "as timm does"),
    ("model", "as timm does"),
)
# Taken where there is no other.
LAST = "student|momentum_encoder|encoder_k|optimizer.*|mu|nu|exp_avg.*"


class Tree(NamedTuple):
    """One model of a file."""

    dialect: WeightFormat
    prefix: str  # of its names in the file, with the last separator
    arrays: Arrays  # without the prefix
    notes: tuple[str, ...]  # what was left aside, and why it was this one


def select(file: object, arrays: Mapping[str, np.ndarray], dialect: str, tree: str) -> Tree:
    """The model in the arrays of a file.

    `dialect` is init.dialect, `tree` init.tree; empty: recognised by the names, and what the
    file's own library takes. Raises UserError, in one line, for names of no known format and where
    it can't be said which of several models is meant.
    """
    found, there = recognise(file, arrays, dialect)
    prefix, lines = choose(file, there, tree)
    deeper = tuple(other for other in there if other != prefix and other.startswith(prefix))
    inside = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix) and not name.startswith(deeper)
    }
    others = tuple(other for other in there if other != prefix)
    aside = [
        n for n in arrays if not n.startswith(prefix) and not (others and n.startswith(others))
    ]
    unused = [name for name in inside if found.unused and re.match(found.unused, name)]
    if aside:
        lines.append(f"left aside, no parameters of it: {some(aside)}")
    if unused:
        lines.append(f"left aside, not used to predict: {some(unused)}")
        inside = {name: array for name, array in inside.items() if name not in unused}
    return Tree(found, prefix, inside, tuple(lines))


def recognise(
    file: object, names: Iterable[str], forced: str = ""
) -> tuple[WeightFormat, tuple[str, ...]]:
    """The dialect, and the prefixes of the models of it. Raises UserError."""
    names = list(names)
    if forced:
        if forced not in FORMATS:
            raise UserError(f"init.dialect={forced!r} is unknown; {nearest(forced, FORMATS)}")
        dialect = FORMATS[forced]
        return dialect, prefixes(dialect, names) or ("",)
    for dialect in FORMATS.values():
        if there := prefixes(dialect, names):
            return dialect, there
    if SHARD.search(str(file)):
        raise UserError(f"{file} is one of several shards: give the folder that holds them all")
    raise UserError(
        f"{file}: its names are of no dialect that is known ({', '.join(FORMATS)}): "
        f"{some(sorted(names))}"
    )


def prefixes(dialect: WeightFormat, names: Iterable[str]) -> tuple[str, ...]:
    """What comes before the dialect's mark, wherever it is."""
    pattern = re.compile(rf"(?P<prefix>|.*?[./])({dialect.mark})$")
    found = (pattern.fullmatch(name) for name in names)
    return tuple(dict.fromkeys(match["prefix"] for match in found if match))


def choose(file: object, found: Sequence[str], tree: str) -> tuple[str, list[str]]:
    """The prefix of the model that is meant, and the line that says why. Raises UserError."""
    if tree:
        exact = [prefix for prefix in found if tree == shown(prefix)]
        asked = exact or [prefix for prefix in found if tree in parts(prefix)]
        if len(asked) != 1:
            what = "several models" if asked else "no model"
            raise UserError(
                f"{file} holds {what} named init.tree={tree}; there are {listed(found)}"
            )
        return asked[0], []
    if len(found) == 1:
        return found[0], []
    ranked = sorted(found, key=rank)
    first, second = ranked[:2]
    if rank(first) == rank(second):
        raise UserError(
            f"{file} holds several models: {listed(found)}; give --config.init.tree to convert or "
            "train"
        )
    others = listed(ranked[1:])
    place = rank(first)
    why = PREFERRED[place][1] if place < len(PREFERRED) else "the others are only for training"
    return first, [
        f"it holds several models: {shown(first)} is taken, {why}; --config.init.tree takes "
        f"another: {others}"
    ]


def rank(prefix: str) -> int:
    """Its place in PREFERRED, the lowest first."""
    if any(re.fullmatch(LAST, part) for part in parts(prefix)):
        return len(PREFERRED) + 1
    for number, (pattern, _) in enumerate(PREFERRED):
        if any(re.fullmatch(pattern, part) for part in parts(prefix)):
            return number
    return len(PREFERRED)


def parts(prefix: str) -> list[str]:
    return [part for part in re.split("[./]", prefix) if part]


def shown(prefix: str) -> str:
    """A prefix as init.tree has it; the model without one is "."."""
    return prefix.rstrip("./") or "."


def listed(found: Iterable[str]) -> str:
    return ", ".join(map(shown, found))


def some(names: Sequence[str]) -> str:
    """The names, or the first of many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
