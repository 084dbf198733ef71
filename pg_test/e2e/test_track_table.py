"""Tracked tables: each changed row is an event, in the same transaction (SPEC: tiers, track_table)."""

from __future__ import annotations

import json
import subprocess

import psycopg
import pytest
from harness.database import Database, notices_of, one, refused, wait_until

PROJECT = "acme"


@pytest.fixture(scope="module")
def owner(db):
    """An admin of the project who owns tables of schema `shop`."""
    db.project(PROJECT)
    session = db.login(PROJECT, "admin", name="login_shop")
    db.admin.execute("CREATE SCHEMA shop AUTHORIZATION login_shop; GRANT USAGE ON SCHEMA shop TO PUBLIC")
    return session


@pytest.fixture(scope="module")
def clerk(db, owner):
    """Somebody who writes the tables and knows nothing of rakam."""
    db.make_login("login_clerk")
    return db.connect("login_clerk")


@pytest.fixture
def table(db, owner, request):
    """The name of a table and of the collection for its changes."""
    name = request.node.name.split("[")[0].removeprefix("test_")[:40]
    db.admin.execute("DELETE FROM rakam_internal.dead_letter")
    yield name
    db.admin.execute(f"DROP TABLE IF EXISTS shop.{name} CASCADE")


def create(owner, table, columns="id int PRIMARY KEY, name text, price numeric(10,2)", more=""):
    owner.execute(f"CREATE TABLE shop.{table} ({columns}) {more}; GRANT ALL ON shop.{table} TO login_clerk")


def track(session, table, collection=None):
    session.execute("SELECT rakam.track_table(%s, %s, %s::regclass)", (PROJECT, collection or table, f"shop.{table}"))


def events(db, collection, *names):
    """(op, value of each name) of the events, as text, in order."""
    columns = "".join(f", properties->>'{name}'" for name in names)
    rows = db.all(
        f"SELECT properties->>'op' AS op{columns} FROM acme._all WHERE _collection = '{collection}' ORDER BY 1, 2"
        if names
        else f"SELECT properties->>'op' FROM acme._all WHERE _collection = '{collection}' ORDER BY 1"
    )
    return rows


# -- what becomes an event -----------------------------------------------------------------------------------------------


def test_each_changed_row_is_an_event(db, owner, clerk, table):
    create(owner, table)
    track(owner, table)
    clerk.execute(f"INSERT INTO shop.{table} VALUES (1, 'pen', 1.50), (2, 'ink', 9.99), (3, 'cap', NULL)")
    clerk.execute(f"UPDATE shop.{table} SET price = price + 1 WHERE id < 3")
    clerk.execute(f"UPDATE shop.{table} SET price = 0 WHERE id > 3")
    clerk.execute(f"DELETE FROM shop.{table} WHERE id = 1")
    assert events(db, table, "id", "name", "price") == [
        ("delete", "1", "pen", "2.5"),
        ("insert", "1", "pen", "1.5"),
        ("insert", "2", "ink", "9.99"),
        ("insert", "3", "cap", None),
        ("update", "1", "pen", "2.5"),
        ("update", "2", "ink", "10.99"),
    ]
    clerk.execute(f"TRUNCATE shop.{table}")
    assert events(db, table)[-3:] == [("truncate",), ("update",), ("update",)]
    db.tick()
    assert db.all(f"SELECT op, count(*) FROM acme.{table} GROUP BY op ORDER BY op") == [
        ("delete", 1), ("insert", 3), ("truncate", 1), ("update", 2),
    ]  # fmt: skip


def test_in_the_same_transaction(db, owner, clerk, table):
    create(owner, table)
    track(owner, table)
    clerk.execute("BEGIN")
    clerk.execute(f"INSERT INTO shop.{table} VALUES (1, 'pen', 1)")
    clerk.execute("SAVEPOINT s")
    clerk.execute(f"INSERT INTO shop.{table} VALUES (2, 'ink', 1)")
    clerk.execute("ROLLBACK TO s")
    assert events(db, table) == []
    clerk.execute("COMMIT")
    assert events(db, table, "id") == [("insert", "1")]
    clerk.execute(f"BEGIN; DELETE FROM shop.{table}; ROLLBACK")
    assert events(db, table, "id") == [("insert", "1")]


