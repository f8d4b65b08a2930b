"""Training: one loop for pretraining and fine-tuning.

A resumed run repeats the undisturbed one bit for bit, because its batches, their augmentation,
dropout and the learning rate are functions of (seed, step), and nothing else is remembered (law 4).
"""

import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_scale import config, data
from vit_scale.augment.pipeline import train_images
from vit_scale.augment.view import View, view
from vit_scale.checkpoint import Checkpoints, all_steps
from vit_scale.data import Batch, Source, open_split, train_batches
from vit_scale.distributed import multihost, preemption
from vit_scale.distributed.accelerators import mfu
from vit_scale.distributed.preemption import Preempted
from vit_scale.distributed.sharding import batch_rows, shard_batch
from vit_scale.models.flops import training_flops
from vit_scale.models.parameters import count
from vit_scale.runs import compilation_cache, rollbacks
from vit_scale.runs.resume import OPERATIONAL, resumed_config
from vit_scale.runs.rollbacks import Rollback
from vit_scale.runs.run_folder import Run
from vit_scale.runs.watchdog import Watchdog, phase
from vit_scale.storage import paths
from vit_scale.tracking import TrackedRun, Tracker, git_state, parameter_table, versions
from vit_scale.tracking.metrics import TrainMetrics
from vit_scale.training import teachers
from vit_scale.training.evaluator import Evaluate, check_classes
from vit_scale.training.guard import Diverged, Guard, diverged_for_good
from vit_scale.training.init_state import averaged, check_source, init_state, recover, restore
from vit_scale.training.program import (
    Program,
    TrainState,
    jit_train_step,
    plan_program,
)


def train(cfg: ConfigDict, workdir: str | os.PathLike, name: str, quiet: bool = False) -> dict:
    """Run `cfg` in the folder `workdir`, from its newest whole checkpoint on; returns its report.

    A finished run is left as it is. Raises UserError, before anything is compiled, for whatever can
    be seen to be wrong; Preempted after SIGTERM, with everything saved.
    """
    with multihost.shared_errors():
        cfg = resumed_config(cfg, workdir)
        program, sources = plan_program(cfg), open_sources(cfg)
        check_shared_memory(program, sources)
        about = describe(program, name, sources)
        if not all_steps(paths.parse(workdir)):
            check_source(program, sources.train.classes, ids_of(sources.train))
        same = identity(about, sources) if multihost.has_peers() else {}
    multihost.check_same(same)
    with Run(workdir, about) as run, preemption.deferred():
        if run.report:
            return run.report
        with (
            compilation_cache.cached(run.path, cfg.checkpoint.programs),
            Watchdog(run.path, cfg.watchdog) as watchdog,
            Checkpoints(run.path, cfg.checkpoint.keep) as checkpoints,
            watchdog.report_failure(),
        ):
            report = Training(program, sources, run, checkpoints, watchdog, quiet).to_the_end()
        run.write_report(report)
    return report


