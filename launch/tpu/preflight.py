"""Check the config, its data and its workdir before anything is billed.

`vit-scale show` resolves the config for the slice's devices, on this machine's CPU. Without it (the
project needs Python 3.11) only the name is checked here, and worker 0 checks the rest before
training starts.
"""

import difflib
import json
import os
import pathlib
import re
import subprocess
import sys

from launch.tpu.exit_codes import Exit, Stop

STORED = ("folder", "array_record", "tar", "huggingface", "tfds")  # the others are downloaded
HUB = r"\w[\w.-]*/[\w.-]+(@\w+)?|\w[\w.-]*(@\w+)?"
REACHABLE = ("gs://", "/", "https://", "http://", "hf://")  # from every worker


def check_name(root: pathlib.Path, config: str) -> str:
    """Return the config's name on the workers. Raises Stop if it does not exist."""
    name, colon, argument = config.partition(":")
    if name.endswith(".py") or "/" in name:
        path = pathlib.Path(name).resolve()
        if not path.is_file():
            raise Stop(Exit.BAD_INPUT, f"config file {name} does not exist")
        if root not in path.parents:
            problem = f"config {name} is outside {root}, and workers get only that"
            raise Stop(Exit.BAD_INPUT, f"{problem}: move it there")
        return f"./{path.relative_to(root)}{colon}{argument}"
    names = sorted(file.stem for file in (root / "configs").glob("*.py") if file.stem != "base")
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"valid: {', '.join(names)}"
        raise Stop(Exit.BAD_INPUT, f"unknown config {name!r}; {hint}")
    return config


def show_arguments(config: str, overrides: list[str], devices: int | None) -> list[str]:
    """Return the arguments of `vit-scale show`; `devices` is None if their number is unknown."""
    flag = [] if devices is None else ["--devices", str(devices)]
    return ["show", "--config", config, "--json", *flag, *overrides]


def resolve(root: pathlib.Path, show: list[str], install: bool = False) -> dict | None:
    """Run `vit-scale show`; None if `vit-scale` is not available here.

    With `install`, .venv is created if there is none. Raises Stop if vit-scale refuses the config.
    """
    argv = [str(root / ".venv" / "bin" / "vit-scale"), *show]
    script = [str(root / "launch" / "environment.sh")]
    if not os.path.exists(argv[0]) and not install:
        print(f"config {show[2]} not checked here: run launch/environment.sh", file=sys.stderr)
        return None
    if not os.path.exists(argv[0]) and subprocess.run(script, stdout=sys.stderr).returncode:
        return None  # as without Python 3.11 and uv
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(argv, cwd=root, env=environment, capture_output=True, text=True)
    except OSError:
        return None
    # No message means a broken environment here; the workers have their own.
    return parse_show(done.returncode, done.stdout, done.stderr)


def parse_show(code: int, out: str, err: str) -> dict | None:
    """Parse what `vit-scale show` printed; None if it could not run.

    Raises Stop with its message if it refused the config.
    """
    if code == 0:
        return json.loads(out.splitlines()[-1])
    errors = [line for line in err.splitlines() if line.startswith("vit-scale: ")]
    if not errors:
        return None
    raise Stop(Exit.BAD_INPUT, errors[-1].removeprefix("vit-scale: "))


def stages(resolved: dict) -> dict[str, dict]:
    """Return the configs of the stages by name; a config without stages has the name ""."""
    return resolved.get("stages") or {"": resolved["config"]}


def check_data(resolved: dict, local: bool) -> list[str]:
    """Return commands that fetch data to each worker. Raises Stop for data it cannot reach."""
    commands, named = set(), stages(resolved)
    for stage, cfg in named.items() if not local else ():
        problem, sets = "", [("data.path", cfg["data"]["name"], cfg["data"]["path"])]
        for text, _ in cfg["data"].get("mixture", ()):
            sets.append(("data.mixture", *text.partition(":")[::2]))
        for field, name, path in sets:
            on_hub = name == "huggingface" and re.fullmatch(HUB, path) and not os.path.exists(path)
            if path.startswith(("gs://", "/")) or on_hub or name == "fractal":
                continue
            if name in STORED:
                problem = f"{field}={path} is a folder on this machine: pass --config.data.path="
                problem += "gs://BUCKET/NAME, or a path that --setup mounts"
            else:
                commands.add(f"vit-scale data download {name} --out {path or '.data'}")
        models = {"init.source": cfg["init"]["source"]} if not problem else {}
        if models and cfg["objective"] == "distillation":
            models["distill.teacher"] = cfg["distill"]["teacher"]
        for field, source in models.items():
            if source and source not in named and not source.startswith(REACHABLE):
                problem = f"{field}={source} is a folder on this machine: copy it, and pass "
                problem += f"--config.{field}=gs://BUCKET/RUN"
        if problem:
            raise Stop(Exit.BAD_INPUT, f"{stage}: {problem}" if stage else problem)
    return sorted(commands)


def check_workdir(workdir: str, hosts: int, kept: bool, mounted: bool) -> None:
    """Raise Stop if the workdir is not shared by all hosts, or is deleted with the machine."""
    if workdir.startswith("gs://") and len(workdir) > len("gs://"):
        return
    if workdir.startswith("/") and (mounted or (kept and hosts == 1)):
        return
    problem = f"workdir {workdir} is on a worker's disk" if workdir else "no workdir"
    why = "all hosts must share one" if hosts > 1 else "a local one is deleted with the machine"
    remedy = "pass --workdir gs://BUCKET/RUN, or set BUCKET=gs://BUCKET in launch/tpu.env (for a "
    remedy += "mounted path: --workdir-is-mounted)"
    raise Stop(Exit.BAD_INPUT, f"{problem}, and {why}: {remedy}")
