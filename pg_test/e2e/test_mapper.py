"""Mappers, dead letters and their replay, and the mappers that come with rakam (SPEC: sources, last bullet)."""

from __future__ import annotations

import json
import struct
import threading
import time
from datetime import UTC, datetime

import psycopg
import pytest
from harness.database import collect, collect_batch, notices_of, one, refused, wait_until

PROJECT = "acme"


@pytest.fixture(scope="module")
def owner(db, keys):
    """An admin of the project who is nothing else: may make functions in the project's schema."""
    return db.login(PROJECT, "admin")


@pytest.fixture
def collection(db, keys, request):
    """A collection of its own for each test, its table already there."""
    name = request.node.name.split("[")[0].removeprefix("test_")[:50]
    db.admin.execute("SELECT rakam.create_collection(%s, %s)", (PROJECT, name))
    db.admin.execute("DELETE FROM rakam_internal.dead_letter")
    yield name
    db.admin.execute("SELECT rakam.set_mapper(%s, NULL, NULL)", (PROJECT,))


def make(session: psycopg.Connection, name: str, body: str, batch: bool = False, more: str = "") -> None:
    ty = "jsonb[]" if batch else "jsonb"
    session.execute(
        f"CREATE OR REPLACE FUNCTION acme.{name}(event {ty}) RETURNS {ty} LANGUAGE plpgsql {more} AS $body${body}$body$"
    )


def set_mapper(session, collection, name, batch=False):
    ty = "jsonb[]" if batch else "jsonb"
    session.execute(
        "SELECT rakam.set_mapper(%s, %s, %s::regprocedure, %s)",
        (PROJECT, collection, name and f"{name}({ty})", batch),
    )


def events(db, collection, expression="properties", order="1"):
    """The events as JSON, whichever columns there are."""
    return [
        row[0]
        for row in db.all(f"SELECT {expression} FROM acme._all WHERE _collection = '{collection}' ORDER BY {order}")
    ]


def letters(db):
    return db.all("SELECT convert_from(payload, 'UTF8')::jsonb, error FROM rakam.dead_letter ORDER BY id")


def dropped(db, collection):
    return db.one("SELECT coalesce(sum(n), 0) FROM rakam_internal.mapper_dropped WHERE collection = %s", collection)


# -- what a mapper does --------------------------------------------------------------------------------------------------


def test_every_way_in_is_mapped(db, owner, writer, keys, collection):
    db.admin.execute("SELECT rakam.add_field(%s, %s, 'n', 'double precision')", (PROJECT, collection))
    make(owner, "mark", "BEGIN RETURN event || '{\"mapped\": true}'; END")
    set_mapper(owner, collection, "acme.mark")
    collect(writer, PROJECT, collection, {"n": 1})
    assert collect_batch(writer, PROJECT, [(collection, {"n": 2}), ("other", {"n": 9}), (collection, {"n": 3})])[
        :2
    ] == (3, 0)
    writer.execute(
        "SELECT rakam.collect_batch(%s, %s::jsonb)",
        (PROJECT, json.dumps([{"collection": collection, "properties": {"n": 4}}])),
    )
    writer.execute("SELECT rakam.collect_with_key(%s, %s, '{\"n\": 5}')", (keys["write_key"], collection))
    writer.execute(
        "SELECT rakam.collect_batch_with_key(%s, %s)",
        (keys["write_key"], json.dumps([{"collection": collection, "properties": {"n": 6}}])),
    )
    writer.execute(f"INSERT INTO acme.{collection} (n) VALUES (7), (8)")
    found = db.all(f"SELECT (properties->>'n')::float, properties->>'mapped' FROM acme._all"
                   f" WHERE _collection = '{collection}' ORDER BY 1")  # fmt: skip
    assert found == [(float(n), "true") for n in range(1, 9)]
    assert events(db, "other", "properties->>'mapped'") == [None]
    set_mapper(owner, collection, None)
    collect(writer, PROJECT, collection, {"n": 10})
    assert events(db, collection, "properties->>'mapped'", "(properties->>'n')::float")[-1] is None


def test_large_inserts_and_copy_are_mapped(db, owner, writer, collection):
    """Rows that would have become chunks at once take the way of events."""
    db.admin.execute("SELECT rakam.add_field(%s, %s, 'n', 'integer')", (PROJECT, collection))
    make(
        owner, "third", "BEGIN RETURN CASE WHEN (event->>'n')::int % 3 = 0 THEN event || '{\"mapped\": true}' END; END"
    )
    set_mapper(owner, collection, "acme.third")
    writer.execute(f"INSERT INTO acme.{collection} (n) SELECT generate_series(1, 1500)")
    with writer.cursor().copy(f"COPY acme.{collection} (n) FROM STDIN") as copy:
        for n in range(1501, 3001):
            copy.write_row((n,))
    assert (
        db.one(f"SELECT count(*) FROM acme._all WHERE _collection = '{collection}' AND properties->>'mapped' = 'true'")
        == 1000
    )
    assert dropped(db, collection) == 2000
    db.tick()
    assert db.all(f"SELECT count(*), sum(n), bool_and(mapped) FROM acme.{collection}") == [(1000, 1501500, True)]


def test_an_insert_keeps_its_extra_through_a_mapper(db, owner, writer, collection):
    make(owner, "mark", "BEGIN RETURN event || '{\"mapped\": true}'; END")
    set_mapper(owner, collection, "acme.mark")
    writer.execute(f"INSERT INTO acme.{collection} (_user, _extra) VALUES ('ada', '{{\"kept\": 1}}')")
    db.tick()
    assert db.all(f"SELECT _user, _extra->>'kept' FROM acme.{collection}") == [("ada", "1")]
    assert letters(db) == []


