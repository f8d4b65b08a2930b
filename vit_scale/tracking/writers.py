"""The four CLU MetricWriters. Each takes what it can show and ignores the rest.

Files hold a row when the call returns, so a killed run loses nothing that was reported, and an
error surfaces where it happens; in a bucket they hold it when `flush` returns. Hence no
AsyncWriter: writing takes milliseconds every `log.every` steps.
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

# `clu.metric_writers` imports TensorFlow (1.3 GB) for one of its writers, which is not used here. A
# stand-in for that one module, placed before the first import, is all that the others need.
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
    """A Python number from one on the host or the device."""
    return np.asarray(value).item()


class Writer(MetricWriter):
    """A MetricWriter that ignores what it is not made for."""

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
    """One JSON object a line: {"step": 20, "time": Unix seconds, "train/loss": 2.3, ...}.

    JSON has no NaN and no infinity: they are written as null. Opening the file at step `start`
    drops a torn last line and the rows of later steps, which a killed run wrote and this one writes
    again, and what was measured of step `start`, which is reported again; at step 0 it drops all.
    """

    def __init__(self, path: Path, start: int):
        there = path.read_bytes().splitlines() if path.exists() else []
        kept = [line for line in there if _is_kept(line, start)]
        self._rows = files.AppendedFile(path)
        files.write(self._rows.local, b"".join(line + b"\n" for line in kept))
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


def _is_kept(line: bytes, start: int) -> bool:
    try:
        row = json.loads(line)
        measured = any(name.startswith(("eval/", "final/")) for name in row)
        return 0 < row["step"] < start or (0 < row["step"] == start and not measured)
    except (ValueError, KeyError, TypeError):
        return False


class TensorBoardWriter(Writer):
    """Event files, written through tensorboardX's record layer.

    Its SummaryWriter hands events to a thread, which dies of a full disk; the eleventh event after
    that hangs the run.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._summary, self._event = summary, Event
        local = cache.local(folder)
        local.mkdir(parents=True, exist_ok=True)
        # The library names a file by the second: a run resumed within it would overwrite the first.
        self._events = EventsWriter(str(local / "events"), f".{os.getpid()}.{start}")
        self._file = files.AppendedFile(folder / Path(self._events._file_name).name)
        # A session's start makes TensorBoard forget the later steps of the run that was killed.
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
    """A writer that a training does without, if need be: its failure is one line, and its end.

    `name` is what the line says of it; with none nothing is said. An upload that fails is tried
    again with the next. Raises UserError where `make` does, for a setting that can't be.
    """

    def __init__(self, name: str, make: Callable[[], MetricWriter]):
        self._name, self._told = name, False
        self._writer: MetricWriter | None = None
        try:
            self._writer = make()
        except UserError:  # a mistake in a setting, before anything is trained
            raise
        except Exception as error:  # noqa: BLE001, whatever a package of others may raise
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._name and not self._told:
            say(f"{self._name}: {one_line(error)}; training goes on without it")
        self._told, self._writer = True, None

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
            if not self._told:
                say(f"{self._name}: {one_line(error)}; it will be tried again")
            self._told = True

    def close(self) -> None:
        self._do("close")


def say(line: str) -> None:
    """One line on standard error, above a progress bar; nothing where nobody hears any more."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(f"vit-scale: {line}", file=sys.stderr)
        sys.stderr.flush()


def one_line(error: Exception) -> str:
    """What an exception says, in one line without a full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


# What a person wants to see of a train row; the other writers have it all.
ON_BAR = ("train/loss", "train/accuracy", "images_per_second")
ON_LINE = (*ON_BAR, "train/learning_rate", "data_wait_fraction", "mfu", "seconds_left")


class TerminalWriter(Writer):
    """A progress bar on a terminal, plain lines otherwise, on standard error.

    Rows with "train/" names move the bar; others, such as "eval/accuracy", get a line of their own.
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
            disable=None,  # where the stream is no terminal
        )

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._bar.update(step - self._bar.n)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {name: number(value) for name, value in scalars.items()}
        train = any(name.startswith("train/") for name in values)
        if train and not self._bar.disable:
            self._bar.set_postfix_str(_words({k: values[k] for k in ON_BAR if k in values}))
            return
        if train:
            if "step_seconds" in values:
                values["seconds_left"] = round((self._steps - step) * values["step_seconds"])
            values = {k: values[k] for k in ON_LINE if k in values}
        tqdm.write(f"{self._name} {step}/{self._steps}  {_words(values)}", file=self._stream)
        self._stream.flush()

    def close(self) -> None:
        self._bar.close()


def _words(values: Mapping[str, float]) -> str:
    """`loss 2.303  accuracy 0.1  images_per_second 812.4`; "train/" goes without saying."""
    return "  ".join(
        f"{name.removeprefix('train/')} {value}"
        if isinstance(value, int)
        else f"{name.removeprefix('train/')} {value:.4g}"
        for name, value in values.items()
    )
