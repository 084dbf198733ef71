"""Collecting: the calls, their results, what is refused and how, what a transaction sees (SPEC: collect, errors)."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from harness.database import collect, collect_batch, has_column, one, refused, wait_until

PROJECT = "acme"


@pytest.fixture
def collection(db, keys, request):
    """A collection of its own for each test, its table already there."""
    name = request.node.name.split("[")[0].removeprefix("test_")[:50]
    db.admin.execute("SELECT rakam.create_collection(%s, %s)", (PROJECT, name))
    return name


def rows(connection, collection, columns="*", order="_received_at"):
    return connection.execute(f'SELECT {columns} FROM acme."{collection}" ORDER BY {order}').fetchall()


# -- what a transaction sees ---------------------------------------------------------------------------------------------


def test_visible_in_its_own_transaction_and_to_all_after_commit(db, keys, collection):
    session, other = db.connect(autocommit=False), db.connect()
    collect(session, PROJECT, collection, {"_id": "e1"})
    assert one(session, f"SELECT count(*) FROM acme.{collection}") == 1
    assert one(other, f"SELECT count(*) FROM acme.{collection}") == 0
    session.commit()
    assert one(other, f"SELECT count(*) FROM acme.{collection}") == 1


def test_rollback_leaves_nothing(db, keys, collection):
    session = db.connect(autocommit=False)
    collect(session, PROJECT, collection, {"n": 1})
    session.rollback()
    db.tick()
    assert one(session, f"SELECT count(*) FROM acme.{collection}") == 0


def test_savepoint_rollback_hides_only_what_came_after_it(db, keys, collection):
    session = db.connect(autocommit=False)
    collect(session, PROJECT, collection, {"_id": "before"})
    session.execute("SAVEPOINT s")
    collect(session, PROJECT, collection, {"_id": "inside"})
    assert one(session, f"SELECT count(*) FROM acme.{collection}") == 2
    session.execute("ROLLBACK TO s")
    assert one(session, f"SELECT count(*) FROM acme.{collection}") == 1
    collect(session, PROJECT, collection, {"_id": "after"})
    session.commit()
    db.tick()
    assert rows(db.admin, collection, "_id", "_id") == [("after",), ("before",)]


def test_released_savepoint_of_a_failed_statement(db, keys, collection):
    session = db.connect(autocommit=False)
    collect(session, PROJECT, collection, {"_id": "kept"})
    with refused("22023"), session.transaction():
        collect(session, PROJECT, collection, "[1]")
    session.commit()
    assert rows(db.admin, collection, "_id") == [("kept",)]


def test_prepared_transaction_appears_at_its_commit(db, keys, collection):
    session = db.connect(autocommit=False)
    collect(session, PROJECT, collection, {"_id": "p1"})
    session.execute("PREPARE TRANSACTION 'collect_p1'")
    db.tick()
    assert one(db.admin, f"SELECT count(*) FROM acme.{collection}") == 0
    # A prepared transaction must not keep the others' events from being digested.
    collect(db.admin, PROJECT, collection, {"_id": "other"})
    db.tick()
    assert db.tiers(PROJECT, collection)["inbox"] == 0
    db.admin.execute("COMMIT PREPARED 'collect_p1'")
    assert rows(db.admin, collection, "_id", "_id") == [("other",), ("p1",)]
    db.flush(PROJECT, collection)
    assert rows(db.admin, collection, "_id", "_id") == [("other",), ("p1",)]


def test_new_collection_has_its_table_within_a_second(db, keys):
    collect(db.admin, PROJECT, "born_of_an_event", {"n": 1})
    wait_until(lambda: one(db.admin, "SELECT to_regclass('acme.born_of_an_event') IS NOT NULL"), "the table", 1.0)
    assert one(db.admin, "SELECT count(*) FROM acme.born_of_an_event") == 1


def test_create_collection_twice_is_no_error(db, keys):
    for _ in range(2):
        db.admin.execute("SELECT rakam.create_collection('acme', 'Twice')")
    assert one(db.admin, "SELECT count(*) FROM rakam.collections WHERE collection = 'twice'") == 1


# -- results of the calls ------------------------------------------------------------------------------------------------


def test_collect_returns_void(db, keys, collection):
    kind = one(db.admin, "SELECT pg_typeof(rakam.collect('acme', %s, '{}'))::text", collection)
    assert kind == "void"


def test_batch_result_names_each_rejected_item(db, keys, collection):
    events = json.dumps(
        [
            {"collection": collection, "properties": {"n": 1}},
            {"collection": collection, "properties": [1]},
            {"properties": {"n": 2}, "collection": collection},
            {"collection": "users", "properties": {}},
            7,
            {"collection": collection, "properties": {"_received_at": "2026-01-01"}},
        ]
    )
    for form in ("text", "jsonb"):
        stored, rejected, indexes, errors = db.admin.execute(
            f"SELECT stored, rejected, rejected_indexes, errors FROM rakam.collect_batch('acme', %s::{form})", (events,)
        ).fetchone()
        assert (stored, rejected, indexes) == (2, 4, [1, 3, 4, 5]), form
        assert [error["index"] for error in errors] == indexes
        assert [error["sqlstate"] for error in errors] == ["22023", "42939", "22023", "42939"]
        assert all(set(error) == {"index", "sqlstate", "message"} and error["message"] for error in errors)
    assert one(db.admin, f"SELECT count(*) FROM acme.{collection}") == 4


def test_a_batch_of_garbage_is_refused_as_a_whole(db, writer, collection):
    """What is wrong with each of very many items would take much more memory than they do."""
    good = json.dumps({"collection": collection, "properties": {"n": 1}})
    for kind in ("text", "jsonb"):
        call = f"SELECT * FROM rakam.collect_batch('acme', ('[' || repeat('0,', %s) || %s || ']')::{kind}, NULL)"
        stored, rejected, indexes, errors = writer.execute(call, (100_000, good)).fetchone()
        assert (stored, rejected, len(indexes), len(errors)) == (1, 100_000, 100_000, 100_000)
        with refused("54000", hint="smaller batches"):
            writer.execute(call, (100_001, good))
    assert one(db.admin, f"SELECT count(*) FROM acme.{collection}") == 2


def test_columns_of_all_collections_compared_with_each_other(db, keys):
    collect(db.admin, PROJECT, "namesake", {"_user": "namesake", "_id": "namesake"})
    collect(db.admin, PROJECT, "namesake", {"_user": "nobody"})
    for move in (lambda: None, db.tick, lambda: db.flush(PROJECT)):
        move()
        for condition in (
            "_collection = _user",
            "_user = _collection",
            "_collection IN (_user, 'x')",
            "_collection = _id",
        ):
            assert one(db.admin, f"SELECT count(*) FROM acme._all WHERE {condition}") == 1, condition


def test_patterns_of_any_length(db, keys):
    collect(db.admin, PROJECT, "patterned", {"_user": "abc"})
    db.tick()
    count = "SELECT count(*) FROM acme.patterned WHERE _user {} '{}%%'"
    for length in (3, 4_000, 5_000, 100_000):
        for operator, found in (("LIKE", length == 3), ("NOT LIKE", length > 3)):
            assert one(db.admin, count.format(operator, "_" * length)) == int(found)


def test_batch_of_nothing(db, keys):
    for form in ("text", "jsonb"):
        row = db.admin.execute(f"SELECT * FROM rakam.collect_batch('acme', '[]'::{form})").fetchone()
        assert row == (0, 0, [], [])


def test_batch_into_several_collections(db, keys):
    events = [("batch_a", {"n": 1}), ("batch_b", {"n": 2}), ("batch_a", {"n": 3})]
    assert collect_batch(db.admin, PROJECT, events) == (3, 0, [], [])
    db.tick()
    assert one(db.admin, "SELECT sum(n) FROM acme.batch_a") == 4
    assert one(db.admin, "SELECT sum(n) FROM acme.batch_b") == 2


def test_upload_time_shifts_explicit_times(db, keys, collection):
    now = datetime.now(UTC)
    client = now - timedelta(hours=1)  # a clock that is one hour slow
    events = json.dumps(
        [
            {
                "collection": collection,
                "properties": {"_user": "explicit", "_time": (client - timedelta(minutes=5)).isoformat()},
            },
            {"collection": collection, "properties": {"_user": "none"}},
        ]
    )
    for upload_time in (client.isoformat(), int(client.timestamp() * 1000)):
        api = json.dumps({"upload_time": upload_time})
        db.admin.execute("SELECT rakam.collect_batch('acme', %s, %s)", (events, api))
    found = rows(db.admin, collection, "_user, extract(epoch FROM _received_at - _time)::float8")
    assert len(found) == 4
    for sent, age in found:
        expected = 300 if sent == "explicit" else 0
        assert abs(age - expected) < 10, (sent, age)


def test_checksum(db, keys, collection):
    events = json.dumps([{"collection": collection, "properties": {"n": 1}}])
    right = json.dumps({"checksum": hashlib.md5(events.encode()).hexdigest()})
    wrong = json.dumps({"checksum": hashlib.md5(b"other").hexdigest()})
    assert one(db.admin, "SELECT stored FROM rakam.collect_batch('acme', %s, %s)", events, right) == 1
    with refused("22023"):
        db.admin.execute("SELECT rakam.collect_batch('acme', %s, %s)", (events, wrong))
    with refused("22023"):
        db.admin.execute("SELECT rakam.collect_batch('acme', %s::jsonb, %s)", (events, right))
    assert one(db.admin, f"SELECT count(*) FROM acme.{collection}") == 1


def test_unknown_api_option_is_refused_and_the_valid_ones_named(db, keys):
    with refused("22023", hint="upload_time"):
        db.admin.execute("SELECT rakam.collect_batch('acme', '[]', '{\"uploaded\": 1}')")


def test_jsonb_is_stored_as_the_text_that_the_server_prints(db, keys, collection):
    """Its bytes are read without the server's help; a scan of the inbox shows what came of it."""
    wide = {f"key {n}": n * 1.25 for n in range(100)}
    documents = [
        "{}",
        '{"a": [], "b": {}, "c": null, "d": true, "e": false, "": "empty"}',
        '{"n": [0, -0.0, 1.50, -7, 10000, 99999999.0001, 0.00001, 1e30, 1e-30, 12345678901234567890123456789.0120]}',
        '{"far": [1e400, -2.5e-400, 1.00000000000000000000000000000000000000000000000000000000000000000000000001]}',
        '{"s": "q\\"b\\\\s/\\n\\t\\u0001\\u007f é 😀", "é\\n": [[[["deep"]], {"x": [1, {"y": 2}]}], "z"]}',
        json.dumps({"wide": wide, "list": list(range(200)), "text": "long " * 2000}),
    ]
    session = db.connect(autocommit=False)
    session.execute("CREATE TEMP TABLE document (id int, body jsonb)")
    for number, text in enumerate(documents):
        session.execute("INSERT INTO document VALUES (%s, %s)", (number, text))
        collect(session, PROJECT, collection, text)
    # From a table: with a short header, or compressed.
    session.execute("SELECT rakam.collect('acme', %s, body) FROM document ORDER BY id", (collection,))
    expected = [text for (text,) in session.execute("SELECT body::text FROM document ORDER BY id")]
    inbox = " UNION ALL ".join(f"SELECT id, txid, payload FROM rakam_internal.inbox_{k}" for k in range(3))
    stored = session.execute(
        f"SELECT convert_from(payload, 'UTF8') FROM ({inbox}) i WHERE txid = pg_current_xact_id() ORDER BY id"
    ).fetchall()
    assert [text for (text,) in stored] == expected * 2
    # A scalar is no object, whatever its bytes look like.
    with refused("22023"):
        collect(session, PROJECT, collection, "1.5")


