"""Several runs as one config: pretraining, then what is fine-tuned from it."""

import os
import pathlib
from collections.abc import Iterable

from vit_scale import config, paths
from vit_scale.train import train


def train_stages(
    name: str, overrides: Iterable[str], workdir: str | os.PathLike, quiet: bool = False
) -> list[pathlib.Path]:
    """Train the config `name` in `workdir`, or each of its `stages` in WORKDIR/STAGE.

    A stage whose init.source is the name of another starts from what that one trained. Returns the
    folders of the runs.
    """
    overrides, workdir = list(overrides), paths.path(workdir)
    cfg = config.load(name, overrides)
    if not cfg.stages:
        train(cfg, workdir, config.title(name), quiet)
        return [workdir]
    for stage in cfg.stages:
        part = config.load(f"{name}:{stage}", overrides)
        if part.init.source in cfg.stages:
            part.init.source = str(workdir / part.init.source)
        train(part, workdir / stage, config.title(f"{name}:{stage}"), quiet)
    return [workdir / stage for stage in cfg.stages]
