"""LoRA's adapters against the paper's formula by numpy, in both layouts of the blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import random_params, tiny_config, tiny_model
from vit_scale import config
from vit_scale.errors import UserError
from vit_scale.models.build import build
from vit_scale.models.lora import adapted, is_adapter, merge
from vit_scale.models.parameters import named, select, stack, unstack

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.RandomState(0).randn(3, 16, 16, 3), jnp.float32)


def model_with(*overrides: str):
    cfg = tiny_config("lora.rank=3", "lora.alpha=12.", *overrides)
    return adapted(build(cfg.model, config.image_size(cfg)), cfg.lora)


@pytest.mark.parametrize("scan", [True, False])
def test_an_adapted_model_starts_as_its_base_bit_for_bit(scan):
    model, plain = model_with(f"model.scan={scan}"), tiny_model(f"model.scan={scan}")
    params, base = model.init(KEY), plain.init(KEY)
    names = [name for name in named(params) if is_adapter(name)]
    assert len(names) == (4 if scan else 8)
    assert all(np.any(named(params)[n]) == n.endswith("lora_a") for n in names)
    rest = named(select(params, lambda name: not is_adapter(name)))
    assert all(np.array_equal(leaf, rest.pop(name)) for name, leaf in named(base).items())
    assert not rest
    expected = jax.jit(plain.apply)(base, IMAGES)
    assert np.array_equal(jax.jit(model.apply)(params, IMAGES), expected)


def test_draws_are_those_of_loralib_and_the_same_in_both_layouts():
    """kaiming_uniform_(a=sqrt(5)) is uniform in +-1 / sqrt(inputs): here of 16, 24 and 16 again."""
    stacked, unrolled = (model_with(f"model.scan={x}", "lora.kernels=kernel$") for x in (1, 0))
    first, second = stacked.init(KEY), unrolled.init(KEY)
    jax.tree.map(np.testing.assert_array_equal, first, stack(second))
    for name, inputs in (("attention/query", 16), ("attention/out", 16), ("mlp/down", 24)):
        a = named(first)[f"blocks/{name}/lora_a"]
        assert 0.8 / np.sqrt(inputs) < np.abs(a).max() <= 1 / np.sqrt(inputs)
        assert not np.array_equal(a[0], a[1])
    query, key = (named(first)[f"blocks/attention/{name}/lora_a"] for name in ("query", "key"))
    assert query.shape == key.shape and not np.array_equal(query, key)


@pytest.mark.parametrize("layout", [lambda tree: tree, unstack])
def test_a_kernel_and_its_adapter_are_what_the_paper_adds(layout):
    """h = W x + alpha / rank B A x for each layer, whatever the axes of the kernel."""
    params = random_params(model_with("lora.kernels=kernel$"))
    merged = named(merge(layout(params), 12 / 3))
    assert not any(map(is_adapter, merged))
    leaves = named(unstack(params))
    draw = np.random.RandomState(1)
    for name, inputs in (("attention/query", 1), ("attention/out", 2), ("mlp/up", 1)):
        for layer in range(2):
            w, a, b = (leaves[f"blocks/{layer}/{name}/{x}"] for x in ("kernel", "lora_a", "lora_b"))
            x = draw.randn(*w.shape[:inputs])
            expected = np.tensordot(x, w, inputs)
            expected += 4 * np.tensordot(np.tensordot(x, a, inputs), b, 1)
            single = f"blocks/{layer}/{name}/kernel"
            result = merged[single] if single in merged else merged[f"blocks/{name}/kernel"][layer]
            np.testing.assert_allclose(np.tensordot(x, result, inputs), expected, atol=1e-5)


def test_every_function_of_the_model_sees_the_adapters():
    model, plain = model_with(), tiny_model()
    params = random_params(model)
    merged = merge(params, 4)
    base = select(params, lambda name: not is_adapter(name))
    for function in ("apply", "train", "attention"):
        rest = {"apply": (IMAGES,), "train": (IMAGES, None, None)}.get(
            function, (IMAGES, lambda weights: weights)
        )
        result, expected, without = (
            jax.tree.leaves(getattr(a_model, function)(values, *rest))[0]
            for a_model, values in ((model, params), (plain, merged), (plain, base))
        )
        np.testing.assert_allclose(result, expected, atol=1e-6)
        assert np.abs(result - without).max() > 1e-3, function


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rank=-1"], "lora.rank=-1 and lora.alpha=12.0 must be above 0"),
        (["lora.alpha=0."], "lora.rank=3 and lora.alpha=0.0 must be above 0"),
        (["lora.kernels=("], "lora.kernels='(' is not a regular expression: "),
        (["lora.kernels=embed/kernel"], "lora.kernels='embed/kernel' matches no kernel of att"),
        (
            ["lora.rank=16"],
            "lora.rank=16 must be below that of blocks/attention/query/kernel, 16 x 16",
        ),
    ],
)
def test_refuses(overrides, message):
    with pytest.raises(UserError) as caught:
        model_with(*overrides)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
