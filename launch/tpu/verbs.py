"""The verbs beside `run`: each looks at what there is, by this machine's notes or by --name."""

import argparse
import json
import pathlib
import re
import shlex
import subprocess
import sys
import time

from launch.tpu import accelerators, attempt, cloud, flags, gcloud, meter
from launch.tpu.clock import Clock
from launch.tpu.codes import AUTH, DONE, INFRASTRUCTURE, REFUSED, USAGE, Stop
from launch.tpu.gcloud import ApiError, Tpu
from launch.tpu.journal import Journal
from launch.tpu.plan import ROOT
from launch.tpu.transport import GcloudWorkers, LocalWorkers, Workers, on_all

FOLDER = ROOT / "runs" / "tpu"
LEFT = ("SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED", "STOPPED")


def run(args: argparse.Namespace, words: list[str]) -> int:
    verb = {
        "status": status,
        "logs": logs,
        "stop": stop,
        "delete": delete,
        "list": listing,
        "gc": collect,
        "ssh": ssh,
        "doctor": doctor,
    }[args.verb]
    return verb(args, words) if args.verb == "ssh" else verb(args)


class Known:
    """A run that this machine has notes of, and the way to its workers."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.clock = args, Clock()
        values = flags.Values(args, ROOT)
        name = values.get("name")
        found = [path for path in FOLDER.glob("*/launch.json") if is_of(path, name)]
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
        self.run, self.name = self.request["run"], self.request["name"]
        self.cloud: cloud.Cloud | None = None
        if self.request["tpu"]:
            tpu = Tpu(**self.request["tpu"])
            zone = args.zone or self.journal.state["zone"] or tpu.zone
            tpu = Tpu(**{**vars(tpu), "zone": zone})
            self.cloud = cloud.Cloud(tpu, self.clock, self.journal, not self.request["existing"])

    def workers(self) -> Workers:
        """Raises Stop where there are none."""
        if self.cloud is None:
            homes = sorted(self.folder.glob("worker-*")) or [pathlib.Path.home()]
            return LocalWorkers(homes, "", 0, self.clock)
        look = self.cloud.look()
        if look.kind != "ready":
            raise Stop(REFUSED, f"{self.name} has no workers: {look.detail}")
        return GcloudWorkers(self.cloud.tpu, look.hosts, self.clock, lambda argv: None)


def is_of(path: pathlib.Path, name: str) -> bool:
    try:
        return not name or json.loads(path.read_text())["name"] == name
    except (OSError, ValueError):
        return False


def status(args: argparse.Namespace) -> int:
    known = Known(args)
    state, request = known.journal.state, known.request
    look = known.cloud.look() if known.cloud else cloud.Look("ready", "this machine")
    rows = []
    if look.kind == "ready":
        workers = known.workers()
        answers = on_all(
            range(workers.count), lambda i: workers.agent(i, "status", known.run, "last")
        )
        rows = [row(worker, result) for worker, result in answers.items()]
    hours, price = state["billed"] / 3600, request["price"]
    content = {
        "run": known.run,
        "machine": look.detail,
        "zone": known.cloud.tpu.zone if known.cloud else None,
        "watched_by": known.journal.watcher() or None,
        "attempts": state["attempt"],
        "hours": round(hours, 2),
        "cost_usd": None if price is None else round(hours * price, 2),
        "workers": rows,
    }
    if args.json:
        print(json.dumps(content))
        return DONE
    for key, value in content.items():
        if key != "workers" and value is not None:
            print(f"{key:12} {value}")
    for entry in rows:
        print(
            "  ".join(f"{key} {value}" for key, value in entry.items() if value not in ("", None))
        )
    return DONE


def row(worker: int, result: gcloud.Result) -> dict:
    """What one worker's agent says of its last attempt."""
    text = result.out.decode(errors="replace")
    if result.code or "#STATUS" not in text:
        return {"worker": worker, "state": "not reached", "why": attempt.last(result.err)}
    values = dict(
        word.partition("=")[::2] for word in text.partition("#STATUS ")[2].split("\n")[0].split()
    )
    try:
        beat = json.loads(text.partition("#HEARTBEAT ")[2].split("\n")[0] or "{}")
    except ValueError:
        beat = {}
    age = float(values["now"]) - beat["time"] if "time" in beat else None
    return {
        "worker": worker,
        "attempt": int(values["attempt"]),
        "state": values["state"],
        "code": values["rc"],
        "step": beat.get("step"),
        "phase": beat.get("phase"),
        "heartbeat_age_s": None if age is None else round(age),
        "free_gb": int(values["free_gb"]),
    }


