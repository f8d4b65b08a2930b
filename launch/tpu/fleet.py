"""The machines of this program in the cloud, whoever has started them: list, delete, gc."""

import argparse
import dataclasses
import json
import sys
import time

from launch.tpu import accelerators, billing, cloud_tpu, flags, gcloud
from launch.tpu.clock import Clock
from launch.tpu.exit_codes import DONE, INFRASTRUCTURE, USAGE, Stop
from launch.tpu.gcloud import ApiError, Tpu
from launch.tpu.journal import Journal
from launch.tpu.plan import ROOT
from launch.tpu.run_registry import FOLDER, RegisteredRun, describe_owner
from launch.tpu.transport import HOME, GcloudWorkers, agent_command, on_all

DEAD_STATES = ("SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED", "STOPPED")
QUEUED = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
LATELY = 900  # seconds
NOT_REACHED = "in use, not reached"


def delete(args: argparse.Namespace) -> int:
    """Delete a machine of this program, also one that this machine has no notes of."""
    found, run = find_machine(args)
    status = found.status()
    if status.kind == "absent":
        print(f"{found.tpu.name}: {status.detail}", file=sys.stderr)
        return DONE
    labels = status.labels
    if labels.get("managed-by") != "vit_scale":
        raise Stop(USAGE, f"{found.tpu.name} was not made by this program: it is not deleted")
    owner = labels.get("owner", "")
    own = found.is_ours(labels) and (run or owner == cloud_tpu.owner())
    if not own and args.owner not in ("all", owner):
        raise Stop(
            USAGE,
            f"{found.tpu.name} is not deleted: {describe_owner(labels)}; "
            f"to delete it, give --owner {owner}",
        )
    found.tpu = dataclasses.replace(found.tpu, labels={"run": labels.get("run", "")})
    status = (
        found.status()
    )  # now that its run is known, it may be seen to be a node without a request
    if not confirm(args, f"delete {found.tpu.name} ({status.detail}; {describe_owner(labels)})"):
        return DONE
    found.delete()
    print(f"{found.tpu.name} is deleted", file=sys.stderr)
    return DONE


def find_machine(args: argparse.Namespace) -> tuple[cloud_tpu.CloudTpu, bool]:
    """The machine that is to be deleted; and whether this machine has notes of its run."""
    try:
        run = RegisteredRun(args)
    except Stop:
        if not (args.zone and args.name):
            raise
        project = flags.Values(args, ROOT).get_or_gcloud("project", "project")
        tpu = Tpu(args.name, args.zone, project, "", "", queue=not args.no_queue)
        journal = Journal(FOLDER / f"delete-{args.name}", quiet=True)
        return cloud_tpu.CloudTpu(tpu, Clock(), journal, owned=True), False
    if run.cloud is None or not run.cloud.owned:
        raise Stop(USAGE, "this run's machine was not made by this program: it is not deleted")
    return run.cloud, True


def confirm(args: argparse.Namespace, what: str) -> bool:
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise Stop(USAGE, f"{what}? give --yes")
    return input(f"{what}? [y/N] ").strip().lower() == "y"


class Machine:
    """A machine with this program's labels, in some zone."""

    def __init__(self, tpu: Tpu, state: str, labels: dict, created: str, kind: str):
        self.state, self.labels, self.kind = state, labels, kind
        self.tpu = dataclasses.replace(tpu, labels={"run": labels.get("run", "")})
        self.hours = billing.age(created) / 3600
        expires = labels.get("expires", "")
        # A request has no label that could be renewed, and may wait for days.
        past = expires.isdigit() and int(expires) < time.time()
        self.expired = past and state not in QUEUED
        self.left = state in DEAD_STATES

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


