"""kill -9 at random under eight collecting clients: every acknowledged event is there once, nothing rolled back is.

RAKAM_CRASH_RUNS (default 3) sets the number of seeded runs; the full run is 50.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter

import psycopg
import pytest
from harness.cluster import Cluster
from harness.database import Database, collect, wait_until

RUNS = int(os.environ.get("RAKAM_CRASH_RUNS", "3"))
CLIENTS = 8
SECONDS = 3.0
KILLS = 3


class Client(threading.Thread):
    """Collects in transactions of random shape and remembers what it was told about each.

    Events carry `key`, not `_id`: an event stored twice must show, not be de-duplicated.
    """

    def __init__(self, db: Database, run: int, number: int, seed: int):
        super().__init__(daemon=True)
        self.db, self.run_number, self.number = db, run, number
        self.rng = random.Random(seed)
        self.ended = threading.Event()
        self.acknowledged: list[str] = []
        self.rolled_back: list[str] = []
        self.unknown: list[list[str]] = []
        self.unexpected: list[str] = []
        self.pid: int | None = None
        self.sequence = 0

    def keys(self, count: int) -> list[str]:
        self.sequence += count
        return [f"{self.run_number}-{self.number}-{self.sequence - index}" for index in range(count)]

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                with self.db.cluster.connect(self.db.name, autocommit=False) as session:
                    self.pid = session.info.backend_pid
                    while not self.ended.is_set():
                        self.transaction(session)
            except psycopg.OperationalError:
                time.sleep(0.05)
            except psycopg.Error as error:
                self.unexpected.append(f"{error.sqlstate}: {error}")
                return

    def transaction(self, session: psycopg.Connection) -> None:
        kept = self.keys(self.rng.choice([1, 1, 5, 40]))
        dropped: list[str] = []
        committing = False
        try:
            self.send(session, kept)
            if self.rng.random() < 0.2:
                dropped = self.keys(3)
                session.execute("SAVEPOINT s")
                self.send(session, dropped)
                session.execute("ROLLBACK TO s")
            if self.rng.random() < 0.15:
                session.rollback()
                dropped, kept = dropped + kept, []
            committing = True
            session.commit()
            self.acknowledged += kept
        except psycopg.Error:
            # Before the commit was sent nothing can have been stored; while it was under way nobody knows.
            if committing:
                self.unknown.append(kept)
            else:
                dropped = dropped + kept
            raise
        finally:
            self.rolled_back += dropped

    def send(self, session: psycopg.Connection, keys: list[str]) -> None:
        if len(keys) == 1:
            collect(session, "acme", "survived", {"key": keys[0]})
        else:
            events = json.dumps([{"collection": "survived", "properties": {"key": key}} for key in keys])
            session.execute("SELECT rakam.collect_batch('acme', %s)", (events,))


def kill_something(cluster: Cluster, db: Database, clients: list[Client], rng: random.Random) -> str:
    victim = rng.choice(["backend", "worker", "postmaster"])
    if victim == "backend":
        pid = rng.choice(clients).pid
        if pid is not None:
            cluster.kill9(pid)
    elif victim == "worker":
        workers = [pid for pid, title in cluster.processes().items() if "rakam" in title and "postgres" in title]
        if workers:
            cluster.kill9(rng.choice(workers))
    else:
        cluster.kill9_postmaster()
        cluster.start()
    return victim


@pytest.mark.parametrize("run", range(RUNS))
def test_kill_under_load(private_cluster, seed, run):
    rng = random.Random(seed * 1_000 + run)
    cluster = private_cluster("crash", {"rakam.flush_interval": "1s", "rakam.min_file_events": "1"})
    db = Database(cluster, "crash").create()
    db.project("acme")
    db.close()
    clients = [Client(db, run, number, rng.randrange(2**32)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    deadline = time.monotonic() + SECONDS
    killed = Counter()
    while time.monotonic() < deadline or killed.total() < KILLS or not enough(clients):
        assert time.monotonic() < deadline + 300, "the clients get nothing stored"
        time.sleep(rng.uniform(0.2, 1.0))
        killed[kill_something(cluster, db, clients, rng)] += 1
        if rng.random() < 0.5:
            try_to_flush(cluster, db, rng.random() < 0.5)
    for client in clients:
        client.ended.set()
    for client in clients:
        client.join(timeout=60)
        assert not client.is_alive()
    assert not [text for client in clients for text in client.unexpected]

    cluster.wait_ready()
    acknowledged = {key for client in clients for key in client.acknowledged}
    rolled_back = {key for client in clients for key in client.rolled_back}
    unknown = [group for client in clients for group in client.unknown]
    print(f"run {run}: killed {dict(killed)}; {len(acknowledged)} acknowledged, {len(rolled_back)} rolled back,"
          f" {len(unknown)} transactions unknown")  # fmt: skip
    assert len(acknowledged) > 100

    wait_until(lambda: db.one("SELECT to_regclass('acme.survived') IS NOT NULL"), "the table")
    for stage in ("after the crash", "after a tick", "after a flush", "after a compaction", "after a restart"):
        if stage == "after a tick":
            db.tick()
        elif stage == "after a flush":
            db.flush("acme")
        elif stage == "after a compaction":
            db.admin.execute("SELECT rakam.compact('acme')")
        elif stage == "after a restart":
            db.close()
            cluster.restart()
        stored = Counter(key for (key,) in db.all("SELECT coalesce(key, _extra->>'key') FROM acme.survived"))
        doubled = {key: count for key, count in stored.items() if count > 1}
        assert not doubled, f"{stage}: {len(doubled)} events twice, as {sorted(doubled)[:3]}"
        missing = acknowledged - set(stored)
        assert not missing, f"{stage}: {len(missing)} acknowledged events missing, as {sorted(missing)[:3]}"
        undead = rolled_back & set(stored)
        assert not undead, f"{stage}: {len(undead)} rolled-back events stored, as {sorted(undead)[:3]}"
        for group in unknown:
            present = sum(key in stored for key in group)
            assert present in (0, len(group)), f"{stage}: half a transaction: {present} of {len(group)}"
    db.close()


def enough(clients: list[Client]) -> bool:
    """Whether each client has some answers, however slow the machine is."""
    return all(client.unexpected or len(client.acknowledged) > 20 for client in clients)


def try_to_flush(cluster: Cluster, db: Database, compacts: bool) -> None:
    """A flush in the middle of it all, or a compaction too; that it may be killed is the point."""
    try:
        with cluster.connect(db.name) as session:
            session.execute("SET statement_timeout = '5s'")
            session.execute("SELECT rakam.flush('acme')")
            if compacts:
                session.execute("SELECT rakam.compact('acme')")
    except psycopg.Error:
        return