def test_every_kind_of_write(db, owner, clerk, table):
    create(owner, table)
    track(owner, table)
    with clerk.cursor().copy(f"COPY shop.{table} FROM STDIN") as copy:
        for n in range(3):
            copy.write_row((n, f"n{n}", None))
    clerk.execute(
        f"INSERT INTO shop.{table} VALUES (2, 'two'), (3, 'three') ON CONFLICT (id) DO UPDATE SET name = excluded.name"
    )
    clerk.execute(f"INSERT INTO shop.{table} VALUES (3, 'no') ON CONFLICT DO NOTHING")
    clerk.execute(f"""MERGE INTO shop.{table} t USING (VALUES (0, 'gone'), (1, 'one'), (4, 'four')) v(id, name) ON t.id = v.id
        WHEN MATCHED AND v.name = 'gone' THEN DELETE WHEN MATCHED THEN UPDATE SET name = v.name
        WHEN NOT MATCHED THEN INSERT VALUES (v.id, v.name)""")
    clerk.execute(
        f"WITH d AS (DELETE FROM shop.{table} WHERE id = 4 RETURNING *) INSERT INTO shop.{table} SELECT 5, name FROM d"
    )
    assert events(db, table, "id", "name") == [
        ("delete", "0", "n0"), ("delete", "4", "four"),
        ("insert", "0", "n0"), ("insert", "1", "n1"), ("insert", "2", "n2"), ("insert", "3", "three"),
        ("insert", "4", "four"), ("insert", "5", "four"),
        ("update", "1", "one"), ("update", "2", "two"),
    ]  # fmt: skip


def test_types_become_their_json(db, owner, clerk, table):
    create(owner, table, """id int, big bigint, ratio float8, flag bool, day date, at timestamptz, plain timestamp,
        span interval, raw bytea, tags text[], doc jsonb, verbatim json, net inet, "userName" text, "Weird.Name" text,
        twice int GENERATED ALWAYS AS (id * 2) STORED""")  # fmt: skip
    owner.execute(f"ALTER TABLE shop.{table} ADD gone int; ALTER TABLE shop.{table} DROP gone")
    track(owner, table)
    clerk.execute(
        "SET extra_float_digits = -10; SET bytea_output = escape; SET TimeZone = 'Asia/Tokyo'; SET IntervalStyle = iso_8601"
    )
    clerk.execute(f"""INSERT INTO shop.{table} VALUES (7, 9007199254740993, 0.1234567890123456, true, '2024-02-29',
        '2024-02-29 12:00+00', '2024-02-29 12:00', '1 day', '\\x00ff', '{{a,NULL}}', '{{"a": [1]}}', E'{{"b":\\n2}}', '10.0.0.1',
        'ada', 'w')""")
    clerk.execute("RESET ALL")
    (found,) = (row[0] for row in db.all(f"SELECT properties FROM acme._all WHERE _collection = '{table}'"))
    assert found["big"] == 9007199254740993 and found["ratio"] == 0.1234567890123456
    assert (found["flag"], found["day"], found["twice"]) == (True, "2024-02-29", 14)
    assert found["at"].startswith("2024-02-29T12:00:00")
    assert (found["plain"][:19], found["span"], found["raw"]) == ("2024-02-29T12:00:00", "1 day", "\\x00ff")
    assert (found["tags"], found["doc"], found["verbatim"]) == (["a", None], {"a": [1]}, {"b": 2})
    assert (found["net"], found["user_name"], found["weird_name"]) == ("10.0.0.1", "ada", "w")
    assert "gone" not in found
    db.tick()
    assert db.all(
        f"SELECT big, ratio, flag, day::text, extract(epoch from at)::bigint, user_name, twice FROM acme.{table}"
    ) == [(9007199254740993, 0.1234567890123456, True, "2024-02-29", 1709208000, "ada", 14)]


