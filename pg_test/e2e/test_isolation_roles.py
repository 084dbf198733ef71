"""Projects do not see each other. Hostile statements, each as a role that has no right to what it asks for: no row, value
or count of project `acme` comes back, in a result, a notice, an error or a plan, and nobody is stopped meanwhile.

`mallory` is a member of all three roles of project `evil`, `acme_writer` may only write to `acme`, `nobody` is a member of
nothing, `pooled` is the login role of a connection pool that knows keys.
"""

from __future__ import annotations

import re
import threading
import time

import psycopg
import pytest
from harness.database import collect, collect_batch, one, refused, wait_until

# What must never show. The numbers are the victim's count and sum, chosen to occur nowhere else.
EVENTS = 1_237
MARKER = "topsecret"
TRACES = re.compile(rf"{MARKER}|(?<![\d.])(?:{EVENTS}|{EVENTS * 7_919})(?!\d)")


@pytest.fixture(scope="module")
def world(db):
    """Two projects, events of the victim in every tier, a forged foreign table over them, the hostile logins."""
    keys = db.project("acme")
    db.project("evil")
    batch = [("pageview", {"_user": f"{MARKER}-{n}", "amount": 7_919, "page": MARKER}) for n in range(EVENTS - 10)]
    for start in range(0, len(batch), 400):
        collect_batch(db.admin, "acme", batch[start : start + 400])
        if start == 400:
            db.flush("acme")
    db.tick()
    for _ in range(10):
        collect(db.admin, "acme", "pageview", {"_user": f"{MARKER}-x", "amount": 7_919, "page": MARKER})
    collect(db.admin, "acme", "pageview_bad", {"amount": 1})
    db.tick()
    collect(db.admin, "acme", "pageview_bad", {"amount": MARKER})
    collect(db.admin, "evil", "clicks", {"_user": "mine", "n": 1})
    db.tick()
    db.admin.execute("INSERT INTO acme.users (id) VALUES (%s)", (MARKER,))
    server = db.one("SELECT srvname FROM pg_foreign_table t JOIN pg_foreign_server s ON s.oid = ftserver"
                    " WHERE ftrelid = 'acme.pageview'::regclass")  # fmt: skip
    sessions = {
        "mallory": db.login("evil", "read", "write", "admin", name="login_mallory"),
        "acme_writer": db.login("acme", "write", name="login_acme_writer"),
    }
    for name in ("nobody", "pooled"):
        db.make_login(f"login_{name}")
        sessions[name] = db.connect(f"login_{name}")
    # Forging needs USAGE on the server; give it to the attackers, so that what protects is the extension.
    db.admin.execute(f"GRANT USAGE ON FOREIGN SERVER {server} TO PUBLIC")
    db.admin.execute("CREATE SCHEMA play; GRANT ALL ON SCHEMA play TO PUBLIC")
    sessions["mallory"].execute(
        f"""
        CREATE FOREIGN TABLE play.forged (_time timestamptz, _user text, amount float8, page text)
          SERVER {server} OPTIONS (project 'acme', collection 'pageview');
        CREATE FOREIGN TABLE play.forged_all (_collection text, _time timestamptz, _user text, _id text,
          _received_at timestamptz, properties jsonb) SERVER {server} OPTIONS (project 'acme', collection '_all');
        CREATE FOREIGN TABLE play.forged_types (_user bytea, amount text, _xid bigint) SERVER {server}
          OPTIONS (project 'acme', collection 'pageview');
        CREATE FOREIGN TABLE play.unknown (_time timestamptz, _user text, amount float8, page text)
          SERVER {server} OPTIONS (project 'no_such', collection 'pageview');
        CREATE VIEW play.forged_view AS SELECT * FROM play.forged;
        CREATE FUNCTION play.definer() RETURNS bigint LANGUAGE sql SECURITY DEFINER AS 'SELECT count(*) FROM play.forged';
        CREATE FUNCTION play.tell(text) RETURNS boolean LANGUAGE plpgsql COST 0.0001 AS
          $$ BEGIN RAISE NOTICE 'saw %', $1; RETURN true; END $$;
        GRANT ALL ON ALL TABLES IN SCHEMA play TO PUBLIC;
        """
    )
    # mallory cannot even name the table; somebody else made this view and gave it away.
    db.admin.execute(
        "CREATE VIEW play.direct_view AS SELECT * FROM acme.pageview; ALTER VIEW play.direct_view OWNER TO login_mallory"
    )
    return {"keys": keys, "server": server, "sessions": sessions}


