"""Reading a bucket: blocks are kept on this machine, and nothing that happens to them changes an answer."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path

import psycopg
import pytest
from harness.database import collect, one, refused, wait_until
from harness.services import Services

PROJECT = "far"
QUERY = "SELECT count(*), sum(n), min(pad), max(pad), count(DISTINCT _user) FROM far.hit"
EVENTS = 40_000


@pytest.fixture(scope="module")
def services():
    with Services() as services:
        services.start("s3")
        services.start("faultproxy", FAULTPROXY_TARGET=services.env["S3_ENDPOINT_URL"])
        yield services


@pytest.fixture(scope="module")
def far(db, services):
    """A project in a bucket behind a proxy, with some megabytes that do not compress."""
    env = services.env
    db.admin.execute(
        "CREATE SERVER bucket FOREIGN DATA WRAPPER rakam OPTIONS (url 's3://"
        f"{env['S3_BUCKET']}/cache', endpoint '{env['FAULTPROXY_URL']}', allow_http 'true', region 'us-east-1')"
    )
    db.admin.execute(
        "CREATE USER MAPPING FOR postgres SERVER bucket OPTIONS"
        f" (access_key_id '{env['AWS_ACCESS_KEY_ID']}', secret_access_key '{env['AWS_SECRET_ACCESS_KEY']}')"
    )
    db.project(PROJECT, "bucket")
    collect(db.admin, PROJECT, "hit", {"n": 0, "pad": "", "_user": "u0", "_time": "2026-01-01T00:00:00Z"})
    db.tick()
    db.wait_column("far.hit", "pad")
    db.admin.execute(
        "INSERT INTO far.hit (_time, _user, n, pad) SELECT '2026-01-01'::timestamptz + i * interval '1 second',"
        " 'u' || i % 97, i, (SELECT string_agg(md5((i * k)::text), '') FROM generate_series(1, 9) k)"
        f" FROM generate_series(1, {EVENTS}) i"
    )
    db.flush(PROJECT)
    assert db.tiers(PROJECT, "hit") == {"inbox": 0, "hot": 0, "cold": EVENTS + 1}
    return db


@pytest.fixture(autouse=True)
def no_rules(services):
    yield
    services.faults([])


def blocks(db) -> list[Path]:
    root = db.cluster.data / "rakam_cache"
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name.isdigit())


def bytes_kept(db) -> int:
    """The size of all blocks; the worker may delete some of them meanwhile."""
    size = 0
    for path in blocks(db):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def explain(session, query: str = QUERY) -> dict:
    plan = one(session, f"EXPLAIN (ANALYZE, FORMAT json) {query}")[0]["Plan"]
    while "Files Read" not in plan:
        (plan,) = plan["Plans"]
    return plan


def answer(session) -> tuple:
    return session.execute(QUERY).fetchone()


def uncached(db) -> tuple:
    session = db.connect()
    session.execute("SET rakam.cache_size = 0")
    assert explain(session)["Cache Blocks Hit"] == 0
    return answer(session)


def warm(db) -> None:
    """Reads until everything is kept: that happens behind the reader's back."""
    wait_until(lambda: explain(db.admin)["Cache Blocks Missed"] == 0, "all blocks are kept")


def test_what_was_read_once_is_not_fetched_again(far, services):
    session = far.connect()
    cold = explain(session)
    assert cold["Cache Blocks Missed"] > 3
    assert 0 < cold["Storage Requests"] <= cold["Cache Blocks Missed"]
    assert cold["Storage Bytes Fetched"] >= cold["Bytes Read"] > 3 << 20
    warm(far)
    expected = uncached(far)
    assert expected[0] == EVENTS + 1
    # Also not by a session that has just begun, and not while the bucket is away.
    services.faults([{"match": {}, "fault": {"reset": "before"}}])
    other = far.connect()
    plan = explain(other)
    assert (plan["Cache Blocks Missed"], plan["Storage Requests"], plan["Storage Bytes Fetched"]) == (0, 0, 0)
    assert plan["Cache Blocks Hit"] >= cold["Cache Blocks Missed"]
    assert answer(other) == expected
    text = "\n".join(line for (line,) in other.execute(f"EXPLAIN ANALYZE {QUERY}"))
    assert re.search(r"Cache: \d+ blocks hit, \d+ bytes; 0 blocks missed", text)
    assert "Storage Requests: 0, 0 bytes" in text


def test_a_reader_needs_no_right_to_the_cache(far):
    warm(far)
    reader = far.login(PROJECT, "read")
    assert answer(reader) == uncached(far)
    assert explain(reader)["Cache Blocks Hit"] > 0
    for setting, value in (("cache_dir", "'/tmp/mine'"), ("cache_size", "'1GB'")):
        with refused("42501"):
            reader.execute(f"SET rakam.{setting} = {value}")
    far.make_login("login_stranger")
    with refused("42501"):
        answer(far.connect("login_stranger"))


def test_only_the_servers_user_can_read_blocks(far):
    warm(far)
    data = far.cluster.data
    owner = data.stat().st_uid
    for path in [data / "rakam_cache", *(data / "rakam_cache").rglob("*")]:
        assert path.stat().st_uid == owner
        assert path.stat().st_mode & 0o077 == 0, path


