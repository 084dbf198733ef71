"""Background workers under odd conditions: calls given up at any moment, settings made for everybody, statements that need
a database for themselves."""

from __future__ import annotations

import contextlib
import time

import psycopg
import pytest
from harness.database import Database, collect, in_background, one, refused, wait_until
from harness.lake import health

CALLS = 60


def limit(session: psycopg.Connection, timeout_ms: int) -> None:
    """Under the limit before, which may end this statement, too."""
    while True:
        with contextlib.suppress(psycopg.errors.QueryCanceled):
            session.execute(f"SET statement_timeout = {timeout_ms}")
            return


def test_calls_given_up_early_leave_the_server_alone(db, seed):
    db.project("acme")
    session = db.connect()
    outcomes: dict[str | None, int] = {}
    for n in range(CALLS):
        collect(db.admin, "acme", "page", {"n": n})
        if n % 12 == 0:
            # What a call takes here and now.
            began = time.monotonic()
            db.tick()
            whole_ms = (time.monotonic() - began) * 1000
        # Most calls end before their worker has looked for its request, or while it works.
        limit(session, max(1, round(whole_ms * (n % 12) / 12)))
        try:
            session.execute("SELECT rakam.tick()")
            outcome = None
        except psycopg.Error as error:
            outcome = error.sqlstate
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    limit(session, 0)
    assert set(outcomes) <= {None, "57014", "53000"}, outcomes
    assert outcomes.get("57014", 0) > CALLS // 4, outcomes
    db.tick()
    assert one(session, "SELECT count(*) FROM acme.page") == CALLS


def test_workers_of_others_count_for_everybody(db):
    """Who sees no workers of others in pg_stat_activity has no more of them than `rakam.max_workers` allows."""
    db.project("crowd")
    db.admin.execute("SELECT rakam.create_collection('crowd', 'c')")
    collect(db.admin, "crowd", "c", {"n": 1})
    db.tick()
    db.flush("crowd")
    db.configure(max_workers=1)
    other = db.login("crowd", "admin")
    other.execute(
        "CREATE FUNCTION crowd.nap() RETURNS bool LANGUAGE plpgsql STABLE AS $$BEGIN PERFORM pg_sleep(60); RETURN false; END$$"
    )
    sleeper, thread, _ = in_background(
        db, lambda session: session.execute("SELECT rakam.delete_events('crowd', 'c', 'crowd.nap()')")
    )
    running = "SELECT count(*) FROM rakam.stat_worker WHERE kind = 'task'"
    try:
        wait_until(lambda: one(other, running) == 1, "the task is seen by a member, too")
        for call in ("rakam.flush('crowd')", "rakam.tick()"):
            with refused("53000", hint="rakam.max_workers"):
                other.execute(f"SELECT {call}")
    finally:
        sleeper.cancel()
        thread.join()
        db.configure(max_workers=None)


def test_settings_made_for_everybody_do_not_stop_the_workers(cluster):
    """ALTER DATABASE … SET reaches background workers too."""
    db = Database(cluster, "workers_settings")
    db.drop()
    db.create()
    try:
        db.project("everybody")
        for setting in (
            "default_transaction_read_only = on",
            "default_transaction_isolation = 'serializable'",
            "statement_timeout = 1",
            "lock_timeout = 1",
            "row_security = off",
            "session_replication_role = replica",
            "search_path = pg_temp",
            *(["transaction_timeout = 1"] if db.admin.info.server_version >= 170000 else []),
        ):
            db.admin.execute(f"ALTER DATABASE {db.name} SET {setting}")
        pid = wait_until(db.worker_pid, "the resident worker")
        db.admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
        wait_until(lambda: db.worker_pid() not in (None, pid), "a worker with the new settings")
        collect(db.admin, "everybody", "page", {"n": 1})
        wait_until(lambda: db.tiers("everybody", "page")["hot"] == 1, "the digest")
        collect(db.admin, "everybody", "page", {"n": 2})
        assert db.flush("everybody") == [("page", 2, 1, db.one("SELECT sum(bytes) FROM rakam.data_files"))]
        assert db.one("SELECT count(n) FROM everybody.page") == 2
    finally:
        db.drop()


