"""The flags, and where a value comes from: flag, environment, launch/tpu.env, gcloud's settings."""

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
    "run": "train (the verb if none is given); the same command again takes the run up",
    "status": "how a run is: machine, workers, steps, money",
    "logs": "what the workers print (-f follows)",
    "stop": "save a checkpoint and stop; then delete the machine, or --keep it",
    "delete": "delete a run's machine, whatever it does",
    "list": "every machine that this program made, in --zones",
    "gc": "delete those that are forgotten: expired, preempted, suspended, failed",
    "ssh": "a shell on a worker; with -- COMMAND, run it on all",
    "doctor": "check what a run needs: gcloud, account, project, zone, keys",
}
SETTINGS = {  # name of the environment's and the file's variable
    "name": "TPU_NAME",
    "type": "TPU_TYPE",
    "zone": "ZONE",
    "project": "PROJECT",
    "bucket": "BUCKET",
    "service_account": "SERVICE_ACCOUNT",
}


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one line, which name a misspelt flag and not what follows it."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        known = self._option_string_actions
        for word in args or []:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                self.error(
                    f"unrecognized arguments: {name}" + f" (did you mean {close[0]}?)" * bool(close)
                )
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise Stop(USAGE, f"{message}; see launch/tpu_vm.sh --help")