# -- keys and roles ------------------------------------------------------------------------------------------------------


def test_collect_with_key(db, keys, collection):
    db.make_login("login_shared")
    shared = db.connect("login_shared")
    send = "SELECT rakam.collect_with_key(%s, %s, %s)"
    for key in (keys["write_key"], keys["master_key"]):
        shared.execute(send, (key, collection, '{"n": 1}'))
        batch = json.dumps([{"collection": collection, "properties": {"n": 2}}])
        assert one(shared, "SELECT stored FROM rakam.collect_batch_with_key(%s, %s)", key, batch) == 1
    with refused("42501"):
        shared.execute(send, (keys["read_key"], collection, "{}"))
    with refused("28000"):
        shared.execute(send, ("rk_w_nonsense", collection, "{}"))
    assert one(db.admin, f"SELECT count(*) FROM acme.{collection}") == 4
    # The key gives this one call its right, not the session.
    with refused("42501"):
        shared.execute(f"SELECT count(*) FROM acme.{collection}")


def test_revoked_key_fails_at_the_next_call_of_every_session(db, keys, collection):
    names = ("key_id", "read_key", "write_key", "master_key")
    row = db.admin.execute("SELECT key_id, read_key, write_key, master_key FROM rakam.create_keys('acme')").fetchone()
    extra = dict(zip(names, row, strict=True))
    sessions = [db.connect() for _ in range(3)]
    send = "SELECT rakam.collect_with_key(%s, %s, '{}')"
    for session in sessions:
        session.execute(send, (extra["write_key"], collection))
    db.admin.execute("SELECT rakam.revoke_keys('acme', %s)", (extra["key_id"],))
    for session in sessions:
        for key in (extra["write_key"], extra["master_key"]):
            with refused("28000"):
                session.execute(send, (key, collection))
        with refused("28000"):
            session.execute("SELECT rakam.authenticate(%s)", (extra["read_key"],))
    assert one(db.admin, f"SELECT count(*) FROM acme.{collection}") == 3


