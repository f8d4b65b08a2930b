"""Command-line flags, and settings from flags, environment, launch/tpu.env or gcloud, in order."""

import argparse
import difflib
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from launch.tpu import gcloud, secret
from launch.tpu.exit_codes import Exit, Stop

VERBS = {
    "run": "train (the default verb); rerun the same command to resume",
    "status": "show a run's machine, workers, steps and cost",
    "logs": "print the workers' logs (-f: follow)",
    "stop": "save a checkpoint, stop, and delete the machine (--keep: keep it)",
    "delete": "delete a run's machine, whatever is running on it",
    "list": "list every machine that the launcher created in --zones",
    "gc": "delete forgotten machines: expired, preempted, suspended, failed",
    "ssh": "open a shell on a worker, or run -- COMMAND on all",
    "profile": "trace the next ten steps on every worker, for xprof",
    "doctor": "check gcloud, account, project, zone and SSH keys",
}
PROVISIONING = {
    "spot": "Spot VMs: cheaper, preempted at any time",
    "best-effort": "the best-effort tier of the queue (gcloud alpha)",
    "reserved": "capacity from a reservation",
    "on-demand": "on-demand capacity (default)",
}
PASSED = ("network", "subnetwork", "data-disk", "metadata", "tags", "boot-disk")  # to gcloud
DURATION = r"(\d+(?:\.\d+)?)([smhd]?)"
SETTINGS = {"name": "TPU_NAME", "type": "TPU_TYPE"}  # variables, also in launch/tpu.env
SETTINGS |= {name: name.upper() for name in ("zone", "project", "bucket", "service_account")}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = not action.default or action.nargs == 0 or "default" in text
        return text if shown else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the misspelt flag and suggest the right one."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        options = self._option_string_actions
        for word in args or []:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in options:
                close = difflib.get_close_matches(name, options, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                self.error(f"unrecognized arguments: {name}{hint}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise Stop(Exit.USAGE, f"{message}; see {self.prog} --help")


def seconds(text: str) -> float:
    """Parse 30s, 10m, 6h, 2d or a plain number of seconds."""
    match = re.fullmatch(DURATION, text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 30s, 10m or 6h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}[match[2]]


def matching(pattern: str, what: str) -> Callable[[str], str]:
    """Return a type of flags whose values match `pattern`."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return text

    return check


NUMBER: dict[str, Any] = {"type": int, "metavar": "N"}
USD: dict[str, Any] = {"type": float, "metavar": "USD"}
TIME: dict[str, Any] = {"type": seconds, "metavar": "TIME"}
POLICIES = "delete|keep|keep:TIME"
POLICY: dict[str, Any] = {"metavar": POLICIES}
POLICY["type"] = matching(f"delete|keep(:{DURATION})?", POLICIES)
WORKER: dict[str, Any] = {"type": matching(r"all|\d+", "all or a number"), "metavar": "I|all"}
OTHER = "--(?!(labels|zone|project|async|quiet|node-id|node-count|node-prefix)(=|$))[a-z].*"
UNSET = "--NAME or --NAME=VALUE of a flag that the launcher does not set itself"
GCLOUD: dict[str, Any] = {"type": matching(OTHER, UNSET), "default": []}


def parser() -> Parser:
    verbs = "\n".join(f"  {verb:8} {text}" for verb, text in VERBS.items())
    top = Parser(
        prog="launch/tpu_vm.sh",
        usage="launch/tpu_vm.sh [VERB] --config NAME --name NAME --type TYPE --zone ZONE [FLAG...]",
        description="Train on a Cloud TPU slice: create it, watch the run, recover, delete it."
        "\nIts API (TPU VMs, queued resources) is in maintenance mode, by Google's documentation: "
        f"TPU7x and later, and flex-start, are on GKE: launch/gke.py.\n\n{verbs}",
        epilog="--config.FIELD=VALUE overrides a field of the config. Defaults come from the "
        f"environment and launch/tpu.env: {', '.join(SETTINGS.values())}.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("verb", nargs="?", default="run", choices=VERBS, metavar="VERB")
    _add_run_flags(top.add_argument_group("run").add_argument)
    _add_machine_flags(top.add_argument_group("machine"))
    _add_policy_flags(top.add_argument_group("limits and recovery").add_argument)
    _add_verb_flags(top.add_argument_group("other verbs").add_argument)
    return top


def _add_run_flags(add: Callable) -> None:
    add("--config", help="a config of configs/, NAME:ARGUMENT, or a path in this repository")
    add("--name", help="name of the run and its machine (default: the config's name)")
    add("--workdir", help="run folder, gs://BUCKET/RUN (default: BUCKET/NAME)")
    add("--workdir-is-mounted", action="store_true", help="the workdir outlives the machine")
    add("--bucket", help="gs://BUCKET[/FOLDER] of the default workdir")
    add("--setup", default="", help="command that each worker runs before training, such as mount")
    add("--secret", action="append", default=[], metavar="NAME", help="variable to send, by stdin")
    add("--env-file", default="", metavar="FILE", help="NAME=VALUE lines to send (chmod 600)")


def _add_machine_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--type", help="accelerator type, such as v4-32, v5e-16, v5p-64, v6e-8")
    add("--zone", "--zones", dest="zone", help="zone, or zones to try in order: a,b")
    add("--project", help="Google Cloud project (default: gcloud's)")
    add("--runtime", default="", help="TPU software version (default: by type)")
    model = group.add_mutually_exclusive_group()
    for name, text in PROVISIONING.items():
        model.add_argument(f"--{name}", dest="model", action="store_const", const=name, help=text)
    add("--no-queue", action="store_true", help="create the VM without a queued resource")
    add("--valid-until", **TIME, help="give up if still queued after this")
    add("--num-slices", **NUMBER, default=1, help="slices of this type (multislice)")
    add("--existing", action="store_true", help="use TPU VM NAME; never create or delete it")
    targets = "auto|vm|here|local:N"
    add("--target", default="auto", metavar=targets, help="TPU VM, this host, or N processes on it")
    add("--devices", **NUMBER, default=2, help="virtual devices per process of local:N")
    add("--internal-ip", action="store_true", help="no external IPs: downloads need Cloud NAT")
    add("--iap", action="store_true", help="SSH through Identity-Aware Proxy (gcloud alpha)")
    add("--service-account", default="", help="account of the workers, with cloud-platform scope")
    for name in PASSED:
        add(f"--{name}", default="", help=f"passed to gcloud as --{name}")
    other = "another flag of gcloud's create: --gcloud-flag=--NAME=VALUE"
    add("--gcloud-flag", action="append", **GCLOUD, metavar="FLAG", help=other)


def _add_policy_flags(add: Callable) -> None:
    add("--max-failures", **NUMBER, default=3, help="limit of failures in a row without progress")
    add("--max-restarts", **NUMBER, default=100, help="limit of restarts after preemptions")
    add("--max-hours", type=float, metavar="H", default=0, help="limit of machine hours (0: none)")
    add("--max-cost", **USD, default=0, help="limit of cost (0: none)")
    add("--price", **USD, help="price of a chip-hour (default: list price)")
    add("--stall-timeout", **TIME, default="10m", help="restart without a heartbeat or step")
    add("--first-step-timeout", **TIME, default="45m", help="restart without a first step")
    add("--grace", **TIME, default="2m", help="time to save, from SIGTERM to SIGKILL")
    add("--on-success", **POLICY, default="delete", help="the machine after success")
    add("--on-failure", **POLICY, default="keep:30m", help="the machine after a failure")
    interrupts: dict[str, Any] = {"choices": ["", "detach", "stop"], "metavar": "detach|stop"}
    add("--on-interrupt", **interrupts, default="", help="on Ctrl-C (default: detach if training)")
    add("--orphan", **TIME, default="1h", help="worker 0 deletes an idle machine (0: never)")
    add("--detach", action="store_true", help="watch in the background; follow with `logs -f`")
    add("--dry-run", action="store_true", help="print every command without running any")
    add("--fresh", action="store_true", help="train in a folder of this config's own, WORKDIR-HASH")
    add("--again", action="store_true", help="run again although the run is done")


def _add_verb_flags(add: Callable) -> None:
    add("--keep", action="store_true", help="stop: keep the machine")
    add("-f", "--follow", action="store_true", help="logs: follow")
    add("--worker", **WORKER, default="all", help="logs, ssh: this worker only")
    add("-L", action="append", default=[], metavar="PORT:HOST:PORT", help="ssh: forward a port")
    add("--attempt", **NUMBER, help="logs: of this attempt (default: the latest)")
    add("--json", action="store_true", help="status, list: print one JSON object")
    add("--expired", action="store_true", help="gc: expired machines only")
    add("--yes", action="store_true", help="gc, delete: do not ask")
    add("--owner", default="", metavar="NAME|all", help="list, gc, delete: this user's machines")


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
        file = root / "launch" / "tpu.env"
        self.stored = secret.parse_env(file.read_text()) if file.exists() else {}

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
