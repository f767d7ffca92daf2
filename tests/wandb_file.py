"""Read a `.wandb` file: 32 KiB blocks in LevelDB's log format, whose records are wandb protobuf messages."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK, RECORD = 7, 32768, 7
WHOLE, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[Any]:
    """wandb's `Record` messages of a file, in order."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + RECORD <= len(data):
        if BLOCK - at % BLOCK < RECORD:
            at += BLOCK - at % BLOCK
            continue
        _crc, size, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + RECORD : at + RECORD + size]
        at += RECORD + size
        parts = piece if kind in (WHOLE, FIRST) else parts + piece
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's history, without keys that wandb adds (which start with an underscore)."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            rows.append({k: v for k, v in items.items() if not k.startswith("_")})
    return rows


def run_of(path: Path) -> Any:
    """The run's record: id, name, group, tags."""
    return next(r.run for r in records(path) if r.WhichOneof("record_type") == "run")
