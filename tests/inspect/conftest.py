"""A small set of images on disk, and runs of it whose parameters are random: nothing is trained."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from tests.conftest import colour_coded
from tests.helpers.tiny import CLASSES, random_params, tiny_config, tiny_model, write_run
from vit_scale.models.parameters import OBJECTIVE
from vit_scale.training.objectives import make_objective

N = 20  # images of a split


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> pathlib.Path:
    """`val/CLASS/*.png`, 20 images of 20 x 20 px, and as many in `train`."""
    top = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for index, (image, label) in enumerate(colour_coded(N, len(CLASSES), 20, seed=3)):
            file = top / split / CLASSES[label] / f"{index:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    return top


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not rendered, which takes most of a report's time."""
    plots = pytest.importorskip("vit_scale.inspect.plots", exc_type=ImportError)
    monkeypatch.setattr(plots, "rasterize", lambda figure: np.zeros((2, 2, 3), np.uint8))


def run_of(folder, images, *overrides: str, seed=0, measures=()) -> pathlib.Path:
    """A finished run at step 5, with curves, whose parameters are random.

    `measures` are further ones of training, such as "train/dino".
    """
    fields = (f"data.path={images}", "data.name=folder", "eval.final=test", "data.workers=0")
    cfg = tiny_config(*fields, *overrides)
    model = tiny_model(*fields, *overrides)
    params = random_params(model, seed)
    objective = make_objective(model, cfg)
    if objective.init:
        params[OBJECTIVE] = jax.device_get(objective.init(jax.random.key(seed)))
    write_run(folder, cfg, params, classes=CLASSES[: cfg.model.classes])
    rows = [
        {"step": s, "train/loss": 3 - s / 5, "images_per_second": 40 + s}
        | dict.fromkeys(measures, s / 10)
        for s in range(1, 6)
    ]
    rows.append({"step": 5, "eval/loss": 2.5, "eval/accuracy": 0.25, "eval/n": N})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "report.json").write_text('{"devices": {"kind": "abacus", "count": 3}}')
    return folder


def arrays(figure) -> list[np.ndarray]:
    """The image of each of a figure's axes that has one."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
