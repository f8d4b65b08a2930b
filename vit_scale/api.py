"""What the command line does, as functions: for scripts and notebooks.

They install no signal handlers, never exit the process, and raise `vit_scale.errors.UserError` for
whatever the command line reports in one line.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_scale import config, pretrained
from vit_scale.config import base, image_size
from vit_scale.data import Source, align, open_evaluation, share_images
from vit_scale.data.targets import CLASS, CLASSES
from vit_scale.distributed.mesh import make_mesh
from vit_scale.distributed.sharding import shard, shardings
from vit_scale.errors import USAGE, UserError
from vit_scale.evaluation import KNN, PROBES, Layer, Settings
from vit_scale.evaluation import probe as probe_features
from vit_scale.evaluation.probing import at_size
from vit_scale.models.parameters import stack, unstack
from vit_scale.pretrained import average as averaging
from vit_scale.storage import paths
from vit_scale.training.evaluator import Measure, make_measure
from vit_scale.training.setup import summary
from vit_scale.training.stages import train_stages
from vit_scale.training.trainer import train as train_run
from vit_scale.training.validation import check_classes, validate_evaluation


def train(
    config: str | ConfigDict,
    workdir: str | os.PathLike | None = None,
    *,
    quiet: bool = False,
    watchdog: bool = False,
    until: int | None = None,
    **overrides: Any,
) -> dict:
    """Train a config, or resume its run: the same call continues an interrupted one.

    Args:
      config: a config's name or path, with an argument if it takes one ("quickstart:scratch"), or a
        whole ConfigDict such as `vit_scale.config.load` returns.
      workdir: folder of the run, on disk or "gs://..."; default: runs/NAME.
      quiet: print errors only.
      watchdog: end this process when training stalls, as the command line does.
      until: save and stop after this step; a later call continues, as if it had not stopped.
      **overrides: config fields by their dotted names: `**{"optim.lr": 3e-4}`.

    Returns:
      The content of the run's report.json, such as {"step": 100, "eval": {"accuracy": ..., "n":
      ...}, ...}; for a config of several stages, such a report for each stage by its name; {} where
      `until` stopped it before its last step.

    Raises:
      UserError: the config, its data, or its weights can't work.
    """
    if not watchdog:
        overrides = {f"watchdog.{name}": 0.0 for name in base().watchdog} | overrides
    if isinstance(config, ConfigDict):
        if workdir is None:
            raise UserError("train(ConfigDict) needs a workdir: the run's folder", USAGE)
        if config.stages:
            raise UserError(
                f"a ConfigDict is one run, and this one has stages={config.stages}: give the "
                "config's name, or NAME:STAGE",
                USAGE,
            )
        cfg = overridden(config, overrides)
        return train_run(cfg, workdir, paths.parse(workdir).name, quiet, until)
    workdir = workdir or default_workdir(config)
    return train_stages(config, as_items(overrides), workdir, quiet, until)


def default_workdir(name: str) -> str:
    """Return the folder that a config trains in where none is named.

    Runs of a sweep by Weights & Biases, whose agent names them in the environment, have one each.
    """
    sweep, run = (os.environ.get(f"WANDB_{part}_ID") for part in ("SWEEP", "RUN"))
    if sweep and run:
        return f"runs/{config.title(name)}-sweep-{sweep}/{run}"
    return f"runs/{config.title(name)}"


def evaluate(
    run: str | os.PathLike,
    split: str | None = None,
    *,
    real: str | os.PathLike | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> dict:
    """Evaluate a run's model, or external weights, on every example of a split.

    Args:
      run: a run's folder, RUN/checkpoints/STEP, or a file of weights.
      split: such as "test" or "train[98%:]"; default: the run's eval.final.
      real: ReaL's real.json, by which the predictions on ImageNet's validation set are judged.
      quiet: don't print what had to be assumed about external weights.
      **overrides: config fields by their dotted names: `**{"data.path": "DIR"}`.

    Returns:
      {"run": path, "step": ..., "split": ..., "set": name of the data set, "accuracy": in [0, 1],
      "balanced_accuracy": mean of the classes' own, "loss": mean cross-entropy, "n": examples
      evaluated}; with `real` neither of the middle two. Of a run with several classes an image
      {..., "mAP": ..., "macro_f1": ..., "micro_f1": ..., "thresholds": of probabilities, those of
      the run's eval.split, else 0.5}; of a regression {..., "r2": ..., "rmse": ..., "mae": ...}

    Raises:
      UserError: there is no such run or split, or its classes are not the model's.
    """
    source = pretrained.load_model(run)
    cfg = _resolve(source, overrides)
    if not source.run:  # of an old run that did not record its data, the config tells
        _require_data(run, source, overrides)
    split = _final_split(run, split, cfg)
    model, params = at_size(source, cfg)
    source = source._replace(model=model, params=params)
    measure, examples, line, _ = _evaluation(source, cfg, split, real)
    if not quiet:
        source._replace(notes=(*source.notes, *filter(None, [line]))).print_notes()
    result = measure(source.params)
    if real:
        del result["loss"], result["balanced_accuracy"]  # of no label
    return {
        "run": str(source.path),
        "step": source.step,
        "split": split,
        "set": examples.name,
        **result,
    }


def _resolve(source: pretrained.Pretrained, overrides: Mapping[str, Any]) -> ConfigDict:
    """Return the config of a source, on this machine's devices, with overrides."""
    cfg = copy.deepcopy(source.cfg)
    cfg.mesh = base().mesh  # not those of the training
    return overridden(cfg, overrides)


def _require_data(
    run: str | os.PathLike, source: pretrained.Pretrained, overrides: Mapping[str, Any]
) -> None:
    """Raise UserError where neither the model nor the overrides name a data set."""
    if source.data is None and "data.name" not in overrides:
        raise UserError(
            f"{run} has no data set of its own: give one, such as --config.data.name=folder "
            "--config.data.path=DIR",
            USAGE,
        )


def _final_split(run: str | os.PathLike, split: str | None, cfg: ConfigDict) -> str:
    """Return `split`, or else the config's eval.final. Raises UserError where that is empty."""
    if not (split := split or cfg.eval.final):
        raise UserError(
            f"{run} has no eval.final split: give a split, such as test (--split test)", USAGE
        )
    return split


def _evaluation(
    source: pretrained.Pretrained, cfg: ConfigDict, split: str, real: str | os.PathLike | None
) -> tuple[Callable[[dict], dict], Source, str, Measure]:
    """Return (parameters -> result, the examples, a line on how outputs map, what it measures)."""
    if real and cfg.data.target != CLASS:
        raise UserError(
            f"--real judges one class an image, not data.target={cfg.data.target}", USAGE
        )
    if not source.classes:
        raise UserError(
            f"{source.path} has no classification head to evaluate: vit-scale probe measures its "
            "features"
        )
    cfg.eval.probe = cfg.eval.bank = ""
    mesh = make_mesh(cfg.mesh)
    validate_evaluation(cfg, mesh)
    examples = open_evaluation(cfg, split, source.classes, real)
    check_classes(examples, cfg)
    examples, line = align(examples, source.classes, cfg.init.classes)
    measure = make_measure(cfg, source.model, mesh)
    selected = source.read_selection() if cfg.data.target == CLASSES else {}

    layout = unstack if "0" in source.params.get("blocks", {}) else stack

    def of_params(params: dict) -> dict:
        params = layout(params)
        return measure(shard(params, shardings(params, mesh)), examples, selected)

    return of_params, examples, line, measure


def probe(
    run: str | os.PathLike,
    train: str | None = None,
    split: str | None = None,
    *,
    knn: int = KNN().k,
    temperature: float = KNN().temperature,
    feature: str = Layer().kind,
    layer: int | None = None,
    shots: Sequence[int] = Settings().shots,
    draws: int = Settings().draws,
    only: Sequence[str] = PROBES,
    cache: str | os.PathLike | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> dict:
    """Measure how good the features of a run's model, or of external weights, are.

    Args:
      run: a run's folder, RUN/checkpoints/STEP, or a file of weights; it needs no head.
      train: the split that classifiers are fitted to; default: the run's data.train.
      split: the split that is classified; default: the run's eval.final.
      knn: the number of neighbours.
      temperature: of the neighbours' weights, exp(similarity / temperature).
      feature: pooled (what a head reads), cls, mean (of the patch tokens), or cls_mean (both).
      layer: the block whose tokens are taken, from 0, or from the end if negative; default: last.
      shots: numbers of training images a class of the few-shot classifiers.
      draws: of those images.
      only: which of knn, linear, few_shot and statistics to measure.
      cache: folder for features; default: RUN/features, and none for external weights.
      quiet: don't print what had to be assumed about external weights.
      **overrides: config fields by their dotted names: `**{"data.path": "DIR"}`.

    Returns:
      What was measured on which splits, and the result of each probe by its name, such as {...,
      "knn": {"accuracy": in [0, 1], "n": ..., "interval": of 95 %, "k": ..., ...}, ...}.

    Raises:
      UserError: there is no such run or split, or a setting can't work with them.
    """
    source = pretrained.load_model(run, pretrained.convert_hints(as_items(overrides)))
    cfg = _resolve(source, overrides)
    _require_data(run, source, overrides)
    split = _final_split(run, split, cfg)
    if not quiet:
        source.print_notes()
    settings = Settings(Layer(feature, layer), KNN(knn, temperature), shots, draws, only)
    folder = paths.parse(cache) if cache else None
    return probe_features(source, cfg, train or cfg.data.train, split, settings, folder)


def average(
    runs: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    split: str | None = None,
    wise_ft: float | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> None:
    """Write the average of runs' weights as a new run, with one checkpoint of step 0.

    Args:
      runs: run folders, RUN/checkpoints/STEP, or files of weights.
      out: the new run's folder.
      split: make a greedy soup by the accuracy (or mAP, or R^2) on this split, such as
        "train[90%:]"; without it, the uniform mean.
      wise_ft: interpolate instead: the share of the second run, fine-tuned from the first.
      quiet: don't print the result of every evaluation, and what was averaged.
      **overrides: config fields of a greedy soup's evaluation: `**{"data.path": "DIR"}`.

    Raises:
      UserError: the runs differ in architecture or classes, or the split shares images with those
        that the runs were trained on or are finally judged by.
    """
    report: Callable[[str], None] = (lambda line: None) if quiet else print
    workdir = pretrained.new_folder(out)
    if wise_ft is not None:
        if len(runs) != 2 or split:
            raise UserError("--wise-ft takes two runs, BASE and FINE_TUNED, and no split", USAGE)
        result = averaging.wise_ft(runs[0], runs[1], wise_ft)
    elif split:
        first = pretrained.load_model(runs[0])
        measure, examples, main = _selection(first, split, overrides)
        report(f"selecting by {examples.name}: {len(examples):,} images")
        result = averaging.greedy_soup(runs, measure, report, main)
    else:
        result = averaging.soup(runs)
    pretrained.write_run(workdir, result.model, result.lines)
    for line in result.lines:
        report(line)


def _selection(
    source: pretrained.Pretrained, split: str, overrides: Mapping[str, Any]
) -> tuple[Callable[[dict], dict], Source, str]:
    """Return what measures a split that may select models, its examples, and the main result."""
    cfg = _resolve(source, overrides)
    if image_size(cfg) != image_size(source.cfg):
        size = "{} x {}".format(*image_size(source.cfg))
        raise UserError(f"a greedy soup selects at the runs' own image size, {size}", USAGE)
    for field, use in (("data.train", "trained on"), ("eval.final", "finally judged by")):
        used = config.fields(source.cfg)[field]
        if cfg.data.name == source.cfg.data.name and used and share_images(cfg.data, split, used):
            raise UserError(
                f"split {split} shares images with {field}={used}, which {source.path} is {use}: "
                "select by images that were held out, such as train[90%:] of runs that were "
                "trained with data.train=train[:90%]",
                USAGE,
            )
    measure, examples, _, kind = _evaluation(source, cfg, split, None)
    return measure, examples, kind.main


def show(config: str | ConfigDict, **overrides: Any) -> dict:
    """Describe a config without training it.

    Returns:
      {"parameters": count, "tokens": per image, "flops_per_image": of training, "global_batch":
      ..., "steps": ..., "config": every field}; for a config of several stages also {"stages": the
      fields of each}. A distillation's teacher is not read: its FLOPs are not in it.

    Raises:
      UserError: the fields can't be combined.
    """
    if isinstance(config, ConfigDict):
        return summary(overridden(config, overrides))
    return show_named(config, as_items(overrides))


def show_named(name: str, overrides: list[str]) -> dict:
    """Describe the config `name` and its stages; `overrides` are "FIELD=VALUE"."""
    cfg = config.load(name, overrides)
    content = summary(cfg)
    if cfg.stages:
        content["stages"] = {
            stage: config.to_json(config.load(f"{name}:{stage}", overrides)) for stage in cfg.stages
        }
    return content


def as_items(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides as the command line writes them: "FIELD=VALUE"."""
    return [f"{field}={value}" for field, value in overrides.items()]


def overridden(cfg: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of `cfg` with overrides applied. Raises UserError."""
    return config.override(copy.deepcopy(cfg), as_items(overrides))
