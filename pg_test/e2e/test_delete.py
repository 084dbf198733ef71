"""`rakam.delete_events`: hidden at once in every tier, for good (test_delete_traces.py: crashes, and the last byte).

RAKAM_DELETE_SECONDS (default 6) is how long the races run.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from pathlib import Path

import psycopg
import pytest
from harness.database import collect, collect_batch, in_background, one, refused, wait_until
from harness.numbered import DELETE, delete, fill, numbers, send

RACE_SECONDS = float(os.environ.get("RAKAM_DELETE_SECONDS", "6"))


@pytest.fixture(scope="module")
def stores(cluster, db) -> list[str]:
    """Two projects: one in the default storage, one in a directory."""
    db.project("acme")
    folder = cluster.make_folder("delete-lake")
    db.admin.execute(f"CREATE SERVER delete_lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.project("lakeside", "delete_lake")
    return ["acme", "lakeside"]


@pytest.mark.parametrize("project", ["acme", "lakeside"])
def test_every_tier(db, stores, project):
    table = f"{project}.page"
    everything = fill(db, project, "page")
    other = "other" + project
    send(db, project, other, range(20))
    db.tick()

    assert delete(db.admin, project, "page", "n % 3 = 0 AND text LIKE 't%'") == len(everything) / 3
    left = [n for n in everything if n % 3]
    assert numbers(db.admin, table) == left

    # Filters that prune row groups and pages, counts without columns, limits, parameters.
    for condition, expected in [
        ("n < 100", [n for n in left if n < 100]),
        ("_user = 'u3'", [n for n in left if n % 7 == 3]),
        ("_time = '2026-01-05T10:00:00Z'", [n for n in left if n % 28 == 4]),
        ("n = 301", [301]),
        ("n = 300", []),
    ]:
        assert [int(n) for (n,) in db.all(f"SELECT n FROM {table} WHERE {condition} ORDER BY n")] == expected, condition
        assert db.one(f"SELECT count(*) FROM {table} WHERE {condition}") == len(expected), condition
    assert len(db.all(f"SELECT FROM {table} LIMIT 250")) == 250
    assert db.one(f"SELECT count(*) FROM {table}") == len(left)
    assert db.one(f"SELECT count(*) FROM {project}._all WHERE _collection = 'page'") == len(left)
    assert db.one(f"SELECT count(*) FROM {project}._all WHERE _collection = %s", other) == 20
    db.admin.execute("SET rakam.enable_pushdown = off")
    assert db.one(f"SELECT count(*) FROM {table} WHERE n < 100") == len([n for n in left if n < 100])
    db.admin.execute("RESET rakam.enable_pushdown")

    assert sum(db.tiers(project, "page").values()) == len(left)
    plan = "\n".join(line for (line,) in db.all(f"EXPLAIN (ANALYZE, COSTS OFF) SELECT n FROM {table}"))
    assert f"Deleted Events Hidden: {len(everything) // 3}" in plan

    # Again: they are gone already. More of them: each counts once.
    assert delete(db.admin, project, "page", "n % 3 = 0") == 0
    assert delete(db.admin, project, "page", "n % 3 = 0 OR n % 10 = 1") == len([n for n in left if n % 10 == 1])
    left = [n for n in left if n % 10 != 1]
    assert numbers(db.admin, table) == left

    # A flush writes all of it without them, into chunks' files and instead of the old ones.
    flushed = {row[0]: row[1] for row in db.flush(project, "page")}
    assert flushed["page"] == len([n for n in left if n >= 300])
    assert numbers(db.admin, table) == left
    assert db.tiers(project, "page") == {"inbox": 0, "hot": 0, "cold": len(left)}
    stored, files = db.all(
        "SELECT sum(n), count(*) FROM rakam.data_files WHERE project = %s AND collection = 'page'", project
    )[0]
    assert stored == len(left)
    sizes = "SELECT cold_bytes, files FROM rakam.stat_collection WHERE project = %s AND collection = 'page'"
    assert db.all(sizes, project) == [
        (db.one("SELECT sum(bytes) FROM rakam.data_files WHERE project = %s AND collection = 'page'", project), files)
    ]
    assert db.one("SELECT count(*) FROM rakam_internal.deletion") == 0
    plan = "\n".join(line for (line,) in db.all(f"EXPLAIN (ANALYZE, COSTS OFF) SELECT n FROM {table}"))
    assert "Deleted" not in plan

    # All of it: the files go as a whole.
    assert delete(db.admin, project, "page", "true") == len(left)
    assert numbers(db.admin, table) == []
    assert db.tiers(project, "page") == {"inbox": 0, "hot": 0, "cold": 0}
    assert db.one("SELECT count(*) FROM rakam.data_files WHERE project = %s AND collection = 'page'", project) == 0
    assert db.one(f"SELECT count(*) FROM {project}.{other}") == 20


def test_merged_chunks_leave_them_out(db, stores):
    """Chunks of text and of columns; whole ones, and ones that keep a single event."""
    sent = 0

    def more(count: int) -> None:
        nonlocal sent
        send(db, "acme", "merged", range(sent, sent + count))
        sent += count
        db.tick()

    for count in (200, 200, 600, 200, 600):
        more(count)
    condition = "n < 200 OR n BETWEEN 201 AND 399 OR n % 10 = 5"
    gone = [n for n in range(sent) if n < 200 or 201 <= n <= 399 or n % 10 == 5]
    assert delete(db.admin, "acme", "merged", condition) == len(gone)
    hidden = (
        "SELECT count(*) FROM rakam_internal.deletion JOIN rakam_internal.collection USING (collection_id)"
        " WHERE kind = 'chunk' AND name = 'merged'"
    )
    assert db.one(hidden) > 0
    assert numbers(db.admin, "acme.merged") == sorted(set(range(sent)) - set(gone))
    for _ in range(60):
        if db.one(hidden) == 0:
            break
        more(600)
    assert db.one(hidden) == 0
    expected = sorted(set(range(sent)) - set(gone))
    assert numbers(db.admin, "acme.merged") == expected
    assert db.tiers("acme", "merged")["hot"] == len(expected)


def test_snapshots_from_before_see_everything(db, stores):
    everything = fill(db, "acme", "snapshots", 200)
    with (
        db.connect(autocommit=False) as before,
        db.connect(autocommit=False) as cursor,
        db.connect(autocommit=False) as committed,
    ):
        before.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        before.execute("SELECT 1")
        assert one(committed, "SELECT count(*) FROM acme.snapshots") == len(everything)
        cursor.execute("DECLARE c CURSOR FOR SELECT n FROM acme.snapshots")
        fetched = [int(n) for (n,) in cursor.execute("FETCH 50 FROM c").fetchall()]
        cursor.execute("DECLARE late CURSOR FOR SELECT n FROM acme.snapshots ORDER BY n")

        assert delete(db.admin, "acme", "snapshots", "n % 2 = 0") == len(everything) / 2
        assert delete(db.admin, "acme", "snapshots", "n < 200") == 100
        odd = [n for n in everything if n % 2 and n >= 200]
        assert numbers(db.admin, "acme.snapshots") == odd
        assert numbers(committed, "acme.snapshots") == odd
        assert numbers(before, "acme.snapshots") == everything
        # Even when what they were deleted of has been written anew and could be cleaned up.
        db.flush("acme", "snapshots")
        db.tick()
        assert numbers(before, "acme.snapshots") == everything
        fetched += [int(n) for (n,) in cursor.execute("FETCH ALL FROM c").fetchall()]
        assert sorted(fetched) == everything
        assert [int(n) for (n,) in cursor.execute("FETCH ALL FROM late").fetchall()] == everything
        before.rollback()
        assert numbers(before, "acme.snapshots") == odd


def test_what_comes_after_is_kept(db, stores):
    send(db, "acme", "later", range(100))
    with db.connect(autocommit=False) as open_transaction:
        collect(open_transaction, "acme", "later", {"n": 500, "_time": "2026-01-01T00:00:00Z"})
        # The caller's own are not covered either.
        assert one(open_transaction, DELETE, "acme", "later", "n >= 50") == 50
        open_transaction.commit()
    assert numbers(db.admin, "acme.later") == [*range(50), 500]
    send(db, "acme", "later", [60])
    assert numbers(db.admin, "acme.later") == [*range(50), 60, 500]
    db.flush("acme", "later")
    assert numbers(db.admin, "acme.later") == [*range(50), 60, 500]


def test_what_is_stored_while_the_call_waits_is_kept(db, stores):
    """It waits for a flush. Meanwhile a transaction that was in progress commits, and others begin; all is digested."""
    send(db, "lakeside", "waited", range(100))
    db.wait_column("lakeside.waited", "n")
    db.tick()
    db.configure(failpoint="flush.after_upload=sleep(60000)")
    with db.connect(autocommit=False) as in_progress:
        collect(in_progress, "lakeside", "waited", {"n": 500})
        _, flush, flushed = in_background(
            db, lambda session: session.execute("SELECT rakam.flush('lakeside', 'waited')").fetchall()
        )
        written = (
            "SELECT count(*) FROM rakam_internal.file_intent JOIN rakam_internal.collection USING (collection_id)"
            " WHERE name = 'waited'"
        )
        wait_until(lambda: db.one(written) > 0, "the flush")
        _, deletion, deleted = in_background(db, lambda session: delete(session, "lakeside", "waited", "n % 2 = 0"))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'rakam task' AND wait_event_type = 'Lock'"
        wait_until(lambda: db.one(waiting) == 1, "the deletion waits for the flush")
        in_progress.commit()
    send(db, "lakeside", "waited", [600, 602])
    # So many become a chunk in their own transaction.
    later = [*range(1000, 4000, 2)]
    db.admin.execute("INSERT INTO lakeside.waited (n) SELECT generate_series(1000, 3998, 2)")
    db.tick()
    assert db.tiers("lakeside", "waited")["inbox"] == 0
    assert (flushed, deleted) == ([], [])
    db.configure(failpoint=None)
    flush.join()
    deletion.join()
    assert deleted == [50]
    assert numbers(db.admin, "lakeside.waited") == [*range(1, 100, 2), 500, 600, 602, *later]
    assert delete(db.admin, "lakeside", "waited", "n % 2 = 0") == 3 + len(later)
    assert numbers(db.admin, "lakeside.waited") == [*range(1, 100, 2)]


def test_a_collection_not_seen_before(db, stores):
    collect(db.admin, "acme", "just_now", {"n": 1})
    assert delete(db.admin, "acme", "just_now", "n = 1") == 1
    with refused("42704"):
        delete(db.admin, "acme", "never_seen", "true")


def test_a_file_that_is_missing_stops_no_other(db, cluster, stores):
    """Files are written anew without deleted events, and merged, although one of the collection's cannot be read."""
    days = range(1, 5)
    for day in days:
        events = [("gaps", {"n": n, "_time": f"2026-02-{day:02}T10:00:00Z"}) for n in range(50)]
        collect_batch(db.admin, "lakeside", events)
        db.flush("lakeside", "gaps")
    paths = "SELECT path FROM rakam.data_files WHERE project = 'lakeside' AND collection = 'gaps' ORDER BY min_time"
    before = [path for (path,) in db.all(paths)]
    assert len(before) == len(days)
    assert delete(db.admin, "lakeside", "gaps", "n < 10") == 40
    gone = Path(before[0].removeprefix("file://"))
    aside = gone.rename(gone.with_suffix(".aside"))
    with refused("58P01"):
        db.flush("lakeside", "gaps")
    after = [path for (path,) in db.all(paths)]
    assert len(after) == len(days) and before[0] in after and not set(before[1:]) & set(after)
    # Nor does it stop what is asked for of all projects: the error comes at the end.
    collect(db.admin, "acme", "others", {"n": 1})
    with refused("58P01"):
        db.flush()
    assert db.tiers("acme", "others") == {"inbox": 0, "hot": 0, "cold": 1}
    aside.rename(gone)
    db.flush("lakeside", "gaps")
    assert before[0] not in [path for (path,) in db.all(paths)]
    assert db.one("SELECT count(*) FROM lakeside.gaps") == 160


