"""Write a model card: the README.md beside exported weights, from what a run recorded.

Every number is one that the run's folder holds, and what nobody recorded is said to be unknown.
Paths of the machine that trained stay out of it.
"""

import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from vit_scale import checkpoint, config
from vit_scale.config import image_size
from vit_scale.errors import printable
from vit_scale.models.parameters import count
from vit_scale.pretrained import Pretrained, hub
from vit_scale.pretrained.model_file import without_folder
from vit_scale.runs.json_files import read_json
from vit_scale.runs.report import NAMES, format_name, format_value
from vit_scale.storage import paths

UNKNOWN = "unknown"  # a licence's name on the Hub
LOADERS = {
    "timm": 'import timm\n\nmodel = timm.create_model("{timm}", pretrained=True).eval()',
    "transformers": "from transformers import AutoImageProcessor, AutoModelForImageClassification\n"
    '\nprocessor = AutoImageProcessor.from_pretrained("{path}")\n'
    'model = AutoModelForImageClassification.from_pretrained("{path}")',
}
OURS = 'import vit_scale\n\nmodel = vit_scale.load("{ours}")\nprint(model.top("image.jpg"))'
# Fields of where a run executes and what it writes; and those whose paths are of one machine.
PUBLIC = (paths.HUB, "https://", "http://")
LEFT_OUT = (
    *("stages", "log.", "checkpoint.", "watchdog.", "mesh.", "data.workers", "data.threads"),
    *config.FROM_DATA,
)
PATHS = {"data.path": "DATA", "init.source": "SOURCE", "distill.teacher": "TEACHER"}


class Result(NamedTuple):
    """What a run measured on `n` examples; `note` says which parameters those were."""

    step: int
    split: str
    name: str  # of the run's main result, such as accuracy
    value: float
    n: int
    note: str


def model_card(
    loaded: Pretrained,
    library: str,
    licence: str = "",
    repository: str = "",
    differences: Sequence[str] = (),
) -> str:
    """Return the content of README.md: the Hub's metadata, then what the weights are.

    Args:
      loaded: the exported model.
      library: `timm` or `transformers`, which can load the export.
      licence: the weights' licence; by default that of the model on the Hub that training began
        from, or unknown.
      repository: ORG/NAME of the export on the Hub, if it goes there.
      differences: lines on what the library computes otherwise.
    """
    run, description, report = _recorded(loaded)
    origins = _origins(loaded, run, description.get("cwd", ""))
    base = next((one for one in origins if one.startswith(paths.HUB)), "")
    named = repository or description.get("name") or _repository(base) or loaded.path.stem
    name = named.rpartition("/")[2]
    results = _results(loaded, report)
    task = "image-classification" if loaded.classes else "image-feature-extraction"
    stated = licence.lower() or (hub.licence(base) if base else "") or UNKNOWN
    metadata = {
        "license": stated,
        "library_name": library,
        "pipeline_tag": task,
        "tags": [task, "vision-transformer", "vit_scale", library],
        **_hub_datasets(loaded),
        **({"base_model": _repository(base)} if base else {}),
        **_model_index(name, loaded, results),
    }
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{header}---",
        f"# {name}",
        _architecture(loaded),
        _data(description),
        _recipe(loaded, description, origins),
        _results_section(loaded, results, differences),
        _licence_section(stated, licence, base),
        _loading(library, repository),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _recorded(loaded: Pretrained) -> tuple[pathlib.Path, dict, dict]:
    """(the run's folder, its description, its report); without the last two if it is no run."""
    run = loaded.path.parent.parent
    if loaded.path.parent.name != checkpoint.FOLDER:
        return run, {}, {}
    file = run / "report.json"
    return run, checkpoint.read_description(loaded.path), read_json(file) if file.exists() else {}


def _origins(loaded: Pretrained, run: pathlib.Path, cwd: str) -> list[str]:
    """What the weights began from, what that began from, and so on as far as it can be read."""
    origins: list[str] = []
    source = loaded.source or loaded.cfg.init.source
    while source and source not in origins:
        origins.append(source)
        run = pathlib.Path(paths.resolve(source, run, cwd))
        run = run.parent.parent if run.parent.name == checkpoint.FOLDER else run
        if "://" in source or not (run / "run.json").is_file():
            break
        stored = read_json(run / "run.json")
        source, cwd = stored["config"]["init"]["source"], stored.get("cwd", "")
    return origins


