"""Command-line flags, and settings from flags, environment, launch/tpu.env or gcloud, in order."""

import argparse
import difflib
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NoReturn

from launch.tpu import gcloud
from launch.tpu.exit_codes import USAGE, Stop

VERBS = {
    "run": "train (the default verb); rerun the same command to resume",
    "status": "show a run's machine, workers, steps and cost",
    "logs": "print the workers' logs (-f: follow)",
    "stop": "save a checkpoint, stop, and delete the machine (--keep: keep it)",
    "delete": "delete a run's machine, whatever is running on it",
    "list": "list every machine that the launcher created in --zones",
    "gc": "delete forgotten machines: expired, preempted, suspended, failed",
    "ssh": "open a shell on a worker, or run -- COMMAND on all",
    "doctor": "check gcloud, account, project, zone and SSH keys",
}
SETTINGS = {  # flag: variable in the environment and in launch/tpu.env
    "name": "TPU_NAME",
    "type": "TPU_TYPE",
    "zone": "ZONE",
    "project": "PROJECT",
    "bucket": "BUCKET",
    "service_account": "SERVICE_ACCOUNT",
}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the misspelt flag and suggest the right one."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        options = self._option_string_actions
        for word in args or []:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in options:
                close = difflib.get_close_matches(name, options, n=1)
                self.error(
                    f"unrecognized arguments: {name}" + f" (did you mean {close[0]}?)" * bool(close)
                )
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise Stop(USAGE, f"{message}; see launch/tpu_vm.sh --help")


