"""Batches by step: the Grain pipelines between a source and the device.

Element i of a training pipeline is the batch of step `start + i`, a pure function of (source, seed,
step): there is no iterator state to save, and resuming is starting at another step. Position p of
the endless stream is example p mod n of epoch p div n, shuffled by a permutation of (seed, epoch);
a process takes its rows of the batch after all that, so every number of processes sees the same
global batch.
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
from absl import flags  # the one place outside config.py and cli.py, for `_workers_allowed`
from jaxtyping import Int
from ml_collections import ConfigDict
from tqdm import tqdm

from vit_scale.data import workers as processes
from vit_scale.data.sources import Batch, InMemory, Source
from vit_scale.errors import UserError

DECODE_BATCH = 64  # images that go from a worker to `in_memory` at once


def train_batches(
    source: Source,
    cfg: ConfigDict,
    seed: int,
    start: int,
    stop: int | None = None,
    rows: Int[np.ndarray, "r"] | None = None,
) -> Generator[tuple[int, Batch], None, None]:
    """(step, batch) for the steps start, start + 1, ... stop - 1, or without end.

    A batch is this process's part of the global batch of cfg.batch: its `rows`, or all of it. Every
    epoch visits each example once, in an order of its own; batches run over its end, so none is
    ever short. `cfg` is the configuration's data block. Close the iterator to end its workers.
    """
    batches = TrainBatches(source, cfg.batch, seed, start, stop, rows)
    with contextlib.closing(_read(batches, cfg.workers)) as reader:
        yield from enumerate(reader, start)


def eval_batches(
    source: Source, batch: int, rows: Int[np.ndarray, "r"] | None = None, workers: int = 0
) -> Generator[Batch, None, None]:
    """Every example once, in order, in global batches of `batch`, the last one padded.

    Padding is zeros with mask False. A process gets its `rows` of each batch, and as many batches
    as every other process. `workers`: processes that decode, for sources that do.
    """
    return _read(EvalBatches(source, batch, rows), workers)


def in_memory(source: Source, workers: int) -> InMemory:
    """All of `source`, read once. Raises UserError if this machine hasn't the memory."""
    n, (h, w) = len(source), source.size
    needed, there = n * h * w * 3, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"data.memory: {n} images x {h} x {w} x 3 = {needed / 2**30:.1f} GiB do not fit in "
            f"{there / 2**30:.1f} GiB of memory; set data.memory=False or a smaller data.load"
        )
    images, labels = np.empty((n, h, w, 3), np.uint8), np.empty(n, np.int32)
    mask = np.empty(n, bool)
    with tqdm(total=n, desc=f"decode {source.name}", unit="image", disable=None) as bar:
        for number, batch in enumerate(eval_batches(source, DECODE_BATCH, workers=workers)):
            first = number * DECODE_BATCH
            real = min(DECODE_BATCH, n - first)
            part = slice(first, first + real)
            images[part], labels[part] = batch["image"][:real], batch["label"][:real]
            mask[part] = batch["mask"][:real]
            bar.update(real)
    return InMemory(source.name, images, labels, source.classes, mask)


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
    ):
        self.source = source
        self._batch, self._seed, self._start = batch, seed, start
        self._steps = max(0, (sys.maxsize if stop is None else stop) - start)
        self._rows = np.arange(batch) if rows is None else rows
        self.rows = len(self._rows)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Batch:
        first = (self._start + index) * self._batch
        return self.source.read(shuffled(first + self._rows, len(self.source), self._seed))


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
        wanted = index * self._batch + self._rows
        found = self.source.read(wanted[wanted < len(self.source)])
        missing = len(wanted) - len(found["mask"])
        return {
            "image": np.pad(found["image"], [(0, missing), (0, 0), (0, 0), (0, 0)]),
            "label": np.pad(found["label"], (0, missing)),
            "mask": np.pad(found["mask"], (0, missing)),
        }


def shuffled(positions: Int[np.ndarray, "n"], n: int, seed: int) -> Int[np.ndarray, "n"]:
    """The example at each position of the endless stream of shuffled epochs of n examples."""
    epochs, places = np.divmod(positions, n)
    examples = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        examples[here] = _order(n, seed, int(epoch))[places[here]]
    return examples


@functools.lru_cache(maxsize=2)  # a batch at the end of an epoch needs the next one's order as well
def _order(n: int, seed: int, epoch: int) -> Int[np.ndarray, "n"]:
    # RandomState's stream is frozen (NEP 19): the order survives an upgrade of numpy.
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    return np.random.RandomState(bits).permutation(n)


def _read(batches: TrainBatches | EvalBatches, workers: int) -> Generator[Batch, None, None]:
    """The batches in order, read ahead by a thread, or by processes where the source decodes."""
    dataset = grain.MapDataset.source(batches).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=processes.READ_AHEAD)
    )
    size = shared_bytes(batches.source, batches.rows, 1, workers)
    if size:
        needed = shared_bytes(batches.source, batches.rows, len(batches), workers)
        processes.check_room(needed, workers, size)
        _workers_allowed()
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=processes.READ_AHEAD)
        dataset = dataset.mp_prefetch(options, worker_init_fn=processes.attach_to_parent).map(_own)
    reader = _closing(dataset, workers, size)
    _open.add(reader)
    return reader


def shared_bytes(source: Source, rows: int, batches: int, workers: int) -> int:
    """The shared memory that reading so many batches of `rows` images takes at a time; 0: none."""
    if not workers or not source.decodes:
        return 0
    h, w = source.size
    return processes.held(workers, batches) * rows * (h * w * 3 + 4 + 1)  # image, label, mask


def check_shared_memory(parts: Iterable[tuple[Source, int, int]], workers: int) -> None:
    """Raises UserError where shared memory can't hold what is read at the same time.

    `parts` are (source, images in a batch of this process, batches).
    """
    parts = list(parts)
    needed = sum(shared_bytes(*part, workers) for part in parts)
    largest = max(shared_bytes(source, rows, 1, workers) for source, rows, _ in parts)
    processes.check_room(needed, workers, largest)


def _closing(dataset: grain.IterDataset, workers: int, size: int) -> Generator[Batch, None, None]:
    reasons = processes.one_line(workers, size) if size else contextlib.nullcontext()
    with reasons, contextlib.closing(iter(dataset)) as iterator:
        yield from iterator


def _own(batch: Batch) -> Batch:
    """A copy, because a worker's arrays lie in memory that it shares and takes with it."""
    return {
        "image": np.array(batch["image"]),
        "label": np.array(batch["label"]),
        "mask": np.array(batch["mask"]),
    }


_open: weakref.WeakSet[Generator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Workers end, and shared memory is given back, before the interpreter takes itself apart."""
    for reader in list(_open):
        with contextlib.suppress(ValueError):  # it is running, in a thread that is about to end
            reader.close()


def _workers_allowed() -> None:
    """Grain reads absl's flags when it starts workers, and a notebook never parses any.

    Batches on their way when a run stops lie in shared memory that Python's resource tracker gives
    back. It warns of each time it is of use; its process takes its filters from this list.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    processes.spawn_without_main()
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    if quiet not in sys.warnoptions:
        sys.warnoptions.append(quiet)
