"""What the measurements share: how one describes itself, works in pieces, and leaves one JSON file.

A piece ends after --minutes, by SIGKILL: the same command then resumes from the last checkpoint,
and what comes out is what an undisturbed run gives, bit for bit. A result carries a
fingerprint of the script and the configs that it came from, so that the listing knows an outdated
one, and a work folder of theirs is not continued with others.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from vit_scale import config
from vit_scale.errors import DONE, RESUMABLE, UserError
from vit_scale.models import convnets
from vit_scale.runs.json_files import read_json, write_json

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "benchmarks"

# How a benchmark is watched; none of it changes what is computed.
WATCHED = ("log.wandb=False", "log.tensorboard=False", "log.images=0", "log.every=200")
# The same script in seconds on a CPU. What comes out means nothing.
TOY = (
    "steps=4",
    "data.batch=16",
    "data.workers=0",
    "optim.warmup=1",
    "eval.every=0",
    "eval.batch=500",
    "checkpoint.every=2",
    "log.every=1",
)
TOY_VIT = ("model.width=16", "model.depth=1", "model.heads=2", "model.mlp=32")
TOY_CONVNET = ("model.width=4",)


def toy(config_name: str) -> tuple[str, ...]:
    """What makes a config a toy."""
    convnet = config.load(config_name).model.variant in convnets.SIZES
    return (*TOY, *(TOY_CONVNET if convnet else TOY_VIT))


@dataclasses.dataclass(frozen=True)
class Measurement:
    name: str  # of its module, and of its result's file
    title: str  # what is measured
    data: Mapping[str, str]  # folder wanted in --data: the set in it
    configs: Sequence[str]  # what is trained
    files: Sequence[str]  # what measures, in this folder

    @property
    def command(self) -> str:
        return f"python -m benchmarks.{self.name}"

    @property
    def fingerprint(self) -> str:
        """Of the scripts and the resolved configs: a result with another one is outdated."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update((HERE / file).read_bytes())
        for name in self.configs:
            digest.update(json.dumps(config.to_json(config.load(name)), sort_keys=True).encode())
        return digest.hexdigest()[:16]


class TimeUp(Exception):
    """The piece's minutes are over; nothing that was saved is lost."""


class Session:
    """One piece of a measurement: where its files are, and how long it may go on.

    Raises UserError for a work folder with pieces of another version of the measurement.
    """

    def __init__(self, measurement: Measurement, args: argparse.Namespace):
        self.measurement, self.args = measurement, args
        self.toy: bool = args.toy
        self.data = pathlib.Path(args.data)
        folder = measurement.name + ("-toy" if args.toy else "")
        self.workdir = pathlib.Path(args.workdir or f"runs/benchmarks/{folder}")
        results = self.workdir if args.toy else RESULTS
        self.out = pathlib.Path(args.out or results / f"{measurement.name}.json")
        self.machine: dict = {}  # device, versions, git: as the last training described them
        self._began = time.monotonic()
        self._pieces = {"of": measurement.fingerprint, "toy": args.toy, "seconds": []}
        path = self.workdir / "pieces.json"
        if path.exists():
            earlier, now = read_json(path), self._pieces
            if (earlier["of"], earlier["toy"]) != (now["of"], now["toy"]):
                raise UserError(
                    f"{self.workdir} was begun with another script or config; "
                    "remove it, or give another --workdir"
                )
            self._pieces = earlier
        self._note_pieces(self._pieces["seconds"])

    def _note_pieces(self, seconds: list[float]) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_json(self.workdir / "pieces.json", self._pieces | {"seconds": seconds})

    @property
    def seconds_left(self) -> float:
        """Until the piece has to end."""
        return 60 * self.args.minutes - (time.monotonic() - self._began)

    def train(self, config_name: str, folder: str, *overrides: str) -> dict:
        """Train in WORKDIR/FOLDER, going on where an earlier piece stopped; results and speed.

        Raises TimeUp, and UserError where training fails (it has said why).
        """
        run = self.workdir / folder
        if not (run / "report.json").exists():
            self._train_on(
                config_name, run, (*WATCHED, *overrides, *(toy(config_name) if self.toy else ()))
            )
        report, description = read_json(run / "report.json"), read_json(run / "run.json")
        self.machine = {
            "device": report["devices"],
            "versions": report["versions"],
            "git": description["git"],
        }
        shown = ("step", "parameters", "resolution", "eval")
        return {key: report[key] for key in shown if key in report} | speed(run)

    def _train_on(self, config_name: str, run: pathlib.Path, fields: Sequence[str]) -> None:
        command = [sys.executable, "-m", "vit_scale.cli", "train", "--config", config_name]
        command += ["--workdir", str(run), *(f"--config.{field}" for field in fields)]
        try:
            done = subprocess.run(command, timeout=self.seconds_left)
        except subprocess.TimeoutExpired as error:  # and has been killed
            raise TimeUp from error
        if done.returncode:
            raise UserError(f"training {config_name} failed, see above", done.returncode)

    def end_piece(self) -> list[float]:
        """Note that this piece ends now; the seconds of all pieces."""
        pieces = [*self._pieces["seconds"], round(time.monotonic() - self._began, 1)]
        self._note_pieces(pieces)
        return pieces


def speed(run: pathlib.Path) -> dict[str, float | None]:
    """Medians over a run's rows, all pieces together; None for what no row has (MFU on a CPU)."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("images_per_second", "data_wait_fraction", "mfu")
    columns = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: statistics.median(values) if values else None for name, values in columns.items()}


def main(measurement: Measurement, measure: Callable[[Session], dict]) -> int:
    """Work on a measurement for --minutes; write its JSON if that ends it. The exit code."""
    args = parser(measurement).parse_args()
    try:
        session = Session(measurement, args)
        figures = measure(session)
        session.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(session.out, describe(session, figures))
    except TimeUp:
        total = sum(session.end_piece())
        print(f"{measurement.name}: {total / 60:.1f} minutes; rerun the same command to resume")
        return RESUMABLE
    except UserError as error:
        print(f"{measurement.command}: {error}", file=sys.stderr)
        return error.code
    print(json.dumps(figures, indent=2))
    print(session.out)
    return DONE


def parser(measurement: Measurement) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=measurement.command, description=measurement.title)
    top.add_argument("--toy", action="store_true", help="a few steps of a tiny model: a test")
    top.add_argument("--minutes", type=float, default=9, help="of this piece (default: 9)")
    top.add_argument("--data", default=".data", help="folder with the image sets (default: .data)")
    top.add_argument("--data-note", default="CIFAR-10", help="what CIFAR-10's files hold")
    top.add_argument("--workdir", help="of its runs (default: runs/benchmarks/NAME)")
    top.add_argument("--out", help="its result (default: in results/benchmarks; a toy's: WORKDIR)")
    return top


def describe(session: Session, figures: dict) -> dict:
    """The content of a result's file."""
    measurement, args = session.measurement, session.args
    pieces = session.end_piece()
    # Not in the command: where that machine's files lay.
    options = ["--minutes", f"{args.minutes:g}", "--data-note", args.data_note]
    command = [*measurement.command.split(), *options, *(["--toy"] if args.toy else [])]
    note = {"CIFAR-10": args.data_note}
    return {
        "measurement": measurement.name,
        "title": measurement.title,
        "toy": session.toy,
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **session.machine,
        "data": [note.get(name, name) for name in measurement.data.values()],
        "pieces": len(pieces),
        "seconds": round(sum(pieces), 1),
        "fingerprint": measurement.fingerprint,
        "figures": figures,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """What repetitions came to."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
