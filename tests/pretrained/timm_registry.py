"""Load every plain ViT of timm's registry, with random weights, and compare the logits.

    PYTHONPATH=. python tests/pretrained/timm_registry.py [REGEX]
    PYTHONPATH=. python tests/pretrained/timm_registry.py --write     # docs/timm-models.md

Two blocks at the architecture's own width, on 5 x 5 patches. All that the import is told is what a
config.json of the Hub has: the architecture's name. Needs torch and timm; the page takes an hour.
"""

import gc
import json
import pathlib
import re
import sys
import tempfile
from typing import NamedTuple

import jax
import numpy as np
import timm
import torch

from vit_scale import pretrained
from vit_scale.errors import UserError
from vit_scale.pretrained import weight_files
from vit_scale.pretrained.timm_config import check_architecture

CLASSES, TOLERANCE = 7, 1e-4
MODULES = ("vision_transformer", "eva", "deit")
NAMES = re.compile(r"vit_|deit|eva02_")
# Built of windows, convolutions or relative positions: other modules of timm.
OTHERS = re.compile(r"_relpos|_srelpos|_resnet|_r26|_r50|_r_s16|_mci")


class Row(NamedTuple):
    name: str
    works: bool
    difference: float  # of the logits, at most; 0 where it is refused
    reason: str  # why it is refused


def architectures() -> list[str]:
    """Return the plain ViTs' names: vit_*, deit* and eva02_*."""
    names = [name for name in timm.list_models() if NAMES.match(name)]
    entry = timm.models._registry.model_entrypoint
    modules = {name: entry(name).__module__.rpartition(".")[2] for name in names}
    return [name for name in names if modules[name] in MODULES and not OTHERS.search(name)]


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter matters, and tokens still attend to others: variances as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.02 if parameter.ndim > 1 else 0.1
            if re.search("pos_embed|_token|head.weight|freqs", name):
                scale = 0.2
            one = float("norm" in name and name.endswith("weight")) + 0.5 * ("gamma" in name)
            parameter.copy_(one + scale * noise)
    return model.eval()


def attempt(name: str) -> Row:
    """Build the architecture with timm, load what it stores, and compare."""
    try:
        check_architecture(pathlib.Path(name), name)
    except UserError as error:
        return Row(name, False, 0.0, reason(str(error)))
    patch = int(re.search(r"patch(\d+)", name)[1])  # type: ignore[index]
    model = timm.create_model(name, img_size=5 * patch, num_classes=CLASSES, depth=2)
    randomised(model)
    size = [3, 5 * patch, 5 * patch]
    content = {
        "architecture": name,
        "num_classes": CLASSES,
        "global_pool": model.global_pool,
        "pretrained_cfg": {"input_size": size, "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
        weight_files.write_safetensors(path / weight_files.SAFETENSORS, state)
        (path / "config.json").write_text(json.dumps(content))
        try:
            loaded = pretrained.load_model(path)
        except UserError as error:
            return Row(name, False, 0.0, reason(str(error)))
    images = np.random.RandomState(0).randn(2, 5 * patch, 5 * patch, 3).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    result = jax.jit(loaded.model.apply)(loaded.params, images)
    assert np.ptp(expected) > 0.1
    return Row(name, True, float(np.abs(result - expected).max()), "")


def attempts(names: list[str]) -> list[Row]:
    rows = []
    for name in names:
        rows.append(attempt(name))
        jax.clear_caches()
        gc.collect()
        print(*rows[-1], file=sys.stderr, flush=True)
    return rows


PAGE = pathlib.Path(__file__).parents[2] / "docs" / "timm-models.md"
HEADER = """\
# timm's models

Each plain ViT of timm's registry (`vit_*`, `deit*` and `eva02_*` without windows, convolutions and
relative positions; timm {version}), built there with random weights and two blocks, stored as on
the Hub, and read here by the architecture's name alone: **{works} of {count} give the same
logits**, to {worst} at most; {refused} are refused. `tests/pretrained/timm_registry.py` makes this
page, and a slow test compares it.

```bash
vit-scale convert hf://timm/NAME.TAG runs/NAME     # a model of this list becomes a run
vit-scale convert hf://timm/NAME.TAG --list        # or only say what it is
```

## Refused

| architecture | why |
|---|---|
"""


def page(rows: list[Row]) -> str:
    """Return the page of the manual on these rows."""
    works, refused = ([row for row in rows if row.works is kind] for kind in (True, False))
    worst = max(row.difference for row in works)
    numbers = {"works": len(works), "count": len(rows), "refused": len(refused)}
    text = HEADER.format(version=timm.__version__, worst=f"{worst:.0e}", **numbers)
    text += "".join(f"| `{row.name}` | {row.reason} |\n" for row in refused)
    return text + "\n## Read\n\n" + ", ".join(f"`{row.name}`" for row in works) + "\n"


def reason(message: str) -> str:
    """Return what an error says of the architecture."""
    return message.partition(" of timm has ")[2].removesuffix(": unsupported") or message


def main() -> None:
    write = sys.argv[1:] == ["--write"]
    pattern = re.compile("" if write else "".join(sys.argv[1:]))
    rows = attempts([name for name in architectures() if pattern.search(name)])
    if write:
        PAGE.write_text(page(rows))
    else:
        print(page(rows))


if __name__ == "__main__":
    main()
