"""Self-distillation: DINO, with the switches that make it iBOT or DINOv2.

A student learns to predict, from one crop of an image, what a teacher makes of another. The teacher
is the average of the student's parameters. DINO: Caron et al. 2021 (arXiv 2104.14294); iBOT, which
adds hidden patches: Zhou et al. 2022 (arXiv 2111.07832); DINOv2, which adds Sinkhorn-Knopp centring
and KoLeo: Oquab et al. 2023 (arXiv 2304.07193).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from ml_collections import ConfigDict

from vit_scale.augment.multi_crop import multi_crop
from vit_scale.augment.patch_masks import draw_blocks, draw_counts
from vit_scale.config import image_size
from vit_scale.models.build import Model, Part, part
from vit_scale.models.flops import count_macs
from vit_scale.models.parameters import OBJECTIVE, of_model
from vit_scale.models.projection_heads import PrototypeHead
from vit_scale.training.objectives import self_distillation_losses as losses
from vit_scale.training.objectives.crop_encoder import (
    CropEncoder,
    count_crop_macs,
    encode_crops,
    make_crop_encoder,
    plain_model,
)
from vit_scale.training.objectives.objective import Context, Objective, example_weights
from vit_scale.training.schedules import cosine

HIDING = 0x68696465  # folded into the step's key


class Networks(NamedTuple):
    """What student and teacher are made of: functions of their parameters."""

    encoder: CropEncoder
    head: Part


def self_distillation(model: Model, cfg: ConfigDict, teacher: Callable | None = None) -> Objective:
    """Learn to agree with an averaged teacher on crops of an image, as `cfg.dino` says.

    The loss is the mean cross-entropy over pairs of different crops, of which the teacher's is a
    global one; plus `ibot` times that of hidden patches, plus `koleo` times KoLeo of the pooled
    vectors of each global crop.
    """
    d, networks = cfg.dino, make_networks(model, cfg)
    g, grid = cfg.views.globals, model.shape.grid
    most = _most_hidden(cfg, grid)

    def prepare(batch, key):
        crops = multi_crop(batch, key, cfg, image_size(cfg))
        weight = example_weights(batch["mask"])
        examples = {**crops, "mask": batch["mask"], "weight": weight}
        if d.ibot:
            hidden = draw_masks(jax.random.fold_in(key, HIDING), len(weight), cfg, grid)
            examples |= _hidden_patches(hidden, most)
        return examples

    def teach(examples, context: Context):
        return _teach(networks, cfg, examples, context)

    def loss(params, examples, key):
        return _student_loss(networks, cfg, params, examples, key)

    def coupled(params, embeddings, mask, key):
        value = sum(losses.koleo(embeddings[:, i], mask) for i in range(g))
        return d.koleo * value, {"koleo": value}

    def init(key):
        head_key, patch_key = jax.random.split(key)
        own = {"head": networks.head.init(head_key)}
        if d.ibot:
            own |= {"mask_token": jnp.zeros(model.shape.size.width)}
            if d.ibot_head == "own":
                own |= {"patch_head": networks.head.init(patch_key)}
        return own

    return Objective(
        prepare,
        loss,
        teach,
        coupled if d.koleo else None,
        init,
        state=_new_state(cfg),
        decay=cosine(d.momentum, d.momentum_end, cfg.steps),
        held=(f"^{OBJECTIVE}/(patch_)?head/prototypes/", d.freeze_prototypes)
        if d.freeze_prototypes
        else None,
        count_flops=functools.partial(_count_flops, cfg),
    )


def make_networks(model: Model, cfg: ConfigDict) -> Networks:
    """Build the head, and the model for local crops, of a config."""
    d, width = cfg.dino, model.shape.pooled
    sizes = (width, d.hidden, d.bottleneck, d.prototypes, d.layers, cfg.model.dtype)
    head = part(lambda rngs: PrototypeHead(*sizes, rngs))
    return Networks(make_crop_encoder(model, cfg), head)


def draw_masks(
    key: PRNGKeyArray, b: int, cfg: ConfigDict, grid: tuple[int, int]
) -> Bool[Array, "b v p"]:
    """Draw the hidden patches of each global crop."""
    d, v = cfg.dino, cfg.views.globals
    count_key, block_key = jax.random.split(key)
    counts = draw_counts(count_key, b * v, grid[0] * grid[1], d.mask_share, tuple(d.mask))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(block_key, jnp.arange(b * v))
    masks = jax.vmap(functools.partial(draw_blocks, grid=grid))(keys, count=counts)
    return masks.reshape(b, v, -1)


def _most_hidden(cfg: ConfigDict, grid: tuple[int, int]) -> int:
    """Return how many patches of a global crop are hidden at most."""
    return int(grid[0] * grid[1] * cfg.dino.mask[1]) if cfg.dino.ibot else 0


def _hidden_patches(hidden: Bool[Array, "b v p"], most: int) -> dict[str, Array]:
    """Return the mask, and the numbers of at most `most` hidden patches with their weights.

    The weights of an image's hidden patches sum to 1; those of other patches, which fill up, are 0.
    """
    order = jnp.argsort(~hidden, axis=-1, stable=True)[..., :most]
    chosen = jnp.take_along_axis(hidden, order, axis=-1)
    count = jnp.maximum(hidden.sum(-1, keepdims=True), 1)
    return {"hidden": hidden, "patches": order, "patch_weight": chosen / count}


def _new_state(cfg: ConfigDict) -> dict[str, np.ndarray] | None:
    """Return the centres before the first step; None where Sinkhorn-Knopp needs none."""
    if cfg.dino.centring == "sinkhorn":
        return None
    names = ("centre", "patch_centre") if cfg.dino.ibot else ("centre",)
    return {name: np.zeros(cfg.dino.prototypes, np.float32) for name in names}


def teacher_temperature(cfg: ConfigDict, step: Array) -> Float[Array, ""]:
    """Return the temperature of the teacher's logits: linear over the warm-up, then constant."""
    d = cfg.dino
    share = jnp.clip(step / max(d.teacher_warmup, 1), 0, 1)
    first = d.teacher_temperature_start if d.teacher_warmup else d.teacher_temperature
    return first + share * (d.teacher_temperature - first)


