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
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def _exponentials(q, k, logits):
    """Return exp(score - row maximum) in q's type, and the sum of each row."""
    scores = jnp.einsum("bnke,bmke->bknm", q, k, preferred_element_type=logits)
    exps = jnp.exp(scores - scores.max(axis=-1, keepdims=True)).astype(q.dtype)
    return exps, exps.sum(axis=-1, keepdims=True, dtype=logits)


def _forward(q, k, v, logits):
    q = q * _scale(q)  # before both passes, or the unscaled queries would be stored as well
    exps, total = _exponentials(q, k, logits)
    weights = (exps / total).astype(v.dtype)
    out = jnp.einsum("bknm,bmke->bnke", weights, v)
    return out, (q, k, v, exps, total, out)


def _backward(logits, residuals, grad):
    q, k, v, exps, total, out = residuals
    weights = (exps / total).astype(v.dtype)
    grad_weights = jnp.einsum("bnke,bmke->bknm", grad, v, preferred_element_type=logits)
    row_sums = jnp.einsum("bnke,bnke->bkn", grad, out, preferred_element_type=logits)
    grad_scores = (weights * (grad_weights - row_sums[..., None])).astype(v.dtype)
    return (
        jnp.einsum("bknm,bmke->bnke", grad_scores, k) * _scale(q),
        jnp.einsum("bknm,bnke->bmke", grad_scores, q),
        jnp.einsum("bknm,bnke->bmke", weights, grad),
    )


_attend.defvjp(_forward, _backward)
