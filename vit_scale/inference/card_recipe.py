"""The part of a model card on training: what a run began from, how it learned, and its command."""

import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from vit_scale import config
from vit_scale.errors import printable
from vit_scale.pretrained import Pretrained, model_file
from vit_scale.pretrained.model_file import on_hub

# Fields of where a run executes and what it writes; and those whose paths are of one machine.
LEFT_OUT = (
    *("stages", "log.", "checkpoint.", "watchdog.", "mesh.", "data.workers", "data.threads"),
    *config.FROM_DATA,
)
ABSENT = (
    "The run's folder was not at hand, so this card has no command, and doesn't say what it began "
    "from."
)
PATHS = {"data.path": "DATA", "init.source": "SOURCE", "distill.teacher": "TEACHER"}


def recipe(loaded: Pretrained, description: dict, origins: Sequence[str]) -> str:
    """Return the section on training, from run.json and what training began from, latest first."""
    if not loaded.data:
        source = f"the weights are those of `{_public(origins[0])}`" if origins else "not recorded"
        return f"## Training\n\nNot trained by vit_scale: {source}."
    if made := description.get("source"):  # lines of `convert` or `average`
        lines = [" ".join(map(_public, line.split())) for line in made]
        return f"## Training\n\nNot trained itself, but made of other models: {'; '.join(lines)}."
    cfg, images = loaded.cfg, loaded.data["images"]
    defaults, fields = config.fields(config.base()), config.fields(cfg)
    augment = [
        f"{name.partition('.')[2]} {value}"
        for name, value in fields.items()
        if name.startswith("augment.") and value != defaults[name]
    ]
    at = "" if loaded.step == cfg.steps else f"; exported after step {loaded.step:,}"
    epochs = "" if cfg.data.mixture else f", {cfg.steps * cfg.data.batch / images:,.1f} epochs"
    began = " from ".join(f"`{_public(one)}`" for one in origins) or "random parameters"
    rows = {
        "began from": began if description or origins else "",  # one file leaves folders out
        "objective": f"{cfg.objective}, {cfg.loss} loss" if cfg.model.classes else cfg.objective,
        "optimizer": _optimizer(cfg.optim),
        "learning rate": _learning_rate(cfg.optim),
        "steps": f"{cfg.steps:,} of {cfg.data.batch:,} images{epochs}{at}",
        "augmentation": ", ".join(augment) or "none",
        "average of the weights": f"decay {cfg.optim.ema:g}" if cfg.optim.ema else "none",
        **_machine(description),
    }
    recorded = table(("", ""), [(key, value) for key, value in rows.items() if value])
    command = _command(cfg, description) if description else ABSENT
    return f"## Training\n\n{recorded}\n\n{command}"


def _optimizer(optim: Any) -> str:
    clipped = f"clipped at {optim.clip:g}" if optim.clip else "not clipped"
    return f"{optim.name}, weight decay {optim.weight_decay:g}, gradients {clipped}"


def _learning_rate(optim: Any) -> str:
    parts = [f"{optim.lr:g}, {optim.schedule}, {optim.warmup:,} steps of warm-up"]
    if optim.schedule in ("cosine", "linear") and optim.end:
        parts.append(f"down to {optim.end:g} of it")
    if optim.cooldown:
        parts.append(f"{optim.cooldown:,} steps of cool-down ({optim.cooldown_shape})")
    if optim.layer_decay != 1:
        parts.append(f"times {optim.layer_decay:g} per block below the head")
    return ", ".join(parts)


def _machine(description: dict) -> dict[str, str]:
    devices, git = description.get("devices"), description.get("git") or {}
    versions = description.get("versions", {})
    commit = git.get("commit", "") and f", commit {git['commit'][:12]}"
    changed = ", with changes" if git.get("dirty") else ""
    return {
        "devices": f"{devices['count']} x {devices['kind']}, hosts: {devices['hosts']}"
        if devices
        else "",
        "versions": f"vit_scale {versions['vit_scale']}{commit}{changed}, jax {versions['jax']}"
        if "vit_scale" in versions
        else "",
    }


def _public(source: str) -> str:
    """The name of a source: an address as it is published, of a path the last part."""
    if source.startswith(model_file.PUBLIC):
        return model_file.public_address(source)
    return pathlib.PurePath(source).name


def _command(cfg: Any, description: dict) -> str:
    """The command that trains this config: every field that is not the schema's default."""
    defaults, words = config.fields(config.base()), []
    for name, value in config.fields(cfg).items():
        if value == defaults[name] or name.startswith(LEFT_OUT):
            continue
        words.append(shlex.quote(f"--config.{name}={_shareable(cfg, name, value)}"))
    lines = " \\\n    ".join(["vit-scale train --config configs/base.py", *words])
    stands = [word for word in PATHS.values() if re.search(rf"\b{word}\b", lines)]
    note = f" {', '.join(stands)}: paths of the machine that trained." if stands else ""
    return (
        f"The run was `{description.get('name')}`. From a clone of vit_scale, this command repeats "
        f"it, up to rounding on other devices.{note}\n\n```bash\n{lines}\n```"
    )


def _shareable(cfg: Any, name: str, value: Any) -> Any:
    """A field's value, where a path on the machine that trained is only named."""
    if name == "data.mixture":
        return tuple(
            (one if on_hub(one) or ":" not in one else f"{one.partition(':')[0]}:DATA", weight)
            for one, weight in value
        )
    if (
        name not in PATHS
        or not value
        or (name == "data.path" and on_hub(f"{cfg.data.name}:{value}"))
    ):
        return value
    public = str(value).startswith(model_file.PUBLIC)
    return model_file.public_address(value) if public else PATHS[name]


def table(heads: Sequence[str], rows: Any) -> str:
    """Return a table in Markdown; cells are printable."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
