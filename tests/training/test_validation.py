"""validation: what can't work is refused with the arithmetic, before anything is compiled."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.helpers.tiny import tiny_config
from vit_scale.errors import UserError
from vit_scale.models.spec import resolve
from vit_scale.training.setup import make_setup
from vit_scale.training.validation import check_attention


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optim.accumulate=3"],
            "data.batch=8 is not divisible by 3 = 3 micro-batches x 1 data x 1 fsdp",
        ),
        (["data.batch=0"], "data.batch=0 must be at least 1"),
        (["eval.batch=0"], "eval.batch=0 must be at least 1"),
        (["mesh.fsdp=3"], "mesh data=-1 x fsdp=3 x tensor=1: 1 devices are not divisible by 3"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["seed=-1"], "seed=-1 must be at least 0"),
        (["optim.accumulate=0"], "optim.accumulate=0 must be at least 1"),
        (["model.pool=map", "model.pool_heads=3"], "model.pool_heads=3 must divide the width 16"),
        (["model.pool=map", "model.pool_heads=32"], "model.pool_heads=32 must divide the width 16"),
        (["model.pool=map", "model.pool_mlp=-1"], "pool_mlp=-1 be at least 1"),
        (["log.every=0"], "log.every=0 must be at least 1"),
        (["data.cache=-1."], "data.cache=-1.0 must be at least 0"),
        (["data.cache=nan"], "data.cache=nan must be at least 0"),
        (["checkpoint.every=-1"], "checkpoint.every=-1 must be at least 0"),
        (["init.resample=corner"], "init.resample='corner' is unknown; did you mean corners"),
        (["objective=clasification"], "did you mean classification"),
        (["optim.warmup=10"], "optim.warmup=10 must be fewer than the run's steps=10"),
        (["data.resolution=20"], "image height 20 is not divisible by the patch size 8"),
        (
            ["augment.mix=pair", "data.batch=33"],
            "augment.mix=pair needs an even data.batch, not 33",
        ),
        (["augment.crop=rezised"], "did you mean resized"),
        (
            ["augment.mean=(0.5,)", "augment.policy=rand-m9-mstd0.5-inc1"],
            "augment.mean=(0.5,) must be three numbers",
        ),
        (["optim.freeze=('posembed',)"], "matches no parameter; did you mean posemb"),
        (["mesh.compiler=('fast',)"], "mesh.compiler: 'fast' is not FLAG=VALUE"),
        (["model.remat=some"], "model.remat='some' is unknown"),
        (["optim.name=muon", "optim.train=head"], "optim.name=muon has no matrix of the blocks"),
        (["model.remat=save_only_these_names"], "model.remat='save_only_these_names' is unknown"),
        (
            ["model.posemb=sincos2d", "model.width=18", "model.heads=3"],
            "model.posemb=sincos2d needs a width divisible by 4, not 18",
        ),
        (["data.load=-1"], "data.load=-1 must be at least 0"),
        (["model.norm_epsilon=nan"], "model.norm_epsilon=nan above 0"),
        (["model.layer_scale=nan"], "model.layer_scale=nan must be at least 0"),
    ],
)
def test_what_cannot_work_is_refused(overrides, message):
    with pytest.raises(UserError) as caught:
        make_setup(tiny_config(*overrides))
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
        (A100, ("model.heads=4",), "width 16 / 4 heads = 4: model.attention=cudnn needs a "),
        (A100, ("model.width=272",), "272 / 2 heads = 136: model.attention=cudnn needs a multiple "
         "of 8, at most 128; "),
        (H100, ("model.width=528",), "528 / 2 heads = 264: model.attention=cudnn needs a multiple "
         "of 8, at most 256; "),
    ],
)  # fmt: skip
def test_what_cudnn_cannot_do_is_refused(mesh, overrides, message):
    cfg = tiny_config(*CUDNN, *overrides)
    with pytest.raises(UserError) as caught:
        check_attention(cfg, mesh, resolve(cfg.model, (16, 16)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("mesh", "width"), [(A100, 16), (A100, 256), (H100, 272), (H100, 512)])
def test_what_cudnn_can_do_is_not(mesh, width):
    cfg = tiny_config(*CUDNN, f"model.width={width}")
    check_attention(cfg, mesh, resolve(cfg.model, (16, 16)))


def test_a_mesh_without_devices_may_have_cudnn():
    make_setup(tiny_config(*CUDNN), devices=2)
    with pytest.raises(UserError, match=r"needs model\.dtype=bfloat16, not float32"):
        make_setup(tiny_config("model.attention=cudnn"), devices=2)
    with pytest.raises(UserError, match=r"NVIDIA GPUs .* 1 x cpu: "):
        make_setup(tiny_config(*CUDNN), jax.devices()[:1])
