"""vit_scale trains Vision Transformers on TPU pods, and runs the same program on one CPU or GPU.

In a notebook:

    import vit_scale
    report = vit_scale.train("vit_small_cifar", steps=1000)
    model = vit_scale.load("runs/vit_small_cifar")
    model(images)                    # uint8 [b, h, w, 3] -> probabilities [b, c]
    model.top("cat.jpg")             # [("cat", 0.98), ...]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_scale.api import evaluate, probe, show, train
    from vit_scale.inference.predictor import load
    from vit_scale.models.build import build
    from vit_scale.models.position_embeddings import resample
    from vit_scale.models.vit import ViT

    __version__: str

_HOMES = {
    "evaluate": "api",
    "load": "inference.predictor",
    "probe": "api",
    "show": "api",
    "train": "api",
    "ViT": "models.vit",
    "build": "models.build",
    "resample": "models.position_embeddings",
}
__all__ = ["ViT", "__version__", "build", "evaluate", "load", "probe", "resample", "show", "train"]


def __getattr__(name: str) -> Any:
    # On first use: the command line starts without waiting for jax.
    if name == "__version__":
        from importlib.metadata import version

        return version("vit_scale")
    if name not in _HOMES:
        raise AttributeError(f"module 'vit_scale' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vit_scale.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
