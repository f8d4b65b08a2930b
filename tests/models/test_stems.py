"""stems: a hybrid is a ViT on its stem's features, which are those of numpy or of the authors."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden.draw_by_name import draw, draw_images
from tests.helpers.numpy_layers import conv, halved, norm, relu
from tests.helpers.tiny import random_images, random_params, tiny_config
from vit_scale import config
from vit_scale.errors import UserError
from vit_scale.models import stems
from vit_scale.models.build import build
from vit_scale.models.parameters import is_statistic, named
from vit_scale.training.optimizer import layer_multiplier
from vit_scale.training.setup import make_setup

KEY = jax.random.key(0)
MASK = np.array([1, 0, 1, 1, 1, 0, 1, 1], bool)


def model_of(cfg):
    return build(cfg.model, config.image_size(cfg))


def shapes_of(model) -> dict:
    return named(model.abstract_params)


def test_a_hybrids_patches_are_of_the_features():
    model = model_of(tiny_config("model.variant=R20+Ti/4"))
    assert model.shape.tokens == 4 * 4 + 1
    shapes = {name: leaf.shape for name, leaf in shapes_of(model).items()}
    assert shapes["embed/kernel"] == (1, 1, 64, 16)
    conv_stem = model_of(tiny_config("model.variant=C+Ti/8"))
    shapes = {name: leaf.shape for name, leaf in shapes_of(conv_stem).items()}
    widths = [shapes[f"stem/convs/{i}/kernel"][-1] for i in range(3)]
    assert (widths, shapes["embed/kernel"]) == ([4, 8, 16], (1, 1, 16, 16))
    larger = model_of(tiny_config("model.variant=R20+Ti/8"))
    assert larger.shape.tokens == 2 * 2 + 1
    assert shapes_of(larger)["embed/kernel"].shape == (2, 2, 64, 16)


def conv_stem(x, part, mask=None):
    for i in map(str, range(3)):
        x = relu(norm(conv(x, part["convs"][i], 2), part["norms"][i], mask))
    return x


def pooled_stem(x, part, mask=None):
    for i in map(str, range(3)):
        stage = part["stages"][i]
        x = relu(norm(halved(conv(x, stage["conv1"])), stage["norm1"], mask))
        x = x + relu(norm(conv(x, stage["conv2"]), stage["norm2"], mask))
    return x


PLAIN = {"C+Ti/8": conv_stem, "CNN+Ti/8": pooled_stem}  # in numpy


@pytest.fixture(scope="module", params=PLAIN)
def hybrid(request):
    """(the model, its stem in numpy)"""
    return model_of(tiny_config(f"model.variant={request.param}")), PLAIN[request.param]


@pytest.mark.parametrize("mask", [None, MASK], ids=["running", "batch"])
def test_a_hybrid_is_a_vit_on_a_stem(hybrid, mask):
    model, plain_stem = hybrid
    params = random_params(model)
    images = random_images(8) / 128 - 1
    x = plain_stem(images, params["stem"], mask)
    assert x.shape == (8, 2, 2, 16)
    patches = x @ np.asarray(params["embed"]["kernel"][0, 0]) + params["embed"]["bias"]
    # A ViT whose "patches" are these: its embedding is by the identity, of 8 x 8 x 3 >= 16 pixels.
    vit = model_of(tiny_config())
    kernel = np.zeros((8, 8, 3, 16), np.float32)
    kernel.reshape(-1, 16)[:16] = np.eye(16)
    rest = {k: v for k, v in params.items() if k not in ("stem", "embed")}
    plain = rest | {"embed": {"kernel": kernel, "bias": np.zeros(16, np.float32)}}
    pixels = np.zeros((8, 2, 2, 8 * 8 * 3))
    pixels[..., :16] = patches
    pixels = pixels.reshape(8, 2, 2, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 16, 16, 3)
    expected = jax.jit(vit.apply)(plain, jnp.asarray(pixels, jnp.float32))
    inputs = jnp.asarray(images, jnp.float32)
    if mask is None:
        actual = jax.jit(model.apply)(params, inputs)
    else:
        actual = jax.jit(model.train)(params, inputs, KEY, mask).prediction
        running = jax.jit(model.apply)(params, inputs)
        assert np.abs(actual - running).max() > 1e-3
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(actual, expected, atol=2e-4)


CCT = pathlib.Path(__file__).parents[1] / "golden" / "cct.npz"


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_tokenizer_of_cct_is_that_of_its_authors(layers):
    """golden/make_cct.py ran their code; the patch embedding is by the identity."""
    expected = dict(np.load(CCT))
    width, size, patch = 24, (16, 24), 2**layers
    fields = (f"model.variant=CCT+Ti/{patch}", f"model.width={width}", "model.heads=2")
    model = build(tiny_config(*fields).model, size)
    stem = model.abstract_params["stem"]["convs"]
    convs = {}
    for i, key in enumerate(expected[f"keys/{layers}"]):
        shape = stem[str(i)]["kernel"].shape
        convs[str(i)] = {"kernel": draw(str(key), shape[:1:-1] + shape[:2]).transpose(2, 3, 1, 0)}
    module = nnx.eval_shape(
        lambda: stems.ConvTokenizer(patch, width, tiny_config(*fields).model, nnx.Rngs(0))
    )
    nnx.update(module, {"convs": {i: jax.tree.map(jnp.asarray, c) for i, c in convs.items()}})
    tokens = module(jnp.asarray(draw_images("cct", size)), None)
    assert tokens.shape[1:3] == model.shape.grid == (16 // patch, 24 // patch)
    np.testing.assert_allclose(
        tokens.reshape(2, -1, width), expected[f"tokens/{layers}"], rtol=1e-4, atol=1e-5
    )


def test_a_stem_without_batch_normalisation_trains_in_parts():
    make_setup(tiny_config("model.variant=CCT+Ti/4", "optim.accumulate=2", "optim.train=head"))
    with pytest.raises(UserError, match="stem_epsilon=timm applies to a hybrid with a ResNet"):
        make_setup(tiny_config("model.variant=CCT+Ti/4", "model.stem_epsilon=timm"))


def test_a_hybrid_measures_in_training(hybrid):
    params = random_params(hybrid[0])
    images = jnp.asarray(random_images(8) / 128 - 1, jnp.float32)
    out = jax.jit(hybrid[0].train)(params, images, KEY, MASK)
    statistics = named(out.statistics)
    assert set(statistics) == {n for n in named(params) if is_statistic(n)}
    assert all((value != named(params)[name]).any() for name, value in statistics.items())


def test_layer_decay_takes_a_stem_for_the_embedding():
    assert layer_multiplier("stem/convs/0/kernel", None, 0.5, 2) == 0.125
    assert layer_multiplier("embed/kernel", None, 0.5, 2) == 0.125
    assert layer_multiplier("objective/mask_token", None, 0.5, 2) == 0.125
    make_setup(tiny_config("model.variant=C+Ti/8", "optim.layer_decay=0.5", "model.remat=full"))