def test_columns_with_names_that_mean_something_else(db, owner, clerk, table):
    create(owner, table, '_id int, op text, _received_at text, _extra jsonb, "$server_time" int, _user text, v int')
    track(owner, table)
    clerk.execute(f"INSERT INTO shop.{table} VALUES (1, 'x', 'then', '{{}}', 5, 'ada', 1)")
    clerk.execute(f"UPDATE shop.{table} SET v = 2")
    clerk.execute(f"UPDATE shop.{table} SET v = 3")
    db.tick()
    rows = db.all(
        f"SELECT op, _id, table_id, table_op, table_received_at, table_server_time, _user, v FROM acme.{table} ORDER BY v"
    )
    assert rows == [(op, None, 1, "x", "then", 5, "ada", v) for op, v in (("insert", 1), ("update", 2), ("update", 3))]
    assert db.all("SELECT * FROM rakam.dead_letter") == []


def test_an_event_that_is_refused_does_not_stop_the_writer(db, owner, clerk, table):
    create(owner, table, "id int, doc text")
    track(owner, table)
    clerk.execute(
        f"INSERT INTO shop.{table} SELECT n, CASE n WHEN 2 THEN repeat('x', 1100000) ELSE 'small' END FROM generate_series(1, 3) n"
    )
    assert one(clerk, f"SELECT count(*) FROM shop.{table}") == 3
    assert events(db, table, "id") == [("insert", "1"), ("insert", "3")]
    ((payload, error, source),) = db.all("SELECT payload, error, source FROM rakam.dead_letter")
    assert json.loads(bytes(payload))["id"] == 2 and "54000" in error and source is None
    assert one(owner, "SELECT rakam.replay_dead_letters('acme', NULL)") == 0
    session = db.connect()
    session.execute("SET rakam.max_event_bytes = '4MB'")
    assert one(session, "SELECT rakam.replay_dead_letters('acme', NULL)") == 1
    assert len(events(db, table)) == 3


def test_a_quota_that_is_used_up_stops_no_writer(db, owner, clerk, table):
    db.project("metered")
    db.admin.execute("SELECT rakam.set_quota('metered', 5, NULL, NULL, NULL)")
    create(owner, table)
    db.admin.execute("SELECT rakam.track_table('metered', %s, %s)", (table, f"shop.{table}"))
    clerk.execute(f"INSERT INTO shop.{table} SELECT n FROM generate_series(1, 1000) n")
    assert one(clerk, f"SELECT count(*) FROM shop.{table}") == 1000
    ((payload, error),) = db.all("SELECT payload, error FROM rakam.dead_letter WHERE project = 'metered'")
    assert len(bytes(payload).split(b"\n")) == 1000 and "53400" in error
    db.admin.execute("SELECT rakam.set_quota('metered', NULL, NULL, NULL, NULL)")
    assert db.one("SELECT rakam.replay_dead_letters('metered', NULL)") == 1
    assert db.one(f"SELECT count(DISTINCT properties->>'id') FROM metered._all WHERE _collection = '{table}'") == 1000


def test_refused_changes_use_up_no_bytes(db, owner, clerk, table):
    db.project("weighed")
    db.admin.execute("SELECT rakam.set_quota('weighed', 5, 200000, NULL, NULL)")
    create(owner, table)
    db.admin.execute("SELECT rakam.track_table('weighed', %s, %s)", (table, f"shop.{table}"))
    for first in range(0, 10_000, 1_000):
        clerk.execute(f"INSERT INTO shop.{table} SELECT n FROM generate_series({first}, {first + 999}) n")
    assert db.one("SELECT count(*) FROM rakam.dead_letter WHERE project = 'weighed'") == 10
    wait_until(lambda: collected(db, "weighed"), "the rate of a second is over")


