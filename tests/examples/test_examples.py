"""The examples run as they are: scripts without a `__main__` guard, and the notebook's code."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "tutorial.ipynb"
MACHINE = re.compile(r"/(?:home|Users|root|tmp|work|usr|opt|mnt)/\w")  # begins a path of a machine


def run_script(file: pathlib.Path, cwd: pathlib.Path, **env: str) -> str:
    """Run a Python file as a user does, in a new process; return what it printed."""
    result = subprocess.run(
        [sys.executable, file],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def metrics(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# Scripts

# Written by every process that executes the script, and by every one that decodes an image.
TOP = 'import os; open("top.txt", "a").write(f"{os.getpid()}\\n")\n'
DECODES = '        open("decode.txt", "a").write(f"{os.getpid()}\\n")\n'


@pytest.mark.slow
def test_custom_dataset_decodes_in_workers_that_do_not_run_the_script_again(tmp_path):
    script = (EXAMPLES / "custom_dataset.py").read_text()
    assert "__main__" not in script.replace('`if __name__ == "__main__"`', "")
    line = "        row = self.rows[index]\n"
    assert line in script and "cfg.data.workers = 2" in script
    (tmp_path / "script.py").write_text(TOP + script.replace(line, DECODES + line))
    output = run_script(tmp_path / "script.py", tmp_path)
    (main,) = (tmp_path / "top.txt").read_text().split()
    readers = set((tmp_path / "decode.txt").read_text().split())
    assert len(readers) >= 2 and main not in readers
    accuracy = float(re.search(r"test accuracy ([\d.]+)% \(n = 60\)", output)[1])
    assert accuracy > 60 and "test/0.png: [('checks'," in output


@pytest.mark.slow
def test_custom_objective_replaces_the_loss(tmp_path):
    output = run_script(EXAMPLES / "custom_objective.py", tmp_path)
    assert re.search(r"test accuracy [\d.]+% \(n = 100\) after 60 steps", output)
    losses = [row["train/loss"] for row in metrics(tmp_path / "runs/custom_objective")
              if "train/loss" in row]  # fmt: skip
    # Five binary losses of about log(2) each; softmax cross-entropy starts at log(5) = 1.6.
    assert 2.0 < losses[0] < 3.5 and losses[-1] < losses[0]


# The notebook


def cells(kind: str) -> list[dict]:
    return [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == kind]


def run_notebook(folder: pathlib.Path, until: str | None = None) -> str:
    """Run the code cells in order as a script, up to the first that contains `until`."""
    sources = ["".join(cell["source"]) for cell in cells("code")]
    if until:
        sources = sources[: [until in source for source in sources].index(True)]
    lines = "\n\n".join(sources).splitlines()
    script = folder / "examples" / "tutorial.py"
    script.parent.mkdir()
    script.write_text("\n".join(line for line in lines if not line.startswith("%")))
    return run_script(script, script.parent, TUTORIAL_TINY="1")


def test_the_notebook_runs_up_to_training(tmp_path):
    output = run_notebook(tmp_path, until="vit_scale.train(")
    assert "after block 4 (1, 65, 96)" in output and "logits" in output


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    output = run_notebook(tmp_path)
    for name in ("vit", "cnn", "vit_48"):
        report = json.loads((tmp_path / "runs/tutorial" / name / "report.json").read_text())
        assert f"{name}: " in output or f"{name:7} " in output
        assert report["eval"]["n"] == 20
    assert "(8, 8, 96) -> (12, 12, 96)" in output


def test_the_notebook_is_committed_with_its_outputs():
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds <= {"stream", "execute_result", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 7
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_the_notebook_names_no_path_of_a_machine():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/png", None)
        match = MACHINE.search(json.dumps(cell))
        assert not match, json.dumps(cell)[match.start() :][:80]
