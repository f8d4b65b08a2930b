"""What training would need and take on a TPU slice that is not there: `vit-scale plan`.

The step that `train` runs is compiled for the slice by libtpu, on any machine; what its compiler
says becomes a prediction. Each compilation is a process of its own (step.py): this one never loads
a TPU's library.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from vit_scale import config
from vit_scale.errors import FAILED, UserError
from vit_scale.plan import estimate
from vit_scale.plan.hlo import exposed_cycles
from vit_scale.plan.topology import ENVIRONMENT, Topology

COMPILER = os.path.join(sys.prefix, "libtpu")  # where launch/compiler.sh puts it
LOG = {  # of the scheduler, on standard error
    "TPU_MIN_LOG_LEVEL": "0",
    "TPU_STDERR_LOG_LEVEL": "0",
    "TPU_VMODULE": "latency_hiding_scheduler=1",
}
SAVE_MATMULS = "dots_with_no_batch_dims_saveable"  # recomputes what is cheap


def plan(name: str, overrides: Sequence[str], where: Topology, price: float | None = None) -> dict:
    """What the config `name` with `overrides` comes to on a slice. Bytes are per device.

    Where it fits: times in ms, speed, cost, collectives. Where it doesn't: "fits" is False, and
    "peak_bytes" what it needs, if the compiler said. Raises UserError where the config can't work.
    """
    cfg = config.load(name, overrides)
    if cfg.stages:
        raise UserError(f"config {name} is several runs: plan one, such as {name}:{cfg.stages[0]}")
    found, log = _compile(name, overrides, where)
    if "error" in found:
        raise UserError(found["error"], found["code"])
    found = {"config": name, "overrides": list(overrides)} | found
    if not found["fits"]:
        return found
    found["exposed_ms"] = 1e3 * exposed_cycles(log) / where.tpu.clock_hz
    return found | estimate.totals(found, estimate.step_ms(found), price)


def _compile(name: str, overrides: Sequence[str], where: Topology) -> tuple[dict, str]:
    """The answer of step.py, and the compiler's log."""
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
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise UserError(f"the compiler ended with {done.returncode}, saying: {said[0]}", FAILED)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def compare(
    name: str,
    overrides: Sequence[str],
    variants: Sequence[str],
    where: Topology,
    price: float | None = None,
) -> list[dict]:
    """A plan of the config and of each variant, such as "mesh.fsdp=16,model.remat=full".

    The best first; those that don't fit, or can't work, last, with the reason in "error".
    """
    found = []
    for variant in ("", *variants):
        changes = [part for part in re.split(r",(?=[a-z_.]+=)", variant) if part]
        try:
            row = plan(name, [*overrides, *changes], where, price)
        except UserError as error:
            row = {"fits": False, "error": str(error)}
        found.append(row | {"variant": variant or "as configured"})
    return sorted(found, key=lambda row: row.get("step_ms", float("inf")))


def fit(found: dict, where: Topology, price: float | None, tell: Callable[[str], None]) -> dict:
    """The first plan that fits of those with the cheapest changes; its "flags" are to be added.

    `found` is a plan that does not fit; `tell` hears of every attempt. Raises UserError where none
    of them fits.
    """
    name, overrides = found["config"], found["overrides"]
    for changes in cheapest_changes(found, config.load(name, overrides)):
        attempt = plan(name, [*overrides, *changes], where, price)
        if attempt["fits"]:
            return attempt | {"flags": [f"--config.{change}" for change in changes]}
        tell(f"does not fit: {' '.join(changes)} ({memory(attempt)})")
    raise UserError(f"nothing fits {where.name}, not even a batch of one image per device")


def cheapest_changes(found: dict, cfg) -> Iterator[list[str]]:
    """Overrides that save memory, those that cost the least speed first, then a smaller batch.

    Sharding the parameters hides most of what it moves, but can't save more than the state and the
    gradients; recomputing costs up to a third; micro-batches and smaller batches use the chip less.
    """
    shards = _shardings(found)
    state = sum(found[f"{part}_bytes"] for part in ("parameter", "optimizer", "ema"))
    over = (found["peak_bytes"] or 0) - found["hbm_bytes"]
    for size in shards:
        if over < 2 * state * (1 - found["mesh"]["fsdp"] / size):
            yield [f"mesh.fsdp={size}"]
    remat = [name for name in (SAVE_MATMULS, "full") if name != cfg.model.remat]
    for policy in remat[remat.index("full") :] if cfg.model.remat == SAVE_MATMULS else remat:
        if cfg.model.remat != "full":
            yield [f"model.remat={policy}"]
    smallest = [] if cfg.model.remat == "full" else ["model.remat=full"]
    for size in shards if smallest else ():
        yield [*smallest, f"mesh.fsdp={size}"]
    smallest += [f"mesh.fsdp={size}" for size in shards[-1:]]
    each = cfg.data.batch // (found["mesh"]["data"] * found["mesh"]["fsdp"])
    for parts in _powers(2, each // cfg.optim.accumulate):
        yield [*smallest, f"optim.accumulate={cfg.optim.accumulate * parts}"]
    for parts in _powers(2, each // cfg.optim.accumulate):
        yield [*smallest, f"data.batch={cfg.data.batch // parts}"]


def _shardings(found: dict) -> list[int]:
    """Larger sizes of the fsdp axis, each four times the last, that a slice has room for."""
    now, mesh = found["mesh"]["fsdp"], found["mesh"]
    room = found["devices"] // found["slices"] // mesh["tensor"] // now
    return [now * size for size in _powers(4, room)]


def _powers(base: int, limit: int) -> list[int]:
    """base, base^2, ... of which each divides `limit`; for room that is no power, `limit` last."""
    sizes, size = [], base
    while size <= limit and limit % size == 0:
        sizes.append(size)
        size *= base
    if limit > 1 and limit not in sizes and base > 2:
        sizes.append(limit)
    return sizes


def memory(found: dict) -> str:
    """ "18.2 of 15.8 GiB": what a plan needs of a device, and what there is."""
    needs = found["peak_bytes"]
    return f"{f'{needs / 2**30:.2f}' if needs else 'more'} of {found['hbm_bytes'] / 2**30:.2f} GiB"
