"""Which function a mapper is: followed under other names, never another one of its name, in dumps and upgrades too."""

from __future__ import annotations

import json

import pytest
from harness.database import Database, collect

PROJECT = "acme"
MAPPER = "SELECT function, function_oid, is_lost FROM rakam_internal.mapper WHERE collection = %s"
LOST = "does not exist (SQLSTATE 42883)"


@pytest.fixture(scope="module")
def owner(db, keys):
    return db.login(PROJECT, "admin")


@pytest.fixture(scope="module")
def other(db, keys):
    """Another admin of the project."""
    return db.login(PROJECT, "admin", name="login_other")


def make(session, name: str) -> None:
    """A function that notes as whom it runs."""
    session.execute(
        f"CREATE FUNCTION {name}(event jsonb) RETURNS jsonb LANGUAGE sql AS"
        " $$ SELECT event || jsonb_build_object('who', current_user::text) $$"
    )


def set_mapper(session, collection: str, name: str) -> None:
    session.execute("SELECT rakam.set_mapper(%s, %s, %s::regprocedure)", (PROJECT, collection, f"{name}(jsonb)"))


def who(db, collection: str) -> list[str | None]:
    """Collects one more event, and returns as whom the mapper of each stored event ran."""
    collect(db.admin, PROJECT, collection, {"n": 1})
    query = "SELECT properties->>'who' FROM acme._all WHERE _collection = %s ORDER BY _received_at"
    return [row[0] for row in db.all(query, collection)]


def errors(db, collection: str) -> list[str]:
    return [row[0] for row in db.all("SELECT error FROM rakam_internal.dead_letter WHERE collection = %s", collection)]


def as_upgraded(db) -> None:
    """What tells a database that pg_upgrade has copied: its rows are of another server. No session knows them yet."""
    db.admin.execute("UPDATE rakam_internal.installation SET system_identifier = 0")
    db.admin.execute("UPDATE rakam_internal.mapper SET set_at = set_at")


def test_renamed_and_moved_functions_are_followed(db, owner):
    make(owner, "acme.mark")
    set_mapper(owner, "followed", "acme.mark")
    db.admin.execute("CREATE SCHEMA tools")
    steps = {
        "ALTER FUNCTION acme.mark(jsonb) RENAME TO marked": "acme.marked(jsonb)",
        'ALTER ROUTINE acme.marked(jsonb) RENAME TO "Mark 2"': 'acme."Mark 2"(jsonb)',
        'ALTER FUNCTION acme."Mark 2"(jsonb) SET SCHEMA tools': 'tools."Mark 2"(jsonb)',
        "ALTER SCHEMA tools RENAME TO kit": 'kit."Mark 2"(jsonb)',
    }
    for count, (statement, signature) in enumerate(steps.items(), 1):
        db.admin.execute(statement)
        number = db.one("SELECT %s::regprocedure::oid", signature)
        assert db.all(MAPPER, "followed") == [(signature, number, False)]
        assert who(db, "followed") == ["login_acme_admin"] * count
    db.admin.execute("BEGIN; ALTER SCHEMA kit RENAME TO undone; ROLLBACK")
    assert db.all(MAPPER, "followed")[0][0] == signature
    # Another one in its former place changes nothing, and its own body may change.
    make(db.admin, "acme.mark")
    db.admin.execute("GRANT USAGE, CREATE ON SCHEMA kit TO login_acme_admin")
    owner.execute(
        'CREATE OR REPLACE FUNCTION kit."Mark 2"(event jsonb) RETURNS jsonb LANGUAGE sql AS'
        " $$ SELECT event || jsonb_build_object('who', 'changed') $$"
    )
    assert who(db, "followed")[-1] == "changed"
    assert db.all(MAPPER, "followed") == [(signature, number, False)]


@pytest.mark.parametrize("upgraded", [False, True])
def test_the_name_of_a_dropped_function_finds_no_other(db, owner, other, upgraded):
    collection = f"dropped_{upgraded}".lower()
    name = f"acme.{collection}"
    make(owner, name)
    set_mapper(owner, collection, name)
    assert who(db, collection) == ["login_acme_admin"]
    if upgraded:
        as_upgraded(db)
        assert who(db, collection) == ["login_acme_admin"] * 2
    known = db.one("SELECT count(*) FROM acme._all WHERE _collection = %s", collection)
    owner.execute(f"DROP FUNCTION {name}(jsonb)")
    make(other, name)
    assert len(who(db, collection)) == known
    db.tick()
    assert len(who(db, collection)) == known
    assert [f"function {name}(jsonb) {LOST}" in error for error in errors(db, collection)] == [True] * 2
    assert db.all(MAPPER, collection) == [(f"{name}(jsonb)", None, True)]
    if upgraded:
        as_upgraded(db)
        assert len(who(db, collection)) == known
        db.tick()
    set_mapper(other, collection, name)
    assert who(db, collection)[-1] == "login_other"
    assert db.one("SELECT system_identifier > 0 FROM rakam_internal.installation") is True


