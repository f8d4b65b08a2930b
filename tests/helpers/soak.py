"""Disturb a small training again and again, and check that nothing is lost by it.

    python tests/helpers/soak.py --schedules 100 --seed 0 --json
    python tests/helpers/soak.py --schedules 20 --hosts 2 --faults sigkill,freeze --jobs 2
    python tests/helpers/soak.py --schedules 8 --hosts 2 --faults sigterm --in-turn
    python tests/helpers/soak.py --schedules 20 --objective dino
    python tests/helpers/soak.py --damage 150 --json

A schedule is one run of soak_config.py with one to three faults, each at a random moment of a
random phase, and then left to end. It holds if the run ends with the parameters, averages and
optimizer state of the undisturbed one, bit for bit (the fingerprints of its last checkpoint; where
the number of hosts changes, which is with SGD, parameters within 1e-5), every step is reported
exactly once, and each process left with a documented exit code. Faults are a function of the seed
alone; what the machine does with the moment is not.

    sigkill, sigterm          of one process, in any phase, also in the middle of a save
    bitflip, truncate, remove of any file of the newest checkpoint, after a SIGKILL
    disk                      no file can grow any more
    nan                       a batch whose pixels are NaN: once, or too often in a row
    freeze, raise             of one of several hosts (--hosts 2)
    hosts                     the run goes on with another number of hosts (--hosts 2)

--in-turn makes that one fault a schedule, and goes through the phases instead of drawing them: the
first time at their very beginning, then at random moments.

--damage damages one file of the newest checkpoint of the undisturbed run, anew each time (two of
three times one flipped bit, else a truncation or a removal), and checks that what is restored is
that checkpoint or the one before, to the bit.
"""

import argparse
import collections
import concurrent.futures
import itertools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from typing import ClassVar

ROOT = pathlib.Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests/helpers"
CONFIG = TESTS / "soak_config.py"
STEPS = 24
PHASES = ("import", "start", "restore", "compile", "train", "data", "checkpoint", "eval")
DAMAGE = ("bitflip", "truncate", "remove")
ONE = ("sigkill", "sigterm", *DAMAGE, "disk", "nan")
SEVERAL = ("sigkill", "sigterm", *DAMAGE, "freeze", "raise", "hosts")
KILLED = 137
LIMIT = 600  # seconds for one attempt
# Seconds from SIGTERM to the answer to stop. Of several hosts one looks for it every second, and
# tells the others; on a machine with more processes than cores that takes its time.
NOTICE = {1: 0.1, 2: 4.0}
MOST = 12  # attempts of one schedule


class Failed(Exception):
    """What did not hold."""


class Run:
    """One schedule's run folder, and the attempts made in it."""

    def __init__(self, folder: pathlib.Path, data, hosts: int, nan=(), kind="adamw"):
        self.folder, self.data, self.hosts, self.nan = folder, data, hosts, list(nan)
        self.kind = kind  # the argument of soak_config.py
        self.workdir = folder / "run"
        self.struck: list[dict] = []
        self.codes: list[int] = []
        folder.mkdir(parents=True)

    def attempt(self, fault: dict | None = None) -> int:
        """Run the command once; its exit code."""
        log = self.folder / f"log-{len(self.codes)}"
        command = [sys.executable, str(TESTS / "soak_program.py"), "train"]
        command += ["--config", f"{CONFIG}:{self.kind}"]
        command += [f"--config.data.path={self.data}", "--workdir", str(self.workdir), "--quiet"]
        if self.hosts > 1:
            pod = ["--hosts", str(self.hosts), "--devices", "1"]
            command = [sys.executable, str(ROOT / "launch" / "pod.py"), *pod, *command]
        cache = self.data / f"cache-{self.hosts}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "SOAK_FAULT": json.dumps(fault or {}),
            "SOAK_NAN": json.dumps(self.nan),
            "SOAK_LOG": str(log),
        }
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed(f"attempt with {fault} did not end in {LIMIT} s") from None
        (self.folder / f"errors-{len(self.codes)}").write_text(errors)
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        self.codes.append(code)
        self.struck += [row for row in read_lines(log) if "fault" in row]
        if code == 0 and fault and fault["kind"] == "sigterm":
            self.check_too_late(read_lines(log))
        return code

    def check_too_late(self, rows: list[dict]) -> None:
        """Raises Failed where a process finished that was asked to stop while it still could."""
        struck = next((row for row in rows if "fault" in row), None)
        if struck is None:
            return
        ended = next(
            row for row in rows if row.get("phase") == "end" and row["process"] == struck["process"]
        )
        if (late := ended["asked"] - struck["time"]) > NOTICE[min(self.hosts, 2)]:
            raise Failed(
                f"SIGTERM in {struck['phase']} has no answer, though asked for {late:.1f} s later"
            )
        self.struck[-1]["phase"] += ", too late to stop"

    def errors(self) -> str:
        return (self.folder / f"errors-{len(self.codes) - 1}").read_text()

    def checkpoints(self) -> list[pathlib.Path]:
        found = (self.workdir / "checkpoints").glob("*")
        return sorted((f for f in found if f.name.isdigit()), key=lambda f: int(f.name))

    def arrays(self) -> dict:
        """The fingerprint of each array of the last checkpoint."""
        last = self.workdir / "checkpoints" / str(STEPS)
        return json.loads((last / "manifest" / "metadata").read_text())["arrays"]


