"""Read the config.json of transformers: one reader for each kind of model."""

import pathlib
from collections.abc import Callable
from typing import Any

from vit_scale.errors import UserError
from vit_scale.pretrained import preprocessing
from vit_scale.pretrained.key_mapping import WeightFormat
from vit_scale.pretrained.metadata import Metadata, gelu_field, labels, pixels_of

SINGLE_LABEL = (None, "", "single_label_classification")  # problem_type
Fields = dict[str, Any]
# Settings of code of a model's own, with which the arrays mean something else.
OTHER_FUNCTION = ("auto_map", "post_layernorm", "use_rms_norm", "use_sub_ln")
# What transformers assumes where a config.json is silent; of towers, which store differences only.
_TOWER: Fields = {
    "num_attention_heads": 12,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "image_size": 224,
}
_SIGLIP: Fields = {
    **_TOWER,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
DEFAULTS: dict[str, Fields] = {
    "siglip_vision_model": _SIGLIP,
    "siglip2_vision_model": {**_SIGLIP, "image_size": None, "num_patches": 256},
    "clip_vision_model": {
        **_TOWER,
        "patch_size": 32,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    },
}


def _nothing_more(content: dict) -> Fields:
    return {}


def _dinov3(content: dict) -> Fields:
    changes = {
        f"rope_{name}": float(content.get(f"pos_embed_{name}") or 0.0)
        for name in ("shift", "jitter", "rescale")
    }
    return {"rope": "dinov3", "rope_temperature": float(content["rope_theta"]), **changes}


def _siglip(content: dict) -> Fields:
    if not content.get("vision_use_head", True):
        raise UserError("vision_use_head=False, which is not supported")
    return {}


# model_type -> (name of the weight format, reader of further fields of the model block)
KINDS: dict[str, tuple[str, Callable[[dict], Fields]]] = {
    "vit": ("huggingface", _nothing_more),
    "deit": ("huggingface", _nothing_more),
    "vit_mae": ("huggingface", _nothing_more),
    "vit_msn": ("huggingface", _nothing_more),
    "dinov2": ("huggingface-dinov2", _nothing_more),
    "dinov2_with_registers": ("huggingface-dinov2", _nothing_more),
    "dinov3_vit": ("huggingface-dinov3", _dinov3),
    "siglip_vision_model": ("huggingface-siglip", _siglip),
    "siglip2_vision_model": ("huggingface-siglip", _siglip),
    "clip_vision_model": ("huggingface-clip", _nothing_more),
}
TOWERS = {  # models of images and texts -> the kind of their image tower
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
    "clip": "clip_vision_model",
}


def read_huggingface_config(fmt: WeightFormat, file: pathlib.Path, content: dict) -> Metadata:
    """Read the config.json beside `file`, as transformers writes it. Raises UserError."""
    kind = content.get("model_type", "vit")
    if kind in TOWERS:  # images and texts
        kind, outer = TOWERS[kind], content
        tower = {**outer.get("vision_config", {}), **(outer.get("vision_config_dict") or {})}
        content = {**tower, "id2label": outer.get("id2label")}
        content |= {name: outer[name] for name in OTHER_FUNCTION if outer.get(name)}
    if kind not in KINDS:
        raise UserError(f"{file}: config.json has model_type={kind}, not a plain ViT")
    name, read = KINDS[kind]
    if name != fmt.name:
        raise UserError(
            f"{file}: config.json has model_type={kind}, but the arrays are named as in {fmt.title}"
        )
    content = {**DEFAULTS.get(kind, {}), **content}
    _check(file, content)
    model: Fields = {
        "heads": int(content["num_attention_heads"]),
        "norm_epsilon": float(content["layer_norm_eps"]),
    }
    activation = content.get("hidden_act", "gelu")
    if content.get("use_gated_mlp") and activation not in ("silu", "swish"):
        raise UserError(f"{file}: config.json has use_gated_mlp with {activation}, not silu")
    if not content.get("use_swiglu_ffn") and not content.get("use_gated_mlp"):
        model |= gelu_field(file, activation)
    try:
        model |= read(content)
    except UserError as error:
        raise UserError(f"{file}: config.json has {error}") from error
    size = pixels_of(content.get("image_size")) or _naflex_size(content)
    classes = labels(file, content.get("id2label") or {})
    if classes == tuple(f"LABEL_{i}" for i in range(len(classes))):  # transformers' placeholders
        classes = ()
    # DINOv2's and DINOv3's preprocessors make images smaller than the positions' grid.
    exact = size if kind.startswith(("vit", "deit", "siglip_", "clip")) else None
    pixels, view = preprocessing.from_huggingface(file, exact)
    dimensions = {"width": content.get("hidden_size"), "depth": content.get("num_hidden_layers")}
    return Metadata(
        model,
        pixels,
        view,
        classes,
        size,
        None,
        dimensions,
        notes=_notes(file, content, size, exact is not None),
    )


def _check(file: pathlib.Path, content: dict) -> None:
    """Raise UserError for settings that no model here has."""
    if others := [name for name in OTHER_FUNCTION if content.get(name)]:
        raise UserError(
            f"{file}: config.json has {others[0]}={content[others[0]]}: the model is computed by "
            "other code, which may do something else with the same arrays"
        )
    if content.get("problem_type") not in SINGLE_LABEL:
        raise UserError(
            f"{file}: config.json has problem_type={content['problem_type']}; only single-label "
            "classification is supported"
        )
    if content.get("num_channels", 3) != 3:
        raise UserError(
            f"{file}: config.json has num_channels={content['num_channels']}; only 3 are supported"
        )


def _notes(
    file: pathlib.Path, content: dict, size: tuple[int, int] | None, exact: bool
) -> tuple[str, ...]:
    """What is different from the library's preprocessing."""
    notes = []
    made = preprocessing.output_size(file)
    if not exact and size and made and made != size:
        notes.append(
            f"its image processor makes {made[0]} x {made[1]} px; the model here takes {size[0]} x "
            f"{size[1]} px, as its config.json says: data.resolution changes that"
        )
    if content.get("num_patches"):
        notes.append("images are stretched to one shape; NaFlex keeps the shape of each")
    return tuple(notes)


def _naflex_size(content: dict) -> tuple[int, int] | None:
    """The square image of SigLIP 2's `num_patches`, to which its positions belong."""
    side = round(int(content.get("num_patches", 0)) ** 0.5) * int(content["patch_size"])
    return (side, side) if side else None
