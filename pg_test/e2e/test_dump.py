"""A logical dump of a database, restored as another one: everything digested is there, and life goes on in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.cluster import Cluster
from harness.database import Database, collect, collect_batch, one, refused, wait_until


def test_a_dump_is_restored_and_goes_on(db, cluster):
    db.project("dumped")
    for n in range(40):
        collect(db.admin, "dumped", "page", {"_id": str(n), "n": n, "tag": "cold"})
    db.flush("dumped")
    for n in range(40, 60):
        collect(db.admin, "dumped", "page", {"_id": str(n), "n": n, "later": True})
    db.tick()
    db.admin.execute("SELECT rakam.delete_events('dumped', 'page', 'n < 3')")
    files = cluster.make_folder("dump_files")
    (files / "a.csv").write_text("n\n1\n2\n")
    db.admin.execute("SELECT rakam.attach('dumped', 'files', %s)", (f"file://{files}",))
    everything = "SELECT _id, n, tag, later, _extra FROM dumped.page ORDER BY n"
    before = db.all(everything)
    assert len(before) == 57
    dump = cluster.make_folder("dump") / "whole.sql"
    cluster.run("pg_dump", "-f", dump, db.name, env=cluster.environment())
    restored = Database(cluster, "test_dump_restored").create(extension=False)
    try:
        done = cluster.run("psql", "-X", "-q", "-f", dump, restored.name, env=cluster.environment())
        assert "ERROR" not in done.stderr, done.stderr
        assert restored.all(everything) == before
        # Ids of rows go on behind those that came with the dump: nothing collides, nothing is taken for something else.
        for n in range(60, 80):
            collect(restored.admin, "dumped", "page", {"_id": str(n), "n": n, "fresh": "x"})
        collect(restored.admin, "dumped", "page", {"_id": "5", "n": -1})
        collect(restored.admin, "dumped", "another", {"n": 1})
        restored.tick()
        restored.flush("dumped")
        assert restored.one("SELECT count(*) FROM dumped.page") == 77
        assert restored.one("SELECT count(*) FROM dumped.another") == 1
        assert restored.all(everything)[:57] == before
        assert restored.one("SELECT count(*) FROM rakam.health() WHERE status = 'error'") == 0
        # Attached files are read from where they were.
        assert restored.one("SELECT sum(n) FROM dumped.files") == 3
        restored.admin.execute("SELECT rakam.detach('dumped', 'files')")
        assert restored.one("SELECT to_regclass('dumped.files')") is None
        assert db.all(everything) == before
    finally:
        restored.drop()


def test_a_dump_has_what_is_not_digested(private_cluster):
    """By id and by name, of two projects, single and in a batch; not what is digested and still in its inbox table."""
    settings = {"rakam.digest_max_age": "1d", "rakam.digest_events": "1000000"}
    cluster = private_cluster("dump_inbox", settings)
    db = Database(cluster, "source").create()
    for project in ("one", "two"):
        db.project(project)
        collect(db.admin, project, "page", {"_id": "digested", "n": 0})
    db.tick()
    for project in ("one", "two"):
        collect(db.admin, project, "page", {"_id": "digested", "n": 7})  # a copy, which never counts
        collect(db.admin, project, "page", {"_id": "late", "n": 1, "of": project})
        collect(db.admin, project, "unknown", {"n": 2})
    db.admin.execute("""SELECT rakam.collect_batch('one', '[{"collection": "page", "properties": {"n": 3}},
                                                           {"collection": "page", "properties": {"n": 4}}]'::text)""")
    assert db.tiers("one", "page") == {"inbox": 4, "hot": 1, "cold": 0}
    dump = cluster.make_folder("dump_inbox") / "whole.dump"
    cluster.run("pg_dump", "-Fc", "-f", dump, db.name, env=cluster.environment())
    restored = Database(cluster, "restored").create(extension=False)
    done = cluster.run("pg_restore", "-d", restored.name, dump, env=cluster.environment())
    assert "error" not in done.stderr.lower(), done.stderr

    def rows(of: Database) -> list:
        pages = "SELECT tableoid::regclass::text, _id, n, _received_at FROM {0}.page ORDER BY n"
        return [of.all(pages.format(project)) for project in ("one", "two")]

    restored.tick()
    assert rows(restored) == rows(db)
    assert [row[2] for row in rows(restored)[0]] == [0, 1, 3, 4]
    assert restored.one("SELECT n FROM two.unknown") == 2
    assert restored.one("SELECT count(*) FROM rakam_internal.inbox_restored") == 0
    # Once more, by the background alone.
    again = Database(cluster, "again").create(extension=False)
    cluster.run("pg_restore", "-1", "-d", again.name, dump, env=cluster.environment())
    wait_until(lambda: again.one("SELECT count(*) FROM rakam_internal.inbox_restored") == 0, "the restored rows")
    assert rows(again) == rows(db)
    for database in (again, restored, db):
        database.close()


