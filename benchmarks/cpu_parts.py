"""Measure where a block's time goes on a CPU: each part's arithmetic rate, forward and backward.

    python -m benchmarks.cpu_parts --label before
    python -m benchmarks.cpu_parts --label after --toy

The parts are those of the tutorial's ViT: 128 images of 65 tokens, width 256, 8 heads, MLP 512. All
are compiled first, then they take turns, seven each. "products alone" are plain matrix products of
the MLP's sizes: the rate that the others could reach. Results are added to --out by label.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.measurement import RESULTS
from vit_scale.config import base
from vit_scale.models.attention import attend
from vit_scale.models.layers import MLP, Block, Size, drop, make_norm, to_heads
from vit_scale.models.platforms import gelu
from vit_scale.runs.json_files import read_json, write_json

IMAGES, TOKENS = 128, 65
SIZE = Size(width=256, depth=6, heads=8, mlp=512)
TURNS = 7


class Part(NamedTuple):
    """One part of a block, as a function of parameters and inputs that is differentiated."""

    function: Callable  # (parameters, inputs) -> array
    parameters: Any
    inputs: Any
    macs: int  # of the forward pass; 0 for what multiplies no matrices


def parts(dtype: str, images: int) -> dict[str, Part]:
    cfg = base().model
    cfg.dtype = dtype
    b, n, d, k, f = images, TOKENS, SIZE.width, SIZE.heads, SIZE.mlp
    draw = np.random.RandomState(0)

    def noise(*shape: int):
        return jnp.asarray(draw.randn(*shape), dtype)

    def module(layer: nnx.Module) -> tuple[Callable, Any]:
        graph, params = nnx.split(layer)
        return (lambda params, x: nnx.merge(graph, params)(x)), params

    tokens, heads = noise(b, n, d), noise(b, n, k, d // k)
    rngs = nnx.Rngs(0)
    dropout_key = jax.random.key(0)
    return {
        "products alone": Part(
            lambda w, x: (x @ w[0]) @ w[1],
            (noise(d, f), noise(f, d)),
            noise(b * n, d),
            2 * b * n * d * f,
        ),
        "projection": Part(*module(to_heads("bn", cfg, SIZE, rngs)), tokens, b * n * d * d),
        "attention": Part(
            lambda _, qkv: attend(qkv[0], qkv[1], qkv[2], cfg.logits, "xla"),
            (),
            (heads, heads, heads),
            2 * b * n * n * d,
        ),
        "MLP": Part(*module(MLP(cfg, SIZE, rngs)), tokens, 2 * b * n * d * f),
        "GELU": Part(lambda _, x: gelu(x, approximate=cfg.gelu != "exact"), (), noise(b, n, f), 0),
        "LayerNorm": Part(*module(make_norm(cfg, SIZE.width, rngs)), tokens, 0),
        "dropout": Part(lambda _, x: drop(x, 0.1, dropout_key, x.shape), (), noise(b, n, f), 0),
        "block": Part(
            *module(Block(cfg, SIZE, rngs)),
            tokens,
            b * n * (4 * d * d + 2 * d * f) + 2 * b * n * n * d,
        ),
    }


def measure(dtype: str, images: int = IMAGES, turns: int = TURNS) -> dict[str, dict]:
    """Return {part: {"ms": of the median turn, "gflop_per_second": forward and backward}}."""
    ready = {}
    for name, part in parts(dtype, images).items():
        step = functools.partial(gradient(part), part.parameters, part.inputs)
        jax.block_until_ready(step())
        ready[name] = step, 6 * part.macs
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(turns):
        for name, (step, _) in ready.items():
            began = time.perf_counter()
            jax.block_until_ready(step())
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {
            "ms": round(1e3 * medians[name], 2),
            "gflop_per_second": round(flops / medians[name] / 1e9, 1) if flops else None,
        }
        for name, (_, flops) in ready.items()
    }


def gradient(part: Part) -> Callable:
    def loss(params, inputs):
        return (part.function(params, inputs).astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_parts")
    parser.add_argument("--label", required=True, help="name of this state of the code")
    parser.add_argument("--toy", action="store_true", help="one image, one turn: a test")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS.parent / "cpu" / "parts.json")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    sizes = {"images": 1, "turns": 1} if args.toy else {}
    dtypes = ("float32",) if args.toy else ("float32", "bfloat16")
    figures = {dtype: measure(dtype, **sizes) for dtype in dtypes}
    content = read_json(args.out) if args.out.exists() else {}
    content[args.label] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "toy": args.toy,
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "figures": figures,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, content)
    for dtype, rows in figures.items():
        for name, row in rows.items():
            rate = row["gflop_per_second"] or "-"
            print(f"{dtype:9} {name:15} {row['ms']:9.2f} ms  {rate:>7} GFLOP/s")


def processor() -> str:
    """Return the processor's name, which Linux knows; elsewhere what Python says."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
