"""The command line as a user types it: every verb, what it prints, and where it writes."""

import errno
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vit_scale import checkpoint, cli, config, pretrained
from vit_scale.cli import commands, data_commands
from vit_scale.data.cifar import CLASSES
from vit_scale.errors import USAGE, nearest

MEASURED = ("n", "accuracy", "balanced_accuracy", "loss")
HERE = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2])}
TINY = (
    "--config.data.workers=0",
    "--config.data.batch=16",
    "--config.data.resolution=32",
    "--config.model.variant=Ti/16",
    "--config.model.width=32",
    "--config.model.depth=1",
    "--config.model.heads=2",
    "--config.model.mlp=32",
    "--config.model.pool=gap",
    "--config.eval.every=0",
    "--config.eval.batch=16",
    "--config.checkpoint.every=0",
    "--config.log.images=0",
    "--config.log.wandb=false",
    "--config.log.tensorboard=false",
)
PLAIN = "from vit_scale.config import base\n\n\ndef get_config(steps='1000'):\n"
PLAIN += "    cfg = base()\n    cfg.steps = int(steps)\n    return cfg\n"


def learning(jpegs) -> list[str]:
    fields = ("data.name=folder", "data.memory=true", "model.classes=3", "optim.lr=0.01")
    return [f"--config.data.path={jpegs}", *(f"--config.{field}" for field in fields)]


def ran(capsys, *arguments) -> str:
    """Standard output of a command that works."""
    capsys.readouterr()
    code = cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def last(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def learnt(jpegs, tmp_path_factory) -> pathlib.Path:
    """A run that has learnt to tell the colour-coded classes apart."""
    folder = tmp_path_factory.mktemp("learnt")
    (folder / "plain.py").write_text(PLAIN)
    run = folder / "run"
    fields = learning(jpegs)
    arguments = ["train", "--config", f"{folder / 'plain.py'}:80", *TINY, *fields]
    assert cli.main([*arguments, "--workdir", str(run), "--quiet"]) == 0
    return run


# Help


def test_help_lists_the_verbs(run_cli):
    done = run_cli("--help")
    assert done.returncode == 0
    for verb in ("train", "eval", "probe", "predict", "inspect", "show", "plan", "data"):
        assert re.search(rf"^ +{verb} +\w+", done.stdout, re.M), verb
    assert done.stderr == ""


@pytest.mark.parametrize(
    "verb",
    [
        *([verb] for verb in ("train", "eval", "probe", "predict", "inspect", "show", "plan")),
        *(["data", verb] for verb in ("download", "pack")),
    ],
)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: vit-scale {' '.join(verb)}" in capsys.readouterr().out


def test_help_does_not_wait_for_jax():
    """Nor does a mistake in what is typed."""
    code = "import sys, vit_scale.cli as cli; cli.main(['tran']); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"vit-scale {importlib.metadata.version('vit_scale')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "--config", "vit_base_imagenet"],
        ["show", "--config", "vit_base_imagenet", "--json"],
        ["train", "--help"],
    ],
)
def test_output_that_nobody_reads_ends_quietly(arguments):
    """`vit-scale show ... | head -1`: the reader is gone before the first line comes."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vit_scale.cli", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=HERE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_damaged_run_is_one_though_nobody_reads_the_table():
    reader, writer = os.pipe()
    os.close(reader)
    program = """
import sys
from vit_scale import cli
from vit_scale.runs import verify
verify.verify = lambda run: [{"file": f"checkpoints/{n}", "state": "bad"} for n in range(9000)]
sys.exit(cli.main(["verify", "run"]))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=HERE)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr.startswith("vit-scale: run: 9000 of 9000 are damaged")


def test_a_pipe_that_is_not_the_output_is_no_quiet_end(monkeypatch, capsys):
    def broken(*arguments):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(commands, "show", broken)
    assert cli.main(["show", "run"]) == 1
    assert capsys.readouterr().err == "vit-scale: storage: Broken pipe\n"


