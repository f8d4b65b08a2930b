"""One program that trains one model on one batch, for speed.py: a process that takes turns.

    python -m benchmarks.speed_contender S/16@224 vit_scale [--toy] [model.attention=cudnn]
    python -m benchmarks.speed_contender S/16@224 timm [--toy]

It compiles and warms up, then prints a line of JSON that describes it, then one for each line it
reads: "turn" trains for a second or two and answers with its speed, "memory" with its peak memory.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from benchmarks.measurement import HERE, TOY, TOY_VIT
from vit_scale import config

TURN_SECONDS = 1.5
WARM_UP = 10  # steps, after the first


class Program(NamedTuple):
    """A training that stands ready."""

    train: Callable[[int], None]  # so many steps, and wait for the device
    peak_memory: Callable[[], int | None]  # bytes
    description: dict[str, Any]


def describe(device: str, parameters: int, packages: Sequence[str]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"device": device, "parameters": parameters, "versions": versions}


def examples(cfg: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """A batch of noise, uint8 [b, h, w, 3] and int32 [b]. Zeros would be faster than any image."""
    draw = np.random.RandomState(0)
    size = (cfg.data.batch, *config.image_size(cfg), 3)
    images = draw.randint(0, 256, size, dtype=np.uint8)
    return images, draw.randint(0, cfg.model.classes, cfg.data.batch, dtype=np.int32)


def vit_scale(cfg: ConfigDict) -> Program:
    """The training step of this project: normalisation, loss, gradients, AdamW, metrics."""
    import jax

    from vit_scale.distributed.sharding import shard_batch
    from vit_scale.models.parameters import count
    from vit_scale.training.init_state import init_state
    from vit_scale.training.setup import make_setup
    from vit_scale.training.train_step import jit_train_step

    program = make_setup(cfg)
    step, state = jit_train_step(program), init_state(program, (), quiet=True)
    images, labels = examples(cfg)
    batch = {"image": images, "label": labels, "mask": np.ones(len(labels), bool)}
    batch = jax.block_until_ready(shard_batch(batch, program.mesh, cfg.data.batch))
    device = jax.local_devices()[0]

    def train(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    def peak_memory() -> int | None:
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    packages = ("jax", "jaxlib", "flax", "optax")
    description = describe(device.device_kind, count(state.params), packages)
    return Program(train, peak_memory, description)


def timm(cfg: ConfigDict, backend: str) -> Program:
    """timm's Vision Transformer of that shape: torch.compile, bfloat16 autocast, fused AdamW."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    from vit_scale.models.spec import shape

    cuda = torch.cuda.is_available()
    device_type = "cuda" if cuda else "cpu"
    torch.set_float32_matmul_precision("high")
    resolved = shape(cfg.model, config.image_size(cfg))
    model = VisionTransformer(
        img_size=config.image_size(cfg),
        patch_size=resolved.patch,
        num_classes=cfg.model.classes,
        embed_dim=resolved.size.width,
        depth=resolved.size.depth,
        num_heads=resolved.size.heads,
        mlp_ratio=resolved.size.mlp / resolved.size.width,
    ).to(device_type)
    compiled = torch.compile(model, backend=backend)
    options = {"lr": cfg.optim.lr, "weight_decay": cfg.optim.weight_decay, "fused": cuda}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    pixels, classes = examples(cfg)
    images = torch.from_numpy(pixels).to(device_type).permute(0, 3, 1, 2).contiguous()
    images, labels = (
        images.float().div(127.5).sub(1),
        torch.from_numpy(classes).to(device_type).long(),
    )

    def train(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(device_type, dtype=torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(compiled(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if cuda:
            torch.cuda.synchronize()

    def peak_memory() -> int | None:
        return torch.cuda.max_memory_allocated() if cuda else None

    device = torch.cuda.get_device_name() if cuda else device_type
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Program(train, peak_memory, describe(device, parameters, ("torch", "timm")))


def start(case: str, name: str, overrides: Sequence[str], toy: bool) -> Program:
    """Build, compile and warm up; description["steps_per_turn"] is what fits in a turn."""
    cfg = config.load(
        f"{HERE / 'speed_config.py'}:{case}", [*overrides, *((*TOY, *TOY_VIT) if toy else ())]
    )
    program = timm(cfg, "eager" if toy else "inductor") if name == "timm" else vit_scale(cfg)
    program.train(1)
    program.train(1 if toy else WARM_UP)
    began = time.perf_counter()
    program.train(3)
    seconds = (time.perf_counter() - began) / 3
    steps = 2 if toy else max(2, round(TURN_SECONDS / seconds))
    program.description.update(steps_per_turn=steps, batch=cfg.data.batch)
    return program


def answer(program: Program, question: str) -> dict[str, Any]:
    if question == "memory":
        return {"peak_memory_bytes": program.peak_memory()}
    steps, batch = program.description["steps_per_turn"], program.description["batch"]
    began = time.perf_counter()
    program.train(steps)
    return {"images_per_second": batch * steps / (time.perf_counter() - began)}


def main(case: str, name: str, *options: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else writes to standard output may not garble the answers
    overrides = [option for option in options if option != "--toy"]
    try:
        program = start(case, name, overrides, "--toy" in options)
        print(json.dumps(program.description), file=answers)
        for line in sys.stdin:
            print(json.dumps(answer(program, line.strip())), file=answers)
    except Exception as error:  # noqa: BLE001 (not installed, out of memory, no such kernel ...)
        line = (str(error).splitlines() or [""])[0][:200]
        print(json.dumps({"error": f"{type(error).__name__}: {line}"}), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
