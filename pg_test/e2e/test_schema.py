"""The schema registry: types on first sight, coercion, pending fields, declared fields, twenty sessions at once."""

from __future__ import annotations

import json
import random
import threading
import time

import psycopg
import pytest
from harness.database import collect, collect_batch, has_column, one, refused, wait_until

PROJECT = "acme"


@pytest.fixture(scope="module")
def project(db):
    db.project(PROJECT)
    return PROJECT


def column_type(db, table: str, column: str) -> str | None:
    return db.one(
        "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = %s",
        table,
        column,
    )


def stored_value(db, collection: str, identity: str, expression: str):
    return db.one(f"SELECT {expression} FROM acme.{collection} WHERE _id = %s", identity)


# -- inference -----------------------------------------------------------------------------------------------------------

# What is sent as JSON text, and the type the field then has; None: no column yet.
INFERRED = {
    "a_bool": ("true", "boolean"),
    "a_number": ("1.5", "double precision"),
    "an_int": ("1", "double precision"),
    "an_exp": ("1e3", "double precision"),
    "at_2_53": ("9007199254740992", "double precision"),
    "beyond_2_53": ("9007199254740993", "bigint"),
    "below_minus_2_53": ("-9007199254740993", "bigint"),
    "max_bigint": ("9223372036854775807", "bigint"),
    "beyond_64_bits": ("9223372036854775808", None),
    "a_day": ('"2026-02-28"', "date"),
    "no_day": ('"2026-02-30"', "text"),
    "an_instant": ('"2026-02-28T10:00:00Z"', "timestamp with time zone"),
    "an_instant_blank": ('"2026-02-28 10:00"', "timestamp with time zone"),
    "an_instant_offset": ('"2026-02-28T10:00:00.25+05:30"', "timestamp with time zone"),
    "no_instant": ('"2026-02-28T25:00"', "text"),
    "padded_day": ('" 2026-02-28"', "text"),
    "a_text": ('"hello"', "text"),
    "empty_text": ('""', "text"),
    "number_text": ('"12"', "text"),
    "bools": ("[true, null, false]", "boolean[]"),
    "numbers": ("[1, 2.5, null]", "double precision[]"),
    "texts": ('["a", null]', "text[]"),
    "days_in_array": ('["2026-02-28"]', "text[]"),
    "mixed": ('[1, "a"]', "jsonb"),
    "nested": ("[[1]]", "jsonb"),
    "an_object": ('{"a": 1}', "jsonb"),
    "objects": ('[{"a": 1}]', "jsonb"),
    "a_null": ("null", None),
    "empty_array": ("[]", None),
    "empty_object": ("{}", None),
    "array_of_null": ("[null]", None),
}


@pytest.fixture(scope="module")
def inferred(db, project):
    body = ",".join(f'"{name}": {sent}' for name, (sent, _) in INFERRED.items())
    collect(db.admin, PROJECT, "inferred", "{" + body + ', "_id": "first"}')
    db.tick()
    db.tick()
    return "inferred"


@pytest.mark.parametrize("name", INFERRED)
def test_type_on_first_sight(db, inferred, name):
    assert column_type(db, "acme.inferred", name) == INFERRED[name][1]


@pytest.mark.parametrize("name", [name for name, (_, kind) in INFERRED.items() if kind])
def test_the_value_comes_back(db, inferred, name):
    sent, kind = INFERRED[name]
    for _ in range(2):
        if kind in ("date", "timestamp with time zone", "text"):
            expected = json.loads(sent)
            assert stored_value(
                db, inferred, "first", f'"{name}" = {psycopg.sql.Literal(expected).as_string(None)}::{kind}'
            )
        else:
            assert stored_value(db, inferred, "first", f'to_jsonb("{name}")') == json.loads(sent)
        db.flush(PROJECT, inferred)


def test_a_number_beyond_64_bits_stays_in_extra(db, inferred):
    assert stored_value(db, inferred, "first", "_extra->>'beyond_64_bits'") == "9223372036854775808"


