"""Random filters and projections over every type: the collection answers as a heap table with the same rows does, in rows
and in SQLSTATE. The collection's rows are in a data file, in chunks, and uncommitted in the session that asks.

RAKAM_DIFF_QUERIES (default 2,000) sets the number of queries; the full run is 100,000.
"""

from __future__ import annotations

import os
import random

import psycopg
import pytest
from harness.database import has_column, wait_until
from harness.queries import COLUMNS, TABLE, QueryMaker, random_row

QUERIES = int(os.environ.get("RAKAM_DIFF_QUERIES", "2000"))
ROWS = 1_500


@pytest.fixture(scope="module")
def tables(db):
    """`acme.wild` and `oracle`: the same columns, filled by the same INSERTs."""
    db.project("acme")
    db.admin.execute("SELECT rakam.create_collection('acme', 'wild')")
    for name, kind in COLUMNS.items():
        db.admin.execute("SELECT rakam.add_field('acme', 'wild', %s, %s)", (name, kind))
    db.tick()
    for name in COLUMNS:
        wait_until(lambda name=name: has_column(db.admin, "acme.wild", name), f"column {name}")
    collated = {"text": 'text COLLATE "C"', "text[]": 'text[] COLLATE "C"'}
    columns = ", ".join(f'"{name}" {collated.get(kind, kind)}' for name, kind in COLUMNS.items())
    db.admin.execute(
        f'CREATE TABLE oracle (_time timestamptz, _user text COLLATE "C", _id text COLLATE "C", {columns})'
    )
    return db


def insert(session: psycopg.Connection, rows: list[dict]) -> None:
    for table in ("acme.wild", "oracle"):
        for start in range(0, len(rows), 250):
            part = rows[start : start + 250]
            names = ", ".join(f'"{name}"' for name in part[0])
            values = ", ".join("(" + ", ".join(row.values()) + ")" for row in part)
            session.execute(f"INSERT INTO {table} ({names}) VALUES {values}")


def answer(session: psycopg.Connection, query: str) -> tuple[str | None, list[tuple[str, ...]]]:
    """SQLSTATE, or the rows as text in a defined order."""
    try:
        with session.transaction():
            rows = session.execute(query).fetchall()
    except psycopg.Error as error:
        return error.sqlstate, []
    shown = [tuple("∅" if value is None else str(value) for value in row) for row in rows]
    # The queries with LIMIT order by a unique key; the others have no order to compare.
    return None, shown if "ORDER BY" in query else sorted(shown)


def test_differential(tables, seed):
    db = tables
    rng = random.Random(seed)
    insert(db.admin, [random_row(rng, n) for n in range(ROWS // 3)])
    db.flush("acme", "wild")
    insert(db.admin, [random_row(rng, n) for n in range(ROWS // 3, 2 * ROWS // 3)])
    db.tick()
    session = db.connect(autocommit=False, options="-c client_min_messages=error")
    insert(session, [random_row(rng, n) for n in range(2 * ROWS // 3, ROWS)])

    names = ["_id", "_time", "_user", *COLUMNS]
    whole = ", ".join(f'"{name}"::text' for name in names)
    ours, theirs = (answer(session, f"SELECT {whole} FROM {table} ORDER BY _id") for table in ("acme.wild", "oracle"))
    assert ours[0] is theirs[0] is None
    assert len(ours[1]) == len(theirs[1]) == ROWS
    different = [
        (name, mine[0], mine[index], yours[index])
        for mine, yours in zip(ours[1], theirs[1], strict=True)
        for index, name in enumerate(names)
        if mine[index] != yours[index]
    ]
    assert not different, (
        f"{len(different)} values differ before any filter (column, id, collection, heap): {different[:10]}"
    )

    maker = QueryMaker(rng)
    errors = 0
    for number in range(QUERIES):
        setting = maker.settings()
        query = maker.query()
        for statement in setting:
            session.execute(statement)
        ours, theirs = (answer(session, query.replace(TABLE, table)) for table in ("acme.wild", "oracle"))
        errors += theirs[0] is not None
        if ours != theirs:
            only_ours = [row for row in ours[1] if row not in theirs[1]][:3]
            only_theirs = [row for row in theirs[1] if row not in ours[1]][:3]
            raise AssertionError(
                f"query {number} (seed {seed}) after {setting}:\n{query.replace(TABLE, 'acme.wild')}\n"
                f"collection: {ours[0] or len(ours[1])}, only there {only_ours}\n"
                f"heap table: {theirs[0] or len(theirs[1])}, only there {only_theirs}"
            )
    print(f"{QUERIES} queries, {errors} of them with an error on both sides, 0 mismatches")
    assert errors < QUERIES / 3, "too many queries fail on both sides to show anything"
    session.rollback()