def test_null_drops_and_is_counted(db, owner, writer, collection):
    make(owner, "evens", "BEGIN IF (event->>'n')::int % 2 = 1 THEN RETURN NULL; END IF; RETURN event; END")
    set_mapper(owner, collection, "acme.evens")
    assert collect_batch(writer, PROJECT, [(collection, {"n": n}) for n in range(10)])[:2] == (5, 0)
    collect(writer, PROJECT, collection, {"n": 11})
    writer.execute("BEGIN")
    collect(writer, PROJECT, collection, {"n": 13})
    writer.execute("ROLLBACK")
    assert dropped(db, collection) == 6
    assert events(db, collection, "(properties->>'n')::int") == [0, 2, 4, 6, 8]
    db.tick()
    assert dropped(db, collection) == 6
    assert db.one("SELECT count(*) FROM rakam_internal.mapper_dropped WHERE collection = %s", collection) == 1
    assert "dropped" in db.one("SELECT detail FROM rakam.health() WHERE \"check\" = 'mappers'")


def test_the_projects_mapper_runs_before_the_collections(db, owner, writer, collection):
    make(owner, "first", "BEGIN RETURN event || jsonb_build_object('way', coalesce(event->>'way', '') || 'a'); END")
    make(owner, "second", "BEGIN RETURN event || jsonb_build_object('way', coalesce(event->>'way', '') || 'b'); END")
    set_mapper(owner, None, "acme.first")
    set_mapper(owner, collection, "acme.second")
    collect(writer, PROJECT, collection, {})
    collect_batch(writer, PROJECT, [(collection, {}), ("elsewhere", {})])
    assert events(db, collection, "properties->>'way'") == ["ab", "ab"]
    assert events(db, "elsewhere", "properties->>'way'") == ["a"]
    set_mapper(owner, collection, "acme.first")
    collect(writer, PROJECT, collection, {})
    assert events(db, collection, "properties->>'way'") == ["aa", "ab", "ab"]


def test_every_batch(db, owner, writer, collection):
    make(owner, "batch", "BEGIN RETURN (SELECT array_agg(e || jsonb_build_object('of', cardinality(event)))"
                         " FROM unnest(event) e WHERE (e->>'n')::int <> 2); END", batch=True)  # fmt: skip
    set_mapper(owner, collection, "acme.batch", batch=True)
    assert collect_batch(writer, PROJECT, [(collection, {"n": n}) for n in range(4)])[:2] == (3, 0)
    collect(writer, PROJECT, collection, {"n": 4})
    # The function's result for a batch of which nothing is left is NULL.
    collect(writer, PROJECT, collection, {"n": 2})
    found = events(db, collection, "properties - '_received_at'", "(properties->>'n')::int")
    assert [(e["n"], e["of"]) for e in found] == [(0, 4), (1, 4), (3, 4), (4, 1)]
    assert dropped(db, collection) == 2


def test_a_mapper_sees_its_own_transaction_and_takes_part_in_it(db, owner, writer, collection):
    owner.execute("CREATE TABLE IF NOT EXISTS acme.seen (n int)")
    make(owner, "note", "BEGIN INSERT INTO acme.seen VALUES ((event->>'n')::int);"
                        " RETURN event || jsonb_build_object('seen', (SELECT count(*) FROM acme.seen)); END")  # fmt: skip
    set_mapper(owner, collection, "acme.note")
    writer.execute("BEGIN")
    collect(writer, PROJECT, collection, {"n": 1})
    collect(writer, PROJECT, collection, {"n": 2})
    writer.execute("ROLLBACK")
    collect(writer, PROJECT, collection, {"n": 3})
    assert one(owner, "SELECT array_agg(n) FROM acme.seen") == [3]
    assert events(db, collection, "(properties->>'seen')::int") == [1]


# -- errors --------------------------------------------------------------------------------------------------------------


def test_only_bad_events_of_a_batch_become_dead_letters(db, owner, writer, collection):
    owner.execute("CREATE TABLE IF NOT EXISTS acme.calls (n int)")
    make(owner, "divide", "BEGIN INSERT INTO acme.calls VALUES (1);"
                          " RETURN event || jsonb_build_object('q', 10 / (event->>'n')::int); END")  # fmt: skip
    set_mapper(owner, collection, "acme.divide")
    assert collect_batch(writer, PROJECT, [(collection, {"n": n}) for n in (1, 0, 2, 0)]) == (2, 0, [], [])
    assert events(db, collection, "(properties->>'q')::int") == [5, 10]
    found = letters(db)
    assert [payload for payload, _ in found] == [{"n": 0}, {"n": 0}]
    assert found[0][1] == f'mapper acme.divide(jsonb) of collection "{collection}": division by zero (SQLSTATE 22012)'
    # What failing calls did is gone.
    assert one(owner, "SELECT count(*) FROM acme.calls") == 2


@pytest.mark.parametrize("batch", [False, True])
def test_a_result_has_to_be_an_event(db, owner, writer, collection, batch):
    results = {
        "array": "'[1]'",
        "scalar": "'3'",
        "reserved": "'{\"_received_at\": 1}'",
        "large": "jsonb_build_object('x', (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 40000) i))",
        "id": "jsonb_build_object('_id', repeat('x', 300))",
        "deep": "(repeat('[', 70) || repeat(']', 70))::jsonb",
    }
    for name, result in results.items():
        body = f"IF e->>'r' = '{name}' THEN r := r || ({result})::jsonb; ELSE r := r || e; END IF;"
        declare = "DECLARE e jsonb; r jsonb[] := '{}'; BEGIN "
        if batch:
            make(owner, "bad", declare + f"FOREACH e IN ARRAY event LOOP {body} END LOOP; RETURN r; END", batch=True)
        else:
            make(owner, "bad", declare + f"e := event; {body} RETURN r[1]; END")
        set_mapper(owner, collection, "acme.bad", batch)
        stored = collect_batch(writer, PROJECT, [(collection, {"r": name}), (collection, {"r": "fine"})])
        assert stored[:2] == (1, 0), name
    assert [payload["r"] for payload, _ in letters(db)] == list(results)
    assert all("its result is no event" in error for _, error in letters(db))