def untried(db, owner, clerk, table: str, project: str, rows: int, doc: int = 1_000) -> None:
    """Changes that a project's quota has refused: so many rows with a text of so many bytes, a dead letter each."""
    db.project(project)
    db.admin.execute("SELECT rakam.set_quota(%s, NULL, 0, NULL, NULL)", (project,))
    create(owner, table, "id int, doc text")
    db.admin.execute("SELECT rakam.track_table(%s, %s, %s)", (project, table, f"shop.{table}"))
    for n in range(rows):
        clerk.execute(f"INSERT INTO shop.{table} VALUES ({n}, repeat('x', {doc}))")
    assert left(db, project) == rows


def left(db, project: str) -> int:
    return db.one("SELECT count(*) FROM rakam.dead_letter WHERE project = %s", project)


def test_replayed_changes_are_charged(db, owner, clerk, table):
    untried(db, owner, clerk, table, "charged", 5)
    quota = "SELECT rakam.set_quota('charged', NULL, %s, NULL, NULL)"
    replay = "SELECT rakam.replay_dead_letters('charged')"
    db.admin.execute(quota, (2_500,))
    # What is rolled back is given back.
    session = db.connect(autocommit=False)
    for _ in range(3):
        assert one(session, replay) == 2
        session.rollback()
    assert left(db, "charged") == 5
    told = [notice for notice in notices_of(db.admin, replay) if notice.severity == "WARNING"]
    reason = 'project "charged" has reached its quota of 2500 bytes per day'
    assert [notice.message for notice in told] == [f"not all dead letters were tried: {reason}"]
    assert "again later" in told[0].hint
    for _ in range(2):
        assert left(db, "charged") == 3
        assert db.one(replay) == 0
        # Moving the events on changes nothing.
        db.tick()
    db.admin.execute(quota, (None,))
    assert db.one(replay) == 3
    assert db.one("SELECT count(*) FROM charged._all") == 5
    assert db.one("SELECT count(DISTINCT properties->>'id') FROM charged._all") == 5


def test_replayed_changes_keep_to_the_rate(db, owner, clerk, table):
    untried(db, owner, clerk, table, "rated", 15, doc=1)
    clerk.execute(f"INSERT INTO shop.{table} SELECT n, 'x' FROM generate_series(15, 114) n")
    replay = "SELECT rakam.replay_dead_letters('rated')"
    db.admin.execute("SELECT rakam.set_quota('rated', 5, NULL, NULL, NULL)")
    assert 5 <= db.one(replay) < 15
    # The last one has more events than a second may have: it comes when nothing is owed.
    wait_until(lambda: (db.one(replay), left(db, "rated"))[1] == 0, "all of them")
    assert db.one("SELECT count(*) FROM rated._all") == 115
    with refused("53400"):
        db.admin.execute("SELECT rakam.collect('rated', 'c', '{}')")


def test_a_change_is_charged_once_however_often_its_mapper_fails(db, owner, clerk, table):
    untried(db, owner, clerk, table, "once", 1)
    db.admin.execute(
        "CREATE FUNCTION once.fails(event jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$BEGIN RAISE 'no'; END$$"
    )
    db.admin.execute("SELECT rakam.set_mapper('once', %s, 'once.fails(jsonb)')", (table,))
    db.admin.execute("SELECT rakam.set_quota('once', NULL, 1500, NULL, NULL)")
    replay = "SELECT rakam.replay_dead_letters('once')"
    assert [db.one(replay) for _ in range(3)] == [0, 0, 0]
    db.admin.execute("SELECT rakam.set_mapper('once', %s, NULL)", (table,))
    assert db.one(replay) == 1
    send = "SELECT rakam.collect('once', 'c', jsonb_build_object('x', repeat('y', %s)))"
    for _ in range(2):
        with refused("53400"):
            db.admin.execute(send, (600,))
        db.tick()
    db.admin.execute(send, (300,))


def collected(db, project: str) -> bool:
    try:
        db.admin.execute("SELECT rakam.collect(%s, 'c', jsonb_build_object('x', repeat('y', 150000)))", (project,))
    except psycopg.errors.ConfigurationLimitExceeded as error:
        assert "events per second" in str(error)
        return False
    return True


