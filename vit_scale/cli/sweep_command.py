"""The verb `sweep`: parse its fields, run it, and print the comparison."""

import json
from collections.abc import Sequence
from typing import Any

from vit_scale.cli.commands import refuse_flags
from vit_scale.distributed import preemption
from vit_scale.errors import FAILED, USAGE, UserError


def sweep(args, overrides: Sequence[str]) -> None:
    preemption.install()
    from vit_scale import sweep as sweeps
    from vit_scale.storage import paths

    if args.commands:
        refuse_flags(args, "sweep --commands", "wandb", "compare", "json", "markdown")
    if args.wandb:
        refuse_flags(args, "sweep --wandb", "compare", "json", "markdown")
    if args.json:
        refuse_flags(args, "sweep --json", "markdown")
    if args.seed and not args.random:
        raise UserError("--seed is of --random: give both", USAGE)
    space = sweeps.make_space(args.grid, args.uniform, args.log_uniform)
    if not space.fields:
        raise UserError("a sweep needs --grid, --uniform or --log-uniform", USAGE)
    refuse_swept(space.fields, overrides)
    folder = paths.parse(args.workdir) if args.workdir else sweeps.default_folder(args.config)
    points = sweeps.make_points(space, args.random, args.seed)
    one = sweeps.Sweep(args.config, overrides, points, folder, args.halving)
    if args.commands:
        print_commands(one, args.commands)
        return
    if args.wandb:
        run_wandb_sweep(one, space, args)
        return
    result = sweeps.run_sweep(one, args.parallel, args.quiet, train=not args.compare)
    print_result(one, result, args)


def refuse_swept(swept: Sequence[str], overrides: Sequence[str]) -> None:
    """Raise UserError for a field that is swept and overridden."""
    for item in overrides:
        name = item.partition("=")[0]
        if name in swept:
            raise UserError(f"--config.{name} is swept too: give it once", USAGE)


def print_commands(one, prefix: str) -> None:
    """Print the command of each run; with --halving they would have to be stopped on the way."""
    from vit_scale import sweep as sweeps

    if one.keep:
        raise UserError("--commands prints whole runs: leave out --halving", USAGE)
    sweeps.check(one)
    for number, point in enumerate(one.points):
        folder = one.run_folder(point)
        arguments = sweeps.train_arguments(one.config, one.overrides, point, folder)
        print(sweeps.train_command(prefix, arguments, number))


def print_result(one, result: dict[str, Any], args) -> None:
    """Print the table, where its picture is, and the best run with its command.

    Raises UserError where a run failed.
    """
    from vit_scale import sweep as sweeps

    picture = sweeps.write_picture(one, result)
    failed = [row["name"] for row in result["runs"] if row["status"].startswith("failed")]
    if not args.quiet and args.json:
        print(json.dumps(result))
    elif not args.quiet:
        print(sweeps.format_sweep(result, args.markdown))
        print(f"{result['measure']} on {result['split']}; {picture}")
        print("\n".join(sweeps.describe_best(one, result)))
    if failed:
        many = f"{len(failed)} of {len(result['runs'])} runs failed"
        raise UserError(f"{many}, the first {failed[0]}; see {one.logs}", FAILED)


def run_wandb_sweep(one, space, args) -> None:
    """Write a W&B sweep, and run its agent here where it can be registered."""
    from vit_scale import sweep as sweeps
    from vit_scale.tracking import wandb_sweep
    from vit_scale.training.evaluator import main_result

    if args.halving:
        raise UserError("--wandb can't be combined with --halving", USAGE)
    if args.parallel > 1:
        raise UserError("--wandb runs one agent: start another for each part of the devices", USAGE)
    cfg = sweeps.check(one)[0]
    if not cfg.log.wandb:
        raise UserError("--wandb needs --config.log.wandb=True", USAGE)
    integers = [field for field in space.fields if sweeps.is_integer(field)]
    ranges = {"uniform": space.uniform, "log_uniform_values": space.log_uniform}
    content = wandb_sweep.describe_sweep(
        one.config, one.overrides, space.grid, ranges, integers, main_result(cfg), args.random
    )
    wandb_sweep.run_wandb_sweep(content, one.folder, cfg.log.project)
