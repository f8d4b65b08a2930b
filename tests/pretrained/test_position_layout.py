"""position_layout: stored rows become the grid they were trained as, or are refused."""

import pathlib

import numpy as np
import pytest

from vit_scale import pretrained
from vit_scale.errors import UserError
from vit_scale.pretrained import Hints, weight_files
from vit_scale.pretrained.position_layout import KnownSizes, infer_position_layout

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "weights"
PATCH = 8
CLS, NONE, DIST, EITHER = (1,), (0,), (2,), (1, 0)


def pixels(h: int, w: int) -> tuple[int, int]:
    return h * PATCH, w * PATCH


@pytest.mark.parametrize(
    ("rows", "leading", "sizes", "grid", "tokens"),
    [
        # The size beside the file, whatever is given or wanted, and also where another is a square.
        (16, CLS, KnownSizes(stored=pixels(3, 5)), (3, 5), 1),
        (16, NONE, KnownSizes(stored=pixels(2, 8), target=pixels(4, 4)), (2, 8), 0),
        (17, CLS, KnownSizes(stored=pixels(8, 2), requested=pixels(2, 8)), (8, 2), 1),
        (197, CLS, KnownSizes(stored=pixels(14, 14)), (14, 14), 1),
        # The size given, of every (n-1) x (n+1) grid and of those whose area is a square.
        *(
            (n * n, CLS, KnownSizes(requested=pixels(n - 1, n + 1)), (n - 1, n + 1), 1)
            for n in range(3, 20)
        ),
        *(
            (n * n, CLS, KnownSizes(requested=pixels(n + 1, n - 1)), (n + 1, n - 1), 1)
            for n in range(3, 20)
        ),
        (17, CLS, KnownSizes(requested=pixels(2, 8)), (2, 8), 1),
        (36, NONE, KnownSizes(requested=pixels(4, 9)), (4, 9), 0),
        (38, DIST, KnownSizes(requested=pixels(4, 9)), (4, 9), 2),
        # A size given that is not theirs is the one that they are to be resampled to.
        (17, CLS, KnownSizes(requested=pixels(6, 6)), (4, 4), 1),
        # The size wanted, where it is the only reading.
        (16, CLS, KnownSizes(target=pixels(3, 5)), (3, 5), 1),
        # Else a square.
        (17, CLS, KnownSizes(), (4, 4), 1),
        (18, DIST, KnownSizes(target=pixels(7, 7)), (4, 4), 2),
        (16, NONE, KnownSizes(target=pixels(4, 4)), (4, 4), 0),
        # DeiT III has no row of [CLS], DINOv2 one, and both have LayerScale.
        (1370, EITHER, KnownSizes(), (37, 37), 1),
        (196, EITHER, KnownSizes(requested=pixels(14, 14)), (14, 14), 0),
        (196, EITHER, KnownSizes(target=pixels(14, 14)), (14, 14), 0),
        (196, EITHER, KnownSizes(requested=pixels(13, 15)), (13, 15), 1),
        # And so may any other model, if the size fits so alone, and can't be meant otherwise.
        (16, CLS, KnownSizes(trained=pixels(4, 4)), (4, 4), 0),
        (16, CLS, KnownSizes(trained=pixels(3, 5), requested=pixels(4, 4)), (3, 5), 1),
    ],
)
def test_the_grid_and_the_tokens(rows, leading, sizes, grid, tokens):
    result = infer_position_layout(rows, leading, sizes, PATCH)
    assert (result.grid, result.leading) == (grid, tokens)


@pytest.mark.parametrize(
    ("rows", "leading", "sizes", "says"),
    [
        (
            16,
            CLS,
            KnownSizes(),
            ["16 position embeddings are for 15 patches, which is not a square grid"],
        ),
        (
            16,
            CLS,
            KnownSizes(requested=pixels(4, 4)),
            ["15 patches", "32 x 32 px is 4 x 4 patches"],
        ),
        (18, CLS, KnownSizes(requested=(64, 64)), ["17 patches", "64 x 64 px is 8 x 8 patches"]),
        (18, CLS, KnownSizes(target=(64, 40)), ["64 x 40 px is 8 x 5 patches"]),
        # As many patches are wanted in another shape: were they trained so, or as a square?
        (17, CLS, KnownSizes(target=pixels(2, 8)), ["ambiguous", "4 x 4 patches", "2 x 8 patches"]),
        (36, NONE, KnownSizes(target=pixels(4, 9)), ["6 x 6 patches", "4 x 9 patches"]),
        # 14 x 14 without a row of [CLS], or 13 x 15 with one.
        (
            196,
            EITHER,
            KnownSizes(),
            ["14 x 14 patches", "1 other token and a grid that is not square"],
        ),
        (16, EITHER, KnownSizes(target=pixels(3, 5)), ["4 x 4 patches", "1 other token and 3 x 5"]),
    ],
)
def test_ambiguous_and_impossible_layouts_are_refused(rows, leading, sizes, says):
    with pytest.raises(UserError) as caught:
        infer_position_layout(rows, leading, sizes, PATCH)
    line = str(caught.value)
    assert all(text in line for text in says), line
    assert "--config.init.image=HEIGHTxWIDTH" in line and "\n" not in line


def test_assumptions_are_returned():
    def assumption(rows, leading, **sizes) -> str:
        return infer_position_layout(rows, leading, KnownSizes(**sizes), PATCH).assumption

    assert assumption(17, CLS, stored=pixels(4, 4)) == ""
    assert "1 other token and 4 x 4 patches" in assumption(17, CLS)
    contradicted = assumption(17, CLS, stored=pixels(5, 5))
    assert "although the size beside the file gives 5 x 5" in contradicted
    assert "2 x 8 patches, the size given" in assumption(16, NONE, requested=pixels(2, 8))


@pytest.mark.parametrize("case", ["timm.safetensors", "google.npz", "huggingface"])
def test_formats_with_a_row_for_cls(case, tmp_path):
    """3 x 5 patches and [CLS] are sixteen rows, not 4 x 4 patches, in every format."""
    arrays = weight_files.read_arrays(weight_files.find_weight_file(GOLDEN / case))
    name = next(name for name in arrays if "pos" in name and "embed" in name)
    rows = np.random.RandomState(0).randn(1, 16, 12).astype(np.float32)
    file = tmp_path / ("x.npz" if case.endswith("npz") else "x.safetensors")
    write = weight_files.write_npz if case.endswith("npz") else weight_files.write_safetensors
    write(file, {**arrays, name: rows})
    loaded = pretrained.load_model(file, Hints(heads=3, trained_size=(12, 20)))
    np.testing.assert_array_equal(loaded.params["posemb"], rows[0, 1:].reshape(3, 5, 12))
    cls = next(x for n, x in arrays.items() if n.endswith(("cls", "cls_token")))
    np.testing.assert_array_equal(loaded.params["cls"], cls[0, 0] + rows[0, 0])
    with pytest.raises(UserError, match="16 position embeddings are for 15 patches"):
        pretrained.load_model(file, Hints(heads=3))


def test_big_vision_has_no_row_for_cls(tmp_path):
    arrays = weight_files.read_arrays(GOLDEN / "big_vision-tok.npz")
    name = next(name for name in arrays if name.endswith("pos_embedding"))
    rows = np.random.RandomState(0).randn(1, 16, 12).astype(np.float32)
    weight_files.write_npz(tmp_path / "x.npz", {**arrays, name: rows})
    loaded = pretrained.load_model(tmp_path / "x.npz")
    np.testing.assert_array_equal(loaded.params["posemb"], rows[0].reshape(4, 4, 12))
