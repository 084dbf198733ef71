"""The life of objects in a storage: orphans, deferred deletion, what keeps them, who owns them."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from pathlib import Path

import psycopg
from harness.database import collect, notices_of, refused, wait_until
from harness.lake import check, files, fill, health, make_storage, objects, rewritten, stat, wait_ready


def test_a_storage_compared_with_its_manifest(lake):
    db, folder = lake
    fill(db)
    db.flush()
    fill(db, first=100)
    db.flush()
    assert check(db) == []
    assert check(db, "rakam_local") == []
    intact = files(db)
    assert len(intact) == 2
    missing, corrupt = sorted(intact)
    size = (folder / missing).stat().st_size

    # Somebody's file; a copy under another name; one that another installation wrote; what a crashed write left.
    stray = folder / "acme" / "stray.parquet"
    stray.write_bytes(b"x" * 7)
    copy = folder / "acme" / "seen" / Path(corrupt).name
    shutil.copy(folder / corrupt, copy)
    left = folder / f"{corrupt}.{uuid.uuid4()}.tmp"
    left.write_bytes(b"half")
    foreign = folder / "acme" / "018f3c5e-0000-7000-8000-00000badf00d.parquet"
    foreign.write_bytes(b"theirs")
    (folder / missing).rename(folder / "_rakam" / "aside")
    with open(folder / corrupt, "r+b") as file:
        file.truncate((folder / corrupt).stat().st_size - 1)
    whole = (folder / corrupt).stat().st_size
    expected = [
        (str(stray.relative_to(folder)), "orphan", 7),
        (str(copy.relative_to(folder)), "orphan", copy.stat().st_size),
        (str(left.relative_to(folder)), "orphan", 4),
        (corrupt, "corrupt", whole),
        (missing, "missing", size),
    ]
    assert check(db) == sorted(expected)
    assert stat(db)["orphans"] == 3
    assert "1 are corrupt" in health(db, "storage contents")[0][1]
    db.tick()
    assert stat(db)["orphans"] == 0
    assert objects(folder) == {corrupt, str(foreign.relative_to(folder))}
    assert {problem for _, problem, _ in check(db)} == {"missing", "corrupt"}

    # The same size, other bytes at the end; and what is back is no problem any more.
    (folder / "_rakam" / "aside").rename(folder / missing)
    content = bytearray(copy_of(folder, corrupt, whole))
    (folder / corrupt).write_bytes(content)
    assert check(db) == [(corrupt, "corrupt", len(content))]


def copy_of(folder: Path, path: str, size: int) -> bytes:
    """The file as it was written but for one bit of its metadata."""
    content = bytearray((folder / path).read_bytes()[:size])
    content += b"?"
    return bytes(content)


def test_the_default_storage_compared_with_its_manifest(lake):
    db, _ = lake
    db.project("local")
    for first in (0, 100, 200):
        fill(db, "local", first=first)
        db.flush("local")
    assert check(db, "rakam_local") == []
    paths = [path for (path,) in db.all("SELECT path FROM rakam_internal.data_file ORDER BY file_id")]
    db.admin.execute("DELETE FROM rakam_internal.local_object WHERE path = %s", (paths[0],))
    db.admin.execute("UPDATE rakam_internal.local_object SET data = data || 'x' WHERE path = %s", (paths[1],))
    db.admin.execute(
        "UPDATE rakam_internal.local_object SET data = set_byte(data, length(data) - 30, 7) WHERE path = %s",
        (paths[2],),
    )
    db.admin.execute("INSERT INTO rakam_internal.local_object VALUES ('stray', 0, 1, 'x')")
    found = {(path, problem) for path, problem, _ in check(db, "rakam_local")}
    expected = {(paths[0], "missing"), (paths[1], "corrupt"), (paths[2], "corrupt"), ("stray", "orphan")}
    assert found == expected
    assert stat(db, "rakam_local")["orphans"] == 1
    db.tick()
    assert stat(db, "rakam_local")["orphans"] == 0
    assert db.one("SELECT count(*) FROM rakam_internal.local_object WHERE path = 'stray'") == 0


def test_only_server_admins_check_and_adopt(lake):
    db, _ = lake
    admin = db.login("acme", "admin", "read", "write")
    for call in ("SELECT rakam.check_storage('lake')", "SELECT rakam.adopt_storage('lake')"):
        with refused("42501", hint="rakam_admin"):
            admin.execute(call)
    with refused("42704"):
        check(db, "nothing")
    with refused("22004"):
        db.admin.execute("SELECT rakam.check_storage(NULL)")
    db.admin.execute("SELECT rakam.adopt_storage('rakam_local')")


def test_tenants_see_their_own_storages(lake):
    db, folder = lake
    make_storage(db, "other")
    db.project("rival", "other")
    db.project("local")
    fill(db, "acme", 10)
    fill(db, "rival", 10)
    db.tick()
    mine = db.login("acme", "read")
    rows = mine.execute("SELECT storage, url, owner FROM rakam.stat_lake").fetchall()
    assert rows == [("lake", f"file://{folder}", stat(db)["owner"])]
    assert {storage for (storage,) in db.all("SELECT storage FROM rakam.stat_lake")} == {"rakam_local", "lake", "other"}
    local = db.login("local", "read")
    assert local.execute("SELECT storage, reachable, orphans, deferred FROM rakam.stat_lake").fetchall() == [
        ("rakam_local", True, 0, 0)
    ]
    assert stat(db)["pending_bytes"] > 0
    db.flush("acme")
    assert stat(db)["pending_bytes"] == 0
    assert stat(db, "other")["pending_bytes"] > 0


def test_a_flush_that_crashed_leaves_no_orphan(lake):
    """At each step of a flush and of a deletion: what is announced is found again, and goes."""
    db, folder = lake
    cluster = db.cluster
    sent = 0
    for point in (
        "flush.after_intent", "flush.after_upload", "flush.before_commit", "owner.before_put", "owner.after_put",
        "gc.after_object",
    ):  # fmt: skip
        if point.startswith("owner"):
            # As at the storage's first use, or after a minute.
            db.admin.execute("UPDATE rakam_internal.storage_state SET renewed_at = now() - interval '1 hour'")
        if point == "gc.after_object":
            rewritten(db, folder)
        fill(db, first=sent)
        sent += 100
        db.admin.execute(f"ALTER DATABASE {db.name} SET rakam.failpoint = '{point}=exit'")
        db.close()
        cluster.wait_ready()
        with contextlib.suppress(psycopg.Error):
            db.flush("acme")
            db.tick()
        db.close()
        wait_ready(db)
        db.admin.execute(f"ALTER DATABASE {db.name} RESET rakam.failpoint")
        db.close()
        wait_ready(db)
        db.flush("acme")
        check(db)
        db.tick()
        assert check(db) == [], point
        assert objects(folder) == files(db), point
        assert stat(db)["owner"] == "this database", point
        assert db.one("SELECT count(*) FROM acme.seen") == sent, point


def test_what_somebody_may_need_is_kept(lake):
    db, folder = lake
    fill(db)
    db.flush()
    # An old snapshot, though it has not looked at the collection yet.
    reader = db.connect(autocommit=False)
    reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    reader.execute("SELECT 1")
    path = rewritten(db, folder)
    db.tick()
    assert path in objects(folder)
    assert stat(db)["deferred"] == 1
    reader.rollback()
    # A transaction that was prepared before, and is nobody's now.
    db.admin.execute("BEGIN")
    db.admin.execute("CREATE TABLE prepared_one ()")
    db.admin.execute("PREPARE TRANSACTION 'holds'")
    second = rewritten(db, folder)
    db.tick()
    assert second in objects(folder)
    db.admin.execute("ROLLBACK PREPARED 'holds'")
    # A pin.
    db.admin.execute(
        "INSERT INTO rakam_internal.file_pin SELECT storage_id, path, 'test', now() + interval '1 hour'"
        " FROM rakam_internal.file_deferred WHERE path = %s",
        (second,),
    )

    def gone() -> bool:
        db.tick()
        return path not in objects(folder)

    wait_until(gone, "the deletion of the file", 20, 0.2)
    assert second in objects(folder)
    assert (stat(db)["deferred"], check(db)) == (1, [])
    db.admin.execute("UPDATE rakam_internal.file_pin SET until = now()")
    db.tick()
    assert second not in objects(folder)
    # The retention.
    db.admin.execute("ALTER SYSTEM SET rakam.file_retention = '1h'")
    db.admin.execute("SELECT pg_reload_conf()")
    third = rewritten(db, folder)
    db.tick()
    assert third in objects(folder)
    assert check(db) == []


def test_an_owner_object_that_is_gone_or_spoilt_is_doubt(lake):
    db, folder = lake
    fill(db)
    db.flush()
    owner = folder / "_rakam" / "owner.json"
    content = json.loads(owner.read_text())
    assert content["database"] == "lake"
    assert content["epoch"] == 1
    for spoil in (owner.unlink, lambda: owner.write_text("{}"), lambda: rewrite_nonce(owner)):
        spoil()
        path = rewritten(db, folder)
        db.tick()
        assert path in objects(folder)
        assert health(db, "storage owner")[0][0] == "warning"
        db.admin.execute("SELECT rakam.adopt_storage('lake')")
        db.tick()
        assert path not in objects(folder)
        assert health(db, "storage owner") == []
    assert json.loads(owner.read_text())["epoch"] == 4


def rewrite_nonce(owner: Path) -> None:
    """As a copy of this server's disk would."""
    content = json.loads(owner.read_text())
    owner.write_text(json.dumps({**content, "nonce": str(uuid.uuid4())}))


