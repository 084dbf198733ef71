"""Files: copy_from in every format, who may name which file, loads that are cut short, history in few data files.

RAKAM_HISTORY_ROWS (default 60,000) sets the size of the history; the full run is 10,000,000.
"""

from __future__ import annotations

import datetime
import gzip
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from uuid import UUID

import duckdb
import psycopg
import pyarrow
import pyarrow.parquet
import pytest
from harness.database import Database, has_column, in_background, one, refused, wait_until
from harness.event_files import EVENTS, EXPECTED, FORMATS, ROWS, SUMMARY

PROJECT = "acme"
HISTORY = int(os.environ.get("RAKAM_HISTORY_ROWS", "60000"))


@pytest.fixture(scope="module")
def folder(cluster) -> Path:
    """A folder that the server reads, outside of any storage."""
    return cluster.make_folder("files")


@pytest.fixture(scope="module")
def lake(cluster, db, folder) -> Path:
    lake = cluster.make_folder("files-lake")
    db.admin.execute(f"CREATE SERVER files_lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{lake}')")
    db.project(PROJECT, "files_lake")
    db.project("other", "files_lake")
    return lake


def load(
    session, collection: str, path, format: str | None = None, options: dict | None = None, project: str = PROJECT
) -> int:
    url = path if isinstance(path, str) else f"file://{path}"
    text = json.dumps(options or {})
    return one(session, "SELECT rakam.copy_from(%s, %s, %s, %s, %s)", project, collection, url, format, text)


def bad_rows(db, collection: str) -> list[tuple]:
    return db.all(
        "SELECT value, error FROM rakam.invalid_value WHERE collection = %s AND field = '' ORDER BY error", collection
    )


def types(db, collection: str) -> dict[str, str]:
    return dict(db.all("SELECT field, type FROM rakam.fields WHERE collection = %s", collection))


# -- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_each_format(db, lake, folder, name):
    path = folder / name
    FORMATS[name](path)
    collection = name.split(".", 1)[0] + "_file"
    assert load(db.admin, collection, path) == ROWS
    assert db.admin.execute(SUMMARY.format(collection)).fetchone() == EXPECTED
    assert db.one("SELECT count(*) FROM rakam.invalid_value WHERE collection = %s", collection) == 0
    expected = {"n": "double precision", "price": "double precision", "ok": "boolean", "day": "date", "note": "text"}
    if name in ("a.parquet", "f.avro"):
        expected["n"] = "bigint"
    assert types(db, collection) == expected
    assert db.one(f"SELECT count(*) FROM acme.{collection} WHERE _extra IS NOT NULL") == 0
    first = f"SELECT _time, _user, price, day, note FROM acme.{collection} WHERE n = 7"
    when = datetime.datetime(2025, 8, 8, 10, 7, tzinfo=datetime.UTC)
    assert db.admin.execute(first).fetchone() == (
        when, "u7", 1.75, datetime.date(2025, 1, 8), 'say "7", then\nmore ä',
    )  # fmt: skip
    # After a success the same call loads again.
    assert load(db.admin, collection, path) == ROWS
    assert db.one(f"SELECT count(*) FROM acme.{collection}") == 2 * ROWS
    db.flush(PROJECT, collection)
    assert db.one(f"SELECT sum(n) FROM acme.{collection}") == 2 * EXPECTED[1]


def test_patterns_and_a_format_by_name(db, lake, folder):
    for year in (2023, 2024):
        (folder / f"years/{year}").mkdir(parents=True)
        for part in ("a", "b"):
            (folder / f"years/{year}/{part}.data").write_text(f"year,part\n{year},{part}\n")
    with refused("22023", hint="format"):
        load(db.admin, "globbed", folder / "years/*/*.data")
    assert load(db.admin, "globbed", folder / "years/*/*.data", "csv") == 4
    assert load(db.admin, "globbed", folder / "years/**/b.data", "CSV") == 2
    assert db.all("SELECT year, count(*) FROM acme.globbed GROUP BY 1 ORDER BY 1") == [(2023.0, 3), (2024.0, 3)]
    with refused("58P01", hint="server"):
        load(db.admin, "globbed", folder / "years/*.data", "csv")


def test_options_of_csv(db, lake, folder):
    path = folder / "options.csv"
    path.write_text("1;'a;b';NA\n2;'it''s';\n")
    options = {"header": False, "delimiter": ";", "quote": "'", "null": "NA"}
    assert load(db.admin, "options", path, None, options) == 2
    rows = db.all("SELECT column_1, column_2, column_3 FROM acme.options ORDER BY 1")
    assert rows == [(1.0, "a;b", None), (2.0, "it's", "")]
    for wrong in ({"headr": True}, {"delimiter": "ab"}, {"header": 1}, {"quote": ";", "delimiter": ";"}):
        with refused("22023", hint="delimiter"):
            load(db.admin, "options", path, None, wrong)
    with refused("22023", hint="CSV"):
        load(db.admin, "options", path, "parquet", {"header": True})
    with refused("22023", hint="parquet, csv"):
        load(db.admin, "options", path, "orc")


# -- what does not fit -------------------------------------------------------------------------------------------


