"""Several runs as one config: pretraining, then what is fine-tuned from it."""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.distributed import multihost
from vit_scale.errors import USAGE, UserError
from vit_scale.runs.json_files import read_json
from vit_scale.storage import paths
from vit_scale.training.trainer import train


def train_stages(
    name: str,
    overrides: Iterable[str],
    workdir: str | os.PathLike,
    quiet: bool = False,
    until: int | None = None,
) -> dict:
    """Train the config `name` in `workdir`, or each of its `stages` in WORKDIR/STAGE.

    A stage whose init.source is the name of another stage starts from what that one trained.
    Returns the content of report.json, or {stage: its report}; {} where one run stopped `until` a
    step. Raises UserError for `until` and several stages.
    """
    overrides, workdir = list(overrides), paths.parse(workdir)
    cfg = config.load(name, overrides)
    if not cfg.stages:
        begun = _begun({config.find(name)[1]: workdir})
        cfg = config.load(name, overrides, begun)
        return train(cfg, workdir, config.title(name), quiet, until)
    if until is not None:
        stages = ", ".join(f"{name}:{stage}" for stage in cfg.stages)
        raise UserError(
            f"until={until} applies to one run, and {name} has several: {stages}", USAGE
        )
    reports = {}
    for stage in cfg.stages:
        begun = _begun({one: workdir / one for one in cfg.stages})
        part = config.load(f"{name}:{stage}", overrides, begun)
        if part.init.source in cfg.stages:
            part.init.source = str(workdir / part.init.source)
        reports[stage] = train(part, workdir / stage, config.title(f"{name}:{stage}"), quiet)
    return reports


def _begun(runs: Mapping[str, pathlib.Path]) -> dict[str, ConfigDict]:
    """The configs of those of `runs` that have begun, as process 0 sees them.

    What can't be read is left out: it is refused where the run is opened.
    """
    read = {}
    if multihost.is_first():
        for argument, folder in runs.items():
            with contextlib.suppress(UserError):
                if (folder / "run.json").exists():
                    read[argument] = read_json(folder / "run.json").get("config")
    stored = {argument: value for argument, value in multihost.broadcast(read).items() if value}
    begun = {}
    for argument, value in stored.items():
        with contextlib.suppress(UserError):
            begun[argument] = config.from_json(value)
    return begun