def test_in_the_background_storages_are_compared_once_a_week(lake):
    db, folder = lake
    fill(db)
    db.flush()
    # One that a crash left, without an intent; and what somebody keeps there, of which only a called check says anything.
    left = folder / "acme" / Path(*files(db)).name
    left.write_bytes(b"?")
    (folder / "acme" / "export.parquet").write_bytes(b"1")
    (folder / "acme" / "export.csv").write_bytes(b"1")
    db.admin.execute("UPDATE rakam_internal.storage_state SET checked_at = now() - interval '8 days'")
    wait_until(lambda: not left.exists(), "the deletion of an orphan by the background", pause_s=0.2)
    assert objects(folder) == files(db) | {"acme/export.csv", "acme/export.parquet"}
    assert check(db) == [("acme/export.parquet", "orphan", 1)]
    # What copy_to writes is known, and what is attached.
    db.admin.execute("SELECT rakam.copy_to('acme', 'SELECT 1 AS one', 'mine.parquet')")
    db.tick()
    theirs = folder / "acme" / "theirs" / "x.parquet"
    theirs.parent.mkdir()
    shutil.copy(folder / "acme" / "mine.parquet", theirs)
    for path in (theirs.parent, theirs):
        shutil.chown(path, folder.owner(), folder.group())
    db.admin.execute("SELECT rakam.attach('acme', 'theirs', 'theirs/*.parquet')")
    assert check(db) == []
    db.admin.execute("SELECT rakam.detach('acme', 'theirs')")
    assert [problem for _, problem, _ in check(db)] == ["orphan"]
    db.tick()
    assert not theirs.exists()
    assert (objects(folder), check(db)) == (files(db) | {"acme/export.csv", "acme/mine.parquet"}, [])


