"""Cosine similarities of every example with every example of a bank, on all devices.

The bank's rows are cut into blocks of one size, whatever the mesh, and each device has whole
blocks. Queries come in chunks of one size. So a similarity is the result of the same matrix product
for every number of devices and hosts: not only nearly the same, but the same.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from vit_scale.distributed import multihost, preemption
from vit_scale.distributed.mesh import AXES
from vit_scale.distributed.sharding import shard
from vit_scale.runs import watchdog

BLOCK = 2048  # rows of a bank in one matrix product
CHUNK = 512  # queries in one matrix product


def unit_rows(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Return rows of length 1, float32; a row of zeros stays one."""
    lengths = np.sqrt(np.einsum("nd,nd->n", features, features, dtype=np.float64))
    return (features / np.maximum(lengths, 1e-12)[:, None]).astype(np.float32)


class Bank:
    """Unit vectors on the devices of a mesh, each with its own blocks."""

    def __init__(self, features: Float[np.ndarray, "n d"], mesh: Mesh):
        self.n, self.mesh = len(features), mesh
        blocks = -(-self.n // BLOCK)
        blocks += -blocks % mesh.size
        padded = np.zeros((blocks * BLOCK, features.shape[1]), np.float32)
        padded[: self.n] = unit_rows(features)
        self._blocks = shard(
            padded.reshape(blocks, BLOCK, -1), NamedSharding(mesh, PartitionSpec(AXES))
        )

    def nearest(
        self, queries: Float[np.ndarray, "m d"], k: int
    ) -> Iterator[tuple[Float[np.ndarray, "b k"], Int[np.ndarray, "b k"]]]:
        """Yield the k most similar rows of each query, in descending order: similarities, indices.

        Of equally similar rows, those of smaller index come first. Queries come chunk by chunk.
        """
        search = _nearest(self.mesh, k)
        for chunk, _ in _chunks(queries, "neighbours"):
            count = min(CHUNK, len(queries) - chunk * CHUNK)
            rows = unit_rows(_padded(queries, chunk))
            similarities, indices = jax.device_get(search(self._blocks, rows, self.n))
            yield similarities[:count], indices[:count]

    def mean_exponential(self, factor: float, features: Float[np.ndarray, "n d"]) -> float:
        """Return the mean of exp(factor * (similarity - 1)) over all pairs of two rows.

        `features` are those of the bank, once more.
        """
        total, sums = 0.0, _exponential_sums(self.mesh)
        for chunk, first in _chunks(features, "pairs"):
            rows = unit_rows(_padded(features, chunk))
            parts = sums(self._blocks, rows, self.n, first, np.float32(factor))
            total += float(np.asarray(parts, np.float64).sum())
        return total / (self.n * (self.n - 1))


def _chunks(queries: np.ndarray, what: str) -> Iterator[tuple[int, int]]:
    """Yield the number of each chunk, and its first row."""
    with tqdm(
        total=len(queries),
        desc=what,
        unit="image",
        disable=None if multihost.is_first() else True,
        leave=False,
    ) as bar:
        for first in range(0, len(queries), CHUNK):
            yield first // CHUNK, first
            watchdog.beat()
            preemption.check("while probing")
            bar.update(min(CHUNK, len(queries) - first))


def _padded(queries: np.ndarray, chunk: int) -> Float[np.ndarray, "b d"]:
    """Return a chunk of queries, the last one with rows of zeros."""
    part = queries[chunk * CHUNK : (chunk + 1) * CHUNK]
    return np.concatenate([part, np.zeros((CHUNK - len(part), part.shape[1]), part.dtype)])


def _similarities(queries: Float[Array, "q d"], block: Float[Array, "r d"]) -> Float[Array, "q r"]:
    # In full precision: an accelerator's default rounds to 8 or 11 bits.
    return jnp.einsum("qd,rd->qr", queries, block, precision=jax.lax.Precision.HIGHEST)


def _local_blocks(blocks: Float[Array, "m r d"]) -> tuple[Int[Array, "m"], Float[Array, "m r d"]]:
    """Return the index of the first row of each of a device's blocks, and the blocks."""
    count = blocks.shape[0]
    return (jax.lax.axis_index(AXES) * count + jnp.arange(count)) * BLOCK, blocks


@functools.cache
def _nearest(mesh: Mesh, k: int):
    """Return the compiled search for the k nearest rows: (blocks, queries, n) -> both arrays."""

    def local(blocks, queries, n):
        def step(best, block):
            first, rows = block
            indices = first + jnp.arange(BLOCK)
            similarities = jnp.where(indices < n, _similarities(queries, rows), -jnp.inf)
            values, positions = jax.lax.top_k(similarities, min(k, BLOCK))
            return _merged(best, (values, first + positions), k), None

        start = jnp.full((CHUNK, k), -jnp.inf), jnp.zeros((CHUNK, k), jnp.int32)
        best, _ = jax.lax.scan(step, start, _local_blocks(blocks))
        # In the order of the devices, hence of the rows: `top_k` prefers the first of equals.
        gathered = [jax.lax.all_gather(x, AXES, axis=1, tiled=True) for x in best]
        return _merged(None, tuple(gathered), k)

    return _compiled(local, mesh, inputs=2)


def _merged(best, more, k: int):
    """Return the k largest of (values, indices), of two pairs of them that follow each other."""
    if best is not None:
        more = tuple(jnp.concatenate(pair, axis=1) for pair in zip(best, more, strict=True))
    values, positions = jax.lax.top_k(more[0], k)
    return values, jnp.take_along_axis(more[1], positions, axis=1)


@functools.cache
def _exponential_sums(mesh: Mesh):
    """Return the compiled sums of a chunk with each block, without pairs of a row with itself."""

    def local(blocks, queries, n, first_query, factor):
        own = first_query + jnp.arange(CHUNK)

        def step(_, block):
            first, rows = block
            other = first + jnp.arange(BLOCK)
            is_pair = (own[:, None] < n) & (other < n) & (own[:, None] != other)
            terms = jnp.exp(factor * (_similarities(queries, rows) - 1))
            return None, jnp.where(is_pair, terms, 0).sum()

        _, sums = jax.lax.scan(step, None, _local_blocks(blocks))
        return jax.lax.all_gather(sums, AXES, tiled=True)

    return _compiled(local, mesh, inputs=4)


def _compiled(local, mesh: Mesh, inputs: int):
    """Return `local`, of a device's blocks and `inputs` equal on all devices, as a program."""
    specs = (PartitionSpec(AXES), *(PartitionSpec(),) * inputs)
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    )
