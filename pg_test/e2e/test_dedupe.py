"""De-duplication: the same `_id` counts once, at every instant, whatever path its copies took (SPEC: collect).

RAKAM_DEDUPE_IDS loads so many ids and states what each costs; without it a small load checks that the numbers are flat.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import time
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from harness.database import Database, collect, collect_batch, one, refused, wait_until

PROJECT = "acme"
IDS = int(os.environ.get("RAKAM_DEDUPE_IDS", "0"))


@pytest.fixture(scope="module")
def project(db):
    db.project(PROJECT)
    db.project("other")
    return PROJECT


@pytest.fixture
def table(db, project, request):
    """A collection of its own for each test, its table and columns already there."""
    name = request.node.name.split("[")[0].removeprefix("test_")[:50]
    db.admin.execute("SELECT rakam.create_collection(%s, %s)", (PROJECT, name))
    db.admin.execute("SELECT rakam.add_field(%s, %s, 'n', 'double precision')", (PROJECT, name))
    wait_until(lambda: db.one(f"SELECT to_regclass('{PROJECT}.{name}') IS NOT NULL"), "the table")
    db.tick()
    return name


def copies(connection: psycopg.Connection, table: str) -> dict[str, int]:
    """How often each id counts; the aggregate of the whole, of one column and through _all must agree."""
    by_id = dict(connection.execute(f"SELECT _id, count(*) FROM acme.{table} GROUP BY 1").fetchall())
    return by_id


def duplicates(db: Database, table: str) -> int:
    return db.one("SELECT duplicates FROM rakam.stat_collection WHERE project = %s AND collection = %s", PROJECT, table)


def by_collect(connection: psycopg.Connection, table: str, ids: list[str], n: int) -> None:
    for id_ in ids:
        collect(connection, PROJECT, table, {"_id": id_, "n": n})


def by_batch(connection: psycopg.Connection, table: str, ids: list[str], n: int) -> None:
    stored, *_ = collect_batch(connection, PROJECT, [(table, {"_id": id_, "n": n}) for id_ in ids])
    assert stored == len(ids)


def by_jsonb(connection: psycopg.Connection, table: str, ids: list[str], n: int) -> None:
    events = json.dumps([{"collection": table, "properties": {"_id": id_, "n": n}} for id_ in ids])
    connection.execute("SELECT rakam.collect_batch(%s, %s::jsonb)", (PROJECT, events))


def by_insert(connection: psycopg.Connection, table: str, ids: list[str], n: int) -> None:
    connection.execute(f"INSERT INTO acme.{table} (_id, n) SELECT unnest(%s::text[]), %s", (ids, n))


def by_copy(connection: psycopg.Connection, table: str, ids: list[str], n: int) -> None:
    with connection.cursor().copy(f"COPY acme.{table} (_id, n) FROM STDIN") as copy:
        for id_ in ids:
            copy.write_row((id_, n))


PATHS = {"collect": by_collect, "batch": by_batch, "jsonb": by_jsonb, "insert": by_insert, "copy": by_copy}
PLACES = ("tail", "chunk", "file")


@pytest.mark.parametrize("place", PLACES)
def test_every_pair_of_paths(db, project, table, place):
    """The first copy by one path into one tier, the second by another path: one at once, and one after the digest."""
    pairs = list(itertools.product(PATHS, PATHS))
    ids = {pair: [f"{place}-{'-'.join(pair)}-{k}" for k in range(3)] for pair in pairs}
    before = duplicates(db, table)
    for pair in pairs:
        PATHS[pair[0]](db.admin, table, ids[pair], 1)
    if place == "chunk":
        db.tick()
    elif place == "file":
        db.flush(PROJECT, table)
    once = {id_: 1 for group in ids.values() for id_ in group}
    assert copies(db.admin, table).items() >= once.items()
    for pair in pairs:
        PATHS[pair[1]](db.admin, table, ids[pair], 2)
        # A copy within one call, too.
        PATHS[pair[1]](db.admin, table, [ids[pair][0], ids[pair][0]], 3)
    for stage in ("at once", "digested", "flushed"):
        found = copies(db.admin, table)
        assert {id_: found.get(id_) for id_ in once} == once, f"{place}, {stage}"
        own = f"FROM acme.{table} WHERE _id LIKE '{place}-%'"
        assert db.one(f"SELECT count(*) {own}") == len(once), stage
        assert db.one(f"SELECT count(n) {own} AND n = 1") == len(once), f"{stage}: another than the first copy"
        assert db.one(
            "SELECT count(*) FROM acme._all WHERE _collection = %s AND _id LIKE %s", table, f"{place}-%"
        ) == len(once)
        if stage == "at once":
            db.tick()
        elif stage == "digested":
            db.flush(PROJECT, table)
    assert duplicates(db, table) - before == len(pairs) * 5


def test_no_column_of_the_query_needs_to_be_the_id(db, project, table):
    for n in (1, 1, 2):
        collect(db.admin, PROJECT, table, {"_id": "same", "n": n})
    collect(db.admin, PROJECT, table, {"n": 7})
    collect(db.admin, PROJECT, table, {"n": 7})
    session = db.connect()
    for _ in range(2):
        assert one(session, f"SELECT count(*) FROM acme.{table}") == 3
        assert one(session, f"SELECT sum(n) FROM acme.{table}") == 15
        assert one(session, f"SELECT count(*) FROM acme.{table} WHERE n > 0") == 3
        assert one(session, f"SELECT count(*) FROM (SELECT FROM acme.{table} LIMIT 5) x") == 3
        assert session.execute(f"SELECT _id, n FROM acme.{table} ORDER BY n").fetchall() == [
            ("same", 1), (None, 7), (None, 7)]  # fmt: skip
        assert one(session, "SELECT count(*) FROM acme._all WHERE _collection = %s", table) == 3
        db.tick()


def test_a_filter_sees_the_copy_that_counts(db, project, table):
    """Which copy counts does not depend on the query: a filter never brings another one up."""
    collect(db.admin, PROJECT, table, {"_id": "x", "n": 1})
    collect(db.admin, PROJECT, table, {"_id": "x", "n": 2})
    for _ in range(2):
        assert one(db.admin, f"SELECT count(*) FROM acme.{table} WHERE n = 2") == 0
        assert one(db.admin, f"SELECT count(*) FROM acme.{table} WHERE n = 1 AND _id = 'x'") == 1
        db.tick()


def test_ids_are_compared_as_text_by_value(db, project, table):
    for value in ("1", '"1"', "1.0", "1e0", "10e-1"):
        collect(db.admin, PROJECT, table, f'{{"_id": {value}}}')
    by_insert(db.admin, table, ["1"], 1)
    for value in ('"1.0"', '"01"', '" 1"', '"A"', '"a"', '""', "true", '"\\u00e9"', '"e\\u0301"'):
        collect(db.admin, PROJECT, table, f'{{"_id": {value}}}')
    for value in ("null", "null"):
        collect(db.admin, PROJECT, table, f'{{"_id": {value}, "n": 0}}')
    expected = sorted(["1", "1.0", "01", " 1", "A", "a", "", "true", "\u00e9", "e\u0301"])
    for _ in range(2):
        assert sorted(id_ for id_ in copies(db.admin, table) if id_ is not None) == expected
        assert copies(db.admin, table)[None] == 2
        assert one(db.admin, f"SELECT count(*) FROM acme.{table}") == len(expected) + 2
        db.tick()
    collect(db.admin, PROJECT, table, {"_id": "x" * 256})
    for path in (by_collect, by_insert, by_copy):
        with refused("54000", hint="shorter"):
            path(db.admin, table, ["x" * 257], 1)
    with refused("54000"):
        collect(db.admin, PROJECT, table, f'{{"_id": {"1" * 260}}}')
    rejected = collect_batch(db.admin, PROJECT, [(table, {"_id": "x" * 257}), (table, {"_id": "y"})])
    assert (rejected[0], rejected[1], rejected[2]) == (1, 1, [0])


def test_collections_and_projects_have_ids_of_their_own(db, project, table):
    db.admin.execute("SELECT rakam.create_collection('acme', 'elsewhere')")
    db.admin.execute("SELECT rakam.create_collection('other', %s)", (table,))
    db.tick()
    for _ in range(2):
        for where in ((PROJECT, table), (PROJECT, "elsewhere"), ("other", table)):
            collect(db.admin, *where, {"_id": "shared"})
            assert one(db.admin, f"SELECT count(*) FROM {where[0]}.{where[1]}") == 1
        db.tick()
    assert one(db.admin, "SELECT count(*) FROM acme._all WHERE _id = 'shared'") == 2


def test_a_collection_that_is_not_registered_yet(db, project):
    """Copies that know their collection by name only, then by its id."""
    session = db.connect(autocommit=False)
    for _ in range(3):
        collect(session, PROJECT, "unheard_of", {"_id": "first"})
    assert one(session, "SELECT count(*) FROM acme._all WHERE _collection = 'unheard_of'") == 1
    session.commit()
    db.tick()
    collect(db.admin, PROJECT, "unheard_of", {"_id": "first"})
    assert one(db.admin, "SELECT count(*) FROM acme.unheard_of") == 1
    db.tick()
    assert one(db.admin, "SELECT count(*) FROM acme.unheard_of") == 1
    assert duplicates(db, "unheard_of") == 3


# -- transactions --------------------------------------------------------------------------------------------------------


def test_a_rolled_back_copy_never_counts(db, project, table):
    session = db.connect(autocommit=False)
    collect(session, PROJECT, table, {"_id": "a", "n": 1})
    session.rollback()
    collect(session, PROJECT, table, {"_id": "b", "n": 1})
    session.execute("SAVEPOINT s")
    collect(session, PROJECT, table, {"_id": "a", "n": 2})
    collect(session, PROJECT, table, {"_id": "b", "n": 2})
    assert copies(session, table) == {"a": 1, "b": 1}
    session.execute("ROLLBACK TO s")
    assert copies(session, table) == {"b": 1}
    collect(session, PROJECT, table, {"_id": "a", "n": 3})
    session.commit()
    for _ in range(2):
        found = db.all(f"SELECT _id, n FROM acme.{table} ORDER BY 1")
        assert found == [("a", 3), ("b", 1)]
        db.tick()
    assert duplicates(db, table) == 0


def test_nobody_waits_and_the_late_copy_is_dropped(db, project, table):
    """Two open transactions with the same id: each sees its own, neither waits; the one digested first stays."""
    first, second = db.connect(autocommit=False), db.connect(autocommit=False)
    for session in (first, second):
        # Far more than anything takes that waits for nobody; the other transaction would be waited for until the end.
        session.execute("SET statement_timeout = '60s'")
        session.execute("SET lock_timeout = '10s'")
    collect(first, PROJECT, table, {"_id": "x", "n": 1})
    collect(second, PROJECT, table, {"_id": "x", "n": 2})
    assert copies(first, table) == copies(second, table) == {"x": 1}
    second.commit()
    db.tick()
    assert db.all(f"SELECT _id, n FROM acme.{table}") == [("x", 2)]
    # Committed by now, and known by its run: the open transaction's own copy does not count beside it.
    assert copies(first, table) == {"x": 1}
    first.commit()
    for _ in range(2):
        assert db.all(f"SELECT _id, n FROM acme.{table}") == [("x", 2)]
        db.tick()
    assert duplicates(db, table) == 1


def test_the_copy_that_is_shown_stays(db, project, table):
    """The tail is read in the order of the digest: by transaction, whoever inserted or committed first."""
    # A digest between the two commits would meet the younger one first.
    db.configure(digest_max_age="1h", digest_events=2_000_000_000)
    try:
        db.tick()
        for k in range(10):
            id_ = f"x{k}"
            older, younger = (db.cluster.connect(db.name, autocommit=False) for _ in range(2))
            with older, younger:
                older.execute("SELECT pg_current_xact_id()")
                collect(younger, PROJECT, table, {"_id": id_, "n": 2})
                collect(older, PROJECT, table, {"_id": id_, "n": 1})
                younger.commit()
                older.commit()
        for _ in range(2):
            assert dict(db.all(f"SELECT _id, n FROM acme.{table}")) == {f"x{k}": 1 for k in range(10)}
            db.tick()
    finally:
        db.configure(digest_max_age=None, digest_events=None)
    assert duplicates(db, table) == 10


def test_prepared_transactions(db, project, table):
    session = db.connect(autocommit=False)
    collect(session, PROJECT, table, {"_id": "kept", "n": 1})
    collect(session, PROJECT, table, {"_id": "lost", "n": 1})
    session.execute("PREPARE TRANSACTION 'dedupe_1'")
    collect(db.admin, PROJECT, table, {"_id": "kept", "n": 2})
    assert db.all(f"SELECT _id, n FROM acme.{table}") == [("kept", 2)]
    db.tick()
    assert db.all(f"SELECT _id, n FROM acme.{table}") == [("kept", 2)]
    db.admin.execute("COMMIT PREPARED 'dedupe_1'")
    for _ in range(2):
        assert db.all(f"SELECT _id, n FROM acme.{table} ORDER BY 1") == [("kept", 2), ("lost", 1)]
        db.tick()


def test_a_repeatable_snapshot_counts_as_before(db, project, table):
    """A reader whose snapshot is older than the digest, and than merges of runs after it."""
    by_batch(db.admin, table, [f"r{k}" for k in range(50)], 1)
    by_batch(db.admin, table, [f"r{k}" for k in range(25, 75)], 2)
    session = db.connect(autocommit=False)
    session.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    query = f"SELECT count(*), count(DISTINCT _id), sum(n) FROM acme.{table}"
    first = session.execute(query).fetchone()
    assert first == (75, 75, 100)
    for k in range(12):
        by_batch(db.admin, table, [f"r{k}", f"s{k}"], 3)
        db.tick()
        assert session.execute(query).fetchone() == first
    session.commit()
    assert session.execute(query).fetchone() == (87, 87, 136)
    crowded = "SELECT max(n) FROM (SELECT count(*) AS n FROM rakam_internal.id_run GROUP BY project_id, bucket_from, hash_from, depth, level) x"
    assert db.one(crowded) < 8


# -- races and crashes ---------------------------------------------------------------------------------------------------


class Racer(threading.Thread):
    """Sends the ids in its own order, by a path of its own choice each time; some transactions are rolled back."""

    def __init__(self, db: Database, table: str, ids: list[str], seed: int):
        super().__init__(daemon=True)
        self.db, self.table = db, table
        self.rng = random.Random(seed)
        self.ids = self.rng.sample(ids, len(ids))
        self.committed: set[str] = set()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with self.db.cluster.connect(self.db.name, autocommit=False) as session:
                while self.ids:
                    take = self.rng.choice([1, 1, 2, 10])
                    group, self.ids = self.ids[:take], self.ids[take:]
                    self.rng.choice(list(PATHS.values()))(session, self.table, group, 1)
                    if self.rng.random() < 0.15:
                        session.rollback()
                        self.ids += group
                    else:
                        session.commit()
                        self.committed |= set(group)
        except Exception as error:  # noqa: BLE001 - handed to the test
            self.error = error


def test_sixteen_sessions_race_before_a_reader(db, project, table, seed):
    """Never more than one of an id, never fewer than one once it is committed, while digests and flushes go on."""
    ids = [f"race-{k}" for k in range(150)]
    racers = [Racer(db, table, ids, seed + number) for number in range(16)]
    for racer in racers:
        racer.start()
    moves = itertools.cycle([db.tick, db.tick, lambda: db.flush(PROJECT, table)])
    reader, reads, next_move = db.connect(), 0, 0.0
    while any(racer.is_alive() for racer in racers) or reads < 20:
        committed = set().union(*(set(racer.committed) for racer in racers))
        found = copies(reader, table)
        doubled = {id_: n for id_, n in found.items() if n != 1}
        assert not doubled, f"read {reads}: {doubled}"
        missing = committed - set(found)
        assert not missing, f"read {reads}: missing {missing}"
        total = one(reader, f"SELECT count(*) FROM acme.{table}")
        assert len(found) <= total <= len(ids), f"read {reads}"
        reads += 1
        if time.monotonic() > next_move:
            next(moves)()
            next_move = time.monotonic() + 0.3
    for racer in racers:
        racer.join(timeout=60)
        assert racer.error is None, racer.error
    db.tick()
    assert copies(reader, table) == dict.fromkeys(ids, 1)
    assert duplicates(db, table) == 15 * len(ids)


def test_a_killed_worker_repeats_its_work(private_cluster):
    """kill -9 of the worker in the middle of a merge and of digests, then of the postmaster."""
    # No digest but by tick: the resident must not meet the failpoint by itself.
    settings = {"rakam.digest_max_age": "1h", "rakam.digest_events": "2000000000"}
    cluster = private_cluster("dedupe", settings)
    db = Database(cluster, "dedupe").create()
    db.project(PROJECT)
    db.admin.execute("SELECT rakam.create_collection('acme', 'crashed')")
    expected: set[str] = set()

    def send(round_: int) -> None:
        ids = [f"{round_}-{k}" for k in range(20)]
        by_batch(db.admin, "crashed", ids + ids[:5] + sorted(expected)[:5], round_)
        expected.update(ids)

    def is_right(connection: psycopg.Connection) -> bool:
        return copies(connection, "crashed") == dict.fromkeys(expected, 1)

    for round_ in range(7):
        send(round_)
        db.tick()
    # The next digest leaves the eighth run: a merge.
    for round_, point in enumerate(("ids.before_commit", "digest.before_tick", "digest.before_commit"), 7):
        send(round_)
        assert is_right(db.admin), point
        mark = cluster.log_mark()
        db.configure(failpoint=f"{point}=exit")
        with pytest.raises(psycopg.Error):
            db.tick()
        wait_until(lambda m=mark: "was terminated by signal 9" in cluster.log_since(m), "the kill")
        db.close()
        if point != "ids.before_commit":
            cluster.wait_ready()
            assert is_right(db.admin), point
            db.close()
        # Else the resident merges by itself, and the server goes down as often as it comes up.
        cluster.kill9_postmaster()
        (cluster.data / "postgresql.auto.conf").write_text("")
        cluster.start(settings)
        assert is_right(db.admin), point
        db.tick()
        assert is_right(db.admin), point
    by_batch(db.admin, "crashed", sorted(expected), 99)
    assert is_right(db.admin)
    db.tick()
    assert is_right(db.admin)
    db.flush(PROJECT)
    assert is_right(db.admin)
    assert db.one("SELECT count(*) FROM acme.crashed WHERE n = 99") == 0
    db.close()


def test_replays_of_whole_batches(db, project, table):
    """A producer that retries everything, several times, out of order, some of it while it is being digested."""
    batches = [[f"{b}-{k}" for k in range(700)] for b in range(4)]
    for number, batch in enumerate(batches):
        by_batch(db.admin, table, batch, number)
        if number % 2:
            db.tick()
    for batch in [*batches, *reversed(batches), batches[2]]:
        by_batch(db.admin, table, batch, 99)
        assert db.one(f"SELECT count(*) FROM acme.{table}") == 2_800
        if batch is batches[0]:
            db.tick()
    db.flush(PROJECT, table)
    assert db.one(f"SELECT count(*), count(DISTINCT _id) FROM acme.{table}") == 2_800
    assert db.one(f"SELECT count(*) FROM acme.{table} WHERE n = 99") == 0
    assert duplicates(db, table) == 9 * 700


def test_a_deleted_event_does_not_come_back(db, project, table):
    for id_ in ("gone", "kept"):
        collect(db.admin, PROJECT, table, {"_id": id_, "n": 1})
    assert db.one("SELECT rakam.delete_events('acme', %s, $$_id = 'gone'$$)", table) == 1
    by_batch(db.admin, table, ["gone", "kept"], 2)
    for _ in range(2):
        assert db.all(f"SELECT _id, n FROM acme.{table}") == [("kept", 1)]
        db.tick()


# -- the window ----------------------------------------------------------------------------------------------------------


def insert_at(db: Database, table: str, id_: str, at: datetime, n: int = 1) -> None:
    db.admin.execute(f"INSERT INTO acme.{table} (_id, n, _received_at) VALUES (%s, %s, %s)", (id_, n, at))


@pytest.mark.parametrize("digested", [False, True])
def test_the_edge_of_the_window_is_exact(db, project, table, digested):
    """Received a window apart is a copy, a microsecond more is not; in both directions of time."""
    now = datetime.now(UTC) - timedelta(hours=1)
    window, tick = timedelta(days=7), timedelta(microseconds=1)
    cases = {
        "edge": (window, 1),
        "past": (window + tick, 2),
        "before": (-window, 1),
        "long_before": (-window - tick, 2),
    }
    ids = {name: f"{name}-{digested}" for name in cases}
    for name in cases:
        insert_at(db, table, ids[name], now - timedelta(days=3))
    if digested:
        db.tick()
    for name, (distance, _) in cases.items():
        insert_at(db, table, ids[name], now - timedelta(days=3) + distance, 2)
    for _ in range(2):
        found = copies(db.admin, table)
        assert {name: found[ids[name]] for name in cases} == {name: n for name, (_, n) in cases.items()}
        db.tick()


def test_the_window_slides_with_the_kept_copy(db, project, table):
    """A copy that was dropped does not prolong the window: it is counted from the event that was kept."""
    start = datetime.now(UTC) - timedelta(days=30)
    for day, kept in ((0, 1), (5, 1), (8, 2), (10, 2), (15, 2), (16, 3)):
        insert_at(db, table, "x", start + timedelta(days=day), day)
        assert copies(db.admin, table) == {"x": kept}, day
        if day in (5, 10):
            db.tick()
            assert copies(db.admin, table) == {"x": kept}, day
    db.tick()
    assert [n for (n,) in db.all(f"SELECT n FROM acme.{table} ORDER BY 1")] == [0, 8, 16]


RUNS = "SELECT coalesce(sum(n), 0)::int FROM rakam_internal.id_run"


def test_ids_expire(private_cluster):
    """With a small window: ids are forgotten once no event can be a copy of theirs, and not before."""
    cluster = private_cluster("window", {"rakam.dedupe_window": "3s", "rakam.rotation_interval": "1s"})
    db = Database(cluster, "window").create()
    db.project(PROJECT)
    db.admin.execute("SELECT rakam.create_collection('acme', 'short')")
    db.tick()
    late = db.connect(autocommit=False)
    first, began = db.one("SELECT clock_timestamp()"), time.monotonic()
    # All received within a second, however long it takes to send them.
    again = "INSERT INTO acme.short (_id, _received_at) VALUES ('x', %s)"
    db.admin.execute(again, (first,))
    late.execute(again, (first + timedelta(seconds=1),))
    db.tick()
    db.admin.execute(again, (first + timedelta(milliseconds=500),))
    assert copies(db.admin, "short") == {"x": 1}
    # A transaction still has a copy: its id must not be forgotten, however long that takes.
    time.sleep(max(0.0, began + 5 - time.monotonic()))
    db.tick()
    assert db.one(RUNS) > 0
    late.commit()
    assert copies(db.admin, "short") == {"x": 1}
    db.tick()
    assert copies(db.admin, "short") == {"x": 1}
    collect(db.admin, PROJECT, "short", {"_id": "x"})
    assert copies(db.admin, "short") == {"x": 2}
    db.tick()
    assert copies(db.admin, "short") == {"x": 2}
    wait_until(lambda: db.tick() or db.one(RUNS) == 0, "forgotten ids", pause_s=0.2)
    assert copies(db.admin, "short") == {"x": 2}
    # Off: all count, and nothing is remembered.
    db.close()
    cluster.restart({"rakam.dedupe_window": "0"})
    for _ in range(2):
        collect(db.admin, PROJECT, "short", {"_id": "y"})
    assert copies(db.admin, "short") == {"x": 2, "y": 2}
    db.tick()
    assert copies(db.admin, "short") == {"x": 2, "y": 2}
    assert db.one(RUNS) == 0
    db.close()


def test_an_old_receipt_keeps_no_ids(private_cluster):
    """A digested event of long ago, which lies in its inbox table until that is emptied, has nobody's ids kept."""
    cluster = private_cluster("old", {"rakam.dedupe_window": "2s", "rakam.rotation_interval": "1h"})
    db = Database(cluster, "old").create()
    for project in (PROJECT, "other"):
        db.project(project)
        db.admin.execute("SELECT rakam.create_collection(%s, 'short')", (project,))
    db.tick()
    db.admin.execute("INSERT INTO other.short (_id, _received_at) VALUES ('old', '2001-01-01')")
    collect(db.admin, PROJECT, "short", {"_id": "x"})
    db.tick()
    wait_until(lambda: db.tick() or db.one(RUNS) == 0, "forgotten ids", 30, 0.2)
    db.close()


