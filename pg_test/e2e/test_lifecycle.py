"""Installing, removing, starting and stopping: the extension, its workers, databases, servers without preload."""

from __future__ import annotations

import os
import signal
import time

import psycopg
import pytest
from harness.database import Database, collect, in_background, notices_of, one, refused, wait_until


def test_worker_starts_after_create_extension(db):
    pid = wait_until(db.worker_pid, "the resident worker")
    row = db.all(
        "SELECT database, kind, state IS NOT NULL, since IS NOT NULL, restarts FROM rakam.stat_worker WHERE pid = %s",
        pid,
    )
    assert row == [(db.name, "resident", True, True, 0)]
    assert pid in db.cluster.processes()


def test_killed_worker_comes_back(db):
    pid = wait_until(db.worker_pid, "the resident worker")
    db.admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
    wait_until(lambda: db.worker_pid() not in (pid, None), "another resident worker")
    db.project("after_restart")
    collect(db.admin, "after_restart", "c", {"n": 1})
    wait_until(lambda: db.tiers("after_restart", "c")["hot"] == 1, "a digest by the new worker")


def test_drop_extension_stops_the_worker_and_create_starts_it_again(cluster):
    db = Database(cluster, "dropped_extension")
    db.drop()
    db.create()
    try:
        for _ in range(2):
            pid = wait_until(db.worker_pid, "the resident worker")
            db.project("acme")
            collect(db.admin, "acme", "c", {"n": 1})
            db.tick()
            db.admin.execute("DROP EXTENSION rakam CASCADE")
            wait_until(lambda pid=pid: pid not in cluster.processes(), "the end of the worker")
            assert db.one("SELECT count(*) FROM pg_foreign_table") == 0
            drop_leftovers(db)
            db.admin.execute("CREATE EXTENSION rakam")
    finally:
        db.drop()


def test_an_extension_created_again_at_once_has_a_worker_of_its_own(cluster):
    """In one transaction: the worker, which slept meanwhile, remembers chunks and ids that are no more."""
    db = Database(cluster, "created_again")
    db.drop()
    db.create()
    try:
        db.project("acme")
        for n in range(3):
            db.admin.execute("CREATE TABLE IF NOT EXISTS thousand AS SELECT n FROM generate_series(1, 2000) n")
            collect(db.admin, "acme", "c", {"n": n})
            db.tick()
            db.admin.execute("INSERT INTO acme.c (n) SELECT n FROM thousand")
        db.configure(flush_max_age="1s", flush_interval="1s")
        pid = wait_until(db.worker_pid, "the resident worker")
        wait_until(lambda: db.tiers("acme", "c") == {"inbox": 0, "hot": 0, "cold": 6003}, "the first worker's flush")
        db.admin.execute("BEGIN; DROP EXTENSION rakam CASCADE; CREATE EXTENSION rakam; COMMIT")
        drop_leftovers(db)
        db.project("acme")
        collect(db.admin, "acme", "c", {"n": 1})
        wait_until(lambda: db.tiers("acme", "c") == {"inbox": 0, "hot": 0, "cold": 1}, "the flush by a new worker")
        assert db.worker_pid() != pid
    finally:
        db.configure(flush_max_age=None, flush_interval=None)
        db.drop()


def test_an_extension_created_in_a_long_transaction_has_a_worker(cluster):
    """Whoever waits for its commit gives up, or belongs to the one before: the commit says that a worker is wanted."""
    db = Database(cluster, "created_late")
    db.drop()
    db.create()
    try:
        wait_until(db.worker_pid, "the resident worker")
        observer = db.connect()
        # At once: the one before is still there, and nobody waits for the new one.
        db.admin.execute("DROP EXTENSION rakam CASCADE")
        db.admin.execute("BEGIN; CREATE EXTENSION rakam")
        wait_until(lambda: not residents(observer), "the worker of the one before has ended")
        time.sleep(1)
        db.admin.execute("COMMIT")
        wait_until(db.worker_pid, "the resident worker", 25)
    finally:
        db.drop()


def residents(session: psycopg.Connection) -> int:
    resident = "datname = current_database() AND backend_type = 'rakam resident'"
    return one(session, f"SELECT count(*) FROM pg_stat_activity WHERE {resident}")


