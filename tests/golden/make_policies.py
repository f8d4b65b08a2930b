"""Writes policies.npz: what timm's, torchvision's and big_vision's operations make of an image.

A case is named policy/operation/level/sign/interpolation, in our names; the image has 24 x 32
pixels. AutoAugment's tables are there too, as text. Run in an environment with timm, torchvision,
TensorFlow, and a clone of big_vision on the path:
    PYTHONPATH=. python tests/golden/make_policies.py PHOTO.jpg
"""

import math
import pathlib
import sys
import types

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data import auto_augment
from torchvision.transforms import autoaugment as learned_policies
from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

FILE = pathlib.Path(__file__).with_name("policies.npz")
MEAN = (0.485, 0.456, 0.406)
RESAMPLE = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
NAMES = {
    "AutoContrast": "autocontrast",
    "Equalize": "equalize",
    "Invert": "invert",
    "Rotate": "rotate",
    "Posterize": "posterize",
    "Solarize": "solarize",
    "SolarizeAdd": "solarize_add",
    "Color": "colour",
    "Contrast": "contrast",
    "Brightness": "brightness",
    "Sharpness": "sharpness",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
    "Cutout": "cutout",
    "Identity": "identity",
}
SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
ENHANCED = ("colour", "contrast", "brightness", "sharpness")


def name_of(theirs: str) -> str:
    """Return our name of an operation; timm's say too how a level is read."""
    for ending in ("Increasing", "Original", "Rel"):
        theirs = theirs.removesuffix(ending)
    return NAMES[theirs]


def timm_cases(image: Image.Image, content: dict) -> None:
    """Every operation of RandAugment and AutoAugment, at whole and broken levels."""
    fill = tuple(min(255, round(255 * mean)) for mean in MEAN)
    policies = {
        "rand-m9-mstd0.5-inc1": auto_augment._RAND_INCREASING_TRANSFORMS,
        "rand-m9": auto_augment._RAND_TRANSFORMS,
        "original": ["PosterizeOriginal"],
    }
    for policy, operations in policies.items():
        for theirs in operations:
            name = name_of(theirs)
            signed = name in SIGNED or (name in ENHANCED and "inc1" in policy)
            moves = name in SIGNED
            for level in (0.0, 3.3, 9.0, 10.0) if name not in PLAIN else (9.0,):
                if theirs == "PosterizeIncreasing" and level == 10.0:
                    continue  # keeps no bits, which Pillow refuses
                if theirs == "Posterize" and level < 2.5:
                    continue
                for sign in (1, -1) if signed else (1,):
                    for interpolation in RESAMPLES if moves and level == 9.0 else ("bicubic",):
                        auto_augment.random = types.SimpleNamespace(
                            random=lambda sign=sign: 0.25 if sign > 0 else 0.75
                        )
                        hparams = {"img_mean": fill, "interpolation": RESAMPLE[interpolation]}
                        apply = auto_augment.AugmentOp(theirs, 1.0, level, hparams)
                        key = f"{policy}/{name}/{level}/{sign}/{interpolation}"
                        content[key] = np.asarray(apply(image))


PLAIN = ("autocontrast", "equalize", "invert", "identity")
RESAMPLES = tuple(RESAMPLE)


def torchvision_cases(image: Image.Image, content: dict) -> None:
    """Every operation of TrivialAugment and AutoAugment, at the bins' ends and between."""
    height, width = image.size[::-1]
    trivial, learned = learned_policies.TrivialAugmentWide(), learned_policies.AutoAugment()
    spaces = {
        "trivialaugment": (trivial._augmentation_space(31), (0, 4, 14, 30)),
        "autoaugment-cifar10": (learned._augmentation_space(10, (height, width)), (1, 7, 9)),
    }
    for policy, (space, bins) in spaces.items():
        for operation, (magnitudes, signed) in space.items():
            for level in bins if magnitudes.ndim else (0,):
                for sign in (1, -1) if signed else (1,):
                    magnitude = float(magnitudes[level]) if magnitudes.ndim else 0.0
                    changed = learned_policies._apply_op(
                        image, operation, sign * magnitude, InterpolationMode.NEAREST, None
                    )
                    # Its translations move pixels the other way; the direction is drawn.
                    ours = -sign if operation.startswith("Translate") else sign
                    key = f"{policy}/{NAMES[operation]}/{float(level)}/{ours}/nearest"
                    content[key] = np.asarray(changed)


