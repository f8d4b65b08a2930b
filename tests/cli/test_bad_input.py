"""Every mistake of a user, as typed: one line that names it, and nothing half-written."""

import errno
import os
import pathlib
import pickle
import re
import resource
import select
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from vit_scale import checkpoint, cli
from vit_scale.errors import RESUMABLE
from vit_scale.training import trainer

ROOT = pathlib.Path(__file__).resolve().parents[2]


TINY = {
    "data.name": "folder",
    "data.workers": "0",
    "data.batch": "8",
    "data.resolution": "32",
    "model.variant": "Ti/16",
    "model.width": "16",
    "model.depth": "1",
    "model.heads": "2",
    "model.mlp": "16",
    "model.classes": "3",
    "steps": "4",
    "eval.every": "0",
    "eval.batch": "8",
    "checkpoint.every": "2",
    "log.every": "1",
    "log.images": "0",
    "log.wandb": "false",
    "log.tensorboard": "false",
}
CONFIG = "from vit_scale.config import base\n\n\ndef get_config():\n    return base()\n"


class User:
    """Types commands in a folder, and reads what comes back."""

    def __init__(self, folder: pathlib.Path, data: pathlib.Path, capsys):
        self.folder, self.data, self.capsys = folder, data, capsys
        self.config, self.run = folder / "tiny.py", folder / "run"
        self.config.write_text(CONFIG)

    def training(self, *overrides: str, workdir=None) -> list[str]:
        given = TINY | {"data.path": str(self.data)}
        given |= dict(override.split("=", 1) for override in overrides)
        fields = [f"--config.{key}={value}" for key, value in given.items()]
        return [
            "train",
            "--config",
            f"{self.config}",
            *fields,
            "--workdir",
            str(workdir or self.run),
        ]

    def train(self, *overrides: str, workdir=None) -> None:
        assert cli.main([*self.training(*overrides, workdir=workdir), "--quiet"]) == 0
        self.capsys.readouterr()

    def refused(self, arguments, *says: str, code: int = 1) -> str:
        """Run a command; its one line on standard error, which holds `says` in this order."""
        self.capsys.readouterr()
        assert cli.main([*map(str, arguments)]) == code
        out, err = self.capsys.readouterr()
        assert "{" not in out, "a result was printed"
        return one_line(err, says)


def one_line(err: str, says) -> str:
    """The message, of a standard error that holds nothing else but progress."""
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line and not progress(line)]
    assert len(lines) == 1, err
    assert lines[0].startswith("vit-scale: "), err
    assert re.search(".*".join(map(re.escape, says)), lines[0]), f"{lines[0]}\n{says}"
    return lines[0]


def progress(line: str) -> bool:
    return bool(re.match(r"tiny \d+/\d+ ", line))


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder, and its content."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def user(tmp_path, jpegs, capsys) -> User:
    return User(tmp_path, jpegs, capsys)


