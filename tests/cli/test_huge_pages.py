"""`vit-scale train` starts itself once more, with another way to allocate memory."""

import os
import sys

import pytest

from vit_scale.cli import entry


@pytest.fixture
def restarts(monkeypatch):
    """The programs that took this one's place; then, as here, nothing follows."""
    programs: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: programs.append([path, *arguments]))
    monkeypatch.setattr(entry, "run", lambda argv: 0)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "-m", "vit_scale.cli", "train", "--config", "x"]
    )
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(entry, "ACCELERATORS", ())
    return programs


def started(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vit-scale", *argv])
    assert entry.main() == 0


def test_training_restarts_once_with_the_same_arguments(restarts, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=7")
    for _ in range(2):
        started(monkeypatch, "train", "--config", "x")
    python = sys.executable
    assert restarts == [[python, python, "-m", "vit_scale.cli", "train", "--config", "x"]]
    tunables = os.environ["GLIBC_TUNABLES"].split(":")
    assert tunables[:2] == ["glibc.malloc.tcache_count=7", "glibc.malloc.hugetlb=1"]
    kept = [f"glibc.malloc.{name}" for name in ("mmap_threshold", "trim_threshold", "arena_max")]
    assert [item.partition("=")[0] for item in tunables[2:]] == kept


@pytest.mark.parametrize("platforms", ["cpu", "", "cuda"])
def test_beside_an_accelerator_threads_keep_their_arenas(
    restarts, monkeypatch, tmp_path, platforms
):
    device = tmp_path / "accel0"
    device.touch()
    monkeypatch.setattr(entry, "ACCELERATORS", (f"{tmp_path}/nvidia[0-9]*", f"{tmp_path}/accel*"))
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    started(monkeypatch, "train")
    kept = "arena_max" in os.environ["GLIBC_TUNABLES"]
    assert kept == (platforms == "cpu")
    device.unlink()
    monkeypatch.delenv("GLIBC_TUNABLES")
    started(monkeypatch, "train")
    assert "glibc.malloc.hugetlb=1:glibc.malloc.mmap" in os.environ["GLIBC_TUNABLES"]


def test_a_choice_of_ones_own_stays(restarts, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    started(monkeypatch, "train")
    assert restarts == []
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"


@pytest.mark.parametrize("argv", [(), ("show", "--config", "x"), ("--help",)])
def test_what_computes_little_does_not_restart(restarts, monkeypatch, argv):
    started(monkeypatch, *argv)
    assert restarts == []


def test_other_systems_have_no_such_variable(restarts, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    started(monkeypatch, "train")
    assert restarts == []


def test_a_call_from_python_never_restarts(restarts):
    assert entry.main(["train", "--config", "x"]) == 0
    assert restarts == []