def test_who_may(db, stores):
    send(db, "acme", "rights", range(10))
    db.tick()
    for kind in ("read", "write"):
        with refused("42501"):
            delete(db.login("acme", kind), "acme", "rights", "true")
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as forbidden:
        delete(db.login("lakeside", "admin"), "acme", "rights", "true")
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as unknown:
        delete(db.login("lakeside", "admin"), "nowhere", "rights", "true")
    assert str(forbidden.value).replace("acme", "nowhere") == str(unknown.value)
    for arguments in ((None, "rights", "true"), ("acme", None, "true"), ("acme", "rights", None)):
        with refused("22004"):
            db.admin.execute(DELETE, arguments)
    assert delete(db.login("acme", "admin"), "acme", "rights", "n = 1") == 1
    keys = db.admin.execute("SELECT master_key, write_key FROM rakam.create_keys('acme')").fetchone()
    db.make_login("shared_login")
    with db.connect("shared_login", autocommit=False) as session:
        session.execute("SELECT rakam.authenticate(%s)", [keys[0]])
        assert delete(session, "acme", "rights", "n = 2") == 1
        session.rollback()
        session.execute("SELECT rakam.authenticate(%s)", [keys[1]])
        with refused("42501"):
            delete(session, "acme", "rights", "n = 3")
    assert numbers(db.admin, "acme.rights") == [0, 3, 4, 5, 6, 7, 8, 9]


