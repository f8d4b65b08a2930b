"""Every option has an effect: each field of a config changes what the train step computes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from vit_scale import config
from vit_scale.data import open_split
from vit_scale.errors import UserError
from vit_scale.models.parameters import named
from vit_scale.training import validation
from vit_scale.training.setup import make_setup
from vit_scale.training.train_step import jit_train_step

SMALL = (
    "model.variant=Ti/4",
    "model.width=8",
    "model.depth=2",
    "model.heads=2",
    "model.mlp=8",
    "model.classes=3",
    "data.batch=4",
    "eval.batch=4",
    "data.resolution=8",
    "steps=8",
)


def compute(*overrides: str, stored: int = 8) -> tuple[str, list[np.ndarray]]:
    """The training step as traced: its jaxpr, without what no part of the new state depends on."""
    program = make_setup(config.override(config.base(), [*SMALL, *overrides]))
    b = program.cfg.data.batch
    batch = {
        "image": jax.ShapeDtypeStruct((b, stored, stored, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((b,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((b,), jnp.bool_),
    }
    if program.cfg.data.target != "class":
        batch["target"] = jax.ShapeDtypeStruct((b, program.cfg.model.classes), jnp.float32)
    (step,) = jax.make_jaxpr(jit_train_step(program))(program.state, batch).jaxpr.eqns
    traced, leaves = step.params["jaxpr"], len(jax.tree.leaves(program.state))
    used = [i < leaves for i in range(len(traced.jaxpr.outvars))]
    live, _ = partial_eval.dce_jaxpr(traced.jaxpr, used)
    return re.sub(r"0x[0-9a-f]+", "", str(live)), [np.asarray(c) for c in traced.consts]


def differ(left, right) -> bool:
    return left[0] != right[0] or any(
        not np.array_equal(a, b) for a, b in zip(left[1], right[1], strict=False)
    )


NUMBERS = ("objective=regression", "loss=huber", "data.target=value")
# field: what it is switched to, and what has to be on for it to mean anything
SWITCHES = {
    "seed": ("1",),
    "steps": ("9",),
    "loss": ("sigmoid",),
    "focal.gamma": ("1.", "loss=focal"),
    "focal.alpha": (".3", "loss=focal"),
    "class_weights.weights": ("(1.,2.,3.)", "class_weights.kind=balanced"),
    "regression.mean": ("(9.,1.,1.)", *NUMBERS),
    "regression.std": ("(9.,1.,1.)", *NUMBERS),
    "regression.delta": (".5", *NUMBERS),
    "data.batch": ("8",),
    "data.resolution": ("16",),
    "data.width": ("16",),
    "augment.crop": ("pad",),
    "augment.pad": ("2", "augment.crop=pad"),
    "augment.scale": ("(.5,1.)", "augment.crop=resized"),
    "augment.ratio": ("(.5,2.)", "augment.crop=resized"),
    "augment.flip": ("true",),
    "augment.policy": ("autoaugment-cifar10",),
    "augment.jitter": ("(.4,.4,.4,.0)",),
    "augment.jitter_chance": (".1", "augment.jitter=(.4,.4,.4,.0)"),
    "augment.grey": ("1.",),
    "augment.blur": ("1.",),
    "augment.solarize": ("1.",),
    "augment.mixup": (".3",),
    "augment.cutmix": (".3",),
    "augment.cutmix_share": (".3", "augment.mixup=.3", "augment.cutmix=.4"),
    "augment.mix": ("pair", "augment.mixup=.3"),
    "augment.erase": (".3",),
    "augment.erase_area": ("(.1,.2)", "augment.erase=.3"),
    "augment.erase_mode": ("rand", "augment.erase=.3"),
    "augment.until": (".5", "augment.mixup=.3"),
    "augment.smoothing": (".1",),
    "augment.mean": ("(.4,.5,.5)",),
    "augment.std": ("(.4,.5,.5)",),
    "model.variant": ("Ti/2",),
    "model.width": ("16",),
    "model.depth": ("3",),
    "model.heads": ("4",),
    "model.mlp": ("16",),
    "model.classes": ("4",),
    "model.pool": ("gap",),
    "model.class_token": ("True", "model.pool=gap"),
    "model.fc_norm": ("True", "model.pool=gap"),
    "model.distilled": ("true",),
    "model.posemb": ("sincos2d",),
    "model.rope": ("axial",),
    "model.rope_temperature": ("10", "model.rope=axial", "model.heads=1"),
    "model.rope_offset": ("1", "model.rope=axial"),
    "model.rope_reference": ("16", "model.rope=axial"),
    "model.rope_shift": (".5", "model.rope=dinov3"),
    "model.rope_jitter": ("2", "model.rope=dinov3"),
    "model.rope_rescale": ("2", "model.rope=dinov3"),
    "model.patch_drop": (".5",),
    "model.final_norm": ("false",),
    "model.attention_norm": ("true",),
    "model.mlp_norm": ("true",),
    "model.pool_heads": ("1", "model.pool=map"),
    "model.pool_mlp": ("12", "model.pool=map"),
    "model.dropout": (".1",),
    "model.drop_path": (".1",),
    "model.drop_path_uniform": ("true", "model.drop_path=.1"),
    "model.layer_scale": (".1",),
    "model.registers": ("2",),
    "model.swiglu": ("true",),
    "model.norm": ("rmsnorm",),
    "model.pre_norm": ("true",),
    "model.qk_norm": ("layernorm",),
    "model.qkv_bias": ("false",),
    "model.proj_bias": ("false",),
    "model.patch_bias": ("false",),
    "model.dtype": ("bfloat16",),
    "model.scan": ("false",),
    "model.remat": ("full",),
    "model.logits": ("bfloat16",),
    "model.gelu": ("tanh",),
    "model.norm_epsilon": ("1e-3",),
    "model.stem_epsilon": ("timm", "model.variant=R+Ti/4"),
    "model.representation": ("12",),
    "optim.name": ("sgd",),
    "optim.lr": (".5",),
    "optim.schedule": ("constant",),
    "optim.warmup": ("2",),
    "optim.end": (".1",),
    "optim.timescale": ("3", "optim.schedule=rsqrt"),
    "optim.cooldown": ("3",),
    "optim.cooldown_shape": ("sqrt", "optim.cooldown=3"),
    "optim.milestones": ("(.3,.6)", "optim.schedule=piecewise"),
    "optim.factor": (".5", "optim.schedule=piecewise"),
    "optim.b1": (".8",),
    "optim.b2": (".9",),
    "optim.muon_convolutions": ("true", "optim.name=muon", "model.variant=C+Ti/4"),
    "optim.moment": ("bfloat16",),
    "optim.weight_decay": (".1",),
    "optim.weight_decay_end": (".4",),
    "optim.clip": ("0.",),
    "optim.accumulate": ("2",),
    "optim.ema": (".9",),
    "optim.layer_decay": (".7",),
    "optim.train": ("head",),
    "optim.freeze": ("('embed',)",),
    "lora.rank": ("2",),
    "lora.alpha": ("2.", "lora.rank=2"),
    "lora.kernels": ("mlp/up/kernel$", "lora.rank=2"),
}
# `objective` and `distill` are test_distill.py's. The others decide which pixels the step gets,
# where it starts, or what is done beside it.
OTHERS = (
    *("class_weights.kind", "class_weights.beta"),  # tests/training/test_label_losses.py
    *("model.nearest_grid",),  # tests/models/test_rotary.py
    *("model.attention",),  # test_cudnn_is_another_attention_and_refused_off_a_gpu
    *("model.head_bias",),  # of the initial state: tests/models/test_vit.py
    *("augment.resample",),  # of image files before the step: tests/augment/test_random_crop.py
    *("stages", "objective", "distill.", "data.", "mesh.", "init.", "eval.", "log.", "checkpoint."),
    *("views.", "mae.", "dino.", "lejepa."),  # training/test_self_supervised_switches.py
    *("divergence.", "watchdog."),  # test_guard.py, test_watchdog.py
)
MORE = [  # further values of a switch that is in the table
    ("model.pool=map", "model.pool=gap"),
    ("model.pool=cls_gap", "model.pool=gap"),
    ("model.posemb=none", "model.posemb=sincos2d"),
    ("model.gelu=quick", "model.gelu=tanh"),
    ("model.rope=dinov3", "model.rope=axial"),
    ("model.rope=mixed", "model.rope=axial"),
    ("model.qk_norm=rmsnorm", "model.qk_norm=layernorm"),
    ("model.remat=dots_saveable", "model.remat=full"),
    ("augment.crop=resized", "augment.crop=pad"),
    ("optim.name=lion", "optim.name=sgd"),
    ("optim.name=muon", "optim.name=adamw"),
    ("optim.name=lamb", "optim.name=adamw"),
    ("loss=binary", "loss=sigmoid"),
    ("loss=focal", "loss=sigmoid"),
    ("optim.schedule=linear", "optim.schedule=constant"),
    ("optim.train=bias$", "optim.train=head"),
    ("optim.train=bias$|^head/", "optim.train=bias$"),
]


def test_every_field_is_a_switch_or_does_not_reach_the_step():
    others = {name for name in config.fields(config.base()) if name.startswith(OTHERS)}
    assert SWITCHES.keys() | others == config.fields(config.base()).keys()


@pytest.fixture(scope="module")
def computed():
    """`compute`, each set of overrides once."""
    return functools.cache(compute)


@pytest.mark.parametrize("field", SWITCHES)
def test_a_switch_changes_what_the_step_computes(field, computed):
    value, *on = SWITCHES[field]
    assert differ(computed(*on), computed(*on, f"{field}={value}"))


def test_cudnn_is_another_attention_and_refused_off_a_gpu(monkeypatch):
    """Where it is believed that there are GPUs, it is jax's that every block is traced with."""
    eight = ("model.width=16", "model.dtype=bfloat16")  # values in a head: what cuDNN can
    with pytest.raises(UserError) as caught:
        compute("model.attention=cudnn", *eight)
    assert str(caught.value) == (
        "model.attention=cudnn needs NVIDIA GPUs of Ampere or later, and the mesh is of 1 x cpu: "
        "set model.attention=xla"
    )
    asked = []

    def attend(q, k, v, implementation, attend=jax.nn.dot_product_attention):
        asked.append((implementation, str(q.dtype)))
        return attend(q, k, v, implementation="xla")

    monkeypatch.setattr(validation, "have_cudnn", lambda devices: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    unrolled = ("model.scan=false", *eight)
    assert differ(compute(*unrolled), compute("model.attention=cudnn", *unrolled))
    assert set(asked) == {("cudnn", "bfloat16")} and len(asked) >= 2


@pytest.mark.parametrize(("left", "right"), MORE, ids=[left for left, _ in MORE])
def test_values_of_a_switch_differ_from_each_other(left, right, computed):
    assert differ(computed(left), computed(right))


@pytest.mark.parametrize(
    "override", ["log.every=7", "augment.pad=2", "optim.factor=.5", "data.path=x", "optim.clip=1.0"]
)
def test_what_is_off_or_elsewhere_leaves_the_step_alone(override, computed):
    """The comparison above is not one that always finds a difference."""
    assert not differ(computed(), compute(override))


def after(steps: int, *overrides: str) -> dict[str, np.ndarray]:
    """Parameters after so many steps of SGD from the same drawn state; 0 compiles nothing."""
    overrides = ("optim.name=sgd", "optim.lr=.1", *overrides)
    program = make_setup(config.override(config.base(), [*SMALL, *overrides]))
    draw = np.random.RandomState(0)
    params = {
        name: draw.normal(size=leaf.shape).astype(np.float32) * 0.3
        for name, leaf in sorted(named(program.state.params).items())
    }
    tree = jax.tree.unflatten(jax.tree.structure(program.state.params), list(params.values()))
    tree = jax.tree.map(jnp.asarray, tree)
    ema = jax.tree.map(jnp.copy, tree) if program.cfg.optim.ema else None
    state = program.state._replace(
        step=jnp.int32(0), params=tree, opt_state=program.optimizer.init(tree), ema=ema
    )
    images = draw.randint(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    labels, mask = np.array([0, 1, 2, 1], np.int32), np.array([True, True, True, False])
    step = jit_train_step(program)
    for _ in range(steps):
        state, _ = step(state, {"image": images, "label": labels, "mask": mask})
    result = {f"params/{k}": np.asarray(v) for k, v in named(state.params).items()}
    return result | {f"ema/{k}": np.asarray(v) for k, v in named(state.ema or {}).items()}


@pytest.fixture(scope="module")
def plain():
    return after(2)


@pytest.mark.parametrize("same", ["model.remat=full", "optim.accumulate=2"])
def test_what_changes_the_way_but_not_the_result(same, plain):
    """A masked-out example is in the batch: micro-batches hold different numbers of examples."""
    result = after(2, same)
    for name, leaf in plain.items():
        np.testing.assert_allclose(result[name], leaf, atol=1e-5, err_msg=name)


def test_dropout_and_averaging_change_the_numbers(plain):
    result = after(2, "model.dropout=.5", "optim.ema=.5")
    for name in ("params/embed/kernel", "params/head/kernel"):
        assert np.abs(result[name] - plain[name]).max() > 1e-4
    moved = result["params/head/kernel"] - result["ema/head/kernel"]
    assert np.abs(moved).max() > 1e-4


def test_freezing_leaves_exactly_the_others_unchanged(plain):
    start, head = after(0), after(2, "optim.train=head")
    changed = {name for name in head if not np.array_equal(head[name], start[name])}
    assert changed == {"params/head/bias", "params/head/kernel"}
    same = {name for name in plain if np.array_equal(plain[name], start[name])}
    assert same <= {"params/blocks/attention/key/bias"}  # softmax does not see it: no gradient


def test_adapters_leave_their_base_and_all_but_the_head_unchanged():
    start = after(0, "lora.rank=2")
    adapters = {name for name in start if "lora" in name}
    assert len(adapters) == 4
    for train, more in (("all", "head"), ("bias$", "bias"), ("query/", "query/bias")):
        result = after(2, "lora.rank=2", f"optim.train={train}", "optim.freeze=('key/bias',)")
        changed = {name for name in result if not np.array_equal(result[name], start[name])}
        others = {name for name in start if more in name and "key/bias" not in name}
        assert changed == adapters | others, train


def test_the_data_switches_change_the_images(jpegs):
    """Fields that reach the step only as pixels."""

    def first(split="train", **fields):
        values = {"name": "folder", "path": jpegs, "resolution": 16, **fields}
        cfg = config.override(config.base(), [f"data.{k}={v}" for k, v in values.items()])
        source = open_split(cfg.data, split)
        return len(source), source.read(np.arange(3)), source.decodes

    count, batch, decodes = first()
    assert (count, decodes, batch["image"].shape) == (48, True, (3, 16, 16, 3))
    assert first("train[:12]")[0] == 12
    assert first("val")[0] == 12
    assert not np.array_equal(first("train[50%:]")[1]["image"], first("train[:50%]")[1]["image"])
    assert first(load=20)[1]["image"].shape == (3, 20, 20, 3)
    assert first(width=24)[1]["image"].shape == (3, 16, 24, 3)
    kept = first(memory=True)
    assert not kept[2]
    assert np.array_equal(kept[1]["image"], batch["image"])
