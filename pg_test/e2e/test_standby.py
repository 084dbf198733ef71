"""A streaming standby has every event of the default storage: it answers the same, and goes on after promotion."""

from __future__ import annotations

import itertools
import json
import time
from collections import defaultdict

from harness import flights
from harness.database import Database, collect, one, refused, wait_until
from test_event_store import once, records

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


def test_sources_and_event_stores_go_on_after_promotion(private_cluster, kafka):
    """What was read is not read again, what waited to be sent is sent once, and events of a key stay in their order."""
    primary = private_cluster("primary")
    db = Database(primary, "streams").create()
    kafka.create_topic("promoted_in", 4)
    kafka.create_topic("promoted_out", 3)
    kafka.create_server(db.admin, "k")
    kafka.create_server(db.admin, "out")
    db.project("acme")
    db.project("sent")
    db.admin.execute(
        "SELECT rakam.create_source('acme', 'in', 'k', %s)",
        (json.dumps({"topics": ["promoted_in"], "collection": "e"}),),
    )
    db.admin.execute("SELECT rakam.set_event_store('sent', 'out', '{\"topic\": \"promoted_out\"}')")
    users = [f"u{n}" for n in range(5)]

    def publish(first: int, last: int) -> None:
        kafka.send("promoted_in", [json.dumps({"n": n}) for n in range(first, last)])

    def stored(base: Database) -> tuple[int, int]:
        rows = base.all("SELECT count(*), count(DISTINCT properties->>'n') FROM acme._all")
        return rows[0]

    def send(base: Database, n: int) -> None:
        events = [{"collection": "e", "properties": {"_user": user, "n": n}} for user in users]
        assert base.one("SELECT stored FROM rakam.collect_batch('sent', %s)", json.dumps(events)) == len(users)

    def nothing_waits(base: Database) -> bool:
        tables = " UNION ALL ".join(
            f"SELECT FROM rakam_internal.{t}" for t in ("outbox_0", "outbox_1", "outbox_2", "outbox_batch")
        )
        return base.one(f"SELECT count(*) FROM ({tables}) t") == 0

    publish(0, 1_000)
    wait_until(lambda: stored(db) == (1_000, 1_000), "the first events")
    send(db, 0)
    wait_until(lambda: nothing_waits(db), "the first events are sent")
    standby = primary.standby(f"{primary.name}-standby")
    private_cluster.made.append(standby)
    standby.start({"rakam.digest_interval": "100ms", "max_connections": "100"})
    replica = Database(standby, "streams")

    # More is read; what is collected waits, some of it as a batch that has its number, more behind it.
    publish(1_000, 2_000)
    wait_until(lambda: stored(db) == (2_000, 2_000), "more events")
    db.admin.execute("ALTER SERVER out OPTIONS (SET brokers '127.0.0.1:1')")
    send(db, 1)
    wait_until(lambda: db.one("SELECT count(*) FROM rakam_internal.outbox_batch") == 1, "a batch has its number")
    for n in range(2, 6):
        send(db, n)
    caught_up(db, replica)
    with refused("55000", hint="Connect to the primary", message="during recovery"):
        replica.admin.execute("SELECT rakam.set_event_store('sent', NULL)")
    assert stored(replica) == (2_000, 2_000)
    offsets = "SELECT split, next_offset FROM rakam.offsets ORDER BY 1"
    before = db.all(offsets)
    db.close()
    primary.stop("immediate")
    publish(2_000, 3_000)
    replica.close()
    standby.promote()
    began = time.monotonic()
    wait_until(lambda: stored(replica)[0] > 2_000, "events after promotion")
    took = time.monotonic() - began
    print(f"consumption went on {took:.2f} s after promotion")
    assert took < 5
    wait_until(lambda: stored(replica) == (3_000, 3_000), "each event once")
    assert all(now > then for (_, now), (_, then) in zip(replica.all(offsets), before, strict=True))

    replica.admin.execute(f"ALTER SERVER out OPTIONS (SET brokers '{kafka.brokers}')")
    wait_until(lambda: nothing_waits(replica), "what waited is sent")
    for n in range(6, 9):
        send(replica, n)
    wait_until(lambda: nothing_waits(replica), "what came since is sent")
    found = records(replica, kafka, "sent", "promoted_out")
    by_user = defaultdict(list)
    for _, key, event in once(found):
        by_user[key].append(event["n"])
    assert dict(by_user) == {user: list(range(9)) for user in users}
    # The batch under way kept its origin; then the promoted server has one of its own, since the old one may go on by itself.
    assert len({headers["rakam-origin"] for _, headers, *_ in found}) == 2
    replica.close()


def caught_up(db: Database, replica: Database) -> None:
    position = db.one("SELECT pg_current_wal_flush_lsn()")
    wait_until(
        lambda: one(replica.admin, "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", position), "replay of the WAL", 30
    )
