"""A logical dump of a database, restored as another one: everything digested is there, and life goes on in it."""

from __future__ import annotations

from harness.database import Database, collect


def test_a_dump_is_restored_and_goes_on(db, cluster):
    db.project("dumped")
    for n in range(40):
        collect(db.admin, "dumped", "page", {"_id": str(n), "n": n, "tag": "cold"})
    db.flush("dumped")
    for n in range(40, 60):
        collect(db.admin, "dumped", "page", {"_id": str(n), "n": n, "later": True})
    db.tick()
    db.admin.execute("SELECT rakam.delete_events('dumped', 'page', 'n < 3')")
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
        assert db.all(everything) == before
    finally:
        restored.drop()
