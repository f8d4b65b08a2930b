"""The command line of launch/tpu_vm.sh."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence

from launch.tpu import bundle, doctor, flags, fleet, verbs, worker_commands
from launch.tpu.clock import Clock
from launch.tpu.cloud_tpu import CloudTpu
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.journal import Journal
from launch.tpu.launcher import Launcher
from launch.tpu.plan import ROOT, Plan, make_plan
from launch.tpu.secret import redactable
from launch.tpu.transport import HOME, LocalWorkers

VERBS: dict[str, Callable[..., int]] = {
    "status": verbs.status,
    "logs": verbs.logs,
    "stop": verbs.stop,
    "ssh": verbs.ssh,
    "profile": verbs.profile,
    "delete": fleet.delete,
    "list": fleet.listing,
    "gc": fleet.collect,
    "doctor": doctor.doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return one of exit_codes.py."""
    words, overrides, after = flags.split(sys.argv[1:] if argv is None else argv)
    try:
        args = flags.parser().parse_args(words)
        if args.verb != "run":
            return VERBS[args.verb](args, after) if args.verb == "ssh" else VERBS[args.verb](args)
        if after:
            raise Stop(Exit.USAGE, f"unexpected argument {after[0]!r}; use --config.FIELD=VALUE")
        return run(args, overrides)
    except Stop as stop:
        print(f"tpu_vm: {stop}", file=sys.stderr)
        return stop.code


def run(args, overrides: list[str]) -> int:
    plan = make_plan(args, overrides)
    journal = Journal(plan.folder)
    journal.redacted = redactable(plan.secrets)
    if args.dry_run:
        for what, text in plan.summary:
            print(f"{what:8} {text}")
        print("\n".join(worker_commands.dry_run(plan)))
        return Exit.DONE
    same = journal.state["arguments"] in (None, plan.arguments)
    if journal.state["result"] == Exit.DONE and same and not args.again:
        print(f"tpu_vm: {plan.run} is done, see {plan.workdir}; --again reruns it", file=sys.stderr)
        steps = max(journal.state["progress"].values(), default=0)
        print(json.dumps({"run": plan.run, "result": "done", "code": Exit.DONE, "steps": steps}))
        return Exit.DONE
    if not journal.acquire_lock():
        other = f"process {journal.watcher()} already watches {plan.run}"
        raise Stop(Exit.USAGE, f"{other}: launch/tpu_vm.sh logs -f --name {plan.name}")
    (plan.folder / "stop").unlink(missing_ok=True)  # a request to an earlier launcher
    if args.detach:
        return detach(plan, journal)
    for what, text in plan.summary:
        journal.say(what, text)
    clock = Clock()
    cloud = CloudTpu(plan.tpu, clock, journal) if plan.tpu else None
    workers = None if cloud else local_workers(plan, clock)
    launcher = Launcher(plan, cloud, workers, clock, journal)
    if launcher.machine:  # registers the run, so only once the machine is its own
        launcher.machine.claim = lambda: write_request(plan, journal)
    else:
        write_request(plan, journal)
    return launcher.run()


def write_request(plan: Plan, journal: Journal) -> None:
    """Register the run for the other verbs, with its resolved request."""
    tpu = vars(plan.tpu) if plan.tpu else None
    names = ["run", "name", "target", "config", "arguments", "workdir", "zones", "hosts", "price"]
    content = {name: getattr(plan, name) for name in names}
    content |= {"tpu": tpu, "existing": plan.args.existing}
    content["code"] = {"sha": plan.code.sha, "version": plan.code.description}
    content["resolved"] = [text for what, text in plan.summary]
    if not journal.put("launch.json", json.dumps(content, indent=1, default=str)):
        raise Stop(Exit.USAGE, f"cannot write to {plan.folder}: is the disk full?")
    journal.put("changes.diff", bundle.changes(ROOT))


def local_workers(plan: Plan, clock: Clock) -> LocalWorkers:
    """Return this host as the worker, or N workers on it with a home folder each."""
    if plan.target == "here":
        return LocalWorkers([pathlib.Path.home()], "", 0, clock)
    homes = [plan.folder / f"worker-{number}" for number in range(plan.hosts)]
    for home in homes:  # share datasets with runs outside the launcher
        (home / HOME).mkdir(parents=True, exist_ok=True)
        if not (home / HOME / "data").is_symlink():
            (home / HOME / "data").symlink_to(ROOT / ".data")
    (ROOT / ".data").mkdir(exist_ok=True)
    return LocalWorkers(homes, str(ROOT / ".venv"), plan.args.devices, clock)


def detach(plan: Plan, journal: Journal) -> int:
    """Rerun the same command in the background, detached from this terminal."""
    journal.release_lock()
    plan.folder.mkdir(parents=True, exist_ok=True)
    words = [word for word in sys.argv[1:] if word != "--detach"]
    command = [sys.executable, "-I", str(ROOT / "launch" / "tpu"), *words]
    with (plan.folder / "launcher.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    print(f"process {process.pid} watches {plan.run}; launch/tpu_vm.sh logs -f --name {plan.name}")
    return Exit.DONE