def test_roles_that_are_missing_are_made_again(db, private_cluster):
    """A dump restored where nobody has run pg_dumpall -g: everything is there for superusers, and for all others later."""
    keys = db.project("roles")
    collect(db.admin, "roles", "page", {"n": 1})
    db.flush("roles")
    files = private_cluster("dump_roles")
    folder = files.make_folder("dump_files")
    (folder / "a.csv").write_text("n\n1\n")
    dump = db.cluster.make_folder("dump_roles") / "whole.sql"
    db.cluster.run("pg_dump", "-f", dump, db.name, env=db.cluster.environment())
    restored = Database(files, "roles").create(extension=False)
    target = folder / "whole.sql"
    target.write_text(dump.read_text())
    done = files.run("psql", "-X", "-q", "-f", target, restored.name, env=files.environment())
    errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
    assert all('role "rakam_' in line and line.endswith("does not exist") for line in errors), errors
    assert restored.one("SELECT sum(n) FROM roles.page") == 1
    found = restored.all("SELECT status, hint FROM rakam.health() WHERE \"check\" = 'roles'")
    assert [row[0] for row in found] == ["error"] and "rakam.repair_roles()" in found[0][1]
    # A role that somebody else has made is not taken over.
    restored.admin.execute("CREATE ROLE rakam_roles_write")
    with refused("42710", message='role "rakam_roles_write"'):
        restored.admin.execute("SELECT * FROM rakam.repair_roles()")
    restored.admin.execute("DROP ROLE rakam_roles_write")
    made = [("roles", f"rakam_roles_{kind}") for kind in ("read", "write", "admin")]
    repaired = restored.all("SELECT * FROM rakam.repair_roles()")
    assert [row for row in repaired if row[0] == "roles"] == made
    assert restored.all("SELECT * FROM rakam.repair_roles()") == []
    reader, writer = restored.login("roles", "read"), restored.login("roles", "write")
    collect(writer, "roles", "page", {"n": 2})
    writer.execute("INSERT INTO roles.page (n) VALUES (3)")
    writer.execute("INSERT INTO roles.users (id) VALUES ('ada')")
    assert one(reader, "SELECT sum(n) FROM roles.page") == 6
    assert one(reader, "SELECT count(*) FROM roles._all") == 3
    assert one(reader, "SELECT id FROM roles.users") == "ada"
    with refused("42501"):
        one(writer, "SELECT count(*) FROM roles.page")
    with reader.transaction():
        reader.execute("SELECT rakam.authenticate(%s)", (keys["master_key"],))
        assert one(reader, "SELECT current_user::text") == "rakam_roles_admin"
        reader.execute("CREATE VIEW roles.mine AS SELECT n FROM roles.page")
    # One role alone, dropped by hand; one that was renamed stays the project's.
    restored.admin.execute("DROP OWNED BY rakam_roles_read; DROP ROLE rakam_roles_read")
    restored.admin.execute("ALTER ROLE rakam_roles_write RENAME TO renamed_writer")
    assert restored.all("SELECT * FROM rakam.repair_roles()") == [("roles", "rakam_roles_read")]
    restored.admin.execute("GRANT rakam_roles_read TO login_roles_read")
    assert one(reader, "SELECT sum(n) FROM roles.page") == 6
    restored.admin.execute("SELECT rakam.set_quota('roles', NULL, NULL, NULL, NULL)")
    collect(writer, "roles", "page", {"n": 4})
    with refused("42501"):
        reader.execute("SELECT * FROM rakam.repair_roles()")
    assert restored.one("SELECT status FROM rakam.health() WHERE \"check\" = 'roles'") == "ok"
    restored.close()


