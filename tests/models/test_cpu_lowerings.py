"""The lowerings for a CPU equal JAX's results, or better them; other platforms keep JAX's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.extend.random import threefry2x32_p

from tests.helpers.lowering import lowered
from vit_scale.models import cpu_lowerings

# The first vectors of the authors' known-answer tests (Random123, threefry2x32, 20 rounds).
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize("entries", [1, cpu_lowerings.UNROLL])
@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_threefry_gives_the_published_numbers(key, counter, expected, entries):
    """A small draw is a loop, a large one is unrolled."""
    words = [jnp.full(entries, word, jnp.uint32) for word in counter]
    hash_ = jax.jit(threefry2x32_p.bind)
    bits = hash_(*map(jnp.uint32, key), *words)
    assert [set(np.asarray(word).tolist()) for word in bits] == [{word} for word in expected]
    text = lowered(threefry2x32_p.bind, *map(jnp.uint32, key), *words, platform="cpu")
    assert ("stablehlo.while" in text) == (entries == 1)


def test_a_draw_is_the_same_with_and_without_the_loop(monkeypatch):
    draws = []
    for most in (1, 10**9):
        monkeypatch.setattr(cpu_lowerings, "UNROLL", most)
        jax.clear_caches()
        draws.append(jax.jit(lambda key: jax.random.bits(key, (300,)))(jax.random.key(5)))
    assert (draws[0] == draws[1]).all()


def test_programs_of_unknown_sizes_can_be_exported():
    (batch,) = export.symbolic_shape("b")
    key = jax.eval_shape(lambda: jax.random.key(0))

    def function(key, x):
        sums = jax.lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None)
        return jax.random.normal(key, x.shape) + sums + (x @ x.T).sum()

    x = jax.ShapeDtypeStruct((batch, 6), jnp.bfloat16)
    exported = export.export(jax.jit(function), platforms=["cpu", "tpu"])(key, x)
    for rows in (2, 9000):
        x = draw(rows, 6)
        out = exported.call(jax.random.key(3), x)
        np.testing.assert_array_equal(out, jax.jit(function)(jax.random.key(3), x))


def draw(*shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.RandomState(len(shape)).randn(*shape), dtype)


def assert_rounded_once(out: jax.Array, exact: np.ndarray):
    """Assert that bfloat16 numbers are the nearest to `exact` ones, up to float32's sums."""
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.float64(out) - exact)
    assert (error <= 2.0**-8 * np.abs(exact) + 1e-5 * np.abs(exact).max()).all()


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("nd,df->nf", ((6, 4000), (4000, 3))),
        ("nd,nf->df", ((4000, 5), (4000, 3))),
        ("bnd,bnf->df", ((50, 90, 5), (50, 90, 3))),  # a kernel's gradient
        ("bnkd,bmkd->bknm", ((2, 5, 3, 4000), (2, 7, 3, 4000))),
    ],
)
def test_products_of_bfloat16_are_summed_in_float32(equation, shapes):
    arrays = [draw(*shape) for shape in shapes]
    exact = np.einsum(equation, *map(np.float64, arrays))

    def product(*arrays):
        return jnp.einsum(equation, *arrays)

    assert_rounded_once(jax.jit(product)(*arrays), exact)
    on_cpu, on_tpu = (lowered(product, *arrays, platform=name) for name in ("cpu", "tpu"))
    assert "xf32>" in on_cpu
    assert "f32" not in on_tpu


def total(x, axes):
    return jax.lax.reduce_sum_p.bind(x, axes=axes, out_sharding=None)


@pytest.mark.parametrize("precision", ["default", "highest", "BF16_BF16_BF16"])
@pytest.mark.parametrize(
    ("axes", "by_product"),
    [((0,), True), ((0, 1), True), ((1,), False), ((0, 2), False), ((0, 1, 2), False), ((), False)],
)
def test_sums_of_bfloat16_are_of_float32(axes, by_product, precision):
    x, function = draw(70, 65, 40), functools.partial(total, axes=axes)
    with jax.default_matmul_precision(precision):
        assert_rounded_once(jax.jit(function)(x), np.float64(x).sum(axes))
        on_cpu, on_tpu = (lowered(function, x, platform=name) for name in ("cpu", "tpu"))
    assert ("dot_general" in on_cpu) == by_product
    assert "dot_general" not in on_tpu and "f32" not in on_tpu


def test_few_rows_are_no_product():
    few, many = (draw(rows, 5) for rows in (cpu_lowerings.MANY - 1, cpu_lowerings.MANY))
    sums = functools.partial(total, axes=(0,))
    assert "dot_general" not in lowered(sums, few, platform="cpu")
    assert "dot_general" in lowered(sums, many, platform="cpu")


def test_sums_in_a_batch_of_programs():
    x = draw(3, 50, 60, 7)
    sums = jax.jit(jax.vmap(functools.partial(total, axes=(0, 1))))(x)
    assert_rounded_once(sums, np.float64(x).sum((1, 2)))


def test_the_gradient_of_a_bias_is_the_whole_sum():
    """A sum of 4,096 ones in bfloat16, rounded after each addition, would stay at 256."""
    grad = jax.jit(jax.grad(lambda bias: (jnp.ones((64, 64, 3), "bfloat16") + bias).sum()))
    assert float(grad(jnp.zeros((), "bfloat16"))) == 64 * 64 * 3
    assert grad(jnp.zeros(3, "bfloat16")).tolist() == [4096.0] * 3


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_other_sums_and_products_are_those_of_jax(dtype):
    x = draw(30, 4, dtype=dtype)
    mixed = functools.partial(jnp.dot, preferred_element_type="float32")
    for function in (functools.partial(total, axes=(0,)), lambda x: x @ x.T):
        on_cpu, on_tpu = (lowered(function, x, platform=name) for name in ("cpu", "tpu"))
        assert on_cpu == on_tpu
    x = draw(30, 4)
    on_cpu, on_tpu = (lowered(mixed, x, x.T, platform=name) for name in ("cpu", "tpu"))
    assert on_cpu == on_tpu