def test_every_class_of_error_becomes_a_dead_letter(db, owner, writer, collection):
    codes = ["01000", "02000", "0A000", "22012", "23505", "25001", "28000", "40001", "40P01", "42501", "42P01", "53100",
             "53200", "54001", "55P03", "57014", "57P01", "58030", "P0001", "XX000", "XX001"]  # fmt: skip
    make(owner, "raise", "BEGIN RAISE EXCEPTION 'no' USING ERRCODE = event->>'code'; END")
    set_mapper(owner, collection, "acme.raise")
    for code in codes:
        collect(writer, PROJECT, collection, {"code": code})
    assert [error.split("SQLSTATE ")[1] for _, error in letters(db)] == [f"{code})" for code in codes]
    assert one(writer, "SELECT 1") == 1


def test_a_mapper_that_takes_too_long(db, owner, collection):
    session = db.connect()
    session.execute("SET rakam.mapper_timeout = '500ms'")
    make(owner, "slow", "BEGIN IF event ? 'slow' THEN LOOP END LOOP; END IF; RETURN event; END")
    set_mapper(owner, collection, "acme.slow")
    stored = collect_batch(session, PROJECT, [(collection, {"slow": n} if n else {"n": n}) for n in (0, 1, 2, 3, 4, 5)])
    assert stored[:2] == (1, 0)
    reasons = [error.split(": ", 1)[1] for _, error in letters(db)]
    assert reasons[:3] == ["canceled after 500 ms (SQLSTATE 57014)"] * 3
    assert reasons[3:] == ["not called again after 3 timeouts (SQLSTATE 57014)"] * 2
    # Nothing is left of the time limit.
    session.execute("SELECT pg_sleep(0.7)")


def test_a_mapper_cannot_catch_its_time_limit(db, owner, collection):
    """An exception handler may catch a cancel, but neither go on for long nor have its result count."""
    session = db.connect()
    session.execute("SET rakam.mapper_timeout = '300ms'")
    bodies = {
        "again": "BEGIN FOR i IN 1..40 LOOP BEGIN PERFORM pg_sleep(0.2); EXCEPTION WHEN query_canceled THEN NULL; END;"
        " END LOOP; RETURN event; END",
        "once": "BEGIN PERFORM pg_sleep(5); RETURN event; EXCEPTION WHEN query_canceled THEN RETURN event; END",
        "other": "BEGIN PERFORM pg_sleep(5); RETURN event; EXCEPTION WHEN query_canceled THEN RAISE 'mine'; END",
    }
    for name, body in bodies.items():
        make(owner, f"stubborn_{name}", body)
        set_mapper(owner, collection, f"acme.stubborn_{name}")
        collect(session, PROJECT, collection, {"n": 1})
        assert events(db, collection) == [], name
    assert [error.split(": ", 1)[1] for _, error in letters(db)] == ["canceled after 300 ms (SQLSTATE 57014)"] * 3
    # Nothing is left of the limit: handlers work as ever.
    assert one(session, "SELECT 1") == 1
    make(owner, "handled", "BEGIN RAISE 'x'; EXCEPTION WHEN OTHERS THEN RETURN event; END")
    set_mapper(owner, collection, "acme.handled")
    collect(session, PROJECT, collection, {"n": 2})
    assert events(db, collection, "(properties->>'n')::int") == [2]


def test_a_mapper_has_no_more_time_for_what_it_calls(db, owner, collection):
    session = db.connect()
    session.execute("SET rakam.mapper_timeout = '300ms'")
    make(owner, "quick", "BEGIN RETURN event; END")
    owner.execute("SELECT rakam.set_mapper('acme', 'quick_ones', 'acme.quick(jsonb)')")
    make(owner, "outer", "BEGIN PERFORM rakam.collect('acme', 'quick_ones', event); LOOP END LOOP; END")
    set_mapper(owner, collection, "acme.outer")
    collect(session, PROJECT, collection, {"n": 1})
    assert ["57014" in error for _, error in letters(db)] == [True]
    assert events(db, "quick_ones") == []


def test_a_cancel_and_the_statements_own_timeout_are_not_swallowed(db, owner, collection):
    make(owner, "slow", "BEGIN LOOP END LOOP; END")
    set_mapper(owner, collection, "acme.slow")
    session = db.connect()
    session.execute("SET statement_timeout = '200ms'")
    with refused("57014", message="statement timeout"):
        collect(session, PROJECT, collection, {})
    session.execute("RESET statement_timeout")
    pid = session.info.backend_pid
    failed = []

    def run():
        try:
            collect_batch(session, PROJECT, [(collection, {}), (collection, {})])
        except psycopg.Error as error:
            failed.append(error.sqlstate)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(
        lambda: db.one(
            "SELECT state = 'active' AND query LIKE '%%collect_batch%%' FROM pg_stat_activity WHERE pid = %s", pid
        ),
        "the call runs",
    )
    time.sleep(0.2)
    db.admin.execute("SELECT pg_cancel_backend(%s)", (pid,))
    thread.join(60)
    assert failed == ["57014"]
    assert letters(db) == [] and events(db, collection) == []


