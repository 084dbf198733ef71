"""Sources: servers and what they may say, who may create sources, their life, what is read of files and topics."""

from __future__ import annotations

import json
import time

import psycopg
import pytest
from harness.database import Database, notices_of, refused, wait_until

PROJECT = "acme"


@pytest.fixture(scope="module")
def project(db):
    db.project(PROJECT)
    return PROJECT


@pytest.fixture(scope="module")
def folder(cluster, db, project):
    """A folder that is the storage `drop`, read through the server `dropped`."""
    folder = cluster.make_folder("drop")
    db.admin.execute(f"CREATE SERVER drop FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.admin.execute("CREATE SERVER dropped TYPE 'files' FOREIGN DATA WRAPPER rakam_source OPTIONS (storage 'drop')")
    return folder


def put(cluster, folder, path: str, events: list[dict]) -> None:
    """Writes an object as a whole: it appears under its name when it is complete."""
    target = folder / path
    cluster.make_folder(target.parent.relative_to(cluster.folder).as_posix())
    part = target.with_name(f".{target.name}.part")
    part.write_text("".join(json.dumps(event) + "\n" for event in events))
    part.chmod(0o644)
    part.rename(target)


def create(db, name: str, server: str, **options) -> None:
    db.admin.execute("SELECT rakam.create_source(%s, %s, %s, %s)", (PROJECT, name, server, json.dumps(options)))


def count(db, collection: str) -> int:
    try:
        return db.one(f"SELECT count(*) FROM acme.{collection}")
    except psycopg.errors.UndefinedTable:
        return 0


def offsets(db, source: str) -> list[tuple]:
    return db.all("SELECT split, next_offset::text, state FROM rakam.offsets WHERE source = %s ORDER BY 1", source)


def consumers(db) -> list[int]:
    return [pid for (pid,) in db.all("SELECT pid FROM rakam.stat_worker WHERE kind = 'consumer' ORDER BY 1")]


# -- servers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "state"),
    [
        ("kafka", "", "22023"),
        ("kafka", "\"fetch.min.bytes\" '1'", "22023"),
        ("kafka", "brokers 'a:1', \"enable.auto.commit\" 'true'", "22023"),
        ("kafka", "brokers 'a:1', \"no.such.property\" '1'", "22023"),
        ("kafka", "brokers 'a:1', \"fetch.min.bytes\" 'many'", "22023"),
        ("kafka", "brokers 'a:1', password 'x'", "22023"),
        ("kafka", "brokers 'a:1', \"plugin.library.paths\" '/tmp/x.so'", "22023"),
        ("kinesis", "endpoint 'http://127.0.0.1:1'", "22023"),
        ("kinesis", "region 'us-east-1', access_key_id 'x'", "22023"),
        ("files", "storage 'drop', prefix 'x'", "22023"),
    ],
)
def test_options_of_a_server_are_checked(db, folder, kind, options, state):
    clause = f"OPTIONS ({options})" if options else ""
    with refused(state):
        db.admin.execute(f"CREATE SERVER s TYPE '{kind}' FOREIGN DATA WRAPPER rakam_source {clause}")


def test_a_server_may_come_before_its_storage(db, project):
    """As a dump has them, in the order of their names."""
    early = "CREATE SERVER early TYPE 'files' FOREIGN DATA WRAPPER rakam_source OPTIONS (storage 'nowhere')"
    told = notices_of(db.admin, early)
    assert [(notice.severity, '"nowhere"' in notice.message) for notice in told] == [("WARNING", True)]
    with refused("42704", message="nowhere"):
        create(db, "early", "early", prefix="in", collection="c", format="json")
    db.admin.execute("DROP SERVER early")
    # There is such a server, and it is none.
    db.admin.execute("CREATE FOREIGN DATA WRAPPER other; CREATE SERVER elsewhere FOREIGN DATA WRAPPER other")
    with refused("42704", message="elsewhere"):
        db.admin.execute(early.replace("nowhere", "elsewhere"))
    db.admin.execute("DROP FOREIGN DATA WRAPPER other CASCADE")