def outcome(session: psycopg.Connection, statement: str) -> tuple[str | None, list[tuple], str]:
    """(SQLSTATE of the error or None, rows, everything that was told as text)."""
    told: list[str] = []

    def note(diagnostics) -> None:
        told.append(f"{diagnostics.message_primary} {diagnostics.message_detail} {diagnostics.message_hint}")

    session.add_notice_handler(note)
    rows: list[tuple] = []
    sqlstate = None
    try:
        cursor = session.cursor()
        if statement.startswith("COPY") and statement.endswith("STDOUT"):
            with cursor.copy(statement) as copy:
                rows += copy.rows()
        else:
            cursor.execute(statement)
            while True:
                if cursor.description:
                    rows += cursor.fetchall()
                if not cursor.nextset():
                    break
    except psycopg.Error as error:
        sqlstate = error.sqlstate
        told.append(f"{error} {error.diag.message_detail} {error.diag.message_hint} {error.diag.context}")
    finally:
        session.remove_notice_handler(note)
        if session.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
            session.rollback()
        session.execute("RESET ALL")
        session.execute("RESET ROLE")
    return sqlstate, rows, " ".join(told)


def leaks(statement: str, rows: list[tuple], told: str) -> list[str]:
    shown = " ".join(str(cell) for row in rows for cell in row) + " " + told.replace(statement, "")
    return TRACES.findall(shown)