def test_the_table_itself_refuses_changes(db, stores):
    send(db, "acme", "fixed", range(5))
    db.tick()
    for statement in (
        "UPDATE acme.fixed SET n = 1",
        "DELETE FROM acme.fixed WHERE n = 1",
        "TRUNCATE acme.fixed",
    ):
        with refused("0A000", hint="rakam.delete_events"):
            db.admin.execute(statement)


@pytest.mark.parametrize(
    ("condition", "sqlstate", "position"),
    [
        ("", "42601", None),
        ("n = ", "42601", 5),
        ("n = 1; DROP TABLE acme.users", "42601", 6),
        ("true); DROP TABLE acme.users; SELECT (true", "42601", 5),
        ("true) OR (true", "42601", 5),
        ("true -- ", None, None),
        ("true /* ", "42601", None),
        ("n = 1 FROM acme.users", "42601", None),
        ("n = 1 WHERE true", "42601", None),
        ("n = 1, true", "42601", None),
        ("n = 1 LIMIT 1", "42601", None),
        ("n = 1 UNION SELECT true", "42601", 7),
        ("DISTINCT n = 1", "42601", None),
        ("DELETE FROM acme.users", "42601", None),
        ("missing = 1", "42703", 1),
        ("n = '2024-01-01'::date", "42883", 3),
        ("_time = 'x'", "22007", 9),
        ("n", "42804", 1),
        ("count(*) > 1", "42803", 1),
        ("$1", "42P02", 1),
        ("random() < 0.5", "0A000", None),
        ("nextval('rakam_internal.inbox_id') > 0", "0A000", None),
        ("_user IN (SELECT id FROM acme.users WHERE random() < 2)", "0A000", None),
        ("ctid = '(0,1)'", "0A000", None),
        ("1 / (n - 1) > 0", "22012", None),
        ("rakam_internal.nothing()", "42883", 1),
    ],
)
def test_conditions_refused(db, stores, condition, sqlstate, position):
    if not numbers_of(db, "refusals"):
        send(db, "acme", "refusals", range(3))
        db.tick()
    session = db.login("acme", "admin")
    if sqlstate is None:
        assert delete(session, "acme", "refusals", condition) == 3
        send(db, "acme", "refusals", range(3))
        return
    with pytest.raises(psycopg.Error) as error:
        delete(session, "acme", "refusals", condition)
    assert error.value.sqlstate == sqlstate, str(error.value)
    if position is not None:
        assert error.value.diag.internal_query == condition
        assert int(error.value.diag.internal_position) == position
    assert numbers(db.admin, "acme.refusals") == [0, 1, 2]
    assert db.one("SELECT to_regclass('acme.users') IS NOT NULL")


