"""What is swept, and whether it can be: as a config, and in a folder."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.data import share_images
from vit_scale.errors import USAGE, UserError
from vit_scale.models.spec import SOURCE
from vit_scale.pretrained import with_source_model
from vit_scale.runs.json_files import read_json, write_json
from vit_scale.runs.resume import check_same_config
from vit_scale.storage import cache
from vit_scale.sweep.points import Point, run_name
from vit_scale.sweep.processes import LOGS
from vit_scale.training import objectives, optimizer, validation
from vit_scale.training.setup import as_trained

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
        _check_held_out(cfg)
    for cfg in _with_architectures(configs):
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


def _check_held_out(cfg: ConfigDict) -> None:
    split, train, final = cfg.eval.split, cfg.data.train, cfg.eval.final
    if not split or any(share_images(cfg.data, split, one) for one in (train, final) if one):
        raise UserError(
            "a sweep selects by eval.split, which must be held out from training and from the "
            f"final test (data.train={train!r}, eval.split={split!r}, eval.final={final!r}): give "
            "--config.data.train=train[:98%] --config.eval.split=train[98%:]",
            USAGE,
        )


def _with_architectures(configs: Sequence[ConfigDict]) -> Iterator[ConfigDict]:
    """Yield configs with a source's architecture; of those with one source only the first.

    Reading the same weights for each point would take too long.
    """
    sources: set[str] = set()
    for cfg in configs:
        if cfg.model.variant != SOURCE:
            yield cfg
        elif cfg.init.source not in sources:
            sources.add(cfg.init.source)
            yield with_source_model(cfg)


def _check_trainable(cfg: ConfigDict) -> None:
    """Raise UserError for a config that can't train, as far as that can be said without devices."""
    validation.check_counts(cfg)
    validation.check_model(cfg)
    optimizer.check(cfg.optim, cfg.steps)
    objectives.check(cfg)


def claim(folder: pathlib.Path, content: dict) -> None:
    """Write sweep.json, if it isn't there yet: `check_same_sweep` was called before."""
    if not (folder / FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, {**content, "runs": [], "best": None})


def check_same_sweep(folder: pathlib.Path, content: dict) -> None:
    """Raise UserError for a folder of another sweep; the same one may have other points."""
    file = folder / FILE
    if not file.exists():
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


def check_runs(sweep: Sweep, configs: Sequence[ConfigDict]) -> None:
    """Raise UserError for a run in the sweep's folder that was trained with another config."""
    for point, cfg in zip(sweep.points, configs, strict=True):
        folder = sweep.run_folder(point)
        if (folder / "run.json").exists():
            stored = read_json(folder / "run.json")
            now = config.to_json(as_trained(cfg, folder))
            check_same_config(folder, stored, {"config": now})
