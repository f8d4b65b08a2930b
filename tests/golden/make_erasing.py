"""Writes erasing.npz: the boxes that timm's random erasing erases, and the numbers they come from.

Run in an environment with timm (the extra `peers`):
    PYTHONPATH=. python tests/golden/make_erasing.py
"""

import pathlib

import numpy as np
import torch
from timm.data import random_erasing

FILE = pathlib.Path(__file__).with_name("erasing.npz")
CASES = {"224": (224, 224, 0.02, 1 / 3), "wide": (20, 64, 0.1, 0.9), "small": (8, 8, 0.3, 1.0)}
IMAGES, ATTEMPTS = 24, 10


class Attempts:
    """Stands in for the module `random`: the rows of an array, one for each attempt."""

    def __init__(self, rows: np.ndarray):
        self._rows, self._row, self._uses = iter(rows), None, 0

    def random(self) -> float:
        return 0.0

    def uniform(self, low: float, high: float) -> float:
        if self._uses % 2 == 0:
            self._row = next(self._rows)
        self._uses += 1
        return low + (high - low) * self._row[1 - self._uses % 2]

    def randint(self, low: int, high: int) -> int:
        value = self._row[2]
        self._row = self._row[[0, 1, 3, 2]]
        return low + int(value * (high - low + 1))


def box(image: torch.Tensor) -> list[int]:
    rows, columns = (np.flatnonzero((image[0] == 0).any(axis)) for axis in (1, 0))
    return [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1] if rows.size else [0] * 4


def main() -> None:
    draw, content = np.random.RandomState(0), {}
    for name, (height, width, low, high) in CASES.items():
        numbers = draw.random_sample((IMAGES, ATTEMPTS, 4))
        boxes = []
        for rows in numbers:
            random_erasing.random = Attempts(rows)
            erase = random_erasing.RandomErasing(1.0, low, high, mode="const", device="cpu")
            image = torch.ones(3, height, width)
            erase(image)
            boxes.append(box(image))
        content |= {f"{name}/numbers": numbers, f"{name}/boxes": np.array(boxes)}
        content[f"{name}/setting"] = np.array([height, width, low, high])
    np.savez_compressed(FILE, **content)
    print(f"{len(content)} arrays, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
