"""Rewrite a checkpoint's arrays so that they have the keys and contents of our models.

The model's function stays the same: keys are respelled, stacked blocks are unstacked, LayerScale is
folded into the layers before it, and absent biases become zeros.
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

    Raises UserError if the model has a norm both before and after pooling, or a LayerScale of the
    wrong shape.
    """
    depth, notes = fmt.depth(arrays), []
    arrays = _rename_fc_norm(fmt, arrays)
    arrays, folded = fold_layer_scale(fmt, arrays, depth)
    if folded:
        notes.append(f"LayerScale is folded into the layers before it: {folded} arrays")
    if _add_head_bias(fmt, arrays):
        notes.append("the head has no bias: set to zero")
    if _add_attention_biases(fmt, arrays, depth):
        notes.append("queries, keys and values have no biases: set to zero")
    return arrays, notes


def fold_layer_scale(fmt: WeightFormat, arrays: Arrays, depth: int) -> tuple[Arrays, int]:
    """Multiply LayerScale's factors into the layers before them; also return their number.

    Computed in float64, so the function changes by one rounding of each parameter at most.
    """
    folded, count = dict(arrays), 0
    for scale, layer in fmt.layer_scales:
        for i in range(depth):
            scale_key = scale.replace(BLOCK_INDEX, str(i))
            factors = folded.pop(scale_key, None)
            keys = [f"{layer.replace(BLOCK_INDEX, str(i))}.{name}" for name in ("weight", "bias")]
            if factors is None or not all(key in folded for key in keys):
                continue
            count += 1
            for key in keys:
                column = factors.reshape(-1, *[1] * (folded[key].ndim - 1))
                if column.shape[:1] != folded[key].shape[:1]:
                    raise UserError(f"{scale_key} has the wrong shape, {factors.shape}")
                folded[key] = (folded[key] * column.astype(np.float64)).astype(np.float32)
    return folded, count


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
    kernel, bias = by_param["head/kernel"], by_param["head/bias"]
    weights = arrays.get(kernel.key)
    if bias.key in arrays or weights is None or weights.ndim != 2:
        return False
    outputs = weights.shape[0] if kernel.layout == "linear" else weights.shape[1]
    arrays[bias.key] = np.zeros(outputs, np.float32)
    return True


def _add_attention_biases(fmt: WeightFormat, arrays: Arrays, depth: int) -> bool:
    """Add zero biases to queries, keys and values if none has any (timm's qkv_bias=False)."""
    by_param = {mapping.params[0]: mapping.key for mapping in fmt.expand(depth)}
    bias_keys = {
        param: key
        for param, key in by_param.items()
        if re.fullmatch(r"blocks/\d+/attention/(query|key|value)/bias", param)
    }
    if not bias_keys or any(key in arrays for key in bias_keys.values()):
        return False
    for param, key in bias_keys.items():
        kernel = arrays.get(by_param[param.replace("bias", "kernel")])
        if kernel is not None and kernel.ndim == 2:
            arrays[key] = np.zeros(len(kernel), np.float32)
    return True