class Training:
    """One run, from wherever it stands to its end."""

    def __init__(
        self, program, sources, run: Run, checkpoints: Checkpoints, watchdog: Watchdog, quiet
    ):
        self.program, self.sources, self.run, self.quiet = program, sources, run, quiet
        self.checkpoints, self.watchdog = checkpoints, watchdog
        self.cfg = program.cfg
        self.evaluate = Evaluate(self.cfg, program.model, program.mesh)
        self.train_step: Callable | None = None
        self.teacher: tuple = ()

    def to_the_end(self) -> dict:
        """Train, back from where it diverges as often as that is allowed; the report."""
        while True:
            try:
                return self.attempt()
            except Diverged as error:
                self.roll_back(error)

    def attempt(self) -> dict:
        """Train from the newest checkpoint to the end; the report. Raises Diverged."""
        cfg, checkpoints = self.cfg, self.checkpoints
        with phase("restore"):
            state = recover(self.program, checkpoints) or init_state(
                self.program, self.sources.train.classes, self.quiet, ids_of(self.sources.train)
            )
            self.teacher = teachers.load(self.program.teacher)
        start, guard = int(state.step), Guard(cfg.divergence)
        self.watchdog.begin_at(start)
        preemption.check(f"after step {start}")
        with tracker(self.program, self.run, start, self.quiet) as track:
            if start and self.is_selected(start):  # a run stopped while it evaluated does so now
                self.select(state, start, track)
            with phase("train"):
                for finished, batch in track.waiting(self.batches(start)):
                    if finished == 0 and cfg.log.images:
                        track.images("train/images", 0, sample_images(self.program, batch))
                    state, measures = self.step(state, batch)
                    step = finished + 1
                    track(step, measures)
                    guard(step, measures.nonfinite.total)
                    self.after(state, step, guard, track)
            with phase("checkpoint"):
                checkpoints.wait()
            report = summarise(self.program, self.sources, track)
            report["config"] = self.run.description["name"]
            if self.sources.final:
                with phase("eval"):
                    report["eval"] = self.final_results()
                track.scalars(cfg.steps, {"final/accuracy": report["eval"]["accuracy"]})
        return report

    def batches(self, start: int) -> Iterator[tuple[int, Batch]]:
        """(finished steps, this host's part of the batch), with what rollbacks left out."""
        cfg, rows = self.cfg, batch_rows(self.cfg.data.batch, self.program.mesh)
        past = rollbacks.read(self.run.path)
        for first, last, shift in rollbacks.batch_ranges(past, start, cfg.steps):
            source = self.sources.train
            part = train_batches(source, cfg.data, cfg.seed, first + shift, last + shift, rows)
            with contextlib.closing(part):
                for position, batch in part:
                    yield position - shift, batch

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, TrainMetrics]:
        placed = shard_batch(batch, self.program.mesh, self.cfg.data.batch)
        if self.train_step is None:
            with phase("compile"):
                lowered = jit_train_step(self.program).lower(state, placed, *self.teacher)
                self.train_step = lowered.compile()
            preemption.check("before the first step")
        return self.train_step(state, placed, *self.teacher)

    def after(self, state: TrainState, step: int, guard: Guard, track: Tracker) -> None:
        """Save and evaluate what is due after `step`, and stop here if that is asked for."""
        cfg, stop = self.cfg, preemption.requested()
        self.checkpoints.check()
        selected = self.is_selected(step)
        saved = selected or due(step, cfg.checkpoint.every, cfg.steps) or stop
        # What is not finite is not saved: training goes back past it, or comes through it.
        if saved and (guard.is_sound() or step == cfg.steps):
            with track.timer("checkpoint"):
                self.checkpoints.save(step, state._asdict(), self.run.description)
            if selected and not stop:
                self.select(state, step, track)
        if stop:
            with track.timer("checkpoint"):
                self.checkpoints.wait()
            raise Preempted(f"after step {step}, saved up to {self.checkpoints.find_latest() or 0}")

    def is_selected(self, step: int) -> bool:
        """Whether the parameters after `step` compete for the best."""
        return bool(self.sources.selection) and due(step, self.cfg.eval.every, self.cfg.steps)

    def select(self, state: TrainState, step: int, track: Tracker) -> None:
        """Measure the checkpoint of `step`, if that is not done, and report it."""
        measured = multihost.broadcast(self.checkpoints.read_metrics(step))
        if not measured:
            with track.timer("eval"):
                measured = self.evaluate(averaged(state), self.sources.selection)
            with track.timer("checkpoint"):
                self.checkpoints.record(step, measured)
        track.scalars(step, {f"eval/{key}": x for key, x in measured.items()})

    def final_results(self) -> dict:
        """The results on the final split of the last step and, under "best", of the chosen one."""
        cfg, checkpoints = self.cfg, self.checkpoints

        def result(state):
            found = self.evaluate(averaged(state), self.sources.final)
            return {"split": cfg.eval.final, "step": int(state.step), **found}

        last = chosen = result(restore(self.program, checkpoints, cfg.steps))
        if checkpoints.find_best() is None:
            return last
        if checkpoints.find_best() != last["step"]:
            chosen = result(recover(self.program, checkpoints, checkpoints.rank()))
        selected = {"split": cfg.eval.split, **checkpoints.read_metrics(chosen["step"])}
        return {**last, "best": {**chosen, "selected_by": selected}}

    def roll_back(self, error: Diverged) -> None:
        """Write down that training goes on from the newest checkpoint, past what went wrong.

        Raises UserError where it has gone back too often already.
        """
        self.checkpoints.wait()
        past = rollbacks.read(self.run.path)
        if len(past) >= self.cfg.divergence.rollbacks:
            raise diverged_for_good(error, past) from None
        step = self.checkpoints.find_latest() or 0
        with multihost.shared_errors():
            if multihost.is_first():
                rollbacks.write(self.run.path, [*past, Rollback(step, error.step)])
                line = f"vit-scale: {error}; rolling back to step {step} and skipping those batches"
                print(line, file=sys.stderr, flush=True)


