"""Writes random_crop.npz: the boxes and pixels of timm's and TensorFlow's random resized crops.

Run in an environment with timm, torchvision (the extra `peers`) and tensorflow-cpu:
    PYTHONPATH=. python tests/golden/make_random_crop.py

Each case has the random numbers that its reference drew: fractions for timm, whose `random` is
replaced, and for TensorFlow the words of Philox-4x32 (Salmon et al. 2011) of that seed.
"""

import pathlib

import numpy as np
from PIL import Image

from timm.data import transforms  # isort: skip (PyTorch has to be loaded before TensorFlow)
import tensorflow as tf  # isort: skip

from tests.golden.make_view import photo

FILE = pathlib.Path(__file__).with_name("random_crop.npz")
SIZES = ((375, 500), (500, 375), (40, 61), (24, 240), (240, 24), (20, 20), (3, 5))  # height, width
SCALES = ((0.08, 1.0), (0.05, 1.0), (0.9, 1.0))
PIXELS = ((57, 33), (40, 61))
OUT = 24
NUMBERS = 24  # of timm: at most two for each of ten attempts, and two; TensorFlow has 100


class Fractions:
    """Stands in for the module `random`."""

    def __init__(self, fractions: np.ndarray):
        self._fractions = iter(fractions.tolist())

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._fractions)

    def randint(self, low: int, high: int) -> int:
        return low + int(next(self._fractions) * (high - low + 1))


def philox(seed: int, seed2: int, words: int) -> np.ndarray:
    """Return the first words of TensorFlow's generator of these seeds, as uint32."""
    key, counter, out = [seed, 0], [0, 0, seed2, 0], []
    while len(out) < words:
        block, (k0, k1) = list(counter), key
        for _ in range(10):
            left, right = block[0] * 0xD2511F53, block[2] * 0xCD9E8D57
            block = [
                (right >> 32) ^ block[1] ^ k0,
                right & 0xFFFFFFFF,
                (left >> 32) ^ block[3] ^ k1,
                left & 0xFFFFFFFF,
            ]
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        out += block
        counter[0] += 1
    return np.array(out[:words], np.uint32)


def timm_case(size, scale, fractions, resample="bicubic"):
    """Return the box, and the pixels of the photo of that size."""
    transforms.random = Fractions(fractions)
    crop = transforms.RandomResizedCropAndInterpolation(OUT, scale=scale, interpolation=resample)
    image = Image.fromarray(photo(*size))
    box = crop.get_params(image, scale, crop.ratio)
    transforms.random = Fractions(fractions)
    return box, np.asarray(crop(image))


def tensorflow_case(size, scale, seed, resample="bicubic"):
    begin, extent, _ = tf.raw_ops.SampleDistortedBoundingBoxV2(
        image_size=(*size, 3),
        bounding_boxes=tf.zeros([0, 0, 4]),
        min_object_covered=0.0,
        seed=seed,
        seed2=seed + 1,
        aspect_ratio_range=(0.75, 1.33),
        area_range=scale,
        max_attempts=100,
        use_image_if_no_bounding_boxes=True,
    )
    (top, left, _), (height, width, _) = begin.numpy().tolist(), extent.numpy().tolist()
    cut = photo(*size)[top : top + height, left : left + width]
    pixels = tf.image.resize(cut, (OUT, OUT), method=resample, antialias=True).numpy()
    return (top, left, height, width), pixels


def main() -> None:
    content, random, seed = {}, np.random.RandomState(0), 1
    for size in SIZES:
        for scale in SCALES:
            for number in range(3):
                name = f"{size[0]}x{size[1]}/{scale[0]}/{number}"
                fractions = random.random_sample(NUMBERS)
                content[f"torchvision/{name}/numbers"] = fractions
                content[f"torchvision/{name}/box"] = timm_case(size, scale, fractions)[0]
                seed += 2
                content[f"inception/{name}/numbers"] = philox(seed, seed + 1, 10 * NUMBERS)
                content[f"inception/{name}/box"] = tensorflow_case(size, scale, seed)[0]
    for size in PIXELS:
        content[f"photo/{size[0]}x{size[1]}"] = photo(*size)
        for resample in ("bilinear", "bicubic"):
            name = f"{size[0]}x{size[1]}/{resample}"
            fractions = random.random_sample(NUMBERS)
            content[f"torchvision/{name}/numbers"] = fractions
            pixels = timm_case(size, (0.08, 1.0), fractions, resample)[1]
            content[f"torchvision/{name}/pixels"] = pixels
            seed += 2
            content[f"inception/{name}/numbers"] = philox(seed, seed + 1, 10 * NUMBERS)
            pixels = tensorflow_case(size, (0.08, 1.0), seed, resample)[1]
            content[f"inception/{name}/pixels"] = pixels
    np.savez_compressed(FILE, **content)
    print(f"{len(content)} arrays, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
