"""Average the weights of models that were fine-tuned from the same one.

A uniform or a greedy soup of several runs (Wortsman et al. 2022, arXiv 2203.05482), and WiSE-FT's
interpolation between a model and what it was fine-tuned to (Wortsman et al. 2022, arXiv
2109.01903). Sums are in float64: the mean of a run with itself is that run, bit for bit.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from vit_scale.config import image_size
from vit_scale.errors import UserError
from vit_scale.models.parameters import is_statistic, named, stack, unstack
from vit_scale.models.spec import TRAINING_FIELDS, Shape
from vit_scale.pretrained.adapt import adapt, match_head
from vit_scale.pretrained.key_mapping import HEAD
from vit_scale.pretrained.load import Pretrained, load_model
from vit_scale.runs.report import format_results

# Fields of the `model` block that decide how a model is computed or how it began, not its function.
IGNORED = ("variant", *TRAINING_FIELDS)
Measure = Callable[[dict], dict]  # parameters -> {"accuracy": ..., "n": ..., ...}
Source = str | os.PathLike


class Average(NamedTuple):
    """An averaged model: of one of the runs, with other parameters; and how it was made."""

    model: Pretrained
    lines: tuple[str, ...]


def soup(runs: Sequence[Source]) -> Average:
    """Return the uniform mean of the runs' weights, with the config of the first.

    Raises UserError for runs of different architectures or classes.
    """
    first, paths = load_model(runs[0]), []

    def checked() -> Iterator[dict]:
        for index, run in enumerate(runs):
            model = load_model(run) if index else first
            check_alike(first, model)
            paths.append(str(model.path))
            yield model.params

    params = mean(checked())
    return Average(first._replace(params=params), (f"mean of {', '.join(paths)}",))


def greedy_soup(
    runs: Sequence[Source],
    measure: Measure,
    report: Callable[[str], None],
    main: str = "accuracy",
) -> Average:
    """Return the mean of those runs that don't lower its accuracy, with the config of the best.

    The best run by itself comes first, then each of the others in the order of their accuracy, or
    of another result, `main`. `report` gets a line for every evaluation. Raises UserError as `soup`
    does.
    """
    first, own = load_model(runs[0]), []
    for index, run in enumerate(runs):
        model = load_model(run) if index else first
        check_alike(first, model)
        own.append(measure(model.params))
        report(f"{model.path}: {format_results(own[-1], main)}")
    order = sorted(range(len(runs)), key=lambda index: -own[index][main])  # stable
    chosen, best = order[:1], own[order[0]][main]
    model = load_model(runs[order[0]])
    for index in order[1:]:
        mixed = mean(load_model(runs[one]).params for one in [*chosen, index])
        result = measure(mixed)
        better = result[main] >= best
        names = " + ".join(str(runs[one]) for one in [*chosen, index])
        report(f"{names}: {format_results(result, main)}: {'kept' if better else 'not kept'}")
        if better:
            model, best = model._replace(params=mixed), result[main]
            chosen = [*chosen, index]
    paths = ", ".join(str(load_model(runs[index]).path) for index in chosen)
    return Average(model, (f"greedy mean of {paths}",))


def wise_ft(base: Source, tuned: Source, alpha: float) -> Average:
    """Return (1 - alpha) base + alpha tuned, with the config of the fine-tuned run.

    The base's positions are resampled and its blocks stacked as in fine-tuning. Where it has other
    classes, the fine-tuned head is kept, which a line says. Raises UserError for models of
    different architectures.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"--wise-ft {alpha} must be from 0 (the base) to 1 (the fine-tuned run)")
    first, last = load_model(base), load_model(tuned)
    check_alike(last, first, but=("image", "model.representation", "classes"))
    cfg = last.cfg
    match = match_head(first.classes, last.classes, "auto", cfg.init.classes)
    params, rows = adapt(
        *(first.params, last.params, cfg.init.resample, match is not None),
        outputs=match.outputs if match else None,
    )
    mixed = mean([params, last.params], (1 - alpha, alpha))
    lines = [f"{1 - alpha:g} x {first.path} + {alpha:g} x {last.path}"]
    if match is None:
        kept = [row.name for row in rows if row.name in HEAD or row.action.startswith("new")]
        lines.append(
            f"{', '.join(kept)}: of the fine-tuned run alone, since the base has other classes"
        )
    return Average(last._replace(params=mixed), tuple(lines))


def mean(trees: Iterable[dict], weights: Sequence[float] | None = None) -> dict:
    """Return the mean of parameter trees, or their sum with `weights`, computed in float64.

    The result has the first tree's dtypes and layout of the blocks.
    """
    total: dict[str, np.ndarray] = {}
    like: dict = {}
    count = 0
    for count, tree in enumerate(trees, 1):
        like = like or tree
        leaves = named((unstack if "0" in like.get("blocks", {}) else stack)(tree))
        weight = weights[count - 1] if weights else 1.0
        for name, leaf in leaves.items() if weight else ():
            term = weight * np.asarray(leaf, np.float64)
            total[name] = total[name] + term if name in total else term
    divisor = 1.0 if weights else count
    averaged = [(total[name] / divisor).astype(leaf.dtype) for name, leaf in named(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), averaged)


def check_alike(first: Pretrained, other: Pretrained, but: Sequence[str] = ()) -> None:
    """Raise UserError, with the differences, where two models are not the same function.

    `but` names what may differ. Models with batch normalisation are refused: the statistics of a
    mean are not the mean of the statistics.
    """
    for model in (first, other):
        if any(map(is_statistic, named(model.params))):
            raise UserError(
                f"{model.path} has batch normalisation, whose statistics can't be averaged"
            )
    left, right = _function(first), _function(other)
    different = [
        f"{name}: {left.get(name, 'absent')} and {right.get(name, 'absent')}"
        for name in {**left, **right}
        if left.get(name) != right.get(name) and name not in but
    ]
    if first.classes != other.classes and "classes" not in but:
        different.append(f"classes: {_difference(first.classes, other.classes)}")
    if different:
        raise UserError(f"{first.path} and {other.path} can't be averaged: {'; '.join(different)}")


def _function(model: Pretrained) -> dict[str, object]:
    """Return the fields, resolved, by which a model computes its function of the parameters."""
    cfg, shape = model.cfg, model.model.shape
    fields = {f"model.{name}": value for name, value in cfg.model.items() if name not in IGNORED}
    fields |= {
        "model.variant": cfg.model.variant,
        "model.layer_scale": cfg.model.layer_scale > 0,
        "image": "{} x {}".format(*image_size(cfg)),
        "augment.mean": cfg.augment.mean,
        "augment.std": cfg.augment.std,
        "regression.mean": tuple(cfg.regression.mean),  # the units of the outputs
        "regression.std": tuple(cfg.regression.std),
    }
    if isinstance(shape, Shape):  # whose sizes may be named or written out
        fields |= {f"model.{name}": size for name, size in dataclasses.asdict(shape.size).items()}
        stem = f"{shape.stem.name}+, " if shape.stem else ""
        fields["model.variant"] = f"{stem}patch {shape.patch}"
    return fields


def _difference(left: Sequence[str], right: Sequence[str]) -> str:
    if len(left) != len(right):
        return f"{len(left)} and {len(right)}"
    index = next(i for i, (one, other) in enumerate(zip(left, right, strict=True)) if one != other)
    return f"{index} is {left[index]!r} and {right[index]!r}"
