"""`rakam.set_retention`: exact to the row, in every tier, whatever the background has done so far."""

from __future__ import annotations

import json

import psycopg
import pytest
from harness.database import collect_batch, in_background, one, refused, wait_until

SET = "SELECT rakam.set_retention(%s, %s, %s::interval)"


@pytest.fixture(scope="module")
def lake(cluster, db):
    folder = cluster.make_folder("retention-lake")
    db.admin.execute(f"CREATE SERVER retention_lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.project("acme")
    db.project("lakeside", "retention_lake")
    return folder


def keep(db, project: str, collection: str, interval: str | None) -> None:
    db.admin.execute(SET, (project, collection, interval))


def send(db, project: str, collection: str, days: range, first: int = 0) -> None:
    """An event for each of these days ago, 12 hours more: far from any horizon of whole days."""
    ages = db.all(
        "SELECT d, (now() - d * '1 day'::interval - '12 hours'::interval)::text FROM unnest(%s::int[]) d", list(days)
    )
    events = [(collection, {"age": age, "n": first + age, "_time": at}) for age, at in ages]
    stored, rejected, _, errors = collect_batch(db.admin, project, events)
    assert rejected == 0, errors


def ages(session, table: str) -> list[int]:
    return [int(age) for (age,) in session.execute(f"SELECT age FROM {table} ORDER BY age").fetchall()]


@pytest.mark.parametrize("project", ["acme", "lakeside"])
def test_every_tier_is_exact(db, lake, project):
    table = f"{project}.page"
    send(db, project, "page", range(40))
    db.flush(project, "page")
    send(db, project, "page", range(40))
    db.tick()
    send(db, project, "page", range(40))
    wait_until(
        lambda: db.one("SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = 'age'", table),
        "age",
    )
    session = db.connect()
    session.execute(f"PREPARE young (int) AS SELECT count(*) FROM {table} WHERE age < $1")
    for _ in range(6):
        assert one(session, "EXECUTE young (20)") == 60
    keep(db, project, "page", "10 days")
    kept = [age for age in range(10) for _ in range(3)]
    assert ages(db.admin, table) == kept
    assert one(session, "EXECUTE young (20)") == 30
    for query, expected in [
        (f"SELECT count(*) FROM {table}", 30),
        (f"SELECT count(*) FROM {table} WHERE age >= 9", 3),
        (f"SELECT count(*) FROM {table} WHERE _time < now() - '8 days'::interval", 6),
        (f"SELECT count(*) FROM {table} WHERE _time < now() - '10 days'::interval", 0),
        (f"SELECT max(age) FROM {table}", 9),
        (f"SELECT count(*) FROM {project}._all WHERE _collection = 'page'", 30),
        (f"SELECT count(*) FROM (SELECT FROM {table} LIMIT 100) x", 30),
        (f"SELECT count(*) FROM {table} a JOIN {table} b USING (age)", 90),
    ]:
        assert db.one(query) == expected, query
    db.admin.execute("SET rakam.enable_pushdown = off")
    assert ages(db.admin, table) == kept
    db.admin.execute("RESET rakam.enable_pushdown")
    assert (
        db.one("SELECT retention::text FROM rakam.collections WHERE project = %s AND collection = 'page'", project)
        == "10 days"
    )

    # Moving and removing what is too old changes no answer.
    for step in (
        db.tick,
        lambda: db.flush(project, "page"),
        lambda: db.all("SELECT rakam.compact(%s, 'page')", project),
        db.tick,
    ):
        step()
        assert ages(db.admin, table) == kept
    assert db.tiers(project, "page") == {"inbox": 0, "hot": 0, "cold": 30}
    stored, size, files = db.all(
        "SELECT sum(n), sum(bytes), count(*) FROM rakam.data_files WHERE project = %s AND collection = 'page'", project
    )[0]
    assert stored == 30
    assert db.all(
        "SELECT cold_events, cold_bytes, files FROM rakam.stat_collection WHERE project = %s AND collection = 'page'",
        project,
    ) == [(30, size, files)]


def test_what_is_gone_does_not_come_back(db, lake):
    """A longer time, or none: events that were hidden stay away, also those that no background step had removed yet."""
    for project in ("acme", "lakeside"):
        table = f"{project}.undone"
        send(db, project, "undone", range(30))
        db.flush(project, "undone")
        send(db, project, "undone", range(30))
        db.tick()
        send(db, project, "undone", range(30))
        keep(db, project, "undone", "5 days")
        assert ages(db.admin, table) == [age for age in range(5) for _ in range(3)]
        keep(db, project, "undone", "20 days")
        assert ages(db.admin, table) == [age for age in range(5) for _ in range(3)]
        send(db, project, "undone", range(30))
        assert ages(db.admin, table) == sorted([age for age in range(5) for _ in range(3)] + list(range(20)))
        keep(db, project, "undone", None)
        assert db.one(
            "SELECT retention IS NULL FROM rakam.collections WHERE project = %s AND collection = 'undone'", project
        )
        assert ages(db.admin, table) == sorted([age for age in range(5) for _ in range(3)] + list(range(20)))
        send(db, project, "undone", range(25, 30))
        assert ages(db.admin, table)[-5:] == [25, 26, 27, 28, 29]


def test_a_transaction_keeps_its_own_time(db, lake):
    """What is too old is decided by the start of the transaction, and nobody takes it away from one that sees it."""
    at = db.one("SELECT clock_timestamp() + '3 seconds'::interval")
    collect_batch(db.admin, "acme", [("brief", {"n": 1, "_time": at.isoformat()})])
    db.flush("acme", "brief")
    keep(db, "acme", "brief", "1 second")
    early = db.connect(autocommit=False)
    began = one(early, "SELECT now()")
    count = "SELECT count(*) FROM acme.brief"
    visible = int((began - at).total_seconds() <= 1)
    assert one(early, count) == visible
    wait_until(lambda: db.one("SELECT clock_timestamp() > %s + '8 seconds'::interval", at), "its end", 30)
    assert db.one(count) == 0
    db.all("SELECT rakam.compact('acme', 'brief')")
    db.tick()
    assert one(early, count) == visible
    early.commit()
    assert one(early, count) == 0
    early.commit()
    db.all("SELECT rakam.compact('acme', 'brief')")
    assert db.one("SELECT count(*) FROM rakam.data_files WHERE collection = 'brief'") == 0


def test_the_background_removes_it(db, lake):
    send(db, "lakeside", "swept", range(100, 130))
    db.flush("lakeside", "swept")
    send(db, "lakeside", "swept", range(5))
    db.flush("lakeside", "swept")
    keep(db, "lakeside", "swept", "50 days")
    wait_until(
        lambda: db.one("SELECT sum(n) FROM rakam.data_files WHERE project = 'lakeside' AND collection = 'swept'") == 5,
        "the removal",
        60,
    )
    assert ages(db.admin, "lakeside.swept") == list(range(5))


def test_months_go_by_the_calendar_and_never_back(db):
    since = "SELECT rakam_internal.kept_since(%s::interval, %s::timestamptz)::timestamptz AT TIME ZONE 'UTC'"
    db.admin.execute("SET timezone = 'America/New_York'")
    for interval, at, expected in [
        ("1 month", "2026-05-17T10:00:00Z", "2026-04-17 10:00:00"),
        ("1 month", "2026-03-28T10:00:00Z", "2026-02-28 10:00:00"),
        ("1 month", "2026-03-29T09:00:00Z", "2026-03-01 00:00:00"),
        ("1 month", "2026-03-31T23:00:00Z", "2026-03-01 00:00:00"),
        ("1 month", "2026-04-01T00:00:00Z", "2026-03-01 00:00:00"),
        ("1 year 1 day 01:00", "2026-03-01T12:30:00Z", "2025-02-28 11:30:00"),
        ("90 days", "2026-03-10T12:00:00Z", "2025-12-10 12:00:00"),
    ]:
        assert str(db.one(since, interval, at)) == expected, (interval, at)
    db.admin.execute("RESET timezone")
    steps = (
        "SELECT count(*) FROM (SELECT k, lag(k) OVER (ORDER BY at) AS before FROM (SELECT at,"
        " rakam_internal.kept_since(%s::interval, at) AS k"
        " FROM generate_series('2023-01-01'::timestamptz, '2025-01-01', '7 hours') at) x) y WHERE k < before"
    )
    for interval in ("1 month", "3 months 2 days", "1 year 1 month", "30 days", "13 months 05:00"):
        assert db.one(steps, interval) == 0, interval


def test_rights_and_errors(db, lake):
    send(db, "acme", "ruled", range(3))
    db.tick()
    for kind in ("read", "write"):
        with refused("42501"):
            db.login("acme", kind).execute("SELECT rakam.set_retention('acme', 'ruled', '1 day')")
    db.login("acme", "admin").execute("SELECT rakam.set_retention('acme', 'ruled', '1 year')")
    shown = "SELECT retention::text FROM rakam.collections WHERE project = 'acme' AND collection = 'ruled'"
    assert db.one(shown) == "1 year"
    assert one(db.login("acme", "read"), shown) == "1 year"
    for project, collection, interval, sqlstate in [
        ("nobody", "ruled", "1 day", "42501"),
        ("acme", "nothing", "1 day", "42704"),
        ("acme", "ruled", "0", "22023"),
        ("acme", "ruled", "-1 day", "22023"),
        ("acme", "ruled", "1 month -40 days", "22023"),
        ("acme", "ruled", "100000 years", "22008"),
        (None, "ruled", "1 day", "22004"),
        ("acme", None, "1 day", "22004"),
    ]:
        with refused(sqlstate):
            keep(db, project, collection, interval)
    assert db.one(shown) == "1 year"
    assert (
        db.one(
            "SELECT count(*) FROM rakam.audit_log WHERE call = 'set_retention' AND object = 'ruled' AND outcome = 'ok'"
        )
        == 1
    )


def test_a_result_written_to_a_file(db, lake, cluster):
    send(db, "acme", "copied", range(10))
    db.flush("acme", "copied")
    keep(db, "acme", "copied", "4 days")
    plan = json.dumps(db.all("EXPLAIN (VERBOSE) SELECT * FROM acme.copied"))
    assert "Foreign Scan" in plan
    with (
        db.connect().cursor() as cursor,
        cursor.copy("COPY (SELECT age FROM acme.copied ORDER BY age) TO STDOUT") as copy,
    ):
        assert [float(line) for line in b"".join(copy).decode().split()] == [0, 1, 2, 3]
    view = db.connect()
    view.execute("CREATE VIEW recent AS SELECT count(*) AS n FROM acme.copied")
    assert one(view, "SELECT n FROM recent") == 4
    with pytest.raises(psycopg.Error):
        view.execute("SELECT rakam_internal.kept_since('1 day')")


def test_a_longer_time_is_not_overtaken(db, lake):
    """While events are kept longer from now on, nobody removes any by the time of before."""
    [(moment,)] = db.all("SELECT (now() - interval '10 minutes' + interval '4 seconds')::text")
    assert collect_batch(db.admin, "acme", [("lengthened", {"n": 1, "_time": moment})])[1] == 0
    db.tick()
    keep(db, "acme", "lengthened", "10 minutes")
    assert db.one("SELECT count(*) FROM acme.lengthened") == 1
    db.configure(failpoint="keep.before_set=sleep(600000)")
    try:
        _, setting, kept = in_background(db, lambda s: s.execute(SET, ("acme", "lengthened", "1 day")))
        asleep = """SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'rakam task' AND wait_event_type = 'Extension'
                    AND state_change > backend_start"""
        wait_until(lambda: db.one(asleep) == 1, "the worker that sets it")
        # Hidden for as long as the margin by now: a flush would leave it out.
        wait_until(
            lambda: db.one("SELECT now() > %s::timestamptz + interval '10 minutes 6 seconds'", moment), "the time"
        )
        _, flushing, flushed = in_background(db, lambda s: s.execute("SELECT rakam.flush('acme', 'lengthened')"))
        wait_until(
            lambda: (
                flushed
                or db.one(
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND backend_type = 'rakam task'"
                )
            ),
            "the flush, or that it waits",
        )
    finally:
        db.configure(failpoint=None)
    for thread, outcome in ((setting, kept), (flushing, flushed)):
        thread.join(60)
        assert outcome and not isinstance(outcome[0], Exception), outcome
    assert db.one("SELECT count(*) FROM acme.lengthened") == 1
