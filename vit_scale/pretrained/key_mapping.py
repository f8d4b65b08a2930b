"""How the parameters of a ViT are named and laid out by others: rules that are read both ways.

A dialect is data: one rule for each parameter that it stores, and what its models compute. `write`
goes from our names to the dialect's, `read` back; what one does the other undoes bit for bit. Both
work on flat dicts of numpy arrays, ours with unrolled blocks ("blocks/3/norm1/scale").
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vit_scale.errors import UserError

Arrays = dict[str, np.ndarray]
BLOCK = "{i}"  # stands for the number of a block, in the names of both sides


class Rule(NamedTuple):
    """One stored array. Several of `ours` are fused in it, one after the other on its axis 0."""

    ours: str | tuple[str, ...]
    theirs: str
    layout: str = "same"

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


class Layout(NamedTuple):
    """`read` takes (their array, heads), `write` takes ours."""

    read: Callable[[np.ndarray, int], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _split_rows(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(heads, -1, *x.shape[1:])


LAYOUTS = {
    "same": Layout(lambda x, k: x, lambda x: x),
    "first": Layout(lambda x, k: x[0], lambda x: x[None]),  # 1 ... <-> ...
    "token": Layout(lambda x, k: x[0, 0], lambda x: x[None, None]),  # 1 1 d <-> d
    "linear": Layout(lambda x, k: x.T, lambda x: x.T),  # out in <-> in out
    "patches": Layout(  # d c p p <-> p p c d
        lambda x, k: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
    ),
    "to_heads": Layout(  # (k e) d <-> d k e
        lambda x, k: _split_rows(x, k).transpose(2, 0, 1),
        lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    ),
    "heads": Layout(_split_rows, lambda x: x.reshape(-1)),  # (k e) <-> k e
    "from_heads": Layout(  # d (k e) <-> k e d
        lambda x, k: _split_rows(x.T, k), lambda x: x.reshape(-1, x.shape[-1]).T
    ),
}
# Positions are rows, of which the first may be [CLS]'s: `read` and `write` say more.
POSITIONS = "posemb"


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """A way to store a ViT. `model` and `augment` are what its models were trained with.

    Args:
      name: as in `init.dialect`.
      text: what it is, for people.
      mark: regular expression of a name that no other dialect has, without what wraps it.
      rules: one for each array.
      model: fields of the config's model block that no array tells.
      augment: fields of the augment block; empty where the dialect has no convention.
      view: fields of the eval block: how its models' images are resized and cropped.
      fused: the first rows of the positions are those of [CLS] and of the distillation token.
      apart: regular expressions of names: of models whose positions are the patches' alone although
        the dialect is `fused`, and of models of which some are so; empty where there are none.
      unused: regular expression of names that no prediction needs.
      fc_norm: (the norm after pooling, the one before it), of which a model has one; or empty.
      reads_both: models with a [CLS] token may be pooled otherwise.
      aliases: (regular expression, replacement) that make other spellings the rules' names.
      scales: (array of factors, prefix of the layer that they multiply the outputs of): LayerScale
        (Touvron et al. 2021, arXiv 2103.17239), which is multiplied into that layer.
      stacked: (prefix with the axis of blocks in front, prefix of one block), if it is ever so.
      table: the temperature of the fixed positions of a model that stores none, as a function of
        its width; None where positions are always stored.
    """

    name: str
    text: str
    mark: str
    rules: tuple[Rule, ...]
    model: Mapping[str, Any]
    augment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    view: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fused: bool = True
    apart: tuple[str, ...] = ()
    unused: str = ""
    fc_norm: tuple[str, ...] = ()
    reads_both: bool = False
    aliases: tuple[tuple[str, str], ...] = ()
    scales: tuple[tuple[str, str], ...] = ()
    stacked: tuple[str, str] | None = None
    table: Callable[[int], float] | None = None


def expand(rule: Rule, block: int) -> Rule:
    """The rule of one block; a rule of no block is returned as it is."""
    ours = tuple(name.replace(BLOCK, str(block)) for name in rule.parts)
    return Rule(ours, rule.theirs.replace(BLOCK, str(block)), rule.layout)


def rules_of(dialect: WeightFormat, depth: int) -> list[Rule]:
    """The rules of a model of `depth` blocks."""
    return [
        expand(rule, block)
        for rule in dialect.rules
        for block in (range(depth) if BLOCK in rule.theirs else range(1))
    ]


def spelled(dialect: WeightFormat, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The arrays by the names of the dialect's rules."""
    found: Arrays = {}
    for name, array in arrays.items():
        for pattern, replacement in dialect.aliases:
            name = re.sub(pattern, replacement, name)
        if dialect.stacked and name.startswith(dialect.stacked[0]):
            rest = name.removeprefix(dialect.stacked[0])
            prefix = dialect.stacked[1]
            found |= {prefix.replace(BLOCK, str(i)) + rest: x for i, x in enumerate(array)}
        else:
            found[name] = array
    return found