def test_a_transaction_that_is_not_tracked_is_waited_for(private_cluster):
    """With track_activities off nobody knows when a transaction began: its copies are waited for all the same."""
    cluster = private_cluster("untracked", {"rakam.dedupe_window": "2s", "rakam.rotation_interval": "1s"})
    db = Database(cluster, "untracked").create()
    db.project(PROJECT)
    db.admin.execute("SELECT rakam.create_collection('acme', 'short')")
    db.tick()
    late = db.connect()
    late.execute("SET track_activities = off")
    late.execute("BEGIN")
    collect(late, PROJECT, "short", {"_id": "x"})
    collect(db.admin, PROJECT, "short", {"_id": "x"})
    db.tick()
    assert db.one(RUNS) > 0
    time.sleep(5)
    for _ in range(5):
        db.tick()
    assert db.one(RUNS) > 0
    late.execute("COMMIT")
    assert copies(db.admin, "short") == {"x": 1}
    db.tick()
    assert copies(db.admin, "short") == {"x": 1}
    db.close()


def test_receipts_spread_over_years(db, project, table):
    """Each bucket of time has a run of its own; they are stored together and all are known afterwards."""
    insert = (
        f"INSERT INTO acme.{table} (_id, _received_at)"
        " SELECT n::text, now() - n * interval '44 hours' FROM generate_series(1, 3000) n"
    )
    db.admin.execute(insert)
    db.tick()
    db.admin.execute(insert)
    db.tick()
    assert db.one(f"SELECT count(*) FROM acme.{table}") == 3000
    assert duplicates(db, table) == 3000