def test_kinds_that_there_are_not(db, project):
    db.admin.execute("CREATE SERVER odd_kind TYPE 'pulsar' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers 'a:1')")
    with refused("0A000", message="pulsar", hint="kafka"):
        create(db, "odd_kind", "odd_kind", topics=["t"])
    db.admin.execute("DROP SERVER odd_kind")


def test_secrets_are_the_owners_and_are_not_shown(db):
    admin = db.admin
    admin.execute(
        "CREATE SERVER secret_k TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers '127.0.0.1:1')"
    )
    admin.execute("CREATE USER MAPPING FOR CURRENT_USER SERVER secret_k OPTIONS (username 'u', password 's3cret')")
    for options in ["brokers 'a'", "access_key_id 'x'", "\"fetch.min.bytes\" '1'"]:
        with refused("22023"):
            admin.execute(f"CREATE USER MAPPING FOR PUBLIC SERVER secret_k OPTIONS ({options})")
    member = db.login(PROJECT, "admin")
    shown = member.execute("SELECT umoptions FROM pg_user_mappings WHERE srvname = 'secret_k'").fetchall()
    assert shown == [(None,)]
    # An error of a value does not repeat it.
    with pytest.raises(psycopg.Error) as error:
        admin.execute("ALTER SERVER secret_k OPTIONS (ADD password 's3cret2')")
    assert error.value.sqlstate == "22023"
    assert "s3cret2" not in f"{error.value} {error.value.diag.message_hint}"
    admin.execute("DROP SERVER secret_k CASCADE")


def test_only_admins_make_servers(db, project):
    member = db.login(PROJECT, "admin")
    with refused("42501"):
        member.execute("CREATE SERVER s TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers 'a:1')")
    db.make_login("operator")
    db.admin.execute("GRANT rakam_admin TO operator")
    operator = db.connect("operator")
    operator.execute("CREATE SERVER ok TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers 'a:1')")
    # A file of the server is not for everybody.
    with refused("42501"):
        operator.execute("ALTER SERVER ok OPTIONS (ADD \"ssl.ca.location\" '/etc/passwd')")
    operator.execute("DROP SERVER ok")


# -- creation -------------------------------------------------------------------------------------------------------


def test_creation_is_checked(db, folder):
    call = "SELECT rakam.create_source(%s, %s, %s, %s)"
    good = json.dumps({"collection": "checked", "prefix": "nothing"})
    member = db.login(PROJECT, "admin")
    reader = db.login(PROJECT, "read", "write")
    for session, arguments, state in [
        (db.admin, (PROJECT, "s", "nowhere", good), "42704"),
        (db.admin, (PROJECT, "s", "drop", good), "42704"),
        (db.admin, ("nobody", "s", "dropped", good), "42501"),
        (reader, (PROJECT, "s", "dropped", good), "42501"),
        # The admin of the project has no USAGE on the server.
        (member, (PROJECT, "s", "dropped", good), "42501"),
        (db.admin, (PROJECT, "", "dropped", good), "42602"),
        (db.admin, (PROJECT, "x" * 64, "dropped", good), "42602"),
        (db.admin, (PROJECT, None, "dropped", good), "22004"),
        (db.admin, (PROJECT, "s", "dropped", "[]"), "22023"),
        (db.admin, (PROJECT, "s", "dropped", "{}"), "22023"),
        (db.admin, (PROJECT, "s", "dropped", json.dumps({"collection": "c", "topics": ["x"]})), "22023"),
        (db.admin, (PROJECT, "s", "dropped", json.dumps({"collection": "users"})), "42939"),
        (db.admin, (PROJECT, "s", "dropped", json.dumps({"collection": ""})), "22023"),
        (db.admin, (PROJECT, "s", "dropped", json.dumps({"collection": "x" * 64})), "42602"),
    ]:
        with refused(state):
            session.execute(call, arguments)
    db.admin.execute(f"GRANT USAGE ON FOREIGN SERVER dropped TO rakam_{PROJECT}_admin")
    member.execute(call, (PROJECT, "Checked", "dropped", good))
    with refused("42710"):
        member.execute(call, (PROJECT, "checked", "dropped", good))
    seen = "SELECT source, kind, server, paused FROM rakam.sources WHERE source = 'checked'"
    assert reader.execute(seen).fetchall() == [("checked", "files", "dropped", False)]
    db.project("other")
    stranger = db.login("other", "admin")
    for view in ["sources", "offsets", "stat_source"]:
        assert stranger.execute(f"SELECT count(*) FROM rakam.{view}").fetchone() == (0,)
    for function in ["pause_source", "resume_source", "drop_source"]:
        with refused("42501"):
            stranger.execute(f"SELECT rakam.{function}(%s, 'checked')", (PROJECT,))
        with refused("42501"):
            reader.execute(f"SELECT rakam.{function}(%s, 'checked')", (PROJECT,))
        with refused("42704"):
            member.execute(f"SELECT rakam.{function}(%s, 'unknown')", (PROJECT,))
    with refused("42501"):
        stranger.execute("SELECT rakam.seek_source(%s, 'checked', 'earliest')", (PROJECT,))
    with refused("42704"):
        member.execute("SELECT rakam.seek_source(%s, 'unknown', 'earliest')", (PROJECT,))
    with refused("22023"):
        member.execute("SELECT rakam.seek_source(%s, 'checked', 'somewhere')", (PROJECT,))
    member.execute("SELECT rakam.drop_source(%s, 'checked')", (PROJECT,))
    calls = db.all("SELECT call, outcome FROM rakam.audit_log WHERE object = 'checked' AND outcome = 'ok' ORDER BY at")
    assert ("drop_source", "ok") in calls


