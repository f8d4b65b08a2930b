"""program: refusals with the arithmetic; a step is what it says, is repeatable, and learns."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import random_batch, random_params, tiny_config
from vit_scale import config
from vit_scale.distributed.sharding import shard_batch
from vit_scale.errors import UserError
from vit_scale.models.build import build
from vit_scale.models.parameters import count, named
from vit_scale.training.optimizer import update_ema
from vit_scale.training.program import (
    TrainState,
    check_attention,
    gradients,
    jit_train_step,
    parameter_layout,
    plan_program,
    summary,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

# Everything that the tests below look at is on in the one program that they share.
STEP = (
    "optim.lr=0.01",
    "optim.ema=0.75",
    "optim.freeze=('embed',)",
    "augment.crop=pad",
    "augment.flip=True",
)
MASK = np.array([1, 0, 1, 1, 1, 1, 0, 0], bool)


@pytest.fixture(scope="module")
def program():
    return plan_program(tiny_config(*STEP))


@pytest.fixture(scope="module")
def step(program):
    return jit_train_step(program)


def new_state(program, step: int = 0) -> TrainState:
    """At `step`, the average still being the parameters."""
    params, ema = (jax.device_put(random_params(program.model)) for _ in range(2))
    return TrainState(jnp.int32(step), params, program.optimizer.init(params), ema)


def batch_of(program, **changed) -> dict:
    batch = random_batch() | changed
    return shard_batch(batch, program.mesh, len(batch["label"]))


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# Before anything is compiled


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optim.accumulate=3"],
            "global batch 8 is not divisible by 3 = 3 micro-batches x 1 data x 1 fsdp",
        ),
        (["data.batch=0"], "global batch 0 is not divisible by 1 data shards (1 data x 1 fsdp)"),
        (["eval.batch=0"], "global batch 0"),
        (["mesh.fsdp=3"], "mesh data=-1 x fsdp=3 x tensor=1: 1 devices are not divisible by 3"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["log.every=0"], "log.every=0 must be at least 1"),
        (["checkpoint.every=-1"], "checkpoint.every=-1 must be at least 0"),
        (["init.resample=corner"], "init.resample='corner' is unknown; did you mean corners"),
        (["objective=clasification"], "did you mean classification"),
        (["optim.warmup=10"], "optim.warmup=10 must be fewer than the run's steps=10"),
        (["data.resolution=20"], "image height 20 is not divisible by the patch of 8 pixels"),
        (["augment.crop=rezised"], "did you mean resized"),
        (["optim.freeze=('posembed',)"], "matches no parameter; did you mean posemb"),
        (["mesh.compiler=('fast',)"], "mesh.compiler: 'fast' is not FLAG=VALUE"),
        (["model.remat=some"], "model.remat='some' is unknown"),
    ],
)
def test_what_cannot_work_is_refused(overrides, message):
    with pytest.raises(UserError) as caught:
        plan_program(tiny_config(*overrides))
    assert message in str(caught.value) and "\n" not in str(caught.value)


CUDNN = ("model.attention=cudnn", "model.dtype=bfloat16")


def on(kind: str, platform: str = "gpu", **known) -> SimpleNamespace:
    """A mesh of two such devices."""
    device = SimpleNamespace(device_kind=kind, platform=platform, **known)
    return SimpleNamespace(devices=np.array([[[device]], [[device]]]))


A100, H100 = on("A100", compute_capability="8.0"), on("H100", compute_capability="9.0")


@pytest.mark.parametrize(
    ("mesh", "overrides", "message"),
    [
        (on("cpu", "cpu"), (), "needs NVIDIA GPUs of Ampere or later, and the mesh is of 2 x cpu:"),
        (on("TPU v5 lite", "tpu"), (), "the mesh is of 2 x TPU v5 lite: set model.attention=xla"),
        (on("V100", compute_capability="7.0"), (), "the mesh is of 2 x V100: "),
        (on("MI300X", compute_capability="gfx942"), (), "the mesh is of 2 x MI300X: "),
        (A100, ("model.dtype=float32",), "needs model.dtype=bfloat16, not float32: "),
        (A100, ("model.heads=4",), "model width 16 / 4 heads = 4: model.attention=cudnn needs a "),
        (A100, ("model.width=272",), "272 / 2 heads = 136: model.attention=cudnn needs a multiple "
         "of 8, at most 128; "),
        (H100, ("model.width=528",), "528 / 2 heads = 264: model.attention=cudnn needs a multiple "
         "of 8, at most 256; "),
    ],
)  # fmt: skip
def test_what_cudnn_cannot_do_is_refused(mesh, overrides, message):
    cfg = tiny_config(*CUDNN, *overrides)
    with pytest.raises(UserError) as caught:
        check_attention(cfg, mesh, build(cfg.model, (16, 16)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("mesh", "width"), [(A100, 16), (A100, 256), (H100, 272), (H100, 512)])
def test_what_cudnn_can_do_is_not(mesh, width):
    cfg = tiny_config(*CUDNN, f"model.width={width}")
    check_attention(cfg, mesh, build(cfg.model, (16, 16)))


def test_a_mesh_without_devices_may_have_cudnn():
    plan_program(tiny_config(*CUDNN), devices=2)
    with pytest.raises(UserError, match=r"needs model\.dtype=bfloat16, not float32"):
        plan_program(tiny_config("model.attention=cudnn"), devices=2)
    with pytest.raises(UserError, match=r"NVIDIA GPUs .* 1 x cpu: "):
        plan_program(tiny_config(*CUDNN), jax.devices()[:1])


def test_a_plan_allocates_nothing(program):
    leaves = jax.tree.leaves(program.state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding for leaf in leaves)
    assert program.state.ema.keys() == program.state.params.keys()
    assert plan_program(tiny_config()).state.ema is None


def test_summary():
    content = summary(tiny_config("steps=7", "data.width=24"))
    assert {key: content[key] for key in ("tokens", "global_batch", "steps")} == {
        "tokens": 7,
        "global_batch": 8,
        "steps": 7,
    }
    # By hand: 6 patches, 7 tokens; two blocks, of the second what [CLS] needs; the head on [CLS].
    # Six FLOPs a multiply-accumulate.
    block = 7 * 16 * 64 + 2 * 7 * 7 * 16 + 2 * 7 * 16 * 24
    last = 16 * 32 + 7 * 16 * 32 + 2 * 7 * 16 + 2 * 16 * 24
    assert content["flops_per_image"] == 6 * (6 * 192 * 16 + block + last + 16 * 4)
    program = plan_program(tiny_config("data.width=24"))
    assert content["parameters"] == count(program.state.params)
    assert content["config"]["data"]["width"] == 24


def test_a_summary_is_of_what_can_be_trained():
    cfg = config.load("cnn_cifar", ["model.drop_path=0.1"])
    with pytest.raises(UserError, match=r"model\.drop_path=0\.1 is of a ViT"):
        summary(cfg)


# Gradients in parts


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_batch_give_its_gradient(parts):
    """Of a linear regression, with masked examples."""
    draw = np.random.RandomState(0)
    x, y, w = (draw.randn(*shape).astype(np.float32) for shape in ((8, 3), (8,), (3,)))
    weight = (MASK / MASK.sum()).astype(np.float32)
    examples = {"x": x, "y": y, "weight": weight, "id": np.arange(8)}

    def loss(params, part, key):
        errors = part["x"] @ params["w"] - part["y"]
        return (errors**2 * part["weight"]).sum(), {"id": part["id"]}

    grads, outputs = gradients(loss, {"w": w}, examples, jax.random.key(0), parts)
    np.testing.assert_allclose(grads["w"], 2 * x.T @ ((x @ w - y) * weight), atol=1e-5)
    np.testing.assert_array_equal(outputs["id"], np.arange(8), "not in the batch's order")


def test_parts_have_keys_of_their_own():
    def loss(params, examples, key):
        drawn = jax.random.uniform(key, examples["x"].shape)
        return (drawn * params).sum(), {"drawn": drawn}

    _, outputs = gradients(loss, jnp.float32(1), {"x": np.zeros(8)}, jax.random.key(0), 4)
    assert len(np.unique(outputs["drawn"])) == 8


# The step


def test_accumulated_steps_are_the_same_step(program, step):
    """With sums over parts that have 1, 2 and 0 unmasked examples."""
    accumulating = plan_program(tiny_config(*STEP, "optim.accumulate=4"))
    batch = batch_of(program, mask=MASK)
    expected, metrics = step(new_state(program), batch)
    found, other = jit_train_step(accumulating)(new_state(accumulating), batch)
    for name, leaf in named(found.opt_state).items():
        np.testing.assert_allclose(leaf, named(expected.opt_state)[name], atol=1e-5, err_msg=name)
    other = other.compute()
    for key, value in metrics.compute().items():
        np.testing.assert_allclose(other[key], value, rtol=1e-5, err_msg=key)


def test_a_step_is_a_function_of_state_and_batch_bit_for_bit(program, step):
    batch = batch_of(program)
    first, again, later = (step(new_state(program, at), batch) for at in (3, 3, 4))
    assert bits(first) == bits(again)
    assert bits(first[0].params) != bits(later[0].params), "the step decides the augmentation"


def test_the_state_that_goes_in_is_donated(program, step):
    state = new_state(program)
    after, _ = step(state, batch_of(program))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_what_a_step_changes(program, step):
    before = jax.device_get(new_state(program))
    after, metrics = jax.device_get(step(new_state(program), batch_of(program, mask=MASK)))
    assert after.step == 1 and jax.tree.structure(after) == jax.tree.structure(before)
    old, new = named(before.params), named(after.params)
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert old.keys() - changed == {"embed/kernel", "embed/bias"}
    averaged = update_ema(before.params, after.params, 0.75)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), after.ema, averaged)
    jax.tree.map(
        lambda ema, a, b: np.testing.assert_allclose(ema, 0.75 * a + 0.25 * b, atol=1e-6),
        after.ema,
        before.params,
        after.params,
    )
    measured = metrics.compute()
    assert measured["skipped"] == 3
    assert measured["learning_rate"] == program.schedule(0) == np.float32(0.01)
    norm = np.sqrt(sum(np.square(new[name] - old[name]).sum() for name in old))
    np.testing.assert_allclose(measured["update_norm"], norm, rtol=1e-3)


def test_masked_images_change_nothing(program, step):
    image = random_batch()["image"].copy()
    image[~MASK] = 255
    first, second = (
        step(new_state(program), batch_of(program, mask=MASK, **changed))[0].params
        for changed in ({}, {"image": image})
    )
    assert bits(first) == bits(second)


def test_it_learns(program, step):
    batch, state, losses = batch_of(program), new_state(program), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics.compute()["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert state.step == 20


def test_the_layout_says_where_parameters_lie_and_what_a_device_holds():
    found = parameter_layout(plan_program(tiny_config("mesh.fsdp=4", "model.scan=True"), 8))
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    rows = {row["parameter"]: row for row in found["parameters"]}
    assert rows["blocks/mlp/up/kernel"] == {
        "parameter": "blocks/mlp/up/kernel",
        "shape": "2 x 16 x 24",
        "spec": "-, fsdp",
        "bytes per device": 2 * 16 * 24 * 4 // 4,
    }
    assert rows["norm/scale"]["spec"] == "whole"
    held = found["bytes_per_device"]
    assert held["params"] == sum(row["bytes per device"] for row in rows.values())
    counters = 2 * 4  # Adam's and the schedule's
    assert held["opt_state"] == 2 * held["params"] + counters
    assert held["ema"] == 0
    averaged = parameter_layout(plan_program(tiny_config("mesh.fsdp=4", "optim.ema=0.9"), 8))
    assert averaged["bytes_per_device"]["ema"] == averaged["bytes_per_device"]["params"]