def test_a_refused_change_of_several_lines_is_replayed(db, owner, clerk, table):
    """Values of type json keep their line breaks."""
    db.project("lines")
    db.admin.execute("SELECT rakam.set_quota('lines', NULL, NULL, NULL, 0)")
    owner.execute(f"CREATE TABLE shop.{table} (id int PRIMARY KEY, doc json)")
    owner.execute(f"GRANT ALL ON shop.{table} TO PUBLIC")
    db.admin.execute("SELECT rakam.track_table('lines', %s, %s)", (table, f"shop.{table}"))
    clerk.execute(f"INSERT INTO shop.{table} VALUES (1, E'{{\n \"a\": 1\n}}')")
    db.admin.execute("SELECT rakam.set_quota('lines', NULL, NULL, NULL, NULL)")
    assert db.one("SELECT rakam.replay_dead_letters('lines', NULL)") == 1
    assert db.one("SELECT properties->'doc'->>'a' FROM lines._all") == "1"


def test_mappers_see_the_changes_and_their_errors_stop_nobody(db, owner, clerk, table):
    create(owner, table)
    track(owner, table)
    owner.execute("""CREATE FUNCTION acme.no_pens(event jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
        BEGIN IF event->>'name' = 'pen' THEN RAISE 'no pens'; END IF; RETURN event || '{"mapped": true}'; END $$""")
    owner.execute("SELECT rakam.set_mapper('acme', %s, 'acme.no_pens(jsonb)')", (table,))
    clerk.execute(f"INSERT INTO shop.{table} VALUES (1, 'pen'), (2, 'ink')")
    assert events(db, table, "name", "mapped") == [("insert", "ink", "true")]
    assert "no pens" in db.one("SELECT error FROM rakam.dead_letter")


def test_many_rows_in_one_statement(db, owner, clerk, table):
    create(owner, table)
    track(owner, table)
    clerk.execute(f"INSERT INTO shop.{table} SELECT n, 'name of ' || n, n FROM generate_series(1, 20000) n")
    clerk.execute(f"UPDATE shop.{table} SET name = 'x'")
    assert db.one(f"SELECT count(*) FROM acme._all WHERE _collection = '{table}'") == 40000
    entries = db.one("SELECT sum(c) FROM (" + " UNION ALL ".join(
        f"SELECT count(*) AS c FROM rakam_internal.inbox_{k} WHERE collection = '{table}'" for k in range(3)) + ") i")  # fmt: skip
    assert entries < 20


# -- partitions and heirs ------------------------------------------------------------------------------------------------


def test_partitions(db, owner, clerk, table):
    create(owner, table, "id int, region text", "PARTITION BY LIST (region)")
    for region in ("eu", "us"):
        owner.execute(f"CREATE TABLE shop.{table}_{region} PARTITION OF shop.{table} FOR VALUES IN ('{region}');"
                      f" GRANT ALL ON shop.{table}_{region} TO login_clerk")  # fmt: skip
    track(owner, table)
    clerk.execute(f"INSERT INTO shop.{table} VALUES (1, 'eu'), (2, 'us')")
    clerk.execute(f"INSERT INTO shop.{table}_eu VALUES (3, 'eu')")
    clerk.execute(f"UPDATE shop.{table} SET region = 'us' WHERE id = 1")
    clerk.execute(f"DELETE FROM shop.{table} WHERE id = 2")
    assert events(db, table, "id", "region") == [
        ("delete", "2", "us"), ("insert", "1", "eu"), ("insert", "2", "us"), ("insert", "3", "eu"), ("update", "1", "us"),
    ]  # fmt: skip
    clerk.execute(f"TRUNCATE shop.{table}")
    assert [op for (op,) in events(db, table)].count("truncate") == 1
    clerk.execute(f"TRUNCATE shop.{table}_eu")
    clerk.execute(f"TRUNCATE shop.{table}_eu, shop.{table}_us")
    assert [op for (op,) in events(db, table)].count("truncate") == 4
    # A partition that comes later: by the whole at once, by itself once the table is tracked anew.
    owner.execute(f"CREATE TABLE shop.{table}_asia PARTITION OF shop.{table} FOR VALUES IN ('asia');"
                  f" GRANT ALL ON shop.{table}_asia TO login_clerk")  # fmt: skip
    clerk.execute(f"INSERT INTO shop.{table} VALUES (4, 'asia')")
    clerk.execute(f"INSERT INTO shop.{table}_asia VALUES (5, 'asia')")
    track(owner, table)
    clerk.execute(f"INSERT INTO shop.{table}_asia VALUES (6, 'asia')")
    assert [e for e in events(db, table, "id", "region") if e[2] == "asia"] == [
        ("insert", "4", "asia"),
        ("insert", "6", "asia"),
    ]