def test_bad_rows_and_misfits_are_told_with_file_and_line(db, lake, folder):
    path = folder / "bad.csv"
    path.write_text("_time,price,name\n2025-01-01,1.5,a\n2025-01-02,2\nsoon,cheap,b\n2025-01-03,3,c,d\n")
    db.admin.execute("SELECT rakam.create_collection('acme', 'bad'), rakam.add_field('acme', 'bad', 'price', 'real')")
    assert load(db.admin, "bad", path) == 2
    assert db.all("SELECT price, name, _extra FROM acme.bad ORDER BY name") == [
        (1.5, "a", None),
        (None, "b", {"price": "cheap"}),
    ]
    told = db.all("SELECT field, value, error FROM rakam.invalid_value WHERE collection = 'bad' ORDER BY error")
    assert sorted((field, value) for field, value, _ in told) == [
        ("", "2025-01-02,2\n"),
        ("", "2025-01-03,3,c,d\n"),
        ("_time", "soon"),
        ("price", "cheap"),
    ]
    errors = {value: error for _, value, error in told}
    assert errors["2025-01-02,2\n"].endswith('bad.csv", line 3: expected 3 columns, found 2'), errors
    assert errors["2025-01-03,3,c,d\n"].endswith('bad.csv", line 5: expected 3 columns, found 4'), errors
    assert errors["cheap"].endswith('bad.csv", line 4)'), errors
    assert db.one("SELECT invalid_values FROM rakam.stat_collection WHERE collection = 'bad'") == 4

    lines = folder / "bad.ndjson"
    lines.write_text('{"a": 1}\n{"a":\n[1]\n\n{"_collection": "x"}\n{"a": "\\u0000"}\n{"a": 2}\n')
    assert load(db.admin, "bad_lines", lines) == 2
    assert [re.search(r'", line (\d+): ', error)[1] for _, error in bad_rows(db, "bad_lines")] == ["2", "3", "5", "6"]

    # What is no file of the format at all is an error, and leaves nothing.
    for name, content in (("x.parquet", b"PAR1"), ("x.avro", b"Obj\x01"), ("x.csv.gz", b"no gzip")):
        (folder / name).write_bytes(content)
        with pytest.raises(psycopg.Error) as caught:
            load(db.admin, "broken", folder / name)
        assert caught.value.sqlstate in ("22P04", "58030"), caught.value
    assert db.one("SELECT count(*) FROM rakam.stat_collection WHERE collection = 'broken' AND events > 0") == 0


@pytest.mark.parametrize("name", ["long.csv", "long.json", "long.ndjson"])
def test_a_record_that_is_too_long(db, lake, folder, name):
    """It is told about as any other that is no event, and what comes after it is loaded."""
    events = [{"n": 1, "t": "a"}, {"n": 2, "t": "x" * 4_000_000}, {"n": 3, "t": "b"}]
    line, text = {
        "long.csv": (3, "n,t\n" + "".join(f"{event['n']},{event['t']}\n" for event in events)),
        "long.json": (2, "[" + ",\n".join(map(json.dumps, events)) + "]"),
        "long.ndjson": (2, "\n".join(map(json.dumps, events))),
    }[name]
    path, collection = folder / name, name.replace(".", "_")
    path.write_text(text)
    assert load(db.admin, collection, path) == 2
    assert db.all(f"SELECT n::int, t FROM acme.{collection} ORDER BY n") == [(1, "a"), (3, "b")]
    ((_, error),) = bad_rows(db, collection)
    assert f'{name}", line {line}: ' in error and "over the limit" in error, error


@pytest.mark.parametrize(
    ("name", "text", "stored", "line", "value", "error"),
    [
        ("cut", '[{"n": 1},\n{"n": 2},\n{"n": ', 2, 3, '{"n":', "not closed"),
        ("open", '[{"n": 1},\n{"n": 2}', 2, 2, "", "not closed"),
        ("lines", '[{"n": 1}]\n{"n": 2}\n', 1, 2, '{"n": 2}', "behind the end"),
        ("arrays", '[{"n": 1}]\n[{"n": 2}]\n', 2, None, None, None),
    ],
)
def test_how_arrays_end(db, lake, folder, name, text, stored, line, value, error):
    """What a file lacks, or has beyond its arrays, is told; arrays one behind the other are read."""
    path, collection = folder / f"{name}_array.json", f"{name}_array"
    path.write_text(text)
    assert load(db.admin, collection, path) == stored
    told = bad_rows(db, collection)
    if error is None:
        assert told == []
        return
    ((found, reason),) = told
    assert found == value
    assert f'{path.name}", line {line}: ' in reason and error in reason, reason


def test_a_name_that_something_else_has(db, lake, folder):
    """Nothing is registered or stored where no table could be made."""
    path = folder / "obstacle.csv"
    path.write_text("n\n1\n")
    db.admin.execute("CREATE TABLE acme.obstacle (n int PRIMARY KEY)")
    db.admin.execute("CREATE TYPE acme.obstacle_type AS ENUM ('a')")
    for name, what in (("obstacle", "relation"), ("obstacle_pkey", "relation"), ("obstacle_type", "type")):
        with refused("42710", message=f'{what} "{name}" already exists', hint="another name"):
            load(db.admin, name, path)
    assert db.all("SELECT name FROM rakam_internal.collection WHERE starts_with(name, 'obstacle')") == []


def test_a_field_that_exists_keeps_its_type(db, lake, folder):
    columns = {
        "n": [1, 2**60],
        "when": ["2025-01-01", "never"],
        "deep": [{"a": [1, 2]}, None],
        "f": [1.5, float("nan")],
    }
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, folder / "types.parquet")
    for field, kind in (("n", "integer"), ("when", "timestamptz")):
        db.admin.execute("SELECT rakam.create_collection('acme', 'kept')")
        db.admin.execute("SELECT rakam.add_field('acme', 'kept', %s, %s)", (field, kind))
    assert load(db.admin, "kept", folder / "types.parquet") == 2
    declared = {"n": "integer", "when": "timestamp with time zone"}
    assert types(db, "kept") == {**declared, "deep": "jsonb", "f": "double precision"}
    rows = db.all('SELECT n, "when" IS NULL, deep, f, _extra FROM acme.kept ORDER BY n')
    assert rows == [
        (1, False, {"a": [1, 2]}, 1.5, None),
        (None, True, None, None, {"n": 2**60, "when": "never", "f": "NaN"}),
    ]


