"""Integrity of checkpoints: fingerprints of arrays, and the manifest that holds them.

Storage corrupts data more often than it reports, and a flipped bit in a checkpoint restores as a
silently wrong weight. So a checkpoint carries a manifest: the step, the description of the run, and
a 64-bit fingerprint of each array, computed on the device before writing and compared on the device
after reading. That costs one pass over the arrays in device memory and no second read of the files,
and is independent of how many devices or hosts hold them.
"""

import hashlib
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32

from vit_scale.models.parameters import named

MANIFEST = "manifest"


class Damaged(ValueError):
    """Raised for data that differs from what was written."""


def fingerprints(tree: PyTree) -> dict[str, str]:
    """Return {"blocks/mlp/up/kernel": "float32[192,768] 1c9f86d081884c7d", ...} of a tree.

    A change of a single element always changes its array's fingerprint; any other change does with
    probability 1 - 2^-64. Bits are compared: NaN equals the same NaN, and 0.0 differs from -0.0.
    """
    leaves = named(tree)
    # One at a time: concurrent reductions over the same CPU devices block each other.
    sums = [jax.device_get(_sums(leaf)) for leaf in leaves.values()]
    return {
        name: f"{leaf.dtype}{list(leaf.shape)} {first:08x}{second:08x}".replace(", ", ",")
        for (name, leaf), (first, second) in zip(leaves.items(), sums, strict=True)
    }


@jax.jit
def _sums(x: Array) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """Return two sums modulo 2^32 of hashes of every element's bits and index.

    Integer sums don't depend on order, hence neither on how x is sharded.
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, f"uint{min(8 * x.dtype.itemsize, 32)}")
    bits, position = bits.astype(jnp.uint32), jnp.uint32(0)
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size) + index
    first = _scramble(bits ^ _scramble(position + jnp.uint32(1)))
    second = _scramble(bits + _scramble(position ^ jnp.uint32(0x9E3779B9)))
    return first.sum(dtype=jnp.uint32), second.sum(dtype=jnp.uint32)


def _scramble(x: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """Apply MurmurHash3's finaliser (Appleby): a bijection that mixes all bits of x."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def make_manifest(
    step: int, description: Mapping, trees: Mapping[str, PyTree], **more: str
) -> dict:
    """Return the manifest of a checkpoint, with the fingerprints of {"params": tree, ...}."""
    arrays = fingerprints(dict(trees))
    content = {"step": step, "description": description, "arrays": arrays, **more}
    return with_checksum(content)


def with_checksum(content: Mapping) -> dict:
    """Return JSON `content` with a checksum of itself added."""
    return {**content, "checksum": _checksum(content)}


def check_checksum(content: object) -> dict:
    """Return the content of `with_checksum`. Raises Damaged where the checksum doesn't match."""
    if not isinstance(content, dict) or "checksum" not in content:
        raise Damaged("it has no checksum")
    rest = {name: value for name, value in content.items() if name != "checksum"}
    if content["checksum"] != _checksum(rest):
        raise Damaged("its content does not match its checksum")
    return rest


def _checksum(content: Mapping) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_arrays(content: Mapping, trees: Mapping[str, PyTree]) -> None:
    """Raise Damaged where an array of `trees` differs from the manifest's fingerprint."""
    actual = fingerprints(dict(trees))
    written = {name: f for name, f in content["arrays"].items() if name.partition("/")[0] in trees}
    wrong = [name for name in {**written, **actual} if written.get(name) != actual.get(name)]
    if wrong:
        name = wrong[0]
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(
            f"{name} was written as {written.get(name)} but is read as {actual.get(name)}{more}"
        )