def test_inheritance(db, owner, clerk, table):
    create(owner, table, "id int")
    owner.execute(
        f"CREATE TABLE shop.{table}_heir (more text) INHERITS (shop.{table}); GRANT ALL ON shop.{table}_heir TO login_clerk"
    )
    track(owner, table)
    clerk.execute(f"INSERT INTO shop.{table} VALUES (1)")
    clerk.execute(f"INSERT INTO shop.{table}_heir VALUES (2, 'more')")
    clerk.execute(f"UPDATE shop.{table} SET id = id + 10")
    assert events(db, table, "id", "more") == [
        ("insert", "1", None), ("insert", "2", "more"), ("update", "11", None), ("update", "12", None),
    ]  # fmt: skip


# -- who may, and what cannot be tracked -----------------------------------------------------------------------------------


def test_who_may_track_what(db, owner, clerk, table):
    create(owner, table)
    stranger = db.login("rival", "admin", name="login_rival") if db.project("rival") else None
    writer = db.login(PROJECT, "write", name="login_shop_writer")
    call = "SELECT rakam.track_table(%s, %s, %s)"
    with refused("42501", message="owner"):
        db.login(PROJECT, "admin", name="login_other_admin").execute(call, (PROJECT, table, f"shop.{table}"))
    with refused("42501", message="owner"):
        stranger.execute(call, ("rival", table, f"shop.{table}"))
    with refused("42501", message="project"):
        owner.execute(call, ("rival", table, f"shop.{table}"))
    with refused("42501", message="project"):
        writer.execute(call, (PROJECT, table, f"shop.{table}"))
    with refused("42939"):
        owner.execute(call, (PROJECT, "users", f"shop.{table}"))
    for arguments in ((None, "x", f"shop.{table}"), (PROJECT, None, f"shop.{table}"), (PROJECT, "x", None)):
        with refused("22004"):
            owner.execute("SELECT rakam.track_table(%s, %s, %s::regclass)", arguments)
    owner.execute(f"CREATE VIEW shop.{table}_view AS SELECT * FROM shop.{table}")
    with refused("42809", hint="partitioned"):
        owner.execute(call, (PROJECT, table, f"shop.{table}_view"))
    with refused("0A000"):
        db.admin.execute(call, (PROJECT, table, "rakam_internal.inbox_0"))
    with refused("42P01"):
        owner.execute(call, (PROJECT, table, "shop.nothing"))
    with refused("42704"):
        owner.execute("SELECT rakam.untrack_table(%s, %s)", (PROJECT, f"shop.{table}"))
    assert events(db, table) == []


