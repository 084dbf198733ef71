"""A storage that is away: collecting and hot reads go on, nobody else waits, and the disk does not become full."""

from __future__ import annotations

import contextlib
import uuid

import psycopg
import pytest
from harness.database import Database, collect, refused, wait_until
from harness.lake import check, files_of, fill, health, make_storage, objects, stat


def test_an_outage_holds_up_nobody_else(lake):
    db, folder = lake
    make_storage(db, "other")
    db.project("rival", "other")
    fill(db)
    fill(db, "rival")
    db.flush()
    db.admin.execute("ALTER SYSTEM SET rakam.flush_max_age = '1s'")
    db.admin.execute("SELECT pg_reload_conf()")
    aside = folder.with_name("away")
    folder.rename(aside)
    try:
        fill(db, first=100)
        fill(db, "rival", first=100)
        wait_until(lambda: db.tiers("rival", "seen")["cold"] == 200, "the other storage's files", 40, 0.2)
        wait_until(lambda: stat(db)["reachable"] is False, "the outage being noticed", 40, 0.2)
        assert stat(db)["last_error"]
        assert str(folder) not in stat(db)["last_error"]
        assert stat(db)["pending_bytes"] > 0
        status, detail, hint = health(db, "storage")[1]
        assert (status, "lake fails since" in detail, "Collecting goes on" in hint) == ("error", True, True)
        fill(db, first=200)
        wait_until(lambda: db.tiers("acme", "seen")["hot"] == 200, "the digest", 20)
        assert db.one("SELECT count(*) FROM acme.seen WHERE _received_at > now() + interval '1 day'") == 0
        with refused("58030"):
            db.admin.execute("SELECT sum(n) FROM acme.seen")
        with refused("58030"):
            db.flush("acme")
    finally:
        aside.rename(folder)
    wait_until(lambda: db.tiers("acme", "seen")["cold"] == 300, "the backlog being written", 60, 0.2)
    assert db.one("SELECT sum(n) FROM acme.seen") == sum(range(300))
    assert stat(db)["reachable"] is True
    assert stat(db)["last_error"] is None
    check(db)
    db.tick()
    assert (check(db), objects(folder)) == ([], files_of(db, "lake"))


def test_a_full_hot_tier_refuses_events_until_there_is_room(lake):
    db, folder = lake
    used = db.one("SELECT sum(pg_total_relation_size(('rakam_internal.' || t)::regclass)) FROM unnest(%s::text[]) t",
                  ["inbox_0", "inbox_1", "inbox_2", "inbox_parked", "hot_chunk"])  # fmt: skip
    limit = int(used) + (2 << 20)
    set_limit(db, limit)
    aside = folder.with_name("away")
    folder.rename(aside)
    # Nothing that compression makes small.
    long = "".join(uuid.uuid4().hex for _ in range(1000))
    sent = 0
    with pytest.raises(psycopg.errors.DiskFull) as caught:
        for _ in range(1_000):
            fill_long(db, sent, long)
            sent += 1
    assert "stat_lake" in (caught.value.diag.message_hint or "")
    assert sent > 10
    # Every way in, with no room at all.
    db.wait_column("acme.seen", "n")
    set_limit(db, 0)
    wait_until(lambda: is_refused(db, "SELECT rakam.collect('acme', 'seen', '{\"n\": 1}')"), "the first refusal")
    for statement in (
        'SELECT rakam.collect_batch(\'acme\', \'[{"collection": "seen", "properties": {}}]\')',
        "INSERT INTO acme.seen (n) VALUES (1)",
        "INSERT INTO acme.seen (n) SELECT generate_series(1, 20000)",
    ):
        assert is_refused(db, statement), statement
    status, detail, _ = health(db, "hot tier")[0]
    assert (status, "refused" in detail) == ("error", True)
    aside.rename(folder)
    set_limit(db, limit)

    def room() -> bool:
        db.flush("acme")
        db.tick()
        db.admin.execute("VACUUM rakam_internal.hot_chunk, rakam_internal.inbox_0")
        with contextlib.suppress(psycopg.errors.DiskFull):
            collect(db.admin, "acme", "seen", {"n": -1})
            return True
        return False

    wait_until(room, "room for events", 60, 0.5)
    # The digest may have made room for a few before it was seen that there was none.
    assert db.one("SELECT count(*) FROM acme.seen WHERE n < 0 OR text IS NOT NULL") == sent + 1


def set_limit(db: Database, limit: int) -> None:
    db.admin.execute(f"ALTER SYSTEM SET rakam.max_hot_bytes = {limit}")
    db.admin.execute("SELECT pg_reload_conf()")
    asked = "SELECT setting::float8 FROM pg_settings WHERE name = 'rakam.max_hot_bytes'"
    # Shown with six digits.
    wait_until(lambda: abs(db.one(asked) - limit) <= limit / 10_000, "the setting")


def is_refused(db: Database, statement: str) -> bool:
    try:
        db.admin.execute(statement)
    except psycopg.errors.DiskFull as error:
        assert "stat_lake" in (error.diag.message_hint or "")
        return True
    return False


def fill_long(db: Database, n: int, text: str) -> None:
    collect(db.admin, "acme", "seen", {"n": n, "text": text[n:] + text[:n]})
