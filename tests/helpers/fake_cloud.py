"""A fake cloud for tests of the launcher: fakes/gcloud.py on PATH, workers as local processes.

Time runs thirty times faster for the launcher (LAUNCH_TIME_SCALE). The clone that it is started
in has a space in its name, and the trainer is fakes/trainer.py if nothing else is said.
"""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from tests.helpers.fakes.gcloud import CLIENT, Cloud

ROOT = pathlib.Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests/helpers/fakes"
SCALE = 0.03
CONFIG = "tiny"
TRAINER = shlex.join([sys.executable, "-SE", str(FAKES / "trainer.py")])  # paths may hold spaces

UV = """#!/bin/bash
if [[ $1 == venv ]]; then
  folder=${*: -1}
  mkdir -p "$folder/bin"
  ln -sf "$FAKE_PYTHON" "$folder/bin/python"
else
  printf '#!/bin/bash\\nexec %s "$@"\\n' "$FAKE_TRAINER" >"$(dirname "$4")/vit-scale"
  chmod +x "$(dirname "$4")/vit-scale"
fi
"""
DF = """#!/bin/bash
echo Filesystem
echo "fake 0 0 ${FAKE_FREE:-90000000} 0% /"
"""


def script(file: pathlib.Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


@functools.cache
def machine() -> str:
    """Link /usr/bin and /bin into a folder, without the commands of any real cloud.

    Where the fake one can't be run, exec goes on along PATH: a test must not reach another one.
    """
    folder = tempfile.mkdtemp(prefix="vit_scale-tools-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for place in ("/bin", "/usr/bin"):
        for tool in pathlib.Path(place).iterdir():
            if tool.name not in ("gcloud", "gsutil", "bq", "kubectl"):
                with contextlib.suppress(FileExistsError):
                    os.symlink(tool, f"{folder}/{tool.name}")
    return folder


class Ended(NamedTuple):
    code: int
    result: dict  # the last line printed
    err: str


class Rig:
    """A clone and a fake cloud with `hosts` workers per slice, and ways to inspect both."""

    def __init__(self, folder: pathlib.Path, hosts: int = 2, **settings: Any):
        self.folder, self.hosts = folder, hosts
        self.root, self.cloud_folder = folder / "a clone", folder / "cloud"
        self.workdir, self.elsewhere = folder / "work dir", folder / "elsewhere"
        self.bin, self.tools = folder / "bin", folder / "tools"
        for part in (self.cloud_folder, self.workdir, self.elsewhere, self.bin, self.tools):
            part.mkdir(parents=True)
        self._clone()
        for where in (self.bin, self.tools):
            (where / "client.py").write_text(CLIENT)
            started = shlex.join([sys.executable, "-SE", str(where / "client.py")])
            for name in ("gcloud", "ssh"):
                script(where / name, f'#!/bin/bash\nexec {started} "$@"\n')
        script(self.tools / "uv", UV)
        script(self.tools / "df", DF)
        script(self.tools / "sudo", "#!/bin/bash\nexit 1\n")
        self.settings: dict[str, Any] = {
            "project": "p",
            "account": "tester",
            "config": {"project": "p"},
            "hosts": hosts,
            "scale": SCALE,
            "ssh": str(self.bin / "ssh"),
            "quota": 9,
            "no_zone": [],
            "timelines": [["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]],
            "tools": str(self.tools),
            "machine": machine(),
            "profile": {
                "FAKE_TRAINER": TRAINER,
                "FAKE_PYTHON": sys.executable,
            },
            "profiles": {},
            **settings,
        }
        self.cloud = Cloud(self.cloud_folder, self.settings)

    def _clone(self) -> None:
        """Copy what the launcher needs of the project; the fake trainer plays its configs."""
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "launch", self.root / "launch", ignore=ignore)
        (self.root / "configs").mkdir()
        (self.root / "configs" / f"{CONFIG}.py").write_text("# played by the fake trainer\n")
        (self.root / "vit_scale" / "distributed").mkdir(parents=True)
        table = "vit_scale/distributed/accelerators.json"
        for name in ("pyproject.toml", "constraints.txt", table):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / ".venv" / "bin").mkdir(parents=True)
        (self.root / ".venv" / "bin" / "python").symlink_to(sys.executable)
        script(self.root / ".venv" / "bin" / "vit-scale", f'#!/bin/bash\nexec {TRAINER} "$@"\n')

    def set(self, **settings: Any) -> None:
        self.settings.update(settings)

    def inject(self, *faults: dict) -> None:
        """Inject faults into matching calls of gcloud, as fakes/gcloud.py describes."""
        self.cloud.faults = list(faults)

    def profile(self, **variables: str) -> None:
        """Set variables in every worker's environment."""
        self.settings["profile"].update(variables)

    def trainer_faults(self, *faults: dict) -> None:
        self.profile(FAKE_FAULTS=json.dumps(faults))

    # --- the launcher

    def environment(self, **variables: str) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:{machine()}",
            "HOME": str(self.folder),
            "FAKE_GCLOUD": self.cloud.address,
            "LAUNCH_TIME_SCALE": str(SCALE),
            "PYTHON": sys.executable,
            **variables,
        }

    def flags(self) -> list[str]:
        kind = f"--type=v4-{8 * self.hosts}"
        where = ["--name", "vit", kind, "--zone", "us-a", "--spot", "--workdir", str(self.workdir)]
        policy = ["--on-failure", "delete", "--orphan", "0", "--workdir-is-mounted"]
        return ["--config", CONFIG, *where, *policy]

    def start(self, *words: str, **variables: str) -> subprocess.Popen:
        """Start launch/tpu_vm.sh from another folder."""
        return subprocess.Popen(
            [str(self.root / "launch" / "tpu_vm.sh"), *words],
            cwd=self.elsewhere,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def end(self, process: subprocess.Popen, timeout: float = 120) -> Ended:
        out, err = process.communicate(timeout=timeout)
        lines = [line for line in out.splitlines() if line.startswith("{")]
        return Ended(process.returncode, json.loads(lines[-1]) if lines else {}, err)

    def run(self, *more: str, timeout: float = 120, **variables: str) -> Ended:
        """Run `launch/tpu_vm.sh run` with the usual flags and these."""
        return self.end(self.start(*self.flags(), *more, **variables), timeout)

    def verb(self, *words: str, **variables: str) -> subprocess.CompletedProcess:
        process = self.start(*words, **variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    # --- the state of the cloud

    def is_empty(self) -> bool:
        return not self.cloud.nodes and not self.cloud.requests

    def calls(self, verb: str = "") -> list[list[str]]:
        """Return the calls of gcloud whose command line contains `verb`."""
        return [argv for argv in self.cloud.calls if verb in " ".join(argv)]

    def starts(self) -> list[dict]:
        """Return one entry per started trainer: worker, attempt, step."""
        file = self.workdir / "starts.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    def attempts(self) -> dict[int, list[int]]:
        """Return {attempt: workers that started in it}."""
        found: dict[int, list[int]] = {}
        for entry in self.starts():
            found.setdefault(entry["attempt"], []).append(entry["worker"])
        return {attempt: sorted(workers) for attempt, workers in found.items()}

    def run_folder(self) -> pathlib.Path:
        """Return the folder of the clone's one run."""
        (found,) = (self.root / "runs" / "tpu").glob("vit-*")
        return found

    def check(self) -> None:
        """Check the invariants that hold after any sequence of faults."""
        assert not (self.workdir / "DOUBLE").exists(), "two trainers of one worker at a time"
        for workers in self.attempts().values():
            assert len(workers) == len(set(workers)), "a worker has started twice in an attempt"
        steps = [entry["step"] for entry in self.starts()]
        attempts = [entry["attempt"] for entry in self.starts()]
        assert attempts == sorted(attempts)
        assert steps == sorted(steps), "an attempt started before an earlier checkpoint"

    def wait_for(self, condition, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "timed out"
            time.sleep(0.02)

    def close(self) -> None:
        """Kill what still runs on the workers."""
        self.cloud.close()