def big_vision_cases(image: Image.Image, content: dict) -> None:
    """Every operation of its RandAugment, at the levels of its configs."""
    sys.modules["tensorflow_addons"] = types.SimpleNamespace(image=addons())
    from big_vision.pp import autoaugment

    hparams = autoaugment.HParams(cutout_const=40, translate_const=100)
    pixels = autoaugment.tf.convert_to_tensor(np.asarray(image))
    for operation in autoaugment.NAME_TO_FUNC:
        name = NAMES[operation]
        for level in (0, 10, 15, 20):
            for sign in (1, -1) if name in SIGNED else (1,):
                autoaugment._randomly_negate_tensor = lambda x, sign=sign: sign * x
                autoaugment.tf.random_uniform = centre([0.25, 0.75], image.size[::-1])
                function, _, arguments = autoaugment._parse_policy_info(
                    operation, 1.0, float(level), [128] * 3, hparams
                )
                key = f"randaug(2,{level})/{name}/{float(level)}/{sign}/nearest"
                content[key] = np.asarray(function(pixels, *arguments))


def centre(shares: list[float], size: tuple[int, int]):
    """Return a stand-in for tf.random_uniform that draws cutout's centre: row, then column."""
    numbers = iter([int(share * side) for share, side in zip(shares, size, strict=True)])
    return lambda shape, **_: np.int32(next(numbers))


def addons() -> types.SimpleNamespace:
    """Return what big_vision uses of TensorFlow Addons, which no longer installs."""
    import tensorflow as tf

    def transform(image, matrix):
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=image[None],
            transforms=tf.constant([matrix], tf.float32),
            output_shape=image.shape[:2],
            fill_value=0.0,
            interpolation="NEAREST",
            fill_mode="CONSTANT",
        )[0]

    def translate(image, shift):
        return transform(image, [1.0, 0.0, -shift[0], 0.0, 1.0, -shift[1], 0.0, 0.0])

    def rotate(image, angle):
        height, width = (side - 1 for side in image.shape[:2])
        cos, sin = math.cos(angle), math.sin(angle)
        x = (width - (cos * width - sin * height)) / 2
        y = (height - (sin * width + cos * height)) / 2
        return transform(image, [cos, -sin, x, sin, cos, y, 0.0, 0.0])

    return types.SimpleNamespace(transform=transform, translate=translate, rotate=rotate)


def colour_cases(image: Image.Image, content: dict) -> None:
    """Jitter, grey and blur."""
    for sigma in (0.1, 0.7, 1.3, 2.0):
        blurred = image.filter(ImageFilter.GaussianBlur(sigma))
        content[f"blur/{sigma}"] = np.asarray(blurred)
    for shift in (-0.5, -0.1, 0.07, 0.5):
        content[f"hue/{shift}"] = np.asarray(functional.adjust_hue(image, shift))
    for factor in (0.2, 0.6, 1.4):
        content[f"brightness/{factor}"] = np.asarray(functional.adjust_brightness(image, factor))
        content[f"contrast/{factor}"] = np.asarray(functional.adjust_contrast(image, factor))
        content[f"colour/{factor}"] = np.asarray(functional.adjust_saturation(image, factor))
    content["grey/0"] = np.asarray(functional.to_grayscale(image, 3))


def tables(content: dict) -> None:
    """AutoAugment's policies: (operation, probability, level) of both layers in a line."""

    def text(rows) -> np.ndarray:
        return np.array([" ".join(f"{n} {p} {int(m or 0)}" for n, p, m in row) for row in rows])

    for kind in ("original", "v0", "3a"):
        policy = auto_augment.auto_augment_policy(kind)
        special = NAMES | {"Desaturate": "grey", "GaussianBlurRand": "blur"}
        content[f"table/{kind}"] = text(
            [
                [(special.get(op.name) or name_of(op.name), op.prob, op.magnitude) for op in row]
                for row in policy
            ]
        )
    for kind in ("imagenet", "cifar10"):
        which = learned_policies.AutoAugmentPolicy(kind)
        policy = learned_policies.AutoAugment(which).policies
        content[f"table/autoaugment-{kind}"] = text(
            [[(NAMES[name], p, m) for name, p, m in row] for row in policy]
        )


def main() -> None:
    torch.manual_seed(0)
    photo = Image.open(sys.argv[1]).convert("RGB")
    image = photo.resize((32, 24), Image.BILINEAR, box=(100, 60, 420, 300))
    content = {"image": np.asarray(image), "mean": np.array(MEAN)}
    timm_cases(image, content)
    torchvision_cases(image, content)
    colour_cases(image, content)
    tables(content)
    big_vision_cases(image, content)
    np.savez_compressed(FILE, **content)
    print(f"{len(content)} arrays, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