def test_a_source_may_have_an_odd_name(db, project):
    name = 'It\'s "Ödd", $1; --%s\\'
    db.admin.execute("CREATE SERVER odd TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers '127.0.0.1:1')")
    options = {"topics": ["t"], "format": "avro", "framing": "confluent"}
    create(db, f" {name} ", "odd", **options)
    # Letters of ASCII are the same in any case, wherever a source is named.
    noted = 'it\'s "Ödd", $1; --%s\\'
    assert db.one("SELECT source FROM rakam.sources WHERE server = 'odd'") == noted
    with refused("42710"):
        create(db, noted, "odd", **options)
    schema = '{"type": "record", "name": "e", "fields": [{"name": "n", "type": "long"}]}'
    db.admin.execute("SELECT rakam.register_avro_schema(%s, %s, 1, %s)", (PROJECT, name, schema))
    assert db.one("SELECT rakam.replay_dead_letters(%s, %s)", PROJECT, name) == 0
    for call in ("pause_source", "resume_source"):
        db.admin.execute(f"SELECT rakam.{call}(%s, %s)", (PROJECT, name))
    with refused("2BP01"):
        db.admin.execute("DROP SERVER odd")
    db.admin.execute("SELECT rakam.drop_source(%s, %s)", (PROJECT, name))
    with refused("42704"):
        db.admin.execute("SELECT rakam.replay_dead_letters(%s, %s)", (PROJECT, name))
    db.admin.execute("DROP SERVER odd")


def test_a_rolled_back_source_is_none(db, folder):
    session = db.connect(autocommit=False)
    session.execute(
        "SELECT rakam.create_source(%s, 'undone', 'dropped', %s)", (PROJECT, json.dumps({"collection": "undone"}))
    )
    session.rollback()
    assert db.one("SELECT count(*) FROM rakam.sources WHERE source = 'undone'") == 0


def test_a_server_in_use_stays_and_may_be_renamed(db, cluster, folder):
    db.admin.execute("CREATE SERVER used TYPE 'files' FOREIGN DATA WRAPPER rakam_source OPTIONS (storage 'drop')")
    create(db, "user", "used", collection="of_used", prefix="used")
    with refused("2BP01"):
        db.admin.execute("DROP SERVER used")
    db.admin.execute("ALTER SERVER used RENAME TO renamed")
    assert db.one("SELECT server FROM rakam.sources WHERE source = 'user'") == "renamed"
    put(cluster, folder, "used/a.ndjson", [{"n": 1}])
    wait_until(lambda: count(db, "of_used") == 1, "an event read through the renamed server")
    db.admin.execute("DROP SERVER renamed CASCADE")
    assert db.one("SELECT server FROM rakam.sources WHERE source = 'user'") is None
    error = "SELECT last_error FROM rakam.stat_source WHERE source = 'user' AND last_error IS NOT NULL"
    wait_until(lambda: db.all(error), "the missing server is told")
    db.admin.execute("SELECT rakam.drop_source(%s, 'user')", (PROJECT,))


