"""What a deletion leaves behind: nothing half done after a crash, and in the end not a byte of what was deleted.

RAKAM_DELETE_POINTS=all crashes at every point, not only at the three that matter most.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import psycopg
import pytest
from harness.cluster import Cluster
from harness.database import Database, collect, collect_batch, one, refused, wait_until
from harness.numbered import delete, fill, make, numbers

# Where a process is killed, in which project, in which call, and whether the events are deleted by then.
POINTS = [
    ("delete.before_commit", "acme", "delete", False),
    ("rewrite.after_upload", "lakeside", "flush", True),
    ("rewrite.before_commit", "acme", "flush", True),
]
if os.environ.get("RAKAM_DELETE_POINTS") == "all":
    POINTS += [
        ("delete.after_digest", "lakeside", "delete", False),
        ("delete.before_hide", "lakeside", "delete", False),
        ("rewrite.after_intent", "lakeside", "flush", True),
        ("rewrite.before_commit", "lakeside", "flush", True),
        ("flush.before_commit", "acme", "flush", True),
    ]


def test_crashes(private_cluster):
    """A process killed at each point: the deletion is whole or not there, and stays."""
    cluster: Cluster = private_cluster("crash", {"rakam.file_retention": "0"})
    db = Database(cluster, "crash").create()
    folder = cluster.make_folder("crash-lake")
    db.admin.execute(f"CREATE SERVER crash_lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.project("acme")
    db.project("lakeside", "crash_lake")
    for number, (point, project, call, hidden) in enumerate(POINTS):
        collection = f"c{number}"
        everything = fill(db, project, collection, 60)
        left = [n for n in everything if n % 4]
        if call == "flush":
            assert delete(db.admin, project, collection, "n % 4 = 0") == 45
        db.admin.execute(f"ALTER DATABASE crash SET rakam.failpoint = '{point}=exit'")
        with pytest.raises(psycopg.OperationalError):
            if call == "delete":
                delete(db.admin, project, collection, "n % 4 = 0")
            else:
                db.flush(project, collection)
        cluster.wait_ready()
        db.close()
        wait_until(lambda: alive(db), "the database")
        db.admin.execute("ALTER DATABASE crash RESET rakam.failpoint")
        assert numbers(db.admin, f"{project}.{collection}") == (left if hidden else everything), point
        if not hidden:
            assert delete(db.admin, project, collection, "n % 4 = 0") == 45
        assert numbers(db.admin, f"{project}.{collection}") == left
        db.flush(project, collection)
        db.tick()
        assert numbers(db.admin, f"{project}.{collection}") == left
        assert db.tiers(project, collection) == {"inbox": 0, "hot": 0, "cold": len(left)}
    # And with the server itself killed right after an answer.
    cluster.kill9_postmaster()
    cluster.start()
    db.close()
    for number, (_, project, _, _) in enumerate(POINTS):
        assert numbers(db.admin, f"{project}.c{number}") == left
    objects = {str(path) for path in Path(folder).rglob("*.parquet")}
    wait_until(
        lambda: (db.tick(), {str(p) for p in Path(folder).rglob("*.parquet")} == set(manifest(db)))[1],
        f"only the manifest's objects of {len(objects)}",
    )


def manifest(db: Database) -> list[str]:
    return [
        p.removeprefix("file://") for (p,) in db.all("SELECT path FROM rakam.data_files WHERE project = 'lakeside'")
    ]


def alive(db: Database) -> bool:
    try:
        return db.one("SELECT 1") == 1
    except psycopg.OperationalError:
        return False


def found_in(folder: Path, marker: bytes) -> list[str]:
    """Files below the folder that hold the marker."""
    hits = []
    for path in folder.rglob("*"):
        if path.is_file() and marker in path.read_bytes():
            hits.append(str(path.relative_to(folder)))
    return hits


@pytest.mark.parametrize("storage", ["local", "file"])
def test_the_bytes_are_gone(private_cluster, storage):
    """After flush, tick and VACUUM no relation file and no object holds a byte of them; the log and WAL may."""
    cluster: Cluster = private_cluster(
        # Nobody but the calls: a worker's or autovacuum's transaction would be an old snapshot that delays it.
        f"bytes-{storage}",
        {
            "shared_preload_libraries": "",
            "rakam.file_retention": "0",
            "rakam.rotation_interval": "1h",
            "autovacuum": "off",
        },
    )
    db = Database(cluster, "bytes").create()
    folder = Path(cluster.make_folder("bytes-lake"))
    db.admin.execute(f"CREATE SERVER bytes_lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.project("acme", "bytes_lake" if storage == "file" else None)
    make(db, "acme", "kept")
    marker = f"Zq{random.randrange(10**12):012}Xw"

    def secret(n: int) -> dict:
        return {
            "n": n,
            "_user": marker,
            "_id": f"{marker}-{n}",
            "text": f"{marker} text {n}",
            "long": marker * 200 if n % 10 == 0 else None,
            "count": f"{marker} no number" if n % 5 == 0 else n,
            "deep": {"inner": marker},
            "_time": f"2026-01-{n % 28 + 1:02}T10:00:00Z",
        }

    def store(secrets, others) -> None:
        events = [("kept", secret(n)) for n in secrets]
        events += [("kept", {"n": n, "_user": "somebody", "count": n, "_time": "2026-01-03T00:00:00Z"}) for n in others]
        for start in range(0, len(events), 100):
            assert collect_batch(db.admin, "acme", events[start : start + 100])[1] == 0

    # In files, among others; in files of their own; in chunks; in the inbox.
    store(range(0, 50), range(1000, 1050))
    db.flush("acme")
    store(range(50, 60), [])
    db.flush("acme")
    for start in range(60, 160, 10):
        store(range(start, start + 10), range(1000 + start, 1005 + start))
        db.tick()
    db.admin.execute("ANALYZE")
    store(range(160, 169), range(2000, 2020))
    # Alone: a larger entry of the inbox is compressed, and nothing would be found.
    collect(db.admin, "acme", "kept", secret(169))
    kept = db.all("SELECT n FROM acme.kept WHERE _user = 'somebody' ORDER BY n")
    db.admin.execute("CHECKPOINT")
    base = Path(cluster.data) / "base"
    assert found_in(base, marker.encode())
    if storage == "file":
        assert found_in(folder, marker.encode())

    assert delete(db.admin, "acme", "kept", "n < 1000") == 170
    assert db.all("SELECT n FROM acme.kept ORDER BY n") == kept
    db.flush()
    db.tick()
    db.admin.execute("VACUUM")
    db.admin.execute("CHECKPOINT")
    assert found_in(folder, marker.encode()) == []
    hits = found_in(base, marker.encode())
    assert hits == [], [named(db, hit) for hit in hits]
    assert db.one("SELECT count(*) FROM rakam_internal.erasure") == 0
    assert db.one("SELECT to_empty FROM rakam_internal.inbox_state") == [False, False, False]
    assert db.all("SELECT n FROM acme.kept ORDER BY n") == kept


def named(db: Database, hit: str) -> str:
    node = int(hit.split("/")[-1].split(".")[0].split("_")[0])
    return str(db.one("SELECT max(relname) FROM pg_class WHERE relfilenode = %s", node)) + " " + hit


def test_an_old_snapshot_only_delays_it(private_cluster):
    """While it lasts it reads what it has to; afterwards the background erases by itself, autovacuum's part included."""
    cluster: Cluster = private_cluster(
        "delayed", {"rakam.file_retention": "0", "autovacuum_naptime": "1s", "rakam.flush_interval": "1s"}
    )
    db = Database(cluster, "delayed").create()
    db.project("acme")
    make(db, "acme", "kept")
    marker = f"Zq{random.randrange(10**12):012}Xw"
    for n in range(200):
        collect(db.admin, "acme", "kept", {"n": n, "text": f"{marker} {n}", "_time": "2026-01-03T00:00:00Z"})
    db.flush()
    with db.connect(autocommit=False) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert one(reader, "SELECT count(*) FROM acme.kept") == 200
        assert delete(db.admin, "acme", "kept", "n < 199") == 199
        db.flush()
        db.tick()
        db.admin.execute("VACUUM")
        assert one(reader, "SELECT count(*) FROM acme.kept WHERE text LIKE %s", marker + "%") == 200
        checks = dict(db.all('SELECT "check", detail FROM rakam.health()'))
        assert "deleted events" in checks
        assert db.one("SELECT count(*) FROM rakam_internal.erasure") > 0
    db.admin.execute("VACUUM")
    base = Path(cluster.data) / "base"

    def gone() -> bool:
        db.admin.execute("CHECKPOINT")
        # One event is kept, and its bytes with it.
        return all(
            f"{marker} {n}".encode() not in path.read_bytes()
            for n in (0, 7, 198)
            for path in base.rglob("*")
            if path.is_file()
        )

    wait_until(gone, "the bytes to go", timeout_s=180, pause_s=1)


def test_standby(private_cluster):
    primary = private_cluster("delete-primary")
    db = Database(primary, "standby").create()
    db.project("acme")
    fill(db, "acme", "page", 100)
    db.tick()
    standby = primary.standby(f"{primary.name}-standby")
    private_cluster.made.append(standby)
    standby.start({"max_connections": "100"})
    replica = Database(standby, "standby")

    def caught_up() -> bool:
        lsn = db.one("SELECT pg_current_wal_flush_lsn()")
        return wait_until(lambda: replica.one("SELECT pg_last_wal_replay_lsn() >= %s", lsn), "the standby")

    assert delete(db.admin, "acme", "page", "n % 2 = 0") == 150
    caught_up()
    odd = list(range(1, 300, 2))
    assert numbers(replica.admin, "acme.page") == odd
    with refused("55000", hint="primary server"):
        delete(replica.admin, "acme", "page", "true")
    db.flush()
    db.tick()
    db.admin.execute("VACUUM")
    db.tick()
    caught_up()
    assert numbers(replica.admin, "acme.page") == odd == numbers(db.admin, "acme.page")
