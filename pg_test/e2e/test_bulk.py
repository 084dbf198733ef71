"""COPY and INSERT of many rows: straight into chunks, in the transaction of the statement; the same rows as any other way.

What is in which tier right after a statement is looked at inside its transaction, where no digest can interfere.
"""

from __future__ import annotations

import random
import threading
import time
import zlib
from datetime import UTC, datetime

import psycopg
import pytest
from harness.database import Database, collect, has_column, one, refused, wait_until
from harness.queries import COLUMNS, random_row

PROJECT = "acme"
# A statement of fewer rows leaves them to the digest (src/fdw/bulk.rs).
FIRST_ROWS = 512
WIDE = {
    "n": "bigint",
    "price": "numeric(10,2)",
    "ratio": "double precision",
    "tags": "text[]",
    "doc": "jsonb",
    "word": "text",
}


def make(db: Database, collection: str, columns: dict[str, str], project: str = PROJECT) -> str:
    """A collection with these fields as columns; answers its table's name."""
    db.admin.execute("SELECT rakam.create_collection(%s, %s)", (project, collection))
    for field, kind in columns.items():
        db.admin.execute("SELECT rakam.add_field(%s, %s, %s, %s)", (project, collection, field, kind))
    db.tick()
    table = f"{project}.{collection}"
    wait_until(lambda: all(has_column(db.admin, table, field) for field in columns), f"columns of {table}")
    return table


@pytest.fixture
def table(db, keys, request):
    """A table of its own for each test."""
    return make(db, request.node.name.split("[")[0].removeprefix("test_")[:50], WIDE)


@pytest.fixture
def session(db, keys):
    """A superuser's session with a transaction that the test ends."""
    connection = db.connect(autocommit=False)
    yield connection
    connection.close()


def copy_in(connection: psycopg.Connection, statement: str, data: str | bytes) -> None:
    with connection.cursor() as cursor, cursor.copy(statement) as stream:
        stream.write(data)


def copy_out(connection: psycopg.Connection, statement: str) -> bytes:
    with connection.cursor() as cursor, cursor.copy(statement) as stream:
        return b"".join(bytes(part) for part in stream)


def count(connection: psycopg.Connection, table: str) -> int:
    return one(connection, f"SELECT count(*) FROM {table}")


def tiers(connection: psycopg.Connection, table: str) -> dict[str, tuple[int, int]]:
    """(rows of the tier's table, events in them) for the inbox and the chunks, as a superuser's session sees them."""
    collection_id = one(
        connection,
        "SELECT collection_id FROM rakam_internal.collection JOIN rakam_internal.project p USING (project_id)"
        " WHERE p.name || '.' || collection.name = %s",
        table,
    )
    inbox = " UNION ALL ".join(f"SELECT collection_id, n FROM rakam_internal.inbox_{k}" for k in range(3))
    return {
        tier: connection.execute(
            f"SELECT count(*), coalesce(sum(n), 0) FROM ({rows}) t WHERE collection_id = %s", (collection_id,)
        ).fetchone()
        for tier, rows in (("inbox", inbox), ("chunks", "SELECT collection_id, n FROM rakam_internal.hot_chunk"))
    }


def difference(connection: psycopg.Connection, one_table: str, other: str, columns: str) -> list[tuple]:
    """Rows that only one of two tables has, by the text of their columns."""
    names = columns.split(", ")
    shown = ", ".join(f'"{name}"::text' for name in names)
    return connection.execute(
        f"(SELECT 'first', * FROM (SELECT {shown} FROM {one_table} EXCEPT ALL SELECT {shown} FROM {other}) a)"
        f" UNION ALL (SELECT 'second', * FROM (SELECT {shown} FROM {other} EXCEPT ALL SELECT {shown} FROM {one_table}) b)"
        " LIMIT 3"
    ).fetchall()


