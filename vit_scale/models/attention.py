"""Softmax attention with a backward pass of its own, which touches the n x n weights less often.

What automatic differentiation makes of a softmax reads and writes the weights of all pairs of
tokens several times; on a TPU that is most of what attention takes. Here the backward pass is that
of FlashAttention (Dao et al. 2022, appendix B.2) without its tiles: the sum over a row of weight
times gradient is taken from the output, which is n x e, and only the exponentials are kept.

Scores, their maximum and all sums are float32 if nothing else is said, whatever the type of the
values: in bfloat16 is only what has the size n x n and is stored. Where a TPU's compiler fuses the
scores into what follows them, that takes no longer than scores in bfloat16.
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
    """softmax(q k^T / sqrt(e)) v of each head; `logits` is the precision up to the weights.

    cudnn is its own implementation, of float32 logits.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return _attend(q, k, v, logits)


def weights(q: Heads, k: Float[Array, "b m k e"], logits: str) -> Float[Array, "b k n m"]:
    """softmax(q k^T / sqrt(e)), as float32: what `attend` sums v with, before it is rounded.

    Nothing that trains calls it: there the weights of a block are gone when the block is done.
    """
    exps, total = _exponentials(q * _scale(q), k, logits)
    return exps.astype(jnp.float32) / total


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q, k, v, logits):
    return _forward(q, k, v, logits)[0]


def _scale(q: Array) -> Array:
    return jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


def _exponentials(q, k, logits):
    """exp(score - the row's maximum) in the type of q, and the sum of each row."""
    scores = jnp.einsum("bnke,bmke->bknm", q, k, preferred_element_type=logits)
    exps = jnp.exp(scores - scores.max(axis=-1, keepdims=True)).astype(q.dtype)
    return exps, exps.sum(axis=-1, keepdims=True, dtype=logits)


def _forward(q, k, v, logits):
    q = q * _scale(q)  # what backward needs as well: the unscaled ones would be kept beside them
    exps, total = _exponentials(q, k, logits)
    weights = (exps / total).astype(v.dtype)
    out = jnp.einsum("bknm,bmke->bnke", weights, v)
    return out, (q, k, v, exps, total, out)


def _backward(logits, kept, grad):
    q, k, v, exps, total, out = kept
    weights = (exps / total).astype(v.dtype)
    of_weights = jnp.einsum("bnke,bmke->bknm", grad, v, preferred_element_type=logits)
    row = jnp.einsum("bnke,bnke->bkn", grad, out, preferred_element_type=logits)
    of_scores = (weights * (of_weights - row[..., None])).astype(v.dtype)
    return (
        jnp.einsum("bknm,bmke->bnke", of_scores, k) * _scale(q),
        jnp.einsum("bknm,bnke->bmke", of_scores, q),
        jnp.einsum("bknm,bnke->bmke", weights, grad),
    )


_attend.defvjp(_forward, _backward)