@pytest.mark.parametrize(
    "verb, arguments, resumes",
    [
        ("train", ["train", "--config", "x"], True),
        ("pack_data", ["data", "pack", "a", "b"], True),
        ("download_data", ["data", "download", "cifar10"], True),
        ("predict", ["predict", "run", "a.png"], False),
        ("evaluate", ["eval", "run"], False),
        ("show", ["show", "run"], False),
        ("inspect", ["inspect", "run"], False),
        ("export", ["export", "run", "--format", "npz", "--out", "x"], False),
        ("convert", ["convert", "x", "y"], False),
        ("verify", ["verify", "run"], False),
    ],
)
def test_ctrl_c_speaks_of_resuming_where_something_resumes(
    monkeypatch, capsys, verb, arguments, resumes
):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(data_commands if verb.endswith("_data") else commands, verb, stop)
    assert cli.main(arguments) == 130
    line = "vit-scale: stopped" + "; rerun the same command to resume" * resumes
    assert capsys.readouterr().err == f"{line}\n"


SHOW, PLAN = ["show", "--config", "quickstart"], ["plan", "--config", "x", "--topology", "v5e:2x2"]


@pytest.mark.parametrize(
    "arguments, flag",
    [
        (["show", "run", "--sharding"], "show RUN has no use for --sharding"),
        (["show", "run", "--devices", "4"], "show RUN has no use for --devices"),
        (["show", "run", "--config.steps=4"], "show RUN takes no --config.steps=4"),
        (["show", "run", "--json", "--markdown"], "show --json has no use for --markdown"),
        ([*SHOW, "--markdown"], "show --config has no use for --markdown"),
        ([*PLAN, "--compare", "a=1", "--fit"], "plan --compare has no use for --fit"),
        (["eval", "run", "--config.model.depth=4"], "eval has no use for --config.model.depth"),
        (["eval", "run", "--config.optim.lr=1"], "eval has no use for --config.optim.lr"),
        (["eval", "run", "--config.augment.flip=True"], "no use for --config.augment.flip"),
        (["eval", "run", "--config.data.train=train"], "no use for --config.data.train"),
        (["eval", "run", "--config.eval.split=val"], "--config.eval.split; give --split"),
        (["eval", "run", "--split=val", "--config.eval.final=a"], "--split val or --config.eval"),
        (["eval", "run", "--config.model.heads=2"], "model.heads: vit-scale convert makes a run"),
        (
            [
                "average",
                "c",
                "a",
                "b",
                "--greedy",
                "--split",
                "val",
                "--config.init.resample=cubic",
            ],
            "average has no use for --config.init.resample",
        ),
        (["convert", "x.npz", "--list", "--config.optim.lr=1"], "no use for --config.optim.lr"),
        (["inspect", "run", "--config.mesh.data=2"], "inspect has no use for --config.mesh.data"),
        (["inspect", "run", "--config.steps=2"], "inspect has no use for --config.steps"),
        (["inspect", "run", "--config.data.batch", "2"], "no use for --config.data.batch"),
        (["predict", "run", "a.png", "--config.steps=2"], "predict takes no --config.steps=2"),
        (
            ["sweep", "--config", "x", "--commands", "--json"],
            "sweep --commands has no use for --json",
        ),
        (
            ["sweep", "--config", "x", "--wandb", "--compare"],
            "sweep --wandb has no use for --compare",
        ),
        (
            ["sweep", "--config", "x", "--json", "--markdown"],
            "sweep --json has no use for --markdown",
        ),
        (["sweep", "--config", "x", "--seed", "3"], "--seed is of --random: give both"),
        (["data", "pack", "a", "b", "--workers", "0"], "'0' is not a positive integer"),
        (
            ["data", "pack", "a", "b", "--quality", "80"],
            "--quality 80 is of images that are reduced",
        ),
    ],
)
def test_what_a_verb_would_ignore_is_refused(arguments, flag, capsys):
    """Before anything is read: there is no such run."""
    assert cli.main(arguments) == USAGE
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and flag in err


