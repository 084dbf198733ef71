"""The same events as files of every format."""

from __future__ import annotations

import datetime
import gzip
import json
import struct
import zlib

import pyarrow
import pyarrow.parquet

ROWS = 3_000


def event(n: int) -> dict:
    return {
        "_time": f"2025-{n % 12 + 1:02}-{n % 28 + 1:02}T10:{n % 60:02}:00Z",
        "_user": f"u{n % 100}",
        "n": n,
        "price": n / 4,
        "ok": n % 2 == 0,
        "day": f"2025-01-{n % 28 + 1:02}",
        "note": None if n % 5 == 0 else f'say "{n}", then\nmore ä',
    }


EVENTS = [event(n) for n in range(ROWS)]
EXPECTED = (
    ROWS,
    float(sum(range(ROWS))),
    sum(range(ROWS)) / 4,
    ROWS // 2,
    ROWS - ROWS // 5,
    100,
    sum(len(e["note"]) for e in EVENTS if e["note"]),
)
SUMMARY = """SELECT count(*), sum(n)::float8, sum(price), count(*) FILTER (WHERE ok), count(note), count(DISTINCT _user),
             sum(length(note)) FROM acme.{}"""


def cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text


def csv_text(events: list[dict]) -> str:
    lines = [",".join(events[0])] + [",".join(cell(v) for v in e.values()) for e in events]
    return "\n".join(lines) + "\n"


def arrow_table(events: list[dict]) -> pyarrow.Table:
    table = pyarrow.Table.from_pylist(events)
    times = pyarrow.array([datetime.datetime.fromisoformat(e["_time"]) for e in events], pyarrow.timestamp("ms", "UTC"))
    days = pyarrow.array([datetime.date.fromisoformat(e["day"]) for e in events])
    table = table.set_column(0, "_time", times)
    return table.set_column(table.schema.get_field_index("day"), "day", days)


def avro_long(value: int) -> bytes:
    value = (value << 1) ^ (value >> 63)
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def avro_bytes(value: bytes) -> bytes:
    return avro_long(len(value)) + value


def avro_file(events: list[dict]) -> bytes:
    """An object container by the specification: blocks of 700 records, deflated."""
    fields = [
        ("_time", {"type": "long", "logicalType": "timestamp-millis"}),
        ("_user", "string"),
        ("n", "long"),
        ("price", "double"),
        ("ok", "boolean"),
        ("day", {"type": "int", "logicalType": "date"}),
        ("note", ["null", "string"]),
    ]
    schema = {"type": "record", "name": "event", "fields": [{"name": n, "type": t} for n, t in fields]}
    sync = b"synchronisation!"
    metadata = {"avro.schema": json.dumps(schema).encode(), "avro.codec": b"deflate"}
    out = b"Obj\x01" + avro_long(len(metadata))
    for key, value in metadata.items():
        out += avro_bytes(key.encode()) + avro_bytes(value)
    out += avro_long(0) + sync

    def record(e: dict) -> bytes:
        ms = int(datetime.datetime.fromisoformat(e["_time"]).timestamp() * 1000)
        days = (datetime.date.fromisoformat(e["day"]) - datetime.date(1970, 1, 1)).days
        note = avro_long(0) if e["note"] is None else avro_long(1) + avro_bytes(e["note"].encode())
        return (
            avro_long(ms) + avro_bytes(e["_user"].encode()) + avro_long(e["n"]) + struct.pack("<d", e["price"])
            + bytes([e["ok"]]) + avro_long(days) + note
        )  # fmt: skip

    for start in range(0, len(events), 700):
        part = events[start : start + 700]
        data = zlib.compress(b"".join(map(record, part)), wbits=-15)
        out += avro_long(len(part)) + avro_bytes(data) + sync
    return out


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


FORMATS = {
    "a.parquet": lambda path: pyarrow.parquet.write_table(arrow_table(EVENTS), path, compression="zstd"),
    "b.csv": lambda path: path.write_text(csv_text(EVENTS)),
    "c.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_text(EVENTS).encode())),
    "d.ndjson.zst": lambda path: path.write_bytes(zstd("\n".join(map(json.dumps, EVENTS)).encode())),
    "e.json": lambda path: path.write_text(json.dumps(EVENTS, indent=1)),
    "f.avro": lambda path: path.write_bytes(avro_file(EVENTS)),
}