CONTENT = "SELECT _id, n, tag, later, _extra FROM whole.page ORDER BY n"
DROPPED = "SELECT count(*), sum(n) FROM whole.kept"


@pytest.fixture(scope="module")
def whole(cluster):
    """A database of which a part means something else than the whole: deleted rows of chunks and files, fields that came later."""
    db = Database(cluster, "test_dump_whole")
    db.drop()
    db.create()
    db.project("whole")
    for first in range(0, 40, 10):
        batch = [("page", {"_id": str(n), "n": n, "tag": "cold"}) for n in range(first, first + 10)]
        assert collect_batch(db.admin, "whole", batch)[1] == 0
        db.flush("whole")
    db.admin.execute("SELECT rakam.delete_events('whole', 'page', 'n::int % 10 = 3')")
    for n in range(40, 60):
        collect(db.admin, "whole", "page", {"_id": str(n), "n": n, "later": True})
    db.tick()
    db.admin.execute("SELECT rakam.delete_events('whole', 'page', 'n = 45')")
    old = [("kept", {"n": n, "_time": f"2026-01-{n % 28 + 1:02}T00:00:00Z"}) for n in range(100)]
    assert collect_batch(db.admin, "whole", old)[1] == 0
    db.flush("whole", "kept")
    db.admin.execute("SELECT rakam.delete_events('whole', 'kept', 'n < 10')")
    collect(db.admin, "whole", "page", {"_id": "waits", "n": 60})
    yield db
    db.drop()


def run(cluster: Cluster, program: str, *arguments, errors: bool = False) -> str:
    done = cluster.run(program, *arguments, env=cluster.environment(), check=False)
    if not errors:
        assert "error" not in done.stderr.lower(), done.stderr
        assert done.returncode == 0, done.stderr
    return done.stderr


def dumped(db: Database, name: str, *options: str) -> Path:
    path = db.cluster.make_folder("dump_whole") / name
    if path.is_dir() or not path.exists():
        db.cluster.run("pg_dump", *options, "-f", path, db.name, env=db.cluster.environment())
    return path


ROADS = {
    "psql": lambda db, to: run(db.cluster, "psql", "-X", "-q", "-f", dumped(db, "a.sql"), to.name),
    "psql in one transaction": lambda db, to: run(
        db.cluster, "psql", "-X", "-q", "-1", "-f", dumped(db, "a.sql"), to.name
    ),
    "inserts": lambda db, to: run(db.cluster, "psql", "-X", "-q", "-f", dumped(db, "i.sql", "--inserts"), to.name),
    "pg_restore": lambda db, to: run(db.cluster, "pg_restore", "-d", to.name, dumped(db, "a.dump", "-Fc")),
    "pg_restore -1": lambda db, to: run(db.cluster, "pg_restore", "-1", "-d", to.name, dumped(db, "a.dump", "-Fc")),
    "pg_restore -j": lambda db, to: run(
        db.cluster, "pg_restore", "-j", "4", "-d", to.name, dumped(db, "a.dump", "-Fc")
    ),
    "sections": lambda db, to: [
        run(db.cluster, "pg_restore", f"--section={part}", "-d", to.name, dumped(db, "a.dump", "-Fc"))
        for part in ("pre-data", "data", "post-data")
    ],
    "sections -j": lambda db, to: [
        run(db.cluster, "pg_restore", f"--section={part}", "-j", "3", "-d", to.name, dumped(db, "a.dump", "-Fc"))
        for part in ("pre-data", "data", "post-data")
    ],
    "data only": lambda db, to: [
        run(db.cluster, "pg_restore", "--schema-only", "-d", to.name, dumped(db, "a.dump", "-Fc")),
        run(db.cluster, "pg_restore", "--data-only", "-d", to.name, dumped(db, "a.dump", "-Fc")),
    ],
}


