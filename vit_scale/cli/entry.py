"""The command line: `vit-scale VERB ...`. Each verb is a few lines over the rest of the package.

Here is what may be typed, and what exit code an end has; verbs.py does what was asked. A user's
mistake is one line and a non-zero exit, never a traceback.
"""

import argparse
import contextlib
import io
import logging
import os
import select
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn, TextIO

from vit_scale.cli import commands
from vit_scale.errors import DONE, FAILED, USAGE, UserError, printable
from vit_scale.storage import errors as storage_errors


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help", USAGE)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="vit-scale", description=__doc__.partition("\n")[0], allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"vit-scale {version('vit_scale')}")
    subparsers = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name, run, text):
        sub = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(do=run)
        return sub

    sub = verb("train", commands.train, "train or fine-tune a config; the same command resumes it")
    sub.add_argument("--config", required=True, help="a config's name, a path, or NAME:ARGUMENT")
    sub.add_argument("--workdir", help="the run's folder; runs/NAME if not given")
    sub.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_host_flags(sub)
    sub.epilog = "--config.FIELD=VALUE overrides a field, such as --config.optim.lr=3e-4"

    sub = verb("eval", commands.evaluate, "measure a run's model on every image of a split")
    sub.add_argument("run", metavar="RUN", help="a run's folder, or RUN/checkpoints/STEP")
    sub.add_argument(
        "--split", help="such as test or train[98%%:]; the run's eval.final if not given"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    add_host_flags(sub)
    sub.epilog = "--config.data.name=folder --config.data.path=DIR evaluates on another set"

    sub = verb("predict", commands.predict, "name the likeliest classes of images")
    sub.add_argument("run", metavar="RUN", help="a run's folder, or RUN/checkpoints/STEP")
    sub.add_argument("images", metavar="IMAGE", nargs="+")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    text = "print what a config comes to, or the results of runs as a table"
    add_show_flags(verb("show", commands.show, text))
    add_plan_flags(verb("plan", commands.plan, "compile the train step for an absent TPU slice"))

    text = "read every checkpoint of a run, and compare it with its manifest"
    sub = verb("verify", commands.verify, text)
    sub.add_argument("run", metavar="RUN", help="a run's folder")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    add_inspect_flags(verb("inspect", commands.inspect, "look inside runs, and compare them"))
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


def add_show_flags(sub: argparse.ArgumentParser) -> None:
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
    sub.epilog = (
        "needs libtpu, the compiler (launch/compiler.sh), and no TPU; all of it is predicted"
    )


def add_weight_verbs(verb) -> None:
    sub = verb("convert", commands.convert, "make a run of weights that were trained elsewhere")
    sub.add_argument(
        "source",
        metavar="SOURCE",
        help=".npz, .safetensors, .pth, or a Hugging Face folder; on disk, gs:// or https://",
    )
    sub.add_argument("out", metavar="OUT", help="the new run's folder")
    sub.epilog = "--config.data.resolution=384 resamples positions; --config.init.dialect=timm"

    sub = verb(
        "export", commands.export, "write a run's model for others: timm, transformers, Google, jax"
    )
    sub.add_argument("run", metavar="RUN", help="a run's folder, or RUN/checkpoints/STEP")
    sub.add_argument("--format", required=True, help="safetensors-timm, safetensors-hf, npz or jax")
    sub.add_argument("--out", required=True, metavar="PATH", help="a folder; for npz, jax a file")


def add_data_verbs(sub: argparse.ArgumentParser) -> None:
    subparsers = sub.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    text = "download a set, resuming and checking it"
    download = subparsers.add_parser("download", help=text, description=text, allow_abbrev=False)
    download.add_argument("set", metavar="SET", help="cifar10")
    download.add_argument("--out", default=".data", help="folder to unpack it in (default: .data)")
    download.set_defaults(do=commands.download_data)
    text = "pack an image folder into ArrayRecord files, resuming"
    pack = subparsers.add_parser("pack", help=text, description=text, allow_abbrev=False)
    pack.add_argument("folder", metavar="FOLDER", help="holds train/CLASS/*, and val or test")
    pack.add_argument("out", metavar="OUT", help="folder to write to")
    pack.add_argument("--workers", type=int, help="processes; one a core if not given")
    pack.add_argument("--on-corrupt", default="fail", help="fail or skip (default: fail)")
    pack.set_defaults(do=commands.pack_data)


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
    """Run a command line; returns the exit code.

    Where nobody reads the output any more, as in `vit-scale show ... | head`, it ends quietly.
    """
    try:
        return run(sys.argv[1:] if argv is None else argv)
    finally:
        if _is_unread(sys.stdout):  # else Python complains of it at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    with contextlib.suppress(OSError, ValueError):  # a notebook's is no file
        asked = select.poll()
        asked.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in asked.poll(0))
    return False


# Verbs that a second time go on where they were.
RESUMES = ("train", "data")


def run(argv: Sequence[str]) -> int:
    """What `main` does, as long as its output is read."""
    sys.unraisablehook = _report_unraisable
    if isinstance(sys.stdout, io.TextIOWrapper):  # not a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")  # a name from a disk may be in no charset
    args = argparse.Namespace(verb="")
    arguments, overrides = split_overrides(argv)
    # What Orbax and its loops log of a full disk is hundreds of lines; the one line here says it.
    # So it does of what a bucket refuses, which its packages log with tracebacks.
    for name in ("absl", "asyncio", "gcsfs", "google"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        args = parser().parse_args(arguments)
        args.do(args, overrides)
        sys.stdout.flush()
    except UserError as error:
        return failed(str(error), error.code)
    except KeyboardInterrupt:
        resumes = "; rerun the same command to resume" if args.verb in RESUMES else ""
        return failed(f"stopped{resumes}", 130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            return DONE
        if reason := storage_errors.reason(error):
            source = getattr(error, "filename", None) or "storage"
            return failed(f"{source}: {reason}", storage_errors.exit_code(error))
        leave_hosts(FAILED, error)
        raise
    return DONE


def failed(line: str, code: int) -> int:
    """Say in one line why the command failed; its exit code."""
    with contextlib.suppress(BrokenPipeError):  # nobody hears it
        print(f"vit-scale: {printable(line)}", file=sys.stderr)
    leave_hosts(code)
    return code


def leave_hosts(code: int, error: Exception | None = None) -> None:
    """A process of several ends here and now, and does not wait for the others to end."""
    if "vit_scale.distributed.multihost" in sys.modules:  # else none were joined
        from vit_scale.distributed import multihost

        multihost.leave(code, error)
