"""What bounds a project: quotas, schema mode, time bounds, more fields than columns."""

from __future__ import annotations

import itertools
import json
import string
import threading
import time

from harness.database import Database, collect, collect_batch, has_column, one, refused

PROJECT = "acme"


def set_quota(db, project=PROJECT, **limits):
    values = [limits.get(name) for name in ("events_per_second", "bytes_per_day", "collections", "fields")]
    db.admin.execute("SELECT rakam.set_quota(%s, %s, %s, %s, %s)", (project, *values))


def fixed(db, project=PROJECT, mode="fixed"):
    db.admin.execute("SELECT rakam.set_schema_mode(%s, %s)", (project, mode))


# -- quotas: events and bytes --------------------------------------------------------------------------------------------


def test_a_second_of_events_and_no_more(db, fresh):
    set_quota(db, fresh, events_per_second=20)
    with refused("53400", message="20 events per second", hint="Send again later"):
        collect_batch(db.admin, fresh, [("hit", {"n": n}) for n in range(21)])
    assert one(db.admin, f"SELECT count(*) FROM {fresh}._all") == 0
    began = time.monotonic()
    sent = 0
    while sent < 45:
        try:
            collect(db.admin, fresh, "hit", {"n": sent})
            sent += 1
        except Exception as error:
            assert error.sqlstate == "53400"
        # The burst of a second, then the rate; and as much as that, however slowly it is asked for.
        seconds = time.monotonic() - began
        assert sent <= 20 + 20 * seconds + 1
        assert seconds < 60
    db.tick()
    assert one(db.admin, f"SELECT count(*) FROM {fresh}.hit") == sent


