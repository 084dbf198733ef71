"""Where storages and files are, however that is written: overlapping storages, attached tables, exports."""

from __future__ import annotations

import shutil
from pathlib import Path

from harness.database import Database, in_background, one, refused, wait_until
from harness.lake import check, files, files_of, fill, health, make_storage, objects, rewritten, stat


def server(db: Database, name: str, url: str) -> None:
    db.admin.execute(f"CREATE SERVER {name} FOREIGN DATA WRAPPER rakam OPTIONS (url '{url}')")


def subfolder(folder: Path, path: str) -> Path:
    made = folder / path
    made.mkdir(parents=True)
    for owned in (made, *made.parents):
        if owned == folder:
            break
        shutil.chown(owned, folder.owner(), folder.group())
    return made


def link_to(db: Database, folder: Path) -> Path:
    link = db.cluster.folder / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    return link


def in_use(lake) -> tuple[Database, Path]:
    """With a file, so that the storage is this database's, which may delete there."""
    db, folder = lake
    fill(db)
    db.flush()
    return db, folder


def parquet(db: Database, folder: Path, path: str) -> Path:
    """A Parquet file of somebody's in a storage, as the server's user would put it there."""
    made = folder / path
    if not made.parent.exists():
        subfolder(folder, str(made.parent.relative_to(folder)))
    source = db.cluster.make_folder("source") / "one.parquet"
    if not source.exists():
        db.admin.execute("SELECT rakam.copy_to('acme', 'SELECT 1 AS one', %s)", (f"file://{source}",))
    shutil.copy(source, made)
    shutil.chown(made, folder.owner(), folder.group())
    return made


def test_storages_that_overlap_are_refused(lake):
    db, folder = lake
    link = link_to(db, folder)
    subfolder(folder, "sub")
    overlapping = (
        (f"file://{folder}", "is the same place as"),
        (f"file://{folder}/", "is the same place as"),
        (f"FILE://{folder.parent}//./{folder.name}", "is the same place as"),
        (f"file://{link}", "is the same place as"),
        (f"file://{folder}/sub", "lies within"),
        (f"file://{link}/to/come", "lies within"),
        (f"file://{folder.parent}", "contains"),
    )
    for n, (url, how) in enumerate(overlapping):
        server(db, f"n{n}", url)
        for call in ("SELECT rakam.create_project('other', %s)", "SELECT * FROM rakam.rebuild_catalog(%s)"):
            try:
                db.admin.execute(call, (f"n{n}",))
            except Exception as error:
                assert (error.sqlstate, error.diag.message_primary) == (
                    "22023", f'url of storage "n{n}" overlaps that of another storage',
                )  # fmt: skip
                assert error.diag.message_detail == f'It {how} the url of server "lake", which is in use.'
                assert "beside it" in error.diag.message_hint
            else:
                raise AssertionError(f"{call} with {url}")
    # One beside it, which is not moved into it later, nor the other way round; nobody minds what no project uses.
    beside = make_storage(db, "beside")
    db.project("other", "beside")
    for name, url in (("beside", folder), ("beside", folder / "sub"), ("beside", link), ("lake", beside / "sub")):
        with refused("22023", message=f'storage "{name}" overlaps'):
            db.admin.execute(f"ALTER SERVER {name} OPTIONS (SET url 'file://{url}')")
    db.admin.execute(f"ALTER SERVER n0 OPTIONS (SET url 'file://{beside}')")
    # Another spelling of its own place is none of another storage.
    db.admin.execute(f"ALTER SERVER lake OPTIONS (SET url 'file://{link}/')")
    db.admin.execute(f"ALTER SERVER lake OPTIONS (SET url 'file://{folder}')")
    # A server with a new name is the storage that it was.
    db.admin.execute("ALTER SERVER beside RENAME TO renamed")
    db.project("third", "renamed")
    assert db.one("SELECT count(*) FROM rakam_internal.storage") == 3
    fill(db, "third")
    fill(db)
    db.flush()
    assert len(files_of(db, "renamed")) == len(files_of(db, "lake")) == 1


