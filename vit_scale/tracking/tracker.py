"""What a run reports while it trains: JSON lines, TensorBoard, Weights & Biases and the terminal.

Four CLU MetricWriters stand side by side behind one `Tracker`, so that the loop says everything
once. Guaranteed: logging never waits for the newest step; `metrics.jsonl` holds each row once,
across kills and resumes; only process 0 writes; a `metrics.jsonl` that can't be written ends the
run with one line, and no other writer ever does. In a bucket, where a file is uploaded whole, that
is done before an evaluation or a checkpoint begins, every UPLOAD seconds and at the end: a
checkpoint never precedes the rows up to its step.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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

# Steps that the device may have before it while the host prepares the next: one runs, one waits.
# Without a bound the host runs ahead, and the batches of dispatched steps fill the device's memory.
AHEAD = 2

UPLOAD = 60  # seconds that rows stay on this machine, at least


class Tracker:
    """The loop's one way to report; a context manager, which opens the writers and closes them.

    Train metrics are averaged over the steps since the last row, fetched in one go one step late,
    and written under "train/". Beside them stand `step_seconds`, `images_per_second`,
    `data_wait_fraction` and `mfu`, which leave out the first step (it compiles) and pauses, and
    `seconds`, of this process.

    Args:
      workdir: the run's folder; made if needed.
      cfg: the whole config, of which `log` and `data.batch` are read.
      name: of the run, for people.
      steps: the last step of the run.
      start: the step restored from a checkpoint; 0 for a new run.
      description: {"config": dict, "git": dict | None, "devices": dict, "parameters": str, ...}
      quiet: say nothing on the terminal.
      process: `jax.process_index()`; all but 0 write nothing.
      mfu: from images per second to model FLOPs utilisation; None where the peak is unknown.
      reduce: from fetched metrics, one for each step, to their averages {"loss": ...}.
      clock: the time in seconds.

    Raises:
      UserError: metrics.jsonl can't be written. What else can't be is said once, and left out.
    """

    def __init__(
        self,
        workdir: Path,
        cfg: ConfigDict,
        name: str,
        steps: int,
        start: int,
        description: Mapping[str, Any],
        *,
        quiet: bool = False,
        process: int = 0,
        mfu: Callable[[float], float | None] = lambda images_per_second: None,
        reduce: Callable[[Sequence[Any]], Mapping[str, float]] = metrics.reduce,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.latest: dict[str, float] = {}  # the last train row
        self._workdir, self._cfg, self._name, self._description = workdir, cfg, name, description
        self._steps, self._start, self._quiet, self._process = steps, start, quiet, process
        self._reduce = reduce
        self._speed = Speed(cfg.data.batch, mfu, clock)
        self._pending: list[tuple[int, Any]] = []  # steps whose metrics are still on the device
        self._due = False  # the last of them ends an interval
        self._terminal: BestEffortWriter | None = None
        self._wandb: WandbWriter | None = None
        self._clock, self._uploaded = clock, clock()
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "Tracker":
        with multihost.together(), self._user_errors(), contextlib.ExitStack() as opened:
            writers = []
            for writer in self._open() if self._process == 0 else ():
                opened.callback(writer.close)
                writers.append(writer)
            self._writer = MultiWriter(writers)
            about = dict(self._description)
            table = about.pop("parameters")
            self._writer.write_hparams(about)
            self._writer.write_texts(self._start, {"parameters": table})
            self._opened = opened.pop_all()
        return self

    def _open(self) -> Iterator[MetricWriter]:
        log = self._cfg.log
        self._workdir.mkdir(parents=True, exist_ok=True)
        yield JsonLinesWriter(self._workdir / "metrics.jsonl", self._start)
        if log.tensorboard:
            yield BestEffortWriter("TensorBoard", self._open_tensorboard)
        if log.wandb:
            yield BestEffortWriter("Weights & Biases", self._open_wandb)
        if not self._quiet:  # last to open, first to close: other closing words stand below the bar
            self._terminal = BestEffortWriter("", self._open_terminal)
            yield self._terminal

    def _open_tensorboard(self) -> MetricWriter:
        return TensorBoardWriter(self._workdir / "tensorboard", self._start)

    def _open_wandb(self) -> MetricWriter:
        project = self._cfg.log.project
        self._wandb = WandbWriter(self._workdir, project, self._name, self._quiet)
        return self._wandb

    def _open_terminal(self) -> MetricWriter:
        return TerminalWriter(self._name, self._steps, self._start)

    def __exit__(self, kind, error, trace) -> None:
        with self._user_errors(), self._opened:
            if self._wandb:
                self._wandb.exit_code = _exit_code(error)
            crashed = isinstance(error, Exception) and not isinstance(error, UserError)
            if self._pending and not crashed:  # after a crash the device may never answer
                self._log()

    def __call__(self, step: int, measures: Any) -> None:
        """Take the metrics of `step`, which the device need not have begun; write what was due.

        `measures` is what `reduce` takes a list of: by default a `clu.metrics` collection.
        """
        if not self._speed.running:
            self._finish_pending()
        self._log_if_due()
        self._pending.append((step, measures))
        self._due = step % self._cfg.log.every == 0 or step == self._steps
        if len(self._pending) > AHEAD:
            jax.block_until_ready(self._pending[-1 - AHEAD][1])
        watchdog.beat(step)
        if self._terminal:
            self._terminal.advance(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values that are on the host, such as {"eval/accuracy": 0.9}, at once."""
        self._log_if_due()  # rows stay in the order of their steps; W&B drops the others
        self._write("write_scalars", step, {name: number(value) for name, value in values.items()})

    def images(self, name: str, step: int, images: UInt8[np.ndarray, "b h w 3"]) -> None:
        """Write images to TensorBoard and Weights & Biases."""
        self._log_if_due()
        self._write("write_images", step, {name: np.asarray(images)})

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Time a part of the loop: "data" is waiting for the next batch, all else is a pause.

        A pause ("eval", "checkpoint") begins when the device has finished its steps, writes the row
        that is due, and is left out of the speed.
        """
        if name != "data":
            self._finish_pending()
            self._log_if_due()
        with watchdog.phase(name), self._speed.timing(wait=name == "data"):
            if name != "data":
                self._upload()
            yield

    def waiting(self, batches: Iterable) -> Iterator:
        """Yield from `batches`; the time that each takes to come counts as waiting for data."""
        iterator, end = iter(batches), object()
        while True:
            with self.timer("data"):
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch

    @property
    def seconds(self) -> float:
        """Since this process opened the tracker, everything included."""
        return self._speed.seconds

    @property
    def images_per_second(self) -> float | None:
        """Over all written rows; None before a second step has been."""
        return self._speed.images_per_second

    def _finish_pending(self) -> None:
        """Wait for the device. The first step compiled; the clock starts when it is done."""
        if self._pending:
            step, handle = self._pending[-1]
            jax.block_until_ready(handle)
            if not self._speed.running:
                self._speed.start(step)

    def _log_if_due(self) -> None:
        if self._due:
            self._log()

    def _log(self) -> None:
        """Fetch everything pending at once, and write its averages at its last step."""
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
            f"cannot write metrics in {self._workdir}",
            "free space and rerun the same command to resume, or give another --workdir",
            RESUMABLE,
        )


def publish(
    workdir: Path,
    project: str,
    name: str,
    pictures: Mapping[str, UInt8[np.ndarray, "h w 3"]],
    values: Mapping[str, float],
) -> None:
    """Add pictures and values to the Weights & Biases page of a finished run.

    Raises UserError where it can't be reached; offline without a key, like a training.
    """
    writer = WandbWriter(workdir, project, name, strict=True)
    with contextlib.closing(writer):
        writer.append(pictures, values)


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return DONE
    code = getattr(error, "code", FAILED)  # of a UserError or SystemExit
    return code if isinstance(code, int) else FAILED