def seconds(text: str) -> float:
    """Parse 30s, 10m, 6h, 2d or a plain number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 30s, 10m or 6h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}[match[2]]


def duration(text: str) -> str:
    """Check that `text` is a duration, and return it."""
    seconds(text)
    return text


def machine_policy(text: str) -> str:
    """Check that `text` is delete, keep or keep:DURATION, and return it."""
    if text not in ("delete", "keep"):
        word, _, rest = text.partition(":")
        if word != "keep":
            raise argparse.ArgumentTypeError(f"{text!r} is not delete, keep or keep:DURATION")
        seconds(rest)
    return text


def parser() -> Parser:
    verbs = "\n".join(f"  {verb:8} {text}" for verb, text in VERBS.items())
    top = Parser(
        prog="launch/tpu_vm.sh",
        usage="launch/tpu_vm.sh [VERB] --config NAME --name NAME --type TYPE --zone ZONE [FLAG...]",
        description="Train on a Cloud TPU slice: create it, watch the run, recover, delete it."
        f"\n\n{verbs}",
        epilog="--config.FIELD=VALUE overrides a field of the config. Defaults come from the "
        f"environment and launch/tpu.env: {', '.join(SETTINGS.values())}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("verb", nargs="?", default="run", choices=VERBS, metavar="VERB")
    _add_run_flags(top)
    _add_machine_flags(top)
    _add_policy_flags(top)
    _add_verb_flags(top)
    return top


def _add_run_flags(top: Parser) -> None:
    add = top.add_argument_group("run").add_argument
    add("--config", help="a config of configs/, NAME:ARGUMENT, or a path in this repository")
    add("--name", help="name of the run and its machine (default: the config's name)")
    add("--workdir", help="run folder, gs://BUCKET/RUN (default: BUCKET/NAME)")
    add(
        "--workdir-is-mounted",
        action="store_true",
        help="the workdir is a mounted path that outlives the machine",
    )
    add("--bucket", help="gs://BUCKET[/FOLDER] of the default workdir")
    add("--setup", default="", help="command to run on each worker before training, such as mount")
    add(
        "--secret",
        action="append",
        default=[],
        metavar="NAME",
        help="environment variable to send to the workers, over stdin",
    )
    add(
        "--env-file",
        default="",
        metavar="FILE",
        help="file of NAME=VALUE lines to send (chmod 600)",
    )


def _add_machine_flags(top: Parser) -> None:
    add = top.add_argument_group("machine").add_argument
    add("--type", help="accelerator type, such as v4-32, v5e-16, v5p-64, v6e-8")
    add("--zone", "--zones", dest="zone", help="zone, or zones to try in order: a,b")
    add("--project", help="Google Cloud project (default: gcloud's)")
    add("--runtime", default="", help="TPU software version (default: by type)")
    model = top.add_mutually_exclusive_group()
    for name in ("spot", "reserved", "on-demand"):
        model.add_argument(f"--{name}", dest="model", action="store_const", const=name)
    add(
        "--no-queue",
        action="store_true",
        help="create the TPU VM directly, without a queued resource",
    )
    add(
        "--valid-until",
        type=duration,
        metavar="6h",
        help="give up if still queued after this time",
    )
    add("--num-slices", type=int, default=1, metavar="N", help="number of slices (multislice)")
    add(
        "--existing",
        action="store_true",
        help="use the existing TPU VM NAME; never create or delete it",
    )
    add("--target", default="auto", metavar="auto|vm|here|local:N", help="where to train")
    add("--devices", type=int, default=2, help="virtual devices per worker, with --target local:N")
    add(
        "--internal-ip",
        action="store_true",
        help="create and reach the VMs without external IP addresses",
    )
    add("--iap", action="store_true", help="SSH through Identity-Aware Proxy (gcloud alpha)")
    for name in ("network", "subnetwork", "service-account", "data-disk"):
        add(f"--{name}", default="", help=f"passed to gcloud as --{name}")


def _add_policy_flags(top: Parser) -> None:
    add = top.add_argument_group("limits and recovery").add_argument
    add(
        "--max-failures",
        type=int,
        default=3,
        help="give up after N failures in a row without progress",
    )
    add(
        "--max-restarts",
        type=int,
        default=100,
        help="limit of restarts after preemptions and lost machines",
    )
    add("--max-hours", type=float, default=0, help="limit of machine hours (0: none)")
    add("--max-cost", type=float, default=0, help="limit of cost in USD (0: none)")
    add("--price", type=float, help="USD per chip-hour (default: list price)")
    add(
        "--stall-timeout",
        type=seconds,
        default="10m",
        help="restart after this time without a heartbeat or a step",
    )
    add(
        "--first-step-timeout",
        type=seconds,
        default="45m",
        help="restart if there is no first step after this time",
    )
    add(
        "--grace",
        type=seconds,
        default="2m",
        help="time to save a checkpoint, from SIGTERM to SIGKILL",
    )
    add("--on-success", type=machine_policy, default="delete", metavar="delete|keep")
    add("--on-failure", type=machine_policy, default="keep:30m", metavar="delete|keep|keep:30m")
    add("--on-interrupt", default="", choices=["", "detach", "stop"], metavar="detach|stop")
    add(
        "--orphan",
        type=seconds,
        default="1h",
        help="worker 0 deletes a machine that is idle and unwatched this long (0: never)",
    )
    add("--detach", action="store_true", help="watch in the background; follow with `logs -f`")
    add("--dry-run", action="store_true", help="print every command without running any")
    add("--again", action="store_true", help="run again although the run is done")


def _add_verb_flags(top: Parser) -> None:
    add = top.add_argument_group("other verbs").add_argument
    add("--keep", action="store_true", help="stop: keep the machine")
    add("-f", "--follow", action="store_true", help="logs: follow")
    add("--worker", default="all", metavar="I|all", help="logs, ssh: this worker only")
    add("--attempt", type=int, help="logs: of this attempt (default: the latest)")
    add("--json", action="store_true", help="status, list: print one JSON object")
    add("--expired", action="store_true", help="gc: expired machines only")
    add("--yes", action="store_true", help="gc, delete: do not ask")
    add(
        "--owner",
        default="",
        metavar="NAME|all",
        help="list, gc, delete: machines of this user",
    )


def split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Split into flags, --config.FIELD=VALUE overrides, and what follows a plain `--`."""
    argv = list(argv)
    rest, after = argv, []
    if "--" in argv:
        at = argv.index("--")
        rest, after = argv[:at], argv[at + 1 :]
    flags, overrides, words = [], [], iter(rest)
    for word in words:
        if word.startswith("--config."):
            overrides.append(word if "=" in word else f"{word}={next(words, '')}")
        else:
            flags.append(word)
    return flags, overrides, after


class Values:
    """Settings and where each came from."""

    def __init__(self, args: argparse.Namespace, root: pathlib.Path):
        self.args = args
        self.sources: dict[str, str] = {}
        self.stored = read_env_file(root / "launch" / "tpu.env")

    def get(self, name: str, default: str = "", source: str = "default") -> str:
        variable = SETTINGS[name]
        for value, where in (
            (getattr(self.args, name), "flag"),
            (os.environ.get(variable), f"${variable}"),
            (self.stored.get(variable), "launch/tpu.env"),
            (default, source),
        ):
            if value:
                self.sources[name] = where
                return value
        return ""

    def get_or_gcloud(self, name: str, setting: str) -> str:
        """Like `get`, falling back to a setting of gcloud."""
        if value := self.get(name):
            return value
        if self.args.dry_run and self.args.verb != "doctor":
            return ""
        result = gcloud.run(["gcloud", "config", "get-value", setting, "--quiet"], timeout=60)
        value = result.out.decode().strip() if result.code == 0 else ""
        return self.get(name, "" if value == "(unset)" else value, "gcloud config")


def read_env_file(file: pathlib.Path) -> dict[str, str]:
    """Read NAME=VALUE lines; empty if there is no file."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines if not line.lstrip().startswith("#"))
    return {name.strip(): value.strip().strip("\"'") for name, equals, value in pairs if equals}