def test_a_dropped_or_changed_function_loses_nothing(db, owner, writer, collection):
    make(owner, "gone", "BEGIN RETURN event; END")
    set_mapper(owner, collection, "acme.gone")
    collect(writer, PROJECT, collection, {"n": 1})
    owner.execute("DROP FUNCTION acme.gone(jsonb)")
    collect(writer, PROJECT, collection, {"n": 2})
    (letter,) = letters(db)
    assert letter[0] == {"n": 2}
    assert "does not exist (SQLSTATE 42883)" in letter[1]
    make(owner, "gone", "BEGIN RETURN event; END")
    set_mapper(owner, collection, "acme.gone")
    assert one(owner, "SELECT rakam.replay_dead_letters('acme', NULL)") == 1
    assert events(db, collection, "(properties->>'n')::int") == [1, 2]


def test_what_can_be_a_mapper(db, keys, owner, writer, collection):
    owner.execute("""
        CREATE OR REPLACE FUNCTION acme.f_text(text) RETURNS text LANGUAGE sql AS 'SELECT $1';
        CREATE OR REPLACE FUNCTION acme.f_two(jsonb, int DEFAULT 1) RETURNS jsonb LANGUAGE sql AS 'SELECT $1';
        CREATE OR REPLACE FUNCTION acme.f_set(jsonb) RETURNS SETOF jsonb LANGUAGE sql AS 'SELECT $1';
        CREATE OR REPLACE FUNCTION acme.f_any(anyelement) RETURNS anyelement LANGUAGE sql AS 'SELECT $1';
        CREATE OR REPLACE FUNCTION acme.f_one(jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT $1';
        CREATE OR REPLACE FUNCTION acme.f_many(jsonb[]) RETURNS jsonb[] LANGUAGE sql AS 'SELECT $1';
    """)
    call = "SELECT rakam.set_mapper('acme', %s, %s, every_batch => %s)"
    for name in ("f_text(text)", "f_two(jsonb,int)", "f_set(jsonb)", "f_any(anyelement)", "f_many(jsonb[])"):
        with refused("22023", hint="takes one jsonb and returns jsonb"):
            owner.execute(call, (collection, f"acme.{name}", False))
    with refused("22023", hint="jsonb[]"):
        owner.execute(call, (collection, "acme.f_one(jsonb)", True))
    with refused("42883"):
        owner.execute(call, (collection, "acme.nothing(jsonb)", False))
    with refused("42883", hint="set_mapper"):
        owner.execute(call, (collection, "4000000000", False))
    with refused("42939"):
        owner.execute(call, ("users", "acme.f_one(jsonb)", False))
    with refused("22004"):
        owner.execute("SELECT rakam.set_mapper(NULL, 'x', NULL)")
    with refused("42501"):
        writer.execute(call, (collection, "rakam.map_referrer(jsonb)", False))
    with refused("42501"):
        owner.execute("SELECT rakam.set_mapper('nowhere', NULL, NULL)")
    db.admin.execute("CREATE FUNCTION public.secret(jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT $1';"
                     " REVOKE EXECUTE ON FUNCTION public.secret(jsonb) FROM PUBLIC")  # fmt: skip
    with refused("42501", hint="EXECUTE"):
        owner.execute(call, (collection, "public.secret(jsonb)", False))
    with refused("25006"), owner.transaction():
        owner.execute("SET TRANSACTION READ ONLY")
        owner.execute(call, (collection, "acme.f_one(jsonb)", False))
    # A SQL function serves as well, and every session knows of a change at once.
    owner.execute(call, (collection, "acme.f_many(jsonb[])", True))
    collect(writer, PROJECT, collection, {"n": 1})
    assert events(db, collection, "properties->>'n'") == ["1"]


# -- whom a mapper runs as, and what it cannot do ---------------------------------------------------------------------------


def test_a_mapper_runs_as_who_set_it_in_pinned_surroundings(db, owner, writer, collection):
    make(owner, "who", "BEGIN RETURN jsonb_build_object('who', current_user, 'path', current_setting('search_path'),"
                       " 'zone', current_setting('TimeZone'), 'at', 'at ' || '2024-03-01 12:00'::timestamptz,"
                       " 'rls', current_setting('row_security'), 'memory', current_setting('work_mem')); END")  # fmt: skip
    set_mapper(owner, collection, "acme.who")
    writer.execute(
        "SET TimeZone = 'Asia/Tokyo'; SET search_path = public; SET work_mem = '64kB'; SET DateStyle = german"
    )
    collect(writer, PROJECT, collection, {})
    collect_batch(writer, PROJECT, [(collection, {}), (collection, {})])
    shown = db.all("SHOW work_mem")[0][0]
    for event in events(db, collection):
        assert event["who"] == "login_acme_admin"
        assert event["path"] == 'pg_catalog, "acme", pg_temp'
        assert (event["zone"], event["at"], event["rls"]) == ("UTC", "at 2024-03-01 12:00:00+00", "on")
        assert event["memory"] == shown
    assert [one(writer, f"SHOW {name}") for name in ("TimeZone", "search_path", "work_mem")] == [
        "Asia/Tokyo",
        "public",
        "64kB",
    ]
    assert one(writer, "SELECT current_user") == "login_acme_write"
    writer.execute("RESET ALL")


HOSTILE = {
    "set role": "SET ROLE postgres",
    "set local role": "SET LOCAL ROLE rakam_acme_write",
    "reset role": "RESET ROLE",
    "session": "SET SESSION AUTHORIZATION postgres",
    "default session": "RESET SESSION AUTHORIZATION",
    "authenticate": "PERFORM rakam.authenticate({key!r})",
    "temporary": "CREATE TEMP TABLE t (n int)",
    "prepare": "EXECUTE 'PREPARE p AS SELECT 1'",
    "listen": "LISTEN x",
    "other project": "PERFORM * FROM rival.secrets",
    "collect elsewhere": "PERFORM rakam.collect('rival', 'x', '{{}}')",
    "internal": "DELETE FROM rakam_internal.project",
    "superuser": "ALTER ROLE login_acme_admin SUPERUSER",
    "file": "COPY acme.seen FROM '/etc/passwd'",
    "commit": "COMMIT",
}