def test_sessions_share_a_quota(db, fresh):
    set_quota(db, fresh, events_per_second=30)
    sent = []

    def flood():
        with db.cluster.connect(db.name) as session:
            end = time.monotonic() + 60
            while len(sent) < 60 and time.monotonic() < end:
                try:
                    collect(session, fresh, "hit", {"n": 1})
                    sent.append(1)
                except Exception as error:
                    assert error.sqlstate == "53400"

    threads = [threading.Thread(target=flood) for _ in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 60 <= len(sent) <= 30 + 30 * (time.monotonic() - began) + 1


def test_the_quota_holds_for_every_way_in(db, fresh):
    db.admin.execute("SELECT rakam.create_collection(%s, 'hit')", (fresh,))
    db.admin.execute("SELECT rakam.add_field(%s, 'hit', 'n', 'float8')", (fresh,))
    key = one(db.admin, "SELECT write_key FROM rakam.create_keys(%s)", fresh)
    set_quota(db, fresh, events_per_second=0)
    events = json.dumps([{"collection": "hit", "properties": {"n": 1}}])
    for statement, arguments in [
        ("SELECT rakam.collect(%s, 'hit', '{}')", (fresh,)),
        ("SELECT rakam.collect_batch(%s, %s::text)", (fresh, events)),
        ("SELECT rakam.collect_batch(%s, %s::jsonb)", (fresh, events)),
        ("SELECT rakam.collect_with_key(%s, 'hit', '{}')", (key,)),
        ("SELECT rakam.collect_batch_with_key(%s, %s)", (key, events)),
        (f"INSERT INTO {fresh}.hit (n) VALUES (1), (2)", ()),
    ]:
        with refused("53400", hint="Send again later"):
            db.admin.execute(statement, arguments or None)
    with refused("53400"), db.admin.cursor().copy(f"COPY {fresh}.hit (n) FROM STDIN") as copy:
        copy.write("1\n2\n")
    assert db.tiers(fresh, "hit") == {"inbox": 0, "hot": 0, "cold": 0}
    set_quota(db, fresh)
    collect(db.admin, fresh, "hit", {"n": 1})


def event_of(size):
    """Properties whose JSON is so many bytes long."""
    empty = len(json.dumps({"x": ""}, separators=(",", ":")).replace(":", ": "))
    return json.dumps({"x": "y" * (size - empty)})


def test_bytes_of_a_day(db, fresh):
    set_quota(db, fresh, bytes_per_day=10_000)
    send = "SELECT rakam.collect(%s, 'hit', %s::jsonb)"
    for _ in range(9):
        db.admin.execute(send, (fresh, event_of(1000)))
    with refused("53400", message="10000 bytes per day", hint="midnight UTC"):
        db.admin.execute(send, (fresh, event_of(1001)))
    # What is rolled back is given back, with the transaction and with a savepoint.
    session = db.connect(autocommit=False)
    for undo in ("ROLLBACK", "ROLLBACK TO s"):
        session.execute("SAVEPOINT s")
        session.execute(send, (fresh, event_of(1000)))
        session.execute(undo)
    with session.transaction():
        session.execute(send, (fresh, event_of(1000)))
    session.commit()
    for _ in range(2):
        with refused("53400"):
            db.admin.execute(send, (fresh, event_of(10)))
        # Moving the events on changes nothing.
        db.tick()
    set_quota(db, fresh, bytes_per_day=10_100)
    db.admin.execute(send, (fresh, event_of(100)))
    with refused("53400"):
        db.admin.execute(send, (fresh, event_of(10)))


def test_a_dead_letter_is_charged_once(db, fresh):
    db.admin.execute(
        f"CREATE FUNCTION {fresh}.fails(event jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$BEGIN RAISE 'no'; END$$"
    )
    set_mapper = "SELECT rakam.set_mapper(%s, 'hit', %s::regprocedure)"
    db.admin.execute(set_mapper, (fresh, f"{fresh}.fails(jsonb)"))
    set_quota(db, fresh, bytes_per_day=1_500)
    send = "SELECT rakam.collect(%s, 'hit', %s::jsonb)"
    db.admin.execute(send, (fresh, event_of(1000)))
    replay = "SELECT rakam.replay_dead_letters(%s)"
    assert [db.one(replay, fresh) for _ in range(3)] == [0, 0, 0]
    db.admin.execute(set_mapper, (fresh, None))
    assert db.one(replay, fresh) == 1
    for _ in range(2):
        with refused("53400"):
            db.admin.execute(send, (fresh, event_of(600)))
        db.tick()
    db.admin.execute(send, (fresh, event_of(400)))


def test_bytes_survive_a_restart(private_cluster):
    cluster = private_cluster("bytes")
    database = Database(cluster, "bytes").create()
    database.project("acme")
    set_quota(database, bytes_per_day=10_000)
    send = "SELECT rakam.collect('acme', 'hit', %s::jsonb)"
    for stop, events in (("immediate", 5), ("fast", 3)):
        for _ in range(events):
            database.admin.execute(send, (event_of(1000),))
        database.tick()
        database.close()
        cluster.restart(mode=stop)
    with refused("53400"):
        database.admin.execute(send, (event_of(2001),))
    database.admin.execute(send, (event_of(2000),))
    database.close()


def test_without_preload(private_cluster):
    """Quotas are measured by each process; what is refused is noted in the server's log."""
    cluster = private_cluster("alone", {"shared_preload_libraries": ""})
    database = Database(cluster, "alone").create()
    database.project("acme")
    mark = cluster.log_mark()
    with refused("22023"):
        database.admin.execute("SELECT rakam.set_schema_mode('acme', 'no')")
    assert 'called set_schema_mode for project "acme"' in cluster.log_since(mark)
    log = "SELECT call, object, outcome, role FROM rakam.audit_log WHERE project = 'acme' ORDER BY at"
    assert database.all(log) == [("create_project", None, "ok", "postgres")]
    set_quota(database, events_per_second=5, bytes_per_day=10_000)
    with refused("53400"):
        database.admin.execute("SELECT rakam.collect('acme', 'hit', '{\"n\": 1}') FROM generate_series(1, 500)")
    set_quota(database, bytes_per_day=10_000)
    send = "SELECT rakam.collect('acme', 'hit', %s::jsonb)"
    for _ in range(9):
        database.admin.execute(send, (event_of(1000),))
    with refused("53400"):
        database.admin.execute(send, (event_of(1001),))
    database.tick()
    other = database.connect()
    with refused("53400"):
        other.execute(send, (event_of(1001),))
    database.close()


def test_quota_is_for_those_who_run_the_server(db, keys, admin, writer):
    for session in (admin, writer):
        with refused("42501", hint="rakam_admin"):
            session.execute("SELECT rakam.set_quota('acme', 1, NULL, NULL, NULL)")
    with refused("42501", message='project "nowhere"'):
        db.admin.execute("SELECT rakam.set_quota('nowhere', 1, NULL, NULL, NULL)")
    with refused("22023", hint="NULL is no limit"):
        db.admin.execute("SELECT rakam.set_quota('acme', NULL, NULL, -1, NULL)")
    with refused("22004"):
        db.admin.execute("SELECT rakam.set_quota(NULL, NULL, NULL, -1, NULL)")
    db.make_login("login_operator")
    db.admin.execute("GRANT rakam_admin TO login_operator")
    operator = db.connect("login_operator")
    operator.execute(
        "SELECT rakam.set_quota(project => 'acme', events_per_second => NULL, bytes_per_day => NULL,"
        " collections => NULL, fields => NULL)"
    )


# -- quotas: collections and fields --------------------------------------------------------------------------------------


def test_quota_of_collections(db, fresh):
    collect(db.admin, fresh, "first", {"n": 1})
    db.tick()
    set_quota(db, fresh, collections=2)
    stored, rejected, indexes, errors = collect_batch(
        db.admin, fresh, [("second", {"n": 1}), ("first", {"n": 2}), ("third", {"n": 3}), ("second", {"n": 4})]
    )
    assert (stored, rejected, indexes) == (3, 1, [2])
    assert errors[0]["sqlstate"] == "53400" and "2 collections" in errors[0]["message"]
    db.tick()
    with refused("53400", message="2 collections", hint="rakam.set_quota"):
        collect(db.admin, fresh, "third", {"n": 1})
    with refused("53400", message="2 collections"):
        db.admin.execute("SELECT rakam.create_collection(%s, 'third')", (fresh,))
    db.admin.execute("SELECT rakam.create_collection(%s, 'second')", (fresh,))
    collect(db.admin, fresh, "first", {"n": 5})


def test_a_collection_that_got_past_the_quota_becomes_dead_letters(db, fresh):
    """Two sessions that do not know of each other's collections."""
    collect(db.admin, fresh, "first", {"n": 1})
    db.tick()
    set_quota(db, fresh, collections=2)
    sessions = [db.connect(autocommit=False) for _ in range(2)]
    for session, name in zip(sessions, ("second", "third"), strict=True):
        collect_batch(session, fresh, [(name, {"name": name}), (name, {"name": name, "n": 2})])
    for session in sessions:
        session.commit()
    db.tick()
    there = {name for (name,) in db.all("SELECT collection FROM rakam.collections WHERE project = %s", fresh)}
    assert len(there) == 2 and "first" in there
    lost = ({"second", "third"} - there).pop()
    letters = db.all(
        "SELECT convert_from(payload, 'UTF8')::jsonb, error FROM rakam.dead_letter WHERE project = %s", fresh
    )
    assert [letter["name"] for letter, _ in letters] == [lost, lost]
    assert all("quota of 2 collections" in error for _, error in letters)


def test_quota_of_fields(db, fresh):
    collect(db.admin, fresh, "one", {"a": 1, "b": 2})
    db.tick()
    set_quota(db, fresh, fields=3)
    with refused("53400", message="3 fields", hint="rakam.set_quota"):
        collect(db.admin, fresh, "one", {"a": 1, "c": 1, "d": 1})
    # Names without a type yet are no fields, those that are there cost nothing.
    collect(db.admin, fresh, "one", {"a": 1, "empty": None, "list": [], "xmin": 1})
    stored, _, indexes, errors = collect_batch(
        db.admin, fresh, [("two", {"c": 1}), ("two", {"c": 2}), ("one", {"d": 1}), ("one", {"b": 1})]
    )
    assert (stored, indexes, errors[0]["sqlstate"]) == (3, [2], "53400")
    db.tick()
    with refused("53400"):
        db.admin.execute("SELECT rakam.add_field(%s, 'one', 'd', 'text')", (fresh,))
    db.admin.execute("SELECT rakam.add_field(%s, 'one', 'a', 'float8')", (fresh,))
    assert one(db.admin, "SELECT count(*) FROM rakam.fields WHERE project = %s", fresh) == 3


def test_a_field_that_got_past_the_quota_stays_in_extra(db, fresh):
    db.admin.execute("SELECT rakam.create_collection(%s, 'one')", (fresh,))
    set_quota(db, fresh, fields=1)
    sessions = [db.connect(autocommit=False) for _ in range(2)]
    for session, name in zip(sessions, ("a", "b"), strict=True):
        collect(session, fresh, "one", {name: name})
    for session in sessions:
        session.commit()
    for move in (lambda: None, db.tick, lambda: db.flush(fresh, "one")):
        move()
        # The column, or else the member of _extra, is the same text.
        text = "coalesce(to_jsonb(t)->>'a', _extra->>'a', to_jsonb(t)->>'b', _extra->>'b')"
        found = db.all(f"SELECT {text} FROM {fresh}.one t ORDER BY 1")
        assert found == [("a",), ("b",)]
    assert one(db.admin, "SELECT count(*) FROM rakam.fields WHERE project = %s", fresh) == 1


def test_a_refused_event_takes_no_place_in_a_quota(db, fresh):
    """Of a batch: an event that brings a collection and is refused for its fields leaves the place to the next one."""
    set_quota(db, fresh, collections=1, fields=1)
    rejected = collect_batch(db.admin, fresh, [("a", {"x": 1, "y": 2}), ("b", {"x": 1})])[2]
    assert rejected == [0]
    db.tick()
    assert db.all("SELECT collection FROM rakam.collections WHERE project = %s", fresh) == [("b",)]


def test_an_event_of_very_many_new_names_is_refused_at_once(db, fresh):
    db.admin.execute("SELECT rakam.create_collection(%s, 'c')", (fresh,))
    names = itertools.islice(map("".join, itertools.product(string.ascii_lowercase, repeat=4)), 80_000)
    event = "{" + ",".join(f'"{name}":1' for name in names) + "}"
    session = db.login(fresh, "write")
    session.execute("SET statement_timeout = '10s'")
    set_quota(db, fresh, fields=100)
    with refused("53400"):
        session.execute("SELECT rakam.collect(%s, 'c', %s::jsonb)", (fresh, event))
    db.admin.execute("SELECT rakam.set_schema_mode(%s, 'fixed')", (fresh,))
    with refused("42703"):
        session.execute("SELECT rakam.collect(%s, 'c', %s::jsonb)", (fresh, event))


# -- schema mode ---------------------------------------------------------------------------------------------------------


def test_fixed_schema(db, keys, writer, admin):
    collect(db.admin, PROJECT, "fixed_one", {"known": 1})
    db.tick()
    fixed(db)
    try:
        assert one(db.admin, "SELECT schema_mode FROM rakam.projects WHERE project = 'acme'") == "fixed"
        collect(writer, PROJECT, "fixed_one", {"known": 2, "_user": "ada", "Known": 3})
        for properties in ({"unknown": 1}, {"unknown": None}, {"known": 1, "xmin": 2}):
            with refused("42703", hint="rakam.add_field"):
                collect(writer, PROJECT, "fixed_one", properties)
        with refused("42703", message='"fixed_two" does not exist', hint="rakam.create_collection"):
            collect(writer, PROJECT, "fixed_two", {"known": 1})
        events = [("fixed_one", {"known": 4}), ("fixed_one", {"newName": 1}), ("fixed_two", {}), ("fixed_one", {})]
        for by_key in (False, True):
            if by_key:
                text = json.dumps([{"collection": name, "properties": properties} for name, properties in events])
                call = "SELECT * FROM rakam.collect_batch_with_key(%s, %s)"
                answer = db.admin.execute(call, (keys["write_key"], text)).fetchone()
            else:
                answer = collect_batch(writer, PROJECT, events)
            stored, rejected, indexes, errors = answer
            assert (stored, rejected, indexes) == (2, 2, [1, 2])
            assert [error["sqlstate"] for error in errors] == ["42703", "42703"]
            assert '"new_name"' in errors[0]["message"]
        # Who administers the project may.
        collect(admin, PROJECT, "fixed_one", {"by_admin": 1})
        send = "SELECT rakam.collect_with_key(%s, 'fixed_two', '{\"by_master\": 1}')"
        with refused("42703"):
            writer.execute(send, (keys["write_key"],))
        writer.execute(send, (keys["master_key"],))
        db.tick()
        # And then the write role may use it, in a session that has refused it before.
        collect(writer, PROJECT, "fixed_one", {"by_admin": 2})
        collect(writer, PROJECT, "fixed_two", {"by_master": 2})
        admin.execute("SELECT rakam.add_field('acme', 'fixed_one', 'unknown', 'float8')")
        collect(writer, PROJECT, "fixed_one", {"unknown": 7})
        # A dropped field is unknown again at once.
        admin.execute("SELECT rakam.drop_field('acme', 'fixed_one', 'unknown')")
        with refused("42703"):
            collect(writer, PROJECT, "fixed_one", {"unknown": 8})
    finally:
        fixed(db, mode="open")
    collect(writer, PROJECT, "fixed_one", {"unheard_of": 1})


def test_schema_mode_is_the_admins(db, keys, writer, reader, admin):
    for session in (writer, reader):
        with refused("42501"):
            session.execute("SELECT rakam.set_schema_mode('acme', 'fixed')")
    with refused("22023", hint="open and fixed"):
        admin.execute("SELECT rakam.set_schema_mode('acme', 'closed')")
    admin.execute("SELECT rakam.set_schema_mode(project => 'acme', mode => 'open')")


# -- bounds of _time -----------------------------------------------------------------------------------------------------


def test_time_bounds(db, fresh):
    project_admin = db.login(fresh, "admin")
    bounds = "SELECT rakam.set_time_bounds(%s, %s, %s)"
    project_admin.execute(bounds, (fresh, "1 hour", "10 minutes"))
    collect(db.admin, fresh, "hit", {})
    offsets = {"-59 minutes": True, "-61 minutes": False, "9 minutes": True, "11 minutes": False, "0": True}
    for offset in offsets:
        db.admin.execute(
            "SELECT rakam.collect(%s, 'hit', jsonb_build_object('what', %s::text, '_time', clock_timestamp() + %s::interval))",
            (fresh, offset, offset),
        )
    for move in (db.tick, lambda: db.flush(fresh)):
        move()
        kept = dict(
            db.all(
                f"SELECT what, abs(extract(epoch FROM _time - _received_at - what::interval)) < 30 FROM {fresh}.hit WHERE what IS NOT NULL"
            )
        )
        assert kept == offsets
    errors = db.all("SELECT field, error, count FROM rakam.invalid_value WHERE project = %s", fresh)
    assert errors == [("_time", "time is outside the bounds of the project", 2)] * 2
    for past, future in (("-1 second", "1 day"), ("1 day", "-1 day"), ("10001 years", "1 day")):
        with refused("22023", hint="10,000 years"):
            project_admin.execute(bounds, (fresh, past, future))
    project_admin.execute(bounds, (fresh, "0", "0"))
    with refused("22004"):
        project_admin.execute(bounds, (fresh, None, "1 day"))


# -- more fields than columns --------------------------------------------------------------------------------------------


def test_fields_beyond_the_limit_stay_in_extra(db, fresh):
    event = {f"f{n:03}": n for n in range(520)}
    assert collect_batch(db.admin, fresh, [("wide", event), ("wide", event)])[0] == 2
    total = (
        "SELECT sum(coalesce((to_jsonb(t)->>k)::float8, (t._extra->>k)::float8)) FROM {}.wide t, unnest(%s::text[]) k"
    )
    for move in (db.tick, lambda: db.flush(fresh), lambda: None):
        move()
        assert one(db.admin, total.format(fresh), list(event)) == 2 * sum(event.values())
        assert one(db.admin, "SELECT count(*) FROM rakam.fields WHERE project = %s", fresh) == 500
    missing = [name for name in event if not has_column(db.admin, f"{fresh}.wide", name)]
    assert len(missing) == 20
    assert db.all(f"SELECT _extra->>'{missing[0]}' FROM {fresh}.wide") == [(str(event[missing[0]]),)] * 2
    # A limit below what is there takes no column away, and lets none in.
    db.configure(max_fields=10)
    try:
        collect(db.admin, fresh, "wide", {"f000": 1000, "late": 1})
        collect(db.admin, fresh, "narrow", {f"n{n}": n for n in range(12)})
        db.tick()
        assert one(db.admin, f"SELECT f000 FROM {fresh}.wide WHERE _extra->>'late' = '1'") == 1000
        count = "SELECT count(*) FROM rakam.fields WHERE project = %s AND collection = %s"
        assert one(db.admin, count, fresh, "wide") == 500
        assert one(db.admin, count, fresh, "narrow") == 10
        # Nor is one declared; what is declared already is no error.
        with refused("53400", message="narrow", hint="rakam.max_fields"):
            db.admin.execute("SELECT rakam.add_field(%s, 'narrow', 'declared', 'text')", (fresh,))
        db.admin.execute("SELECT rakam.add_field(%s, 'narrow', 'n0', 'float8')", (fresh,))
        db.admin.execute("SELECT rakam.drop_field(%s, 'narrow', 'n0')", (fresh,))
        db.admin.execute("SELECT rakam.add_field(%s, 'narrow', 'declared', 'text')", (fresh,))
    finally:
        db.configure(max_fields=None)