def test_a_field_that_there_is_not_is_not_one_that_is_ignored(learnt, capsys):
    assert cli.main(["eval", str(learnt), "--config.eval.bach=4"]) == USAGE
    assert "no config field is named 'eval.bach'; did you mean eval.batch?" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "name, says",
    [
        ("optim.lrr", "did you mean optim.lr?"),
        ("optm.lr", "did you mean optim.lr?"),
        ("model.lr", "did you mean optim.lr?"),
        ("batch", "did you mean data.batch or eval.batch?"),
        ("model.dept", "did you mean model.depth?"),
        ("data.fractal.clases", "did you mean data.fractal.classes?"),
        ("optim.zzz", "valid: optim.accumulate, optim.b1, optim.b2, optim.clip"),
        ("log.quantity", "valid: log.every, log.images, log.profile"),
        (
            "nonsense",
            "valid: augment.*, checkpoint.*, class_weights.*, data.*, dino.*, distill.*, diver",
        ),
    ],
)
def test_suggestions_are_near(name, says):
    assert nearest(name, config.fields(config.base())).startswith(says)


@pytest.mark.parametrize(
    "name, valid, says",
    [
        ("cosin", ["constant", "cosine", "linear"], "did you mean cosine?"),
        ("center", ["none", "pad", "resized"], "valid: none, pad, resized"),
        ("mean", ["cls", "gap", "map"], "valid: cls, gap, map"),
        ("validation", ["train", "test"], "valid: test, train"),
        ("flash", ["xla", "cudnn"], "valid: cudnn, xla"),
    ],
)
def test_suggestions_for_values_are_near(name, valid, says):
    assert nearest(name, valid) == says


def test_a_run_that_evaluates_nothing_needs_a_split(learnt, capsys, monkeypatch):
    read = pretrained.load_model

    def without_final(source):
        found = read(source)
        found.cfg.eval.final = ""
        return found

    monkeypatch.setattr(pretrained, "load_model", without_final)
    assert cli.main(["eval", str(learnt)]) == USAGE
    assert capsys.readouterr().err == (
        f"vit-scale: {learnt} has no eval.final split: give a split, such as test (--split test)\n"
    )
    assert cli.main(["eval", str(learnt), "--split", "test", "--json"]) == 0
    assert last(capsys.readouterr().out)["split"] == "test"


# show --config


def shown(capsys, *arguments) -> dict:
    return last(ran(capsys, "show", *arguments, "--json"))


def test_show_a_config_is_exact(capsys):
    content = shown(capsys, "--config", "vit_small_imagenet")
    assert set(content) == {
        *("parameters", "tokens", "flops_per_image", "global_batch", "steps", "config")
    }
    assert content["parameters"] == 22_050_664 - 384  # timm's: its [CLS] has a position as well
    assert content["tokens"] == 14 * 14 + 1
    assert content["global_batch"] == content["config"]["data"]["batch"] == 1024
    assert content["steps"] == content["config"]["steps"]
    # DeiT-S is 4.6 GMACs forward, less what nobody reads of its last block: all but [CLS] of the
    # queries, attention, its output and the MLP. A MAC is two FLOPs, a step three forward passes.
    unread = 196 * (2 * 384**2 + 2 * 197 * 384 + 2 * 384 * 1536)
    assert content["flops_per_image"] == pytest.approx(6 * (4.61e9 - unread), rel=0.005)
    assert content["config"]["model"]["variant"] == "S/16"
    assert (
        config.fields(config.from_json(content["config"])).keys()
        == config.fields(config.base()).keys()
    )


@pytest.mark.parametrize(
    ("variant", "millions"), [("Ti", 5.72), ("S", 22.05), ("B", 86.57), ("L", 304.33)]
)
def test_the_sizes_of_the_papers(variant, millions, capsys):
    """Patch 16, 224 px, 1000 classes, [CLS] (DeiT and ViT; timm counts the same)."""
    name = {"Ti": "tiny", "S": "small", "B": "base", "L": "large"}[variant]
    content = shown(capsys, "--config", f"vit_{name}_imagenet", "--config.model.pool=cls")
    assert content["config"]["model"]["variant"] == f"{variant}/16"
    assert content["config"]["data"]["resolution"] == 224
    assert round(content["parameters"] / 1e6, 2) == millions


