"""A trained model as one file, for sharing: its parameters by name, and what describes them.

A .safetensors file whose metadata holds, as JSON under "vit_scale", the config, the class names,
the step, the training set's description, and what was measured on the split that selects. Paths of
the machine that trained it are left out. Parameters are stored as float32, float16 or bfloat16, and
always read as float32.
"""

import json
import pathlib
import re
import urllib.parse
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
PUBLIC = ("hf://", "https://", "http://")  # addresses that are kept
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}


def check_dtype(name: str) -> None:
    """Raise UserError for an unknown type of the stored parameters."""
    if name not in DTYPES:
        raise UserError(f"--dtype {name!r} is unknown; {nearest(name, DTYPES)}", USAGE)


def write_model(
    file: pathlib.Path, params: dict, cfg: ConfigDict, description: Mapping[str, Any], dtype: str
) -> None:
    """Write a model. Raises OSError, and UserError for a value that is not finite in the type.

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
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"{name} has values that are not finite")
        if not np.isfinite(array.astype(np.float32)).all():
            most = np.abs(arrays[name]).max()
            raise UserError(f"{name} has values up to {most:.3g}, too large for {dtype}")
    data = _without_folders(description["data"])
    text = json.dumps({**description, "data": data, "config": _public(cfg)})
    write_safetensors(file, stored, {KEY: text})


def _public(cfg: ConfigDict) -> dict[str, Any]:
    """Return a config, as JSON types, without paths of this machine."""
    content, default = config.to_json(cfg), config.to_json(config.base())
    for block, field in (("data", "path"), ("init", "source"), ("distill", "teacher")):
        path = content[block][field]
        pinned = block == "data" and on_hub(f"{cfg.data.name}:{path}")
        if path.startswith(PUBLIC):
            content[block][field] = public_address(path)
        elif "/" in path and not pinned:
            content[block][field] = default[block][field]
    sets = [(name.partition(":")[0], *weight) for name, *weight in content["data"]["mixture"]]
    content["data"]["mixture"] = sets
    return content


def _without_folders(content: Any) -> Any:
    """Return nested JSON types whose texts have no folders of this machine."""
    if isinstance(content, Mapping):
        return {key: _without_folders(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_folders(value) for value in content]
    return without_folder(content) if isinstance(content, str) else content


def without_folder(name: str) -> str:
    """Return the name of a set, or of a mixture of sets, without folders of this machine."""
    return re.sub(r"(?<!\S)(\w+://|[/~.])\S*/", "", name)


def public_address(address: str) -> str:
    """Return an address without what only its owner should know: a password, or a query's key."""
    if not address.startswith(("http://", "https://")):
        return address
    parts = urllib.parse.urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", parts.fragment))


def on_hub(entry: str) -> bool:
    """Whether KIND:PATH is a set on the Hugging Face Hub: with the revision that a run records."""
    kind, _, path = entry.partition(":")
    return kind == "huggingface" and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+@[\w.-]+", path))


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
