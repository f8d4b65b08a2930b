"""Count the arithmetic of a function in its jaxpr, without running or compiling it.

Counted are the multiply-accumulates (MACs) of matrix products and of convolutions, zero padding
included; norms, softmax, GELU and biases are not, as is usual for model FLOPs utilisation
(Chowdhery et al. 2022, appendix B).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

from vit_scale.models.parameters import stop_frozen


def count_macs(function: Callable, *args: Any) -> int:
    """Return the MACs of `function(*args)`; `args` may be jax.ShapeDtypeStructs."""
    return _macs(jax.make_jaxpr(function)(*args).jaxpr)


def count_gradient_macs(function: Callable, trained: dict, params: dict, *args: Any) -> int:
    """Return the MACs of `function(params, *args)`, an array, and of its gradient.

    Only parameters that are True in `trained`, a tree of bools, get a gradient; work that only the
    gradients of frozen parameters would need is left out.
    """

    def value_and_gradient(params, *args):
        def loss(params):
            return function(stop_frozen(trained, params), *args).sum()

        return jax.value_and_grad(loss)(params)

    jaxpr = jax.make_jaxpr(value_and_gradient)(params, *args).jaxpr
    return _macs(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _macs(jaxpr: Jaxpr) -> int:
    return sum(map(_equation_macs, jaxpr.eqns))


def _equation_macs(equation: JaxprEqn) -> int:
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
            return math.prod(out) * math.prod(left[axis] for axis in contracted)
        case "conv_general_dilated":
            kernel, out = _shape(equation.invars[1]), _shape(equation.outvars[0])
            out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            zeros = math.prod(equation.params["lhs_dilation"])  # between pixels, in a gradient
            return math.prod(out) * math.prod(kernel) // (out_channels * zeros)
        case "scan":
            return equation.params["length"] * _macs(equation.params["jaxpr"].jaxpr)
        case "cond" if equation.params.get("branches_platforms"):  # a choice: models/platforms.py
            return _macs(equation.params["branches"][-1].jaxpr)
        case "cond" | "while":
            raise NotImplementedError(f"the number of operations of {equation.primitive} varies")
    return sum(map(_macs, _inner_jaxprs(equation)))


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner_jaxprs(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """Yield what jit, checkpoint and custom_vjp call: the forward pass, which is not in a rule."""
    for value in equation.params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def training_flops(macs: int, backward: float = 1.0) -> int:
    """Return the FLOPs of training: 2 per MAC, once forward and twice backward.

    `backward` is the share of the backward pass that is computed.
    """
    return round(2 * macs * (1 + 2 * backward))