def test_hostile_mappers_get_nowhere(db, keys, owner, writer, collection):
    rival = db.project("rival")
    collect(db.admin, "rival", "secrets", {"n": 1})
    db.tick()
    owner.execute("CREATE TABLE IF NOT EXISTS acme.seen (n int)")
    for name, statement in HOSTILE.items():
        statement = statement.format(key=rival["master_key"])
        make(owner, "evil", f"BEGIN {statement}; RETURN event || jsonb_build_object('done', current_user); END")
        set_mapper(owner, collection, "acme.evil")
        for session in (writer, db.admin):
            collect(session, PROJECT, collection, {"name": name})
            assert one(session, "SELECT current_user = session_user") is True
    assert events(db, collection) == []
    assert [payload["name"] for payload, _ in letters(db)] == [name for name in HOSTILE for _ in range(2)]
    assert db.one("SELECT rolsuper FROM pg_roles WHERE rolname = 'login_acme_admin'") is False


def test_deferred_triggers_of_a_mapper_do_not_run_as_the_collector(db, owner, writer, collection):
    owner.execute("""
        CREATE TABLE IF NOT EXISTS acme.bait (n int);
        CREATE OR REPLACE FUNCTION acme.spring() RETURNS trigger LANGUAGE plpgsql AS
          $$ BEGIN ALTER ROLE login_acme_admin SUPERUSER; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER trap AFTER INSERT ON acme.bait DEFERRABLE INITIALLY DEFERRED
          FOR EACH ROW EXECUTE FUNCTION acme.spring()""")
    make(owner, "trap", "BEGIN INSERT INTO acme.bait VALUES (1); RETURN event; END")
    set_mapper(owner, collection, "acme.trap")
    for session in (writer, db.admin):
        collect(session, PROJECT, collection, {})
        collect_batch(session, PROJECT, [(collection, {}), (collection, {})])
    assert db.one("SELECT rolsuper FROM pg_roles WHERE rolname = 'login_acme_admin'") is False
    assert len(letters(db)) == 6 and "deferred trigger" in letters(db)[0][1]
    assert one(owner, "SELECT count(*) FROM acme.bait") == 0


def test_settings_a_mapper_changes_are_put_back(db, owner, writer, collection):
    make(owner, "meddle", "BEGIN PERFORM set_config('search_path', 'evil', false); SET TimeZone = 'Asia/Tokyo';"
                          " PERFORM set_config('statement_timeout', '1', false); RETURN event; END")  # fmt: skip
    set_mapper(owner, collection, "acme.meddle")
    before = [one(writer, f"SHOW {name}") for name in ("search_path", "TimeZone", "statement_timeout")]
    writer.execute("BEGIN")
    collect(writer, PROJECT, collection, {})
    assert [one(writer, f"SHOW {name}") for name in ("search_path", "TimeZone", "statement_timeout")] == before
    writer.execute("COMMIT")
    assert [one(writer, f"SHOW {name}") for name in ("search_path", "TimeZone", "statement_timeout")] == before
    assert len(events(db, collection)) == 1


def test_operators_of_the_caller_are_not_used(db, owner, writer, collection):
    db.admin.execute("""
        CREATE SCHEMA trick; GRANT USAGE ON SCHEMA trick TO PUBLIC;
        CREATE FUNCTION trick.hijack(jsonb, jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT '{"hijacked": true}'::jsonb $$;
        CREATE OPERATOR trick.|| (LEFTARG = jsonb, RIGHTARG = jsonb, FUNCTION = trick.hijack)""")
    make(owner, "plain", "BEGIN RETURN event || '{\"mapped\": 1}'::jsonb; END")
    set_mapper(owner, collection, "acme.plain")
    session = db.connect()
    session.execute("SET search_path = trick, pg_catalog")
    session.execute("SELECT rakam.collect('acme', %s, '{\"n\": 1}'::pg_catalog.jsonb)", (collection,))
    assert [event["mapped"] for event in events(db, collection)] == [1]


def test_a_superusers_mapper_gives_its_rights_to_nobody(db, owner, writer, collection):
    """Whoever owns a function can put anything into it: as a superuser's mapper it runs as its own owner."""
    make(owner, "lent", "BEGIN RETURN event || jsonb_build_object('who', current_user); END")
    set_mapper(db.admin, collection, "acme.lent")
    collect(writer, PROJECT, collection, {})
    make(owner, "lent", "BEGIN ALTER ROLE login_acme_admin SUPERUSER; RETURN event; END")
    collect(writer, PROJECT, collection, {})
    assert [event["who"] for event in events(db, collection)] == ["login_acme_admin"]
    assert db.one("SELECT rolsuper FROM pg_roles WHERE rolname = 'login_acme_admin'") is False


def test_a_mapper_of_somebody_who_left_does_not_run(db, owner, writer, collection):
    leaver = db.login(PROJECT, "admin", name="login_leaver")
    leaver.execute("CREATE FUNCTION acme.leavers(event jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT event'")
    set_mapper(leaver, collection, "acme.leavers")
    collect(writer, PROJECT, collection, {"n": 1})
    db.admin.execute("REVOKE rakam_acme_admin FROM login_leaver")
    collect(writer, PROJECT, collection, {"n": 2})
    assert "no admin of the project any more" in letters(db)[0][1]
    leaver.close()
    db.admin.execute("DROP OWNED BY login_leaver; DROP ROLE login_leaver")
    collect(writer, PROJECT, collection, {"n": 3})
    assert len(events(db, collection)) == 1 and len(letters(db)) == 2


def test_mappers_that_collect_for_each_other_end(db, owner, writer, collection):
    make(owner, "again", f"BEGIN PERFORM rakam.collect('acme', '{collection}', event); RETURN event; END")
    set_mapper(owner, collection, "acme.again")
    collect(writer, PROJECT, collection, {"n": 1})
    assert len(events(db, collection)) == 4
    assert [error.split("SQLSTATE ")[1] for _, error in letters(db)] == ["54001)"]


