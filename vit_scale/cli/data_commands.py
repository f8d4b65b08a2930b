"""The verbs of `vit-scale data`, like those of commands.py."""

import json
from collections.abc import Sequence

from vit_scale.cli.commands import refuse


def download_data(args, overrides: Sequence[str]) -> None:
    from vit_scale.data import downloads

    refuse(overrides, "data download")
    print(downloads.download(args.set, args.out))


def pack_data(args, overrides: Sequence[str]) -> None:
    from vit_scale.data import packing

    refuse([one for one in overrides if not one.startswith(packing.FIELDS)], "data pack")
    counts = packing.pack(
        args.source,
        args.out,
        args.workers,
        args.on_corrupt,
        shorter_side=args.shorter_side,
        quality=args.quality,
        overrides=overrides,
    )
    print(f"{args.out}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))


def index_data(args, overrides: Sequence[str]) -> None:
    from vit_scale.data import tar_shards, tfds_sets

    refuse(overrides, "data index")
    if tfds_sets.is_prepared(args.path):
        counts = tfds_sets.index_names(args.path)
    else:
        counts = tar_shards.index_shards(args.path, args.workers)
    print(f"{args.path}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))


def bench_data(args, overrides: Sequence[str]) -> None:
    from vit_scale import config, plan
    from vit_scale.data import throughput
    from vit_scale.plan import topology

    where = topology.parse(args.topology) if args.topology else None
    cfg = config.load(args.config, overrides)
    result = throughput.measure(cfg, args.seconds)
    if where:
        result["plan"] = plan.plan(args.config, overrides, where)
    print(json.dumps(result) if args.json else throughput.summary(cfg, result))
