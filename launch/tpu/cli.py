"""The command line of launch/tpu_vm.sh."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence

from launch.tpu import bundle, doctor, flags, fleet, plan, verbs, worker_commands
from launch.tpu.clock import Clock
from launch.tpu.cloud_tpu import CloudTpu
from launch.tpu.exit_codes import DONE, USAGE, Stop
from launch.tpu.journal import Journal
from launch.tpu.launcher import Launcher
from launch.tpu.plan import ROOT, Plan
from launch.tpu.secret import redactable
from launch.tpu.transport import HOME, LocalWorkers

VERBS: dict[str, Callable[..., int]] = {
    "status": verbs.status,
    "logs": verbs.logs,
    "stop": verbs.stop,
    "ssh": verbs.ssh,
    "delete": fleet.delete,
    "list": fleet.listing,
    "gc": fleet.collect,
    "doctor": doctor.doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; its exit code, one of exit_codes.py."""
    words, overrides, after = flags.split(sys.argv[1:] if argv is None else argv)
    try:
        args = flags.parser().parse_args(words)
        if args.verb != "run":
            return VERBS[args.verb](args, after) if args.verb == "ssh" else VERBS[args.verb](args)
        if after:
            raise Stop(
                USAGE, f"what is {after[0]!r}? fields are overridden by --config.FIELD=VALUE"
            )
        return run(args, overrides)
    except Stop as stop:
        print(f"tpu_vm: {stop}", file=sys.stderr)
        return stop.code


def run(args, overrides: list[str]) -> int:
    made = plan.make(args, overrides)
    journal = Journal(made.folder)
    journal.redacted = redactable(made.secrets)
    if args.dry_run:
        for what, text in made.lines:
            print(f"{what:8} {text}")
        print("\n".join(worker_commands.dry_run(made)))
        return DONE
    if journal.state["result"] == DONE and not args.again:
        print(f"tpu_vm: {made.run} is done, see {made.workdir}; --again runs it", file=sys.stderr)
        steps = max(journal.state["progress"].values(), default=0)
        print(json.dumps({"run": made.run, "result": "done", "code": DONE, "steps": steps}))
        return DONE
    if not journal.acquire_lock():
        raise Stop(
            USAGE,
            f"process {journal.watcher()} watches {made.run} already: launch/tpu_vm.sh logs -f "
            f"--name {made.name}",
        )
    (made.folder / "stop").unlink(missing_ok=True)  # of a launcher that had ended already
    if args.detach:
        return detach(made, journal)
    for what, text in made.lines:
        journal.say(what, text)
    clock = Clock()
    cloud = CloudTpu(made.tpu, clock, journal) if made.tpu else None
    workers = None if cloud else local_workers(made, clock)
    launcher = Launcher(made, cloud, workers, clock, journal)
    if launcher.machine:  # other verbs know a run by its notes: not before the machine is its own
        launcher.machine.claim = lambda: write_request(made, journal)
    else:
        write_request(made, journal)
    return launcher.run()


def write_request(made: Plan, journal: Journal) -> None:
    """What was asked for, for whoever looks at the run later, and for the other verbs."""
    tpu = vars(made.tpu) if made.tpu else None
    content = {
        "run": made.run,
        "name": made.name,
        "target": made.target,
        "config": made.config,
        "arguments": made.arguments,
        "workdir": made.workdir,
        "code": {"sha": made.code.sha, "version": made.code.description},
        "tpu": tpu,
        "zones": made.zones,
        "hosts": made.hosts,
        "price": made.price,
        "existing": made.args.existing,
        "resolved": [text for what, text in made.lines],
    }
    if not journal.put("launch.json", json.dumps(content, indent=1, default=str)):
        raise Stop(USAGE, f"{made.folder} can't be written: is the disk full?")
    journal.put("changes.diff", bundle.changes(ROOT))


def local_workers(made: Plan, clock: Clock) -> LocalWorkers:
    """The one host that this is, or so many with a home of their own each."""
    if made.target == "here":
        return LocalWorkers([pathlib.Path.home()], "", 0, clock)
    homes = [made.folder / f"worker-{number}" for number in range(made.hosts)]
    for home in homes:  # generated and downloaded sets are shared with what runs without a launcher
        (home / HOME).mkdir(parents=True, exist_ok=True)
        if not (home / HOME / "data").is_symlink():
            (home / HOME / "data").symlink_to(ROOT / ".data")
    (ROOT / ".data").mkdir(exist_ok=True)
    return LocalWorkers(homes, str(ROOT / ".venv"), made.args.devices, clock)


def detach(made: Plan, journal: Journal) -> int:
    """The same command in the background, apart from this terminal."""
    journal.release_lock()
    made.folder.mkdir(parents=True, exist_ok=True)
    words = [word for word in sys.argv[1:] if word != "--detach"]
    command = [sys.executable, "-I", str(ROOT / "launch" / "tpu"), *words]
    with (made.folder / "launcher.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    print(f"process {process.pid} watches {made.run}; launch/tpu_vm.sh logs -f --name {made.name}")
    return DONE