def seconds(text: str) -> float:
    """30s, 10m, 6h, 2d, or a plain number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 30s, 10m, 6h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}[match[2]]


def duration(text: str) -> str:
    """As it was given, if it is one."""
    seconds(text)
    return text


def ending(text: str) -> str:
    """delete, keep, or keep:DURATION."""
    if text not in ("delete", "keep"):
        word, _, rest = text.partition(":")
        if word != "keep":
            raise argparse.ArgumentTypeError(f"{text!r} is none of delete, keep, keep:30m")
        seconds(rest)
    return text


def parser() -> Parser:
    verbs = "\n".join(f"  {verb:8} {text}" for verb, text in VERBS.items())
    top = Parser(
        prog="launch/tpu_vm.sh",
        usage="launch/tpu_vm.sh [VERB] --config NAME --name NAME --type TYPE --zone ZONE [FLAG...]",
        description=f"Trains on a TPU slice.\n\n{verbs}",
        epilog="--config.FIELD=VALUE overrides a field of the config. NAME, TYPE, ZONE, PROJECT "
        "and BUCKET also come from TPU_NAME, TPU_TYPE, ... or from launch/tpu.env.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("verb", nargs="?", default="run", choices=VERBS, metavar="VERB")
    _add_what(top)
    _add_machine(top)
    _add_policy(top)
    _add_verbs(top)
    return top


def _add_what(top: Parser) -> None:
    add = top.add_argument_group("what").add_argument
    add("--config", help="a config's name, NAME:ARGUMENT, or a path in this tree")
    add("--name", help="of the machine and the run; the config's name if not given")
    add("--workdir", help="the run's folder, gs://BUCKET/RUN; BUCKET/NAME if not given")
    add("--workdir-is-mounted", action="store_true", help="it is a path that outlives the machine")
    add("--bucket", help="gs://BUCKET[/FOLDER]: where workdirs are")
    add(
        "--setup", default="", help="a command to run on each worker before training, such as mount"
    )
    add(
        "--secret", action="append", default=[], metavar="NAME", help="send this variable, by stdin"
    )
    add("--env-file", default="", metavar="FILE", help="NAME=VALUE lines to send (chmod 600)")


def _add_machine(top: Parser) -> None:
    add = top.add_argument_group("machine").add_argument
    add("--type", help="accelerator type, such as v4-32, v5e-16, v5p-64, v6e-8")
    add("--zone", "--zones", dest="zone", help="zone, or zones to try in this order: a,b")
    add("--project", help="gcloud's own if not given")
    add("--runtime", default="", help="software version (default: the one of the type)")
    model = top.add_mutually_exclusive_group()
    for name in ("spot", "reserved", "on-demand"):
        model.add_argument(f"--{name}", dest="model", action="store_const", const=name)
    add("--no-queue", action="store_true", help="make the node at once; no queued resource")
    add(
        "--valid-until",
        type=duration,
        metavar="6h",
        help="how long the request may wait in the queue",
    )
    add("--num-slices", type=int, default=1, metavar="N", help="slices of that type (multislice)")
    add("--existing", action="store_true", help="use the TPU VM NAME: never create, never delete")
    add("--target", default="auto", metavar="auto|vm|here|local:N", help="where to train")
    add("--devices", type=int, default=2, help="with local:N: virtual devices of each worker")
    add("--internal-ip", action="store_true", help="no external addresses")
    add("--iap", action="store_true", help="ssh through Identity-Aware Proxy (gcloud alpha)")
    for name in ("network", "subnetwork", "service-account", "data-disk"):
        add(f"--{name}", default="", help="as gcloud's flag")


def _add_policy(top: Parser) -> None:
    add = top.add_argument_group("how it goes on").add_argument
    add("--max-failures", type=int, default=3, help="failures in a row without progress")
    add("--max-restarts", type=int, default=100, help="restarts for preemptions and lost machines")
    add("--max-hours", type=float, default=0, help="of a machine; 0: no limit")
    add("--max-cost", type=float, default=0, help="USD, by the price table; 0: no limit")
    add("--price", type=float, help="USD a chip and hour, instead of the table's")
    add("--stall-timeout", type=seconds, default="10m", help="without a heartbeat or a step")
    add("--first-step-timeout", type=seconds, default="45m", help="from the start to a first step")
    add("--grace", type=seconds, default="2m", help="from SIGTERM to SIGKILL")
    add("--on-success", type=ending, default="delete", metavar="delete|keep")
    add("--on-failure", type=ending, default="keep:30m", metavar="delete|keep|keep:30m")
    add("--on-interrupt", default="", choices=["", "detach", "stop"], metavar="detach|stop")
    add("--orphan", type=seconds, default="1h", help="ended and unwatched, worker 0 deletes it")
    add("--detach", action="store_true", help="watch in the background; `logs -f` shows it")
    add("--dry-run", action="store_true", help="print every command, and run none")
    add("--again", action="store_true", help="run what has finished once more")


def _add_verbs(top: Parser) -> None:
    add = top.add_argument_group("of other verbs").add_argument
    add("--keep", action="store_true", help="stop: keep the machine")
    add("-f", "--follow", action="store_true", help="logs: go on as they grow")
    add("--worker", default="all", metavar="I|all", help="logs, ssh: of this worker")
    add("--attempt", type=int, help="logs: of this attempt (default: the last)")
    add("--json", action="store_true", help="status, list: one JSON object")
    add("--expired", action="store_true", help="gc: only what has expired")
    add("--yes", action="store_true", help="gc, delete: don't ask")
    add(
        "--owner",
        default="",
        metavar="NAME|all",
        help="list, gc, delete: whose machines",
    )


def split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The flags; apart from them each --config.FIELD=VALUE; and what follows a plain `--`."""
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
    """Values with their sources, as they are printed."""

    def __init__(self, args: argparse.Namespace, root: pathlib.Path):
        self.args = args
        self.sources: dict[str, str] = {}
        self.stored = read(root / "launch" / "tpu.env")

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
        """As `get`, and last what gcloud is set to."""
        if value := self.get(name):
            return value
        if self.args.dry_run and self.args.verb != "doctor":
            return ""
        result = gcloud.run(["gcloud", "config", "get-value", setting, "--quiet"], timeout=60)
        value = result.out.decode().strip() if result.code == 0 else ""
        return self.get(name, "" if value == "(unset)" else value, "gcloud config")


def read(file: pathlib.Path) -> dict[str, str]:
    """NAME=VALUE lines; nothing where there is no file."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines if not line.lstrip().startswith("#"))
    return {name.strip(): value.strip().strip("\"'") for name, equals, value in pairs if equals}
