"""The engine's memory is bounded: for the whole server where the library is preloaded, else for each session."""

from __future__ import annotations

import json
import random
import re
import string
import threading
import time

import psycopg
import pytest
from harness.database import Database, one, refused, wait_until

LIMIT_MB = 16
SESSIONS = 8
EVENTS = 40_000
BODY_BYTES = 200
QUERY = "SELECT count(*), sum(length(body)) FROM acme.page"


@pytest.fixture
def filled(private_cluster):
    """A database whose only collection is a data file of about 6 MB, on a server with a limit of 16 MB."""

    def make(suffix: str, **settings: str) -> Database:
        cluster = private_cluster(suffix, {"rakam.memory_limit": f"{LIMIT_MB}MB", **settings})
        db = Database(cluster, "memory").create()
        db.project("acme")
        rng = random.Random(7)
        for _ in range(EVENTS // 2_000):
            bodies = ["".join(rng.choices(string.ascii_letters, k=BODY_BYTES)) for _ in range(2_000)]
            events = [{"collection": "page", "properties": {"body": body}} for body in bodies]
            db.admin.execute("SELECT rakam.collect_batch('acme', %s)", (json.dumps(events),))
        db.flush()
        return db

    return make


def in_use_mb(connection: psycopg.Connection) -> int:
    detail = one(connection, """SELECT detail FROM rakam.health() WHERE "check" = 'engine memory'""")
    found = re.match(rf"(\d+) of {LIMIT_MB} MB in use", detail)
    assert found, detail
    return int(found[1])


def hold(session: psycopg.Connection, name: str = "held") -> None:
    """Leaves a scan open that has read its first row."""
    session.execute(f"DECLARE {name} CURSOR FOR SELECT body FROM acme.page")
    session.execute(f"FETCH 1 FROM {name}").fetchone()


def test_concurrent_scans_stay_below_the_limit(filled):
    db = filled("memory")
    expected = (EVENTS, EVENTS * BODY_BYTES)
    assert db.admin.execute(QUERY).fetchone() == expected
    done: list[str] = []
    wrong: list[object] = []
    seen: list[int] = []
    began = time.monotonic()

    def enough() -> bool:
        """A few seconds, and on a slow machine until there was what the test is about."""
        both = done.count("right") >= 5 and done.count("refused") >= 5
        return bool(wrong) or time.monotonic() - began > 6 and both and max([0, *seen]) > LIMIT_MB // 2

    def read(session: psycopg.Connection) -> None:
        while time.monotonic() - began < 120 and not enough():
            try:
                row = session.execute(QUERY).fetchone()
                done.append("right")
                if row != expected:
                    wrong.append(row)
            except psycopg.Error as error:
                done.append("refused")
                if error.sqlstate != "53200" or "rakam.memory_limit" not in (error.diag.message_hint or ""):
                    wrong.append(error)

    threads = [threading.Thread(target=read, args=(db.connect(),), daemon=True) for _ in range(SESSIONS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(in_use_mb(db.admin))
    for thread in threads:
        thread.join()
    assert wrong == []
    assert done.count("right") >= 5 and done.count("refused") >= 5, done
    assert max(seen) <= LIMIT_MB
    assert max(seen) > LIMIT_MB // 2, "the scans were to fill the memory"
    wait_until(lambda: in_use_mb(db.admin) == 0, "all memory given back")
    assert db.admin.execute(QUERY).fetchone() == expected


def test_what_a_session_holds_comes_back_however_it_ends(filled):
    db = filled("memory")
    for end in ("commit", "savepoint", "error", "cancel", "close", "terminate"):
        session = db.connect(autocommit=False)
        session.execute("SAVEPOINT before")
        hold(session)
        assert in_use_mb(db.admin) > 0
        match end:
            case "commit":
                session.commit()
            case "savepoint":
                session.execute("ROLLBACK TO before")
            case "error":
                with refused("22012"):
                    session.execute("SELECT 1 / 0")
                session.rollback()
            case "cancel":
                session.execute("SET statement_timeout = '100ms'")
                with refused("57014"):
                    session.execute("SELECT pg_sleep(10), (SELECT count(*) FROM acme.page)")
            case "close":
                session.close()
            case "terminate":
                db.admin.execute("SELECT pg_terminate_backend(%s)", (session.info.backend_pid,))
        wait_until(lambda: in_use_mb(db.admin) == 0, f"all memory given back after {end}")
        session.close()


def test_a_killed_session_leaves_nothing(filled):
    db = filled("memory")
    session = db.connect(autocommit=False)
    hold(session)
    assert in_use_mb(db.admin) > 0
    db.cluster.kill9(session.info.backend_pid)

    def recovered() -> bool:
        try:
            return in_use_mb(db.admin) == 0
        except psycopg.OperationalError:
            return False

    wait_until(recovered, "the server is back and nothing is in use", timeout_s=60)
    assert db.admin.execute(QUERY).fetchone()[0] == EVENTS


def test_without_preload_each_session_has_its_own_limit(filled):
    db = filled("memory", shared_preload_libraries="")
    sessions = [db.connect(autocommit=False) for _ in range(4)]
    for session in sessions:
        hold(session)
        assert 0 < in_use_mb(session) <= LIMIT_MB
    assert in_use_mb(db.admin) == 0
    # Together they hold more than the limit; one session cannot.
    assert sum(in_use_mb(session) for session in sessions) > LIMIT_MB
    with refused("53200", hint="rakam.memory_limit"):
        for n in range(8):
            hold(sessions[0], f"more_{n}")
