"""Self-supervised runs report nearest neighbours at the usual times, and lose nothing by it."""

import json

import pytest

from tests.helpers.objectives import SELF_SUPERVISED
from tests.helpers.tiny import SIZES
from tests.laws.test_laws import Killed, final_state, losses, rows, same_bits
from vit_scale import api, cli
from vit_scale.errors import UserError
from vit_scale.training import feature_measure

FIELDS = (
    *SIZES,
    *SELF_SUPERVISED["mae"],
    *("data.batch=16", "eval.batch=24", "steps=6", "optim.lr=3e-3", "eval.every=3"),
    *(
        "eval.probe=knn",
        "data.train=train[:96]",
        "eval.split=train[96:160]",
        "eval.final=test[:40]",
    ),
    *("log.wandb=False", "log.tensorboard=False", "log.every=1", "checkpoint.programs=False"),
)


def command(cifar, run, *more: str) -> list[str]:
    fields = [f"--config.{item}" for item in (*FIELDS, f"data.path={cifar}", *more)]
    return ["train", "--config", "vit_tutorial_cifar", *fields, "--workdir", str(run), "--quiet"]


PLAIN = ("augment.mixup=0", "augment.cutmix=0", "augment.smoothing=0", "model.dropout=0")


@pytest.fixture(scope="module")
def run(cifar, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed") / "run"
    assert cli.main(command(cifar, folder, *PLAIN)) == 0
    return folder


def test_the_report_has_what_probe_measures(run):
    report = json.loads((run / "report.json").read_text())
    probed = api.probe(run, split="test[:40]", only=["knn"], quiet=True)["knn"]
    last = report["eval"]
    assert {name: last[name] for name in ("accuracy", "n")} == {
        name: probed[name] for name in ("accuracy", "n")
    }
    assert last["n"] == 40 and last["interval"] == list(probed["interval"])
    measured = {row["step"]: row["eval/accuracy"] for row in rows(run) if "eval/accuracy" in row}
    assert measured.keys() == {3, 6}
    chosen = last["best"]["step"]
    assert measured[chosen] == max(measured.values())
    assert last["best"]["selected_by"]["accuracy"] == measured[chosen]
    described = json.loads((run / "run.json").read_text())
    assert described["data"]["sets"]["bank"]["images"] == 96
    assert described["classes"] == []
    assert not [name for row in rows(run) for name in row if "train/accuracy" in name]


def test_killed_while_features_are_computed_nothing_is_lost(run, cifar, tmp_path, monkeypatch):
    folder, extract = tmp_path / "run", feature_measure.Extract.__call__
    calls = iter(range(100))

    def killed(self, params, source):
        if next(calls) == 1:  # of the bank, after the features of the held-out images
            raise Killed
        return extract(self, params, source)

    with monkeypatch.context() as patch:
        patch.setattr(feature_measure.Extract, "__call__", killed)
        with pytest.raises(Killed):
            cli.main(command(cifar, folder, *PLAIN))
    assert not any("eval/accuracy" in row for row in rows(folder))
    assert cli.main(command(cifar, folder, *PLAIN)) == 0
    same_bits(final_state(folder), final_state(run))
    assert losses(folder) == losses(run)
    for name in ("eval/accuracy", "final/accuracy"):
        assert [row[name] for row in rows(folder) if name in row] == [
            row[name] for row in rows(run) if name in row
        ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.bank=train", "eval.split=train[96:160] shares images with the neighbours"),
        ("eval.probe=kn", "eval.probe='kn' is unknown; did you mean knn"),
        ("eval.probe=", "set eval.probe=knn, or both to ''"),
    ],
)
def test_probes_that_cannot_work_are_refused(cifar, tmp_path, capsys, override, message):
    assert cli.main(command(cifar, tmp_path / "run", *PLAIN, override)) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_without_a_head_is_not_evaluated(run):
    with pytest.raises(UserError, match="vit-scale probe measures its features"):
        api.evaluate(run, "test", quiet=True)
