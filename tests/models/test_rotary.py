"""Rotary positions, patch dropout and the nearest grid: by hand, a token and a pair at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import random_params, tiny_config, tiny_model
from tests.models.test_vit import plain_logits
from vit_scale.errors import UserError
from vit_scale.models import rotary
from vit_scale.models.layers import keep_patches, kept_patches, random_patches
from vit_scale.models.parameters import stack

GRID, WIDTH = (2, 3), 8  # patches, channels of a head


def block(*fields: str):
    return rotary.settings(tiny_config(*fields).model)


def fixed(cfg, grid=GRID, before=0, width=WIDTH):
    return rotary.rotation(cfg, rotary.coordinates(cfg, grid), before, width)


def by_hand(kind: str, row: int, column: int, **cfg: float) -> list[float]:
    """The angles of one patch, of the published formulas."""
    base, quarter = cfg.get("temperature", 100.0), WIDTH // 4
    angles = []
    for size, position in zip(GRID, (row, column), strict=True):
        for i in range(quarter):
            if kind == "dinov3":
                coordinate = 2 * (position + 0.5) / size - 1
                angles.append(2 * np.pi * coordinate / base ** (2 * i / (WIDTH / 2)))
            else:
                counted = (position + cfg.get("offset", 0)) * cfg.get("reference", size) / size
                angles.append(counted / base ** (4 * i / WIDTH))
    return angles


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dinov3", {}),
        ("axial", {}),
        ("axial", {"temperature": 1e4, "reference": 16}),
        ("axial", {"offset": 1.0, "reference": 5}),
    ],
)
def test_angles_are_those_of_the_formulas(kind, options):
    fields = [f"model.rope_{name}={value}" for name, value in options.items()]
    turned = fixed(block(f"model.rope={kind}", *fields), before=2)
    for n in range(2):
        np.testing.assert_array_equal(turned.cos[n], 1)
        np.testing.assert_array_equal(turned.sin[n], 0)
    for n in range(6):
        angles = by_hand(kind, *divmod(n, 3), **options)
        np.testing.assert_allclose(turned.cos[2 + n, 0], np.cos(angles), atol=2e-6)
        np.testing.assert_allclose(turned.sin[2 + n, 0], np.sin(angles), atol=2e-6)
    assert turned.cos.shape == (8, 1, WIDTH // 2)


def test_a_pair_of_channels_turns():
    turned = fixed(block("model.rope=axial"))
    x = np.random.RandomState(0).randn(1, 6, 3, WIDTH).astype(np.float32)
    result = np.asarray(turned(jnp.asarray(x)))
    for n in range(6):
        for i, angle in enumerate(by_hand("axial", *divmod(n, 3))):
            pair = x[0, n, :, i] + 1j * x[0, n, :, i + WIDTH // 2]
            expected = pair * np.exp(1j * angle)
            np.testing.assert_allclose(result[0, n, :, i], expected.real, atol=1e-6)
            np.testing.assert_allclose(result[0, n, :, i + WIDTH // 2], expected.imag, atol=1e-6)


@pytest.mark.parametrize("kind", ["axial", "mixed"])
def test_scores_depend_on_distances_alone(kind):
    cfg, grid = block(f"model.rope={kind}"), (4, 4)
    if kind == "mixed":
        learned = rotary.random_frequencies(jax.random.key(0), 2, WIDTH, 10.0)
        turned = rotary.mixed_rotation(learned, rotary.coordinates(cfg, grid), 0)
        assert float(jnp.abs(turned.cos[5, 0] - turned.cos[5, 1]).max()) > 0.01  # a head's own
    else:
        turned = fixed(cfg, grid)
    draw = np.random.RandomState(0)
    q, k = (np.tile(draw.randn(1, 1, 2, WIDTH), (1, 16, 1, 1)) for _ in range(2))
    scores = np.einsum("bnke,bmke->knm", turned(jnp.asarray(q)), turned(jnp.asarray(k)))
    table = scores.reshape(2, 4, 4, 4, 4)
    np.testing.assert_allclose(table[:, :3, :3, 1, 2], table[:, 1:, 1:, 2, 3], atol=1e-4)
    assert np.abs(table[:, 0, 0, 1, 2] - table[:, 0, 0, 2, 1]).max() > 1e-3  # rows, columns


def test_mixed_frequencies_are_of_columns_and_rows():
    learned = np.random.RandomState(0).randn(2, 2, WIDTH // 2).astype(np.float32)
    positions = rotary.coordinates(block("model.rope=mixed"), GRID)
    turned = rotary.mixed_rotation(jnp.asarray(learned), positions, 1)
    for n in range(6):
        row, column = divmod(n, 3)
        expected = np.cos(column * learned[0] + row * learned[1])
        np.testing.assert_allclose(turned.cos[1 + n], expected, atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", ["axial", "dinov3", "mixed"])
def test_a_model_with_rotary_positions_tells_the_order_of_patches(kind, scan):
    """Without absolute positions as well; unrolled equals scanned, whose last block is whole."""
    fields = ("model.posemb=none", "model.registers=2", "data.width=24", f"model.rope={kind}")
    vit = tiny_model(*fields, f"model.scan={scan}")
    params = random_params(vit)
    assert "posemb" not in params
    images = np.random.RandomState(1).randn(1, 16, 24, 3).astype(np.float32)
    swapped = np.concatenate([images[:, :, 8:16], images[:, :, :8], images[:, :, 16:]], axis=2)
    logits, other = (np.asarray(jax.jit(vit.apply)(params, x)) for x in (images, swapped))
    assert np.abs(logits - other).max() > 1e-3
    bag = tiny_model("model.posemb=none", "model.registers=2", "data.width=24")
    same = [jax.jit(bag.apply)(random_params(bag), x) for x in (images, swapped)]
    np.testing.assert_allclose(*same, atol=1e-5)
    if not scan:
        whole = tiny_model(*fields, "model.scan=True")
        np.testing.assert_allclose(jax.jit(whole.apply)(stack(params), images), logits, atol=1e-5)


@pytest.mark.parametrize("field", ["rope_shift=0.5", "rope_jitter=2", "rope_rescale=2"])
def test_coordinates_change_in_training_alone(field):
    cfg, key = block("model.rope=dinov3", f"model.{field}"), jax.random.key(3)
    old = rotary.coordinates(cfg, GRID).astype(np.float32)
    new = np.asarray(rotary.augmented(cfg, jnp.asarray(old), key))
    name, limit = field.split("=")
    if name == "rope_shift":
        moved = new - old
        np.testing.assert_allclose(moved, np.broadcast_to(moved[0], moved.shape), atol=1e-6)
        assert 0 < np.abs(moved).max() <= float(limit)
    else:
        moved = new / np.where(old == 0, 1, old)
        rows, columns = moved[:, 0], moved[old[:, 1] != 0, 1]
        assert np.ptp(rows) < 1e-5 and np.ptp(columns) < 1e-5
        assert 0.5 <= rows[0] <= 2 and rows[0] != 1
        assert (abs(rows[0] - columns[0]) < 1e-5) == (name == "rope_rescale")
    vit = tiny_model("model.rope=dinov3", f"model.{field}")
    params, images = random_params(vit), np.random.RandomState(0).randn(1, 16, 16, 3)
    plain = jax.jit(tiny_model("model.rope=dinov3").apply)(params, images)
    np.testing.assert_array_equal(jax.jit(vit.apply)(params, images), plain)
    assert np.abs(jax.jit(vit.apply)(params, images, key) - plain).max() > 1e-4


def test_dropped_patches():
    x = jnp.arange(2 * 10 * 3, dtype=jnp.float32).reshape(2, 10, 3)

    def drop(key: int):
        return keep_patches(x, 2, random_patches(jax.random.key(key), 2, 8, kept_patches(8, 0.5)))

    kept, tokens = drop(0)
    assert kept.shape == (2, 2 + 4, 3)
    for image in range(2):
        order = np.asarray(tokens[image])
        assert list(order[:2]) == [0, 1] and (np.diff(order) > 0).all() and order[-1] < 10
        np.testing.assert_array_equal(kept[image], x[image, order])
    draws = [drop(i)[1] for i in range(20)]
    counts = np.bincount(np.stack(draws)[:, :, 2:].reshape(-1), minlength=10)[2:]
    assert counts.min() > 8 and counts.sum() == 20 * 2 * 4  # of 40: each about half
    assert (np.asarray(tokens[0]) != np.asarray(tokens[1])).any()
    assert kept_patches(8, 0.99) == 1


@pytest.mark.parametrize("kind", ["axial", "dinov3"])
@pytest.mark.parametrize("pool", ["cls", "gap", "map", "cls_gap"])
def test_equals_a_plain_numpy_vit(kind, pool):
    fields = (f"model.pool={pool}", f"model.rope={kind}", "model.registers=2", "data.width=24")
    vit = tiny_model(*fields)
    params = random_params(vit)
    images = np.random.RandomState(1).randn(1, 16, 24, 3).astype(np.float32)
    angles = np.array([[by_hand(kind, *divmod(n, 3))] for n in range(6)])
    double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = plain_logits(double, images[0].astype(np.float64), pool, 8, angles)
    np.testing.assert_allclose(jax.jit(vit.apply)(params, images)[0], expected, atol=5e-5)
    still = plain_logits(double, images[0].astype(np.float64), pool, 8)
    assert np.abs(expected - still).max() > 1e-3


@pytest.mark.parametrize("kind", ["none", "axial", "mixed"])
def test_patches_keep_their_positions_when_others_are_dropped(kind):
    vit = tiny_model(f"model.rope={kind}", "model.patch_drop=0.5", "model.pool=gap")
    params = random_params(vit)
    images = np.random.RandomState(1).randn(2, 16, 16, 3).astype(np.float32)
    key = jax.random.key(5)
    dropped = jax.jit(vit.apply)(params, images, key)
    embed_key = jax.random.split(key, 3)[0]
    tokens = random_patches(jax.random.fold_in(embed_key, 1), 2, 4, 2)
    double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for image, kept, logits in zip(images, np.asarray(tokens), np.asarray(dropped), strict=True):
        where = [divmod(int(n), 2) for n in kept]
        angles = None
        if kind == "axial":
            angles = np.array([[[row, row / 10, column, column / 10]] for row, column in where])
        if kind == "mixed":
            angles = [
                np.array([column * learned[0] + row * learned[1] for row, column in where])
                for learned in double["blocks"]["attention"]["frequencies"]
            ]
        result = plain_logits(double, image.astype(np.float64), "gap", 8, angles, kept)
        np.testing.assert_allclose(logits, result, atol=5e-5)


def test_images_go_to_the_nearest_grid():
    with pytest.raises(UserError, match="image height 20 is not divisible by the patch size 8"):
        tiny_model("data.resolution=20")
    vit = tiny_model("data.resolution=20", "data.width=27", "model.nearest_grid=true")
    assert vit.shape.grid == (2, 3)  # 2.5 rounds to even, 3.4 to 3
    params = random_params(vit)
    images = np.random.RandomState(0).randn(2, 20, 27, 3).astype(np.float32)
    resized = jax.image.resize(images, (2, 16, 24, 3), "linear", antialias=True)
    plain = tiny_model("data.resolution=16", "data.width=24")
    expected = jax.jit(plain.apply)(params, resized)
    np.testing.assert_allclose(jax.jit(vit.apply)(params, images), expected, atol=1e-5)
    assert vit.macs == plain.macs


def test_training_macs_are_of_the_patches_that_are_kept():
    vit, half = tiny_model("model.pool=gap"), tiny_model("model.pool=gap", "model.patch_drop=0.5")
    assert half.macs == vit.macs == vit.training_macs
    tokens, width, mlp, depth = 4, 16, 24, 2

    def blocks(n):
        return depth * (4 * n * width**2 + 2 * n * n * width + 2 * n * width * mlp)

    assert vit.macs - half.training_macs == blocks(tokens) - blocks(tokens // 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("model.rope=dino",), "model.rope='dino' is unknown; did you mean dinov3"),
        (("model.rope=axial", "model.heads=8"), "head width .* divisible by 4, not 2"),
        (("model.rope_jitter=0.5",), "model.rope_jitter=0.5 is a factor: at least 1"),
        (("model.rope_temperature=1",), "must be above 1"),
        (("model.patch_drop=1",), "model.patch_drop=1.0 must be at least 0 and below 1"),
        (("model.pool=cls", "model.class_token=true"), "needs pool=gap or map, not cls"),
        (("model.pool=gap", "model.fc_norm=true", "model.final_norm=false"), "final_norm=True"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        tiny_model(*fields)
