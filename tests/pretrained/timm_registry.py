"""Load every plain ViT of timm's registry, with random weights, and compare the logits.

    PYTHONPATH=. python tests/pretrained/timm_registry.py [REGEX]       # prints a row for each

Two blocks at the architecture's own width, on 5 x 5 patches. All that the import is told is what a
config.json of the Hub has: the architecture's name. Needs torch and timm.
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
        return Row(name, False, 0.0, str(error).partition(": ")[2])
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
            return Row(name, False, 0.0, str(error).partition(": ")[2])
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


def main() -> None:
    pattern = re.compile(sys.argv[1] if sys.argv[1:] else "")
    rows = attempts([name for name in architectures() if pattern.search(name)])
    loaded = [row for row in rows if row.works]
    worst = max((row.difference for row in loaded), default=0.0)
    print(f"{len(loaded)} of {len(rows)} load; logits differ by {worst:.1e} at most")
    for row in rows:
        if not row.works:
            print(f"{row.name}: {row.reason}")


if __name__ == "__main__":
    main()
