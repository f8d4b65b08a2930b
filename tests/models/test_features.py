"""Features of images: pooled, [CLS], mean; of a layer; of some patches; of a model without head."""

import jax
import numpy as np
import pytest

from tests.helpers.tiny import convnet_config, random_params, tiny_model
from vit_scale import config
from vit_scale.errors import UserError
from vit_scale.models.build import build
from vit_scale.models.parameters import unstack

IMAGES = np.random.RandomState(1).randn(2, 16, 16, 3).astype(np.float32)
BOTH = ("model.pool=cls_gap", "model.registers=2")


@pytest.fixture(scope="module")
def tokens():
    """Of the last block, of two layouts of the same parameters."""
    model = tiny_model(*BOTH)
    return np.asarray(jax.jit(model.encode)(random_params(model), IMAGES).tokens)


@pytest.mark.parametrize("layout", [(), ("model.scan=False",)])
def test_features_are_of_the_tokens(tokens, layout):
    """[CLS], 2 registers, 4 patches; what the head reads is pooled."""
    model = tiny_model(*BOTH, *layout)
    params = random_params(tiny_model(*BOTH))
    if layout:
        params = unstack(params)
    cls, mean = tokens[:, 0], tokens[:, 3:].mean(1)
    both = np.concatenate([cls, mean], -1)
    for kind, expected in {"cls": cls, "mean": mean, "cls_mean": both, "pooled": both}.items():
        result = jax.jit(model.features, static_argnums=(2, 3))(params, IMAGES, kind, -1)
        np.testing.assert_allclose(result, expected, atol=1e-5, err_msg=kind)
    logits = jax.jit(model.apply)(params, IMAGES)
    head = params["head"]
    np.testing.assert_allclose(logits, both @ head["kernel"] + head["bias"], atol=1e-4)


def test_a_layer_is_counted_from_either_end_and_normed():
    """The first of two blocks is a model of one block."""
    model, shallow = tiny_model(), tiny_model("model.depth=1")
    params = random_params(model)
    first = {**params, "blocks": jax.tree.map(lambda x: x[:1], params["blocks"])}
    expected = jax.jit(shallow.features)(first, IMAGES)
    for layer in (0, -2):
        np.testing.assert_allclose(
            model.features(params, IMAGES, "cls", layer), expected, atol=1e-5
        )
    assert np.abs(model.features(params, IMAGES, "cls") - expected).max() > 0.1


def test_fc_norm_is_of_the_pooled_vector_only():
    model = tiny_model("model.pool=gap", "model.fc_norm=True")
    params = random_params(model)
    encoded, mean = jax.jit(model.encode)(params, IMAGES), np.asarray
    tokens = mean(encoded.tokens)
    pooled = tokens.mean(1)
    normed = (pooled - pooled.mean(-1, keepdims=True)) / np.sqrt(
        pooled.var(-1, keepdims=True) + 1e-6
    ) * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(encoded.pooled, normed, atol=1e-4)
    np.testing.assert_allclose(model.features(params, IMAGES), normed, atol=1e-4)


def test_only_the_chosen_patches_are_encoded():
    """As if the others were not there; hidden ones are a vector at their position."""
    model = tiny_model("model.posemb=sincos2d", "model.class_token=True", "model.pool=gap")
    params, patches = random_params(model), np.array([[0, 3], [1, 2]])
    some = jax.jit(model.encode)(params, IMAGES, None, patches).tokens
    assert some.shape == (2, 1 + 2, 16)
    changed = IMAGES.copy()
    changed[0, :8, 8:], changed[1, 8:, 8:] = 9, 9  # patch 1 of the first, patch 3 of the second
    again = jax.jit(model.encode)(params, changed, None, patches).tokens
    np.testing.assert_array_equal(some, again)
    whole = jax.jit(model.encode)(params, IMAGES).tokens
    assert np.abs(some[:, 1:] - np.take_along_axis(whole[:, 1:], patches[..., None], 1)).max() > 0.1
    hidden = np.array([[False, True, False, False], [False, False, False, True]])
    vector = np.ones(16, np.float32)
    one, other = (
        jax.jit(model.encode)(params, x, None, None, (hidden, vector)).tokens
        for x in (IMAGES, changed)
    )
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - whole).max() > 0.1


def test_a_model_without_classes_has_no_head():
    model = tiny_model("model.classes=0", "model.representation=5")
    assert not {"head", "representation"} & model.abstract_params.keys()
    params = random_params(model)
    np.testing.assert_allclose(
        jax.jit(model.apply)(params, IMAGES), model.features(params, IMAGES), atol=1e-5
    )


def test_features_of_a_convnet_are_what_its_head_reads():
    cfg = convnet_config("cnn")
    model = build(cfg.model, config.image_size(cfg))
    params = random_params(model)
    features = jax.jit(model.features)(params, IMAGES)
    head = params["head"]
    np.testing.assert_allclose(
        features @ head["kernel"] + head["bias"], jax.jit(model.apply)(params, IMAGES), atol=1e-4
    )
    with pytest.raises(UserError, match="cnn has pooled features only, not cls of layer None"):
        model.features(params, IMAGES, "cls")
