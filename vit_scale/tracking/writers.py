"""CLU MetricWriters for JSON lines, TensorBoard and the terminal; each ignores what it can't show.

A row is on disk when the call returns, so a killed run loses none, and errors surface where they
happen; in a bucket it is there when `flush` returns. Hence no AsyncWriter: writing takes
milliseconds every `log.every` steps.
"""

import contextlib
import json
import math
import os
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vit_scale.errors import UserError
from vit_scale.storage import cache, files
from vit_scale.storage.errors import one_line

# `clu.metric_writers` imports TensorFlow (1.3 GB) for one writer, which is not used here. An empty
# module in its place, before the first import, is all that the others need.
_unused = types.ModuleType("clu.metric_writers.summary_writer")
_unused.SummaryWriter = type("SummaryWriter", (), {})  # type: ignore[attr-defined]
sys.modules.setdefault(_unused.__name__, _unused)

from clu.metric_writers import MetricWriter, MultiWriter  # noqa: E402

__all__ = [
    "BestEffortWriter",
    "JsonLinesWriter",
    "MetricWriter",
    "MultiWriter",
    "TensorBoardWriter",
    "TerminalWriter",
    "number",
]


def number(value: Any) -> int | float:
    """Convert a scalar on the host or the device to a Python number."""
    return np.asarray(value).item()


class Writer(MetricWriter):
    """A MetricWriter whose methods do nothing; subclasses override what they support."""

    def write_summaries(self, step, values, metadata=None): ...
    def write_scalars(self, step, scalars): ...
    def write_images(self, step, images): ...
    def write_videos(self, step, videos): ...
    def write_audios(self, step, audios, *, sample_rate): ...
    def write_texts(self, step, texts): ...
    def write_histograms(self, step, arrays, num_buckets=None): ...
    def write_hparams(self, hparams): ...
    def flush(self): ...
    def close(self): ...