# -- where rows go -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["copy", "insert"])
@pytest.mark.parametrize(("rows", "where"), [(FIRST_ROWS - 1, "inbox"), (FIRST_ROWS, "chunks"), (4_000, "chunks")])
def test_few_rows_go_to_the_inbox_and_many_become_a_chunk(db, keys, session, kind, rows, where):
    table = make(db, f"road_{kind}_{rows}", {"n": "bigint"})
    if kind == "copy":
        copy_in(session, f"COPY {table} (n) FROM STDIN", "".join(f"{n}\n" for n in range(rows)))
    else:
        session.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(0, {rows - 1}) g")
    empty = {"inbox": (0, 0), "chunks": (0, 0)}
    assert tiers(session, table) == {**empty, where: (1, rows)}
    expected = (rows, rows * (rows - 1) // 2)
    for see in (session, db.admin, db.admin, db.admin):
        if see is session:
            assert session.execute(f"SELECT count(*), sum(n) FROM {table}").fetchone() == expected
            assert count(db.admin, table) == 0
            session.commit()
        else:
            assert see.execute(f"SELECT count(*), sum(n) FROM {table}").fetchone() == expected
            db.flush(PROJECT, table.split(".")[1])
    assert db.tiers(PROJECT, table.split(".")[1])["cold"] == rows


def test_every_type_is_stored_as_postgres_has_it(db, keys, session, seed):
    """The same rows in a heap table, in chunks, in the inbox, and then in files: no difference."""
    many, few = make(db, "every_type", COLUMNS), make(db, "every_type_few", COLUMNS)
    names = ", ".join(["_time", "_user", *COLUMNS])
    quoted = ", ".join(f'"{name}"' for name in names.split(", "))
    session.execute(f"CREATE TEMP TABLE oracle AS SELECT {quoted} FROM {many}")
    rng = random.Random(seed)
    for _ in range(6):
        made = [random_row(rng, n) for n in range(200)]
        values = ", ".join("(" + ", ".join(row[name] for name in names.split(", ")) + ")" for row in made)
        session.execute(f"INSERT INTO oracle ({quoted}) VALUES {values}")
        session.execute(f"INSERT INTO {few} ({quoted}) VALUES {values}")
    session.execute(f"INSERT INTO {many} ({quoted}) SELECT * FROM oracle")
    assert tiers(session, few)["chunks"] == (0, 0)
    assert tiers(session, many)["inbox"] == (0, 0)
    assert difference(session, many, "oracle", names) == []
    assert difference(session, few, "oracle", names) == []
    session.execute("CREATE TABLE every_type_oracle AS SELECT * FROM oracle")
    session.commit()
    for step in (db.tick, db.flush):
        step()
        for table in (many, few):
            assert difference(db.admin, table, "every_type_oracle", names) == []


def test_values_that_events_do_not_have(session, table):
    for column, value, state in (
        ("ratio", "'NaN'::float8", "22023"),
        ("ratio", "'-Infinity'::float8", "22023"),
        ("_time", "'infinity'::timestamptz", "22008"),
        ("_time", "'10000-01-01'::timestamptz", "22008"),
        ("tags", "'{{a},{b}}'::text[]", "0A000"),
        ("tags", "'[2:2]={a}'::text[]", "0A000"),
        ("_extra", "'[1]'::jsonb", "22023"),
        ("doc", "(repeat('[', 64) || repeat(']', 64))::jsonb", "54000"),
        ("_extra", """('{"a":' || repeat('[', 63) || repeat(']', 63) || '}')::jsonb""", "54000"),
    ):
        for rows in (1, 2_000):
            with refused(state), session.transaction():
                session.execute(
                    f"INSERT INTO {table} ({column}) SELECT CASE WHEN g = {rows} THEN {value} END"
                    f" FROM generate_series(1, {rows}) g"
                )
    assert count(session, table) == 0
    # What is nothing, or the same in another spelling.
    for rows in (1, 2_000):
        session.execute(
            f"""INSERT INTO {table} (ratio, doc, tags, _extra, n) SELECT '-0', 'null', '{{}}', '{{}}', {rows}
                FROM generate_series(1, {rows}) g"""
        )
    found = session.execute(
        f"SELECT DISTINCT ratio::text, doc IS NULL, tags::text, _extra IS NULL FROM {table}"
    ).fetchall()
    assert found == [("0", True, "{}", True)]


def test_an_event_has_one_limit_of_size(db, session, table):
    session.execute("SET LOCAL rakam.max_event_bytes = '10kB'")
    for rows in (1, 2_000):
        # The second is over the limit as JSON only: a quote takes two bytes of it.
        for long in ("repeat('x', 12000)", "repeat('\"', 6000)"):
            with refused("54000", hint="rakam.max_event_bytes"), session.transaction():
                session.execute(
                    f"INSERT INTO {table} (word) SELECT CASE WHEN g = {rows} THEN {long} END"
                    f" FROM generate_series(1, {rows}) g"
                )
        session.execute(f"INSERT INTO {table} (word) SELECT repeat('x', 9000) FROM generate_series(1, {rows}) g")
    assert count(session, table) == 2_001


def test_rows_with_an_id_go_to_the_inbox_in_few_entries(session, table):
    session.execute(f"INSERT INTO {table} (_id, n) SELECT 'id' || g, g FROM generate_series(1, 3000) g")
    found = tiers(session, table)
    assert found["chunks"] == (0, 0)
    assert found["inbox"][1] == 3_000
    assert found["inbox"][0] <= 2
    # Among rows without one, too.
    session.execute(
        f"INSERT INTO {table} (_id, n) SELECT CASE WHEN g % 10 = 0 THEN 'more' || g END, g FROM generate_series(1, 3000) g"
    )
    found = tiers(session, table)
    assert found["chunks"] == (1, 2_700)
    assert found["inbox"][1] == 3_300
    with refused("54000"), session.transaction():
        session.execute(f"INSERT INTO {table} (_id) SELECT repeat('x', 200 + g) FROM generate_series(1, 60) g")
    assert session.execute(f"SELECT count(*), count(DISTINCT _id), sum(n) FROM {table}").fetchone() == (
        6_000, 3_300, 2 * 4_501_500,
    )  # fmt: skip


def test_each_time_of_receipt_is_an_inbox_row(session, table):
    """Events of an inbox row share their time of receipt, so that a restored event keeps its own."""
    session.execute(
        f"""INSERT INTO {table} (_id, n, _received_at) SELECT 'id' || g, g % 7, '2026-01-01 00:00Z'::timestamptz + g % 7 * interval '1 day'
            FROM generate_series(1, 2000) g"""
    )
    assert tiers(session, table)["inbox"] == (7, 2_000)
    assert session.execute(
        f"SELECT count(*) FROM {table} WHERE _received_at = '2026-01-01 00:00Z'::timestamptz + n * interval '1 day'"
    ).fetchone() == (2_000,)


def test_values_to_be_logged_are_left_to_the_digest(db, writer, table):
    """A string that is cut, a time out of bounds: the digest keeps the exact counts, whoever loads at the same time."""
    name = table.split(".")[1]
    writer.execute(
        f"""INSERT INTO {table} (n, _time, word, tags, doc)
            SELECT g, CASE g WHEN 600 THEN '1950-01-01'::timestamptz WHEN 601 THEN now() + interval '3 days' END,
              CASE g WHEN 700 THEN repeat('é', 40000) END,
              CASE g WHEN 701 THEN ARRAY['short', repeat('x', 70000)] END,
              CASE g WHEN 702 THEN jsonb_build_object('a', repeat('x', 70000)) END
            FROM generate_series(1, 2000) g"""
    )
    db.tick()
    found = db.all(f"SELECT n, _time = _received_at, octet_length(word), octet_length(tags[2]), length(doc->>'a') FROM {table}"
                   " WHERE n IN (1, 600, 601, 700, 701, 702) ORDER BY n")  # fmt: skip
    assert found == [
        (1, True, None, None, None),
        (600, True, None, None, None),
        (601, True, None, None, None),
        (700, True, 65_536, None, None),
        (701, True, None, 65_536, None),
        (702, True, None, None, 65_536),
    ]
    logged = db.all(
        "SELECT field, count(*) FROM rakam.invalid_value WHERE collection = %s GROUP BY field ORDER BY field", name
    )
    assert logged == [("_time", 2), ("doc", 1), ("tags", 1), ("word", 1)]
    assert count(db.admin, table) == 2_000


def test_a_column_that_is_no_field_takes_the_inbox(db, session, table):
    db.admin.execute(f'ALTER FOREIGN TABLE {table} ADD COLUMN by_hand text COLLATE "C"')
    session.execute(f"INSERT INTO {table} (n, by_hand) SELECT g, 'x' FROM generate_series(1, 2000) g")
    assert tiers(session, table)["inbox"][1] == 2_000
    session.commit()
    db.tick()
    assert db.all(f"SELECT count(*), count(by_hand), sum(n) FROM {table}") == [(2_000, 2_000, 2_001_000)]


def test_a_field_that_is_no_column_yet_stays_null(db, session, table):
    collect(session, PROJECT, table.split(".")[1], {"n": 0, "fresh": "seen"})
    session.commit()
    db.tick()
    wait_until(lambda: has_column(db.admin, table, "fresh"), "column fresh")
    session.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 2000) g")
    assert session.execute(f"SELECT count(*), count(fresh), count(_extra) FROM {table}").fetchone() == (2_001, 1, 0)


