"""Select the state dict of one model in a checkpoint file.

Training scripts save a state dict under any key, wrapped in other modules, next to its moving
average, its teacher or its optimizer. Here a file is a flat dict of arrays
("state_dict.module.backbone.cls_token"). A model is wherever the signature of a weight format
occurs; what precedes the signature is the model's prefix.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vit_scale.errors import UserError, nearest
from vit_scale.pretrained.formats import FORMATS
from vit_scale.pretrained.key_mapping import Arrays, WeightFormat, abbreviate
from vit_scale.pretrained.weight_files import SHARD

# (regular expression of a part of the prefix, reason): which of several models is taken. The first
# row that matches one of them wins.
PREFERRED = (
    ("state_dict_ema", "as timm does"),
    ("model_ema", "as timm and DeiT do"),
    (r"(.*_)?(ema|averaged?|swa)(_.*)?", "the average"),
    ("teacher", "as DINO, iBOT and DINOv2 do"),
    ("base_encoder|encoder_q", "as MoCo does"),
    ("state_dict", "as timm does"),
    ("model", "as timm does"),
)
# Taken only if there is no other model.
LAST = "student|momentum_encoder|encoder_k|optimizer.*|mu|nu|exp_avg.*"


class StateDict(NamedTuple):
    """The arrays of one model in a file."""

    format: WeightFormat
    prefix: str  # of its keys in the file, including the last separator
    arrays: Arrays  # by key, without the prefix
    notes: tuple[str, ...]  # what was ignored, and why this model was chosen


def select_state_dict(
    file: object, arrays: Mapping[str, np.ndarray], format_name: str, tree: str
) -> StateDict:
    """Select the state dict of the model in the arrays of a file.

    `format_name` is init.dialect; empty: detect it. `tree` is init.tree; empty: choose the model
    that the file's own library would load. Raises UserError for keys of no supported format, and
    if several models qualify.
    """
    fmt, prefixes = detect_format(file, arrays, format_name)
    prefix, notes = choose_prefix(file, prefixes, tree)
    others = tuple(other for other in prefixes if other != prefix)
    nested = tuple(other for other in others if other.startswith(prefix))
    selected = {
        key.removeprefix(prefix): array
        for key, array in arrays.items()
        if key.startswith(prefix) and not key.startswith(nested)
    }
    outside = [
        key
        for key in arrays
        if not key.startswith(prefix) and not (others and key.startswith(others))
    ]
    unused = [key for key in selected if fmt.unused and re.match(fmt.unused, key)]
    if outside:
        notes.append(f"ignored, not part of the model: {abbreviate(outside)}")
    if unused:
        notes.append(f"ignored, not needed for inference: {abbreviate(unused)}")
        selected = {key: array for key, array in selected.items() if key not in unused}
    return StateDict(fmt, prefix, selected, tuple(notes))


def detect_format(
    file: object, keys: Iterable[str], format_name: str = ""
) -> tuple[WeightFormat, tuple[str, ...]]:
    """Detect the format of a file by its keys, and the prefixes of the models in it.

    `format_name` overrides the detection. Raises UserError if it is unknown, or nothing matches.
    """
    keys = list(keys)
    if format_name:
        if format_name not in FORMATS:
            raise UserError(
                f"init.dialect={format_name!r} is unknown; {nearest(format_name, FORMATS)}"
            )
        fmt = FORMATS[format_name]
        return fmt, find_prefixes(fmt, keys) or ("",)
    for fmt in FORMATS.values():
        if prefixes := find_prefixes(fmt, keys):
            return fmt, prefixes
    if SHARD.search(str(file)):
        raise UserError(f"{file} is one shard of several: give the folder that holds all of them")
    raise UserError(
        f"{file}: unknown weight format; supported: {', '.join(FORMATS)}; the file has "
        f"{abbreviate(sorted(keys))}"
    )


def find_prefixes(fmt: WeightFormat, keys: Iterable[str]) -> tuple[str, ...]:
    """What precedes the format's signature, wherever it occurs."""
    pattern = re.compile(rf"(?P<prefix>|.*?[./])({fmt.signature})$")
    matches = (pattern.fullmatch(key) for key in keys)
    return tuple(dict.fromkeys(match["prefix"] for match in matches if match))


def choose_prefix(file: object, prefixes: Sequence[str], tree: str) -> tuple[str, list[str]]:
    """Choose the prefix of the model to load; also return a note if there was a choice.

    Raises UserError if `tree` names none or several, and if several rank equally.
    """
    if tree:
        matching = [prefix for prefix in prefixes if tree == _display(prefix)]
        matching = matching or [prefix for prefix in prefixes if tree in _parts(prefix)]
        if len(matching) != 1:
            what = "several models" if matching else "no model"
            raise UserError(
                f"{file} has {what} named init.tree={tree}; it has {_display_all(prefixes)}"
            )
        return matching[0], []
    if len(prefixes) == 1:
        return prefixes[0], []
    ranked = sorted(prefixes, key=_rank)
    first, second = ranked[:2]
    if _rank(first) == _rank(second):
        raise UserError(
            f"{file} holds several models: {_display_all(prefixes)}; choose one with "
            "--config.init.tree"
        )
    rank = _rank(first)
    reason = PREFERRED[rank][1] if rank < len(PREFERRED) else "the others only serve training"
    return first, [
        f"the file holds several models; loading {_display(first)} ({reason}); "
        f"--config.init.tree selects another: {_display_all(ranked[1:])}"
    ]


def _rank(prefix: str) -> int:
    """The index in PREFERRED of the first row that matches; lower is preferred."""
    if any(re.fullmatch(LAST, part) for part in _parts(prefix)):
        return len(PREFERRED) + 1
    for rank, (pattern, _) in enumerate(PREFERRED):
        if any(re.fullmatch(pattern, part) for part in _parts(prefix)):
            return rank
    return len(PREFERRED)


def _parts(prefix: str) -> list[str]:
    return [part for part in re.split("[./]", prefix) if part]


def _display(prefix: str) -> str:
    """A prefix as init.tree spells it; the empty one is "."."""
    return prefix.rstrip("./") or "."


def _display_all(prefixes: Iterable[str]) -> str:
    return ", ".join(map(_display, prefixes))
