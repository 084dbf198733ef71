"""Thin tenants and floods: few events are kept as text and answer as columns do; files are written when they are worth it;
nobody's events wait for another project's flood.

Most tests use a server without workers, where every step is a call. The heavy ones are off by default:
RAKAM_FLOOD_SECONDS=60 floods one project at full rate while another sends an event a second, RAKAM_PROJECTS=10000 lets
so many projects send an event a minute for RAKAM_PROJECT_MINUTES (default 3).
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import psycopg
import pytest
from harness.cluster import Cluster
from harness.database import Database, collect, collect_batch, one, wait_until

FLOOD_SECONDS = int(os.environ.get("RAKAM_FLOOD_SECONDS", "0"))
PROJECTS = int(os.environ.get("RAKAM_PROJECTS", "0"))
MINUTES = int(os.environ.get("RAKAM_PROJECT_MINUTES", "3"))
SETTINGS = {"shared_preload_libraries": "", "rakam.max_fields": "9", "rakam.flush_interval": "1s"}

# Becomes columns; everything else stays in `_extra`, for want of room.
SEED = {"n": 1, "price": 1.5, "tags": ["a"], "flag": True, "day": "2026-01-02", "word": "w", "deep": {"a": 1},
        "list": [1, 2], "pad": 0}  # fmt: skip
ODD = [
    {"n": "7", "price": "12.50", "tags": ["a", 1, None], "flag": "true", "late": "12.345", "odd": 1},
    {"n": {"no": "number"}, "price": "dear", "tags": "one", "flag": 3, "late": "soon", "odd": 2},
    {"n": None, "price": 1e300, "tags": [], "day": "2026-02-30", "late": 5, "odd": 3},
    {"word": 17, "deep": "flat", "list": {"a": 1}, "day": "2026-02-03T04:05:06Z", "late": [1], "odd": 4},
    {"word": "x" * 300, "deep": [{"b": None}], "xmin": 1, "late": "y" * 300, "_user": "ünï\u0001", "odd": 5},
    {"_time": "2026-01-02T03:04:05.678901+02", "_id": "one", "late": 1.0, "odd": 6},
    {"_time": "1900-01-01", "N": 3, "late": None, "list": ["1", 2], "odd": 7},
    {"_time": "never", "late": True, "odd": 8},
]


@pytest.fixture(scope="module")
def alone():
    """A database in a server that runs no worker of rakam."""
    cluster = Cluster(f"{os.environ.get('RAKAM_TEST_CLUSTER', 'e2e')}-thin")
    cluster.destroy()
    cluster.start(SETTINGS)
    db = Database(cluster, "thin").create()
    yield db
    db.close()
    cluster.destroy()


def chunks(db: Database, project: str, collection: str) -> dict[str, tuple[int, int, int]]:
    """By format: the number of chunks, of their events, and the highest level."""
    rows = db.all(
        "SELECT format, count(*), sum(n), max(level) FROM rakam_internal.hot_chunk JOIN rakam_internal.collection c"
        " USING (collection_id) JOIN rakam_internal.project p ON p.project_id = c.project_id"
        " WHERE p.name = %s AND c.name = %s GROUP BY 1",
        project,
        collection,
    )
    return {name: tuple(numbers) for name, *numbers in rows}


def everything(session: psycopg.Connection, table: str, *, without: str = "{}") -> list[str]:
    """The odd events as the table shows them, every column of them."""
    rows = session.execute(
        f"SELECT (to_jsonb(t) - %s::text[])::text FROM {table} t WHERE _extra ? 'odd' ORDER BY _extra->>'odd'",
        (without,),
    ).fetchall()
    return [row for (row,) in rows]


def test_few_events_answer_alike_in_every_form(alone):
    db = alone
    db.project("forms")
    for name in ("few", "many"):
        collect(db.admin, "forms", name, SEED)
    db.tick()
    session = db.connect(autocommit=False)
    for event in ODD:
        collect(session, "forms", "few", event)
    in_inbox = everything(session, "forms.few")
    assert len(in_inbox) == len(ODD)
    session.commit()
    collect_batch(db.admin, "forms", [("many", event) for event in ODD] + [("many", {"pad": 1})] * 600)
    db.tick()
    assert chunks(db, "forms", "few") == {"rows": (2, 1 + len(ODD), 0)}
    assert chunks(db, "forms", "many")["arrow"] == (1, 600 + len(ODD), 0)
    assert everything(db.admin, "forms.few") == in_inbox

    # A field that comes later is found in both, and what does not fit it stays where it was.
    db.configure(max_fields=10)
    for name in ("few", "many"):
        db.admin.execute("SELECT rakam.add_field('forms', %s, 'late', 'numeric(9,2)')", (name,))
    db.configure(max_fields=None)
    db.tick()
    with_field = everything(db.admin, "forms.few")
    own = "{_time,_received_at}"
    assert everything(db.admin, "forms.few", without=own) == everything(db.admin, "forms.many", without=own)
    late = "SELECT late::text FROM forms.few WHERE late IS NOT NULL ORDER BY _extra->>'odd'"
    assert db.all(late) == [("12.35",), ("5.00",), ("1.00",)]
    # Every column alone, conditions, and none at all.
    for (column,) in db.all("SELECT attname FROM pg_attribute WHERE attrelid = 'forms.few'::regclass AND attnum > 0"):
        query = f"SELECT \"{column}\"::text, count(*) FROM forms.{{}} WHERE _extra ? 'odd' GROUP BY 1 ORDER BY 1"
        if column not in ("_time", "_received_at"):
            assert db.all(query.format("few")) == db.all(query.format("many")), column
    assert db.one("SELECT count(*) FROM forms.few") == 1 + len(ODD)
    assert db.one("SELECT count(*) FROM forms.few WHERE n = 7 AND tags[2] = '1'") == 1
    assert db.one("SELECT count(*) FROM forms.few WHERE _time = '2026-01-02 01:04:05.678901+00'") == 1

    # Row chunks become larger row chunks, then columns, then a file.
    for n in range(30):
        collect(db.admin, "forms", "few", {"pad": n})
        db.tick()
    merged = chunks(db, "forms", "few")
    assert merged["rows"] == (1, 31 + len(ODD), 1) and "arrow" not in merged
    assert everything(db.admin, "forms.few") == with_field
    collect_batch(db.admin, "forms", [("few", {"pad": 1})] * 470)
    db.tick()
    assert chunks(db, "forms", "few") == {"arrow": (1, 501 + len(ODD), 0)}
    assert everything(db.admin, "forms.few") == with_field
    db.flush("forms", "few")
    assert chunks(db, "forms", "few") == {}
    assert everything(db.admin, "forms.few") == with_field
    db.flush("forms", "many")
    assert everything(db.admin, "forms.few", without=own) == everything(db.admin, "forms.many", without=own)


def test_what_does_not_fit_is_counted_once(alone):
    db = alone
    db.project("counted")
    collect(db.admin, "counted", "c", {"n": 1})
    db.tick()
    collect(db.admin, "counted", "c", {"n": "x"})
    count = "SELECT sum(invalid_values), (SELECT count(*) FROM rakam.invalid_value WHERE project = 'counted') FROM rakam.stat_collection WHERE project = 'counted'"
    db.tick()
    assert chunks(db, "counted", "c") == {"rows": (2, 2, 0)}
    assert db.all(count) == [(1, 1)]
    collect_batch(db.admin, "counted", [("c", {"n": 2})] * 499)
    db.tick()
    assert chunks(db, "counted", "c") == {"arrow": (1, 501, 0)}
    assert db.all(count) == [(1, 1)]
    db.flush("counted")
    assert db.all(count) == [(1, 1)]
    assert db.one("SELECT sum(n) FROM counted.c") == 1 + 2 * 499


def test_a_file_has_to_be_worth_it(alone):
    """Age alone is no reason to write one for a few events; a long age is, and so is a call."""
    db = alone
    db.project("files")
    for name in ("old", "called"):
        collect(db.admin, "files", name, {"n": 1})
    db.tick()
    time.sleep(1.1)  # longer than rakam.flush_interval
    db.tick()
    assert db.tiers("files", "old") == {"inbox": 0, "hot": 1, "cold": 0}
    assert [row[:2] for row in db.flush("files", "called")] == [("called", 1)]
    try:
        db.configure(flush_max_age="1s")
        tick_until_cold(db, "old", 1)
        # Merges do not make events younger.
        db.configure(flush_max_age="1d")
        collect(db.admin, "files", "merged", {"n": 0})
        db.tick()
        born = "SELECT min(created_at) FROM rakam_internal.hot_chunk"
        before = db.one(born)
        for n in range(31):
            collect(db.admin, "files", "merged", {"n": n})
            db.tick()
        assert chunks(db, "files", "merged") == {"rows": (1, 32, 1)}
        assert db.one(born) == before
        # Few events of a collection are many of all together.
        db.configure(min_file_events=32)
        tick_until_cold(db, "merged", 32)
    finally:
        db.configure(flush_max_age=None, min_file_events=None)


def tick_until_cold(db: Database, collection: str, n: int) -> None:
    """Ticks until the chunks have the age that the settings ask for, which a fast machine is ahead of."""

    def flushed() -> bool:
        db.tick()
        return db.tiers("files", collection) == {"inbox": 0, "hot": 0, "cold": n}

    wait_until(flushed, f"{collection} in data files")


def flood_text(events: int, pad: int) -> str:
    return json.dumps([{"collection": "c", "properties": {"n": n, "pad": "x" * pad}} for n in range(events)])


def test_a_flood_delays_its_own_project_only(alone):
    db = alone
    for project in ("flood", "thin"):
        db.project(project)
        collect(db.admin, project, "c", {"n": 0})
    db.tick()
    text = flood_text(1_000, 1_000)
    batches = 24
    for _ in range(batches):
        db.admin.execute("SELECT rakam.collect_batch('flood', %s)", (text,))
    collect(db.admin, "thin", "c", {"n": 1})
    flooded = (1 + 1_000 * batches, sum(range(1_000)) * batches)
    total = "SELECT count(*), sum(n) FROM {}.c"

    # What was committed before this call is digested by it: the thin project's events are, and it ends then.
    assert [row[:2] for row in db.flush("thin")] == [("c", 2)]
    assert db.all("SELECT p.name FROM rakam_internal.inbox_lag JOIN rakam_internal.project p USING (project_id)") == [
        ("flood",)
    ]
    behind = db.tiers("flood", "c")
    assert behind["inbox"] > 0 and sum(behind.values()) == flooded[0]
    assert db.all(total.format("flood")) == [flooded]
    assert db.all(total.format("thin")) == [(2, 1)]
    found = dict(db.all('SELECT "check", status FROM rakam.health()'))
    assert found["inbox"] == "warning"

    # A member of one project does not learn of the other's lag; its own is right.
    stranger, member = (db.login(project, "read") for project in ("thin", "flood"))
    assert one(stranger, "SELECT count(*) FROM rakam_internal.inbox_lag") == 0
    assert member.execute(total.format("flood")).fetchall() == [flooded]

    # An older snapshot keeps its answer while the project catches up, is sealed and truncated.
    old = db.connect(autocommit=False)
    old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    assert old.execute(total.format("flood")).fetchall() == [flooded]
    for _ in range(3):
        db.tick()
    assert db.one("SELECT count(*) FROM rakam_internal.inbox_lag") == 0
    digested = db.tiers("flood", "c")
    assert digested["inbox"] == 0 and digested["hot"] + digested["cold"] == flooded[0]
    assert db.all(total.format("flood")) == [flooded]
    assert old.execute(total.format("flood")).fetchall() == [flooded]
    old.rollback()


def test_a_lagging_project_keeps_its_inbox(alone):
    """No table is emptied under a project that lags, and a transaction that was open all the while loses nothing."""
    db = alone
    db.project("slow")
    session = db.connect(autocommit=False)
    collect(session, "slow", "c", {"n": 1})
    text = flood_text(1_000, 1_000)
    for _ in range(20):
        db.admin.execute("SELECT rakam.collect_batch('slow', %s)", (text,))
    db.project("other")
    collect(db.admin, "other", "c", {"n": 1})
    db.flush("other")
    assert db.one("SELECT count(*) FROM rakam_internal.inbox_lag") == 1
    session.commit()
    assert db.one("SELECT count(*) FROM slow.c") == 20_001
    db.tick()
    db.tick()
    assert db.one("SELECT count(*) FROM rakam_internal.inbox_lag") == 0
    assert db.one("SELECT count(*) FROM slow.c") == 20_001
    digested = db.tiers("slow", "c")
    assert digested["inbox"] == 0 and digested["hot"] + digested["cold"] == 20_001
    # A project that is dropped while it lags takes its lag along.
    for _ in range(20):
        db.admin.execute("SELECT rakam.collect_batch('slow', %s)", (text,))
    db.flush("other")
    assert db.one("SELECT count(*) FROM rakam_internal.inbox_lag") == 1
    db.admin.execute("SET rakam.allow_project_drop = on")
    db.admin.execute("SELECT rakam.drop_project('slow')")
    assert db.one("SELECT count(*) FROM rakam_internal.inbox_lag") == 0
    db.tick()
    collect(db.admin, "other", "c", {"n": 2})
    db.tick()
    assert db.one("SELECT sum(n) FROM other.c") == 3


class Session(threading.Thread):
    """Runs a function with a session of its own until the deadline; keeps what it gives and its error."""

    def __init__(self, db: Database, deadline: float, work):
        super().__init__(daemon=True)
        self.db, self.deadline, self.work = db, deadline, work
        self.results: list = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.db.cluster.connect(self.db.name) as session:
                while time.monotonic() < self.deadline:
                    self.results.append(self.work(session))
        except Exception as error:  # noqa: BLE001 - handed to the test
            self.error = error

    def end(self) -> list:
        self.join(timeout=FLOOD_SECONDS + 120)
        if self.error:
            raise self.error
        return self.results


# The heavy form: it measures, and wants the machine for itself. test_a_flood_delays_its_own_project_only is the slice.
@pytest.mark.skipif(not FLOOD_SECONDS, reason="heavy: measures for RAKAM_FLOOD_SECONDS on a machine of its own")
def test_flood(private_cluster):
    """One project sends as fast as three sessions can, another one an event a second."""
    cluster = private_cluster("flood", {"rakam.digest_interval": "1s", "rakam.digest_max_age": "30s"})
    db = Database(cluster, "flood").create()
    for project in ("flood", "thin"):
        db.project(project)
        collect(db.admin, project, "c", {"n": 0, "word": "a"})
        db.flush(project)
    batch = json.dumps([
        {"collection": "c", "properties": {"n": n, "word": f"w{n % 97}", "price": n / 7, "_user": f"u{n % 1000}"}}
        for n in range(500)
    ])  # fmt: skip
    deadline = time.monotonic() + FLOOD_SECONDS
    flood = [
        Session(db, deadline, lambda s: s.execute("SELECT rakam.collect_batch('flood', %s)", (batch,)) and 500)
        for _ in range(3)
    ]
    hot = "SELECT sum(n) FROM rakam_internal.hot_chunk WHERE collection_id = (SELECT collection_id FROM rakam_internal.collection c JOIN rakam_internal.project p USING (project_id) WHERE p.name = 'thin')"
    visible, digested, sent = [], [], 0
    time.sleep(1)
    while time.monotonic() < deadline - 3:
        began = time.monotonic()
        collect(db.admin, "thin", "c", {"n": 1})
        sent += 1
        committed = time.monotonic()
        assert db.one("SELECT count(*) FROM thin.c") == 1 + sent
        visible.append(time.monotonic() - committed)
        while (db.one(hot) or 0) < sent:
            time.sleep(0.01)
        digested.append(time.monotonic() - committed)
        time.sleep(max(0, began + 1 - time.monotonic()))
    events = sum(sum(session.end()) for session in flood)
    left = db.tiers("flood", "c")
    worst = sorted(digested)
    p99 = worst[int(len(worst) * 0.99)]
    print(
        f"flood {events / FLOOD_SECONDS:,.0f} events/s in, at its end {left}; thin: visible after at most"
        f" {max(visible):.2f} s, digested after {worst[len(worst) // 2]:.2f} s (median), {p99:.2f} s (p99),"
        f" {worst[-1]:.2f} s (worst) of {len(worst)}"
    )
    assert p99 < 2
    began = time.monotonic()
    db.tick()
    print(f"caught up {time.monotonic() - began:.1f} s after the flood")
    assert db.one("SELECT count(*) FROM flood.c") == 1 + events
    db.close()


# The heavy form: it takes five minutes. test_few_events_answer_alike_in_every_form is the slice.
@pytest.mark.skipif(not PROJECTS, reason="heavy: RAKAM_PROJECTS=10000 takes five minutes")
def test_ten_thousand_projects(private_cluster):
    """Each project sends an event a minute. Rows, WAL and CPU of the workers per minute are printed."""
    cluster = private_cluster("many", {"rakam.digest_interval": "1s", "rakam.digest_max_age": "30s",
                                       "max_locks_per_transaction": "256", "rakam.rotation_interval": "60s"})  # fmt: skip
    db = Database(cluster, "many").create()
    began = time.monotonic()
    for n in range(PROJECTS):
        db.admin.execute("SELECT rakam.create_project(%s)", (f"p{n}",))
        db.admin.execute('SELECT rakam.collect(%s, \'c\', \'{"n": 1, "word": "a"}\')', (f"p{n}",))
    print(f"{PROJECTS} projects made in {time.monotonic() - began:.0f} s")
    db.tick()
    missing = "SELECT count(*) FROM rakam_internal.collection WHERE ft IS NULL"
    wait_until(lambda: db.one(missing) == 0, "a table for each", 600, 1)
    print(f"their tables are there after {time.monotonic() - began:.0f} s")
    time.sleep(15)
    session = db.connect()
    for minute in range(MINUTES):
        before = measures(db)
        start = time.monotonic()
        for n in range(PROJECTS):
            collect(session, f"p{n}", "c", {"n": minute, "word": "abc", "_user": f"u{n}", "price": n / 3})
            time.sleep(max(0, start + 60 * (n + 1) / PROJECTS - time.monotonic()))
        after = measures(db)
        told = {name: round(after[name] - before[name], 2) for name in before}
        print(f"minute {minute}: {told}")
    waiting = "SELECT count(*) FROM rakam_internal.inbox_lag"
    assert db.one(waiting) == 0
    assert db.one("SELECT count(*) FROM rakam_internal.data_file") == 0
    db.close()


def measures(db: Database) -> dict[str, float]:
    row = db.admin.execute(
        "SELECT pg_current_wal_lsn() - '0/0', (SELECT count(*) FROM rakam_internal.hot_chunk),"
        " (SELECT coalesce(max(chunk_id), 0) FROM rakam_internal.hot_chunk),"
        " (SELECT max(tick_id) FROM rakam_internal.inbox_tick), (SELECT count(*) FROM rakam_internal.data_file)"
    ).fetchone()
    names = ("wal MB", "chunks", "chunks made", "ticks", "files")
    found = dict(zip(names, map(float, row), strict=True))
    found["wal MB"] /= 1e6
    ticks = os.sysconf("SC_CLK_TCK")
    cpu = 0.0
    for pid, title in db.cluster.processes().items():
        if "rakam" in title:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            cpu += (int(fields[11]) + int(fields[12])) / ticks
    found["worker CPU s"] = cpu
    return found
