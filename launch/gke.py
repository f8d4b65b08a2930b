#!/usr/bin/env python3
"""Prints what trains on GKE: a JobSet for kubectl, or with --xpk the command that has xpk make one.

    launch/gke.py --config vit_base_imagenet --name vit --type v5e-256 --image IMAGE \\
        --workdir gs://BUCKET/vit --secret wandb --spot | kubectl apply -f -

IMAGE has vit_scale installed with its extra tpu. The exit codes mean what they mean everywhere: 42
and those of lost machines (127 and above) start all slices again, at most --max-restarts times;
others end it.
"""

import argparse
import json
import pathlib
import shlex
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from launch.tpu import accelerators, flags, preflight
from launch.tpu.accelerators import Accelerator
from launch.tpu.exit_codes import REFUSED, RESTARTABLE, USAGE, Stop
from launch.tpu.plan import NAME, ROOT


def parser() -> argparse.ArgumentParser:
    top = flags.Parser(prog="launch/gke.py", description=__doc__.partition("\n")[0])
    add = top.add_argument
    add("--config", required=True, help="a config's name, NAME:ARGUMENT, or a path in this tree")
    add("--name", required=True, help="of the JobSet")
    add("--type", required=True, help="accelerator type, such as v5e-256")
    add("--image", required=True, help="container image with vit_scale and its extra tpu")
    add("--workdir", required=True, help="the run's folder, gs://BUCKET/RUN")
    add("--num-slices", type=int, default=1)
    add("--spot", action="store_true")
    add("--secret", default="", help="name of a Kubernetes Secret: its keys become variables")
    add("--service-account", default="", help="Kubernetes service account that may use the bucket")
    add("--max-restarts", type=int, default=100)
    add("--grace", type=flags.seconds, default="2m", help="to save a checkpoint before SIGKILL")
    add("--xpk", metavar="CLUSTER", help="print xpk's command instead")
    return top


def render(args: argparse.Namespace, train: list[str]) -> dict:
    """The JobSet: one job a slice, one pod a host, each with all of the host's chips."""
    slice_ = accelerators.parse(args.type)
    if not slice_.gke or not slice_.topology:
        raise Stop(REFUSED, f"type {slice_.type}: GKE's name of it is not known here")
    job = {
        "parallelism": slice_.hosts,
        "completions": slice_.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "train",
                        "operator": "NotIn",
                        "values": [*RESTARTABLE],
                    },
                }
            ]
        },
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
                "rules": [
                    {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
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
        "restartPolicy": "Never",  # a podFailurePolicy needs it
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


def yaml(value, indent: int = 0) -> str:
    """Dictionaries as blocks; plain values and lists of them as JSON, which YAML reads."""
    pad = "  " * indent
    if isinstance(value, dict) and value:
        lines = []
        for key, inner in value.items():
            text = yaml(inner, indent + 1)
            lines.append(f"{pad}{key}:" + (f"\n{text}" if nested(inner) else f" {text}"))
        return "\n".join(lines)
    if nested(value):
        return "\n".join(f"{pad}- {yaml(inner, indent + 1).lstrip()}" for inner in value)
    return json.dumps(value)


def nested(value) -> bool:
    if isinstance(value, list):
        return any(isinstance(inner, (dict, list)) for inner in value)
    return isinstance(value, dict) and bool(value)


def xpk(args: argparse.Namespace, train: list[str]) -> str:
    """The same with xpk, which restarts after the same exit codes by default."""
    words = ["xpk", "workload", "create", "--cluster", args.xpk, "--workload", args.name]
    words += [
        "--tpu-type",
        accelerators.parse(args.type).type,
        "--num-slices",
        str(args.num_slices),
    ]
    words += ["--docker-image", args.image, "--max-restarts", str(args.max_restarts)]
    words += ["--termination-grace-period-seconds", str(int(args.grace) + 30)]
    words += ["--spot"] * args.spot
    return shlex.join([*words, "--command", shlex.join(["vit-scale", *train])])


def main(argv: list[str] | None = None) -> int:
    try:
        words, overrides, _ = flags.split(sys.argv[1:] if argv is None else argv)
        args = parser().parse_args(words)
        if args.xpk and (args.secret or args.service_account):
            given = "--secret" if args.secret else "--service-account"
            raise Stop(USAGE, f"xpk has nothing like {given}: leave it out, or print the JobSet")
        if not NAME.fullmatch(args.name):
            raise Stop(
                REFUSED, f"--name {args.name!r}: at most 40 of a-z, 0-9 and -, a letter first"
            )
        config = preflight.check_name(ROOT, args.config)
        slice_ = accelerators.parse(args.type)
        preflight.check_workdir(args.workdir, slice_.hosts, kept=False, mounted=False)
        shown = preflight.resolve(ROOT, config, overrides, slice_.chips * args.num_slices)
        if shown and preflight.check_data(shown, local=False):
            print("gke: the data is downloaded by no one: it must be in IMAGE", file=sys.stderr)
        train = ["train", "--config", config, "--workdir", args.workdir, *overrides]
        print(xpk(args, train) if args.xpk else yaml(render(args, train)))
    except Stop as stop:
        print(f"gke: {stop}", file=sys.stderr)
        return stop.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