def test_nobody_can_put_our_trigger_on_a_table(db, owner, table):
    """The right to collect is the trigger itself: only track_table makes one."""
    db.make_login("login_thief")
    thief = db.connect("login_thief")
    db.admin.execute("CREATE SCHEMA thief AUTHORIZATION login_thief")
    thief.execute("CREATE TABLE thief.t (id int)")
    statement = ("CREATE TRIGGER mine AFTER INSERT ON thief.t REFERENCING NEW TABLE AS n FOR EACH STATEMENT"
                 " EXECUTE FUNCTION rakam_internal.track_change('acme', 'forged')")  # fmt: skip
    with refused("42501"):
        thief.execute(statement)
    # Owning a tracked table gives no other project either: the names stand in the trigger.
    create(owner, table)
    track(owner, table)
    with refused("42501"):
        owner.execute(f"CREATE TRIGGER more AFTER INSERT ON shop.{table} REFERENCING NEW TABLE AS n FOR EACH STATEMENT"
                      " EXECUTE FUNCTION rakam_internal.track_change('rival', 'forged')")  # fmt: skip
    with refused("42501"):
        thief.execute("SELECT rakam_internal.track_change()")
    # Even a superuser's mistake harms nobody: the function looks at how it is called.
    db.admin.execute(
        f"CREATE TRIGGER wrong BEFORE INSERT ON shop.{table} FOR EACH ROW EXECUTE FUNCTION rakam_internal.track_change('acme', 'x')"
    )
    with refused("39P01"):
        owner.execute(f"INSERT INTO shop.{table} VALUES (1)")
    assert db.one("SELECT count(*) FROM acme._all WHERE _collection = 'forged'") == 0


def test_casts_of_the_tables_owner_run_as_the_writer(db, owner, clerk, table):
    """Conversions to JSON that somebody else wrote run with nobody else's rights."""
    owner.execute(f"""
        CREATE TYPE shop.{table}_t AS (n int);
        CREATE FUNCTION shop.{table}_json(shop.{table}_t) RETURNS json LANGUAGE sql AS
          $$ SELECT to_json(current_user::text) $$;
        CREATE CAST (shop.{table}_t AS json) WITH FUNCTION shop.{table}_json""")
    create(owner, table, f"v shop.{table}_t[]")
    track(owner, table)
    clerk.execute(f"INSERT INTO shop.{table} VALUES (ARRAY[ROW(1)::shop.{table}_t])")
    found = db.all(f"SELECT properties->>'v' FROM acme._all WHERE _collection = '{table}'")
    assert found and "postgres" not in str(found)
    db.admin.execute(f"DROP TYPE shop.{table}_t CASCADE")


# -- its end -------------------------------------------------------------------------------------------------------------


def triggers(db, table):
    return db.one("SELECT count(*) FROM pg_trigger WHERE tgrelid = to_regclass(%s)", f"shop.{table}")


def test_untrack_and_track_anew(db, owner, clerk, table):
    create(owner, table)
    track(owner, table)
    track(owner, table, f"{table}_again")
    assert triggers(db, table) == 4
    clerk.execute(f"INSERT INTO shop.{table} VALUES (1)")
    owner.execute("SELECT rakam.untrack_table(%s, %s)", (PROJECT, f"shop.{table}"))
    clerk.execute(f"INSERT INTO shop.{table} VALUES (2)")
    assert (triggers(db, table), events(db, table)) == (0, [])
    assert events(db, f"{table}_again", "id") == [("insert", "1")]
    with refused("42704"):
        owner.execute("SELECT rakam.untrack_table(%s, %s)", (PROJECT, f"shop.{table}"))


def test_the_projects_admin_may_end_what_is_not_the_own_table(db, owner, clerk, table):
    create(owner, table)
    track(owner, table)
    other = db.login(PROJECT, "admin", name="login_other_admin")
    other.execute("SELECT rakam.untrack_table(%s, %s)", (PROJECT, f"shop.{table}"))
    assert triggers(db, table) == 0


def test_a_dropped_table_leaves_nothing(db, owner, table):
    create(owner, table)
    track(owner, table)
    owner.execute(f"DROP TABLE shop.{table}")
    assert db.one("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'rakam\\_acme\\_%'") == 0


def test_a_renamed_table_stays_tracked(db, owner, clerk, table):
    create(owner, table)
    track(owner, table)
    owner.execute(f"ALTER TABLE shop.{table} RENAME TO {table}_new; ALTER TABLE shop.{table}_new ADD colour text")
    clerk.execute(f"INSERT INTO shop.{table}_new (id, colour) VALUES (1, 'red')")
    assert events(db, table, "colour") == [("insert", "red")]
    owner.execute(f"DROP TABLE shop.{table}_new")