def test_a_function_that_goes_with_its_schema_is_gone(db, owner, other):
    db.admin.execute("CREATE SCHEMA passing; GRANT USAGE, CREATE ON SCHEMA passing TO PUBLIC")
    make(owner, "passing.mark")
    set_mapper(owner, "passing", "passing.mark")
    db.admin.execute("DROP SCHEMA passing CASCADE")
    db.admin.execute("CREATE SCHEMA passing; GRANT USAGE, CREATE ON SCHEMA passing TO PUBLIC")
    make(other, "passing.mark")
    assert who(db, "passing") == []
    assert [LOST in error for error in errors(db, "passing")] == [True]
    db.admin.execute("SELECT rakam.set_mapper('acme', 'passing', NULL)")
    assert who(db, "passing") == [None]


def test_after_an_upgrade_functions_are_found_by_their_names_once(db, owner):
    make(owner, "acme.kept")
    set_mapper(owner, "kept", "acme.kept")
    as_upgraded(db)
    assert who(db, "kept") == ["login_acme_admin"]
    db.tick()
    server = "SELECT system_identifier FROM pg_control_system()"
    assert db.one("SELECT system_identifier FROM rakam_internal.installation") == db.one(server)
    owner.execute("ALTER FUNCTION acme.kept(jsonb) RENAME TO kept_on")
    assert who(db, "kept") == ["login_acme_admin"] * 2
    assert db.all(MAPPER, "kept")[0][0] == "acme.kept_on(jsonb)"


def test_a_function_renamed_right_after_an_upgrade_is_followed(db, owner):
    make(owner, "acme.early")
    set_mapper(owner, "early", "acme.early")
    as_upgraded(db)
    # Nobody has had the time to find it by its old name.
    owner.execute("ALTER FUNCTION acme.early(jsonb) RENAME TO renamed_early")
    assert db.all(MAPPER, "early")[0][::2] == ("acme.renamed_early(jsonb)", False)
    assert who(db, "early") == ["login_acme_admin"]


def test_a_function_that_comes_after_its_mapper_is_found(db, owner):
    """As pg_restore makes those that depend on a primary key."""
    make(owner, "acme.late")
    set_mapper(owner, "late", "acme.late")
    with db.admin.transaction():
        (row,) = db.all("SELECT to_jsonb(m) - 'function_oid' FROM rakam_internal.mapper m WHERE collection = 'late'")
        db.admin.execute("DELETE FROM rakam_internal.mapper WHERE collection = 'late'")
        owner_of = "acme.late(jsonb) OWNER TO login_acme_admin"
        db.admin.execute("DROP FUNCTION acme.late(jsonb)")
        columns = "project_id, collection, function, is_lost, every_batch, owner, set_at"
        db.admin.execute(
            f"INSERT INTO rakam_internal.mapper ({columns})"
            f" SELECT {columns} FROM jsonb_populate_record(NULL::rakam_internal.mapper, %s)",
            (json.dumps(row[0]),),
        )
        make(db.admin, "acme.late")
        db.admin.execute(f"ALTER FUNCTION {owner_of}")
    db.tick()
    assert who(db, "late") == ["login_acme_admin"]


def test_who_changes_functions_waits_for_no_tenant(db, owner):
    db.admin.execute("CREATE SCHEMA common; GRANT USAGE ON SCHEMA common TO PUBLIC")
    make(db.admin, "common.used")
    make(db.admin, "common.other")
    set_mapper(owner, "shared", "common.used")
    reader = db.connect(autocommit=False)
    reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    reader.execute("SELECT count(*) FROM rakam_internal.mapper")
    db.admin.execute("ALTER FUNCTION common.used(jsonb) RENAME TO still_used")
    # Neither of its business nor in its way.
    reader.execute("DROP FUNCTION common.other(jsonb)")
    reader.commit()
    tenant = db.login(PROJECT, "admin", autocommit=False)
    tenant.execute("SELECT rakam.set_mapper(%s, 'shared', NULL)", (PROJECT,))
    db.admin.execute("SET statement_timeout = '5s'")
    db.admin.execute("DROP FUNCTION common.still_used(jsonb)")
    db.admin.execute("RESET statement_timeout")
    tenant.rollback()
    assert who(db, "shared") == []
    db.tick()
    assert db.all(MAPPER, "shared") == [("common.still_used(jsonb)", None, True)]


def test_a_dump_has_mappers(db, cluster, owner, other):
    make(owner, "acme.first")
    make(owner, "acme.left")
    set_mapper(owner, "dumped", "acme.first")
    set_mapper(owner, "left", "acme.left")
    owner.execute("ALTER FUNCTION acme.first(jsonb) RENAME TO travels")
    owner.execute("DROP FUNCTION acme.left(jsonb)")
    make(other, "acme.left")
    dump = cluster.make_folder("dump_mappers") / "whole.dump"
    cluster.run("pg_dump", "-Fc", "-f", dump, db.name, env=cluster.environment())
    restored = Database(cluster, "test_mapper_restored")
    restored.drop()
    restored.create(extension=False)
    try:
        done = cluster.run("pg_restore", "-d", restored.name, dump, env=cluster.environment())
        assert "error" not in done.stderr.lower(), done.stderr
        number = restored.one("SELECT 'acme.travels(jsonb)'::regprocedure::oid")
        assert restored.all(MAPPER, "dumped") == [("acme.travels(jsonb)", number, False)]
        assert restored.all(MAPPER, "left") == [('acme."left"(jsonb)', None, True)]
        assert who(restored, "dumped") == ["login_acme_admin"]
        assert who(restored, "left") == []
        assert [LOST in error for error in errors(restored, "left")] == [True]
    finally:
        restored.drop()
