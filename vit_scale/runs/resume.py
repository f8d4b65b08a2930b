"""Resuming a run: which config it continues with, and what may differ from how it began.

`resumed_config` completes a config with what the run recorded; `check_same_config` and
`check_same_data` refuse, with the differences, a config or data that would make it another run.
"""

import os
import pathlib
import re
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from vit_scale import checkpoint, config
from vit_scale.errors import UserError, printable
from vit_scale.models.spec import SOURCE, TRAINING_FIELDS
from vit_scale.runs.json_files import read_json
from vit_scale.storage import paths

# Fields that decide where and how a run executes, not what it computes: they may change on
# resuming. So may the answer to a corrupt image: a run that stopped at one has met none before.
OPERATIONAL = (
    *(
        "log.",
        "checkpoint.",
        "data.workers",
        "data.threads",
        "data.cache",
        "data.path",
        "data.memory",
        "data.on_corrupt",
    ),
    *("data.changed", "eval.batch", "mesh.", "watchdog."),
    "distill.teacher",  # its checksum may not change
)
# Fields that are read only before the first checkpoint. A pretrained run may have moved since, or
# have another path from here.
ONLY_AT_START = ("init.source",)
# Fields that hold the path of another run or of weights, as the user typed it.
PATHS = ("init.source", "distill.teacher")
REVISION = re.compile(r"@[^/]+(?=/|$)")


def resumed_config(cfg: ConfigDict, workdir: str | os.PathLike) -> ConfigDict:
    """Return `cfg` as it resumes the run in `workdir`: newer fields keep the run's old behaviour.

    Relative paths of other runs that were typed in another folder are made valid from here.
    """
    path = paths.parse(workdir) / "run.json"
    stored = read_json(path) if path.exists() else {}
    if not isinstance(stored.get("config"), dict):
        return cfg
    cfg = config.with_old_defaults(cfg, stored["config"])
    recorded = config.dotted(stored["config"])
    for field in config.FROM_DATA:  # also where images were added since
        if recorded.get(field) and not config.fields(cfg)[field]:
            cfg.update_from_flattened_dict({field: tuple(recorded[field])})
    _keep_revisions(cfg.data, stored["config"].get("data", {}))
    if cfg.model.variant == SOURCE:  # the run has the architecture that its source had
        old = config.from_json(stored["config"])
        names = [name for name in old.model if name not in TRAINING_FIELDS]
        cfg.model.update({name: old.model[name] for name in names})
        cfg.augment.update({name: old.augment[name] for name in ("mean", "std")})
    before = str(recorded.get("init.source", ""))
    if before.startswith(paths.HUB) and _repository(before) == _repository(cfg.init.source):
        cfg.init.source = before
    for field, value in config.fields(cfg).items():
        if field in PATHS and value == recorded.get(field) and not os.path.exists(value):
            cfg.update_from_flattened_dict({field: _recorded_path(field, path.parent, stored)})
    return cfg


def _repository(address: str) -> str:
    """Return ORG/NAME[/FILE] of a model on the hub, without its revision."""
    return REVISION.sub("", address).removeprefix(paths.HUB)


def _keep_revisions(cfg: ConfigDict, recorded: dict) -> None:
    """Keep the revisions of sets on Hugging Face's hub, which a run records as NAME@REVISION."""

    def kept(path: str, before: object) -> str:
        return str(before) if str(before).partition("@")[0] == path else path

    if cfg.name == recorded.get("name") == "huggingface":
        cfg.path = kept(cfg.path, recorded.get("path"))
    before = [name for name, _ in recorded.get("mixture") or ()]
    if len(before) == len(cfg.mixture) and all(isinstance(one, tuple) for one in cfg.mixture):
        cfg.mixture = tuple(
            (kept(name, old) if str(name).startswith("huggingface:") else name, *weight)
            for (name, *weight), old in zip(cfg.mixture, before, strict=True)
        )


def _recorded_path(field: str, run: pathlib.Path, stored: dict) -> str:
    """Return the path in a field of a run.json as seen from here (`paths.resolve`)."""
    name = config.dotted(stored["config"]).get(field) or ""
    return paths.resolve(name, run, stored.get("cwd", ""))


def comparable(stored: dict) -> dict:
    """Return a config, as JSON types, without the paths of data.mixture, whose sets may move."""
    mixture = [[entry.partition(":")[0], weight] for entry, weight in stored["data"]["mixture"]]
    return {**stored, "data": {**stored["data"], "mixture": mixture}}