def numbers_of(db, collection: str) -> list[int]:
    if db.one("SELECT to_regclass(%s) IS NULL", f"acme.{collection}"):
        return []
    return numbers(db.admin, f"acme.{collection}")


def test_conditions_are_sql(db, stores):
    """What Postgres understands after WHERE, evaluated by Postgres, in the caller's time zone."""
    send(db, "acme", "rich", range(60), tags=["a", "b"], deep={"k": 1})
    db.flush("acme", "rich")
    session = db.login("acme", "admin")
    session.execute("INSERT INTO acme.users (id) VALUES ('u1'), ('u2')")
    session.execute("SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German, DMY'")
    left = list(range(60))

    def gone(condition: str, keep) -> None:
        expected = [n for n in left if not keep(n)]
        assert delete(session, "acme", "rich", condition) == len(expected), condition
        left[:] = [n for n in left if keep(n)]
        assert numbers(db.admin, "acme.rich") == left

    gone("_user IN (SELECT id FROM users)", lambda n: n % 7 not in (1, 2))
    gone("EXISTS (SELECT FROM rich r WHERE r.n = rich.n + 1 AND r._user = 'u4')", lambda n: not (n % 7 == 3 and n < 59))
    # 10:00 UTC is 19:00 in Tokyo: the day of the comparison is the caller's; so is the order of day and month.
    gone("_time < '05.01.2026 19:00'", lambda n: n % 28 >= 4)
    gone("text ~ '^t 4' AND tags @> ARRAY['a'] AND (deep ->> 'k')::int = 1", lambda n: not str(n).startswith("4"))
    gone("CASE WHEN n > 30 THEN text = 't 33' ELSE NULL END", lambda n: n != 33)
    gone("n = (SELECT max(r.n) FROM rich r) AND n > (SELECT count(*) FROM rich) / 10", lambda n: n != max(left))
    gone("n IS NULL OR false", lambda n: True)
    gone("rich.n = 20 AND rich IS DISTINCT FROM NULL", lambda n: n != 20)