def test_autovacuum_learns_what_workers_wrote(db):
    """A worker lives for long: its counts must not wait for its end."""

    def counted() -> bool:
        collect(db.admin, "counts", "page", {"n": 1})
        return db.one("SELECT n_tup_ins > 0 FROM pg_stat_all_tables WHERE relid = 'rakam_internal.hot_chunk'::regclass")

    db.project("counts")
    wait_until(counted, "rows written by the worker in the statistics", pause_s=0.5)


def test_a_table_that_cannot_be_made_keeps_nobody_busy(cluster):
    """It is looked for when its turn comes, later each time."""
    db = Database(cluster, "workers_obstructed")
    db.drop()
    db.create()
    try:
        db.project("crowded")
        db.admin.execute("CREATE TABLE crowded.page ()")
        collect(db.admin, "crowded", "page", {"n": 1})
        wait_until(lambda: "page" in health(db, "schema")[0][1], "the table in the way is told")
        looked = """SELECT seq_scan + coalesce(idx_scan, 0) FROM pg_stat_all_tables
                    WHERE relid = 'rakam_internal.field'::regclass"""
        time.sleep(4)
        before = db.one(looked)
        time.sleep(6)
        assert db.one(looked) - before < 15
        db.admin.execute("DROP TABLE crowded.page")
        wait_until(lambda: db.one("SELECT to_regclass('crowded.page') IS NOT NULL"), "the table")
        assert db.all("SELECT n FROM crowded.page") == [(1,)]
    finally:
        db.drop()


def test_statements_that_need_a_database_for_themselves(private_cluster):
    cluster = private_cluster("workers")
    template = Database(cluster, "template1")
    template.admin.execute("CREATE EXTENSION rakam")
    wait_until(template.worker_pid, "the resident worker of template1")
    with cluster.connect() as postgres:
        postgres.execute("CREATE ROLE creator LOGIN CREATEDB")
    template.close()
    with cluster.connect("postgres", "creator") as creator:
        # Its template is template1, which is not its own.
        creator.execute("CREATE DATABASE made")
    for name, statement in (
        ("made", "ALTER DATABASE made RENAME TO renamed"),
        ("renamed", "ALTER DATABASE renamed SET TABLESPACE pg_default"),
    ):
        db = Database(cluster, name)
        wait_until(db.worker_pid, f"the resident worker of {name}")
        db.close()
        with cluster.connect() as postgres:
            postgres.execute(statement)


def test_errors_of_utility_statements_are_as_without_the_extension(db):
    """The hook that makes way for DROP DATABASE sees every utility statement of the server."""
    with pytest.raises(psycopg.errors.DivisionByZero) as error:
        db.admin.execute("DO $$ BEGIN PERFORM 1 / 0; END $$")
    assert "PL/pgSQL function inline_code_block line 1" in error.value.diag.context
    db.admin.execute("CREATE TABLE plain (n int CONSTRAINT small CHECK (n < 10))")
    copy_in = "COPY plain FROM STDIN"
    with (
        pytest.raises(psycopg.errors.InvalidTextRepresentation) as error,
        db.admin.cursor().copy(copy_in) as copy,
    ):
        copy.write("1\nx\n")
    assert 'COPY plain, line 2, column n: "x"' in error.value.diag.context
    with pytest.raises(psycopg.errors.CheckViolation) as error, db.admin.cursor().copy(copy_in) as copy:
        copy.write("11\n")
    assert (error.value.diag.constraint_name, error.value.diag.table_name) == ("small", "plain")
    with pytest.raises(psycopg.errors.UndefinedTable) as error:
        db.admin.execute("CREATE VIEW v AS SELECT * FROM nothing_there")
    assert error.value.diag.statement_position == "32"
    db.admin.execute("DROP TABLE plain")