def test_received_at_is_for_the_admin(db, lake, folder):
    path = folder / "restored.csv"
    path.write_text('_received_at,_time,n,_extra\n2020-02-03T04:05:06Z,2020-02-03T04:05:00Z,1,"{""k"": 1}"\n')
    writer = db.login(PROJECT, "write", name="login_acme_loader")
    db.admin.execute("GRANT pg_read_server_files TO login_acme_loader")
    with refused("42501", hint="_received_at"):
        load(writer, "restored", path)
    db.admin.execute("GRANT rakam_acme_admin TO login_acme_loader")
    assert load(writer, "restored", path) == 1
    row = db.all("SELECT _received_at, n, _extra FROM acme.restored")
    assert row == [(datetime.datetime(2020, 2, 3, 4, 5, 6, tzinfo=datetime.UTC), 1.0, {"k": 1})]
    path.write_text("_collection,n\nx,1\n")
    with refused("42939"):
        load(db.admin, "restored", path)
    # Of JSON, where each event stands for itself, the event is refused; and taken from the admin.
    lines = folder / "restored.ndjson"
    lines.write_text(
        '{"_received_at": "2020-02-03T04:05:07Z", "n": 2, "_id": "a"}\n{"n": 3, "_receivedAt": 1580702708000}\n'
        '{"_received_at": "then", "n": 4}\n'
    )
    db.admin.execute("REVOKE rakam_acme_admin FROM login_acme_loader")
    assert load(writer, "restored", lines) == 0
    assert [error.split(": ")[-1] for _, error in bad_rows(db, "restored")] == [
        'field "_received_at" is reserved for the server'
    ] * 3
    db.admin.execute("GRANT rakam_acme_admin TO login_acme_loader")
    assert load(writer, "restored", lines) == 3
    rows = db.all("SELECT n, _received_at FROM acme.restored WHERE n > 1 ORDER BY n")
    at = datetime.datetime(2020, 2, 3, 4, 5, 7, tzinfo=datetime.UTC)
    assert rows[:2] == [(2, at), (3, at + datetime.timedelta(seconds=1))]
    assert rows[2][1] > at + datetime.timedelta(days=365)
    assert db.all("SELECT value FROM rakam.invalid_value WHERE collection = 'restored' AND field = '_received_at'") == [
        ("then",)
    ]


def test_ids_and_mappers_take_the_inbox(db, lake, folder):
    """Copies of an event with an `_id` are looked for by the digest, and a mapper takes JSON."""
    path = folder / "ids.csv"
    lines = [f'2025-01-01,{"" if n % 4 else n},{n},"a, b"' for n in range(400)]
    path.write_text("\n".join(["_time,_id,n,word", *lines]) + "\n")
    assert load(db.admin, "with_ids", path) == 400
    db.tick()
    found = "SELECT count(*), count(_id), sum(n), count(*) FILTER (WHERE word = 'a, b') FROM acme.{}"
    assert db.admin.execute(found.format("with_ids")).fetchone() == (400, 100, float(sum(range(400))), 400)
    db.admin.execute(
        """CREATE FUNCTION acme.doubled(event jsonb) RETURNS jsonb IMMUTABLE LANGUAGE sql AS
           $$ SELECT CASE WHEN (event->>'n')::int < 300 THEN event || jsonb_build_object('n', (event->>'n')::int * 2) END $$"""
    )
    db.admin.execute("SELECT rakam.set_mapper('acme', 'mapped', 'acme.doubled(jsonb)')")
    assert load(db.admin, "mapped", path) == 300, "the mapper has dropped a hundred"
    db.tick()
    assert db.admin.execute(found.format("mapped")).fetchone() == (300, 75, float(sum(range(300)) * 2), 300)


def test_a_mapper_that_comes_while_a_load_waits_to_store(db, lake, folder):
    """Its rows are parted by month already, without the columns that none of them has."""
    path = folder / "late_mapper.csv"
    path.write_text("_time,n,empty\n" + "".join(f"2025-{n % 12 + 1:02}-01,{n},\n" for n in range(300)))
    db.admin.execute(
        "CREATE FUNCTION acme.late(event jsonb) RETURNS jsonb IMMUTABLE LANGUAGE sql AS $$ SELECT event || '{\"late\": true}' $$"
    )
    db.admin.execute("SELECT rakam.create_collection('acme', 'late_mapper')")
    db.configure(failpoint="load.before_store=sleep(120000)")
    try:
        _, thread, outcome = in_background(db, lambda s: load(s, "late_mapper", path))
        # Its columns are registered by the conversion of the rows that wait now.
        wait_until(lambda: "n" in types(db, "late_mapper"), "the load")
        db.admin.execute("SELECT rakam.set_mapper('acme', 'late_mapper', 'acme.late(jsonb)')")
    finally:
        db.configure(failpoint=None)
    thread.join(60)
    assert outcome == [300]
    db.tick()
    assert db.admin.execute(
        "SELECT count(*), sum(n)::int, count(*) FILTER (WHERE late), count(DISTINCT _time) FROM acme.late_mapper"
    ).fetchone() == (300, sum(range(300)), 300, 12)


def test_files_of_one_load_have_columns_of_their_own(db, lake, folder):
    """What only some pieces have meets in the chunks of a month, also beside an `_extra`."""
    own = folder / "own"
    own.mkdir()
    (own / "a.csv").write_text("_time,shared,only_a\n2025-01-01,1,x\n2025-02-01,2,y\n")
    (own / "b.csv").write_text("_time,shared,only_b\n2025-01-02,3,4\n2025-03-01,5,6\n")
    (own / "c.ndjson").write_text(
        json.dumps({"_time": "2025-01-03", "shared": "misfit", "only_b": 7})
        + "\n"
        + json.dumps({"_time": "2025-02-02"})
    )
    (own / "d.csv").write_text("_time,only_a\n2025-03-02,z\n")
    assert load(db.admin, "own", f"file://{own}/*") == 7
    rows = """SELECT _time::date::text, shared, only_a, only_b, _extra->>'shared' FROM acme.own ORDER BY _time"""
    expected = [
        ("2025-01-01", 1, "x", None, None),
        ("2025-01-02", 3, None, 4, None),
        ("2025-01-03", None, None, 7, "misfit"),
        ("2025-02-01", 2, "y", None, None),
        ("2025-02-02", None, None, None, None),
        ("2025-03-01", 5, None, 6, None),
        ("2025-03-02", None, "z", None, None),
    ]
    assert db.all(rows) == expected
    db.flush(PROJECT, "own")
    assert db.all(rows) == expected


