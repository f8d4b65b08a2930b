"""Translate image preprocessing between other libraries' configs and ours.

timm describes it in `pretrained_cfg`, Hugging Face in `preprocessor_config.json`. Both are reduced
to a mean, a standard deviation and a view (augment/view.py); what these can't express is refused.
"""

import pathlib
from typing import Any

import numpy as np

from vit_scale.augment.view import View, crop_of
from vit_scale.errors import UserError
from vit_scale.pretrained.hints import Size
from vit_scale.pretrained.weight_files import read_json

Fields = dict[str, Any]
PIL_RESAMPLING = {"bilinear": 2, "bicubic": 3, "lanczos": 1}  # Pillow's numbers, as in JSON files
RESAMPLING_NAMES = {number: name for name, number in PIL_RESAMPLING.items()}
SUPPORTED_RESAMPLING = f"supported: {', '.join(PIL_RESAMPLING)}"
CROPS: dict[str, Any] = {"do_center_crop": True, "resample": 3, "shortest": True}
# Supported image processors of transformers, by the start of their names, and their defaults.
# `shortest`: an int as `size` is that of the shortest edge.
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"shortest": False},
    "DeiT": CROPS | {"shortest": False},
    "Bit": CROPS,
    "CLIP": CROPS,
    "Siglip": {"shortest": False},
    "DINOv3": {"shortest": False, "resample": 2},
    "BaseImageProcessor": {"shortest": False},
}
STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb")
# Defaults of a pretrained_cfg. Without a pretrained_cfg, formats/timm.py has those of timm's ViTs.
TIMM_PIXELS: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TIMM_VIEW: dict[str, Any] = {"fit": "shorter", "crop": 0.875, "resample": "bicubic"}


def from_timm(file: pathlib.Path, content: dict) -> tuple[Fields, Fields]:
    """(fields of the augment block, fields of the eval block) of timm's pretrained_cfg.

    Raises UserError for a setting that our fields can't express.
    """
    pixels = {
        name: tuple(map(float, content[name])) for name in ("mean", "std") if content.get(name)
    }
    if any(len(values) != 3 for values in pixels.values()) or min(pixels.get("std", (1,))) <= 0:
        raise UserError(f"{file}: mean and std must have three values each, and std be above 0")
    view: Fields = {}
    if content.get("crop_pct"):
        view["crop"] = float(content["crop_pct"])
        if not 0 < view["crop"] <= 1:
            raise UserError(f"{file}: crop_pct={content['crop_pct']} must be above 0 and at most 1")
    if name := content.get("interpolation"):
        if name not in PIL_RESAMPLING:
            raise UserError(f"{file}: unsupported interpolation={name}; {SUPPORTED_RESAMPLING}")
        view["resample"] = name
    mode = content.get("crop_mode")
    if mode not in (None, "", "center", "squash"):
        raise UserError(f"{file}: unsupported crop_mode={mode}; supported: center, squash")
    if mode:
        view["fit"] = "stretch" if mode == "squash" else "shorter"
    return pixels, view


def from_huggingface(file: pathlib.Path, model_size: Size | None) -> tuple[Fields, Fields]:
    """(fields of the augment block, fields of the eval block) of the preprocessor beside `file`.

    `model_size` is the (height, width) in pixels of the model's input. Raises UserError for a
    setting that our fields can't express, and if the preprocessor returns images of another size.
    """
    source, content = _read_preprocessor(file)
    if not content:
        return {}, {}
    content = _with_defaults(source, content)
    pixels = _normalization(source, content)
    view: Fields = {}
    if "resample" in content:
        name = RESAMPLING_NAMES.get(content["resample"], str(content["resample"]).lower())
        if name not in PIL_RESAMPLING:
            raise UserError(
                f"{source}: unsupported resample={content['resample']}; {SUPPORTED_RESAMPLING}"
            )
        view["resample"] = name
    if not content.get("do_resize", True):
        if content.get("do_center_crop"):
            raise UserError(f"{source}: unsupported: do_center_crop without do_resize")
        # Then it only takes images of the model's size, which this view leaves as they are.
        return pixels, view | {"fit": "stretch", "crop": 1.0}
    return pixels, view | _size_fields(source, content, model_size)


def output_size(file: pathlib.Path) -> Size | None:
    """Return (height, width) of the images that the preprocessor beside `file` makes, if stated."""
    _, content = _read_preprocessor(file)
    size = content.get("crop_size") if content.get("do_center_crop", True) else None
    size = size or content.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and size.keys() >= {"height", "width"}:
        return int(size["height"]), int(size["width"])
    return None


