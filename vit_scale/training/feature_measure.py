"""Measure features while they are trained: nearest neighbours, where nothing is predicted."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_scale.data import Source
from vit_scale.data.splits import are_disjoint
from vit_scale.data.targets import CLASS
from vit_scale.errors import UserError, nearest
from vit_scale.evaluation import KNN, Extract, NotFinite
from vit_scale.models.build import Model

PROBES = ("", "knn")  # of eval.probe


class NearestNeighbours:
    """Classify features by their 20 nearest among those of `bank`, as `vit-scale probe` does.

    (params, source) -> {"n": ..., "accuracy": ..., "interval": of 95 %}. The features of the bank
    are computed anew each time, because they change with the parameters. Of features that are not
    finite the accuracy is NaN, so that training may recover.

    Raises UserError for a bank of fewer images than neighbours.
    """

    main = "accuracy"

    def __init__(self, cfg: ConfigDict, model: Model, mesh: Mesh, bank: Source):
        KNN().check(len(bank))
        self.extract, self.mesh, self.bank = Extract(cfg, model, mesh), mesh, bank

    def __call__(
        self, params: dict, source: Source, selected: Mapping | None = None
    ) -> dict[str, Any]:
        try:
            queries, bank = self.extract(params, source), self.extract(params, self.bank)
        except NotFinite:
            return {"n": len(source), "accuracy": math.nan, "interval": [0.0, 1.0]}
        result = KNN().evaluate(*bank, *queries, self.mesh)
        return {"n": result["n"], "accuracy": result["accuracy"], "interval": result["interval"]}


def check_probe(cfg: ConfigDict) -> None:
    """Raise UserError for an `eval.probe` that is unknown, or whose splits can't be compared."""
    if cfg.eval.probe not in PROBES:
        raise UserError(
            f"eval.probe={cfg.eval.probe!r} is unknown; {nearest(cfg.eval.probe, PROBES)}"
        )
    if not cfg.eval.probe:
        if cfg.eval.bank:
            raise UserError(f"eval.bank={cfg.eval.bank} is of eval.probe=knn, which is not set")
        return
    if cfg.data.target != CLASS:
        raise UserError(
            f"eval.probe=knn needs one class an image, not data.target={cfg.data.target}: set "
            "eval.probe, eval.split and eval.final to ''"
        )
    check_bank(cfg, lambda *pair: not are_disjoint(*pair))


def check_bank(cfg: ConfigDict, share: Callable[[str, str], bool]) -> None:
    """Raise UserError for neighbours among the images that are classified.

    `share` tells whether two splits share images.
    """
    bank = cfg.eval.bank or cfg.data.train
    for field in ("split", "final"):
        split = cfg.eval[field]
        if split and share(bank, split):
            raise UserError(
                f"eval.{field}={split} shares images with the neighbours of eval.probe=knn, "
                f"{bank}: every image would be its own nearest"
            )
