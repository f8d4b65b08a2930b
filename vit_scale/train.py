"""Training: one loop for pretraining and fine-tuning.

A resumed run repeats the undisturbed one bit for bit, because its batches, their augmentation,
dropout and the learning rate are functions of (seed, step), and nothing else is remembered (law 4).
"""

import functools
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_scale import config, data, flops, hosts, paths
from vit_scale.augment import train_images
from vit_scale.checkpoint import Checkpoints, steps
from vit_scale.data import Source, open_split, train_batches
from vit_scale.evaluate import Evaluate, check_classes
from vit_scale.mesh import batch_rows, put_batch
from vit_scale.model import count
from vit_scale.program import Program, jit_train_step, plan_program, training_flops
from vit_scale.run import Run
from vit_scale.state import averaged, check_source, init_state, restore
from vit_scale.tracking import Tracker, git_state, parameter_table, versions


def train(cfg: ConfigDict, workdir: str | os.PathLike, name: str, quiet: bool = False) -> dict:
    """Run `cfg` in the folder `workdir`, from its newest checkpoint on; returns its report.

    A finished run is left as it is. Raises UserError, before anything is compiled, for whatever can
    be seen to be wrong.
    """
    with hosts.together():
        program, sources = plan_program(cfg), open_sources(cfg)
        about = describe(program, name, sources.train)
        if not steps(paths.path(workdir)):
            check_source(program, sources.train.classes)
    with Run(workdir, about) as run, Checkpoints(run.path, cfg.checkpoint.keep) as checkpoints:
        if run.report:
            return run.report
        state = restore(program, checkpoints) or init_state(program, sources.train.classes, quiet)
        train_step, evaluate = jit_train_step(program), Evaluate(cfg, program.model, program.mesh)
        with tracker(program, run, int(state.step), quiet) as track:
            start, rows = int(state.step), batch_rows(cfg.data.batch, program.mesh)
            batches = train_batches(sources.train, cfg.data, cfg.seed, start, cfg.steps, rows)
            for finished, batch in track.waiting(batches):
                if finished == 0 and cfg.log.images:
                    track.images("train/images", 0, sample_images(program, batch))
                state, measures = train_step(state, put_batch(batch, program.mesh, cfg.data.batch))
                step, selection = finished + 1, None
                track(step, measures)
                if sources.selection and due(step, cfg.eval.every, cfg.steps):
                    with track.timer("eval"):
                        selection = evaluate(averaged(state), sources.selection)
                    track.scalars(step, {f"eval/{key}": x for key, x in selection.items()})
                if selection or due(step, cfg.checkpoint.every, cfg.steps):
                    with track.timer("checkpoint"):
                        checkpoints.save(step, state._asdict(), about, selection)
            checkpoints.wait()
            report = summarise(program, sources, track) | {"config": name}
            if sources.final:
                report["eval"] = final_results(program, checkpoints, evaluate, sources.final)
                track.scalars(cfg.steps, {"final/accuracy": report["eval"]["accuracy"]})
        run.write_report(report)
    return report


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

    def opened(split: str) -> Source:
        source = open_split(cfg.data, split)
        check_classes(source, cfg)
        return source

    return Sources(
        train=opened(cfg.data.train),
        selection=opened(cfg.eval.split) if cfg.eval.split else None,
        final=opened(cfg.eval.final) if cfg.eval.final else None,
    )


def sample_images(program: Program, batch: dict) -> np.ndarray:
    """The first images of the first batch as the model will see them, uint8 [n, H, W, 3]."""
    cfg = program.cfg
    key = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), 0))[0]
    first = {name: jnp.asarray(leaf[: cfg.log.images]) for name, leaf in batch.items()}
    images, _ = train_images(first, key, cfg.augment, config.image_size(cfg), cfg.model.classes)
    pixels = 255 * (np.asarray(images) * cfg.augment.std + np.asarray(cfg.augment.mean))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def describe(program: Program, name: str, source: Source) -> dict:
    """What run.json, every checkpoint and the trackers say of the run."""
    return {
        "name": name,
        "config": config.to_json(program.cfg),
        "classes": list(source.classes),
        "data": data.describe(source),
        "devices": devices(),
        "git": git_state(pathlib.Path(__file__).parent),
        "versions": versions(),
        "parameters": parameter_table(program.state.params),
    }


def devices() -> dict:
    return {
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
        "hosts": jax.process_count(),
    }


def utilisation(program: Program, images_per_second: float) -> float | None:
    """Model FLOPs utilisation; None where the device's peak is unknown."""
    per_image = training_flops(program.model, program.cfg.model.classes)
    kind = jax.devices()[0].device_kind
    return flops.mfu(images_per_second, per_image, jax.device_count(), kind)


def tracker(program: Program, run: Run, start: int, quiet: bool) -> Tracker:
    """The run's writers, from the step that it goes on from."""
    cfg, about = program.cfg, run.description
    return Tracker(
        run.path,
        cfg,
        about["name"],
        cfg.steps,
        start,
        about,
        quiet=quiet,
        process=jax.process_index(),
        mfu=functools.partial(utilisation, program),
    )


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


def final_results(
    program: Program, checkpoints: Checkpoints, evaluate: Evaluate, source: Source
) -> dict:
    """The results on `source` of the last step and, under "best", of the one selection chose."""

    def result(step):
        state = restore(program, checkpoints, step)
        return {"split": program.cfg.eval.final, "step": step, **evaluate(averaged(state), source)}

    last, best = result(checkpoints.latest), checkpoints.best
    if best is None:
        return last
    selected = {"split": program.cfg.eval.split, **checkpoints.metrics(best)}
    chosen = last if best == last["step"] else result(best)
    return {**last, "best": {**chosen, "selected_by": selected}}
