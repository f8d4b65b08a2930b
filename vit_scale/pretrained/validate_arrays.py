"""Check that external arrays are, exactly, those of a ViT of this project.

Every check raises UserError with the key in the file, so that nothing is missing, left over, of the
wrong shape or not finite without a message.
"""

import math
import pathlib
import re

import numpy as np

from vit_scale.errors import UserError
from vit_scale.models.build import Model
from vit_scale.models.parameters import named
from vit_scale.pretrained.canonicalize import canonical_keys
from vit_scale.pretrained.key_mapping import (
    HEAD,
    LAYOUTS,
    POSITIONS,
    Arrays,
    WeightFormat,
    abbreviate,
    to_arrays,
)
from vit_scale.pretrained.state_dicts import StateDict

# (regular expression of a key, feature of models that this project lacks)
UNSUPPORTED = (
    (r"relative_position|rel_pos", "relative positions"),
    (r"rope", "rotary positions of a kind that is not supported"),
    (r"\.(0|1)\.(norm|attn|mlp|ls)", "parallel branches of a block"),
    (r"^classifier\.", "a classifier that reads the mean of the patches"),
    (r"lora_", "LoRA: merge it into the weights first"),
)


def select_floats(file: pathlib.Path, state_dict: StateDict) -> tuple[Arrays, list[str]]:
    """The floating-point arrays by canonical key, and a note on the others, such as counters.

    Raises UserError for a parameter that is not floating-point, such as a quantized one.
    """
    fmt = state_dict.format
    arrays = canonical_keys(fmt, state_dict.arrays)
    others = [key for key, x in arrays.items() if x.dtype.kind != "f"]
    params = {mapping.key for mapping in fmt.expand(fmt.depth(arrays))}
    if quantized := [key for key in others if key in params]:
        raise UserError(
            f"{file}: {state_dict.prefix}{quantized[0]} is {arrays[quantized[0]].dtype}, not "
            "floating-point; quantized models can't be read: use the unquantized weights"
        )
    notes = [f"ignored, not floating-point: {abbreviate(others)}"] if others else []
    return {key: x for key, x in arrays.items() if key not in others}, notes


def check_finite(file: pathlib.Path, state_dict: StateDict) -> None:
    """Check that no array contains NaN or infinity. Raises UserError with the first that does."""
    floats = {key: x for key, x in state_dict.arrays.items() if x.dtype.kind == "f"}
    broken = [key for key, x in floats.items() if not np.isfinite(x).all()]
    if broken:
        array = state_dict.arrays[broken[0]]
        indices = np.flatnonzero(~np.isfinite(array))
        more = f", and {len(broken) - 1} more arrays have such values" if broken[1:] else ""
        raise UserError(
            f"{file}: {state_dict.prefix}{broken[0]} is not finite: {array.flat[indices[0]]} at "
            f"index {indices[0]}, {indices.size} of its {array.size} values{more}; the model "
            "diverged, overflowed in half precision, or the file is damaged: use another checkpoint"
        )


def check_keys(fmt: WeightFormat, arrays: Arrays) -> None:
    """Check that a mapping covers every array. Raises UserError with those that are not, and why.

    If no array is covered at all, the format is wrong; that error is left to `infer_config`.
    """
    covered = {mapping.key for mapping in fmt.expand(fmt.depth(arrays))}
    extra = sorted(arrays.keys() - covered)
    if extra and len(extra) < len(arrays):
        features = [name for regex, name in UNSUPPORTED if any(re.search(regex, k) for k in extra)]
        reason = f" ({', '.join(features)})" if features else ""
        raise UserError(
            f"not a supported {fmt.name} ViT: unexpected arrays: {abbreviate(extra)}{reason}"
        )


def check_shapes(
    fmt: WeightFormat, arrays: Arrays, model: Model, params: dict, leading_positions: int
) -> None:
    """Check that the arrays are those of `model` in this format. Raises UserError with the rest.

    `params` is its parameter tree of jax.ShapeDtypeStruct, with unrolled blocks.
    """
    shapes = _expected_shapes(fmt, arrays, model, named(params), leading_positions)
    problems = {
        "missing": sorted(shapes.keys() - arrays),
        "unexpected": sorted(arrays.keys() - shapes),
        "wrong shape": [
            f"{key} {arrays[key].shape}, expected {shape}"
            for key, shape in sorted(shapes.items())
            if key in arrays and arrays[key].shape != shape
        ],
    }
    if any(problems.values()):
        raise UserError(
            f"not a complete {fmt.name} ViT: "
            + "; ".join(f"{what}: {abbreviate(keys)}" for what, keys in problems.items() if keys)
        )


def _expected_shapes(
    fmt: WeightFormat, arrays: Arrays, model: Model, leaves: dict, leading_positions: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of the format's arrays for `model`, by key."""
    stored = fmt.stored_params(arrays)
    absent = {name for name in HEAD if "head/bias" not in stored}  # both heads, or none
    absent |= {POSITIONS} - stored if fmt.sincos_temperature else set()
    params = {
        name: np.broadcast_to(np.float32(0), leaf.shape)  # takes no memory
        for name, leaf in leaves.items()
        if name not in absent
    }
    shapes = {key: x.shape for key, x in to_arrays(fmt, params, model.shape.size.depth).items()}
    for mapping in fmt.mappings:
        if mapping.params == (POSITIONS,) and mapping.key in shapes:
            rows = math.prod(model.shape.grid) + leading_positions
            table = np.broadcast_to(np.float32(0), (rows, model.shape.size.width))
            shapes[mapping.key] = LAYOUTS[mapping.layout].to_array(table).shape
    return shapes
