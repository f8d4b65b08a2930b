"""The machines of this program in the cloud, whoever has started them: list, delete, gc."""

import argparse
import json
import sys
import time

from launch.tpu import accelerators, cloud, flags, gcloud, meter
from launch.tpu.clock import Clock
from launch.tpu.codes import DONE, INFRASTRUCTURE, USAGE, Stop
from launch.tpu.gcloud import ApiError, Tpu
from launch.tpu.journal import Journal
from launch.tpu.known import FOLDER, Known
from launch.tpu.plan import ROOT
from launch.tpu.transport import GcloudWorkers

LEFT = ("SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED", "STOPPED")


def delete(args: argparse.Namespace) -> int:
    """Delete a machine of this program, also one that this machine has no notes of."""
    if args.zone and args.name:
        values = flags.Values(args, ROOT)
        tpu = Tpu(
            args.name,
            args.zone,
            values.of_gcloud("project", "project"),
            "",
            "",
            queue=not args.no_queue,
        )
        journal = Journal(FOLDER / f"delete-{args.name}", quiet=True)
        found: cloud.Cloud | None = cloud.Cloud(tpu, Clock(), journal, owned=True)
    else:
        known = Known(args)
        found = known.cloud
    if found is None or not found.owned:
        raise Stop(USAGE, "this run's machine was not made by this program: it is not deleted")
    look = found.look()
    if look.kind == "absent":
        print(f"{found.tpu.name}: {look.detail}", file=sys.stderr)
        return DONE
    if look.labels.get("managed-by") != "vit_scale":
        raise Stop(USAGE, f"{found.tpu.name} was not made by this program: it is not deleted")
    if not confirmed(args, f"delete {found.tpu.name} ({look.detail})"):
        return DONE
    found.delete()
    print(f"{found.tpu.name} is deleted", file=sys.stderr)
    return DONE


def confirmed(args: argparse.Namespace, what: str) -> bool:
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise Stop(USAGE, f"{what}? give --yes")
    return input(f"{what}? [y/N] ").strip().lower() == "y"


class Machine:
    """A machine with this program's labels, in some zone."""

    def __init__(self, tpu: Tpu, state: str, labels: dict, created: str, kind: str):
        self.tpu, self.state, self.labels, self.kind = tpu, state, labels, kind
        self.hours = meter.age(created) / 3600
        expires = labels.get("expires", "")
        self.expired = expires.isdigit() and int(expires) < time.time()
        self.left = state in LEFT

    @property
    def price(self) -> float | None:
        try:
            return accelerators.parse(self.kind).price
        except Stop:
            return None

    def as_json(self) -> dict:
        return {
            "name": self.tpu.name,
            "zone": self.tpu.zone,
            "type": self.kind,
            "state": self.state,
            "run": self.labels.get("run"),
            "owner": self.labels.get("owner"),
            "hours": round(self.hours, 1),
            "usd_per_hour": None if self.left else self.price,
            "forgotten": self.expired or self.left,
        }


def machines(args: argparse.Namespace) -> list[Machine]:
    """Every machine of this program in the zones: requests, and nodes without one."""
    values = flags.Values(args, ROOT)
    project = values.of_gcloud("project", "project")
    zones = values.of_gcloud("zone", "compute/zone").split(",")
    if not zones[0]:
        raise Stop(USAGE, "--zones a,b is needed: machines are looked for zone by zone")
    found = []
    asked = cloud.Cloud(Tpu("", "", "", "", ""), Clock(), Journal(FOLDER / "list", quiet=True))
    for zone in zones:
        requests = read_list(asked, gcloud.listing("queued-resources", zone, project))
        nodes = read_list(asked, gcloud.listing("tpu-vm", zone, project))
        made = {last(node["name"]): node for node in nodes}
        for request in requests:
            specs = request.get("tpu", {}).get("nodeSpec", [{}])
            node = specs[0].get("node", {})
            tpu = Tpu(last(request["name"]), zone, project, "", "", slices=len(specs))
            there = [made.pop(spec.get("nodeId", ""), None) for spec in specs]
            labels = next(
                (n["labels"] for n in there if n and n.get("labels")), node.get("labels", {})
            )
            created = next(
                (n["createTime"] for n in there if n and n.get("createTime")),
                request.get("createTime", ""),
            )
            state = request.get("state", {}).get("state", "")
            state = next((n["state"] for n in there if n and n.get("state") in LEFT), state)
            found.append(Machine(tpu, state, labels, created, node.get("acceleratorType", "")))
        for name, node in made.items():
            tpu = Tpu(name, zone, project, "", "", queue=False)
            found.append(
                Machine(
                    tpu,
                    node.get("state", ""),
                    node.get("labels", {}),
                    node.get("createTime", ""),
                    node.get("acceleratorType", ""),
                )
            )
    return [machine for machine in found if machine.labels.get("managed-by") == "vit_scale"]


def read_list(asked: cloud.Cloud, argv: list[str]) -> list[dict]:
    try:
        return json.loads(asked.call(argv) or b"[]")
    except ApiError as error:
        raise cloud.refuse(error) from None


def last(name: str) -> str:
    return name.rpartition("/")[2]


def listing(args: argparse.Namespace) -> int:
    rows = [machine.as_json() for machine in machines(args)]
    if args.json:
        print(json.dumps({"machines": rows}))
        return DONE
    for entry in rows:
        print("  ".join(f"{key} {value}" for key, value in entry.items() if value is not None))
    if not rows:
        print("no machine of this program is there", file=sys.stderr)
    return DONE


def collect(args: argparse.Namespace) -> int:
    """Delete what is forgotten: each machine is shown, and asked about unless --yes is given."""
    code = DONE
    for machine in machines(args):
        wanted = machine.expired or (machine.left and not args.expired)
        text = json.dumps(machine.as_json())
        if not wanted or (not machine.left and trains(machine)):
            print(f"in use: {text}")
            continue
        if not confirmed(args, f"delete {text}"):
            continue
        journal = Journal(FOLDER / "list", quiet=True)
        try:
            cloud.Cloud(machine.tpu, Clock(), journal, owned=True).delete()
            print(f"deleted: {text}")
        except Stop as stop:
            print(f"NOT deleted: {text}: {stop}")
            code = INFRASTRUCTURE
    return code


def trains(machine: Machine) -> bool:
    """Whether a training runs there, whatever the labels say: they can't always be renewed."""
    clock = Clock()
    journal = Journal(FOLDER / "list", quiet=True)
    look = cloud.Cloud(machine.tpu, clock, journal).look()
    if look.kind != "ready" or not look.hosts:
        return False
    workers = GcloudWorkers(machine.tpu, look.hosts, clock, lambda argv: None)
    result = workers.agent(0, "status", machine.labels.get("run", ""), "last")
    return b"state=running" in result.out
