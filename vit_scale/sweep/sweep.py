"""Run a sweep, and say which run is best."""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_scale import checkpoint, config
from vit_scale.data import are_disjoint
from vit_scale.distributed import preemption
from vit_scale.errors import DIVERGED, USAGE, UserError
from vit_scale.inspect.curves import Curve, read_curves
from vit_scale.runs import report
from vit_scale.runs.json_files import read_json, write_json
from vit_scale.runs.lock import Lock
from vit_scale.storage import cache, paths
from vit_scale.sweep import halving
from vit_scale.sweep.points import Point, run_name, train_arguments
from vit_scale.sweep.processes import LOGS, Failure, Job, run_jobs
from vit_scale.sweep.slots import make_slots
from vit_scale.training import objectives, optimizer, validation
from vit_scale.training.evaluator import main_result

FILE = "sweep.json"


class Sweep(NamedTuple):
    """What is swept: a config by name, with fields for all runs, at some points.

    `keep`: at each rung of successive halving one in `keep` runs continues; None: all train to the
    end.
    """

    config: str
    overrides: Sequence[str]
    points: Sequence[Point]
    folder: pathlib.Path
    keep: int | None = None

    @property
    def logs(self) -> pathlib.Path:
        """The folder of what the runs print, on this machine."""
        return cache.local(self.folder) / LOGS

    def run_folder(self, point: Point) -> pathlib.Path:
        return self.folder / run_name(point)


def check(sweep: Sweep) -> list[ConfigDict]:
    """Return the config of each point. Raises UserError for a point that can't be trained.

    Also for a config of several runs, for one without a held-out split to select by, and for points
    whose runs would have the same folder.
    """
    configs = [
        config.load(sweep.config, [*sweep.overrides, *(f"{k}={v}" for k, v in point.items())])
        for point in sweep.points
    ]
    first = configs[0]
    if first.stages:
        stages = ", ".join(f"{sweep.config}:{stage}" for stage in first.stages)
        raise UserError(f"{sweep.config} is several runs: sweep one of {stages}", USAGE)
    for cfg in configs:
        _check_trainable(cfg)
    names: dict[str, str] = {}  # by what is trained
    for point, cfg in zip(sweep.points, configs, strict=True):
        name = run_name(point)
        if name in names.values():
            raise UserError(
                f"two points have the folder {name}: their values differ only in characters that "
                "a folder's name can't have"
            )
        if (other := names.setdefault(cfg.to_json(), name)) != name:
            raise UserError(f"the points {other} and {name} are the same run: leave one out")
    return configs


def _check_trainable(cfg: ConfigDict) -> None:
    """Raise UserError for a config that can't train, as far as that can be said without devices.

    And for one whose eval.split is not held out.
    """
    split, train, final = cfg.eval.split, cfg.data.train, cfg.eval.final
    held_out = (
        split and are_disjoint(split, train) and not (final and not are_disjoint(split, final))
    )
    if not held_out:
        raise UserError(
            "a sweep selects by eval.split, which must be held out from training and from the "
            f"final test (data.train={train!r}, eval.split={split!r}, eval.final={final!r}): give "
            "--config.data.train=train[:98%] --config.eval.split=train[98%:]",
            USAGE,
        )
    validation.check_counts(cfg)
    validation.check_model(cfg)
    optimizer.check(cfg.optim, cfg.steps)
    objectives.check(cfg)


def run_sweep(
    sweep: Sweep, parallel: int = 1, quiet: bool = False, train: bool = True
) -> dict[str, Any]:
    """Train every point, or resume that, and return the comparison, which SWEEP/sweep.json holds.

    With `train=False` what is trained so far is compared.

    Returns:
      {"config": ..., "overrides": [...], "rungs": [...], "split": ..., "measure": "accuracy",
      "runs": [...], "best": NAME or None}; "runs", the best first, are dicts of "name", "point",
      "step", "result" at that step, "n" and "status".

    Raises:
      UserError: the points, the slots or the folder can't work, or a run stopped resumably.
      Preempted: after SIGTERM, when all runs have stopped.
    """
    configs = check(sweep)
    first = configs[0]
    rungs = [first.steps]
    if sweep.keep:
        if any((c.steps, c.eval.every) != (first.steps, first.eval.every) for c in configs):
            raise UserError("--halving compares runs of the same steps and eval.every", USAGE)
        rungs = halving.rungs(len(configs), sweep.keep, first.steps, first.eval.every)
    content = {
        "config": sweep.config,
        "overrides": list(sweep.overrides),
        "rungs": rungs if sweep.keep else [],
        "split": first.eval.split,
        "measure": main_result(first),
    }
    slots = make_slots(parallel)
    pairs = zip(sweep.points, configs, strict=True)
    runs = [Entry(point, cfg.steps, content["measure"]) for point, cfg in pairs]
    racing = list(range(len(runs)))
    lock = Lock(sweep.folder)
    with preemption.deferred(), contextlib.ExitStack() as held:
        lock.acquire()
        held.callback(lock.release)
        _claim(sweep.folder, content)
        for rung in rungs:
            until = rung if sweep.keep and rung < first.steps else None
            jobs = [job for i in racing if (job := _job(sweep, runs[i], until)) is not None]
            jobs = jobs if train else []
            failures = run_jobs(jobs, slots, sweep.logs, quiet)
            for i in racing:
                runs[i].read(sweep, until, failures)
            ranking = sorted(racing, key=lambda i: runs[i].score, reverse=True)
            write_json(sweep.folder / FILE, {**content, **_comparison(runs)})
            racing = halving.survivors(ranking, sweep.keep) if sweep.keep else racing
    return {**content, **_comparison(runs)}


