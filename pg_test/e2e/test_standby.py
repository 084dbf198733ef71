"""A streaming standby has every event of the default storage: it answers the same, and goes on after promotion."""

from __future__ import annotations

import itertools
import json

from harness import flights
from harness.database import Database, collect, one, refused, wait_until

EVENTS = 20_000
SUMS = "SELECT count(*), sum(distance), count(DISTINCT _user), min(_time), max(_time) FROM acme.departure"


def test_standby_promoted_after_a_flush(private_cluster):
    primary = private_cluster("primary")
    db = Database(primary, "standby").create()
    db.project("acme")
    source = flights.events(EVENTS)

    def send(count: int) -> None:
        while count > 0:
            batch = list(itertools.islice(source, min(count, 500)))
            text = json.dumps([{"collection": "departure", "properties": properties} for properties in batch])
            assert db.one("SELECT stored FROM rakam.collect_batch('acme', %s)", text) == len(batch)
            count -= len(batch)

    send(EVENTS // 2)
    db.flush("acme")
    standby = primary.standby(f"{primary.name}-standby")
    private_cluster.made.append(standby)
    standby.start({"rakam.digest_interval": "100ms", "max_connections": "100"})
    replica = Database(standby, "standby")

    # While streaming: some events in files, some in chunks, some in the inbox; more files after a second flush.
    send(EVENTS // 4)
    db.tick()
    send(EVENTS // 4)
    caught_up(db, replica)
    assert replica.all(SUMS) == db.all(SUMS)
    db.flush("acme")
    collect(db.admin, "acme", "departure", {"distance": 1, "_user": "the last one", "_time": "2013-12-31T23:59:59Z"})
    caught_up(db, replica)
    expected = db.all(SUMS)
    assert expected[0][0] == EVENTS + 1
    assert replica.all(SUMS) == expected

    # Writes are refused, clearly.
    for statement in (
        "SELECT rakam.collect('acme', 'departure', '{}')",
        "SELECT rakam.tick()",
        "SELECT rakam.flush()",
        "SELECT rakam.create_project('other')",
        "SELECT rakam.drop_collection('acme', 'departure')",
        "SELECT rakam.delete_events('acme', 'departure', 'true')",
        "SELECT rakam.set_quota('acme', 1, NULL, NULL, NULL)",
    ):
        with refused("55000", hint="Connect to the primary", message="during recovery"):
            replica.admin.execute(statement)
    # PostgreSQL's own words for its own statements.
    with refused("25006", message="INSERT"):
        replica.admin.execute("INSERT INTO acme.departure (distance) VALUES (1)")

    db.close()
    primary.stop("immediate")
    replica.close()
    standby.promote()
    assert replica.all(SUMS) == expected
    wait_until(lambda: replica.worker_pid(), "a worker after promotion")
    collect(replica.admin, "acme", "departure", {"distance": 2})
    replica.tick()
    replica.flush("acme")
    after = replica.all(SUMS)[0]
    assert (after[0], after[1]) == (expected[0][0] + 1, expected[0][1] + 2)
    assert replica.tiers("acme", "departure")["cold"] == after[0]
    replica.close()


def caught_up(db: Database, replica: Database) -> None:
    position = db.one("SELECT pg_current_wal_flush_lsn()")
    wait_until(
        lambda: one(replica.admin, "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", position), "replay of the WAL", 30
    )