def test_the_worker_flushes_chunks_that_no_digest_has_made(db, table):
    name = table.split(".")[1]
    db.flush(PROJECT)
    time.sleep(2.5)  # until the worker has looked at the tiers again, and found nothing hot
    db.configure(flush_interval="1s", min_file_events=1000)
    try:
        # Fewer than rakam.min_file_events would wait for rakam.flush_max_age.
        db.admin.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 12000) g")
        wait_until(lambda: db.tiers(PROJECT, name)["cold"] == 12_000, "a data file", pause_s=0.2)
    finally:
        db.configure(flush_interval=None, min_file_events=None)


# -- transactions --------------------------------------------------------------------------------------------------------


def test_rollback_and_savepoints(db, session, table):
    session.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 1000) g")
    session.rollback()
    assert count(session, table) == 0
    session.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 1000) g")
    session.execute("SAVEPOINT s")
    session.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 2000) g")
    assert count(session, table) == 3_000
    session.execute("ROLLBACK TO s")
    assert count(session, table) == 1_000
    session.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 700) g")
    session.commit()
    for _ in range(2):
        assert count(db.admin, table) == 1_700
        db.flush(PROJECT, table.split(".")[1])


def test_a_statement_that_fails_midway_stores_nothing(db, writer, table):
    lines = [f"{n}\t{n}\n" for n in range(150_000)]
    # Found by Postgres, and found by us.
    for value, state in (("not a number", "22P02"), ("NaN", "22023")):
        lines[140_000] = f"140000\t{value}\n"
        with refused(state):
            copy_in(writer, f"COPY {table} (n, ratio) FROM STDIN", "".join(lines))
    assert count(db.admin, table) == 0
    assert tiers(db.admin, table) == {"inbox": (0, 0), "chunks": (0, 0)}