@pytest.fixture(scope="module")
def trained(jpegs, tmp_path_factory) -> pathlib.Path:
    """A finished run, with one checkpoint. Tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("trained")
    user = User(folder, jpegs, None)
    assert cli.main([*user.training("steps=2"), "--quiet"]) == 0
    return user.run


# What is typed

TYPED = {
    "no verb": (["--help-me"], ["VERB"]),
    "verb": (["tran"], ["tran", "train"]),
    "option": (["train", "--config", "quickstart", "--wrkdir", "x"], ["--wrkdir"]),
    "no config": (["train"], ["--config"]),
    "config": (["train", "--config", "vit_smal_cifar"], ["vit_smal_cifar", "vit_small_cifar"]),
    "config path": (["train", "--config", "./none.py"], ["none.py"]),
    "config for show": (["show", "--config", "quikstart"], ["quikstart", "quickstart"]),
    "nothing to show": (["show"], ["RUN", "--config"]),
    "set to download": (["data", "download", "cifar11"], ["cifar11", "cifar10"]),
    "predict's override": (["predict", "r", "i", "--config.seed=1"], ["predict", "seed"]),
}


@pytest.mark.parametrize("mistake", TYPED)
def test_a_command_that_is_none(mistake, user, monkeypatch):
    monkeypatch.chdir(user.folder)
    arguments, says = TYPED[mistake]
    user.refused(arguments, *says, code=2)
    assert [file.name for file in user.folder.iterdir()] == ["tiny.py"]


FIELDS = {
    "key": ("optim.lrr=3", ["optim.lrr", "optim.lr"]),
    "an argument of the function": ("until=3", ["no config field is named 'until'"]),
    "block": ("optin.lr=3", ["optin.lr", "optim.lr"]),
    "a whole block": ("optim=3", ["optim"]),
    "number": ("optim.lr=abc", ["lr", "abc"]),
    "integer": ("steps=1.5", ["steps", "1.5"]),
    "boolean": ("augment.flip=maybe", ["flip", "maybe"]),
    "tuple": ("augment.scale=ab", ["augment.scale", "ab"]),
    "tuple of words": ("augment.scale=('a','b')", ["augment.scale", "tuple"]),
    "tuple's length": ("augment.mean=(.5,.5)", ["augment.mean", "(0.5, 0.5)", "three"]),
    "no value": ("steps=", ["steps"]),
}


@pytest.mark.parametrize("mistake", FIELDS)
def test_a_field_that_is_none_or_of_another_type(mistake, user):
    override, says = FIELDS[mistake]
    code = 1 if mistake == "tuple's length" else 2
    user.refused(user.training(override), *says, code=code)
    assert not user.run.exists()


def test_a_key_without_a_value_at_the_end(user):
    user.refused([*user.training(), "--config.steps"], "steps", "value", code=2)
    assert not user.run.exists()


CONFIG_FILES = {
    "syntax": ("def get_config(:\n", ["tiny.py", "invalid syntax"]),
    "no get_config": ("x = 1\n", ["tiny.py", "get_config"]),
    "not a config": ("def get_config():\n    return 3\n", ["tiny.py", "ConfigDict"]),
    "raises": ("def get_config():\n    return 1 / 0\n", ["tiny.py", "division by zero"]),
    "unknown key": (
        CONFIG.replace("return base()", "cfg = base()\n    cfg.optim.lrr = 3\n    return cfg"),
        ["tiny.py", "lrr", "lr"],
    ),
    "new block": (
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config():\n    return ConfigDict({'optin': {'lr': 3}})\n",
        ["tiny.py", "optin.lr", "optim.lr"],
    ),
    "missing fields": (
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config():\n    return ConfigDict({'optim': {'lr': 3.0}})\n",
        ["tiny.py", "base()"],
    ),
}


@pytest.mark.parametrize("mistake", CONFIG_FILES)
def test_a_config_file_that_is_none(mistake, user, monkeypatch):
    content, says = CONFIG_FILES[mistake]
    # config_flags gives every config file of a process the same module to run in.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    user.config.write_text(content)
    arguments = ["train", "--config", str(user.config), "--workdir", str(user.run)]
    user.refused(arguments, *says, code=2)
    assert not user.run.exists()


# What can't work, with the arithmetic

VALUES = {
    "data.batch=0": ["data.batch=0 must be at least 1"],
    "optim.accumulate=3": ["data.batch=8 is not divisible by 3 = 3 micro-batches"],
    "mesh.data=3": ["data=3", "3 devices, but there are 1"],
    "mesh.fsdp=2": ["fsdp=2", "1 devices are not divisible by 2"],
    "mesh.tensor=0": ["tensor=0"],
    "eval.batch=0": ["0"],
    "steps=0": ["steps=0"],
    "data.resolution=40": ["40", "not divisible", "16"],
    "data.width=40": ["width 40", "not divisible", "16"],
    "data.resolution=16": ["16 x 16", "1 x 1", "2 x 2"],
    "data.resolution=0": ["0 x 0"],
    "data.width=16": ["32 x 16", "2 x 1", "2 x 2"],
    "model.variant=XXL/16": ["XXL/16", "S/16"],
    "model.variant=S": ["'S'", "S/16"],
    "model.variant=S/0": ["patch 0"],
    "model.heads=3": ["width 16 is not divisible by 3 heads"],
    "model.classes=0": ["3 classes", "model.classes=0", "--config.model.classes=3"],
    "model.classes=4": ["3 classes", "model.classes=4", "--config.model.classes=3"],
    "model.pool=mean": ["model.pool", "mean", "map"],
    "model.posemb=sincos": ["model.posemb", "sincos", "sincos2d"],
    "model.dtype=float16": ["model.dtype", "float16", "bfloat16"],
    "model.remat=ful": ["model.remat", "ful", "full"],
    "model.attention=flash": ["model.attention", "flash", "xla"],
    "model.attention=cudnn": ["cudnn", "NVIDIA GPUs", "1 x cpu", "model.attention=xla"],
    "model.dropout=1.5": ["model.dropout=1.5"],
    "augment.crop=center": ["augment.crop", "center"],
    "augment.scale=0.5": ["augment.scale=(0.5,)", "two numbers"],
    "augment.scale=(1.,.5)": ["augment.scale", "low <= high"],
    "augment.std=(0.,1.,1.)": ["augment.std", "above 0"],
    "optim.name=adam": ["optim.name", "adam", "adamw"],
    "optim.schedule=cosin": ["optim.schedule", "cosin", "cosine"],
    "optim.warmup=9": ["optim.warmup=9", "steps=4"],
    "optim.lr=-1.": ["optim.lr=-1"],
    "optim.ema=1.": ["optim.ema=1"],
    "optim.freeze=('blokcs',)": ["optim.freeze", "blokcs"],
    "optim.freeze=('(',)": ["optim.freeze", "regular expression"],
    "optim.train=haed": ["optim.train", "haed", "head"],
    "lora.rank=99": ["lora.rank=99", "16 x 16"],
    "checkpoint.frozen=twice": ["checkpoint.frozen", "twice", "once"],
    "data.name=cifar": ["data.name", "cifar", "cifar10"],
    "data.train=trian": ["trian", "train"],
    "data.train=train[9:9]": ["train[9:9]", "48 images"],
    "data.train=train[:100]": ["train[:100]", "48 images"],
    "eval.split=tset": ["tset", "test"],
    "eval.final=test[50:]": ["test[50:]", "12 images"],
    "data.on_corrupt=ignore": ["data.on_corrupt", "ignore", "skip"],
    "init.resample=bilinear": ["init.resample", "bilinear", "cubic"],
    "data.workers=-1": ["data.workers=-1"],
    "log.every=0": ["log.every=0"],
    "checkpoint.every=-1": ["checkpoint.every=-1"],
    "eval.every=-1": ["eval.every=-1"],
    "stages=('a',)": ["tiny.py:a", "get_config() takes 0 positional arguments"],
}


@pytest.mark.parametrize("override", VALUES)
def test_a_value_that_cannot_work(override, user):
    code = 2 if override.startswith("stages") else 1
    user.refused(user.training(override), *VALUES[override], code=code)
    assert not user.run.exists()


# Data


def test_no_data_set(user):
    nowhere = user.folder / "nowhere"
    user.refused(user.training(f"data.path={nowhere}"), f"{nowhere}", "train")
    cifar = user.training(f"data.path={nowhere}", "data.name=cifar10", "model.classes=10")
    line = user.refused(cifar, f"{nowhere}", "vit-scale data download cifar10 --out")
    assert "cifar-10-batches-py" in line
    user.refused(user.training(f"data.path={nowhere}", "data.name=array_record"), "data pack")
    assert not user.run.exists()
    assert not nowhere.exists()


def copy_of(cifar: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """CIFAR-10 in the binary layout, whose files are links to the fixture's."""
    there = folder / "cifar-10-batches-bin"
    there.mkdir()
    for file in (cifar / "cifar-10-batches-bin").iterdir():
        os.link(file, there / file.name)
    return there


