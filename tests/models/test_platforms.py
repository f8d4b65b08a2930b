"""What a CPU computes in its own way gives what other platforms give, and only a CPU gets it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers.lowering import lowered
from vit_scale.models import attention, convolution, platforms
from vit_scale.models.flops import count_macs


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), jnp.float32)


@pytest.fixture
def elsewhere(monkeypatch):
    """Returns a function of functions: what they compute on another platform than a CPU."""

    def use(function):
        def call(*args):
            with monkeypatch.context() as patch:
                for module in (attention, platforms):
                    patch.setattr(module, "choose", lambda *args, cpu, others: others(*args))
                return function(*args)

        return call

    return use


def assert_close(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * abs(other).max())


def with_gradients(function, *args):
    """The value of `function`, and its gradients for a cotangent that is no constant."""
    out, backward = jax.vjp(function, *args)
    return out, backward(draw(*out.shape, seed=9).astype(out.dtype))


def test_the_choice_is_made_for_the_platform_that_is_compiled_for():
    def function(x):
        return platforms.choose(x, cpu=jnp.sin, others=jnp.cos)

    on_cpu, on_tpu = (lowered(function, 1.0, platform=name) for name in ("cpu", "tpu"))
    assert " stablehlo.sine" in on_cpu and "cosine" not in on_cpu
    assert "cosine" in on_tpu and " stablehlo.sine" not in on_tpu
    assert function(1.0) == jnp.sin(1.0)


def test_macs_are_those_of_the_other_platforms():
    def function(x):
        return platforms.choose(x, cpu=lambda x: x @ x @ x, others=lambda x: x @ x)

    assert count_macs(function, draw(4, 4)) == 64


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_and_its_gradient(approximate, elsewhere):
    x = jnp.linspace(-8, 8, 1001)
    ours = with_gradients(functools.partial(platforms.gelu, approximate=approximate), x)
    theirs = with_gradients(functools.partial(jax.nn.gelu, approximate=approximate), x)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    others = elsewhere(with_gradients)(lambda x: platforms.gelu(x, approximate), x)
    jax.tree.map(np.testing.assert_array_equal, others, theirs)


def test_a_product_of_tokens_and_its_gradients(elsewhere):
    x, kernel = draw(2, 5, 3), draw(3, 4, seed=1)
    layer = nnx.Linear(
        3, 4, use_bias=False, rngs=nnx.Rngs(0), dot_general=platforms.tokens_times_kernel
    )
    graph, state = nnx.split(layer)

    def product(x, kernel):
        return nnx.merge(graph, jax.tree.map(lambda _: kernel, state))(x)

    ours = with_gradients(product, x, kernel)
    assert_close(ours, with_gradients(lambda x, kernel: x @ kernel, x, kernel))
    assert_close(ours, elsewhere(with_gradients)(product, x, kernel))
    for dtype in ("float32", "bfloat16"):
        args = x.astype(dtype), kernel.astype(dtype)
        for platform in ("cpu", "tpu"):
            text = lowered(functools.partial(with_gradients, product), *args, platform=platform)
            flat = "tensor<10x4x" in text  # the gradient, as a matrix
            assert flat == (platform == "cpu" and dtype == "float32")


def test_attention_and_its_gradients(elsewhere):
    q, k, v = draw(2, 5, 3, 4), draw(2, 7, 3, 4, seed=1), draw(2, 7, 3, 4, seed=2)
    attend = functools.partial(attention.attend, logits="float32", implementation="xla")
    ours = with_gradients(attend, q, k, v)
    assert_close(ours, with_gradients(jax.nn.dot_product_attention, q, k, v))
    assert_close(ours, elsewhere(with_gradients)(attend, q, k, v))


@pytest.mark.parametrize(
    ("side", "stride", "pad"),
    [(3, 1, (1, 1)), (3, 2, (1, 1)), (1, 2, (0, 0)), (5, 3, (2, 2)), (7, 2, (2, 3))],
)
@pytest.mark.parametrize("values", [1, 10_000, 10**6])  # 1 example at a time, some, all 6
def test_a_convolution_and_its_gradients(side, stride, pad, values, elsewhere, monkeypatch):
    monkeypatch.setattr(convolution, "PATCH_VALUES", values)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x, kernel = draw(6, 9, 12, 3), draw(side, side, 3, 4, seed=1)

    def convolve(x, kernel):
        return convolution.convolve(x, kernel, stride, pad)

    def reference(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        window, padding = (stride, stride), [pad, pad]
        return jax.lax.conv_general_dilated(x, kernel, window, padding, dimension_numbers=numbers)

    ours = with_gradients(convolve, x, kernel)
    assert_close(ours, with_gradients(reference, x, kernel))
    assert_close(ours, elsewhere(with_gradients)(convolve, x, kernel))


def test_a_kernels_gradient_takes_few_examples_at_a_time_but_one_per_device(monkeypatch):
    x = draw(6, 8, 8, 3)
    values = 8 * 8 * 27  # patches of an example

    def at_a_time(devices, most):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        monkeypatch.setattr(convolution, "PATCH_VALUES", most)
        gradient = lambda x, grad: convolution.kernel_gradient(x, grad, 3, 1, (1, 1))  # noqa: E731
        text = lowered(gradient, x, x, platform="cpu")
        return int(re.search(r"tensor<(\d)x8x8x27x", text)[1])

    assert at_a_time(1, 2 * values - 1) == 1
    assert at_a_time(1, 5 * values) == 3  # which divides 6
    assert at_a_time(1, 9 * values) == 6
    assert at_a_time(2, 1) == 2
