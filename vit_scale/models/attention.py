"""Softmax attention with a custom backward pass that reads the n x n weights less often.

The derivative that JAX makes of a softmax reads and writes all n x n weights several times, which
is most of attention's time on a TPU. Here the backward pass is FlashAttention's (Dao et al. 2022,
appendix B.2) without tiling: the row sums of weight times gradient are computed from the output,
which is n x e, and only the exponentials are stored.

Scores, their maxima and all sums have the precision `logits`, float32 by default; only the stored
n x n arrays have the values' type. Where a TPU's compiler fuses the scores into the next operation,
float32 costs no more than bfloat16.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_scale.models.platforms import choose

Heads = Float[Array, "b n k e"]


def attend(
    q: Heads,
    k: Float[Array, "b m k e"],
    v: Float[Array, "b m k e"],
    logits: str,
    implementation: Literal["xla", "cudnn"],
) -> Heads:
    """Return softmax(q k^T / sqrt(e)) v for each head; `logits` is the precision of the scores.

    "cudnn" is jax.nn.dot_product_attention's kernel, whose scores are float32.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return _attend(q, k, v, logits)


def weights(q: Heads, k: Float[Array, "b m k e"], logits: str) -> Float[Array, "b k n m"]:
    """Return softmax(q k^T / sqrt(e)) in float32, for inspection: `attend` does not store it."""
    exps, total = _exponentials(q * _scale(q), k, logits)
    return exps.astype(jnp.float32) / total


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q, k, v, logits):
    return _forward(q, k, v, logits)[0]


def _scale(q: Array) -> Array:
    return jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


class Layout(NamedTuple):
    """The axes of queries and of keys: images b, queries n, keys m, heads k, channels e."""

    n: str
    m: str


TOKENS_FIRST = Layout("bnke", "bmke")  # as the projections leave them
HEADS_FIRST = Layout("bkne", "bkme")


def _exponentials(q, k, logits, axes=TOKENS_FIRST):
    """Return exp(score - row maximum) in q's type, and the sum of each row."""
    scores = jnp.einsum(f"{axes.n},{axes.m}->bknm", q, k, preferred_element_type=logits)
    exps = jnp.exp(scores - scores.max(axis=-1, keepdims=True)).astype(q.dtype)
    return exps, exps.sum(axis=-1, keepdims=True, dtype=logits)


def _forward(q, k, v, logits):
    def forward(q, k, v, axes=TOKENS_FIRST):
        exps, total = _exponentials(q, k, logits, axes)
        weights = (exps / total).astype(v.dtype)
        out = jnp.einsum(f"bknm,{axes.m}->{axes.n}", weights, v)
        return out, exps, total

    def heads_first(q, k, v):
        out, exps, total = forward(*map(_swap, (q, k, v)), HEADS_FIRST)
        return _swap(out), exps, total

    q = q * _scale(q)  # before both passes, or the unscaled queries would be stored as well
    out, exps, total = choose(q, k, v, cpu=heads_first, others=forward)
    return out, (q, k, v, exps, total, out)


def _backward(logits, residuals, grad):
    def backward(q, k, v, exps, total, out, grad, axes=TOKENS_FIRST):
        n, m = axes
        weights = (exps / total).astype(v.dtype)
        grad_weights = jnp.einsum(f"{n},{m}->bknm", grad, v, preferred_element_type=logits)
        row_sums = jnp.einsum(f"{n},{n}->bkn", grad, out, preferred_element_type=logits)
        grad_scores = (weights * (grad_weights - row_sums[..., None])).astype(v.dtype)
        return (
            jnp.einsum(f"bknm,{m}->{n}", grad_scores, k) * _scale(q),
            jnp.einsum(f"bknm,{n}->{m}", grad_scores, q),
            jnp.einsum(f"bknm,{n}->{m}", weights, grad),
        )

    def heads_first(q, k, v, exps, total, out, grad):
        q, k, v, out, grad = map(_swap, (q, k, v, out, grad))
        return tuple(map(_swap, backward(q, k, v, exps, total, out, grad, HEADS_FIRST)))

    return choose(*residuals, grad, cpu=heads_first, others=backward)


def _swap(x: Array) -> Array:
    """Exchange tokens and heads, in memory as well.

    A CPU's library multiplies matrices that are contiguous, and takes softmax into the product.
    """
    return jax.lax.optimization_barrier(x.swapaxes(1, 2))


_attend.defvjp(_forward, _backward)
