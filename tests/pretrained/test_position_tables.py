"""positions: a table of rows is the grid that it was trained as, or it is refused."""

import pathlib

import numpy as np
import pytest

from vit_scale import pretrained
from vit_scale.errors import UserError
from vit_scale.pretrained import Hints, weight_files
from vit_scale.pretrained.position_tables import Sizes, read

pytestmark = pytest.mark.usefixtures("quick_compile")
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "weights"
PATCH = 8
CLS, NONE, DIST, EITHER = (1,), (0,), (2,), (1, 0)


def pixels(h: int, w: int) -> tuple[int, int]:
    return h * PATCH, w * PATCH


@pytest.mark.parametrize(
    ("rows", "before", "sizes", "grid", "tokens"),
    [
        # The size beside the file, whatever is given or wanted, and also where another is a square.
        (16, CLS, Sizes(stored=pixels(3, 5)), (3, 5), 1),
        (16, NONE, Sizes(stored=pixels(2, 8), target=pixels(4, 4)), (2, 8), 0),
        (17, CLS, Sizes(stored=pixels(8, 2), requested=pixels(2, 8)), (8, 2), 1),
        (197, CLS, Sizes(stored=pixels(14, 14)), (14, 14), 1),
        # The size given, of every (n-1) x (n+1) grid and of those whose area is a square.
        *(
            (n * n, CLS, Sizes(requested=pixels(n - 1, n + 1)), (n - 1, n + 1), 1)
            for n in range(3, 20)
        ),
        *(
            (n * n, CLS, Sizes(requested=pixels(n + 1, n - 1)), (n + 1, n - 1), 1)
            for n in range(3, 20)
        ),
        (17, CLS, Sizes(requested=pixels(2, 8)), (2, 8), 1),
        (36, NONE, Sizes(requested=pixels(4, 9)), (4, 9), 0),
        (38, DIST, Sizes(requested=pixels(4, 9)), (4, 9), 2),
        # A size given that is not theirs is the one that they are to be resampled to.
        (17, CLS, Sizes(requested=pixels(6, 6)), (4, 4), 1),
        # The size wanted, where it is the only reading.
        (16, CLS, Sizes(target=pixels(3, 5)), (3, 5), 1),
        # Else a square.
        (17, CLS, Sizes(), (4, 4), 1),
        (18, DIST, Sizes(target=pixels(7, 7)), (4, 4), 2),
        (16, NONE, Sizes(target=pixels(4, 4)), (4, 4), 0),
        # DeiT III has no row of [CLS], DINOv2 one, and both have LayerScale.
        (1370, EITHER, Sizes(), (37, 37), 1),
        (196, EITHER, Sizes(requested=pixels(14, 14)), (14, 14), 0),
        (196, EITHER, Sizes(target=pixels(14, 14)), (14, 14), 0),
        (196, EITHER, Sizes(requested=pixels(13, 15)), (13, 15), 1),
        # And so may any other model, if the size fits so alone, and can't be meant otherwise.
        (16, CLS, Sizes(trained=pixels(4, 4)), (4, 4), 0),
        (16, CLS, Sizes(trained=pixels(3, 5), requested=pixels(4, 4)), (3, 5), 1),
    ],
)
def test_the_grid_and_the_tokens(rows, before, sizes, grid, tokens):
    found = read(rows, before, sizes, PATCH)
    assert (found.grid, found.before) == (grid, tokens)


@pytest.mark.parametrize(
    ("rows", "before", "sizes", "says"),
    [
        (16, CLS, Sizes(), ["16 positions are of 15 patches, which is no square grid"]),
        (16, CLS, Sizes(requested=pixels(4, 4)), ["15 patches", "32 x 32 px is 4 x 4 patches"]),
        (18, CLS, Sizes(requested=(64, 64)), ["17 patches", "64 x 64 px is 8 x 8 patches"]),
        (18, CLS, Sizes(target=(64, 40)), ["64 x 40 px is 8 x 5 patches"]),
        # As many patches are wanted in another shape: were they trained so, or as a square?
        (17, CLS, Sizes(target=pixels(2, 8)), ["two ways", "4 x 4 patches", "2 x 8 patches"]),
        (36, NONE, Sizes(target=pixels(4, 9)), ["6 x 6 patches", "4 x 9 patches"]),
        # 14 x 14 without a row of [CLS], or 13 x 15 with one.
        (196, EITHER, Sizes(), ["14 x 14 patches", "1 other token and a grid that is no square"]),
        (16, EITHER, Sizes(target=pixels(3, 5)), ["4 x 4 patches", "1 other token and 3 x 5"]),
    ],
)
def test_what_can_be_read_in_two_ways_or_in_none(rows, before, sizes, says):
    with pytest.raises(UserError) as caught:
        read(rows, before, sizes, PATCH)
    line = str(caught.value)
    assert all(text in line for text in says), line
    assert "--config.init.image=HEIGHTxWIDTH" in line and "\n" not in line


def test_what_was_believed_is_handed_on():
    assert read(17, CLS, Sizes(stored=pixels(4, 4)), PATCH).assumed == ""
    assert "1 other token and 4 x 4 patches" in read(17, CLS, Sizes(), PATCH).assumed
    contradicted = read(17, CLS, Sizes(stored=pixels(5, 5)), PATCH).assumed
    assert "although the size beside the file is of 5 x 5" in contradicted
    assert (
        "2 x 8 patches, the size given"
        in read(16, NONE, Sizes(requested=pixels(2, 8)), PATCH).assumed
    )


@pytest.mark.parametrize("case", ["timm.safetensors", "google.npz", "huggingface"])
def test_each_format_with_a_row_of_cls(case, tmp_path):
    """3 x 5 patches and [CLS] are sixteen rows: no square of 4 x 4, of whatever format."""
    arrays = weight_files.read(weight_files.file_in(GOLDEN / case))
    name = next(name for name in arrays if "pos" in name and "embed" in name)
    rows = np.random.RandomState(0).randn(1, 16, 12).astype(np.float32)
    file = tmp_path / ("x.npz" if case.endswith("npz") else "x.safetensors")
    write = weight_files.write_npz if case.endswith("npz") else weight_files.write_safetensors
    write(file, {**arrays, name: rows})
    given = pretrained.load_model(file, Hints(heads=3, trained_size=(12, 20)))
    np.testing.assert_array_equal(given.params["posemb"], rows[0, 1:].reshape(3, 5, 12))
    cls = next(x for n, x in arrays.items() if n.endswith(("cls", "cls_token")))
    np.testing.assert_array_equal(given.params["cls"], cls[0, 0] + rows[0, 0])
    with pytest.raises(UserError, match="16 positions are of 15 patches"):
        pretrained.load_model(file, Hints(heads=3))


def test_big_vision_has_no_row_of_cls(tmp_path):
    arrays = weight_files.read(GOLDEN / "big_vision-tok.npz")
    name = next(name for name in arrays if name.endswith("pos_embedding"))
    rows = np.random.RandomState(0).randn(1, 16, 12).astype(np.float32)
    weight_files.write_npz(tmp_path / "x.npz", {**arrays, name: rows})
    given = pretrained.load_model(tmp_path / "x.npz")
    np.testing.assert_array_equal(given.params["posemb"], rows[0].reshape(4, 4, 12))