def test_keys_are_stored_as_hashes_only(db, keys):
    for kind in ("read", "write", "master"):
        assert keys[f"{kind}_key"].startswith("rk_")
    stored = db.one("SELECT string_agg(k::text, ' ') FROM rakam_internal.api_key k")
    assert not any(keys[f"{kind}_key"][5:] in stored for kind in ("read", "write", "master"))


def test_authenticate_acts_for_the_transaction(db, keys, collection):
    db.make_login("login_pooled")
    pooled = db.connect("login_pooled")
    collect(db.admin, PROJECT, collection, {"n": 1})
    with pooled.transaction():
        pooled.execute("SELECT rakam.authenticate(%s)", (keys["read_key"],))
        assert one(pooled, f"SELECT count(*) FROM acme.{collection}") == 1
    with refused("42501"):
        pooled.execute(f"SELECT count(*) FROM acme.{collection}")
    pooled.execute("SELECT rakam.authenticate(%s, local => false)", (keys["read_key"],))
    assert one(pooled, f"SELECT count(*) FROM acme.{collection}") == 1
    pooled.execute("DISCARD ALL")
    with refused("42501"):
        pooled.execute(f"SELECT count(*) FROM acme.{collection}")


def test_unknown_and_forbidden_project_tell_the_same(db, keys):
    db.make_login("login_stranger")
    stranger = db.connect("login_stranger")
    told = []
    for project in ("acme", "no_such_project"):
        with pytest.raises(psycopg.Error) as caught:
            collect(stranger, project, "pageview", {})
        assert caught.value.sqlstate == "42501"
        told.append((caught.value.diag.message_primary or "").replace(project, "?"))
    assert told[0] == told[1]