# -- files ----------------------------------------------------------------------------------------------------------


def test_each_object_is_read_once(db, cluster, folder):
    for n in range(20):
        put(cluster, folder, f"once/a{n:02}.ndjson", [{"file": n, "row": row} for row in range(50)])
    create(db, "once", "dropped", collection="once", prefix="once")
    wait_until(lambda: count(db, "once") == 1_000, "all rows")
    wait_until(lambda: {state for _, _, state in offsets(db, "once")} == {"ended"}, "all objects at their ends")
    assert [(split, n) for split, n, _ in offsets(db, "once")] == [(f"once/a{n:02}.ndjson", "50") for n in range(20)]
    db.configure(source_refresh="200ms")
    put(cluster, folder, "once/later/b.ndjson", [{"file": 99, "row": 0}])
    wait_until(lambda: count(db, "once") == 1_001, "the object that came later")
    assert db.one("SELECT count(DISTINCT (file, row)) FROM acme.once") == 1_001
    db.configure(source_refresh=None)


def test_dead_letters_of_csv_are_tried_again(db, cluster, folder):
    """Rows that are none for their file, that are too large, and that a mapper refuses: each once what was wrong is mended."""
    db.configure(source_refresh="200ms", max_event_bytes="20kB")
    db.admin.execute(
        "CREATE FUNCTION acme.picky(event jsonb) RETURNS jsonb LANGUAGE plpgsql AS"
        " $$BEGIN IF event->>'name' = 'bad' THEN RAISE 'picky'; END IF; RETURN event; END$$"
    )
    db.admin.execute("SELECT rakam.set_mapper(%s, 'rows', 'acme.picky(jsonb)')", (PROJECT,))
    large, huge = "y" * 15_000, "z" * 45_000
    rows = [
        "n;name;at;long;more",
        "1;one;2026-01-02;;",
        "2;two;2026-01-03;only four",
        f'3;"th""ree";2026-01-04;{large};{large}',
        f"4;four;2026-01-05;{huge};{huge}",
        "5;bad;2026-01-06;;",
    ]
    cluster.make_folder("drop/rows")
    (folder / "rows/.a.part").write_text("\n".join(rows) + "\n")
    (folder / "rows/.a.part").chmod(0o644)
    (folder / "rows/.a.part").rename(folder / "rows/a.csv")
    create(db, "rows", "dropped", collection="rows", prefix="rows", options={"delimiter": ";"})
    wait_until(lambda: count(db, "rows") == 1, "the good row")
    letters = "SELECT off::int, error FROM rakam.dead_letter WHERE source = 'rows' ORDER BY off NULLS LAST"
    before = db.all(letters)
    assert [line for line, _ in before] == [3, 4, 5, None]
    replay = "SELECT rakam.replay_dead_letters(%s, 'rows')"
    assert db.one(replay, PROJECT) == 0
    # Nothing was mended: what is wrong is still told as it was.
    assert db.all(letters)[0] == before[0] == (3, "expected 5 columns, found 4 (SQLSTATE 22P04)")
    db.configure(max_event_bytes=None)
    assert db.one(replay, PROJECT) == 2
    db.admin.execute("SELECT rakam.set_mapper(%s, 'rows', NULL)", (PROJECT,))
    assert db.one(replay, PROJECT) == 1
    db.tick()
    found = db.all("SELECT n::int, name, at::text, length(long), length(more) FROM acme.rows ORDER BY n")
    assert found == [
        (1, "one", "2026-01-02", None, None),
        (3, 'th"ree', "2026-01-04", 15_000, 15_000),
        (4, "four", "2026-01-05", 45_000, 45_000),
        (5, "bad", "2026-01-06", None, None),
    ]
    db.admin.execute(
        "UPDATE rakam_internal.dead_letter SET payload = convert_to('2;two;2026-01-03;a;b', 'UTF8') WHERE source = 'rows'"
    )
    assert db.one(replay, PROJECT) == 1
    assert count(db, "rows") == 5
    db.admin.execute("SELECT rakam.drop_source(%s, 'rows')", (PROJECT,))
    db.configure(source_refresh=None)


