"""The training loop, one for pretraining and fine-tuning.

A resumed run repeats the uninterrupted one bit for bit, because its batches, their augmentation,
dropout, and the learning rate are functions of (seed, step), and nothing else is remembered.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_scale.checkpoint import Checkpoints, all_steps
from vit_scale.data import Batch, Source, train_batches
from vit_scale.distributed import multihost, preemption
from vit_scale.distributed.accelerators import mfu, peak_flops
from vit_scale.distributed.mesh import cpu_options
from vit_scale.distributed.preemption import Preempted
from vit_scale.distributed.sharding import batch_rows, shard_batch
from vit_scale.errors import USAGE, UserError
from vit_scale.runs import compilation_cache, rollbacks
from vit_scale.runs.extension import depending_on_steps, steps_before_cooldown
from vit_scale.runs.rollbacks import Rollback
from vit_scale.runs.run_folder import Run
from vit_scale.runs.watchdog import Watchdog, phase
from vit_scale.storage import paths
from vit_scale.tracking import Profiler, TrackedRun, Tracker
from vit_scale.tracking.metrics import TrainMetrics
from vit_scale.training.description import describe, identity, summarise
from vit_scale.training.evaluator import Measure, make_measure
from vit_scale.training.guard import Diverged, Guard, diverged_for_good
from vit_scale.training.init_state import (
    check_source,
    init_state,
    recover,
    restore,
    store_frozen,
)
from vit_scale.training.measures import select_scalars
from vit_scale.training.objectives.teacher import restore_params
from vit_scale.training.setup import Setup, as_trained, make_setup
from vit_scale.training.splits import Splits, class_ids, open_splits
from vit_scale.training.statistics import with_statistics
from vit_scale.training.train_state import TrainState
from vit_scale.training.train_step import jit_train_step
from vit_scale.training.validation import validate_inputs


def train(
    cfg: ConfigDict,
    workdir: str | os.PathLike,
    name: str,
    quiet: bool = False,
    until: int | None = None,
) -> dict:
    """Train `cfg` in the folder `workdir`, resuming from its newest intact checkpoint.

    A finished run is left as it is.

    Args:
      cfg: the full config of one run.
      workdir: folder of the run, on disk or in a bucket ("gs://...").
      name: name of the run, for its reports and trackers.
      quiet: print errors only.
      until: save and stop after this step; a later call continues, as if it had not stopped.

    Returns:
      The content of report.json; {} where it stopped before the last step.

    Raises:
      UserError: the config, the data, the source of the weights, or `until` can't work; raised
        before anything is compiled or the folder is created.
      Preempted: after SIGTERM, with everything saved.
    """
    with multihost.shared_errors():
        if until is not None and until < 1:
            raise UserError(f"until={until} must be at least 1", USAGE)
        cfg = as_trained(cfg, workdir)
        setup, splits = make_setup(cfg), open_splits(cfg)
        if (completed := with_statistics(cfg, splits.train)) is not cfg:
            cfg, setup = completed, make_setup(completed)
        validate_inputs(cfg, setup.mesh, splits, setup.teacher)
        measure = make_measure(cfg, setup.model, setup.mesh, splits.bank)
        description = describe(setup, name, splits)
        if not all_steps(paths.parse(workdir)):
            check_source(setup, splits.train.classes, class_ids(splits.train))
        same = identity(description, splits) | {"until": until} if multihost.has_peers() else {}
    multihost.check_same(same)
    # An extension to more steps, where the schedule allows it, starts from this checkpoint.
    stable = None if depending_on_steps(cfg) else steps_before_cooldown(cfg)
    with Run(workdir, description) as run, preemption.deferred():
        if run.report:
            return run.report
        with (
            compilation_cache.cached(run.path, cfg.checkpoint.programs),
            Watchdog(run.path, cfg.watchdog) as watchdog,
            Checkpoints(run.path, cfg.checkpoint.keep, measure.main, stable) as checkpoints,
            watchdog.report_failure(),
        ):
            parts = (setup, splits, measure, run, checkpoints, watchdog)
            report = Training(*parts, quiet, until).to_the_end()
        if report:
            run.write_report(report)
    return report


class Training:
    """The training of one run, from its newest checkpoint to its end."""

    def __init__(
        self,
        setup: Setup,
        splits: Splits,
        measure: Measure,
        run: Run,
        checkpoints: Checkpoints,
        watchdog: Watchdog,
        quiet: bool,
        until: int | None,
    ):
        self.setup, self.splits, self.run, self.quiet = setup, splits, run, quiet
        self.checkpoints, self.watchdog = checkpoints, watchdog
        self.cfg, self.measure = setup.cfg, measure
        self.last = min(until or setup.cfg.steps, setup.cfg.steps)  # step that this call ends at
        self.train_step: Callable | None = None
        self.teacher: tuple = ()

    def to_the_end(self) -> dict:
        """Train to the end, rolling back when training diverges; return the report."""
        while True:
            try:
                return self.attempt()
            except Diverged as error:
                self.roll_back(error)

    def attempt(self) -> dict:
        """Train from the newest checkpoint to `last`; return the report, {} before the end.

        Raises Diverged.
        """
        cfg, checkpoints = self.cfg, self.checkpoints
        with phase("restore"):
            state = recover(self.setup, checkpoints) or init_state(
                self.setup, self.splits.train.classes, self.quiet, class_ids(self.splits.train)
            )
            store_frozen(self.setup, checkpoints, state, self.run.description)
            self.teacher = restore_params(self.setup.teacher)
        start, guard = int(state.step), Guard(cfg.divergence)
        self.watchdog.begin_at(start)
        preemption.check(f"after step {start}")
        with tracker(self.setup, self.run, start, self.quiet) as track:
            if start and self.is_selected(start):  # stopped before or during this evaluation
                self.select(state, start, track)
            profiler = Profiler(self.run.path, cfg, track, self.quiet)
            with phase("train"), profiler:
                for finished, batch in track.waiting(self.batches(start)):
                    step = finished + 1
                    with profiler.step(step):
                        state, measures = self.step(state, batch)
                    if finished == 0 and cfg.log.images:  # after it: training shows sooner
                        track.images("train/images", 0, sample_images(self.setup, batch))
                    track(step, measures)
                    profiler.after(step)
                    guard(step, measures.nonfinite.total)
                    self.after(state, step, guard, track)
            with phase("checkpoint"):
                checkpoints.wait()
            if self.last < cfg.steps:
                return {}
            del state  # checkpoints are evaluated, and there may be no room for two states
            report = summarise(self.setup, self.splits, track)
            report |= {"config": self.run.description["name"], "measure": self.measure.main}
            if self.splits.final:
                with phase("eval"):
                    report["eval"] = self.final_results(self.splits.final)
                main = self.measure.main
                track.scalars(cfg.steps, {f"final/{main}": report["eval"][main]})
        return report

    def batches(self, start: int) -> Iterator[tuple[int, Batch]]:
        """Yield (finished steps, this host's part of the batch), skipping what rollbacks skip."""
        cfg, rows = self.cfg, batch_rows(self.cfg.data.batch, self.setup.mesh)
        past, end = rollbacks.agree(self.run.path), max(start, self.last)
        for first, last, shift in rollbacks.batch_ranges(past, start, end):
            source = self.splits.train
            part = train_batches(source, cfg.data, cfg.seed, first + shift, last + shift, rows)
            with contextlib.closing(part):
                for position, batch in part:
                    yield position - shift, batch

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, TrainMetrics]:
        """Run the train step, compiling it the first time."""
        placed = shard_batch(batch, self.setup.mesh, self.cfg.data.batch)
        if self.train_step is None:
            with phase("compile"):
                lowered = jit_train_step(self.setup).lower(state, placed, *self.teacher)
                self.train_step = lowered.compile()
            preemption.check("before the first step")
        return self.train_step(state, placed, *self.teacher)

    def after(self, state: TrainState, step: int, guard: Guard, track: Tracker) -> None:
        """Save and evaluate what is due after `step`; raise Preempted if a stop is requested."""
        cfg, stop = self.cfg, preemption.requested()
        self.checkpoints.check()
        selected = self.is_selected(step)
        saved = selected or due(step, cfg.checkpoint.every, cfg.steps) or stop
        saved = saved or step in (self.last, self.checkpoints.always)
        # Parameters after a non-finite step are not saved: training recovers or rolls back first.
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
        """Return whether the parameters after `step` compete for the best checkpoint."""
        return bool(self.splits.selection) and due(step, self.cfg.eval.every, self.cfg.steps)

    def select(self, state: TrainState, step: int, track: Tracker) -> None:
        """Evaluate the checkpoint of `step`, unless that is done, and report it."""
        assert self.splits.selection
        measured = multihost.broadcast(self.checkpoints.read_metrics(step))
        if not measured:
            with track.timer("eval"):
                measured = self.measure(state.eval_params, self.splits.selection)
            with track.timer("checkpoint"):
                self.checkpoints.record(step, measured)
        track.scalars(step, {f"eval/{key}": x for key, x in select_scalars(measured).items()})

    def final_results(self, final: Source) -> dict:
        """Evaluate the last step on the final split and, under "best", the selected one."""
        cfg, checkpoints = self.cfg, self.checkpoints

        def result(state):
            selected = multihost.broadcast(checkpoints.read_metrics(int(state.step)))
            measured = self.measure(state.eval_params, final, selected)
            return {"split": cfg.eval.final, "step": int(state.step), **measured}

        last = chosen = result(restore(self.setup, checkpoints, cfg.steps))
        best_first = checkpoints.rank()
        if not best_first:
            return last
        if best_first[0] != last["step"]:
            chosen = result(recover(self.setup, checkpoints, best_first))
        selected = {"split": cfg.eval.split, **checkpoints.read_metrics(chosen["step"])}
        return {**last, "best": {**chosen, "selected_by": selected}}

    def roll_back(self, error: Diverged) -> None:
        """Record a rollback to the newest checkpoint that skips the batches since.

        Raises UserError after too many rollbacks.
        """
        self.checkpoints.wait()
        past = rollbacks.agree(self.run.path)
        if len(past) >= self.cfg.divergence.rollbacks:
            raise diverged_for_good(error, past) from None
        step = self.checkpoints.find_latest() or 0
        with multihost.shared_errors():
            if multihost.is_first():
                rollbacks.write(self.run.path, [*past, Rollback(step, error.step)])
                line = f"vit-scale: {error}; rolling back to step {step} and skipping those batches"
                print(line, file=sys.stderr, flush=True)