# -- refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        "rakam.collect(NULL, 'c', '{}')",
        "rakam.collect('acme', NULL, '{}')",
        "rakam.collect('acme', 'c', NULL)",
        "rakam.collect_batch(NULL, '[]'::text)",
        "rakam.collect_batch('acme', NULL::text)",
        "rakam.collect_batch('acme', NULL::jsonb)",
        "rakam.collect_with_key(NULL, 'c', '{}')",
        "rakam.create_collection('acme', NULL)",
        "rakam.create_project(NULL)",
    ],
)
def test_null_is_an_error(db, keys, call):
    with refused("22004"):
        db.admin.execute(f"SELECT {call}")


@pytest.mark.parametrize("properties", ["[]", "1", '"text"', "null", "true"])
def test_properties_must_be_an_object(writer, properties):
    with refused("22023"):
        collect(writer, PROJECT, "shapes", properties)


@pytest.mark.parametrize(
    ("name", "sqlstate"),
    [
        ("", "42602"),
        ("x" * 64, "42602"),
        ("users", "42939"),
        ("USERS", "42939"),
        ("_all", "42939"),
        ("_anything", "42939"),
        ("continuous_x", "42939"),
        ("materialized_x", "42939"),
    ],
)
def test_collection_names(db, writer, name, sqlstate):
    with refused(sqlstate):
        collect(writer, PROJECT, name, {})
    with refused(sqlstate):
        db.admin.execute("SELECT rakam.create_collection('acme', %s)", (name,))


@pytest.mark.parametrize(
    ("name", "sqlstate"),
    [
        ("", "42602"),
        ("1st", "42602"),
        ("a-b", "42602"),
        ("a" * 41, "42602"),
        ("pg_x", "42939"),
        ("public", "42939"),
        ("information_schema", "42939"),
        ("rakam", "42939"),
        ("rakam_x", "42939"),
        ("acme", "42710"),
        ("ACME", "42710"),
    ],
)
def test_project_names(db, keys, name, sqlstate):
    with refused(sqlstate):
        db.project(name)