def test_code_in_a_condition_gains_nothing(db, stores):
    """Functions of a condition run as the caller, read-only, restricted; and what they leave behind is undone."""
    send(db, "acme", "code", range(20))
    send(db, "lakeside", "secret", range(20))
    db.tick()
    mallory = db.login("acme", "admin", name="mallory_deletes")
    mallory.execute("CREATE TABLE acme.notes (who text)")
    body = "CREATE FUNCTION acme.{}(n bigint) RETURNS boolean LANGUAGE plpgsql STABLE AS $$ BEGIN {} END $$"

    def tries(name: str, code: str) -> psycopg.Error | int:
        mallory.execute(body.format(name, code))
        try:
            return delete(mallory, "acme", "code", f"{name}(n)")
        except psycopg.Error as error:
            return error

    become = "PERFORM set_config('role', 'postgres', false); RETURN true;"
    assert tries("becomes", become).sqlstate == "42501"
    assert (
        tries("session", "PERFORM set_config('session_authorization', 'postgres', true); RETURN true;").sqlstate
        == "42501"
    )
    assert (
        tries("who", "IF current_user <> 'mallory_deletes' THEN RAISE 'ran as %', current_user; END IF; RETURN n = 1;")
        == 1
    )
    assert tries("drops", "EXECUTE 'DROP TABLE acme.notes'; RETURN true;").sqlstate in ("0A000", "25006", "42501")
    # Declared as something it is not: the transaction is read-only all the same.
    mallory.execute(
        "CREATE FUNCTION acme.really_writes() RETURNS boolean LANGUAGE plpgsql VOLATILE AS"
        " $$ BEGIN INSERT INTO acme.notes VALUES (current_user); RETURN true; END $$"
    )
    assert tries("writes", "RETURN acme.really_writes();").sqlstate in ("0A000", "25006")
    assert tries("opens", "EXECUTE 'SET TRANSACTION READ WRITE'; RETURN acme.really_writes();").sqlstate in (
        "0A000",
        "25001",
        "25006",
    )
    assert tries("temps", "EXECUTE 'CREATE TEMP TABLE t (x int)'; RETURN true;").sqlstate in ("0A000", "25006", "42501")
    assert tries("sets", "PERFORM set_config('search_path', 'acme', false); RETURN n = 2;") == 1
    assert tries("peeks", "RETURN EXISTS (SELECT FROM lakeside.secret);").sqlstate == "42501"
    # A foreign table of one's own shows nothing of another project, and its owner nothing of the deletion's rights.
    mallory.execute(
        "CREATE FOREIGN TABLE acme.forged (n bigint) SERVER rakam OPTIONS (project 'lakeside', collection 'secret')"
    )
    assert delete(mallory, "acme", "code", "EXISTS (SELECT FROM acme.forged)") == 0
    assert (
        delete(mallory, "acme", "code", "n IN (SELECT object_id FROM rakam_internal.deletion WHERE project_id <> 1)")
        == 0
    )
    # An operator of the caller's schema does not stand in for Postgres'.
    mallory.execute(
        "CREATE FUNCTION acme.never(bigint, integer) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT false'"
    )
    mallory.execute("CREATE OPERATOR acme.= (LEFTARG = bigint, RIGHTARG = integer, FUNCTION = acme.never)")
    assert delete(mallory, "acme", "code", "n = 0 OR n = 3") == 2
    assert one(mallory, "SELECT count(*) FROM acme.notes") == 0
    assert numbers(db.admin, "acme.code") == [*range(4, 20)]
    assert db.one("SELECT count(*) FROM lakeside.secret") == 20
    # A function that reads the collection itself reads all of it, whichever scan tells the rows apart.
    send(db, "acme", "code", [100])
    assert tries("reads", "RETURN n = 100 AND (SELECT count(*) FROM acme.code) = 17;") == 1


