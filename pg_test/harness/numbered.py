"""Events numbered `n` in a collection, in every tier, and their deletion."""

from __future__ import annotations

import psycopg

from .database import Database, collect_batch, one

DELETE = "SELECT rakam.delete_events(%s, %s, %s)"


def delete(session: psycopg.Connection, project: str, collection: str, condition: str) -> int:
    return one(session, DELETE, project, collection, condition)


def make(db: Database, project: str, collection: str) -> None:
    """The collection, with whole numbers as `n`."""
    db.admin.execute("SELECT rakam.create_collection(%s, %s)", (project, collection))
    db.admin.execute("SELECT rakam.add_field(%s, %s, 'n', 'bigint')", (project, collection))


def send(db: Database, project: str, collection: str, numbers, **more) -> None:
    if db.one("SELECT to_regclass(%s) IS NULL", f"{project}.{collection}"):
        make(db, project, collection)
    events = [
        (
            collection,
            {"n": n, "_user": f"u{n % 7}", "_time": f"2026-01-{n % 28 + 1:02}T10:00:00Z", "text": f"t {n}"} | more,
        )
        for n in numbers
    ]
    for start in range(0, len(events), 400):
        stored, rejected, _, errors = collect_batch(db.admin, project, events[start : start + 400])
        assert rejected == 0, errors


def numbers(session, table: str) -> list[int]:
    return [int(n) for (n,) in session.execute(f"SELECT n FROM {table} ORDER BY n").fetchall()]


def fill(db: Database, project: str, collection: str, each: int = 300) -> list[int]:
    """Events 0… in files, then as many in chunks, then as many in the inbox."""
    send(db, project, collection, range(each))
    db.flush(project, collection)
    send(db, project, collection, range(each, 2 * each))
    db.tick()
    send(db, project, collection, range(2 * each, 3 * each))
    return list(range(3 * each))