def test_a_fixed_schema_and_the_audit_log(db, lake, folder):
    path = folder / "fixed.csv"
    path.write_text("n,extra\n1,x\n")
    db.project("settled")
    writer = db.login("settled", "write")
    db.admin.execute("GRANT pg_read_server_files TO login_settled_write")
    db.admin.execute("SELECT rakam.set_schema_mode('settled', 'fixed')")
    with refused("42703", hint="create_collection"):
        load(writer, "c", path, project="settled")
    db.admin.execute("SELECT rakam.create_collection('settled', 'c')")
    db.admin.execute("SELECT rakam.add_field('settled', 'c', 'n', 'integer')")
    with refused("42703", hint="add_field"):
        load(writer, "c", path, project="settled")
    path.write_text("n\n1\n")
    assert load(writer, "c", path, project="settled") == 1
    noted = db.all("SELECT call, object, outcome FROM rakam.audit_log WHERE project = 'settled' AND call = 'copy_from'")
    assert ("copy_from", "c", "ok") in noted
    wait_until(
        lambda: (
            ("copy_from", "c", "error 42703")
            in db.all("SELECT call, object, outcome FROM rakam.audit_log WHERE project = 'settled'")
        ),
        "the refused call in the log",
        20,
    )


# -- who may name which file -------------------------------------------------------------------------------------


def test_which_files_a_role_may_name(db, lake, folder):
    (folder / "secret.csv").write_text("n\n1\n")
    for project in (PROJECT, "other"):
        (lake / project / "import").mkdir(parents=True, exist_ok=True)
        (lake / project / "import/own.csv").write_text("n\n1\n2\n")
        (lake / project / "import/link.csv").symlink_to(folder / "secret.csv")
    shutil.chown(lake / PROJECT, lake.owner(), lake.group())
    writer = db.login(PROJECT, "write")
    with refused("42501", hint="pg_read_server_files"):
        load(writer, "named", folder / "secret.csv")
    with refused("42501", hint="USAGE"):
        load(writer, "named", lake / "acme/import/own.csv")
    # A path of the project's own part of its storage; nothing leads out of it.
    assert load(writer, "named", "import/own.csv") == 2
    assert load(writer, "named", "import/*.csv") == 2
    for path in ("../other/import/own.csv", "/etc/passwd", "import/../../other/import/own.csv", ""):
        with refused("22023"):
            load(writer, "named", path)
    for path in ("import/link.csv", "other/import/own.csv", "import/none.csv"):
        with refused("58P01"):
            load(writer, "named", path)
    # A URL below a storage on which the caller has USAGE.
    db.admin.execute("GRANT USAGE ON FOREIGN SERVER files_lake TO login_acme_write")
    assert load(writer, "named", lake / "acme/import/own.csv") == 2
    with refused("42501"):
        load(writer, "named", f"file://{lake}-other/x.csv")
    with refused("58P01"):
        load(writer, "named", lake / "acme/import/link.csv")
    db.admin.execute("REVOKE USAGE ON FOREIGN SERVER files_lake FROM login_acme_write")
    db.admin.execute("GRANT pg_read_server_files TO login_acme_write")
    assert load(writer, "named", folder / "secret.csv") == 1
    db.admin.execute("REVOKE pg_read_server_files FROM login_acme_write")
    # The project's rights come first, with one answer for unknown and forbidden.
    reader = db.login(PROJECT, "read")
    for session, project in ((reader, PROJECT), (writer, "other"), (writer, "nobody")):
        with refused("42501", message=f'permission denied for project "{project}"'):
            load(session, "named", "import/own.csv", project=project)
    for scheme, state, message in (
        ("s3", "42501", "permission denied for file"),
        ("hdfs", "0A000", "hdfs"),
        ("http", "0A000", "not supported"),
    ):
        with refused(state, message=message):
            load(db.admin, "named", f"{scheme}://bucket/x.csv")
    db.project("inside")
    with refused("0A000", hint="file:///"):
        load(db.admin, "named", "x.csv", project="inside")
    for arguments in ((None, "c", "u"), (PROJECT, None, "u"), (PROJECT, "c", None)):
        with refused("22004"):
            db.admin.execute("SELECT rakam.copy_from(%s::text, %s::text, %s::text)", arguments)
    with refused("42939"):
        load(db.admin, "_all", "import/own.csv")


# -- results of queries ------------------------------------------------------------------------------------------


def save(session, sql: str, path, format: str | None = None, project: str = PROJECT) -> int:
    url = path if isinstance(path, str) else f"file://{path}"
    return one(session, "SELECT rakam.copy_to(%s, %s, %s, %s)", project, sql, url, format)


@pytest.fixture(scope="module")
def source(db, lake, folder) -> str:
    path = folder / "source.ndjson"
    path.write_text("\n".join(map(json.dumps, EVENTS)))
    load(db.admin, "source", path)
    return "SELECT _time, _user, n, price, ok, day, note FROM source ORDER BY n"


@pytest.mark.parametrize("name", ["out.parquet", "out.csv", "out.csv.gz", "out.ndjson", "out.ndjson.zst"])
def test_what_is_written_can_be_loaded(db, source, folder, name):
    path = folder / name
    assert save(db.admin, source + ";  -- a comment", path) == ROWS
    assert save(db.admin, source, path) == ROWS, "an existing file is replaced, as by COPY"
    collection = "again_" + name.replace(".", "_")
    assert load(db.admin, collection, path) == ROWS
    assert db.admin.execute(SUMMARY.format(collection)).fetchone() == EXPECTED
    if name == "out.parquet":
        schema = pyarrow.parquet.read_schema(path)
        assert [str(schema.field(c).type) for c in ("_time", "n", "ok", "day", "note")] == [
            "timestamp[us, tz=UTC]", "double", "bool", "date32[day]", "string",
        ]  # fmt: skip
    if name == "out.csv":
        table = duckdb.connect().execute(f"SELECT count(*), sum(n), count(note) FROM '{path}'").fetchone()
        assert table == (ROWS, EXPECTED[1], EXPECTED[4])


