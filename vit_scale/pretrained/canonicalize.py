"""Rewrite a checkpoint's arrays so that they have the keys and contents of our models.

The model's function stays the same: keys are respelled, stacked blocks are unstacked, packed arrays
are split or fused as the format's key mappings have them, and a head's absent bias becomes zero.
"""

import re
from collections.abc import Mapping

import numpy as np

from vit_scale.errors import UserError
from vit_scale.pretrained.key_mapping import BLOCK_INDEX, Arrays, WeightFormat


def canonical_keys(fmt: WeightFormat, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Rename arrays to the keys of the format's mappings, and unstack scanned blocks."""
    renamed: Arrays = {}
    for key, array in arrays.items():
        for pattern, replacement in fmt.aliases:
            key = re.sub(pattern, replacement, key)
        if fmt.scanned and key.startswith(fmt.scanned[0]):
            rest = key.removeprefix(fmt.scanned[0])
            prefix = fmt.scanned[1]
            renamed |= {prefix.replace(BLOCK_INDEX, str(i)) + rest: x for i, x in enumerate(array)}
        else:
            renamed[key] = array
    return renamed


def canonicalize(fmt: WeightFormat, arrays: Arrays) -> tuple[Arrays, list[str]]:
    """Return the same model in arrays that ours have, and a note on each change.

    Raises UserError if the model has a norm both before and after pooling, or an array of the wrong
    shape.
    """
    depth, notes = fmt.depth(arrays), []
    arrays = _rename_fc_norm(fmt, arrays)
    for step in fmt.steps:
        arrays, changes = step(arrays, depth)
        notes += changes
    if _add_head_bias(fmt, arrays):
        notes.append("the head has no bias: set to zero")
    return arrays, notes


def _rename_fc_norm(fmt: WeightFormat, arrays: Arrays) -> Arrays:
    """Give a norm after pooling the key of the one before it: our models have a single norm."""
    if not fmt.fc_norm or f"{fmt.fc_norm[0]}.weight" not in arrays:
        return arrays
    after, before = fmt.fc_norm
    if f"{before}.weight" in arrays:
        raise UserError(
            f"it has {before} before pooling and {after} after it; models here have only one"
        )
    return {re.sub(rf"^{after}\.", f"{before}.", key): array for key, array in arrays.items()}


def _add_head_bias(fmt: WeightFormat, arrays: Arrays) -> bool:
    """Add a zero bias to a head without one; whether there was anything to do."""
    by_param = {mapping.params[0]: mapping for mapping in fmt.expand(1)}
    if "head/kernel" not in by_param:
        return False
    kernel, bias = by_param["head/kernel"], by_param["head/bias"]
    weights = arrays.get(kernel.key)
    if bias.key in arrays or weights is None or weights.ndim != 2:
        return False
    outputs = weights.shape[0] if kernel.layout == "linear" else weights.shape[1]
    arrays[bias.key] = np.zeros(outputs, np.float32)
    return True
