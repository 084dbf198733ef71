"""What bounds a project and what takes its definitions back: quotas, schema mode, time bounds, dropping and renaming
collections and fields, the values of a field, the audit log, the bounds of logs."""

from __future__ import annotations

import json
import threading
import time

import pytest
from harness.database import Database, collect, collect_batch, has_column, notices_of, one, refused, wait_until

PROJECT = "acme"


@pytest.fixture(scope="module")
def keys(db):
    return db.project(PROJECT)


@pytest.fixture(scope="module")
def writer(db, keys):
    return db.login(PROJECT, "write")


@pytest.fixture(scope="module")
def admin(db, keys):
    return db.login(PROJECT, "admin")


@pytest.fixture(scope="module")
def reader(db, keys):
    return db.login(PROJECT, "read")


def set_quota(db, project=PROJECT, **limits):
    values = [limits.get(name) for name in ("events_per_second", "bytes_per_day", "collections", "fields")]
    db.admin.execute("SELECT rakam.set_quota(%s, %s, %s, %s, %s)", (project, *values))


@pytest.fixture
def limited(db, keys):
    """Sets quotas of the project, and takes them away after the test."""
    yield lambda **limits: set_quota(db, **limits)
    set_quota(db)


@pytest.fixture
def fresh(db, request):
    """A project of its own for a test."""
    name = "p_" + request.node.name.split("[")[0].removeprefix("test_")[:30].strip("_")
    db.project(name)
    return name


def fixed(db, project=PROJECT, mode="fixed"):
    db.admin.execute("SELECT rakam.set_schema_mode(%s, %s)", (project, mode))


def values(connection, collection, columns="*", order="1", project=PROJECT):
    return connection.execute(f'SELECT {columns} FROM {project}."{collection}" ORDER BY {order}').fetchall()


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
    assert log_of(database, "acme") == [("create_project", None, "ok", "postgres")]
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


# -- dropping a collection -----------------------------------------------------------------------------------------------


def everything_of(db, collection_id):
    """The internal tables that have rows of a collection, the inbox apart."""
    tables = [
        "hot_chunk",
        "data_file",
        "collection_stat",
        "field",
        "invalid_value",
        "invalid_count",
        "inbox_parked",
        "collection",
        "dropped_field",
        "manifest_log",
    ]
    count = "SELECT count(*) FROM rakam_internal.{} WHERE collection_id = %s"
    return {table for table in tables if one(db.admin, count.format(table), collection_id)}


def fill(db, project, collection, tag):
    """Events in every tier; one has a value that does not fit."""
    collect_batch(db.admin, project, [(collection, {"tag": tag, "n": n}) for n in range(3)])
    db.flush(project, collection)
    collect_batch(db.admin, project, [(collection, {"tag": tag, "n": n}) for n in (3, "four")])
    db.tick()
    collect(db.admin, project, collection, {"tag": tag, "n": 5})


