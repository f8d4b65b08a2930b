"""bit: the published hybrids' sizes, the layers against numpy, and what they are allowed to do.

Logits are compared with Google's code and timm in tests/pretrained/test_hybrids.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers.tiny import random_batch, random_images, random_params, tiny_config
from vit_scale import config
from vit_scale.distributed.mesh import abstract_mesh
from vit_scale.distributed.sharding import partition_spec
from vit_scale.errors import UserError
from vit_scale.models import bit, convolution
from vit_scale.models.build import build
from vit_scale.models.parameters import count, is_statistic, named
from vit_scale.training.setup import make_setup
from vit_scale.training.train_state import TrainState
from vit_scale.training.train_step import jit_train_step

TINY = "model.variant=R+Ti/8"


def full(variant: str):
    cfg = config.override(config.base(), [f"model.variant={variant}", "model.classes=1000"])
    return build(cfg.model, (224, 224))


@pytest.mark.parametrize(
    ("variant", "parameters", "grid", "kernel"),
    [  # of timm, whose [CLS] and its position are two vectors
        ("R+Ti/32", 6_337_704 - 192, 7, (8, 8, 64, 192)),
        ("R26+S/32", 36_431_912 - 384, 7, (1, 1, 2048, 384)),
        ("R50+L/32", 328_994_856 - 1024, 7, (1, 1, 2048, 1024)),
        ("R50+B/16", 98_659_112 - 768, 14, (1, 1, 1024, 768)),
    ],
)
def test_published_sizes(variant, parameters, grid, kernel):
    model = full(variant)
    assert count(model.abstract_params) == parameters
    assert model.shape.grid == (grid, grid)
    assert model.abstract_params["embed"]["kernel"].shape == kernel
    assert not any(map(is_statistic, named(model.abstract_params)))


def test_macs_are_those_of_convolutions_and_tokens():
    """The root: 7 x 7 x 3 x 64 for each of 112 x 112 pixels; the rest as the ViT without it."""
    stem = 7 * 7 * 3 * 64 * 112**2
    vit = full("Ti/32").macs - 49 * 32 * 32 * 3 * 192
    assert full("R+Ti/32").macs == stem + vit + 49 * 8 * 8 * 64 * 192


def test_patches_may_be_several_pixels_of_the_features():
    for variant, patch in (("R50+Ti/64", 2), ("R50+Ti/48", 3), ("R+Ti/16", 4)):
        cfg = config.override(config.base(), [f"model.variant={variant}"])
        shape = build(cfg.model, (192, 192)).shape
        assert shape.stem.patch == patch and shape.grid[0] == 192 // shape.patch
    assert bit.stages("R50", 48) == (3, 4, 9) and bit.stages("R50", 64) == (3, 4, 6, 3)


def test_max_pooling_is_tensorflows():
    x = np.random.RandomState(0).randn(2, 6, 8, 3).astype(np.float32)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-np.inf)
    windows = [padded[:, i : i + 6 : 2, j : j + 8 : 2] for i in range(3) for j in range(3)]
    np.testing.assert_array_equal(convolution.max_pool_overlapping(x), np.max(windows, axis=0))
    pooled = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
    np.testing.assert_array_equal(convolution.max_pool_overlapping(x), pooled)


@pytest.mark.parametrize("library", bit.EPSILONS)
def test_layers_are_those_of_numpy(library):
    draw, epsilons = np.random.RandomState(0), bit.EPSILONS[library]
    x = draw.randn(2, 4, 4, 64).astype(np.float32)
    cfg = tiny_config(TINY).model
    layer = convolution.StandardizedConvolution(1, (64, 64), cfg, epsilons, nnx.Rngs(0))
    kernel = (1e-3 + 1e-4 * draw.randn(1, 1, 64, 64)).astype(np.float32)  # which epsilons matter to
    layer.kernel[...] = jnp.asarray(kernel)
    exact = kernel[0, 0].astype(np.float64)
    variance = exact.var(0)
    if library == "google":
        scale = 1 / (np.sqrt(variance) + 1e-5)
    else:
        scale = 1 / np.sqrt(variance + 1e-8)
    expected = x @ ((exact - exact.mean(0)) * scale)
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=2e-4)
    norm = convolution.GroupNorm(64, epsilons.norm)
    norm.bias[...] = jnp.arange(64.0)
    x = x * 1e-2
    groups = x.reshape(2, 16, 32, 2).transpose(0, 2, 1, 3).reshape(2, 32, 32)
    epsilon = {"google": 1e-6, "timm": 1e-5}[library]
    mean, variance = groups.mean(2)[:, None, None], groups.var(2)[:, None, None]
    mean, variance = (np.repeat(part, 2, axis=-1) for part in (mean, variance))
    expected = (x - mean) / np.sqrt(variance + epsilon) + np.arange(64)
    np.testing.assert_allclose(norm(x), expected, rtol=0, atol=2e-5)


def test_a_block_begins_as_its_shortcut():
    cfg = tiny_config(TINY).model
    block = bit.Bottleneck((128, 128), 1, cfg, nnx.Rngs(0))
    x = np.random.RandomState(0).randn(1, 4, 4, 128).astype(np.float32)
    np.testing.assert_array_equal(block(x), np.maximum(x, 0))
    halved = bit.Bottleneck((128, 256), 2, cfg, nnx.Rngs(0))
    assert halved(x).shape == (1, 2, 2, 256)


def trained(*overrides: str) -> dict:
    """Parameters after a step of SGD, by name."""
    program = make_setup(tiny_config(TINY, "optim.name=sgd", "optim.lr=.1", *overrides))
    params = jax.device_put(random_params(program.model))
    state = TrainState(jnp.int32(1), params, program.optimizer.init(params), None)
    return named(jit_train_step(program)(state, random_batch(8))[0].params)


@pytest.mark.slow
def test_no_example_depends_on_others():
    """So batches may be split, and layers frozen: with batch normalisation neither may."""
    whole, halves = trained(), trained("optim.accumulate=2")
    before = named(random_params(build(tiny_config(TINY).model, (16, 16))))
    frozen = trained("optim.freeze=('stem',)")
    for name, leaf in whole.items():
        np.testing.assert_allclose(leaf, halves[name], rtol=0, atol=1e-5, err_msg=name)
        if name != "blocks/attention/key/bias":  # which has no gradient
            assert not np.array_equal(leaf, before[name]), name
            moved = not np.array_equal(frozen[name], before[name])
            assert moved == (not name.startswith("stem/")), name
    model = build(tiny_config(TINY).model, (16, 16))
    images = jnp.asarray(random_images(4) / 128 - 1, jnp.float32)
    apply, params = jax.jit(model.apply), random_params(model)
    one, others = apply(params, images), apply(params, images.at[1:].multiply(-1))
    np.testing.assert_array_equal(one[0], others[0])


def test_kernels_are_split_over_fsdp():
    sizes = abstract_mesh(tiny_config(TINY, "mesh.fsdp=8").mesh, 8).shape
    shapes = named(full("R26+S/32").abstract_params)
    for name, leaf in shapes.items():
        if name.startswith("stem/"):
            split = "fsdp" in partition_spec(name, leaf.shape, sizes)
            assert split == name.endswith("kernel"), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("R26+Ti/16",), "patch size 16 is not divisible by 32, the stride of R26+"),
        (("R50+Ti/8",), "patch size 8 is not divisible by 16, the stride of R50+"),
        (("R+Ti/2",), "patch size 2 is not divisible by 4, the stride of R+"),
        (("R26+Ti/32",), "give a grid of 0 x 0 patches"),
        (("Ti/8", "model.stem_epsilon=timm"), "model.stem_epsilon=timm applies to a hybrid with"),
        (("C+Ti/8", "model.stem_epsilon=timm"), "model.stem_epsilon=timm applies to a hybrid with"),
        (("R+Ti/8", "model.stem_epsilon=tim"), "'tim' is unknown; did you mean timm"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message):
    variant, *others = overrides
    nearest = ["model.nearest_grid=True"] if variant == "R26+Ti/32" else []
    resolution = "data.resolution=64" if "64" in variant or "16" in variant else ""
    fields = [f"model.variant={variant}", *others, *nearest, *filter(None, [resolution])]
    with pytest.raises(UserError) as caught:
        make_setup(tiny_config(*fields))
    assert message in str(caught.value) and "\n" not in str(caught.value)
