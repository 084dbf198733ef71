"""`rakam.compact` and compaction in the background: few files, the same rows, at every instant.

RAKAM_COMPACT_TENANTS (default 3; the full run is 500) tenants get RAKAM_COMPACT_FLUSHES (30) small flushes each in a day;
RAKAM_COMPACT_YEARS_TENANTS (1; 2,000) tenants get 100 events a day over three years in RAKAM_COMPACT_YEARS_FLUSHES (12; 36)
flushes; RAKAM_COMPACT_ROUNDS (25; 500) is how many random steps the twin of the random test takes. The full runs take hours.
"""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import duckdb
import psycopg
import pytest
from harness.cluster import Cluster
from harness.database import Database, collect, collect_batch, one, refused, wait_until
from harness.numbered import delete, make, numbers, send

TENANTS = int(os.environ.get("RAKAM_COMPACT_TENANTS", "3"))
FLUSHES = int(os.environ.get("RAKAM_COMPACT_FLUSHES", "30"))
YEARS_TENANTS = int(os.environ.get("RAKAM_COMPACT_YEARS_TENANTS", "1"))
YEARS_FLUSHES = int(os.environ.get("RAKAM_COMPACT_YEARS_FLUSHES", "12"))
ROUNDS = int(os.environ.get("RAKAM_COMPACT_ROUNDS", "25"))
COMPACT = "SELECT * FROM rakam.compact(%s, %s)"
HALF_TARGET = 128 << 20
MOST = 8
# The most small files over any one day: it is reached on the first day of some file.
COVERING = """
SELECT coalesce(max(covering), 0) FROM (
  SELECT (SELECT count(*) FROM rakam.data_files g WHERE g.project = f.project AND g.collection = f.collection
          AND g.bytes < %s AND f.first_day BETWEEN g.first_day AND g.last_day) AS covering
  FROM (SELECT DISTINCT project, collection, first_day FROM rakam.data_files WHERE project = %s) f) c
"""