def _teach(
    networks: Networks, cfg: ConfigDict, examples: dict, context: Context
) -> tuple[dict, dict | None]:
    """Add the teacher's probabilities to the examples; return them and the new centres."""
    d, params, state = cfg.dino, context.teacher, context.state
    own, temperature = params[OBJECTIVE], teacher_temperature(cfg, context.step)
    crops, counted = examples["global"], examples["mask"][:, None]
    encoded = encode_crops(networks.encoder.model, of_model(params), crops, None, None, d.ibot > 0)
    pooled, patches = encoded

    def targets(logits, weight, name):
        if state is None:
            return losses.sinkhorn(logits, weight, temperature), None
        new = losses.update_centre(state[name], logits, weight, d.centre_momentum)
        return losses.centred(logits, state[name], temperature), new

    logits = networks.head.apply(own["head"], pooled)
    weight = jnp.broadcast_to(counted, logits.shape[:2]).astype(jnp.float32)
    result, centre = targets(logits, weight, "centre")
    new: dict[str, Any] = {"centre": centre}
    examples = {**examples, "target": result}
    if d.ibot:
        chosen = jnp.take_along_axis(patches, examples["patches"][..., None], axis=2)
        logits = networks.head.apply(own.get("patch_head", own["head"]), chosen)
        hidden = counted[..., None] & (examples["patch_weight"] > 0)
        result, new["patch_centre"] = targets(logits, hidden.astype(jnp.float32), "patch_centre")
        examples["patch_target"] = result
    return examples, None if state is None else new


def _student_loss(
    networks: Networks, cfg: ConfigDict, params: dict, examples: dict, key: PRNGKeyArray
) -> tuple[Array, dict]:
    """Return the student's loss and its outputs, as `Objective.loss`."""
    d, own = cfg.dino, params[OBJECTIVE]
    hidden = (examples["hidden"], own["mask_token"]) if d.ibot else None
    crops, model = examples["global"], networks.encoder.model
    pooled, patches = encode_crops(model, of_model(params), crops, key, hidden, d.ibot > 0)
    vectors = [pooled, *networks.encoder.local(params, examples, key)]
    logits = networks.head.apply(own["head"], jnp.concatenate(vectors, axis=1))
    total = per_crop = losses.across_views(examples["target"], logits, d.student_temperature)
    measures = {"dino": per_crop}
    if d.ibot:
        chosen = jnp.take_along_axis(patches, examples["patches"][..., None], axis=2)
        logits = networks.head.apply(own.get("patch_head", own["head"]), chosen)
        per_patch = jax.vmap(losses.of_patches, (1, 1, 1, None), 1)(
            *(examples["patch_target"], logits, examples["patch_weight"], d.student_temperature)
        ).mean(1)
        total, measures["ibot"] = per_crop + d.ibot * per_patch, per_patch
    outputs = {"loss": total, "mask": examples["mask"], "statistics": {}, "measures": measures}
    if d.koleo:
        outputs["embeddings"] = pooled
    return (total * examples["weight"]).sum(), outputs


def _count_flops(cfg: ConfigDict) -> int:
    """Return the FLOPs of training on one image: the student's, thrice, and the teacher's."""
    model, plain = plain_model(cfg)
    networks = make_networks(model, plain)
    large, small = count_crop_macs(networks.encoder, plain)
    head_params = jax.eval_shape(networks.head.init, jax.random.key(0))
    vector = jax.ShapeDtypeStruct((1, model.shape.pooled), jnp.float32)
    head, v = count_macs(networks.head.apply, head_params, vector), cfg.views
    patches = _most_hidden(cfg, model.shape.grid)
    large += v.globals * (1 + patches) * head
    return 6 * (large + small + v.locals * head) + 2 * large
