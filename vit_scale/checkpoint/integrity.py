"""Whether what is read is what was written: fingerprints of arrays, and the manifest with them.

Storage gives back other bytes than it was given more often than it says so, and a flipped bit in a
checkpoint's values restores as a wrong weight without a word. So a checkpoint carries a manifest:
the step, the description of the run, and 64 bits of each array, taken from the device before it is
written and compared on the device after it is read. It costs a pass over the arrays where they are,
no second reading of files, and does not depend on how many devices or hosts hold them.
"""

import hashlib
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32

MANIFEST = "manifest"


class Damaged(ValueError):
    """What was read is not what was written; says what."""


def fingerprints(tree: PyTree) -> dict[str, str]:
    """{"blocks/mlp/up/kernel": "float32[192,768] 1c9f86d081884c7d", ...} of a tree of arrays.

    A change of any one element changes its array's fingerprint for certain, any other change with
    probability 1 - 2^-64. Bits are compared, so NaN equals the same NaN, and 0.0 is not -0.0.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    # One after the other: programs that all reduce over the same CPU devices wait for each other.
    sums = [jax.device_get(_sums(leaf)) for _, leaf in leaves]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}{list(leaf.shape)} {first:08x}{second:08x}".replace(", ", ",")
        )
        for (path, leaf), (first, second) in zip(leaves, sums, strict=True)
    }


@jax.jit
def _sums(x: Array) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """Two sums modulo 2^32, over the elements, of hashes of an element's bits and its place.

    Integers add up to the same in any order: the sums don't depend on how x is sharded.
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, f"uint{min(8 * x.dtype.itemsize, 32)}")
    bits, place = bits.astype(jnp.uint32), jnp.uint32(0)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    first = _scramble(bits ^ _scramble(place + jnp.uint32(1)))
    second = _scramble(bits + _scramble(place ^ jnp.uint32(0x9E3779B9)))
    return first.sum(dtype=jnp.uint32), second.sum(dtype=jnp.uint32)


def _scramble(x: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """MurmurHash3's finaliser (Appleby): one to one, and each bit of it depends on all of x."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def manifest(step: int, description: Mapping, trees: Mapping[str, PyTree]) -> dict:
    """What a checkpoint says of itself; {"params": tree, ...} are fingerprinted."""
    content = {"step": step, "description": description, "arrays": fingerprints(dict(trees))}
    return signed(content)


def signed(content: Mapping) -> dict:
    """`content`, which JSON holds, with the checksum of all the rest."""
    return {**content, "checksum": _checksum(content)}


def check_signed(content: object) -> dict:
    """`content` of `signed`. Raises Damaged where it is not what its checksum says."""
    if not isinstance(content, dict) or "checksum" not in content:
        raise Damaged("it has no checksum")
    rest = {name: value for name, value in content.items() if name != "checksum"}
    if content["checksum"] != _checksum(rest):
        raise Damaged("its content is not what its checksum says")
    return rest


def _checksum(content: Mapping) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_arrays(content: Mapping, trees: Mapping[str, PyTree]) -> None:
    """Raises Damaged where an array of `trees` is not the one that a manifest describes."""
    there = fingerprints(dict(trees))
    written = {name: f for name, f in content["arrays"].items() if name.partition("/")[0] in trees}
    wrong = [name for name in {**written, **there} if written.get(name) != there.get(name)]
    if wrong:
        name = wrong[0]
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(
            f"{name} was written as {written.get(name)} and is read as {there.get(name)}{more}"
        )
