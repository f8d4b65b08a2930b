"""The smallest models and runs that are whole, with parameters by numpy: nothing is compiled."""

import functools
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vit_scale import config
from vit_scale.checkpoint import Checkpoints
from vit_scale.models.build import Model, build
from vit_scale.models.parameters import named
from vit_scale.runs.json_files import write_json

CLASSES = ("cat", "dog", "eel", "fox")
SIZES = (
    "model.variant=Ti/8",
    "model.width=16",
    "model.depth=2",
    "model.heads=2",
    "model.mlp=24",
    f"model.classes={len(CLASSES)}",
    "data.resolution=16",
    "data.batch=8",
    "eval.batch=8",
    "steps=10",
    "optim.warmup=0",
    "augment.crop=none",
)


def tiny_config(*overrides: str) -> ConfigDict:
    """A 2-block ViT of width 16 on 16 px images, with overrides such as "model.pool=map"."""
    return config.override(config.base(), [*SIZES, *overrides])


def convnet_config(variant: str, *overrides: str) -> ConfigDict:
    """A narrow network of vit_scale.models.convnets on the same images: "cnn" or a ResNet."""
    small = ["model.width=4", *(["model.mlp=12"] if variant == "cnn" else ["model.depth=8"])]
    others = [item for item in SIZES if not item.startswith("model.")]
    sizes = [f"model.variant={variant}", *small, f"model.classes={len(CLASSES)}", *others]
    return config.override(config.base(), [*sizes, *overrides])


@functools.cache
def tiny_model(*overrides: str) -> Model:
    cfg = tiny_config(*overrides)
    return build(cfg.model, config.image_size(cfg))


def random_params(model: Model, seed: int = 0) -> dict:
    """Parameters of which none is zero or one, so that each of them matters to the logits."""
    shapes = model.abstract_params
    draw = np.random.RandomState(seed)
    leaves = [
        (name.endswith(("scale", "variance")) + 0.2 * draw.randn(*leaf.shape)).astype(np.float32)
        for name, leaf in named(shapes).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def random_images(count: int, size: tuple[int, int] = (16, 16), seed: int = 0) -> np.ndarray:
    """uint8 [count, h, w, 3]."""
    return np.random.RandomState(seed).randint(0, 256, (count, *size, 3)).astype(np.uint8)


def random_batch(count: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """A host batch of noise, the brighter the higher the label: a model can learn it."""
    labels = np.random.RandomState(seed).randint(0, len(CLASSES), count).astype(np.int32)
    images = random_images(count, seed=seed) // 4 + 48 * labels[:, None, None, None]
    return {"image": images.astype(np.uint8), "label": labels, "mask": np.ones(count, bool)}


def write_run(
    folder: pathlib.Path, cfg: ConfigDict, params, step: int = 5, ema=None, **said
) -> pathlib.Path:
    """The folder of a run of `cfg` that has one checkpoint, of these parameters.

    `said` is further what it says of itself, such as the `data` that it was trained on.
    """
    about = {"name": "tiny", "config": config.to_json(cfg), "classes": list(CLASSES), **said}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", about)
    with Checkpoints(folder) as checkpoints:
        trees = {"params": params, "opt_state": {"count": np.int32(step)}, "ema": ema}
        checkpoints.save(step, trees, about)
    return folder


def write_images(top: pathlib.Path, *splits: str) -> dict:
    """Write three images of each class to folders SPLIT/CLASS; return the fields that name them."""
    for split in splits:
        for name in CLASSES:
            (top / split / name).mkdir(parents=True)
            for i, image in enumerate(random_images(3, seed=len(name))):
                Image.fromarray(image).save(top / split / name / f"{i}.png")
    return {"data.name": "folder", "data.path": str(top)}
