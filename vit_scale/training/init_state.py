"""Make the train state that training starts from: restored, or initialised.

A run resumes from its newest intact checkpoint (`recover`); without one it is initialised
(`init_state`), from `init.source` where that is set. Fine-tuning is nothing but initialisation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vit_scale import config, pretrained
from vit_scale.checkpoint import Checkpoints
from vit_scale.config import image_size
from vit_scale.data.class_mapping import Match
from vit_scale.distributed import multihost
from vit_scale.distributed.mesh import cpu_options
from vit_scale.distributed.sharding import shard
from vit_scale.errors import UserError
from vit_scale.models.lora import is_adapter
from vit_scale.models.parameters import count, is_statistic, named, of_model, select, unite
from vit_scale.models.spec import Shape
from vit_scale.storage.download import Unreachable
from vit_scale.training.optimizer import trained
from vit_scale.training.setup import Setup, init_params
from vit_scale.training.train_state import TrainState


def restore(setup: Setup, checkpoints: Checkpoints, step: int) -> TrainState:
    """Restore the checkpoint of `step`. Raises UserError where it is damaged."""
    return _train_state(setup, step, checkpoints.restore(step, setup.state._asdict()))


def recover(
    setup: Setup, checkpoints: Checkpoints, order: list[int] | None = None
) -> TrainState | None:
    """Restore the newest intact checkpoint, or the first intact one of the steps `order`.

    Returns None if there is none. Damaged checkpoints are moved aside (`Checkpoints.recover`).
    """
    restored = checkpoints.recover(setup.state._asdict(), order)
    return _train_state(setup, *restored) if restored else None


def store_frozen(
    setup: Setup, checkpoints: Checkpoints, state: TrainState, description: dict
) -> None:
    """Store the frozen parameters once for all checkpoints, where `checkpoint.frozen` says so."""
    cfg = setup.cfg
    if cfg.checkpoint.frozen == "each" or (cfg.checkpoint.frozen == "auto" and not cfg.lora.rank):
        return
    is_trained = named(trained(cfg.optim, state.params))
    frozen = select(state.params, lambda name: not is_trained[name] and not is_statistic(name))
    if frozen:
        checkpoints.store_base(frozen, description, new=int(state.step) == 0)


def _train_state(setup: Setup, step: int, trees: dict) -> TrainState:
    finished = jax.device_put(np.int32(step), setup.state.step.sharding)
    return TrainState(step=finished, **{"ema": None, **trees})


def read_source(setup: Setup) -> pretrained.Pretrained:
    """Read the weights that `init.source` names. Raises UserError.

    Where they can't be downloaded, the error says how to pretrain a replacement.
    """
    cfg = setup.cfg
    shape = setup.model.shape
    heads = shape.size.heads if isinstance(shape, Shape) else None
    try:
        hints = pretrained.hints_from_config(cfg, heads)._replace(target_size=image_size(cfg))
        return pretrained.load_model(cfg.init.source, hints)
    except Unreachable as error:
        if not cfg.init.instead:
            raise
        raise UserError(
            f"{error}; or pretrain it yourself: vit-scale train --config {cfg.init.instead}, then "
            f"--config.init.source=runs/{config.title(cfg.init.instead)} "
            "(empty: from random parameters)",
            error.code,
        ) from error


def check_source(setup: Setup, classes: tuple[str, ...], ids: tuple[str, ...] = ()) -> None:
    """Raise UserError for an `init.source` that is missing, damaged, or doesn't fit the model.

    `classes` are the names of the model's outputs, `ids` other names of them. Called before a run's
    folder is created, so that the corrected command can use the same folder.
    """
    cfg = setup.cfg
    if not cfg.init.source:
        return
    source = read_source(setup)
    match = _match_head(setup, source, classes, ids)

    def adapt(params, target):
        return pretrained.adapt(params, target, cfg.init.resample, match is not None)[0]

    jax.eval_shape(adapt, source.params, _base(setup.state.params))


def _match_head(
    setup: Setup, source: pretrained.Pretrained, classes: tuple[str, ...], ids: tuple[str, ...]
) -> Match | None:
    """Say how the source's outputs map to the model's, of which there are none without a head."""
    cfg = setup.cfg
    outputs = classes if cfg.model.classes else ()
    return pretrained.match_head(source.classes, outputs, cfg.init.head, cfg.init.classes, ids)


def _base(params: dict) -> dict:
    """Return the parameters without those of adapters and objectives, which no source has."""
    return select(of_model(params), lambda name: not is_adapter(name))


def _trained_line(setup: Setup, params: dict) -> str:
    """Say how many parameters are trained; "" where all are."""
    is_trained = named(trained(setup.cfg.optim, params))
    some, total = count(select(params, lambda name: is_trained[name])), count(params)
    return f"training {some:,} of {total:,} parameters" if some < total else ""


def init_state(
    setup: Setup, classes: tuple[str, ...], quiet: bool, ids: tuple[str, ...] = ()
) -> TrainState:
    """Make the state at step 0: random parameters, then those of `init.source`, then the optimizer.

    `classes` are the names of the model's outputs, `ids` other names of them: a source with the
    same classes keeps its head.
    """
    cfg = setup.cfg
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    options = cpu_options(setup.mesh)
    init = functools.partial(init_params, setup.model, setup.objective)
    make_params = jax.jit(init, out_shardings=shardings.params, compiler_options=options)
    params = make_params(jax.random.key(cfg.seed))
    if cfg.init.source:
        with multihost.shared_errors():
            source = read_source(setup)
        match = _match_head(setup, source, classes, ids)
        base, rows = pretrained.adapt(
            *(source.params, _base(params), cfg.init.resample, match is not None),
            outputs=match.outputs if match else None,
        )
        params = shard(unite(params, base), shardings.params)
        if not quiet:
            head = [match.line] if match and match.line else []
            notes = [*source.notes, *pretrained.mismatched_settings(source.cfg, cfg), *head]
            print(
                "\n".join(
                    [f"initialised from {source.path}", pretrained.adaptation_table(rows), *notes]
                )
            )
    if not quiet and (line := _trained_line(setup, params)):
        print(line)
    make_opt_state = jax.jit(setup.optimizer.init, out_shardings=shardings.opt_state)
    # A copy, because both are donated.
    ema = None if setup.state.ema is None else jax.tree.map(jnp.copy, params)
    step = jax.device_put(np.int32(0), shardings.step)
    own = shard(setup.objective.state, shardings.objective)
    return TrainState(step, params, make_opt_state(params), ema, own)