@pytest.mark.parametrize("field", ["_received_at", "_extra", "_project", "_collection", "$server_time"])
def test_server_set_fields_are_refused(writer, field):
    with refused("42939", message=field):
        collect(writer, PROJECT, "reserved", {field: 1})


def test_too_large(db, writer, collection):
    with refused("54000"):
        collect(writer, PROJECT, collection, {"blob": ["x" * 60_000] * 20})
    with refused("54000"):
        collect(writer, PROJECT, collection, {"_id": "i" * 257})
    collect(writer, PROJECT, collection, {"_id": "i" * 256})
    deep = "[" * 70 + "]" * 70
    with refused("54000"):
        collect(writer, PROJECT, collection, f'{{"deep": {deep}}}')
    assert one(db.admin, f"SELECT count(*) FROM acme.{collection}") == 1


def test_malformed_text(db, writer, collection):
    for text in ("", "{", '[{"collection": "c", "properties": {}', "nonsense", "[1,]"):
        with refused("22P02"):
            writer.execute("SELECT rakam.collect_batch('acme', %s)", (text,))
    for text in ("{}", "1", '"x"', "null"):
        with refused("22023"):
            writer.execute("SELECT rakam.collect_batch('acme', %s)", (text,))
    assert one(db.admin, f"SELECT count(*) FROM acme.{collection}") == 0


def test_a_hostile_item_is_rejected_alone(db, writer, collection):
    deep = "[" * 100 + "]" * 100
    bad = [
        (f'{{"collection": "{collection}", "properties": {{"a": "nul \\u0000"}}}}', "22P05"),
        (f'{{"collection": "{collection}", "properties": {{"k\\u0000": 1}}}}', "22P05"),
        (f'{{"collection": "{collection}", "properties": {{"a": {deep}}}}}', "54000"),
        (f'{{"collection": "{collection}", "properties": {{"a": "{"x" * 1_100_000}"}}}}', "54000"),
        (f'{{"collection": "{collection}", "properties": {{"_id": "{"x" * 300}"}}}}', "54000"),
        (f'{{"collection": "{collection}"}}', "22023"),
        ('{"properties": {}}', "22023"),
        (f'{{"collection": "{collection}", "properties": null}}', "22023"),
        ('{"collection": 1, "properties": {}}', "22023"),
        ('{"collection": "", "properties": {}}', "42602"),
        ("null", "22023"),
    ]
    good = f'{{"collection": "{collection}", "properties": {{"ok": true}}}}'
    text = f"[{good}," + ",".join(item for item, _ in bad) + f",{good}]"
    stored, rejected, indexes, errors = writer.execute(
        "SELECT * FROM rakam.collect_batch('acme', %s)", (text,)
    ).fetchone()
    assert (stored, rejected) == (2, len(bad))
    assert indexes == list(range(1, len(bad) + 1))
    assert [error["sqlstate"] for error in errors] == [sqlstate for _, sqlstate in bad]
    db.tick()
    assert one(db.admin, f"SELECT count(*) FROM acme.{collection} WHERE ok") == 2


@pytest.mark.parametrize("statement", ["UPDATE acme.{} SET _user = 'x'", "DELETE FROM acme.{}", "TRUNCATE acme.{}"])
def test_events_cannot_be_changed(db, keys, collection, statement):
    collect(db.admin, PROJECT, collection, {"n": 1})
    before = rows(db.admin, collection, "count(*), count(_user)", "1")
    with pytest.raises(psycopg.Error) as caught:
        db.admin.execute(statement.format(collection))
    assert caught.value.sqlstate == "0A000"
    assert caught.value.diag.message_hint
    assert rows(db.admin, collection, "count(*), count(_user)", "1") == before


