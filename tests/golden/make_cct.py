"""Writes cct.npz: what CCT's convolutional tokenizer computes with random weights.

Run with numpy and torch, and the path of a clone of SHI-Labs/Compact-Transformers:
    python tests/golden/make_cct.py CLONE
Weights and images are drawn by their names (draw_by_name.py). Nothing here imports vit_scale.
"""

import pathlib
import sys

import numpy as np
import torch
from draw_by_name import draw, draw_images

WIDTH, SIZE = 24, (16, 24)
FILE = pathlib.Path(__file__).with_name("cct.npz")


def main(clone: str) -> None:
    sys.path.insert(0, clone)
    from src.utils.tokenizer import Tokenizer

    content = {}
    for layers in (1, 2, 3):
        tokenizer = Tokenizer(
            kernel_size=3,
            stride=1,
            padding=1,
            n_conv_layers=layers,
            n_output_channels=WIDTH,
            activation=torch.nn.ReLU,
        )
        shapes = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
        weights = {key: torch.from_numpy(draw(key, shape)) for key, shape in shapes.items()}
        tokenizer.load_state_dict(weights)
        images = torch.from_numpy(draw_images("cct", SIZE)).permute(0, 3, 1, 2)
        with torch.no_grad():
            content[f"tokens/{layers}"] = tokenizer(images).numpy()
        content[f"keys/{layers}"] = np.array(list(shapes))
    np.savez_compressed(FILE, **content)


if __name__ == "__main__":
    main(sys.argv[1])
