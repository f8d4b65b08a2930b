"""The optimizer of an `optim` block: a chain of optax transformations.

One chain for every optimizer, in this order:

    clip the global norm -> direction (Adam, momentum, Lion, Muon) -> + weight decay * parameter
      (-> * trust ratio: LAMB) -> * layer decay -> * -lr

Transformations select parameters by name ("blocks/mlp/up/kernel"), never by rank, so that stacked
blocks, which have a leading layer axis, train like unrolled ones. Frozen parameters are outside the
chain: they get no update, have no optimizer state, and don't count in the clipped norm.

Weight decay is decoupled from the gradient and times the learning rate (AdamW, Loshchilov & Hutter
2019, as optax and torch write it), for SGD as well, as big_vision does.
"""

import itertools
import math
import re
from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from vit_scale.errors import UserError, nearest
from vit_scale.models.lora import is_adapter
from vit_scale.models.parameters import (
    CONVOLUTIONS,
    MATRICES,
    OBJECTIVE,
    is_statistic,
    map_named,
    name_of,
    named,
)
from vit_scale.training.schedules import (
    COOLDOWNS,
    SCHEDULES,
    Schedule,
    make_schedule,
    make_weight_decay,
    milestone_steps,
)

# Direction


def _adamw(cfg: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_adam(cfg.b1, cfg.b2, mu_dtype=cfg.moment)


def _sgd(cfg: ConfigDict) -> optax.GradientTransformation:
    return optax.trace(cfg.b1, accumulator_dtype=cfg.moment)


def _lion(cfg: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_lion(cfg.b1, cfg.b2, mu_dtype=cfg.moment)


def _matrices(cfg: ConfigDict) -> dict[str, tuple]:
    """Return the patterns of the parameters that Muon trains, and their axes."""
    return MATRICES | (CONVOLUTIONS if cfg.muon_convolutions else {})


def _muon(cfg: ConfigDict) -> optax.GradientTransformation:
    return optax.contrib.muon(
        learning_rate=-1.0,  # only the direction, with the gradient's sign: the chain applies lr
        beta=cfg.b1,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        mu_dtype=cfg.moment,
        # Updates as large as Adam's (Liu et al. 2025), so that both groups share one lr.
        consistent_rms=0.2,
        # Adam, with Nesterov momentum as well, trains the rest: embedding, head, vectors, biases,
        # LoRA's adapters.
        muon_weight_dimension_numbers=lambda params: map_named(
            lambda name, leaf: _matrix_axes(_matrices(cfg), name), params
        ),
    )


def _lamb(cfg: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_adam(cfg.b1, cfg.b2, eps=1e-6, mu_dtype=cfg.moment)


OPTIMIZERS = {
    "adamw": _adamw,  # Loshchilov & Hutter 2019
    "sgd": _sgd,  # heavy-ball momentum, as ViT's fine-tuning
    "lion": _lion,  # Chen et al. 2023
    "muon": _muon,  # Jordan et al. 2024; Adam for what is not a hidden matrix
    "lamb": _lamb,  # You et al. 2020; the trust ratio follows weight decay
}


def _matrix_axes(matrices: dict, name: str) -> optax.contrib.MuonDimensionNumbers | None:
    for pattern, axes in matrices.items():
        if re.search(pattern, name):
            return optax.contrib.MuonDimensionNumbers(*axes)
    return None


# By name

# The names that `optim.train` has for sets of parameters; any other value is a regular expression.
TRAIN = {"all": "", "head": rf"^(head(_dist)?|{OBJECTIVE})/"}


def decayed(name: str) -> bool:
    """Return whether weight decay applies: to kernels and their adapters only.

    So not to bias, norm, position, or token.
    """
    return name.endswith("kernel") or is_adapter(name)


def depth(params: PyTree) -> int:
    """Return the number of blocks, stacked or unrolled."""
    blocks = params["blocks"]
    return len(blocks) if "0" in blocks else jax.tree.leaves(blocks)[0].shape[0]


def _scale_by_trust_ratio() -> optax.GradientTransformation:
    """Scale each decayed parameter's update to its own norm, as apex's FusedLAMB does with decay.

    Also where weight_decay is 0. Unlike optax.scale_by_trust_ratio, a layer of stacked blocks has
    its own ratio. So have query, key and value, which apex sees as one matrix.
    """

    def scale(updates, params):
        def scaled(path: tuple, update, param):
            name = name_of(path)
            if not decayed(name):
                return update
            layers = re.search(r"(^|/)blocks/(?!\d)", name) is not None
            axes = tuple(range(layers, update.ndim))
            size, own = (jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) for x in (update, param))
            return update * jnp.where((size == 0) | (own == 0), 1, own / size)

        return jax.tree_util.tree_map_with_path(scaled, updates, params)

    return optax.stateless(scale)


LAYER_0 = ("stem", "embed", "posemb", "cls", "dist", "registers", "pre_norm")


def layer_multiplier(name: str, leaf, rate: float, blocks: int) -> float | jax.Array:
    """Return `rate` to the power of the number of layers above (BEiT, Bao et al. 2022).

    Embedding, positions, the tokens before the patches and iBOT's for hidden ones are layer 0,
    block i is layer i + 1, and the rest is the last layer, with scale 1. For a stacked leaf (l
    ...): one scale per block, (l 1 ...).
    """
    first, _, rest = name.partition("/")
    if first in LAYER_0 or name == "objective/mask_token":
        return rate ** (blocks + 1)
    if first != "blocks":
        return 1.0
    block = rest.partition("/")[0]
    if block.isdigit():
        return rate ** (blocks - int(block))
    powers = [rate ** (blocks - i) for i in range(blocks)]
    return jnp.asarray(powers, leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))


def _scale_by_layer(rate: float, blocks: int) -> optax.GradientTransformation:
    def scale(updates, params):
        return map_named(
            lambda name, leaf: leaf * layer_multiplier(name, leaf, rate, blocks), updates
        )

    return optax.stateless(scale)


def _hold(pattern: str, steps: int) -> optax.GradientTransformation:
    """Leave the parameters of these names as they are for the first `steps` updates.

    As with a learning rate of 0, which DINOv2's code gives them: their moments are kept.
    """

    def hold(updates, state, params=None):
        begun = state.count >= steps
        updates = map_named(
            lambda name, leaf: jnp.where(begun, leaf, 0) if re.search(pattern, name) else leaf,
            updates,
        )
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32)), hold
    )


