"""Exact evaluation: every example counts once, for every batch size and number of hosts."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from vit_scale.augment.pipeline import eval_images
from vit_scale.config import image_size
from vit_scale.data import Source, are_files, eval_batches, views
from vit_scale.distributed import multihost, preemption
from vit_scale.distributed.mesh import cpu_options
from vit_scale.distributed.sharding import batch_rows, batch_sharding, shard_batch, shardings
from vit_scale.errors import UserError
from vit_scale.models.build import Model
from vit_scale.runs import watchdog
from vit_scale.tracking.metrics import EvalMetrics, to_floats
from vit_scale.training.validation import check_classes


class Evaluate:
    """Evaluate a model: (params, source) -> {"n": ..., "accuracy": ..., "loss": ...}.

    Raises UserError for a source with another number of classes than the model, and for one without
    a readable image.
    """

    def __init__(self, cfg: ConfigDict, model: Model, mesh: Mesh):
        self.cfg, self.mesh = cfg, mesh
        _, seen = views(cfg, are_files(cfg.data))

        def eval_step(params, batch):
            images = eval_images(batch["image"], cfg.augment, image_size(cfg), seen)
            logits = model.apply(params, images)
            labels = batch["label"] if "target" not in batch else right(logits, batch["target"])
            return EvalMetrics.single_from_model_output(
                logits=logits, labels=labels, mask=batch["mask"]
            )

        self._eval_step = jax.jit(
            eval_step,
            in_shardings=(shardings(model.abstract_params, mesh), batch_sharding(mesh)),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
            compiler_options=cpu_options(mesh),
        )

    def __call__(self, params: dict, source: Source) -> dict[str, float]:
        cfg, total = self.cfg, EvalMetrics.empty()
        check_classes(source, cfg)
        rows = batch_rows(cfg.eval.batch, self.mesh)
        batches = eval_batches(source, cfg.eval.batch, rows, cfg.data.workers)
        with tqdm(
            total=len(source),
            desc=f"evaluate {source.name}",
            unit="image",
            disable=None if multihost.is_first() else True,
            leave=False,
        ) as bar:
            for batch in batches:
                total = total.merge(
                    self._eval_step(params, shard_batch(batch, self.mesh, cfg.eval.batch))
                )
                jax.block_until_ready(total)  # else all batches would wait on the device
                watchdog.beat()
                preemption.check(f"while evaluating {source.name}")
                bar.update(min(cfg.eval.batch, len(source) - bar.n))
        result = to_floats(total)
        if not result["n"]:
            raise UserError(f"{source.name}: none of its {len(source)} images could be read")
        return result


def right(logits: Float[Array, "b c"], target: Float[Array, "b c"]) -> Int[Array, "b"]:
    """Return the prediction where `target` marks it as right, else a class that it marks."""
    prediction = logits.argmax(-1)
    hit = jnp.take_along_axis(target, prediction[:, None], axis=1)[:, 0] > 0
    return jnp.where(hit, prediction, target.argmax(-1))
