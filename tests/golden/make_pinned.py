"""Write tests/golden/pinned: a run that stopped halfway, and what becomes of it.

    python tests/golden/make_pinned.py          of the commit that is checked out

Commit c062dd0 wrote what is checked in: every later commit has to read, resume, evaluate and export
such a run. `expected.npz` holds what c062dd0 made of it. Only a commit that changes rounding on
purpose makes that anew, by `make_pinned.py expected`, and says why; the run itself stays.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image

import vit_scale
from vit_scale import checkpoint, config
from vit_scale.distributed import preemption
from vit_scale.distributed.preemption import Preempted
from vit_scale.models.parameters import named
from vit_scale.pretrained import load_model
from vit_scale.runs import watchdog
from vit_scale.training import trainer

HERE = pathlib.Path(__file__).resolve().parent / "pinned"
STOP = 6  # of 12 steps
CLASSES = ("crane", "derrick", "eel")


def write_data(top: pathlib.Path) -> None:
    """Noise around the colour of a class, of several sizes, none of them square."""
    draw = np.random.RandomState(20261129)
    palette = draw.randint(48, 208, (len(CLASSES), 3))
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(CLASSES):
            folder = top / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = 16 + 2 * draw.randint(1, 5), 16 + 3 * draw.randint(0, 4)
                noise = draw.randint(-48, 48, (height, width, 3))
                pixels = np.clip(palette[label] + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png", optimize=True)


def write_run(workdir: pathlib.Path) -> None:
    """Train to STOP as the command line does, and stop as SIGTERM does."""
    cfg = config.load(str(HERE / "config.py"))
    asked = preemption.requested
    preemption.requested = lambda: reached(STOP)
    try:
        trainer.train(cfg, workdir, "pinned", quiet=True)
    except Preempted:
        pass
    finally:
        preemption.requested = asked


def reached(step: int) -> bool:
    """Whether the training of this process has finished `step`."""
    return watchdog._current is not None and watchdog._current.step >= step


def clean(run: pathlib.Path) -> None:
    """Leave nothing of the machine and the moment."""
    shutil.rmtree(run / "heartbeats")
    (run / ".lock").unlink()
    for file in run.rglob("commit_success.txt"):
        file.write_text(file.read_text().replace(str(run), "run"))


def resumed(run: pathlib.Path) -> dict[str, np.ndarray]:
    """Parameters and their average at the end of `run`, which is resumed here."""
    done = trainer.train(config.load(str(HERE / "config.py")), run, "pinned", quiet=True)
    step = run / checkpoint.FOLDER / str(done["step"])
    params = load_model(run).params  # of the same shapes, and of this device
    found = checkpoint.read(step, {"params": params, "ema": params})
    return {name: np.asarray(leaf) for name, leaf in named(found).items()}


def images() -> np.ndarray:
    return np.random.RandomState(1).randint(0, 256, (4, 16, 16, 3)).astype(np.uint8)


def evaluate(run: pathlib.Path) -> dict:
    command = [sys.executable, "-m", "vit_scale.cli", "eval", str(run), "--split", "val", "--json"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def expected(scratch: pathlib.Path) -> dict[str, np.ndarray]:
    """Everything that is compared, of a copy of the pinned run in `scratch`."""
    run = scratch / "run"
    shutil.copytree(HERE / "run", run)
    os.chdir(HERE)
    predictor = vit_scale.load(run)
    photo = predictor.top(HERE / "data/val/eel/0.png", k=3)
    measured = evaluate(run)
    found = {
        "probabilities": predictor(images()),
        "photo": np.array([dict(photo)[name] for name in CLASSES]),
        "eval": np.array([measured[key] for key in ("n", "accuracy", "loss")]),
    }
    found |= {f"given/{k}": np.asarray(v) for k, v in named(predictor.params).items()}
    found |= {f"resumed/{name}": array for name, array in resumed(run).items()}
    report = json.loads((run / "report.json").read_text())["eval"]
    for key, result in (("last", report), ("best", report["best"])):
        found[f"report/{key}"] = np.array([result[k] for k in ("step", "n", "accuracy", "loss")])
    return found


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    scratch = HERE / "scratch"
    if sys.argv[1:] != ["expected"]:
        for name in ("data", "run"):
            shutil.rmtree(HERE / name, ignore_errors=True)
        write_data(HERE / "data")
        os.chdir(HERE)
        write_run(HERE / "run")
        clean(HERE / "run")
    try:
        np.savez_compressed(HERE / "expected.npz", **expected(scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
