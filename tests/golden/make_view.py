"""Writes view.npz: photos that are not square, and the pixels that timm's evaluation makes of them.

Run in an environment with timm and torchvision (the extra `peers`):
    python tests/golden/make_view.py
"""

import itertools
import pathlib

import numpy as np
from PIL import Image
from timm.data import create_transform

FILE = pathlib.Path(__file__).with_name("view.npz")
PHOTOS = ((40, 61), (57, 33), (20, 20), (24, 90))  # height, width
SIZES = ((16, 16), (16, 24), (24, 12))
MODES = {"center": "shorter", "squash": "stretch"}  # timm's crop_mode: eval.fit
CROPS = (1.0, 0.9, 0.6)


def photo(height: int, width: int) -> np.ndarray:
    """Edges and slopes, so that a pixel's shift is seen."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (3 + i) + y / (5 - i)) for i in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


def main() -> None:
    found = {}
    for shape in PHOTOS:
        found["photo/" + "x".join(map(str, shape))] = photo(*shape)
    for shape, size, mode, crop in itertools.product(PHOTOS, SIZES, MODES, CROPS):
        for resample in ("bilinear", "bicubic", "lanczos") if crop == 0.9 else ("bicubic",):
            see = create_transform(
                (3, *size), crop_pct=crop, crop_mode=mode, interpolation=resample, normalize=False
            )
            pixels = np.asarray(see(Image.fromarray(photo(*shape)))).transpose(1, 2, 0)
            case = (
                "x".join(map(str, shape)),
                "x".join(map(str, size)),
                MODES[mode],
                crop,
                resample,
            )
            found["/".join(map(str, case))] = pixels
    np.savez_compressed(FILE, **found)
    print(f"{len(found) - len(PHOTOS)} cases, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