def test_dropping_the_extension_tells_first_what_stays_outside(lake):
    db, folder = lake
    collect(db.admin, "acme", "page", {"n": 1})
    db.flush("acme")
    db.tick()
    count, size = db.all("SELECT count(*), sum(bytes)::int8 FROM rakam.data_files WHERE storage = 'lake'")[0]
    notices = notices_of(db.admin, "BEGIN; DROP EXTENSION rakam CASCADE; ROLLBACK")
    expected = f'{count} data files of {size} bytes stay in storage "lake", file://{folder}'
    assert (notices[0].message, notices[0].severity) == (expected, "NOTICE")
    assert "rakam.rebuild_catalog" in notices[0].hint
    assert db.one("SELECT count(*) FROM acme.page") == 1
    # Not to whoever may not drop it.
    reader = db.login("acme", "read")
    told: list[str] = []
    reader.add_notice_handler(lambda notice: told.append(notice.message_primary or ""))
    with refused("42501"):
        reader.execute("DROP EXTENSION rakam")
    assert told == []
    assert notices_of(db.admin, "DROP EXTENSION IF EXISTS no_such_extension")[0].message.startswith("extension")


def test_a_server_in_use_is_not_dropped_and_may_be_renamed(lake):
    db, _folder = lake
    collect(db.admin, "acme", "page", {"n": 1})
    db.flush("acme")
    with refused("2BP01", hint="CASCADE"):
        db.admin.execute("DROP SERVER lake")
    db.admin.execute("ALTER SERVER lake RENAME TO sea")
    # By the background, or now.
    db.tick()
    assert db.one("SELECT count(*) FROM acme.page") == 1
    assert db.one("SELECT storage FROM rakam.projects WHERE project = 'acme'") == "sea"
    collect(db.admin, "acme", "page", {"n": 2})
    db.flush("acme")
    assert db.one("SELECT sum(n) FROM acme.page") == 3
    assert db.one("SELECT count(*) FROM rakam.stat_lake WHERE storage = 'sea' AND owner = 'this database'") == 1
    # What CASCADE takes away is said by its absence, without naming the place.
    db.admin.execute("BEGIN; DROP SERVER sea CASCADE")
    with refused("58030", message='storage "sea" cannot be read'):
        db.admin.execute("SELECT sum(n) FROM acme.page")
    db.admin.execute("ROLLBACK")
    # A restored dump has no such dependency: a worker makes it again.
    db.admin.execute(
        "DELETE FROM pg_depend WHERE objid = 'acme._all'::regclass AND refclassid = 'pg_foreign_server'::regclass"
        " AND refobjid = (SELECT oid FROM pg_foreign_server WHERE srvname = 'sea')"
    )
    db.tick()
    with refused("2BP01"):
        db.admin.execute("DROP SERVER sea")


def test_a_tick_does_not_tell_of_the_storages_of_others(lake):
    db, folder = lake
    db.project("other")
    collect(db.admin, "acme", "secret_page", {"n": 1})
    db.flush("acme")
    db.admin.execute("ALTER SERVER lake OPTIONS (SET url 'file:///nowhere/at/all')")
    with refused("58030"):
        db.admin.execute("SELECT rakam.tick()")
    member = db.login("other", "write")
    member.execute("SELECT rakam.tick()")
    collect(member, "other", "page", {"n": 1})
    member.execute("SELECT rakam.tick()")
    assert db.one("SELECT n FROM other.page") == 1
    db.admin.execute(f"ALTER SERVER lake OPTIONS (SET url 'file://{folder}')")
    db.admin.execute("SELECT rakam.tick()")
