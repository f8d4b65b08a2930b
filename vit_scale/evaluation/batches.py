"""Go through a set once, a batch at a time, on all hosts."""

from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from vit_scale.data import Source, eval_batches
from vit_scale.distributed import multihost, preemption
from vit_scale.distributed.sharding import batch_rows, shard_batch
from vit_scale.runs import watchdog


def evaluate_batches(
    eval_step: Callable, params: dict, source: Source, cfg: ConfigDict, mesh: Mesh, what: str
) -> Iterator[Any]:
    """Yield `eval_step(params, batch)` for each batch of a source, with a progress bar.

    `what` is the bar's verb, such as "evaluate". A requested stop ends it (`preemption.check`).
    """
    rows = batch_rows(cfg.eval.batch, mesh)
    with tqdm(
        total=len(source),
        desc=f"{what} {source.name}",
        unit="image",
        disable=None if multihost.is_first() else True,
        leave=False,
    ) as bar:
        for batch in eval_batches(source, cfg.eval.batch, rows, cfg.data.workers):
            yield eval_step(params, shard_batch(batch, mesh, cfg.eval.batch))
            watchdog.beat()
            preemption.check(f"in {what} {source.name}")
            bar.update(min(cfg.eval.batch, len(source) - bar.n))
