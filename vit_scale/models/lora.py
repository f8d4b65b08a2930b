"""Low-rank adapters of a model's kernels (LoRA, Hu et al. 2022, arXiv 2106.09685).

An adapted kernel W has two leaves beside it, `lora_a` of W's input axes and the rank, and `lora_b`
of the rank and W's output axes: "blocks/attention/query/lora_a" (d r), "lora_b" (r k e). The model
computes with W + alpha / rank * A B, which is formed before the forward pass, so that no module
knows of adapters. B starts at zero, and an adapted model as its base.

Unlike the reference implementation there is no dropout of an adapter's input, which no change of W
expresses; and the gradient of the whole W is formed, as when W itself is trained, before it is
multiplied into those of A and B.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from vit_scale.errors import UserError, nearest
from vit_scale.models.build import Model
from vit_scale.models.parameters import MATRICES, named, unite

A, B = "lora_a", "lora_b"


def is_adapter(name: str) -> bool:
    """Return whether a leaf belongs to an adapter."""
    return name.rpartition("/")[2] in (A, B)


class Adapter(NamedTuple):
    """The shapes of one adapter, without the layer axis of stacked blocks."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    layers: int  # that are stacked; 0: none


def adapted(model: Model, cfg: ConfigDict) -> Model:
    """Return `model` with adapters on the kernels that a config's `lora` block names.

    Without any (rank 0) it is `model` itself. Raises UserError if the block is invalid.
    """
    if cfg.rank == 0:
        return model
    adapters = _adapters(cfg, model.abstract_params)
    scale = cfg.alpha / cfg.rank

    def init(key):
        return unite(model.init(key), _initial(adapters, key))

    def merged(function: Callable) -> Callable:
        return lambda params, *rest: function(merge(params, scale), *rest)

    return dataclasses.replace(
        model,
        init=init,
        abstract_params=jax.eval_shape(init, jax.random.key(0)),
        apply=merged(model.apply),
        train=merged(model.train),
        features=merged(model.features),
        attention=model.attention and merged(model.attention),
        encode=merged(model.encode),
    )


def merge(params: dict, scale: float) -> dict:
    """Return the parameters of the model without adapters that computes the same.

    `scale` is alpha / rank. Stacked blocks are merged layer by layer.
    """
    merged = {
        name: merge(leaf, scale) if isinstance(leaf, dict) else leaf
        for name, leaf in params.items()
        if not is_adapter(name)
    }
    if A in params:
        kernel, a, b = params["kernel"], params[A], params[B]
        multiply = _multiply if kernel.ndim == a.ndim + b.ndim - 2 else jax.vmap(_multiply)
        merged["kernel"] = kernel + scale * multiply(a, b)
    return merged


def _multiply(a: Array, b: Array) -> Array:
    # In float32 on a TPU too: one small product a step, and the same weights on every device.
    return jnp.tensordot(a, b, axes=1, precision="highest")


def _adapters(cfg: ConfigDict, params: dict) -> dict[str, Adapter]:
    """Return the adapter of each kernel that `cfg` names. Raises UserError."""
    if not (cfg.rank > 0 and 0 < cfg.alpha < math.inf):
        raise UserError(f"lora.rank={cfg.rank} and lora.alpha={cfg.alpha} must be above 0")
    kernels = {name: leaf.shape for name, leaf in named(params).items() if _axes(name)}
    try:
        chosen = {name: shape for name, shape in kernels.items() if re.search(cfg.kernels, name)}
    except re.error as error:
        raise UserError(
            f"lora.kernels={cfg.kernels!r} is not a regular expression: {error}"
        ) from None
    if not chosen:
        raise UserError(
            f"lora.kernels={cfg.kernels!r} matches no kernel of attention or MLP; "
            f"{nearest(cfg.kernels, kernels)}"
        )
    adapters = {}
    for name, shape in chosen.items():
        inputs, outputs = (tuple(shape[axis] for axis in axes) for axes in _axes(name) or ())
        d, f = math.prod(inputs), math.prod(outputs)
        if cfg.rank >= min(d, f):
            raise UserError(f"lora.rank={cfg.rank} must be below that of {name}, {d} x {f}")
        layers = shape[0] if len(shape) > len(inputs) + len(outputs) else 0
        adapters[name] = Adapter((*inputs, cfg.rank), (cfg.rank, *outputs), layers)
    return adapters


def _axes(name: str) -> tuple[tuple, tuple] | None:
    """Return the input and the output axes of a kernel, counted from the end."""
    return next((axes for end, axes in MATRICES.items() if re.search(end, name)), None)


def _initial(adapters: dict[str, Adapter], key: Array) -> dict:
    """Return the parameters of the adapters: A uniform in +-1 / sqrt(inputs) as in loralib, B zero.

    Draws depend on the name of the kernel and its layer: they are the same stacked and unrolled.
    """
    params: dict = {}
    for name, adapter in adapters.items():
        block = re.match(r"blocks/(\d+)/", name)
        layer = int(block[1]) if block else 0
        plain = name.replace(f"blocks/{layer}/", "blocks/") if block else name
        own = jax.random.fold_in(key, np.uint32(zlib.crc32(plain.encode())))
        layers = jnp.arange(adapter.layers) if adapter.layers else jnp.int32(layer)
        draw = functools.partial(_uniform, own, adapter.a)
        leaves: dict = {
            A: (jax.vmap(draw) if adapter.layers else draw)(layers),
            B: jnp.zeros((*layers.shape, *adapter.b)),
        }
        for part in reversed(name.split("/")[:-1]):
            leaves = {part: leaves}
        params = unite(params, leaves)
    return params


def _uniform(key: Array, shape: tuple[int, ...], layer: Array) -> Array:
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    own = jax.random.fold_in(key, layer)
    return jax.random.uniform(own, shape, minval=-bound, maxval=bound)