# Statements as (who, statement, what must come of it): a SQLSTATE; "none": no rows or only zeros and NULLs; "quiet": it may
# work, but shows nothing of acme; "error": any error. {server} is the foreign server of the collections' tables.
HOSTILE = [
    # Directly.
    ("mallory", "SELECT * FROM acme.pageview", "42501"),
    ("mallory", "SELECT count(*) FROM acme.pageview", "42501"),
    ("mallory", "SELECT 1 FROM acme.pageview LIMIT 1", "42501"),
    ("mallory", "SELECT tableoid, ctid FROM acme.pageview", "42501"),
    ("mallory", "SELECT * FROM acme._all", "42501"),
    ("mallory", "SELECT * FROM acme.users", "42501"),
    # A foreign key is looked up as the owner of the table it refers to, through casts of whoever made it.
    ("mallory", "CREATE TABLE evil.refers (u text REFERENCES evil.users (id))", "42501"),
    ("nobody", "SELECT rakam_internal.installed()", "42501"),
    ("mallory", "SET search_path = acme, public; SELECT * FROM pageview", "42P01"),
    ("mallory", "COPY acme.pageview TO STDOUT", "42501"),
    ("mallory", "COPY (SELECT * FROM acme.pageview) TO STDOUT", "42501"),
    ("mallory", "EXPLAIN SELECT * FROM acme.pageview", "42501"),
    ("mallory", "EXPLAIN (ANALYZE, VERBOSE) SELECT * FROM acme.pageview", "42501"),
    ("mallory", "BEGIN; LOCK TABLE acme.pageview", "42501"),
    ("mallory", "ANALYZE acme.pageview", "quiet"),
    ("mallory", "DECLARE c CURSOR WITH HOLD FOR SELECT * FROM acme.pageview", "42501"),
    ("mallory", "PREPARE steal AS SELECT * FROM acme.pageview; EXECUTE steal", "42501"),
    ("mallory", "DO $$ BEGIN PERFORM count(*) FROM acme.pageview; END $$", "42501"),
    ("mallory", "SELECT * FROM evil.clicks c WHERE EXISTS (SELECT FROM acme.pageview p WHERE p._user > c._user)", "42501"),
    ("mallory", "INSERT INTO evil.users (id) SELECT DISTINCT _user FROM acme.pageview", "42501"),
    ("mallory", "SELECT * FROM play.direct_view", "42501"),
    ("mallory", "INSERT INTO acme.pageview (_user) VALUES ('x')", "42501"),
    ("mallory", "UPDATE acme.pageview SET _user = 'x'", "42501"),
    ("mallory", "DELETE FROM acme.pageview", "42501"),
    ("mallory", "TRUNCATE acme.pageview", "42501"),
    ("mallory", "DROP FOREIGN TABLE acme.pageview", "42501"),
    ("mallory", "ALTER FOREIGN TABLE acme.pageview OPTIONS (SET project 'evil')", "42501"),
    ("mallory", "ALTER FOREIGN TABLE acme.pageview ADD COLUMN mine text", "42501"),
    ("mallory", "CREATE TABLE acme.mine (x int)", "42501"),
    ("mallory", "CREATE TRIGGER t AFTER INSERT ON acme.users FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()", "42501"),
    ("mallory", "ALTER SCHEMA acme RENAME TO mine", "42501"),
    ("mallory", "ALTER DEFAULT PRIVILEGES IN SCHEMA acme GRANT SELECT ON TABLES TO login_mallory", "quiet"),
    ("mallory", "ALTER TABLE play.forged INHERIT acme.pageview", "42501"),
    # Calls that name the other project.
    ("mallory", "SELECT rakam.collect('acme', 'pageview', '{}')", "42501"),
    ("mallory", "SELECT rakam.collect_batch('acme', '[]'::text)", "42501"),
    ("mallory", "SELECT rakam.collect_batch('acme', '[]'::jsonb)", "42501"),
    ("mallory", "SELECT rakam.create_collection('acme', 'mine')", "42501"),
    ("mallory", "SELECT rakam.add_field('acme', 'pageview', 'mine', 'text')", "42501"),
    ("mallory", "SELECT * FROM rakam.flush('acme')", "42501"),
    ("mallory", "SELECT * FROM rakam.flush('acme', 'pageview')", "42501"),
    ("mallory", "SELECT * FROM rakam.flush()", "quiet"),
    ("mallory", "SELECT rakam.tick()", "quiet"),
    ("mallory", "SELECT * FROM rakam.create_keys('acme')", "42501"),
    ("mallory", "SELECT rakam.revoke_keys('acme', '00000000-0000-0000-0000-000000000000')", "42501"),
    ("mallory", "SELECT * FROM rakam.create_project('third')", "42501"),
    ("mallory", "SELECT rakam.drop_project('acme')", "42501"),
    ("mallory", "SELECT rakam.drop_project('evil')", "42501"),
    ("nobody", "SELECT rakam.collect('acme', 'pageview', '{}')", "42501"),
    ("nobody", "SELECT rakam.collect('evil', 'clicks', '{}')", "42501"),
    ("nobody", "SELECT rakam.tick()", "42501"),
    ("nobody", "SELECT * FROM acme.pageview", "42501"),
    # What the extension shows about itself.
    ("mallory", "SELECT * FROM rakam.projects WHERE project <> 'evil'", "none"),
    ("mallory", "SELECT * FROM rakam.keys WHERE project <> 'evil'", "none"),
    ("mallory", "SELECT * FROM rakam.collections WHERE project <> 'evil'", "none"),
    ("mallory", "SELECT * FROM rakam.fields WHERE project <> 'evil'", "none"),
    ("mallory", "SELECT * FROM rakam.data_files WHERE project <> 'evil'", "none"),
    ("mallory", "SELECT * FROM rakam.invalid_value", "none"),
    ("mallory", "SELECT * FROM rakam.dead_letter", "none"),
    ("mallory", "SELECT * FROM rakam.stat_collection WHERE project <> 'evil'", "none"),
    ("mallory", "SELECT * FROM rakam.stat_worker", "quiet"),
    ("mallory", "SELECT * FROM rakam.stat_progress", "quiet"),
    ("mallory", "SELECT * FROM rakam.health()", "quiet"),
    ("nobody", "SELECT * FROM rakam.projects", "none"),
    ("nobody", "SELECT * FROM rakam.stat_collection", "none"),
    ("nobody", "SELECT * FROM rakam.data_files", "none"),
    # Forged foreign tables.
    ("mallory", "SELECT * FROM play.forged", "none"),
    ("mallory", "SELECT count(*), sum(amount) FROM play.forged", "none"),
    ("mallory", "SELECT * FROM play.forged_all", "none"),
    ("mallory", "SELECT * FROM play.forged_types", "none"),
    ("mallory", "SELECT * FROM play.forged_view", "none"),
    ("mallory", "SELECT play.definer()", "none"),
    ("mallory", "SELECT * FROM play.forged WHERE play.tell(_user)", "none"),
    ("mallory", "SELECT * FROM play.forged WHERE _user = 'topsecret-1' OR 1 / (amount - 7919)::int = 1", "none"),
    ("mallory", "SELECT * FROM play.forged, evil.clicks WHERE play.tell(forged._user || clicks._user)", "none"),
    ("mallory", "SET row_security = off; SELECT * FROM play.forged", "quiet"),
    ("mallory", "SET enable_seqscan = off; SET rakam.enable_pushdown = off; SELECT count(*) FROM play.forged", "none"),
    ("mallory", "CREATE MATERIALIZED VIEW play.kept AS SELECT * FROM play.forged; SELECT * FROM play.kept", "none"),
    ("mallory", "CREATE TABLE play.copied AS SELECT * FROM play.forged; SELECT * FROM play.copied", "none"),
    ("mallory", "COPY (SELECT * FROM play.forged) TO STDOUT", "quiet"),
    ("mallory", "EXPLAIN (ANALYZE, VERBOSE) SELECT * FROM play.forged", "quiet"),
    ("mallory", "ANALYZE play.forged; SELECT reltuples FROM pg_class WHERE oid = 'play.forged'::regclass", "quiet"),
    ("mallory", "SELECT * FROM pg_stats WHERE schemaname IN ('play', 'acme', 'rakam_internal')", "quiet"),
    ("mallory", "SELECT relname, reltuples FROM pg_class WHERE relnamespace = 'acme'::regnamespace", "quiet"),
    ("mallory", "ALTER FOREIGN TABLE play.unknown OPTIONS (SET project 'acme'); SELECT * FROM play.unknown", "none"),
    ("mallory", "ALTER FOREIGN TABLE play.unknown OPTIONS (SET project 'ACME '); SELECT * FROM play.unknown", "quiet"),
    ("mallory", "CREATE FOREIGN TABLE play.mixed (_user text) SERVER {server} OPTIONS (project 'evil', collection 'pageview');"
                " SELECT * FROM play.mixed", "none"),
    ("mallory", "CREATE FOREIGN TABLE pg_temp.temporary (_user text) SERVER {server}"
                " OPTIONS (project 'acme', collection 'pageview'); SELECT * FROM pg_temp.temporary", "quiet"),
    ("mallory", "IMPORT FOREIGN SCHEMA acme FROM SERVER {server} INTO play", "error"),
    ("mallory", "INSERT INTO play.forged (_user) VALUES ('x')", "42501"),
    ("mallory", "INSERT INTO play.mixed (_user) VALUES ('x')", "error"),
    ("mallory", "COPY play.forged (_user) FROM PROGRAM 'echo x'", "42501"),
    ("nobody", "SELECT * FROM play.forged", "none"),
    ("nobody", "SELECT * FROM play.forged_view", "none"),
    ("nobody", "SELECT play.definer()", "none"),
    ("nobody", "INSERT INTO play.forged (_user) VALUES ('x')", "42501"),
    # Writing is not reading.
    ("acme_writer", "SELECT * FROM acme.pageview", "42501"),
    ("acme_writer", "SELECT count(*) FROM acme._all", "42501"),
    ("acme_writer", "SELECT * FROM play.forged", "none"),
    ("acme_writer", "SELECT * FROM play.forged_all", "none"),
    ("acme_writer", "INSERT INTO acme.pageview (page) SELECT _user FROM acme.pageview", "42501"),
    ("acme_writer", "SELECT value FROM rakam.invalid_value", "none"),
    ("acme_writer", "SELECT payload FROM rakam.dead_letter", "none"),
    ("acme_writer", "SELECT rakam.create_collection('acme', 'mine')", "42501"),
    ("acme_writer", "SELECT * FROM rakam.flush('acme')", "42501"),
    ("acme_writer", "SELECT * FROM rakam.create_keys('acme')", "42501"),
    ("acme_writer", "INSERT INTO play.forged (_user) VALUES ('x')", "42501"),
    # Becoming somebody else.
    ("mallory", "SET ROLE rakam_acme_read", "42501"),
    ("mallory", "SET ROLE postgres", "42501"),
    ("mallory", "SET SESSION AUTHORIZATION rakam_acme_read", "42501"),
    ("mallory", "GRANT rakam_acme_read TO login_mallory", "42501"),
    ("mallory", "ALTER ROLE rakam_acme_read LOGIN", "42501"),
    ("mallory", "CREATE ROLE rakam_acme_owner IN ROLE rakam_acme_read", "42501"),
    ("mallory", "SELECT rakam.authenticate('rk_r_00000000000000000000000000000000')", "28000"),
    ("mallory", "SELECT rakam.authenticate('')", "28000"),
    # Settings, the server, the extension itself.
    ("mallory", "SET rakam.failpoint = 'flush=error'", "42501"),
    ("mallory", "SET rakam.role_prefix = 'x'", "42501"),
    ("mallory", "SET rakam.allow_project_drop = on; SELECT rakam.drop_project('acme')", "42501"),
    ("mallory", "SET rakam.memory_limit = '1TB'", "42501"),
    ("mallory", "ALTER SYSTEM SET rakam.threads = 0", "42501"),
    ("mallory", "SELECT pg_read_file('postgresql.conf')", "42501"),
    ("mallory", "COPY play.copied FROM '/etc/passwd'", "42501"),
    ("mallory", "DROP EXTENSION rakam CASCADE", "42501"),
    ("mallory", "CREATE FUNCTION rakam.evil() RETURNS int LANGUAGE sql AS 'SELECT 1'", "42501"),
    ("mallory", "CREATE OR REPLACE FUNCTION rakam_internal.readable_projects(x name) RETURNS SETOF int LANGUAGE sql AS 'SELECT 1'", "42501"),
    ("mallory", "CREATE SERVER mine FOREIGN DATA WRAPPER rakam OPTIONS (url 'file:///')", "42501"),
    ("mallory", "ALTER SERVER {server} OPTIONS (ADD url 'file:///')", "42501"),
    ("mallory", "SELECT pg_terminate_backend(pid) FROM rakam.stat_worker WHERE pid IS NOT NULL", "quiet"),
    ("mallory", "SELECT query FROM pg_stat_activity", "quiet"),
]  # fmt: skip


