"""What a CPU is given for JAX's primitives gives JAX's results, and only a CPU is given it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


def draw(*shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.RandomState(len(shape)).randn(*shape), dtype)


def assert_rounded_once(out: jax.Array, exact: np.ndarray):
    """Asserts that bfloat16 numbers are the nearest to `exact` ones, up to float32's sums."""
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.float64(out) - exact)
    assert (error <= 2.0**-8 * np.abs(exact) + 1e-5 * np.abs(exact).max()).all()


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("nd,df->nf", ((6, 50), (50, 3))),
        ("bnd,bnf->df", ((4, 9, 5), (4, 9, 3))),  # a kernel's gradient
        ("bnkd,bmkd->bknm", ((2, 5, 3, 8), (2, 7, 3, 8))),
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


@pytest.mark.parametrize("axes", [(0,), (0, 1)])
def test_sums_of_bfloat16_over_leading_axes_are_products(axes):
    x = draw(7, 11, 5)

    def total(x):
        return jax.lax.reduce_sum_p.bind(x, axes=axes, out_sharding=None)

    assert_rounded_once(jax.jit(total)(x), np.float64(x).sum(axes))
    on_cpu, on_tpu = (lowered(total, x, platform=name) for name in ("cpu", "tpu"))
    assert "dot_general" in on_cpu and "stablehlo.reduce" not in on_cpu
    assert "dot_general" not in on_tpu and "stablehlo.reduce" in on_tpu


@pytest.mark.parametrize(
    ("dtype", "axes"), [("float32", (0,)), ("bfloat16", (1,)), ("int32", (0,))]
)
def test_other_sums_and_products_are_those_of_jax(dtype, axes):
    x = draw(3, 4, dtype=dtype)

    def total(x):
        return jax.lax.reduce_sum_p.bind(x, axes=axes, out_sharding=None)

    def product(x):
        return jnp.dot(x, x.T, preferred_element_type="float32" if "float" in dtype else None)

    for function in (total, product):
        on_cpu, on_tpu = (lowered(function, x, platform=name) for name in ("cpu", "tpu"))
        assert on_cpu == on_tpu