def logs(args: argparse.Namespace) -> int:
    """Print the logs that were collected; with --follow go on, as long as they are."""
    known = Known(args)
    number = args.attempt or known.journal.state["attempt"]
    folder, offsets = known.folder / f"a{number}", {}
    if not folder.is_dir():
        raise Stop(USAGE, f"{known.run} has no logs of attempt {number} here")
    while True:
        for file in sorted(folder.glob("w*.log")):
            if args.worker not in ("all", str(int(file.stem[1:]))):
                continue
            with file.open(errors="replace") as stream:
                stream.seek(offsets.get(file, 0))
                for line in stream:
                    print(f"[{file.stem}] {line}", end="" if line.endswith("\n") else "\n")
                offsets[file] = stream.tell()
        newest = json.loads((known.folder / "state.json").read_text())["attempt"]
        if args.follow and not args.attempt and newest > number:
            number, folder, offsets = newest, known.folder / f"a{newest}", {}
            print(f"--- attempt {number}", file=sys.stderr)
        elif not args.follow or not known.journal.watcher():
            return DONE
        sys.stdout.flush()
        known.clock.sleep(2)


def stop(args: argparse.Namespace) -> int:
    """Have the launcher of this machine stop the run; without one, do it here."""
    known = Known(args)
    if known.journal.watcher():
        (known.folder / "stop").write_text("keep" if args.keep else "delete")
        print(f"process {known.journal.watcher()} stops {known.run}", file=sys.stderr)
        while known.journal.watcher():
            known.clock.sleep(2)
        print((known.folder / "journal.jsonl").read_text().splitlines()[-1])
        return DONE
    workers, number = known.workers(), known.journal.state["attempt"]
    seconds = max(1, round(args.grace * known.clock.scale))
    answers = on_all(range(workers.count), lambda i: workers.agent(i, "status", known.run, "last"))
    rows = [row(worker, result) for worker, result in answers.items()]
    number = max([number, *(entry.get("attempt", 0) for entry in rows)])
    on_all(range(workers.count), lambda i: workers.agent(i, "stop", known.run, number, seconds))
    until = known.clock.now() + args.grace + 60
    while known.clock.now() < until:
        answers = on_all(
            range(workers.count), lambda i: workers.agent(i, "status", known.run, number)
        )
        if all(row(i, result)["state"] != "running" for i, result in answers.items()):
            break
        known.clock.sleep(5)
    print(f"{known.run}: attempt {number} is stopped", file=sys.stderr)
    if not args.keep and known.cloud and known.cloud.owned:
        known.cloud.delete()
        print(f"{known.name} is deleted", file=sys.stderr)
    return DONE


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
        found = cloud.Cloud(tpu, Clock(), journal, owned=True)
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


def ssh(args: argparse.Namespace, words: list[str]) -> int:
    known = Known(args)
    if known.cloud is None:
        raise Stop(USAGE, f"{known.run} is on this machine: its workers are in {known.folder}")
    workers = known.workers()
    if not words:
        node, index = workers.places[0 if args.worker == "all" else int(args.worker)]
        return subprocess.call(gcloud.ssh(known.cloud.tpu, node, index))
    chosen = range(workers.count) if args.worker == "all" else [int(args.worker)]
    results = on_all(chosen, lambda i: workers.shell(i, shlex.join(words), b"", 600))
    for worker, result in results.items():
        for line in (result.out.decode(errors="replace") + result.err).splitlines():
            print(f"[w{worker:02}] {line}")
    return DONE if all(result.code == 0 for result in results.values()) else INFRASTRUCTURE


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
    project = values.of_gcloud("project", "project")
    say(bool(project), f"project {project or 'none'}", "run: gcloud config set project PROJECT")
    zones = [zone for zone in values.of_gcloud("zone", "compute/zone").split(",") if zone]
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
