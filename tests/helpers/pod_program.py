"""The processes of a pod in tests/laws/test_mesh.py; started by launch/pod.py or on their own.

    python tests/helpers/pod_program.py JOBS.json [--coordinator ... --processes ... --process ...]

JOBS holds {"folder": ..., "meshes": ..., "state": [field, ...], "runs": [arguments, ...]}. Each run
is trained in this one program. Every device's part of some global batches goes to the folder, and
how many bytes of a fresh state each device holds.
"""

import argparse
import json
import pathlib
import sys

import jax
import numpy as np

from vit_scale import cli, config, data
from vit_scale.augment import draw
from vit_scale.distributed import multihost
from vit_scale.distributed.sharding import batch_rows, shard_batch
from vit_scale.training.init_state import init_state
from vit_scale.training.setup import make_setup


def write_batches(folder: pathlib.Path, overrides: list[str], meshes: dict) -> None:
    """For each mesh and step, {name: (first row, part)} of every device here, in one file."""
    for name, sizes in meshes.items():
        cfg = config.load("vit_tutorial_cifar", [*overrides, *sizes])
        program = make_setup(cfg)
        rows, size = batch_rows(cfg.data.batch, program.mesh), cfg.data.batch
        source = data.open_split(cfg.data, cfg.data.train)
        prepare = jax.jit(program.objective.prepare)
        draws = jax.jit(lambda key, n=size, c=cfg: draw(key, n, c.augment, (32, 32), (32, 32)))
        for step, batch in data.train_batches(source, cfg.data, cfg.seed, 7, 9, rows):
            key = jax.random.fold_in(jax.random.key(cfg.seed), step)
            given = shard_batch(batch, program.mesh, size)
            prepared = prepare(given, key)
            parts = {f"host/{k}": x for k, x in given.items()}
            parts |= {f"device/{k}": x for k, x in prepared.items()}
            found = {
                f"{key}/{shard.index[0].indices(size)[0]}/{shard.device.id}": np.asarray(shard.data)
                for key, array in parts.items()
                for shard in array.addressable_shards
            }
            found |= {f"draw/{k}/0/0": np.asarray(x) for k, x in draws(key).items()}
            np.savez(folder / f"{name}-{step}-{jax.process_index()}.npz", **found)


def write_state_bytes(folder: pathlib.Path, overrides: list[str]) -> None:
    """{"params": {device: bytes}, "opt_state": ...}, counted from the arrays' shards."""
    state = init_state(make_setup(config.load("vit_tiny_imagenet", overrides)), (), quiet=True)
    found: dict[str, dict[int, int]] = {}
    for name in ("params", "opt_state"):
        held = found.setdefault(name, {})
        for leaf in jax.tree.leaves(getattr(state, name)):
            for shard in leaf.addressable_shards:
                held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    (folder / "state_bytes.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    args = parser.parse_args()
    multihost.join(args.coordinator, args.processes, args.process, wait=120)
    jobs = json.loads(pathlib.Path(args.jobs).read_text())
    folder = pathlib.Path(jobs["folder"])
    write_batches(folder, jobs["overrides"], jobs["meshes"])
    if jobs["state"]:
        write_state_bytes(folder, jobs["state"])
    for arguments in jobs["runs"]:
        if code := cli.main(arguments):
            sys.exit(code)


if __name__ == "__main__":
    main()
