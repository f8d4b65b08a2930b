"""The runs launched from this clone, by their folders in runs/tpu, and access to their workers."""

import argparse
import json
import pathlib

from launch.tpu import cloud_tpu, flags
from launch.tpu.clock import Clock
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.gcloud import Tpu
from launch.tpu.journal import Journal
from launch.tpu.plan import ROOT
from launch.tpu.transport import GcloudWorkers, LocalWorkers, Workers

FOLDER = ROOT / "runs" / "tpu"


class RegisteredRun:
    """A run launched from this clone. `args` name it; by default the latest."""

    REACHABLE = ("ready", "unhealthy", "recovering")  # statuses in which workers may answer

    def __init__(self, args: argparse.Namespace):
        self.args, self.clock = args, Clock()
        values = flags.Values(args, ROOT)
        name = values.get("name")
        requests = [path for path in FOLDER.glob("*/launch.json") if has_name(path, name)]
        if not requests:
            raise Stop(
                Exit.USAGE,
                f"no run{name and f' named {name}'} was launched from this clone: "
                "pass --name, or see `list`",
            )
        self.folder = max(requests, key=lambda path: path.stat().st_mtime).parent
        self.request = json.loads((self.folder / "launch.json").read_text())
        self.journal = Journal(self.folder, quiet=True)
        self.id, self.name = self.request["run"], self.request["name"]
        self.cloud: cloud_tpu.CloudTpu | None = None
        if self.request["tpu"]:
            # An earlier launcher's request may have other fields, of its creation.
            known = {k: v for k, v in self.request["tpu"].items() if k in Tpu.__dataclass_fields__}
            zone = args.zone or self.journal.state["zone"] or known["zone"]
            tpu = Tpu(**{**known, "zone": zone})
            owned = not self.request["existing"]
            self.cloud = cloud_tpu.CloudTpu(tpu, self.clock, self.journal, owned)

    def workers(self) -> Workers:
        """Return its workers. Raises Stop if there are none."""
        if self.cloud is None:
            homes = sorted(self.folder.glob("worker-*")) or [pathlib.Path.home()]
            return LocalWorkers(homes, "", 0, self.clock)
        status = self.status()
        if status.kind not in self.REACHABLE:
            raise Stop(Exit.REFUSED, f"{self.name} has no workers: {status.detail}")
        return GcloudWorkers(self.cloud.tpu, status.hosts, self.clock, lambda argv: None)

    def status(self) -> cloud_tpu.Status:
        """Return the machine's status. Raises Stop if another run has it by now."""
        assert self.cloud
        status = self.cloud.status()
        if self.cloud.owned and status.kind != "absent" and not self.cloud.is_ours(status.labels):
            raise Stop(
                Exit.USAGE,
                f"{self.name} no longer belongs to {self.id}: it {describe_owner(status.labels)}",
            )
        return status


def describe_owner(labels: dict) -> str:
    """Say who owns a machine with these labels, as the rest of a sentence."""
    if labels.get("managed-by") != "vit_scale":
        return "was not created by this launcher"
    return f"belongs to run {labels.get('run')} of {labels.get('owner')}"


def has_name(path: pathlib.Path, name: str) -> bool:
    try:
        return not name or json.loads(path.read_text())["name"] == name
    except (OSError, ValueError):
        return False