def drop_leftovers(db: Database) -> None:
    """The project's schema and roles are the user's; they do not go with the extension."""
    db.admin.execute("DROP SCHEMA IF EXISTS acme CASCADE")
    for kind in ("read", "write", "admin"):
        if db.one("SELECT count(*) FROM pg_roles WHERE rolname = %s", f"rakam_acme_{kind}"):
            db.admin.execute(f"DROP OWNED BY rakam_acme_{kind} CASCADE")
            db.admin.execute(f"DROP ROLE rakam_acme_{kind}")


def test_drop_database_with_a_running_worker(cluster):
    db = Database(cluster, "dropped_database")
    db.drop()
    db.create()
    pid = wait_until(db.worker_pid, "the resident worker")
    db.project("acme")
    collect(db.admin, "acme", "c", {"n": 1})
    db.close()
    with cluster.connect() as postgres:
        # Postgres itself gives the worker five seconds to leave.
        postgres.execute("DROP DATABASE dropped_database")
    wait_until(lambda: pid not in cluster.processes(), "the end of the worker")
    db.drop()


def test_create_database_from_a_template_with_a_worker(cluster, db):
    """CREATE DATABASE … TEMPLATE needs the template free of sessions; a worker must not be in the way for long."""
    wait_until(db.worker_pid, "the resident worker")
    db.close()
    copy = Database(cluster, "copied")
    copy.drop()
    with cluster.connect() as postgres:
        postgres.execute(f"CREATE DATABASE copied TEMPLATE {db.name}")
    try:
        wait_until(copy.worker_pid, "a worker in the copy")
    finally:
        copy.drop()


def test_three_databases_with_the_default_number_of_worker_slots(cluster):
    databases = [Database(cluster, f"three_{n}") for n in range(3)]
    for database in databases:
        database.drop()
    try:
        for database in databases:
            database.create()
        for number, database in enumerate(databases):
            wait_until(database.worker_pid, f"a worker in database {number}")
            database.project(f"p{number}")
            collect(database.admin, f"p{number}", "c", {"n": number})
            database.tick()
            assert database.one(f"SELECT sum(n) FROM p{number}.c") == number
    finally:
        for database in databases:
            database.drop()


def test_no_free_worker_slot_is_a_warning_not_a_spin(private_cluster):
    """Four slots: Postgres' own replication launcher and ours take two, two databases the others; three want one."""
    cluster = private_cluster("slots", {"max_worker_processes": "4"})
    databases = [Database(cluster, f"slots_{n}") for n in range(3)]
    for database in databases:
        database.create()
        database.project(f"p_{database.name}")
    # A database with a worker works; a call that needs a slot of its own says that there is none.
    served = wait_until(lambda: [d for d in databases if d.worker_pid()], "a database with a worker")[0]
    collect(served.admin, f"p_{served.name}", "c", {"n": 1})
    wait_until(lambda: served.one(f"SELECT to_regclass('p_{served.name}.c') IS NOT NULL"), "a table")
    wait_until(lambda: sum(d.worker_pid() is not None for d in databases) == 2, "two databases with a worker")
    with refused("53000", hint="max_worker_processes"):
        served.tick()
    starved = next(database for database in databases if database.worker_pid() is None)
    # It can still collect, and it shows in rakam.stat_worker, once and not in a loop in the log.
    with refused("53000", hint="max_worker_processes"):
        starved.admin.execute(f"SELECT rakam.create_collection('p_{starved.name}', 'c')")
    collect(starved.admin, f"p_{starved.name}", "c", {"n": 1})
    assert starved.one(f"SELECT count(*) FROM p_{starved.name}._all") == 1
    assert starved.all(
        "SELECT state, last_error FROM rakam.stat_worker WHERE database = current_database() AND pid IS NULL"
    )
    time.sleep(5)
    warnings = [line for line in cluster.log_since().splitlines() if "WARNING" in line]
    assert 1 <= len(warnings) <= 10, warnings[:20]
    for database in databases:
        database.close()


def test_databases_without_the_extension_need_no_worker(private_cluster):
    """Two slots are free for workers: one is kept by the database with rakam, in the other the rest are looked into."""
    settings = {"max_worker_processes": "4"}
    cluster = private_cluster("plain", settings)
    plain = [Database(cluster, f"plain_{n}") for n in range(10)]
    for database in plain[:5]:
        database.create(extension=False).close()
    db = Database(cluster, "with_rakam").create()
    wait_until(db.worker_pid, "the resident worker")
    db.close()
    for database in plain[5:]:
        database.create(extension=False).close()
    mark = cluster.log_mark()
    cluster.restart(settings)
    wait_until(db.worker_pid, "the resident worker after a restart")
    time.sleep(15)
    assert "has no worker" not in cluster.log_since(mark)
    # One of those that were found without it.
    plain[7].admin.execute("CREATE EXTENSION rakam")
    wait_until(plain[7].worker_pid, "its worker")
    assert db.worker_pid()
    for database in (db, plain[7]):
        database.close()


