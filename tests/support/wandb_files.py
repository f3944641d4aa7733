"""What W&B has written offline: its files in LevelDB's log format, read with W&B's own messages."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, FIRST = 32768, 7, 7  # bytes of a block, of a record's header, and of the file's


def records(path: Path) -> Iterator[bytes]:
    """Each record's data, with its checksum checked. A record that crosses blocks is in several parts."""
    data, at, whole = path.read_bytes(), FIRST, b""
    assert data[:4] == b":W&B"
    while at < len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        checksum, size, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + HEADER : at + HEADER + size]
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) == checksum
        whole, at = whole + part, at + HEADER + size
        if kind in (1, 4):  # a whole record, or the last part
            yield whole
            whole = b""


def read(path: Path) -> tuple[str, dict[int, dict[str, Any]], int]:
    """The name of a run, its numbers by step, and its exit code."""
    from wandb.proto.wandb_internal_pb2 import Record

    name, steps, code = "", {}, -1
    for data in records(path):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name = record.run.run_id
        elif kind == "exit":
            code = record.exit.exit_code
        elif kind == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            steps[row["_step"]] = {key: value for key, value in row.items() if key[0] != "_"}
    return name, steps, code