def test_lines_of_any_column_names(db, lake, folder):
    """The names that the query gives mean nothing else to us; and others than the server may read the file."""
    path = folder / "names.ndjson"
    for query in ("SELECT row(1, 2) AS q, 5 AS n", "SELECT 7 AS q, 5 AS n", "SELECT 1 AS row_to_json, 2 AS text"):
        assert save(db.admin, query, path) == 1
        assert json.loads(path.read_text()) == one(db.admin, f"SELECT row_to_json(x.*) FROM ({query}) x")
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["all.csv", "all.parquet", "all.ndjson"])
def test_a_load_gives_back_what_was_written(db, lake, folder, name):
    path, collection = folder / name, "back_" + name.replace(".", "_")
    db.admin.execute("SELECT rakam.create_collection('acme', %s)", (collection,))
    for field, ty in (("t", "text[]"), ("b", "boolean[]"), ("f", "double precision[]"), ("j", "jsonb"), ("k", "int")):
        db.admin.execute("SELECT rakam.add_field('acme', %s, %s, %s)", (collection, field, ty))
    values = """VALUES (1, '{a,NULL,"","NULL","x,\\"y\\" \\\\"}'::text[], '{t,NULL,f}'::bool[], '{1.5,NULL,-2e30}'::float8[],
                        '{"a": [1]}'::jsonb),
                       (2, '{}', '{}', '{}', '[1, "2"]'), (3, NULL, NULL, NULL, '"text"'), (4, '{"{}"}', NULL, NULL, '7')"""
    query = f"SELECT * FROM ({values}) v (k, t, b, f, j)"
    assert save(db.admin, query, path) == 4
    assert load(db.admin, collection, path) == 4
    assert db.all(f"SELECT k, t, b, f, j FROM acme.{collection} ORDER BY k") == db.all(query + " ORDER BY k")
    assert bad_rows(db, collection) == []


def test_rows_that_a_file_cannot_hold(db, lake, folder):
    with refused("0A000", hint="column"):
        save(db.admin, "SELECT FROM generate_series(1, 3)", folder / "none.parquet")
    # One column of CSV, as COPY reads it.
    path = folder / "end.csv"
    assert save(db.admin, r"VALUES ('a'), ('\.'), ('b')", path) == 3
    db.admin.execute("CREATE TEMP TABLE ends (t text)")
    db.admin.execute(f"COPY ends FROM '{path}' (FORMAT csv, HEADER)")
    assert db.one("SELECT count(*) FROM ends") == 3
    # What copy_from and attach would take for something else.
    for name in ("*.csv", "a?.parquet", "[1].ndjson", "part*/x.csv"):
        with refused("22023", message=f'"{folder / name}": it is a pattern', hint="*, ? and ["):
            save(db.admin, "SELECT 1 AS n", folder / name)
    with refused("22023", message='"out/*.csv": it is a pattern'):
        save(db.admin, "SELECT 1 AS n", "out/*.csv")
    for name in ("twice.csv", "twice.parquet", "twice.ndjson"):
        with refused("42701", message='column "n" specified more than once', hint="AS"):
            save(db.admin, "SELECT 1 AS n, 2 AS m, 3 AS n", folder / name)
        assert not (folder / name).exists()
    # Long rows are fetched, and written, a few at a time.
    path = folder / "long.parquet"
    assert save(db.admin, "SELECT repeat('x', 10000000) AS t FROM generate_series(1, 30)", path) == 30
    assert pyarrow.parquet.ParquetFile(path).metadata.num_rows == 30


