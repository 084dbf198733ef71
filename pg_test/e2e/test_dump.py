"""A logical dump of a database, restored as another one: everything digested is there, and life goes on in it."""

from __future__ import annotations

from harness.database import Database, collect, wait_until


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
