#!/usr/bin/env python3
"""Print a GKE JobSet that trains a config, for kubectl; or with --xpk, the equivalent xpk command.

    launch/gke.py --config vit_base_imagenet --name vit --type v5e-256 --image IMAGE \\
        --workdir gs://BUCKET/vit --secret wandb --spot | kubectl apply -f -

IMAGE must have vit_scale installed with its extra tpu. Exit codes of resumable runs (42) and lost
machines (127 and above) restart all slices, at most --max-restarts times; others fail the JobSet.
"""

import argparse
import json
import pathlib
import shlex
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from launch.tpu import accelerators, flags, preflight
from launch.tpu.accelerators import Accelerator
from launch.tpu.exit_codes import RESTARTABLE, Exit, Stop
from launch.tpu.plan import NAME, ROOT


def parser() -> argparse.ArgumentParser:
    top = flags.Parser(prog="launch/gke.py", description=__doc__.partition("\n")[0])
    add = top.add_argument
    add("--config", required=True, help="a config of configs/, NAME:ARGUMENT, or a path below here")
    add("--name", required=True, help="name of the JobSet")
    add("--type", required=True, help="accelerator type, such as v5e-256")
    add("--image", required=True, help="container image with vit_scale and its extra tpu")
    add("--workdir", required=True, help="run folder, gs://BUCKET/RUN")
    add("--num-slices", type=int, metavar="N", default=1, help="number of slices (multislice)")
    add("--spot", action="store_true", help="Spot VMs")
    add("--secret", default="", help="Kubernetes Secret whose keys become environment variables")
    add("--service-account", default="", help="Kubernetes service account that reads the bucket")
    add("--max-restarts", type=int, metavar="N", default=100, help="restarts of all slices")
    add("--grace", type=flags.seconds, metavar="TIME", default="2m", help="time to save at a stop")
    add("--xpk", metavar="CLUSTER", help="print the xpk command for CLUSTER instead")
    return top


def render(args: argparse.Namespace, train: list[str]) -> dict:
    """Render the JobSet: one job per slice, one pod per host with all of the host's chips."""
    slice_ = accelerators.parse(args.type)
    if not slice_.gke or not slice_.topology:
        raise Stop(
            Exit.REFUSED,
            f"type {slice_.type} is not supported on GKE: no GKE name or topology is known",
        )
    final = {"containerName": "train", "operator": "NotIn", "values": [*RESTARTABLE]}
    job = {
        "parallelism": slice_.hosts,
        "completions": slice_.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": final}]},
        "template": {"spec": pod(args, train, slice_)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": args.name,
            "labels": {"managed-by": "vit_scale"},
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": args.max_restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": args.num_slices, "template": {"spec": job}}
            ],
        },
    }


def pod(args: argparse.Namespace, train: list[str], slice_: Accelerator) -> dict:
    selector = {
        "cloud.google.com/gke-tpu-accelerator": slice_.gke,
        "cloud.google.com/gke-tpu-topology": slice_.topology,
    }
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    chips = {"google.com/tpu": slice_.chips // slice_.hosts}
    container = {
        "name": "train",
        "image": args.image,
        "command": ["vit-scale", *train],
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"requests": chips, "limits": chips},
        "volumeMounts": [{"name": "dshm", "mountPath": "/dev/shm"}],
    }
    if args.secret:
        container["envFrom"] = [{"secretRef": {"name": args.secret}}]
    spec = {
        "restartPolicy": "Never",  # required by podFailurePolicy
        "terminationGracePeriodSeconds": int(args.grace) + 30,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": selector,
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": [{"name": "dshm", "emptyDir": {"medium": "Memory"}}],
    }
    if args.service_account:
        spec["serviceAccountName"] = args.service_account
    return spec


def xpk(args: argparse.Namespace, train: list[str]) -> str:
    """Return the xpk command, whose default restart policy uses the same exit codes."""
    words = ["xpk", "workload", "create", "--cluster", args.xpk, "--workload", args.name]
    words += ["--tpu-type", accelerators.parse(args.type).type]
    words += ["--num-slices", str(args.num_slices)]
    words += ["--docker-image", args.image, "--max-restarts", str(args.max_restarts)]
    words += ["--termination-grace-period-seconds", str(int(args.grace) + 30)]
    words += ["--spot"] * args.spot
    return shlex.join([*words, "--command", shlex.join(["vit-scale", *train])])


def main(argv: list[str] | None = None) -> int:
    try:
        words, overrides, _ = flags.split(sys.argv[1:] if argv is None else argv)
        args = parser().parse_args(words)
        if args.xpk and (args.secret or args.service_account):
            flag = "--secret" if args.secret else "--service-account"
            raise Stop(Exit.USAGE, f"xpk does not support {flag}: remove it, or print the JobSet")
        if not NAME.fullmatch(args.name):
            raise Stop(
                Exit.REFUSED, f"--name {args.name!r}: up to 40 of a-z, 0-9, -; a letter first"
            )
        config = preflight.check_name(ROOT, args.config)
        slice_ = accelerators.parse(args.type)
        preflight.check_workdir(args.workdir, slice_.hosts, kept=False, mounted=False)
        resolved = preflight.resolve(ROOT, config, overrides, slice_.chips * args.num_slices)
        if resolved and preflight.check_data(resolved, local=False):
            print("gke: the data must be in IMAGE: pods do not download it", file=sys.stderr)
        train = ["train", "--config", config, "--workdir", args.workdir, *overrides]
        print(xpk(args, train) if args.xpk else json.dumps(render(args, train), indent=2))
    except Stop as stop:
        print(f"gke: {stop}", file=sys.stderr)
        return stop.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
