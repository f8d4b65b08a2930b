"""posemb: equal to scipy and torch, identity at equal grids, the published sin-cos table."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_scale.errors import UserError
from vit_scale.models.patch_embeddings import resample_patches
from vit_scale.models.position_embeddings import METHODS, resample, sincos2d

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "posemb.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files} - {"patches"})
PATCHES = sorted({name.split("/")[1] for name in GOLDEN.files if name.startswith("patches")})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_resample_equals_the_reference(case, method):
    """scipy.ndimage.zoom(order=1), torch bicubic antialiased: golden/make_posemb.py."""
    expected = GOLDEN[f"{case}/{method}"]
    result = resample(GOLDEN[f"{case}/input"], expected.shape[:2], method)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("case", PATCHES)
def test_patch_embeddings_are_resampled_as_flexivit_does(case):
    """timm's resample_patch_embed, bilinear: golden/make_posemb.py."""
    kernel, expected = (GOLDEN[f"patches/{case}/{name}"] for name in ("input", "output"))
    result = resample_patches(kernel, expected.shape[:2])
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(resample_patches(kernel, kernel.shape[:2]), kernel)


def test_an_enlarged_patch_has_the_same_embedding():
    """For any patch: what the pseudo-inverse is for."""
    kernel = jnp.asarray(GOLDEN["patches/4x4_6x6/input"])
    patch = np.random.RandomState(0).randn(4, 4, 3).astype(np.float32)
    enlarged = jax.image.resize(patch, (6, 6, 3), "linear", antialias=False)
    before = np.einsum("pqc,pqcd->d", patch, kernel)
    after = np.einsum("pqc,pqcd->d", enlarged, resample_patches(kernel, (6, 6)))
    np.testing.assert_allclose(after, before, atol=1e-4)
    assert np.abs(before).min() > 0.1


def test_golden_file_covers_up_down_and_non_square():
    assert {"14x14_24x24", "24x24_14x14", "4x4_8x8", "8x8_12x12", "7x5_3x9"} <= set(CASES)


def test_methods_differ():
    pe = GOLDEN["4x4_8x8/input"]
    difference = resample(pe, (8, 8), "cubic") - resample(pe, (8, 8), "corners")
    assert np.abs(difference).mean() > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_equal_grids_are_bit_identical(method):
    pe = GOLDEN["7x5_3x9/input"]
    assert np.array_equal(resample(pe, pe.shape[:2], method), pe)


@pytest.mark.parametrize("method", METHODS)
def test_a_swapped_grid_is_another_grid(method):
    pe = jnp.asarray(GOLDEN["7x5_3x9/input"])
    assert resample(pe, (5, 7), method).shape == (5, 7, pe.shape[-1])
    np.testing.assert_allclose(
        resample(pe, (9, 3), method),
        resample(pe.swapaxes(0, 1), (3, 9), method).swapaxes(0, 1),
        atol=1e-6,
    )


def test_corners_equals_the_formula_of_the_design():
    pe, grid = jnp.asarray(GOLDEN["7x5_3x9/input"]), (3, 9)
    scale = (np.asarray(grid) - 1) / (np.asarray(pe.shape[:2]) - 1)
    expected = jax.image.scale_and_translate(
        pe,
        (*grid, pe.shape[-1]),
        (0, 1),
        jnp.asarray(scale, jnp.float32),
        jnp.asarray(0.5 - 0.5 * scale, jnp.float32),
        "linear",
        antialias=False,
    )
    np.testing.assert_allclose(resample(pe, grid, "corners"), expected, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_tables_come_back_as_float32(method):
    pe = jnp.asarray(GOLDEN["4x4_8x8/input"], jnp.bfloat16)
    assert resample(pe, (4, 4), method).dtype == jnp.float32
    expected = resample(pe.astype(jnp.float32), (8, 8), method)
    assert np.array_equal(resample(pe, (8, 8), method), expected)


def test_sincos2d_values():
    """Row 2, column 3 of a (4, 5) grid at width 8: frequencies 1 and 1/100, columns first."""
    table = sincos2d((4, 5), 8)
    assert table.shape == (4, 5, 8) and table.dtype == jnp.float32
    x, y = np.array([3, 0.03]), np.array([2, 0.02])
    expected = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)])
    np.testing.assert_allclose(table[2, 3], expected, atol=1e-7)
    np.testing.assert_array_equal(table[0, 0], [0, 0, 1, 1, 0, 0, 1, 1])


def test_sincos2d_tells_every_position_apart():
    table = np.asarray(sincos2d((6, 7), 16)).reshape(42, 16)
    distances = np.abs(table[:, None] - table[None]).max(-1) + np.eye(42)
    assert distances.min() > 0.1


@pytest.mark.parametrize("d", [0, 2, 6, 190])
def test_sincos2d_refuses_widths_not_divisible_by_4(d):
    with pytest.raises(UserError, match=f"divisible by 4, not {d}"):
        sincos2d((2, 2), d)


def test_unknown_method_names_the_nearest():
    with pytest.raises(
        UserError, match=r"init\.resample='corner' is unknown; did you mean corners"
    ):
        resample(jnp.zeros((2, 2, 4)), (3, 3), "corner")


def test_a_flat_table_is_refused():
    with pytest.raises(UserError, match=r"not \(1, 1, 197, 192\)") as caught:
        resample(jnp.zeros((1, 197, 192))[None], (3, 3))
    assert "(h, w, d)" in str(caught.value)
