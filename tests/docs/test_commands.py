"""Every command in a document is one: parsed by the parser that would get it, with real fields."""

import argparse
import importlib
import pathlib
import re
import shlex
import tomllib

import pytest

from launch.tpu import flags
from tests.helpers.documents import ROOT, blocks, commands, documents, inline
from vit_scale import config
from vit_scale.cli.parser import parser, split_overrides
from vit_scale.training import objectives, optimizer
from vit_scale.training.validation import check_counts

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
COMMANDS = [
    pytest.param(words, id=f"{name}: {shlex.join(words)[:60]}")
    for name, text in documents().items()
    for words in commands(text)
]
FILES = (".py", ".json", ".npz", ".safetensors")
# sbatch's own, before the script.
SBATCH = {"--array", "--cpus-per-task", "--gres", "--mem", "--nodes", "--oversubscribe"}
SBATCH |= {"--signal", "--time"}


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    """A folder with photos.py, the config that the manual writes."""
    (code,) = [
        block
        for block in blocks(documents()["docs/getting-started.md"], "python")
        if "def get_config" in block
    ]
    (tmp_path / "photos.py").write_text(code)
    monkeypatch.chdir(tmp_path)


def check_overrides(words: list[str]) -> list[str]:
    """The words without --config.FIELD=VALUE, each of which has to be a field's."""
    arguments, overrides = split_overrides(words)
    config.override(config.base(), overrides)
    return arguments


def vit_scale(words: list[str]) -> None:
    arguments, overrides = split_overrides(words)
    args = parser().parse_args(arguments)
    if getattr(args, "config", None):
        cfg = config.load(args.config, overrides)
        check_counts(cfg)
        if not cfg.stages and cfg.model.variant != "source":  # which the weights decide
            optimizer.check(cfg.optim, cfg.steps)
            objectives.check(cfg)
    else:
        config.override(config.base(), overrides)
    for variant in getattr(args, "compare", None) or ():
        config.override(config.base(), re.split(r",(?=[a-z_.]+=)", variant))


def local(words: list[str]) -> None:
    """launch/local.sh takes --hosts and --devices, and gives the rest to `vit-scale train`."""
    rest, several = [], argparse.ArgumentParser(allow_abbrev=False)
    several.add_argument("--hosts", type=int)
    several.add_argument("--devices", type=int)
    _, rest = several.parse_known_args(words)
    vit_scale(["train", *rest])


def tpu_vm(words: list[str]) -> None:
    arguments, overrides, _ = flags.split(words)
    args = flags.parser().parse_args(arguments)
    if args.config:
        config.load(args.config, [word.removeprefix("--config.") for word in overrides])


def gke(words: list[str]) -> None:
    arguments, overrides, _ = flags.split(words)
    args = importlib.import_module("launch.gke").parser().parse_args(arguments)
    config.load(args.config, [word.removeprefix("--config.") for word in overrides])


