"""Avro records as other programs write them: by fastavro, in each framing that a source reads."""

from __future__ import annotations

import io
import struct
from typing import Any

import fastavro


def schema(name: str, **fields: str) -> dict[str, Any]:
    """A record of optional fields, each with its Avro type."""
    optional = [{"name": field, "type": ["null", kind], "default": None} for field, kind in fields.items()]
    return {"type": "record", "name": name, "fields": optional}


def body(schema: dict[str, Any], event: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), event)
    return out.getvalue()


def confluent(schema_id: int, schema: dict[str, Any], event: dict[str, Any]) -> bytes:
    """In the framing of Confluent's registry."""
    return b"\0" + struct.pack(">I", schema_id) + body(schema, event)


def container(schema: dict[str, Any], events: list[dict[str, Any]], codec: str = "deflate") -> bytes:
    """A container file."""
    out = io.BytesIO()
    fastavro.writer(out, fastavro.parse_schema(schema), events, codec)
    return out.getvalue()


def read_confluent(schemas: dict[int, dict[str, Any]], record: bytes) -> dict[str, Any]:
    """The event of a record in the framing of Confluent's registry, by the schema that its id names."""
    assert record[0] == 0
    (schema_id,) = struct.unpack(">I", record[1:5])
    found = fastavro.schemaless_reader(io.BytesIO(record[5:]), fastavro.parse_schema(schemas[schema_id]), None)
    assert isinstance(found, dict)
    return found
