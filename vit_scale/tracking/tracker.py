"""The tracker: metrics to JSON lines, TensorBoard, Weights & Biases and the terminal.

The train loop calls one `Tracker`, which feeds four CLU MetricWriters. Guaranteed: logging never
waits for the newest step; `metrics.jsonl` holds each row once, across kills and resumes; only
process 0 writes; a run ends, with one line, where `metrics.jsonl` can't be written, and never
because of another writer. To a bucket a file is uploaded whole: before each evaluation and
checkpoint, every UPLOAD seconds, and at the end, so that the rows up to a checkpoint's step are
there before the checkpoint.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from vit_scale.distributed import multihost
from vit_scale.errors import DONE, FAILED, RESUMABLE, UserError
from vit_scale.runs import watchdog
from vit_scale.storage.errors import user_errors
from vit_scale.tracking import metrics
from vit_scale.tracking.throughput import Speed
from vit_scale.tracking.wandb_writer import WandbWriter
from vit_scale.tracking.writers import (
    BestEffortWriter,
    JsonLinesWriter,
    MetricWriter,
    MultiWriter,
    TensorBoardWriter,
    TerminalWriter,
    number,
)

# Steps that are dispatched at most: one runs, one waits. Without a bound the host runs ahead, and
# the batches of dispatched steps fill the device's memory.
AHEAD = 2

UPLOAD = 60  # seconds between uploads to a bucket


class TrackedRun(NamedTuple):
    """The run that a `Tracker` reports.

    `description` is what run.json holds: {"name": str, "config": dict, "parameters": str, ...}.
    """

    folder: Path
    cfg: ConfigDict
    description: Mapping[str, Any]
    start: int = 0  # the step restored from a checkpoint
    quiet: bool = False  # print nothing
    # From images per second to model FLOPs utilisation; None where the peak is unknown.
    mfu: Callable[[float], float | None] = lambda images_per_second: None


class Tracker:
    """Write a run's metrics; a context manager, which opens the writers and closes them.

    Train metrics are averaged over the steps since the last row, fetched in one go one step late,
    and written under "train/". `step_seconds`, `images_per_second`, `data_wait_fraction` and `mfu`,
    which leave out the first step (it compiles) and pauses, are in the same row, as are `seconds`
    since this process began.

    `reduce` averages fetched metrics, one per step, into {"loss": ...}; `clock` is the time in
    seconds. Raises UserError where metrics.jsonl can't be written. Any other writer that fails
    prints one line and is dropped.
    """

    def __init__(
        self,
        run: TrackedRun,
        reduce: Callable[[Sequence[Any]], Mapping[str, float]] = metrics.reduce,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.latest: dict[str, float] = {}  # the last train row
        self._run, self._cfg, self._reduce = run, run.cfg, reduce
        self._speed = Speed(run.cfg.data.batch, run.mfu, clock)
        self._pending: list[tuple[int, Any]] = []  # steps whose metrics are still on the device
        self._due = False  # the last of them ends an interval
        self._terminal: BestEffortWriter | None = None
        self._wandb: WandbWriter | None = None
        self._clock, self._uploaded = clock, clock()
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "Tracker":
        with multihost.shared_errors(), self._user_errors(), contextlib.ExitStack() as opened:
            writers = []
            for writer in self._open() if multihost.is_first() else ():
                opened.callback(writer.close)
                writers.append(writer)
            self._writer = MultiWriter(writers)
            description = dict(self._run.description)
            table = description.pop("parameters")
            self._writer.write_hparams(description)
            self._writer.write_texts(self._run.start, {"parameters": table})
            self._opened = opened.pop_all()
        return self

    def _open(self) -> Iterator[MetricWriter]:
        log = self._cfg.log
        self._run.folder.mkdir(parents=True, exist_ok=True)
        yield JsonLinesWriter(self._run.folder / "metrics.jsonl", self._run.start)
        if log.tensorboard:
            yield BestEffortWriter("TensorBoard", self._open_tensorboard)
        if log.wandb:
            yield BestEffortWriter("Weights & Biases", self._open_wandb)
        if not self._run.quiet:  # opened last, closed first: the others' last lines follow the bar
            self._terminal = BestEffortWriter("", self._open_terminal)
            yield self._terminal

    def _open_tensorboard(self) -> MetricWriter:
        return TensorBoardWriter(self._run.folder / "tensorboard", self._run.start)

    def _open_wandb(self) -> MetricWriter:
        folder, name, project = (
            self._run.folder,
            self._run.description["name"],
            self._cfg.log.project,
        )
        self._wandb = WandbWriter(folder, project, name, self._run.quiet)
        return self._wandb

    def _open_terminal(self) -> MetricWriter:
        return TerminalWriter(self._run.description["name"], self._cfg.steps, self._run.start)

    def __exit__(self, kind, error, trace) -> None:
        with self._user_errors(), self._opened:
            if self._wandb:
                self._wandb.exit_code = _exit_code(error)
            crashed = isinstance(error, Exception) and not isinstance(error, UserError)
            if self._pending and not crashed:  # after a crash the device may never answer
                self._log()

    def __call__(self, step: int, measures: Any) -> None:
        """Take the metrics of `step`, which the device may not have begun; write a row that is due.

        `reduce` takes a list of such `measures`; by default they are `clu.metrics` collections.
        """
        if not self._speed.running:
            self._finish_pending()
        self._log_if_due()
        self._pending.append((step, measures))
        self._due = step % self._cfg.log.every == 0 or step == self._cfg.steps
        if len(self._pending) > AHEAD:
            jax.block_until_ready(self._pending[-1 - AHEAD][1])
        watchdog.beat(step)
        if self._terminal:
            self._terminal.advance(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values on the host, such as {"eval/accuracy": 0.9}, at once."""
        self._log_if_due()  # W&B drops rows that are not in the order of steps
        self._write("write_scalars", step, {name: number(value) for name, value in values.items()})

    def images(self, name: str, step: int, images: UInt8[np.ndarray, "b h w 3"]) -> None:
        """Write images to TensorBoard and Weights & Biases."""
        self._log_if_due()
        self._write("write_images", step, {name: np.asarray(images)})

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text to TensorBoard and Weights & Biases."""
        self._log_if_due()
        self._write("write_texts", step, {name: text})

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Time a phase of the loop: "data" waits for the next batch, any other is a pause.

        A pause ("eval", "checkpoint") begins once the device has finished its steps; it writes the
        row that is due, and is left out of the speed.
        """
        if name != "data":
            self._finish_pending()
            self._log_if_due()
        with (
            watchdog.phase(name),
            self._speed.timing(wait=name == "data"),
            jax.profiler.TraceAnnotation(name),
        ):
            if name != "data":
                self._upload()
            yield

    def waiting(self, batches: Iterable) -> Iterator:
        """Yield from `batches`, and count the time until each arrives as waiting for data."""
        iterator, end = iter(batches), object()
        while True:
            with self.timer("data"):
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch

    @property
    def seconds(self) -> float:
        """Wall time since this tracker was made."""
        return self._speed.seconds

    @property
    def images_per_second(self) -> float | None:
        """Mean over all written rows; None before the second step."""
        return self._speed.images_per_second

    def _finish_pending(self) -> None:
        """Wait for the device; after the first step, which compiles, start the stopwatch."""
        if self._pending:
            step, handle = self._pending[-1]
            jax.block_until_ready(handle)
            if not self._speed.running:
                self._speed.start(step)

    def _log_if_due(self) -> None:
        if self._due:
            self._log()

    def _log(self) -> None:
        """Fetch all pending metrics at once, and write their averages at their last step."""
        steps, handles = zip(*self._pending, strict=True)
        self._pending, self._due = [], False
        averages = self._reduce(jax.device_get(list(handles)))
        row = {f"train/{name}": number(value) for name, value in averages.items()}
        self.latest = row | self._speed.lap(steps[-1])
        self._write("write_scalars", steps[-1], self.latest)

    def _write(self, method: str, step: int, values: Mapping[str, Any]) -> None:
        with self._user_errors():
            getattr(self._writer, method)(step, values)
        if self._clock() - self._uploaded >= UPLOAD:
            self._upload()

    def _upload(self) -> None:
        with self._user_errors():
            self._writer.flush()
        self._uploaded = self._clock()

    def _user_errors(self) -> contextlib.AbstractContextManager[None]:
        return user_errors(
            f"cannot write metrics in {self._run.folder}",
            "free space and rerun the same command to resume, or use another --workdir",
            RESUMABLE,
        )


def publish(
    workdir: Path,
    project: str,
    name: str,
    pictures: Mapping[str, UInt8[np.ndarray, "h w 3"]],
    values: Mapping[str, float],
) -> None:
    """Add pictures and values to the Weights & Biases run of a finished training run.

    Works offline without a key, as training does. Raises UserError where the server can't be
    reached.
    """
    writer = WandbWriter(workdir, project, name, strict=True)
    with contextlib.closing(writer):
        writer.append(pictures, values)


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return DONE
    code = getattr(error, "code", FAILED)  # of a UserError or SystemExit
    return code if isinstance(code, int) else FAILED
