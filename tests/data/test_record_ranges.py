"""ArrayRecord shards read by ranges of bytes: ArrayRecord's own reader is the reference."""

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vit_scale.data import record_ranges, shards
from vit_scale.data.decode import Corrupt
from vit_scale.data.record_ranges import RecordRanges
from vit_scale.errors import UserError
from vit_scale.storage import paths


def write(file, count: int, size: int, options: str = shards.WRITE) -> list[bytes]:
    random = np.random.RandomState(size)
    records = [random.bytes(size + number % 97) for number in range(count)]
    writer = ArrayRecordWriter(str(file), options)
    for record in records:
        writer.write(record)
    writer.close()
    return records


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.array_record"


# Records that begin and end everywhere in and around the headers of 64 KiB blocks.
@pytest.mark.parametrize(
    ("count", "size"),
    [(0, 0), (1, 4), (3, 200_000), (5_000, 20), (300, 65_400), (200, 32_660), (1_000, 600)],
)
def test_records_are_those_of_the_reference(file, count, size):
    records = write(file, count, size)
    ranges = RecordRanges([file], 0)
    assert ranges.count(0) == count
    assert [ranges.read(0, position) for position in range(count)] == records
    if count:
        assert ArrayRecordReader(str(file), shards.READ).read_all() == records


def test_the_end_of_a_shard_is_one_read_and_a_record_another(file, monkeypatch):
    records, reads, read_range = write(file, 2_048, 600), [], paths.read_range
    monkeypatch.setattr(
        paths, "read_range", lambda *args: reads.append(args[1:3]) or read_range(*args)
    )
    ranges = RecordRanges([file], 0)
    size = file.stat().st_size
    assert reads == [(size - record_ranges.TAIL, record_ranges.TAIL)]
    assert ranges.read(0, 1_000) == records[1_000]
    assert len(reads) == 2 and len(records[1_000]) < reads[1][1] < len(records[1_000]) + 80
    reads.clear()
    write(file, 20_000, 20)  # its offsets are longer than what is read first
    assert RecordRanges([file], 0).count(0) == 20_000 and len(reads) == 2


def refusal(file) -> str:
    with pytest.raises(UserError) as caught:
        RecordRanges([file], 0)
    message = str(caught.value)
    assert message.startswith(f"{file} ({file.stat().st_size} bytes): ") and "\n" not in message
    assert message.endswith("; copy it again, or pack the set again with `vit-scale data pack`")
    return message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("group_size:1", "it is compressed, unlike those that are packed here"),
        ("group_size:1,brotli", "it is compressed"),
        ("group_size:4,uncompressed", "it has several records in a chunk, unlike those"),
    ],
)
def test_other_options_are_refused(file, options, message):
    write(file, 9, 5_000, options)
    assert message in refusal(file)


def test_a_file_that_is_truncated_or_of_another_format_is_refused(file):
    write(file, 9, 50_000)
    whole = file.read_bytes()
    for content, message in (
        (b"", "not a complete ArrayRecord file"),
        (whole[:-100], "not a complete ArrayRecord file"),
        (whole[: -record_ranges.BLOCK], "not an ArrayRecord file, or truncated"),
        (bytes(len(whole)), "not an ArrayRecord file, or truncated"),
        (np.random.RandomState(0).bytes(len(whole)), "not an ArrayRecord file, or truncated"),
        (whole[: 2**17] + whole[2**18 :], "not an ArrayRecord file, or truncated"),
    ):
        file.write_bytes(content)
        assert message in refusal(file)


def test_a_damaged_footer_is_refused_for_every_bit_of_it(file):
    """Or is read as the same offsets: a flipped bit of a checksum or of a size changes nothing."""
    records = write(file, 3, 50_000)
    whole = file.read_bytes()
    position = whole.index(b"\x08\x40\x10")  # the first entry: offset 64
    for at in range(position - 20, position + 25):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                ranges = RecordRanges([file], 0)
                read = [ranges.read(0, number) for number in range(ranges.count(0))]
            except (UserError, Corrupt):
                continue
            assert read == records


def test_a_record_that_is_not_there_is_corrupt(file):
    write(file, 3, 50_000)
    ranges = RecordRanges([file], 0)
    for position in (3, -1):
        with pytest.raises(Corrupt, match="the shard has 3 records"):
            ranges.read(0, position)
    content = bytearray(file.read_bytes())
    content[64 + 8] ^= 1  # the size of the first chunk's data
    file.write_bytes(content)
    with pytest.raises(Corrupt, match="no record at bytes 64 to 50109: 1 records of 50000 bytes"):
        ranges.read(0, 0)
    assert len(ranges.read(0, 1)) == 50_001
