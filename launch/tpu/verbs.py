"""The runs launched from this clone, by their folders in runs/tpu, and the verbs for one run:
status, logs, stop, ssh and profile.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys

from launch.tpu import flags, gcloud, transport
from launch.tpu.clock import Clock
from launch.tpu.cloud_tpu import CloudTpu, Status
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.gcloud import Tpu
from launch.tpu.journal import Journal
from launch.tpu.plan import ROOT
from launch.tpu.transport import AgentStatus, last_error, on_all

FOLDER = ROOT / "runs" / "tpu"
TRACING = 600  # seconds for ten steps and for writing their trace


class RegisteredRun:
    """A run launched from this clone. `args` name it; by default the latest."""

    REACHABLE = ("ready", "unhealthy", "recovering")  # statuses in which workers may answer

    def __init__(self, args: argparse.Namespace):
        self.clock = Clock()
        name = flags.Values(args, ROOT).get("name")
        requests = [path for path in FOLDER.glob("*/launch.json") if has_name(path, name)]
        if not requests:
            problem = f"no run{name and f' named {name}'} was launched from this clone"
            raise Stop(Exit.USAGE, f"{problem}: pass --name, or see `list`")
        self.folder = max(requests, key=lambda path: path.stat().st_mtime).parent
        self.request = json.loads((self.folder / "launch.json").read_text())
        self.journal = Journal(self.folder, quiet=True)
        self.id, self.name = self.request["run"], self.request["name"]
        self.cloud: CloudTpu | None = None
        if self.request["tpu"]:
            # An earlier launcher's request may have other fields, of its creation.
            known = {k: v for k, v in self.request["tpu"].items() if k in Tpu.__dataclass_fields__}
            zone = args.zone or self.journal.state["zone"] or known["zone"]
            tpu = Tpu(**{**known, "zone": zone})
            owned = not self.request["existing"]
            self.cloud = CloudTpu(tpu, self.clock, self.journal, owned)

    def workers(self) -> transport.Workers:
        """Return its workers. Raises Stop if there are none."""
        if self.cloud is None:
            homes = sorted(self.folder.glob("worker-*")) or [pathlib.Path.home()]
            return transport.LocalWorkers(homes, "", 0, self.clock)
        status = self.status()
        if status.kind not in self.REACHABLE:
            raise Stop(Exit.REFUSED, f"{self.name} has no workers: {status.detail}")
        tpu, hosts = self.cloud.tpu, status.hosts
        return transport.GcloudWorkers(tpu, hosts, self.clock, lambda argv: None)

    def status(self) -> Status:
        """Return the machine's status. Raises Stop if another run has it by now."""
        if self.cloud is None:
            return Status("ready", "this machine")
        status = self.cloud.status()
        if self.cloud.owned and status.kind != "absent" and not self.cloud.is_ours(status.labels):
            problem = f"{self.name} no longer belongs to {self.id}"
            raise Stop(Exit.USAGE, f"{problem}: it {describe_owner(status.labels)}")
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


def status(args: argparse.Namespace) -> int:
    run = RegisteredRun(args)
    state, request = run.journal.state, run.request
    status, rows = run.status(), []
    if status.kind in ("ready", "unhealthy"):
        rows = worker_rows(run.workers(), run.id, "last")
    hours, price = state["billed"] / 3600, request["price"]
    content = {
        "run": run.id,
        "machine": status.detail,
        "zone": run.cloud.tpu.zone if run.cloud else None,
        "watched_by": run.journal.watcher() or None,
        "attempts": state["attempt"],
        "hours": round(hours, 2),
        "cost_usd": None if price is None else round(hours * price, 2),
        "workers": rows,
    }
    if args.json:
        print(json.dumps(content))
        return Exit.DONE
    for key, value in content.items():
        if key != "workers" and value is not None:
            print(f"{key:12} {value}")
    for entry in rows:
        cells = [f"{key} {value}" for key, value in entry.items() if value not in ("", None)]
        print("  ".join(cells))
    return Exit.DONE


def worker_rows(workers: transport.Workers, run: str, attempt: int | str) -> list[dict]:
    """Ask every worker for its status, for a table."""
    answers = workers.agents("status", run, attempt)
    return [worker_row(worker, result) for worker, result in answers.items()]


def worker_row(worker: int, result: gcloud.Result) -> dict:
    """Parse a worker's answer to `status` into a row of the table."""
    reply = AgentStatus.parse(result)
    if reply is None:
        return {"worker": worker, "state": "not reached", "why": last_error(result.err)}
    beat = reply.heartbeat or {}
    return {
        "worker": worker,
        "attempt": reply.attempt,
        "state": reply.state,
        "code": "" if reply.code is None else str(reply.code),
        "step": beat.get("step"),
        "phase": beat.get("phase"),
        "heartbeat_age_s": round(reply.now - beat["time"]) if "time" in beat else None,
        "free_gb": reply.free_gb,
    }


def logs(args: argparse.Namespace) -> int:
    """Print the logs collected here; with --follow, until the launcher stops collecting them."""
    run = RegisteredRun(args)
    number = args.attempt or run.journal.state["attempt"]
    folder = run.folder / f"a{number}"
    offsets: dict[pathlib.Path, int] = {}
    if not folder.is_dir():
        raise Stop(Exit.USAGE, f"no logs of attempt {number} of {run.id} on this machine")
    while True:
        for file in sorted(folder.glob("w*.log")):
            if args.worker not in ("all", str(int(file.stem[1:]))):
                continue
            with file.open(errors="replace") as stream:
                stream.seek(offsets.get(file, 0))
                for line in stream:
                    print(f"[{file.stem}] {line}", end="" if line.endswith("\n") else "\n")
                offsets[file] = stream.tell()
        newest = json.loads((run.folder / "state.json").read_text())["attempt"]
        if args.follow and not args.attempt and newest > number:
            number, folder, offsets = newest, run.folder / f"a{newest}", {}
            print(f"--- attempt {number}", file=sys.stderr)
        elif not args.follow or not run.journal.watcher():
            return Exit.DONE
        sys.stdout.flush()
        run.clock.sleep(2)