def replace(file: pathlib.Path, content: bytes) -> None:
    file.unlink()  # it is a link: the fixture's file must not change
    file.write_bytes(content)


def test_cifar_files_that_are_missing_short_or_wrong(user, cifar):
    batches = copy_of(cifar, user.folder)
    training = user.training(
        f"data.path={user.folder}", "data.name=cifar10", "model.classes=10", "eval.final=test[:9]"
    )
    file = batches / "data_batch_3.bin"
    content = file.read_bytes()
    file.unlink()
    user.refused(training, f"{file}", "No such file", "vit-scale data download cifar10")
    file.write_bytes(content[:5000])
    user.refused(training, f"{file}", "ends at byte 5000", "30730000 bytes", "replace")
    wrong = bytearray(content)
    wrong[3073 * 7] = 11
    file.write_bytes(wrong)
    user.refused(training, f"{file}", "label 11 at position 7", "10 classes")
    assert not user.run.exists()


class Hostile:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_hostile_pickle_is_not_executed(user):
    batches, proof = user.folder / "cifar-10-batches-py", user.folder / "executed"
    batches.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (batches / name).write_bytes(pickle.dumps({"data": Hostile(proof), "labels": []}))
    training = user.training(
        f"data.path={user.folder}", "data.name=cifar10", "model.classes=10", "eval.final="
    )
    user.refused(training, f"{batches / 'data_batch_1'}", "mkdir", "replace")
    assert not proof.exists()
    assert not user.run.exists()


