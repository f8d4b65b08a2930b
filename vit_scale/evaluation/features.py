"""Features of every example of a set: each once, for every batch size, mesh and number of hosts."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from vit_scale.augment.pipeline import eval_images
from vit_scale.config import image_size
from vit_scale.data import Source, are_files, views
from vit_scale.distributed.mesh import cpu_options
from vit_scale.distributed.sharding import batch_sharding, shardings
from vit_scale.errors import UserError, nearest
from vit_scale.evaluation.batches import evaluate_batches
from vit_scale.models.build import Model
from vit_scale.models.spec import Shape

KINDS = ("pooled", "cls", "mean", "cls_mean")


class Features(NamedTuple):
    """The features of a set's readable examples, in its order, whole on every host."""

    values: Float[np.ndarray, "n d"]  # float32
    labels: Int[np.ndarray, "n"]  # int32


class Layer(NamedTuple):
    """What is taken as an image's feature: a kind, of the tokens after a block; None: the last."""

    kind: str = "pooled"
    block: int | None = None

    def check(self, model: Model) -> None:
        """Raise UserError for an unknown kind, or a model without such tokens or blocks."""
        if self.kind not in KINDS:
            raise UserError(f"feature {self.kind!r} is unknown; {nearest(self.kind, KINDS)}")
        shape = model.shape
        if not isinstance(shape, Shape):
            if self != Layer():
                raise UserError(
                    f"feature {self.kind} of block {self.block}: a convolutional network has "
                    "pooled features of its last layer only"
                )
            return
        if "cls" in self.kind.split("_") and not shape.class_token:
            raise UserError(
                f"feature {self.kind} needs a [CLS], which this model (pool={shape.pool}) lacks: "
                "take mean or pooled"
            )
        depth = shape.size.depth
        if self.block is not None and not -depth <= self.block < depth:
            raise UserError(
                f"layer {self.block} of {depth} blocks: it must be from {-depth} to {depth - 1}"
            )


POOLED = Layer()


class NotFinite(UserError):
    """Raised for features that are not finite."""


class Extract:
    """A compiled function from (params, source) to the features of all its readable examples.

    Raises UserError for a source without a readable image, and NotFinite.
    """

    def __init__(self, cfg: ConfigDict, model: Model, mesh: Mesh, layer: Layer = POOLED):
        layer.check(model)
        self.cfg, self.mesh = cfg, mesh
        _, view = views(cfg, are_files(cfg.data))

        def extract(params, batch):
            images = eval_images(batch["image"], cfg.augment, image_size(cfg), view)
            features = model.features(params, images, layer.kind, layer.block)
            return features, batch["label"], batch["mask"]

        # Whole on every device, hence on every host: a batch of features is small.
        self._extract = jax.jit(
            extract,
            in_shardings=(shardings(model.abstract_params, mesh), batch_sharding(mesh)),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
            compiler_options=cpu_options(mesh),
        )

    def __call__(self, params: dict, source: Source) -> Features:
        parts = []
        for part in evaluate_batches(
            self._extract, params, source, self.cfg, self.mesh, "features of"
        ):
            features, labels, mask = map(np.asarray, part)
            parts.append(Features(features[mask], labels[mask]))
        values, labels = map(np.concatenate, zip(*parts, strict=True))
        if not len(labels):
            raise UserError(f"{source.name}: none of its {len(source)} images could be read")
        if broken := int((~np.isfinite(values).all(axis=1)).sum()):
            raise NotFinite(
                f"{source.name}: the features of {broken:,} of {len(labels):,} images are not "
                "finite: the model has diverged, or its dtype overflows"
            )
        return Features(values, labels)
