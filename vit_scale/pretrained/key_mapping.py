"""Map the parameters of a ViT to and from the names and layouts of other libraries.

A `WeightFormat` is data: one `KeyMapping` for each stored array, and the settings its models were
trained with. `to_arrays` converts our parameters to the format's arrays, and `to_params` reverses
that bit for bit. Both work on flat dicts of numpy arrays; on our side, blocks are unrolled
("blocks/3/norm1/scale").
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_scale.errors import UserError

Arrays = dict[str, np.ndarray]
BLOCK_INDEX = "{i}"  # placeholder for the number of a block, in parameter names and keys
POSITIONS = "posemb"
HEAD = ("head/kernel", "head/bias", "head_dist/kernel", "head_dist/bias")
LISTED = 6  # keys that a message lists; a file may have hundreds


class KeyMapping(NamedTuple):
    """One stored array. It may hold several parameters, concatenated along its axis 0."""

    param: str | tuple[str, ...]
    key: str
    layout: str = "same"

    @property
    def params(self) -> tuple[str, ...]:
        return (self.param,) if isinstance(self.param, str) else self.param

    def for_block(self, block: int) -> "KeyMapping":
        """The mapping of one block, with its number filled in."""
        params = tuple(name.replace(BLOCK_INDEX, str(block)) for name in self.params)
        return KeyMapping(params, self.key.replace(BLOCK_INDEX, str(block)), self.layout)


def dense(param: str | tuple[str, ...], key: str, layout: str = "linear") -> Sequence[KeyMapping]:
    """The mappings of a torch layer's weight and bias to the kernels and biases `param`."""
    params = (param,) if isinstance(param, str) else param
    bias = "heads" if layout == "to_heads" else "same"
    return (
        KeyMapping(tuple(f"{name}/kernel" for name in params), f"{key}.weight", layout),
        KeyMapping(tuple(f"{name}/bias" for name in params), f"{key}.bias", bias),
    )


def attention(prefix: str, *keys: str) -> Sequence[KeyMapping]:
    """Return the mappings of a block's separate query, key and value layers, in this order."""
    parts = zip(("query", "key", "value"), keys, strict=True)
    rows = [
        dense(f"blocks/{{i}}/attention/{part}", prefix + key, "to_heads") for part, key in parts
    ]
    return [mapping for pair in rows for mapping in pair]


def norm(param: str, key: str) -> Sequence[KeyMapping]:
    """The mappings of a torch norm's weight and bias; an RMSNorm has no bias."""
    return (
        KeyMapping((f"{param}/scale",), f"{key}.weight"),
        KeyMapping((f"{param}/bias",), f"{key}.bias"),
    )


class Layout(NamedTuple):
    """How a stored array is reshaped and transposed to a parameter, and back."""

    to_param: Callable[[np.ndarray, int], np.ndarray]  # (array, number of heads) -> parameter
    to_array: Callable[[np.ndarray], np.ndarray]


def _split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(heads, -1, *x.shape[1:])


LAYOUTS = {  # comments: stored array <-> parameter
    "same": Layout(lambda x, k: x, lambda x: x),
    "first": Layout(lambda x, k: x[0], lambda x: x[None]),  # 1 ... <-> ...
    "token": Layout(lambda x, k: x[0, 0], lambda x: x[None, None]),  # 1 1 d <-> d
    "linear": Layout(lambda x, k: x.T, lambda x: x.T),  # out in <-> in out
    "patches": Layout(  # d c p p <-> p p c d
        lambda x, k: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
    ),
    "to_heads": Layout(  # (k e) d <-> d k e
        lambda x, k: _split_heads(x, k).transpose(2, 0, 1),
        lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    ),
    "heads": Layout(_split_heads, lambda x: x.reshape(-1)),  # (k e) <-> k e
    "from_heads": Layout(  # d (k e) <-> k e d
        lambda x, k: _split_heads(x.T, k), lambda x: x.reshape(-1, x.shape[-1]).T
    ),
}


class Convention(NamedTuple):
    """Settings of the models whose files have a key that matches a regular expression."""

    key: str
    model: Mapping[str, Any]  # fields of the model block
    channels: str = "halves"  # order of a head's channels: rotary_channels.py


