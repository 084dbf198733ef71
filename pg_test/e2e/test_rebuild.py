"""`rakam.rebuild_catalog`: a database that is gone is made anew from what lies in its storage (SPEC: tiers).

The lost database is dropped, or still there in the tests that need it: then the new one has another `rakam.role_prefix`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
from pathlib import Path

import psycopg
import pytest
from harness.cluster import Cluster
from harness.database import Database, collect, collect_batch, in_background, notices_of, one, refused, wait_until
from harness.numbered import delete

NUMBERS = itertools.count()


@pytest.fixture
def lost(cluster, request):
    """Makes databases on a folder of their own each; drops them after the test."""
    made: list[Database] = []

    def make(folder: Path | None = None, server: Cluster = cluster, prefix: str | None = None) -> tuple[Database, Path]:
        number = next(NUMBERS)
        folder = folder or server.make_folder(f"rebuild-{number}")
        db = Database(server, f"rebuild_{number}")
        db.drop()
        db.create()
        made.append(db)
        if prefix:
            db.admin.execute(f"ALTER DATABASE {db.name} SET rakam.role_prefix = '{prefix}'")
            db.close()
        db.admin.execute(f"CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
        return db, Path(folder)

    yield make
    for db in made:
        if db.cluster.running:
            db.drop()


def events(db: Database, project: str, collection: str, numbers, **more) -> None:
    batch = [
        (
            collection,
            {"_id": f"{collection}-{n}", "_user": f"u{n % 7}", "_time": f"2026-01-{n % 28 + 1:02}T10:00:00Z", "n": n}
            | more,
        )
        for n in numbers
    ]
    for start in range(0, len(batch), 500):
        assert collect_batch(db.admin, project, batch[start : start + 500])[1] == 0


def rebuild(db: Database) -> list[tuple]:
    return db.all("SELECT * FROM rakam.rebuild_catalog('lake')")


def content(db: Database) -> dict[str, object]:
    """All that users see of the projects, but for what is not restored."""
    found: dict[str, object] = {
        "projects": db.all("SELECT project, storage, schema_mode FROM rakam.projects ORDER BY 1"),
        "collections": db.all("SELECT project, collection FROM rakam.collections ORDER BY 1, 2"),
        "fields": db.all(
            "SELECT project, collection, field, field_id, type, declared FROM rakam.fields ORDER BY 1, 2, 4"
        ),
        "versions": db.all(
            "SELECT project, collection, version, avro_schema::text FROM rakam.schema_versions ORDER BY 1, 2, 3"
        ),
        "files": db.all(
            "SELECT project, collection, path, n, bytes, period, first_day FROM rakam.data_files ORDER BY path"
        ),
        "stats": db.all(
            "SELECT project, collection, cold_events, cold_bytes, files FROM rakam.stat_collection ORDER BY 1, 2"
        ),
    }
    for project, collection in found["collections"]:
        table = f'{project}."{collection}"'
        found[table] = db.all(f"SELECT to_jsonb(t)::text FROM {table} t ORDER BY 1")
        for condition in ("n < 40", "n IS NULL", "_user = 'u3'", "_time >= '2026-01-20'"):
            found[f"{table} {condition}"] = (
                db.one(f"SELECT count(*) FROM {table} WHERE {condition}") if _has_n(db, project, collection) else None
            )
    return found


def _has_n(db: Database, project: str, collection: str) -> bool:
    return (
        db.one(
            "SELECT count(*) FROM rakam.fields WHERE project = %s AND collection = %s AND field = 'n'",
            project,
            collection,
        )
        > 0
    )


def every_kind_of_change(db: Database) -> None:
    """Two projects with all that can have happened to them."""
    for project in ("acme", "other"):
        db.project(project, "lake")
    db.admin.execute("SELECT rakam.set_schema_mode('other', 'fixed')")
    db.admin.execute("SELECT rakam.set_time_bounds('other', '30 years', '2 days')")
    for name, kind in (("price", "numeric(12,3)"), ("at", "inet"), ("deep", "jsonb"), ("tags", "text[]"), ("token", "uuid"),
                       ("day", "date"), ("single", "real"), ("never_sent", "boolean[]")):  # fmt: skip
        if db.one("SELECT count(*) FROM rakam.collections WHERE project = 'acme' AND collection = 'page'") == 0:
            db.admin.execute("SELECT rakam.create_collection('acme', 'page')")
        db.admin.execute("SELECT rakam.add_field('acme', 'page', %s, %s)", (name, kind))
    more = {"price": "12.5", "at": "10.0.0.1", "deep": {"a": [1, None]}, "tags": ["x", None], "day": "2026-02-03", "single": 0,
            "token": "00000000-0000-0000-0000-00000000002a", "free": {"k": "v"}, "gone": "value"}  # fmt: skip
    events(db, "acme", "page", range(300), **more)
    db.flush("acme")
    events(db, "acme", "page", range(300, 500), long="ä" * 100)
    events(db, "acme", "was", range(50))
    events(db, "acme", "dropped", range(20))
    events(db, "other", "page", range(77))
    db.flush()
    db.admin.execute("SELECT rakam.rename_collection('acme', 'was', 'Is now')")
    db.admin.execute("SELECT rakam.drop_collection('acme', 'dropped')")
    db.admin.execute("SELECT rakam.drop_field('acme', 'page', 'gone')")
    assert delete(db.admin, "acme", "page", "n::int % 10 = 3") == 50
    # Written anew without them, and hidden in the file.
    db.flush("acme", "page")
    assert delete(db.admin, "acme", "page", "n::int % 10 = 4") == 50
    events(db, "other", "page", range(77, 99), gone="later")
    db.flush()
    db.admin.execute("SELECT rakam.create_collection('other', 'empty')")
    db.tick()


def test_everything_comes_back(lost, cluster):
    db, folder = lost()
    every_kind_of_change(db)
    before = content(db)
    db.drop()
    db, _ = lost(folder)
    found = rebuild(db)
    assert found == db.all("SELECT project, collection, files, cold_events FROM rakam.stat_collection ORDER BY 1, 2")
    after = content(db)
    for what in before:
        assert after[what] == before[what], what
    assert after.keys() == before.keys()
    # Keys are not restored, roles are; nothing is deleted, and the storage still belongs to the lost one.
    assert db.one("SELECT count(*) FROM rakam_internal.api_key") == 0
    assert one(db.login("acme", "read"), "SELECT count(*) FROM acme.page") == 400
    with refused("42501"):
        one(db.login("other", "read"), "SELECT count(*) FROM acme.page")
    objects = {str(path) for path in folder.rglob("*.parquet")}
    db.tick()
    assert {str(path) for path in folder.rglob("*.parquet")} == objects
    # Copies of what is there are known; new events, fields and collections have ids of their own.
    events(db, "acme", "page", range(495, 510), gone="again", fresh=1)
    collect(db.admin, "acme", "dropped", {"n": 1})
    db.flush()
    assert db.one("SELECT count(*) FROM acme.page") == 410
    assert db.one("SELECT count(*) FROM acme.page WHERE gone = 'again'") == 10
    assert db.one("SELECT count(*) FROM acme.dropped") == 1
    # Once more, of what has been written since, by the new owner.
    db.admin.execute("SELECT rakam.adopt_storage('lake')")
    assert delete(db.admin, "acme", "page", "n >= 505") == 5
    db.tick()
    before = content(db)
    db.drop()
    db, _ = lost(folder)
    rebuild(db)
    after = content(db)
    for what in before:
        assert after[what] == before[what], what


def test_only_an_empty_database(lost):
    db, folder = lost()
    db.project("acme", "lake")
    events(db, "acme", "page", range(10))
    db.flush()
    with refused("55000", hint="empty database"):
        rebuild(db)
    other, _ = lost(folder, prefix="rakam_second_")
    with refused("42704"):
        other.admin.execute("SELECT rakam.rebuild_catalog('nowhere')")
    with refused("22023"):
        other.admin.execute("SELECT rakam.rebuild_catalog('rakam_local')")
    with refused("22004"):
        other.admin.execute("SELECT rakam.rebuild_catalog(NULL)")
    other.make_login("login_nobody")
    with refused("42501", hint="rakam_admin"):
        other.connect("login_nobody").execute("SELECT rakam.rebuild_catalog('lake')")
    assert rebuild(other) == [("acme", "page", 1, 10)]
    with refused("55000", message="rebuilt"):
        rebuild(other)


def test_roles_of_others_are_refused(lost):
    db, folder = lost()
    db.project("acme", "lake")
    events(db, "acme", "page", range(10))
    db.flush()
    # The database is alive: its roles are in use.
    other, _ = lost(folder)
    with refused("42710", message="rakam_acme_read", hint="rakam.role_prefix"):
        rebuild(other)
    assert other.one("SELECT count(*) FROM rakam.projects") == 0
    members = db.login("acme", "read")
    members.close()
    with db.cluster.connect() as postgres:
        db.close()
        postgres.execute(f"DROP DATABASE {db.name} WITH (FORCE)")
        # Somebody else's by now.
        postgres.execute("COMMENT ON ROLE rakam_acme_write IS 'mine'")
        with refused("42710", message="rakam_acme_write"):
            rebuild(other)
        postgres.execute("DROP ROLE rakam_acme_write")
    assert rebuild(other) == [("acme", "page", 1, 10)]
    # Members are members again.
    assert one(other.connect("login_acme_read"), "SELECT count(*) FROM acme.page") == 10


def test_files_that_came_after_the_description(lost):
    """The description is lost, or ends before the last files: they say enough themselves."""
    db, folder = lost()
    db.project("acme", "lake")
    events(db, "acme", "page", range(40), at="10.0.0.1")
    db.flush()
    events(db, "acme", "page", range(40, 100), late=True, tags=["a"])
    events(db, "acme", "fresh", range(5))
    db.flush()
    assert delete(db.admin, "acme", "page", "n < 10") == 10
    # The rewritten file lies beside the old one, which is kept.
    db.flush()
    db.admin.execute("SELECT rakam.rename_collection('acme', 'fresh', 'renamed')")
    events(db, "acme", "renamed", range(5, 7))
    db.flush()
    before = content(db)
    assert len(list(folder.rglob("*.parquet"))) > len(before["files"])
    db.drop()
    description = folder / "_rakam/description"
    logs = sorted(description.rglob("*.log"), key=lambda path: path.name)
    assert len(logs) >= 4
    for kept in (3, 1, 0):
        copy = folder.with_name(f"{folder.name}-{kept}")
        shutil.copytree(folder, copy)
        for path in [*folder.parent.glob(f"{copy.name}/**/*"), copy]:
            shutil.chown(path, folder.owner(), folder.group())
        for log in logs[kept:]:
            (copy / log.relative_to(folder)).unlink()
        if kept == 0:
            shutil.rmtree(copy / "_rakam/description")
        again, _ = lost(copy)
        told = notices_of(again.admin, "SELECT rakam.rebuild_catalog('lake')")
        assert [n.severity for n in told if "no description" in n.message] == (["WARNING"] if kept == 0 else [])
        after = content(again)
        for what in ("collections", "files", "stats", 'acme."page"', 'acme."renamed"'):
            # The copy lies elsewhere.
            found = json.loads(json.dumps(after[what], default=str).replace(str(copy), str(folder)))
            assert found == json.loads(json.dumps(before[what], default=str)), f"{what} with {kept} logs"
        again.drop()
        shutil.rmtree(copy)


def test_damage_is_told_and_left_out(lost):
    db, folder = lost()
    db.project("acme", "lake")
    for part in range(3):
        events(db, "acme", "page", range(100 * part, 100 * part + 100))
        db.flush()
    paths = [Path(path.removeprefix("file://")) for (path,) in db.all("SELECT path FROM rakam.data_files ORDER BY 1")]
    db.drop()
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-20])
    (folder / "acme/page/somebody.txt").write_text("x")
    again, _ = lost(folder)
    told = [
        n.message for n in notices_of(again.admin, "SELECT rakam.rebuild_catalog('lake')") if n.severity == "WARNING"
    ]
    assert len(told) == 2, told
    assert any(paths[0].name in text and "missing" in text for text in told)
    assert any(paths[1].name in text and "left out" in text for text in told)
    assert again.one("SELECT count(*) FROM acme.page") == 100


def test_many_projects_and_an_interrupted_rebuild(lost):
    db, folder = lost()
    names = [f"tenant_{k}" for k in range(16)]
    for name in names:
        db.project(name, "lake")
        for part in range(2):
            events(db, name, "page", range(10 * part, 10 * part + 10))
            db.flush(name)
    before = db.all("SELECT project, collection, files, cold_events FROM rakam.stat_collection ORDER BY 1, 2")
    assert [row[3] for row in before] == [20] * 16
    db.drop()
    again, _ = lost(folder)
    for point in ("rebuild.before_files", "rebuild.after_files"):
        again.configure(failpoint=f"{point}=error")
        try:
            # The worker is gone, in the middle of it.
            with refused("57P01"):
                rebuild(again)
        finally:
            again.configure(failpoint=None)
    assert again.one("SELECT count(*) FROM rakam.projects") == 16
    assert rebuild(again) == before
    for name in names:
        assert again.one(f"SELECT count(*) FROM {name}.page") == 20


POINTS = [
    "describe.before_put",
    "describe.after_put",
    "flush.after_upload",
    "rewrite.before_commit",
    "rewrite.after_upload",
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_between_storage_and_description(private_cluster, lost, point):
    """The server dies in the middle of a step, is up for a moment, and then lost for good."""
    # Without workers: nobody cleans up before the copy is made.
    server = private_cluster("rebuild", {"shared_preload_libraries": ""})
    db, folder = lost(server=server)
    db.project("acme", "lake")
    events(db, "acme", "page", range(100))
    db.flush()
    if point.startswith("rewrite"):
        assert delete(db.admin, "acme", "page", "n < 30") == 30
    else:
        events(db, "acme", "page", range(100, 160))
        db.tick()
    numbers = [int(n) for (n,) in db.all("SELECT n FROM acme.page ORDER BY n")]
    db.admin.execute(f"ALTER DATABASE {db.name} SET rakam.failpoint = '{point}=exit'")
    with pytest.raises(psycopg.OperationalError):
        db.flush()
    server.wait_ready()
    db.close()
    # What the crash left: all of it counts once, whatever of it was committed.
    copy = Path(server.make_folder("rebuild-copy"))
    server.kill9_postmaster()
    shutil.rmtree(copy)
    shutil.copytree(folder, copy)
    for path in [*copy.rglob("*"), copy]:
        shutil.chown(path, folder.owner(), folder.group())
    server.start()
    wait_until(lambda: alive(db), "the database")
    db.admin.execute(f"ALTER DATABASE {db.name} RESET rakam.failpoint")
    again, _ = lost(copy, server=server, prefix="rakam_again_")
    rebuild(again)
    assert [int(n) for (n,) in again.all("SELECT n FROM acme.page ORDER BY n")] == numbers
    # And after the server has gone on.
    db.close()
    db.flush()
    later, _ = lost(folder, server=server, prefix="rakam_later_")
    rebuild(later)
    assert [int(n) for (n,) in later.all("SELECT n FROM acme.page ORDER BY n")] == numbers
    for database in (db, again, later):
        database.drop()


def alive(db: Database) -> bool:
    try:
        return db.one("SELECT 1") == 1
    except psycopg.OperationalError:
        return False


def test_the_cost_of_the_description(lost):
    """However many projects change, it is an object for each look; and old ones go."""
    db, folder = lost()
    for k in range(8):
        db.project(f"cost_{k}", "lake")
        events(db, f"cost_{k}", "page", range(3))
    db.flush()
    db.tick()
    description = folder / "_rakam/description"
    before = {path.name for path in description.rglob("*.log")}
    for k in range(8):
        db.admin.execute("SELECT rakam.set_schema_mode(%s, 'fixed')", (f"cost_{k}",))
    db.tick()
    new = [path for path in description.rglob("*.log") if path.name not in before]
    assert 1 <= len(new) <= 3
    told = [json.loads(line) for path in new for line in path.read_text().splitlines()]
    assert {row["project_id"] for row in told if row.get("what") == "project"} == {
        id_ for (id_,) in db.all("SELECT project_id FROM rakam_internal.project")
    }
    db.tick()
    assert db.one("SELECT count(*) FROM rakam_internal.description_due") == 0
    # Nothing changes, nothing is written.
    names = {path.name for path in description.rglob("*")}
    for _ in range(3):
        db.tick()
    assert {path.name for path in description.rglob("*")} == names
    # A new state, in time, replaces what came before the last one.
    for _ in range(3):
        db.admin.execute("UPDATE rakam_internal.description SET log_bytes = 1::bigint << 40")
        db.admin.execute("SELECT rakam.set_schema_mode('cost_0', 'open')")
        db.tick()
    states = {path.name.split(".")[0] for path in description.rglob("*.state")}
    assert len(states) == 2
    assert min(path.name for path in description.rglob("*.log")) >= min(states)


def test_an_interrupted_rebuild_is_kept_as_it_is(lost):
    """Between two calls nothing goes out of use, and nobody deletes: the second one would take it for what it has to restore."""
    db, folder = lost()
    for name in ("acme", "other"):
        db.project(name, "lake")
        for part in range(3):
            events(db, name, "page", range(20 * part, 20 * part + 20))
            db.flush(name)
    assert delete(db.admin, "acme", "page", "n < 5") == 5
    db.tick()
    before = content(db)
    present = {str(path) for path in folder.rglob("*.parquet")}
    db.drop()
    again, _ = lost(folder)
    try:
        for point in ("rebuild.before_files", "rebuild.after_files"):
            again.configure(failpoint=f"{point}=error", file_retention="0")
            with refused("57P01"):
                rebuild(again)
            again.configure(failpoint=None)
            with refused("55000", message="being rebuilt", hint="rakam.rebuild_catalog"):
                again.admin.execute("SELECT rakam.adopt_storage('lake')")
            # What is not entered yet is no orphan.
            assert again.all("SELECT * FROM rakam.check_storage('lake')") == []
            again.tick()
            assert {str(path) for path in folder.rglob("*.parquet")} == present
        assert again.one("SELECT count(*) FROM rakam.data_files") > 0
        for call in (
            "SELECT rakam.compact('acme')",
            "SELECT rakam.delete_events('acme', 'page', 'n > 30')",
            "SELECT rakam.drop_collection('acme', 'page')",
            "SET rakam.allow_project_drop = on; SELECT rakam.drop_project('acme')",
        ):
            with refused("55000", message="being rebuilt", hint="rakam.rebuild_catalog"):
                again.admin.execute(call)
        # Flushes go on, and leave what is there.
        again.flush()
        told = again.all("SELECT status, hint FROM rakam.health() WHERE \"check\" = 'rebuild'")
        assert [status for status, _ in told] == ["warning"] and "rakam.rebuild_catalog('lake')" in told[0][1]
        rebuild(again)
        after = content(again)
        for what in before:
            assert after[what] == before[what], what
        assert again.all("SELECT status FROM rakam.health() WHERE \"check\" = 'rebuild'") == []
        again.admin.execute("SELECT rakam.adopt_storage('lake')")
        again.all("SELECT * FROM rakam.compact('acme')")
        again.tick()
        assert again.one("SELECT count(*) FROM acme.page") == 55
    finally:
        again.configure(failpoint=None, file_retention=None)


def test_others_work_while_a_catalog_is_rebuilt(lost):
    """A rebuild may take hours: events of others come to data files, by calls and by themselves."""
    db, folder = lost()
    db.project("acme", "lake")
    events(db, "acme", "page", range(50))
    db.flush()
    db.drop()
    again, _ = lost(folder)
    again.configure(failpoint="rebuild.before_files=sleep(600000)", flush_max_age="1s")
    try:
        _, thread, outcome = in_background(
            again, lambda session: session.execute("SELECT rakam.rebuild_catalog('lake')")
        )
        wait_until(lambda: again.one("SELECT count(*) FROM rakam.projects") == 1, "the projects")
        again.project("near")
        again.admin.execute("SET statement_timeout = '30s'")
        events(again, "acme", "page", range(50, 60))
        again.flush("acme")
        events(again, "near", "page", range(10))
        again.flush("near")
        again.tick()
        # By itself, also once the storages have been seen after.
        for n in range(1, 3):
            events(again, "near", "page", range(10 * n, 10 * n + 10))
            wait_until(lambda n=n: again.tiers("near", "page")["cold"] == 10 * n + 10, "a flush by itself", 60)
            wait_until(
                lambda: again.one("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'rakam gc'") == 0,
                "its end",
            )
        assert thread.is_alive()
    finally:
        again.configure(failpoint=None, flush_max_age=None)
    thread.join(60)
    assert not isinstance(outcome[0], Exception), outcome
    assert again.one("SELECT count(*) FROM acme.page") == 60


def test_a_new_owner_describes_everything(lost):
    """What another copy of the database has said of the storage is not what the one that adopted it knows."""
    db, folder = lost()
    db.project("acme", "lake")
    events(db, "acme", "page", range(60))
    events(db, "acme", "dropped", range(5))
    db.flush()
    db.tick()
    copy = Database(db.cluster, f"{db.name}_copy")
    copy.drop()
    db.close()
    with db.cluster.connect() as postgres:

        def copied() -> bool:
            with contextlib.suppress(psycopg.errors.ObjectInUse):
                postgres.execute(f"CREATE DATABASE {copy.name} TEMPLATE {db.name}")
                return True
            postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (db.name,))
            return False

        wait_until(copied, "the copy of the database", 30)
    try:
        copy.admin.execute("SELECT rakam.adopt_storage('lake')")
        assert delete(copy.admin, "acme", "page", "n < 10") == 10
        copy.admin.execute("SELECT rakam.drop_collection('acme', 'dropped')")
        events(copy, "acme", "page", range(60, 70))
        copy.flush()
        before = content(copy)
        again, _ = lost(folder, prefix="rakam_again_")
        rebuild(again)
        after = content(again)
        for what in before:
            assert after[what] == before[what], what
    finally:
        copy.drop()


@pytest.mark.parametrize("adopts", [True, False])
def test_a_server_that_was_set_back(private_cluster, lost, adopts):
    """Its disk is an older one: what it describes now has nothing to do with the logs of the future that it lost."""
    server = private_cluster("setback")
    db, folder = lost(server=server)
    db.project("acme", "lake")
    events(db, "acme", "page", range(20))
    db.flush()
    db.tick()
    kept = server.folder / "kept"

    def swap(source: Path, target: Path) -> None:
        db.close()
        server.stop()
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "-a", source, target], check=True)
        server.start()
        wait_until(lambda: alive(db), "the database")

    swap(server.data, kept)
    # The future that is lost.
    for n in range(3):
        events(db, "acme", "page", range(20 + 10 * n, 30 + 10 * n))
        db.flush()
    db.admin.execute("SELECT rakam.create_collection('acme', 'never')")
    db.tick()
    swap(kept, server.data)
    if adopts:
        db.admin.execute("SELECT rakam.adopt_storage('lake')")
    events(db, "acme", "page", range(100, 115))
    db.flush()
    assert delete(db.admin, "acme", "page", "n < 3") == 3
    db.tick()
    before = content(db)
    assert before["stats"][0][2] == 32
    again, _ = lost(folder, server=server, prefix="rakam_again_")
    rebuild(again)
    after = content(again)
    for what in before:
        assert after[what] == before[what], what
    for database in (db, again):
        database.drop()
