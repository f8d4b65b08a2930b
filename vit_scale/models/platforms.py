"""Where a CPU computes the same function in another way than a TPU or GPU.

The choice is made when the program is compiled for a platform, not when it is traced: `plan`
compiles for TPUs on a machine that has none. Other platforms compute as if there were no choice.
`cpu_lowerings` changes how a CPU computes primitives, wherever they are called.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_scale.models import cpu_lowerings  # noqa: F401 - for all programs of this process


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

    On a CPU the kernel's gradient in float32 is a product of two matrices: as a sum over images and
    tokens it makes the MLP a third slower. A TPU would copy the tokens into a matrix. The forward
    pass is one primitive, which policies of rematerialisation know.
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
        cpu = by_matrices if x.dtype == jnp.float32 else plain
        return choose(*args, grad, cpu=cpu, others=plain)

    function = jax.custom_vjp(product)
    function.defvjp(lambda *args: (product(*args), args), backward)
    return function(x, kernel)
