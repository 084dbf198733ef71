"""Every documented error that applies (SPEC: errors): its SQLSTATE, a message in the style of PostgreSQL, and its hint. None
has no hint but where PostgreSQL itself finds the error, before we are called. One table; what needs a server in a certain
state is below it. Not here: 53200 (test_memory.py), a bucket that is away (test_bucket.py), a standby (test_standby.py)."""

from __future__ import annotations

import json
import re

import psycopg
import pytest
from harness.database import Database, collect, collect_batch, one, refused, wait_until
from harness.full_disk import FullDisk
from harness.lake import files_of, fill, make_storage, objects

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
    ("42501", "admin", "SELECT * FROM rakam.check_storage('rakam_local')", (), "rakam_admin"),
    ("42501", "admin", "SELECT rakam.adopt_storage('rakam_local')", (), "rakam_admin"),
    ("42501", "admin", "SELECT * FROM rakam.rebuild_catalog('rakam_local')", (), "rakam_admin"),
    ("42501", "admin", "CREATE SERVER own FOREIGN DATA WRAPPER rakam OPTIONS (url 's3://b/p')", (), None),
    ("42501", "stranger", "SELECT rakam.tick()", (), "some project"),
    ("42501", "writer", "SELECT rakam.copy_from('err', 'known', 'file:///etc/passwd', 'csv')", (), "pg_read_server_files"),
    ("42501", "reader", "SELECT rakam.copy_to('err', 'SELECT 1', 'file:///tmp/x.csv')", (), "pg_write_server_files"),
    ("42501", "super", "SELECT rakam.copy_to('err', 'DROP TABLE err.users', 'file:///tmp/x.csv')", (), "Only one SELECT"),
    ("42501", "admin", "SELECT rakam.track_table('err', 'changed', 'pg_catalog.pg_class')", (), "owner"),
    ("42501", "writer", "SELECT rakam.collect_batch_with_key(%(read_key)s, '[]')", (), "write key"),
    ("42501", "admin", "INSERT INTO err.forged (n) VALUES (1)", (), "the table that rakam has made"),
    ("42501", "definer", "SELECT err.becomes(%(read_key)s)", (), "where SET ROLE is allowed"),
    ("42501", "writer", "SELECT * FROM err.known", (), None),
    ("42501", "reader", "INSERT INTO err.known (n) VALUES (1)", (), None),
    ("42501", "writer", "INSERT INTO err.known (_received_at) VALUES (now())", (), "leave it out"),
    ("42501", "writer", "SELECT rakam.collect_with_key(%(read_key)s, 'known', '{}')", (), "write key"),
    ("42501", "stranger", "SELECT * FROM rakam_internal.api_key", (), None),
    # What exists already, and what does not.
    ("42710", "super", "SELECT * FROM rakam.create_project('err')", (), "another name"),
    ("42710", "super", "SELECT * FROM rakam.create_project('occupied')", (), "another name"),
    ("42710", "super", "SELECT * FROM rakam.create_project('claimed')", (), "rakam.role_prefix"),
    ("42710", "super", "SELECT rakam.attach('err', 'known', 'file:///tmp/*.csv')", (), "another name"),
    ("42710", "super", "SELECT rakam.attach('err', 'held', 'file://' || %(file)s)", (), "another name"),
    ("42710", "admin", "SELECT rakam.rename_collection('err', 'second', 'held')", (), "rakam.detach"),
    ("42710", "writer", "SELECT rakam.collect('err', 'held', '{}')", (), "rakam.detach"),
    ("42710", "admin", "SELECT rakam.add_field('err', 'known', 'n', 'text')", (), "never changes its type"),
    ("42710", "admin", "SELECT rakam.rename_collection('err', 'known', 'second')", (), "another name"),
    ("42704", "admin", "SELECT rakam.add_field('err', 'unheard', 'n', 'text')", (), "rakam.create_collection"),
    ("42704", "admin", "SELECT rakam.drop_collection('err', 'unheard')", (), "rakam.collections"),
    ("42704", "admin", "SELECT rakam.rename_collection('err', 'unheard', 'x')", (), "rakam.collections"),
    ("42704", "admin", "SELECT rakam.drop_field('err', 'unheard', 'n')", (), "rakam.collections"),
    ("42704", "reader", "SELECT * FROM rakam.field_values('err', 'unheard', 'n')", (), "rakam.collections"),
    ("42704", "admin", "SELECT * FROM rakam.flush('err', 'unheard')", (), "rakam.collections"),
    ("42704", "admin", "SELECT * FROM rakam.compact('err', 'unheard')", (), "rakam.collections"),
    ("42704", "admin", "SELECT rakam.set_retention('err', 'unheard', '1 day')", (), "rakam.collections"),
    ("42704", "admin", "SELECT rakam.delete_events('err', 'unheard', 'true')", (), "rakam.collections"),
    ("42704", "admin", "SELECT rakam.detach('err', 'unheard')", (), "rakam.attached"),
    ("42704", "super", "SELECT rakam.untrack_table('err', 'err.users')", (), "rakam.track_table"),
    ("42704", "admin", "SELECT rakam.replay_dead_letters('err', 'unheard')", (), "With NULL as source"),
    ("42704", "super", "SELECT * FROM rakam.check_storage('unheard')", (), "foreign server"),
    ("42704", "super", "SELECT rakam.adopt_storage('unheard')", (), "foreign server"),
    ("42704", "super", "SELECT * FROM rakam.rebuild_catalog('unheard')", (), "CREATE SERVER"),
    ("42704", "super", "SELECT * FROM rakam.create_project('another', 'rakam')", (), "the option url"),
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
    ("42602", "super", "SELECT * FROM rakam.create_project(%s)", ("x" * 41,), "at most 40"),
    ("42602", "admin", "SELECT rakam.create_collection('err', '')", (), "1 to 63 bytes"),
    ("42602", "writer", "SELECT rakam.collect('err', %s, '{}')", ("x" * 64,), "1 to 63 bytes"),
    ("42602", "super", "SELECT rakam.attach('err', '', 'file:///tmp/*.csv')", (), "1 to 63 bytes"),
    ("42602", "admin", "SELECT rakam.add_field('err', 'known', 'xmin', 'text')", (), "_extra"),
    *[
        ("42939", "super", "SELECT * FROM rakam.create_project(%s)", (name,), "belong to the server")
        for name in ("rakam_x", "rakam", "pg_x", "public", "information_schema")
    ],
    ("42939", "super", "SELECT rakam.track_table('err', '_x', 'err.users')", (), "used by rakam itself"),
    ("42939", "super", "SELECT rakam.copy_from('err', 'materialized_x', 'file:///tmp/x.csv')", (), "used by rakam itself"),
    ("42939", "super", "SELECT rakam.copy_from('err', 'known', 'file://' || %(reserved)s)", (), "Rename the column"),
    ("42939", "writer", "SELECT rakam.collect('err', 'users', '{}')", (), "used by rakam itself"),
    ("42939", "admin", "SELECT rakam.rename_collection('err', 'known', 'continuous_x')", (), "used by rakam itself"),
    ("42939", "admin", "SELECT rakam.drop_field('err', 'known', '_time')", (), "Every collection"),
    *[
        ("42939", "writer", "SELECT rakam.collect('err', 'known', %s)", (json.dumps({name: 1}),), "Rename the field")
        for name in ("_received_at", "_extra", "_project", "_collection", "$server_time", "$serverTime")
    ],
    *[
        ("42939", "admin", "SELECT rakam.add_field('err', 'known', %s, %s)", (name, ty), "another name")
        for name, ty in (("_extra", "jsonb"), ("_received_at", "timestamptz"), ("$serverTime", "text"))
    ],
    # Missing and malformed arguments.
    ("22004", "writer", "SELECT rakam.collect('err', 'known', NULL)", (), "{}"),
    ("22004", "writer", "SELECT rakam.collect_batch('err', NULL::text)", (), "[]"),
    ("22004", "writer", "SELECT rakam.collect_batch('err', NULL::jsonb)", (), "[]"),
    ("22004", "writer", "SELECT rakam.collect_with_key(%(write_key)s, NULL, '{}')", (), "rakam.collections"),
    ("22004", "super", "SELECT rakam.set_quota(NULL, 1, 1, 1, 1)", (), "rakam.projects"),
    ("22023", "writer", "SELECT rakam.collect('err', 'known', '[1]')", (), "such as {"),
    ("22023", "writer", "SELECT rakam.collect_batch('err', '[]'::text, '[]')", (), "upload_time"),
    ("22023", "writer", "SELECT rakam.collect_batch('err', '[]'::text, '{\"checksum\": 1}')", (), "MD5"),
    ("22023", "writer", "SELECT rakam.collect_batch('err', '[]'::text, '{\"upload_time\": \"x\"}')", (), "ISO 8601"),
    ("22023", "writer", "SELECT rakam.collect_batch('err', '[{}]'::jsonb, '{\"checksum\": \"x\"}')", (), "as text"),
    ("22023", "super", "SELECT rakam.copy_from('err', 'known', 'file:///tmp/x.csv', 'xml')", (), "parquet, csv"),
    ("22023", "super", "SELECT rakam.copy_from('err', 'known', 'file:///tmp/x.csv', NULL, '{\"colour\": 1}')", (), "delimiter"),
    ("22023", "super", "SELECT * FROM rakam.rebuild_catalog('rakam_local')", (), "directory or a bucket"),
    ("22023", "admin", "SELECT rakam.set_retention('err', 'known', '-1 day')", (), "90 days"),
    ("22023", "admin", "SELECT rakam.set_mapper('err', 'known', 'pg_catalog.now()')", (), "jsonb"),
    ("22023", "writer", "SELECT rakam.collect_batch('err', '{}'::text)", (), "Send [{"),
    ("22023", "writer", "SELECT rakam.collect_batch('err', '[]'::text, '{\"checksum\": \"0\"}')", (), "MD5"),
    ("22023", "writer", "SELECT rakam.collect_batch('err', '[]'::jsonb, '{\"checksum\": \"0\"}')", (), "as text"),
    ("22023", "writer", "SELECT rakam.collect_batch('err', '[]'::text, '{\"colour\": 1}')", (), "upload_time"),
    ("22023", "admin", "SELECT rakam.add_field('err', 'known', 'f', 'money')", (), "Types are"),
    ("22023", "admin", "SELECT rakam.add_field('err', 'known', 'f', 'numeric')", (), "Types are"),
    ("22023", "admin", "SELECT rakam.add_field('err', 'known', 'f', 'numeric(39,2)')", (), "Types are"),
    ("22023", "admin", "SELECT rakam.set_schema_mode('err', 'half')", (), "open and fixed"),
    ("22023", "admin", "SELECT rakam.set_time_bounds('err', '-1 day', '1 day')", (), "10,000 years"),
    ("22023", "super", "SELECT rakam.set_quota('err', -1, NULL, NULL, NULL)", (), "NULL is no limit"),
    ("22P02", "writer", "SELECT rakam.collect('err', 'known', '{')", (), None),
    ("22P02", "writer", "SELECT rakam.collect_batch('err', '[{]'::text)", (), None),
    ("22P05", "writer", "SELECT rakam.collect('err', 'known', '{\"a\": \"\\u0000\"}')", (), None),
    # Keys.
    ("28000", "stranger", "SELECT rakam.authenticate('rk_r_00')", (), "rakam.create_keys"),
    ("28000", "stranger", "SELECT rakam.authenticate(%(revoked_key)s)", (), "rakam.create_keys"),
    ("28000", "stranger", "SELECT rakam.collect_with_key('rk_w_00', 'known', '{}')", (), "rakam.create_keys"),
    ("28000", "stranger", "SELECT rakam.collect_with_key(%(revoked_key)s, 'known', '{}')", (), "rakam.create_keys"),
    ("28000", "stranger", "SELECT rakam.collect_batch_with_key(%(revoked_key)s, '[]')", (), "rakam.create_keys"),
    # Too large.
    ("54000", "writer", "SELECT rakam.collect('err', 'known', %s)", (LARGE,), "rakam.max_event_bytes"),
    ("54000", "writer", "SELECT rakam.collect('err', 'known', %s)", (DEEP,), "as text"),
    ("54000", "writer", "SELECT rakam.collect('err', 'known', %s)", (LONG_ID,), "shorter"),
    # Events do not change.
    ("0A000", "super", "UPDATE err.known SET n = 2", (), "rakam.delete_events"),
    ("0A000", "super", "DELETE FROM err.known", (), "rakam.delete_events"),
    ("0A000", "super", "TRUNCATE err.known", (), "rakam.delete_events"),
    ("0A000", "super", "UPDATE err.held SET n = 2", (), "rakam.copy_from"),
    ("0A000", "super", "INSERT INTO err.held VALUES ('1')", (), "rakam.copy_from"),
    ("0A000", "super", "CREATE SERVER h FOREIGN DATA WRAPPER rakam OPTIONS (url 'ftp://n/x')", (), "bucket"),
    ("0A000", "super", "SELECT rakam.copy_from('err', 'known', 'hdfs://n/x.csv')", (), "file:///"),
    ("0A000", "super", "SELECT rakam.copy_to('err', 'SELECT 1', 'file:///tmp/x.avro')", (), "ndjson"),
    ("0A000", "admin", "SELECT rakam.delete_events('err', 'known', 'random() > 0.5')", (), "work the value out first"),
    ("0A000", "super", "CREATE SERVER h FOREIGN DATA WRAPPER rakam OPTIONS (url 'hdfs://n/x')", (), "file://"),
    # Not now, and what stands in the way.
    ("55000", "super", "SELECT rakam.drop_project('err')", (), "rakam.allow_project_drop"),
    ("55000", "super", "SELECT * FROM rakam.rebuild_catalog('err_lake')", (), "empty database"),
    # Files.
    ("58P01", "super", "SELECT rakam.copy_from('err', 'known', 'file:///nowhere/x.csv')", (), "one on the server"),
    ("58P01", "super", "SELECT rakam.copy_from('err', 'known', 'file:///nowhere/*.csv')", (), "one on the server"),
    ("58P01", "super", "SELECT rakam.attach('err', 'nothing', 'file:///nowhere/*.csv')", (), "one on the server"),
    ("2BP01", "admin", "SELECT rakam.drop_collection('err', 'known')", (), "depend on it"),
    ("2BP01", "admin", "SELECT rakam.drop_field('err', 'known', 'n')", (), "depend on it"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(cluster, db):
    """Projects `err`, `rigid` (fixed schema), `full`, `slow`, `small` (quotas), and sessions of each kind of role."""
    keys = db.project("err")
    make_storage(db, "err_lake")
    folder = cluster.make_folder("errors-files")
    files = {"file": "n\n1\n", "reserved": "_project\n1\n"}
    for name, text in files.items():
        path = folder / f"{name}.csv"
        path.write_text(text)
        path.chmod(0o644)
        keys[name] = str(path)
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
    db.admin.execute("SELECT rakam.attach('err', 'held', %s)", (f"file://{keys['file']}",))
    db.admin.execute(
        "CREATE FOREIGN TABLE err.forged (n float8) SERVER rakam OPTIONS (project 'err', collection 'known')"
    )
    db.admin.execute("GRANT INSERT ON err.forged TO rakam_err_admin")
    db.admin.execute("CREATE SCHEMA occupied")
    db.admin.execute("CREATE ROLE rakam_claimed_read")
    db.admin.execute(
        "CREATE FUNCTION err.becomes(key text) RETURNS void LANGUAGE sql SECURITY DEFINER"
        " AS 'SELECT rakam.authenticate(key)'"
    )
    db.admin.execute("SELECT rakam.set_schema_mode('rigid', 'fixed')")
    for project, quota in (
        ("full", (None, None, 1, 1)),
        ("slow", (0, None, None, None)),
        ("small", (None, 1, None, None)),
    ):
        db.admin.execute("SELECT rakam.set_quota(%s, %s, %s, %s, %s)", (project, *quota))
    sessions = {"super": db.admin, "definer": db.admin}
    for name, kinds in {"reader": ["read"], "writer": ["write"], "admin": ["admin"], "stranger": []}.items():
        role = f"login_errors_{name}"
        db.make_login(role)
        for kind in kinds:
            for project in projects:
                db.admin.execute(f"GRANT rakam_{project}_{kind} TO {role}")
        sessions[name] = db.connect(role)
    yield sessions, {**keys, "revoked_key": revoked[1]}
    db.admin.execute("DROP ROLE rakam_claimed_read")


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


# Every function that names a project, with the rest of its arguments; in brackets what may be NULL.
CALLS = {
    "add_field": "$project, $collection, 'f', 'text'",
    "attach": "$project, 'there', 'file:///tmp/x.csv'",
    "collect": "$project, $collection, '{}'",
    "collect_batch": "$project, '[]'::text",
    "compact": "[$project], [$collection]",
    "copy_from": "$project, $collection, 'x.csv'",
    "copy_to": "$project, 'SELECT 1', 'x.csv'",
    "create_collection": "$project, $collection",
    "create_keys": "$project",
    "create_source": "$project, 'none', 'nowhere', '{}'",
    "delete_events": "$project, $collection, 'true'",
    "detach": "$project, 'there'",
    "drop_collection": "$project, $collection",
    "drop_field": "$project, $collection, 'f'",
    "drop_source": "$project, 'none'",
    "field_values": "$project, $collection, 'f'",
    "flush": "[$project], [$collection]",
    "pause_source": "$project, 'none'",
    "register_avro_schema": "$project, 'none', 1, '\"string\"'",
    "rename_collection": "$project, $collection, 'other'",
    "replay_dead_letters": "$project",
    "resume_source": "$project, 'none'",
    "revoke_keys": "$project, gen_random_uuid()",
    "seek_source": "$project, 'none', 'earliest'",
    "set_event_store": "$project, NULL",
    "set_mapper": "$project, [$collection], NULL",
    "set_quota": "$project, NULL, NULL, NULL, NULL",
    "set_retention": "$project, $collection, NULL",
    "set_schema_mode": "$project, 'open'",
    "set_time_bounds": "$project, '1 day', '1 day'",
    "track_table": "$project, $collection, 'pg_class'",
    "untrack_table": "$project, 'pg_class'",
}


def call(function: str, project: str | None, collection: str | None = "c") -> str:
    arguments = CALLS[function].replace("[", "").replace("]", "")
    for name, value in (("$project", project), ("$collection", collection)):
        arguments = arguments.replace(name, "NULL" if value is None else f"'{value}'")
    return f"SELECT rakam.{function}({arguments})"


def test_every_function_of_a_project_is_among_the_calls(db):
    functions = db.all(
        "SELECT DISTINCT proname FROM pg_proc WHERE pronamespace = 'rakam'::regnamespace"
        " AND proargnames[1] = 'project' AND proargmodes[1] IS DISTINCT FROM 't'"
    )
    assert {name for (name,) in functions} == set(CALLS)


@pytest.mark.parametrize("function", sorted(set(CALLS) - {"set_quota"}))
def test_unknown_and_forbidden_project_look_the_same(world, function):
    sessions, _ = world
    texts = set()
    for project in ("err", "nowhere"):
        with pytest.raises(psycopg.Error) as caught:
            sessions["stranger"].execute(call(function, project))
        diagnostics = caught.value.diag
        assert diagnostics.sqlstate == "42501"
        assert "one of its roles" in diagnostics.message_hint
        told = (diagnostics.message_primary, diagnostics.message_detail, diagnostics.message_hint)
        texts.add(tuple((text or "").replace(project, "…") for text in told))
    assert len(texts) == 1


@pytest.mark.parametrize("function", sorted(CALLS))
def test_null_is_no_name(world, function):
    sessions, _ = world
    for argument, names in (("project", (None,)), ("collection", ("err", None))):
        if f"${argument}" in CALLS[function] and f"[${argument}]" not in CALLS[function]:
            with pytest.raises(psycopg.Error) as caught:
                sessions["super"].execute(call(function, *names))
            diagnostics = caught.value.diag
            assert (diagnostics.sqlstate, argument in diagnostics.message_primary) == ("22004", True), diagnostics
            assert f"rakam.{argument}s" in (diagnostics.message_hint or "")


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


@pytest.fixture(scope="module")
def cold(db):
    """A project with a file in a directory, and the file."""
    folder = make_storage(db, "cold_lake")
    db.project("cold", "cold_lake")
    fill(db, "cold")
    db.flush("cold")
    (path,) = folder.rglob("*.parquet")
    return folder, path


def test_a_file_that_is_missing(db, cold):
    folder, path = cold
    aside = folder.with_name("aside.parquet")
    path.rename(aside)
    for statement in (
        "SELECT sum(n) FROM cold.seen",
        "SELECT count(*) FROM cold._all WHERE properties->>'n' = '1'",
        "SELECT rakam.delete_events('cold', 'seen', 'n = 10')",
    ):
        with pytest.raises(psycopg.Error) as caught:
            db.admin.execute(statement)
        diagnostics = caught.value.diag
        assert diagnostics.sqlstate == "58P01", caught.value
        check_style(diagnostics)
        assert "missing" in diagnostics.message_primary
        assert "Try again" in diagnostics.message_hint and "rakam.check_storage" in diagnostics.message_hint
    problems = db.all("SELECT path, problem FROM rakam.check_storage('cold_lake')")
    assert [(path.name in found, problem) for found, problem in problems] == [(True, "missing")]
    aside.rename(path)
    assert db.one("SELECT sum(n) FROM cold.seen") == sum(range(100))


def test_a_storage_that_cannot_be_reached(db, cold):
    folder, _ = cold
    fill(db, "cold", 10, "more")
    aside = folder.with_name("storage-cold-away")
    folder.rename(aside)
    folder.write_text("no folder")
    try:
        for statement, hint in (
            ("SELECT sum(n) FROM cold.seen", "the server may read it"),
            ("SELECT * FROM rakam.flush('cold', 'more')", "collecting goes on meanwhile"),
            ("SELECT * FROM rakam.check_storage('cold_lake')", "can be reached"),
            ("SELECT rakam.adopt_storage('cold_lake')", "can be reached"),
            ("SELECT rakam.copy_to('cold', 'SELECT 1', 'x.csv')", "mount"),
        ):
            with pytest.raises(psycopg.Error) as caught:
                db.admin.execute(statement)
            diagnostics = caught.value.diag
            told = f"{statement}: {diagnostics.sqlstate} {diagnostics.message_primary}; {diagnostics.message_hint}"
            assert diagnostics.sqlstate == "58030", told
            check_style(diagnostics)
            assert hint in (diagnostics.message_hint or ""), told
        # What is hot can be read, and more be collected.
        fill(db, "cold", 10, "more", 10)
        db.wait_column("cold.more", "n")
        assert db.one("SELECT sum(n) FROM cold.more") == sum(range(20))
    finally:
        folder.unlink()
        aside.rename(folder)
    wait_until(lambda: flushed(db, "cold"), "the storage to be used again")
    assert db.tiers("cold", "more") == {"inbox": 0, "hot": 0, "cold": 20}


def flushed(db: Database, project: str) -> bool:
    try:
        db.flush(project)
    except psycopg.Error as error:
        assert error.sqlstate == "58030", error
        return False
    return True


def test_a_full_disk(private_cluster):
    """The directory of a storage has no room: its events stay where they are."""
    cluster = private_cluster("full-disk")
    folder = cluster.make_folder("storage-full")
    disk = FullDisk(cluster, folder)
    cluster.restart()
    db = Database(cluster, "full").create()
    db.admin.execute(f"CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.project("acme", "lake")
    fill(db)
    db.flush()
    fill(db, first=100)
    with disk.full():
        for statement, hint in (
            ("SELECT * FROM rakam.flush('acme')", "events are kept"),
            (f"SELECT rakam.copy_to('acme', 'TABLE seen', 'file://{folder}/out.csv')", "Free space"),
        ):
            with pytest.raises(psycopg.Error) as caught:
                db.admin.execute(statement)
            diagnostics = caught.value.diag
            assert diagnostics.sqlstate == "53100", caught.value
            check_style(diagnostics)
            assert "no space left on device" in diagnostics.message_primary.lower()
            assert hint in (diagnostics.message_hint or ""), diagnostics.message_hint
        assert db.one("SELECT sum(n) FROM acme.seen") == sum(range(200))
        fill(db, first=200)
    wait_until(lambda: flushed(db, "acme"), "the storage to be used again")
    assert db.tiers("acme", "seen") == {"inbox": 0, "hot": 0, "cold": 300}
    assert db.one("SELECT sum(n) FROM acme.seen") == sum(range(300))
    wait_until(lambda: (db.tick(), objects(folder) == files_of(db, "lake"))[1], "the end of what was half written")
    db.close()


def test_the_hot_tier_is_full(world, db):
    """Every way in says the same."""
    sessions, given = world
    session = sessions["super"]
    db.configure(max_hot_bytes=0)
    try:
        wait_until(lambda: is_refused(session, "SELECT rakam.collect('err', 'known', '{}')"), "the first refusal")
        for statement in (
            "SELECT rakam.collect('err', 'known', '{\"n\": 1}')",
            'SELECT rakam.collect_batch(\'err\', \'[{"collection": "known", "properties": {}}]\'::text)',
            'SELECT rakam.collect_batch(\'err\', \'[{"collection": "known", "properties": {}}]\'::jsonb)',
            f"SELECT rakam.collect_with_key('{given['write_key']}', 'known', '{{}}')",
            "INSERT INTO err.known (n) VALUES (1)",
            "INSERT INTO err.known (n) SELECT generate_series(1, 20000)",
            f"SELECT rakam.copy_from('err', 'known', 'file://{given['file']}')",
        ):
            assert is_refused(session, statement), statement
        with (
            refused("53100", hint="rakam.stat_lake", message="hot tier is full"),
            session.cursor().copy("COPY err.known (n) FROM STDIN") as copy,
        ):
            copy.write("1\n" * 10)
    finally:
        db.configure(max_hot_bytes=None)
    wait_until(lambda: not is_refused(session, "SELECT rakam.collect('err', 'second', '{}')"), "room")


def is_refused(session: psycopg.Connection, statement: str) -> bool:
    try:
        session.execute(statement)
    except psycopg.errors.DiskFull as error:
        assert error.diag.message_primary == "the hot tier is full"
        assert "Send again later" in error.diag.message_hint and "rakam.stat_lake" in error.diag.message_hint
        check_style(error.diag)
        return True
    return False


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
