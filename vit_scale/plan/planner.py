"""Plan one config on a slice, compare variants, and search for one that fits: `vit-scale plan`.

Each compilation is a process of its own (step.py): this one never loads libtpu.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from vit_scale import config
from vit_scale.errors import FAILED, UserError
from vit_scale.models import convnets
from vit_scale.plan import estimate
from vit_scale.plan.hlo import exposed_cycles
from vit_scale.plan.topology import ENVIRONMENT, Topology

COMPILER = os.path.join(sys.prefix, "libtpu")  # where launch/compiler.sh puts it
LOG = {  # makes the scheduler log to standard error
    "TPU_MIN_LOG_LEVEL": "0",
    "TPU_STDERR_LOG_LEVEL": "0",
    "TPU_VMODULE": "latency_hiding_scheduler=1",
}
SAVE_MATMULS = "dots_with_no_batch_dims_saveable"  # recomputes all but matrix products


def plan(name: str, overrides: Sequence[str], where: Topology, price: float | None = None) -> dict:
    """Predict memory, time and cost of the config `name` with `overrides` on a slice.

    Bytes are per device, times in ms, `price` in USD per chip and hour. If the step does not fit,
    "fits" is False and "peak_bytes" is what it needs, or None if the compiler did not say. Raises
    UserError for a config that can't work.
    """
    cfg = config.load(name, overrides)
    if cfg.stages:
        raise UserError(
            f"config {name} has several stages: plan one, such as {name}:{cfg.stages[0]}"
        )
    result, log = _compile(name, overrides, where)
    if "error" in result:
        raise UserError(result["error"], result["code"])
    result = {"config": name, "overrides": list(overrides)} | result
    if not result["fits"]:
        return result
    result["exposed_ms"] = 1e3 * exposed_cycles(log) / where.tpu.clock_hz
    result |= estimate.totals(result, estimate.step_ms(result), price)
    if result.get("decodes"):
        result |= estimate.decoding(result, result["images_per_second"], where)
    return result


def _compile(name: str, overrides: Sequence[str], where: Topology) -> tuple[dict, str]:
    """Run step.py in a process; return its result and the compiler's log."""
    request = {"config": name, "overrides": list(overrides), "topology": where.name}
    done = subprocess.run(
        [sys.executable, "-m", "vit_scale.plan.step"],
        input=json.dumps(request | {"slices": where.slices}) + "\n",
        env=os.environ | ENVIRONMENT | LOG | {"PYTHONPATH": os.pathsep.join([*sys.path, COMPILER])},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise UserError(f"the compiler exited with code {done.returncode}: {last[0]}", FAILED)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def compare(
    name: str,
    overrides: Sequence[str],
    variants: Sequence[str],
    where: Topology,
    price: float | None = None,
) -> list[dict]:
    """Plan the config and each variant, such as "mesh.fsdp=16,model.remat=full".

    Returns the fastest first, and last those that don't fit or can't work; "error" says why.
    """
    results = []
    for variant in ("", *variants):
        changes = [part for part in re.split(r",(?=[a-z_.]+=)", variant) if part]
        try:
            row = plan(name, [*overrides, *changes], where, price)
        except UserError as error:
            row = {"fits": False, "error": str(error)}
        results.append(row | {"variant": variant or "as configured"})
    return sorted(results, key=lambda row: row.get("step_ms", float("inf")))


def fit(result: dict, where: Topology, price: float | None, report: Callable[[str], None]) -> dict:
    """Search for the cheapest changes that make a plan fit; they are its "flags".

    `result` is a plan that does not fit; `report` gets a line per failed attempt. Raises UserError
    where no change suffices.
    """
    name, overrides = result["config"], result["overrides"]
    for changes in cheapest_changes(result, config.load(name, overrides)):
        try:
            attempt = plan(name, [*overrides, *changes], where, price)
        except UserError as error:  # such as rematerialisation of a convolutional network
            report(f"can't be: {' '.join(changes)} ({error})")
            continue
        if attempt["fits"]:
            return attempt | {"flags": [f"--config.{change}" for change in changes]}
        report(f"does not fit: {' '.join(changes)} ({memory(attempt)})")
    raise UserError(f"no configuration fits {where.name}, not even a batch of one image per device")


def cheapest_changes(result: dict, cfg) -> Iterator[list[str]]:
    """Yield overrides that save memory, the least slowdown first, and a smaller batch last.

    Sharding the parameters overlaps most of its communication, but saves no more than the state and
    the gradients; rematerialisation costs up to a third of the speed; micro-batches and smaller
    batches use the chip less.
    """
    shards = _fsdp_sizes(result)
    state = sum(result[f"{part}_bytes"] for part in ("parameter", "optimizer", "ema"))
    over = (result["peak_bytes"] or 0) - result["hbm_bytes"]
    for size in shards:
        if over < 2 * state * (1 - result["mesh"]["fsdp"] / size):
            yield [f"mesh.fsdp={size}"]
    done = cfg.model.remat == "full" or cfg.model.variant in convnets.SIZES  # which have no blocks
    policies = {"none": (SAVE_MATMULS, "full")}.get(cfg.model.remat, ("full",))
    yield from ([f"model.remat={policy}"] for policy in policies if not done)
    smallest = [] if done else ["model.remat=full"]
    for size in shards if smallest else ():
        yield [*smallest, f"mesh.fsdp={size}"]
    smallest += [f"mesh.fsdp={size}" for size in shards[-1:]]
    per_device = cfg.data.batch // (result["mesh"]["data"] * result["mesh"]["fsdp"])
    for parts in _powers(2, per_device // cfg.optim.accumulate):
        yield [*smallest, f"optim.accumulate={cfg.optim.accumulate * parts}"]
    for parts in _powers(2, per_device // cfg.optim.accumulate):
        yield [*smallest, f"data.batch={cfg.data.batch // parts}"]


def _fsdp_sizes(result: dict) -> list[int]:
    """Return larger sizes of the fsdp axis, each four times the last, that a slice allows."""
    current, mesh = result["mesh"]["fsdp"], result["mesh"]
    limit = result["devices"] // result["slices"] // mesh["tensor"] // current
    return [current * size for size in _powers(4, limit)]


def _powers(base: int, limit: int) -> list[int]:
    """Return base, base^2, ... that divide `limit`; for a base above 2, `limit` is the last."""
    sizes, size = [], base
    while size <= limit and limit % size == 0:
        sizes.append(size)
        size *= base
    if limit > 1 and limit not in sizes and base > 2:
        sizes.append(limit)
    return sizes


def memory(result: dict) -> str:
    """Format what a plan needs of a device's memory: "14.20 of 15.75 GiB"."""
    needs = result["peak_bytes"]
    return f"{f'{needs / 2**30:.2f}' if needs else 'more'} of {result['hbm_bytes'] / 2**30:.2f} GiB"