def test_a_type_is_decided_by_the_first_value_that_has_one(db, project):
    for index, sent in enumerate(("null", "[]", '"2026-01-01"', '"not a day"')):
        collect(db.admin, PROJECT, "decided_late", f'{{"f": {sent}, "_id": "{index}"}}')
        db.tick()
    assert column_type(db, "acme.decided_late", "f") == "date"
    assert stored_value(db, "decided_late", "3", "_extra->>'f'") == "not a day"


# -- coercion ------------------------------------------------------------------------------------------------------------

# declared type, sent JSON, what to_jsonb(column) gives; Ellipsis: does not fit, stays in _extra.
COERCED = [
    ("double precision", '"1.5"', 1.5),
    ("double precision", '"abc"', ...),
    ("double precision", "true", ...),
    ("double precision", "1e400", ...),
    ("bigint", "1.0", 1),
    ("bigint", "1e2", 100),
    ("bigint", '"7"', 7),
    ("bigint", "1.5", ...),
    ("bigint", "9223372036854775808", ...),
    ("integer", "2147483648", ...),
    ("integer", "-2147483648", -2147483648),
    ("real", "0.1", 0.1),
    ("numeric(10,2)", "1.25", 1.25),
    ("numeric(10,2)", '"12345678.5"', 12345678.5),
    ("numeric(10,2)", "123456789.5", ...),
    ("boolean", '"true"', True),
    ("boolean", '"false"', False),
    ("boolean", '"yes"', ...),
    ("boolean", "1", ...),
    ("text", "1", "1"),
    ("text", "1.50", "1.5"),
    ("text", "true", "true"),
    ("date", '"2026-01-31"', "2026-01-31"),
    ("date", '"2026-02-31"', ...),
    ("date", "5", ...),
    ("timestamptz", '"2026-01-31"', "2026-01-31T00:00:00+00:00"),
    ("timestamptz", '"2026-01-31T10:00:00+02:00"', "2026-01-31T08:00:00+00:00"),
    ("uuid", '"A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"', "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    ("uuid", '"a0eebc99"', ...),
    ("inet", '"192.168.0.1/24"', "192.168.0.1/24"),
    ("inet", '"::1"', "::1"),
    ("inet", '"300.0.0.1"', ...),
    ("jsonb", '"x"', "x"),
    ("jsonb", '{"a": [1, null]}', {"a": [1, None]}),
    ("text[]", '"one"', ["one"]),
    ("text[]", '[1, "a", null]', ["1", "a", None]),
    ("double precision[]", "3", [3]),
    ("double precision[]", '["3", 4]', [3, 4]),
    ("double precision[]", '["x"]', ...),
    ("boolean[]", "true", [True]),
    ("boolean[]", "[1]", ...),
]


@pytest.mark.parametrize(("kind", "sent", "expected"), COERCED, ids=[f"{k}-{s}" for k, s, _ in COERCED])
def test_coercion(db, project, kind, sent, expected):
    field = "f_" + "".join(c if c.isalnum() else "_" for c in kind)
    identity = f"{kind} {sent}"
    db.admin.execute("SELECT rakam.create_collection('acme', 'coerced')")
    if not has_column(db.admin, "acme.coerced", field):
        db.admin.execute("SELECT rakam.add_field('acme', 'coerced', %s, %s)", (field, kind))
        db.tick()
    # Each sample carries the exact count of its field and day.
    counted = "SELECT coalesce(max(count), 0) FROM rakam.invalid_value WHERE collection = 'coerced' AND field = %s"
    before = db.one(counted, field)
    collect(db.admin, PROJECT, "coerced", f'{{"{field}": {sent}, "_id": {json.dumps(identity)}}}')
    db.tick()
    for _ in range(2):
        value = stored_value(db, "coerced", identity, f"to_jsonb({field})")
        extra = stored_value(db, "coerced", identity, "_extra")
        if expected is ...:
            assert value is None
            assert stored_value(db, "coerced", identity, f"_extra = jsonb_build_object('{field}', '{sent}'::jsonb)")
        else:
            assert value == expected
            assert extra is None
        db.flush(PROJECT, "coerced")
    assert db.one(counted, field) - before == (1 if expected is ... else 0)


def test_invalid_values_under_a_flood_are_sampled_and_counted_exactly(db, project):
    collect(db.admin, PROJECT, "flooded", {"n": 1})
    db.tick()
    for _ in range(10):
        collect_batch(db.admin, PROJECT, [("flooded", {"n": f"bad {i}"}) for i in range(500)])
    db.tick()
    assert db.one("SELECT invalid_values FROM rakam.stat_collection WHERE collection = 'flooded'") == 5_000
    assert db.one("SELECT count(*) FROM acme.flooded WHERE n IS NULL AND _extra->>'n' LIKE 'bad %'") == 5_000
    assert db.one("SELECT count(*) FROM rakam.invalid_value WHERE collection = 'flooded'") <= 1_000


# -- declared fields -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sqlstate"),
    [
        ("numeric", "22023"),
        ("numeric(39,2)", "22023"),
        ("numeric(5,7)", "22023"),
        ("money", "22023"),
        ("integer[]", "22023"),
        ("no_such_type", "42704"),
        ("", "42601"),
        ("text; DROP TABLE x", "42601"),
    ],
)
def test_add_field_refuses_types(db, project, kind, sqlstate):
    db.admin.execute("SELECT rakam.create_collection('acme', 'declared')")
    with refused(sqlstate):
        db.admin.execute("SELECT rakam.add_field('acme', 'declared', 'f', %s)", (kind,))


