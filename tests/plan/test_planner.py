"""plan, without its compiler: programs as text, slices by name, the arithmetic of predictions."""

import json

import pytest

from tests.helpers.tiny import tiny_config
from vit_scale import cli, plan
from vit_scale.data import delivered_size
from vit_scale.errors import UserError
from vit_scale.plan import estimate, planner, table, topology
from vit_scale.plan.hlo import Collective, Cost, Program, exposed_cycles, shape_bytes

# A program

CYCLES = 'backend_config={{"estimated_cycles":"{}"}}'


def program(entry: str, *computations: str) -> Cost:
    """The cost of a program: lines of its entry's body, and other computations in full."""
    return Program(
        "HloModule m\n\n"
        + "\n\n".join(computations)
        + f"\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n"
        f"{entry}\n}}\n"
    ).cost()


INNER = f"""%inner (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0:T(8)}} parameter(0)
  ROOT %mul = f32[8]{{0:T(8)}} multiply(%p, %p), {CYCLES.format(1_000_000)}
}}"""


def test_cycles_are_summed_and_a_fusion_speaks_for_what_is_in_it():
    cost = program(
        f"""  %p = f32[8]{{0}} parameter(0)
  %fusion.1 = (f32[8]{{0:T(8)}}, f32[8]{{0}}) fusion(%p), calls=%inner, {CYCLES.format(70)}
  ROOT %copy = f32[8]{{0}} copy(%p), {CYCLES.format(5)}""",
        INNER,
    )
    assert cost == Cost(75, (), 0)


def loop(name: str, bound: str, body_cycles: int, inside: str = "") -> str:
    return f"""%{name}_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]{{0}}) parameter(0)
  %work.{name} = f32[8]{{0}} copy(%p), {CYCLES.format(body_cycles)}
{inside}
}}

%{name}_condition (p: (s32[], f32[8])) -> pred[] {{
  %bound = {bound}
  ROOT %lt = pred[]{{:T(512)}} compare(%p, %bound), direction=LT
}}"""


WHILE = "  %while.{0} = (s32[], f32[8]{{0}}) while(%p), condition=%{0}_condition, body=%{0}_body"


def test_a_loop_counts_as_often_as_it_runs():
    known = WHILE.format("a") + ', backend_config={"known_trip_count":{"n":"3"}}'
    a = loop("a", "s32[]{:T(128)} constant(99)", 10)
    assert program(known, a).cycles == 30
    b = loop("b", "s32[]{:T(128)} constant(24)", 10)
    assert program(WHILE.format("b"), b).cycles == 240
    data_dependent = loop("c", "f32[]{:T(128)} constant(7)", 10)
    assert program(WHILE.format("c"), data_dependent).cycles == 10
    nested = loop("d", "s32[] constant(2)", 1, WHILE.format("b"))
    assert program(WHILE.format("d"), nested, b).cycles == 2 * (1 + 240)


def test_branches_count_as_their_mean_and_a_call_once():
    cheap = INNER.replace("%inner", "%cheap").replace("1000000", "4")
    entry = "  %c = f32[8] conditional(%i, %p, %p), branch_computations={%cheap, %inner}"
    assert program(entry, INNER, cheap).cycles == 500_002
    assert program("  %c = f32[8] call(%p), to_apply=%cheap", cheap).cycles == 4


GATHER = "bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=[4,2]<=[8]"


def test_a_pair_hides_what_is_computed_between():
    """In the entry, and in a loop, as often as it runs. Without work in between: not hidden."""
    start = "(bf16[8,128]{1,0}, bf16[16,128]{1,0}) all-gather-start(%p)"
    pair = f"""  %ag = {start}, replica_groups=[4,2]<=[8]
  %work = f32[8]{{0}} copy(%p), {CYCLES.format(50)}
  %done = bf16[16,128]{{1,0}} all-gather-done(%ag)
  %later = f32[8]{{0}} copy(%p), {CYCLES.format(7)}"""
    gather = Collective("all-gather", 16 * 128 * 2, 2, 50, 1)
    assert program(pair) == Cost(57, (gather,), 0)
    inside = loop("a", "s32[] constant(3)", 0, pair)
    assert program(WHILE.format("a"), inside) == Cost(171, (gather._replace(times=3),), 0)
    lines = pair.splitlines()
    (idle,) = program("\n".join([lines[0], lines[2]])).collectives
    assert idle.hidden == 0


