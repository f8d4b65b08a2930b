"""Write our models as transformers' Dinov2ForImageClassification, with registers or without.

Its classifier reads [CLS] beside the mean of the patches: a head that reads one of them gets zeros
for the other. LayerScale that a model hasn't is one, an absent bias zero.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vit_scale.models.spec import Shape
from vit_scale.pretrained.formats import DINOV2
from vit_scale.pretrained.key_mapping import POSITIONS, Arrays, to_arrays
from vit_scale.pretrained.library_configs import PLAIN_BLOCK

# Fields of the model block that Dinov2 lacks, and their values without them.
ABSENT: dict[str, Any] = PLAIN_BLOCK | {"distilled": False, "representation": 0}


def is_dinov2(cfg: ConfigDict, shape: Shape) -> bool:
    """Return whether Dinov2 can express the model of this `model` block."""
    plain = all(cfg[name] == value for name, value in ABSENT.items())
    plain = plain and shape.class_token and not shape.stem
    square = shape.grid[0] == shape.grid[1]  # else transformers resamples positions
    return plain and square and shape.pool != "map" and bool(mlp_ratio(shape))


def mlp_ratio(shape: Shape) -> int:
    """Return the whole `mlp_ratio` with which transformers makes an MLP of this width; 0: none."""
    for ratio in range(1, 17):
        hidden = shape.size.width * ratio
        if shape.size.swiglu:
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        if hidden == shape.size.mlp:
            return ratio
    return 0


def dinov2_arrays(params: Arrays, shape: Shape) -> Arrays:
    """Return named, unrolled parameters as the arrays of Dinov2ForImageClassification."""
    width, mlp, depth = shape.size.width, shape.size.mlp, shape.size.depth
    absent: Arrays = {
        POSITIONS: np.zeros((*shape.grid, width), np.float32),
        "embed/bias": np.zeros(width, np.float32),
    }
    for i in range(depth):
        block = f"blocks/{i}/"
        absent |= {f"{block}scale{branch}": np.ones(width, np.float32) for branch in (1, 2)}
        for part in ("query", "key", "value"):
            heads = params[f"{block}attention/{part}/kernel"].shape[1:]
            absent[f"{block}attention/{part}/bias"] = np.zeros(heads, np.float32)
        absent[block + "attention/out/bias"] = np.zeros(width, np.float32)
        absent[block + "mlp/down/bias"] = np.zeros(width, np.float32)
        for layer in ("up", "gate") if shape.size.swiglu else ("up",):
            absent[f"{block}mlp/{layer}/bias"] = np.zeros(mlp, np.float32)
    params = absent | params
    if shape.pool != "cls_gap" and "head/kernel" in params:
        head = params["head/kernel"]
        halves = [head, np.zeros_like(head)]
        params["head/kernel"] = np.concatenate(halves if shape.pool == "cls" else halves[::-1])
    arrays = to_arrays(DINOV2, params, depth)
    if shape.size.swiglu:
        arrays = _packed(arrays, depth)
    arrays["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    prefix = model_type(shape) + "."
    return {key if key.startswith("classifier") else prefix + key: x for key, x in arrays.items()}


def _packed(arrays: Arrays, depth: int) -> Arrays:
    """Return the arrays with each gated MLP's first two layers as one."""
    for i in range(depth):
        mlp = f"encoder.layer.{i}.mlp."
        for leaf in ("weight", "bias"):
            halves = [arrays.pop(f"{mlp}{layer}.{leaf}") for layer in ("gate", "fc1")]
            arrays[f"{mlp}weights_in.{leaf}"] = np.concatenate(halves)
            arrays[f"{mlp}weights_out.{leaf}"] = arrays.pop(f"{mlp}fc2.{leaf}")
    return arrays


def model_type(shape: Shape) -> str:
    """Return transformers' name of the kind of model."""
    return "dinov2_with_registers" if shape.registers else "dinov2"


def class_name(shape: Shape) -> str:
    """Return transformers' class."""
    return "Dinov2WithRegisters" * bool(shape.registers) or "Dinov2"


def dinov2_config(shape: Shape, common: dict[str, Any]) -> dict[str, Any]:
    """Return config.json; `common` is that of a ViT, whose shared settings it keeps."""
    own = {
        "architectures": [f"{class_name(shape)}ForImageClassification"],
        "model_type": model_type(shape),
        "mlp_ratio": mlp_ratio(shape),
        "use_swiglu_ffn": shape.size.swiglu,
        "layerscale_value": 1.0,
    }
    if shape.registers:
        own["num_register_tokens"] = shape.registers
    return {name: value for name, value in common.items() if name != "intermediate_size"} | own
