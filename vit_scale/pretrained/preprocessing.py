"""How others' code makes pixels of an image, in our fields, and ours in theirs.

timm says it in its `pretrained_cfg`, Hugging Face in `preprocessor_config.json`. What is said there
comes to a mean, a standard deviation and a view (view.py), or is refused.
"""

import pathlib
from typing import Any

import numpy as np

from vit_scale.augment.view import View, crop_of
from vit_scale.errors import UserError
from vit_scale.pretrained.weight_files import read_json

Fields = dict[str, Any]
Size = tuple[int, int]
PIL = {"bilinear": 2, "bicubic": 3, "lanczos": 1}  # Pillow's numbers, which Hugging Face stores
CROPS: dict[str, Any] = {"do_center_crop": True, "resample": 3, "shortest": True}
# Image processors of transformers that are known here, and what they do where nothing is said.
KINDS: dict[str, dict[str, Any]] = {
    "ViT": {"shortest": False},
    "DeiT": CROPS | {"shortest": False},
    "Bit": CROPS,
    "CLIP": CROPS,
    "Siglip": {"shortest": False},
    "BaseImageProcessor": {"shortest": False},
}
# timm's defaults of a pretrained_cfg; without one, its ViTs' own are assumed (dialects/timm.py).
TIMM_PIXELS: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TIMM_VIEW: dict[str, Any] = {"fit": "shorter", "crop": 0.875, "resample": "bicubic"}
STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb")
NAMES = {number: name for name, number in PIL.items()}


def of_timm(file: pathlib.Path, content: dict) -> tuple[Fields, Fields]:
    """(fields of the augment block, fields of the eval block) of timm's pretrained_cfg.

    Raises UserError for what no field here says.
    """
    pixels = {
        name: tuple(map(float, content[name])) for name in ("mean", "std") if content.get(name)
    }
    if any(len(values) != 3 for values in pixels.values()) or min(pixels.get("std", (1,))) <= 0:
        raise UserError(f"{file}: mean and std are not of three channels, or a std is not above 0")
    view: Fields = {}
    if content.get("crop_pct"):
        view["crop"] = float(content["crop_pct"])
        if not 0 < view["crop"] <= 1:
            raise UserError(f"{file}: crop_pct={content['crop_pct']} is not above 0 and at most 1")
    if name := content.get("interpolation"):
        if name not in PIL:
            raise UserError(f"{file}: interpolation={name}; images here are resized {_choices()}")
        view["resample"] = name
    mode = content.get("crop_mode")
    if mode not in (None, "", "center", "squash"):
        raise UserError(f"{file}: crop_mode={mode}; images here are cropped by center or squash")
    if mode:
        view["fit"] = "stretch" if mode == "squash" else "shorter"
    return pixels, view


def _choices() -> str:
    return ", ".join(PIL)


def of_huggingface(file: pathlib.Path, model: Size | None) -> tuple[Fields, Fields]:
    """(fields of the augment block, fields of the eval block) of the preprocessor beside `file`.

    `model` is (height, width) in pixels of what the model sees. Raises UserError for what no field
    here says, and where the preprocessor gives images of another size.
    """
    beside = file.parent / "preprocessor_config.json"
    content = read_json(beside)
    if not content:  # transformers 5 may keep it with a tokenizer's
        beside = file.parent / "processor_config.json"
        content = read_json(beside).get("image_processor", {})
    content = {name: value for name, value in content.items() if value is not None}
    if not content:
        return {}, {}
    content = _with_defaults(beside, content)
    pixels = _normalisation(beside, content)
    view: Fields = {}
    if "resample" in content:
        name = NAMES.get(content["resample"], str(content["resample"]).lower())
        if name not in PIL:
            raise UserError(
                f"{beside}: resample={content['resample']}; images here are resized {_choices()}"
            )
        view["resample"] = name
    if not content.get("do_resize", True):
        if content.get("do_center_crop"):
            raise UserError(f"{beside}: do_center_crop without do_resize: no field here says so")
        return pixels, view | {"fit": "stretch", "crop": 1.0}  # it takes images of its size alone
    return pixels, view | _size_fields(beside, content, model)


def _with_defaults(beside: pathlib.Path, content: dict) -> dict:
    """What is said, and what its kind of processor does without a word.

    Raises UserError for a kind that is not known here, and for a step that no field here says.
    """
    kind = content.get("image_processor_type") or content.get("feature_extractor_type") or "ViT"
    known = next((name for name in KINDS if kind.startswith(name)), None)
    if known is None:
        raise UserError(
            f"{beside}: {kind} is none of the image processors that are known here, those of "
            f"{', '.join(KINDS)}"
        )
    for name, value in content.items():
        other = name.startswith("do_") and name not in STEPS
        if value and (other or name in ("rescale_offset", "crop_pct", "size_divisor")):
            raise UserError(f"{beside}: {name}={value}: no field here says so")
    return KINDS[known] | content