def test_dead_letters_of_another_kind_of_source_stay(db, cluster, folder):
    """A source made anew under the name of another: what it cannot read again stays, with the reason, and ends nothing."""
    db.configure(source_refresh="200ms")
    cluster.make_folder("drop/kind")
    (folder / "kind/.a.part").write_text("n,name\n1,one\n2\n")
    (folder / "kind/.a.part").chmod(0o644)
    (folder / "kind/.a.part").rename(folder / "kind/a.csv")
    create(db, "kind", "dropped", collection="kind", prefix="kind")
    wait_until(lambda: count(db, "kind") == 1, "the good row")
    db.admin.execute("SELECT rakam.drop_source(%s, 'kind')", (PROJECT,))
    db.admin.execute(
        "CREATE SERVER away TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers '127.0.0.1:1')"
    )
    create(db, "kind", "away", topics=["kind"])
    assert db.one("SELECT rakam.replay_dead_letters(%s, 'kind')", PROJECT) == 0
    [(error,)] = db.all("SELECT error FROM rakam.dead_letter WHERE source = 'kind'")
    assert error == "the source names no collection for the rows of files (SQLSTATE 22P04)"
    db.admin.execute("SELECT rakam.drop_source(%s, 'kind')", (PROJECT,))
    db.admin.execute("DROP SERVER away")
    db.configure(source_refresh=None)


def test_names_of_columns_with_nul_characters(db, cluster, folder):
    """No text of Postgres has them: the rows are dead letters, and the source goes on."""
    db.configure(source_refresh="200ms")
    cluster.make_folder("drop/nul")
    (folder / "nul/.a.part").write_bytes(b"a,b\0c\n1,2\n1,2,3\n")
    (folder / "nul/.a.part").chmod(0o644)
    (folder / "nul/.a.part").rename(folder / "nul/a.csv")
    create(db, "nul", "dropped", collection="nul", prefix="nul")
    letters = (
        "SELECT count(*) FROM rakam.dead_letter WHERE source = 'nul' AND (error LIKE '%NUL%' OR error LIKE '%columns%')"
    )
    wait_until(lambda: db.one(letters) == 2, "the rows are told")
    put(cluster, folder, "nul/b.ndjson", [{"n": 1}])
    wait_until(lambda: count(db, "nul") == 1, "the next object")
    db.wait_column("acme.nul", "n")
    with refused("22P05"):
        db.admin.execute(f"SELECT rakam.copy_from('acme', 'nul2', 'file://{folder}/nul/a.csv')")
    db.admin.execute("SELECT rakam.drop_source(%s, 'nul')", (PROJECT,))
    db.configure(source_refresh=None)


def test_an_object_that_comes_while_the_source_is_being_changed(db, cluster, folder):
    db.configure(source_refresh="200ms")
    put(cluster, folder, "held/a.ndjson", [{"n": 1}])
    create(db, "held", "dropped", collection="held", prefix="held")
    wait_until(lambda: count(db, "held") == 1, "the first object")
    session = db.connect(autocommit=False)
    session.execute("SELECT rakam.resume_source(%s, 'held')", (PROJECT,))
    put(cluster, folder, "held/b.ndjson", [{"n": 2}])
    time.sleep(2)
    session.rollback()
    wait_until(lambda: count(db, "held") == 2, "the second object", 20)
    db.admin.execute("SELECT rakam.drop_source(%s, 'held')", (PROJECT,))
    db.configure(source_refresh=None)