def test_a_failed_block_leaves_the_rest_of_its_function(session, table):
    session.execute(f"""
        DO $$ BEGIN
          INSERT INTO {table} (n) SELECT g FROM generate_series(1, 1000) g;
          BEGIN
            INSERT INTO {table} (n) SELECT 1 / (70000 - g) FROM generate_series(1, 80000) g;
          EXCEPTION WHEN division_by_zero THEN NULL;
          END;
          INSERT INTO {table} (n) SELECT g FROM generate_series(1, 600) g;
        END $$""")
    assert count(session, table) == 1_600


def test_an_insert_inside_of_an_insert(db, session, table):
    """A function of the query that inserts into the same table, in a block of its own that fails at times."""
    session.execute(f"""
        CREATE FUNCTION pg_temp.also(g bigint) RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN
          IF g % 500 = 0 THEN
            BEGIN
              INSERT INTO {table} (word) SELECT 'inner' FROM generate_series(1, 600);
              IF g % 1000 = 0 THEN RAISE 'rolled back'; END IF;
            EXCEPTION WHEN raise_exception THEN NULL;
            END;
          END IF;
          RETURN g;
        END $$""")
    session.execute(f"INSERT INTO {table} (n, word) SELECT pg_temp.also(g), 'outer' FROM generate_series(1, 2000) g")
    found = dict(session.execute(f"SELECT word, count(*) FROM {table} GROUP BY word").fetchall())
    assert found == {"outer": 2_000, "inner": 1_200}


def test_prepared_transaction(db, session, table):
    session.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 1000) g")
    session.execute("PREPARE TRANSACTION 'bulk_p1'")
    db.tick()
    db.flush(PROJECT, table.split(".")[1])
    assert count(db.admin, table) == 0
    db.admin.execute("COMMIT PREPARED 'bulk_p1'")
    for _ in range(2):
        assert db.all(f"SELECT count(*), sum(n) FROM {table}") == [(1_000, 500_500)]
        db.flush(PROJECT, table.split(".")[1])


def test_cancel(session, table):
    session.execute("SAVEPOINT s")
    session.execute("SET LOCAL statement_timeout = '300ms'")
    with refused("57014"):
        session.execute(f"INSERT INTO {table} (n, word) SELECT g, md5(g::text) FROM generate_series(1, 100000000) g")
    session.execute("ROLLBACK TO s")
    assert count(session, table) == 0


def test_read_only(db, writer, table):
    session = db.connect(autocommit=False)
    session.execute("SET TRANSACTION READ ONLY")
    with refused("25006"):
        copy_in(session, f"COPY {table} (n) FROM STDIN", "1\n")
    session.rollback()


