"""Profiles: xprof traces of a few training steps, of what the host and its devices did in them.

Process 0 traces the steps of `log.profile`; each process that receives SIGUSR2 traces its next ten.
A trace changes nothing that is computed, and its failure never ends a run.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from vit_scale.distributed import multihost, profile_request
from vit_scale.storage import cache, files
from vit_scale.tracking.tracker import Tracker
from vit_scale.tracking.writers import failure, print_line

FOLDER = "profile"  # of a run; TensorBoard and xprof find traces in its plugins/profile/
REQUESTED = 10  # steps, for SIGUSR2


class Profiler:
    """A context manager around the steps of a run of `cfg` in the folder `run`.

    `step` goes around each step, and `after` follows once the tracker has its metrics.
    """

    def __init__(self, run: Path, cfg: ConfigDict, track: Tracker, quiet: bool = False):
        self._folder, self._track, self._quiet = run / FOLDER, track, quiet
        first, steps = cfg.log.profile if multihost.is_first() else (0, 0)
        self._planned, self._end = range(first, first + steps), cfg.steps
        self._steps: tuple[int, int] | None = None  # first and last of the trace in progress
        name = f".process_{jax.process_index()}.partial"
        self._partial = cache.local(self._folder) / name

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exception) -> None:
        if self._steps:  # training was stopped
            self._stop()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Name the code inside as a step in traces; begin a trace that is due."""
        if not self._steps and step in self._planned:
            last, self._planned = self._planned[-1], range(0)  # not again, should it fail
            self._start(step, last)
        elif not self._steps and profile_request.take():
            self._start(step, min(step + REQUESTED - 1, self._end))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int) -> None:
        """End the trace whose last step is `step`."""
        if self._steps and step == self._steps[1]:
            with self._track.timer("profile"):  # waits for the device
                session = self._stop()
            if session:
                self._track.text(step, "profile", str(session))

    def _start(self, first: int, last: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # each Python call, which slows the host down
        with self._track.timer("profile"), self._one_line_errors(first, last):
            shutil.rmtree(self._partial, ignore_errors=True)
            jax.profiler.start_trace(self._partial, profiler_options=options)
            self._steps = first, last

    def _stop(self) -> Path | None:
        """Write the trace in progress; return its folder, or None if that failed."""
        (first, last), self._steps = self._steps or (0, 0), None
        session, written = self._folder / f"plugins/profile/steps_{first}-{last}", False
        with self._one_line_errors(first, last):
            jax.profiler.stop_trace()
            session.mkdir(parents=True, exist_ok=True)
            for file in filter(Path.is_file, self._partial.rglob("*")):
                # By process: those of one machine have one host name.
                files.move(file, session / f"process_{jax.process_index()}.{file.name}")
            written = True
            if not self._quiet:
                line = f"profile of steps {first} to {last}: {session}"
                print_line(f"{line}; to open it: xprof --logdir {self._folder}")
        shutil.rmtree(self._partial, ignore_errors=True)
        return session if written else None

    @contextlib.contextmanager
    def _one_line_errors(self, first: int, last: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001, of the profiler or the storage
            name = f"no profile of steps {first} to {last}"
            print_line(f"{failure(name, error)}; training continues")