# -- what is remembered --------------------------------------------------------------------------------------------------


def test_runs_are_invisible_to_others(db, project, table):
    collect(db.admin, PROJECT, table, {"_id": "secret"})
    db.tick()
    mine = db.login(PROJECT, "read")
    other = db.login("other", "read", "write", "admin")
    writer = db.login(PROJECT, "write")
    acme = db.one("SELECT project_id FROM rakam_internal.project WHERE name = 'acme'")
    count = f"SELECT count(*) FROM rakam_internal.id_run WHERE project_id = {acme}"
    assert db.one(count) > 0
    assert one(mine, count) > 0
    for session in (other, writer):
        assert one(session, count) == 0
        with refused("42501"):
            session.execute("DELETE FROM rakam_internal.id_run")
        with refused("42501"):
            session.execute("INSERT INTO rakam_internal.id_run SELECT * FROM rakam_internal.id_run")
    # As a reader of the project, and through a view of its owner: the tail is compared as the effective user.
    collect(db.admin, PROJECT, table, {"_id": "secret"})
    assert one(mine, f"SELECT count(*) FROM acme.{table}") == 1
    db.admin.execute(f"CREATE OR REPLACE VIEW public.dedupe_view AS SELECT * FROM acme.{table}")
    db.admin.execute("GRANT SELECT ON public.dedupe_view TO PUBLIC")
    assert one(other, "SELECT count(*) FROM public.dedupe_view") == 1