def test_a_query_does_not_see_what_its_own_statement_inserts(db, session, table):
    session.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 70000) g")
    session.execute("DECLARE before CURSOR FOR SELECT n FROM " + table)
    assert session.execute("FETCH 1 FROM before").fetchone()
    session.execute(f"INSERT INTO {table} (n) SELECT n + 70000 FROM {table}")
    assert session.execute(f"SELECT count(*), sum(n) FROM {table}").fetchone() == (140_000, 140_000 * 140_001 // 2)
    assert len(session.execute("FETCH ALL FROM before").fetchall()) == 69_999


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_isolation_levels(db, keys, session, level):
    table = make(db, f"level_{level.split()[0].lower()}", {"n": "bigint"})
    session.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
    assert count(session, table) == 0
    db.admin.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 1000) g")
    session.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 600) g")
    assert count(session, table) == 600
    session.commit()
    assert count(session, table) == 1_600


# -- kinds of statements -------------------------------------------------------------------------------------------------


NUMBERED = """SELECT i AS n, (i / 100.0)::numeric(10,2) AS price, CASE WHEN i % 3 > 0 THEN i / 8.0::float8 END AS ratio,
    CASE WHEN i % 5 > 0 THEN ARRAY['t' || i, NULL] END AS tags, jsonb_build_object('i', i) AS doc,
    CASE WHEN i % 7 > 0 THEN repeat('w' || i, i % 20) END AS word FROM generate_series(1, 9000) i"""


@pytest.mark.parametrize(
    "query",
    [
        NUMBERED,
        f"SELECT * FROM ({NUMBERED}) q ORDER BY word, n",
        "SELECT * FROM stored",
        "SELECT n + 1, price, ratio, tags, doc, word || n FROM stored",
        f"SELECT s.n, q.price, q.ratio, s.tags, q.doc, s.word FROM stored s LEFT JOIN ({NUMBERED}) q USING (n)",
    ],
    ids=["computed", "sorted", "stored", "changed", "joined"],
)
def test_rows_of_a_query_are_what_it_gives(session, keys, db, query):
    """Their values are taken over as they are, from wherever the query has them, in more than one part of a chunk."""
    table = make(db, f"q{zlib.crc32(query.encode())}", WIDE)
    columns = ", ".join(WIDE)
    # Some texts are compressed, some stored apart.
    session.execute(
        f"CREATE TEMP TABLE stored ON COMMIT DROP AS SELECT n, price, ratio, tags, doc,"
        f" CASE n % 1000 WHEN 1 THEN repeat('long', 5000)"
        f"   WHEN 2 THEN (SELECT string_agg(md5(n::text || k), '') FROM generate_series(1, 200) k) ELSE word END AS word"
        f" FROM ({NUMBERED}) q"
    )
    session.execute(f"CREATE TEMP TABLE given ({', '.join(f'{n} {t}' for n, t in WIDE.items())}) ON COMMIT DROP")
    for target in (table, "given"):
        session.execute(f"INSERT INTO {target} ({columns}) {query}")
    assert tiers(session, table)["chunks"] == (1, 9000)
    assert difference(session, table, "given", columns) == []


def test_a_view_checks_each_row(session, table):
    session.execute(f"CREATE VIEW checked AS SELECT * FROM {table} WHERE n > 0 WITH CHECK OPTION")
    session.execute("INSERT INTO checked (n) SELECT generate_series(1, 600)")
    assert count(session, table) == 600
    with pytest.raises(psycopg.errors.WithCheckOptionViolation):
        session.execute("INSERT INTO checked (n) SELECT generate_series(5, -5, -1)")


def test_returning(admin, table):
    found = admin.execute(
        f"INSERT INTO {table} (n, price, _time) SELECT g, g / 3.0, CASE WHEN g = 1500 THEN '1900-01-01'::timestamptz END"
        " FROM generate_series(1, 1500) g RETURNING n, price::text, _time = _received_at, _received_at = now()"
    ).fetchall()
    assert len(found) == 1_500
    assert found[9] == (10, "3.33", True, False)
    assert all(replaced for _, _, replaced, _ in found)
    assert len({row[0] for row in found}) == 1_500


def test_on_conflict_do_nothing(writer, admin, table):
    writer.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 1000) g ON CONFLICT DO NOTHING")
    assert count(admin, table) == 1_000


