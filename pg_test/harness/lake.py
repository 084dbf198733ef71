"""What the tests of storages do all the time: fill one, look at its objects, ask rakam about it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import psycopg

from .database import Database, one, wait_until


def make_storage(db: Database, name: str) -> Path:
    folder = db.cluster.make_folder(f"storage-{name}")
    db.admin.execute(f"CREATE SERVER {name} FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    return folder


def fill(db: Database, project: str = "acme", count: int = 100, collection: str = "seen", first: int = 0) -> None:
    events = [
        {"collection": collection, "properties": {"n": n, "_time": "2026-03-01T00:00:00Z"}}
        for n in range(first, first + count)
    ]
    assert db.one("SELECT stored FROM rakam.collect_batch(%s, %s)", project, json.dumps(events)) == count


def objects(folder: Path) -> set[str]:
    """Every file of a storage but what rakam keeps about the storage itself."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if not path.startswith("_rakam/")}


def files(db: Database) -> set[str]:
    return {path for (path,) in db.all("SELECT path FROM rakam_internal.data_file WHERE storage_id > 1")}


def check(db: Database, storage: str = "lake") -> list[tuple]:
    return db.all("SELECT path, problem, bytes FROM rakam.check_storage(%s) ORDER BY 1", storage)


def stat(db: Database, storage: str = "lake") -> dict:
    columns = ("url", "reachable", "last_error", "pending_bytes", "orphans", "deferred", "owner")
    row = db.admin.execute(
        f"SELECT {', '.join(columns)} FROM rakam.stat_lake WHERE storage = %s", (storage,)
    ).fetchone()
    return dict(zip(columns, row, strict=True))


def health(db: Database, check: str) -> list[tuple]:
    return db.all('SELECT status, detail, hint FROM rakam.health() WHERE "check" = %s', check)


def rewritten(db: Database, folder: Path) -> str:
    """Takes a file of its own out of use, and returns its path."""
    fill(db, collection="doomed", count=10)
    db.flush("acme", "doomed")
    path = db.one(
        "SELECT f.path FROM rakam_internal.data_file f JOIN rakam_internal.collection c USING (collection_id)"
        " WHERE c.name = 'doomed'"
    )
    assert path in objects(folder)
    db.admin.execute("SELECT rakam.drop_collection('acme', 'doomed')")
    return path


def files_of(db: Database, storage: str) -> set[str]:
    rows = db.all(
        "SELECT f.path FROM rakam_internal.data_file f JOIN rakam_internal.storage s USING (storage_id)"
        " WHERE s.name = %s",
        storage,
    )
    return {path for (path,) in rows}


def wait_ready(db: Database) -> None:
    """A killed child makes the server restart all of them."""

    def answers() -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            return one(db.admin, "SELECT true")
        db.close()
        return False

    wait_until(answers, "the server after a crash", 60, 0.1)
