"""A run's folder, written by one process at a time, from its description to its report.

    run.json         resolved config, class names, data, versions, git state; written first
    report.json      the results; written once, last
    checkpoints/     STEP/: arrays, manifest and selection.json (checkpoint/)
    base/            0/: the frozen parameters, if checkpoints leave them out (checkpoint.frozen)
    extended/        STEPS/: what an extension to more steps replaced (extension.py)
    damaged/         checkpoints that failed verification (checkpoint/)
    metrics.jsonl    a row of metrics per line (tracking/writers.py)
    tensorboard/     event files (tracking/writers.py)
    profile/         traces of steps, for xprof (tracking/profiler.py)
    wandb/           Weights & Biases' own files (tracking/wandb_writer.py)
    wandb_id.txt     the id of its Weights & Biases run, for resuming
    rollbacks.json   where training diverged and went back (rollbacks.py)
    heartbeats/      PROCESS.json: step, phase and final status of each process (watchdog.py)
    goodput.json     the seconds of each attempt by phase (goodput.py)
    programs/        compiled programs, on accelerators (compilation_cache.py)
    features/        cached features of `vit-scale probe` (evaluation/cache.py)
    inspect/         the page of `vit-scale inspect`; compare/ for several runs (inspect/)
    .lock            held by the process that writes here (lock.py)

The folder alone is enough to load, evaluate, predict and export. If it is in a bucket (`gs://`),
Weights & Biases' own files stay on the disk of the machine that trains (`cache.local`).
"""

import os

from vit_scale.distributed import multihost
from vit_scale.runs.extension import extend
from vit_scale.runs.json_files import read_json, write_json
from vit_scale.runs.lock import Lock
from vit_scale.runs.resume import check_same_config, check_same_data
from vit_scale.storage import paths


class Run:
    """A context manager that holds the folder `workdir`, locked by process 0 for all hosts.

    `report` is the content of report.json, None until the run has finished.

    Raises UserError where the folder can't be made or written, where another live process holds it,
    where it holds a run with a different config or different data, and where the hosts don't share
    it.
    """

    def __init__(self, workdir: str | os.PathLike, description: dict):
        self.path = paths.parse(workdir)
        self.description = description
        self.report: dict | None = None
        self._lock = Lock(self.path)

    def __enter__(self) -> "Run":
        try:
            with multihost.shared_errors():
                if multihost.is_first():
                    self._lock.acquire()
                    self._claim()
            multihost.check_shared(self.path)
            with multihost.shared_errors():
                self.report = self._read_report()
            self.report = multihost.broadcast(self.report)
        except BaseException:  # Ctrl-C as well: a run that was not entered must hold no lock
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        if multihost.is_first():
            self._lock.release()

    def _claim(self) -> None:
        """Write run.json, or check that this config and data continue the run that is there.

        A larger number of steps extends it.
        """
        path = self.path / "run.json"
        if not path.exists():
            write_json(path, self.description)
            return
        extend(self.path, self.description)
        stored = read_json(path)
        check_same_config(self.path, stored, self.description)
        if not (self.path / "report.json").exists():  # a finished run reads no data
            check_same_data(self.path, stored, self.description)

    def _read_report(self) -> dict | None:
        path = self.path / "report.json"
        return read_json(path) if multihost.is_first() and path.exists() else None

    def write_report(self, content: dict) -> None:
        """Write report.json, which marks the run as finished."""
        with multihost.shared_errors():
            if multihost.is_first():
                write_json(self.path / "report.json", content)
        self.report = content