def ids_of(source: Source) -> tuple[str, ...]:
    """The names of a set's folders, where its classes are shown by others."""
    return getattr(source, "ids", ())


def due(step: int, every: int, last: int) -> bool:
    """Whether to do after `step` of `last` what is done every `every` steps; 0: only at the end."""
    return step == last or (every > 0 and step % every == 0)


class Sources(NamedTuple):
    """The sets to train on, to select the best step on, and to report on; None where not wanted."""

    train: Source
    selection: Source | None
    final: Source | None


def open_sources(cfg: ConfigDict) -> Sources:
    """Open the splits that the config names. Raises UserError where the head has other classes."""

    def opened(split: str, seen: View | None = None) -> Source:
        source = open_split(cfg.data, split, seen)
        check_classes(source, cfg)
        return source

    return Sources(
        train=opened(cfg.data.train),
        selection=opened(cfg.eval.split, view(cfg.eval)) if cfg.eval.split else None,
        final=opened(cfg.eval.final, view(cfg.eval)) if cfg.eval.final else None,
    )


def check_shared_memory(program: Program, sources: Sources) -> None:
    """Raises UserError where what the data workers hand over will not fit; Linux alone says so."""
    cfg, mesh = program.cfg, program.mesh
    train, evaluated = (len(batch_rows(n, mesh)) for n in (cfg.data.batch, cfg.eval.batch))
    parts = [(sources.train, train, cfg.steps)]
    if sources.selection:  # evaluated beside a training that waits with its batches
        parts.append((sources.selection, evaluated, -(-len(sources.selection) // cfg.eval.batch)))
    data.check_shared_memory(parts, cfg.data.workers)
    if sources.final:
        final = (sources.final, evaluated, -(-len(sources.final) // cfg.eval.batch))
        data.check_shared_memory([final], cfg.data.workers)


def sample_images(program: Program, batch: dict) -> np.ndarray:
    """The first images of the first batch as the model will see them, uint8 [n, H, W, 3]."""
    cfg = program.cfg
    key = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), 0))[0]
    first = {name: jnp.asarray(leaf[: cfg.log.images]) for name, leaf in batch.items()}
    images, _ = train_images(first, key, cfg.augment, config.image_size(cfg), cfg.model.classes)
    pixels = 255 * (np.asarray(images) * cfg.augment.std + np.asarray(cfg.augment.mean))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def describe(program: Program, name: str, sources: Sources) -> dict:
    """What run.json, every checkpoint and the trackers say of the run."""
    sets = {part: data.describe(source) for part, source in sources._asdict().items() if source}
    return {
        "name": name,
        "cwd": os.getcwd(),  # relative paths in the config are of this folder
        "config": config.to_json(program.cfg),
        "classes": list(sources.train.classes),
        "data": {**sets["train"], "sets": sets},
        "devices": devices(),
        "git": git_state(pathlib.Path(__file__).parent),
        "versions": versions(),
        "parameters": parameter_table(program.state.params),
    }


def identity(about: dict, sources: Sources) -> dict:
    """What has to be the same on every host: the program, and the images."""
    fields = config.dotted(about["config"])
    same = {name: value for name, value in fields.items() if not name.startswith(OPERATIONAL)}
    for split, source in sources._asdict().items():
        if source:
            same[f"{split} set"] = [*data.describe(source).values(), data.checksum(source)]
    return {**same, **{name: about[name] for name in ("classes", "git", "versions")}}


def devices() -> dict:
    return {
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
        "hosts": jax.process_count(),
    }


def utilisation(program: Program, images_per_second: float) -> float | None:
    """Model FLOPs utilisation; None where the device's peak is unknown."""
    per_image = training_flops(program.model.macs)
    kind = jax.devices()[0].device_kind
    return mfu(images_per_second, per_image, jax.device_count(), kind)


def tracker(program: Program, run: Run, start: int, quiet: bool) -> Tracker:
    """Build the run's tracker, which begins after step `start`."""
    mfu = functools.partial(utilisation, program)
    return Tracker(TrackedRun(run.path, program.cfg, run.description, start, quiet, mfu))


def summarise(program: Program, sources: Sources, track: Tracker) -> dict:
    """What report.json says of the run, but for its results."""
    cfg = program.cfg
    return {
        "step": cfg.steps,
        "parameters": count(program.state.params),
        "init": cfg.init.source,
        "resolution": list(config.image_size(cfg)),
        "data": data.describe(sources.train),
        "images_per_second": track.images_per_second,
        "seconds": track.seconds,
        "devices": devices(),
        "versions": versions(),
    }
