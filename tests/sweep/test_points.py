"""points: which values each run of a sweep has."""

import pytest

from vit_scale.errors import UserError
from vit_scale.sweep import halving, make_points, make_space, run_name, train_command
from vit_scale.sweep import points as points_module
from vit_scale.sweep.points import LONGEST_NAME, split_values


def space(*grid, uniform=(), log_uniform=()):
    return make_space(grid, uniform, log_uniform)


def test_values_are_split_at_commas_outside_of_brackets_and_quotes():
    assert split_values("1e-3, 3e-3") == ["1e-3", "3e-3"]
    assert split_values("(0.3,1.0),(0.5,1.0)") == ["(0.3,1.0)", "(0.5,1.0)"]
    assert split_values("('a,(b',),c") == ["('a,(b',)", "c"]


def test_a_grid_has_all_combinations_in_the_order_of_its_fields():
    points = make_points(space("optim.lr=1,2", "model.width=8,16,24"))
    assert [tuple(point.values()) for point in points] == [
        ("1", "8"), ("1", "16"), ("1", "24"), ("2", "8"), ("2", "16"), ("2", "24"),
    ]  # fmt: skip


def test_a_larger_number_of_draws_adds_points():
    one = space("optim.lr=1,2,3", "model.width=8,16,24")
    few, more = make_points(one, 4), make_points(one, 9)
    assert more[:4] == few
    assert sorted(map(str, more)) == sorted(map(str, make_points(one)))
    assert make_points(one, 4, seed=1) != few


def test_ranges_are_drawn_evenly_in_value_and_in_logarithm():
    both = space(uniform=["augment.mixup=0.2,0.6"], log_uniform=["optim.lr=1e-5,1e-1"])
    points = make_points(both, 400)
    mixup = sorted(float(point["augment.mixup"]) for point in points)
    lr = sorted(float(point["optim.lr"]) for point in points)
    assert 0.2 <= mixup[0] < 0.21 and 0.59 < mixup[-1] <= 0.6
    assert mixup[200] == pytest.approx(0.4, abs=0.03)
    assert 1e-5 <= lr[0] < 2e-5 and 5e-2 < lr[-1] <= 1e-1
    assert 5e-4 < lr[200] < 2e-3
    narrow = make_points(space(uniform=["optim.ema=0.9991,0.9999"]), 50)
    assert all(0.9991 <= float(point["optim.ema"]) <= 0.9999 for point in narrow)
    assert max(map(len, points[0].values())) <= 8, "no more digits than it takes"
    widths = make_points(space(log_uniform=["optim.warmup=10,1000"]), 5)
    assert all(point["optim.warmup"].isdigit() for point in widths), "an integer field"


@pytest.mark.parametrize(
    ("grid", "ranges", "count", "message"),
    [
        (["optim.lx=1"], {}, None, r"no config field is named 'optim\.lx'"),
        (["optim.lr="], {}, None, "must be FIELD=VALUE,VALUE"),
        (["optim.lr=1,1"], {}, None, "with different values"),
        (["optim.lr=1", "optim.lr=2"], {}, None, "optim.lr is given twice"),
        ([], {"uniform": ["optim.lr=2,1"]}, 3, "LOW < HIGH"),
        ([], {"uniform": ["optim.lr=1"]}, 3, "two numbers"),
        ([], {"log_uniform": ["optim.lr=0,1"]}, 3, "both above 0"),
        ([], {"log_uniform": ["optim.lr=1,2"]}, None, "give --random N"),
        (["optim.lr=1,2"], {}, 3, "more than the 2 points"),
        (["optim.lr=1,2"], {"uniform": ["model.depth=1,2"]}, 9, "only about 4 points"),
    ],
)
def test_impossible_points_are_refused(grid, ranges, count, message):
    with pytest.raises(UserError, match=message):
        make_points(space(*grid, **ranges), count)


def test_a_whole_grid_can_be_drawn(monkeypatch):
    monkeypatch.setattr(points_module, "MOST_DRAWS", 1)  # gives up drawing early
    grid = space("optim.lr=1,2,3,4,5,6", "optim.b1=.1,.2,.3,.4")
    drawn = make_points(grid, 24)
    assert sorted(map(str, drawn)) == sorted(map(str, make_points(grid)))
    assert make_points(grid, 23) == drawn[:23] != make_points(grid)[:23]


def test_names_are_folders():
    assert run_name({"optim.lr": "1e-3", "model.variant": "S/16"}) == (
        "optim.lr=1e-3,model.variant=S-16"
    )
    long = {f"optim.lr{i}": "1" * 30 for i in range(9)}
    assert len(run_name(long)) <= LONGEST_NAME
    assert run_name(long) != run_name({**long, "optim.lr8": "2"})


def test_a_command_is_quoted_and_numbered():
    arguments = ["--config.optim.freeze=('a b',)"]
    command = train_command("launch/tpu_vm.sh --name s{number}", arguments, 3)
    assert command == """launch/tpu_vm.sh --name s3 '--config.optim.freeze=('"'"'a b'"'"',)'"""


def test_rungs_are_multiples_of_the_evaluations():
    assert halving.rungs(9, 3, 900, 50) == [100, 300, 900]
    assert halving.rungs(10, 3, 900, 70) == [140, 350, 900]
    assert halving.rungs(2, 3, 900, 70) == [900]
    assert halving.rungs(4, 2, 1000, 250) == [250, 500, 1000]
    for every in (0, 300, 1000):
        with pytest.raises(UserError, match=r"9 runs after 100, 300 of 900 .*at most 100"):
            halving.rungs(9, 3, 900, every)


def test_one_run_in_so_many_survives():
    assert halving.survivors([4, 2, 0, 1, 3], 2) == [4, 2]
    assert halving.survivors([4, 2], 3) == [4]