def load(db: Database, table: str, first: int, n: int) -> None:
    db.admin.execute(
        f"INSERT INTO acme.{table} (_id) SELECT 'id-' || k FROM generate_series(%s::int8, %s) k", (first, first + n - 1)
    )


def run_sizes(db: Database) -> tuple[int, int, int]:
    """Rows, ids and bytes of what is remembered."""
    return db.admin.execute(
        "SELECT count(*), coalesce(sum(n), 0)::int8, coalesce(sum(octet_length(ids) + coalesce(octet_length(filter), 0)), 0)::int8"
        " FROM rakam_internal.id_run"
    ).fetchone()


def test_many_ids(private_cluster):
    """Runs merge, split by hash, and are looked up by slices, from the cache and whole: all with the same answer."""
    # The smallest cache: most look-ups have to read.
    cluster = private_cluster(
        "many", {"rakam.dedupe_memory": "1MB", "rakam.digest_max_age": "1h", "rakam.digest_events": "2000000000"}
    )
    db = Database(cluster, "many").create()
    db.project(PROJECT)
    db.admin.execute("SELECT rakam.create_collection('acme', 'many')")
    db.tick()
    total = 0
    for _ in range(10):
        load(db, "many", total, 9_000)
        total += 9_000
        db.tick()
    rows, ids, size = run_sizes(db)
    assert ids == total
    assert rows < 40
    assert db.one("SELECT max(depth) FROM rakam_internal.id_run") > 0
    assert db.one("SELECT max(n) FROM rakam_internal.id_run") <= 74_000
    assert size / ids < 25
    # Few ids, spread over all runs: slices; and strangers.
    rng = random.Random(7)
    known = sorted({f"id-{rng.randrange(total)}" for _ in range(40)})
    by_batch(db.admin, "many", known + ["new-1", "new-2"], 1)
    assert db.one("SELECT count(*) FROM acme.many") == total + 2
    db.tick()
    assert db.one("SELECT count(*) FROM acme.many") == total + 2
    # Many: whole filters and runs.
    load(db, "many", 50_000, 30_000)
    assert db.one("SELECT count(*) FROM acme.many") == total + 2
    db.tick()
    assert db.one("SELECT count(*), count(DISTINCT _id) FROM acme.many") == total + 2
    assert duplicates(db, "many") == 30_000 + len(known)
    db.close()


