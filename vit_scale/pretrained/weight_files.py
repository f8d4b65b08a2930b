"""Files of weights: what is in them, by name, and nothing of them run.

The format is read off the first bytes, not off the name. Everything that can be wrong with a file
is one line: cut short, another format, a pickle, a page of HTML that a proxy sent instead.
"""

import argparse
import contextlib
import json
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from vit_scale.errors import UserError
from vit_scale.storage import files
from vit_scale.storage.errors import one_line, user_errors

ENDINGS = (".npz", ".safetensors", ".pth", ".pt", ".bin")
MODEL = "model.safetensors"  # the file in a folder
PYTORCH = "pytorch_model.bin"
NAMES = (MODEL, f"{MODEL}.index.json", PYTORCH, f"{PYTORCH}.index.json")  # in this order
HEADER = 100 << 20  # bytes: as long as the text that begins a .safetensors file may be
INDEX = ".index.json"  # ends the name of the list of a model's shards
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
SAFE = "convert it where it was made: safetensors.torch.save_file(model.state_dict(), PATH)"


def file_in(place: pathlib.Path) -> pathlib.Path:
    """The file of weights that `place`, a file or a folder, means. Raises UserError without one."""
    if not place.is_dir():
        return place
    found = [place / name for name in NAMES if (place / name).is_file()]
    if not found:
        raise UserError(f"{place} holds none of {', '.join(NAMES)}, and no run")
    return found[0]


def shards(index: pathlib.Path) -> list[str]:
    """The names of the files that the index of a model's shards lists. Raises UserError."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index} is no index of shards: it has no weight_map")
    names = sorted({str(name) for name in listed.values()})
    if outside := [name for name in names if pathlib.PurePath(name).name != name]:
        raise UserError(f"{index} lists {outside[0]}, which is not beside it")
    return names


def read(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of a .npz, .safetensors or PyTorch file, or of the shards in an index.

    Floats as float32. Raises UserError for a file that is none, is cut short, or would have to be
    run, and for a shard that is missing.
    """
    if file.name.endswith(INDEX):
        return _read_shards(file)
    with _one_line(file):
        with file.open("rb") as stream:
            start = stream.read(512)
        kind = _kind(file, start)
        arrays = _read(kind, file)
    if not arrays:
        raise UserError(f"{file} holds no arrays")
    return {name: _float32(array) for name, array in arrays.items()}


def _read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays that an index lists. Raises UserError where one is not where it should be."""
    arrays: dict[str, np.ndarray] = {}
    for name in shards(index):
        arrays |= read(index.with_name(name))
    if missing := sorted(read_json(index)["weight_map"].keys() - arrays):
        raise UserError(f"{index} lists {missing[0]}, which is in none of its shards")
    return arrays


def _kind(file: pathlib.Path, start: bytes) -> str:
    if start.lstrip()[:1] == b"<":
        raise UserError(
            f"{file} is a page of HTML, not weights: a login or an error page was saved instead; "
            "download it again"
        )
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{file} is a pointer of Git LFS, not weights: get them with `git lfs pull`"
        )
    if start[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if any(name.endswith("data.pkl") for name in names):
            return "pytorch"
        if all(name.endswith(".npy") for name in names):
            return "npz"
        raise UserError(f"{file} is a zip archive of {names[0]} and the like, not of weights")
    if 2 <= int.from_bytes(start[:8], "little") <= HEADER and start[8:9] == b"{":
        return "safetensors"
    if start[:1] == b"\x80":
        return "pytorch"
    raise UserError(
        f"{file} is neither .npz nor .safetensors nor PyTorch's: it begins with {start[:8]!r}; "
        "it is cut short, or another kind of file"
    )


def _read_npz(file: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _read_pytorch(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file} is PyTorch's pickle, which only torch reads without running it: pip install "
            f"torch, or {SAFE}"
        ) from error
    try:
        # Opened here: by a name that ends in .safetensors torch would believe the ending.
        with file.open("rb") as stream, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"{file} holds more than weights: it would have to be run to be read, and it was "
                f"not; {SAFE}"
            ) from error
        raise
    return {
        name: (x.detach().float() if x.is_floating_point() else x).numpy()
        for name, x in _leaves(content)
        if isinstance(x, torch.Tensor)
    }


def _leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of what lies in nested dictionaries and lists."""
    if isinstance(content, Mapping):
        pairs = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        pairs = [(str(i), value) for i, value in enumerate(content)]
    else:
        yield name, content
        return
    for key, value in pairs:
        yield from _leaves(value, f"{name}.{key}" if name else key)


def _read(kind: str, file: pathlib.Path) -> dict[str, np.ndarray]:
    match kind:
        case "npz":
            return _read_npz(file)
        case "safetensors":
            return safetensors.numpy.load_file(file)
    return _read_pytorch(file)


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.dtype("V2"):  # how numpy stores bfloat16
        array = array.view(jnp.bfloat16)
    floats = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(np.float32, copy=False) if floats else array


@contextlib.contextmanager
def _one_line(file: pathlib.Path) -> Iterator[None]:
    """Turn what the readers raise into a UserError; damaged files make them raise any type."""
    try:
        with user_errors(f"cannot read {file}"):
            yield
    except UserError:
        raise
    except Exception as error:
        line = one_line(error)
        if "allow_pickle" in line:
            line = "it holds Python objects, which would have to be run, and were not"
        raise UserError(
            f"{file} is damaged or cut short ({line}); download or copy it again"
        ) from error


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """What a file beside the weights says; empty where there is none. Raises UserError."""
    if not file.is_file():
        return {}
    with user_errors(f"cannot read {file}", also=(ValueError,)):
        content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object")
    return content


def write_npz(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A .npz file, whole or not at all. Raises OSError."""
    with files.atomic(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def write_safetensors(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A .safetensors file as PyTorch's packages expect it, whole or not at all. Raises OSError."""
    with files.atomic(file) as temporary:
        safetensors.numpy.save_file(dict(arrays), temporary, metadata={"format": "pt"})
