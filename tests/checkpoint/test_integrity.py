"""integrity: every changed bit changes a fingerprint. tests/laws/test_mesh.py verifies a checkpoint
of eight devices on four, two and one."""

import jax.numpy as jnp
import numpy as np
import pytest

from vit_scale.checkpoint.integrity import (
    Damaged,
    check_arrays,
    check_checksum,
    fingerprints,
    make_manifest,
    with_checksum,
)

SHAPE = (8, 3, 5)


def an_array(dtype, seed=0) -> np.ndarray:
    draw = np.random.RandomState(seed)
    return np.asarray(jnp.asarray(100 * draw.randn(*SHAPE)).astype(dtype))


def of(array) -> str:
    return fingerprints({"x": array})["x"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8])
def test_each_flipped_bit_of_each_element_changes_it(dtype):
    array = an_array(dtype)
    before, results = of(array), set()
    for bit in range(8 * array.nbytes):
        content = bytearray(array.tobytes())
        content[bit // 8] ^= 1 << (bit % 8)
        results.add(of(np.frombuffer(content, array.dtype).reshape(SHAPE)))
    assert before not in results
    assert len(results) == 8 * array.nbytes  # and no two of them alike


def test_bits_are_compared_and_not_values():
    assert of(np.float32([0.0])) != of(np.float32([-0.0]))
    assert of(np.float32([np.nan])) == of(np.float32([np.nan]))
    assert of(np.array([True, False])) != of(np.array([False, True]))
    assert of(np.zeros((2, 3), np.float32)) != of(np.zeros((3, 2), np.float32))
    assert of(np.int32(7)) != of(np.int32(8))


def test_a_manifest_of_other_arrays_names_the_first():
    trees = {"params": {"a": an_array(jnp.float32), "b": an_array(jnp.int32)}}
    content = make_manifest(3, {"classes": ["cat"]}, {**trees, "opt_state": {"n": np.int32(1)}})
    assert set(content["arrays"]) == {"params/a", "params/b", "opt_state/n"}
    check_arrays(content, trees)
    wrong = {"params": {**trees["params"], "b": an_array(jnp.int32, seed=1)}}
    with pytest.raises(
        Damaged, match=r"^params/b was written as int32\[8,3,5\] \w{16} but is read"
    ):
        check_arrays(content, wrong)
    with pytest.raises(Damaged, match=r"params/b was written as int32.* is read as None"):
        check_arrays(content, {"params": {"a": trees["params"]["a"]}})


def test_a_signed_content_is_whole_or_damaged():
    content = {"step": 3, "description": {"name": "dög", "lr": 0.1}, "arrays": {"a": "x"}}
    assert check_checksum(with_checksum(content)) == content
    for changed in ({"step": 4}, {"arrays": {"a": "y"}}, {"more": 1}, {"checksum": "0"}):
        with pytest.raises(Damaged):
            check_checksum(with_checksum(content) | changed)
    for other in ([], None, {"step": 3}):
        with pytest.raises(Damaged, match="it has no checksum"):
            check_checksum(other)
