"""What a run needs on this machine and in the cloud, and what to do where it is missing."""

import argparse
import pathlib
import re
import sys

from launch.tpu import accelerators, flags, gcloud
from launch.tpu.exit_codes import AUTH, DONE
from launch.tpu.gcloud import Tpu
from launch.tpu.plan import ROOT


def doctor(args: argparse.Namespace) -> int:
    """Each thing that a run needs, with what to do where it is missing."""
    values, code = flags.Values(args, ROOT), DONE

    def say(good: bool, what: str, remedy: str = "") -> bool:
        nonlocal code
        print(
            f"{'ok  ' if good else 'FAIL'} {what}" + (f": {remedy}" if remedy and not good else "")
        )
        code = code if good else AUTH
        return good

    say(True, f"Python {sys.version.split()[0]}")
    say(gcloud.run(["git", "--version"]).code == 0, "git", "install it, or everything is shipped")
    found = gcloud.run(["gcloud", "--version"], timeout=60)
    if not say(found.code == 0, "gcloud", "install it: https://cloud.google.com/sdk"):
        return code
    active = ["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]
    account = gcloud.run(active, timeout=60).out.decode().strip()
    say(bool(account), f"account {account or 'none'}", "run: gcloud auth login")
    project = values.get_or_gcloud("project", "project")
    say(bool(project), f"project {project or 'none'}", "run: gcloud config set project PROJECT")
    zones = [zone for zone in values.get_or_gcloud("zone", "compute/zone").split(",") if zone]
    say(bool(zones), f"zone {', '.join(zones) or 'none'}", "give --zone")
    for zone in zones:
        _offers(say, zone, project, values.get("type"))
    key = pathlib.Path.home() / ".ssh" / "google_compute_engine"
    say(key.exists(), f"ssh key {key}", "the first ssh makes it: gcloud compute config-ssh")
    agent = gcloud.run(["ssh-add", "-l"], timeout=20)
    if agent.code == 0 and key.exists():  # an agent without this key makes gcloud refuse to copy
        listed = "google_compute_engine" in agent.out.decode(errors="replace")
        say(listed, "ssh agent holds the key", f"run: ssh-add {key}")
    vit = ROOT / ".venv" / "bin" / "vit-scale"
    say(vit.exists(), "configs are checked here", "launch/environment.sh makes .venv")
    return code


def _offers(say, zone: str, project: str, kind: str) -> None:
    where = Tpu("", zone, project, "", "").where
    argv = [
        "gcloud",
        "compute",
        "tpus",
        "accelerator-types",
        "list",
        *where,
        "--format=value(type)",
    ]
    result = gcloud.run(argv, timeout=60)
    if result.code:
        error = gcloud.error(result.err)
        say(False, f"zone {zone}: {error}", gcloud.REMEDIES.get(error.kind, ""))
        return
    offered = re.findall(r"[a-z0-9]+-[0-9]+", result.out.decode())
    wanted = accelerators.parse(kind).type if kind else ""
    good = not wanted or wanted in offered
    say(good, f"zone {zone} offers {wanted or len(offered)}", f"it has {', '.join(offered[:12])}")
