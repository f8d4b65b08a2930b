"""The runs that this machine has notes of, in runs/tpu, and the way to their workers."""

import argparse
import json
import pathlib

from launch.tpu import cloud_tpu, flags
from launch.tpu.clock import Clock
from launch.tpu.exit_codes import REFUSED, USAGE, Stop
from launch.tpu.gcloud import Tpu
from launch.tpu.journal import Journal
from launch.tpu.plan import ROOT
from launch.tpu.transport import GcloudWorkers, LocalWorkers, Workers

FOLDER = ROOT / "runs" / "tpu"


class RegisteredRun:
    """A run that this machine has notes of, and the way to its workers."""

    ANSWERING = ("ready", "unhealthy", "recovering")  # looks at a machine whose workers may answer

    def __init__(self, args: argparse.Namespace):
        self.args, self.clock = args, Clock()
        values = flags.Values(args, ROOT)
        name = values.get("name")
        found = [path for path in FOLDER.glob("*/launch.json") if has_name(path, name)]
        if not found:
            raise Stop(
                USAGE,
                f"no run {name or ''} is known here: give its --name, or see `list`".replace(
                    "  ", " "
                ),
            )
        self.folder = max(found, key=lambda path: path.stat().st_mtime).parent
        self.request = json.loads((self.folder / "launch.json").read_text())
        self.journal = Journal(self.folder, quiet=True)
        self.id, self.name = self.request["run"], self.request["name"]
        self.cloud: cloud_tpu.CloudTpu | None = None
        if self.request["tpu"]:
            tpu = Tpu(**self.request["tpu"])
            zone = args.zone or self.journal.state["zone"] or tpu.zone
            tpu = Tpu(**{**vars(tpu), "zone": zone})
            self.cloud = cloud_tpu.CloudTpu(
                tpu, self.clock, self.journal, not self.request["existing"]
            )

    def workers(self) -> Workers:
        """Raises Stop where there are none."""
        if self.cloud is None:
            homes = sorted(self.folder.glob("worker-*")) or [pathlib.Path.home()]
            return LocalWorkers(homes, "", 0, self.clock)
        status = self.status()
        if status.kind not in self.ANSWERING:
            raise Stop(REFUSED, f"{self.name} has no workers: {status.detail}")
        return GcloudWorkers(self.cloud.tpu, status.hosts, self.clock, lambda argv: None)

    def status(self) -> cloud_tpu.Status:
        """How the machine is. Raises Stop where another run has it by now."""
        assert self.cloud
        status = self.cloud.status()
        if self.cloud.owned and status.kind != "absent" and not self.cloud.is_ours(status.labels):
            raise Stop(
                USAGE, f"{self.name} is not of {self.id} any more: {describe_owner(status.labels)}"
            )
        return status


def describe_owner(labels: dict) -> str:
    """Who has the machine with these labels."""
    if labels.get("managed-by") != "vit_scale":
        return "this program has not made it"
    return f"it is of run {labels.get('run')}, of {labels.get('owner')}"


def has_name(path: pathlib.Path, name: str) -> bool:
    try:
        return not name or json.loads(path.read_text())["name"] == name
    except (OSError, ValueError):
        return False