class JsonLinesWriter(Writer):
    """One JSON object per line: {"step": 20, "time": Unix seconds, "train/loss": 2.3, ...}.

    NaN and infinity, which JSON lacks, become null. Opening the file at step `start` removes what
    the resumed run writes again: a torn last line, rows of later steps, and evaluations of step
    `start`; at step 0 everything.
    """

    def __init__(self, path: Path, start: int):
        lines = path.read_bytes().splitlines() if path.exists() else []
        valid = [line for line in lines if _is_valid(line, start)]
        self._rows = files.AppendedFile(path)
        files.write(self._rows.local, b"".join(line + b"\n" for line in valid))
        self._file = open(self._rows.local, "a", encoding="utf-8")  # noqa: SIM115

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {name: number(value) for name, value in scalars.items()}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": int(step), "time": time.time(), **row})
        self._file.write(line + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._rows.save()

    def close(self) -> None:
        self._file.close()
        self._rows.finish()


def _is_valid(line: bytes, start: int) -> bool:
    """Tell whether a run that resumes at `start` keeps a row."""
    try:
        row = json.loads(line)
        evaluated = any(name.startswith(("eval/", "final/")) for name in row)
        return 0 < row["step"] < start or (0 < row["step"] == start and not evaluated)
    except (ValueError, KeyError, TypeError):
        return False


class TensorBoardWriter(Writer):
    """TensorBoard event files, written through tensorboardX's record layer.

    tensorboardX's SummaryWriter writes in a thread, which dies on a full disk; the eleventh event
    after that blocks the run for ever.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._summary, self._event = summary, Event
        local = cache.local(folder)
        local.mkdir(parents=True, exist_ok=True)
        # tensorboardX names files by the second: one that resumes sooner would overwrite the first.
        self._events = EventsWriter(str(local / "events"), f".{os.getpid()}.{start}")
        self._file = files.AppendedFile(folder / Path(self._events._file_name).name)
        # SessionLog.START makes TensorBoard discard the later steps of the run that was killed.
        session = SessionLog(status=SessionLog.START)
        self._add(start + 1, session_log=session)

    def _add(self, step: int, **content: Any) -> None:
        self._events.write_event(self._event(step=step, wall_time=time.time(), **content))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._add(step, summary=self._summary.scalar(name, number(value)))
        self._events.flush()

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, batch in images.items():
            for i, image in enumerate(batch):
                content = self._summary.image(f"{name}/{i}", image, dataformats="HWC")
                self._add(step, summary=content)
        self._events.flush()

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            code = "".join(f"    {line}\n" for line in text.splitlines())  # Markdown, verbatim
            self._add(step, summary=self._summary.text(name, code))
        self._events.flush()

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self.write_texts(0, {"config": json.dumps(hparams, indent=2, default=str)})

    def flush(self) -> None:
        self._file.save()

    def close(self) -> None:
        self._events.close()
        self._file.finish()


class BestEffortWriter(Writer):
    """A writer that is dropped when it fails, with one line, without ending the run.

    `name` is for the line; "" prints none. A failed upload is retried with the next one. Raises
    UserError where `make` does, for an invalid setting.
    """

    def __init__(self, name: str, make: Callable[[], MetricWriter]):
        self._name, self._reported = name, False
        self._writer: MetricWriter | None = None
        try:
            self._writer = make()
        except UserError:  # an invalid setting, before training begins
            raise
        except Exception as error:  # noqa: BLE001, third-party packages raise anything
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._name and not self._reported:
            print_line(f"{failure(self._name, error)}; training continues without it")
        self._reported, self._writer = True, None

    def _do(self, method: str, *arguments: Any) -> None:
        if self._writer:
            try:
                getattr(self._writer, method)(*arguments)
            except Exception as error:  # noqa: BLE001
                self._give_up(error)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._do("write_scalars", step, scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._do("write_images", step, images)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._do("write_texts", step, texts)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._do("write_hparams", hparams)

    def advance(self, step: int) -> None:
        self._do("advance", step)

    def flush(self) -> None:
        try:
            if self._writer:
                self._writer.flush()
        except Exception as error:  # noqa: BLE001
            if not self._reported:
                print_line(f"{failure(self._name, error)}; it will be retried")
            self._reported = True

    def close(self) -> None:
        self._do("close")


def print_line(line: str) -> None:
    """Print one line on standard error, above a progress bar; ignore a closed stream."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(f"vit-scale: {line}", file=sys.stderr)
        sys.stderr.flush()


def failure(name: str, error: Exception) -> str:
    """Return "NAME: what the exception says", on one line without a full stop."""
    return f"{name}: {one_line(error).rstrip('.')}"


# The values of a train row that the terminal shows.
ON_BAR = ("train/loss", "train/accuracy", "images_per_second")
ON_LINE = (*ON_BAR, "train/learning_rate", "data_wait_fraction", "mfu", "seconds_left")


class TerminalWriter(Writer):
    """A progress bar if standard error is a terminal, else plain lines.

    Rows of "train/" values update the bar; others, such as "eval/accuracy", are printed as lines.
    """

    def __init__(self, name: str, steps: int, start: int):
        self._name, self._steps, self._stream = name, steps, sys.stderr
        self._bar = tqdm(
            desc=name,
            total=steps,
            initial=start,
            unit="step",
            file=self._stream,
            dynamic_ncols=True,
            disable=None,  # if the stream is not a terminal
        )

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._bar.update(step - self._bar.n)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {name: number(value) for name, value in scalars.items()}
        train = any(name.startswith("train/") for name in values)
        if train and not self._bar.disable:
            self._bar.set_postfix_str(_format({k: values[k] for k in ON_BAR if k in values}))
            return
        if train:
            if "step_seconds" in values:
                values["seconds_left"] = round((self._steps - step) * values["step_seconds"])
            values = {k: values[k] for k in ON_LINE if k in values}
        tqdm.write(f"{self._name} {step}/{self._steps}  {_format(values)}", file=self._stream)
        self._stream.flush()

    def close(self) -> None:
        self._bar.close()


def _format(values: Mapping[str, float]) -> str:
    """Format values as `loss 2.303  accuracy 0.1  images_per_second 812.4`, without "train/"."""
    return "  ".join(
        f"{name.removeprefix('train/')} {value}"
        if isinstance(value, int)
        else f"{name.removeprefix('train/')} {value:.4g}"
        for name, value in values.items()
    )
