"""A set of photos of ImageNet's size, made of the two that scikit-learn ships.

    python -m benchmarks.photos OUT --images 1000

Each is a part of one of the two, slightly warped and with a sensor's noise, 400 to 500 px on its
longer side, stored as a JPEG of quality 75 to 96: OUT/train/CLASS/NUMBER.jpg, about 70 kB on
average.
"""

import argparse
import importlib.util
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from vit_scale.errors import UserError

CLASSES = 10
NOISE = 16.0  # grey levels


def photos() -> list[Image.Image]:
    """Return the two photos, 427 x 640 pixels each. Raises UserError without scikit-learn."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("the photos come with scikit-learn: pip install scikit-learn")
    folder = pathlib.Path(package.origin).parent / "datasets" / "images"
    return [Image.open(folder / name).convert("RGB") for name in ("china.jpg", "flower.jpg")]


def draw(source: Image.Image, random: np.random.RandomState) -> Image.Image:
    """Return a part of a photo at about its own scale, its corners moved by a few pixels."""
    long, ratio = random.randint(400, 501), random.uniform(1.25, 1.5)
    size = np.array([long, round(long / ratio)])
    if random.uniform() < 0.25 and long <= source.height:
        size = size[::-1]
    size = np.minimum(size, source.size)
    left, top = (
        random.randint(0, limit - side + 1) for limit, side in zip(source.size, size, strict=True)
    )
    right, bottom = left + size[0], top + size[1]
    corners = np.array([left, top, left, bottom, right, bottom, right, top])
    quad = corners + random.uniform(0, 6, 8) * np.array([1, 1, 1, -1, -1, -1, -1, 1])
    resample = Image.Resampling.BICUBIC
    return source.transform(tuple(size), Image.Transform.QUAD, tuple(quad), resample)


def grain(image: Image.Image, random: np.random.RandomState) -> Image.Image:
    """Add a sensor's noise, without which the files are half as large as ImageNet's."""
    noisy = np.asarray(image) + random.normal(0, NOISE, (image.height, image.width, 1))
    return Image.fromarray(np.clip(np.round(noisy), 0, 255).astype(np.uint8))


def write(out: pathlib.Path, images: int) -> int:
    """Write so many photos into OUT/train, those that are not there yet; return their bytes."""
    sources, total = photos(), 0
    for number in tqdm(range(images), unit="photo", disable=None):
        file = out / "train" / f"class_{number % CLASSES}" / f"{number:05}.jpg"
        if not file.exists():
            random = np.random.RandomState(number)
            image = grain(draw(sources[random.randint(2)], random), random)
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, quality=int(random.randint(75, 97)))
        total += file.stat().st_size
    return total


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photos")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--images", type=int, default=1000)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    total = write(args.out, args.images)
    print(f"{args.out}: {args.images} photos of {total / args.images / 1e3:.1f} kB on average")


if __name__ == "__main__":
    main()
