"""What can be seen to be wrong before anything is billed: the config, its data, its workdir.

The project's own command resolves the config, on this machine's CPU, for the devices of the slice.
Where it can't be had (the project needs Python 3.11), the name is checked against the files, and
worker 0 checks the rest before any training starts.
"""

import difflib
import json
import os
import pathlib
import subprocess
import sys

from launch.tpu.exit_codes import BAD_INPUT, Stop


def check_name(root: pathlib.Path, config: str) -> str:
    """The config as the workers name it. Raises Stop for one that isn't there."""
    name, colon, argument = config.partition(":")
    if name.endswith(".py") or "/" in name:
        path = pathlib.Path(name).resolve()
        if not path.is_file():
            raise Stop(BAD_INPUT, f"there is no config file {name}")
        if root not in path.parents:
            raise Stop(BAD_INPUT, f"{name} is not in {root}, and only that travels: move it there")
        return f"./{path.relative_to(root)}{colon}{argument}"
    known = sorted(file.stem for file in (root / "configs").glob("*.py") if file.stem != "base")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"valid: {', '.join(known)}"
        raise Stop(BAD_INPUT, f"no config is named {name!r}; {hint}")
    return config


def show(config: str, overrides: list[str], devices: int | None) -> list[str]:
    """vit-scale's words; `devices` is None where their number isn't known."""
    many = [] if devices is None else ["--devices", str(devices)]
    return ["show", "--config", config, "--json", *many, *overrides]


def resolve(
    root: pathlib.Path, config: str, overrides: list[str], devices: int | None
) -> dict | None:
    """What the config comes to on so many devices; None where the command can't be had here.

    Raises Stop for what the project refuses.
    """
    argv = [str(root / ".venv" / "bin" / "vit-scale"), *show(config, overrides, devices)]
    if not os.path.exists(argv[0]) and not make_environment(root):
        return None
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(argv, cwd=root, env=environment, capture_output=True, text=True)
    except OSError:
        return None
    # One that says nothing is an environment that does not work: the workers have their own.
    return read(done.returncode, done.stdout, done.stderr)


def read(code: int, out: str, err: str) -> dict | None:
    """What `vit-scale show` has printed; None where it did not come to that.

    Raises Stop for what the project refuses.
    """
    if code == 0:
        return json.loads(out.splitlines()[-1])
    said = [line for line in err.splitlines() if line.startswith("vit-scale: ")]
    if not said:
        return None
    raise Stop(BAD_INPUT, said[-1].removeprefix("vit-scale: "))


def make_environment(root: pathlib.Path) -> bool:
    """Whether .venv could be made: it can't where there is no Python 3.11, nor uv."""
    script = [str(root / "launch" / "environment.sh")]
    return subprocess.run(script, stdout=sys.stderr).returncode == 0


def parts(shown: dict) -> dict[str, dict]:
    """The configs that are trained: the stages, or the one under its name ""."""
    return shown.get("stages") or {"": shown["config"]}


def check_data(shown: dict, local: bool) -> list[str]:
    """Commands that bring to each worker what it needs. Raises Stop for what it could not reach."""
    if local:
        return []
    commands, stages = [], parts(shown)
    for name, cfg in stages.items():
        where, path = f"{name}: " if name else "", cfg["data"]["path"]
        if not is_reachable(path) and cfg["data"]["name"] == "cifar10":
            commands.append(f"vit-scale data download cifar10 --out {path}")
        elif not is_reachable(path) and cfg["data"]["name"] != "fractal":
            raise Stop(
                BAD_INPUT,
                f"{where}data.path={path} is a folder of this machine: give "
                "--config.data.path=gs://BUCKET/NAME, or a path that --setup mounts",
            )
        source = cfg["init"]["source"]
        web = source.startswith(("https://", "http://"))
        if source and source not in stages and not web and not is_reachable(source):
            raise Stop(
                BAD_INPUT,
                f"{where}init.source={source} is a folder of this machine: copy it, and give "
                "--config.init.source=gs://BUCKET/RUN",
            )
    return sorted(set(commands))


def is_reachable(path: str) -> bool:
    return path.startswith(("gs://", "/"))


def check_workdir(workdir: str, hosts: int, kept: bool, mounted: bool) -> None:
    """Raises Stop where a machine's disk would take the run with it, or be one of several."""
    if workdir.startswith("gs://") and len(workdir) > len("gs://"):
        return
    if workdir.startswith("/") and (mounted or (kept and hosts == 1)):
        return
    given = f"workdir {workdir} is on a worker's disk" if workdir else "there is no workdir"
    why = "all hosts must share it" if hosts > 1 else "it is deleted with the machine"
    raise Stop(
        BAD_INPUT,
        f"{given}, and {why}: give --workdir gs://BUCKET/RUN, or BUCKET=gs://BUCKET in "
        "launch/tpu.env (a mounted path: --workdir-is-mounted)",
    )