@pytest.fixture
def copied(user) -> pathlib.Path:
    """The image folder, to be damaged; the user trains on it."""
    user.data = shutil.copytree(user.data, user.folder / "images")
    return user.data


def test_folders_without_images_or_of_other_classes(user, copied):
    (copied / "train" / "class_3").mkdir()
    user.refused(user.training("model.classes=4"), "class_3", "no images")
    shutil.rmtree(copied / "train" / "class_3")
    shutil.copytree(copied / "val" / "class_0", copied / "val" / "other")
    user.refused(user.training(), f"{copied / 'val' / 'other'}", "training set lacks")
    shutil.rmtree(copied / "train")
    (copied / "train").mkdir()
    user.refused(user.training("eval.final="), f"{copied / 'train'}", "no images")
    assert not user.run.exists()


def test_an_image_that_is_corrupt_stops_the_run_or_is_counted(user, copied):
    file = copied / "train" / "class_1" / "001.jpg"
    file.write_bytes(file.read_bytes()[:100])
    test_file = copied / "val" / "class_2" / "002.jpg"
    test_file.write_bytes(b"not an image")
    fields = ("steps=6", "checkpoint.every=0")  # an epoch: every image is seen
    says = (f"cannot read {file}", "--config.data.on_corrupt=skip")
    user.refused(user.training(*fields), *says)
    assert checkpoint.finished_steps(user.run) == []
    assert not (user.run / "report.json").exists()
    skipping = user.folder / "skipping"
    user.train(*fields, "data.on_corrupt=skip", "log.every=6", workdir=skipping)
    assert '"train/skipped": 1' in (skipping / "metrics.jsonl").read_text()
    assert '"n": 11' in (skipping / "report.json").read_text()


@pytest.mark.slow
def test_a_corrupt_image_is_named_by_a_worker_too(user, copied, run_cli):
    file = copied / "train" / "class_1" / "001.jpg"
    file.write_bytes(file.read_bytes()[:100])
    arguments = user.training("steps=6", "checkpoint.every=0", "data.workers=2")
    done = run_cli(*arguments)
    one_line(done.stderr, [f"{file}", "--config.data.on_corrupt=skip"])
    assert (done.returncode, done.stdout) == (1, "")
    assert not (user.run / "report.json").exists()


def test_packing_names_what_it_cannot_pack(user, copied):
    out = user.folder / "packed"
    user.refused(["data", "pack", user.folder / "nowhere", out], "nowhere", "train/CLASS/IMAGE")
    assert not out.exists()
    file = copied / "train" / "class_1" / "001.jpg"
    file.write_bytes(b"not an image")
    pack = ["data", "pack", copied, out, "--workers", 1]
    user.refused(pack, f"cannot read {file}", "--on-corrupt skip")
    assert not [name for name in tree(out) if "train" in name or "partial" in name]
    user.refused(
        user.training(f"data.path={out}", "data.name=array_record"), f"{out}", "not packed"
    )
    user.refused([*pack, "--on-corrupt", "drop"], "drop", "skip")


# Runs and checkpoints


def test_an_init_source_that_is_none(user, trained):
    def refused(source, *says):
        user.refused(user.training(f"init.source={source}"), f"{source}", *says)
        assert checkpoint.finished_steps(user.run) == []
        assert not (user.run / "report.json").exists()

    refused(user.folder / "nowhere", "is not a run folder", "RUN/checkpoints/STEP")
    refused(trained / "checkpoints" / "99", "is not a run folder")
    begun = user.folder / "begun"
    begun.mkdir()
    shutil.copy(trained / "run.json", begun)
    refused(begun, "no finished checkpoint")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.width=32", ["blocks/mlp/up/kernel", "(1, 16, 16)", "(1, 32, 16)"]),
        ("model.pool=gap", ["cls (16,)", "is not in the model"]),
        ("model.depth=2", ["blocks/mlp/up/kernel", "(1, 16, 16)", "(2, 16, 16)"]),
        ("model.swiglu=true", ["blocks/mlp/gate/kernel (1, 16, 16)", "is not in the source"]),
    ],
)
def test_a_checkpoint_of_another_model_lists_both_sides(override, says, user, trained):
    user.refused(user.training(f"init.source={trained}", override), "don't fit", *says)
    assert checkpoint.finished_steps(user.run) == []