def test_parked_events(db, stores):
    """Events that could not be digested yet are read all the same, and deleted by the same conditions."""
    send(db, "acme", "parked", range(10))
    db.tick()
    db.admin.execute(
        "INSERT INTO rakam_internal.inbox_parked (id, project_id, collection_id, collection, txid, n, received_at,"
        "   shift_us, payload, error, next_attempt)"
        " SELECT 1000000 + k, project_id, collection_id, name, '3'::xid8, 1, now(), 0,"
        "   convert_to(CASE k WHEN 5 THEN 'no event' ELSE json_build_object('n', 100 + k)::text END, 'UTF8'),"
        "   'for a test', now() + interval '1 day'"
        " FROM rakam_internal.collection, generate_series(0, 9) k WHERE name = 'parked'"
    )
    assert numbers(db.admin, "acme.parked") == [*range(10), *range(100, 105), *range(106, 110)]
    assert delete(db.admin, "acme", "parked", "n IN (3, 101, 107, 109)") == 4
    left = [n for n in [*range(10), *range(100, 105), *range(106, 110)] if n not in (3, 101, 107, 109)]
    assert numbers(db.admin, "acme.parked") == left
    assert db.one("SELECT count(*) FROM rakam_internal.inbox_parked WHERE error = 'for a test'") == 7
    db.admin.execute("DELETE FROM rakam_internal.inbox_parked WHERE error = 'for a test'")


def test_a_lock_of_the_caller(db, stores):
    send(db, "acme", "locked", range(10))
    db.tick()
    with db.connect(autocommit=False) as session:
        session.execute("ALTER FOREIGN TABLE acme.locked OPTIONS (SET collection 'locked')")
        with refused("55P03", hint="transaction"):
            delete(session, "acme", "locked", "true")
    # Reading it before is no obstacle.
    with db.connect(autocommit=False) as session:
        session.execute("SELECT * FROM acme.locked").fetchall()
        assert delete(session, "acme", "locked", "n < 5") == 5


