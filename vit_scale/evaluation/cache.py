"""A cache of features that knows what they were computed from.

A file's name is a hash of everything that features depend on: the fingerprint of each parameter,
the model, the images and how they are preprocessed, the layer. The file holds that description
too, and a checksum. One of another description, or a damaged one, is not used but computed again,
and that is said.
"""

import hashlib
import io
import json
import pathlib
import sys
import zipfile
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.checkpoint.integrity import Damaged, check_checksum, fingerprints, with_checksum
from vit_scale.data import Source, checksum, describe
from vit_scale.distributed import multihost
from vit_scale.errors import UserError, printable
from vit_scale.evaluation.features import Features, Layer
from vit_scale.storage import files
from vit_scale.storage.errors import one_line, user_errors

# Fields of the data and eval blocks that change which pixels the model gets, or which examples.
DATA_FIELDS = (
    *("name", "resolution", "width", "load", "square", "exif", "decoder", "on_corrupt"),
    *("slices", "fractal"),
)
EVAL_FIELDS = ("fit", "crop", "resample")


def describe_features(
    cfg: ConfigDict, params: dict, source: Source, split: str, layer: Layer
) -> dict:
    """Return everything that the features of a split depend on, as JSON.

    Of the images: their names and labels, where the set records a fingerprint of them, and the
    pixels of 16. So a set whose images were changed under the same names may pass unnoticed.
    """
    fields = config.to_json(cfg)
    arrays = json.dumps(fingerprints(params), sort_keys=True)
    return {
        "parameters": hashlib.sha256(arrays.encode()).hexdigest(),
        "model": fields["model"],
        "images": describe(source) | {"split": split, "checksum": checksum(source)},
        "data": {name: fields["data"][name] for name in DATA_FIELDS},
        "eval": {name: fields["eval"][name] for name in EVAL_FIELDS},
        "pixels": {name: fields["augment"][name] for name in ("mean", "std")},
        "layer": layer._asdict(),
        "platform": jax.default_backend(),
    }


def cached(
    folder: pathlib.Path | None, description: Mapping, compute: Callable[[], Features]
) -> Features:
    """Return features from the folder, or compute and store them there; None: no cache.

    All hosts read the same file, or all compute. A folder that can't be written is no error.
    """
    if folder is None:
        return compute()
    description = json.loads(json.dumps(description))
    text = json.dumps(description, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
    features = _read(path, description)
    everywhere = features is not None
    if multihost.has_peers():
        everywhere = bool(np.all(multihost_utils.process_allgather(np.bool_(everywhere))))
    if features is not None and everywhere:
        return features
    features = compute()
    if multihost.is_first():
        try:
            with user_errors(f"features are not cached: cannot write {path}"):
                folder.mkdir(parents=True, exist_ok=True)
                files.write(path, _encode(features, description))
        except UserError as error:
            _say(str(error))
    return features


def _say(line: str) -> None:
    print(f"vit-scale: {printable(line)}", file=sys.stderr)


def _encode(features: Features, description: Mapping) -> bytes:
    content = with_checksum({"of": description, "arrays": _digest(features)})
    buffer = io.BytesIO()
    np.savez(buffer, **features._asdict(), description=np.array(json.dumps(content)))
    return buffer.getvalue()


def _read(path: pathlib.Path, description: Mapping) -> Features | None:
    """Return the features in a file, or None if there is no such file, or no intact one."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            features = Features(arrays["values"], arrays["labels"])
            content = check_checksum(json.loads(str(arrays["description"])))
        if content["of"] != description:
            raise Damaged("it is of other features")
        if content["arrays"] != _digest(features):
            raise Damaged("its arrays do not match their checksum")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        if multihost.is_first():
            _say(f"{path} is damaged ({one_line(error)}): computing the features again")
        return None
    return features


def _digest(features: Features) -> str:
    digest = hashlib.sha256()
    for array in features:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
