"""Read what a Weights & Biases run wrote offline, so that tests can assert on it.

The file is a log with LevelDB's framing: seven bytes of header, then blocks of 32 KiB, in which
fragments <crc32, length, type> make up the records, each a `wandb_internal_pb2.Record`.
"""

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, FRAGMENT = 32 * 1024, 7, struct.Struct("<IHB")
FULL, LAST = 1, 4  # types of the fragment that ends a record


class OfflineRun:
    """The records of the one run folder that `pattern` finds under `workdir`/wandb.

    The run must have finished; its end, which wandb writes a moment later, is waited for.
    """

    def __init__(self, workdir: Path, pattern: str = "offline-run-*"):
        (self.folder,) = (workdir / "wandb").glob(pattern)
        (path,) = self.folder.glob("run-*.wandb")
        self.records: list[Record] = []
        patience = time.monotonic() + 10
        while not self._of("exit") and time.monotonic() < patience:
            time.sleep(0.01)
            self.records = list(_records(path.read_bytes()))

    def _of(self, kind: str) -> list:
        return [getattr(r, kind) for r in self.records if r.WhichOneof("record_type") == kind]

    @property
    def history(self) -> list[dict]:
        """One dict for each step that was logged, with its `_step`."""
        return [_items(row.item) for row in self._of("history")]

    @property
    def config(self) -> dict:
        """The config as it stood at the end."""
        config: dict = {}
        for run in self._of("run"):
            config |= _items(run.config.update)
        for update in self._of("config"):
            config |= _items(update.update)
        return config

    @property
    def run(self):
        """The record that names the run: run_id, project, display_name."""
        return self._of("run")[0]

    @property
    def exit_code(self) -> int | None:
        """None where the run did not finish."""
        exits = self._of("exit")
        return exits[-1].exit_code if exits else None


def _items(items) -> dict:
    """Media are written as nested keys, ("train/images", "count"): a dict under the first."""
    found: dict = {}
    for item in items:
        *outer, name = item.nested_key or [item.key]
        owner = found
        for key in outer:
            owner = owner.setdefault(key, {})
        owner[name] = json.loads(item.value_json)
    return found


def _records(data: bytes) -> Iterator[Record]:
    if data[:4] != b":W&B":
        raise ValueError("not a Weights & Biases file")
    position, content = FILE_HEADER, b""
    while position + FRAGMENT.size <= len(data):
        room = BLOCK - position % BLOCK
        if room < FRAGMENT.size:  # too little for a fragment: padding
            position += room
            continue
        checksum, length, kind = FRAGMENT.unpack_from(data, position)
        if kind == length == 0:
            position += room
            continue
        position += FRAGMENT.size
        fragment = data[position : position + length]
        if len(fragment) < length:
            return  # torn by a kill
        if zlib.crc32(bytes([kind]) + fragment) != checksum:
            raise ValueError(f"bad checksum at byte {position}")
        position += length
        content += fragment
        if kind in (FULL, LAST):
            yield Record.FromString(content)
            content = b""
