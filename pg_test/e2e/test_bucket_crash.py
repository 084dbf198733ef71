"""kill -9 of workers, backends and the postmaster while the files lie in a bucket that misbehaves: every acknowledged event
is there once, every file of the manifest is in the bucket, and nothing else is once `check_storage` has compared and a
`tick` has collected garbage.

RAKAM_S3_CRASH_RUNS (default 2) sets the number of seeded runs; the full run is 150. RAKAM_LEDGER names a file to which each
run appends a line: see ledger/s3_crash.tsv.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import psycopg
import pytest
from harness.buckets import Bucket, FaultProxy
from harness.cluster import Cluster
from harness.database import Database, collect_batch, wait_until
from harness.numbered import make, send
from test_crash import Client, kill_something, try_to_flush

RUNS = int(os.environ.get("RAKAM_S3_CRASH_RUNS", "2"))
LEDGER = os.environ.get("RAKAM_LEDGER")
CLIENTS = 3
SECONDS = 4.0
KILLS = 3
SETTINGS = {
    "rakam.flush_interval": "1s",
    "rakam.min_file_events": "1",
    "rakam.file_retention": "0",
    "rakam.storage_timeout": "5s",
}


def faults(rng: random.Random) -> list[dict]:
    """What the store does in a run: every kind of fault, more of one or the other."""

    def chance() -> float:
        return rng.choice([0.05, 0.1, 0.25])

    return [
        {"chance": chance(), "fault": {"s3_error": "SlowDown", "status": 503}},
        {"chance": chance(), "fault": {"s3_error": "InternalError", "status": 500}},
        {"chance": chance(), "fault": {"reset": "before"}},
        {"chance": chance(), "fault": {"reset": "after"}},
        {"match": {"method": "GET"}, "chance": chance(), "fault": {"truncate": rng.choice([10, 1000])}},
        {"match": {"method": "GET"}, "chance": chance(), "fault": {"bandwidth": 50_000}},
        {"chance": chance(), "fault": {"delay_ms": rng.choice([50, 400])}},
    ]


class Deleter(threading.Thread):
    """Stores events of which half are deleted again, so that files are written anew and their old objects collected."""

    def __init__(self, db: Database):
        super().__init__(daemon=True)
        self.db = db
        self.ended = threading.Event()
        self.kept: set[str] = set()
        self.doomed: set[str] = set()
        self.deleted: set[str] = set()

    def run(self) -> None:
        number = 0
        while not self.ended.is_set():
            number += 1
            keys = [f"{number}-{n}" for n in range(40)]
            try:
                with self.db.cluster.connect(self.db.name) as session:
                    session.execute("SET statement_timeout = '10s'")
                    events = [("half", {"key": key, "gone": n % 2 == 0}) for n, key in enumerate(keys)]
                    collect_batch(session, "acme", events)
                    self.kept.update(keys[1::2])
                    self.doomed.update(keys[0::2])
                    known = set(self.doomed)
                    session.execute("SELECT rakam.flush('acme', 'half')")
                    session.execute("SELECT rakam.delete_events('acme', 'half', 'gone')")
                    self.deleted |= known
                    session.execute("SELECT rakam.flush('acme', 'half')")
                    session.execute("SELECT rakam.tick()")
            except psycopg.Error:
                # Killed, cancelled or refused by the store: all of that is the point.
                time.sleep(0.1)


def counted(db: Database, table: str) -> Counter:
    found = Counter(key for (key,) in db.all(f"SELECT coalesce(key, _extra->>'key') FROM acme.{table}"))
    doubled = {key: count for key, count in found.items() if count > 1}
    assert not doubled, f"{len(doubled)} events of {table} twice, as {sorted(doubled)[:3]}"
    return found


def check(db: Database, clients: list[Client], deleter: Deleter, stage: str) -> None:
    stored = set(counted(db, "survived"))
    missing = {key for client in clients for key in client.acknowledged} - stored
    assert not missing, f"{stage}: {len(missing)} acknowledged events missing, as {sorted(missing)[:3]}"
    undead = {key for client in clients for key in client.rolled_back} & stored
    assert not undead, f"{stage}: {len(undead)} rolled-back events stored, as {sorted(undead)[:3]}"
    if deleter.kept:
        half = set(counted(db, "half"))
        assert deleter.kept <= half, f"{stage}: {len(deleter.kept - half)} events missing that nobody deleted"
        assert not deleter.deleted & half, f"{stage}: {len(deleter.deleted & half)} deleted events are back"


@pytest.mark.parametrize("run", range(RUNS))
def test_kill_while_the_store_misbehaves(private_cluster, s3, seed, run):
    rng = random.Random(seed * 1_000 + run)
    cluster: Cluster = private_cluster("s3-crash")
    # They outlive the postmaster.
    with cluster.connect() as session:
        for name, value in SETTINGS.items():
            session.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        session.execute("SELECT pg_reload_conf()")
    with FaultProxy(s3.endpoint, rng.randrange(2**31)) as proxy:
        there = s3.storage(f"crash/{seed}-{run}", proxy.url)
        db = Database(cluster, "crash").create()
        there.create(db.admin, "lake")
        db.project("acme", "lake")
        db.close()
        clients = [Client(db, run, number, rng.randrange(2**32)) for number in range(CLIENTS)]
        deleter = Deleter(db)
        proxy.set(*faults(rng))
        for thread in [*clients, deleter]:
            thread.start()
        deadline = time.monotonic() + SECONDS
        killed: Counter = Counter()
        while time.monotonic() < deadline or killed.total() < KILLS:
            time.sleep(rng.uniform(0.2, 1.5))
            killed[kill_something(cluster, db, clients, rng)] += 1
            if rng.random() < 0.5:
                try_to_flush(cluster, db, rng.random() < 0.5)
        for thread in [*clients, deleter]:
            thread.ended.set()
        for thread in [*clients, deleter]:
            thread.join(timeout=60)
            assert not thread.is_alive()
        assert not [text for client in clients for text in client.unexpected]
        fired = proxy.fired()
        proxy.clear()
        cluster.wait_ready()
        wait_until(lambda: db.one("SELECT to_regclass('acme.survived') IS NOT NULL"), "the table", 30)
        check(db, clients, deleter, "after the kills")

        db.flush("acme")
        left = problems(db, "lake")
        wait_until(lambda: is_clean(db, there), lambda: unclean(db, there), 60, 0.5)
        check(db, clients, deleter, "after a flush")
        events = len({key for client in clients for key in client.acknowledged}) + len(deleter.kept)
        files = len(there.objects())
        if LEDGER:
            line = [seed, run, sum(killed.values()), sum(fired), events, files, left["missing"], left["orphan"]]
            with Path(LEDGER).open("a") as ledger:
                ledger.write("\t".join(map(str, line)) + "\n")
        db.close()


def problems(db: Database, storage: str) -> Counter:
    """What `check_storage` finds: orphans of uploads that a kill cut off, which it queues, but never a file that is missing
    or harmed."""
    found = db.all("SELECT path, problem FROM rakam.check_storage(%s)", storage)
    assert not [row for row in found if row[1] != "orphan"], found
    return Counter(problem for _, problem in found)


def is_clean(db: Database, there: Bucket) -> bool:
    """After garbage was collected every file of the manifest is there, whole, and nothing else is; `check_storage` says
    the same."""
    db.tick()
    files, objects = manifest(db, there.url), there.objects()
    # Files that the background has merged since are gone from both.
    missing = (files.items() - objects.items()) & manifest(db, there.url).items()
    assert not missing, f"missing: {sorted(missing)[:3]}"
    return files == objects and problems(db, "lake").total() == 0


def unclean(db: Database, there: Bucket) -> str:
    """What is there although it should not be, and what keeps it."""
    left = there.objects().items() - manifest(db, there.url).items()
    kept = {
        table: db.all(f"SELECT {table} FROM rakam_internal.{table} LIMIT 5")
        for table in ("file_intent", "file_deferred")
    }
    owner = db.one("SELECT owner FROM rakam.stat_lake WHERE storage = 'lake'")
    running = db.all(
        "SELECT backend_type, state, backend_xmin, query FROM pg_stat_activity WHERE backend_xmin IS NOT NULL"
    )
    return f"the objects of the manifest and no others; others {sorted(left)[:3]}, {problems(db, 'lake')}, {kept}, {owner}, {running}"


def manifest(db: Database, url: str) -> dict[str, int]:
    found = db.all("SELECT path, bytes FROM rakam.data_files WHERE path LIKE %s", f"{url}/%")
    return {path.removeprefix(f"{url}/"): size for path, size in found}


def test_kill_before_expired_files_go(private_cluster, s3):
    """The worker that takes out of the manifest what is kept no longer is killed before its commit, again and again: the
    answers stay the same, then the events go for good, and their objects."""
    cluster: Cluster = private_cluster("s3-expiry", {"rakam.file_retention": "0", "rakam.min_file_events": "1"})
    db = Database(cluster, "expiry").create()
    there = s3.storage("expiry")
    there.create(db.admin, "lake")
    for project, storage in (("far", "lake"), ("near", None)):
        db.project(project, storage)
        make(db, project, "page")
        for first, year in ((200, 2026), (0, 2020), (100, 2021)):
            send(db, project, "page", range(first, first + 50), _time=f"{year}-01-01T10:00:00Z")
            db.flush(project)
            send(db, project, "page", range(first + 50, first + 100), _time=f"{year}-01-01T11:00:00Z")
            db.tick()
    kept = list(range(200, 300))
    keep = f"{db.one('SELECT extract(year FROM now())::int') - 2024} years"
    expired = "SELECT count(*) FROM rakam.data_files WHERE project = %s AND max_time < '2024-01-01'"
    mark = cluster.log_mark()
    # Before there is anything to remove: workers of the background come upon it, too.
    db.admin.execute("ALTER DATABASE expiry SET rakam.failpoint = 'compact.before_expiry=exit'")
    for project in ("far", "near"):
        steady(db, "SELECT rakam.set_retention(%s, 'page', %s::interval)", project, keep)
        with pytest.raises(psycopg.OperationalError):
            db.admin.execute("SELECT rakam.compact(%s, 'page')", (project,))
        db.close()
        cluster.wait_ready()
        assert steady(db, content(project)) == kept
        assert steady(db, expired, project) == 3
    assert cluster.log_since(mark).count("was terminated by signal 9") >= 2
    steady(db, "ALTER DATABASE expiry RESET rakam.failpoint")
    # Workers that began before are the last to be killed.
    for project in ("far", "near"):
        steady(db, "SELECT count(*) FROM rakam.flush(%s)", project)
        steady(db, "SELECT count(*) FROM rakam.compact(%s)", project)
        assert steady(db, content(project)) == kept
        assert db.tiers(project, "page") == {"inbox": 0, "hot": 0, "cold": 100}
        assert db.one(expired, project) == 0
    problems(db, "lake")
    wait_until(lambda: is_clean(db, there), lambda: unclean(db, there), 60, 0.5)
    assert [db.one(content(project)) for project in ("far", "near")] == [kept, kept]
    db.close()


def content(project: str) -> str:
    return f"SELECT array_agg(n ORDER BY n) FROM {project}.page"


def steady(db: Database, statement: str, *values: str) -> object:
    """The first value of a statement's answer; it is repeated while a killed worker takes the server with it."""
    answers = []

    def answered() -> bool:
        try:
            row = db.admin.execute(statement, values or None)
        except psycopg.OperationalError:
            db.close()
            return False
        answers.append(row.fetchone()[0] if row.description else None)
        return True

    wait_until(answered, statement)
    return answers[0]
