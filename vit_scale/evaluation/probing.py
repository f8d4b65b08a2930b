"""Probe a model's features on a labelled set: kNN, linear classifiers, statistics."""

import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_scale.config import image_size
from vit_scale.data import Source, open_evaluation, share_images
from vit_scale.distributed import multihost
from vit_scale.distributed.mesh import make_mesh
from vit_scale.distributed.sharding import check_batch, shard, shardings
from vit_scale.errors import USAGE, UserError, nearest
from vit_scale.evaluation import few_shot, linear, statistics
from vit_scale.evaluation.cache import cached, describe_features
from vit_scale.evaluation.features import POOLED, Extract, Features, Layer
from vit_scale.evaluation.knn import KNN
from vit_scale.models.build import Model, build
from vit_scale.pretrained import Pretrained, adapt

PROBES = ("knn", "linear", "few_shot", "statistics")


class Settings(NamedTuple):
    """What is measured, and how."""

    layer: Layer = POOLED
    knn: KNN = KNN()
    shots: Sequence[int] = few_shot.SHOTS
    draws: int = few_shot.DRAWS
    only: Sequence[str] = PROBES

    def check(self) -> None:
        """Raise UserError for values that can't work with any data."""
        for name in self.only:
            if name not in PROBES:
                raise UserError(f"probe {name!r} is unknown; {nearest(name, PROBES)}", USAGE)
        if "few_shot" in self.only:
            few_shot.check(self.shots, self.draws)


ALL = Settings()


def probe(
    source: Pretrained,
    cfg: ConfigDict,
    train: str,
    split: str,
    settings: Settings = ALL,
    cache: pathlib.Path | None = None,
) -> dict:
    """Measure the features of a loaded model; its head is not used.

    Args:
      source: the model.
      cfg: its config, with the data block of the set to probe on.
      train: the split that classifiers are fitted to, and neighbours are searched in.
      split: the split that is classified, and of which the statistics are.
      cache: folder for features; None: that of a run, and none for external weights.

    Returns:
      {"run", "step", "set", "classes", "train", "train_n", "split", "n", "feature", "layer",
      "dimensions"} and, by the name of each probe, its result.

    Raises:
      UserError: a setting, a split, or the set can't be used, or hosts differ in model or images.
    """
    settings.check()
    mesh = make_mesh(cfg.mesh)
    check_batch("eval.batch", cfg.eval.batch, mesh)
    model, params = at_size(source, cfg)
    extract = Extract(cfg, model, mesh, settings.layer)
    sources = open_splits(cfg, train, split)
    if "knn" in settings.only:
        settings.knn.check(len(sources[0]))
    folder, placed = cache or cache_folder(source), shard(params, shardings(params, mesh))

    def features(images: Source, name: str) -> Features:
        description = describe_features(cfg, params, images, name, settings.layer)
        multihost.check_same(description)
        return cached(folder, description, functools.partial(extract, placed, images))

    fitted, tested = features(sources[0], train), features(sources[1], split)
    return {
        "run": str(source.path),
        "step": source.step,
        "set": sources[1].name,
        "classes": len(sources[0].classes),
        "train": train,
        "train_n": len(fitted.labels),
        "split": split,
        "n": len(tested.labels),
        "feature": settings.layer.kind,
        "layer": settings.layer.block,
        "dimensions": fitted.values.shape[1],
        **_results(fitted, tested, sources[0].classes, settings, mesh),
    }


def _results(
    train: Features, test: Features, classes: Sequence[str], settings: Settings, mesh: Mesh
) -> dict:
    """Return the result of each probe, in the order of PROBES."""
    data = train.values, train.labels, test.values, test.labels, mesh
    if "few_shot" in settings.only:
        few_shot.check_counts(train.labels, classes, max(settings.shots))
    probes: dict[str, Callable] = {
        "knn": lambda: settings.knn.evaluate(*data),
        "linear": lambda: linear.evaluate(*data),
        "few_shot": lambda: [
            few_shot.evaluate(*data, shots, settings.draws) for shots in settings.shots
        ],
        "statistics": lambda: statistics.measure(test.values, test.labels, mesh),
    }
    return {name: run() for name, run in probes.items() if name in settings.only}


def at_size(source: Pretrained, cfg: ConfigDict) -> tuple[Model, dict]:
    """Return the model and its parameters for the config's image size.

    Position embeddings are resampled where that is another than the model's own, which is said.
    """
    if image_size(cfg) == image_size(source.cfg):
        return source.model, source.params
    model = build(cfg.model, image_size(cfg))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.abstract_params)
    params, rows = adapt(source.params, zeros, cfg.init.resample, same_classes=True)
    for row in rows if multihost.is_first() else ():
        if row.action != "kept":
            print(f"vit-scale: {row.name}: {row.action}", file=sys.stderr)
    return model, params


def open_splits(cfg: ConfigDict, train: str, split: str) -> tuple[Source, Source]:
    """Open both splits, preprocessed as in evaluation.

    Raises UserError for a set without one label an image, and for splits that share images or have
    different classes.
    """
    if cfg.data.target != "class":
        raise UserError(
            f"data.target={cfg.data.target}: probes need one class an image, data.target=class"
        )
    if cfg.data.mixture:
        raise UserError(
            "data.mixture: probes are of one set; name it: --config.data.mixture=() "
            "--config.data.name=NAME --config.data.path=PATH"
        )
    if share_images(cfg.data, train, split):
        raise UserError(
            f"splits {train} and {split} share images, or may: give others, such as "
            "--train train[:90%] --split train[90%:]",
            USAGE,
        )
    fitted, tested = (open_evaluation(cfg, name, ()) for name in (train, split))
    if fitted.classes != tested.classes:
        raise UserError(
            f"{fitted.name} has {len(fitted.classes)} classes and {tested.name} "
            f"{len(tested.classes)}, or others: probes need the same"
        )
    return fitted, tested


def cache_folder(source: Pretrained) -> pathlib.Path | None:
    """Return the folder of a run's cached features; None for external weights."""
    return source.run / "features" if source.run else None


def accuracy_rows(result: dict) -> list[dict]:
    """Return a row of each accuracy of a probe, for a table."""
    rows = []
    for name in ("knn", "linear", "few_shot"):
        for one in result.get(name, []) if name == "few_shot" else filter(None, [result.get(name)]):
            settings = {
                "knn": "k {k}, temperature {temperature}",
                "linear": "L2 {strength:.1e}",
                "few_shot": "{shots} a class, {draws} draws",
            }[name]
            low, high = (f"{100 * bound:.2f}" for bound in one["interval"])
            rows.append(
                {
                    "probe": name,
                    "accuracy": one["accuracy"],
                    "95 % interval": f"{low} to {high} %",
                    "n": one["n"],
                    "settings": settings.format(**one),
                }
            )
    return rows
