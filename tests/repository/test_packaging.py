"""What is installed: the wheel holds the configs, and every version is pinned for every Python."""

import configparser
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_no_message_names_a_distribution_that_is_not_published():
    """`pip install 'vit_scale[gs]'` finds nothing: extras are installed from a clone."""
    files = [ROOT / "README.md", *ROOT.glob("launch/*")]
    for folder in ("vit_scale", "launch/tpu", "configs", "benchmarks", "docs"):
        files += [file for ending in ("py", "md") for file in (ROOT / folder).rglob(f"*.{ending}")]
    named = r"pip install '?vit[_-]scale|vit[_-]scale\[(gs|tpu|gpu|inspect|peers|test)\]"
    texts = {file: file.read_text() for file in files if file.is_file()}
    assert len(texts) > 100
    assert not [str(file) for file, text in texts.items() if re.search(named, text)]


def test_every_extra_that_a_message_names_is_one():
    documents = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    texts = [file.read_text() for file in [*documents, *(ROOT / "vit_scale").rglob("*.py")]]
    named = set(re.findall(r"launch/environment\.sh (\w+)", " ".join(texts)))
    assert named >= {"gs", "inspect", "peers"}
    assert named <= set(PROJECT["optional-dependencies"])


def test_wheel_holds_the_code_and_the_configs_and_nothing_else(wheel):
    sources = {
        *(f"vit_scale/{file.relative_to(ROOT).as_posix()}" for file in ROOT.glob("configs/*.py")),
        *(file.relative_to(ROOT).as_posix() for file in ROOT.glob("vit_scale/**/*.py")),
        "vit_scale/py.typed",
        "vit_scale/distributed/accelerators.json",
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == sources
    assert "vit_scale/configs/base.py" in sources


def test_wheel_installs_the_command(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(name).decode())
    assert entry_points["console_scripts"]["vit-scale"] == "vit_scale.cli:main"


def test_a_bare_name_works_from_any_folder(wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    wheel.extractall(installed)
    elsewhere.mkdir()
    program = (
        "from vit_scale import config; cfg = config.load('vit_small_cifar', ['steps=7']); "
        "print(config.FOLDER, cfg.model.variant, cfg.steps)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == [str(installed / "vit_scale" / "configs"), "S/16", "7"], result


def pins(python: str) -> dict[str, str]:
    """{distribution: version} of constraints.txt on Linux; every line is one exact version."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_python_implementation": "CPython",
    }
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.url is None, line
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            if requirement.marker is None or requirement.marker.evaluate(environment):
                name = canonicalize_name(requirement.name)
                assert name not in found, f"{name} is pinned twice for Python {python}"
                found[name] = specifier.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_what_the_project_requires(python):
    pinned = pins(python)
    for line in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        requirement = Requirement(line)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), (line, version)


@pytest.mark.parametrize("python", PYTHONS)
def test_jax_goes_with_the_python(python):
    pinned, minor = pins(python), "0.10" if python == "3.11" else "0.12"
    for name in ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt"):
        assert re.match(rf"{minor}([.]\d+)+$", pinned[name]), f"{name} {pinned[name]}"


def test_constraints_name_no_address():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if "://" in line or line.startswith(("-", "--"))] == []
