"""A logical dump of a database, restored as another one: everything digested is there, and life goes on in it."""

from __future__ import annotations

from harness.database import Database, collect, one, refused, wait_until


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
