"""Read batches by step, in Grain pipelines.

Element i of a training pipeline is the batch of step `start + i`, a pure function of (source, seed,
step): there is no iterator state to save, and resuming is starting at a later step. Position p of
the endless stream is example p mod n of epoch p div n, permuted by (seed, epoch). Only then does a
process select its rows of the batch, so the global batch is the same for any number of processes.
"""

import atexit
import contextlib
import functools
import os
import sys
import weakref
from collections.abc import Generator, Iterable

import grain
import numpy as np
from absl import flags
from jaxtyping import Int
from ml_collections import ConfigDict
from tqdm import tqdm

from vit_scale.augment.random_crop import ExampleDraws
from vit_scale.data import workers as processes
from vit_scale.data.balanced import BalancedOrder
from vit_scale.data.mixtures import Mixture
from vit_scale.data.orders import permutation
from vit_scale.data.sources import Batch, InMemory, Source, empty_batch
from vit_scale.errors import UserError

DECODE_BATCH = 64  # images per batch while `in_memory` reads a set


def train_batches(
    source: Source,
    cfg: ConfigDict,
    seed: int,
    start: int,
    stop: int | None = None,
    rows: Int[np.ndarray, "r"] | None = None,
) -> Generator[tuple[int, Batch], None, None]:
    """Yield (step, batch) for the steps start, start + 1, ..., stop - 1, or without end.

    Each epoch visits every example once, in its own order; a batch may span two epochs, so none is
    short. With cfg.repeats, a batch is that of as many fewer examples, several times over (repeated
    augmentation, Hoffer et al. 2020); the last ones once less if the batch is not a multiple. With
    cfg.sampling=balanced each class is visited equally often instead (`BalancedOrder`). Close the
    iterator to end its workers.

    Args:
      source: the training set.
      cfg: the config's data block; cfg.batch is the global batch.
      seed: of the shuffling.
      start: the first step.
      stop: the step after the last one.
      rows: this process's rows of the global batch; None: all.
    """
    balanced = BalancedOrder(source) if cfg.sampling == "balanced" else None
    batches = TrainBatches(source, cfg.batch, seed, start, stop, rows, cfg.repeats, balanced)
    with contextlib.closing(_read(batches, cfg.workers)) as reader:
        yield from enumerate(reader, start)


def eval_batches(
    source: Source, batch: int, rows: Int[np.ndarray, "r"] | None = None, workers: int = 0
) -> Generator[Batch, None, None]:
    """Yield every example once, in order, in global batches of `batch`, the last one padded.

    Padding is zeros with mask False. A process gets its `rows` of each batch, and as many batches
    as every other process. `workers` is the number of decoding processes.
    """
    return _read(EvalBatches(source, batch, rows), workers)


def in_memory(source: Source, workers: int) -> InMemory:
    """Read all of `source` into memory. Raises UserError if this machine has too little."""
    n, (h, w) = len(source), source.size
    needed, memory = n * h * w * 3, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UserError(
            f"data.memory: {n} images x {h} x {w} x 3 = {needed / 2**30:.1f} GiB do not fit in "
            f"{memory / 2**30:.1f} GiB of memory; set data.memory=False or a smaller data.load"
        )
    whole = empty_batch(source, n)
    with tqdm(total=n, desc=f"decode {source.name}", unit="image", disable=None) as bar:
        for number, batch in enumerate(eval_batches(source, DECODE_BATCH, workers=workers)):
            first = number * DECODE_BATCH
            count = min(DECODE_BATCH, n - first)
            for name, values in whole.items():
                values[first : first + count] = batch[name][:count]  # type: ignore[literal-required, index]
            bar.update(count)
    images, labels, target = whole["image"], whole["label"], whole.get("target")
    if hasattr(source, "labels"):  # which those of corrupt images have too
        (labels if target is None else target)[:] = source.labels(np.arange(n))
    return InMemory(source.name, images, labels, source.classes, whole["mask"], target)