def test_cancel(db, stores):
    send(db, "acme", "slow", range(500))
    db.tick()
    db.admin.execute(
        "CREATE FUNCTION acme.slowly(n bigint) RETURNS boolean LANGUAGE plpgsql STABLE"
        " AS $$ BEGIN PERFORM pg_sleep(0.1); RETURN true; END $$"
    )
    with db.connect() as session:
        session.execute("SET statement_timeout = '500ms'")
        start = time.monotonic()
        with refused("57014"):
            delete(session, "acme", "slow", "slowly(n)")
        # All of it takes 50 s.
        assert time.monotonic() - start < 30
    wait_until(
        lambda: db.one("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'rakam task'") == 0,
        "the worker's end",
    )
    assert len(numbers(db.admin, "acme.slow")) == 500


def test_races(db, stores):
    """Collectors, flushes, merges and deletions at once: a reader sees at each instant what cannot be otherwise."""
    ended = threading.Event()
    errors: list[str] = []
    sent = itertools.count()
    committed: list[int] = []
    deleted: set[int] = set()

    def worker(work):
        def run():
            try:
                with db.cluster.connect(db.name) as session:
                    while not ended.is_set():
                        work(session)
            except Exception as error:
                errors.append(f"{work.__name__}: {error}")
                ended.set()

        return threading.Thread(target=run, daemon=True)

    lock = threading.Lock()

    under_way: set[int] = set()

    def collecting(session):
        batch = [next(sent) for _ in range(25)]
        with lock:
            under_way.add(batch[0])
        collect_batch(
            session, "acme", [("raced", {"n": n, "_time": f"2026-01-{n % 5 + 1:02}T00:00:00Z"}) for n in batch]
        )
        with lock:
            committed.extend(batch)
            under_way.remove(batch[0])
        time.sleep(0.01)

    def flushing(session):
        session.execute("SELECT * FROM rakam.flush('acme', 'raced')")
        time.sleep(0.2)

    def ticking(session):
        session.execute("SELECT rakam.tick()")

    def deleting(session):
        with lock:
            known = set(committed)
        digit = random.randrange(50)
        doomed = {n for n in known - deleted if n % 50 == digit}
        count = delete(session, "acme", "raced", f"n % 50 = {digit}") if known else 0
        # What was collected while it ran may be among them or not; what was there before has to be.
        assert count >= len(doomed), f"{count} of {len(doomed)}"
        # Batches that were stored before it, but not noted yet: those of which the answer is still to come.
        with lock:
            unsure = set(under_way)
        wait_until(lambda: ended.is_set() or not unsure & under_way, "the answers to what was sent before")
        with lock:
            known = set(committed)
        there = {int(n) for (n,) in session.execute("SELECT n FROM acme.raced").fetchall()}
        assert not there & doomed
        with lock:
            deleted.update(n for n in known if n % 50 == digit and n not in there)
        assert not there & deleted

    def reading(session):
        with lock:
            known, gone = set(committed), set(deleted)
        rows = [int(n) for (n,) in session.execute("SELECT n FROM acme.raced").fetchall()]
        there = set(rows)
        assert len(rows) == len(there), "an event twice"
        assert not there & gone, "a deleted event came back"
        missing = known - there
        with lock:
            assert len({n % 50 for n in missing - deleted}) <= 1, "events missing that nobody deleted"

    send(db, "acme", "raced", [])
    collect(db.admin, "acme", "raced", {"n": -1})
    db.tick()
    threads = [worker(w) for w in (collecting, collecting, flushing, ticking, deleting, reading)]
    for thread in threads:
        thread.start()
    ended.wait(RACE_SECONDS)
    wait_until(lambda: ended.is_set() or deleted, "something deleted", 120)
    ended.set()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert deleted
    rows = numbers(db.admin, "acme.raced")
    assert sorted(set(rows)) == rows
    assert set(rows) == set(committed) - deleted | {-1}
    db.flush("acme", "raced")
    assert numbers(db.admin, "acme.raced") == rows
    assert sum(db.tiers("acme", "raced").values()) == len(rows)
