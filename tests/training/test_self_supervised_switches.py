"""Every option of self-supervision has an effect on what is computed, or is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.objectives import SELF_SUPERVISED
from tests.helpers.tiny import tiny_config, tiny_model
from vit_scale import config
from vit_scale.errors import UserError
from vit_scale.models.parameters import OBJECTIVE
from vit_scale.training.objectives import Context, check, make_objective

SMALL = ("model.depth=1", "data.batch=4", "eval.batch=4", "steps=8")
IBOT = ("dino.ibot=1.0",)
SINKHORN = ("dino.centring=sinkhorn",)
SWITCHES = {  # field: (objective, value, what has to be on)
    "views.globals": ("lejepa", "3"),
    "views.locals": ("lejepa", "3"),
    "views.local_resolution": ("lejepa", "12"),
    "views.local_scale": ("lejepa", "(.1,.2)"),
    "views.blur": ("lejepa", "(.5,.5,.5)"),
    "views.solarize": ("lejepa", "(.5,.5,.5)"),
    "mae.mask": ("mae", ".5"),
    "mae.width": ("mae", "12"),
    "mae.depth": ("mae", "2"),
    "mae.heads": ("mae", "4"),
    "mae.mlp": ("mae", "12"),
    "mae.normalise": ("mae", "False"),
    "dino.prototypes": ("dinov2", "20"),
    "dino.hidden": ("dinov2", "12"),
    "dino.bottleneck": ("dinov2", "12"),
    "dino.layers": ("dinov2", "2"),
    "dino.student_temperature": ("dinov2", ".2"),
    "dino.teacher_temperature": ("dinov2", ".07"),
    "dino.teacher_temperature_start": ("dinov2", ".02", "dino.teacher_warmup=3"),
    "dino.teacher_warmup": ("dinov2", "3", "dino.teacher_temperature=.07"),
    "dino.momentum": ("dinov2", ".5"),
    "dino.momentum_end": ("dinov2", ".95"),
    "dino.centring": ("dinov2", "mean"),
    "dino.centre_momentum": ("ibot", ".5"),
    "dino.freeze_prototypes": ("ibot", "2"),
    "dino.ibot": ("ibot", "0"),
    "dino.ibot_head": ("ibot", "own"),
    "dino.mask": ("dinov2", "(.3,.4)"),
    "dino.mask_share": ("dinov2", ".3"),
    "dino.koleo": ("ibot", ".2"),
    "lejepa.weight": ("lejepa", ".1"),
    "lejepa.slices": ("lejepa", "12"),
    "lejepa.hidden": ("lejepa", "12"),
    "lejepa.width": ("lejepa", "12"),
    "lejepa.layers": ("lejepa", "2"),
}


def compute(name: str, *overrides: str) -> str:
    """What an objective computes, as traced: examples, targets, losses, and its schedules."""
    fields = (*SELF_SUPERVISED[name], *SMALL, *overrides)
    cfg = tiny_config(*fields)
    check(cfg)
    model = tiny_model(*(item for item in fields if item.startswith("model.")))
    objective = make_objective(model, cfg)
    batch = {
        "image": jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((4,), jnp.bool_),
    }

    def program(batch, key):
        params = {**model.init(key), OBJECTIVE: objective.init(key)}
        examples, state = objective.prepare(batch, key), None
        if objective.teach:
            state = jax.tree.map(jnp.asarray, objective.state)
            examples, state = objective.teach(examples, Context(jnp.int32(1), params, state))
        value, outputs = objective.loss(params, examples, key)
        if objective.coupled:
            mask = examples["mask"]
            value += objective.coupled(params, outputs["embeddings"], mask, key)[0]
        return value, state

    traced = jax.make_jaxpr(program)(batch, jax.random.key(0))
    decay = objective.decay and [float(objective.decay(step)) for step in (0, 4, 8)]
    constants = [np.asarray(constant).tobytes() for constant in traced.consts]
    text = re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr))
    return f"{text} {constants} {decay} {objective.held}"


def test_every_field_of_self_supervision_is_a_switch():
    blocks = ("views.", "mae.", "dino.", "lejepa.")
    assert SWITCHES.keys() == {
        name for name in config.fields(config.base()) if name.startswith(blocks)
    }


@pytest.fixture(scope="module")
def computed():
    return functools.cache(compute)


@pytest.mark.parametrize("field", SWITCHES)
def test_a_switch_changes_what_is_computed(field, computed):
    name, value, *on = SWITCHES[field]
    assert computed(name, *on) != computed(name, *on, f"{field}={value}")


def test_what_does_not_reach_the_objective_leaves_it_alone(computed):
    """The comparison above is not one that always finds a difference."""
    assert computed("mae") == computed("mae", "log.every=7", "optim.lr=.5")


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("mae", "model.classes=4", "objective=mae learns no classes: set model.classes=0, not 4"),
        ("mae", "augment.mixup=.5", "augment.mixup=0.5 mixes labels: with objective=mae leave it"),
        ("mae", "mae.mask=.99", "mae.mask=0.99 leaves 0 of 16 patches visible"),
        ("mae", "mae.mask=nan", "mae.mask=nan leaves 0 of 16 patches visible"),
        ("mae", "mae.mlp=-3", "mae.mlp=-3 must be at least 1"),
        ("mae", "model.pool=map", "objective=mae trains no attention pooling"),
        ("mae", "mae.width=9", "mae.width=9 must be divisible by mae.heads=2 and by 4"),
        ("mae", "model.patch_drop=.5", "model.patch_drop=0.5 hides patches beside mae.mask"),
        ("mae", "model.variant=R+Ti/4", "has convolutions before them, which see all"),
        ("mae", "views.locals=3", "views.locals=3 is read by objective=dino and lejepa, not mae"),
        ("mae", "dino.ibot=1", "dino.ibot=1.0 is read by objective=dino, not mae: remove it"),
        ("mae", "model.nearest_grid=True", "resizes images whose pixels are to be predicted"),
        ("lejepa", "augment.blur=.5", "is set for each kind of crop by views.blur"),
        ("ibot", "model.patch_drop=.5", "leaves out patches that dino.ibot=1.0 compares"),
        ("ibot", "dino.mask_share=0", "with dino.mask_share=0 hides no patches"),
        ("ibot", "dino.teacher_warmup=10", "at least 0 and fewer than steps=10"),
        ("mae", "eval.final=test", "set eval.probe=knn, or both to ''"),
        ("ibot", "augment.crop=pad", "augment.crop=pad makes one crop of an image"),
        ("ibot", "views.globals=0", "at least one global crop, and two crops in all"),
        ("ibot", "views.local_resolution=6", "must be a multiple of the patch size 4, at least 8"),
        ("ibot", "views.blur=(1.,)", "three probabilities"),
        ("ibot", "dino.centring=mena", "dino.centring='mena' is unknown; did you mean mean"),
        ("ibot", "dino.student_temperature=0", "dino.student_temperature=0.0 must be above 0"),
        ("ibot", "dino.momentum=1.5", "dino.momentum=1.5 must be from 0 to 1"),
        ("ibot", "dino.mask=(.5,.1)", "two fractions, 0 < low <= high < 1"),
        ("ibot", "model.pool=cls_gap", "needs pooled vectors as wide as tokens, 16"),
        ("ibot", "optim.ema=.9", "optim.ema=0.9 is an average beside the teacher"),
        ("lejepa", "lejepa.weight=1", "lejepa.weight=1.0 must be between 0 and 1"),
        ("lejepa", "lejepa.slices=0", "lejepa.slices=0 must be at least 1"),
        ("lejepa", "model.variant=C+Ti/4", "needs a ViT without batch normalisation, not C+Ti/4"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(name, override, message):
    with pytest.raises(UserError) as caught:
        check(tiny_config(*SELF_SUPERVISED[name], override))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_ibot_compares_patches_after_the_final_norm():
    fields = ("model.pool=gap", "model.class_token=true", "model.fc_norm=true")
    with pytest.raises(UserError, match=r"which model\.fc_norm=True puts behind the pooling"):
        check(tiny_config(*SELF_SUPERVISED["ibot"], *fields))
