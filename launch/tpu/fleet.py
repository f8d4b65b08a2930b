"""All machines that launchers created, whoever ran them: the verbs list, delete and gc."""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections import ChainMap

from launch.tpu import accelerators, billing, cloud_tpu, flags, gcloud
from launch.tpu.clock import Clock
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.gcloud import ApiError, Tpu
from launch.tpu.journal import Journal
from launch.tpu.plan import ROOT
from launch.tpu.transport import HOME, AgentStatus, GcloudWorkers, agent_command, on_all
from launch.tpu.verbs import FOLDER, RegisteredRun, describe_owner

DEAD_STATES = ("SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED", "STOPPED")
QUEUED = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
RECENT = 900  # seconds since a launcher last asked a worker


def delete(args: argparse.Namespace) -> int:
    """Delete a machine, even one whose run is not in this clone's registry."""
    cloud, registered = find_machine(args)
    status = cloud.status()
    if status.kind == "absent":
        print(status.detail, file=sys.stderr)
        return Exit.DONE
    labels = status.labels
    if labels.get("managed-by") != "vit_scale":
        raise Stop(Exit.USAGE, f"{cloud.tpu.name} was not created by this launcher: not deleted")
    owner = labels.get("owner", "")
    own = cloud.is_ours(labels) and (registered or owner == cloud_tpu.owner())
    if not own and args.owner not in ("all", owner):
        problem = f"{cloud.tpu.name} not deleted: it {describe_owner(labels)}"
        raise Stop(Exit.USAGE, f"{problem}; to delete it, pass --owner {owner}")
    cloud.tpu = dataclasses.replace(cloud.tpu, labels={"run": labels.get("run", "")})
    status = cloud.status()  # with its run known, a node without a request is recognised
    if not confirm(args, f"delete {cloud.tpu.name} ({status.detail}; it {describe_owner(labels)})"):
        return Exit.DONE
    cloud.delete()
    print(f"{cloud.tpu.name} deleted", file=sys.stderr)
    return Exit.DONE


def find_machine(args: argparse.Namespace) -> tuple[cloud_tpu.CloudTpu, bool]:
    """Return the machine to delete, and whether its run is in this clone's registry."""
    try:
        run = RegisteredRun(args)
    except Stop:
        if not (args.zone and args.name):
            raise
        project = flags.Values(args, ROOT).get_or_gcloud("project", "project")
        return client(Tpu(args.name, args.zone, project, queue=not args.no_queue)), False
    if run.cloud is None or not run.cloud.owned:
        raise Stop(Exit.USAGE, "this run's machine was not created by this launcher: not deleted")
    return run.cloud, True


def confirm(args: argparse.Namespace, what: str) -> bool:
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise Stop(Exit.USAGE, f"no terminal to ask for confirmation: pass --yes to {what}")
    return input(f"{what}? [y/N] ").strip().lower() == "y"


def client(tpu: Tpu) -> cloud_tpu.CloudTpu:
    """Return access to a machine that may be deleted."""
    return cloud_tpu.CloudTpu(tpu, Clock(), Journal(FOLDER / "list", quiet=True), owned=True)


class Machine:
    """A machine with the launcher's labels."""

    def __init__(self, tpu: Tpu, state: str, labels: dict, created: str, kind: str):
        self.state, self.labels, self.kind = state, labels, kind
        self.cloud = client(dataclasses.replace(tpu, labels={"run": labels.get("run", "")}))
        self.hours = billing.age(created) / 3600
        expires = labels.get("expires", "")
        # A queued request has no label to renew, and may wait for days.
        past = expires.isdigit() and int(expires) < time.time()
        self.expired = past and state not in QUEUED
        self.left = state in DEAD_STATES

    def as_json(self) -> dict:
        price = None
        with contextlib.suppress(Stop):  # a type that is not in the table
            price = accelerators.parse(self.kind).price
        return {
            "name": self.cloud.tpu.name,
            "zone": self.cloud.tpu.zone,
            "type": self.kind,
            "state": self.state,
            "run": self.labels.get("run"),
            "owner": self.labels.get("owner"),
            "hours": round(self.hours, 1),
            "usd_per_hour": None if self.left else price and price * self.cloud.tpu.slices,
            "forgotten": self.expired or self.left,
        }