@pytest.fixture(scope="module")
def lake(cluster, db) -> Path:
    """Two projects: one in the default storage, one in a directory."""
    folder = cluster.make_folder("compact-lake")
    db.admin.execute(f"CREATE SERVER compact_lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.project("acme")
    db.project("lakeside", "compact_lake")
    return folder


@contextmanager
def settings(db, **values: str):
    """Settings of the whole server, for a while."""
    for name, value in values.items():
        db.admin.execute(f"ALTER SYSTEM SET rakam.{name} = '{value}'")
    db.admin.execute("SELECT pg_reload_conf()")
    for name, value in values.items():
        wait_until(lambda name=name, value=value: db.one(f"SHOW rakam.{name}") == value, name)
    try:
        yield
    finally:
        for name in values:
            db.admin.execute(f"ALTER SYSTEM RESET rakam.{name}")
        db.admin.execute("SELECT pg_reload_conf()")


def files(db, project: str, collection: str) -> list[tuple]:
    return db.all(
        "SELECT period, n, bytes, level, path FROM rakam.data_files WHERE project = %s AND collection = %s ORDER BY path",
        project,
        collection,
    )


def compact(db, project: str, collection: str | None = None) -> dict[str, tuple]:
    return {name: counts for name, *counts in db.all(COMPACT, project, collection)}


@pytest.mark.parametrize("project", ["acme", "lakeside"])
def test_small_files_become_one(db, lake, project):
    table = f"{project}.page"
    for number in range(10):
        send(db, project, "page", range(number * 20, number * 20 + 20), more=number, **{f"own{number}": number})
        db.flush(project, "page")
    send(db, project, "page", range(200, 210))
    whole = f"SELECT to_jsonb(p) FROM {table} p ORDER BY n"
    before = db.all(whole)
    assert len(files(db, project, "page")) == 10
    events, written, size = compact(db, project, "page")["page"]
    after = files(db, project, "page")
    assert (events, written) == (200, 1)
    assert [(n, bytes_, level) for _, n, bytes_, level, _ in after] == [(200, size, 1)]
    assert db.all(whole) == before
    assert db.all(f"SELECT own3 FROM {table} WHERE own3 IS NOT NULL") == [(3.0,)] * 20
    assert db.all(
        "SELECT cold_events, cold_bytes, files FROM rakam.stat_collection WHERE project = %s AND collection = 'page'",
        project,
    ) == [(200, size, 1)]
    if project == "lakeside":
        path = after[0][4].removeprefix("file://")
        reader = duckdb.connect()
        assert reader.execute("SELECT count(*), sum(n) FROM read_parquet(?)", [path]).fetchone() == (200, 19_900)
        times = reader.execute("SELECT _time FROM read_parquet(?)", [path]).fetchall()
        assert times == sorted(times)
    # There is nothing left to do.
    assert compact(db, project, "page")["page"] == [0, 0, 0]
    assert files(db, project, "page") == after


def test_fields_that_came_and_went(db, lake):
    """Files of several versions: values that waited in `_extra` become columns, dropped ones stay away."""
    db.admin.execute("SELECT rakam.create_collection('acme', 'versions')")
    with db.admin.transaction():
        db.admin.execute("SELECT rakam.set_schema_mode('acme', 'open')")
    for number in range(3):
        collect(db.admin, "acme", "versions", {"n": number, "gone": number, "typed": "7", "s": f"a{number}"})
    db.flush("acme", "versions")
    db.admin.execute("SELECT rakam.drop_field('acme', 'versions', 'gone')")
    for number in range(3, 6):
        collect(db.admin, "acme", "versions", {"n": number, "gone": f"text {number}", "late": number})
    db.flush("acme", "versions")
    for number in range(6, 9):
        collect(db.admin, "acme", "versions", {"n": number, "late": "does not fit"})
    db.flush("acme", "versions")
    whole = "SELECT to_jsonb(v) FROM acme.versions v ORDER BY n"
    before = db.all(whole)
    assert [row["gone"] for (row,) in before] == [None] * 3 + [f"text {n}" for n in (3, 4, 5)] + [None] * 3
    assert compact(db, "acme", "versions")["versions"][:2] == [9, 1]
    assert db.all(whole) == before


def test_deleted_events_stay_away(db, lake):
    for number in range(4):
        send(db, "lakeside", "trimmed", range(number * 100, number * 100 + 100))
        db.flush("lakeside", "trimmed")
    assert delete(db.admin, "lakeside", "trimmed", "n % 4 = 0 OR n BETWEEN 100 AND 199") == 175
    left = [n for n in range(400) if n % 4 and not 100 <= n < 200]
    assert compact(db, "lakeside", "trimmed")["trimmed"][:2] == [len(left), 1]
    assert numbers(db.admin, "lakeside.trimmed") == left
    assert db.tiers("lakeside", "trimmed") == {"inbox": 0, "hot": 0, "cold": len(left)}
    # A lone file with deleted events is written anew; a chunk, too.
    send(db, "lakeside", "trimmed", range(400, 420))
    db.tick()
    assert delete(db.admin, "lakeside", "trimmed", "n % 5 = 0") > 0
    left = [n for n in [*left, *range(400, 420)] if n % 5]
    compact(db, "lakeside", "trimmed")
    assert db.one("SELECT count(*) FROM rakam_internal.deletion") == 0
    assert numbers(db.admin, "lakeside.trimmed") == left


def test_events_deleted_while_their_file_is_merged(db, lake):
    for number in range(3):
        send(db, "lakeside", "raced", range(number * 50, number * 50 + 50))
        db.flush("lakeside", "raced")
    announced = "SELECT count(*) FROM rakam_internal.file_intent WHERE purpose = 'compact'"
    db.admin.execute(f"ALTER DATABASE \"{db.name}\" SET rakam.failpoint = 'compact.after_upload=sleep(1500)'")
    done: list = []
    with db.cluster.connect(db.name) as session:
        caller = threading.Thread(
            target=lambda: done.extend(session.execute(COMPACT, ("lakeside", "raced")).fetchall())
        )
        caller.start()
        try:
            wait_until(lambda: db.one(announced) > 0 or done, "the merge")
            assert delete(db.admin, "lakeside", "raced", "n % 2 = 0") == 75
            # Hidden at once, while the merge that has not seen it goes on.
            assert numbers(db.admin, "lakeside.raced") == list(range(1, 150, 2))
        finally:
            db.admin.execute(f'ALTER DATABASE "{db.name}" RESET rakam.failpoint')
            caller.join(timeout=60)
    assert done[0][:3] in [("raced", 75, 1), ("raced", 150, 1)]
    assert numbers(db.admin, "lakeside.raced") == list(range(1, 150, 2))
    assert db.tiers("lakeside", "raced")["cold"] == 75
    db.tick()
    assert db.one(announced) == 0


def test_readers_see_the_same_all_along(db, lake):
    with settings(db, file_retention="0"):
        for number in range(10):
            send(db, "lakeside", "watched", range(number * 300, number * 300 + 300))
            db.flush("lakeside", "watched")
        repeatable = db.connect(autocommit=False)
        repeatable.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        repeatable.execute("DECLARE early CURSOR FOR SELECT n FROM lakeside.watched")
        seen = [int(n) for (n,) in repeatable.execute("FETCH 10 FROM early")]
        repeatable.execute("DECLARE late CURSOR FOR SELECT n FROM lakeside.watched")
        compact(db, "lakeside", "watched")
        db.tick()
        assert one(db.admin, "SELECT count(*) FROM lakeside.watched") == 3_000
        seen += [int(n) for (n,) in repeatable.execute("FETCH ALL FROM early")]
        assert sorted(seen) == list(range(3_000))
        assert len(repeatable.execute("FETCH ALL FROM late").fetchall()) == 3_000
        assert one(repeatable, "SELECT count(*) FROM lakeside.watched") == 3_000
        repeatable.commit()
        # Nobody needs them any more.
        folder = lake / "lakeside" / "watched"
        wait_until(lambda: (db.tick(), len(list(folder.rglob("*.parquet"))) == 1)[1], "the merged files' deletion")


def test_small_days_move_up(db, lake):
    with settings(db, min_file_events="1"):
        for day in range(1, 13):
            collect_batch(
                db.admin, "acme", [("days", {"n": n, "_time": f"2024-{day:02}-{day:02}T00:00:00Z"}) for n in range(20)]
            )
        db.flush("acme", "days")
        assert [period for period, *_ in files(db, "acme", "days")] == ["day"] * 12
        # Each is worth a file of its own.
        assert compact(db, "acme", "days")["days"] == [0, 0, 0]
    events, written, _ = compact(db, "acme", "days")["days"]
    assert (events, written) == (240, 1)
    assert [(period, n) for period, n, *_ in files(db, "acme", "days")] == [("year", 240)]
    first, last = db.all("SELECT first_day::text, last_day::text FROM rakam.data_files WHERE collection = 'days'")[0]
    assert (first, last) == ("2024-01-01", "2024-12-31")
    assert db.one("SELECT count(*) FROM acme.days WHERE _time = '2024-05-05T00:00:00Z'") == 20
    # What is enough for finer ones goes down again, when it is merged anyway.
    with settings(db, min_file_events="25"):
        collect_batch(db.admin, "acme", [("days", {"n": n, "_time": "2024-03-03T01:00:00Z"}) for n in range(10)])
        db.flush("acme", "days")
        compact(db, "acme", "days")
        assert [(period, n) for period, n, *_ in sorted(files(db, "acme", "days"))] == [("day", 30), ("year", 220)]


def test_the_target_size_holds(db, lake):
    """More than one file of the target: no file but the last of a day is small."""
    with settings(db, target_file_size="1MB", min_file_events="1000"):
        make(db, "acme", "bulky")
        for part in range(4):
            db.admin.execute(
                "INSERT INTO acme.bulky (_time, _user, n) SELECT '2026-03-03T00:00:00Z'::timestamptz + i * '5 ms'::interval,"
                " md5(random()::text), i FROM generate_series(%s, %s) i",
                (part * 40_000, part * 40_000 + 39_999),
            )
            db.flush("acme", "bulky")
        compact(db, "acme", "bulky")
        found = files(db, "acme", "bulky")
        assert sum(n for _, n, *_ in found) == 160_000
        assert len(found) > 1
        assert sum(bytes_ < 1 << 19 for _, _, bytes_, *_ in found) <= 1
        assert compact(db, "acme", "bulky")["bulky"] == [0, 0, 0]
        assert db.one("SELECT count(*) FROM acme.bulky WHERE n = 77777") == 1


def test_rights_and_names(db, lake):
    writer = db.login("acme", "write")
    with refused("42501"):
        writer.execute("SELECT rakam.compact('acme')")
    with refused("42501"):
        db.login("acme", "read").execute("SELECT rakam.compact('acme', 'page')")
    with refused("42501"):
        db.admin.execute("SELECT rakam.compact('nobody')")
    with refused("42704"):
        db.admin.execute("SELECT rakam.compact('acme', 'nothing')")
    # One who administers one project compacts that one alone.
    own = db.login("acme", "admin").execute("SELECT collection FROM rakam.compact()").fetchall()
    assert {name for (name,) in own} == {
        name for (name,) in db.all("SELECT collection FROM rakam.collections WHERE project = 'acme'")
    }
    assert db.one("SELECT count(*) FROM rakam.audit_log WHERE call = 'compact' AND outcome = 'ok'") > 0


def test_cancelled(db, lake):
    for number in range(3):
        send(db, "lakeside", "cut", range(number * 10, number * 10 + 10))
        db.flush("lakeside", "cut")
    session = db.connect()
    db.admin.execute(f"ALTER DATABASE \"{db.name}\" SET rakam.failpoint = 'compact.after_intent=sleep(60000)'")
    try:
        session.execute("SET statement_timeout = '500ms'")
        with refused("57014"):
            session.execute("SELECT rakam.compact('lakeside', 'cut')")
    finally:
        db.admin.execute(f'ALTER DATABASE "{db.name}" RESET rakam.failpoint')
    assert numbers(db.admin, "lakeside.cut") == list(range(30))
    assert compact(db, "lakeside", "cut")["cut"][:2] == [30, 1]
    wait_until(lambda: (db.tick(), db.one("SELECT count(*) FROM rakam_internal.file_intent") == 0)[1], "no intents")
    assert numbers(db.admin, "lakeside.cut") == list(range(30))


def test_crashes(private_cluster):
    """A worker killed at each point: the same rows, and nothing is left behind."""
    cluster: Cluster = private_cluster("compact", {"rakam.file_retention": "0"})
    db = Database(cluster, "crash").create()
    folder = Path(cluster.make_folder("crash-lake"))
    db.admin.execute(f"CREATE SERVER crash_lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.project("acme")
    db.project("lakeside", "crash_lake")
    points = ["compact.after_intent", "compact.after_upload", "compact.before_commit"]
    cases = [(point, project) for point in points for project in ("acme", "lakeside")]
    for number, (point, project) in enumerate(cases):
        collection = f"c{number}"
        for part in range(3):
            send(db, project, collection, range(part * 20, part * 20 + 20))
            db.flush(project, collection)
        db.admin.execute(f"ALTER DATABASE crash SET rakam.failpoint = '{point}=exit'")
        with pytest.raises(psycopg.OperationalError):
            compact(db, project, collection)
        cluster.wait_ready()
        db.close()
        wait_until(lambda: alive(db), "the database")
        db.admin.execute("ALTER DATABASE crash RESET rakam.failpoint")
        assert numbers(db.admin, f"{project}.{collection}") == list(range(60)), point
        assert compact(db, project, collection)[collection][:2] == [60, 1], point
        assert numbers(db.admin, f"{project}.{collection}") == list(range(60)), point
        assert db.tiers(project, collection) == {"inbox": 0, "hot": 0, "cold": 60}
    manifest = {
        p.removeprefix("file://") for (p,) in db.all("SELECT path FROM rakam.data_files WHERE project = 'lakeside'")
    }
    wait_until(
        lambda: (db.tick(), {str(p) for p in folder.rglob("*.parquet")} == manifest)[1], "only the manifest's objects"
    )


def alive(db: Database) -> bool:
    try:
        return db.one("SELECT 1") == 1
    except psycopg.OperationalError:
        return False


def test_the_background_keeps_the_bound(db, lake):
    """Small flushes of several tenants in a day, without any call: no day has too many small files."""
    for tenant in range(TENANTS):
        db.project(f"busy{tenant}", "compact_lake")
        make(db, f"busy{tenant}", "page")
    for number in range(FLUSHES):
        for tenant in range(TENANTS):
            events = [("page", {"n": number * 5 + n, "_time": "2026-06-06T10:00:00Z"}) for n in range(5)]
            assert collect_batch(db.admin, f"busy{tenant}", events)[0] == 5
        db.flush(None, "page")
    for tenant in range(TENANTS):
        name = f"busy{tenant}"
        wait_until(lambda name=name: db.one(COVERING, HALF_TARGET, name) <= MOST, f"few files of {name}", 60)
        assert numbers(db.admin, f"{name}.page") == list(range(FLUSHES * 5))


def test_three_years_of_a_small_tenant(db, lake):
    """100 events a day over three years: no more than 40 files, and so few bytes."""
    days = 3 * 365
    names = [f"small{tenant}" for tenant in range(YEARS_TENANTS)]
    for name in names:
        db.project(name, "compact_lake")
        make(db, name, "page")
        for field, kind in (("page", "text"), ("took", "float8")):
            db.admin.execute("SELECT rakam.add_field(%s, 'page', %s, %s)", (name, field, kind))

    def fill(name: str) -> tuple[str, int, int]:
        with db.cluster.connect(db.name) as session:
            for part in range(YEARS_FLUSHES):
                first, end = part * days // YEARS_FLUSHES, (part + 1) * days // YEARS_FLUSHES
                session.execute(
                    # Nothing that a pattern of numbers would make small.
                    f"INSERT INTO {name}.page (_time, _user, n, page, took)"
                    " SELECT '2023-01-01T00:00:00Z'::timestamptz + (i / 100 + random()) * '1 day'::interval,"
                    " 'u' || (random() * random() * 5000)::int, i, '/page/' || (random() * random() * 300)::int,"
                    " random() * 100 FROM generate_series(%s::int, %s::int) i",
                    (first * 100, end * 100 - 1),
                )
                session.execute("SELECT * FROM rakam.flush(%s, 'page')", (name,))
            session.execute("SELECT * FROM rakam.compact(%s)", (name,))
            count, size = session.execute(
                "SELECT count(*), sum(bytes)::bigint FROM rakam.data_files WHERE project = %s", (name,)
            ).fetchone()
            assert count <= 40
            assert one(session, COVERING, HALF_TARGET, name) <= MOST
            found = session.execute(f"SELECT count(*), sum(n) FROM {name}.page").fetchone()
            assert found == (days * 100, sum(range(days * 100)))
        return name, count, size

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(fill, names))
    files, sizes = [count for _, count, _ in done], [size for _, _, size in done]
    print(
        f"{len(done)} tenants, {days * 100:,} events each: {min(files)} to {max(files)} files, {min(sizes):,} to"
        f" {max(sizes):,} bytes, {sum(sizes) / len(done) / days / 100:.2f} bytes an event"
    )


def test_random_steps_against_a_heap_table(db, lake, seed):
    """Any order of flush, compaction, retention and deletion: the collection answers as a heap table does that loses what
    they take."""
    rng = random.Random(seed)
    make(db, "lakeside", "twin")
    db.tick()
    db.admin.execute("CREATE TABLE twin (n bigint, _time timestamptz)")
    keep = None
    sent = 0

    def add() -> None:
        nonlocal sent
        # At noon of a day before today: no horizon of whole days falls upon them.
        days = [rng.randrange(1, 500) for _ in range(rng.randrange(1, 60))]
        rows = db.all(
            "SELECT (date_trunc('hour', now()) - d * '1 day'::interval - '12 hours'::interval)::text FROM unnest(%s::int[]) d",
            days,
        )
        events = [("twin", {"n": sent + i, "_time": at}) for i, (at,) in enumerate(rows)]
        assert collect_batch(db.admin, "lakeside", events)[0] == len(events)
        for i, (at,) in enumerate(rows):
            db.admin.execute("INSERT INTO twin VALUES (%s, %s)", (sent + i, at))
        sent += len(rows)

    def retain() -> None:
        nonlocal keep
        keep = rng.choice([None, 30, 100, 200, 400])
        value = None if keep is None else f"{keep} days"
        db.admin.execute("SELECT rakam.set_retention('lakeside', 'twin', %s::interval)", (value,))

    def remove() -> None:
        digit = rng.randrange(10)
        condition = f"n % 10 = {digit} AND n % 3 = 0"
        found = db.admin.execute(f"DELETE FROM twin WHERE {condition}").rowcount
        assert delete(db.admin, "lakeside", "twin", condition) == found

    steps = {
        "add": add,
        "flush": lambda: db.flush("lakeside", "twin"),
        "tick": db.tick,
        "compact": lambda: compact(db, "lakeside", "twin"),
        "retain": retain,
        "remove": remove,
    }
    names, weights = list(steps), [8, 6, 2, 3, 2, 1]
    done = []
    for _ in range(ROUNDS):
        name = rng.choices(names, weights)[0]
        done.append(name)
        steps[name]()
        if keep is not None:
            db.admin.execute("DELETE FROM twin WHERE _time < now() - %s * '1 day'::interval", (keep,))
        for query in ("SELECT n::int8, _time FROM {} ORDER BY n", "SELECT count(*) FROM {} WHERE n > 50"):
            assert db.all(query.format("lakeside.twin")) == db.all(query.format("twin")), f"seed {seed}: {done}, {keep}"
        assert db.one("SELECT count(*) FROM lakeside._all WHERE _collection = 'twin'") == db.one(
            "SELECT count(*) FROM twin"
        )
    print(f"seed {seed}: {done}; {sent} events, {db.one('SELECT count(*) FROM twin')} left")


def test_a_merge_reads_its_own_files_only(db, lake):
    """However many files a collection has: a merge that looked at all of them would make compaction quadratic."""
    days, flushes = 30, 4
    db.project("days")
    # A table that is so small would be read from one end to the other each time.
    db.admin.execute(f"ALTER DATABASE {db.name} SET enable_seqscan = off")
    with settings(db, min_file_events="1"):
        for number in range(flushes):
            batch = [("page", {"n": day, "_time": f"2026-01-{day + 1:02}T{number:02}:00:00Z"}) for day in range(days)]
            assert collect_batch(db.admin, "days", batch)[1] == 0
            db.flush("days")
        assert len(files(db, "days", "page")) == days * flushes
        read = """SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_all_tables
                  WHERE relid = 'rakam_internal.data_file'::regclass"""
        before = db.one(read)
        assert compact(db, "days", "page")["page"][:2] == [days * flushes, days]
        # A worker tells what it has read when it ends, which may be a moment after its answer.
        wait_until(
            lambda: db.one("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'rakam task'") == 0, "its end"
        )
        assert db.one(read) - before < 20 * days * flushes
    db.admin.execute(f"ALTER DATABASE {db.name} RESET enable_seqscan")
    db.admin.execute("SET rakam.allow_project_drop = on; SELECT rakam.drop_project('days')")
