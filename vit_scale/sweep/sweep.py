"""Run a sweep, and say which run is best."""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

from vit_scale import checkpoint, config
from vit_scale.distributed import preemption
from vit_scale.errors import DIVERGED, USAGE, UserError
from vit_scale.inspect.curves import Curve, read_curves
from vit_scale.runs import report
from vit_scale.runs.json_files import write_json
from vit_scale.runs.lock import Lock
from vit_scale.storage import paths
from vit_scale.sweep import halving
from vit_scale.sweep.definition import FILE, Sweep, check, check_runs, check_same_sweep, claim
from vit_scale.sweep.points import Point, run_name, train_arguments
from vit_scale.sweep.processes import Failure, Job, run_jobs
from vit_scale.sweep.slots import make_slots
from vit_scale.training.evaluator import main_result


def run_sweep(
    sweep: Sweep, parallel: int = 1, quiet: bool = False, train: bool = True
) -> dict[str, Any]:
    """Train every point, or resume that, and return the comparison, which SWEEP/sweep.json holds.

    With `train=False` what is trained so far is compared, and sweep.json stays as it is.

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
    check_same_sweep(sweep.folder, content)
    if not train:
        return {**content, **_comparison(_trained_so_far(sweep, runs))}
    lock = Lock(sweep.folder)
    with preemption.deferred(), contextlib.ExitStack() as held:
        lock.acquire()
        held.callback(lock.release)
        claim(sweep.folder, content)
        check_runs(sweep, configs)
        for rung in rungs:
            until = rung if sweep.keep and rung < first.steps else None
            jobs = [job for i in racing if (job := _job(sweep, runs[i], until)) is not None]
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
        self._take(read_curves(sweep.run_folder(self.point)), until or self.steps)
        self.status = "stopped" if until else "finished"
        if self.result is None:
            self.status = f"no result at step {self.step:,}"

    def read_newest(self, sweep: Sweep) -> None:
        """Read the run's newest result, wherever that is."""
        curves = read_curves(sweep.run_folder(self.point))
        steps, _ = curves.get(f"eval/{self.measure}", ([], []))
        if steps:
            self._take(curves, max(steps))
            self.status = "finished" if self.step == self.steps else "not finished"

    def _take(self, curves: dict[str, Curve], step: int) -> None:
        n = _value_at(curves, "n", step)
        self.step, self.result = step, _value_at(curves, self.measure, step)
        self.n = None if n is None else int(n)


def _trained_so_far(sweep: Sweep, runs: Sequence[Entry]) -> Sequence[Entry]:
    """Read each run's newest result. Raises UserError where none of them has begun."""
    if not any(sweep.run_folder(entry.point).exists() for entry in runs):
        raise UserError(f"{sweep.folder} has none of these runs: give the sweep's --workdir")
    for entry in runs:
        entry.read_newest(sweep)
    return runs


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
