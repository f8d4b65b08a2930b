#!/usr/bin/env python3
"""Check a config for a TPU slice, and print, or --run, the xpk command that trains it on GKE.

    launch/gke.py --config vit_base_imagenet --name vit --type v6e-64 --cluster CLUSTER \\
        --base-image IMAGE --workdir gs://BUCKET/vit --run -- --project PROJECT --zone ZONE

What follows `--` goes to xpk. --base-image has the dependencies, and xpk adds this repository's
files as they are now; --image has both: see Dockerfile. Resumable runs (exit code 42) and lost
machines (127 and above) restart all slices, at most --max-restarts times; other codes end the job.
"""

import argparse
import pathlib
import shlex
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from launch.tpu import accelerators, bundle, flags, preflight
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.plan import NAME, ROOT


def parser() -> argparse.ArgumentParser:
    top = flags.Parser(prog="launch/gke.py", description=__doc__.partition("\n")[0])
    add, image = top.add_argument, top.add_mutually_exclusive_group(required=True)
    add("--config", required=True, help="a config of configs/, NAME:ARGUMENT, or a path below here")
    named = flags.matching(NAME.pattern, "up to 40 of a-z, 0-9 and -, a letter first")
    add("--name", required=True, type=named, help="name of the workload")
    add("--type", required=True, help="accelerator type, such as v6e-64")
    add("--cluster", "--xpk", required=True, help="GKE cluster that xpk has set up")
    image.add_argument("--base-image", help="image of the dependencies; xpk adds the code")
    image.add_argument("--image", help="image of the dependencies and the code")
    add("--workdir", required=True, help="run folder, gs://BUCKET/RUN")
    add("--num-slices", type=int, metavar="N", default=1, help="number of slices (multislice)")
    add("--spot", action="store_true", help="Spot VMs, if the cluster provisions nodes itself")
    add("--max-restarts", type=int, metavar="N", default=100, help="restarts of all slices")
    add("--grace", type=flags.seconds, metavar="TIME", default="2m", help="time to save at a stop")
    add("--run", action="store_true", help="run the command, instead of printing it")
    for flag in ("--secret", "--service-account"):
        add(flag, type=not_in_xpk, help=argparse.SUPPRESS)
    return top


def not_in_xpk(value: str) -> str:
    raise argparse.ArgumentTypeError("xpk has no such flag: see GKE in docs/distributed.md")


def copied(root: pathlib.Path) -> list[str]:
    """List what xpk adds to an image though git does not track it: all but .dockerignore."""
    lines = (root / ".dockerignore").read_text().splitlines()
    excluded = [f"-x{line if line.startswith('**/') else f'/{line}'}" for line in lines]
    return (bundle.git(root, "ls-files", "-z", "--others", *excluded) or b"").decode().split("\0")


def check_code(config: str, image: str | None) -> None:
    """Raise Stop if the container would lack the config or this folder's edits, or have a key."""
    name = config.partition(":")[0]
    file = name.removeprefix("./") if name.startswith("./") else f"configs/{name}.py"
    others = [] if image else copied(ROOT)
    if file not in [*bundle.files(ROOT), *others]:
        raise Stop(Exit.BAD_INPUT, f"config {file}: images may lack what git or docker ignores")
    if keys := [name for name in others if bundle.holds_key(ROOT, name)]:
        raise Stop(Exit.BAD_INPUT, f"xpk would copy keys, so move them: {', '.join(keys)}")
    code = bundle.describe(ROOT)
    if image and code.endswith("+changes"):
        raise Stop(Exit.BAD_INPUT, f"{image} may lack your edits: commit them, or use --base-image")
    if image:
        print(f"gke: {image} must have been built from this code, {code}", file=sys.stderr)


def command(args: argparse.Namespace, overrides: list[str]) -> str:
    """Return what every host runs, for a shell. Raises Stop for what the slice cannot train."""
    config, slice_ = preflight.check_name(ROOT, args.config), accelerators.parse(args.type)
    if not slice_.gke:
        raise Stop(Exit.REFUSED, f"type {slice_.type} is not supported on GKE")
    if args.num_slices < 1:
        raise Stop(Exit.USAGE, f"--num-slices {args.num_slices} must be at least 1")
    check_code(config, args.image)
    preflight.check_workdir(args.workdir, slice_.hosts, kept=False, mounted=False)
    devices = slice_.devices * args.num_slices
    resolved = preflight.resolve(ROOT, preflight.show_arguments(config, overrides, devices))
    downloads = preflight.check_data(resolved, local=False) if resolved else []
    train = ["vit-scale", "train", "--config", config, "--workdir", args.workdir, *overrides]
    return " && ".join([*downloads, shlex.join(train)])


def xpk(args: argparse.Namespace, overrides: list[str], more: list[str]) -> list[str]:
    """Return xpk's command line; the exit codes that restart are xpk's default."""
    words = ["xpk", "workload", "create", "--cluster", args.cluster, "--workload", args.name]
    words += ["--tpu-type", accelerators.parse(args.type).type]
    words += ["--num-slices", str(args.num_slices), "--max-restarts", str(args.max_restarts)]
    words += ["--termination-grace-period-seconds", str(int(args.grace) + 30)]
    words += ["--spot"] * args.spot
    local = ["--base-docker-image", args.base_image, "--script-dir", str(ROOT)]
    words += ["--docker-image", args.image] if args.image else local
    return [*words, *more, "--command", command(args, overrides)]


def main(argv: list[str] | None = None) -> int:
    try:
        flag_words, overrides, more = flags.split(sys.argv[1:] if argv is None else argv)
        args = parser().parse_args(flag_words)
        words = xpk(args, overrides, more)
        if args.run:
            return subprocess.run(words).returncode
        print(shlex.join(words))
    except FileNotFoundError:
        print("gke: xpk is not installed: pip install xpk", file=sys.stderr)
        return Exit.SETUP_FAILED
    except Stop as stop:
        print(f"gke: {stop}", file=sys.stderr)
        return stop.code
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