class Entry:
    """One run of a sweep: how far it came, and its result there."""

    def __init__(self, point: Point, steps: int, measure: str):
        self.point, self.steps, self.measure = point, steps, measure
        self.step, self.status = 0, "waiting"
        self.result: float | None = None
        self.n: int | None = None

    @property
    def score(self) -> tuple[float, float]:
        """What runs are ranked by: how much of them is trained, then the result."""
        return (-1.0, 0.0) if self.result is None else (self.step / self.steps, self.result)

    def read(self, sweep: Sweep, until: int | None, failures: dict[str, Failure]) -> None:
        """Read the run's result at the step `until`; None: at its end."""
        if (error := failures.get(run_name(self.point))) is not None:
            self.status = "diverged" if error.code == DIVERGED else f"failed: {error.line}"
            self.result = None
            return
        curves = read_curves(sweep.run_folder(self.point))
        self.step = until or self.steps
        self.result = _value_at(curves, self.measure, self.step)
        n = _value_at(curves, "n", self.step)
        self.n = None if n is None else int(n)
        self.status = "stopped" if until else "finished"
        if self.result is None:
            self.status = f"no result at step {self.step:,}"


def _value_at(curves: dict[str, Curve], name: str, step: int) -> float | None:
    """Return an evaluation's value at a step; None where it is missing or was not finite."""
    steps, values = curves.get(f"eval/{name}", ([], []))
    return dict(zip(steps, values, strict=True)).get(step)


def _job(sweep: Sweep, entry: Entry, until: int | None) -> Job | None:
    """Return what is left to train of a run up to a rung; None if that is done."""
    folder = sweep.run_folder(entry.point)
    done, last = max(checkpoint.finished_steps(folder), default=0), until or entry.steps
    evaluated = until and _value_at(read_curves(folder), entry.measure, until) is not None
    if (folder / "report.json").exists() or (evaluated and done >= (until or 0)):
        return None
    arguments = train_arguments(sweep.config, sweep.overrides, entry.point, folder)
    arguments += ["--until", str(until)] if until else []
    return Job(run_name(entry.point), arguments, folder, min(done, last), last)


def _comparison(runs: Sequence[Entry]) -> dict[str, Any]:
    ranked = sorted(runs, key=lambda entry: entry.score, reverse=True)
    rows = [
        {
            "name": run_name(entry.point),
            "point": entry.point,
            "step": entry.step,
            "result": entry.result,
            "n": entry.n,
            "status": entry.status,
        }
        for entry in ranked
    ]
    best = ranked[0] if ranked[0].status == "finished" else None
    return {"runs": rows, "best": run_name(best.point) if best else None}


def _claim(folder: pathlib.Path, content: dict) -> None:
    """Write sweep.json, or check that it is of the same sweep, which may have other points."""
    file = folder / FILE
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {**content, "runs": [], "best": None})
        return
    stored = read_json(file)
    changed = [
        f"{key}: {stored.get(key)} -> {content[key]}"
        for key in ("config", "overrides", "measure", "split")
        if stored.get(key) != content[key]
    ]
    if changed:
        raise UserError(
            f"{folder} holds another sweep ({'; '.join(changed)}); use another --workdir"
        )


def format_sweep(result: dict[str, Any], markdown: bool = False) -> str:
    """Format a comparison as a table, the best run first."""
    rows = [
        {
            **row["point"],
            "step": row["step"],
            result["measure"]: None
            if row["result"] is None
            else report.format_value(result["measure"], row["result"]),
            "n": row["n"],
            "status": row["status"],
        }
        for row in result["runs"]
    ]
    return report.table(rows, markdown)


def default_folder(name: str) -> pathlib.Path:
    """Return the folder of a sweep for which none is named."""
    return paths.parse(f"runs/{config.title(name)}-sweep")