def test_there_are_enough_statements():
    assert len(HOSTILE) >= 80


@pytest.mark.parametrize(("who", "statement", "expected"), HOSTILE, ids=[f"{n:03}" for n in range(len(HOSTILE))])
def test_hostile_statement(db, world, who, statement, expected):
    statement = statement.replace("{server}", world["server"])
    sqlstate, rows, told = outcome(world["sessions"][who], statement)
    assert leaks(statement, rows, told) == [], f"{who}: {statement}: {told}"
    if expected == "none":
        assert sqlstate is None, told
        assert all(cell in (None, 0) for row in rows for cell in row), rows[:3]
    elif expected == "error":
        assert sqlstate is not None, rows
    elif expected != "quiet":
        assert sqlstate == expected, f"{sqlstate}: {told or rows[:3]}"


def test_the_world_is_what_the_tests_believe(db, world):
    """The owner of the forged table sees the events once it is a member: the forged tables above were not simply broken."""
    both = db.login("acme", "read", name="login_honest")
    assert both.execute("SELECT count(*), sum(amount) FROM play.forged").fetchone()[0] >= EVENTS
    assert one(both, "SELECT count(*) FROM acme.pageview") >= EVENTS
    assert db.one("SELECT count(*) FROM acme.pageview WHERE _user = 'x' OR page LIKE 'topsecret-%'") == 0


