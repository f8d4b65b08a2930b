"""Check what a run needs on this machine and in the cloud, and say how to fix what is missing."""

import argparse
import pathlib
import re
import sys

from launch.tpu import accelerators, flags, gcloud
from launch.tpu.exit_codes import Exit
from launch.tpu.plan import ROOT


def doctor(args: argparse.Namespace) -> int:
    """Print each requirement as ok or FAIL, with its remedy."""
    values, code = flags.Values(args, ROOT), Exit.DONE

    def report(good: bool, what: str, remedy: str = "") -> bool:
        nonlocal code
        suffix = f": {remedy}" if remedy and not good else ""
        print(f"{'ok  ' if good else 'FAIL'} {what}{suffix}")
        code = code if good else Exit.NOT_PERMITTED
        return good

    report(True, f"Python {sys.version.split()[0]}")
    git = gcloud.run(["git", "--version"]).code == 0
    report(git, "git", "install it, else every file here is sent to the workers")
    version = gcloud.run(["gcloud", "--version"], timeout=60)
    if not report(version.code == 0, "gcloud", "install it: https://cloud.google.com/sdk"):
        return code
    active = ["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]
    account = gcloud.run(active, timeout=60).out.decode().strip()
    report(bool(account), f"account {account or 'none'}", "run: gcloud auth login")
    project = values.get_or_gcloud("project", "project")
    report(bool(project), f"project {project or 'none'}", "run: gcloud config set project PROJECT")
    zones = [zone for zone in values.get_or_gcloud("zone", "compute/zone").split(",") if zone]
    report(bool(zones), f"zone {', '.join(zones) or 'none'}", "pass --zone")
    for zone in zones:
        _check_zone(report, zone, project, values.get("type"))
    key = pathlib.Path.home() / ".ssh" / "google_compute_engine"
    report(key.exists(), f"ssh key {key}", "run: gcloud compute config-ssh")
    agent = gcloud.run(["ssh-add", "-l"], timeout=20)
    if agent.code == 0 and key.exists():  # gcloud refuses to copy if the agent lacks this key
        listed = "google_compute_engine" in agent.out.decode(errors="replace")
        report(listed, "ssh agent holds the key", f"run: ssh-add {key}")
    vit = ROOT / ".venv" / "bin" / "vit-scale"
    report(vit.exists(), "configs can be checked here", "run: launch/environment.sh")
    return code


def _check_zone(report, zone: str, project: str, kind: str) -> None:
    # Without tpu-vm it would ask API v1, of the former TPU nodes.
    location = gcloud.Tpu("", zone, project).location
    argv = [*gcloud.TPUS, "tpu-vm", "accelerator-types", "list", *location, "--format=value(type)"]
    result = gcloud.run(argv, timeout=60)
    if result.code:
        error = gcloud.error(result.err)
        report(False, f"zone {zone}: {error}", gcloud.REMEDIES.get(error.kind, ""))
        return
    offered = re.findall(r"[a-z0-9]+-[0-9]+", result.out.decode())
    wanted = accelerators.parse(kind).type if kind else ""
    good = not wanted or wanted in offered
    remedy = f"it has {', '.join(offered[:12])}"
    report(good, f"zone {zone} offers {wanted or len(offered)}", remedy)