def test_add_field_again(db, project):
    add = "SELECT rakam.add_field('acme', %s, %s, %s)"
    db.admin.execute("SELECT rakam.create_collection('acme', 'declared')")
    db.admin.execute(add, ("declared", "amount", "numeric(12,4)"))
    db.admin.execute(add, ("declared", "amount", "numeric(12, 4)"))
    for field in ("amount", "_time"):
        with refused("42710", hint="never changes its type"):
            db.admin.execute(add, ("declared", field, "text"))
    with refused("42704"):
        db.admin.execute(add, ("no_such_collection", "f", "text"))
    # It is there already, as in every collection.
    db.admin.execute(add, ("declared", "_time", "timestamptz"))
    assert db.all("SELECT field FROM rakam.fields WHERE collection = 'declared'") == [("amount",)]
    db.tick()
    row = db.all(
        "SELECT type, declared, column_ready FROM rakam.fields WHERE collection = 'declared' AND field = 'amount'"
    )
    assert row == [("numeric(12,4)", True, True)]


def test_older_rows_read_null(db, project):
    collect(db.admin, PROJECT, "grown", {"_id": "old"})
    db.flush(PROJECT, "grown")
    db.admin.execute("SELECT rakam.add_field('acme', 'grown', 'later', 'inet')")
    collect(db.admin, PROJECT, "grown", {"_id": "new", "later": "10.0.0.1"})
    db.tick()
    assert db.all("SELECT _id, later::text FROM acme.grown ORDER BY 1") == [("new", "10.0.0.1/32"), ("old", None)]
    db.flush(PROJECT, "grown")
    assert db.all("SELECT _id, later::text FROM acme.grown ORDER BY 1") == [("new", "10.0.0.1/32"), ("old", None)]


# -- pending fields ------------------------------------------------------------------------------------------------------


def test_a_new_field_is_readable_at_once_and_soon_a_column(db, project):
    collect(db.admin, PROJECT, "pending", {"_id": "a", "first": 1})
    db.tick()
    collect(db.admin, PROJECT, "pending", {"_id": "b", "colour": "red"})
    by_extra = "SELECT _id FROM acme.pending WHERE _extra->>'colour' = 'red'"
    if not has_column(db.admin, "acme.pending", "colour"):
        assert db.all(by_extra) in ([("b",)], [])
    db.wait_column("acme.pending", "colour")
    assert db.all("SELECT _id, colour, _extra FROM acme.pending ORDER BY 1") == [("a", None, None), ("b", "red", None)]