def test_internal_tables_show_and_take_nothing(db, world):
    mallory = world["sessions"]["mallory"]
    relations = db.all(
        "SELECT c.oid::regclass::text FROM pg_class c WHERE relnamespace = 'rakam_internal'::regnamespace AND relkind IN ('r', 'v')"
    )
    assert len(relations) > 15
    acme = db.one("SELECT project_id FROM rakam_internal.project WHERE name = 'acme'")
    for (relation,) in relations:
        sqlstate, rows, told = outcome(mallory, f"SELECT to_jsonb(t.*) FROM {relation} t")
        assert leaks("", rows, told) == [], relation
        assert sqlstate in (None, "42501"), f"{relation}: {told}"
        assert not [row for (row,) in rows if row.get("project_id") == acme], f"{relation} shows rows of acme"
        for statement in (
            f"DELETE FROM {relation}",
            f"TRUNCATE {relation}",
            f"BEGIN; LOCK TABLE {relation} IN ACCESS EXCLUSIVE MODE",
        ):
            sqlstate, _, _ = outcome(mallory, statement)
            assert sqlstate in ("42501", "42809", "55000"), f"{statement}: {sqlstate}"
    for statement in (
        "INSERT INTO rakam_internal.inbox_0 (project_id, collection_id, collection, n, received_at, payload)"
        f" VALUES ({acme}, 0, 'pageview', 1, now(), '{{}}')",
        "UPDATE rakam_internal.project SET name = 'mine'",
        "UPDATE rakam_internal.project SET read_role_name = 'login_mallory'",
    ):
        assert outcome(mallory, statement)[0] == "42501", statement


def test_internal_functions_show_nothing(db, world):
    """Every function a member may call, called with NULLs and with the other project's number: no leak, no crash."""
    mallory = world["sessions"]["mallory"]
    functions = mallory.execute(
        "SELECT p.oid::regproc::text, p.oid::regprocedure::text, pronargs - pronargdefaults FROM pg_proc p"
        " JOIN pg_namespace n ON n.oid = pronamespace WHERE nspname IN ('rakam', 'rakam_internal')"
        " AND prokind = 'f' AND has_function_privilege(p.oid, 'EXECUTE') AND has_schema_privilege(n.oid, 'USAGE')"
    ).fetchall()
    assert functions
    acme = db.one("SELECT project_id FROM rakam_internal.project WHERE name = 'acme'")
    for name, signature, arguments in functions:
        for value in ("NULL", str(acme), "'acme'", "'rakam_acme_read'"):
            call = f"SELECT * FROM {name}({', '.join([value] * arguments)})"
            sqlstate, rows, told = outcome(mallory, call)
            assert leaks(call, rows, told) == [], f"{signature}: {told or rows[:3]}"
            assert sqlstate != "XX000", f"{call}: {told}"


