"""Programs that users of the project bring along, each in an environment of its own."""

import functools
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest


@functools.cache
def python_of(command: str, package: str) -> str:
    """Return the Python that has `command`: the one on PATH, or installed for these tests.

    Skips the test without a package registry.
    """
    path = shutil.which(command)
    if path:
        return str(pathlib.Path(path).resolve().parent / "python")
    folder = pathlib.Path(tempfile.gettempdir()) / f"vit_scale-{command}-{package.split('==')[-1]}"
    if not (folder / "bin" / command).exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", package]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(folder)
            pytest.skip(f"{package} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return str(folder / "bin" / "python")
