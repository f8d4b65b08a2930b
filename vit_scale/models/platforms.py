"""Where a CPU computes the same function in another way than a TPU or GPU.

The choice is made when the program is compiled for a platform, not when it is traced: `plan`
compiles for TPUs on a machine that has none. Other platforms compute as if there were no choice.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jax.interpreters import mlir
from jaxtyping import Array, Float


def choose(*args: Any, cpu: Callable, others: Callable) -> Any:
    """Return `cpu(*args)` on a CPU and `others(*args)` elsewhere; their results have one shape.

    Not to be differentiated, because the derivative would store what either of them needs: use
    `by_platform`, or this in the rules of a jax.custom_vjp.
    """
    return jax.lax.platform_dependent(*args, cpu=cpu, default=others)


def by_platform(cpu: Callable, others: Callable) -> Callable:
    """Return a function of arrays that is `cpu` on a CPU and `others` elsewhere.

    It can be differentiated, and keeps its arguments for the backward pass, nothing else.
    """

    def backward(args, grad):
        def rule(function):
            return lambda args, grad: jax.vjp(function, *args)[1](grad)

        return choose(args, grad, cpu=rule(cpu), others=rule(others))

    function = jax.custom_vjp(functools.partial(choose, cpu=cpu, others=others))
    function.defvjp(lambda *args: (function(*args), args), backward)
    return function


def gelu(x: Array, approximate: bool) -> Array:
    """Return jax.nn.gelu (Hendrycks & Gimpel 2016), on a CPU the exact one by erf, not erfc.

    The latter takes twice as many operations, for relative precision where the result is 0.
    """

    def by_erf(x):
        return x * (0.5 * jax.lax.erf(x * math.sqrt(0.5)) + 0.5)

    by_jax = functools.partial(jax.nn.gelu, approximate=approximate)
    return by_jax(x) if approximate else by_platform(by_erf, by_jax)(x)


def tokens_times_kernel(
    x: Float[Array, "*tokens d"], kernel: Float[Array, "d f"], dimensions: tuple, **options: Any
) -> Float[Array, "*tokens f"]:
    """Return jax.lax.dot_general of the same arguments: tokens times a kernel.

    On a CPU the kernel's gradient is a product of two matrices: as a sum over images and tokens it
    makes the MLP a third slower. A TPU would copy the tokens into a matrix. The forward pass is one
    primitive, which policies of rematerialisation know.
    """
    assert dimensions == (((x.ndim - 1,), (0,)), ((), ())), dimensions

    def product(x, kernel):
        return jax.lax.dot_general(x, kernel, dimensions, **options)

    def plain(x, kernel, grad):
        return jax.vjp(product, x, kernel)[1](grad)

    def by_matrices(x, kernel, grad):
        def of_matrix(kernel):
            tokens = x.reshape(-1, x.shape[-1])
            return jax.lax.dot_general(tokens, kernel, (((1,), (0,)), ((), ())), **options)

        (grad_x,) = jax.vjp(lambda x: product(x, kernel), x)[1](grad)
        (grad_kernel,) = jax.vjp(of_matrix, kernel)[1](grad.reshape(-1, grad.shape[-1]))
        return grad_x, grad_kernel

    def backward(args, grad):
        return choose(*args, grad, cpu=by_matrices, others=plain)

    function = jax.custom_vjp(product)
    function.defvjp(lambda *args: (product(*args), args), backward)
    return function(x, kernel)


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


# For all programs of this process, initialisation and augmentation among them.
mlir.register_lowering(
    threefry2x32_p, mlir.lower_fun(threefry, multiple_results=True), platform="cpu", inline=False
)