def _results(loaded: Pretrained, report: dict) -> list[Result]:
    """The main results in a run's report, and the one stored with the exported checkpoint."""
    results, stored = [], loaded.read_selection()
    measured = report.get("eval") or stored
    main = report.get("measure") or next((name for name in NAMES if name in measured), "")
    if last := report.get("eval"):
        results.append(_result(main, last, "last step"))
        if best := last.get("best"):
            selected = best["selected_by"]
            how = f"{selected[main]:.4f} on {selected['split']}, n = {selected['n']:,}"
            results.append(_result(main, best, f"best step by its {format_name(main)}, {how}"))
    if main in stored:
        split = {"split": loaded.cfg.eval.split, "step": loaded.step}
        results.append(_result(main, {**split, **stored}, "while training"))
    kept = {(one.step, one.split): one for one in reversed(results)}
    return [one for one in results if kept[one.step, one.split] is one]


def _result(main: str, measured: dict, note: str) -> Result:
    step, split, n = (measured[name] for name in ("step", "split", "n"))
    return Result(step, split, main, measured[main], n, note)


def _hub_datasets(loaded: Pretrained) -> dict[str, list[str]]:
    """{"datasets": names on the Hub}; empty for data that the Hub may not have."""
    names = [f"{loaded.cfg.data.name}:{loaded.cfg.data.path}"]
    if loaded.cfg.data.mixture:
        names = [entry for entry, _ in loaded.cfg.data.mixture]
    sets = [one.removeprefix("huggingface:").partition("@")[0] for one in names if _on_hub(one)]
    return {"datasets": sets} if sets and loaded.data else {}


def _on_hub(entry: str) -> bool:
    kind, _, path = entry.partition(":")
    return kind == "huggingface" and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?", path))


def _repository(address: str) -> str:
    return "/".join(address.removeprefix(paths.HUB).split("/")[:2]).partition("@")[0]


def _model_index(name: str, loaded: Pretrained, results: Sequence[Result]) -> dict[str, Any]:
    """The Hub's `model-index`: the results of the exported step, if any."""
    rows = [
        {
            "task": {"type": "image-classification"},
            "dataset": {
                "name": f"{loaded.cfg.data.name} {one.split}",
                "type": _hub_datasets(loaded).get("datasets", [loaded.cfg.data.name])[0],
                "split": one.split,
            },
            "metrics": [
                {
                    "type": one.name,
                    "value": one.value,
                    "name": f"{format_name(one.name)} (n = {one.n:,})",
                }
            ],
        }
        for one in results
        if one.step == loaded.step
    ]
    return {"model-index": [{"name": name, "results": rows}]} if rows else {}


def _architecture(loaded: Pretrained) -> str:
    cfg, shape, classes = loaded.cfg, loaded.model.shape, loaded.classes
    height, width = image_size(cfg)
    size = shape.size
    shown = ", ".join(f"`{name}`" for name in classes[:10])
    rows = {
        "architecture": f"Vision Transformer, {cfg.model.variant}: width {size.width}, depth "
        f"{size.depth}, {size.heads} heads, MLP {size.mlp}",
        "parameters": f"{count(loaded.params):,}",
        "input": f"{height} x {width} px, patches of {shape.patch} px, "
        f"{shape.grid[0]} x {shape.grid[1]} of them",
        "pooling": shape.pool,
        "normalisation": f"mean {tuple(cfg.augment.mean)}, std {tuple(cfg.augment.std)}",
        "classes": f"{len(classes):,}: {shown}{', ...' if len(classes) > 10 else ''}"
        if classes
        else "none: it has no head",
    }
    kind = "An image classifier" if classes else "A backbone without a head"
    made = "trained" if loaded.data else "converted"
    return f"{kind}, {made} with vit_scale.\n\n{_table(('', ''), rows.items())}"


def _data(description: dict) -> str:
    """The sets that the run trained and was evaluated on, as it described them."""
    if not (data := description.get("data")):
        return ""
    uses = {"train": "training", "selection": "selecting the step", "final": "final evaluation"}
    heads = ["used for", "set", "images"]
    sets = data.get("sets", {"train": data})
    rows = [
        [uses.get(part, part), without_folder(one.get("name", "")), f"{one['images']:,}"]
        for part, one in sets.items()
    ]
    prints = [one.get("fingerprint", "") for one in sets.values()]
    if any(prints):
        heads.append("fingerprint of names and labels")
        rows = [[*row, one] for row, one in zip(rows, prints, strict=True)]
    return f"## Data\n\n{_table(heads, rows)}"