def _normalisation(beside: pathlib.Path, content: dict) -> Fields:
    """Mean and standard deviation, of pixels in [0, 1].

    Without a rescaling they are of pixels in [0, 255], without a normalisation 0 and 1.
    """
    factor = content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else 1.0
    unit = 1.0 if np.isclose(255 * factor, 1.0, rtol=1e-6) else 255.0 * float(factor)
    if not content.get("do_normalize", True):
        return {"mean": (0.0,) * 3, "std": (1 / unit,) * 3}
    fields: Fields = {}
    for name in ("mean", "std"):
        value = content.get(f"image_{name}")
        if value is None and unit != 1.0:
            raise UserError(f"{beside}: rescale_factor={factor}, and no image_{name} is set")
        if value is None:
            continue
        three = (value,) * 3 if isinstance(value, int | float) else tuple(value)
        if len(three) != 3 or (name == "std" and min(three) <= 0):
            raise UserError(
                f"{beside}: image_{name}={value} is not of three channels, or not above 0"
            )
        fields[name] = tuple(float(v) / unit if unit != 1.0 else float(v) for v in three)
    return fields


def _size_fields(beside: pathlib.Path, content: dict, model: Size | None) -> Fields:
    """What `size`, `crop_size` and `do_center_crop` come to."""
    size = content.get("size")
    if size is None:
        return {}
    if isinstance(size, int):  # before transformers 4.26
        size = {"shortest_edge": size} if content["shortest"] else {"height": size, "width": size}
    size = {name: value for name, value in size.items() if value}
    crop = content.get("crop_size", 224) if content.get("do_center_crop") else None
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    if size.keys() == {"shortest_edge"}:
        if crop is None:
            raise UserError(f"{beside}: size={size} without a centre crop: images of any shape")
        fit, resized = "shortest_edge", (int(size["shortest_edge"]),) * 2
    elif size.keys() == {"height", "width"}:
        fit, resized = "stretch", (int(size["height"]), int(size["width"]))
    else:
        raise UserError(f"{beside}: size={size} is neither shortest_edge nor height and width")
    if crop is not None and crop.keys() != {"height", "width"}:
        raise UserError(f"{beside}: crop_size={crop} is not height and width")
    seen = (int(crop["height"]), int(crop["width"])) if crop else resized
    if model and seen != model:
        raise UserError(
            f"{beside}: images of {seen[0]} x {seen[1]} px come out of it, and the model is of "
            f"{model[0]} x {model[1]}: correct one of the two files"
        )
    if seen[0] > resized[0] or seen[1] > resized[1]:
        raise UserError(
            f"{beside}: size={size} is smaller than crop_size={crop}: no field here pads images"
        )
    share = crop_of(seen, resized if fit == "stretch" else (resized[0], resized[0]))
    if share is None:
        raise UserError(
            f"{beside}: size={size} and crop_size={crop} differ in shape: no field here says so"
        )
    if fit == "stretch" and any((r - s) % 4 == 3 for r, s in zip(resized, seen, strict=True)):
        raise UserError(
            f"{beside}: crop_size={crop} out of size={size} begins at half a pixel, which is "
            "rounded down there and up here: no field here says so"
        )
    return {"fit": fit, "crop": share}


def exported(view: View, fit: str, files: bool, whole: bool) -> tuple[View, list[str]]:
    """A run's view as others' code can have it, and lines about what it can't.

    `fit` is how that code cuts out the centre: `shorter` (timm) or `shortest_edge` (transformers).
    `files`: the run decodes images from files; `whole`: at the size that its model sees. A run that
    resizes twice, or on the device, is nearest to one that does it once.
    """
    train = "bicubic" if files and whole else "bilinear"
    resample = train if view.resample == "train" else view.resample
    lines = []
    if files and not whole:
        lines.append(
            "its images are resized twice, when they are decoded (data.load) and on the device; "
            "other code does it once, and sees slightly other pixels"
        )
    if view.fit == "cover":
        lines.append(
            "it cuts a photo that is not square in fractions of a pixel (eval.fit=cover); other "
            "code in whole ones, and sees slightly other pixels"
        )
    elif view.fit not in ("stretch", fit):
        lines.append(
            f"it rounds half a pixel as eval.fit={view.fit}, the other code as {fit}: of some "
            "photos the one sees what lies a pixel beside what the other sees"
        )
    return View("stretch" if view.fit == "stretch" else fit, view.crop, resample), lines