def damage_nothing_else(run: pathlib.Path, pattern: str, content: bytes | None) -> None:
    files = [file for file in run.glob(pattern) if file.is_file()]
    assert files
    for file in files:
        if content is None:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2] + content)


@pytest.mark.parametrize(
    ("pattern", "content"),
    [
        ("checkpoints/2/params/**/d/*", b""),
        ("checkpoints/2/params/**/d/*", None),
        ("checkpoints/2/params/manifest.ocdbt", b""),
        ("checkpoints/2/params/_METADATA", b""),
        ("checkpoints/2/manifest/metadata", b""),
    ],
    ids=["truncated", "missing", "index", "metadata", "manifest"],
)
def test_a_damaged_checkpoint(pattern, content, user, trained, jpegs):
    run = shutil.copytree(trained, user.folder / "damaged")
    damage_nothing_else(run, pattern, content)
    before = tree(run)
    image = next((jpegs / "val" / "class_0").iterdir())
    checkpoint_folder = f"{run / 'checkpoints' / '2'}"
    user.refused(["predict", run, image], checkpoint_folder, "damaged")
    user.refused(["eval", run, "--split", "test"], checkpoint_folder, "damaged")
    user.refused(user.training(f"init.source={run}"), checkpoint_folder, "damaged")
    assert tree(run) == before


def test_resuming_from_a_damaged_checkpoint(user, trained):
    run = shutil.copytree(trained, user.run)
    (run / "report.json").unlink()
    damage_nothing_else(run, "checkpoints/2/opt_state/**/d/*", b"")
    user.refused(user.training("steps=2"), f"{run / 'checkpoints' / '2'}", "damaged")
    assert not (run / "report.json").exists()


def test_a_run_that_is_none(user, trained, jpegs, monkeypatch):
    monkeypatch.chdir(user.folder)
    image = next((jpegs / "val" / "class_0").iterdir())
    user.refused(["eval", "runs/none"], "runs/none", "is not a run folder")
    user.refused(["predict", "runs/none", image], "runs/none", "is not a run folder")
    user.refused(["show", "runs/none"], "runs/none", "is not a run folder")
    begun = user.folder / "begun"
    begun.mkdir()
    shutil.copy(trained / "run.json", begun)
    user.refused(["show", begun], f"{begun}", "has not finished")
    (begun / "run.json").write_text('{"config": ')
    user.refused(user.training(workdir=begun), f"cannot read {begun / 'run.json'}")
    user.refused(["eval", trained, "--split", "tset"], "tset", "test")
    user.refused(["eval", trained, "--config.eval.batch=0"], "eval.batch=0 must be at least 1")
    user.refused(["eval", trained, "--config.eval.bach=1"], "eval.bach", "eval.batch", code=2)
    assert sorted(file.name for file in user.folder.iterdir()) == ["begun", "tiny.py"]


def test_an_image_that_cannot_be_read(user, trained, jpegs):
    missing, text, empty = (user.folder / name for name in ("none.jpg", "text.jpg", "empty.png"))
    text.write_text("not an image")
    empty.touch()
    good = next((jpegs / "val" / "class_0").iterdir())
    user.refused(["predict", trained, missing], f"{missing}", "No such file")
    user.refused(["predict", trained, good, text, "--json"], f"cannot read image {text}: ")
    user.refused(["predict", trained, empty], f"cannot read image {empty}: ")
    user.refused(["predict", trained, user.folder], f"{user.folder}", "directory")


# The workdir


def test_a_workdir_that_cannot_be_made_or_written(user, monkeypatch):
    file = user.folder / "file"
    file.write_text("mine")
    user.refused(user.training(workdir=file), f"{file}", "File exists", "--workdir")
    user.refused(user.training(workdir=file / "run"), f"{file / 'run'}", "Not a directory")
    assert file.read_text() == "mine"


def test_a_read_only_workdir(user, monkeypatch):
    """root may write everywhere: the system's refusal is played."""
    user.run.mkdir()
    opened = open

    def refuse(path, mode="r", *arguments, **named):
        if str(path).startswith(str(user.run)) and set(mode) & set("wax+"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, mode, *arguments, **named)

    monkeypatch.setattr("builtins.open", refuse)
    user.refused(user.training(), f"{user.run}", "Read-only file system", "--workdir")
    assert list(user.run.iterdir()) == []


def namespaces() -> bool:
    """Whether this user may mount a file system that nobody else sees."""
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


