"""The command line: `vit-scale VERB ...`. Each verb is a few lines over the rest of the package.

A user's mistake is one line and a non-zero exit, never a traceback.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from vit_scale import preemption
from vit_scale.errors import DONE, FAILED, RESUMABLE, STORAGE, USAGE, UserError, nearest


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help", USAGE)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="vit-scale", description=__doc__.partition("\n")[0], allow_abbrev=False)
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name, run, text):
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(do=run)
        return sub

    sub = verb("train", train, "train or fine-tune a config; the same command resumes it")
    sub.add_argument("--config", required=True, help="a config's name, a path, or NAME:ARGUMENT")
    sub.add_argument("--workdir", help="the run's folder; runs/NAME if not given")
    sub.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_host_flags(sub)
    sub.epilog = "--config.FIELD=VALUE overrides a field, such as --config.optim.lr=3e-4"

    sub = verb("eval", evaluate, "measure a run's model on every image of a split")
    sub.add_argument("run", metavar="RUN", help="a run's folder, or RUN/checkpoints/STEP")
    sub.add_argument(
        "--split", help="such as test or train[98%%:]; the run's eval.final if not given"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    add_host_flags(sub)
    sub.epilog = "--config.data.name=folder --config.data.path=DIR evaluates on another set"

    sub = verb("predict", predict, "name the likeliest classes of images")
    sub.add_argument("run", metavar="RUN", help="a run's folder, or RUN/checkpoints/STEP")
    sub.add_argument("images", metavar="IMAGE", nargs="+")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = verb("show", show, "print what a config comes to, or the results of runs as a table")
    sub.add_argument("runs", metavar="RUN", nargs="*", help="folders of finished runs")
    sub.add_argument("--config", help="a config's name, a path, or NAME:ARGUMENT")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument("--markdown", action="store_true", help="print the table of runs as Markdown")
    sub.add_argument(
        "--sharding", action="store_true", help="print where each parameter of --config lies"
    )
    sub.add_argument(
        "--devices", type=count, metavar="N", help="check that --config trains on so many devices"
    )

    add_plan_flags(verb("plan", plan, "compile the training step for a TPU slice not there"))

    sub = verb("verify", verify, "read every checkpoint of a run, and compare it with its manifest")
    sub.add_argument("run", metavar="RUN", help="a run's folder")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    add_inspect_flags(verb("inspect", inspect, "look inside runs, and compare them"))
    add_weight_verbs(verb)
    add_data_verbs(verb("data", None, "download or pack image sets"))
    return top


def count(text: str) -> int:
    """An argument that is at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def add_host_flags(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group(
        "several hosts", "found without flags on TPU VMs, SLURM, Open MPI and GKE"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--processes", type=count, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--wait",
        type=count,
        default=300,
        metavar="SECONDS",
        help="for all to appear (default: 300)",
    )


def join_hosts(args) -> None:
    from vit_scale import hosts

    hosts.join(args.coordinator, args.processes, args.process, args.wait)
    args.quiet = getattr(args, "quiet", False) or not hosts.is_first()


def add_inspect_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "runs", metavar="RUN", nargs="+", help="a run's folder, or RUN/checkpoints/STEP"
    )
    sub.add_argument("--images", metavar="DIR", help="look at these, instead of the split's images")
    sub.add_argument(
        "--split", help="such as test or train[98%%:]; the run's eval.final if not given"
    )
    sub.add_argument(
        "--out", metavar="DIR", help="RUN/inspect, or of several the first one's RUN/compare"
    )
    sub.add_argument(
        "--wandb", action="store_true", help="add the pictures to the runs' Weights & Biases pages"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.epilog = "--config.data.path=DIR says where the runs' images are now"


def add_plan_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, help="a config's name, a path, or NAME:ARGUMENT")
    sub.add_argument("--topology", required=True, help="such as v5e:16x16 or v5litepod-256")
    sub.add_argument("--slices", type=int, default=1, help="how many of them (default: 1)")
    sub.add_argument("--fit", action="store_true", help="find the changes that make it fit")
    sub.add_argument(
        "--compare", nargs="+", metavar="FIELD=VALUE,...", help="variants, the fastest first"
    )
    sub.add_argument("--price", type=float, help="USD per chip and hour")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.epilog = "needs libtpu, the compiler (vit_scale[tpu]), and no TPU; all of it is predicted"