def test_operators_of_the_caller_are_not_used(db, world):
    """Operators and functions that the caller put in front of the system's must not run with the extension's rights."""
    mallory = world["sessions"]["mallory"]
    mallory.execute(
        """
        CREATE TABLE play.caught (who text, what text);
        GRANT INSERT ON play.caught TO PUBLIC;
        CREATE FUNCTION play.trap(a anyelement, b anyelement) RETURNS boolean LANGUAGE plpgsql AS
          $$ BEGIN INSERT INTO play.caught VALUES (current_user, 'operator'); RETURN true; END $$;
        CREATE FUNCTION play.trap_int(a int, b int) RETURNS boolean LANGUAGE plpgsql AS
          $$ BEGIN INSERT INTO play.caught VALUES (current_user, 'int'); RETURN true; END $$;
        CREATE FUNCTION play.trap_text(a text, b text) RETURNS boolean LANGUAGE plpgsql AS
          $$ BEGIN INSERT INTO play.caught VALUES (current_user, 'text'); RETURN true; END $$;
        CREATE FUNCTION play.trap_ts(a timestamptz, b timestamptz) RETURNS boolean LANGUAGE plpgsql AS
          $$ BEGIN INSERT INTO play.caught VALUES (current_user, 'timestamptz'); RETURN true; END $$;
        CREATE OPERATOR play.= (LEFTARG = int, RIGHTARG = int, FUNCTION = play.trap_int);
        CREATE OPERATOR play.= (LEFTARG = text, RIGHTARG = text, FUNCTION = play.trap_text);
        CREATE OPERATOR play.>= (LEFTARG = timestamptz, RIGHTARG = timestamptz, FUNCTION = play.trap_ts);
        CREATE FUNCTION play.now() RETURNS timestamptz LANGUAGE plpgsql AS
          $$ BEGIN INSERT INTO play.caught VALUES (current_user, 'now'); RETURN '2000-01-01'; END $$;
        CREATE FUNCTION play.lower(text) RETURNS text LANGUAGE plpgsql AS
          $$ BEGIN INSERT INTO play.caught VALUES (current_user, 'lower'); RETURN $1; END $$;
        """
    )
    hostile = [
        "SELECT count(*) FROM evil.clicks",
        "SELECT * FROM evil._all",
        "SELECT rakam.collect('evil', 'clicks', '{\"n\": 2}')",
        'SELECT rakam.collect_batch(\'evil\', \'[{"collection": "clicks", "properties": {"n": 3}}]\'::text)',
        "SELECT * FROM rakam.flush('evil')",
        "SELECT rakam.create_collection('evil', 'other')",
        "SELECT rakam.add_field('evil', 'other', 'f', 'text')",
        "SELECT * FROM rakam.stat_collection",
        "SELECT * FROM rakam.health()",
        "SELECT * FROM rakam.create_keys('evil')",
        "SELECT rakam.tick()",
        "INSERT INTO evil.clicks (n) VALUES (4)",
    ]
    for statement in hostile:
        mallory.execute("SET search_path = play, pg_catalog")
        outcome_of = outcome(mallory, f"SET search_path = play, pg_catalog; {statement}")
        assert leaks(statement, outcome_of[1], outcome_of[2]) == []
    db.admin.execute("SET search_path = play, pg_catalog, public")
    db.admin.execute("SELECT rakam.tick()")
    db.admin.execute("RESET search_path")
    strangers = db.all("SELECT * FROM play.caught WHERE who NOT IN ('login_mallory', 'postgres') OR who = 'postgres'")
    assert strangers == [], f"functions of mallory ran as {strangers[:5]}"


def test_prepared_statements_follow_the_role(db, world):
    """One login, member of both projects without inheriting: what a statement shows is the role's at its execution."""
    db.admin.execute("CREATE ROLE login_switch LOGIN NOINHERIT")
    for project in ("acme", "evil"):
        db.admin.execute(f"GRANT rakam_{project}_read TO login_switch")
    session = db.connect("login_switch")
    session.execute("SET ROLE rakam_acme_read")
    session.execute("PREPARE direct AS SELECT count(*) FROM acme.pageview")
    session.execute("PREPARE forged AS SELECT count(*) FROM play.forged")
    for _ in range(7):
        session.execute("SET ROLE rakam_acme_read")
        assert one(session, "EXECUTE direct") >= EVENTS
        assert one(session, "EXECUTE forged") >= EVENTS
        session.execute("SET ROLE rakam_evil_read")
        with refused("42501"):
            session.execute("EXECUTE direct")
        assert one(session, "EXECUTE forged") == 0
        session.execute("RESET ROLE")
        assert one(session, "EXECUTE forged") == 0


def test_plans_and_estimates_do_not_tell(db, world):
    """The plan over a forged table of a project that exists is the plan over one that does not."""
    mallory = world["sessions"]["mallory"]
    for options in ("", "(VERBOSE)", "(ANALYZE, VERBOSE, TIMING OFF, SUMMARY OFF)"):
        told = []
        mallory.execute("ALTER FOREIGN TABLE play.unknown OPTIONS (SET project 'no_such')")
        for table in ("forged", "unknown"):
            rows = mallory.execute(f"EXPLAIN {options} SELECT * FROM play.{table} WHERE _user = 'x'").fetchall()
            told.append("\n".join(row[0] for row in rows).replace(table, "?").replace("no_such", "acme"))
        assert told[0] == told[1]