def test_members_see_their_own_dead_letters_only(db, owner, writer, collection):
    make(owner, "fail", "BEGIN RAISE 'no'; END")
    set_mapper(owner, collection, "acme.fail")
    collect(writer, PROJECT, collection, {"n": 1})
    reader = db.login(PROJECT, "read")
    stranger = db.login("rival", "read", "write", "admin", name="login_stranger")
    counts = {s: one(s, "SELECT count(*) FROM rakam.dead_letter") for s in (reader, owner, writer, stranger)}
    assert list(counts.values()) == [1, 1, 0, 0]
    assert one(stranger, "SELECT count(*) FROM rakam_internal.mapper WHERE project_id = "
                         "(SELECT project_id FROM rakam_internal.project WHERE name = 'acme')") == 0  # fmt: skip
    for session in (reader, writer, stranger):
        with refused("42501"):
            session.execute("SELECT rakam.replay_dead_letters('acme', NULL)")


# -- replay --------------------------------------------------------------------------------------------------------------


def test_replay_is_exact(db, owner, writer, collection):
    make(owner, "fix", "BEGIN IF NOT event ? 'ok' THEN RAISE 'not yet'; END IF; RETURN event; END")
    set_mapper(owner, collection, "acme.fix")
    before = datetime.now(UTC)
    for n in range(3):
        collect(writer, PROJECT, collection, {"n": n, **({"_time": "2024-05-01"} if n == 1 else {})})
    after = datetime.now(UTC)
    assert one(owner, "SELECT rakam.replay_dead_letters('acme', NULL)") == 0
    assert db.all("SELECT attempts FROM rakam_internal.dead_letter") == [(2,)] * 3
    make(owner, "fix", "BEGIN IF event->>'n' = '2' THEN RAISE 'never'; END IF; RETURN event; END")
    owner.execute("BEGIN")
    assert one(owner, "SELECT rakam.replay_dead_letters('acme', NULL)") == 2
    owner.execute("ROLLBACK")
    assert (len(letters(db)), len(events(db, collection))) == (3, 0)
    assert one(owner, "SELECT rakam.replay_dead_letters(project => 'acme', source => NULL)") == 2
    ((payload, error),) = letters(db)
    assert payload == {"n": 2} and "never" in error
    db.tick()
    found = db.all(f"SELECT n, _time, _received_at FROM acme.{collection} ORDER BY n")
    assert [row[0] for row in found] == [0, 1]
    assert all(before <= received <= after for _, _, received in found)
    assert found[0][1] == found[0][2] and found[1][1] == datetime(2024, 5, 1, tzinfo=UTC)
    set_mapper(owner, collection, None)
    assert one(owner, "SELECT rakam.replay_dead_letters('acme', NULL)") == 1
    assert letters(db) == []


def test_replay_begins_at_the_mapper_that_failed(db, owner, writer, collection):
    make(
        owner,
        "first",
        "BEGIN RETURN event || jsonb_build_object('first', coalesce((event->>'first')::int, 0) + 1); END",
    )
    make(owner, "second", "BEGIN RAISE 'not yet'; END")
    set_mapper(owner, None, "acme.first")
    set_mapper(owner, collection, "acme.second")
    collect(writer, PROJECT, collection, {"n": 1})
    assert letters(db)[0][0] == {"n": 1, "first": 1}
    make(owner, "second", "BEGIN RETURN event || '{\"second\": 1}'; END")
    assert one(owner, "SELECT rakam.replay_dead_letters('acme', NULL)") == 1
    (event,) = events(db, collection)
    assert (event["n"], event["first"], event["second"]) == (1, 1, 1)


def test_two_replays_at_once_do_not_double(db, owner, writer, collection):
    make(owner, "fail", "BEGIN RAISE 'no'; END")
    set_mapper(owner, collection, "acme.fail")
    collect_batch(writer, PROJECT, [(collection, {"n": n}) for n in range(300)])
    set_mapper(owner, collection, None)
    counts = []

    def replay():
        with db.cluster.connect(db.name) as session:
            counts.append(one(session, "SELECT rakam.replay_dead_letters('acme', NULL)"))

    threads = [threading.Thread(target=replay) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 300 and letters(db) == []
    assert sorted(events(db, collection, "(properties->>'n')::int")) == list(range(300))


def test_replay_asks_for_room(db, owner, writer, collection):
    make(owner, "roomless", "BEGIN RAISE 'no'; END")
    set_mapper(owner, collection, "acme.roomless")
    for n in range(3):
        collect(writer, PROJECT, collection, {"n": n})
    set_mapper(owner, collection, None)
    replay = "SELECT rakam.replay_dead_letters('acme', NULL)"

    def is_full() -> bool:
        try:
            collect(writer, PROJECT, "roomy", {})
            return False
        except psycopg.errors.DiskFull:
            return True

    db.configure(max_hot_bytes=0)
    try:
        wait_until(is_full, "the hot tier is full")
        assert one(owner, replay) == 0
        assert "SQLSTATE 53100" in letters(db)[0][1]
    finally:
        db.configure(max_hot_bytes=None)
    wait_until(lambda: not is_full(), "room")
    assert one(owner, replay) == 3
    assert events(db, collection, "(properties->>'n')::int") == [0, 1, 2]


def test_replay_of_sources_that_are_not_there(owner, collection):
    with refused("42704", hint="NULL"):
        owner.execute("SELECT rakam.replay_dead_letters('acme', 'clicks')")
    with refused("22004"):
        owner.execute("SELECT rakam.replay_dead_letters(NULL, NULL)")


# -- the mappers that come with rakam ----------------------------------------------------------------------------------------

CHROME = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 Safari/537.36"
)


