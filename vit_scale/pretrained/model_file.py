"""A trained model as one file, for sharing: arrays by their names here, and what describes them.

A .safetensors file whose metadata holds, as JSON under "vit_scale", the config, the class names,
the step, the training set's description, and what was measured on the split that selects. Paths of
the machine that trained it are left out. Parameters are stored as float32, float16 or bfloat16, and
always read as float32.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.errors import USAGE, UserError, nearest
from vit_scale.models.build import build
from vit_scale.models.parameters import named
from vit_scale.pretrained.weight_files import read_arrays, write_safetensors

KEY = "vit_scale"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}


def check_dtype(name: str) -> None:
    """Raise UserError for an unknown type of the stored parameters."""
    if name not in DTYPES:
        raise UserError(f"--dtype {name!r} is unknown; {nearest(name, DTYPES)}", USAGE)


def write_model(
    file: pathlib.Path, params: dict, cfg: ConfigDict, description: Mapping[str, Any], dtype: str
) -> None:
    """Write a model. Raises OSError, and UserError where a value exceeds what the type holds.

    Args:
      file: path that ends in .safetensors.
      params: its parameters, nested.
      cfg: its config.
      description: {"classes": [...], "step": n, "data": {...} or None, "selection": {...}}.
      dtype: of the stored parameters.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in named(params).items()}
    with np.errstate(over="ignore"):  # reported below
        stored = {name: array.astype(DTYPES[dtype]) for name, array in arrays.items()}
    for name, array in stored.items():
        if not np.isfinite(array.astype(np.float32)).all():
            most = np.abs(arrays[name]).max()
            raise UserError(f"{name} has values up to {most:.3g}, too large for {dtype}")
    content = config.to_json(cfg)
    for block, field in (("data", "path"), ("init", "source"), ("distill", "teacher")):
        content[block][field] = config.to_json(config.base())[block][field]
    metadata = {KEY: json.dumps({**description, "config": content})}
    write_safetensors(file, stored, metadata)


def read_description(file: pathlib.Path) -> dict[str, Any] | None:
    """Return what a file says of its model; None if it isn't one of this project."""
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, framework="numpy") as content:
            text = (content.metadata() or {}).get(KEY)
    except (OSError, safetensors.SafetensorError):
        return None  # reported where its arrays are read
    return json.loads(text) if text else None


def read_params(file: pathlib.Path, cfg: ConfigDict) -> dict:
    """Return the parameters of a file, on the first device, in float32.

    Raises UserError where the file is damaged, or not of this model.
    """
    arrays = read_arrays(file)
    model = build(cfg.model, config.image_size(cfg))
    wanted = named(model.abstract_params)
    if wanted.keys() != arrays.keys():
        name = sorted(wanted.keys() ^ arrays.keys())[0]
        state = "lacks" if name in wanted else "has"
        raise UserError(f"{file} {state} the array {name}: its model is of another version")
    for name, leaf in wanted.items():
        if arrays[name].shape != leaf.shape:
            raise UserError(f"{file}: {name} is {arrays[name].shape}, not {leaf.shape}")
    return jax.tree.map(
        jnp.asarray,
        jax.tree.unflatten(
            jax.tree.structure(model.abstract_params), [arrays[name] for name in wanted]
        ),
    )