def most_bytes(session) -> int:
    """What the session's process has had in memory at most."""
    status = Path(f"/proc/{session.info.backend_pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


def test_long_rows_behind_short_ones_are_fetched_a_few_at_a_time(db, lake, folder):
    session, path = db.connect(), folder / "growing.csv.zst"
    assert save(session, "SELECT 'x' AS t FROM generate_series(1, 100)", path) == 100
    before = most_bytes(session)
    length = "CASE WHEN g > 3000 THEN 1000000 ELSE 1 END"
    assert save(session, f"SELECT repeat('x', {length}) AS t FROM generate_series(1, 3400) g", path) == 3400
    assert most_bytes(session) - before < 200 << 20


def test_values_keep_their_type_in_parquet(db, lake, folder):
    path = folder / "values.parquet"
    query = """SELECT 7::int2 AS a, -5::int8 AS b, 1.5::real AS c, 12.345::numeric(10,2) AS d, 'x'::"char"::text AS e,
                      'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid AS f, '{"k": 1}'::jsonb AS g, NULL::date AS h,
                      '2024-05-17 08:00+02'::timestamptz AS i, 1e40::numeric AS j"""
    assert save(db.admin, query, path) == 1
    row = pyarrow.parquet.read_table(path).to_pylist()[0]
    assert str(row.pop("d")) == "12.35"
    assert row.pop("i") == datetime.datetime(2024, 5, 17, 6, tzinfo=datetime.UTC)
    uuid = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
    # Newer versions of pyarrow know the type.
    assert row.pop("f") in (UUID(uuid), UUID(uuid).bytes)
    assert row == {"a": 7, "b": -5, "c": 1.5, "e": "x", "g": '{"k": 1}', "h": None, "j": "1" + "0" * 40}
    with refused("22008", hint="text"):
        save(db.admin, "SELECT 'infinity'::timestamptz AS t", path)
    # Arrays are lists, for others and for a load.
    query = """SELECT ARRAY[true, NULL] AS a, ARRAY[1.5, NULL]::float8[] AS b, ARRAY[0.25]::real[] AS c,
                      ARRAY['x,y', NULL, 'say "z"'] AS d, ARRAY[1, NULL]::int2[] AS e, ARRAY[7]::int[] AS f,
                      ARRAY[9007199254740993]::bigint[] AS g, '{}'::text[] AS h, NULL::int[] AS i, gen_random_uuid() AS u"""
    assert (
        save(db.admin, query + " UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL", path)
        == 2
    )
    schema = pyarrow.parquet.read_schema(path)
    assert [str(schema.field(c).type.value_type) for c in "abcdefgh"] == [
        "bool", "double", "double", "string", "int32", "int32", "int64", "string",
    ]  # fmt: skip
    full, empty = pyarrow.parquet.read_table(path).to_pylist()
    assert {c: full[c] for c in "abcdefghi"} == {
        "a": [True, None], "b": [1.5, None], "c": [0.25], "d": ["x,y", None, 'say "z"'], "e": [1, None], "f": [7],
        "g": [9007199254740993], "h": [], "i": None,
    }  # fmt: skip
    assert set(empty.values()) == {None}
    duck = duckdb.sql(f"SELECT typeof(u), typeof(d), typeof(g) FROM '{path}' LIMIT 1").fetchall()
    assert duck == [("UUID", "VARCHAR[]", "BIGINT[]")]
    assert load(db.admin, "lists", path) == 2
    found = types(db, "lists")
    assert (found["a"], found["b"], found["d"], found["f"], found["u"]) == (
        "boolean[]", "double precision[]", "text[]", "double precision[]", "uuid",
    )  # fmt: skip
    (row,) = db.all("SELECT a, b, d, f, h, g FROM acme.lists WHERE u IS NOT NULL")
    assert row == ([True, None], [1.5, None], ["x,y", None, 'say "z"'], [7], [], [9007199254740993])
    with refused("0A000", hint="to_jsonb"):
        save(db.admin, "SELECT ARRAY[[1], [2]] AS a", path)


def test_who_may_write_which_file(db, source, lake, folder):
    reader = db.login(PROJECT, "read")
    writer = db.login(PROJECT, "write")
    with refused("42501", hint="pg_write_server_files"):
        save(reader, "SELECT 1", folder / "mine.csv")
    for session, project in ((writer, PROJECT), (reader, "other"), (reader, "nobody")):
        with refused("42501", message=f'permission denied for project "{project}"'):
            save(session, "SELECT 1", "x.csv", project=project)
    assert save(reader, "SELECT count(*) AS n FROM source", "export/deep/n.csv") == 1
    assert (lake / "acme/export/deep/n.csv").read_text() == f"n\n{ROWS}\n"
    # In a storage nothing is replaced: the data files are there, too.
    with refused("58P02"):
        save(reader, "SELECT 1 AS n", "export/deep/n.csv")
    for path in ("../other/x.csv", "/tmp/x.csv"):
        with refused("22023"):
            save(reader, "SELECT 1", path)
    (lake / "acme/out").symlink_to(folder)
    with refused("58P01"):
        save(reader, "SELECT 1", "out/x.csv")
    assert load(writer, "from_export", "export/deep/n.csv") == 1
    # The query has the caller's rights, and the project's schema before it.
    db.admin.execute("SELECT rakam.create_collection('other', 'secret')")
    with refused("42501", message="other"):
        save(reader, "SELECT * FROM other.secret", "x.csv")
    with refused("42P01"):
        save(reader, "SELECT * FROM nothing", "x.csv")
    for statement, state in (
        ("SELECT 1; SELECT 2", "42601"),
        ("", "42601"),
        ("SELEC 1", "42601"),
        ("INSERT INTO source (n) VALUES (1)", "42501"),
        ("WITH w AS (DELETE FROM users RETURNING id) SELECT * FROM w", "42501"),
        ("SELECT 1 AS n INTO made", "42501"),
        ("DROP TABLE source", "42501"),
        ("EXPLAIN SELECT 1", "42501"),
    ):
        with refused(state):
            save(reader, statement, "x.csv")
    assert save(reader, "WITH w AS (VALUES (1), (2)) TABLE w", "values.ndjson") == 2
    with refused("0A000", hint="ndjson"):
        save(reader, "SELECT 1", "x.avro")
    with refused("22023"):
        save(reader, "SELECT 1", "x.txt")
    assert not list((lake / "acme").glob("x.*")), "what failed left nothing"


def test_an_unfinished_file_is_removed(db, source, folder):
    out = folder / "unfinished"
    out.mkdir()
    shutil.chown(out, folder.owner(), folder.group())
    for query in ("SELECT 1 / (2000 - g) FROM generate_series(1, 3000) g", "SELECT missing"):
        with pytest.raises(psycopg.Error):
            save(db.admin, query, out / "x.csv")
        assert list(out.iterdir()) == []
    for end in ("cancel", "terminate"):
        session, thread, outcome = in_background(
            db, lambda s: save(s, "SELECT g, pg_sleep(0.0005) FROM generate_series(1, 1000000) g", out / "x.csv")
        )
        wait_until(lambda: list(out.iterdir()), "the temporary file")
        assert [path.name for path in out.iterdir()] != ["x.csv"]
        if end == "cancel":
            session.cancel()
        else:
            db.admin.execute("SELECT pg_terminate_backend(%s)", (session.info.backend_pid,))
        thread.join(30)
        assert isinstance(outcome[0], psycopg.Error)
        wait_until(lambda: not list(out.iterdir()), "its removal")


# -- loads that are cut short ------------------------------------------------------------------------------------

SETTINGS = {"rakam.flush_size": "1MB", "rakam.target_file_size": "1MB"}


def long_csv(path: Path, rows: int) -> None:
    with path.open("w") as file:
        file.write("_time,n,word\n")
        for n in range(rows):
            file.write(f"2025-{n % 12 + 1:02}-01,{n},{n * 7919 % 100_003:x}-{'long word ' * 10}\n")


def test_a_cancelled_and_a_killed_load_go_on(private_cluster, tmp_path):
    cluster = private_cluster("files", SETTINGS)
    db = Database(cluster, "files_cut").create()
    db.project(PROJECT)
    path = cluster.make_folder("files") / "long.csv"
    rows = 200_000
    long_csv(path, rows)
    # Each step of storing pauses, so that there is a moment to hit.
    db.admin.execute("ALTER DATABASE files_cut SET rakam.failpoint = 'load.after_store=sleep(800)'")
    watcher = db.login(PROJECT, "read")
    db.make_login("login_stranger")
    stranger = db.connect("login_stranger")
    seen = [0]

    def shown(session):
        return session.execute(
            "SELECT pid, project, what, done, total, unit, started_at FROM rakam.stat_progress WHERE what = 'copy_from'"
        ).fetchall()

    def events() -> int:
        return db.one("SELECT coalesce(sum(events), 0)::int FROM rakam.stat_collection WHERE collection = 'cut'")

    def stored_more() -> bool:
        return events() > seen[-1]

    for how in ("cancel", "terminate", "caller", "kill"):
        session, thread, outcome = in_background(db, lambda s: load(s, "cut", path))
        wait_until(stored_more, "events of the load", 60)
        progress = shown(watcher)
        assert len(progress) == 1, progress
        pid, project, _, done, total, unit, started_at = progress[0]
        assert (project, unit, total) == (PROJECT, "bytes", path.stat().st_size)
        assert 0 <= done <= total and started_at is not None
        assert shown(stranger) == []
        if how == "cancel":
            session.cancel()
        elif how == "terminate":
            db.admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
        elif how == "caller":
            db.admin.execute("SELECT pg_terminate_backend(%s)", (session.info.backend_pid,))
        else:
            os.kill(pid, signal.SIGKILL)
        thread.join(60)
        assert isinstance(outcome[0], psycopg.Error), outcome
        if how == "kill":
            db.close()
            wait_until(lambda: cluster_answers(cluster), "the server after the kill", 60)
            watcher, stranger = db.connect("login_acme_read"), db.connect("login_stranger")
        wait_until(lambda: shown(db.admin) == [], "an end of the progress")
        seen.append(events())
        assert seen[-1] < rows
    assert seen == sorted(set(seen)), "each attempt goes on from the one before"
    db.admin.execute("ALTER DATABASE files_cut RESET rakam.failpoint")
    # Another call does not touch the note of this one.
    other = path.with_name("other.csv")
    other.write_text("_time,n,word\n2025-01-01,-1,x\n")
    assert load(db.admin, "cut", other) == 1
    assert load(db.admin, "cut", path) == rows
    assert db.all("SELECT count(*), count(DISTINCT n), sum(n) FROM acme.cut WHERE n >= 0") == [
        (rows, rows, float(sum(range(rows))))
    ]
    assert db.one("SELECT count(*) FROM rakam_internal.file_load") == 0
    # A file that has changed is another one.
    os.utime(path, (1, 1))
    assert load(db.admin, "cut", path) == rows
    db.flush()
    assert db.one("SELECT count(*) FROM acme.cut") == 2 * rows + 1
    db.close()


def cluster_answers(cluster) -> bool:
    try:
        with cluster.connect("postgres") as session:
            return one(session, "SELECT NOT pg_is_in_recovery()")
    except psycopg.Error:
        return False


def test_a_load_that_fails_keeps_nothing_it_did_not_commit(db, lake, folder):
    path = folder / "cut_short.ndjson.gz"
    whole = gzip.compress("\n".join(json.dumps({"n": n}) for n in range(50_000)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with refused("58030"):
        load(db.admin, "short", path)
    assert db.one("SELECT coalesce(sum(events), 0) FROM rakam.stat_collection WHERE collection = 'short'") == 0
    path.write_bytes(whole)
    assert load(db.admin, "short", path) == 50_000


def test_a_load_that_nobody_takes_up_is_forgotten(db, lake):
    db.admin.execute("SELECT rakam.create_collection('acme', 'left')")
    db.admin.execute(
        "INSERT INTO rakam_internal.file_load (load_key, project_id, collection_id, updated_at)"
        " SELECT convert_to(age::text, 'UTF8'), project_id, collection_id, now() - age FROM rakam_internal.collection,"
        " unnest('{29 days,31 days}'::interval[]) age WHERE name = 'left'"
    )
    db.tick()
    assert db.all("SELECT convert_from(load_key, 'UTF8') FROM rakam_internal.file_load") == [("29 days",)]
    db.admin.execute("DELETE FROM rakam_internal.file_load")


def test_a_load_sees_the_collection_vanish_with_its_project(db, folder):
    """Dropping the project ends its loads; nothing of them stays."""
    db.project("brief")
    path = folder / "brief.csv"
    path.write_text("n\n1\n")
    # It waits there until the project is gone.
    db.configure(failpoint="load.before_store=sleep(120000)")
    try:
        _, thread, outcome = in_background(db, lambda s: load(s, "c", path, project="brief"))
        # Its table is made before it stores anything.
        wait_until(lambda: has_column(db.admin, "brief.c", "n"), "the load")
        with db.connect(autocommit=False) as session:
            session.execute("SET LOCAL rakam.allow_project_drop = on")
            session.execute("SELECT rakam.drop_project('brief')")
            session.commit()
    finally:
        db.configure(failpoint=None)
    thread.join(60)
    assert isinstance(outcome[0], psycopg.Error) and outcome[0].sqlstate == "42704", outcome
    assert db.one("SELECT count(*) FROM rakam_internal.file_load") == 0
    assert db.one("SELECT count(*) FROM rakam_internal.progress") == 0


def test_a_project_is_dropped_behind_what_a_load_stores(db, folder):
    """Not between its events and their commit: they would be nobody's."""
    db.project("held")
    path = folder / "held.csv"
    path.write_text("n\n1\n")
    ending = (
        "SELECT count(*) FROM pg_locks WHERE relation = 'rakam_internal.file_load'::regclass"
        " AND mode = 'RowExclusiveLock'"
    )
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%drop_project%'"

    def drop(session) -> None:
        session.execute("SET rakam.allow_project_drop = on")
        session.execute("SELECT rakam.drop_project('held')")

    db.configure(failpoint="load.before_commit=sleep(120000)")
    try:
        _, loading, _ = in_background(db, lambda s: load(s, "c", path, project="held"))
        # Its table is made before its last transaction, which stores the events before it takes its note away.
        wait_until(lambda: has_column(db.admin, "held.c", "n") and db.one(ending), "the end of the load")
        _, dropping, dropped = in_background(db, drop)
        wait_until(lambda: db.one(waiting), "the drop")
    finally:
        db.configure(failpoint=None)
    loading.join(60)
    dropping.join(60)
    assert dropped == [None]
    nobodys = (
        "SELECT count(*) FROM rakam_internal.hot_chunk h"
        " LEFT JOIN rakam_internal.collection c USING (collection_id) WHERE c.collection_id IS NULL"
    )
    assert db.one(nobodys) == 0


# -- history -----------------------------------------------------------------------------------------------------


def shuffled(path: Path, rows: int) -> None:
    """Events over three years, in no order."""
    duck = duckdb.connect()
    duck.execute("SET TimeZone = 'UTC'")
    duck.execute(
        f"""COPY (SELECT TIMESTAMPTZ '2022-01-01 00:00:00+00' + to_seconds((hash(n) % (1096 * 86400))::int) AS _time,
                        'u' || (hash(n + 1) % 50000) AS _user, n, (hash(n + 2) % 10000) / 100 AS price,
                        ['home', 'cart', 'search', 'item'][1 + (hash(n + 3) % 4)::int] AS page
                 FROM range({rows}) t(n)) TO '{path}' (FORMAT parquet)"""
    )


def test_history_in_any_order_makes_few_files(db, lake, folder):
    path = folder / "history.parquet"
    shuffled(path, HISTORY)
    duck = duckdb.connect()
    whole = duck.execute(f"SELECT count(*), sum(n)::text FROM '{path}'").fetchone()

    _, thread, outcome = in_background(db, lambda s: load(s, "history", path))
    last = 0
    while thread.is_alive():
        count = db.one("SELECT coalesce(sum(events), 0)::int FROM rakam.stat_collection WHERE collection = 'history'")
        if has_column(db.admin, "acme.history", "n"):
            stored, distinct = db.admin.execute("SELECT count(*), count(DISTINCT n) FROM acme.history").fetchone()
            assert stored == distinct >= max(last, count), "no event vanishes or doubles meanwhile"
            last = stored
        time.sleep(0.2)
    assert outcome == [HISTORY]
    db.flush(PROJECT, "history")
    assert db.tiers(PROJECT, "history") == {"inbox": 0, "hot": 0, "cold": HISTORY}
    assert db.admin.execute("SELECT count(*), sum(n)::text FROM acme.history").fetchone() == whole
    few_files(db, "history")
    march = "_time >= '2023-03-01' AND _time < '2023-04-01'"
    expected = duck.execute(
        f"SELECT count(*), sum(n)::text FROM '{path}' WHERE _time >= TIMESTAMPTZ '2023-03-01 00:00:00+00'"
        " AND _time < TIMESTAMPTZ '2023-04-01 00:00:00+00'"
    ).fetchone()
    assert db.admin.execute(f"SELECT count(*), sum(n)::text FROM acme.history WHERE {march}").fetchone() == expected


def few_files(db: Database, collection: str) -> None:
    per_flush = db.all(
        "SELECT flush_id, count(*) FROM rakam_internal.data_file f JOIN rakam_internal.collection c USING (collection_id)"
        " WHERE c.name = %s GROUP BY 1",
        collection,
    )
    assert max(count for _, count in per_flush) <= 64
    half = db.one("SELECT pg_size_bytes(current_setting('rakam.target_file_size')) / 2")
    small = db.one("SELECT count(*) FROM rakam.data_files WHERE collection = %s AND bytes < %s", collection, half)
    assert small <= 40, f"{small} small files"


def test_a_backlog_in_any_order_is_written_month_by_month(private_cluster):
    """Chunks of all months, as a COPY or many late events leave them, and a backlog of several steps."""
    settings = {"rakam.flush_interval": "1h", "rakam.min_file_events": "500", "rakam.target_file_size": "1MB"}
    cluster = private_cluster("backlog", settings)
    db = Database(cluster, "backlog").create()
    db.project(PROJECT)
    path = cluster.make_folder("files") / "history.parquet"
    rows = 60_000
    shuffled(path, rows)
    assert load(db.admin, "source", path) == rows
    db.admin.execute("SELECT rakam.create_collection('acme', 'h')")
    for field, kind in (("n", "bigint"), ("price", "double precision"), ("page", "text")):
        db.admin.execute("SELECT rakam.add_field('acme', 'h', %s, %s)", (field, kind))
    for part in range(6):
        db.admin.execute(
            "INSERT INTO acme.h (_time, _user, n, price, page)"
            f" SELECT _time, _user, n, price, page FROM acme.source WHERE n % 6 = {part}"
        )
        db.tick()
    assert db.tiers(PROJECT, "h")["hot"] == rows
    assert db.one("SELECT max(max_time) - min(min_time) > '2 years' FROM rakam_internal.hot_chunk")
    db.configure(flush_size="1MB")
    summary = "SELECT count(*), count(DISTINCT n), sum(n) FROM acme.h"
    before = db.admin.execute(summary).fetchone()
    flushed = db.flush(PROJECT, "h")
    assert db.admin.execute(summary).fetchone() == before == (rows, rows, sum(range(rows)))
    assert flushed[0][1] == rows and flushed[0][2] <= 64, flushed
    assert db.tiers(PROJECT, "h") == {"inbox": 0, "hot": 0, "cold": rows}
    months = db.one(
        "SELECT count(DISTINCT first_day) FROM rakam.data_files WHERE collection = 'h' AND period = 'month'"
    )
    assert months == 36
    few_files(db, "h")
    db.close()