def test_a_reader_in_a_transaction_delays_the_column_not_the_value(db, project):
    collect(db.admin, PROJECT, "held", {"_id": "a"})
    db.tick()
    reader = db.connect(autocommit=False)
    assert one(reader, "SELECT count(*) FROM acme.held") == 1
    collect(db.admin, PROJECT, "held", {"_id": "b", "fresh": [1, 2]})
    db.admin.execute("SET statement_timeout = '60s'")
    db.tick()
    db.admin.execute("RESET statement_timeout")
    # The reader holds the table: the value is there, under _extra, and nobody waits for the column.
    assert not has_column(db.admin, "acme.held", "fresh")
    assert db.one("SELECT _extra->'fresh' FROM acme.held WHERE _id = 'b'") == [1, 2]
    db.flush(PROJECT, "held")
    assert db.one("SELECT _extra->'fresh' FROM acme.held WHERE _id = 'b'") == [1, 2]
    other = db.connect()
    slowness = []
    for _ in range(20):
        before = time.monotonic()
        assert one(other, "SELECT count(*) FROM acme.held") == 2
        slowness.append(time.monotonic() - before)
    # An attempt at the lock is in their way for a tenth of a second at most, and there are pauses between attempts.
    assert min(slowness) < 1, "readers wait for a lock attempt"
    reader.commit()
    db.wait_column("acme.held", "fresh")
    assert db.all("SELECT _id, fresh, _extra FROM acme.held ORDER BY 1") == [("a", None, None), ("b", [1.0, 2.0], None)]


def test_tables_in_use_hold_up_nobody_else(db, project):
    """Somebody reads all his tables, in a transaction that stays open, while each is to get a column."""
    db.project("busy")
    names = [f"c{n:02}" for n in range(80)]
    db.admin.execute("SELECT rakam.create_collection('busy', name) FROM unnest(%s::text[]) name", (names,))
    db.tick()
    reader = db.connect(autocommit=False)
    for name in names:
        reader.execute(f"SELECT FROM busy.{name} LIMIT 1")
    collect_batch(db.admin, "busy", [(name, {"n": 1}) for name in names])
    wait_until(lambda: db.tiers("busy", names[-1])["inbox"] == 0, "they are digested")
    for n in range(5):
        began = time.monotonic()
        collect(db.admin, project, f"beside{n}", {"n": n})
        wait_until(lambda n=n: has_column(db.admin, f"{project}.beside{n}", "n"), "another project's table")
        assert time.monotonic() - began < 4
    began = time.monotonic()
    db.admin.execute("SELECT rakam.tick()")
    assert time.monotonic() - began < 15
    assert not has_column(db.admin, "busy.c00", "n")
    reader.rollback()
    for name in names:
        wait_until(lambda name=name: has_column(db.admin, f"busy.{name}", "n"), "the column")
    db.admin.execute("SET rakam.allow_project_drop = on; SELECT rakam.drop_project('busy')")


def test_fields_of_one_batch_come_in_one_step(db, project):
    collect(db.admin, PROJECT, "wide", {"_id": "w", **{f"f{i}": i for i in range(120)}})
    db.wait_column("acme.wide", "f119")
    assert db.one("SELECT f0 + f60 + f119 FROM acme.wide") == 179
    assert (
        db.one("SELECT count(*) FROM rakam.fields WHERE collection = 'wide' AND column_ready AND field ~ '^f[0-9]+$'")
        == 120
    )


def test_fields_beyond_the_limit_stay_in_extra(db, project):
    collect(db.admin, PROJECT, "too_wide", {f"f{i:03}": i for i in range(600)})
    db.tick()
    db.tick()
    columns, in_extra = db.all(
        "SELECT (SELECT count(*) FROM rakam.fields WHERE collection = 'too_wide' AND field ~ '^f'),"
        " (SELECT count(*) FROM acme.too_wide, jsonb_object_keys(_extra))"
    )[0]
    assert columns <= 500
    assert columns + in_extra == 600
    db.flush(PROJECT, "too_wide")
    assert db.one("SELECT count(*) FROM acme.too_wide, jsonb_object_keys(_extra)") == in_extra


# -- twenty sessions -----------------------------------------------------------------------------------------------------


