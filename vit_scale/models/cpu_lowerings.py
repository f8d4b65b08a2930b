"""How a CPU computes a few of JAX's primitives, in all programs of a process that imports this.

Programs are traced as ever; only what XLA is given for a CPU differs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jax.interpreters import mlir
from jax.lax import dot_general_p, reduce_sum_p
from jaxtyping import Array

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
KEY_PARITY = 0x1BD11BDA
UNROLL = 2**14  # entries


def threefry(key0: Array, key1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """Return the 20 rounds of Threefry-2x32 (Salmon et al. 2011) of uint32 arrays.

    The bits are JAX's own, which on a CPU are computed in a loop that writes every fourth round to
    memory. Unrolled, a large draw takes a sixth of the time. A small one stays a loop, because ten
    times as many operations would take longer to compile.
    """

    def four_rounds(i, state):
        x0, x1, (now, later, last), (rotations, next_rotations) = state
        for rotation in rotations:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << rotation) | (x1 >> (32 - rotation)))
        x0, x1 = x0 + now, x1 + later + jnp.uint32(i + 1)
        return x0, x1, (later, last, now), (next_rotations, rotations)

    keys = (key1, key0 ^ key1 ^ jnp.uint32(KEY_PARITY), key0)
    state = (x0 + key0, x1 + key1, keys, tuple(map(jnp.uint32, ROTATIONS)))
    if max(x0.size, x1.size) < UNROLL:
        state = jax.lax.fori_loop(0, 5, four_rounds, state)
    else:
        for i in range(5):
            state = four_rounds(i, state)
    # Or a draw that is broadcast would be computed anew for each entry.
    return jax.lax.optimization_barrier(state[:2])


def product(lhs: Array, rhs: Array, **options: Any) -> Array:
    """Return dot_general_p of bfloat16 arrays, summed in float32 and rounded once.

    XLA passes such a product to a library that uses the processor's bfloat16 instructions, twice
    as fast as float32. If it returned bfloat16, XLA would convert the arguments to float32 first.
    """
    options["preferred_element_type"] = jnp.dtype("float32")
    return dot_general_p.bind(lhs, rhs, **options).astype(lhs.dtype)


def sum_of_leading_axes(x: Array, *, axes: tuple[int, ...], **options: Any) -> Array:
    """Return reduce_sum_p of a bfloat16 array, as a product with ones: a bias's gradient."""
    ones = jnp.ones(x.shape[: len(axes)], x.dtype)
    sums = jax.lax.dot_general(ones, x, ((axes, axes), ((), ())), preferred_element_type="float32")
    return sums.astype(x.dtype)


def are_leading(x: Any, *, axes: tuple[int, ...], out_sharding: Any) -> bool:
    return axes == tuple(range(len(axes))) and 0 < len(axes) < x.ndim and out_sharding is None


def register(primitive: Any, function: Callable, applies: Callable) -> None:
    """Lower a primitive of bfloat16 arrays as `function` on a CPU where it `applies`."""
    by_jax = mlir._platform_specific_lowerings["cpu"].get(primitive) or mlir._lowerings[primitive]
    lower_function = mlir.lower_fun(function, multiple_results=False)

    def lower(ctx, *args, **options):
        arrays = (*ctx.avals_in, *ctx.avals_out)
        ours = all(array.dtype == jnp.bfloat16 for array in arrays)
        ours = ours and applies(*ctx.avals_in, **options)
        return (lower_function if ours else by_jax.rule)(ctx, *args, **options)

    mlir.register_lowering(primitive, lower, platform="cpu")


mlir.register_lowering(
    threefry2x32_p, mlir.lower_fun(threefry, multiple_results=True), platform="cpu", inline=False
)
if hasattr(mlir, "_platform_specific_lowerings"):  # not public: without it, as fast as JAX
    register(dot_general_p, product, lambda *arrays, **options: True)
    register(reduce_sum_p, sum_of_leading_axes, are_leading)
