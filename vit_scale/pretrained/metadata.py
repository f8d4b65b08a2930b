"""Read the metadata beside external weights: architecture, preprocessing and class names.

timm and Hugging Face write a `config.json` beside the weights, Hugging Face also a
`preprocessor_config.json`, open_clip an `open_clip_config.json`. Google's .npz files come alone;
those that we export have a .json of the same name. A setting that no model here can honour raises
an error; none is ignored.
"""

import pathlib
from typing import Any, NamedTuple

from vit_scale.errors import UserError

GELUS = {  # names in transformers and timm -> model.gelu
    "gelu": "exact",
    "gelu_tanh": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_new": "tanh",
    "quick_gelu": "quick",
}


class Metadata(NamedTuple):
    """What is stated about a model beside its arrays; a field is empty where nothing is."""

    model: dict[str, Any]  # fields of the config's model block
    augment: dict[str, Any]  # fields of its augment block
    eval: dict[str, Any]  # fields of its eval block: how images are resized and cropped
    classes: tuple[str, ...]
    image_size: tuple[int, int] | None  # (height, width) in pixels
    no_embed_class: bool | None = None  # timm: position embeddings have no row for [CLS]
    dimensions: dict[str, Any] = {}  # noqa: RUF012  # width and depth, to check the arrays against
    # (augment fields, eval fields) that the library falls back to, which the file does not state.
    library_defaults: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    notes: tuple[str, ...] = ()
    channels: str = ""  # order of a head's channels (rotary_channels.py)
    eva: bool | None = None  # timm: its class is Eva, not VisionTransformer; None: unknown


NO_METADATA = Metadata({}, {}, {}, (), None)


def gelu_field(file: pathlib.Path, name: str) -> dict[str, str]:
    """Return {"gelu": ...} for a library's name of an activation. Raises UserError."""
    if name not in GELUS:
        raise UserError(
            f"{file}: config.json has the activation {name}, which is not supported; "
            f"supported: {', '.join(GELUS)}"
        )
    return {"gelu": GELUS[name]}


def pixels_of(value: Any) -> tuple[int, int] | None:
    """Return (height, width) of an int or a pair; None if empty."""
    if not value:
        return None
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


def labels(file: pathlib.Path, names: Any) -> tuple[str, ...]:
    """Return class names in the order of the outputs, from a list or a dict {output: name}.

    Raises UserError if an output has no name.
    """
    if isinstance(names, dict):
        outputs = sorted(map(int, names))
        if outputs != list(range(len(outputs))):
            raise UserError(
                f"{file}: config.json names {len(outputs)} classes, for outputs {outputs[0]} to "
                f"{outputs[-1]}; every output from 0 needs a name"
            )
        by_output = {int(key): name for key, name in names.items()}
        names = [by_output[i] for i in outputs]
    return tuple(map(str, names))
