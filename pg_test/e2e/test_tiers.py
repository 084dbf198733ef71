"""Moving events between the tiers changes no answer. A heap table that gets the same rows in the same transactions is the
oracle: one statement reads both, so it has one snapshot of both.

RAKAM_TIER_EVENTS (default 30,000) and RAKAM_TIER_READS (default 120) set the size; the full run is 450,000 and 1,000.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import time

import psycopg
import pytest
from harness import flights
from harness.database import collect, one, wait_until

EVENTS = int(os.environ.get("RAKAM_TIER_EVENTS", "30000"))
READS = int(os.environ.get("RAKAM_TIER_READS", "120"))
PROJECT = "acme"

# Differences between the collection and the oracle, by day, by user and in total: none at any snapshot.
DIFFERENCE = """
WITH ours AS MATERIALIZED (SELECT _time, _user, distance FROM acme.departure),
     theirs AS MATERIALIZED (SELECT _time, _user, distance FROM oracle),
     a AS (SELECT 'day ' || (_time AT TIME ZONE 'UTC')::date AS what, count(*) AS n, sum(distance) AS s FROM ours GROUP BY 1
           UNION ALL SELECT 'user ' || coalesce(_user, ''), count(*), sum(distance) FROM ours GROUP BY 1
           UNION ALL SELECT 'total', count(*), sum(distance) FROM ours),
     b AS (SELECT 'day ' || (_time AT TIME ZONE 'UTC')::date AS what, count(*) AS n, sum(distance) AS s FROM theirs GROUP BY 1
           UNION ALL SELECT 'user ' || coalesce(_user, ''), count(*), sum(distance) FROM theirs GROUP BY 1
           UNION ALL SELECT 'total', count(*), sum(distance) FROM theirs)