def add_weight_verbs(verb) -> None:
    sub = verb("convert", convert, "make a run of weights that were trained elsewhere")
    sub.add_argument(
        "source",
        metavar="SOURCE",
        help=".npz, .safetensors, .pth, or a Hugging Face folder; on disk, gs:// or https://",
    )
    sub.add_argument("out", metavar="OUT", help="the new run's folder")
    sub.epilog = "--config.data.resolution=384 resamples positions; --config.init.dialect=timm"

    sub = verb("export", export, "write a run's model for others: timm, transformers, Google, jax")
    sub.add_argument("run", metavar="RUN", help="a run's folder, or RUN/checkpoints/STEP")
    sub.add_argument("--format", required=True, help="safetensors-timm, safetensors-hf, npz or jax")
    sub.add_argument("--out", required=True, metavar="PATH", help="a folder; for npz, jax a file")


def add_data_verbs(sub: argparse.ArgumentParser) -> None:
    verbs = sub.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    text = "download a set, resuming and checking it"
    download = verbs.add_parser("download", help=text, description=text, allow_abbrev=False)
    download.add_argument("set", metavar="SET", help="cifar10")
    download.add_argument("--out", default=".data", help="folder to unpack it in (default: .data)")
    download.set_defaults(do=download_data)
    text = "pack an image folder into ArrayRecord files, resuming"
    pack = verbs.add_parser("pack", help=text, description=text, allow_abbrev=False)
    pack.add_argument("folder", metavar="FOLDER", help="holds train/CLASS/*, and val or test")
    pack.add_argument("out", metavar="OUT", help="folder to write to")
    pack.add_argument("--workers", type=int, help="processes; one a core if not given")
    pack.add_argument("--on-corrupt", default="fail", help="fail or skip (default: fail)")
    pack.set_defaults(do=pack_data)


def train(args, overrides: Sequence[str]) -> None:
    preemption.install()
    from vit_scale import config, report
    from vit_scale.stages import train_stages

    join_hosts(args)
    workdir = args.workdir or f"runs/{config.title(args.config)}"
    runs = train_stages(args.config, overrides, workdir, args.quiet)
    if not args.quiet:
        rows = report.rows(runs)
        print(report.table(rows))
        print(json.dumps({"runs": rows}))


def evaluate(args, overrides: Sequence[str]) -> None:
    from vit_scale import config, pretrained
    from vit_scale.data import open_split
    from vit_scale.evaluate import Evaluate
    from vit_scale.mesh import make_mesh, place, shardings

    join_hosts(args)
    given = pretrained.read(args.run)
    given.cfg.mesh = config.base().mesh  # the machine's devices, not the training's
    cfg = config.override(given.cfg, overrides)
    split = args.split or cfg.eval.final
    source = open_split(cfg.data, split)
    mesh = make_mesh(cfg.mesh)
    params = place(given.params, shardings(given.params, mesh))
    result = Evaluate(cfg, given.model, mesh)(params, source)
    if args.quiet:
        return
    shown = {"run": str(given.path), "step": given.step, "split": split, **result}
    if args.json:
        print(json.dumps(shown))
    else:
        print(
            f"{source.name}: accuracy {100 * result['accuracy']:.2f} %, loss {result['loss']:.4f}, "
            f"n {result['n']:,} (step {given.step:,}, batch {cfg.eval.batch:,})"
        )


def predict(args, overrides: Sequence[str]) -> None:
    from vit_scale.predict import load

    refuse(overrides, "predict")
    predictor = load(args.run)
    found = {image: predictor.top(image) for image in args.images}
    if args.json:
        print(json.dumps({image: dict(top) for image, top in found.items()}))
        return
    for image, top in found.items():
        print(image)
        for name, probability in top:
            print(f"  {100 * probability:6.2f} %  {name}")


def inspect(args, overrides: Sequence[str]) -> None:
    from vit_scale import report
    from vit_scale.inspect import describe, inspect

    found = inspect(args.runs, args.images, args.split, args.out, overrides, args.wandb)
    if args.json:
        print(json.dumps(found))
        return
    print(report.table(describe(found["runs"])))
    for note in found["notes"]:
        print(note)
    print(found["page"])


def show(args, overrides: Sequence[str]) -> None:
    from vit_scale import config, goodput, report
    from vit_scale.program import placements, plan_program, summary

    if bool(args.runs) == bool(args.config):
        raise UserError("show takes RUN folders or --config NAME; see vit-scale show --help", USAGE)
    if args.runs:
        refuse(overrides, "show RUN")
        rows = report.rows(args.runs)
        spent = {str(run): used for run in args.runs if (used := report.goodput(run))}
        if args.json:
            print(json.dumps({"runs": rows, "goodput": spent}))
            return
        print(report.table(rows, args.markdown))
        for run, used in spent.items() if not args.markdown else ():
            print(f"\n{run}: {goodput.text(used)}")
        return
    cfg = config.load(args.config, overrides)
    if args.sharding:
        found = placements(plan_program(cfg, args.devices))
        print(json.dumps(found) if args.json else report.placements(found))
        return
    content = summary(cfg)
    stages = {stage: config.load(f"{args.config}:{stage}", overrides) for stage in cfg.stages}
    if args.devices:  # raises where it can't be
        for part in stages.values() or (cfg,):
            plan_program(part, args.devices)
    if stages:
        content["stages"] = {stage: config.to_json(part) for stage, part in stages.items()}
    if args.json:
        print(json.dumps(content))
    else:
        for key, value in config.dotted(content).items():
            print(f"{key:24} {value}")


