"""The grammar of the command line: verbs, their arguments, and `--config.FIELD=VALUE` overrides."""

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from vit_scale.cli import commands, data_commands, sweep_command
from vit_scale.errors import USAGE, UserError

RUN = "run folder, or RUN/checkpoints/STEP"
MODEL = f"{RUN}, or weights: a file, a folder, hf://ORG/NAME"
CONFIG = "name of a config, NAME:ARGUMENT, or a path"
SPLIT = "split such as test or train[98%%:] (default: eval.final of the run)"
JSON = "print one JSON object"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a UserError of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help", USAGE)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    text = "Train Vision Transformers on one CPU or GPU, or on TPU pods."
    top = Parser(prog="vit-scale", description=text, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"vit-scale {version('vit_scale')}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name, run, text):
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(do=run)
        return sub

    text = "train or fine-tune a config; rerun the same command to resume"
    add_train_flags(verb("train", commands.train, text))
    text = "evaluate a run on every image of a split"
    add_eval_flags(verb("eval", commands.evaluate, text))
    text = "measure a model's features: kNN, linear and few-shot classifiers, statistics"
    add_probe_flags(verb("probe", commands.probe, text))
    text = "print the most likely classes of images, or the numbers that a regression predicts"
    add_predict_flags(verb("predict", commands.predict, text))
    text = "train a config with many values of some fields, and compare them on a held-out split"
    add_sweep_flags(verb("sweep", sweep_command.sweep, text))
    text = "print the sizes, costs, and fields of a config, or a table of the results of runs"
    add_show_flags(verb("show", commands.show, text))
    text = "predict memory, speed, and cost on a TPU slice"
    add_plan_flags(verb("plan", commands.plan, text))
    text = "check every checkpoint of a run against its manifest"
    add_verify_flags(verb("verify", commands.verify, text))
    text = "write a report on runs: attention, errors, calibration, comparison"
    add_inspect_flags(verb("inspect", commands.inspect, text))
    text = "convert pretrained weights of other libraries to a run"
    add_convert_flags(verb("convert", commands.convert, text))
    text = "average the weights of runs: a soup, or WiSE-FT's interpolation"
    add_average_flags(verb("average", commands.average, text))
    text = "export a run as one file, or to timm, transformers, Google's ViT, or jax.export"
    add_export_flags(verb("export", commands.export, text))
    add_data_verbs(verb("data", None, "download, pack, index or measure data sets"))
    return top


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def natural(text: str) -> int:
    """Parse an integer of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return int(text)


def halving(text: str) -> int:
    """Parse an integer of at least 2."""
    if positive(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 2")
    return int(text)


def add_train_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, help=CONFIG)
    sub.add_argument("--workdir", help="folder of the run (default: runs/NAME)")
    sub.add_argument("--quiet", action="store_true", help="print errors only")
    text = "save and stop after this step; without the flag, the same command then continues"
    sub.add_argument("--until", type=positive, metavar="STEP", help=text)
    add_host_flags(sub)
    sub.epilog = "--config.FIELD=VALUE overrides a field, such as --config.optim.lr=3e-4."


def add_host_flags(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group(
        "several hosts", "Detected on TPU VMs, SLURM, Open MPI, and GKE; needed elsewhere."
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=positive, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    text = "how long to wait for all processes (default: 300)"
    group.add_argument("--wait", type=positive, default=300, metavar="SECONDS", help=text)


def add_eval_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", help=MODEL)
    sub.add_argument("--split", help=SPLIT)
    text = "real.json: judge predictions on ImageNet's validation set by ReaL's labels"
    sub.add_argument("--real", metavar="FILE", help=text)
    sub.add_argument("--json", action="store_true", help=JSON)
    add_host_flags(sub)
    sub.epilog = "--config.data.name=folder --config.data.path=DIR evaluates on another data set."


def add_probe_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", help=MODEL)
    text = "split to fit classifiers to (default: data.train of the run)"
    sub.add_argument("--train", metavar="SPLIT", help=text)
    sub.add_argument("--split", help=SPLIT)
    text = "number of neighbours (default: 20)"
    sub.add_argument("--knn", type=positive, default=20, metavar="K", help=text)
    text = "of the neighbours' weights, exp(similarity / T) (default: 0.07)"
    sub.add_argument("--temperature", type=float, default=0.07, metavar="T", help=text)
    text = (
        "pooled (what a head reads), cls, mean (of the patch tokens) or cls_mean (default: pooled)"
    )
    sub.add_argument("--feature", default="pooled", metavar="KIND", help=text)
    text = "block to take tokens after, from 0, or from the end if negative (default: the last)"
    sub.add_argument("--layer", type=int, metavar="N", help=text)
    text = "training images a class of the few-shot classifiers (default: 5 10)"
    sub.add_argument("--shots", type=positive, nargs="+", default=(5, 10), metavar="N", help=text)
    text = "draws of these images (default: 5)"
    sub.add_argument("--draws", type=positive, default=5, metavar="N", help=text)
    probes = ("knn", "linear", "few_shot", "statistics")
    text = f"what to measure: {', '.join(probes)} (default: all)"
    sub.add_argument(
        "--only", nargs="+", choices=probes, default=probes, metavar="PROBE", help=text
    )
    text = "folder for the features (default: RUN/features; none for external weights)"
    sub.add_argument("--cache", metavar="DIR", help=text)
    sub.add_argument("--json", action="store_true", help=JSON)
    add_host_flags(sub)
    sub.epilog = "--config.data.name=folder --config.data.path=DIR probes on another data set."


def add_predict_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", help=MODEL)
    sub.add_argument("images", metavar="IMAGE", nargs="+", help="file of an image")
    sub.add_argument("--json", action="store_true", help=JSON)


def add_sweep_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, help=CONFIG)
    text = "field and its values: optim.lr=1e-3,3e-3; several times for all combinations"
    add = sub.add_argument
    add("--grid", action="append", default=[], metavar="FIELD=VALUES", help=text)
    text = "field and its range: augment.mixup=0,0.5; needs --random"
    add("--uniform", action="append", default=[], metavar="FIELD=LOW,HIGH", help=text)
    text = "the same, evenly in the logarithm: optim.lr=1e-4,1e-2"
    add("--log-uniform", action="append", default=[], metavar="FIELD=LOW,HIGH", help=text)
    add("--random", type=positive, metavar="N", help="draw N points instead of all of the grid")
    add("--seed", type=natural, default=0, help="seed of --random (default: 0)")
    add("--parallel", type=positive, default=1, metavar="K", help="runs side by side (default: 1)")
    text = "successive halving: at each rung, the best one in ETA runs continues"
    add("--halving", type=halving, metavar="ETA", help=text)
    add("--workdir", help="folder of the sweep (default: runs/NAME-sweep)")
    text = (
        "print the commands of the runs and train nothing; for another command than vit-scale "
        "train, such as 'launch/tpu_vm.sh --name sweep-{number}'"
    )
    add("--commands", nargs="?", const="vit-scale train", metavar="COMMAND", help=text)
    text = "compare what is trained so far, and train nothing"
    add("--compare", action="store_true", help=text)
    text = "write a W&B sweep, register it if there is an API key, and run its agent"
    add("--wandb", action="store_true", help=text)
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--json", action="store_true", help=JSON)
    add("--quiet", action="store_true", help="print errors only")
    sub.epilog = "--config.FIELD=VALUE sets a field of all runs."


def add_show_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("runs", metavar="RUN", nargs="*", help="folders of finished runs")
    sub.add_argument("--config", help=CONFIG)
    sub.add_argument("--json", action="store_true", help=JSON)
    sub.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    sub.add_argument("--sharding", action="store_true", help="print each parameter's sharding")
    text = "check that the config can train on N devices"
    sub.add_argument("--devices", type=positive, metavar="N", help=text)


def add_plan_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, help=CONFIG)
    text = "TPU slice, such as v5e:16x16 or v5litepod-256"
    sub.add_argument("--topology", required=True, help=text)
    sub.add_argument("--slices", type=int, default=1, help="number of slices (default: 1)")
    text = "search for the smallest changes with which it fits"
    sub.add_argument("--fit", action="store_true", help=text)
    text = "compare variants, fastest first"
    sub.add_argument("--compare", nargs="+", metavar="FIELD=VALUE,...", help=text)
    sub.add_argument("--price", type=float, help="USD per chip and hour")
    sub.add_argument("--json", action="store_true", help=JSON)
    sub.epilog = (
        "Needs the TPU compiler, libtpu (launch/compiler.sh), but no TPU. All numbers are "
        "predictions."
    )


def add_verify_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", help="run folder")
    sub.add_argument("--json", action="store_true", help=JSON)


def add_inspect_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("runs", metavar="RUN", nargs="+", help=RUN)
    text = "show attention on these images instead of the split's"
    sub.add_argument("--images", metavar="DIR", help=text)
    sub.add_argument("--split", help=SPLIT)
    text = "folder of the report (default: RUN/inspect; for several runs, FIRST_RUN/compare)"
    sub.add_argument("--out", metavar="DIR", help=text)
    text = "add the pictures to the runs' pages in Weights & Biases"
    sub.add_argument("--wandb", action="store_true", help=text)
    sub.add_argument("--json", action="store_true", help=JSON)
    sub.epilog = "--config.data.path=DIR is where the runs' images are now."


def add_convert_flags(sub: argparse.ArgumentParser) -> None:
    text = ".npz, .safetensors, .pth, or a Hugging Face folder; a path, gs://, https:// or hf://"
    sub.add_argument("source", metavar="SOURCE", help=text)
    sub.add_argument("out", metavar="OUT", nargs="?", help="folder of the new run")
    text = "only say what SOURCE is: size, patch, grid, parts, preprocessing, what is assumed"
    sub.add_argument("--list", action="store_true", help=text)
    sub.epilog = (
        "--config.data.resolution=384 resamples position embeddings; --config.init.dialect=timm "
        "names the format where it can't be recognised."
    )


def add_average_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("runs", metavar="RUN", nargs="+", help=RUN)
    sub.add_argument("out", metavar="OUT", help="folder of the new run")
    text = "leave out runs that lower the mean's accuracy on --split"
    sub.add_argument("--greedy", action="store_true", help=text)
    text = "split to select by, such as train[90%%:]; never that of eval.final"
    sub.add_argument("--split", help=text)
    text = "of two runs, BASE and FINE_TUNED: (1 - ALPHA) BASE + ALPHA FINE_TUNED"
    sub.add_argument("--wise-ft", type=float, metavar="ALPHA", help=text)
    sub.epilog = "--config.data.path=DIR is where the images of --split are."


def add_export_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", help=MODEL)
    text = "safetensors (one file of this project), safetensors-timm, safetensors-hf, npz or jax"
    sub.add_argument("--format", required=True, help=text)
    text = "folder to write; for safetensors, npz and jax, a file"
    sub.add_argument("--out", required=True, metavar="PATH", help=text)
    text = "type of the parameters in safetensors: float32, float16, bfloat16 (default: float32)"
    sub.add_argument("--dtype", default="float32", help=text)
    text = (
        "write a model card beside the file of safetensors: OUT, with .md; folders have one anyway"
    )
    sub.add_argument("--card", action="store_true", help=text)
    text = "upload the folder to this repository of the Hugging Face Hub, made if need be"
    sub.add_argument("--push", default="", metavar="ORG/NAME", help=text)
    sub.add_argument("--private", action="store_true", help="make the repository private")
    text = "licence for the model card, such as apache-2.0 (default: unknown, or the source's)"
    sub.add_argument("--license", default="", metavar="ID", help=text)


def add_data_verbs(sub: argparse.ArgumentParser) -> None:
    verbs = sub.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    text = "download a data set; resumable, verified by checksum"
    download = verbs.add_parser("download", help=text, description=text, allow_abbrev=False)
    names = (
        "cifar10, cifar100, mnist, fashion_mnist, svhn, stl10, flowers102, pets, food101, "
        "imagenette, imagewoof, or tiny_imagenet"
    )
    download.add_argument("set", metavar="SET", help=names)
    download.add_argument("--out", default=".data", help="folder to unpack into (default: .data)")
    download.set_defaults(do=data_commands.download_data)
    text = "pack a set of image files into ArrayRecord files; resumable"
    pack = verbs.add_parser("pack", help=text, description=text, allow_abbrev=False)
    text = "folder with train/CLASS/*, and val or test; or another set, NAME:PATH, such as tar:DIR"
    pack.add_argument("source", metavar="SOURCE", help=text)
    pack.add_argument("out", metavar="OUT", help="folder to write")
    pack.add_argument(
        "--workers", type=positive, help="number of processes (default: one per core)"
    )
    text = "what to do with corrupt images: fail or skip (default: fail)"
    pack.add_argument("--on-corrupt", default="fail", help=text)
    text = (
        "pixels to reduce the shorter side of larger images to (default: store files as they are)"
    )
    pack.add_argument("--shorter-side", type=positive, default=0, metavar="PIXELS", help=text)
    text = "JPEG quality of reduced images (default: 95)"
    pack.add_argument("--quality", type=positive, default=95, help=text)
    pack.set_defaults(do=data_commands.pack_data)
    text = "index tar shards (WebDataset's layout), or the file names of a tfds set"
    index = verbs.add_parser("index", help=text, description=text, allow_abbrev=False)
    index.add_argument("path", metavar="PATH", help="folder, or pattern such as DIR/{split}-*.tar")
    index.add_argument(
        "--workers", type=positive, help="number of processes (default: one per core)"
    )
    index.set_defaults(do=data_commands.index_data)
    text = "measure how fast this machine reads and decodes a config's training images"
    bench = verbs.add_parser("bench", help=text, description=text, allow_abbrev=False)
    bench.add_argument("--config", required=True, help=CONFIG)
    text = "seconds of each measurement (default: 10)"
    bench.add_argument("--seconds", type=positive, default=10, help=text)
    text = "also plan the config for this slice, and compare: v5e:4x4"
    bench.add_argument("--topology", help=text)
    bench.add_argument("--json", action="store_true", help=JSON)
    bench.set_defaults(do=data_commands.bench_data)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `argv` into the plain arguments and the "FIELD=VALUE" of each --config.FIELD=VALUE."""
    rest, overrides, arguments = [], [], iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        override = argument.removeprefix("--config.")
        value = None if "=" in override else next(arguments, None)
        overrides.append(override if value is None else f"{override}={value}")
    return rest, overrides