(SELECT 'only ours', * FROM (TABLE a EXCEPT ALL TABLE b) x) UNION ALL
(SELECT 'only oracle', * FROM (TABLE b EXCEPT ALL TABLE a) y)
LIMIT 10
"""


@pytest.fixture(scope="module")
def project(db):
    db.project(PROJECT)
    db.admin.execute("CREATE TABLE oracle (_time timestamptz, _user text, distance double precision)")
    db.admin.execute("SELECT rakam.create_collection('acme', 'departure')")
    db.admin.execute("SELECT rakam.add_field('acme', 'departure', 'distance', 'double precision')")
    db.tick()
    return PROJECT


def send(connection: psycopg.Connection, batch: list[dict]) -> None:
    """A batch into the collection and into the oracle, in one transaction."""
    text = json.dumps([{"collection": "departure", "properties": properties} for properties in batch])
    with connection.transaction():
        assert one(connection, "SELECT stored FROM rakam.collect_batch('acme', %s)", text) == len(batch)
        connection.execute(
            "INSERT INTO oracle SELECT (p->>'_time')::timestamptz, p->>'_user', (p->>'distance')::float8"
            " FROM jsonb_array_elements(%s::jsonb) e, LATERAL (SELECT e->'properties' AS p) q",
            (text,),
        )


class Loop(threading.Thread):
    """Calls a function with a session of its own until it is stopped; keeps the first error."""

    def __init__(self, db, call):
        super().__init__(daemon=True)
        self.db, self.call = db, call
        self.ended = threading.Event()
        self.error: Exception | None = None
        self.rounds = 0

    def run(self) -> None:
        try:
            with self.db.cluster.connect(self.db.name) as session:
                while not self.ended.is_set():
                    self.call(session)
                    self.rounds += 1
        except Exception as error:  # noqa: BLE001 - handed to the test
            self.error = error

    def stop(self) -> None:
        self.ended.set()
        self.join(timeout=120)
        assert not self.is_alive(), "the loop does not end"
        if self.error:
            raise self.error


def rotate(session: psycopg.Connection) -> None:
    session.execute("SELECT rakam.tick()")
    time.sleep(0.02)


def flush(session: psycopg.Connection) -> None:
    session.execute("SELECT * FROM rakam.flush('acme', 'departure')")
    time.sleep(0.3)


def test_answers_are_constant_while_the_tiers_move(db, project):
    source = flights.events(EVENTS)
    batches = iter(lambda: list(itertools.islice(source, 300)), [])
    lock = threading.Lock()

    def write(session: psycopg.Connection) -> None:
        with lock:
            batch = next(batches, None)
        if batch is None:
            time.sleep(0.05)
        else:
            send(session, batch)

    loops = [Loop(db, call) for call in (write, write, rotate, flush)]
    for loop in loops:
        loop.start()
    committed, repeatable = db.connect(), db.connect(autocommit=False)
    repeatable.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    total = "SELECT count(*), sum(distance), count(DISTINCT _user) FROM acme.departure"
    try:
        for read in itertools.count():
            if read >= READS and all(loop.rounds > 2 for loop in loops):
                break
            assert committed.execute(DIFFERENCE).fetchall() == [], f"read {read}, READ COMMITTED"
            if read % 4 == 0:
                first = repeatable.execute(total).fetchone()
                assert repeatable.execute(DIFFERENCE).fetchall() == [], f"read {read}, REPEATABLE READ"
                time.sleep(0.2)
                assert repeatable.execute(total).fetchone() == first, f"read {read}: the snapshot moved"
                repeatable.commit()
            if any(loop.error for loop in loops):
                break
    finally:
        for loop in loops:
            loop.stop()
    assert all(loop.rounds > 2 for loop in loops), [loop.rounds for loop in loops]
    db.tick()
    db.flush(PROJECT)
    assert db.all(DIFFERENCE) == []
    tiers = db.tiers(PROJECT, "departure")
    assert tiers["inbox"] == tiers["hot"] == 0
    assert tiers["cold"] == db.one("SELECT count(*) FROM oracle") > 0


def test_each_tier_alone_and_all_together(db, project):
    """The same rows in a data file, in a chunk, in the inbox, and uncommitted in this session."""
    session = db.connect(autocommit=False)
    expected = 0
    for place in ("file", "chunk", "inbox", "own"):
        target = session if place == "own" else db.admin
        for n in range(10):
            collect(target, PROJECT, "places", {"place": place, "n": n, "deep": {"a": [n]}, "tags": [place, "x"]})
        if place == "file":
            db.flush(PROJECT, "places")
        elif place == "chunk":
            db.tick()
        expected += 10
    found = session.execute("SELECT place, count(*), sum(n) FROM acme.places GROUP BY 1 ORDER BY 1").fetchall()
    assert found == [(place, 10, 45.0) for place in ("chunk", "file", "inbox", "own")]
    filtered = "SELECT count(*) FROM acme.places WHERE n >= 5 AND 'x' = ANY (tags) AND deep->'a'->>0 <> '7'"
    assert one(session, filtered) == 16
    session.rollback()
    assert db.one("SELECT count(*) FROM acme.places") == 30


def test_a_cursor_reads_its_snapshot_through_a_flush(db, project):
    for n in range(2_000):
        if n % 400 == 0:
            db.tick()
        collect(db.admin, PROJECT, "cursed", {"n": n})
    session = db.connect(autocommit=False)
    session.execute("DECLARE c CURSOR FOR SELECT n FROM acme.cursed")
    seen = [n for (n,) in session.execute("FETCH 10 FROM c")]
    for n in range(2_000, 2_500):
        collect(db.admin, PROJECT, "cursed", {"n": n})
    db.tick()
    db.flush(PROJECT, "cursed")
    db.tick()
    seen += [n for (n,) in session.execute("FETCH ALL FROM c")]
    assert sorted(seen) == list(range(2_000))
    session.commit()
    assert db.one("SELECT count(*) FROM acme.cursed") == 2_500


def test_rescans_subtransactions_and_prepared_statements(db, project):
    for n in range(50):
        collect(db.admin, PROJECT, "scanned", {"n": n, "grp": n % 5})
    db.tick()
    session = db.connect(autocommit=False)
    nested = (
        """SELECT g, (SELECT count(*) FROM acme.scanned s WHERE s.grp = g) FROM generate_series(0, 5) g ORDER BY 1"""
    )
    assert session.execute(nested).fetchall() == [(0, 10), (1, 10), (2, 10), (3, 10), (4, 10), (5, 0)]
    session.execute("SET LOCAL enable_hashjoin = off")
    session.execute("SET LOCAL enable_mergejoin = off")
    joined = "SELECT count(*) FROM acme.scanned a JOIN acme.scanned b ON a.grp = b.grp AND a.n < b.n"
    assert one(session, joined) == 5 * 45
    session.execute("PREPARE q (float8) AS SELECT count(*) FROM acme.scanned WHERE n < $1")
    for bound in (0, 10, 25, 50, 10, 10, 10, 10):
        assert one(session, f"EXECUTE q ({bound})") == bound
    session.execute("SAVEPOINT s")
    with pytest.raises(psycopg.Error):
        session.execute("SELECT 1 / (n - 3)::int FROM acme.scanned")
    session.execute("ROLLBACK TO s")
    assert one(session, "EXECUTE q (7)") == 7
    session.commit()
    db.admin.execute("CREATE VIEW scanned_view AS SELECT grp, max(n) AS top FROM acme.scanned GROUP BY 1")
    assert db.all("SELECT * FROM scanned_view ORDER BY 1") == [(g, 45.0 + g) for g in range(5)]


def test_an_old_transaction_elsewhere_does_not_slow_queries(db, project):
    """A transaction with an xid in another database holds the horizon of the whole cluster back. The tail that a query
    reads must stay the un-digested one all the same."""
    with db.cluster.connect("postgres", autocommit=False) as old:
        old.execute("SELECT pg_current_xact_id()")
        for _ in range(20):
            text = json.dumps([{"collection": "tail", "properties": {"n": n}} for n in range(500)])
            db.admin.execute("SELECT rakam.collect_batch('acme', %s)", (text,))
            db.tick()
        wait_until(lambda: db.tiers(PROJECT, "tail")["inbox"] == 0, "an empty inbox")
        # Uncommitted, so that no digest takes it before it is read.
        sender = db.connect(autocommit=False)
        collect(sender, PROJECT, "tail", {"n": -1})
        explained = sender.execute("EXPLAIN (ANALYZE, VERBOSE, COSTS OFF) SELECT n FROM acme.tail").fetchall()
        plan = "\n".join(line for (line,) in explained)
        inbox = [line for line in plan.splitlines() if "nbox" in line]
        assert inbox, plan
        assert not any(
            word.isdigit() and int(word) >= 1_000 for line in inbox for word in line.replace("=", " ").split()
        ), plan
        sender.commit()
        with_old = timed(db, "SELECT count(*) FROM acme.tail")
        old.rollback()
    without = timed(db, "SELECT count(*) FROM acme.tail")
    assert with_old < 3 * without + 0.02, f"{with_old:.4f} s with an old transaction, {without:.4f} s without"
    assert db.one("SELECT count(*) FROM acme.tail") == 10_001


def timed(db, query: str) -> float:
    durations = []
    for _ in range(15):
        began = time.perf_counter()
        db.admin.execute(query).fetchall()
        durations.append(time.perf_counter() - began)
    return min(durations)


def test_the_inbox_is_truncated_and_stays_right(db, project):
    """Rotation seals, digests and truncates: after it the inbox tables are small, and nothing is missing."""
    size = "SELECT sum(pg_relation_size(c.oid)) FROM pg_class c WHERE c.relname ~ '^inbox_[012]$'"
    peak = 0
    for n in range(40):
        text = json.dumps([{"collection": "rotated", "properties": {"n": n, "pad": "x" * 200}} for _ in range(250)])
        db.admin.execute("SELECT rakam.collect_batch('acme', %s)", (text,))
        peak = max(peak, db.one(size))
    wait_until(lambda: db.one("SELECT to_regclass('acme.rotated')") is not None, "the table", pause_s=0.05)
    whole = [(10_000, 250.0 * sum(range(40)))]
    assert db.all("SELECT count(*), sum(n) FROM acme.rotated") == whole
    wait_until(lambda: db.one(size) < peak / 2, "a truncated inbox", pause_s=0.2)
    assert db.all("SELECT count(*), sum(n) FROM acme.rotated") == whole


def test_explain_names_tiers_and_files(db, project):
    for day in ("2026-01-01", "2026-02-01"):
        for n in range(20):
            collect(db.admin, PROJECT, "explained", {"_time": f"{day}T10:00:00Z", "n": n, "s": "abc"})
        db.flush(PROJECT, "explained")
    # Uncommitted, so that no digest takes it before it is read.
    session = db.connect(autocommit=False)
    collect(session, PROJECT, "explained", {"_time": "2026-02-02T00:00:00Z", "n": 1, "s": "x"})
    explain = (
        "EXPLAIN (ANALYZE, VERBOSE, COSTS OFF) SELECT n FROM acme.explained WHERE _time >= '2026-02-01' AND s ~* 'A'"
    )
    plan = "\n".join(line for (line,) in session.execute(explain).fetchall())
    session.commit()
    told = dict(re.findall(r"^ *([A-Z][A-Za-z ]+): (.+)$", plan, re.MULTILINE))
    assert told["Files"].startswith("1 read, 1 skipped by period"), plan
    assert told["Inbox"].endswith("1 events"), plan
    assert int(told["Bytes Read"]) > 0, plan
    assert "_time" in told["Engine Filter"], plan
    # The case-insensitive pattern stays in Postgres, and the plan says so, with the reason.
    assert "~*" in told["Not Pushed Down"], plan
    assert "~*" in told["Filter"], plan
    assert db.one("SELECT count(*) FROM acme.explained WHERE _time >= '2026-02-01' AND s ~* 'A'") == 20
    # A scan that is ended before its end, too.
    plan = "\n".join(
        line
        for (line,) in db.all("EXPLAIN (ANALYZE, COSTS OFF) SELECT EXISTS (SELECT FROM acme.explained WHERE s ~* 'A')")
    )
    assert re.search(r"Files: [12] read", plan), plan


def test_the_manifests_log_is_bounded(db):
    """Only its newest entries are kept; the newest one always is."""
    log = "FROM rakam_internal.manifest_log"
    db.admin.execute(
        """INSERT INTO rakam_internal.manifest_log (collection_id, project_id, op, file_id, path)
           SELECT 0, 0, 'add', n, 'p' FROM generate_series(1, 150000) n"""
    )
    newest = db.one(f"SELECT max(seq) {log}")
    db.admin.execute("SELECT rakam.tick()")
    oldest, after = db.all(f"SELECT min(seq), max(seq) {log}")[0]
    assert after >= newest
    assert 100_000 - (after - newest) <= newest - oldest <= 100_000
