"""Read and write weight files, without ever executing code from them.

The container is detected by its first bytes, not by its name. Whatever is wrong with a file raises
a one-line UserError: truncated, another format, an unsafe pickle, an HTML page saved in its place.
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

SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin")
SAFETENSORS = "model.safetensors"  # file names in a model's folder
PYTORCH = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"  # of the file that lists a model's shards
FILE_NAMES = (  # by rank
    *(SAFETENSORS, SAFETENSORS + INDEX_SUFFIX, PYTORCH, PYTORCH + INDEX_SUFFIX),
    "open_clip_model.safetensors",
)
METADATA_FILES = (  # beside the weights
    *("config.json", "preprocessor_config.json", "processor_config.json"),
    "open_clip_config.json",
)
MAX_HEADER = 100 << 20  # bytes of JSON that begin a .safetensors file, at most
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
TO_SAFETENSORS = "convert it with safetensors.torch.save_file(model.state_dict(), PATH)"


def find_weight_file(path: pathlib.Path) -> pathlib.Path:
    """The weight file at `path`, or in the folder `path`. Raises UserError if there is none."""
    if not path.is_dir():
        return path
    candidates = [path / name for name in FILE_NAMES if (path / name).is_file()]
    if not candidates:
        raise UserError(f"{path} is not a run and has no {' or '.join(FILE_NAMES)}")
    return candidates[0]


def shard_names(index: pathlib.Path) -> list[str]:
    """The file names of the shards in an index. Raises UserError if the index is malformed."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} is not an index of shards: it has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    paths = {name: pathlib.PurePath(name) for name in names}
    if outside := [n for n, path in paths.items() if path.name != n or n in ("", "..")]:
        raise UserError(f"{index} lists {outside[0]}, which is not in its folder")
    return names


def read_arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Read all arrays of a .npz, .safetensors or PyTorch file, or of the shards of an index.

    Floating-point arrays are returned as float32. Raises UserError if the file is missing, damaged,
    of another kind or an unsafe pickle, or a shard is missing.
    """
    if file.name.endswith(INDEX_SUFFIX):
        return _read_shards(file)
    with _one_line_errors(file):
        with file.open("rb") as stream:
            start = stream.read(512)
        match _detect_container(file, start):
            case "npz":
                arrays = _read_npz(file)
            case "safetensors":
                arrays = safetensors.numpy.load_file(file)
            case _:
                arrays = _read_pytorch(file)
    if not arrays:
        raise UserError(f"{file} contains no arrays")
    return {key: _float32(array) for key, array in arrays.items()}


def _read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name in shard_names(index):
        arrays |= read_arrays(index.with_name(name))
    if missing := sorted(read_json(index)["weight_map"].keys() - arrays):
        raise UserError(f"{index} lists the array {missing[0]}, which is in none of its shards")
    return arrays


def _detect_container(file: pathlib.Path, start: bytes) -> str:
    """`npz`, `safetensors` or `pytorch`. Raises UserError for anything else."""
    if start.lstrip()[:1] == b"<":
        raise UserError(
            f"{file} is an HTML page, not weights: probably a login or error page; download the "
            "weights again"
        )
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a Git LFS pointer, not weights: run `git lfs pull`")
    if start[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if any(name.endswith("data.pkl") for name in names):
            return "pytorch"
        if all(name.endswith(".npy") for name in names):
            return "npz"
        raise UserError(f"{file} is a zip archive without weights; its first file is {names[0]}")
    if 2 <= int.from_bytes(start[:8], "little") <= MAX_HEADER and start[8:9] == b"{":
        return "safetensors"
    if start[:1] == b"\x80":
        return "pytorch"
    raise UserError(
        f"{file} is not a .npz, .safetensors or PyTorch file, or it is truncated; it begins with "
        f"{start[:8]!r}"
    )


def _read_npz(file: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def _read_pytorch(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file} is a PyTorch pickle, which only torch can read safely: pip install torch, or "
            f"{TO_SAFETENSORS}"
        ) from error
    try:
        # Given a name that ends in .safetensors, torch would go by the name: hence a stream.
        with file.open("rb") as stream, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"{file} contains pickled code besides weights, which was not executed; "
                f"{TO_SAFETENSORS}"
            ) from error
        raise
    return {
        key: (x.detach().float() if x.is_floating_point() else x).numpy()
        for key, x in _flatten(content)
        if isinstance(x, torch.Tensor)
    }


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each leaf of nested dictionaries and lists."""
    if isinstance(content, Mapping):
        pairs = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        pairs = [(str(i), value) for i, value in enumerate(content)]
    else:
        yield prefix, content
        return
    for key, value in pairs:
        yield from _flatten(value, f"{prefix}.{key}" if prefix else key)


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.dtype("V2"):  # how numpy stores bfloat16
        array = array.view(jnp.bfloat16)
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(np.float32, copy=False) if is_float else array


@contextlib.contextmanager
def _one_line_errors(file: pathlib.Path) -> Iterator[None]:
    """Turn any error of the readers into a one-line UserError: on damaged files they raise many."""
    try:
        with user_errors(f"cannot read {file}"):
            yield
    except UserError:
        raise
    except Exception as error:
        reason = one_line(error)
        if "allow_pickle" in reason:
            reason = "it contains pickled Python objects, which were not executed"
        raise UserError(f"{file} is damaged or truncated ({reason}); get a new copy") from error


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file is missing. Raises UserError if it is malformed."""
    if not file.is_file():
        return {}
    with user_errors(f"cannot read {file}", also=(ValueError,)):
        content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object")
    return content


def write_npz(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a .npz file atomically. Raises OSError."""
    with files.atomic(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


PYTORCHS = {"format": "pt"}  # metadata, without which transformers refuses a file


def write_safetensors(
    file: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] = PYTORCHS
) -> None:
    """Write a .safetensors file atomically. Raises OSError."""
    with files.atomic(file) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; save_file lets nobody else read it
        safetensors.numpy.save_file(dict(arrays), temporary, metadata=dict(metadata))
        temporary.chmod(mode)