def test_a_role_of_an_old_name_gets_nothing(db):
    """A role that is dropped and made anew is somebody else's, whatever is changed of the project afterwards."""
    db.project("delta")
    collect(db.admin, "delta", "page", {"n": 1})
    db.tick()
    db.admin.execute("DROP OWNED BY rakam_delta_read")
    db.admin.execute("DROP ROLE rakam_delta_read")
    db.admin.execute("CREATE ROLE rakam_delta_read LOGIN")
    session = db.connect("rakam_delta_read")
    for change in (
        "rakam.set_time_bounds('delta', '1 year', '1 day')",
        "rakam.set_quota('delta', NULL, NULL, NULL, NULL)",
    ):
        db.admin.execute(f"SELECT {change}")
        assert one(session, "SELECT count(*) FROM rakam.projects") == 0
        assert db.one("SELECT read_role FROM rakam_internal.project WHERE name = 'delta'") is None
    with refused("42710", message='role "rakam_delta_read"'):
        db.admin.execute("SELECT * FROM rakam.repair_roles()")
    session.close()
    db.admin.execute("DROP ROLE rakam_delta_read")
    assert ("delta", "rakam_delta_read") in db.all("SELECT * FROM rakam.repair_roles()")
    reader = db.login("delta", "read")
    assert one(reader, "SELECT sum(n) FROM delta.page") == 1
    assert one(reader, "SELECT count(*) FROM rakam.projects") == 1


def test_analyzed_plans_do_not_tell(db, world):
    """EXPLAIN ANALYZE counts what policies hide: members may have no query of our tables analyzed."""
    mallory = db.connect(world["sessions"]["mallory"].info.user)
    collection = db.one(
        "SELECT collection_id FROM rakam_internal.collection WHERE name = 'pageview' ORDER BY 1 LIMIT 1"
    )
    queries = (
        f"SELECT FROM rakam_internal.hot_chunk WHERE collection_id = {collection}",
        "SELECT FROM rakam_internal.project WHERE name = 'acme'",
        "SELECT count(*) FROM rakam.fields WHERE field = 'amount'",
    )
    for query in queries:
        for explain in ("EXPLAIN ANALYZE", "EXPLAIN (ANALYZE, FORMAT JSON)", "EXPLAIN ANALYZE CREATE TEMP TABLE t AS"):
            with refused("42501", message="analyze"):
                mallory.execute(f"{explain} {query}")
        mallory.execute(f"EXPLAIN {query}")
        mallory.execute(query)
        assert db.all(f"EXPLAIN ANALYZE {query}")
    assert mallory.execute("EXPLAIN ANALYZE SELECT count(*) FROM evil.clicks").fetchall()
    mallory.close()


@pytest.mark.parametrize(
    "call",
    [
        "rakam.collect('{}', 'pageview', '{{}}')",
        "rakam.collect_batch('{}', '[]'::text)",
        "rakam.create_collection('{}', 'x')",
        "rakam.add_field('{}', 'pageview', 'x', 'text')",
        "rakam.flush('{}', NULL)",
        "rakam.create_keys('{}')",
        "rakam.revoke_keys('{}', gen_random_uuid())",
    ],
)
def test_unknown_and_forbidden_look_the_same(world, call):
    texts = []
    for project in ("acme", "nosuchproject"):
        sqlstate, _, told = outcome(world["sessions"]["mallory"], f"SELECT {call.format(project)}")
        assert sqlstate == "42501"
        texts.append(told.replace(project, "?"))
    assert texts[0] == texts[1]


def test_keys_behind_a_shared_connection(db, world):
    """A pool's connection serves one key after the other; nothing of one stays for the next."""
    keys, pooled = world["keys"], world["sessions"]["pooled"]
    evil = db.admin.execute("SELECT read_key, write_key, master_key FROM rakam.create_keys('evil')").fetchone()
    count = "SELECT count(*) FROM acme.pageview"

    with pooled.transaction():
        pooled.execute("SELECT rakam.authenticate(%s)", (keys["read_key"],))
        assert one(pooled, count) >= EVENTS
    for key in evil:
        with refused("42501"), pooled.transaction():
            pooled.execute("SELECT rakam.authenticate(%s)", (key,))
            pooled.execute(count)
        with pooled.transaction():
            pooled.execute("SELECT rakam.authenticate(%s)", (evil[0],))
            assert one(pooled, "SELECT count(*) FROM play.forged") == 0
    with refused("42501"):
        pooled.execute(count)
    # An error inside the transaction, then the next client.
    with refused("22012"), pooled.transaction():
        pooled.execute("SELECT rakam.authenticate(%s)", (keys["read_key"],))
        pooled.execute("SELECT 1 / 0")
    with refused("42501"):
        pooled.execute(count)
    # A savepoint rolled back takes the role with it.
    with refused("42501"), pooled.transaction():
        pooled.execute("SAVEPOINT s")
        pooled.execute("SELECT rakam.authenticate(%s)", (keys["read_key"],))
        pooled.execute("ROLLBACK TO s")
        pooled.execute(count)
    # The write key's role writes and does not read; the call with a key leaves no role behind.
    with refused("42501"), pooled.transaction():
        pooled.execute("SELECT rakam.authenticate(%s)", (keys["write_key"],))
        pooled.execute(count)
    pooled.execute("SELECT rakam.collect_with_key(%s, 'pageview', '{}')", (keys["write_key"],))
    assert one(pooled, "SELECT current_user::text") == "login_pooled"
    with refused("42501"):
        pooled.execute("SELECT rakam.collect('acme', 'pageview', '{}')")
    # Switching from one project's key to the other's inside one transaction.
    with pooled.transaction():
        pooled.execute("SELECT rakam.authenticate(%s)", (keys["read_key"],))
        pooled.execute("SELECT rakam.authenticate(%s)", (evil[0],))
        assert one(pooled, "SELECT count(*) FROM play.forged") == 0
    for session_key in (keys["read_key"], evil[0]):
        pooled.execute("SELECT rakam.authenticate(%s, local => false)", (session_key,))
        pooled.execute("RESET ROLE")
        with refused("42501"):
            pooled.execute(count)
    # A key of the plan cache's past: the same prepared text under two keys.
    pooled.execute("PREPARE shared AS SELECT count(*) FROM play.forged")
    for key, sees in ((keys["read_key"], True), (evil[0], False), (keys["master_key"], True), (evil[2], False)):
        with pooled.transaction():
            pooled.execute("SELECT rakam.authenticate(%s)", (key,))
            assert (one(pooled, "EXECUTE shared") > 0) == sees


