"""Read the metadata beside a weight file, with the reader of its format."""

import pathlib

from vit_scale.errors import UserError
from vit_scale.pretrained.formats import CLIP, DINOV2, DINOV3, HUGGINGFACE, OPEN_CLIP, SIGLIP, TIMM
from vit_scale.pretrained.huggingface_config import read_huggingface_config
from vit_scale.pretrained.key_mapping import WeightFormat
from vit_scale.pretrained.metadata import NO_METADATA, Metadata, pixels_of
from vit_scale.pretrained.timm_config import architecture_metadata, read_timm_config
from vit_scale.pretrained.weight_files import read_json

OPEN_CLIP_FIELDS = (
    *("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "ls_init_value"),
)
TRANSFORMERS = (HUGGINGFACE, DINOV2, DINOV3, SIGLIP, CLIP)


def read_metadata(fmt: WeightFormat, file: pathlib.Path, architecture: str = "") -> Metadata:
    """Read the metadata beside the weight file `file`.

    `architecture` is timm's name of it, for a file without a config.json. Raises UserError if the
    metadata is malformed, or describes a model that is no plain ViT.
    """
    try:
        return _read(fmt, file, architecture)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{file}: the metadata beside it is not as {fmt.title} writes it: {error!r}"
        ) from error


def _read(fmt: WeightFormat, file: pathlib.Path, architecture: str) -> Metadata:
    own = read_json(file.with_suffix(".json")) if file.suffix == ".npz" else {}
    if own:
        pixels = {name: tuple(map(float, own[name])) for name in ("mean", "std")}
        view = own.get("eval", {})  # absent from files of earlier versions
        return Metadata(own["model"], pixels, view, tuple(own["classes"]), tuple(own["image"]))
    content = read_json(file.parent / "config.json")
    if fmt is TIMM and "architecture" in content:
        return read_timm_config(file, content)
    if fmt is TIMM and architecture:
        return architecture_metadata(file, architecture)
    if fmt in TRANSFORMERS and content:
        return read_huggingface_config(fmt, file, content)
    if fmt is OPEN_CLIP:
        return _open_clip(file)
    return NO_METADATA


def _open_clip(file: pathlib.Path) -> Metadata:
    """The image tower in open_clip_config.json."""
    content = read_json(file.parent / "open_clip_config.json")
    if not content:
        return NO_METADATA
    model_cfg, preprocess = content["model_cfg"], content.get("preprocess_cfg", {})
    vision = model_cfg["vision_cfg"]
    for name, value in vision.items():
        if value and name not in OPEN_CLIP_FIELDS:
            raise UserError(f"{file}: open_clip_config.json has {name}={value}: not supported")
    heads = int(vision["width"]) // int(vision.get("head_width", 64))
    fields = {"heads": heads, "gelu": "quick" if model_cfg.get("quick_gelu") else "exact"}
    pixels = {
        name: tuple(map(float, preprocess[name]))
        for name in ("mean", "std")
        if preprocess.get(name)
    }
    dimensions = {"width": int(vision["width"]), "depth": int(vision["layers"])}
    return Metadata(fields, pixels, {}, (), pixels_of(vision["image_size"]), None, dimensions)