def test_harmed_blocks_are_fetched_again(far, services):
    warm(far)
    expected = uncached(far)
    reads = 0
    for harm in ("flip", "cut", "empty", "zeros", "swap"):
        files = blocks(far)
        assert len(files) > 3
        contents = [path.read_bytes() for path in files]
        for index, path in enumerate(files):
            content = bytearray(contents[index])
            if harm == "flip":
                content[len(content) * (index + 1) // (len(files) + 2)] ^= 1
            elif harm == "cut":
                del content[len(content) // 2 :]
            elif harm == "empty":
                content.clear()
            elif harm == "zeros":
                content[:] = bytes(len(content))
            else:
                content[:] = contents[index - 1]
            path.write_bytes(content)
        session = far.connect()
        plan = explain(session)
        assert plan["Cache Blocks Missed"] > 0, harm
        reads += 1
        assert answer(session) == expected, harm
        warm(far)
        assert answer(session) == expected
    assert reads == 5


def test_a_cache_that_cannot_be_written_is_in_nobodys_way(far):
    expected = uncached(far)
    folder = far.cluster.make_folder("no-cache")
    (folder / "file").write_text("")
    mark = far.cluster.log_mark()
    session = far.connect()
    session.execute(f"SET rakam.cache_dir = '{folder}/file'")
    for _ in range(3):
        assert answer(session) == expected
        plan = explain(session)
        assert (plan["Cache Blocks Hit"], plan["Cache Blocks Missed"] > 0) == (0, True)
    wait_until(lambda: "could not keep blocks in rakam.cache_dir" in far.cluster.log_since(mark), "the log says so")
    assert answer(session) == expected
    assert far.cluster.log_since(mark).count("could not keep blocks") == 1
    found = dict(session.execute('SELECT "check", status FROM rakam.health()').fetchall())
    assert found["cache"] == "warning"
    # A folder that the server may read, but not write.
    folder = far.cluster.make_folder("locked")
    folder.chmod(0o500)
    session = far.connect()
    session.execute(f"SET rakam.cache_dir = '{folder}'")
    assert answer(session) == expected
    assert list(folder.iterdir()) == []
    found = dict(far.admin.execute('SELECT "check", status FROM rakam.health()').fetchall())
    assert found["cache"] == "ok"


def test_base_backups_leave_blocks_out(far):
    warm(far)
    target = far.cluster.make_folder("backup")
    far.cluster.run(
        "pg_basebackup", "-h", far.cluster.socket_dir, "-p", far.cluster.port, "-U", "postgres",
        "-D", target / "data", "-X", "none", "-c", "fast",
    )  # fmt: skip
    assert (target / "data" / "PG_VERSION").exists()
    assert [path for path in (target / "data" / "rakam_cache").rglob("*") if path.is_file()] == []


def test_cancel_and_limit_stop_reads(far, services):
    services.faults([{"match": {"method": "GET"}, "fault": {"delay_ms": 20_000}}])
    session = far.connect()
    session.execute("SET rakam.cache_size = 0")
    session.execute("SET statement_timeout = '300ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        answer(session)
    services.faults([])
    session.execute("RESET statement_timeout")
    assert answer(session)[0] == EVENTS + 1
    before = explain(session, "SELECT * FROM far.hit")["Storage Bytes Fetched"]
    assert explain(session, "SELECT n FROM far.hit LIMIT 1")["Storage Bytes Fetched"] < before


def test_bad_answers_change_nothing(far, services):
    expected = uncached(far)
    session = far.connect()
    session.execute("SET rakam.cache_size = 0")
    for fault in ({"truncate": 5000}, {"reset": "before"}, {"reset": "after"}, {"s3_error": "SlowDown", "status": 503}):
        services.faults([{"match": {"method": "GET"}, "times": 3, "fault": fault}])
        assert answer(session) == expected, fault
    # Into the cache comes what is right.
    for path in blocks(far):
        path.unlink()
    services.faults([{"match": {"method": "GET"}, "every": 2, "times": 4, "fault": {"truncate": 100_000}}])
    assert answer(far.connect()) == expected
    warm(far)
    assert answer(far.connect()) == expected


def test_the_worker_keeps_to_the_bound(far):
    warm(far)
    assert bytes_kept(far) > 3 << 20
    far.admin.execute("ALTER SYSTEM SET rakam.cache_size = '3MB'")
    far.admin.execute("SELECT pg_reload_conf()")
    try:
        wait_until(lambda: bytes_kept(far) <= 3 << 20, "the worker makes room", timeout_s=40)
        assert answer(far.connect()) == uncached(far)
    finally:
        far.admin.execute("ALTER SYSTEM RESET rakam.cache_size")
        far.admin.execute("SELECT pg_reload_conf()")


def test_objects_that_are_deleted_leave_no_blocks(far, services):
    warm_query = "SELECT count(*), max(n) FROM going.hit"
    far.project("going", "bucket")
    for n in range(3):
        collect(far.admin, "going", "hit", {"n": n, "_time": "2026-02-01T00:00:00Z"})
    far.flush("going")
    before = set(blocks(far))
    session = far.connect()
    assert session.execute(warm_query).fetchone() == (3, 2)
    (block,) = wait_until(lambda: set(blocks(far)) - before, "the block is kept")
    session.execute("SET rakam.allow_project_drop = on")
    far.admin.execute("ALTER SYSTEM SET rakam.file_retention = 0")
    far.admin.execute("SELECT pg_reload_conf()")
    try:
        session.execute("SELECT rakam.drop_project('going')")
        wait_until(lambda: far.tick() or not block.exists(), "the block goes with its object")
    finally:
        far.admin.execute("ALTER SYSTEM RESET rakam.file_retention")
        far.admin.execute("SELECT pg_reload_conf()")


# A disk that is full is a small file system of its own, which root alone may mount, and in many containers not even root.
# The crate's test of a full disk (`ulimit -f`, crates/lake cache) runs everywhere.
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a disk of its own")
def test_a_full_disk_is_harmless(far, services):
    expected = uncached(far)
    folder = far.cluster.make_folder("small-disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=0777", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        for _ in range(2):
            session = far.connect()
            session.execute(f"SET rakam.cache_dir = '{folder}'")
            assert answer(session) == expected
            session.close()
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