def test_show_as_text_names_every_field(capsys):
    out = ran(capsys, "show", "--config", "vit_tiny_cifar", "--config.optim.lr=0.03")
    assert re.search(r"^config\.optim\.lr +0\.03$", out, re.M)
    names = {line.split()[0] for line in out.splitlines()}
    assert {f"config.{field}" for field in config.fields(config.base())} <= names


@pytest.mark.parametrize("name", config.names())
def test_every_config_shows(name, capsys):
    assert shown(capsys, "--config", name)["parameters"] > 1e5


# --config and overrides


def test_a_config_by_name_from_any_folder_by_path_and_with_an_argument(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PLAIN)
    assert shown(capsys, "--config", "vit_tutorial_cifar")["steps"] == 200 * 45_000 // 128
    assert shown(capsys, "--config", "vit_tutorial_cifar:2")["steps"] == 2 * 45_000 // 128
    assert shown(capsys, "--config=vit_tutorial_cifar:2")["steps"] == 2 * 45_000 // 128
    assert shown(capsys, "--config", "mine.py")["steps"] == 1000
    assert shown(capsys, "--config", "./mine.py:7")["steps"] == 7
    assert shown(capsys, "--config", tmp_path / "mine.py:8")["steps"] == 8


def test_overrides_with_equals_or_apart_before_or_after(capsys):
    given = ["--config.optim.lr=3e-4", "--config.steps", "77", "--config.augment.scale=(0.5,1.0)"]
    given += ["--config.augment.flip=false", "--config.data.width=64", "--config.optim.lr=5e-4"]
    for arguments in (
        ["--config", "vit_tutorial_cifar", *given],
        [*given, "--config", "vit_tutorial_cifar"],
    ):
        content = shown(capsys, *arguments)["config"]
        assert content["optim"]["lr"] == 5e-4  # the last one counts
        assert content["steps"] == 77
        assert content["augment"]["scale"] == [0.5, 1.0]
        assert content["augment"]["flip"] is False
        assert content["data"]["width"] == 64


def test_show_checks_a_config_for_devices(capsys):
    """All of its stages, without any device: what a launcher asks before anything is billed."""
    content = shown(capsys, "--config", "quickstart", "--devices", "64")
    assert next(iter(content["stages"])) == "pretrain"
    assert content["stages"]["finetune-64"]["data"]["resolution"] == 64
    assert "stages" not in shown(capsys, "--config", "vit_tiny_cifar")
    assert cli.main(["show", "--config", "quickstart", "--devices", "48"]) == 1
    assert "data.batch=128 is not divisible by 48 data shards" in capsys.readouterr().err


# train, eval, predict, show RUN


def test_training_prints_a_table_and_then_json(learnt, capsys, jpegs):
    """On a finished run: it says again what it came to, and changes nothing."""
    plain = f"{learnt.parent / 'plain.py'}:80"
    fields = learning(jpegs)
    report = (learnt / "report.json").read_bytes()
    out = ran(capsys, "train", "--config", plain, *TINY, *fields, "--workdir", learnt)
    assert (learnt / "report.json").read_bytes() == report
    (row,) = last(out)["runs"]
    assert row["run"] == str(learnt)
    assert (row["steps"], row["n"], row["evaluated on"]) == (80, 12, "test")
    assert row["accuracy"] == json.loads(report)["eval"]["accuracy"] > 0.9
    header, line = (re.split(r"  +", text) for text in out.splitlines()[-3:-1])
    table = dict(zip(header, line, strict=True))
    assert table["accuracy"] == f"{100 * row['accuracy']:.2f} %"
    assert table["n"] == "12"


def test_the_report_names_config_devices_versions_and_speed(learnt):
    report = json.loads((learnt / "report.json").read_text())
    assert (report["config"], report["step"], report["resolution"]) == ("plain-80", 80, [32, 32])
    assert report["parameters"] == sum(
        int(np.prod(shape)) for shape in learnt_shapes(learnt).values()
    )
    assert report["images_per_second"] > 0
    assert report["seconds"] > 0
    assert report["devices"]["count"] >= 1
    assert {"jax", "flax", "python"} <= report["versions"].keys()
    assert set(report["eval"]) == {*MEASURED, "split", "step", "best"}
    assert report["eval"]["best"]["selected_by"]["split"] == "test"