def test_locks_of_sql_users_stop_nobody(db, world):
    """mallory takes every advisory lock it can name, and locks its own tables; the victim's work goes on."""
    seen = db.all("SELECT DISTINCT classid::bigint, objid::bigint FROM pg_locks WHERE locktype = 'advisory'")
    session = db.connect("login_mallory", autocommit=False)
    for classid, objid in seen:
        session.execute("SELECT pg_advisory_xact_lock(%s)", (classid << 32 | objid if classid < 1 << 31 else objid,))
    session.execute("SELECT pg_advisory_xact_lock(g) FROM generate_series(-64, 500) g")
    session.execute("SELECT pg_advisory_xact_lock(a, b) FROM generate_series(0, 20) a, generate_series(0, 20) b")
    session.execute("SELECT count(*) FROM evil.clicks")
    session.execute("SELECT rakam.collect('evil', 'clicks', '{\"fresh_field\": 1}')")
    began = time.monotonic()
    before = db.one("SELECT count(*) FROM acme.pageview")
    collect(db.admin, "acme", "pageview", {"_user": "after the locks"})
    db.tick()
    db.flush("acme")
    assert db.one("SELECT count(*) FROM acme.pageview") == before + 1
    assert db.tiers("acme", "pageview")["inbox"] == 0
    # A lock of mallory's would be waited for until its end.
    assert time.monotonic() - began < 60
    session.rollback()


def test_nobody_is_stopped(db, world):
    """While mallory runs through all of it again, the victim's writer and reader go on without an error or a long wait."""
    ended = threading.Event()
    failures: list[str] = []
    slowest = [0.0]

    def victim() -> None:
        try:
            with db.cluster.connect(db.name, "login_acme_writer") as writer, db.cluster.connect(db.name) as reader:
                while not ended.is_set():
                    began = time.monotonic()
                    collect(writer, "acme", "heartbeat", {"n": 1})
                    reader.execute("SELECT count(*) FROM acme.heartbeat").fetchone()
                    slowest[0] = max(slowest[0], time.monotonic() - began)
                    time.sleep(0.01)
        except psycopg.Error as error:
            failures.append(str(error))

    db.admin.execute("SELECT rakam.create_collection('acme', 'heartbeat')")
    thread = threading.Thread(target=victim, daemon=True)
    thread.start()
    mallory = db.connect("login_mallory")
    for who, statement, _ in HOSTILE:
        if who == "mallory":
            statement = statement.replace("{server}", world["server"])
            _, rows, told = outcome(mallory, statement)
            assert leaks(statement, rows, told) == []
    ended.set()
    thread.join(timeout=30)
    assert not failures
    assert slowest[0] < 15, f"the victim waited {slowest[0]:.1f} s"
    wait_until(lambda: db.one("SELECT count(*) FROM acme.heartbeat") > 5, "the victim's events")


def test_a_reader_may_turn_row_security_off(db, world):
    """As pg_dump does: the policies are those of tables behind the collection, not of the collection. They stay in force."""
    honest = db.login("acme", "read", name="login_without_row_security")
    for session, expected in ((honest, EVENTS), (world["sessions"]["mallory"], 0)):
        before = one(session, "SELECT count(*) FROM play.forged")
        session.execute("SET row_security = off")
        assert one(session, "SELECT count(*) FROM play.forged") == before >= expected
        # The internal tables themselves say that they have policies.
        with refused("42501"):
            session.execute("SELECT count(*) FROM rakam_internal.hot_chunk")
        session.execute("RESET row_security")
    honest.execute("SET row_security = off")
    assert one(honest, "SELECT count(*) FROM acme.pageview") >= EVENTS
    assert one(honest, "SELECT count(*) FROM rakam.field_values('acme', 'pageview', 'page')") == 1
    assert one(world["sessions"]["mallory"], "SELECT count(*) FROM play.forged") == 0