# The heavy form: 50,000,000 ids take a quarter of an hour. test_many_ids is the slice for every run.
@pytest.mark.skipif(IDS == 0, reason="heavy: runs with RAKAM_DEDUPE_IDS, of which 50,000,000 take a quarter of an hour")
def test_the_cost_of_an_id_is_flat(private_cluster):
    """Loads RAKAM_DEDUPE_IDS ids and prints, step by step: bytes kept and WAL written per id, CPU of the worker per event.
    CPU of the last quarter must stay within one and a half times that of the second."""
    cluster = private_cluster("heavy", {"max_wal_size": "4GB", "rakam.flush_interval": "1d", "rakam.flush_size": "1GB"})
    db = Database(cluster, "heavy").create()
    db.project(PROJECT)
    db.admin.execute("SELECT rakam.create_collection('acme', 'heavy')")
    db.tick()
    pid = wait_until(db.worker_pid, "the worker")
    step, piece, costs, loaded = min(1_000_000, IDS // 8), 12_500, [], 0
    while loaded + step <= IDS:
        cpu, lsn = worker_cpu_seconds(pid), db.one("SELECT pg_current_wal_lsn()")
        for _ in range(step // piece):
            load(db, "heavy", loaded, piece)
            loaded += piece
            wait_until(lambda: db.tiers(PROJECT, "heavy")["inbox"] < 8 * piece, "the digest", 300, 0.1)
        wait_until(lambda: db.tiers(PROJECT, "heavy")["inbox"] == 0, "the digest", 300, 0.1)
        time.sleep(6)  # the next merge of ids belongs to this step
        costs.append((worker_cpu_seconds(pid) - cpu) / step * 1e6)
        wal = db.one("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), %s)", lsn)
        rows, ids, size = run_sizes(db)
        relation = db.one("SELECT pg_total_relation_size('rakam_internal.id_run')")
        print(f"{loaded / 1e6:.2f} M: {rows} runs, {ids} ids, {size / ids:.2f} B/id kept, {relation / ids:.1f} B/id on disk,"
              f" {int(wal) / step:.0f} B/event of WAL, {costs[-1]:.1f} us/event of the worker's CPU", flush=True)  # fmt: skip
        assert ids == loaded and size / ids < 25
    quarter = len(costs) // 4
    assert sum(costs[-quarter:]) < 1.5 * sum(costs[quarter : 2 * quarter]), costs
    db.close()


def worker_cpu_seconds(pid: int) -> float:
    """CPU time of a process, user and system."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