def check_same_config(run: pathlib.Path, stored: dict, description: dict) -> None:
    """Raise UserError, with the differences, where a run would compute something different.

    `stored` is the run's run.json, `description` that of the config that is to continue it.
    """
    old, new = stored.get("config"), config.dotted(description["config"])
    if not isinstance(old, dict):
        raise UserError(f"{run / 'run.json'} is damaged: it has no config; use another --workdir")
    # Through this version's schema: a field that is newer than the run has its default.
    before = config.to_json(config.from_json(old))
    same_paths = tuple(
        f"{field}: "
        for field in PATHS
        if paths.is_same(_recorded_path(field, run, stored), str(new.get(field, "")))
    )
    ignored = same_paths + OPERATIONAL + (ONLY_AT_START if checkpoint.finished_steps(run) else ())
    differences = config.differences(comparable(before), comparable(description["config"]))
    changed = [line for line in differences if not line.startswith(ignored)]
    if changed:
        raise UserError(
            f"workdir {run} holds a run with a different config ({'; '.join(changed)}); use "
            "another --workdir, or the config it was started with"
        )


def check_same_data(run: pathlib.Path, stored: dict, description: dict) -> None:
    """Raise UserError where a run's data is not what it began with.

    Added or removed images are accepted with data.changed, and printed; different classes never
    are, because the labels would change their meaning. What a description lacks is not compared.
    """
    before, now = stored.get("classes"), description.get("classes")
    if before is not None and now is not None and list(before) != list(now):
        raise UserError(
            f"workdir {run} holds a run with different classes ({_class_changes(before, now)}); "
            "use another --workdir, or the data it was started with"
        )
    pairs = _common_sets(stored.get("data"), description.get("data"))
    for part, (old, new) in pairs.items():
        if {"slices"} <= old.keys() & new.keys() and old["slices"] != new["slices"]:
            raise UserError(
                f"workdir {run} holds a run with a different split ({part}: {new['name']} is "
                f"sliced by {new['slices']}, was by {old['slices']}): it would train on held-out "
                "images; use another --workdir, or the data it was started with"
            )
    changes = {part: _image_changes(*pair) for part, pair in pairs.items()}
    changed = "; ".join(f"{part}: {change}" for part, change in changes.items() if change)
    if not changed:
        return
    if not description["config"]["data"]["changed"]:
        raise UserError(
            f"workdir {run} holds a run that began with different data ({changed}); use another "
            "--workdir, the data it was started with, or --config.data.changed=True to continue "
            "with the new data"
        )
    line = f"vit-scale: data.changed: since this run began, {changed}"
    print(printable(line), file=sys.stderr, flush=True)


def _class_changes(before: Sequence[str], now: Sequence[str]) -> str:
    old, new = set(before), set(now)
    removed = [repr(name) for name in before if name not in new]
    added = [repr(name) for name in now if name not in old]
    changes = [
        f"{what} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("removed", removed), ("added", added))
        if names
    ]
    pairs = zip(before, now, strict=False)
    first = next((i for i, (was, is_now) in enumerate(pairs) if was != is_now), None)
    if first is not None:
        changes.append(f"class {first} was {before[first]!r}, is now {now[first]!r}")
    if len(before) != len(now):
        changes.append(f"{len(before)} -> {len(now)} classes")
    return ", ".join(changes)


def _common_sets(before: dict | None, now: dict | None) -> dict[str, tuple[dict, dict]]:
    """Pair the sets that two descriptions share; an old run describes only its training set."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return {}
    old, new = before.get("sets", {"train": before}), now.get("sets", {"train": now})
    return {part: (old[part], new[part]) for part in old if part in new}


def _image_changes(before: dict, now: dict) -> str:
    """Say what changed in a set; "" if nothing. Without a fingerprint only sizes are compared."""
    fingerprints = before.get("fingerprint"), now.get("fingerprint")
    same = None in fingerprints or fingerprints[0] == fingerprints[1]
    if same and before.get("images") == now.get("images"):
        return ""
    size = "of" if "of" in before and "of" in now else "images"
    old, new = int(before.get(size, 0)), int(now.get(size, 0))
    if old == new:
        return f"{now['name']} still has {new:,} images, but their paths or labels changed"
    change = f"{new - old:,} more" if new > old else f"{old - new:,} fewer"
    return f"{now['name']} went from {old:,} to {new:,} images, {change}"