@pytest.mark.parametrize("road", ROADS)
def test_every_road_of_a_restore(whole, cluster, road):
    """A worker runs from CREATE EXTENSION on: whatever comes first, nothing is made of a part."""
    restored = Database(cluster, "test_dump_road")
    restored.drop()
    restored.create(extension=False)
    try:
        ROADS[road](whole, restored)
        over = "SELECT count(*) FROM rakam.health() WHERE \"check\" = 'restore'"
        wait_until(lambda: restored.one(over) == 0, lambda: str(restored.all("SELECT * FROM rakam.health()")))
        # What was in the inbox comes a moment later.
        wait_until(lambda: restored.all(CONTENT) == whole.all(CONTENT), "all events")
        assert restored.all(DROPPED) == whole.all(DROPPED)
        restored.tick()
        restored.flush()
        restored.all("SELECT rakam.compact('whole')")
        assert restored.all(CONTENT) == whole.all(CONTENT)
        assert restored.all(DROPPED) == whole.all(DROPPED)
        # Copies are known, and ids go on.
        for n in (5, 60, 61):
            collect(restored.admin, "whole", "page", {"_id": str(n) if n != 60 else "waits", "n": -1})
        restored.project("another")
        collect(restored.admin, "another", "page", {"n": 1})
        restored.tick()
        assert restored.one("SELECT count(*) FROM whole.page WHERE n = -1") == 1
        assert restored.one("SELECT count(*) FROM another.page") == 1
        assert restored.all("SELECT detail FROM rakam.health() WHERE status = 'error'") == []
    finally:
        restored.drop()


def test_nothing_is_made_of_half_a_restore(whole, cluster):
    """The dump ends before the deleted rows and the fields come, and goes on later."""
    text = dumped(whole, "a.sql").read_text()
    at = text.index("COPY rakam_internal.deletion ")
    assert text.index("COPY rakam_internal.data_file ") < at < text.index("COPY rakam_internal.field ")
    folder = cluster.make_folder("dump_half")
    (folder / "first.sql").write_text(text[:at])
    head = text[: text.index("CREATE ")]
    (folder / "second.sql").write_text(head + text[at:])
    restored = Database(cluster, "test_dump_half")
    restored.drop()
    restored.create(extension=False)
    try:
        run(cluster, "psql", "-X", "-q", "-f", folder / "first.sql", restored.name)
        state = "SELECT state FROM rakam.stat_worker WHERE kind = 'resident' AND database = current_database()"
        wait_until(lambda: restored.one(state) == "restore", "the worker, that it waits")
        files = restored.all("SELECT path FROM rakam.data_files ORDER BY 1")
        for call in (
            "SELECT rakam.tick()",
            "SELECT rakam.flush()",
            "SELECT rakam.compact('whole')",
            "SELECT rakam.set_retention('whole', 'kept', '1 year')",
            "SELECT rakam.delete_events('whole', 'page', 'true')",
            "SELECT * FROM rakam.create_project('early')",
            "SET rakam.allow_project_drop = on; SELECT rakam.drop_project('whole')",
        ):
            with refused("55000", message="restore", hint="rakam.health()"):
                restored.admin.execute(call)
        told = restored.all("SELECT status, detail, hint FROM rakam.health() WHERE \"check\" = 'restore'")
        assert [row[0] for row in told] == ["error"]
        assert "rows" in told[0][1] and "DELETE FROM rakam_internal.restore" in told[0][2], told
        # Collecting goes on.
        collect(restored.admin, "whole", "page", {"_id": "meanwhile", "n": 61})
        assert restored.all("SELECT path FROM rakam.data_files ORDER BY 1") == files
        run(cluster, "psql", "-X", "-q", "-f", folder / "second.sql", restored.name)
        wait_until(lambda: restored.one(state) != "restore", "the worker, that it goes on")
        restored.tick()
        restored.all("SELECT rakam.compact('whole')")
        assert restored.all(CONTENT)[:-1] == whole.all(CONTENT)
        assert restored.all(CONTENT)[-1][0] == "meanwhile"
        assert restored.all(DROPPED) == whole.all(DROPPED)
    finally:
        restored.drop()


