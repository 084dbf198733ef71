"""Attached tables: foreign files read as they are now, by those who may read the project, and by nobody else."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import shutil
import struct
from pathlib import Path

import duckdb
import psycopg
import pyarrow
import pyarrow.parquet
import pytest
from harness.database import Database, collect, collect_batch, notices_of, one, refused
from psycopg.types.json import Jsonb

PROJECT = "acme"
UTC = datetime.UTC


@pytest.fixture(scope="module")
def folder(cluster) -> Path:
    """A folder that the server reads, outside of any storage."""
    return cluster.make_folder("attached")


@pytest.fixture(scope="module")
def lake(cluster, db) -> Path:
    lake = cluster.make_folder("attached-lake")
    db.admin.execute(f"CREATE SERVER attached_lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{lake}')")
    db.project(PROJECT, "attached_lake")
    db.project("other", "attached_lake")
    return lake


def attach(session, name: str, path, format: str | None = None, project: str = PROJECT) -> None:
    url = path if isinstance(path, str) else f"file://{path}"
    session.execute("SELECT rakam.attach(%s, %s, %s, %s)", (project, name, url, format))


def types(db, name: str) -> dict[str, str]:
    return dict(
        db.all(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute"
            " WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            f"acme.{name}",
        )
    )


def make(folder: Path, name: str) -> Path:
    made = folder / name
    made.mkdir(parents=True)
    return made


def differs(db, name: str, heap: str) -> int:
    """Rows that only one of the two tables has."""
    return db.one(
        f"SELECT count(*) FROM ((TABLE acme.{name} EXCEPT ALL TABLE {heap}) UNION ALL"
        f" (TABLE {heap} EXCEPT ALL TABLE acme.{name})) d"
    )


# -- types and rows ----------------------------------------------------------------------------------------------

COLUMNS = {
    "k": (pyarrow.int32(), "integer"),
    "tiny": (pyarrow.int8(), "smallint"),
    "small": (pyarrow.int16(), "smallint"),
    "big": (pyarrow.int64(), "bigint"),
    "unsigned": (pyarrow.uint64(), "numeric(20,0)"),
    "single": (pyarrow.float32(), "real"),
    "double": (pyarrow.float64(), "double precision"),
    "price": (pyarrow.decimal128(12, 3), "numeric(12,3)"),
    "huge": (pyarrow.decimal256(50, 5), "numeric(50,5)"),
    "flag": (pyarrow.bool_(), "boolean"),
    "Text": (pyarrow.large_string(), "text"),
    "bytes": (pyarrow.binary(), "bytea"),
    "day": (pyarrow.date32(), "date"),
    "at_local": (pyarrow.timestamp("us"), "timestamp without time zone"),
    "at": (pyarrow.timestamp("ms", "UTC"), "timestamp with time zone"),
    "clock": (pyarrow.time64("us"), "time without time zone"),
    "ints": (pyarrow.list_(pyarrow.int32()), "integer[]"),
    "words": (pyarrow.list_(pyarrow.string()), "text[]"),
    "floats": (pyarrow.list_(pyarrow.float64()), "double precision[]"),
    "object": (pyarrow.struct([("x", pyarrow.int32()), ("y", pyarrow.string())]), "jsonb"),
    "kind": (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), "text"),
}


def row(k: int) -> dict:
    special = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0]
    values = {
        "tiny": k % 100 - 50,
        "small": k * 7 - 3000,
        "big": (k - 500) * 10**15,
        "unsigned": k * 10**16,
        "single": k / 4,
        "double": special[k % 11] if k % 11 < 5 else k / 7,
        "price": decimal.Decimal(k * 1001 - 5) / 1000,
        "huge": decimal.Decimal(f"{k}123456789012345678901234567890.12345"),
        "flag": k % 3 == 0,
        "Text": ["", "größe", 'it\'s "quoted" \\ {,}', f"u{k}", "A", "a"][k % 6],
        "bytes": bytes([k % 256, 0, 255]),
        "day": datetime.date(2024, 1, 1) + datetime.timedelta(days=k % 400),
        "at_local": datetime.datetime(1969, 12, 31, 23, 59, 59, k),
        "at": datetime.datetime(2024, 3, 31, tzinfo=UTC) + datetime.timedelta(minutes=k),
        "clock": datetime.time(k % 24, k % 60, 1, k),
        "ints": [k, None, -k] if k % 2 else [],
        "words": ["a,b", 'say "x"', None, "NULL", ""][: k % 6],
        "floats": [k / 3, None, float("nan")],
        "object": {"x": k, "y": None if k % 2 else "ü"},
        "kind": f"kind {k % 4}",
    }
    # Each column is NULL now and then.
    return {"k": k} | {name: None if (k + i) % 13 == 0 else v for i, (name, v) in enumerate(values.items())}


CONDITIONS = [
    "tiny > 10",
    "small = 4 OR small IS NULL",
    "big >= 100000000000000000",
    "big = 0",
    "unsigned < 1000000000000000000",
    "single BETWEEN 10 AND 20.5",
    "double > 100",
    "double = 'NaN'",
    "double < 0",
    "double = 0",
    "double = '-Infinity'",
    "double <> 1",
    "price = 1.996",
    "price IN (1.996, 2.997, NULL)",
    "huge > 5",
    "flag",
    "flag IS NOT TRUE",
    "NOT flag",
    "\"Text\" = ''",
    "\"Text\" LIKE 'u1%'",
    "\"Text\" > 'a'",
    '"Text" IS NULL',
    "bytes = '\\x0100ff'",
    "day > '2024-12-01'",
    "day IS NOT NULL AND k < 20",
    "at_local < '1969-12-31 23:59:59.000100'",
    "at >= '2024-03-31 10:00+00'",
    "at BETWEEN '2024-03-31 01:00+00' AND '2024-03-31 02:00+00'",
    "clock < '12:00'",
    "ints = '{}'",
    "'NULL' = ANY (words)",
    "object->>'y' = 'ü'",
    "kind = 'kind 2'",
    "kind IN ('kind 1', 'none')",
    "k > 990 AND kind IS NOT NULL",
    "k + 1 = 500",
]


def test_parquet_is_what_a_heap_table_with_the_same_rows_is(db, lake, folder):
    rows = [row(k) for k in range(1000)]
    here = make(folder, "typed")
    schema = pyarrow.schema([(name, ty) for name, (ty, _) in COLUMNS.items()])
    for part in range(2):
        table = pyarrow.Table.from_pylist(rows[part * 500 : part * 500 + 500], schema)
        pyarrow.parquet.write_table(table, here / f"{part}.parquet", row_group_size=100)
    attach(db.admin, "typed", here)
    sql_types = {name: ty for name, (_, ty) in COLUMNS.items()}
    assert types(db, "typed") == sql_types
    columns = ", ".join(f'"{name}" {ty}' + (' COLLATE "C"' if ty == "text" else "") for name, ty in sql_types.items())
    db.admin.execute(f"CREATE TABLE heap_typed ({columns})")
    with db.admin.cursor() as cursor:
        names = list(sql_types)
        cursor.executemany(
            f"INSERT INTO heap_typed VALUES ({', '.join(['%s'] * len(names))})",
            [[Jsonb(r[n]) if n == "object" and r[n] is not None else r[n] for n in names] for r in rows],
        )
    assert differs(db, "typed", "heap_typed") == 0
    for pushdown in ("on", "off"):
        db.admin.execute(f"SET rakam.enable_pushdown = {pushdown}")
        for condition in CONDITIONS:
            query = 'SELECT array_agg(k ORDER BY k), count(*), count("Text") FROM '
            ours = db.all(f"{query} acme.typed WHERE {condition}")
            heap = db.all(f"{query} heap_typed WHERE {condition}")
            assert ours == heap, f"{condition} with pushdown {pushdown}"
    db.admin.execute("RESET rakam.enable_pushdown")
    # The same errors.
    for expression, sqlstate in (("1 / (k - 500)", "22012"), ("(big * 1000000)::int", "22003")):
        for table in ("acme.typed", "heap_typed"):
            with refused(sqlstate):
                db.admin.execute(f"SELECT {expression} FROM {table}").fetchall()
    # A join of two attached tables needs both to be read side by side.
    assert db.one("SELECT count(*) FROM acme.typed a JOIN acme.typed b USING (k) JOIN heap_typed c USING (k)") == 1000
    assert db.one("SELECT count(*) FROM acme.typed") == 1000
    assert len(db.all("SELECT FROM acme.typed LIMIT 7")) == 7
    (plan,) = db.admin.execute(
        "EXPLAIN (ANALYZE, FORMAT json) SELECT \"Text\" FROM acme.typed WHERE at < '2024-03-31 00:30+00'"
    ).fetchone()
    scan = plan[0]["Plan"]
    assert (scan["Files Read"], scan["Row Groups Read"], scan["Row Groups Skipped by Statistics"]) == (2, 1, 9)


def bits(ty: pyarrow.DataType, layout: str, *values: int) -> pyarrow.Array:
    return pyarrow.Array.from_buffers(ty, len(values), [None, pyarrow.py_buffer(struct.pack(layout, *values))])


def test_nan_of_any_sign_is_one(db, lake, folder):
    """As 0.0 / 0.0 is on x86: its sign bit is set."""
    here = make(folder, "nan")
    double = bits(pyarrow.float64(), "<3Q", 0x7FF8 << 48, 0xFFF8 << 48, 0)
    single = bits(pyarrow.float32(), "<3I", 0x7FC0 << 16, 0xFFC0 << 16, 0)
    table = pyarrow.table({"k": [1, 2, 3], "f8": double, "f4": single})
    pyarrow.parquet.write_table(table, here / "a.parquet")
    attach(db.admin, "nan", here)
    for column, condition, rows in (
        (column, condition, rows)
        for column in ("f8", "f4")
        for condition, rows in (
            ("{} > 100", [1, 2]),
            ("{} < 1", [3]),
            ("{} = 'NaN'", [1, 2]),
            ("{} IN ('NaN', 7)", [1, 2]),
            ("{} <> 'NaN'", [3]),
        )
    ):
        condition = condition.format(column)
        query = f"SELECT array_agg(k::int ORDER BY k) FROM acme.nan WHERE {condition}"
        for pushdown in ("on", "off"):
            db.admin.execute(f"SET rakam.enable_pushdown = {pushdown}")
            assert db.one(query) == rows, f"{condition} with pushdown {pushdown}"
    db.admin.execute("RESET rakam.enable_pushdown")


def test_days_as_milliseconds(db, lake, folder):
    here = make(folder, "days")
    day = datetime.date(2024, 5, 17)
    table = pyarrow.table({"d": pyarrow.array([day, None], pyarrow.date64())})
    pyarrow.parquet.write_table(table, here / "a.parquet")
    attach(db.admin, "days", here)
    assert types(db, "days") == {"d": "date"}
    assert db.all("SELECT d FROM acme.days ORDER BY d") == [(day,), (None,)]
    db.one("SELECT rakam.copy_from('acme', 'days_loaded', %s)", f"file://{here}/a.parquet")
    assert db.all("SELECT d FROM acme.days_loaded ORDER BY d") == [(day,), (None,)]


def test_times_of_any_year_as_int96(db, lake, folder):
    """As Spark and Impala write them; nanoseconds since 1970 reach from 1677 to 2262."""
    here = make(folder, "int96")
    times = [
        datetime.datetime(1, 1, 1),
        datetime.datetime(1500, 6, 1, 12),
        datetime.datetime(1970, 1, 1),
        datetime.datetime(2300, 1, 1, 0, 0, 0, 1),
        datetime.datetime(9999, 12, 31, 23, 59, 59, 999_999),
    ]
    us = pyarrow.timestamp("us")
    lists = pyarrow.array([*([t] for t in times), []], pyarrow.list_(us))
    table = pyarrow.table({"at": pyarrow.array([*times, None], us), "lists": lists})
    # Without Arrow's own schema, in which only pyarrow says that the times were microseconds.
    int96 = {"use_deprecated_int96_timestamps": True, "store_schema": False}
    pyarrow.parquet.write_table(table, here / "a.parquet", row_group_size=2, **int96)
    assert pyarrow.parquet.read_metadata(here / "a.parquet").schema.column(0).physical_type == "INT96"
    attach(db.admin, "int96", here)
    assert types(db, "int96") == {"at": "timestamp without time zone", "lists": "timestamp without time zone[]"}
    assert db.all("SELECT at, lists FROM acme.int96 ORDER BY at") == [*((t, [t]) for t in times), (None, [])]
    for pushdown in ("on", "off"):
        db.admin.execute(f"SET rakam.enable_pushdown = {pushdown}")
        for condition, expected in (("at > '2200-01-01'", times[3:]), ("at < '1600-01-01'", times[:2])):
            found = db.one(f"SELECT array_agg(at ORDER BY at) FROM acme.int96 WHERE {condition}")
            assert found == expected, f"{condition} with pushdown {pushdown}"
    db.admin.execute("RESET rakam.enable_pushdown")
    loaded = db.one("SELECT rakam.copy_from('acme', 'int96_loaded', %s)", f"file://{here}/a.parquet")
    assert loaded == len(times) + 1
    found = db.all("SELECT at AT TIME ZONE 'UTC' FROM acme.int96_loaded ORDER BY at")
    assert found == [*((t,) for t in times), (None,)]


def test_lists_over_many_pages(db, lake, folder):
    here = make(folder, "paged")
    lists = [[n, n + 1] if n % 3 else [] for n in range(20_000)]
    table = pyarrow.table({"ints": pyarrow.array(lists, pyarrow.list_(pyarrow.int32()))})
    small = {"compression": "zstd", "data_page_size": 1_000, "write_batch_size": 100}
    pyarrow.parquet.write_table(table, here / "a.parquet", **small)
    attach(db.admin, "paged", here)
    assert db.one("SELECT sum(i) FROM acme.paged, unnest(ints) i") == sum(map(sum, lists))
    assert db.one("SELECT rakam.copy_from('acme', 'paged_loaded', %s)", f"file://{here}/a.parquet") == len(lists)


def test_what_duckdb_and_copy_to_write(db, lake, folder):
    here = make(folder, "duck")
    duckdb.sql(
        f"COPY (SELECT 1::UTINYINT AS t, uuid() AS u, '{{\"a\": 1}}'::JSON AS j, INTERVAL 1 DAY AS i, MAP {{'x': 1}} AS m,"
        f" DATE '0044-03-15' AS d, [[1], [2, 3]] AS n, TIMESTAMPTZ '2024-01-01 00:00+00' AS z)"
        f" TO '{here}/a.parquet' (FORMAT parquet)"
    )
    attach(db.admin, "duck", here)
    found = types(db, "duck")
    assert [found[c] for c in "tujmdnz"] == [
        "smallint", "uuid", "jsonb", "jsonb", "date", "jsonb", "timestamp with time zone",
    ]  # fmt: skip
    (value,) = db.all("SELECT t, j, m, d, n, z FROM acme.duck")
    assert value == (
        1, {"a": 1}, {"x": 1}, datetime.date(44, 3, 15), [[1], [2, 3]], datetime.datetime(2024, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    here.chmod(0o777)
    url = f"file://{here}/b.parquet"
    assert one(db.admin, "SELECT rakam.copy_to('acme', 'SELECT t, d FROM duck', %s)", url) == 1
    assert db.all("SELECT t, d, u IS NULL FROM acme.duck ORDER BY u") == [
        (1, datetime.date(44, 3, 15), False),
        (1, datetime.date(44, 3, 15), True),
    ]


def avro(rows: list[tuple[int, str]]) -> bytes:
    def long(n: int) -> bytes:
        n = n << 1 ^ n >> 63
        out = b""
        while n > 0x7F:
            out += bytes([n & 0x7F | 0x80])
            n >>= 7
        return out + bytes([n])

    def text(value: str | bytes) -> bytes:
        value = value.encode() if isinstance(value, str) else value
        return long(len(value)) + value

    fields = [{"name": "id", "type": "long"}, {"name": "Name", "type": ["null", "string"]}]
    schema = json.dumps({"type": "record", "name": "r", "fields": fields})
    sync = bytes(16)
    block = b"".join(long(n) + (long(1) + text(name) if name else long(0)) for n, name in rows)
    head = b"Obj\x01" + long(2) + text("avro.schema") + text(schema) + text("avro.codec") + text("null") + long(0)
    return head + sync + long(len(rows)) + text(block) + sync


def test_other_formats(db, lake, folder):
    here = make(folder, "formats")
    (here / "a.csv").write_text('id,Name,at,xmin\n1,ann,2024-01-02,1\n2,"",2024-01-02T03:04:05Z,\n3,,,\n')
    (here / "b.ndjson.gz").write_bytes(
        gzip.compress(b'{"id": 4, "Name": "ben", "deep": {"x": [1]}}\n\n{"Name": 5, "id": null, "at": "2024-01-02"}\n')
    )
    (here / "c.json").write_text('[{"id": 0.5, "tags": ["a", null]}, {"id": 7, "tags": []}]')
    (here / "d.avro").write_bytes(avro([(8, "avro"), (9, "")]))
    (here / "README").write_text("not data")
    (here / "_SUCCESS").write_text("")
    told = notices_of(db.admin, f"SELECT rakam.attach('acme', 'formats', 'file://{here}')")
    assert [n.message for n in told] == ['column "xmin" of the files is left out: a table cannot have it']
    assert types(db, "formats") == {
        "id": "numeric",
        "Name": "text",
        "at": "timestamp with time zone",
        "deep": "jsonb",
        "tags": "text[]",
    }
    day = datetime.datetime(2024, 1, 2, tzinfo=UTC)
    assert db.all('SELECT id, "Name", at, deep, tags FROM acme.formats ORDER BY id, "Name"') == [
        (0.5, None, None, None, ["a", None]),
        (1, "ann", day, None, None),
        (2, "", day.replace(hour=3, minute=4, second=5), None, None),
        (3, None, None, None, None),
        (4, "ben", None, {"x": [1]}, None),
        (7, None, None, None, []),
        (8, "avro", None, None, None),
        (9, None, None, None, None),
        (None, "5", day, None, None),
    ]
    # A format says which files of the folder are meant, and what those without a suffix are.
    (here / "plain").write_text("id\n10\n")
    attach(db.admin, "only_csv", here, "csv")
    (here / "README").unlink()
    db.admin.execute("SELECT rakam.detach('acme', 'only_csv')")
    attach(db.admin, "only_csv", here, "csv")
    assert db.one("SELECT sum(id) FROM acme.only_csv") == 16
    attach(db.admin, "pattern", f"file://{here}/*.csv")
    assert db.one("SELECT sum(id) FROM acme.pattern") == 6
    attach(db.admin, "one_file", here / "c.json")
    assert db.one("SELECT sum(id) FROM acme.one_file") == 7.5


def test_folders_are_columns(db, lake, folder):
    here = make(folder, "hive")
    for year in (2023, 2024):
        for city in ("Bern", "New%20York", "__HIVE_DEFAULT_PARTITION__"):
            part = make(here, f"year={year}/city={city}")
            (part / "x.csv").write_text(f"n\n{year}\n1\n")
    attach(db.admin, "hive", here)
    assert types(db, "hive") == {"n": "double precision", "city": "text", "year": "bigint"}
    query = "SELECT city, year, sum(n) FROM acme.hive WHERE year = 2024 AND n > 1 GROUP BY 1, 2 ORDER BY 1"
    assert db.all(query) == [("Bern", 2024, 2024), ("New York", 2024, 2024), (None, 2024, 2024)]
    (plan,) = db.admin.execute(f"EXPLAIN (ANALYZE, FORMAT json) {query}").fetchone()
    text = json.dumps(plan)
    assert '"Files Read": 3' in text
    assert '"Files Skipped by Folder": 3' in text
    make(here, "year=soon")
    (here / "year=soon/x.csv").write_text("n\n1\n")
    with refused("22P02", message="year=soon/x.csv"):
        db.all("SELECT year FROM acme.hive")


# -- files come and go -------------------------------------------------------------------------------------------


def test_files_are_those_of_now(db, lake, folder):
    here = make(folder, "living")
    (here / "a.ndjson").write_text('{"n": 1, "t": "x"}\n')
    attach(db.admin, "living", here)
    assert db.all("SELECT n, t FROM acme.living") == [(1, "x")]
    (here / "b.ndjson").write_text('{"n": 2, "unknown": true}\n')
    assert db.all("SELECT n, t FROM acme.living ORDER BY n") == [(1, "x"), (2, None)]
    (here / "c.ndjson").write_text('{"n": 3}\n{"n": "many"}\n')
    with refused("22P02", message="living/c.ndjson", hint="rakam.detach"):
        db.all("SELECT n FROM acme.living")
    # Who does not look at the column does not meet the value; a limit may end before it.
    assert db.one("SELECT count(t) FROM acme.living") == 1
    (here / "c.ndjson").write_text('{"n": 3}\nno json\n')
    with refused("22P04", message='c.ndjson", line 2'):
        db.all("SELECT t FROM acme.living")
    (here / "c.ndjson").unlink()
    (here / "c.json").write_text('[{"n": 3},\n{"n": 4}')
    with refused("22P04", message='c.json", line 2'):
        db.all("SELECT n FROM acme.living")
    (here / "c.json").unlink()
    (here / "bad.parquet").write_bytes(b"PAR1 is not enough")
    with refused("22P04", message="bad.parquet"):
        db.all("SELECT t FROM acme.living")
    (here / "bad.parquet").unlink()
    cursor = db.connect(autocommit=False)
    cursor.execute("DECLARE c CURSOR FOR SELECT n FROM acme.living")
    assert len(cursor.execute("FETCH 1 FROM c").fetchall()) == 1
    cursor.rollback()
    for file in here.iterdir():
        file.unlink()
    assert db.one("SELECT count(*) FROM acme.living") == 0
    # An empty folder is an empty table; a folder that is away is none.
    here.rmdir()
    with refused("58P01", message="living"):
        db.one("SELECT count(*) FROM acme.living")


def test_what_cannot_be_attached(db, lake, folder):
    here = make(folder, "refused")
    with refused("58P01"):
        attach(db.admin, "no_files", here)
    with refused("58P01"):
        attach(db.admin, "no_files", folder / "nothing")
    with refused("22023"):
        attach(db.admin, "no_files", f"file://{here}/../refused")
    with refused("22023", hint="parquet"):
        attach(db.admin, "no_files", here, "orc")
    with refused("0A000"):
        attach(db.admin, "no_files", "hdfs://x/y")
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), here / "1.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x"]}), here / "2.parquet")
    with refused("42804", message="2.parquet", hint="narrower"):
        attach(db.admin, "no_type", here)
    (here / "twice.csv").write_text("a,a\n1,2\n")
    with refused("42701", message="twice.csv"):
        attach(db.admin, "twice", here / "twice.csv")
    for arguments in ((None, "n", "u"), (PROJECT, None, "u"), (PROJECT, "n", None)):
        with refused("22004"):
            db.admin.execute("SELECT rakam.attach(%s::text, %s::text, %s::text)", arguments)
    for arguments in ((None, "n"), (PROJECT, None)):
        with refused("22004"):
            db.admin.execute("SELECT rakam.detach(%s::text, %s::text)", arguments)
    assert db.one("SELECT count(*) FROM rakam.attached WHERE name LIKE 'no%%' OR name = 'twice'") == 0


# -- nothing is written ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(db, lake) -> str:
    here = lake / PROJECT / "small"
    here.mkdir(parents=True)
    (here / "a.csv").write_text("n,t\n1,one\n2,two\n")
    shutil.chown(lake / PROJECT, lake.owner(), lake.group())
    attach(db.login(PROJECT, "admin"), "small", "small")
    return "small"


def test_it_is_read_only(db, small):
    admin = db.login(PROJECT, "admin")
    for session in (db.admin, admin):
        for statement in (
            "INSERT INTO acme.small (n) VALUES (3)",
            "INSERT INTO acme.small (n) SELECT 3 WHERE false",
            "UPDATE acme.small SET n = 3",
            "DELETE FROM acme.small",
        ):
            with refused("0A000", hint="rakam.copy_from"):
                session.execute(statement)
        with refused("0A000", hint="rakam.copy_from"), session.cursor().copy("COPY acme.small FROM STDIN") as copy:
            copy.write("1\tx\n")
    with refused("0A000", hint="rakam.copy_from"):
        db.admin.execute("TRUNCATE acme.small")
    assert db.one("SELECT count(*) FROM acme.small") == 2
    assert db.one("SELECT count(*) FROM acme._all WHERE _collection = 'small'") == 0


# -- who may ------------------------------------------------------------------------------------------------------


def test_who_may_read(db, small):
    for kind, allowed in (("read", True), ("admin", True), ("write", False)):
        session = db.login(PROJECT, kind)
        if allowed:
            assert one(session, "SELECT sum(n) FROM acme.small") == 3
            assert one(session, "SELECT count(*) FROM rakam.attached WHERE name = 'small'") == 1
        else:
            with refused("42501"):
                session.execute("SELECT FROM acme.small")
            assert one(session, "SELECT count(*) FROM rakam.attached") == 0
    for session in (db.login("other", "admin"), db.login(PROJECT, "write")):
        with refused("42501"):
            session.execute("SELECT FROM acme.small")
        assert one(session, "SELECT count(*) FROM rakam_internal.attached_table") == 0
    # A forged table is as powerful as its user.
    forger = db.login("other", "admin", name="forger")
    db.admin.execute("GRANT USAGE ON FOREIGN SERVER rakam TO forger, login_acme_read, login_acme_write")
    db.admin.execute("CREATE SCHEMA forge")
    db.admin.execute("GRANT ALL ON SCHEMA forge TO forger, login_acme_read, login_acme_write")
    forger.execute(
        "CREATE FOREIGN TABLE forge.small (n float8, t varchar(2)) SERVER rakam OPTIONS (project 'acme', attached 'small')"
    )
    assert one(forger, "SELECT count(*) FROM forge.small") == 0
    forger.execute("GRANT SELECT ON forge.small TO login_acme_read, login_acme_write")
    assert one(db.login(PROJECT, "write"), "SELECT count(*) FROM forge.small") == 0
    reader = db.login(PROJECT, "read")
    with refused("22001"):
        reader.execute("SELECT t FROM forge.small").fetchall()
    assert one(reader, "SELECT sum(n) FROM forge.small") == 3
    with refused("0A000"):
        forger.execute("INSERT INTO forge.small (n) VALUES (1)")
    with refused("22023"):
        forger.execute(
            "CREATE FOREIGN TABLE forge.both (n int) SERVER rakam OPTIONS (project 'acme', collection 'a', attached 'b')"
        )


def test_who_may_attach_what(db, lake, folder, small):
    (folder / "secret.csv").write_text("secret\n1\n")
    for project in (PROJECT, "other"):
        (lake / project / "mine").mkdir(parents=True, exist_ok=True)
        (lake / project / "mine/own.csv").write_text("n\n1\n")
    (lake / "acme/mine/link.csv").symlink_to(folder / "secret.csv")
    (lake / "acme/mine/beside.csv").symlink_to(lake / "acme/small/a.csv")
    (lake / "acme/away").symlink_to(folder)
    admin = db.login(PROJECT, "admin", name="attacher")
    for kind in ("read", "write"):
        with refused("42501", message='permission denied for project "acme"'):
            attach(db.login(PROJECT, kind), "nope", "mine")
        with refused("42501", message='permission denied for project "acme"'):
            db.login(PROJECT, kind).execute("SELECT rakam.detach('acme', 'small')")
    with refused("42501", message='permission denied for project "nobody"'):
        attach(admin, "nope", "mine", project="nobody")
    with refused("42501", hint="pg_read_server_files"):
        attach(admin, "nope", folder / "secret.csv")
    for path in ("../other/mine", "/etc", "mine/../../other/mine", ""):
        with refused("22023"):
            attach(admin, "nope", path)
    for path in ("away", "away/*.csv", "mine/link.csv", "other/mine"):
        with refused("58P01"):
            attach(admin, "nope", path)
    # Links are not followed out of the folder, not even to elsewhere in the storage.
    attach(admin, "mine", "mine")
    assert types(db, "mine") == {"n": "double precision"}
    assert one(admin, "SELECT sum(n) FROM acme.mine") == 1
    # The right is asked when the files are attached; the project's readers read them then.
    db.admin.execute("GRANT pg_read_server_files TO attacher")
    attach(admin, "elsewhere", folder / "secret.csv")
    db.admin.execute("REVOKE pg_read_server_files FROM attacher")
    assert one(db.login(PROJECT, "read"), "SELECT secret FROM acme.elsewhere") == 1
    db.admin.execute("GRANT USAGE ON FOREIGN SERVER attached_lake TO attacher")
    attach(admin, "shared", lake / "other/mine")
    db.admin.execute("REVOKE USAGE ON FOREIGN SERVER attached_lake FROM attacher")
    assert one(db.login(PROJECT, "read"), "SELECT n FROM acme.shared") == 1
    (lake / "other/mine/link.csv").symlink_to(folder / "secret.csv")
    assert one(db.login(PROJECT, "read"), "SELECT count(*) FROM acme.shared") == 1


def test_a_storage_that_is_moved_widens_nothing(db, lake, cluster):
    """What was allowed is files below a storage: not those elsewhere, when the storage goes there."""
    first, second = cluster.make_folder("moved-1"), cluster.make_folder("moved-2")
    for place in (first, second):
        (place / "x").mkdir()
        (place / "x/a.csv").write_text("n\n1\n")
    db.admin.execute(f"CREATE SERVER moved FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{first}')")
    mover = db.login(PROJECT, "admin", name="mover")
    db.admin.execute("GRANT USAGE ON FOREIGN SERVER moved TO mover")
    attach(mover, "moved", first / "x")
    assert one(mover, "SELECT n FROM acme.moved") == 1
    db.admin.execute(f"ALTER SERVER moved OPTIONS (SET url 'file://{second}')")
    with refused("58030", message='storage "moved"', hint="attach"):
        mover.execute("SELECT n FROM acme.moved")
    db.admin.execute("REVOKE USAGE ON FOREIGN SERVER moved FROM mover; DROP SERVER moved")
    with refused("58030"):
        mover.execute("SELECT n FROM acme.moved")
    mover.execute("SELECT rakam.detach('acme', 'moved')")


# -- names --------------------------------------------------------------------------------------------------------


def test_names_are_those_of_collections(db, lake, small):
    collect(db.admin, PROJECT, "taken", {"n": 1})
    with refused("42710", message="collection"):
        attach(db.admin, "taken", "small")
    with refused("42710", message="attached table"):
        attach(db.admin, "Small", "small")
    db.admin.execute("CREATE VIEW acme.a_view AS SELECT 1 AS x")
    with refused("42710", message="relation"):
        attach(db.admin, "a_view", "small")
    for name in ("users", "_all", "continuous_x"):
        with refused("42939"):
            attach(db.admin, name, "small")
    with refused("42602"):
        attach(db.admin, "", "small")
    for statement in (
        "SELECT rakam.collect('acme', 'small', '{}')",
        "SELECT rakam.create_collection('acme', 'small')",
        "SELECT rakam.copy_from('acme', 'small', 'small/a.csv')",
        "SELECT rakam.rename_collection('acme', 'taken', 'small')",
    ):
        with refused("42710", message="attached table", hint="rakam.detach"):
            db.admin.execute(statement)
    stored, rejected, _, errors = collect_batch(db.admin, PROJECT, [("small", {"n": 1}), ("taken", {"n": 2})])
    assert (stored, rejected, errors[0]["sqlstate"]) == (1, 1, "42710")
    with refused("42809", hint="rakam.detach"):
        db.admin.execute("SELECT rakam.drop_collection('acme', 'small')")
    with refused("42704", hint="rakam.drop_collection"):
        db.admin.execute("SELECT rakam.detach('acme', 'taken')")
    with refused("42704", hint="rakam.attached"):
        db.admin.execute("SELECT rakam.detach('acme', 'unheard_of')")


def test_detach_and_attach_again(db, lake):
    here = lake / PROJECT / "again"
    here.mkdir()
    (here / "a.csv").write_text("n\n1\n")
    admin = db.login(PROJECT, "admin")
    attach(admin, "again", "again")
    db.admin.execute("CREATE VIEW acme.on_it AS SELECT * FROM acme.again")
    with refused("2BP01", hint="depend"):
        admin.execute("SELECT rakam.detach('acme', 'again')")
    assert one(admin, "SELECT count(*) FROM acme.again") == 1
    db.admin.execute("DROP VIEW acme.on_it")
    admin.execute("SELECT rakam.detach('acme', 'again')")
    with refused("42P01"):
        admin.execute("SELECT FROM acme.again")
    assert (here / "a.csv").exists()
    # New columns are taken by attaching anew; the name may also be a collection's now.
    (here / "a.csv").write_text("n,more\n1,2\n")
    attach(admin, "again", "again")
    assert one(admin, "SELECT more FROM acme.again") == 2
    # Somebody may drop the table itself.
    db.admin.execute("DROP FOREIGN TABLE acme.again")
    attach(admin, "again", "again")
    admin.execute("SELECT rakam.detach('acme', 'again')")
    collect(admin, PROJECT, "again", {"n": 5})
    db.tick()
    assert one(admin, "SELECT n FROM acme.again") == 5
    calls = db.all(
        "SELECT call, outcome FROM rakam.audit_log WHERE object = 'again' AND role = 'login_acme_admin' ORDER BY at"
    )
    assert [call for call, outcome in calls if outcome == "ok"] == [
        "attach", "detach", "attach", "attach", "detach",
    ]  # fmt: skip
    assert db.one(
        "SELECT to_regclass('rakam_internal.attached_table') = ANY (extconfig) FROM pg_extension WHERE extname = 'rakam'"
    )


def test_a_session_from_before_knows_the_name_is_taken(db, lake, folder):
    """What it remembers of the project is from before the table was attached, or detached."""
    early = db.connect()
    collect(early, PROJECT, "hits", {"n": 1})
    db.tick()
    # Nothing is registered after this, which would have it look again.
    collect(early, PROJECT, "hits", {"n": 1})
    (folder / "since.csv").write_text("n\n1\n")
    attach(db.admin, "since", folder / "since.csv")
    with refused("42710", hint="rakam.detach"):
        collect(early, PROJECT, "since", {"n": 1})
    stored, _, _, errors = collect_batch(early, PROJECT, [(name, {"n": 2}) for name in ("since", "hits")])
    assert (stored, [error["sqlstate"] for error in errors]) == (1, ["42710"])
    with refused("42710", hint="rakam.detach"):
        early.execute("SELECT rakam.create_collection('acme', 'since')")
    assert db.one("SELECT count(*) FROM acme._all WHERE _collection = 'since'") == 0
    early.execute("SELECT rakam.detach('acme', 'since')")
    collect(early, PROJECT, "since", {"n": 3})
    db.tick()
    assert db.one("SELECT n FROM acme.since") == 3


def test_a_dropped_project_takes_its_tables_along(db, lake, folder):
    db.project("brief", "attached_lake")
    (folder / "brief.csv").write_text("n\n1\n")
    attach(db.admin, "files", folder / "brief.csv", project="brief")
    assert db.one("SELECT n FROM brief.files") == 1
    db.admin.execute("SET rakam.allow_project_drop = on")
    db.admin.execute("SELECT rakam.drop_project('brief')")
    assert db.one("SELECT count(*) FROM rakam_internal.attached_table WHERE name = 'files'") == 0
    assert (folder / "brief.csv").exists()


# -- bounds -------------------------------------------------------------------------------------------------------


def test_a_limit_ends_early_and_a_cancel_at_once(db, lake, folder):
    here = make(folder, "long")
    line = ",".join(str(n) for n in range(20)) + "\n"
    for part in range(4):
        (here / f"{part}.csv").write_text(",".join(f"c{n}" for n in range(20)) + "\n" + line * 200_000)
    size = sum(file.stat().st_size for file in here.iterdir())
    attach(db.admin, "long", here)
    (plan,) = db.admin.execute("EXPLAIN (ANALYZE, TIMING off, FORMAT json) SELECT c1 FROM acme.long LIMIT 3").fetchone()
    scan = plan[0]["Plan"]["Plans"][0]
    assert scan["Actual Rows"] == 3
    assert scan["Bytes Read"] < size * 3 / 4
    session = db.connect()
    with pytest.raises(psycopg.errors.QueryCanceled):
        session.execute("SET statement_timeout = '50ms'")
        session.execute("SELECT count(*), sum(c1), sum(c2), sum(c19) FROM acme.long a")
    session.execute("RESET statement_timeout")
    assert one(session, "SELECT count(c1) FROM (SELECT c1 FROM acme.long LIMIT 1000) s") == 1000


def test_memory_is_bounded(private_cluster):
    cluster = private_cluster("attach-memory", {"rakam.memory_limit": "32MB"})
    db = Database(cluster, "bounded").create()
    here = cluster.make_folder("wide")
    wide = ["x" * 1_000_000 + str(n) for n in range(40)]
    pyarrow.parquet.write_table(pyarrow.table({"t": wide}), here / "a.parquet", use_dictionary=False)
    lake = cluster.make_folder("lake")
    db.admin.execute(f"CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{lake}')")
    db.project(PROJECT, "lake")
    attach(db.admin, "wide", here)
    # More in all than there is memory, a few rows at a time.
    assert db.one("SELECT sum(length(t)) FROM acme.wide") == sum(map(len, wide))
    huge = ["y" * 60_000_000]
    pyarrow.parquet.write_table(pyarrow.table({"t": huge}), here / "b.parquet", use_dictionary=False)
    with refused("53200", hint="rakam.memory_limit"):
        db.one("SELECT max(length(t)) FROM acme.wide")
    assert db.one("SELECT count(*) FROM acme.wide") == 41
    with refused("53200", hint="rakam.memory_limit"):
        db.one("SELECT rakam.copy_from('acme', 'huge', %s)", f"file://{here}/b.parquet")
    # Pages are there as a whole, those of all columns at a time.
    here = cluster.make_folder("pages")
    pages = pyarrow.table({name: ["x" * 1_000_000] * 40 for name in "abc"})
    pyarrow.parquet.write_table(pages, here / "a.parquet", use_dictionary=False, data_page_size=1 << 30)
    attach(db.admin, "pages", here)
    assert db.one("SELECT sum(length(a)) FROM acme.pages") == 40_000_000
    with refused("53200", hint="rakam.memory_limit"):
        db.one("SELECT sum(length(a)), sum(length(b)), sum(length(c)) FROM acme.pages")
    with refused("53200", hint="rakam.memory_limit"):
        db.one("SELECT rakam.copy_from('acme', 'pages_loaded', %s)", f"file://{here}/a.parquet")
    # What the file has once may be the value of every row; what it does not have at all may be long.
    here = cluster.make_folder("once")
    write = {"compression": "zstd", "use_dictionary": True, "store_schema": False}
    once = pyarrow.table({f"c{n}": ["x" * 200_000] * 1_500 for n in range(3)})
    pyarrow.parquet.write_table(once, here / "a.parquet", **write)
    attach(db.admin, "once", here)
    query = "SELECT count(*), sum(length(c0)), max(length(c1)), min(length(c2)) FROM acme.once"
    assert db.all(query) == [(1_500, 300_000_000, 200_000, 200_000)]
    here = cluster.make_folder("none")
    none = pyarrow.table({"c": pyarrow.array([[None] * 5_000_000], pyarrow.list_(pyarrow.float64()))})
    pyarrow.parquet.write_table(none, here / "a.parquet", **write)
    attach(db.admin, "none", here)
    with refused("53200", hint="rakam.memory_limit"):
        db.one("SELECT array_length(c, 1) FROM acme.none")
    # A load makes chunks that can be read again, also when they have been merged.
    once = pyarrow.table({"t": ["x" * 30_000] * 8_000})
    pyarrow.parquet.write_table(once, here / "b.parquet", **write)
    assert db.one("SELECT rakam.copy_from('acme', 'loaded', %s)", f"file://{here}/b.parquet") == 8_000
    db.admin.execute("SET rakam.memory_limit = '160MB'")
    for _ in range(2):
        assert db.one("SELECT length(t) FROM acme.loaded LIMIT 1") == 30_000
        assert db.one("SELECT sum(length(t)) FROM acme.loaded") == 240_000_000
        db.admin.execute("SELECT rakam.tick()")
    db.close()