def list_machines(args: argparse.Namespace) -> list[Machine]:
    """List the launcher's machines in the zones: requests, and nodes without one."""
    values = flags.Values(args, ROOT)
    project = values.get_or_gcloud("project", "project")
    zones = values.get_or_gcloud("zone", "compute/zone").split(",")
    if not zones[0]:
        raise Stop(Exit.USAGE, "--zones a,b is required: machines are listed zone by zone")
    machines: list[Machine] = []

    def add(name: str, nodes: list[dict], fallback: dict, **options) -> None:
        """Add a machine; what its nodes do not report comes from `fallback`."""
        route: dict = {"iap": args.iap, "internal_ip": args.internal_ip}
        tpu = Tpu(name, zone, project, **route, **options)
        states = [node["state"] for node in nodes if node.get("state") in DEAD_STATES]
        state = next(iter(states), fallback.get("state", ""))
        get = ChainMap(*nodes, fallback).get
        labels, created, kind = get("labels"), get("createTime"), get("acceleratorType")
        machines.append(Machine(tpu, state, labels or {}, created or "", kind or ""))

    for zone in zones:
        location = Tpu("", zone, project).location
        requests = read_list(gcloud.listing("queued-resources", location))
        listed = read_list(gcloud.listing("tpu-vm", location))
        nodes = {node["name"].rpartition("/")[2]: node for node in listed}
        for request in requests:
            names = cloud_tpu.node_names(request)
            own = [nodes.pop(name, {}) for name in names]
            fallback = {**request, **cloud_tpu.node_specs(request)[0].get("node", {})}
            fallback["state"] = request.get("state", {}).get("state", "")
            add(request["name"].rpartition("/")[2], own, fallback, slices=len(names))
        for name, node in nodes.items():
            add(name, [node], node, queue=False)
    return [machine for machine in machines if machine.labels.get("managed-by") == "vit_scale"]


def read_list(argv: list[str]) -> list[dict]:
    try:
        return json.loads(client(Tpu("", "", "")).call(argv) or b"[]")
    except ApiError as error:
        raise cloud_tpu.refuse(error) from None


def listing(args: argparse.Namespace) -> int:
    rows = [machine.as_json() for machine in list_machines(args)]
    if args.owner not in ("", "all"):
        rows = [row for row in rows if row["owner"] == args.owner]
    if args.json:
        print(json.dumps({"machines": rows}))
        return Exit.DONE
    for entry in rows:
        print("  ".join(f"{key} {value}" for key, value in entry.items() if value is not None))
    if not rows:
        print("no machines found", file=sys.stderr)
    return Exit.DONE


def collect(args: argparse.Namespace) -> int:
    """Delete forgotten machines, each after confirmation unless --yes is given."""
    code, mine = Exit.DONE, args.owner or cloud_tpu.owner()
    for machine in list_machines(args):
        text = json.dumps(machine.as_json())
        if mine not in ("all", machine.labels.get("owner")):
            print(f"another's: {text}")
            continue
        forgotten = machine.expired or (machine.left and not args.expired)
        use = "in use" if not forgotten else "" if machine.left else in_use(machine)
        if use:
            print(f"{use}: {text}")
            continue
        if not confirm(args, f"delete {text}"):
            continue
        try:
            machine.cloud.delete()
            print(f"deleted: {text}")
        except Stop as stop:
            print(f"NOT deleted: {text}: {stop}")
            code = Exit.INFRASTRUCTURE
    return code


def in_use(machine: Machine) -> str:
    """Describe how a machine is in use, or return "" if it is not.

    It is unused if every worker reports that nothing runs and that no launcher has asked recently.
    Its labels do not decide: they cannot always be renewed.
    """
    clock, status = machine.cloud.clock, machine.cloud.status()
    if status.kind in ("absent", "gone", "failed"):
        return ""
    workers = GcloudWorkers(machine.cloud.tpu, status.hosts, clock, lambda argv: None)
    ask = agent_command("status", machine.labels.get("run", ""), "last")
    line = f"if test -e {HOME}/agent.sh; then {ask}; else echo no agent; fi"
    results = on_all(range(workers.count), lambda i: workers.shell(i, line, b"", 60)).values()
    replies = [AgentStatus.parse(result) for result in results]
    if any(reply and in_use_now(reply, clock) for reply in replies):
        return "in use"
    if any(result.out.startswith(b"#STATUS attempt=") for result in results):
        return "agent of an earlier version, use delete"
    idle = [AgentStatus.parse(result) or result.out == b"no agent\n" for result in results]
    return "" if idle and all(idle) else "in use, not reached"


def in_use_now(reply: AgentStatus, clock: Clock) -> bool:
    """Return whether an attempt runs, or a launcher has called recently."""
    watched = reply.watched_at and (reply.now - reply.watched_at) / clock.scale < RECENT
    return reply.state == "running" or bool(watched)