def learnt_shapes(run) -> dict[str, tuple[int, ...]]:
    import vit_scale
    from vit_scale.models.parameters import named

    return {name: leaf.shape for name, leaf in named(vit_scale.load(run).params).items()}


def test_eval_prints_n(learnt, capsys):
    out = ran(capsys, "eval", learnt)
    assert re.fullmatch(r".+: accuracy \d+\.\d\d %, loss \d+\.\d+, n 12 \(step 80\)\n", out)
    result = last(ran(capsys, "eval", learnt, "--split", "train[:50%]", "--json"))
    assert set(result) == {*MEASURED, "run", "step", "split", "set"}
    assert (result["n"], result["split"], result["step"]) == (24, "train[:50%]", 80)
    assert result["run"] == str(learnt / "checkpoints" / "80")
    assert result["accuracy"] > 0.9


def test_predict_names_the_learnt_classes(learnt, jpegs, capsys):
    images = [next((jpegs / "val" / f"class_{label}").iterdir()) for label in range(3)]
    found = last(ran(capsys, "predict", learnt, *images, "--json"))
    assert list(found) == [str(image) for image in images]
    for label, image in enumerate(images):
        top = found[str(image)]
        assert next(iter(top)) == f"class_{label}"
        assert set(top) == {"class_0", "class_1", "class_2"}
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert sum(top.values()) == pytest.approx(1, abs=1e-5)
    out = ran(capsys, "predict", learnt / "checkpoints" / "80", images[2])
    lines = out.splitlines()
    assert lines[0] == str(images[2])
    assert re.fullmatch(r" +\d+\.\d\d %  class_2", lines[1])
    assert len(lines) == 4


def test_predict_takes_any_size_and_mode(learnt, jpegs, tmp_path, capsys):
    source = next((jpegs / "val" / "class_1").iterdir())
    with Image.open(source) as image:
        image.resize((120, 90)).save(tmp_path / "large.png")
        image.convert("RGBA").save(tmp_path / "alpha.png")
        image.convert("L").save(tmp_path / "grey.png")
    found = last(ran(capsys, "predict", learnt, *sorted(tmp_path.glob("*.png")), "--json"))
    assert len(found) == 3
    for name in ("large", "alpha"):
        assert next(iter(found[str(tmp_path / f"{name}.png")])) == "class_1"


def test_predict_gives_at_most_five(cifar, tmp_path, capsys, jpegs):
    fields = (f"--config.data.path={cifar}", "--config.model.classes=10", "--config.eval.final=")
    fields += ("--config.eval.split=", "--config.steps=1")
    ran(capsys, "train", "--config", "vit_tutorial_cifar", *TINY, *fields,
        "--config.optim.schedule=constant", "--workdir", tmp_path / "run")  # fmt: skip
    image = next((jpegs / "val" / "class_1").iterdir())
    (top,) = last(ran(capsys, "predict", tmp_path / "run", image, "--json")).values()
    assert len(top) == 5
    assert set(top) < set(CLASSES)


def test_show_runs_as_text_markdown_and_json(learnt, capsys):
    content = last(ran(capsys, "show", learnt, learnt, "--json"))
    assert [row["run"] for row in content["runs"]] == [str(learnt)] * 2
    lines = ran(capsys, "show", learnt, "--markdown").splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"\|( -+ \|)+", lines[1])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    row = dict(zip(cells[0], cells[2], strict=True))
    assert row["run"] == str(learnt)
    assert (row["n"], row["steps"], row["initialised from"]) == ("12", "80", "random")
    table = ran(capsys, "show", learnt).splitlines()
    assert len(table) == 5 and table[3].startswith(f"{learnt}: goodput ")
    spent = content["goodput"][str(learnt)]
    lost = spent["productive"] + sum(spent["lost"].values())
    assert spent["attempts"] >= 1 and lost == pytest.approx(spent["wall"], abs=0.5)


# data pack


