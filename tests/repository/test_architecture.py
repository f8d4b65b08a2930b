"""The shape of the house, held by machine: imports point one way, a third-party package has one
home, functions stay short, every configuration loads.

The checks are functions over a folder, so that each is also tried on a small tree that breaks it.
"""

import ast
import io
import pathlib
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator

import pytest

from vit_scale import config

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Packages, and the modules beside them. Each imports from itself and from the rows above it, never
# from its own row or below.
LAYERS = (
    {"errors"},
    {"config", "distributed", "models", "storage"},
    {"augment", "checkpoint"},
    {"data"},
    {"runs"},
    {"pretrained", "tracking"},
    {"evaluation"},
    {"inference", "training"},
    {"inspect", "plan"},
    {"sweep"},
    {"api"},
    {"__init__"},
    {"cli"},
)

# Third-party package (or a name in it): what to install it as, and the modules that may import it.
# An empty set is every module. The longest name that fits an import decides.
HOMES = {
    "absl": ("absl-py", {"config", "cli", "data"}),  # data: Grain's workers need parsed flags
    "array_record": ("array_record", {"data"}),
    "clu.metric_writers": ("clu", {"tracking"}),
    "clu.metrics": ("clu", {"tracking"}),
    "clu.parameter_overview": ("clu", {"tracking"}),
    "cykooz_resizer": ("cykooz-resizer", {"data"}),
    "datasets": ("datasets", {"data"}),  # an extra: Hugging Face's sets
    "etils": ("etils", {"storage"}),
    "flatbuffers": ("flatbuffers", {"inference"}),  # jax.export needs it, and doesn't require it
    "flax": ("flax", {"models"}),
    "flax.struct": ("flax", {"tracking"}),  # a clu.metrics.Collection is declared with it
    "fsspec": ("fsspec", {"storage"}),
    "grain": ("grain", {"data"}),
    "huggingface_hub": ("huggingface_hub", {"pretrained"}),  # an extra
    "jax": ("jax", set()),
    "jaxtyping": ("jaxtyping", set()),
    "matplotlib": ("matplotlib", {"inspect"}),
    "ml_collections": ("ml-collections", {"config", "cli"}),
    "ml_collections.ConfigDict": ("ml-collections", set()),  # the type, for annotations
    "numpy": ("numpy", set()),
    "optax": ("optax", {"evaluation", "training"}),
    "orbax": ("orbax-checkpoint", {"checkpoint"}),
    "PIL": ("pillow", {"data"}),
    "safetensors": ("safetensors", {"pretrained"}),
    "scipy": ("scipy", {"data", "evaluation"}),
    "simplejpeg": ("simplejpeg", {"data"}),
    "tensorflow_datasets": ("tensorflow-datasets", {"data"}),  # an extra
    "tensorboardX": ("tensorboardX", {"tracking"}),
    "torch": ("torch", {"pretrained"}),  # where it is there: PyTorch's pickles
    "tqdm": ("tqdm", set()),
    "wandb": ("wandb", {"tracking"}),
    "yaml": ("pyyaml", {"inference", "tracking"}),
}

NAMES_THAT_SAY_NOTHING = {"base_utils", "common", "helpers", "manager", "misc", "util", "utils"}
LONGEST_FUNCTION = 60  # lines; CONTRIBUTING.md asks for about 40
# A package registry, or a folder of one person's machine. (Written so as not to match itself.)
LOCAL = re.compile(
    r"(pypi|npmjs)[.]org|python[h]osted|deb[.]debian|(^|[^\w.])/(home|Users|root|work|farm)/\w"
)


def owner(root: pathlib.Path, file: pathlib.Path) -> str:
    """The part of vit_scale that a file belongs to: `data` for vit_scale/data/cifar.py."""
    return file.relative_to(root / "vit_scale").parts[0].removesuffix(".py")