def docker(words: list[str]) -> None:
    assert words[0] == "build" and words[-1] == "."
    stages = re.findall(r"^FROM .+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert "--target" not in words or words[words.index("--target") + 1] in stages


def sky(words: list[str]) -> None:
    """The job's file exists, and so do the variables that are set."""
    assert words[:2] == ["jobs", "launch"]
    job = (ROOT / words[2]).read_text()
    assert set(words[3::2]) <= {"--gpus", "--secret", "--env"}
    for word in words[4::2]:
        variable, is_set, _ = word.partition("=")
        assert not is_set or re.search(rf"^  {variable}: ", job, re.MULTILINE), variable


def slurm(words: list[str]) -> None:
    script = words.index("launch/slurm.sbatch")
    assert {word for word in words[:script] if word.startswith("--")} <= SBATCH
    vit_scale(["train", *(word.replace("%a", "1") for word in words[script + 1 :])])


def environment(words: list[str]) -> None:
    assert set(words) <= set(EXTRAS)


def pytest_arguments(words: list[str]) -> None:
    for word in words:
        assert not word.startswith("tests/") or (ROOT / word.partition("::")[0]).exists(), word


def benchmark_parser(module) -> argparse.ArgumentParser:
    """A benchmark's own, or that of all measurements."""
    if hasattr(module, "parser"):
        return module.parser()
    return importlib.import_module("benchmarks.measurement").parser(module.MEASUREMENT)


def python(words: list[str]) -> None:
    if words[0] == "-m":
        name = words[1]
        assert name.partition(".")[0] in ("benchmarks", "pytest"), name
        if name.startswith("benchmarks."):
            benchmark_parser(importlib.import_module(name)).parse_args(words[2:])
        return
    source = (ROOT / words[0]).read_text()
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in source, word


def nothing(words: list[str]) -> None:
    assert not words


OTHER_PROGRAMS = ("gcloud", "kill", "kubectl", "mkdocs", "pip", "sed", "source", "wandb", "xprof")
KNOWN = {
    "vit-scale": vit_scale,
    "launch/local.sh": local,
    "launch/tpu_vm.sh": tpu_vm,
    "launch/gke.py": gke,
    "launch/environment.sh": environment,
    "launch/compiler.sh": nothing,
    "launch/pin.sh": nothing,
    "launch/test.sh": pytest_arguments,
    "sbatch": slurm,
    "python": python,
    "docker": docker,
    "sky": sky,
} | dict.fromkeys(OTHER_PROGRAMS, lambda words: None)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_one(words):
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    name = words[0].removeprefix(".venv/bin/")
    assert name in KNOWN, f"teach this test what {name} is"
    if name.startswith("launch/"):
        assert (ROOT / name).is_file()
    KNOWN[name](words[1:])


def test_there_are_many():
    """A change of the fences would leave nothing to check."""
    assert len(COMMANDS) > 80


BLOCKS = [key for key, value in config.base().items() if hasattr(value, "items")]
FIELDS = config.fields(config.base())


# In the page on Python `model` is a variable.
@pytest.mark.parametrize("name", [name for name in documents() if name != "docs/python.md"])
def test_fields_that_are_named_exist(name):
    """`--config.optim.lr=1e-3`, `optim.lr` and `optim.lr=1e-3` in a sentence."""
    wrong = []
    for code in inline(documents()[name]):
        for word in code.split():
            override = word.removeprefix("--config.")
            field = override.partition("=")[0]
            if word == override and field.partition(".")[0] not in BLOCKS:
                continue
            if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", field) and field not in FIELDS:
                wrong.append(word)
    assert not [word for word in wrong if not word.endswith(FILES)]


def options() -> set[str]:
    """Every flag of every command."""
    known_flags = set(flags.parser()._option_string_actions)
    known_flags |= set(importlib.import_module("launch.gke").parser()._option_string_actions)
    names = ("speed", "cpu_parts", "cpu_step", "loader", "photos")
    modules = [importlib.import_module(f"benchmarks.{name}") for name in names]
    queue = [parser(), *map(benchmark_parser, modules)]
    while queue:
        this = queue.pop()
        known_flags |= set(this._option_string_actions)
        for action in this._actions:
            if isinstance(action, argparse._SubParsersAction):
                queue += action.choices.values()
    others = {"--build-arg", "--env-file"}  # of docker and xpk
    others |= {"--hosts", "--strict", "--local-dir"}  # of shells, mkdocs, hf
    return known_flags | SBATCH | others


@pytest.mark.parametrize("name", [name for name in documents() if "results/" not in name])
def test_flags_that_are_named_exist(name):
    named = {word.strip(",") for code in inline(documents()[name]) for word in code.split()}
    flags_used = {word.partition("=")[0] for word in named if word.startswith("--")}
    flags_used = {word for word in flags_used if not word.startswith("--config.") and word != "--"}
    assert flags_used <= options()


def test_environment_script_lists_the_extras():
    text = (ROOT / "launch" / "environment.sh").read_text()
    listed = re.search(r"extras of pyproject.toml: ([\w, ]+)", text)
    assert listed and set(listed[1].split(", ")) == set(EXTRAS)


def test_the_readme_is_short():
    lines = pathlib.Path(ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