def trained(cfg: ConfigDict, params: PyTree) -> PyTree:
    """A tree of bools: True for each parameter that is trained, False for each frozen one.

    Of a model with adapters they are trained, beside what `cfg.train` names: "all" is the head
    then, and kernels that have one are frozen. Running statistics are False: they are updated, but
    by no gradient.
    """
    adapters = {name.rpartition("/")[0] for name in named(params) if is_adapter(name)}
    kernels = {f"{module}/kernel" for module in adapters}
    train = "head" if adapters and cfg.train == "all" else cfg.train
    wanted = TRAIN.get(train, train)

    def is_trained(name: str, leaf) -> bool:
        if is_statistic(name) or any(re.search(pattern, name) for pattern in cfg.freeze):
            return False
        return is_adapter(name) or (name not in kernels and bool(re.search(wanted, name)))

    return map_named(is_trained, params)


# The whole


def make_optimizer(
    cfg: ConfigDict, steps: int, params: PyTree, held: tuple[str, int] | None = None
) -> tuple[optax.GradientTransformation, Schedule]:
    """Build the optimizer of an `optim` block for a run of `steps`.

    The learning rate is `schedule(n)` after n updates, counted in the optimizer's state. The train
    step applies `accumulate` and `ema`.

    Args:
      cfg: the `optim` block.
      steps: updates in the whole run.
      params: the parameters, or their shapes.
      held: a regular expression of the parameters that get no update in the first so many steps.

    Returns:
      (optimizer, schedule); its updates are added by `optax.apply_updates`.
    """
    schedule = make_schedule(cfg, steps)
    decay = optax.add_decayed_weights(
        make_weight_decay(cfg, steps),
        lambda tree: map_named(lambda name, leaf: decayed(name), tree),
    )
    chain = optax.chain(
        optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity(),
        OPTIMIZERS[cfg.name](cfg),
        optax.chain(decay, _scale_by_trust_ratio()) if cfg.name == "lamb" else decay,
        _scale_by_layer(cfg.layer_decay, depth(params))
        if cfg.layer_decay != 1
        else optax.identity(),
        optax.scale_by_learning_rate(schedule),
        *([_hold(*held)] if held else []),
    )
    labels = jax.tree.map(lambda train: "trained" if train else "frozen", trained(cfg, params))
    return optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels), schedule