def test_a_paused_source_waits_and_goes_on(db, cluster, folder):
    db.configure(source_refresh="200ms")
    create(db, "paused", "dropped", collection="paused", prefix="paused")
    put(cluster, folder, "paused/a.ndjson", [{"n": 1}])
    wait_until(lambda: count(db, "paused") == 1, "the first object")
    db.admin.execute("SELECT rakam.pause_source(%s, 'paused')", (PROJECT,))
    put(cluster, folder, "paused/b.ndjson", [{"n": 2}])
    # Another source, which sees its object meanwhile.
    create(db, "beside", "dropped", collection="beside", prefix="beside")
    put(cluster, folder, "beside/a.ndjson", [{"n": 1}])
    wait_until(lambda: count(db, "beside") == 1, "the other source goes on")
    assert count(db, "paused") == 1
    db.admin.execute("SELECT rakam.resume_source(%s, 'paused')", (PROJECT,))
    wait_until(lambda: count(db, "paused") == 2, "the second object")
    for name in ["paused", "beside"]:
        db.admin.execute("SELECT rakam.drop_source(%s, %s)", (PROJECT, name))
    db.configure(source_refresh=None)


def test_files_of_a_mapped_collection_are_stored(db, cluster, folder):
    db.admin.execute("""CREATE FUNCTION acme.doubled(event jsonb) RETURNS jsonb LANGUAGE sql
                        AS $$ SELECT jsonb_set(event, '{n}', to_jsonb((event->>'n')::int * 2)) $$""")
    db.admin.execute("SELECT rakam.set_mapper('acme', 'mapped', 'acme.doubled(jsonb)')")
    put(cluster, folder, "mapped/a.ndjson", [{"n": n} for n in range(10)])
    create(db, "mapped", "dropped", prefix="mapped", collection="mapped")
    wait_until(lambda: count(db, "mapped") == 10, "the object's events")
    db.wait_column("acme.mapped", "n")
    assert db.one("SELECT sum(n) FROM acme.mapped") == 90
    db.admin.execute("SELECT rakam.drop_source('acme', 'mapped')")


def test_no_consumer_without_sources(db):
    for (name,) in db.all("SELECT source FROM rakam.sources"):
        db.admin.execute("SELECT rakam.drop_source(%s, %s)", (PROJECT, name))
    wait_until(lambda: consumers(db) == [], "the consumers end")


def test_sources_go_with_their_project(db, folder):
    db.project("passing")
    db.admin.execute(
        "SELECT rakam.create_source('passing', 'gone', 'dropped', %s)",
        (json.dumps({"collection": "c", "prefix": "c"}),),
    )
    wait_until(lambda: consumers(db), "a consumer comes")
    db.admin.execute("SET rakam.allow_project_drop = on")
    db.admin.execute("SELECT rakam.drop_project('passing')")
    db.admin.execute("RESET rakam.allow_project_drop")
    assert db.one("SELECT count(*) FROM rakam_internal.source") == 0
    assert (
        db.one(
            "SELECT count(*) FROM pg_foreign_table JOIN pg_foreign_server s ON s.oid = ftserver WHERE srvname = 'dropped'"
        )
        == 0
    )
    wait_until(lambda: consumers(db) == [], "the consumers end")


def test_a_dump_carries_sources_and_how_far_they_are(db, cluster, folder):
    put(cluster, folder, "dumped/a.ndjson", [{"n": n} for n in range(10)])
    create(db, "dumped", "dropped", collection="dumped", prefix="dumped")
    wait_until(lambda: {state for _, _, state in offsets(db, "dumped")} == {"ended"}, "the object is read")
    target = Database(cluster, "sources_restored")
    target.drop()
    target.create(extension=False)
    archive = cluster.folder / "sources.dump"
    cluster.run("pg_dump", "-Fc", "-f", archive, db.name, env=cluster.environment())
    cluster.run("pg_restore", "-d", "sources_restored", archive, env=cluster.environment())
    assert offsets(target, "dumped") == offsets(db, "dumped")
    assert target.one("SELECT server FROM rakam.sources WHERE source = 'dumped'") == "dropped"
    with refused("2BP01"):
        target.admin.execute("DROP SERVER dropped")
    # What was read before the dump is not read again, what comes after it is.
    target.configure(source_refresh="200ms")
    put(cluster, folder, "dumped/b.ndjson", [{"n": 10}])
    for database in [db, target]:
        wait_until(lambda database=database: count(database, "dumped") == 11, "the object that came later")
    assert target.one("SELECT count(DISTINCT n) FROM acme.dumped") == 11
    target.configure(source_refresh=None)
    target.drop()
    db.admin.execute("SELECT rakam.drop_source(%s, 'dumped')", (PROJECT,))