def test_a_restore_that_stays_a_part(whole, cluster):
    """Who left something out is told so, and may go on without it."""
    listed = cluster.run("pg_restore", "-l", dumped(whole, "a.dump", "-Fc"), env=cluster.environment()).stdout
    kept = [line for line in listed.splitlines() if "TABLE DATA rakam_internal deletion" not in line]
    assert len(kept) == len(listed.splitlines()) - 1
    (cluster.make_folder("dump_part") / "list").write_text("\n".join(kept))
    restored = Database(cluster, "test_dump_part")
    restored.drop()
    restored.create(extension=False)
    try:
        wanted = cluster.folder / "dump_part" / "list"
        run(cluster, "pg_restore", "-L", wanted, "-d", restored.name, dumped(whole, "a.dump", "-Fc"))
        with refused("55000", message="restore"):
            restored.tick()
        [(status, detail)] = restored.all("SELECT status, detail FROM rakam.health() WHERE \"check\" = 'restore'")
        assert status == "error" and "rakam_internal.deletion has 0 of" in detail
        restored.admin.execute("DELETE FROM rakam_internal.restore")
        restored.tick()
        assert restored.one("SELECT count(*) FROM whole.kept") == 100
        assert restored.one("SELECT count(*) FROM rakam.health() WHERE \"check\" = 'restore'") == 0
    finally:
        restored.drop()


def test_a_field_dropped_after_a_restore_is_read_nowhere(private_cluster):
    """Transaction ids of the server that a dump came from mean nothing beside those of a younger one."""
    old = private_cluster("dump_old")
    db = Database(old, "source").create()
    db.project("acme")
    db.admin.execute("SET synchronous_commit = off")
    # The transactions of the restore itself are some hundreds.
    db.admin.execute("DO $$ BEGIN FOR i IN 1..20000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$")
    collect(db.admin, "acme", "page", {"color": "red", "n": 1})
    db.tick()
    dump = old.make_folder("dump_old") / "whole.sql"
    old.run("pg_dump", "-f", dump, db.name, env=old.environment())
    db.close()
    young = private_cluster("dump_young")
    target = young.make_folder("dump_young") / "whole.sql"
    target.write_text(dump.read_text())
    restored = Database(young, "restored").create(extension=False)
    young.run("psql", "-X", "-q", "-f", target, restored.name, env=young.environment())
    assert restored.one("SELECT color FROM acme.page") == "red"
    restored.admin.execute("SELECT rakam.drop_field('acme', 'page', 'color')")
    assert restored.one("SELECT _extra FROM acme.page") is None
    collect(restored.admin, "acme", "page", {"color": "blue", "n": 2})
    restored.tick()
    assert restored.all("SELECT n, color FROM acme.page ORDER BY n") == [(1, None), (2, "blue")]
    restored.close()