def plan(args, overrides: Sequence[str]) -> None:
    from vit_scale import plan
    from vit_scale.plan import table, topology

    where = topology.parse(args.topology, args.slices)
    if args.compare:
        rows = plan.compare(args.config, overrides, args.compare, where, args.price)
        print(json.dumps({"variants": rows}) if args.json else table.comparison(rows))
        return
    found = plan.plan(args.config, overrides, where, args.price)
    if args.fit and not found["fits"]:
        found = plan.fit(found, where, args.price, lambda line: print(line, file=sys.stderr))
    print(json.dumps(found) if args.json else table.text(found))


def verify(args, overrides: Sequence[str]) -> None:
    from vit_scale import report, verify

    refuse(overrides, "verify")
    rows = verify.verify(args.run)
    print(json.dumps({"files": rows}) if args.json else report.table(rows))
    if bad := [row["file"] for row in rows if row["state"] != "whole"]:
        raise UserError(
            f"{args.run}: {len(bad)} of {len(rows)} are damaged ({', '.join(bad)}); training goes "
            "on from the newest whole checkpoint"
        )


def convert(args, overrides: Sequence[str]) -> None:
    from vit_scale import pretrained

    made, rows = pretrained.convert(args.source, args.out, overrides)
    shape, classes = made.model.shape, len(made.classes)
    text = f"{shape.size}, patch {shape.patch}, pool {shape.pool}, {classes} classes"
    print("\n".join([*made.lines, pretrained.table(rows), f"{args.out}: {text}"]))


def export(args, overrides: Sequence[str]) -> None:
    from vit_scale.export import export

    refuse(overrides, "export")
    print("\n".join(export(args.run, args.format, args.out)))


def download_data(args, overrides: Sequence[str]) -> None:
    from vit_scale.data import download

    refuse(overrides, "data download")
    sets = {"cifar10": download.cifar10}
    if args.set not in sets:
        raise UserError(f"no set is named {args.set!r}; {nearest(args.set, sets)}", USAGE)
    print(sets[args.set](args.out))


def pack_data(args, overrides: Sequence[str]) -> None:
    from vit_scale.data import records

    refuse(overrides, "data pack")
    counts = records.pack(args.folder, args.out, args.workers, args.on_corrupt)
    print(f"{args.out}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))


def refuse(overrides: Sequence[str], verb: str) -> None:
    if overrides:
        raise UserError(f"vit-scale {verb} takes no --config.{overrides[0]}", USAGE)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments, and apart from them the "FIELD=VALUE" of each --config.FIELD=VALUE."""
    rest, overrides, arguments = [], [], iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        override = argument.removeprefix("--config.")
        value = None if "=" in override else next(arguments, None)
        overrides.append(override if value is None else f"{override}={value}")
    return rest, overrides


def _report_unraisable(unraisable) -> None:
    """What tensorstore's threads say when writes outlive the checkpoint that failed is no news.

    The failure itself is raised where the checkpoint is waited for, and becomes one line.
    """
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    sys.unraisablehook = _report_unraisable
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    # What Orbax and its loops log of a full disk is hundreds of lines; the one line here says it.
    # So it does of what a bucket refuses, which its packages log with tracebacks.
    for name in ("absl", "asyncio", "gcsfs", "google"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        args = parser().parse_args(arguments)
        args.do(args, overrides)
    except UserError as error:
        return failed(str(error), error.code)
    except KeyboardInterrupt:
        return failed("stopped; the same command goes on from the last checkpoint", 130)
    except OSError as error:
        code = RESUMABLE if error.errno in STORAGE else FAILED
        return failed(f"{error.filename or 'storage'}: {error.strerror or error}", code)
    except Exception as error:
        from vit_scale import paths

        if reason := paths.reason(error):
            return failed(f"object storage: {reason}", FAILED)
        leave_hosts(FAILED, error)
        raise
    return DONE


def failed(line: str, code: int) -> int:
    """Say in one line why the command failed; its exit code."""
    print(f"vit-scale: {line}", file=sys.stderr)
    leave_hosts(code)
    return code


def leave_hosts(code: int, error: Exception | None = None) -> None:
    """A process of several ends here and now, and does not wait for the others to end."""
    if "vit_scale.hosts" in sys.modules:  # else no verb has got far enough to meet any
        from vit_scale import hosts

        hosts.leave(code, error)


if __name__ == "__main__":
    sys.exit(main())