def due(step: int, every: int, last: int) -> bool:
    """Return whether something done every `every` steps (0: at the end) is due after `step`."""
    return step == last or (every > 0 and step % every == 0)


def sample_images(setup: Setup, batch: dict) -> np.ndarray:
    """Return the first images of the first batch as the model sees them, uint8 [n, H, W, 3].

    Of an objective that compares crops they are the global crops, those of an image side by side.
    """
    cfg = setup.cfg
    key = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), 0))[0]
    first = {name: jnp.asarray(leaf[: cfg.log.images]) for name, leaf in batch.items()}

    def augment(batch: dict, key: jax.Array) -> jax.Array:
        examples = setup.objective.prepare(batch, key)
        if "image" in examples:
            return examples["image"]
        crops = examples["global"]
        return crops.reshape(-1, *crops.shape[2:])[: cfg.log.images]

    # Compiled as one: operation by operation it took ten seconds.
    images = jax.jit(augment, compiler_options=cpu_options(setup.mesh))(first, key)
    pixels = 255 * (np.asarray(images) * cfg.augment.std + np.asarray(cfg.augment.mean))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def make_utilisation(setup: Setup) -> Callable[[float], float | None]:
    """Return a function of images/s: model FLOPs utilisation, None if the peak is unknown."""
    kind = jax.devices()[0].device_kind
    if peak_flops(kind) is None:  # then counting the model's FLOPs would be wasted
        return lambda images_per_second: None
    per_image = setup.flops_per_image
    return lambda rate: mfu(rate, per_image, jax.device_count(), kind)


def tracker(setup: Setup, run: Run, start: int, quiet: bool) -> Tracker:
    """Build the run's tracker, which begins after step `start`."""
    mfu = make_utilisation(setup)
    return Tracker(TrackedRun(run.path, setup.cfg, run.description, start, quiet, mfu))
