"""A model trained by timm's own training script, for a number of CPU minutes, to compare with ours.

    PYTHONPATH=PEERS python -m benchmarks.timm_training --clone TIMM --data .data/cifar10-jpeg \\
        --minutes 280 --out results/cifar10/timm-vit -- --model vit_tiny_patch16_224 --lr 1e-3 ...

Everything after `--` goes to TIMM/train.py; PEERS has torch and timm. One epoch, in a folder of its
own, is timed to choose how many fit; the number is stored, so that the same command resumes a
run that was stopped. The CPU time is that of the process and its loader's, read while they run.
Writes OUT/report.json: the flags, CPU seconds, and the accuracy on the test split of each
evaluation, after every third epoch and the last.
"""

import argparse
import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from vit_scale.errors import UserError
from vit_scale.runs.json_files import read_json, write_json

EVALUATE = 3  # epochs from one evaluation on the test split, and checkpoint, to the next
FIXED = (
    *("--device", "cpu", "--workers", "1", "--no-prefetcher", "--train-split", "train"),
    *("--val-split", "test", "--log-interval", "100000", "--checkpoint-hist", "1"),
    *("--val-interval", str(EVALUATE)),
)
POLL = 5.0  # seconds between readings of the CPU time
TICK = os.sysconf("SC_CLK_TCK")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or resume that, and write the report. Raises UserError where timm's script fails."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    args, flags = parse(words[:split]), words[split + 1 :]
    if (args.out / "report.json").exists():
        raise UserError(f"{args.out} has a report.json: give another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    state, told = args.out / "state.json", {"minutes": args.minutes, "flags": flags}
    content = read_json(state) if state.exists() else {**told, **calibrate(args, flags), "cpu": 0.0}
    if {key: content[key] for key in told} != told:
        raise UserError(f"{args.out} has a run with other flags or --minutes: give another --out")
    write_json(state, content)
    train(args, [*flags, "--epochs", str(content["epochs"])], "run", content, state)
    write_report(args, flags, content)
    return 0


def calibrate(args, flags: Sequence[str]) -> dict[str, float]:
    """Return the CPU seconds of start-up, of an epoch and of an evaluation; and how many epochs."""
    shutil.rmtree(args.workdir / "calibration", ignore_errors=True)
    seen = {"cpu": 0.0}
    train(args, [*flags, "--epochs", "1", "--warmup-epochs", "0"], "calibration", seen)
    start, epoch = seen["Train: "], seen["Test: "] - seen["Train: "]
    evaluation = seen["cpu"] - seen["Test: "]
    epochs = int((60 * args.minutes - start) / (epoch + evaluation / EVALUATE))
    return {"start": start, "epoch": epoch, "evaluation": evaluation, "epochs": max(2, epochs)}


def parse(words: Sequence[str]) -> argparse.Namespace:
    text = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timm_training", description=text)
    path = pathlib.Path
    parser.add_argument("--clone", type=path, required=True, help="clone of timm, with train.py")
    parser.add_argument("--data", type=path, required=True, help="folder of train/ and test/")
    parser.add_argument("--minutes", type=float, required=True, help="CPU time to spend")
    parser.add_argument("--out", type=path, required=True, help="folder of the report")
    parser.add_argument("--workdir", type=path, help="folder of timm's files (default: OUT/timm)")
    args = parser.parse_args(words)
    args.workdir = args.workdir or args.out / "timm"
    return args


def train(args, flags: Sequence[str], name: str, content: dict, state=None) -> None:
    """Run timm's script, adding its CPU seconds to `content`, stored in the file `state`.

    Without that file they are also kept as they were when the log first had "Train: " or "Test: ".
    """
    folder = args.workdir / name
    latest = folder / "last.pth.tar"
    resume = ["--resume", str(latest)] if latest.exists() else []
    places = ["--data-dir", str(args.data), "--output", str(args.workdir), "--experiment", name]
    command = [sys.executable, str(args.clone / "train.py"), *FIXED, *places, *flags, *resume]
    folder.mkdir(parents=True, exist_ok=True)
    before = content["cpu"] = content.get("saved", 0.0)  # what was lost is not counted
    written = latest.stat().st_mtime if resume else None
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            content["cpu"] = before + cpu_seconds(process.pid)
            if latest.exists() and latest.stat().st_mtime != written:
                written, content["saved"] = latest.stat().st_mtime, content["cpu"]
            if state:
                write_json(state, content)
            else:
                printed = (folder / "log.txt").read_text()
                for word in ("Train: ", "Test: "):
                    if word in printed:
                        content.setdefault(word, content["cpu"])
            time.sleep(POLL if state else min(POLL, 0.2))
    if process.returncode:
        raise UserError(f"timm's script failed with {process.returncode}; see {folder}/log.txt")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its children, user and system; 0 once it has ended."""
    folder = pathlib.Path(f"/proc/{pid}")
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        children = (folder / "task" / str(pid) / "children").read_text().split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICK + sum(map(cpu_seconds, map(int, children)))


def write_report(args, flags: Sequence[str], content: dict) -> None:
    """Write OUT/report.json from timm's summary."""
    with open(args.workdir / "run" / "summary.csv", newline="") as file:
        # A resumed run adds a header, and may repeat an epoch.
        rows = {row["epoch"]: row for row in csv.DictReader(file) if row["epoch"] != "epoch"}
    accuracies = {int(epoch) + 1: float(row["eval_top1"]) / 100 for epoch, row in rows.items()}
    report = {
        "peer": "timm, train.py",
        "version": version(args.clone),
        "minutes": args.minutes,
        "flags": list(flags),
        "epochs": content["epochs"],
        "cpu": content["cpu"],
        "curve": list(accuracies.items()),  # (epochs, accuracy)
        "eval": {
            "split": "test",
            "accuracy": accuracies[content["epochs"]],
            "n": count(args.data / "test"),
        },
    }
    write_json(args.out / "report.json", report)
    print(json.dumps({key: report[key] for key in ("epochs", "cpu", "eval")}))


def version(clone: pathlib.Path) -> str:
    return (clone / "timm" / "version.py").read_text().split("'")[1]


def count(folder: pathlib.Path) -> int:
    return sum(1 for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