def test_twenty_sessions_with_different_fields_and_collections(db, project, seed):
    """One keeps its transaction open, one rolls back, one prepares: nothing lost, no deadlock, nobody waits."""
    sessions, events = 20, 40
    db.project("crowd")
    mark = db.cluster.log_mark()
    barrier = threading.Barrier(sessions)
    slowest = [0.0] * sessions
    failures: list[str] = []
    open_session = db.connect(autocommit=False)

    def send(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        try:
            connection = open_session if number == 0 else db.cluster.connect(db.name, autocommit=number > 2)
            barrier.wait()
            for index in range(events):
                collection = rng.choice(["shared", f"own_{number}", f"own_{rng.randrange(sessions)}"])
                properties = {"_id": f"{number}-{index}", "by": number, f"f_{number}_{index % 7}": index, "common": "x"}
                began = time.monotonic()
                collect(connection, "crowd", collection, properties)
                slowest[number] = max(slowest[number], time.monotonic() - began)
            if number == 1:
                connection.rollback()
            elif number == 2:
                connection.execute("PREPARE TRANSACTION 'crowd_2'")
            if number != 0:
                connection.close()
        except Exception as error:  # noqa: BLE001 - a thread's failure is the test's
            failures.append(f"session {number}: {error!r}")

    threads = [threading.Thread(target=send, args=(number,)) for number in range(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures
    assert not any(thread.is_alive() for thread in threads), "a session still waits"
    # Few processors and twenty sessions: what counts is that nobody waited for another's transaction, which is open still.
    assert max(slowest) < 30, f"slowest calls {sorted(slowest)[-3:]} s"

    db.tick()
    count = "SELECT count(*), count(DISTINCT _id) FROM crowd._all"
    assert db.all(count) == [((sessions - 3) * events,) * 2]
    open_session.commit()
    db.admin.execute("COMMIT PREPARED 'crowd_2'")
    expected = [((sessions - 1) * events,) * 2]
    assert db.all(count) == expected
    db.tick()
    assert db.all(count) == expected
    wait_until(
        lambda: db.one("SELECT bool_and(column_ready) FROM rakam.fields WHERE project = 'crowd'"), "all columns", 20
    )
    db.flush("crowd")
    assert db.all(count) == expected
    per_session = dict(db.all("SELECT (properties->>'by')::float8::int, count(*) FROM crowd._all GROUP BY 1"))
    assert per_session == {number: events for number in range(sessions) if number != 1}
    assert "deadlock detected" not in db.cluster.log_since(mark)


def test_a_poison_event_parks_alone(db, project):
    """A row of the inbox that cannot be digested at all is set aside; its neighbours go on, and it can still be seen."""
    collect(db.admin, PROJECT, "poisoned", {"_id": "good 1"})
    db.tick()
    # No call stores such bytes; a broken disk or a bug could.
    table = db.one("SELECT 'rakam_internal.inbox_' || current_table FROM rakam_internal.inbox_state")
    db.admin.execute(
        f"INSERT INTO {table} (project_id, collection_id, collection, n, received_at, payload)"
        " SELECT project_id, collection_id, name, 1, now(), '\\xff00fe'::bytea"
        " FROM rakam_internal.collection WHERE name = 'poisoned'"
    )
    collect(db.admin, PROJECT, "poisoned", {"_id": "good 2"})
    db.tick()
    assert (
        db.one("SELECT (SELECT count(*) FROM rakam_internal.inbox_parked) + (SELECT count(*) FROM rakam.dead_letter)")
        == 1
    )
    assert db.tiers(PROJECT, "poisoned")["hot"] == 2
    assert db.all("SELECT _id FROM acme.poisoned WHERE _id IS NOT NULL ORDER BY 1") == [("good 1",), ("good 2",)]
    collect(db.admin, PROJECT, "poisoned", {"_id": "good 3"})
    db.tick()
    db.flush(PROJECT, "poisoned")
    assert db.tiers(PROJECT, "poisoned")["cold"] == 3
    db.admin.execute("DELETE FROM rakam_internal.inbox_parked")


def test_schema_versions(db, project):
    """Every version stays readable as Avro, its fields under ids that never change."""
    db.admin.execute("SELECT rakam.create_collection('acme', 'versioned')")
    for field, kind in (("price", "numeric(10,2)"), ("größe", "text"), ("tags", "text[]")):
        db.admin.execute("SELECT rakam.add_field('acme', 'versioned', %s, %s)", (field, kind))
    rows = db.all(
        "SELECT version, avro_schema, created_at FROM rakam.schema_versions"
        " WHERE project = 'acme' AND collection = 'versioned' ORDER BY version"
    )
    assert [version for version, _, _ in rows] == [1, 2, 3, 4]
    assert [len(schema["fields"]) for _, schema, _ in rows] == [10, 11, 12, 13]
    assert [created for _, _, created in rows] == sorted(created for _, _, created in rows)
    assert rows[3][1]["fields"][:12] == rows[2][1]["fields"]
    added = rows[3][1]["fields"][10:]
    ids = db.all("SELECT field_id FROM rakam.fields WHERE collection = 'versioned' ORDER BY 1")
    assert [(field["field-id"],) for field in added] == ids
    assert [(field["name"], field["rakam-type"]) for field in added] == [
        ("price", "numeric(10,2)"),
        ("gr_uf6__udf_e", "text"),
        ("tags", "text[]"),
    ]
    assert added[1]["rakam-name"] == "größe"
    assert added[0]["type"] == ["null", {"type": "bytes", "logicalType": "decimal", "precision": 10, "scale": 2}]
    assert rows[0][1]["fields"][0]["type"] == ["null", {"type": "long", "logicalType": "timestamp-micros"}]
    db.admin.execute("SELECT rakam.drop_field('acme', 'versioned', 'price')")
    db.admin.execute("SELECT rakam.add_field('acme', 'versioned', 'price', 'text')")
    later = db.all(
        "SELECT version, avro_schema, created_at FROM rakam.schema_versions"
        " WHERE project = 'acme' AND collection = 'versioned' ORDER BY version"
    )
    assert later[:4] == rows
    names = [[(f["name"], f["rakam-type"]) for f in schema["fields"][10:]] for _, schema, _ in later[4:]]
    assert names == [
        [("gr_uf6__udf_e", "text"), ("tags", "text[]")],
        [("gr_uf6__udf_e", "text"), ("tags", "text[]"), ("price", "text")],
    ]


def test_tables_that_the_owner_has_changed_by_hand(db, project):
    """Renamed, moved and dropped: the collection's events stay readable, and what comes new has its place."""
    for n in range(3):
        collect(db.admin, project, "byhand", {"n": n})
    db.tick()
    db.admin.execute("ALTER FOREIGN TABLE acme.byhand RENAME TO other; CREATE SCHEMA elsewhere")
    db.admin.execute("ALTER FOREIGN TABLE acme.other SET SCHEMA elsewhere")
    collect(db.admin, project, "byhand", {"n": 3, "later": "x"})
    db.tick()
    assert db.all("SELECT n, later FROM elsewhere.other WHERE n > 1 ORDER BY n") == [(2, None), (3, "x")]
    db.admin.execute("DROP FOREIGN TABLE elsewhere.other")
    assert db.one("SELECT count(*) FROM acme._all WHERE _collection = 'byhand'") == 4
    db.admin.execute("SELECT rakam.create_collection('acme', 'byhand')")
    reader = db.login(project, "read")
    assert reader.execute("SELECT n, later FROM acme.byhand WHERE n > 1 ORDER BY n").fetchall() == [(2, None), (3, "x")]
    # By a new field alone.
    db.admin.execute("DROP FOREIGN TABLE acme.byhand")
    collect(db.admin, project, "byhand", {"n": 4, "latest": True})
    db.tick()
    assert one(reader, "SELECT count(*) FROM acme.byhand WHERE latest OR n < 3") == 4


def test_a_fields_type_is_an_argument_by_name(db, project):
    db.admin.execute(
        "SELECT rakam.add_field(project => 'acme', collection => 'named', field => 'f', type => 'inet')"
        " FROM rakam.create_collection(project => 'acme', collection => 'named')"
    )
    assert column_type(db, "acme.named", "f") == "inet"


def test_something_else_has_the_name_of_a_collection(db, project):
    """Its events are in `_all`, others get their tables, and it gets its own once the name is free."""
    db.admin.execute("CREATE VIEW acme.obstructed AS SELECT 1 AS x; CREATE TYPE acme.obstructed_too AS (x int)")
    for name in ("obstructed", "obstructed_too", "unobstructed"):
        collect(db.admin, project, name, {"n": 1})
    db.wait_column("acme.unobstructed", "n")
    mark = db.cluster.log_mark()
    for _ in range(3):
        db.tick()
    assert db.one("SELECT count(*) FROM acme._all WHERE _collection LIKE 'obstructed%%'") == 2
    finding = db.all("SELECT status, detail FROM rakam.health() WHERE \"check\" = 'schema'")
    assert finding == [("warning", "tables that cannot be made: acme.obstructed, acme.obstructed_too")]
    for name, what in (("obstructed", "relation"), ("obstructed_too", "relation")):
        with refused("42710", message=f'{what} "{name}" already exists', hint="another name"):
            db.admin.execute("SELECT rakam.create_collection('acme', %s)", (name,))
    # Each process says it, not each attempt.
    told = [line for line in db.cluster.log_since(mark).splitlines() if "obstructed" in line and "LOG:" in line]
    assert len(told) <= 12, told
    db.admin.execute("DROP VIEW acme.obstructed; DROP TYPE acme.obstructed_too")
    for name in ("obstructed", "obstructed_too"):
        db.wait_column(f"acme.{name}", "n")
        assert db.one(f"SELECT n FROM acme.{name}") == 1


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        ("users_pkey", None),
        ("a_table", "CREATE TABLE acme.a_table ()"),
        ("a_view", "CREATE VIEW acme.a_view AS SELECT 1 AS x"),
        ("a_sequence", "CREATE SEQUENCE acme.a_sequence"),
        ("a_type", "CREATE TYPE acme.a_type AS ENUM ('x')"),
        ("a_domain", "CREATE DOMAIN acme.a_domain AS int"),
    ],
)
def test_a_name_that_is_taken_makes_no_collection(db, project, name, definition):
    if definition:
        db.admin.execute(definition)
    with refused("42710", message=f'"{name}" already exists', hint="another name"):
        db.admin.execute("SELECT rakam.create_collection('acme', %s)", (name,))
    assert db.one("SELECT count(*) FROM rakam.collections WHERE collection = %s", name) == 0
    finding = db.all("SELECT detail FROM rakam.health() WHERE \"check\" = 'schema'")
    assert not [detail for (detail,) in finding if name in detail], finding


def test_a_refused_field_is_not_added(db, project):
    """The caller's own lock refuses it, for good; somebody else's query delays the column only."""
    db.admin.execute("SELECT rakam.create_collection('acme', 'kept')")
    fields = "SELECT field, column_ready FROM rakam.fields WHERE collection = 'kept'"
    session = db.connect(autocommit=False)
    for lock in ("SELECT * FROM acme.kept", "SELECT * FROM acme.kept; DECLARE c CURSOR FOR SELECT * FROM acme.kept"):
        session.execute(lock)
        with refused("55P03", hint="Commit or roll back first"):
            session.execute("SELECT rakam.add_field('acme', 'kept', 'mine', 'bigint')")
        session.rollback()
        db.tick()
        assert db.all(fields) == []
    calls = "SELECT outcome FROM rakam.audit_log WHERE call = 'add_field' AND object = %s"
    wait_until(lambda: db.all(calls, "kept.mine") == [("error 55P03",)] * 2, "what was refused is noted")
    session.execute("SELECT * FROM acme.kept")
    db.admin.execute("SELECT rakam.add_field('acme', 'kept', 'theirs', 'bigint')")
    assert db.all(fields) == [("theirs", False)]
    assert db.all(calls, "kept.theirs") == [("ok",)]
    # It is there already: whoever holds the table.
    session.execute("SELECT rakam.create_collection('acme', 'kept')")
    session.rollback()
    db.wait_column("acme.kept", "theirs")
    session.execute("SELECT * FROM acme.kept")
    session.execute("SELECT rakam.add_field('acme', 'kept', 'theirs', 'bigint')")
    session.rollback()


def test_a_table_dropped_by_hand_is_told_of(db, project):
    collect(db.admin, project, "bare", {"n": 1})
    db.tick()
    db.admin.execute("DROP FOREIGN TABLE acme.bare")
    db.tick()
    schema = "SELECT status, detail, hint FROM rakam.health() WHERE \"check\" = 'schema'"
    [(status, detail, hint)] = db.all(schema)
    assert (status, "acme.bare" in detail, "rakam.create_collection" in hint) == ("warning", True, True), detail
    db.admin.execute("SELECT rakam.create_collection('acme', 'bare')")
    assert db.one("SELECT n FROM acme.bare") == 1
    assert "acme.bare" not in db.all(schema)[0][1]


# -- transactions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_own_writes_are_seen_whatever_was_registered_since(db, project, level):
    """As of a heap table that somebody made after the snapshot was taken."""
    tag = level[0].lower()
    for name in ("early", "wide"):
        collect(db.admin, project, f"{name}_{tag}", {"n": 1})
    db.tick()
    session = db.connect(autocommit=False)
    session.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
    assert one(session, f"SELECT count(*) FROM acme.early_{tag}") == 1
    # First by its name alone.
    collect(session, project, f"late_{tag}", {"n": 1})
    db.admin.execute("SELECT rakam.create_collection('acme', %s)", (f"late_{tag}",))
    db.admin.execute("SELECT rakam.add_field('acme', %s, 'n', 'bigint')", (f"late_{tag}",))
    db.admin.execute("SELECT rakam.add_field('acme', %s, 'm', 'bigint')", (f"wide_{tag}",))
    collect(db.admin, project, f"late_{tag}", {"n": 100})
    db.tick()
    collect(session, project, f"late_{tag}", {"n": 2})
    session.execute(f"INSERT INTO acme.late_{tag} (n) VALUES (3)")
    session.execute(f"INSERT INTO acme.wide_{tag} (m) VALUES (4)")
    assert session.execute(f"SELECT n FROM acme.late_{tag} ORDER BY n").fetchall() == [(1,), (2,), (3,)]
    assert session.execute(f"SELECT n, m FROM acme.wide_{tag} ORDER BY n").fetchall() == [(1, None), (None, 4)]
    everything = f"SELECT _collection, count(*) FROM acme._all WHERE _collection ~ '_{tag}$' GROUP BY 1 ORDER BY 1"
    assert session.execute(everything).fetchall() == [(f"early_{tag}", 1), (f"late_{tag}", 3), (f"wide_{tag}", 2)]
    # Of a project made since, too.
    db.project(f"new_{tag}")
    collect(session, f"new_{tag}", "c", {"n": 1})
    assert one(session, f"SELECT count(*) FROM new_{tag}._all") == 1
    session.commit()
    assert db.all(f"SELECT n FROM acme.late_{tag} ORDER BY n") == [(1,), (2,), (3,), (100,)]
    db.tick()
    assert db.one(f"SELECT count(*) FROM new_{tag}.c") == 1


def test_a_project_of_the_same_transaction_is_not_there_for_workers(db, tmp_path):
    (tmp_path / "f.csv").write_text("a\n1\n")
    tmp_path.chmod(0o755)
    session = db.connect(autocommit=False)
    for call in (
        "create_collection('unborn', 'c')",
        "add_field('unborn', 'c', 'f', 'text')",
        "delete_events('unborn', 'c', 'true')",
        "drop_collection('unborn', 'c')",
        "rename_collection('unborn', 'c', 'd')",
        "drop_field('unborn', 'c', 'f')",
        "set_retention('unborn', 'c', '1 day')",
        "flush('unborn', 'c')",
        f"attach('unborn', 't', 'file://{tmp_path}/f.csv')",
        f"copy_from('unborn', 'c', 'file://{tmp_path}/f.csv')",
    ):
        session.execute("SELECT rakam.create_project('unborn')")
        with refused("55000", message='project "unborn" is not committed yet', hint="Commit"):
            session.execute(f"SELECT rakam.{call}")
        session.rollback()
        with refused("42501"):
            session.execute(f"SELECT rakam.{call}")
        session.rollback()
    # What needs no worker goes on as it did, and after the commit everything does.
    session.execute("SELECT rakam.create_project('unborn')")
    collect(session, "unborn", "c", {"n": 1})
    assert one(session, "SELECT count(*) FROM unborn._all") == 1
    session.commit()
    session.execute("SELECT rakam.create_collection('unborn', 'd')")
    session.commit()
