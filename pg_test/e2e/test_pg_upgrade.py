"""pg_upgrade takes a cluster with rakam into one that initdb has made: everything is there, and goes on."""

from __future__ import annotations

import json
import time

from conftest import AT_ONCE, SETTINGS
from harness.cluster import Cluster
from harness.database import Database, collect, refused, wait_until
from harness.lake import fill, make_storage, objects
from test_lake_copies import owned_by_others
from test_sources import put

# What is collected stays in the inbox until somebody calls a tick.
LAZY = {"rakam.digest_max_age": "1d", "rakam.digest_events": "1000000"}

EVENTS = "SELECT _id, n, mapped, _time, _received_at, _extra FROM acme.page ORDER BY n"


def upgraded(private_cluster, old: Cluster, settings: dict[str, str]) -> Cluster:
    new = Cluster(f"{old.name}-new", old.profile)
    private_cluster.made.append(new)
    new.upgrade_from(old)
    return new.start({**SETTINGS, **settings})


def workers(cluster: Cluster) -> list[str]:
    return [title for title in cluster.processes().values() if title.startswith("postgres: rakam")]


def make(session, name: str, result: str) -> None:
    session.execute(f"CREATE FUNCTION acme.{name}(event jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT {result} $$")


def test_everything_is_there_and_goes_on(private_cluster):
    old = private_cluster("upgrade", LAZY)
    db = Database(old, "shop").create()
    keys = db.project("acme")
    owner, other = db.login("acme", "admin"), db.login("acme", "admin", name="login_other")
    writer = db.login("acme", "write")
    make(owner, "mark", "event || '{\"mapped\": true}'")
    owner.execute("SELECT rakam.set_mapper('acme', 'page', 'acme.mark(jsonb)')")
    owner.execute("SELECT rakam.set_mapper('acme', NULL, 'rakam.map_referrer(jsonb)')")
    # Another one of its name, of somebody else, is not the mapper that was set.
    make(owner, "gone", "event")
    owner.execute("SELECT rakam.set_mapper('acme', 'late', 'acme.gone(jsonb)')")
    owner.execute("DROP FUNCTION acme.gone(jsonb)")
    make(other, "gone", "event")
    db.admin.execute("SELECT rakam.set_quota('acme', 1000000, NULL, NULL, NULL)")
    db.admin.execute("ALTER DATABASE shop SET rakam.threads = 2")
    writer.execute("INSERT INTO acme.users (id) VALUES ('ada')")
    for n in range(20):
        collect(writer, "acme", "page", {"_id": str(n), "n": n, "dropped": n})
    db.flush("acme")
    # The foreign table has a column less than its catalog rows, and the file hidden rows.
    db.admin.execute("SELECT rakam.drop_field('acme', 'page', 'dropped')")
    db.admin.execute("SELECT rakam.delete_events('acme', 'page', 'n < 3')")
    for n in range(20, 40):
        collect(writer, "acme", "page", {"_id": str(n), "n": n})
    db.tick()
    for n in range(40, 60):
        collect(writer, "acme", "page", {"_id": str(n), "n": n})
    assert all(db.tiers("acme", "page").values())
    queries = (
        EVENTS,
        "SELECT id, created_at FROM acme.users",
        "SELECT * FROM rakam.fields ORDER BY collection, field_id",
        "SELECT * FROM rakam.data_files ORDER BY path",
        "SELECT name, read_role, write_role, admin_role, events_per_second FROM rakam_internal.project",
    )
    before = {query: db.all(query) for query in queries}
    assert len(before[EVENTS]) == 57 and all(row[2] for row in before[EVENTS])
    number = db.one("SELECT 'acme.mark(jsonb)'::regprocedure::oid")
    db.close()

    new = upgraded(private_cluster, old, LAZY)
    db = Database(new, "shop")
    assert {query: db.all(query) for query in queries} == before
    assert db.one("SELECT 'acme.mark(jsonb)'::regprocedure::oid") != number, "by its oid it would be found as well"
    assert db.one("SHOW rakam.threads") == "2"
    wait_until(lambda: db.worker_pid(), "a worker in the new cluster")
    writer = db.connect("login_acme_write")
    for n in range(60, 80):
        collect(writer, "acme", "page", {"_id": str(n), "n": n})
    collect(writer, "acme", "page", {"_id": "5", "n": -1})
    writer.execute("SELECT rakam.collect_with_key(%s, 'page', '{\"n\": 80}')", (keys["write_key"],))
    db.tick()
    db.flush("acme")
    tiers = db.tiers("acme", "page")
    assert (tiers["inbox"], tiers["hot"]) == (0, 0)
    after = db.all(EVENTS)
    assert after[:57] == before[EVENTS]
    assert [row[1:3] for row in after[57:]] == [(n, True) for n in range(60, 81)]
    db.all("SELECT * FROM rakam.compact('acme')")
    assert db.all(EVENTS) == after
    assert db.all("SELECT detail FROM rakam.health() WHERE status = 'error'") == []
    collect(writer, "acme", "late", {"n": 1})
    [(error,)] = db.all("SELECT error FROM rakam.dead_letter")
    assert "function acme.gone(jsonb) does not exist (SQLSTATE 42883)" in error
    # Functions are followed as before.
    db.admin.execute("ALTER FUNCTION acme.mark(jsonb) RENAME TO marked")
    collect(writer, "acme", "page", {"n": 81})
    db.tick()
    assert db.one("SELECT mapped FROM acme.page WHERE n = 81") is True
    db.project("second")
    collect(db.admin, "second", "page", {"n": 1})
    assert db.one("SELECT count(*) FROM second._all") == 1
    db.close()