def test_explain_analyze_and_functions_insert(session, table):
    session.execute(f"EXPLAIN INSERT INTO {table} (n) SELECT g FROM generate_series(1, 1000) g")
    assert count(session, table) == 0
    session.execute(f"EXPLAIN ANALYZE INSERT INTO {table} (n) SELECT g FROM generate_series(1, 1000) g")
    session.execute(f"""
        CREATE FUNCTION pg_temp.load(many int) RETURNS SETOF bigint LANGUAGE sql AS
          $$ INSERT INTO {table} (n) SELECT g FROM generate_series(1, many) g RETURNING n $$""")
    assert session.execute("SELECT count(*) FROM pg_temp.load(1000)").fetchone() == (1_000,)
    session.execute(f"PREPARE load (int) AS INSERT INTO {table} (n) SELECT g FROM generate_series(1, $1) g")
    for _ in range(7):
        session.execute("EXECUTE load (600)")
    assert count(session, table) == 2_000 + 7 * 600


def test_several_tables_in_one_statement(db, session, table):
    other = make(db, "several_other", WIDE)
    session.execute(f"""
        WITH source AS (SELECT g FROM generate_series(1, 1000) g),
             a AS (INSERT INTO {table} (n) SELECT g FROM source RETURNING n),
             b AS (INSERT INTO {other} (n) SELECT -g FROM source)
        INSERT INTO {other} (n) SELECT n * 2 FROM a""")
    assert session.execute(f"SELECT count(*), sum(n) FROM {table}").fetchone() == (1_000, 500_500)
    assert session.execute(f"SELECT count(*), sum(n) FROM {other}").fetchone() == (2_000, 500_500)
    assert tiers(session, other) == {"inbox": (0, 0), "chunks": (2, 2_000)}


def test_partitions(db, keys, session):
    """A collection as a partition beside heap tables: rows are routed, those of COPY too."""
    table = make(db, "partition_of", {"n": "bigint"})
    columns = ", ".join(
        f'"{name}" {kind} ' + ('COLLATE "C"' if kind == "text" else "")
        for name, kind in db.all(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute"
            " WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum DESC",
            table,
        )
    )
    session.execute(f"CREATE TABLE parted ({columns}) PARTITION BY LIST (n)")
    session.execute("CREATE TABLE parted_rest PARTITION OF parted DEFAULT")
    session.execute(f"ALTER TABLE parted ATTACH PARTITION {table} FOR VALUES IN (1, 2)")
    session.execute("INSERT INTO parted (n, _user) SELECT g % 4, 'u' || g FROM generate_series(1, 4000) g")
    copy_in(session, "COPY parted (_user, n) FROM STDIN", "".join(f"c{n}\t{n % 4}\n" for n in range(4_000)))
    assert session.execute(f"SELECT n, count(*), count(DISTINCT _user) FROM {table} GROUP BY n ORDER BY n").fetchall() == [
        (1, 2_000, 2_000), (2, 2_000, 2_000),
    ]  # fmt: skip
    assert count(session, "parted_rest") == 4_000
    assert tiers(session, table) == {"inbox": (0, 0), "chunks": (2, 4_000)}
    session.rollback()


def test_triggers_see_what_was_inserted(db, session, table):
    session.execute("CREATE TABLE told (what text, seen bigint)")
    session.execute(f"""
        CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
          INSERT INTO told SELECT TG_LEVEL, count(*) FROM {table};
          RETURN NULL;
        END $$""")
    session.execute(
        f"CREATE TRIGGER of_row AFTER INSERT ON {table} FOR EACH ROW WHEN (NEW.n = 1) EXECUTE FUNCTION tell()"
    )
    session.execute(f"CREATE TRIGGER of_all AFTER INSERT ON {table} FOR EACH STATEMENT EXECUTE FUNCTION tell()")
    session.execute(f"""
        CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
          IF NEW.n = 3 THEN RETURN NULL; END IF;
          NEW.word := 'changed';
          RETURN NEW;
        END $$;
        CREATE TRIGGER before_row BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION change()""")
    session.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 600) g")
    copy_in(session, f"COPY {table} (n) FROM STDIN", "".join(f"{n}\n" for n in range(1, 601)))
    assert session.execute("SELECT what, seen FROM told").fetchall() == [
        ("ROW", 599), ("STATEMENT", 599), ("ROW", 1_198), ("STATEMENT", 1_198),
    ]  # fmt: skip
    assert session.execute(f"SELECT count(word) FROM {table}").fetchone() == (1_198,)
    session.rollback()


