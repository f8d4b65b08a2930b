"""The short version of soak.py: a few schedules of it, chosen to meet every kind of fault."""

import json
import pathlib

import pytest

from tests.helpers import soak


def soaked(tmp_path: pathlib.Path, capsys, *arguments: str) -> dict:
    folder = tmp_path / "soak"
    code = soak.main([*arguments, "--folder", str(folder), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert code == (1 if result["failed"] else 0)
    return result


@pytest.mark.slow
def test_nothing_is_lost(tmp_path, capsys):
    """With this seed the one schedule draws each of these faults once."""
    faults = "sigkill,sigterm,bitflip"
    result = soaked(tmp_path, capsys, "--schedules", "1", "--seed", "21", "--faults", faults)
    assert result["failed"] == [] and result["held"] == 1
    assert set(result["exit_codes"]) <= {"0", "42", "137"}


@pytest.mark.slow
@pytest.mark.parametrize("hosts", ["1", "2"])
def test_nothing_is_lost_in_the_long_run(tmp_path, capsys, hosts):
    result = soaked(tmp_path, capsys, "--schedules", "30", "--seed", "1", "--hosts", hosts)
    assert result["failed"] == [] and result["held"] == 30


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mae", "dino", "lejepa"])
def test_nothing_is_lost_without_labels(tmp_path, capsys, objective):
    """Teachers, centres and probes included."""
    fields = ("--schedules", "20", "--seed", "3", "--objective", objective)
    result = soaked(tmp_path, capsys, *fields)
    assert result["failed"] == [] and result["held"] == 20


def test_the_soak_sees_what_is_lost(tmp_path):
    """A run that differs, by an array, a step or a result, does not hold."""

    def run(name, arrays, accuracy, steps):
        made = soak.Run(tmp_path / name, tmp_path / "data", 1)
        folder = made.workdir / "checkpoints" / str(soak.STEPS) / "manifest"
        folder.mkdir(parents=True)
        (folder / "metadata").write_text(json.dumps({"arrays": arrays}))
        (made.workdir / "report.json").write_text(json.dumps({"eval": {"accuracy": accuracy}}))
        rows = [{"step": step, "train/loss": 1.0} for step in steps]
        rows.append({"step": soak.STEPS, "eval/accuracy": accuracy})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (made.workdir / "metrics.jsonl").write_text(text)
        return made

    steps = list(range(1, soak.STEPS + 1))
    whole = run("whole", {"params/a": "x", "params/b": "y"}, 0.5, steps)
    soak.check_rows(whole)
    soak.check_result(whole, whole, exact=True)
    for other, what in [
        (run("bit", {"params/a": "x", "params/b": "z"}, 0.5, steps), "params/b"),
        (run("less", {"params/a": "x"}, 0.5, steps), "params/b"),
        (run("result", {"params/a": "x", "params/b": "y"}, 0.4, steps), "0.4"),
    ]:
        with pytest.raises(soak.Failed, match=what):
            soak.check_result(other, whole, exact=True)
    for wrong in (steps[1:], [*steps, 24], [1, *steps]):
        with pytest.raises(soak.Failed, match=r"steps in metrics.jsonl"):
            soak.check_rows(run(f"rows-{len(wrong)}-{wrong[0]}-{wrong[1]}", {}, 0.5, wrong))