def test_user_agent_and_referrer(db, owner, writer, collection):
    set_mapper(owner, None, "rakam.map_user_agent")
    set_mapper(owner, collection, "rakam.map_referrer")
    event = {"_user_agent": CHROME, "_referrer": "https://www.google.com/search?q=event+analytics", "os": "mine"}
    collect(writer, PROJECT, collection, event)
    db.tick()
    row = db.all(f"SELECT browser, browser_version, os, device, referrer_host, referrer_medium, referrer_term"
                 f" FROM acme.{collection}")  # fmt: skip
    assert row == [("Chrome", "120.0.0.0", "mine", "desktop", "www.google.com", "search", "event analytics")]
    assert one(writer, "SELECT rakam.map_user_agent(NULL) IS NULL")
    with refused("22023"):
        writer.execute("SELECT rakam.map_referrer('[1]')")


def encode(value) -> bytes:
    """A value of MaxMind's format: maps and strings are enough here, and whole numbers for the metadata."""

    def control(kind: int, size: int) -> bytes:
        assert size < 285
        extended = bytes([kind - 7]) if kind > 7 else b""
        first = (0 if kind > 7 else kind) << 5
        return bytes([first | min(size, 29)]) + extended + (bytes([size - 29]) if size >= 29 else b"")

    if isinstance(value, str):
        return control(2, len(value.encode())) + value.encode()
    if isinstance(value, dict):
        return control(7, len(value)) + b"".join(encode(k) + encode(v) for k, v in value.items())
    if isinstance(value, list):
        return control(11, len(value)) + b"".join(encode(v) for v in value)
    raw = value.to_bytes(4, "big").lstrip(b"\0")
    return control({16: 5, 32: 6, 64: 9}[32], len(raw)) + raw


def mmdb(record: dict) -> bytes:
    """A database that knows 10.0.0.0/8 only."""
    bits = [0, 0, 0, 0, 1, 0, 1, 0]
    nodes = len(bits)
    data = encode(record)
    tree = b""
    for depth, bit in enumerate(bits):
        onward = depth + 1 if depth + 1 < nodes else nodes + 16
        pair = [nodes, nodes]
        pair[bit] = onward
        tree += b"".join(struct.pack(">I", p)[1:] for p in pair)

    def short(n: int) -> bytes:
        raw = n.to_bytes(2, "big").lstrip(b"\0")
        return bytes([(5 << 5) | len(raw)]) + raw

    def long(n: int) -> bytes:
        raw = n.to_bytes(8, "big").lstrip(b"\0")
        return bytes([len(raw), 9 - 7]) + raw

    metadata = [
        ("binary_format_major_version", short(2)), ("binary_format_minor_version", short(0)),
        ("build_epoch", long(1_700_000_000)), ("database_type", encode("Test-City")), ("description", encode({"en": "test"})),
        ("ip_version", short(4)), ("languages", encode(["en"])), ("node_count", encode(nodes)), ("record_size", short(24)),
    ]  # fmt: skip
    head = bytes([(7 << 5) | len(metadata)]) + b"".join(encode(k) + v for k, v in metadata)
    return tree + bytes(16) + data + b"\xab\xcd\xefMaxMind.com" + head


def test_geoip(db, owner, writer, collection, tmp_path, cluster):
    path = cluster.make_folder("geoip") / "city.mmdb"
    place = {
        "country": {"iso_code": "TR", "names": {"en": "Türkiye"}},
        "subdivisions": [{"iso_code": "34", "names": {"en": "Istanbul Province"}}],
        "city": {"names": {"en": "Istanbul", "tr": "İstanbul"}},
    }
    set_mapper(owner, collection, "rakam.map_geoip")
    session = db.login(PROJECT, "write", name="login_geo")
    call = f"SELECT rakam.collect('acme', '{collection}', '{{\"_ip\": \"10.1.2.3\"}}')"
    told = notices_of(session, call)
    assert [notice.severity for notice in told] == ["WARNING"] and "rakam.geoip_database" in told[0].hint
    assert notices_of(session, call) == []

    try:
        path.write_bytes(mmdb(place))
        path.chmod(0o644)
        db.configure(geoip_database=path)
        located = "SELECT rakam.map_geoip('{\"_ip\": \"10.1.2.3\"}') ->> 'country'"
        wait_until(lambda: one(session, located) == "TR", "the setting in the session")
        for ip in ("10.1.2.3", "::ffff:10.9.9.9", "11.0.0.1", "2001:db8::1", "nowhere"):
            collect(session, PROJECT, collection, {"_ip": ip, "region": "kept"} if ip.startswith("::") else {"_ip": ip})
        found = events(db, collection, "(properties->>'_ip', properties->>'country', properties->>'region', properties->>'city')::text",
                       "properties->>'_ip', 1")  # fmt: skip
        assert sorted(found) == [
            "(10.1.2.3,,,)", "(10.1.2.3,,,)", '(10.1.2.3,TR,"Istanbul Province",Istanbul)', "(11.0.0.1,,,)",
            "(2001:db8::1,,,)", "(::ffff:10.9.9.9,TR,kept,Istanbul)", "(nowhere,,,)",
        ], found  # fmt: skip
        located = [row for row in found if "TR" in row]
        assert located == ['(10.1.2.3,TR,"Istanbul Province",Istanbul)', "(::ffff:10.9.9.9,TR,kept,Istanbul)"]
        # Overwritten in place, shorter: noticed before the next look.
        path.write_bytes(b"not a database")
        told = notices_of(session, call)
        assert len(told) == 1 and "not located" in told[0].message
        assert letters(db) == []
    finally:
        db.configure(geoip_database=None)


