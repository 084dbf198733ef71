"""Copies of a database on one storage: each reads and adds, none deletes before it has adopted the storage."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import psycopg
from conftest import AT_ONCE
from harness.cluster import Cluster
from harness.database import Database, wait_until
from harness.lake import check, fill, health, objects, rewritten, stat


def owned_by_others(db: Database, folder: Path, before: set[str]) -> None:
    """A copy of the database reads and writes, deletes nothing, says so, and deletes once it has adopted the storage."""
    count = db.one("SELECT count(*) FROM acme.seen")
    fill(db, count=10, first=10_000)
    db.flush("acme")
    assert db.one("SELECT count(*) FROM acme.seen") == count + 10
    doomed = rewritten(db, folder)
    stray = folder / "stray"
    stray.write_bytes(b"?")
    check(db)
    for _ in range(3):
        db.tick()
    assert before <= objects(folder)
    assert {doomed, "stray"} <= objects(folder)
    said = health(db, "storage owner")
    assert [status for status, _, _ in said] == ["warning"]
    assert "adopt_storage('lake')" in said[0][2]
    assert stat(db)["owner"] not in (None, "this database")
    db.admin.execute("SELECT rakam.adopt_storage('lake')")
    assert stat(db)["owner"] == "this database"
    assert health(db, "storage owner") == []

    def gone() -> bool:
        check(db)
        db.tick()
        return not {doomed, "stray"} & objects(folder)

    wait_until(gone, "the deletions after the adoption", 30, 0.2)
    assert check(db) == []


def test_a_promoted_clone_deletes_nothing(lake, private_cluster):
    db, folder = lake
    original = db.cluster
    fill(db)
    db.flush()
    old = rewritten_but_kept(db, folder)
    clone = original.standby(f"{original.name}-clone")
    private_cluster.made.append(clone)
    clone.start({**AT_ONCE, "rakam.digest_interval": "100ms", "max_connections": "100"})
    copy = Database(clone, "lake")
    # A standby says what the primary's workers noted.
    assert stat(copy)["owner"] == "this database"
    assert [status for status, _, _ in health(copy, "storage")] == ["ok", "info"]
    clone.promote()
    wait_until(lambda: copy.worker_pid(), "a worker after promotion", 20)
    at_once(copy)
    try:
        # The original keeps it.
        owned_by_others(copy, folder, objects(folder) | {old})
    finally:
        at_once(db)
    # Now it is the original that has to keep its hands off.
    theirs = objects(folder)
    fill(db, first=500)
    db.flush()
    doomed = rewritten(db, folder)
    db.tick()
    check(db)
    db.tick()
    assert theirs | {doomed} <= objects(folder)
    assert "promoted or restored copy" in health(db, "storage owner")[0][1]
    assert db.one("SELECT count(*) FROM acme.seen") == 200
    copy.close()


def rewritten_but_kept(db: Database, folder: Path) -> str:
    """A file out of use that waits for its deletion."""
    db.admin.execute("ALTER SYSTEM SET rakam.file_retention = '1h'")
    db.admin.execute("SELECT pg_reload_conf()")
    path = rewritten(db, folder)
    assert stat(db)["deferred"] == 1
    return path


def at_once(db: Database) -> None:
    db.admin.execute("ALTER SYSTEM RESET rakam.file_retention")
    db.admin.execute("SELECT pg_reload_conf()")
    wait_until(lambda: db.one("SHOW rakam.file_retention") == "0", "the setting")


def test_a_copy_by_template_deletes_nothing(lake):
    db, folder = lake
    fill(db)
    db.flush()
    rewritten_but_kept(db, folder)
    db.close()
    with db.cluster.connect() as postgres:
        # The original is at rest: it would delete what is its own.
        postgres.execute("ALTER DATABASE lake ALLOW_CONNECTIONS false")

        def copied() -> bool:
            with contextlib.suppress(psycopg.errors.ObjectInUse):
                postgres.execute("CREATE DATABASE lake_copy TEMPLATE lake")
                return True
            postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'lake'")
            return False

        wait_until(copied, "the copy of the database", 30)
        copy = Database(db.cluster, "lake_copy")
        at_once(copy)
        try:
            owned_by_others(copy, folder, objects(folder))
        finally:
            postgres.execute("ALTER DATABASE lake ALLOW_CONNECTIONS true")
    copy.drop()


def test_a_restored_dump_deletes_nothing(lake, private_cluster):
    db, folder = lake
    fill(db)
    db.flush()
    rewritten_but_kept(db, folder)
    dump = db.cluster.folder / "dump.sql"
    db.cluster.run("pg_dump", *connection(db), "-f", dump, "lake")
    roles = db.cluster.run("pg_dumpall", *connection(db), "-g").stdout
    other = private_cluster("restored", AT_ONCE)
    other.run("psql", *connection(Database(other, "postgres")), "-q", "-d", "postgres", "-c", "CREATE DATABASE lake")
    (other.folder / "roles.sql").write_text(roles)
    other.run("psql", *connection(Database(other, "x")), "-q", "-d", "postgres", "-f", other.folder / "roles.sql")
    shutil.copy(dump, other.folder / "dump.sql")
    (other.folder / "dump.sql").chmod(0o644)
    other.run("psql", *connection(Database(other, "x")), "-q", "-d", "lake", "-f", other.folder / "dump.sql")
    copy = Database(other, "lake")
    owned_by_others(copy, folder, objects(folder))
    copy.close()


def connection(db: Database) -> list[str]:
    cluster: Cluster = db.cluster
    return ["-h", str(cluster.socket_dir), "-p", str(cluster.port), "-U", "postgres"]