def _read_preprocessor(file: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """The path and the settings of the preprocessor beside `file`; {} if there is none."""
    source = file.parent / "preprocessor_config.json"
    content = read_json(source)
    if not content:  # transformers 5 may store it along with a tokenizer
        source = file.parent / "processor_config.json"
        content = read_json(source).get("image_processor", {})
    return source, {name: value for name, value in content.items() if value is not None}


def _with_defaults(source: pathlib.Path, content: dict) -> dict:
    """Add the defaults of the image processor. Raises UserError if it or a step is unsupported."""
    kind = content.get("image_processor_type") or content.get("feature_extractor_type") or "ViT"
    processor = next((name for name in PROCESSORS if kind.startswith(name)), None)
    if processor is None:
        raise UserError(
            f"{source}: unsupported image processor {kind}; supported: those of "
            f"{', '.join(PROCESSORS)}"
        )
    for name, value in content.items():
        other_step = name.startswith("do_") and name not in STEPS
        if value and (other_step or name in ("rescale_offset", "crop_pct", "size_divisor")):
            raise UserError(f"{source}: unsupported setting {name}={value}")
    return PROCESSORS[processor] | content


def _normalization(source: pathlib.Path, content: dict) -> Fields:
    """Mean and standard deviation for pixels in [0, 1].

    Without rescaling, those in the file are for pixels in [0, 255]; without normalization, they are
    0 and 1.
    """
    factor = content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else 1.0
    white = 1.0 if np.isclose(255 * factor, 1.0, rtol=1e-6) else 255.0 * float(factor)
    if not content.get("do_normalize", True):
        return {"mean": (0.0,) * 3, "std": (1 / white,) * 3}
    fields: Fields = {}
    for name in ("mean", "std"):
        value = content.get(f"image_{name}")
        if value is None and white != 1.0:
            raise UserError(f"{source}: rescale_factor={factor} without image_{name}")
        if value is None:
            continue
        values = (value,) * 3 if isinstance(value, int | float) else tuple(value)
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            raise UserError(
                f"{source}: image_{name}={value} must have three values"
                + (" above 0" if name == "std" else "")
            )
        fields[name] = tuple(float(v) / white if white != 1.0 else float(v) for v in values)
    return fields


def _size_fields(source: pathlib.Path, content: dict, model_size: Size | None) -> Fields:
    """The eval fields `fit` and `crop` for `size`, `crop_size` and `do_center_crop`."""
    size = content.get("size")
    if size is None:
        return {}
    if isinstance(size, int):  # transformers before 4.26
        size = {"shortest_edge": size} if content["shortest"] else {"height": size, "width": size}
    size = {name: value for name, value in size.items() if value}
    crop = content.get("crop_size", 224) if content.get("do_center_crop") else None
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    fit, resized = _resized(source, size, crop)
    if crop is not None and crop.keys() != {"height", "width"}:
        raise UserError(f"{source}: unsupported crop_size={crop}: needs height and width")
    output = (int(crop["height"]), int(crop["width"])) if crop else resized
    if model_size and output != model_size:
        raise UserError(
            f"{source} makes images of {output[0]} x {output[1]} px, but the image_size in "
            f"config.json is {model_size[0]} x {model_size[1]}: correct one of the two files"
        )
    return {"fit": fit, "crop": _crop_share(source, fit, resized, output)}


def _resized(source: pathlib.Path, size: dict, crop: dict | None) -> tuple[str, Size]:
    """(eval.fit, the size that the fit resizes to) for the settings `size` and `crop_size`."""
    if size.keys() == {"shortest_edge"}:
        if crop is None:
            raise UserError(f"{source}: unsupported size={size} without a centre crop")
        return "shortest_edge", (int(size["shortest_edge"]),) * 2
    if size.keys() == {"height", "width"}:
        return "stretch", (int(size["height"]), int(size["width"]))
    raise UserError(f"{source}: unsupported size={size}: needs shortest_edge, or height and width")


def _crop_share(source: pathlib.Path, fit: str, resized: Size, output: Size) -> float:
    """eval.crop for a centre crop of `output` out of `resized`. Raises UserError."""
    sizes = f"crop of {output[0]} x {output[1]} out of {resized[0]} x {resized[1]} px"
    if output[0] > resized[0] or output[1] > resized[1]:
        raise UserError(f"{source}: unsupported {sizes}: images would be padded")
    share = crop_of(output, resized)
    if share is None:
        raise UserError(f"{source}: unsupported {sizes}: the two differ in shape")
    margins = [r - s for r, s in zip(resized, output, strict=True)]
    if fit == "stretch" and any(margin % 4 == 3 for margin in margins):
        raise UserError(
            f"{source}: unsupported {sizes}: it starts at half a pixel, which transformers rounds "
            "down and vit_scale up"
        )
    return share


def library_view(view: View, fit: str, files: bool, one_resize: bool) -> tuple[View, list[str]]:
    """The closest view that another library can express, and a line for each difference.

    Args:
      view: that of the run's evaluation.
      fit: how the library cuts out the centre: `shorter` (timm) or `shortest_edge` (transformers).
      files: the run decodes image files; else it has its images in memory.
      one_resize: files are decoded at the model's input size; else they are resized twice.
    """
    train = "bicubic" if files and one_resize else "bilinear"
    resample = train if view.resample == "train" else view.resample
    lines = []
    if files and not one_resize:
        lines.append(
            "this run resizes images twice, when decoding (data.load) and on the device; other "
            "libraries do it once, so pixels differ slightly"
        )
    if view.fit == "cover":
        lines.append(
            "this run crops images that are not square at fractions of a pixel (eval.fit=cover); "
            "other libraries crop at whole pixels, so pixels differ slightly"
        )
    elif view.fit not in ("stretch", fit):
        lines.append(
            f"this run rounds half pixels as eval.fit={view.fit}, the other library as {fit}: some "
            "images are shifted by one pixel"
        )
    return View("stretch" if view.fit == "stretch" else fit, view.crop, resample), lines
