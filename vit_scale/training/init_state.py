"""How a run begins: what it holds, and where it comes from.

The order is written down once: resumed if there is a checkpoint (`recover`), else initialised, from
`init.source` where that is set (`init_state`). Fine-tuning is nothing but initialisation (law 5).
"""

import jax
import jax.numpy as jnp
import numpy as np

from vit_scale import pretrained
from vit_scale.checkpoint import Checkpoints
from vit_scale.config import image_size
from vit_scale.distributed import multihost
from vit_scale.distributed.sharding import shard
from vit_scale.errors import UserError
from vit_scale.models.spec import Shape
from vit_scale.storage.download import Unreachable
from vit_scale.training import teachers
from vit_scale.training.program import Program, TrainState


def restore(program: Program, checkpoints: Checkpoints, step: int) -> TrainState:
    """The checkpoint of `step`. Raises UserError where it is damaged."""
    return _placed(program, step, checkpoints.restore(step, program.state._asdict()))


def recover(
    program: Program, checkpoints: Checkpoints, order: list[int] | None = None
) -> TrainState | None:
    """The newest checkpoint that is whole, or the first of `order`; None if there is none.

    What is damaged is set aside: see `Checkpoints.recover`.
    """
    found = checkpoints.recover(program.state._asdict(), order)
    return _placed(program, *found) if found else None


def _placed(program: Program, step: int, trees: dict) -> TrainState:
    steps = jax.device_put(np.int32(step), program.state.step.sharding)
    return TrainState(steps, trees["params"], trees["opt_state"], trees.get("ema"))


def read_source(program: Program) -> pretrained.Pretrained:
    """What `init.source` names. Raises UserError, with the way round where it can't be fetched."""
    cfg = program.cfg
    shape = program.model.shape
    heads = shape.size.heads if isinstance(shape, Shape) else None
    try:
        hints = pretrained.hints_from_config(cfg, heads)._replace(target_size=image_size(cfg))
        return pretrained.load_model(cfg.init.source, hints)
    except Unreachable as error:
        if not cfg.init.instead:
            raise
        raise UserError(
            f"{error}; or pretrain it yourself: vit-scale train --config {cfg.init.instead}, then "
            f"--config.init.source=runs/{cfg.init.instead} (empty: from random parameters)"
        ) from error


def check_source(program: Program, classes: tuple[str, ...], ids: tuple[str, ...] = ()) -> None:
    """Raises UserError for an `init.source` that is missing, damaged, or does not fit the model.

    And for a teacher of other classes.

    `ids` are other names of the classes. For before a run's folder is claimed: the corrected
    command then finds it free.
    """
    cfg = program.cfg
    teachers.check_classes(program.teacher, classes)
    if not cfg.init.source:
        return
    given = read_source(program)
    kept = pretrained.match_head(given.classes, classes, cfg.init.head, cfg.init.classes, ids)

    def fit(source, target):
        return pretrained.adapt(source, target, cfg.init.resample, kept is not None)[0]

    jax.eval_shape(fit, given.params, program.state.params)


def init_state(
    program: Program, classes: tuple[str, ...], quiet: bool, ids: tuple[str, ...] = ()
) -> TrainState:
    """The state at step 0: random parameters, what `init.source` gives, then the optimizer's.

    `classes` are the names of the outputs: a source that has the same keeps its head. `ids` are
    other names of them.
    """
    cfg = program.cfg
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    make_params = jax.jit(program.model.init, out_shardings=shardings.params)
    params = make_params(jax.random.key(cfg.seed))
    if cfg.init.source:
        with multihost.shared_errors():
            given = read_source(program)
        kept = pretrained.match_head(given.classes, classes, cfg.init.head, cfg.init.classes, ids)
        params, rows = pretrained.adapt(
            *(given.params, params, cfg.init.resample, kept is not None),
            outputs=kept.outputs if kept else None,
        )
        params = shard(params, shardings.params)
        if not quiet:
            head = [kept.line] if kept and kept.line else []
            about = [*given.notes, *pretrained.mismatched_settings(given.cfg, cfg), *head]
            print(
                "\n".join(
                    [f"initialised from {given.path}", pretrained.adaptation_table(rows), *about]
                )
            )
    make_opt_state = jax.jit(program.optimizer.init, out_shardings=shardings.opt_state)
    ema = jax.tree.map(jnp.copy, params) if cfg.optim.ema else None  # a copy: both are donated
    step = jax.device_put(np.int32(0), shardings.step)
    return TrainState(step, params, make_opt_state(params), ema)


def averaged(state: TrainState) -> dict:
    """The parameters that are the model: their average where the run keeps one."""
    return state.params if state.ema is None else state.ema
