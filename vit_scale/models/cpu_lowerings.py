"""How a CPU computes a few of JAX's primitives: random bits, and bfloat16's products and sums.

Programs are traced as ever; only their lowering for a CPU differs, in every program that a process
compiles after it has imported this.
"""

import math
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
    sizes = x0.size, x1.size  # which jax.export may not know
    if not all(isinstance(size, int) for size in sizes) or max(sizes) < UNROLL:
        state = jax.lax.fori_loop(0, 5, four_rounds, state)
    else:
        for i in range(5):
            state = four_rounds(i, state)
    # Or a draw that is broadcast would be computed anew for each entry.
    return jax.lax.optimization_barrier(state[:2])


def multiply(lhs: Array, rhs: Array, **options: Any) -> Array:
    """Return dot_general_p of bfloat16 arrays, summed in float32 and rounded once.

    XLA has a library for such products, which uses the processor's bfloat16 instructions and is
    twice as fast as float32; if they returned bfloat16, it would convert the arguments to float32.
    It does so still where the sum is over one axis that is not the last of `lhs`.
    """
    options["preferred_element_type"] = jnp.dtype("float32")
    return dot_general_p.bind(lhs, rhs, **options).astype(lhs.dtype)


def total(x: Array, *, axes: tuple[int, ...], **options: Any) -> Array:
    """Return reduce_sum_p of a bfloat16 array, summed in float32 and rounded once.

    XLA would round after each addition, and be wrong by 10 % for a few thousand entries. Many rows
    are summed by a product with ones, as in the gradient of a bias, which is fast.
    """
    rows = math.prod(x.shape[: len(axes)])  # which jax.export may not know
    many = not isinstance(rows, int) or rows >= MANY
    leading = axes == tuple(range(len(axes))) and len(axes) < x.ndim
    if options.get("out_sharding") is not None or not (leading and many):
        return reduce_sum_p.bind(x.astype(jnp.float32), axes=axes, **options).astype(x.dtype)
    ones = jnp.ones(x.shape[: len(axes)], x.dtype)
    sums = jax.lax.dot_general(
        ones,
        x,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.DEFAULT,  # whatever jax.default_matmul_precision says
        preferred_element_type=jnp.float32,
    )
    return sums.astype(x.dtype)


MANY = 16  # rows; fewer are as fast without a product


def register_bfloat16(primitive: Any, function: Callable) -> None:
    """Lower a primitive of bfloat16 arrays as `function` on a CPU."""
    by_jax = mlir._platform_specific_lowerings["cpu"].get(primitive) or mlir._lowerings[primitive]
    lower_function = mlir.lower_fun(function, multiple_results=False)

    def lower(ctx, *args, **options):
        arrays = (*ctx.avals_in, *ctx.avals_out)
        ours = all(array.dtype == jnp.bfloat16 for array in arrays)
        return (lower_function if ours else by_jax.rule)(ctx, *args, **options)

    mlir.register_lowering(primitive, lower, platform="cpu")


mlir.register_lowering(
    threefry2x32_p, mlir.lower_fun(threefry, multiple_results=True), platform="cpu", inline=False
)
register_bfloat16(dot_general_p, multiply)
register_bfloat16(reduce_sum_p, total)