def test_who_may_write(db, keys, writer, table):
    db.project("rival")
    mallory = db.login("rival", "read", "write", "admin")
    lines = "".join(f"{n}\n" for n in range(1_000))
    with refused("42501"):
        copy_in(mallory, f"COPY {table} (n) FROM STDIN", lines)
    # A table of one's own that says it were the other project's, or one's own project's.
    for project in (PROJECT, "rival"):
        mallory.execute(
            f"CREATE FOREIGN TABLE rival.forged_{project} (n bigint) SERVER rakam"
            f" OPTIONS (project '{project}', collection '{table.split('.')[1]}')"
        )
        with refused("42501"):
            copy_in(mallory, f"COPY rival.forged_{project} (n) FROM STDIN", lines)
    with refused("55000"):
        copy_in(db.admin, f"COPY {PROJECT}._all (_user) FROM STDIN", "x\n")
    # The writer may write, not read: neither by a query nor by what his own statement tells.
    copy_in(writer, f"COPY {table} (n) FROM STDIN", lines)
    with refused("42501"):
        writer.execute(f"INSERT INTO {table} (n) SELECT n FROM {table}")
    assert count(db.admin, table) == 1_000


@pytest.mark.parametrize("rows", [1, 2_000])
def test_received_at_is_for_admins(db, writer, admin, table, rows):
    statement = (
        f"INSERT INTO {table} (n, _received_at) SELECT g, '2026-01-01 00:00:00Z'::timestamptz + (g % 5) * interval '1 day'"
        f" FROM generate_series(1, {rows}) g"
    )
    with refused("42501", hint="admin role"):
        writer.execute(statement)
    admin.execute(statement)
    first = datetime(2026, 1, 2, tzinfo=UTC)
    for _ in range(2):
        assert db.all(f"SELECT DISTINCT _received_at, _time FROM {table} WHERE n = 1") == [(first, first)]
        assert one(db.admin, f"SELECT count(DISTINCT _received_at) FROM {table}") == min(rows, 5)
        db.flush(PROJECT, table.split(".")[1])


# -- out and in again ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(db, keys):
    """A collection of rows of every kind and tier: with and without `_id`, with `_extra`, misfits, late ones."""
    table = make(db, "source", COLUMNS)
    names = ", ".join(f'"{name}"' for name in ["_time", "_user", "_id", *COLUMNS])
    rng = random.Random(7)
    for start, keep_id in ((0, True), (300, False), (600, True), (900, False)):
        made = [random_row(rng, start + n) for n in range(300)]
        for row in made:
            if not keep_id:
                row["_id"] = "NULL"
        values = ", ".join("(" + ", ".join(row.values()) + ")" for row in made)
        db.admin.execute(f"INSERT INTO {table} ({names}) VALUES {values}")
        collect(
            db.admin, PROJECT, "source",
            {"_id": f"odd{start}", "big": "not a number", "Other Name": [1, {"a": None}], "xmin": 1, "_ip": "10.0.0.1"},
        )  # fmt: skip
        collect(
            db.admin, PROJECT, "source", {"_device_id": "d", "_session_id": "s", "_referrer": "r", "_user_agent": "a"}
        )
        (db.flush if start == 0 else db.tick)()
    db.admin.execute(
        f"INSERT INTO {table} (_received_at, words) SELECT '2026-02-01'::timestamptz + g * interval '1 second', 'old'"
        " FROM generate_series(1, 1000) g"
    )
    wait_until(lambda: has_column(db.admin, table, "other_name"), "column other_name")
    return table


def columns_of(db: Database, table: str) -> dict[str, str]:
    return dict(
        db.all(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute"
            " WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            table,
        )
    )


def twin(db: Database, source: str, collection: str, project: str = PROJECT) -> str:
    fields = {name: kind for name, kind in columns_of(db, source).items() if not name.startswith("_")}
    return make(db, collection, fields, project)


@pytest.mark.parametrize("form", ["text", "csv", "binary"])
def test_copy_out_and_in_again(db, admin, source, form):
    names = ", ".join(columns_of(db, source))
    copied = twin(db, source, f"copied_{form}")
    data = copy_out(admin, f"COPY (SELECT {names} FROM {source}) TO STDOUT (FORMAT {form})")
    copy_in(admin, f"COPY {copied} ({names}) FROM STDIN (FORMAT {form})", data)
    for step in (None, db.tick, db.flush):
        if step:
            step()
        assert difference(db.admin, source, copied, names) == []
    assert count(db.admin, copied) == 1_200 + 8 + 1_000