def imports(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def wrong_directions(root: pathlib.Path) -> list[str]:
    """Imports inside vit_scale that point to the same or a later layer; modules without a layer."""
    level = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    found = []
    for file in sorted((root / "vit_scale").rglob("*.py")):
        here = owner(root, file)
        if here not in level:
            found.append(f"{file.relative_to(root)}: give {here!r} its place in LAYERS")
            continue
        for line, name in imports(file):
            where = f"{file.relative_to(root)}:{line}"
            if name.startswith("."):
                found.append(f"{where}: write the whole name instead of {name}")
            if name.split(".")[0] != "vit_scale":
                continue
            part = name.split(".")[1:2]
            there = part[0] if part and part[0] in level else "__init__"
            if there != here and level[there] >= level[here]:
                found.append(f"{where}: {here} must not import {there}")
    return found


def home(name: str) -> tuple[str, set[str]] | None:
    """The row of HOMES that decides about an import, or None."""
    parts = name.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((HOMES[known] for known in names if known in HOMES), None)


def away_from_home(root: pathlib.Path) -> list[str]:
    """Third-party imports in vit_scale that are made outside the package's home, or have none."""
    found = []
    for file in sorted((root / "vit_scale").rglob("*.py")):
        for line, name in imports(file):
            if name.split(".")[0] in {"vit_scale", "", *sys.stdlib_module_names}:
                continue
            where = f"{file.relative_to(root)}:{line}"
            if home(name) is None:
                found.append(f"{where}: give {name} a home in HOMES")
            elif (homes := home(name)[1]) and owner(root, file) not in homes:
                found.append(f"{where}: {name} may be imported in {', '.join(sorted(homes))} only")
    return found


def not_standard_library(root: pathlib.Path) -> list[str]:
    """Imports in launch/ that a bare Python could not do; its own files may import each other."""
    files = sorted((root / "launch").rglob("*.py"))
    own = {file.stem for file in files} | {"launch"}
    return [
        f"{file.relative_to(root)}:{line}: {name} is not in the standard library"
        for file in files
        for line, name in imports(file)
        if not name.startswith(".") and name.split(".")[0] not in sys.stdlib_module_names | own
    ]


def long_functions(root: pathlib.Path) -> list[str]:
    return [
        f"{file.relative_to(root)}:{node.lineno}: {node.name} has {length} lines"
        for folder in ("vit_scale", "configs", "launch", "benchmarks")
        for file in sorted((root / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    ]


def empty_names(files: list[pathlib.Path]) -> list[str]:
    return [
        str(file)
        for file in files
        if file.suffix in {".py", ".sh"}
        and file.parts[:2] != ("tests", "helpers")
        and {file.stem, *file.parts} & NAMES_THAT_SAY_NOTHING
    ]


def local_addresses(root: pathlib.Path, files: list[pathlib.Path]) -> list[str]:
    """Lines of text files that name a registry host or a path of somebody's machine."""
    found = []
    for file in files:
        try:
            lines = (root / file).read_text().splitlines()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # binary, deleted and not yet committed, or a link to a folder
        found += [f"{file}:{n}: {line}" for n, line in enumerate(lines, 1) if LOCAL.search(line)]
    return found


def uncommented_fields(source: str) -> list[str]:
    """Keys in a schema's dictionaries that no comment explains; a whole block needs none."""
    tree = ast.parse(source)
    blocks = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return [
        f"{key.value}, line {key.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if commented.isdisjoint(range(key.lineno, value.end_lineno + 1))
        and not (isinstance(value, ast.Call) and getattr(value.func, "id", "") in blocks)
    ]


def project_files() -> list[pathlib.Path]:
    """What is or may be committed; without git (an unpacked archive) everything visible."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        return [pathlib.Path(line) for line in listing.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        files = (file.relative_to(ROOT) for file in ROOT.rglob("*") if file.is_file())
        return [file for file in files if not any(part.startswith(".") for part in file.parts)]


def test_imports_point_one_way():
    assert wrong_directions(ROOT) == []


def test_each_package_has_one_home():
    assert away_from_home(ROOT) == []


def test_what_is_imported_is_what_is_installed():
    """A missing requirement breaks only on a fresh machine; a superfluous one costs everybody."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.match(r"[\w-]+", line)[0] for line in project["dependencies"] + extras["inspect"]
    }
    homes = {distribution for distribution, _ in HOMES.values()}
    lines = extras["peers"] + extras["hf"] + extras["hub"] + extras["tfds"]
    optional = {re.match(r"[\w-]+", line)[0] for line in lines} & homes
    assert optional == {"torch", "datasets", "huggingface_hub", "tensorflow-datasets"}
    assert declared == homes - optional


def test_launch_needs_only_the_standard_library():
    assert not_standard_library(ROOT) == []


def test_functions_are_short():
    assert long_functions(ROOT) == []


def test_names_say_something():
    assert empty_names(project_files()) == []


def test_nothing_is_tied_to_one_machine():
    assert local_addresses(ROOT, project_files()) == []


def test_every_field_of_the_schema_is_explained():
    assert uncommented_fields((ROOT / "configs" / "base.py").read_text()) == []


@pytest.mark.parametrize("name", config.names())
def test_config_loads(name):
    """Also each of its stages. Its header is the command that runs it, and what comes out."""
    cfg = config.load(name)
    for argument in cfg.stages:
        assert not config.load(f"{name}:{argument}").stages
    header = ast.get_docstring(ast.parse((config.FOLDER / f"{name}.py").read_text()))
    assert re.search(rf"--config {name}(:\S+)?(\s|$)", header), "the header gives the command"
    assert re.search("Result|Expected", header), "the header says what comes out, or not measured"


PLANTED = {
    "vit_scale/models/vit.py": "import wandb\nfrom vit_scale.training import trainer\n",
    "vit_scale/training/trainer.py": "import vit_scale.models.vit\nfrom vit_scale import errors\n",
    "vit_scale/data/cifar.py": "from vit_scale.data.sources import Source\nimport grain\n",
    "vit_scale/augment/view.py": "import vit_scale.data\nfrom ml_collections import ConfigDict\n",
    "vit_scale/distributed/mesh.py": "from ml_collections import config_flags\nfrom . import x\n",
    "vit_scale/novel.py": "def f():\n    import pandas\n",
    "launch/tpu.py": "import json, jax\nfrom launch.states import State\nimport vit_scale\n",
    "launch/states.py": "def f():\n" + "    1\n" * 60,
}


@pytest.fixture
def planted(tmp_path) -> pathlib.Path:
    for name, source in PLANTED.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return tmp_path


def test_planted_mistakes_are_found(planted):
    assert wrong_directions(planted) == [
        "vit_scale/augment/view.py:1: augment must not import data",
        "vit_scale/distributed/mesh.py:2: write the whole name instead of ..x",
        "vit_scale/models/vit.py:2: models must not import training",
        "vit_scale/novel.py: give 'novel' its place in LAYERS",
    ]
    mesh = "vit_scale/distributed/mesh.py:1: ml_collections.config_flags"
    assert away_from_home(planted) == [
        f"{mesh} may be imported in cli, config only",
        "vit_scale/models/vit.py:1: wandb may be imported in tracking only",
        "vit_scale/novel.py:2: give pandas a home in HOMES",
    ]
    assert not_standard_library(planted) == [
        "launch/tpu.py:1: jax is not in the standard library",
        "launch/tpu.py:3: vit_scale is not in the standard library",
    ]
    assert long_functions(planted) == ["launch/states.py:1: f has 61 lines"]


def test_planted_names_are_found(tmp_path):
    files = [
        pathlib.Path(name)
        for name in ("vit_scale/utils.py", "a/misc/b.sh", "tests/helpers/tiny.py")
    ]
    assert empty_names(files) == ["vit_scale/utils.py", "a/misc/b.sh"]
    (tmp_path / "notes.md").write_text(
        "fine: runs/x, /tmp/x\nls /" + "home/ada/x\nhttps://py" + "pi.org\n"
    )
    lines = local_addresses(tmp_path, [pathlib.Path("notes.md")])
    assert [line.split(":")[1] for line in lines] == ["2", "3"]
    assert uncommented_fields(
        "def a(): return {'x': 1, 'b': b()}\ndef b():\n  return {\n'y': 2,  # m\n}"
    ) == ["x, line 1"]
