"""Read the metadata beside a weight file, with the reader of its format."""

import pathlib

from vit_scale.errors import UserError
from vit_scale.pretrained.formats import CLIP, DINOV2, DINOV3, HUGGINGFACE, OPEN_CLIP, SIGLIP, TIMM
from vit_scale.pretrained.huggingface_config import read_huggingface_config
from vit_scale.pretrained.key_mapping import WeightFormat
from vit_scale.pretrained.metadata import NO_METADATA, Metadata, pixels_of
from vit_scale.pretrained.preprocessing import PIL_RESAMPLING
from vit_scale.pretrained.timm_config import architecture_metadata, read_timm_config
from vit_scale.pretrained.weight_files import read_json

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_FIELDS = (  # that are read, in the arrays, or of training
    *("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "ls_init_value"),
    "patch_dropout",
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
    if fmt in (TIMM, OPEN_CLIP) and (file.parent / OPEN_CLIP_CONFIG).is_file():
        return _open_clip(fmt, file)
    if fmt is TIMM and content:
        kind = content.get("model_type") or content.get("architectures") or "another library"
        line = f"config.json beside it is not timm's, but of {kind}: ignored"
        return NO_METADATA._replace(notes=(line,))
    if fmt in TRANSFORMERS and content:
        return read_huggingface_config(fmt, file, content)
    return NO_METADATA


def _open_clip(fmt: WeightFormat, file: pathlib.Path) -> Metadata:
    """The image tower in open_clip_config.json: open_clip's own, or one of timm."""
    content = read_json(file.parent / OPEN_CLIP_CONFIG)
    model_cfg, preprocess = content["model_cfg"], content.get("preprocess_cfg", {})
    vision = model_cfg["vision_cfg"]
    stated = [name for name in ("mean", "std") if preprocess.get(name)]
    pixels = {name: tuple(map(float, preprocess[name])) for name in stated}
    view = _open_clip_view(file, preprocess)
    size = pixels_of(vision.get("image_size"))
    if fmt is TIMM:
        named = architecture_metadata(file, vision["timm_model_name"])
        return named._replace(augment=pixels, eval=view, image_size=size)
    for name, value in vision.items():
        if value and name not in OPEN_CLIP_FIELDS and (name, value) != ("pool_type", "tok"):
            raise UserError(f"{file}: {OPEN_CLIP_CONFIG} has {name}={value}: not supported")
    heads = int(vision["width"]) // int(vision.get("head_width", 64))
    fields = {"heads": heads, "gelu": "quick" if model_cfg.get("quick_gelu") else "exact"}
    dimensions = {"width": int(vision["width"]), "depth": int(vision["layers"])}
    return Metadata(fields, pixels, view, (), size, None, dimensions)


def _open_clip_view(file: pathlib.Path, preprocess: dict) -> dict[str, str]:
    """Fields of the eval block for open_clip's `resize_mode` and `interpolation`."""
    fits = {"squash": "stretch", "shortest": "shorter"}
    view = {}
    if mode := preprocess.get("resize_mode"):
        if mode not in fits:
            raise UserError(f"{file}: {OPEN_CLIP_CONFIG} has resize_mode={mode}: not supported")
        view["fit"] = fits[mode]
    if interpolation := preprocess.get("interpolation"):
        if interpolation not in PIL_RESAMPLING:
            raise UserError(
                f"{file}: {OPEN_CLIP_CONFIG} has interpolation={interpolation}: not supported"
            )
        view["resample"] = interpolation
    return view