def scaled(dialect: WeightFormat, arrays: Arrays, depth: int) -> tuple[Arrays, int]:
    """The arrays with LayerScale's factors in the layers before them, and how many there were.

    In float64: the function stays the same to a rounding of each parameter.
    """
    found, count = dict(arrays), 0
    for scale, layer in dialect.scales:
        for i in range(depth):
            factors = found.pop(scale.replace(BLOCK, str(i)), None)
            names = [f"{layer.replace(BLOCK, str(i))}.{end}" for end in ("weight", "bias")]
            if factors is None or not all(name in found for name in names):
                continue
            count += 1
            for name in names:
                column = factors.reshape(-1, *[1] * (found[name].ndim - 1))
                if column.shape[:1] != found[name].shape[:1]:
                    raise UserError(f"{scale.replace(BLOCK, str(i))} has the wrong shape")
                found[name] = (found[name] * column.astype(np.float64)).astype(np.float32)
    return found, count


def read(dialect: WeightFormat, arrays: Mapping[str, np.ndarray], depth: int, heads: int) -> Arrays:
    """Our parameters. Positions stay rows (n d), with [CLS]'s where they have one.

    Raises UserError for an array that its layout can't be of.
    """
    ours: Arrays = {}
    for rule in rules_of(dialect, depth):
        if rule.theirs not in arrays:
            continue
        array, layout = arrays[rule.theirs], LAYOUTS[rule.layout]
        try:
            found = [layout.read(part, heads) for part in np.split(array, len(rule.parts))]
        except (ValueError, IndexError) as error:
            raise UserError(f"{rule.theirs} has the wrong shape, {array.shape}") from error
        ours |= zip(rule.parts, found, strict=True)
    return ours


def write(dialect: WeightFormat, ours: Mapping[str, np.ndarray], depth: int) -> Arrays:
    """Their arrays. `ours` are unrolled, and their positions a grid (h w d).

    Raises UserError for parameters that the dialect doesn't have.
    """
    theirs: Arrays = {}
    given = dict(ours)
    if POSITIONS in given:
        rows = given[POSITIONS].reshape(-1, given[POSITIONS].shape[-1])
        if dialect.fused:
            # Ours are vectors with their positions in them. What is added must change no bit: -0.0.
            tokens = sum(name in given for name in ("cls", "dist"))
            rows = np.concatenate([np.full_like(rows[:1], -0.0)] * tokens + [rows])
        given[POSITIONS] = rows
    for rule in rules_of(dialect, depth):
        if all(name in given for name in rule.parts):
            layout = LAYOUTS[rule.layout]
            parts = [layout.write(given.pop(name)) for name in rule.parts]
            array = parts[0] if len(parts) == 1 else np.concatenate(parts)
            theirs[rule.theirs] = np.ascontiguousarray(array)
    if given:
        raise UserError(f"{dialect.text} has no place for {', '.join(sorted(given))}")
    return theirs