@pytest.mark.parametrize("storage", ["local", "file"])
def test_dropped_collection_is_gone_from_every_tier(db, cluster, storage):
    project = f"drop_{storage}"
    if storage == "file":
        folder = cluster.make_folder("governance-lake")
        db.admin.execute(f"CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
        db.project(project, "lake")
    else:
        db.project(project)
    fill(db, project, "doomed", "old")
    fill(db, project, "other", "other")
    doomed = one(db.admin, "SELECT collection_id FROM rakam_internal.collection WHERE name = 'doomed' ORDER BY 1 DESC")
    assert len(everything_of(db, doomed)) >= 7
    objects = "SELECT count(*) FROM rakam_internal.local_object WHERE project_id = (SELECT project_id FROM rakam_internal.project WHERE name = %s)"
    before = one(db.admin, objects, project)
    project_admin = db.login(project, "admin")
    # The whole project is still being read, under an older snapshot.
    cursor = db.connect(autocommit=False)
    cursor.execute(f"DECLARE c CURSOR FOR SELECT properties->>'tag' FROM {project}._all")
    project_admin.execute("SELECT rakam.drop_collection(%s, 'Doomed')", (project,))
    assert one(db.admin, "SELECT to_regclass(%s)", f"{project}.doomed") is None
    assert one(db.admin, f"SELECT count(*) FROM {project}._all") == 6
    assert everything_of(db, doomed) == set()
    assert one(db.admin, objects, project) * 2 == before
    if storage == "file":
        assert (
            one(db.admin, "SELECT count(*) FROM rakam_internal.file_deferred WHERE reason = 'collection dropped'") == 1
        )
    tags = [tag for (tag,) in cursor.execute("FETCH ALL FROM c").fetchall()]
    assert sorted(tags) == ["old"] * 6 + ["other"] * 6
    cursor.close()
    db.tick()
    assert one(db.admin, "SELECT count(*) FROM rakam.collections WHERE project = %s", project) == 1
    # The name may be used again, by another collection.
    collect(db.admin, project, "doomed", {"tag": 1})
    db.tick()
    assert db.all(f"SELECT tag FROM {project}.doomed") == [(1.0,)]
    with refused("42704", message='"never"', hint="rakam.collections"):
        project_admin.execute("SELECT rakam.drop_collection(%s, 'never')", (project,))


def test_events_on_their_way_go_with_the_collection(db, fresh):
    """Transactions that have sent an event before the drop and commit after it: by id, and by name."""
    by_name = db.connect(autocommit=False)
    collect(by_name, fresh, "doomed", {"tag": "by name, before"})
    collect(db.admin, fresh, "doomed", {"tag": "committed"})
    db.tick()
    by_id = db.connect(autocommit=False)
    collect(by_id, fresh, "doomed", {"tag": "by id, before"})
    db.admin.execute("SELECT rakam.drop_collection(%s, 'doomed')", (fresh,))
    # The same transactions go on: what they send now is for a new collection.
    collect(by_name, fresh, "doomed", {"tag": "by name, after"})
    by_name.commit()
    by_id.commit()
    read = f"SELECT properties->>'tag' FROM {fresh}._all"
    for move in (lambda: None, db.tick, lambda: db.flush(fresh)):
        move()
        assert db.all(read) == [("by name, after",)]
    collect(by_id, fresh, "doomed", {"tag": "later"})
    by_id.commit()
    db.tick()
    assert sorted(db.all(f"SELECT tag FROM {fresh}.doomed")) == [("by name, after",), ("later",)]
    assert one(db.admin, "SELECT count(*) FROM rakam_internal.former_name") == 0


def test_a_dropped_collection_does_not_come_back_by_itself(db, fresh):
    holder = db.connect(autocommit=False)
    collect(holder, fresh, "doomed", {"n": 1})
    collect(db.admin, fresh, "doomed", {"n": 2})
    db.tick()
    db.admin.execute("SELECT rakam.drop_collection(%s, 'doomed')", (fresh,))
    holder.commit()
    db.tick()
    time.sleep(1)
    assert db.all("SELECT collection FROM rakam.collections WHERE project = %s", fresh) == []
    assert one(db.admin, f"SELECT count(*) FROM {fresh}._all") == 0


def test_dependent_views_restrict(db, fresh):
    collect(db.admin, fresh, "seen", {"n": 1, "m": 1})
    db.tick()
    db.admin.execute(f"CREATE VIEW {fresh}.of_n AS SELECT n FROM {fresh}.seen")
    for call, arguments in (("drop_collection", ("seen",)), ("drop_field", ("seen", "n"))):
        places = ", ".join(["%s"] * (1 + len(arguments)))
        with refused("2BP01", hint="depend on it"):
            db.admin.execute(f"SELECT rakam.{call}({places})", (fresh, *arguments))
    db.admin.execute("SELECT rakam.drop_field(%s, 'seen', 'm')", (fresh,))
    assert db.all(f"SELECT n FROM {fresh}.of_n") == [(1.0,)]
    db.admin.execute(f"DROP VIEW {fresh}.of_n")
    db.admin.execute("SELECT rakam.drop_collection(%s, 'seen')", (fresh,))


def test_a_reader_is_waited_for(db, fresh):
    collect(db.admin, fresh, "busy", {"n": 1})
    db.tick()
    holder = db.connect(autocommit=False)
    holder.execute(f"SELECT * FROM {fresh}.busy")
    impatient = db.connect()
    impatient.execute("SET lock_timeout = '300ms'")
    with refused("55P03", hint="raise lock_timeout"):
        impatient.execute("SELECT rakam.drop_collection(%s, 'busy')", (fresh,))
    # The caller itself stands in the way.
    with refused("55P03", hint="transaction of its own"):
        holder.execute("SELECT rakam.drop_field(%s, 'busy', 'n')", (fresh,))
    holder.rollback()
    # Others read and send meanwhile, and it happens once the reader is gone.
    holder.execute(f"SELECT * FROM {fresh}.busy")
    done = threading.Event()

    def drop():
        with db.cluster.connect(db.name) as session:
            session.execute("SELECT rakam.drop_collection(%s, 'busy')", (fresh,))
        done.set()

    thread = threading.Thread(target=drop)
    thread.start()
    for _ in range(5):
        collect(db.admin, fresh, "other", {"n": 1})
        assert one(db.admin, f"SELECT count(*) FROM {fresh}.busy") == 1
        time.sleep(0.1)
    assert not done.is_set()
    holder.rollback()
    thread.join(timeout=60)
    assert done.is_set()


# -- renaming a collection -----------------------------------------------------------------------------------------------


def test_renamed_collection_keeps_its_events(db, fresh):
    by_name = db.connect(autocommit=False)
    collect(by_name, fresh, "old", {"tag": "by name"})
    fill(db, fresh, "old", "filled")
    by_id = db.connect(autocommit=False)
    collect(by_id, fresh, "old", {"tag": "by id"})
    db.admin.execute(f"CREATE VIEW {fresh}.v AS SELECT tag FROM {fresh}.old")
    snapshot = db.connect(autocommit=False)
    snapshot.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    snapshot.execute(f"SELECT count(*) FROM {fresh}.users")
    db.admin.execute("SELECT rakam.rename_collection(%s, 'old', 'New')", (fresh,))
    # An older snapshot reads the same events under the new name.
    assert one(snapshot, f"SELECT count(*) FROM {fresh}.new") == 6
    snapshot.rollback()
    collect(by_name, fresh, "old", {"tag": "another"})
    by_name.commit()
    by_id.commit()
    for move in (lambda: None, db.tick, lambda: db.flush(fresh)):
        move()
        assert one(db.admin, f"SELECT count(*) FROM {fresh}.new WHERE tag = 'filled'") == 6
        assert sorted(db.all(f"SELECT tag FROM {fresh}.new WHERE tag <> 'filled'")) == [("by id",), ("by name",)]
        assert one(db.admin, f"SELECT count(*) FROM {fresh}.v") == 8
        whole = "SELECT _collection, count(*) FROM {}._all GROUP BY 1 ORDER BY 1"
        assert db.all(whole.format(fresh)) == [("new", 8), ("old", 1)]
    assert db.all(f"SELECT tag FROM {fresh}.old") == [("another",)]
    with refused("42710", message='"new" already exists'):
        db.admin.execute("SELECT rakam.rename_collection(%s, 'old', 'new')", (fresh,))
    with refused("42939"):
        db.admin.execute("SELECT rakam.rename_collection(%s, 'old', '_new')", (fresh,))
    with refused("42704"):
        db.admin.execute("SELECT rakam.rename_collection(%s, 'never', 'x')", (fresh,))
    # Names can change places.
    for old, new in (("old", "third"), ("new", "old"), ("third", "new")):
        db.admin.execute("SELECT rakam.rename_collection(%s, %s, %s)", (fresh, old, new))
    assert db.all(f"SELECT tag FROM {fresh}.new") == [("another",)]
    writer = db.login(fresh, "write")
    writer.execute(f"INSERT INTO {fresh}.old (tag) VALUES ('inserted')")
    assert one(db.admin, f"SELECT count(*) FROM {fresh}.old") == 9


# -- dropping a field ----------------------------------------------------------------------------------------------------


def test_dropped_field_is_read_nowhere(db, fresh):
    db.admin.execute("SELECT rakam.create_collection(%s, 'c')", (fresh,))
    # In a file's _extra before the field exists, in columns, as misfits, and in the inbox.
    db.admin.execute(f"INSERT INTO {fresh}.c (_id, _extra) VALUES ('member', '{{\"x\": 7, \"keep\": 1}}')")
    db.flush(fresh)
    collect_batch(db.admin, fresh, [("c", {"_id": "file", "x": 1}), ("c", {"_id": "misfit", "x": "no number"})])
    db.flush(fresh)
    collect_batch(db.admin, fresh, [("c", {"_id": "chunk", "x": 2}), ("c", {"_id": "misfit 2", "x": {"a": 1}})])
    db.tick()
    open_before = db.connect(autocommit=False)
    collect(open_before, fresh, "c", {"_id": "open", "x": 3})
    collect(db.admin, fresh, "c", {"_id": "inbox", "x": 4})
    assert one(db.admin, f"SELECT count(x) FROM {fresh}.c") == 4
    assert one(db.admin, "SELECT count(*) FROM rakam.invalid_value WHERE project = %s", fresh) == 2
    db.admin.execute("SELECT rakam.drop_field(%s, 'c', 'X')", (fresh,))
    collect(open_before, fresh, "c", {"_id": "after the drop", "x": "red"})
    open_before.commit()

    def found():
        return dict(
            db.all(f"SELECT t._id, coalesce(to_jsonb(t)->'x', t._extra->'x') FROM {fresh}.c t WHERE t._id <> '-'")
        )

    gone = dict.fromkeys(("member", "file", "misfit", "chunk", "misfit 2", "open", "inbox"))
    everywhere = f"SELECT properties->'x' FROM {fresh}._all WHERE properties ? 'x'"
    assert not has_column(db.admin, f"{fresh}.c", "x")
    for move in (lambda: None, db.tick, lambda: db.flush(fresh)):
        move()
        assert found() == gone | {"after the drop": "red"}
        assert db.all(everywhere) == [("red",)]
        assert one(db.admin, f"SELECT _extra FROM {fresh}.c WHERE _id = 'member'") == {"keep": 1}
    # It is another field now, of another type, with another id; for older rows it is NULL, also to a filter.
    assert has_column(db.admin, f"{fresh}.c", "x")
    field = db.all("SELECT field_id, type FROM rakam.fields WHERE project = %s AND field = 'x'", fresh)
    assert field == [(17, "text")]
    assert db.all(f"SELECT _id FROM {fresh}.c WHERE x IS NOT NULL") == [("after the drop",)]
    assert one(db.admin, f"SELECT count(*) FROM {fresh}.c WHERE x = '7'") == 0
    assert one(db.admin, "SELECT count(*) FROM rakam.invalid_value WHERE project = %s AND field = 'x'", fresh) == 0
    # A second drop, and a number again: no value of any earlier field shows.
    db.admin.execute("SELECT rakam.drop_field(%s, 'c', 'x')", (fresh,))
    collect(db.admin, fresh, "c", {"_id": "third", "x": 9})
    db.tick()
    assert found() == gone | {"after the drop": None, "third": 9}
    assert db.all("SELECT field_id, type FROM rakam.fields WHERE project = %s AND field = 'x'", fresh) == [
        (18, "double precision")
    ]
    # Whatever time of receipt a new event is given, and where it goes first.
    db.wait_column(f"{fresh}.c", "x")
    old = "timestamptz '2001-01-01 00:00:00+00'"
    db.admin.execute(f"INSERT INTO {fresh}.c (_id, x, _received_at) VALUES ('old', 10, {old})")
    db.admin.execute(
        f"INSERT INTO {fresh}.c (_id, x, _received_at) SELECT 'old' || n, n, {old} FROM generate_series(1, 2000) n"
    )
    db.tick()
    assert one(db.admin, f"SELECT x FROM {fresh}.c WHERE _id = 'old'") == 10
    assert one(db.admin, f"SELECT count(x) FROM {fresh}.c WHERE _id LIKE 'old%%'") == 2001


def test_what_cannot_be_dropped(db, keys, writer, reader, admin):
    collect(db.admin, PROJECT, "undroppable", {"n": 1})
    db.tick()
    with refused("42703", hint="rakam.fields"):
        admin.execute("SELECT rakam.drop_field('acme', 'undroppable', 'm')")
    with refused("42939", hint="Every collection"):
        admin.execute("SELECT rakam.drop_field('acme', 'undroppable', '_user')")
    with refused("22004"):
        admin.execute("SELECT rakam.drop_field('acme', 'undroppable', NULL)")
    for session in (writer, reader):
        for call in ("drop_collection('acme', 'undroppable')", "rename_collection('acme', 'undroppable', 'x')",
                     "drop_field('acme', 'undroppable', 'n')"):  # fmt: skip
            with refused("42501", message='project "acme"'):
                session.execute(f"SELECT rakam.{call}")


# -- the values of a field -----------------------------------------------------------------------------------------------


def test_field_values(db, keys, reader, writer):
    events = [("valued", {"page": page, "n": n, "tags": ["a", page], "ok": True})
              for n, page in enumerate(["/", "/a", "/a", "/b%", "/b%", "/b_", None, "x"])]  # fmt: skip
    collect_batch(db.admin, PROJECT, events[:3])
    db.flush(PROJECT, "valued")
    collect_batch(db.admin, PROJECT, events[3:5])
    db.tick()
    collect_batch(db.admin, PROJECT, events[5:])
    call = "SELECT * FROM rakam.field_values('acme', 'valued', {})"

    def found(arguments):
        return reader.execute(call.format(arguments)).fetchall()

    assert found("'page'") == [("/a", 2), ("/b%", 2), ("/", 1), ("/b_", 1), ("x", 1)]
    assert found("'page', max_rows => 2") == [("/a", 2), ("/b%", 2)]
    assert found("'page', '/b%'") == [("/b%", 2)]
    assert found("'Page', prefix => '/b'") == [("/b%", 2), ("/b_", 1)]
    assert found("'page', max_rows => 0") == []
    assert found("'ok'") == [("true", 8)]
    assert found("'n', '7'") == [("7", 1)]
    assert found("'tags', '{a,x'") == [("{a,x}", 1)]
    assert found("'_user'") == []
    session = db.connect(autocommit=False)
    collect(session, PROJECT, "valued", {"page": "mine"})
    assert session.execute(call.format("'page', 'm'")).fetchall() == [("mine", 1)]
    session.rollback()
    with refused("42703", hint="rakam.fields"):
        found("'nothing'")
    with refused("22023"):
        found("'page', max_rows => -1")
    with refused("22004"):
        found("'page', max_rows => NULL")
    with refused("42704"):
        reader.execute("SELECT * FROM rakam.field_values('acme', 'nowhere', 'page')")
    with refused("42501", message='project "acme"'):
        writer.execute(call.format("'page'"))


# -- the audit log -------------------------------------------------------------------------------------------------------


def log_of(db, project):
    return db.all("SELECT call, object, outcome, role FROM rakam.audit_log WHERE project = %s ORDER BY at", project)


def test_audit_log(db, fresh):
    project_admin, project_writer = db.login(fresh, "admin"), db.login(fresh, "write")
    admin_role, writer_role = (session.info.user for session in (project_admin, project_writer))
    assert log_of(db, fresh) == [("create_project", None, "ok", "postgres")]
    collect(project_writer, fresh, "hit", {"n": 1})
    project_admin.execute("SELECT rakam.create_collection(%s, 'hit')", (fresh,))
    project_admin.execute("SELECT rakam.add_field(%s, 'hit', 'm', 'text')", (fresh,))
    with refused("42501"):
        project_writer.execute("SELECT * FROM rakam.create_keys(%s)", (fresh,))
    with refused("42710"):
        project_admin.execute("SELECT rakam.add_field(%s, 'hit', 'm', 'bigint')", (fresh,))
    project_admin.execute("SELECT * FROM rakam.field_values(%s, 'hit', 'm')", (fresh,))
    session = db.connect(autocommit=False)
    session.execute("SELECT rakam.set_schema_mode(%s, 'fixed')", (fresh,))
    session.rollback()
    session.execute("SAVEPOINT s")
    session.execute("SELECT rakam.set_time_bounds(%s, '1 day', '1 day')", (fresh,))
    session.execute("ROLLBACK TO s")
    session.execute("SELECT rakam.set_schema_mode(%s, 'open')", (fresh,))
    session.commit()
    expected = [
        ("create_project", None, "ok", "postgres"),
        ("create_collection", "hit", "ok", admin_role),
        ("add_field", "hit.m", "ok", admin_role),
        ("create_keys", None, "error 42501", writer_role),
        ("add_field", "hit.m", "error 42710", admin_role),
        ("set_schema_mode", "fixed", "rolled back", "postgres"),
        ("set_time_bounds", None, "rolled back", "postgres"),
        ("set_schema_mode", "open", "ok", "postgres"),
    ]
    wait_until(lambda: len(log_of(db, fresh)) >= len(expected), "what was refused is noted, too")
    assert log_of(db, fresh) == expected
    # By whom, behind the role that it acted as.
    key = one(db.admin, "SELECT master_key FROM rakam.create_keys(%s)", fresh)
    db.make_login("login_pool")
    pool = db.connect("login_pool", autocommit=False)
    pool.execute("SELECT rakam.authenticate(%s)", (key,))
    pool.execute("SELECT rakam.flush(%s)", (fresh,))
    pool.commit()
    roles = "SELECT role, session_role FROM rakam_internal.audit_log WHERE project = %s AND call = 'flush'"
    assert db.all(roles, fresh) == [(f"rakam_{fresh}_admin", "login_pool")]
    # Members see the log of their projects, others none of it; nobody of them writes it.
    assert one(project_writer, "SELECT count(*) FROM rakam.audit_log") == len(expected) + 2
    assert one(db.connect("login_pool"), "SELECT count(*) FROM rakam.audit_log") == 0
    with refused("42501"):
        project_admin.execute("DELETE FROM rakam_internal.audit_log")


def test_what_takes_effect_at_once_survives_a_rollback_and_the_log_says_so(db, fresh):
    """Calls that work in a worker commit there: also inside a transaction block, where those that take away say it."""
    for n in range(4):
        collect(db.admin, fresh, "hit", {"n": n, "odd": bool(n % 2)})
    db.tick()
    session = db.connect(autocommit=False)
    calls = [
        (f"create_collection('{fresh}', 'made')", "made", False),
        (f"add_field('{fresh}', 'made', 'f', 'inet')", "made.f", False),
        (f"rename_collection('{fresh}', 'made', 'renamed')", "made", False),
        (f"delete_events('{fresh}', 'hit', 'odd')", "hit", True),
        (f"set_retention('{fresh}', 'hit', '10 years')", "hit", True),
        (f"drop_field('{fresh}', 'hit', 'odd')", "hit.odd", True),
        (f"drop_collection('{fresh}', 'renamed')", "renamed", True),
    ]
    for call, _, takes_away in calls:
        told = notices_of(session, f"SELECT rakam.{call}")
        session.rollback()
        assert any("ROLLBACK does not undo" in n.message for n in told) == takes_away, (call, told)
    assert db.all(f"SELECT n FROM {fresh}.hit ORDER BY n") == [(0,), (2,)]
    assert db.one("SELECT retention FROM rakam.collections WHERE project = %s", fresh) is not None
    assert db.all("SELECT collection, field FROM rakam.fields WHERE project = %s", fresh) == [("hit", "n")]
    expected = [("create_project", None, "ok", "postgres")]
    expected += [(call.split("(")[0], what, "ok", "postgres") for call, what, _ in calls]
    # What a worker of the background notes comes behind this, if anything does.
    with refused("42501"):
        db.login(fresh, "read").execute("SELECT rakam.drop_collection(%s, 'hit')", (fresh,))
    wait_until(lambda: log_of(db, fresh)[-1][2] == "error 42501", "what was refused is noted")
    assert log_of(db, fresh)[:-1] == expected
    # In a transaction of its own there is nothing to be said.
    assert not notices_of(db.admin, f"SELECT rakam.delete_events('{fresh}', 'hit', 'true')")
    assert db.one(f"SELECT count(*) FROM {fresh}.hit") == 0


def test_audit_of_everything_and_of_nothing(db, fresh):
    session = db.connect()
    session.execute("SET rakam.audit = 'all'")
    collect(session, fresh, "hit", {"n": 1})
    session.execute("SELECT rakam.create_collection(%s, 'hit')", (fresh,))
    session.execute("SELECT * FROM rakam.field_values(%s, 'hit', '_user')", (fresh,))
    session.execute("BEGIN READ ONLY")
    session.execute("SELECT * FROM rakam.field_values(%s, 'hit', '_id')", (fresh,))
    session.execute("COMMIT")
    session.execute("SET rakam.audit = 'off'")
    session.execute("SELECT rakam.set_schema_mode(%s, 'open')", (fresh,))
    with refused("22023"):
        session.execute("SELECT rakam.set_schema_mode(%s, 'no')", (fresh,))
    expected = [("create_project", "ok"), ("create_collection", "ok"), ("field_values", "ok"), ("field_values", "ok")]
    wait_until(lambda: len(log_of(db, fresh)) >= len(expected), "the entries")
    time.sleep(0.3)
    assert [(call, outcome) for call, _, outcome, _ in log_of(db, fresh)] == expected
    tenant = db.login(fresh, "admin")
    with refused("42501"):
        tenant.execute("SET rakam.audit = 'off'")


def test_a_flood_of_refused_calls_waits_for_nobody(db, fresh):
    """More than the queue holds: the rest is in the server's log."""
    mark = db.cluster.log_mark()
    stranger_name = "login_stranger"
    db.make_login(stranger_name)
    stranger = db.connect(stranger_name)
    calls = 1500
    stranger.execute(
        f"""DO $$ BEGIN FOR i IN 1..{calls} LOOP
              BEGIN PERFORM rakam.create_keys('{fresh}'); EXCEPTION WHEN insufficient_privilege THEN NULL; END;
            END LOOP; END $$"""
    )
    noted = "SELECT count(*) FROM rakam.audit_log WHERE project = %s AND call = 'create_keys'"

    def all_noted():
        logged = db.cluster.log_since(mark).count("called create_keys for project")
        return one(db.admin, noted, fresh) + logged == calls

    wait_until(all_noted, "each call in the table or in the server's log")
    assert one(db.admin, noted, fresh) >= 256


# -- logs do not grow without bound --------------------------------------------------------------------------------------


def test_a_flood_of_invalid_values_is_counted_and_sampled(db, fresh):
    collect(db.admin, fresh, "hit", {"n": 1})
    db.tick()
    for part in range(4):
        collect_batch(db.admin, fresh, [("hit", {"n": f"bad {n}", "_id": f"{part} {n}"}) for n in range(500)])
        db.tick()
    found = db.all("SELECT count(*), min(count), max(count) FROM rakam.invalid_value WHERE project = %s", fresh)
    samples = found[0][0]
    assert 20 <= samples <= 100
    assert found[0][1:] == (2000, 2000)
    collections = "SELECT invalid_values FROM rakam.stat_collection WHERE project = %s AND collection = 'hit'"
    assert one(db.admin, collections, fresh) == 2000
    assert one(db.admin, f"SELECT count(*) FROM {fresh}.hit WHERE _extra->>'n' LIKE 'bad %%'") == 2000


def test_retention_of_logs(db, fresh):
    collect(db.admin, fresh, "hit", {"n": 1})
    db.tick()
    collect(db.admin, fresh, "hit", {"n": "bad"})
    db.tick()
    project = one(db.admin, "SELECT project_id FROM rakam_internal.project WHERE name = %s", fresh)
    db.admin.execute(
        "INSERT INTO rakam_internal.dead_letter (project_id, payload, error) VALUES (%s, '{}', 'why')", (project,)
    )
    for table in ("invalid_value", "dead_letter", "audit_log"):
        db.admin.execute(
            f"UPDATE rakam_internal.{table} SET at = now() - interval '2 days' WHERE project_id = %s", (project,)
        )
    left = "SELECT " + ", ".join(
        f"(SELECT count(*) FROM rakam.{view} WHERE project = %s)"
        for view in ("invalid_value", "dead_letter", "audit_log")
    )
    db.tick()
    assert db.admin.execute(left, (fresh,) * 3).fetchone() == (1, 1, 1)
    settings = ("invalid_retention", "dead_letter_retention", "audit_retention")
    db.configure(**dict.fromkeys(settings, "1d"))
    try:
        db.tick()
        assert db.admin.execute(left, (fresh,) * 3).fetchone() == (0, 0, 0)
        # The exact counts stay.
        assert one(db.admin, "SELECT invalid_values FROM rakam.stat_collection WHERE project = %s", fresh) == 1
    finally:
        db.configure(**dict.fromkeys(settings))


def test_upkeep_waits_for_nobody(db, fresh):
    """For no dead letter that is being replayed, and no project that is being changed, while everybody's digest waits for it."""
    project = one(db.admin, "SELECT project_id FROM rakam_internal.project WHERE name = %s", fresh)
    db.admin.execute(
        "INSERT INTO rakam_internal.dead_letter (project_id, collection, payload, error, at)"
        " SELECT %s, 'hit', '{\"n\": 1}', 'why', now() - interval '2 days' FROM generate_series(1, 2)",
        (project,),
    )
    replaying, changing = db.connect(autocommit=False), db.connect(autocommit=False)
    ticking = db.connect()
    ticking.execute("SET statement_timeout = '20s'")
    try:
        ids = replaying.execute(
            "SELECT id FROM rakam_internal.dead_letter WHERE project_id = %s ORDER BY id LIMIT 1 FOR UPDATE", (project,)
        ).fetchall()
        changing.execute("SELECT rakam.set_time_bounds(%s, '1 year', '1 day')", (fresh,))
        db.admin.execute(f"ALTER ROLE rakam_{fresh}_read RENAME TO rakam_{fresh}_renamed_read")
        db.configure(dead_letter_retention="1d")
        ticking.execute("SELECT rakam.tick()")
        # What nobody is at is done.
        left = "SELECT id FROM rakam_internal.dead_letter WHERE project_id = %s"
        wait_until(lambda: db.all(left, project) == ids, "the other letter is dropped")
        changing.rollback()
        replaying.rollback()
        name = "SELECT read_role_name FROM rakam_internal.project WHERE name = %s"
        wait_until(lambda: one(db.admin, name, fresh) == f"rakam_{fresh}_renamed_read", "the new name", 30)
        wait_until(lambda: db.all(left, project) == [], "the last letter is dropped", 30)
    finally:
        replaying.close()
        changing.close()
        ticking.close()
        db.configure(dead_letter_retention=None)