def test_two_projects_track_one_table(db, owner, table):
    db.project("second")
    create(owner, table)
    track(owner, table)
    db.admin.execute("SELECT rakam.track_table('second', %s, %s)", (table, f"shop.{table}"))
    db.admin.execute(f"INSERT INTO shop.{table} VALUES (1)")
    assert events(db, table, "id") == [("insert", "1")]
    assert db.one(f"SELECT count(*) FROM second._all WHERE _collection = '{table}'") == 1
    db.admin.execute("SET rakam.allow_project_drop = on")
    db.admin.execute("SELECT rakam.drop_project('second')")
    assert triggers(db, table) == 4
    db.admin.execute(f"INSERT INTO shop.{table} VALUES (2)")
    assert events(db, table, "id") == [("insert", "1"), ("insert", "2")]


def test_a_fixed_schema_sets_new_fields_aside(db, owner, clerk, table):
    create(owner, table)
    track(owner, table)
    clerk.execute(f"INSERT INTO shop.{table} VALUES (1, 'pen', 2)")
    db.tick()
    owner.execute("SELECT rakam.set_schema_mode('acme', 'fixed')")
    try:
        owner.execute(f"ALTER TABLE shop.{table} ADD COLUMN more text")
        # The write goes on; what has a field that the schema has not waits among the dead letters.
        clerk.execute(f"INSERT INTO shop.{table} VALUES (2, 'ink', 3, NULL), (3, 'cap', 4, 'new')")
        assert events(db, table, "id") == [("insert", "1"), ("insert", "2")]
        ((payload, error),) = db.all("SELECT convert_from(payload, 'UTF8'), error FROM rakam.dead_letter")
        assert json.loads(payload)["more"] == "new"
        assert 'field "more"' in error
        owner.execute("SELECT rakam.add_field('acme', %s, 'more', 'text')", (table,))
        assert one(owner, "SELECT rakam.replay_dead_letters('acme')") == 1
        assert events(db, table, "id", "more")[-1] == ("insert", "3", "new")
    finally:
        owner.execute("SELECT rakam.set_schema_mode('acme', 'open')")


def test_a_trigger_of_a_project_that_is_gone_only_warns(db, owner, table):
    """Nothing makes such a trigger but a restore of a table without its project."""
    create(owner, table)
    db.admin.execute(f"CREATE TRIGGER stray AFTER INSERT ON shop.{table} REFERENCING NEW TABLE AS n FOR EACH STATEMENT"
                     " EXECUTE FUNCTION rakam_internal.track_change('no_such', 'x')")  # fmt: skip
    (notice,) = notices_of(owner, f"INSERT INTO shop.{table} VALUES (1)")
    assert notice.severity == "WARNING" and "no_such" in notice.message
    assert one(owner, f"SELECT count(*) FROM shop.{table}") == 1


def test_the_extension_goes_with_its_triggers_and_a_dump_keeps_them(cluster):
    # Last: dropping a database also drops the logins that no other one needs.
    database = Database(cluster, "test_track_dump")
    database.drop()
    database.create()
    try:
        database.project("dumped")
        database.admin.execute("CREATE TABLE t (id int)")
        database.admin.execute("SELECT rakam.track_table('dumped', 'changes', 't')")
        dump = ["pg_dump", *cluster.psql_command(database.name)[1:], "--schema-only", "-t", "t"]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        assert text.count("EXECUTE FUNCTION rakam_internal.track_change('dumped', 'changes')") == 4
        with refused("2BP01"):
            database.admin.execute("DROP EXTENSION rakam")
        database.admin.execute("DROP EXTENSION rakam CASCADE")
        database.admin.execute("INSERT INTO t VALUES (1)")
        assert database.one("SELECT count(*) FROM pg_trigger WHERE tgrelid = 't'::regclass") == 0
    finally:
        database.drop()