# -- fields --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "column"),
    [
        ("userName", "user_name"),
        ("user_name2", "user_name2"),
        ("userID", "user_id"),
        ("HTTPStatus", "http_status"),
        ("aB", "a_b"),
        ("already_Snake", "already_snake"),
        ("with blank", "with_blank"),
        ("with.dot", "with_dot"),
        ("  padded  ", "padded"),
        ('"quoted"', "quoted"),
        ("ABC", "abc"),
        ("x9Y", "x9_y"),
        ("größe", "größe"),
        ("ünïDé", "ünï_dé"),
        ("_own", "_own"),
        ("a-b", "a-b"),
        ("$price", "$price"),
    ],
)
def test_field_names(db, writer, sent, column):
    collect(writer, PROJECT, "field_names", {sent: "v", "_id": f"name {sent}"})
    db.tick()
    assert has_column(db.admin, "acme.field_names", column), f"{sent} did not become {column}"
    found = db.one(f'SELECT "{column}" FROM acme.field_names WHERE _id = %s', f"name {sent}")
    assert found == "v"


def test_the_same_name_twice_the_last_wins(db, writer, collection):
    text = f'[{{"collection": "{collection}", "properties": {{"userName": "first", "user_name": "second"}}}}]'
    writer.execute("SELECT rakam.collect_batch('acme', %s)", (text,))
    db.tick()
    assert rows(db.admin, collection, "user_name, _extra") == [("second", None)]


def test_names_that_cannot_be_columns_live_in_extra(db, writer, collection):
    names = ["xmin", "xmax", "cmin", "cmax", "ctid", "tableoid", "l" * 64, ""]
    collect(writer, PROJECT, collection, {name: index for index, name in enumerate(names)} | {"plain": 1})
    for _ in range(2):
        db.tick()
    extra = rows(db.admin, collection, "_extra")[0][0]
    assert extra == {name: index for index, name in enumerate(names)}
    db.flush(PROJECT, collection)
    assert rows(db.admin, collection, "_extra, plain") == [(extra, 1.0)]


def test_id_as_number(db, writer, collection):
    collect(writer, PROJECT, collection, '{"_id": 1}')
    collect(writer, PROJECT, collection, '{"_user": 42, "_id": "x"}')
    assert rows(db.admin, collection, "_id, _user", "_id") == [("1", None), ("x", "42")]


def test_long_strings_are_cut_on_a_character_and_logged(db, writer, collection):
    collect(writer, PROJECT, collection, {"s": "é" * 40_000, "short": "x"})
    db.tick()
    cut = rows(db.admin, collection, "s")[0][0]
    # 64 kB, and no half character at the end.
    assert 65_000 <= len(cut.encode()) <= 65_536
    assert set(cut) == {"é"}
    assert db.one("SELECT count(*) FROM rakam.invalid_value WHERE collection = %s AND field = 's'", collection) == 1


# -- _time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        ("2026-03-01T12:00:00Z", "2026-03-01T12:00:00+00:00"),
        ("2026-03-01T12:00:00+02:00", "2026-03-01T10:00:00+00:00"),
        ("2026-03-01 12:00:00", "2026-03-01T12:00:00+00:00"),
        ("2026-03-01T12:00:00.123456", "2026-03-01T12:00:00.123456+00:00"),
        ("2026-03-01T12:00", "2026-03-01T12:00:00+00:00"),
        (1_772_366_400_000, "2026-03-01T12:00:00+00:00"),
        (1_772_366_400_123.0, "2026-03-01T12:00:00.123000+00:00"),
        ("1772366400000", "2026-03-01T12:00:00+00:00"),
    ],
)
def test_time_formats(db, writer, sent, stored):
    # Without an offset it is UTC, whatever the session's time zone.
    writer.execute("SET TimeZone = 'America/New_York'")
    identity = f"time {sent!r}"
    collect(writer, PROJECT, "time_formats", {"_time": sent, "_id": identity})
    db.tick()
    for _ in range(2):
        found = db.one("SELECT _time FROM acme.time_formats WHERE _id = %s", identity)
        assert found == datetime.fromisoformat(stored)
        db.flush(PROJECT, "time_formats")


def test_missing_time_is_the_clock_at_the_call(db, writer, collection):
    session = db.connect(autocommit=False)
    session.execute("SELECT pg_sleep(0.3)")
    before = one(session, "SELECT clock_timestamp()")
    collect(session, PROJECT, collection, {})
    after = one(session, "SELECT clock_timestamp()")
    session.commit()
    same, at = rows(db.admin, collection, "_time = _received_at, _time")[0]
    assert same
    assert before <= at <= after