FULL = """
set -u
mount -t tmpfs -o size=$SIZE tmpfs "$DISK"
"$@" 2>"$ERRORS"
echo "exit code $?"
ls "$DISK/run/checkpoints"
dd if=/dev/zero of="$DISK/filler" 2>/dev/null
rm "$DISK/filler"
mount -o remount,size=100m "$DISK"
"$@" --quiet 2>>"$ERRORS.again"
echo "exit code $?"
ls "$DISK/run/checkpoints"
"""


@pytest.mark.slow
@pytest.mark.skipif(not namespaces(), reason="needs a small disk of its own: unshare and tmpfs")
def test_a_disk_that_is_full_at_the_second_checkpoint(user):
    """A run of 6 steps, and room for its first checkpoint only; then room is made."""
    disk, errors = user.folder / "disk", user.folder / "errors"
    disk.mkdir()
    arguments = user.training("model.mlp=4000", "steps=6", workdir=disk / "run")
    done = subprocess.run(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            FULL,
            "sh",
            sys.executable,
            "-m",
            "vit_scale.cli",
            *arguments,
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DISK": str(disk),
            "ERRORS": str(errors),
            "SIZE": "2500k",  # a checkpoint is 1.5 MB
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["exit code 42", "2"], done
    says = [f"{disk / 'run'}", "No space left on device", "free space"]
    one_line(errors.read_text(), says)
    assert lines[-3:] == ["exit code 0", "4", "6"], (done, errors.with_suffix(".again"))


def test_a_write_that_fails_leaves_the_checkpoint_before_it(user, monkeypatch):
    """The same on every system: files may not grow any more once the second save begins."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = checkpoint.Checkpoints.save

    def save_with_a_limit(self, step, *arguments):
        if step == 4:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        save(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_with_a_limit)
        try:
            says = (f"{user.run}", "free space", "same command")
            user.refused(user.training("steps=6"), *says, code=RESUMABLE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.finished_steps(user.run) == [2]
    assert not (user.run / "report.json").exists()
    user.train("steps=6")
    undisturbed = user.folder / "undisturbed"
    user.train("steps=6", workdir=undisturbed)
    left, right = (
        {n: x for n, x in tree(run).items() if n == "checkpoints/6/manifest/metadata"}
        for run in (user.run, undisturbed)
    )
    assert left == right
    assert len(left) == 1


HOLD = """
import sys, time
from vit_scale.runs.run_folder import Run
with Run(sys.argv[1], {"config": {}}):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(user, trained):
    """The workdir, of a run, held by another live process: (its folder, the process)."""
    (shutil.copytree(trained, user.run) / "report.json").unlink()
    (user.run / "run.json").rename(user.folder / "run.json")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(user.run)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert select.select([process.stdout], [], [], 60)[0]
        assert process.stdout.readline() == "held\n"
        (user.folder / "run.json").replace(user.run / "run.json")
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_workdir_in_use_and_then_not_any_more(user, held):
    before = tree(user.run)
    says = (f"{user.run}", f"in use by process {held.pid}", "--workdir")
    user.refused(user.training("steps=2"), *says)
    assert tree(user.run) == before
    held.send_signal(signal.SIGKILL)  # its lock file stays, with its number in it
    held.wait()
    assert (user.run / ".lock").read_text() == f"{held.pid}\n"
    user.train("steps=2")
    assert (user.run / "report.json").exists()


def test_another_config_on_the_same_workdir(user, trained):
    run = shutil.copytree(trained, user.run)
    before = tree(run)
    says = (f"{run}", "different config", "optim.lr: 0.001 -> 0.003", "--workdir")
    user.refused(user.training("steps=2", "optim.lr=0.003"), *says)
    after = tree(run)
    del before[".lock"], after[".lock"]
    assert after == before
    user.train("steps=2", "log.every=2", "eval.batch=4")  # these may change


def test_through_the_shell_it_is_the_same(user, run_cli):
    done = run_cli("train", "--config", "vit_tutorial_cifar", "--config.optim.lrr=1")
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, ["optim.lrr", "optim.lr"])
    done = run_cli("train", "--config", "vit_tutorial_cifar", "--config.data.path=nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    one_line(done.stderr, ["nowhere", "vit-scale data download cifar10"])
    assert sorted(file.name for file in user.folder.iterdir()) == ["tiny.py"]


def test_a_bug_is_not_dressed_up_as_a_mistake(user, monkeypatch):
    """Only what is known to be the user's is one line: all else keeps its traceback."""

    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(trainer, "make_setup", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(user.training())
    assert not np.any([file.name == "run" for file in user.folder.iterdir()])