def test_a_fused_pair_is_one_transfer():
    """The TPU's form: a start, fusions that carry out steps of it, and a done."""
    carrying = "\n\n".join(
        f"%{name} (p: bf16[8,128]) -> bf16[16,128] {{\n  ROOT %ag.{name} = {GATHER}\n}}"
        for name in ("start", "async_collective_fusion.3", "done")
    )
    cost = program(
        f"""  %async-collective-start.4 = bf16[16,128] fusion(%p), kind=kCustom, calls=%start
  %fusion.9 = bf16[16,128] fusion(%p), calls=%async_collective_fusion.3, {CYCLES.format(30)}
  %async-collective-done.4 = bf16[16,128] fusion(%fusion.9), kind=kCustom, calls=%done""",
        carrying,
    )
    assert cost == Cost(30, (Collective("all-gather", 4096, 2, 30, 1),), 0)


def test_what_everything_waits_for():
    scatter = """%all-reduce-scatter.2 (input: f32[128,64]) -> f32[32,64] {
  %ar = f32[128,64]{1,0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %ds = f32[32,64]{1,0} dynamic-slice(%ar, %i, %j), dynamic_slice_sizes={32,64}
}"""
    groups = "mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_0','axis_2'}"
    cost = program(
        f"""  %rs = f32[32,64]{{1,0}} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2
  %ar = (f32[128,197]{{1,0:T(8,128)S(1)}}, bf16[8]{{0}}) all-reduce(%p), replica_groups={groups}
  %kernel = bf16[8] custom-call(%p), custom_call_target="tpu_custom_call"
  %send = (f32[10]{{0}}, u32[], token[]) send(%p), frontend_attributes={{_xla_megascale="x"}}""",
        scatter,
    )
    assert cost == Cost(
        0,
        (
            Collective("reduce-scatter", 128 * 64 * 4, 4, None, 1),
            Collective("all-reduce", 128 * 197 * 4 + 16, 16, None, 1),
            Collective("send", 40, 2, 0, 1),
        ),
        1,
    )


def test_bytes_of_shapes():
    assert shape_bytes("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}") == 2048
    assert (
        shape_bytes("(f32[3]{0}, pred[5]{0}, s4[4]{0}, f8e4m3fn[7]{0}, u32[])")
        == 12 + 5 + 2 + 7 + 4
    )
    assert shape_bytes("token[]") == 0


LOG = """I1 x.cc:1] [latency-hiding-scheduler] Statistics before scheduling:
I1 x.cc:2] For computation: main.1_spmd, module jit_train_step(3)
I1 x.cc:2] Total wasted cycles: 5e+06
I1 x.cc:3] [latency-hiding-scheduler] Statistics after scheduling:
I1 x.cc:4] For computation: body.7, module jit_train_step(3)
I1 x.cc:4] Total wasted cycles: 11
I1 x.cc:4] For computation: main.1_spmd, module jit_train_step(3)
I1 x.cc:4] Total wasted cycles: 2.5e+03
I1 x.cc:4] Total cycles: 2.65818e+08
"""


def test_the_log_of_the_scheduler():
    assert exposed_cycles(LOG) == 2500
    assert exposed_cycles("nothing was asynchronous\n") == 0


# Slices


@pytest.mark.parametrize(
    ("text", "name", "chips", "devices"),
    [
        ("v5e:16x16", "v5e:16x16", 256, 256),
        ("v5litepod-256", "v5e:16x16", 256, 256),
        ("v5e-8", "v5e:2x4", 8, 8),
        ("v6e-1", "v6e:1x1", 1, 1),
        ("v4-32", "v4:2x2x4", 16, 16),
        ("v5p-128", "v5p:4x4x4", 64, 64),
        ("v5p:16x20x28", "v5p:16x20x28", 8960, 8960),
        ("tpu7x-16", "tpu7x:2x2x2", 8, 16),
        ("TPU7x:4x4x4", "tpu7x:4x4x4", 64, 128),
    ],
)
def test_slices_by_name(text, name, chips, devices):
    result = topology.parse(text)
    assert (result.name, result.chips, result.devices) == (name, chips, devices)
    assert topology.parse(text, 3).chips == 3 * chips