def test_copy_of_the_table_itself_is_for_heap_tables(admin, source):
    with refused("42809", hint="COPY (SELECT ...) TO"):
        copy_out(admin, f"COPY {source} TO STDOUT")


def test_pg_dump_of_a_collection(db, cluster, source):
    """The rows of one collection, from one database into another that has the collection."""
    names = ", ".join(columns_of(db, source))
    dump = cluster.make_folder("bulk_dump") / "source.sql"
    cluster.run(
        "pg_dump", "--data-only", "--include-foreign-data=rakam", f"--table={source}", "-f", dump, db.name,
        env=cluster.environment(),
    )  # fmt: skip
    elsewhere = Database(cluster, "test_bulk_elsewhere").create()
    try:
        # Roles are the cluster's: another prefix for the second database.
        elsewhere.admin.execute("SET rakam.role_prefix = 'rakam_elsewhere_'")
        elsewhere.project(PROJECT)
        for name, kind in {n: k for n, k in columns_of(db, source).items() if not n.startswith("_")}.items():
            if one(elsewhere.admin, "SELECT to_regclass('acme.source') IS NULL"):
                elsewhere.admin.execute("SELECT rakam.create_collection('acme', 'source')")
            elsewhere.admin.execute("SELECT rakam.add_field('acme', 'source', %s, %s)", (name, kind))
        elsewhere.tick()
        wait_until(lambda: len(columns_of(elsewhere, source)) == len(columns_of(db, source)), "all columns")
        cluster.run("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", dump, elsewhere.name, env=cluster.environment())
        shown = ", ".join(f'"{name}"::text' for name in names.split(", "))
        for _ in range(2):
            ours, theirs = (
                sorted(map(str, database.all(f"SELECT {shown} FROM {source}"))) for database in (db, elsewhere)
            )
            assert ours == theirs
            elsewhere.flush()
    finally:
        elsewhere.close()
        with cluster.connect() as postgres:
            postgres.execute(f"DROP DATABASE {elsewhere.name} WITH (FORCE)")


# -- bounds --------------------------------------------------------------------------------------------------------------


def anonymous_mb(pid: int) -> int:
    """Memory of its own: pages of the server's shared buffers do not count."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) // 1024


def grown_mb(session: psycopg.Connection, statement: str) -> int:
    """Runs a statement; answers by how much its process grew at most meanwhile."""
    pid = session.info.backend_pid
    seen = [anonymous_mb(pid)]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(anonymous_mb(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        session.execute(statement)
    finally:
        done.set()
        watcher.join()
    return max(seen) - seen[0]


def test_memory_is_bounded(db, session, table):
    """A load of some 60 MB that hardly compresses, of rows for the inbox and for chunks, in the memory of a few chunks."""
    session.execute(f"INSERT INTO {table} (n) SELECT g FROM generate_series(1, 1000) g")
    word = " || ".join(f"md5('{n}' || g)" for n in range(16))
    grown = grown_mb(
        session,
        f"INSERT INTO {table} (_id, word) SELECT CASE WHEN g % 3 = 0 THEN g::text END, {word}"
        " FROM generate_series(1, 120000) g",
    )
    chunks, events = tiers(session, table)["chunks"]
    assert events == 1_000 + 80_000
    assert 3 <= chunks <= 6
    # A chunk of 16 MB exists about six times while it is written: columns, their message, datum, tuple.
    assert grown < 120
    session.rollback()


def test_many_targets_share_one_bound(db, keys, session):
    """Partitions that take turns: the largest buffer gives way, and no chunk is of a few rows."""
    tables = [make(db, f"crowd_{n}", {"n": "bigint"}) for n in range(12)]
    columns = ", ".join(
        f'"{name}" {kind} ' + ('COLLATE "C"' if kind == "text" else "")
        for name, kind in columns_of(db, tables[0]).items()
    )
    session.execute(f"CREATE TABLE crowd ({columns}) PARTITION BY LIST (n)")
    for n, table in enumerate(tables):
        session.execute(f"ALTER TABLE crowd ATTACH PARTITION {table} FOR VALUES IN ({n})")
    grown = grown_mb(
        session,
        "INSERT INTO crowd (n, _user) SELECT g % 12, repeat(md5(g::text), 256) FROM generate_series(1, 24000) g",
    )
    assert grown < 140
    for table in tables:
        found = tiers(session, table)
        assert found["inbox"][1] + found["chunks"][1] == 2_000
        assert found["chunks"][0] <= 5
    assert count(session, "crowd") == 24_000
    session.rollback()
