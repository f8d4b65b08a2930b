"""Balanced sampling: each class equally often, its examples in epochs; a pure function of steps."""

import collections

import numpy as np
import pytest

from tests.data.test_image_folder import block
from vit_scale import data
from vit_scale.data import InMemory
from vit_scale.errors import UserError

COUNTS = (1, 3, 20, 0, 7)  # of each class; one has none
LABELS = np.repeat(np.arange(5), COUNTS)
SOURCE = InMemory(
    "rare",
    np.tile(np.arange(len(LABELS), dtype=np.uint8)[:, None, None, None], (1, 1, 1, 3)),
    LABELS,
    tuple("abcde"),
)


def examples(stop: int, start=0, seed=1, rows=None, sampling="balanced", **fields) -> np.ndarray:
    """The example in each row of the batches of 6 from step `start` to `stop`."""
    cfg = block("", batch=6, sampling=sampling, **fields)
    batches = data.train_batches(SOURCE, cfg, seed, start, stop, rows)
    return np.array([batch["image"][:, 0, 0, 0] for _, batch in batches], int)


def test_every_class_is_visited_equally_often_in_epochs_of_its_own():
    stream = examples(40).ravel()
    for count in (4, 20, 240):
        assert np.bincount(LABELS[stream[:count]], minlength=5).tolist() == [
            count // 4 * (n > 0) for n in COUNTS
        ]
    for label in (1, 2, 4):
        own = stream[LABELS[stream] == label]
        whole = [own[i : i + COUNTS[label]] for i in range(0, 60, COUNTS[label])]
        epochs = [tuple(epoch) for epoch in whole if len(epoch) == COUNTS[label]]
        for epoch in epochs:
            assert sorted(epoch) == np.flatnonzero(label == LABELS).tolist()
        assert len(set(epochs)) > 1
    rounds = {tuple(LABELS[stream[i : i + 4]]) for i in range(0, 240, 4)}
    assert len(rounds) > 10, "the classes of a round are in an order of their own"


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    whole = examples(9)
    np.testing.assert_array_equal(examples(9, start=5), whole[5:])
    for hosts in (2, 3):
        parts = [examples(9, rows=np.arange(host, 6, hosts)) for host in range(hosts)]
        joined = np.stack(parts, -1).reshape(9, 6)
        np.testing.assert_array_equal(joined, whole)
    assert not np.array_equal(examples(9, seed=2), whole)
    shuffled = collections.Counter(examples(31 * 4, sampling="shuffle").ravel().tolist())
    assert set(shuffled.values()) == {24}, "without it, each example is visited equally often"
    twice = examples(9, repeats=2)
    np.testing.assert_array_equal(twice[:, :3], twice[:, 3:])
    np.testing.assert_array_equal(twice[:, :3].ravel(), whole.ravel()[:27])


def test_what_has_no_single_class_is_refused():
    vectors = InMemory("v", np.zeros((2, 1, 1, 3), np.uint8), [0, 0], "ab", target=np.eye(2))
    with pytest.raises(UserError, match=r"data.sampling=balanced needs one class an image, and v"):
        next(data.train_batches(vectors, block("", batch=2, sampling="balanced"), 0, 0, 1))
