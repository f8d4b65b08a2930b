"""rollbacks: the list on disk decides the batch of each step."""

from vit_scale.runs import rollbacks
from vit_scale.runs.rollbacks import Rollback, batch_ranges


def test_batches_after_a_rollback():
    """Diverged at 10, back to 4: steps from 4 on take the batches from 10 on."""
    back = [Rollback(4, 10)]
    assert list(batch_ranges([], 0, 20)) == [(0, 20, 0)]
    assert list(batch_ranges(back, 4, 20)) == [(4, 20, 6)]
    assert list(batch_ranges(back, 0, 20)) == [
        (0, 4, 0),
        (4, 20, 6),
    ]  # from an older checkpoint
    assert list(batch_ranges(back, 12, 20)) == [(12, 20, 6)]
    # It diverges again at 9, with batch 14: past that one too, and later once more.
    again = [*back, Rollback(4, 9), Rollback(12, 15)]
    assert list(batch_ranges(again, 2, 20)) == [(2, 4, 0), (4, 12, 11), (12, 20, 14)]
    assert list(batch_ranges(back, 20, 20)) == []


def test_rollbacks_are_stored(tmp_path):
    assert rollbacks.read(tmp_path) == []
    rollbacks.write(tmp_path, [Rollback(4, 10), Rollback(4, 9)])
    assert rollbacks.read(tmp_path) == [Rollback(4, 10), Rollback(4, 9)]


def test_all_processes_take_what_the_first_one_reads(tmp_path, monkeypatch):
    rollbacks.write(tmp_path, [Rollback(4, 10)])
    assert rollbacks.agree(tmp_path) == [Rollback(4, 10)]
    monkeypatch.setattr(rollbacks.multihost, "is_first", lambda: False)
    monkeypatch.setattr(rollbacks.multihost, "broadcast", lambda mine: [*mine, [2, 3]])
    assert rollbacks.agree(tmp_path) == [Rollback(2, 3)]