def test_two_names_of_each_size():
    for kind, tpu in topology.TPUS.items():
        for chips, sides in tpu.topologies.items():
            result = topology.parse(f"{tpu.accelerator_type}-{chips * tpu.type_counts_per_chip}")
            assert result == topology.parse(f"{kind}:{sides}")
            assert result.chips == chips


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v8:2x2", "valid: v4:{2x2x1,2x2x2,"),
        ("v5e", "valid: v5e:{1x1,2x2,2x4,4x4,4x8,8x8,8x16,16x16} or v5litepod-{1,4,8,16,32,64,"),
        ("v5e:2x2x2", "valid: v5e:{1x1,"),
        ("v5e:0x4", "valid: v5e:{1x1,"),
        ("v6e-24", "or v6e-{1,4,8,16,32,64,128,256}"),
        ("v4-9", "or v4-{8,16,32,"),
        ("v4-x", "or v4-{8,16,32,"),
        ("v5e:32x32", "v5e:32x32 has 1,024 chips; the largest v5e slice has 256: add slices"),
    ],
)
def test_slices_that_are_not_made(text, message):
    with pytest.raises(UserError) as caught:
        topology.parse(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.code == 2


def test_slices_are_counted_from_one():
    with pytest.raises(UserError, match="--slices=0 must be at least 1"):
        topology.parse("v5e:4x4", 0)


# Predictions

V5E = topology.parse("v5e:4x4", 2)
MOVED = (
    Collective("all-reduce", 1_000_000, 4, None, 10),  # 2 x 3/4 x 1 MB x 10
    Collective("all-gather", 1_000_000, 2, 99, 4),  # 1/2 x 1 MB x 4
    Collective("all-gather", 1_000_000, 1, None, 4),  # nobody to gather from
    Collective("collective-permute", 1_000_000, 2, None, 1),
    Collective("send", 6_250_000, 2, 0, 3),
)


def test_parts_of_a_step_exactly():
    result = estimate.parts(Cost(30_000_000, MOVED, 0), V5E)
    assert result == pytest.approx(
        {
            "arithmetic_ms": 20.0,  # at 1.5 GHz
            "synchronous_ms": 1e3 * (15e6 + 1e6) / 200e9,
            "hidden_ms": 1e3 * 2e6 / 200e9,
            "between_slices_ms": 1e3 * 3 * 6.25e6 / 3.125e9,
        }
    )
    assert estimate.step_ms(result | {"exposed_ms": 0.5}) == pytest.approx(20 + 0.5 + 0.08)


def test_a_step_is_no_shorter_than_what_it_moves():
    times = {"arithmetic_ms": 1, "exposed_ms": 1, "synchronous_ms": 2}
    assert estimate.step_ms(times | {"hidden_ms": 1, "between_slices_ms": 3}) == 4
    assert estimate.step_ms(times | {"hidden_ms": 9, "between_slices_ms": 3}) == 11
    assert estimate.step_ms(times | {"hidden_ms": 9, "between_slices_ms": 30}) == 30


STEP = {"global_batch": 1024, "chips": 256, "devices": 256, "steps": 9000}
STEP |= {"flops_per_step": 1024 * 1e10, "device_kind": "TPU v5 lite"}


def test_totals_exactly():
    result = estimate.totals(STEP, 20.0, 1.2)
    assert result["images_per_second"] == 51_200
    assert result["mfu"] == pytest.approx(51_200 * 1e10 / (256 * 197e12))
    assert result["chip_hours"] == pytest.approx(256 * 9000 * 0.02 / 3600)
    assert result["cost_usd"] == pytest.approx(1.2 * 12.8)
    assert estimate.totals(STEP, 20.0, None)["cost_usd"] is None


def test_what_the_hosts_have_to_decode():
    where = topology.parse("v5e:4x4")
    step = {"hosts": 4}
    needs = estimate.decoding(step, 45_200, where)
    assert needs == {
        "images_per_second_per_host": 11_300, "decoding_vcpus": 22.6, "host_vcpus": 112
    }  # fmt: skip
    line = table.decoding_line(step | needs)
    assert line.startswith(
        "each of 4 hosts has to decode 11,300 images/s: 23 vCPUs at 500 images/s each, of 112 ("
    )
    assert "WARNING" not in line
    starved = table.decoding_line(step | estimate.decoding(step, 4 * 60_000, where))
    assert "120 vCPUs" in starved and "WARNING: the devices would wait for images" in starved


def test_collectives_by_kind():
    assert estimate.by_kind(MOVED)[:2] == [
        {"kind": "send", "count": 3, "bytes": 18_750_000, "async": 3, "overlapped": 0},
        {"kind": "all-reduce", "count": 10, "bytes": 10_000_000, "async": 0, "overlapped": 0},
    ]
    gathers = estimate.by_kind(MOVED)[2]
    assert gathers == {
        "kind": "all-gather", "count": 8, "bytes": 8_000_000, "async": 4, "overlapped": 4
    }  # fmt: skip


def test_batches_have_the_size_that_is_delivered():
    for fields, size in {
        ("data.name=cifar10", "data.resolution=384"): (32, 32),
        ("data.name=folder", "data.resolution=224", "data.load=256"): (256, 256),
        ("data.name=array_record", "data.resolution=224", "data.width=112"): (224, 112),
        ("data.name=fractal", "data.fractal.resolution=52"): (52, 52),
    }.items():
        assert delivered_size(tiny_config(*fields).data) == size
    with pytest.raises(UserError, match="did you mean cifar10"):
        delivered_size(tiny_config("data.name=cifar").data)


# Search and comparison

NEEDS = {"fits": False, "peak_bytes": 20 << 30, "hbm_bytes": 16 << 30, "slices": 1}
NEEDS |= {"parameter_bytes": 1 << 30, "optimizer_bytes": 2 << 30, "ema_bytes": 0}
NEEDS |= {"devices": 32, "mesh": {"data": 32, "fsdp": 1, "tensor": 1}}


def test_the_cheapest_change_is_tried_first():
    """Sharding 3 GiB of state, then recomputing more and more, micro-batches, smaller batches."""
    cfg = tiny_config("data.batch=128")
    assert list(plan.cheapest_changes(NEEDS, cfg)) == [
        ["mesh.fsdp=4"],
        ["mesh.fsdp=16"],
        ["mesh.fsdp=32"],
        ["model.remat=dots_with_no_batch_dims_saveable"],
        ["model.remat=full"],
        ["model.remat=full", "mesh.fsdp=4"],
        ["model.remat=full", "mesh.fsdp=16"],
        ["model.remat=full", "mesh.fsdp=32"],
        ["model.remat=full", "mesh.fsdp=32", "optim.accumulate=2"],
        ["model.remat=full", "mesh.fsdp=32", "optim.accumulate=4"],
        ["model.remat=full", "mesh.fsdp=32", "data.batch=64"],
        ["model.remat=full", "mesh.fsdp=32", "data.batch=32"],
    ]


def test_what_cannot_help_is_not_tried():
    """Sharding saves at most twice the state, 6 GiB; nothing saves more than full remat."""
    cfg = tiny_config("data.batch=32", "model.remat=full")
    far = NEEDS | {"peak_bytes": 23 << 30}
    assert list(plan.cheapest_changes(far, cfg)) == []
    assert list(plan.cheapest_changes(NEEDS, cfg)) == [[f"mesh.fsdp={n}"] for n in (4, 16, 32)]


@pytest.fixture
def compiler(monkeypatch):
    """A compiler whose results `answer` completes."""

    def use(answer):
        def compiled(name, overrides, where):
            step = STEP | {"mesh": NEEDS["mesh"], "hbm_bytes": 16 << 30, "slices": 1}
            step |= {"topology": where.name, "compile_seconds": 12.0, "collectives": []}
            step |= {"unpriced_kernels": 0, "temporary_bytes": 1 << 30, "program_bytes": 1 << 20}
            step |= {f"{part}_bytes": NEEDS[f"{part}_bytes"] for part in ("parameter", "optimizer")}
            step |= {"ema_bytes": 0, "synchronous_ms": 0.0, "hidden_ms": 0, "between_slices_ms": 0}
            return step | answer(dict(item.split("=") for item in overrides)), ""

        monkeypatch.setattr(planner, "_compile", compiled)

    return use


def by_sharding(fields: dict) -> dict:
    """Sharding divides 8 of 20 GiB, and costs a little time per device."""
    size = int(fields.get("mesh.fsdp", 1))
    if "error" in fields.get("data.path", ""):
        return {"error": "it cannot work", "code": 1}
    needs = 12 + 8 / size
    return {"fits": needs <= 16, "peak_bytes": int(needs * 2**30), "arithmetic_ms": 20.0 + size}


def test_fit_finds_the_first_change_that_fits(compiler, capsys):
    compiler(by_sharding)
    arguments = ["plan", "--config", "vit_tiny_imagenet", "--topology", "v5e:4x4"]
    assert cli.main([*arguments]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT: 20.00 of 16.00 GiB per device" in out
    assert cli.main([*arguments, "--fit", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["flags"] == ["--config.mesh.fsdp=4"]
    assert json.loads(out)["step_ms"] == 24
    assert cli.main([*arguments, "--fit", "--price=1.2"]) == 0
    out = capsys.readouterr().out
    assert "to make it fit, add: --config.mesh.fsdp=4" in out and "not measured" in out
    assert "fits: 14.00 of 16.00 GiB" in out


def test_changes_that_a_config_can_not_have_are_passed_over(compiler, capsys):
    def answer(fields):
        if "optim.accumulate" in fields:
            return {"error": "optim.accumulate changes batch normalisation", "code": 1}
        fits = int(fields.get("data.batch", 99)) < 64
        return {"fits": fits, "peak_bytes": (9 if fits else 99) << 30, "arithmetic_ms": 20.0}

    compiler(answer)
    for name, first in (("vit_hybrid_cifar", "model.remat"), ("resnet_cifar", "mesh.fsdp")):
        arguments = ["plan", "--config", name, "--topology", "v5e:4x4", "--fit", "--json"]
        assert cli.main(arguments) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["flags"][-1].startswith("--config.data.batch=")
        assert err.split(": ", 1)[1].startswith(first)
        assert "optim.accumulate=2 (optim.accumulate changes batch normalisation)" in err


def test_nothing_that_fits_is_said(compiler, capsys):
    compiler(lambda fields: {"fits": False, "peak_bytes": 99 << 30})
    arguments = ["plan", "--config", "vit_tiny_imagenet", "--topology", "v5e:4x4", "--fit"]
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("vit-scale: no configuration fits v5e:4x4")
    assert "does not fit: model.remat=full (99.00 of 16.00 GiB)" in err.splitlines()


def test_variants_are_compared_the_best_first(compiler, capsys):
    compiler(by_sharding)
    variants = ["mesh.fsdp=8", "mesh.fsdp=2,optim.lr=0.1", "data.path=error"]
    arguments = ["plan", "--config", "vit_tiny_imagenet", "--topology", "v5e:4x4"]
    assert cli.main([*arguments, "--compare", *variants, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["variants"]
    assert [(row["variant"], row.get("step_ms")) for row in rows] == [
        ("mesh.fsdp=2,optim.lr=0.1", 22),
        ("mesh.fsdp=8", 28),
        ("as configured", None),
        ("data.path=error", None),
    ]
    assert rows[0]["overrides"] == ["mesh.fsdp=2", "optim.lr=0.1"]
    assert cli.main([*arguments, "--compare", *variants]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("variant") and lines[1].startswith("mesh.fsdp=2,optim.lr=0.1")
    assert lines[3].endswith("does not fit: 20.00 of 16.00 GiB")
    assert lines[4].endswith("it cannot work")
    assert lines[-1] == table.NOTE


def test_several_runs_are_not_one_plan(capsys):
    assert cli.main(["plan", "--config", "quickstart", "--topology", "v5e:2x2"]) == 1
    assert capsys.readouterr().err == (
        "vit-scale: config quickstart has several stages: plan one, such as quickstart:pretrain\n"
    )