Step = Callable[[Arrays, int], tuple[Arrays, list[str]]]


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """The way a library stores a ViT, and the settings its models were trained with.

    Args:
      name: value of `init.dialect` that selects the format.
      title: name of the library, for messages.
      signature: regular expression of a key that every checkpoint of this format has, under any
        prefix, and no checkpoint of another format.
      mappings: one for each stored array.
      model: fields of the config's model block that the arrays don't determine.
      augment: fields of its augment block: how pixels are normalized.
      eval: fields of its eval block: how images are resized and cropped.
      class_positions: whether position embeddings begin with rows for [CLS] and the distillation
        token.
      no_class_positions: for a format with `class_positions`, (regular expression of a key that
        only models without those rows have, one of a key that some models without them have);
        empty if every model has the rows.
      unused: regular expression of keys that inference doesn't need.
      fc_norm: (prefix of the norm after pooling, prefix of the norm before it); a model has one of
        them. Empty if the format has no norm after pooling.
      ambiguous_pool: whether the arrays leave open if the head reads [CLS] or pools patches.
      aliases: (regular expression, replacement) pairs that rewrite other spellings to `key`s.
      projection: whether the head is CLIP's projection, not a classifier.
      conventions: settings of models that have certain keys, unless a file beside them states them.
      needs_architecture: groups of regular expressions; where keys match all of a group, the arrays
        don't tell the model's function: the library's name of the architecture must be stated.
      steps: functions (arrays, depth) -> (arrays, notes) that rewrite other contents to `mappings`.
      scanned: (prefix of arrays that stack all blocks on axis 0, prefix of a single block), or None
        if blocks are never stacked.
      sincos_temperature: function from the width to the temperature of the fixed position
        embeddings that a model without stored ones uses; None if they are always stored.
    """

    name: str
    title: str
    signature: str
    mappings: tuple[KeyMapping, ...]
    model: Mapping[str, Any]
    augment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eval: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_positions: bool = True
    no_class_positions: tuple[str, ...] = ()
    unused: str = ""
    fc_norm: tuple[str, ...] = ()
    ambiguous_pool: bool = False
    aliases: tuple[tuple[str, str], ...] = ()
    conventions: tuple[Convention, ...] = ()
    needs_architecture: tuple[tuple[str, ...], ...] = ()
    projection: bool = False
    steps: tuple["Step", ...] = ()
    scanned: tuple[str, str] | None = None
    sincos_temperature: Callable[[int], float] | None = None

    def expand(self, depth: int) -> list[KeyMapping]:
        """The mappings of a model of `depth` blocks."""
        return [
            mapping.for_block(block)
            for mapping in self.mappings
            for block in (range(depth) if BLOCK_INDEX in mapping.key else range(1))
        ]

    def depth(self, keys: Iterable[str]) -> int:
        """The number of blocks that these keys belong to; at least 1."""
        patterns = [
            re.escape(mapping.key).replace(re.escape(BLOCK_INDEX), r"(\d+)")
            for mapping in self.mappings
            if BLOCK_INDEX in mapping.key
        ]
        matches = (re.fullmatch(pattern, key) for key in keys for pattern in patterns)
        return 1 + max((int(match[1]) for match in matches if match), default=0)

    def stored_params(self, keys: Iterable[str]) -> set[str]:
        """Our names of the parameters behind these keys; those of any block as of block 0."""
        keys = set(keys)
        return {
            re.sub(r"^blocks/\d+/", "blocks/0/", name)
            for mapping in self.expand(self.depth(keys))
            if mapping.key in keys
            for name in mapping.params
        }


def to_params(
    fmt: WeightFormat,
    arrays: Mapping[str, np.ndarray],
    depth: int,
    heads: int,
    pool_heads: int | None = None,
) -> Arrays:
    """Convert the format's arrays to our parameters; arrays that are missing are skipped.

    `pool_heads` are those of attention pooling, if it has another number of heads. Position
    embeddings stay rows (n d), including those of [CLS], the distillation token and registers.
    Raises UserError for an array whose shape contradicts its layout.
    """
    params: Arrays = {}
    for mapping in fmt.expand(depth):
        if mapping.key not in arrays:
            continue
        array, layout = arrays[mapping.key], LAYOUTS[mapping.layout]
        own = pool_heads if pool_heads and mapping.params[0].startswith("pool/") else heads
        try:
            parts = np.split(array, len(mapping.params))
            params |= zip(mapping.params, [layout.to_param(x, own) for x in parts], strict=True)
        except (ValueError, IndexError) as error:
            raise UserError(f"{mapping.key} has the wrong shape, {array.shape}") from error
    return params


def to_arrays(fmt: WeightFormat, params: Mapping[str, np.ndarray], depth: int) -> Arrays:
    """Convert our parameters to the format's arrays. Blocks are unrolled, positions (h w d).

    Raises UserError for parameters that the format can't store.
    """
    arrays: Arrays = {}
    remaining = dict(params)
    if POSITIONS in remaining:
        rows = remaining[POSITIONS].reshape(-1, remaining[POSITIONS].shape[-1])
        if fmt.class_positions:
            # Our [CLS] vector includes its position. Adding -0.0 to it changes no bit.
            tokens = sum(name in remaining for name in ("cls", "dist"))
            rows = np.concatenate([np.full_like(rows[:1], -0.0)] * tokens + [rows])
        remaining[POSITIONS] = rows
    for mapping in fmt.expand(depth):
        if all(name in remaining for name in mapping.params):
            layout = LAYOUTS[mapping.layout]
            parts = [layout.to_array(remaining.pop(name)) for name in mapping.params]
            array = parts[0] if len(parts) == 1 else np.concatenate(parts)
            arrays[mapping.key] = np.ascontiguousarray(array)
    if remaining:
        raise UserError(f"{fmt.title} can't store {', '.join(sorted(remaining))}")
    return arrays


def abbreviate(keys: Sequence[str]) -> str:
    """Join keys for a message: at most LISTED of them, and the number of the others."""
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(keys[:LISTED]) + more
