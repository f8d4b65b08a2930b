"""One program that trains one model on one batch, for speed.py and cpu_step.py, in turns.

    python -m benchmarks.speed_contender CONFIG vit_scale [--toy] [model.attention=cudnn]
    python -m benchmarks.speed_contender CONFIG timm [--toy]

CONFIG is a config's name or path, such as benchmarks/speed_config.py:S/16@224. The programs are
those of `PROGRAMS`; each computes in the config's model.dtype.

It compiles and warms up, then prints a line of JSON that describes it, then one for each line it
reads: "turn" trains for a second or two and answers with its speed, "memory" with its peak memory.
"""

import functools
import importlib.metadata
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from benchmarks.contender import Server, serve
from benchmarks.measurement import TOY, TOY_VIT
from vit_scale import config
from vit_scale.errors import UserError

TURN_SECONDS = 1.5
WARM_UP = 10  # steps, after the first two; fewer where they take more than WARM_UP_SECONDS
WARM_UP_SECONDS = 10.0
SLOWEST = 20.0  # seconds of a step; a slower program would stop the others for minutes


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
    """Train timm's Vision Transformer of that shape by torch.compile's `backend`; empty: eager.

    AdamW is the fused one, the fastest on a CPU too. Autocast where model.dtype is bfloat16.
    """
    import torch

    cuda = torch.cuda.is_available()
    device_type = "cuda" if cuda else "cpu"
    if cuda:
        torch.set_float32_matmul_precision("high")
    model = timm_model(cfg).to(device_type)
    network = torch.compile(model, backend=backend) if backend else model
    options = {"lr": cfg.optim.lr, "weight_decay": cfg.optim.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    pixels, classes = examples(cfg)
    images = torch.from_numpy(pixels).to(device_type).permute(0, 3, 1, 2).contiguous()
    images, labels = (
        images.float().div(127.5).sub(1),
        torch.from_numpy(classes).to(device_type).long(),
    )
    bfloat16 = cfg.model.dtype == "bfloat16"

    def train(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(device_type, dtype=torch.bfloat16, enabled=bfloat16):
                loss = torch.nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if cfg.optim.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip)
            optimizer.step()
        if cuda:
            torch.cuda.synchronize()

    def peak_memory() -> int | None:
        return torch.cuda.max_memory_allocated() if cuda else None

    device = torch.cuda.get_device_name() if cuda else device_type
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Program(train, peak_memory, describe(device, parameters, ("torch", "timm")))


def timm_model(cfg: ConfigDict) -> Any:
    """Build timm's module: [CLS], and dropout where ours has it; of a hybrid, with its stem."""
    from timm.models.vision_transformer import VisionTransformer

    from vit_scale.models.spec import shape

    resolved = shape(cfg.model, config.image_size(cfg))
    return VisionTransformer(
        img_size=config.image_size(cfg),
        patch_size=resolved.patch,
        num_classes=cfg.model.classes,
        embed_dim=resolved.size.width,
        depth=resolved.size.depth,
        num_heads=resolved.size.heads,
        mlp_ratio=resolved.size.mlp / resolved.size.width,
        pos_drop_rate=cfg.model.dropout,
        proj_drop_rate=cfg.model.dropout,
        **({"embed_layer": convolutional_embedding} if resolved.stem else {}),
    )


def convolutional_embedding(
    img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, **_
) -> Any:
    """Build the C stem of vit_scale/models/stems.py and its 1x1 embedding, as torch modules."""
    from timm.layers import PatchEmbed
    from torch import nn

    from vit_scale.models.stems import stem_channels

    layers = []
    for i, o in itertools.pairwise([in_chans, *stem_channels(patch_size, embed_dim)]):
        layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    grid = (img_size[0] // patch_size, img_size[1] // patch_size)
    to_tokens = PatchEmbed(grid, patch_size=1, in_chans=embed_dim, embed_dim=embed_dim)
    embedding = nn.Sequential(*layers, to_tokens)
    embedding.num_patches = to_tokens.num_patches  # timm asks for it
    return embedding


def big_vision_model(cfg: ConfigDict) -> tuple[Any, Any]:
    """Return big_vision's module, of a clone on PYTHONPATH, and its model of that shape.

    Raises UserError for a hybrid.
    """
    from vit_scale.models.spec import shape

    resolved = shape(cfg.model, config.image_size(cfg))
    if resolved.stem:
        raise UserError("big_vision has no ViT with a convolutional stem")
    from big_vision.models import vit

    return vit, vit._Model(
        num_classes=cfg.model.classes,
        patch_size=(resolved.patch, resolved.patch),
        width=resolved.size.width,
        depth=resolved.size.depth,
        mlp_dim=resolved.size.mlp,
        num_heads=resolved.size.heads,
        pool_type={"cls": "tok"}.get(resolved.pool, resolved.pool),
        dropout=cfg.model.dropout,
        dtype_mm=cfg.model.dtype,
    )


def big_vision(cfg: ConfigDict) -> Program:
    """Train big_vision's ViT of that shape as its train.py does.

    Raises UserError for a hybrid.
    """
    import jax
    import optax

    from vit_scale.models.parameters import count
    from vit_scale.tracking.provenance import git_state

    vit, model = big_vision_model(cfg)
    pixels, classes = examples(cfg)
    images, labels = jax.device_put((pixels.astype(np.float32) / 127.5 - 1, classes))
    clip = optax.clip_by_global_norm(cfg.optim.clip) if cfg.optim.clip else optax.identity()
    adamw = optax.adamw(cfg.optim.lr, weight_decay=cfg.optim.weight_decay)
    optimizer = optax.chain(clip, adamw)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, images, labels):
        params, opt_state, key = state
        key, dropout_key = jax.random.split(key)

        def loss_of(params):
            logits, _ = model.apply(
                {"params": params}, images, train=True, rngs={"dropout": dropout_key}
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), loss

    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    parameters = count(params)
    state = params, jax.jit(optimizer.init)(params), jax.random.key(1)

    def train(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, loss = step(state, images, labels)
        jax.block_until_ready((state, loss))

    device = jax.local_devices()[0]

    def peak_memory() -> int | None:
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    description = describe(device.device_kind, parameters, ("jax", "jaxlib", "flax", "optax"))
    clone = git_state(pathlib.Path(vit.__file__).parents[1])
    description["versions"]["big_vision"] = clone["commit"] if clone else "unknown"
    return Program(train, peak_memory, description)


PROGRAMS: dict[str, Callable[[ConfigDict], Program]] = {
    "vit_scale": vit_scale,
    "timm": lambda cfg: timm(cfg, "inductor"),
    "timm_eager": lambda cfg: timm(cfg, ""),
    "big_vision": big_vision,
}


def start(config_name: str, name: str, overrides: Sequence[str], toy: bool) -> Program:
    """Build, compile and warm up; description["steps_per_turn"] is what fits in a turn."""
    cfg = config.load(config_name, [*overrides, *((*TOY, *TOY_VIT) if toy else ())])
    program = timm(cfg, "eager") if toy and name == "timm" else PROGRAMS[name](cfg)
    seconds = warm_up(program, 1 if toy else WARM_UP)
    steps = 2 if toy else max(2, round(TURN_SECONDS / seconds))
    program.description.update(steps_per_turn=steps, batch=cfg.data.batch)
    return program


def warm_up(program: Program, steps: int) -> float:
    """Compile, warm up with at most so many steps, and return the seconds of a step.

    Raises UserError for a program that is too slow to compete.
    """
    program.train(1)
    seconds = clock(program, 1)
    if seconds > SLOWEST:
        raise UserError(f"one step takes {seconds:.0f} s")
    program.train(max(1, min(steps, int(WARM_UP_SECONDS / seconds))))
    return clock(program, 3) / 3


def clock(program: Program, steps: int) -> float:
    """Return the seconds that so many steps take."""
    began = time.perf_counter()
    program.train(steps)
    return time.perf_counter() - began


def answer(program: Program, question: str) -> dict[str, Any]:
    if question == "memory":
        return {"peak_memory_bytes": program.peak_memory()}
    steps, batch = program.description["steps_per_turn"], program.description["batch"]
    return {"images_per_second": batch * steps / clock(program, steps)}


def main(config_name: str, name: str, *options: str) -> None:
    overrides = [option for option in options if option != "--toy"]

    def ready() -> Server:
        program = start(config_name, name, overrides, "--toy" in options)
        return Server(program.description, functools.partial(answer, program))

    serve(ready, sys.stdin)


if __name__ == "__main__":
    main(*sys.argv[1:])