@pytest.mark.parametrize(
    "sent", ["yesterday", "", "2026-13-01T00:00:00Z", True, {}, [], "1850-01-01", 99_999_999_999_999]
)
def test_time_that_does_not_work_is_replaced_and_logged(db, writer, sent):
    identity = f"bad time {sent!r}"
    collect(writer, PROJECT, "time_invalid", {"_time": sent, "_id": identity})
    db.tick()
    assert db.one("SELECT _time = _received_at FROM acme.time_invalid WHERE _id = %s", identity)
    logged = db.all(
        "SELECT field, event_id FROM rakam.invalid_value WHERE collection = 'time_invalid' AND event_id = %s", identity
    )
    assert logged == [("_time", identity)]


def test_time_bounds(db, writer, collection):
    now = datetime.now(UTC)
    times = {
        "in the past": (now - timedelta(days=365 * 19), True),
        "too old": (now - timedelta(days=365 * 21), False),
        "a little ahead": (now + timedelta(hours=23), True),
        "too far ahead": (now + timedelta(hours=26), False),
    }
    for name, (at, _) in times.items():
        collect(writer, PROJECT, collection, {"_id": name, "_time": at.isoformat()})
    db.tick()
    kept = dict(rows(db.admin, collection, "_id, _time <> _received_at"))
    assert kept == {name: inside for name, (_, inside) in times.items()}


# -- INSERT --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def typed(db, collection):
    for field, kind in (("n", "bigint"), ("price", "numeric(10,2)"), ("at", "timestamptz"), ("tags", "text[]")):
        db.admin.execute("SELECT rakam.add_field('acme', %s, %s, %s)", (collection, field, kind))
    db.tick()
    return collection


def test_insert_returning(db, typed):
    # RETURNING reads, which the write role may not.
    found = db.admin.execute(
        f"INSERT INTO acme.{typed} (_user, n, price, tags) VALUES ('u1', 1, 2.345, '{{a,b}}'), ('u2', NULL, 7, NULL)"
        " RETURNING n, price::text, _time IS NOT NULL, _received_at IS NOT NULL"
    ).fetchall()
    assert found == [(1, "2.35", True, True), (None, "7.00", True, True)]
    for _ in range(2):
        assert rows(db.admin, typed, "_user, n, price::text, tags", "_user") == [
            ("u1", 1, "2.35", ["a", "b"]),
            ("u2", None, "7.00", None),
        ]
        db.flush(PROJECT, typed)


def test_insert_is_typed_by_postgres(db, writer, typed):
    with refused("22P02"):
        writer.execute(f"INSERT INTO acme.{typed} (n) VALUES (1), ('x')")
    with refused("22003"):
        writer.execute(f"INSERT INTO acme.{typed} (price) VALUES (123456789.5)")
    with refused("42703"):
        writer.execute(f"INSERT INTO acme.{typed} (no_such_field) VALUES (1)")
    assert one(db.admin, f"SELECT count(*) FROM acme.{typed}") == 0


def test_insert_on_conflict_do_nothing(db, writer, typed):
    writer.execute(f"INSERT INTO acme.{typed} (_id, n) VALUES ('a', 1) ON CONFLICT DO NOTHING")
    assert one(db.admin, f"SELECT count(*) FROM acme.{typed}") == 1


def test_insert_select_and_rollback(db, keys, typed):
    session = db.connect(autocommit=False)
    session.execute(f"INSERT INTO acme.{typed} (n) SELECT g FROM generate_series(1, 1000) g")
    assert one(session, f"SELECT count(*), sum(n) FROM acme.{typed}") == 1000
    session.rollback()
    session.execute(f"INSERT INTO acme.{typed} (n) SELECT g FROM generate_series(1, 500) g")
    session.commit()
    db.tick()
    assert rows(db.admin, typed, "count(*), sum(n)", "1") == [(500, 125_250)]


def test_insert_extra_and_received_at(db, writer, typed):
    writer.execute(f"""INSERT INTO acme.{typed} (_id, _extra) VALUES ('e', '{{"free": [1, {{"a": null}}]}}')""")
    db.tick()
    assert rows(db.admin, typed, "_extra->'free'->0")[0][0] == 1
    with refused("42501"):
        writer.execute(f"INSERT INTO acme.{typed} (_received_at) VALUES ('2026-01-01')")
    admin = db.login(PROJECT, "admin")
    admin.execute(f"INSERT INTO acme.{typed} (_id, _received_at) VALUES ('r', '2026-01-01 00:00:00Z')")
    assert db.one(f"SELECT _received_at FROM acme.{typed} WHERE _id = 'r'") == datetime(2026, 1, 1, tzinfo=UTC)
