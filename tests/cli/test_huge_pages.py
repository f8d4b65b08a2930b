"""`vit-scale train` starts itself once more, with huge pages for the allocator."""

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
    assert tunables == ["glibc.malloc.tcache_count=7", "glibc.malloc.hugetlb=1"]


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