def test_of_two_sessions_one_takes_a_place(lake):
    db, folder = lake
    spare = db.cluster.make_folder("storage-spare")
    server(db, "first", f"file://{spare}")
    server(db, "second", f"file://{spare}/sub")
    db.admin.execute("BEGIN; SELECT rakam.create_project('one', 'first')")
    _, thread, outcome = in_background(
        db, lambda session: session.execute("SELECT rakam.create_project('two', 'second')")
    )
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%%''two''%%'"
    # In its own transaction a session sees the activity of when it looked first.
    observer = db.connect()
    wait_until(lambda: outcome or one(observer, waiting) == 1, "the other session waits")
    db.admin.execute("COMMIT")
    thread.join()
    assert outcome[0].sqlstate == "22023"


def test_overlaps_from_before_lose_nothing(lake):
    """Three storages on one place, one of them a folder deeper, as no call makes them any more."""
    db, folder = lake
    subfolder(folder, "sub")
    for name, url in (("deeper", f"{folder}/sub"), ("same", folder)):
        make_storage(db, name)
        db.project(f"of_{name}", name)
        with refused("22023"):
            db.admin.execute(f"ALTER SERVER {name} OPTIONS (SET url 'file://{url}')")
        db.admin.execute(
            "ALTER EVENT TRIGGER rakam_server_changed DISABLE;"
            f"ALTER SERVER {name} OPTIONS (SET url 'file://{url}');"
            "ALTER EVENT TRIGGER rakam_server_changed ENABLE"
        )
    # A project whose folder is the other storage.
    db.project("sub", "lake")
    for project in ("acme", "of_deeper", "of_same", "sub"):
        fill(db, project)
        db.flush(project)
        db.admin.execute("SELECT rakam.copy_to(%s, 'SELECT 1 AS one', 'export.parquet')", (project,))
    db.tick()
    before = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"of_same/export.parquet", "sub/of_deeper/export.parquet", "sub/export.parquet"} <= before
    for storage in ("lake", "deeper", "same"):
        assert check(db, storage) == []
    db.admin.execute("UPDATE rakam_internal.storage_state SET checked_at = now() - interval '8 days'")
    db.tick()
    assert before <= {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for project in ("acme", "of_deeper", "of_same", "sub"):
        assert db.one(f"SELECT count(*) FROM {project}.seen") == 100


def test_a_storage_of_another_database_is_left_alone(lake):
    db, folder = lake
    fill(db)
    db.flush()
    other = Database(db.cluster, "lake_other")
    other.drop()
    other.create()
    try:
        server(other, "lake", f"file://{subfolder(folder, 'theirs/deep')}")
        other.project("theirs", "lake")
        fill(other, "theirs")
        other.flush("theirs")
        other.admin.execute("SELECT rakam.copy_to('theirs', 'SELECT 1 AS one', 'export.parquet')")
        other.tick()
        stray = parquet(db, folder, "theirs/stray.parquet")
        before = {path for path in folder.rglob("*") if path.is_file()}
        assert check(db) == [("theirs/stray.parquet", "orphan", stray.stat().st_size)]
        db.tick()
        assert {path for path in folder.rglob("*") if path.is_file()} == before - {stray}
        assert check(other) == []
    finally:
        other.drop()


def test_queued_orphans_are_looked_at_again(lake):
    db, folder = in_use(lake)
    theirs = [parquet(db, folder, f"acme/theirs/{n}.parquet") for n in range(3)]
    strays = [parquet(db, folder, f"acme/{name}.parquet") for name in ("stray", "other")]
    assert len(check(db)) == 5
    db.admin.execute("SELECT rakam.attach('acme', 'theirs', 'theirs/*.parquet')")
    assert stat(db)["orphans"] == 2
    # One that became somebody's in a way that nobody has told of.
    db.admin.execute(
        "UPDATE rakam_internal.file_deferred SET path = 'acme/theirs/0.parquet' WHERE path = 'acme/other.parquet'"
    )
    db.tick()
    assert ([path.exists() for path in strays], [path.exists() for path in theirs]) == ([False, True], [True] * 3)
    db.tick()
    assert [path for path, _, _ in check(db)] == ["acme/other.parquet"]
    assert db.one("SELECT count(*) FROM acme.theirs") == 3


def test_orphans_wait_while_files_are_attached(lake):
    db, folder = in_use(lake)
    theirs = parquet(db, folder, "acme/theirs/x.parquet")
    assert len(check(db)) == 1
    db.configure(failpoint="attach.before_commit=sleep(60000)")
    _, thread, outcome = in_background(
        db, lambda session: session.execute("SELECT rakam.attach('acme', 'theirs', 'theirs')")
    )
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 114 AND granted"
    wait_until(lambda: outcome or db.one(held) == 1, "the files are being attached")
    _, tick, done = in_background(db, lambda session: session.execute("SELECT rakam.tick()"))
    blocked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 114 AND NOT granted"
    wait_until(lambda: done or db.one(blocked) == 1, "the tick waits for it")
    db.configure(failpoint=None)
    thread.join()
    tick.join()
    assert not isinstance(outcome[0], Exception) and not isinstance(done[0], Exception), (outcome, done)
    assert theirs.exists()
    assert db.one("SELECT count(*) FROM acme.theirs") == 1


def test_attached_files_are_known_however_they_are_spelled(lake):
    db, folder = in_use(lake)
    link = link_to(db, folder)
    for name, url in (
        ("doubled", "doubled//*.parquet"),
        ("inner", f"file://{folder}//acme/./inner/*.parquet"),
        ("linked", f"FILE://{link}/acme/linked/"),
        ("shape", "shape/?.parquet"),
        ("single", "single/x.parquet"),
    ):
        parquet(db, folder, f"acme/{name}/x.parquet")
        db.admin.execute("SELECT rakam.attach('acme', %s, %s)", (name, url))
    parquet(db, folder, "acme/nobodys/x.parquet")
    assert [path for path, _, _ in check(db)] == ["acme/nobodys/x.parquet"]
    db.tick()
    assert len(objects(folder) - files(db)) == 5
    for name in ("doubled", "inner", "linked", "shape", "single"):
        assert db.one(f"SELECT one FROM acme.{name}") == 1


def test_exports_are_known_wherever_the_storage_is(lake):
    db, _ = lake
    real = db.cluster.make_folder("storage-real")
    link = link_to(db, real)
    server(db, "linked", f"file://{link}/./deep/")
    subfolder(real, "deep")
    db.project("on_link", "linked")
    fill(db, "on_link")
    db.flush()
    exports = ("own.parquet", f"file://{link}/deep/by_link.parquet", f"file://{real}//deep/real.parquet")
    for url in exports:
        db.admin.execute("SELECT rakam.copy_to('on_link', 'SELECT 1 AS one', %s)", (url,))
    expected = {"on_link/own.parquet", "by_link.parquet", "real.parquet"}
    assert check(db, "linked") == []
    db.tick()
    assert expected <= objects(real / "deep")
    # A copy of the database knows them as well.
    dump = db.cluster.make_folder("dump") / "pins.sql"
    db.cluster.run("pg_dump", "-f", dump, db.name, env=db.cluster.environment())
    restored = Database(db.cluster, "lake_restored")
    restored.drop()
    restored.create(extension=False)
    try:
        db.cluster.run("psql", "-X", "-q", "-f", dump, restored.name, env=db.cluster.environment())
        restored.admin.execute("SELECT rakam.adopt_storage('linked')")
        assert check(restored, "linked") == []
        restored.tick()
        assert expected <= objects(real / "deep")
    finally:
        restored.drop()


def test_what_cannot_be_noted_is_not_written(lake):
    db, folder = lake
    with db.connect() as session:
        session.execute("SET default_transaction_read_only = on")
        with refused("25006", message="into a storage"):
            session.execute("SELECT rakam.copy_to('acme', 'SELECT 1 AS one', 'export.parquet')")
        with refused("25006", message="into a storage"):
            session.execute("SELECT rakam.copy_to('acme', 'SELECT 1 AS one', 'export.rows', 'csv')")
        # No such file is ever taken for an orphan.
        session.execute("SELECT rakam.copy_to('acme', 'SELECT 1 AS one', 'export.csv')")
        elsewhere = db.cluster.make_folder("elsewhere") / "export.parquet"
        session.execute("SELECT rakam.copy_to('acme', 'SELECT 1 AS one', %s)", (f"file://{elsewhere}",))
    assert objects(folder) == {"acme/export.csv"}
    assert check(db) == []


def test_an_export_is_no_orphan_before_its_transaction_ends(lake):
    db, folder = in_use(lake)
    with db.connect(autocommit=False) as session:
        session.execute("SELECT rakam.copy_to('acme', 'SELECT 1 AS one', 'export.parquet')")
        assert [problem for _, problem, _ in check(db)] == ["orphan"]
        db.tick()
        assert objects(folder) - files(db) == {"acme/export.parquet"}
        session.commit()
    db.tick()
    assert (objects(folder) - files(db), check(db)) == ({"acme/export.parquet"}, [])


def test_a_dropped_project_leaves_nothing_that_fails(lake):
    """Neither the errors of its collections nor the storage that it was on."""
    db, folder = lake
    make_storage(db, "brief")
    db.project("gone", "brief")
    fill(db, "gone")
    db.flush("gone")
    collection = db.one("SELECT max(collection_id) FROM rakam_internal.collection")
    db.admin.execute(
        "INSERT INTO rakam_internal.job (job_key, failures, last_error, error_at) VALUES (%s, 3, 'x', now())",
        (f"flush/{collection}",),
    )
    db.admin.execute("SET rakam.allow_project_drop = on")
    db.admin.execute("SELECT rakam.drop_project('gone')")
    assert db.one("SELECT count(*) FROM rakam_internal.job WHERE job_key LIKE '%%/%%'") == 0
    db.tick()
    assert stat(db, "brief")["deferred"] == 0
    db.admin.execute("DROP SERVER brief CASCADE")
    wait_until(
        lambda: db.one("SELECT count(*) FROM rakam_internal.storage WHERE name = 'brief'") == 0, "it is forgotten"
    )
    db.tick()
    assert "error" not in {status for status, _, _ in health(db, "storage")}
    # One that has a project, or files to be deleted, is not.
    make_storage(db, "kept")
    db.project("stays", "kept")
    db.admin.execute("DROP SERVER kept CASCADE")
    with refused("58030"):
        db.tick()
    assert db.one("SELECT count(*) FROM rakam_internal.storage WHERE name = 'kept'") == 1
    assert files(db) == set()


def test_a_clock_that_is_set_back_stops_nothing(lake):
    db, folder = lake
    fill(db)
    db.flush()
    # Noted by the clock of then: an hour ahead.
    db.admin.execute(
        "UPDATE rakam_internal.storage_state SET failures = 3, failing_since = now(), last_error = 'x',"
        " retry_at = now() + interval '1 hour', reached_at = now() + interval '1 hour'"
    )
    wait_until(lambda: stat(db)["reachable"], "the background asks the storage again")
    nonce = "SELECT nonce FROM rakam_internal.storage_state"
    before = db.one(nonce)
    rewritten(db, folder)
    db.admin.execute("UPDATE rakam_internal.storage_state SET renewed_at = now() + interval '1 hour'")
    db.tick()
    assert db.one(nonce) != before
