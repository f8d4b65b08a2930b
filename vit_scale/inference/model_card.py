"""Write a model card: the README.md beside exported weights, from what a run recorded.

Every number is one that the run's folder holds, and what nobody recorded is said to be unknown.
Paths of the machine that trained stay out of it.
"""

import pathlib
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from vit_scale import checkpoint
from vit_scale.config import image_size
from vit_scale.data.targets import CLASS, CLASSES, VALUE
from vit_scale.inference.card_recipe import recipe, table
from vit_scale.models.parameters import count
from vit_scale.models.spec import Shape
from vit_scale.pretrained import Pretrained, hub
from vit_scale.pretrained.model_file import on_hub, without_folder
from vit_scale.runs.json_files import read_json
from vit_scale.runs.report import NAMES, format_name, format_value
from vit_scale.storage import paths

UNKNOWN = "unknown"  # a licence's name on the Hub
LIBRARY = "vit_scale"  # which reads the one file
LOADERS = {
    "timm": 'import timm\n\nmodel = timm.create_model("{timm}", pretrained=True).eval()',
    "transformers": "from transformers import AutoImageProcessor, AutoModelForImageClassification\n"
    '\nprocessor = AutoImageProcessor.from_pretrained("{path}")\n'
    'model = AutoModelForImageClassification.from_pretrained("{path}")',
}
HEADLESS = {  # how the same libraries load a model without a head
    "timm": LOADERS["timm"],
    "transformers": LOADERS["transformers"].replace("AutoModelForImageClassification", "AutoModel"),
}
OURS = 'import vit_scale\n\nmodel = vit_scale.load("{ours}")\n'
TOP = 'print(model.top("image.jpg"))'
FEATURES = 'features = model.features(model.read("image.jpg")[None])  # [1, width]'
TASKS = {
    CLASS: "image-classification",
    CLASSES: "image-classification",
    VALUE: "image-regression",  # no task of the Hub
}
KINDS = {
    CLASS: "An image classifier",
    CLASSES: "A classifier of images with several labels",
    VALUE: "A regression of numbers from images",
}


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
    rounded: str = "",
) -> str:
    """Return the content of README.md: the Hub's metadata, then what the weights are.

    Args:
      loaded: the exported model.
      library: `timm` or `transformers`, which can load the export; `vit_scale` for its one file.
      licence: the weights' licence; by default that of the model on the Hub that training began
        from, or unknown.
      repository: ORG/NAME of the export on the Hub, if it goes there; the name of the one file.
      differences: lines on what the library computes otherwise.
      rounded: the type that the parameters were rounded to, if it isn't float32.
    """
    run, description, report = _recorded(loaded)
    origins = _origins(loaded, run, description.get("cwd", ""))
    base = next((one for one in origins if one.startswith(paths.HUB)), "")
    named = repository or description.get("name") or _repository(base) or loaded.path.stem
    name = named.rpartition("/")[2].removesuffix(".safetensors")
    results = _results(loaded, report)
    target = loaded.cfg.data.target
    task = TASKS[target] if loaded.classes else "image-feature-extraction"
    stated = licence.lower() or (hub.licence(base) if base else "") or UNKNOWN
    network = ["vision-transformer"] if isinstance(loaded.model.shape, Shape) else []
    metadata = {
        "license": stated,
        "library_name": library,
        **({} if loaded.classes and target == VALUE else {"pipeline_tag": task}),
        "tags": list(dict.fromkeys([task, *network, LIBRARY, library])),
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
        recipe(loaded, description, origins),
        _results_section(loaded, results, differences, rounded),
        _licence_section(stated, licence, base),
        _loading(library, repository, bool(loaded.classes)),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _recorded(loaded: Pretrained) -> tuple[pathlib.Path, dict, dict]:
    """(the run's folder, its description, its report); without the last two if it is no run."""
    if (run := loaded.run) is None:
        return loaded.path.parent.parent, {}, {}
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
    sets = [one.removeprefix("huggingface:").partition("@")[0] for one in names if on_hub(one)]
    return {"datasets": sets} if sets and loaded.data else {}


def _repository(address: str) -> str:
    return "/".join(address.removeprefix(paths.HUB).split("/")[:2]).partition("@")[0]


def _model_index(name: str, loaded: Pretrained, results: Sequence[Result]) -> dict[str, Any]:
    """The Hub's `model-index`: the results of the exported step, if any."""
    rows = [
        {
            "task": {"type": TASKS[loaded.cfg.data.target]},
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
    cfg, classes = loaded.cfg, loaded.classes
    shown = ", ".join(f"`{name}`" for name in classes[:10]) + ", ..." * (len(classes) > 10)
    outputs = "numbers" if cfg.data.target == VALUE else "classes"
    rows = {
        "architecture": _network(loaded),
        "parameters": f"{count(loaded.params):,}",
        **_input(loaded),
        "normalisation": f"mean {tuple(cfg.augment.mean)}, std {tuple(cfg.augment.std)}",
        outputs: f"{len(classes):,}: {shown}" if classes else "none: it has no head",
    }
    kind = KINDS[cfg.data.target] if classes else "A backbone without a head"
    made = "trained" if loaded.data else "converted"
    return f"{kind}, {made} with vit_scale.\n\n{table(('', ''), rows.items())}"


def _network(loaded: Pretrained) -> str:
    variant, size = loaded.cfg.model.variant, loaded.model.shape.size
    if not isinstance(loaded.model.shape, Shape):
        return f"convolutional network, {variant}"
    return (
        f"Vision Transformer, {variant}: width {size.width}, depth {size.depth}, {size.heads} "
        f"heads, MLP {size.mlp}"
    )


def _input(loaded: Pretrained) -> dict[str, str]:
    shape, (height, width) = loaded.model.shape, image_size(loaded.cfg)
    if not isinstance(shape, Shape):
        return {"input": f"{height} x {width} px"}
    patches = f"patches of {shape.patch} px, {shape.grid[0]} x {shape.grid[1]} of them"
    return {"input": f"{height} x {width} px, {patches}", "pooling": shape.pool}


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
    return f"## Data\n\n{table(heads, rows)}"


def _results_section(
    loaded: Pretrained, results: Sequence[Result], differences: Sequence[str], rounded: str
) -> str:
    rows = [
        (f"{one.step:,}", one.split, format_value(one.name, one.value), f"{one.n:,}", one.note)
        for one in results
    ]
    main = format_name(results[0].name if results else "accuracy")
    heads = ("step", "split", main, "n", "")
    before = f", in float32, before the parameters were rounded to {rounded}" if rounded else ""
    text = table(heads, rows) + f"\n\nMeasured by vit_scale{before}. " if rows else ""
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


def _loading(library: str, repository: str, head: bool) -> str:
    ours = OURS + (TOP if head else FEATURES)
    if library == LIBRARY:
        command = f"```bash\nvit-scale predict {shlex.quote(repository)} image.jpg\n```\n\n"
        code = f"```python\n{ours.format(ours=repository)}\n```"
        return f"## Use\n\n{command if head else ''}{code}"
    path = repository or "PATH/OF/THIS/FOLDER"
    fields = {
        "path": path,
        "timm": f"hf-hub:{path}" if repository else f"local-dir:{path}",
        "ours": f"{paths.HUB}{path}" if repository else path,
    }
    theirs = (LOADERS if head else HEADLESS)[library]
    blocks = [f"```python\n{text.format(**fields)}\n```" for text in (theirs, ours)]
    return "## Use\n\n" + "\n\n".join(blocks)