def read_lines(path: pathlib.Path) -> list[dict]:
    """The JSON lines of a file, but for a last one that is torn."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def phases(run: Run) -> dict[str, list[float]]:
    """How long each phase lasted each time, in the undisturbed run."""
    rows = [row for row in read_lines(run.folder / "log-0") if row["process"] == 0]
    found = collections.defaultdict(list)
    for this, following in itertools.pairwise(rows):
        found[this["phase"]].append(following["time"] - this["time"])
    return found


def moment(draw: random.Random, lasting: dict[str, list[float]], kind: str, turn=None) -> dict:
    """A fault of `kind` at a random moment of a phase: of a random one, or of the next in turn."""
    late = ("train", "checkpoint", "eval")
    phases = [p for p in (late if kind in ("disk", "raise") else PHASES) if p in lasting]
    phase = draw.choice(phases) if turn is None else phases[turn % len(phases)]
    nth = draw.randrange(len(lasting[phase]))
    at_once = kind == "disk" or (turn is not None and turn < len(phases))
    delay = 0 if at_once else draw.uniform(0, lasting[phase][nth])
    return {"kind": kind, "phase": phase, "nth": nth + 1, "delay": delay}


def damage(draw: random.Random, run: Run, kind: str) -> str | None:
    """Damage one file of the newest checkpoint, if there are two; says which."""
    there = run.checkpoints()
    if len(there) < 2:
        return None
    files = sorted(f for f in there[-1].rglob("*") if f.is_file() and f.stat().st_size)
    file = draw.choice(files)
    content = bytearray(file.read_bytes())
    if kind == "bitflip":
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(content)
    elif kind == "truncate":
        file.write_bytes(content[: draw.randrange(len(content))])
    else:
        file.unlink()
    run.struck.append({"fault": kind, "phase": f"{file.relative_to(there[-1])}"})
    return str(file)


def check_code(run: Run, code: int, kind: str, process: int | None) -> None:
    """Raises Failed where a process left in another way than is documented for what it met.

    Of several, the one that the fault was for has to be named: it is the cause, not the others.
    """
    expected = {
        "sigkill": {0, 42, KILLED},  # 0: it had ended before; 42: of a pod, the survivor's
        "sigterm": {0, 42},
        "disk": {0, 42},
        "freeze": {0, 42},
        "raise": {0, 1},
        "none": {0},
    }[kind]
    if code not in expected:
        raise Failed(f"exit code {code} after {kind}: {run.errors()[-500:]}")
    cause = {
        "freeze": f"process {process} (",
        "sigkill": f"pod: host {process} of",
        "raise": "a mistake on this host alone",
    }.get(kind)
    if process is not None and code and cause and cause not in run.errors():
        raise Failed(f"{kind} of process {process} is not named: {run.errors()[-500:]}")


def check_rows(run: Run) -> None:
    rows = read_lines(run.workdir / "metrics.jsonl")
    steps = [row["step"] for row in rows if "train/loss" in row]
    if steps != list(range(1, STEPS + 1)):
        raise Failed(f"steps in metrics.jsonl: {steps}")
    measured = [row["step"] for row in rows if "eval/accuracy" in row]
    if measured != sorted(set(measured)) or measured[-1] != STEPS:
        raise Failed(f"evaluations in metrics.jsonl: {measured}")


def check_result(run: Run, whole: Run, exact: bool) -> None:
    if exact:
        ours, theirs = run.arrays(), whole.arrays()
        wrong = [name for name in theirs if ours.get(name) != theirs[name]]
        if wrong or ours.keys() != theirs.keys():
            raise Failed(f"differ from the undisturbed run: {wrong[:3]} of {len(wrong)}")
        report = [json.loads((r.workdir / "report.json").read_text())["eval"] for r in (run, whole)]
        if report[0] != report[1]:
            raise Failed(f"reports {report[0]}, not {report[1]}")
    elif (apart := distance(run, whole)) > 1e-5:
        raise Failed(f"parameters are up to {apart:.2g} from the undisturbed run's")


def distance(run: Run, other: Run) -> float:
    """The largest difference of a parameter."""
    import numpy as np

    from vit_scale import pretrained
    from vit_scale.models.parameters import named

    left, right = (named(pretrained.load_model(r.workdir).params) for r in (run, other))
    return max(float(np.abs(np.asarray(left[n]) - np.asarray(right[n])).max()) for n in right)


class References:
    """The undisturbed runs that others than the plain one are compared with, made at first use."""

    # NaN once, and skipped; and four in a row: the run goes back past them.
    NAN: ClassVar = {"once": [9], "often": [13, 14, 15, 16]}

    def __init__(self, folder: pathlib.Path, data, hosts: int, objective: str = ""):
        self.arguments, self.objective = (folder, data, hosts), objective
        self.runs: dict[str, Run] = {}
        self.lock = threading.Lock()  # of --jobs

    def __getitem__(self, name: str) -> Run:
        folder, data, hosts = self.arguments
        with self.lock:
            if name not in self.runs:
                kind = kind_of("sgd" if name == "sgd" else "adamw", self.objective)
                nan = self.NAN.get(name, ())
                self.runs[name] = undisturbed(folder / name, data, hosts, nan, kind)
        return self.runs[name]


def schedule(number: int, args, folder: pathlib.Path, whole: Run, others: References) -> dict:
    """One schedule; what it did, and "failed" where it did not hold."""
    draw = random.Random(f"{args.seed}/{number}")
    turn = number if args.in_turn else None
    kinds = [
        draw.choice(args.faults) for _ in range(1 if args.in_turn else draw.choice((1, 2, 2, 3)))
    ]
    reference = whole
    if "hosts" in kinds:
        reference = others["sgd"]
    elif "nan" in kinds:
        reference = others[draw.choice(("once", "often"))]
        kinds = [kind for kind in kinds if kind != "nan"] or ["sigkill"]
    lasting, exact = phases(whole), True
    place = folder / f"{number:04}"
    run = Run(place, whole.data, args.hosts, reference.nan, reference.kind)
    if run.nan:
        run.struck.append({"fault": "nan", "phase": f"batches {run.nan}"})
    began = time.monotonic()
    try:
        for kind in kinds:
            if kind == "hosts":
                run.hosts, exact = 1 if run.hosts > 1 else args.hosts, False
                run.struck.append({"fault": "hosts", "phase": str(run.hosts)})
                kind = "sigkill"
            signal_kind = "sigkill" if kind in DAMAGE else kind
            fault = moment(draw, lasting, signal_kind, turn)
            if kind in DAMAGE:  # late enough that there is something to damage
                fault["phase"], fault["nth"] = "train", draw.randrange(8, len(lasting["train"]))
            if run.hosts > 1:
                fault["process"] = draw.randrange(run.hosts) if kind != "freeze" else 1
            elif signal_kind in ("freeze", "raise"):  # nobody else is there to notice
                fault["kind"] = signal_kind = "sigkill"
            code = run.attempt(fault)
            check_code(run, code, signal_kind, fault.get("process"))
            if kind in DAMAGE and code:
                damage(draw, run, kind)
        while (code := run.attempt()) and len(run.codes) < MOST:
            raise Failed(f"undisturbed, it ends with {code}: {run.errors()[-500:]}")
        check_rows(run)
        check_result(run, reference, exact and run.hosts == args.hosts)
        failed = None
        shutil.rmtree(run.folder)
    except Failed as error:
        failed = f"{error} (left in {run.folder})"
    return {
        "schedule": number,
        "faults": [f"{row['fault']} in {row['phase']}" for row in run.struck],
        "codes": run.codes,
        "seconds": round(time.monotonic() - began, 1),
        "failed": failed,
    }


def damage_and_restore(number: int, seed: int, folder: pathlib.Path, whole: Run) -> dict:
    """Damage a copy of the undisturbed run, and restore it."""
    from vit_scale import config
    from vit_scale.checkpoint import Checkpoints, read_manifest
    from vit_scale.checkpoint.integrity import fingerprints
    from vit_scale.training.setup import make_setup

    draw = random.Random(f"{seed}/{number}")
    kind = "bitflip" if number % 3 else draw.choice(("truncate", "remove"))
    run = Run(folder / f"{number:04}", whole.data, 1)
    shutil.copytree(whole.workdir, run.workdir)
    written = {int(f.name): read_manifest(f)["arrays"] for f in run.checkpoints()}
    newest = max(written)
    damage(draw, run, kind)
    state = make_setup(config.load(str(CONFIG))).state._asdict()
    with Checkpoints(run.workdir) as checkpoints:
        step, trees = checkpoints.recover(state)
    exact = fingerprints(trees) == written[step]
    outcome = "harmless" if step == newest else "seen"
    shutil.rmtree(run.folder)
    return {
        "schedule": number,
        "faults": [f"{kind}, {outcome if exact else 'silent'}"],
        "codes": [],
        "failed": None if exact else f"{run.struck}: other values were restored",
    }


def kind_of(optimizer: str, objective: str) -> str:
    """The argument of soak_config.py."""
    return f"{optimizer},{objective}" if objective else optimizer


def undisturbed(folder: pathlib.Path, data, hosts: int, nan=(), kind="adamw") -> Run:
    run = Run(folder, data, hosts, nan, kind)
    if code := run.attempt():
        raise SystemExit(f"the undisturbed run ends with {code}:\n{run.errors()}")
    return run


def summarise(done: list[dict]) -> dict:
    struck = collections.Counter(
        fault if fault.startswith("sig") else fault.partition(" in ")[0]
        for row in done
        for fault in row["faults"]
    )
    failed = [row for row in done if row["failed"]]
    codes = collections.Counter(code for row in done for code in row["codes"])
    return {
        "schedules": len(done),
        "held": len(done) - len(failed),
        "faults": dict(sorted(struck.items())),
        "exit_codes": dict(sorted(codes.items())),
        "failed": failed,
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-turn", action="store_true", help="one fault each, phase by phase")
    parser.add_argument("--damage", type=int, help="instead: damage and restore, so many times")
    parser.add_argument("--faults", help=f"of {','.join(dict.fromkeys(ONE + SEVERAL))}")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--objective", default="", help="mae, dino or lejepa")
    parser.add_argument("--jobs", type=int, default=1, help="schedules at the same time")
    parser.add_argument("--folder", type=pathlib.Path, help="where to work; a new one if not given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    known = ONE if args.hosts == 1 else SEVERAL
    args.faults = args.faults.split(",") if args.faults else list(known)
    if unknown := set(args.faults) - set(known):
        parser.error(
            f"--faults {','.join(sorted(unknown))}: with {args.hosts} hosts {','.join(known)}"
        )
    folder = args.folder or pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
    data = folder / "data"
    kind = kind_of("adamw", args.objective)
    whole = undisturbed(folder / "whole", data, args.hosts, kind=kind)
    if args.damage:
        rows = (damage_and_restore(n, args.seed, folder, whole) for n in range(args.damage))
        return report(list(rows), args.json)
    others = References(folder, data, args.hosts, args.objective)
    done = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        numbers = range(args.first, args.first + args.schedules)
        for row in pool.map(lambda n: schedule(n, args, folder, whole, others), numbers):
            done.append(row)
            how = row["failed"] or "holds"
            codes = ", ".join(map(str, row["codes"]))
            print(
                f"{row['schedule']:4} {how}: {', '.join(row['faults'])}; exit codes {codes}",
                file=sys.stderr,
                flush=True,
            )
    return report(done, args.json)


def report(done: list[dict], as_json: bool) -> int:
    result = summarise(done)
    print(json.dumps(result) if as_json else json.dumps(result, indent=2))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