def stop(args: argparse.Namespace) -> int:
    """Have this machine's launcher stop the run; without one, stop it directly."""
    run = RegisteredRun(args)
    if run.journal.watcher():
        (run.folder / "stop").write_text("keep" if args.keep else "delete")
        print(f"process {run.journal.watcher()} is stopping {run.id}", file=sys.stderr)
        while run.journal.watcher():
            run.clock.sleep(2)
        print((run.folder / "journal.jsonl").read_text().splitlines()[-1])
        return Exit.DONE
    status = run.status()
    if status.kind == "absent":
        raise Stop(Exit.REFUSED, f"{run.name} has no workers: {status.detail}")
    if status.kind in run.REACHABLE:  # nothing trains on a machine in any other status
        stop_workers(run, args)
    if not args.keep and run.cloud and run.cloud.owned:
        run.cloud.delete()
        print(f"{run.name} deleted", file=sys.stderr)
    return Exit.DONE


def stop_workers(run: RegisteredRun, args: argparse.Namespace) -> None:
    """Have the attempt save and stop on every worker; return once it has, or after the grace.

    Raises Stop if the machine is kept and some workers cannot be reached: they may still train.
    """
    workers, clock = run.workers(), run.clock
    rows = worker_rows(workers, run.id, "last")
    number = max([run.journal.state["attempt"], *(entry.get("attempt", 0) for entry in rows)])
    seconds = max(1, round(args.grace * clock.scale))
    until = clock.now() + args.grace + 60
    while True:  # idempotent: unreachable workers are asked again
        workers.agents("stop", run.id, number, seconds)
        rows = worker_rows(workers, run.id, number)
        left = [entry for entry in rows if entry["state"] in ("running", "not reached")]
        if not left or clock.now() > until:
            break
        clock.sleep(5)
    if args.keep:
        workers.agent(0, "disarm", run.id)
    if not left:
        print(f"{run.id}: attempt {number} stopped", file=sys.stderr)
        return
    names = ", ".join(f"[w{entry['worker']:02}] {entry['state']}" for entry in left)
    print(f"{run.id}: attempt {number}, after the grace period: {names}", file=sys.stderr)
    if args.keep:
        raise Stop(Exit.INFRASTRUCTURE, f"{run.id} may still train: {names}")


def ssh(args: argparse.Namespace, words: list[str]) -> int:
    run = RegisteredRun(args)
    if run.cloud is None:
        raise Stop(Exit.USAGE, f"{run.id} runs on this machine: its workers are in {run.folder}")
    workers = run.workers()
    first = 0 if args.worker == "all" else int(args.worker)
    if first >= workers.count:
        raise Stop(Exit.USAGE, f"--worker {first}: {run.id} has {workers.count} workers, from 0")
    line = words[0] if len(words) == 1 else shlex.join(words)  # one word is a line of the shell
    if args.L or not words:
        forwards = [f"--ssh-flag=-L {forward}" for forward in args.L]
        return subprocess.call([*gcloud.ssh(run.cloud.tpu, *workers.hosts[first], line), *forwards])
    chosen = range(workers.count) if args.worker == "all" else [first]
    results = on_all(chosen, lambda i: workers.shell(i, line, b"", 600))
    for worker, result in results.items():
        text = result.out.decode(errors="replace") + gcloud.CHATTER.sub("", result.err)
        for shown in text.splitlines():
            print(f"[w{worker:02}] {shown}")
    return Exit.INFRASTRUCTURE if any(result.code for result in results.values()) else Exit.DONE


def profile(args: argparse.Namespace) -> int:
    """Trace the next ten steps on every worker, and print where the traces are. Raises Stop."""
    run = RegisteredRun(args)
    workers = run.workers()

    def trace(worker: int) -> str:
        """Return the path of the worker's trace, on the worker or in a bucket."""
        result = workers.agent(worker, "profile", run.id, number, limit=TRACING + 60)
        if result.code:
            raise Stop(Exit.INFRASTRUCTURE, f"[w{worker:02}] no trace: {last_error(result.err)}")
        return result.out.decode().strip()

    for worker, result in workers.agents("status", run.id, "last").items():
        reply = AgentStatus.parse(result)
        if reply is None or reply.state != "running":
            raise Stop(Exit.REFUSED, f"[w{worker:02}] does not train, or does not answer")
        number = reply.attempt
    for worker, path in on_all(range(workers.count), trace).items():
        folder = path
        if run.cloud and not path.startswith("gs://"):
            folder = f"{run.folder}/profile/plugins/profile/{pathlib.PurePath(path).name}"
            result = workers.shell(worker, f"tar -cz -C {shlex.quote(path)} .", b"", TRACING)
            os.makedirs(folder, exist_ok=True)
            if result.code or gcloud.run(["tar", "-xzC", folder], result.out).code:
                raise Stop(Exit.INFRASTRUCTURE, f"[w{worker:02}] {path} was not fetched")
    print(f"{folder}; to open it: xprof --logdir {shlex.quote(folder.partition('/plugins/')[0])}")
    return Exit.DONE
