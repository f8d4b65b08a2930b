"""setup: the abstract train state, the summary, the layout of the parameters."""

import jax
import pytest

from tests.helpers.tiny import tiny_config
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


def test_frozen_parameters_cost_no_gradient():
    """Of 5 tokens of width 16 in two unrolled blocks, of which the head reads [CLS] alone."""

    def flops(*overrides):
        cfg = tiny_config("model.scan=False", *overrides)
        assert summary(cfg)["flops_per_image"] == make_setup(cfg).flops_per_image
        return make_setup(cfg).flops_per_image

    forward = flops() // 6 + 192 * 16  # the embedding of a patch of zeros for [CLS] is computed
    assert flops("optim.train=head") == 2 * (forward + 16 * 4)
    # Whatever the rank: merging is once per step, and the kernels' gradients are computed whole.
    adapters = {flops(f"lora.rank={rank}", "lora.kernels=mlp/down") for rank in (1, 4)}
    attention = 16 * 32 * 5 + 16 * 32 + 2 * 2 * 16 * 5 + 16  # of the last block, and its row sums
    backward = 16 * 4 + 2 * 16 * 24 + attention
    assert adapters == {2 * (forward + 16 * 4 + backward + (5 + 1) * 16 * 24)}


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