def update_ema(ema: PyTree, params: PyTree, decay: float) -> PyTree:
    """Return the updated moving average, `decay * ema + (1 - decay) * params`."""
    return jax.tree.map(lambda mean, new: mean + (1 - decay) * (new - mean), ema, params)


# Refusals

CHOICES: dict[str, Collection[str]] = {
    "name": OPTIMIZERS,
    "schedule": SCHEDULES,
    "cooldown_shape": COOLDOWNS,
    "moment": ("float32", "bfloat16"),
}
BOUNDS = {  # lowest allowed, first not allowed
    "lr": (0, math.inf),
    "warmup": (0, math.inf),
    "end": (0, math.inf),
    "timescale": (1, math.inf),
    "cooldown": (0, math.inf),
    "factor": (0, math.inf),
    "b1": (0, 1),
    "b2": (0, 1),
    "weight_decay": (0, math.inf),
    "weight_decay_end": (0, math.inf),
    "clip": (0, math.inf),
    "accumulate": (1, math.inf),
    "ema": (0, 1),
}


def check(cfg: ConfigDict, steps: int) -> None:
    """Raise UserError for an `optim` block with an unknown or impossible value."""
    for field, valid in CHOICES.items():
        if cfg[field] not in valid:
            raise UserError(
                f"optim.{field}={cfg[field]!r} is unknown; {nearest(cfg[field], valid)}"
            )
    for field, (low, high) in BOUNDS.items():
        if cfg[field] is not None and not low <= cfg[field] < high:
            limit = "finite" if high == math.inf else f"below {high}"
            raise UserError(f"optim.{field}={cfg[field]} must be at least {low} and {limit}")
    if cfg.muon_convolutions and cfg.name != "muon":
        raise UserError(f"optim.muon_convolutions=True applies to name=muon, not {cfg.name}")
    if not 0 < cfg.layer_decay <= 1:
        raise UserError(f"optim.layer_decay={cfg.layer_decay} must be above 0 and at most 1")
    if cfg.warmup >= steps:
        raise UserError(f"optim.warmup={cfg.warmup} must be fewer than the run's steps={steps}")
    if cfg.warmup + cfg.cooldown > steps:
        total = cfg.warmup + cfg.cooldown
        raise UserError(
            f"optim.warmup={cfg.warmup} + cooldown={cfg.cooldown} = {total} exceed steps={steps}"
        )
    if cfg.schedule == "piecewise":
        boundaries = [cfg.warmup, *milestone_steps(cfg, steps), steps]
        if any(a >= b for a, b in itertools.pairwise(boundaries)):
            raise UserError(
                f"optim.milestones={cfg.milestones} of steps={steps} are steps {boundaries[1:-1]}: "
                f"they must rise between the end of warm-up, {cfg.warmup}, and {steps}"
            )


def check_trained(cfg: ConfigDict, params: PyTree) -> None:
    """Raise UserError for a pattern in `freeze` or `train` that is invalid or matches nothing.

    And for Muon without a matrix to train; of adapters it is known that Adam trains them.
    """
    names = list(named(params))
    patterns = [("freeze", pattern) for pattern in cfg.freeze]
    patterns += [("train", cfg.train)] if cfg.train not in TRAIN else []
    for field, pattern in patterns:
        try:
            matched = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UserError(
                f"optim.{field}={pattern!r} is not a regular expression: {error}"
            ) from None
        if not matched:
            hint = nearest(pattern, [*(TRAIN if field == "train" else ()), *names])
            raise UserError(f"optim.{field}={pattern!r} matches no parameter; {hint}")
    chosen = [name for name, is_trained in named(trained(cfg, params)).items() if is_trained]
    if not chosen:
        raise UserError(f"optim.freeze={cfg.freeze} and train={cfg.train!r} leave nothing to train")
    orthogonal = any(is_adapter(n) or _matrix_axes(_matrices(cfg), n) for n in chosen)
    if cfg.name == "muon" and not orthogonal:
        raise UserError(
            f"optim.name=muon has no matrix of the blocks to train with optim.train={cfg.train!r}: "
            "set optim.name=adamw"
        )