def _recipe(loaded: Pretrained, description: dict, origins: Sequence[str]) -> str:
    if not loaded.data:
        source = f"the weights are those of `{_public(origins[0])}`" if origins else "not recorded"
        return f"## Training\n\nNot trained by vit_scale: {source}."
    cfg, images = loaded.cfg, loaded.data["images"]
    defaults, fields = config.fields(config.base()), config.fields(cfg)
    augment = [
        f"{name.partition('.')[2]} {value}"
        for name, value in fields.items()
        if name.startswith("augment.") and value != defaults[name]
    ]
    at = "" if loaded.step == cfg.steps else f"; exported after step {loaded.step:,}"
    epochs = "" if cfg.data.mixture else f", {cfg.steps * cfg.data.batch / images:,.1f} epochs"
    rows = {
        "began from": " from ".join(f"`{_public(one)}`" for one in origins) or "random parameters",
        "objective": f"{cfg.objective}, {cfg.loss} loss",
        "optimizer": f"{cfg.optim.name}, weight decay {cfg.optim.weight_decay:g}, "
        f"gradients clipped at {cfg.optim.clip:g}",
        "learning rate": f"{cfg.optim.lr:g}, {cfg.optim.schedule}, {cfg.optim.warmup:,} steps of "
        "warm-up",
        "steps": f"{cfg.steps:,} of {cfg.data.batch:,} images{epochs}{at}",
        "augmentation": ", ".join(augment) or "none",
        "average of the weights": f"decay {cfg.optim.ema:g}" if cfg.optim.ema else "none",
        **_machine(description),
    }
    table = _table(("", ""), [(key, value) for key, value in rows.items() if value])
    return f"## Training\n\n{table}\n\n{_command(cfg, description)}"


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
    """The name of a source: an address as it is, of a path the last part."""
    return source if source.startswith(PUBLIC) else pathlib.PurePath(source).name


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
            (one if _on_hub(one) or ":" not in one else f"{one.partition(':')[0]}:DATA", weight)
            for one, weight in value
        )
    on_hub = name == "data.path" and _on_hub(f"{cfg.data.name}:{value}")
    public = on_hub or str(value).startswith(PUBLIC)
    return PATHS[name] if name in PATHS and value and not public else value


def _results_section(
    loaded: Pretrained, results: Sequence[Result], differences: Sequence[str]
) -> str:
    rows = [
        (f"{one.step:,}", one.split, format_value(one.name, one.value), f"{one.n:,}", one.note)
        for one in results
    ]
    main = format_name(results[0].name if results else "accuracy")
    heads = ("step", "split", main, "n", "")
    text = _table(heads, rows) + "\n\nMeasured by vit_scale. " if rows else ""
    if all(one.step != loaded.step for one in results):
        text += f"The {main} of the exported parameters, step {loaded.step:,}, was not measured. "
    else:
        text += f"The exported parameters are those of step {loaded.step:,}. "
    lines = "".join(f"\n- {line}" for line in differences)
    return f"## Results\n\n{text.strip()}" + (f"\n\nDifferences:\n{lines}" if lines else "")


def _licence_section(stated: str, licence: str, base: str) -> str:
    if stated == UNKNOWN:
        text = "Unknown: no licence was given. **Fill it in**, above and here"
        text += ", as the data and the model that training began from allow." if base else "."
    elif licence:
        text = f"{stated}."
    else:
        text = f"{stated}, as stated by `{_repository(base)}`, which training began from."
    return f"## Licence\n\n{text}"


def _loading(library: str, repository: str) -> str:
    path = repository or "PATH/OF/THIS/FOLDER"
    fields = {
        "path": path,
        "timm": f"hf-hub:{path}" if repository else f"local-dir:{path}",
        "ours": f"{paths.HUB}{path}" if repository else path,
    }
    blocks = [f"```python\n{text.format(**fields)}\n```" for text in (LOADERS[library], OURS)]
    return "## Use\n\n" + "\n\n".join(blocks)


def _table(heads: Sequence[str], rows: Any) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