def test_sessions_go_on_over_batches(db, owner, writer, collection):
    set_mapper(owner, collection, "rakam.map_session", batch=True)

    def at(minute, **more):
        hour, minute = divmod(minute, 60)
        return (collection, {"_time": f"2024-06-01T{10 + hour:02}:{minute:02}:00Z", "_user": "ada", **more})

    collect_batch(writer, PROJECT, [at(0, n=1), at(20, n=2), at(51, n=4), at(20, n=3, _user="bob")])
    collect_batch(writer, PROJECT, [at(80, n=5), at(111, n=6)])
    collect(writer, PROJECT, collection, at(130, n=7)[1])
    collect(writer, PROJECT, collection, at(131, n=8, _session_id="mine")[1])
    collect(writer, PROJECT, collection, {"n": 9})
    collect(writer, PROJECT, collection, {"_device_id": "d", "n": 10, "_time": "2024-06-01T10:00:00Z"})
    # Late, but within the gap of the first session.
    collect(writer, PROJECT, collection, at(10, n=11)[1])
    db.tick()
    ids = dict(db.all(f"SELECT n::int, _session_id FROM acme.{collection}"))
    assert ids[1] == ids[2] == ids[11]
    assert ids[4] == ids[5] and ids[6] == ids[7]
    assert len({ids[n] for n in (1, 3, 4, 6, 8, 10)}) == 6
    assert ids[8] == "mine" and ids[9] is None
    db.tick()
    assert db.one("SELECT count(*) FROM rakam_internal.session_span") == 6


def test_sessions_of_projects_and_of_callers_are_their_own(db, owner, writer, collection):
    set_mapper(owner, collection, "rakam.map_session", batch=True)
    event = {"_user": "eve", "_time": "2024-07-01T10:00:00Z"}
    collect(writer, PROJECT, collection, event)
    spans = db.one("SELECT count(*) FROM rakam_internal.session_span")
    # By hand nothing is looked up and nothing is remembered.
    found = one(
        writer, "SELECT rakam.map_session(ARRAY[%s::jsonb, NULL, %s::jsonb])", json.dumps(event), json.dumps(event)
    )
    assert found[1] is None and found[0]["_session_id"] == found[2]["_session_id"]
    assert found[0]["_session_id"] != events(db, collection, "properties->>'_session_id'")[0]
    assert db.one("SELECT count(*) FROM rakam_internal.session_span") == spans
    for session in (writer, owner):
        for statement in ("SELECT count(*)", "DELETE"):
            with refused("42501"):
                session.execute(f"{statement} FROM rakam_internal.session_span")


def test_sessions_make_nobody_wait(db, owner, writer, collection):
    set_mapper(owner, collection, "rakam.map_session", batch=True)
    session, other = db.connect(autocommit=False), db.connect()
    other.execute("SET lock_timeout = '10s'")
    collect(session, PROJECT, collection, {"_user": "same"})
    collect(other, PROJECT, collection, {"_user": "same"})
    session.commit()
    assert len(events(db, collection)) == 2


# -- the rest ------------------------------------------------------------------------------------------------------------


def test_calls_are_in_the_audit_log(db, owner, writer, collection):
    set_mapper(owner, collection, "rakam.map_referrer")
    with refused("42501"):
        set_mapper(writer, collection, None)
    owner.execute("SELECT rakam.replay_dead_letters('acme', NULL)")
    noted = "SELECT call, role FROM rakam.audit_log WHERE project = 'acme' AND (object = %s OR call = 'replay_dead_letters')"
    expected = {
        ("set_mapper", "login_acme_admin"),
        ("set_mapper", "login_acme_write"),
        ("replay_dead_letters", "login_acme_admin"),
    }
    wait_until(lambda: set(db.all(noted, collection)) >= expected, "the calls are noted")


def test_a_renamed_collection_keeps_its_mapper(db, owner, writer, collection):
    make(owner, "mark", "BEGIN RETURN event || '{\"mapped\": true}'; END")
    set_mapper(owner, collection, "acme.mark")
    owner.execute("SELECT rakam.set_mapper('acme', 'renamed_one', 'rakam.map_referrer(jsonb)')")
    owner.execute("SELECT rakam.rename_collection('acme', %s, 'renamed_one')", (collection,))
    collect(writer, PROJECT, "renamed_one", {"n": 1})
    assert events(db, "renamed_one", "properties->>'mapped'") == ["true"]
    owner.execute("SELECT rakam.drop_collection('acme', 'renamed_one')")
    collect(writer, PROJECT, "renamed_one", {"n": 2})
    assert events(db, "renamed_one", "(properties->>'mapped') || (properties->>'n')") == ["true2"]


def test_mappers_and_letters_go_with_their_project(db):
    db.project("brief")
    db.admin.execute("SELECT rakam.set_mapper('brief', NULL, 'rakam.map_session(jsonb[])', true)")
    collect(db.admin, "brief", "x", {"_user": "ada"})
    db.admin.execute(
        "CREATE FUNCTION public.failing(jsonb) RETURNS jsonb LANGUAGE plpgsql AS 'BEGIN RAISE ''no''; END'"
    )
    db.admin.execute("SELECT rakam.set_mapper('brief', 'x', 'public.failing(jsonb)')")
    collect(db.admin, "brief", "x", {"_user": "ada"})
    project_id = db.one("SELECT project_id FROM rakam_internal.project WHERE name = 'brief'")
    tables = ("mapper", "session_span", "dead_letter", "mapper_dropped")
    count = " + ".join(f"(SELECT count(*) FROM rakam_internal.{t} WHERE project_id = {project_id})" for t in tables)
    assert db.one(f"SELECT {count}") >= 4
    db.admin.execute("SET rakam.allow_project_drop = on")
    db.admin.execute("SELECT rakam.drop_project('brief')")
    assert db.one(f"SELECT {count}") == 0
