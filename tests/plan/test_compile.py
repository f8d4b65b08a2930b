"""plan with its compiler: a tiny model's real step, compiled for TPUs that are not there.

libtpu is in a folder of its own (launch/compiler.sh), which only plan's processes look into.
"""

import importlib.util
import json
import os
import pathlib
import sys

import pytest

from tests.helpers.tiny import SIZES, tiny_config
from vit_scale import cli
from vit_scale.plan import COMPILER
from vit_scale.training.setup import summary

HERE = pathlib.Path(COMPILER).is_dir() or importlib.util.find_spec("libtpu")
pytestmark = pytest.mark.skipif(
    not HERE, reason="libtpu is not installed: launch/compiler.sh installs it"
)

PLAIN = "from vit_scale.config import base\n\n\ndef get_config():\n    return base()\n"
FIELDS = (*SIZES, "data.batch=64", "optim.ema=0.9", "model.scan=False")


@pytest.fixture(scope="module", autouse=True)
def no_options_for_a_cpu():
    """libtpu reads the same variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output of plan --json for the tiny model, with more arguments."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plain.py").write_text(PLAIN)

    def run(capsys, *arguments, fields=()) -> dict:
        options = ["plan", "--config", str(folder / "plain.py"), "--topology", "v5e:2x2", "--json"]
        options += [f"--config.{field}" for field in (*FIELDS, *fields)]
        capsys.readouterr()
        assert cli.main([*options, *arguments]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


def parameters() -> int:
    return summary(tiny_config())["parameters"]


def test_a_step(run, capsys):
    """Exact where the figure is exact."""
    result = run(capsys, "--price=2")
    assert (result["topology"], result["chips"], result["devices"]) == ("v5e:2x2", 4, 4)
    assert result["device_kind"] == "TPU v5 lite"
    assert result["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert result["fits"] is True
    assert result["hbm_bytes"] == 15.75 * 2**30
    assert result["parameter_bytes"] == result["ema_bytes"] == 4 * parameters()
    # Adam's two moments, its count, and the schedule's: int32.
    assert result["optimizer_bytes"] == 8 * parameters() + 8
    assert result["flops_per_step"] == 64 * summary(tiny_config())["flops_per_image"]
    state = result["parameter_bytes"] + result["optimizer_bytes"] + result["ema_bytes"]
    assert state < result["peak_bytes"] < result["hbm_bytes"]
    assert result["step_ms"] >= result["arithmetic_ms"] > 0
    assert result["images_per_second"] == pytest.approx(64e3 / result["step_ms"])
    assert result["chip_hours"] == pytest.approx(4 * 10 * result["step_ms"] / 3.6e6)
    assert result["cost_usd"] == pytest.approx(2 * result["chip_hours"])
    assert result["unpriced_kernels"] == 0
    reduced = {row["kind"]: row for row in result["collectives"]}["all-reduce"]
    # The gradients, and metrics; the patches' bias has the sum of the positions' gradients.
    bias = 4 * tiny_config().model.width
    assert reduced["bytes"] >= result["parameter_bytes"] - bias


@pytest.mark.slow
def test_variants_of_a_step(run, capsys):
    """In the right direction where a figure is estimated."""
    variants = ["data.batch=8192", "mesh.fsdp=4"]
    rows = {row["variant"]: row for row in run(capsys, "--compare", *variants)["variants"]}
    result = rows["as configured"]
    larger, sharded = rows["data.batch=8192"], rows["mesh.fsdp=4"]
    assert larger["step_ms"] > 2 * result["step_ms"]
    assert larger["flops_per_step"] == 128 * result["flops_per_step"]
    assert larger["parameter_bytes"] == result["parameter_bytes"]
    assert sharded["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    # All but positions, norms, [CLS], small biases: what the sharding rules don't list.
    assert sharded["parameter_bytes"] < result["parameter_bytes"] / 2
    assert {"all-gather", "reduce-scatter"} & {row["kind"] for row in sharded["collectives"]}


@pytest.mark.slow
def test_what_does_not_fit_and_what_would(run, capsys):
    """Residuals of 256 blocks for 65,536 images are too much; recomputing them is not."""
    fields = ("data.batch=65536", "model.depth=256", "model.scan=True")
    result = run(capsys, fields=fields)
    assert result["fits"] is False and "step_ms" not in result
    assert result["peak_bytes"] > result["hbm_bytes"]
    fixed = run(capsys, "--fit", fields=fields)
    assert fixed["fits"] is True and fixed["peak_bytes"] < fixed["hbm_bytes"]
    assert fixed["flags"][0].startswith("--config.model.remat=")
    assert "does not fit" not in fixed["flags"]


def test_options_reach_the_compiler(run, capsys):
    """An unknown option is rejected in one line; a CPU ignores them (test_mesh)."""
    with pytest.raises(AssertionError, match="No such compile option: 'xla_no_such_option'"):
        run(capsys, fields=("mesh.compiler=('xla_no_such_option=1',)",))


def test_what_no_tpu_has_is_refused(run, capsys):
    with pytest.raises(AssertionError, match=r"needs NVIDIA GPUs .* of 4 x TPU v5 lite: set model"):
        run(capsys, fields=("model.attention=cudnn", "model.dtype=bfloat16"))


def test_without_its_compiler_one_line_says_so(run, capsys, monkeypatch, tmp_path):
    """Nor is a slice compiled that the compiler does not support."""
    monkeypatch.setattr("vit_scale.plan.planner.COMPILER", str(tmp_path))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not _has_libtpu(p)])
    arguments = ["plan", "--config", "vit_tiny_imagenet", "--topology"]
    assert cli.main([*arguments, "v5e:2x2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs libtpu" in line and "launch/compiler.sh" in line
    monkeypatch.undo()
    assert cli.main([*arguments, "v5p:3x3x3"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vit-scale: topology v5p:3x3x3 is not supported by libtpu: INVALID")


def _has_libtpu(folder: str) -> bool:
    return os.path.isdir(os.path.join(folder, "libtpu"))