def test_pack_then_train_from_the_pack(jpegs, tmp_path, capsys):
    out = ran(capsys, "data", "pack", jpegs, tmp_path / "packed", "--workers", 1)
    assert out == f"{tmp_path / 'packed'}: train 48, val 12, skipped 0\n"
    (tmp_path / "plain.py").write_text(PLAIN)
    fields = (f"--config.data.path={tmp_path / 'packed'}", "--config.data.name=array_record")
    fields += ("--config.model.classes=3", "--config.optim.lr=0.01", "--config.data.memory=true")
    arguments = ["train", "--config", f"{tmp_path / 'plain.py'}:60", *TINY, *fields]
    (row,) = last(ran(capsys, *arguments, "--workdir", tmp_path / "run"))["runs"]
    assert (row["trained on"], row["n"]) == ("packed train", 12)
    assert row["accuracy"] > 0.9


# Stages, and the default workdir


@pytest.mark.slow
def test_stages_end_to_end_in_the_default_workdir(tmp_path, run_cli):
    """The quickstart, tiny: pretrain, then the same classes from scratch and from there."""
    fields = (
        *TINY[3:8],
        "--config.data.workers=0",
        "--config.data.batch=16",
        "--config.steps=6",
        "--config.optim.warmup=1",
        "--config.eval.batch=16",
        "--config.data.fractal.points=200",
        "--config.data.fractal.classes=8",
        "--config.data.fractal.test_per_class=1",
        "--config.data.fractal.resolution=16",
        "--config.model.classes=8",
        "--config.log.images=0",
        "--config.log.wandb=false",
    )
    done = run_cli("train", "--config", "quickstart", *fields)
    assert done.returncode == 0, done.stderr
    run = pathlib.Path("runs/quickstart")
    stages = ["pretrain", "scratch-32", "finetune-32", "scratch-64", "finetune-64"]
    assert sorted(path.name for path in (tmp_path / run).iterdir()) == sorted(stages)
    table = last(done.stdout)["runs"]
    assert [row["run"] for row in table] == [str(run / stage) for stage in stages]
    assert [row["resolution"] for row in table] == [f"{s} x {s}" for s in (32, 32, 32, 64, 64)]
    starts = [row["initialised from"] for row in table]
    assert starts == ["random", "random", str(run / "pretrain"), "random", str(run / "pretrain")]
    assert [row["n"] for row in table] == [None, 8, 8, 8, 8]
    assert "posemb" in done.stdout  # what fine-tuning did with each parameter
    assert re.search(r"^run +initialised from", done.stdout, re.M)
    assert "quickstart-finetune-64 6/6" in done.stderr
    described = json.loads((tmp_path / run / "finetune-64" / "run.json").read_text())
    assert described["name"] == "quickstart-finetune-64"
    before = {stage: (tmp_path / run / stage / "report.json").read_bytes() for stage in stages}
    # Everything is there: the same command prints the same again, without its pretrained source.
    again = run_cli("train", "--config", "quickstart", *fields)
    assert last(again.stdout) == last(done.stdout)
    for stage in stages:
        assert (tmp_path / run / stage / "report.json").read_bytes() == before[stage]


def test_quiet_says_nothing(learnt, jpegs, tmp_path, capsys):
    (tmp_path / "plain.py").write_text(PLAIN)
    fields = (f"--config.data.path={jpegs}", "--config.data.name=folder")
    fields += ("--config.model.classes=3", f"--config.init.source={learnt}")
    arguments = ["train", "--config", f"{tmp_path / 'plain.py'}:1", *TINY, *fields]
    capsys.readouterr()
    assert cli.main([*arguments, "--workdir", str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert checkpoint.finished_steps(tmp_path / "run") == [1]


def test_ctrl_c_is_one_line(learnt, monkeypatch, capsys):
    def interrupt(args, overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "show", interrupt)
    assert cli.main(["show", str(learnt)]) == 130
    assert capsys.readouterr().err.startswith("vit-scale: stopped")


def test_the_console_script_is_this_program(tmp_path):
    script = pathlib.Path(sys.executable).with_name("vit-scale")
    if not script.exists():
        script = shutil.which("vit-scale")
    if not script:
        pytest.skip("vit-scale is not installed here")
    done = subprocess.run(
        [script, "show", "--config", "quickstart:pretrain", "--json"],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert last(done.stdout)["config"]["data"]["name"] == "fractal"