def test_storages_and_sources(private_cluster):
    """To its storages the new server is another one; a source goes on where it was."""
    settings = {**AT_ONCE, "rakam.source_refresh": "200ms"}
    old = private_cluster("upgrade_lake", settings)
    db = Database(old, "lake").create()
    folder, zone = make_storage(db, "lake"), make_storage(db, "zone")
    db.project("acme", "lake")
    fill(db)
    db.flush()
    # Made again before the storage that it names, whose name comes later.
    db.admin.execute("CREATE SERVER arrivals TYPE 'files' FOREIGN DATA WRAPPER rakam_source OPTIONS (storage 'zone')")
    put(old, zone, "in/a.ndjson", [{"n": n} for n in range(10)])
    options = {"collection": "arrived", "prefix": "in"}
    db.admin.execute("SELECT rakam.create_source('acme', 'arrivals', 'arrivals', %s)", (json.dumps(options),))
    offsets = "SELECT split, next_offset::text, state FROM rakam.offsets"
    wait_until(lambda: [state for _, _, state in db.all(offsets)] == ["ended"], "the first object is read")
    before = db.all(offsets)
    db.wait_column("acme.arrived", "n")
    db.close()

    new = upgraded(private_cluster, old, settings)
    db = Database(new, "lake")
    assert db.all(offsets) == before
    arrived = "SELECT count(*), count(DISTINCT n) FROM acme.arrived"
    assert db.all(arrived) == [(10, 10)]
    put(old, zone, "in/b.ndjson", [{"n": 10}])
    wait_until(lambda: db.all(arrived) == [(11, 11)], "the object that came later")
    with refused("2BP01"):
        db.admin.execute("DROP SERVER arrivals")
    owned_by_others(db, folder, objects(folder))
    db.close()


def test_a_server_that_is_being_upgraded_has_no_workers(private_cluster):
    cluster = private_cluster("upgrade_alone")
    db = Database(cluster, "shop").create()
    db.project("acme")
    collect(db.admin, "acme", "page", {"n": 1})
    db.tick()
    assert workers(cluster)
    db.close()
    cluster.stop()
    cluster.run("pg_ctl", "start", "-w", "-D", cluster.data, "-l", cluster.log, "-o", "-b")
    assert db.one("SELECT count(*) FROM acme.page") == 1
    # The launcher would be there by now, and the resident that it starts.
    time.sleep(2)
    assert workers(cluster) == []
    db.close()
    cluster.restart(SETTINGS)
    wait_until(lambda: db.worker_pid(), "a worker in a server as any other")
    db.close()
