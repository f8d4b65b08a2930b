"""Extending a run: more steps than it began with, where nothing it computed depends on the number.

The extended run equals, bit for bit, one that had the new number of steps from the start. A
cool-down that was trained already is undone: what came after the step before it is moved to
RUN/extended/STEPS, a run folder with the results of the shorter run.
"""

import copy
import pathlib
import sys

from ml_collections import ConfigDict

from vit_scale import checkpoint, config
from vit_scale.errors import UserError, printable
from vit_scale.runs import rollbacks
from vit_scale.runs.json_files import read_json, write_json
from vit_scale.runs.resume import check_same_config, check_same_data
from vit_scale.storage import files

FIELDS = ("steps", "optim.cooldown", "optim.cooldown_shape")  # that an extension may change
BY_STEPS = ("cosine", "linear", "piecewise")  # schedules that depend on the number of steps
COPIED = ("run.json", "report.json", "metrics.jsonl", "goodput.json", rollbacks.FILE)


def steps_before_cooldown(cfg: ConfigDict) -> int:
    """Return the number of steps before the cool-down; all of them without one."""
    return cfg.steps - cfg.optim.cooldown


def depending_on_steps(cfg: ConfigDict) -> list[str]:
    """Return the fields that make a run's first steps depend on how many there are."""
    optim, dino = cfg.optim, cfg.dino
    end = optim.weight_decay_end
    depends = {
        f"optim.schedule={optim.schedule}": optim.schedule in BY_STEPS,
        f"optim.weight_decay_end={end}": end is not None and end != optim.weight_decay,
        f"augment.until={cfg.augment.until}": 0 < cfg.augment.until < 1,
        f"dino.momentum_end={dino.momentum_end}": cfg.objective == "dino"
        and dino.momentum != dino.momentum_end,
    }
    return [field for field, does in depends.items() if does]


def extend(run: pathlib.Path, description: dict) -> None:
    """Let a run continue to the larger number of steps of `description`; do nothing otherwise.

    Rerunning it after an interruption completes it. Raises UserError where the steps that were
    trained depend on their number, where no checkpoint from before the cool-down is left, and where
    anything else differs.
    """
    stored = read_json(run / "run.json")
    if not isinstance(stored.get("config"), dict):
        return  # damaged: refused when it is compared
    old, new = (config.from_json(one["config"]) for one in (stored, description))
    if new.steps <= old.steps:
        return
    if reasons := depending_on_steps(new):
        raise UserError(
            f"workdir {run} holds a run of {old.steps:,} steps, which can't be extended to "
            f"{new.steps:,}: with {', '.join(reasons)} its first steps depend on their number; use "
            "another --workdir"
        )
    changes = {field: config.fields(new)[field] for field in FIELDS}
    extended = copy.deepcopy(old)
    extended.update_from_flattened_dict(changes)
    check_same_config(run, {**stored, "config": config.to_json(extended)}, description)
    check_same_data(run, stored, description)
    common = min(map(steps_before_cooldown, (old, new)))
    _archive(run, old.steps, common)
    if new.eval.every == 0 or old.steps % new.eval.every:  # a longer run measures no such step
        last = run / checkpoint.FOLDER / str(old.steps) / checkpoint.SELECTION
        last.unlink(missing_ok=True)
    past = rollbacks.read(run)
    if undone := [one for one in past if one.diverged > common]:
        rollbacks.write(run, [one for one in past if one not in undone])
    write_json(run / "run.json", description)
    line = f"vit-scale: extending {run} from {old.steps:,} to {new.steps:,} steps, from step "
    latest = max(checkpoint.finished_steps(run), default=0)
    print(printable(f"{line}{latest:,}"), file=sys.stderr, flush=True)


def _archive(run: pathlib.Path, steps: int, common: int) -> None:
    """Move what came after the step `common`, and the report, to RUN/extended/STEPS."""
    trained = checkpoint.finished_steps(run)
    later = [step for step in trained if step > common]
    if later and len(later) == len(trained):
        raise UserError(
            f"workdir {run} has no checkpoint up to step {common:,}, where its cool-down began "
            f"(the first is of step {min(trained):,}): use another --workdir"
        )
    archive = run / checkpoint.EXTENDED / str(steps)
    archive.mkdir(parents=True, exist_ok=True)
    for name in COPIED:  # what an interrupted extension copied is whole, and may have changed since
        if (run / name).exists() and not (archive / name).exists():
            files.write(archive / name, (run / name).read_bytes())
    for step in later:
        folder = pathlib.Path(checkpoint.FOLDER) / str(step)
        files.remove_folder(archive / folder)  # of an extension that was interrupted
        files.move_folder(run / folder, archive / folder)
    (run / "report.json").unlink(missing_ok=True)