class TrainBatches:
    """A Grain source: element i is this process's part of the batch of step `start + i`."""

    def __init__(
        self,
        source: Source,
        batch: int,
        seed: int,
        start: int,
        stop: int | None,
        rows: Int[np.ndarray, "r"] | None,
        repeats: int = 1,
        balanced: BalancedOrder | None = None,
    ):
        self.source, self._balanced = source, balanced
        self._batch, self._seed, self._start = batch, seed, start
        self._repeats = repeats
        self._steps = max(0, (sys.maxsize if stop is None else stop) - start)
        self._rows = np.arange(batch) if rows is None else rows
        self.rows = len(self._rows)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Batch:
        step = self._start + index
        indices = self._indices(step)
        if not getattr(self.source, "crops", False):
            return self.source.read(indices)
        draws = [ExampleDraws(self._seed, step, row) for row in self._rows.tolist()]
        return self.source.read(indices, draws)  # type: ignore[call-arg]

    def _indices(self, step: int) -> Int[np.ndarray, "r"]:
        """Return the example of each of this process's rows."""
        if not isinstance(self.source, Mixture):
            images = -(-self._batch // self._repeats)
            positions = step * images + self._rows % images
            if self._balanced:
                return self._balanced.examples(positions, self._seed)
            return shuffled(positions, len(self.source), self._seed)
        which, positions = self.source.chosen(step, self._batch, self._rows, self._seed)
        indices = np.empty_like(positions)
        for number, length in enumerate(self.source.lengths):
            own = which == number
            examples = shuffled(positions[own], length, self._seed + number)
            indices[own] = self.source.index(number, examples)
        return indices


class EvalBatches:
    """A Grain source: element i is this process's part of the i-th batch, padded."""

    def __init__(self, source: Source, batch: int, rows: Int[np.ndarray, "r"] | None):
        self.source = source
        self._batch = batch
        self._rows = np.arange(batch) if rows is None else rows
        self.rows = len(self._rows)

    def __len__(self) -> int:
        return -(-len(self.source) // self._batch)

    def __getitem__(self, index: int) -> Batch:
        indices = index * self._batch + self._rows
        batch = self.source.read(indices[indices < len(self.source)])
        padded = empty_batch(self.source, len(indices))
        for name, values in padded.items():
            values[: len(batch["mask"])] = batch[name]  # type: ignore[literal-required, index]
        return padded


def shuffled(positions: Int[np.ndarray, "n"], n: int, seed: int) -> Int[np.ndarray, "n"]:
    """Return the example at each position of the endless stream of shuffled epochs."""
    epochs, offsets = np.divmod(positions, n)
    examples = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        examples[chosen] = _order(n, seed, int(epoch))[offsets[chosen]]
    return examples


EPOCHS = 4  # orders that are kept of a set: a batch may span two, and two sets be as large


@functools.lru_cache(maxsize=32)  # sets of a mixture
def _orders(n: int, seed: int) -> dict[int, Int[np.ndarray, "n"]]:
    """Return the latest orders of a set's examples, by epoch."""
    return {}


def _order(n: int, seed: int, epoch: int) -> Int[np.ndarray, "n"]:
    orders = _orders(n, seed)
    order = orders.get(epoch)
    if order is None:
        order = permutation(n, seed, epoch)
        for old in sorted(orders)[: 1 - EPOCHS]:
            orders.pop(old, None)  # another thread may have done it
        orders[epoch] = order
    return order


def _read(batches: TrainBatches | EvalBatches, workers: int) -> Generator[Batch, None, None]:
    """Read batches in order, ahead of time in a thread, or in processes if the source decodes."""
    dataset = grain.MapDataset.source(batches).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=processes.READ_AHEAD)
    )
    size = shared_bytes(batches.source, batches.rows, 1, workers)
    if size:
        needed = shared_bytes(batches.source, batches.rows, len(batches), workers)
        processes.check_shared_memory(needed, workers, size)
        _prepare_for_workers()
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=processes.READ_AHEAD)
        dataset = dataset.mp_prefetch(options, worker_init_fn=processes.attach_to_parent).map(_own)
    reader = _closing(dataset, workers, size)
    _open.add(reader)
    return reader


def shared_bytes(source: Source, rows: int, batches: int, workers: int) -> int:
    """Return the shared memory that reading `batches` of `rows` images needs at a time."""
    if not workers or not source.decodes:
        return 0
    example = sum(values.nbytes for values in empty_batch(source, 1).values())  # type: ignore[attr-defined]
    return processes.in_flight(workers, batches) * rows * example


def check_shared_memory(parts: Iterable[tuple[Source, int, int]], workers: int) -> None:
    """Raise UserError if shared memory is too small for sets that are read at the same time.

    `parts` are (source, images per batch in this process, number of batches).
    """
    parts = list(parts)
    needed = sum(shared_bytes(*part, workers) for part in parts)
    largest = max(shared_bytes(source, rows, 1, workers) for source, rows, _ in parts)
    processes.check_shared_memory(needed, workers, largest)


def _closing(dataset: grain.IterDataset, workers: int, size: int) -> Generator[Batch, None, None]:
    errors = processes.user_errors(workers, size) if size else contextlib.nullcontext()
    with errors, contextlib.closing(iter(dataset)) as iterator:
        yield from iterator


def _own(batch: Batch) -> Batch:
    """Copy a batch out of shared memory, which goes away with its worker."""
    return {name: np.array(values) for name, values in batch.items()}  # type: ignore[return-value]


_open: weakref.WeakSet[Generator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End workers and free shared memory before the interpreter shuts down."""
    for reader in list(_open):
        with contextlib.suppress(ValueError):  # it is running, in a thread that is about to end
            reader.close()


def _prepare_for_workers() -> None:
    """Parse absl's flags, which Grain needs and a notebook never does, and silence a warning.

    Python's resource tracker frees the shared memory of batches that are in flight when a run
    stops, and warns of each; its process inherits the filters in sys.warnoptions.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    processes.spawn_without_main()
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    if quiet not in sys.warnoptions:
        sys.warnoptions.append(quiet)
