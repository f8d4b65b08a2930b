"""Where a CPU computes the same function in another way than a TPU or GPU.

The choice is made when the program is compiled for a platform, not when it is traced: `plan`
compiles for TPUs on a machine that has none. What other platforms compile is not changed by it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jax.interpreters import mlir
from jaxtyping import Array


def choose(*args: Any, cpu: Callable, others: Callable) -> Any:
    """Return `cpu(*args)` on a CPU and `others(*args)` elsewhere; their results have one shape.

    Not to be differentiated: the derivative would store what either of them needs. It belongs into
    the rules of a jax.custom_vjp.
    """
    return jax.lax.platform_dependent(*args, cpu=cpu, default=others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(function: Callable[[Array], Array], x: Array) -> Array:
    """Apply an elementwise function.

    Accelerators keep x and compute the derivative from it in the backward pass, fused into the
    matrix product there. XLA would do such a product by hand on a CPU, for which reason a CPU
    computes the derivative with the function and keeps it in place of x.
    """
    return function(x)


def _activate(function, x):
    def with_derivative(x):
        return jax.lax.optimization_barrier(jax.jvp(function, (x,), (jnp.ones_like(x),)))

    return choose(x, cpu=with_derivative, others=lambda x: (function(x), x))


def _activate_backward(function, kept, grad):
    def from_input(x, grad):
        return jax.vjp(function, x)[1](grad)[0]

    return (choose(kept, grad, cpu=jnp.multiply, others=from_input),)


activate.defvjp(_activate, _activate_backward)


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


mlir.register_lowering(
    threefry2x32_p, mlir.lower_fun(threefry, multiple_results=True), platform="cpu", inline=False
)