def list_machines(args: argparse.Namespace) -> list[Machine]:
    """Every machine of this program in the zones: requests, and nodes without one."""
    values = flags.Values(args, ROOT)
    project = values.get_or_gcloud("project", "project")
    zones = values.get_or_gcloud("zone", "compute/zone").split(",")
    if not zones[0]:
        raise Stop(USAGE, "--zones a,b is needed: machines are looked for zone by zone")
    found = []
    asked = cloud_tpu.CloudTpu(
        Tpu("", "", "", "", ""), Clock(), Journal(FOLDER / "list", quiet=True)
    )
    for zone in zones:
        requests = read_list(asked, gcloud.listing("queued-resources", zone, project))
        nodes = read_list(asked, gcloud.listing("tpu-vm", zone, project))
        made = {base_name(node["name"]): node for node in nodes}
        for request in requests:
            node_specs = request.get("tpu", {}).get("nodeSpec", [{}])
            node = node_specs[0].get("node", {})
            tpu = Tpu(base_name(request["name"]), zone, project, "", "", slices=len(node_specs))
            tpu = dataclasses.replace(tpu, iap=args.iap, internal_ip=args.internal_ip)
            there = [made.pop(spec.get("nodeId", ""), None) for spec in node_specs]
            labels = next(
                (n["labels"] for n in there if n and n.get("labels")), node.get("labels", {})
            )
            created = next(
                (n["createTime"] for n in there if n and n.get("createTime")),
                request.get("createTime", ""),
            )
            state = request.get("state", {}).get("state", "")
            state = next((n["state"] for n in there if n and n.get("state") in DEAD_STATES), state)
            found.append(Machine(tpu, state, labels, created, node.get("acceleratorType", "")))
        for name, node in made.items():
            tpu = Tpu(name, zone, project, "", "", queue=False)
            tpu = dataclasses.replace(tpu, iap=args.iap, internal_ip=args.internal_ip)
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


def read_list(asked: cloud_tpu.CloudTpu, argv: list[str]) -> list[dict]:
    try:
        return json.loads(asked.call(argv) or b"[]")
    except ApiError as error:
        raise cloud_tpu.refuse(error) from None


def base_name(name: str) -> str:
    return name.rpartition("/")[2]


def listing(args: argparse.Namespace) -> int:
    rows = [machine.as_json() for machine in list_machines(args)]
    if args.owner not in ("", "all"):
        rows = [row for row in rows if row["owner"] == args.owner]
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
    code, mine = DONE, args.owner or cloud_tpu.owner()
    for machine in list_machines(args):
        text = json.dumps(machine.as_json())
        if mine not in ("all", machine.labels.get("owner")):
            print(f"another's: {text}")
            continue
        find_machine = machine.expired or (machine.left and not args.expired)
        use = "in use" if not find_machine else "" if machine.left else in_use(machine)
        if use:
            print(f"{use}: {text}")
            continue
        if not confirm(args, f"delete {text}"):
            continue
        journal = Journal(FOLDER / "list", quiet=True)
        try:
            cloud_tpu.CloudTpu(machine.tpu, Clock(), journal, owned=True).delete()
            print(f"deleted: {text}")
        except Stop as stop:
            print(f"NOT deleted: {text}: {stop}")
            code = INFRASTRUCTURE
    return code


def in_use(machine: Machine) -> str:
    """How a machine is in use, whatever its labels say: they can't always be renewed; "" if not.

    It is not where each worker says that nothing runs there, and that no launcher has asked lately.
    """
    clock = Clock()
    status = cloud_tpu.CloudTpu(machine.tpu, clock, Journal(FOLDER / "list", quiet=True)).status()
    if status.kind in ("absent", "gone", "failed"):
        return ""
    workers = GcloudWorkers(machine.tpu, status.hosts, clock, lambda argv: None)
    ask = agent_command("status", machine.labels.get("run", ""), "last")
    line = f"if test -e {HOME}/agent.sh; then {ask}; else echo '#STATUS state=absent'; fi"
    answers = on_all(range(workers.count), lambda i: workers.shell(i, line, b"", 60))
    said = [result.out.decode(errors="replace") for result in answers.values()]
    if any("state=running" in text or watched(text, clock) for text in said):
        return "in use"
    reached = all(result.code == 0 for result in answers.values())
    return "" if reached and said and all("#STATUS" in text for text in said) else NOT_REACHED


def watched(status: str, clock: Clock) -> bool:
    """Whether a launcher has asked this worker lately."""
    asked = status.partition("#SITTER ")[2].split("\n")[0].split()[1:]
    now = status.partition("now=")[2].split()[:1]
    return bool(asked and now) and (float(now[0]) - float(asked[0])) / clock.scale < LATELY
