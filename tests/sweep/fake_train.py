"""Stands for `vit-scale train` in the tests of sweeps: the accuracy follows from the fields.

A learning rate of 9 diverges, one of 8 fails, one of 7 is preempted once, one of 6 waits for
SIGTERM, one of 5 is trained by another process, one of 4 waits for a second run beside it, one of
11 dies without a word.
"""

import json
import os
import pathlib
import signal
import sys
import time

EVERY = 10


def main(arguments: list[str]) -> int:
    fields = dict(item[9:].split("=", 1) for item in arguments if item.startswith("--config."))
    folder = pathlib.Path(arguments[arguments.index("--workdir") + 1])
    lr, steps = float(fields["optim.lr"]), int(fields["steps"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calls.txt").open("a").write(" ".join(arguments) + "\n")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    slot = {"cores": cores, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "time": time.time()}
    (folder / "slot.json").write_text(json.dumps(slot))
    if lr == 9:
        print("vit-scale: training diverged")
        return 43
    if lr == 8:
        print("vit-scale: something is wrong")
        return 1
    if lr == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    if lr == 7 and not (folder / "stopped").exists():
        (folder / "stopped").touch()
        print("vit-scale: the disk is full")
        return 42
    if lr == 5:
        print("vit-scale: workdir x is in use by process 7; wait for it")
        return 1
    if lr == 6:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
        (folder / "ready").touch()
        time.sleep(60)
    while lr == 4 and len(list(folder.parent.glob("*/slot.json"))) < 2:
        time.sleep(0.01)  # for the other run, which is beside it
    last = int(arguments[arguments.index("--until") + 1]) if "--until" in arguments else steps
    rows = [
        {"step": step, "eval/accuracy": 1 - abs(lr - 3) / 10 - 1 / (step + 1), "eval/n": 500}
        for step in range(EVERY, last + 1, EVERY)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "checkpoints" / str(last) / "manifest").mkdir(parents=True, exist_ok=True)
    if last == steps:
        report = {"eval": {"split": "test", "accuracy": 0.5, "n": 10}}
        (folder / "report.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
