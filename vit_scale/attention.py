"""Softmax attention with a backward pass of its own, which touches the n x n weights less often.

What automatic differentiation makes of a softmax reads and writes the weights of all pairs of
tokens several times; on a TPU that is most of what attention takes. Here the backward pass is that
of FlashAttention (Dao et al. 2022, appendix B.2) without its tiles: the sum over a row of weight
times gradient is taken from the output, which is n x e, and only the exponentials are kept.

Scores, their maximum and all sums are float32, whatever the type of the values: in bfloat16 is only
what has the size n x n and is stored. A compiler that fuses the scores into what follows them then
takes no longer than for scores in bfloat16.
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
    implementation: Literal["xla", "cudnn"],
) -> Heads:
    """softmax(q k^T / sqrt(e)) v of each head."""
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return _attend(q, k, v)


def weights(q: Heads, k: Float[Array, "b m k e"]) -> Float[Array, "b k n m"]:
    """softmax(q k^T / sqrt(e)), in float32: what `attend` sums v with.

    Nothing that trains calls it: there the weights of a block are gone when the block is done.
    """
    exps, total = _exponentials(q * _scale(q), k)
    return exps / total


@jax.custom_vjp
def _attend(q, k, v):
    return _forward(q, k, v)[0]


def _scale(q: Array) -> Array:
    return jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _exponentials(q, k):
    """exp(score - the row's maximum) in the type of q, and the sum of each row, float32."""
    scores = _einsum("bnke,bmke->bknm", q, k)
    exps = jnp.exp(scores - scores.max(axis=-1, keepdims=True)).astype(q.dtype)
    return exps, exps.sum(axis=-1, keepdims=True, dtype=jnp.float32)


def _forward(q, k, v):
    q = q * _scale(q)  # what backward needs as well: the unscaled ones would be kept beside them
    exps, total = _exponentials(q, k)
    weights = (exps / total).astype(v.dtype)
    out = jnp.einsum("bknm,bmke->bnke", weights, v)
    return out, (q, k, v, exps, total, out)


def _backward(kept, grad):
    q, k, v, exps, total, out = kept
    weights = (exps / total).astype(v.dtype)
    of_weights = _einsum("bnke,bmke->bknm", grad, v)
    row = _einsum("bnke,bnke->bkn", grad, out)
    of_scores = (weights * (of_weights - row[..., None])).astype(v.dtype)
    return (
        jnp.einsum("bknm,bmke->bnke", of_scores, k) * _scale(q),
        jnp.einsum("bknm,bnke->bmke", of_scores, q),
        jnp.einsum("bknm,bnke->bmke", weights, grad),
    )


_attend.defvjp(_forward, _backward)