def test_without_preload(private_cluster):
    cluster = private_cluster("nopreload", {"shared_preload_libraries": ""})
    db = Database(cluster, "nopreload").create(extension=False)
    told = notices_of(db.admin, "CREATE EXTENSION rakam")
    about = [notice for notice in told if "shared_preload_libraries" in f"{notice.message} {notice.hint}"]
    assert len(about) == 1
    assert about[0].severity == "NOTICE"
    assert about[0].hint
    db.project("acme")
    assert db.worker_pid() is None
    for n in range(10):
        collect(db.admin, "acme", "c", {"n": n})
    db.tick()
    assert db.one("SELECT sum(n) FROM acme.c") == 45
    assert db.tiers("acme", "c") == {"inbox": 0, "hot": 10, "cold": 0}
    db.flush("acme")
    assert db.tiers("acme", "c") == {"inbox": 0, "hot": 0, "cold": 10}
    assert db.one("SELECT sum(n) FROM acme.c") == 45
    db.close()


def test_encoding_must_be_utf8(cluster):
    with cluster.connect() as postgres:
        postgres.execute("DROP DATABASE IF EXISTS latin")
        postgres.execute("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    with cluster.connect("latin") as session, refused("0A000"):
        session.execute("CREATE EXTENSION rakam")
    with cluster.connect() as postgres:
        postgres.execute("DROP DATABASE latin")


def test_projects_come_and_go(db):
    db.project("shortlived")
    collect(db.admin, "shortlived", "c", {"n": 1})
    db.tick()
    with refused("55000", hint="rakam.allow_project_drop"):
        db.admin.execute("SELECT rakam.drop_project('shortlived')")
    db.admin.execute("SET rakam.allow_project_drop = on")
    db.admin.execute("SELECT rakam.drop_project('shortlived')")
    db.admin.execute("RESET rakam.allow_project_drop")
    assert db.one("SELECT count(*) FROM rakam.projects WHERE project = 'shortlived'") == 0
    assert db.one("SELECT count(*) FROM pg_namespace WHERE nspname = 'shortlived'") == 0
    assert db.one("SELECT count(*) FROM pg_roles WHERE rolname ~ '^rakam_shortlived_'") == 0
    for table in ("collection", "field", "hot_chunk", "data_file", "api_key"):
        left = db.one(
            f"SELECT count(*) FROM rakam_internal.{table} t WHERE to_jsonb(t) ? 'project_id'"
            " AND NOT EXISTS (SELECT FROM rakam_internal.project p WHERE p.project_id = t.project_id)"
        )
        assert left == 0, table
    db.project("shortlived")
    collect(db.admin, "shortlived", "c", {"n": 2})
    db.tick()
    assert db.one("SELECT sum(n) FROM shortlived.c") == 2


def finding(db, check):
    return db.all('SELECT status, detail, hint FROM rakam.health() WHERE "check" = %s', check)


def test_an_open_drop_of_a_project_holds_up_nobody_else(db):
    """In a transaction that stays open, rolled back, prepared and committed."""
    for project in ("going", "staying"):
        db.project(project)
        for n in range(40):
            collect(db.admin, project, "c", {"n": n, "_id": str(n)})
        db.tick()
        # More than there is to merge, and something for each step of the upkeep.
        db.admin.execute("SELECT rakam.create_collection(%s, 'empty')", (project,))
        db.admin.execute("SELECT rakam.rename_collection(%s, 'empty', 'still_empty')", (project,))
    staying = 40

    def goes_on(events: int) -> int:
        for n in range(events, events + 3):
            collect(db.admin, "staying", "c", {"n": n, "_id": str(n), f"f{n}": n})
        db.wait_column("staying.c", f"f{events + 2}")
        wait_until(lambda: db.tiers("staying", "c")["inbox"] == 0, "a digest of the other project")
        session = db.connect(options="-c statement_timeout=60s")
        session.execute("SELECT rakam.tick()")
        assert db.one("SELECT count(*) FROM staying.c") == events + 3
        return events + 3

    session = db.connect(autocommit=False)
    session.execute("SET rakam.allow_project_drop = on")
    session.commit()
    session.execute("SELECT rakam.drop_project('going')")
    # Its events come in all the same, and wait.
    collect(db.admin, "going", "c", {"n": 40, "late": True})
    staying = goes_on(staying)
    [(status, detail, hint)] = finding(db, "projects being dropped")
    assert status == "warning", detail
    assert "going" in detail and f"process {session.info.backend_pid}" in detail, detail
    assert "roll" in hint
    session.rollback()
    wait_until(lambda: db.tiers("going", "c")["inbox"] == 0, "a digest after the rollback")
    assert db.one("SELECT count(*) FROM going.c") == 41
    assert not finding(db, "projects being dropped")

    session.execute("SELECT rakam.drop_project('going')")
    session.execute("PREPARE TRANSACTION 'drops going'")
    collect(db.admin, "going", "c", {"n": 41})
    collect(db.admin, "going", "unknown", {"n": 41})
    staying = goes_on(staying)
    [(_, detail, _)] = finding(db, "projects being dropped")
    assert 'prepared transaction "drops going"' in detail, detail
    db.admin.execute("COMMIT PREPARED 'drops going'")
    staying = goes_on(staying)
    assert not finding(db, "projects being dropped")
    assert finding(db, "inbox")[0][0] != "warning"
    for table in ("collection", "hot_chunk", "id_run", "inbox_lag", "manifest_log"):
        left = f"SELECT count(*) FROM rakam_internal.{table} t LEFT JOIN rakam_internal.project p USING (project_id)"
        wait_until(lambda left=left: db.one(left + " WHERE p.name IS NULL") == 0, f"nothing of it in {table}")


def test_an_open_drop_of_a_project_that_is_being_flushed_holds_up_nobody_else(private_cluster):
    """Its flush gives up, and so do the notes of how that went; the others' data files are written as ever."""
    cluster = private_cluster("flushing", {"rakam.flush_interval": "1s", "rakam.min_file_events": "1"})
    db = Database(cluster, "flushing").create()
    folder = cluster.make_folder("flushing-lake")
    db.admin.execute(f"CREATE SERVER flushing_lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.project("flushing", "flushing_lake")
    db.project("waiting")
    written = "SELECT count(*) FROM rakam.data_files WHERE project = %s"
    db.configure(failpoint="flush.after_upload=sleep(20000)")
    collect(db.admin, "flushing", "c", {"n": 1})
    wait_until(lambda: db.one("SELECT count(*) FROM rakam_internal.file_intent") > 0, "the flush")
    session = db.connect(autocommit=False)
    drop_project(session, "flushing")
    db.configure(failpoint=None)
    for n in range(3):
        collect(db.admin, "waiting", "c", {"n": n})
        wait_until(lambda n=n: db.one(written, "waiting") > n, "a file of the other project", 60)
    session.rollback()
    wait_until(lambda: db.one(written, "flushing") > 0, "its own file", 60)
    assert db.one("SELECT sum(n) FROM flushing.c") == 1
    db.close()


def test_a_drop_sees_everything_that_is_to_go(db):
    db.project("newer")
    collect(db.admin, "newer", "c", {"n": 1})
    session = db.connect(autocommit=False)
    for level in ("REPEATABLE READ", "SERIALIZABLE"):
        session.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        session.execute("SET LOCAL rakam.allow_project_drop = on")
        with refused("55000", hint="READ COMMITTED"):
            session.execute("SELECT rakam.drop_project('newer')")
        session.rollback()
    drop_project(session, "newer")
    session.commit()


def test_lost_privileges_are_given_back(db):
    db.project("robbed")
    collect(db.admin, "robbed", "c", {"n": 1})
    db.tick()
    reader, writer = db.login("robbed", "read"), db.login("robbed", "write")
    assert finding(db, "roles")[0][0] == "ok"
    db.admin.execute("DROP OWNED BY rakam_robbed_read, rakam_robbed_write")
    with refused("42501"):
        reader.execute("SELECT * FROM robbed.c")
    [(status, detail, hint)] = finding(db, "roles")
    assert (status, "robbed" in detail, "repair_roles" in hint) == ("error", True, True), detail
    repaired = db.all("SELECT project, role FROM rakam.repair_roles() ORDER BY role")
    assert repaired == [("robbed", "rakam_robbed_read"), ("robbed", "rakam_robbed_write")]
    assert reader.execute("SELECT n FROM robbed.c").fetchall() == [(1,)]
    assert reader.execute("SELECT count(*) FROM robbed._all").fetchone() == (1,)
    writer.execute("INSERT INTO robbed.c (n) VALUES (2)")
    assert finding(db, "roles")[0][0] == "ok"
    assert db.all("SELECT * FROM rakam.repair_roles()") == []


def test_who_runs_projects_need_not_be_a_superuser(db):
    """A member of rakam_admin creates and drops projects, and nobody else does."""
    db.make_login("runs_projects")
    db.admin.execute("GRANT rakam_admin TO runs_projects")
    session = db.connect("runs_projects")
    session.execute("SELECT * FROM rakam.create_project('theirs')")
    with refused("55000", hint="rakam.allow_project_drop"):
        session.execute("SELECT rakam.drop_project('theirs')")
    session.execute("SET rakam.allow_project_drop = on")
    db.make_login("runs_nothing")
    other = db.connect("runs_nothing")
    other.execute("SET rakam.allow_project_drop = on")
    with refused("42501"):
        other.execute("SELECT rakam.drop_project('theirs')")
    session.execute("SELECT rakam.drop_project('theirs')")
    assert db.one("SELECT count(*) FROM rakam.projects WHERE project = 'theirs'") == 0


def test_a_foreign_role_of_that_name_is_refused(db):
    db.admin.execute("CREATE ROLE rakam_taken_read NOLOGIN")
    with pytest.raises(psycopg.Error) as caught:
        db.project("taken")
    assert caught.value.sqlstate == "42710", caught.value
    assert db.one("SELECT count(*) FROM rakam.projects WHERE project = 'taken'") == 0
    db.admin.execute("DROP ROLE rakam_taken_read")


def test_health(db):
    db.project("healthy")
    collect(db.admin, "healthy", "c", {"n": 1})
    db.tick()
    rows = db.all('SELECT "check", status, detail, hint FROM rakam.health()')
    assert rows
    assert {status for _, status, _, _ in rows} <= {"ok", "info", "warning", "error"}
    assert len({check for check, _, _, _ in rows}) >= 4
    assert not [row for row in rows if row[1] in ("warning", "error")], rows
    # A transaction that holds the horizon is somebody's mistake more often than not; health names its pid.
    assert all(detail for _, _, detail, _ in rows)


def test_stat_collection(db):
    db.project("counted")
    for n in range(5):
        collect(db.admin, "counted", "c", {"n": n, "_time": "2026-01-01T00:00:00Z"})
    db.flush("counted")
    collect(db.admin, "counted", "c", {"n": "not a number"})
    db.tick()
    row = db.admin.execute("SELECT * FROM rakam.stat_collection WHERE project = 'counted'")
    assert [column.name for column in row.description] == [
        "project", "collection", "events", "inbox_events", "hot_events", "hot_bytes", "cold_events", "cold_bytes",
        "files", "duplicates", "invalid_values", "last_event_at", "freshness_s",
    ]  # fmt: skip
    names = [column.name for column in row.description]
    stat = dict(zip(names, row.fetchone(), strict=True))
    assert (stat["events"], stat["inbox_events"], stat["hot_events"], stat["cold_events"]) == (6, 0, 1, 5)
    assert stat["files"] == 1
    assert stat["cold_bytes"] > 0
    assert stat["hot_bytes"] > 0
    assert stat["invalid_values"] == 1
    files = db.all("SELECT period, first_day::text, last_day::text, n FROM rakam.data_files WHERE project = 'counted'")
    assert files == [("year", "2026-01-01", "2026-12-31", 5)]


def test_hanging_client_does_not_stop_the_server(cluster, db):
    """A fast shutdown ends a session in the middle of a scan."""
    db.project("stopping")
    db.admin.execute("SELECT rakam.collect_batch('stopping', (SELECT jsonb_agg(jsonb_build_object('collection', 'c',"
                     " 'properties', jsonb_build_object('n', g))) FROM generate_series(1, 5000) g))")  # fmt: skip
    db.tick()
    session = db.connect()
    pid = session.info.backend_pid
    with session.cursor() as cursor:
        cursor.execute("SELECT n FROM stopping.c LIMIT 1")
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: pid not in cluster.processes(), "the end of the session")
    assert db.one("SELECT count(*) FROM stopping.c") == 5_000


def test_everything_that_users_see_is_described(db):
    undescribed = db.all(
        "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'rakam'::regnamespace"
        " AND obj_description(oid, 'pg_proc') IS NULL UNION ALL"
        " SELECT oid::regclass::text FROM pg_class WHERE relnamespace = 'rakam'::regnamespace AND relkind = 'v'"
        " AND obj_description(oid, 'pg_class') IS NULL"
    )
    assert undescribed == []


def test_a_project_dropped_during_a_merge_leaves_no_events(db):
    db.admin.execute("SET rakam.allow_project_drop = on")
    project_id = "SELECT project_id FROM rakam_internal.project WHERE name = 'merged'"
    db.project("merged")
    db.admin.execute("SELECT rakam.create_collection('merged', 'page')")
    db.admin.execute("SELECT rakam.add_field('merged', 'page', 'n', 'bigint')")
    db.wait_column("merged.page", "n")
    number = db.one(project_id)
    db.configure(failpoint="merge.before_commit=sleep(60000)")
    for _ in range(12):
        db.admin.execute("INSERT INTO merged.page (n) SELECT generate_series(1, 1000)")
    at_it = (
        "SELECT count(*) FROM pg_stat_activity WHERE query = 'rakam merge' AND backend_xid IS NOT NULL"
        " AND datname = current_database()"
    )
    wait_until(lambda: db.one(at_it) == 1, "the merge")
    _, thread, outcome = in_background(db, lambda session: drop_project(session, "merged"))
    blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%%drop_project%%'"
    wait_until(lambda: outcome or db.one(blocked) == 1, "the drop waits for the merge")
    db.configure(failpoint=None)
    thread.join()
    assert outcome == [None]
    assert db.one("SELECT count(*) FROM rakam_internal.hot_chunk WHERE project_id = %s", number) == 0


def test_a_project_dropped_during_an_insert_leaves_no_events(db):
    """The insert goes straight into a chunk; the drop waits for its transaction."""
    db.project("filled")
    db.admin.execute("SELECT rakam.create_collection('filled', 'page')")
    db.admin.execute("SELECT rakam.add_field('filled', 'page', 'n', 'bigint')")
    db.wait_column("filled.page", "n")
    number = db.one("SELECT project_id FROM rakam_internal.project WHERE name = 'filled'")
    writer = db.connect(autocommit=False)
    writer.execute("INSERT INTO filled.page (n) SELECT generate_series(1, 3000)")
    _, thread, outcome = in_background(db, lambda session: drop_project(session, "filled"))
    blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%%drop_project%%'"
    wait_until(lambda: outcome or db.one(blocked) == 1, "the drop waits for the insert")
    writer.commit()
    thread.join()
    assert outcome == [None]
    assert db.one("SELECT count(*) FROM rakam_internal.hot_chunk WHERE project_id = %s", number) == 0


def drop_project(session, project: str) -> None:
    session.execute("SET rakam.allow_project_drop = on")
    session.execute("SELECT rakam.drop_project(%s)", (project,))


def test_a_collection_that_took_the_name_is_not_dropped(db):
    """While a call waits for the locks of the collection that it found, the name becomes another's."""
    db.project("renames")
    for name in ("one", "two"):
        collect(db.admin, "renames", name, {"n": 1})
    db.tick()
    db.configure(failpoint="flush.after_intent=sleep(60000)")
    _, flush, flushed = in_background(db, lambda session: session.execute("SELECT rakam.flush('renames', 'one')"))
    job = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 102 AND granted = %s"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    wait_until(lambda: flushed or db.one(job, True) == 1, "the flush")
    call = "SELECT rakam.drop_collection('renames', 'one')"
    _, drop, dropped = in_background(db, lambda session: session.execute(call))
    wait_until(lambda: dropped or db.one(job, False) == 1, "the call waits")
    # What two calls of rename_collection do that were there before.
    for old, new in (("one", "first"), ("two", "one")):
        db.admin.execute("UPDATE rakam_internal.collection SET name = %s WHERE name = %s", (new, old))
    db.configure(failpoint=None)
    flush.join()
    drop.join()
    assert [getattr(error, "sqlstate", None) for error in dropped] == ["40001"]
    left = db.all("SELECT collection FROM rakam.collections WHERE project = 'renames' ORDER BY 1")
    assert left == [("first",), ("one",)]
