"""setup: the abstract train state, the summary, the layout of the parameters."""

import jax
import pytest

from tests.helpers.tiny import random_params, tiny_config, tiny_model, write_run
from vit_scale import config
from vit_scale.errors import UserError
from vit_scale.models.parameters import count
from vit_scale.training.setup import make_setup, parameter_layout, summary


def test_a_setup_allocates_nothing():
    setup = make_setup(tiny_config("optim.ema=0.75"))
    leaves = jax.tree.leaves(setup.state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding for leaf in leaves)
    assert setup.state.ema.keys() == setup.state.params.keys()
    assert make_setup(tiny_config()).state.ema is None


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
    setup = make_setup(tiny_config("data.width=24"))
    assert content["parameters"] == count(setup.state.params)
    assert content["config"]["data"]["width"] == 24


@pytest.mark.parametrize("scan", [True, False])
def test_frozen_parameters_save_their_share_of_the_backward_pass(scan):
    """Of 5 tokens of width 16 in two blocks, of which the head reads the mean."""

    def flops(*overrides):
        cfg = tiny_config(
            f"model.scan={scan}", "model.pool=gap", "model.class_token=True", *overrides
        )
        assert summary(cfg)["flops_per_image"] == make_setup(cfg).flops_per_image
        return make_setup(cfg).flops_per_image

    n, middle, head = 5, 5 * 16 * 24, 16 * 4
    forward, embed = flops() // 6, n * 192 * 16  # a patch of zeros for [CLS] is embedded too
    products, mixing, sums = n * 16 * 64 + 2 * middle, 2 * n * n * 16, n * 16
    whole = embed + 2 * head + 2 * (2 * products + 2 * mixing + sums)

    def expected(backward):
        return round(2 * forward * (1 + 2 * backward / whole))

    assert flops("optim.train=head") == expected(head)
    # Of the first block one kernel only, or if scanned all; of the input of the head its gradient.
    blocks = 2 if scan else 1
    adapted = 2 * middle + 2 * head + blocks * (products + 2 * mixing + sums)
    # Whatever the rank: merging is once per step, and the kernels' gradients are computed whole.
    assert {flops(f"lora.rank={rank}", "lora.kernels=mlp/down") for rank in (1, 4)} == {
        expected(adapted)
    }
    assert flops("optim.freeze=('head/bias',)") == flops()  # a bias costs no product


def test_a_teachers_forward_pass_is_counted(tmp_path):
    teacher = tiny_model("model.depth=3", "model.pool=gap")
    cfg = tiny_config("model.depth=3", "model.pool=gap")
    run = write_run(tmp_path / "run", cfg, random_params(teacher))
    taught = tiny_config("objective=distillation", f"distill.teacher={run}")
    own = make_setup(tiny_config(), 2).flops_per_image
    assert make_setup(taught, 2).flops_per_image == own + 2 * teacher.macs


def test_a_summary_is_of_what_can_be_trained():
    cfg = config.load("cnn_cifar", ["model.drop_path=0.1"])
    with pytest.raises(UserError, match=r"model\.drop_path=0\.1 applies to a ViT"):
        summary(cfg)


def test_the_layout_says_how_parameters_are_sharded_and_what_a_device_holds():
    found = parameter_layout(make_setup(tiny_config("mesh.fsdp=4", "model.scan=True"), 8))
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
    averaged = parameter_layout(make_setup(tiny_config("mesh.fsdp=4", "optim.ema=0.9"), 8))
    assert averaged["bytes_per_device"]["ema"] == averaged["bytes_per_device"]["params"]


def test_a_misspelt_objective_is_named_without_devices():
    with pytest.raises(UserError, match=r"objective='distilation' is unknown; did you mean distil"):
        summary(tiny_config("objective=distilation"))
