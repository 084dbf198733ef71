"""Every documented error that applies (SPEC: errors): its SQLSTATE, a message in the style of PostgreSQL, and a hint where
one helps. One table; what needs a server in a certain state is below it."""

from __future__ import annotations

import json
import re

import psycopg
import pytest
from harness.database import Database, collect, collect_batch, one, refused

DEEP = '{"a":' * 65 + "1" + "}" * 65
LONG_ID = json.dumps({"_id": "x" * 257})
LARGE = json.dumps({"x": "y" * (1 << 20)})


def batch(*items) -> str:
    return json.dumps([{"collection": name, "properties": properties} for name, properties in items])


# SQLSTATE, who asks, statement, its arguments, a part of the hint (None: it has none).
CASES = [
    # Unknown and forbidden projects have one text; missing privileges.
    ("42501", "stranger", "SELECT rakam.collect('err', 'known', '{}')", (), "one of its roles"),
    ("42501", "stranger", "SELECT rakam.collect('nowhere', 'known', '{}')", (), "one of its roles"),
    ("42501", "reader", "SELECT rakam.collect('err', 'known', '{}')", (), "one of its roles"),
    ("42501", "stranger", "SELECT rakam.collect_batch('err', '[]'::text)", (), "one of its roles"),
    ("42501", "writer", "SELECT * FROM rakam.create_keys('err')", (), "one of its roles"),
    ("42501", "writer", "SELECT rakam.create_collection('err', 'c')", (), "one of its roles"),
    ("42501", "writer", "SELECT rakam.add_field('err', 'known', 'f', 'text')", (), "one of its roles"),
    ("42501", "writer", "SELECT rakam.drop_collection('err', 'known')", (), "one of its roles"),
    ("42501", "writer", "SELECT rakam.rename_collection('err', 'known', 'x')", (), "one of its roles"),
    ("42501", "writer", "SELECT rakam.drop_field('err', 'known', 'n')", (), "one of its roles"),
    ("42501", "writer", "SELECT rakam.set_schema_mode('err', 'open')", (), "one of its roles"),
    ("42501", "writer", "SELECT rakam.set_time_bounds('err', '1 day', '1 day')", (), "one of its roles"),
    ("42501", "writer", "SELECT * FROM rakam.field_values('err', 'known', 'n')", (), "one of its roles"),
    ("42501", "writer", "SELECT * FROM rakam.flush('err')", (), "one of its roles"),
    ("42501", "admin", "SELECT * FROM rakam.create_project('another')", (), "rakam_admin"),
    ("42501", "admin", "SELECT rakam.drop_project('err')", (), "rakam_admin"),
    ("42501", "admin", "SELECT rakam.set_quota('err', 1, 1, 1, 1)", (), "rakam_admin"),
    ("42501", "stranger", "SELECT rakam.tick()", (), "some project"),
    ("42501", "writer", "SELECT * FROM err.known", (), None),
    ("42501", "reader", "INSERT INTO err.known (n) VALUES (1)", (), None),
    ("42501", "writer", "INSERT INTO err.known (_received_at) VALUES (now())", (), "leave it out"),
    ("42501", "writer", "SELECT rakam.collect_with_key(%(read_key)s, 'known', '{}')", (), "write key"),
    ("42501", "stranger", "SELECT * FROM rakam_internal.api_key", (), None),
    # What exists already, and what does not.
    ("42710", "super", "SELECT * FROM rakam.create_project('err')", (), "another name"),
    ("42710", "admin", "SELECT rakam.add_field('err', 'known', 'n', 'text')", (), "never changes its type"),
    ("42710", "admin", "SELECT rakam.rename_collection('err', 'known', 'second')", (), "another name"),
    ("42704", "admin", "SELECT rakam.add_field('err', 'unheard', 'n', 'text')", (), "rakam.create_collection"),
    ("42704", "admin", "SELECT rakam.drop_collection('err', 'unheard')", (), "rakam.collections"),
    ("42704", "admin", "SELECT rakam.rename_collection('err', 'unheard', 'x')", (), "rakam.collections"),
    ("42704", "admin", "SELECT rakam.drop_field('err', 'unheard', 'n')", (), "rakam.collections"),
    ("42704", "reader", "SELECT * FROM rakam.field_values('err', 'unheard', 'n')", (), "rakam.collections"),
    ("42704", "admin", "SELECT rakam.revoke_keys('err', gen_random_uuid())", (), "rakam.keys"),
    ("42704", "super", "SELECT * FROM rakam.create_project('another', 'nowhere')", (), "CREATE SERVER"),
    ("42703", "admin", "SELECT rakam.drop_field('err', 'known', 'unheard')", (), "rakam.fields"),
    ("42703", "reader", "SELECT * FROM rakam.field_values('err', 'known', 'unheard')", (), "rakam.fields"),
    # New fields and collections where the schema is fixed; quotas.
    ("42703", "writer", "SELECT rakam.collect('rigid', 'known', '{\"x\": 1}')", (), "rakam.add_field"),
    ("42703", "writer", "SELECT rakam.collect('rigid', 'unheard', '{}')", (), "rakam.create_collection"),
    ("53400", "writer", "SELECT rakam.collect('full', 'unheard', '{}')", (), "rakam.set_quota"),
    ("53400", "writer", "SELECT rakam.collect('full', 'known', '{\"x\": 1}')", (), "rakam.set_quota"),
    ("53400", "writer", "SELECT rakam.collect('slow', 'known', '{}')", (), "Send again later"),
    ("53400", "writer", "SELECT rakam.collect('small', 'known', '{}')", (), "midnight UTC"),
    ("53400", "admin", "SELECT rakam.create_collection('full', 'unheard')", (), "rakam.set_quota"),
    ("53400", "admin", "SELECT rakam.add_field('full', 'known', 'x', 'text')", (), "rakam.set_quota"),
    # Names.
    ("42602", "super", "SELECT * FROM rakam.create_project('1st')", (), "starts with a letter"),
    ("42602", "admin", "SELECT rakam.create_collection('err', '')", (), None),
    ("42602", "writer", "SELECT rakam.collect('err', %s, '{}')", ("x" * 64,), None),
    ("42602", "admin", "SELECT rakam.add_field('err', 'known', 'xmin', 'text')", (), "_extra"),
    ("42939", "super", "SELECT * FROM rakam.create_project('rakam_x')", (), "belong to the server"),
    ("42939", "writer", "SELECT rakam.collect('err', 'users', '{}')", (), "used by rakam itself"),
    ("42939", "admin", "SELECT rakam.rename_collection('err', 'known', 'continuous_x')", (), "used by rakam itself"),
    ("42939", "admin", "SELECT rakam.drop_field('err', 'known', '_time')", (), "Every collection"),
    *[
        ("42939", "writer", "SELECT rakam.collect('err', 'known', %s)", (json.dumps({name: 1}),), "Rename the field")
        for name in ("_received_at", "_extra", "_project", "_collection", "$server_time", "$serverTime")
    ],
    # Missing and malformed arguments.
    ("22004", "writer", "SELECT rakam.collect(NULL, 'known', '{}')", (), None),
    ("22004", "writer", "SELECT rakam.collect('err', NULL, '{}')", (), None),
    ("22004", "writer", "SELECT rakam.collect('err', 'known', NULL)", (), None),
    ("22004", "writer", "SELECT rakam.collect_batch('err', NULL::text)", (), None),
    ("22004", "admin", "SELECT rakam.drop_field('err', 'known', NULL)", (), None),
    ("22004", "super", "SELECT rakam.set_quota(NULL, 1, 1, 1, 1)", (), None),
    ("22023", "writer", "SELECT rakam.collect('err', 'known', '[1]')", (), None),
    ("22023", "writer", "SELECT rakam.collect_batch('err', '{}'::text)", (), "Send [{"),
    ("22023", "writer", "SELECT rakam.collect_batch('err', '[]'::text, '{\"checksum\": \"0\"}')", (), "MD5"),
    ("22023", "writer", "SELECT rakam.collect_batch('err', '[]'::jsonb, '{\"checksum\": \"0\"}')", (), "as text"),
    ("22023", "writer", "SELECT rakam.collect_batch('err', '[]'::text, '{\"colour\": 1}')", (), "upload_time"),
    ("22023", "admin", "SELECT rakam.add_field('err', 'known', 'f', 'money')", (), "Types are"),
    ("22023", "admin", "SELECT rakam.add_field('err', 'known', 'f', 'numeric')", (), "Types are"),
    ("22023", "admin", "SELECT rakam.set_schema_mode('err', 'half')", (), "open and fixed"),
    ("22023", "admin", "SELECT rakam.set_time_bounds('err', '-1 day', '1 day')", (), "10,000 years"),
    ("22023", "super", "SELECT rakam.set_quota('err', -1, NULL, NULL, NULL)", (), "NULL is no limit"),
    ("22P02", "writer", "SELECT rakam.collect('err', 'known', '{')", (), None),
    ("22P02", "writer", "SELECT rakam.collect_batch('err', '[{]'::text)", (), None),
    ("22P05", "writer", "SELECT rakam.collect('err', 'known', '{\"a\": \"\\u0000\"}')", (), None),
    # Keys.
    ("28000", "stranger", "SELECT rakam.authenticate('rk_r_00')", (), None),
    ("28000", "stranger", "SELECT rakam.collect_with_key('rk_w_00', 'known', '{}')", (), None),
    ("28000", "stranger", "SELECT rakam.collect_with_key(%(revoked_key)s, 'known', '{}')", (), None),
    # Too large.
    ("54000", "writer", "SELECT rakam.collect('err', 'known', %s)", (LARGE,), "rakam.max_event_bytes"),
    ("54000", "writer", "SELECT rakam.collect('err', 'known', %s)", (DEEP,), None),
    ("54000", "writer", "SELECT rakam.collect('err', 'known', %s)", (LONG_ID,), "shorter"),
    # Events do not change.
    ("0A000", "super", "UPDATE err.known SET n = 2", (), "rakam.delete_events"),
    ("0A000", "super", "DELETE FROM err.known", (), "rakam.delete_events"),
    ("0A000", "super", "TRUNCATE err.known", (), "rakam.delete_events"),
    ("0A000", "super", "CREATE SERVER h FOREIGN DATA WRAPPER rakam OPTIONS (url 'hdfs://n/x')", (), "file://"),
    # Not now, and what stands in the way.
    ("55000", "super", "SELECT rakam.drop_project('err')", (), "rakam.allow_project_drop"),
    ("2BP01", "admin", "SELECT rakam.drop_collection('err', 'known')", (), "depend on it"),
    ("2BP01", "admin", "SELECT rakam.drop_field('err', 'known', 'n')", (), "depend on it"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(db):
    """Projects `err`, `rigid` (fixed schema), `full`, `slow`, `small` (quotas), and sessions of each kind of role."""
    keys = db.project("err")
    revoked = db.admin.execute("SELECT key_id, write_key FROM rakam.create_keys('err')").fetchone()
    db.admin.execute("SELECT rakam.revoke_keys('err', %s)", (revoked[0],))
    projects = ("err", "rigid", "full", "slow", "small")
    for project in projects:
        if project != "err":
            db.project(project)
        collect(db.admin, project, "known", {"n": 1})
    collect(db.admin, "err", "second", {"n": 1})
    db.tick()
    db.admin.execute("CREATE VIEW err.of_n AS SELECT n FROM err.known")
    db.admin.execute("SELECT rakam.set_schema_mode('rigid', 'fixed')")
    for project, quota in (
        ("full", (None, None, 1, 1)),
        ("slow", (0, None, None, None)),
        ("small", (None, 1, None, None)),
    ):
        db.admin.execute("SELECT rakam.set_quota(%s, %s, %s, %s, %s)", (project, *quota))
    sessions = {"super": db.admin}
    for name, kinds in {"reader": ["read"], "writer": ["write"], "admin": ["admin"], "stranger": []}.items():
        role = f"login_errors_{name}"
        db.make_login(role)
        for kind in kinds:
            for project in projects:
                db.admin.execute(f"GRANT rakam_{project}_{kind} TO {role}")
        sessions[name] = db.connect(role)
    return sessions, {"read_key": keys["read_key"], "revoked_key": revoked[1]}


def check_style(diagnostics) -> None:
    """As PostgreSQL's error style guide says."""
    message = diagnostics.message_primary
    # Names of ours and SQL keywords keep their case; other messages begin with a small letter.
    assert re.match(r'["a-z_]|JSON |NULL |ON CONFLICT |could not |cannot ', message), message
    assert not message.endswith((".", "!", "\n")) and "\n" not in message, message
    # The server's own details: of its JSON parser, and what depends on an object.
    own = diagnostics.sqlstate in ("22P05", "2BP01")
    for sentence in (None if own else diagnostics.message_detail, diagnostics.message_hint):
        if sentence is not None:
            assert re.match(r'[A-Z"$_]|file://|rakam\.|users and', sentence), sentence
            assert sentence.endswith("."), sentence


@pytest.mark.parametrize(
    ("sqlstate", "who", "statement", "arguments", "hint"), CASES, ids=[f"{case[0]}-{n}" for n, case in enumerate(CASES)]
)
def test_documented_error(world, sqlstate, who, statement, arguments, hint):
    sessions, keys = world
    if "%(" in statement:
        arguments = keys
    with pytest.raises(psycopg.Error) as caught:
        sessions[who].execute(statement, arguments or None)
    diagnostics = caught.value.diag
    told = f"{diagnostics.sqlstate}: {diagnostics.message_primary}; hint: {diagnostics.message_hint}"
    assert diagnostics.sqlstate == sqlstate, told
    check_style(diagnostics)
    if hint is None:
        assert diagnostics.message_hint is None, told
    else:
        assert hint in (diagnostics.message_hint or ""), told


def test_unknown_and_forbidden_project_look_the_same(world):
    sessions, _ = world
    texts = set()
    for project in ("err", "nowhere"):
        with pytest.raises(psycopg.Error) as caught:
            sessions["stranger"].execute("SELECT rakam.collect(%s, 'c', '{}')", (project,))
        diagnostics = caught.value.diag
        told = (diagnostics.message_primary, diagnostics.message_detail, diagnostics.message_hint)
        texts.add(tuple((text or "").replace(project, "…") for text in told))
    assert len(texts) == 1


# What is wrong with a single event is in the result of its batch: SQLSTATE by event.
ITEMS = [
    ("42703", "rigid", ("known", {"x": 1})),
    ("42703", "rigid", ("unheard", {})),
    ("53400", "full", ("known", {"x": 1})),
    ("53400", "full", ("unheard", {})),
    ("42939", "err", ("known", {"_extra": 1})),
    ("42939", "err", ("_all", {})),
    ("42602", "err", ("", {})),
    ("22023", "err", ("known", [1])),
    ("54000", "err", ("known", json.loads(DEEP))),
    ("54000", "err", ("known", json.loads(LONG_ID))),
    ("54000", "err", ("known", json.loads(LARGE))),
    ("22P05", "err", ("known", {"a": "\0"})),
]  # fmt: skip


@pytest.mark.parametrize(("sqlstate", "project", "item"), ITEMS)
def test_documented_error_of_an_item(world, sqlstate, project, item):
    sessions, _ = world
    stored, rejected, indexes, errors = collect_batch(sessions["writer"], project, [("known", {"n": 1}), item])
    assert (stored, rejected, indexes) == (1, 1, [1])
    assert [error["sqlstate"] for error in errors] == [sqlstate]
    assert re.match(r'["a-z_]|JSON ', errors[0]["message"]) and not errors[0]["message"].endswith(".")


def test_a_lock_of_the_callers_own(world, db):
    session = db.connect(autocommit=False)
    session.execute("SELECT * FROM err.second")
    with refused("55P03", hint="Commit or roll back first"):
        session.execute("SELECT rakam.drop_collection('err', 'second')")
    session.rollback()


def test_read_only(world, db):
    session = db.connect()
    session.execute("SET default_transaction_read_only = on")
    for statement in (
        "SELECT rakam.collect('err', 'known', '{}')",
        "SELECT rakam.set_schema_mode('err', 'open')",
        "SELECT rakam.drop_collection('err', 'known')",
    ):
        with refused("25006", message="read-only transaction"):
            session.execute(statement)


def test_no_worker_slot(private_cluster):
    cluster = private_cluster("slots", {"max_worker_processes": "2"})
    db = Database(cluster, "slots").create()
    with cluster.connect() as postgres:
        # The launcher and the resident have the two.
        assert one(postgres, "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'rakam%%'") <= 2
    with refused("53000", hint="max_worker_processes"):
        for _ in range(50):
            db.tick()
    db.close()
