"""A life with streams: starts, formats, packed records, shards that are split and merged, a service that throttles, iterators that
expire, streams that are made anew. kinesis-mock is nearer to the meaning, kinesalite is fast: what both can is tried with both."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict

import pytest
from harness import avro
from harness.buckets import FaultProxy
from harness.database import refused, wait_until
from harness.kinesis import Kinesis, aggregate, hash_key, hash_range

PROJECT = "acme"


@pytest.fixture(scope="module")
def project(db):
    db.project(PROJECT)
    db.configure(source_refresh="300ms")
    yield PROJECT
    db.configure(source_refresh=None)


@pytest.fixture(params=["kinesis", "kinesis_fast"])
def service(request, db, project) -> Kinesis:
    found = request.getfixturevalue(request.param)
    server_of(db, found)
    return found


def server_of(db, service: Kinesis, proxy: FaultProxy | None = None) -> str:
    """The server of a service, or of a proxy in front of it."""
    name = f"{service.engine}_{'proxied' if proxy else 'direct'}"
    if not db.one("SELECT count(*) FROM pg_foreign_server WHERE srvname = %s", name):
        service.create_server(db.admin, name, proxy)
    return name


def create(db, service: Kinesis, name: str, server: str | None = None, **options) -> None:
    given = {"stream": name, "collection": name} | options
    server = server or server_of(db, service)
    db.admin.execute("SELECT rakam.create_source(%s, %s, %s, %s)", (PROJECT, name, server, json.dumps(given)))


def drop(db, *names: str) -> None:
    for name in names:
        db.admin.execute("SELECT rakam.drop_source(%s, %s)", (PROJECT, name))


def stored(db, collection: str) -> list[int]:
    rows = db.all(
        f"SELECT (properties->>'n')::bigint FROM {PROJECT}._all WHERE _collection = %s ORDER BY 1", collection
    )
    return [n for (n,) in rows]


def wait_for(db, collection: str, expected: list[int]) -> None:
    wait_until(lambda: stored(db, collection) == expected, f"{len(expected)} events of {collection}", 120)


def states(db, source: str) -> dict[str, str]:
    return dict(db.all("SELECT split, state FROM rakam.offsets WHERE source = %s", source))


def error(db, source: str) -> str:
    return db.one("SELECT max(last_error) FROM rakam.stat_source WHERE source = %s", source) or ""


def keyed(numbers) -> list[tuple[str, bytes]]:
    """Records of many keys, so that every shard has some."""
    return [(f"key{n}", json.dumps({"n": n}).encode()) for n in numbers]


# -- where reading begins -------------------------------------------------------------------------------------------


def test_starts(db, service):
    stream = f"starts_{service.engine}"
    service.create_stream(stream, 2)
    placed = service.send(stream, keyed(range(20)))
    # Times are in milliseconds.
    time.sleep(0.02)
    between = time.time()
    time.sleep(0.02)
    placed += service.send(stream, keyed(range(20, 40)))
    shards = [shard["ShardId"] for shard in service.shards(stream)]
    of = {shard: [n for n, (there, _) in enumerate(placed) if there == shard] for shard in shards}
    assert all(of.values())
    # From this record of the one shard on; the other one from its beginning.
    named = of[shards[0]][len(of[shards[0]]) // 2]
    starts = {
        "earliest": ("earliest", list(range(40))),
        "time": (int(between * 1000), list(range(20, 40))),
        "text": (time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(between - 3600)), list(range(40))),
        "sequence": (
            {shards[0]: placed[named][1]},
            sorted([n for n in of[shards[0]] if n >= named] + of[shards[1]]),
        ),
    }
    if service.engine == "mock":
        # kinesalite does not answer who asks for what comes after a time when nothing did.
        starts["latest"] = ("latest", [])
    names = {kind: f"{kind}_{service.engine}" for kind in starts}
    for kind, name in names.items():
        create(db, service, name, stream=stream, start=starts[kind][0])
    for kind, name in names.items():
        wait_until(lambda name=name: len(states(db, name)) == 2, f"the shards of {name}")
        wait_for(db, name, starts[kind][1])
    service.send(stream, keyed(range(40, 50)))
    for kind, name in names.items():
        wait_for(db, name, [*starts[kind][1], *range(40, 50)])
    # A wrong one is told at once.
    with refused("22023"):
        create(db, service, "wrong", stream=stream, start={shards[0]: "x"})
    drop(db, *names.values())


# -- what records are -----------------------------------------------------------------------------------------------


def test_formats(db, project, kinesis_fast):
    schema = avro.schema("E", n="long", title="string")
    event = {"n": 5, "title": "größe"}
    kinesis_fast.create_stream("formats", 2)
    kinesis_fast.create_stream("schemas", 2)
    # A collection of the stream's name, unless the record says otherwise.
    create(db, kinesis_fast, "formats", collection=None)
    create(db, kinesis_fast, "schemas", format="avro", framing="confluent")
    db.admin.execute("SELECT rakam.register_avro_schema(%s, 'schemas', 7, %s)", (PROJECT, json.dumps(schema)))
    kinesis_fast.send(
        "formats",
        [
            ("a", b'{"n": 1}'),
            ("a", b'{"_collection": "routed", "n": 2}'),
            ("a", b'{"collection": "routed", "properties": {"n": 3}}'),
            ("a", b"\xff no json"),
            ("a", b'{"n": 4}'),
        ],
    )
    good, unknown = avro.confluent(7, schema, event), avro.confluent(8, schema, event)
    placed = kinesis_fast.send("schemas", [("a", good), ("a", unknown), ("a", good[:-3]), ("a", good)])
    wait_for(db, "formats", [1, 4])
    wait_for(db, "routed", [2, 3])
    wait_for(db, "schemas", [5, 5])
    letters = db.all("SELECT split, off::text, payload FROM rakam.dead_letter WHERE source = 'schemas' ORDER BY id")
    assert letters == [(*placed[1], unknown), (*placed[2], good[:-3])]
    assert db.one("SELECT payload FROM rakam.dead_letter WHERE source = 'formats'") == b"\xff no json"
    # Once its schema is known, the record is an event.
    db.admin.execute("SELECT rakam.register_avro_schema(%s, 'schemas', 8, %s)", (PROJECT, json.dumps(schema)))
    assert db.one("SELECT rakam.replay_dead_letters(%s, 'schemas')", PROJECT) == 1
    wait_for(db, "schemas", [5, 5, 5])
    drop(db, "formats", "schemas")


def test_packed_records(db, service):
    stream, packed_avro = f"packed_{service.engine}", f"packed_avro_{service.engine}"
    schema = avro.schema("E", n="long")
    for name in (stream, packed_avro):
        service.create_stream(name, 2)
    create(db, service, stream)
    create(db, service, packed_avro, format="avro", framing="confluent")
    db.admin.execute("SELECT rakam.register_avro_schema(%s, %s, 1, %s)", (PROJECT, packed_avro, json.dumps(schema)))
    first, second = service.open_shards(stream)
    inside, outside = hash_range(first)[1] - 1, hash_range(second)[0] + 1
    # A key of the first shard.
    key = next(k for k in (f"k{n}" for n in range(100)) if hash_key(k) <= hash_range(first)[1])

    def events(*numbers: int) -> list[tuple[str, bytes]]:
        return [(key, json.dumps({"n": n}).encode()) for n in numbers]

    service.send(
        stream,
        [
            (key, aggregate(events(1, 2, 3))),
            (key, b'{"n": 4}'),
            (key, aggregate(events(5, 6), explicit=inside)),
            # It has come to the wrong shard: its producer sends it again, as Amazon's does after a split.
            (key, aggregate(events(97, 98), explicit=outside)),
            # One of them is no event.
            (key, aggregate([*events(7), (key, b"no event"), *events(8)])),
        ],
    )
    records = [(key, avro.confluent(1, schema, {"n": n})) for n in range(10)]
    service.send(packed_avro, [(key, aggregate(records[:6])), (key, aggregate(records[6:]))])
    wait_for(db, stream, list(range(1, 9)))
    wait_for(db, packed_avro, list(range(10)))
    letters = db.all("SELECT payload FROM rakam.dead_letter WHERE source = %s", stream)
    assert letters == [(b"no event",)]
    drop(db, stream, packed_avro)


# -- shards that come and go ----------------------------------------------------------------------------------------


def test_resharding_loses_nothing_and_keeps_the_order_of_keys(db, service):
    stream = f"reshard_{service.engine}"
    service.create_stream(stream, 2)
    create(db, service, stream)
    keys = [f"user{n}" for n in range(8)]
    last = 60
    failed: list[Exception] = []
    reached = 0

    def publish() -> None:
        nonlocal reached
        try:
            for n in range(last):
                # One after the other: a request with two records of a key would not say which of them is first.
                service.send(stream, [(key, json.dumps({"_user": key, "n": n}).encode()) for key in keys])
                reached = n
        except Exception as problem:
            failed.append(problem)

    publisher = threading.Thread(target=publish)
    publisher.start()

    def when(n: int) -> None:
        wait_until(lambda: reached >= n or failed, f"{n} of each key are sent")

    when(10)
    service.split(stream, service.open_shards(stream)[0])
    when(25)
    shards = service.open_shards(stream)
    service.merge(stream, shards[1], shards[2])
    when(40)
    service.split(stream, service.open_shards(stream)[1])
    publisher.join()
    assert not failed, failed[0]
    wait_for(db, stream, sorted(n for n in range(last) for _ in keys))
    # What is stored first was received first.
    in_order = defaultdict(list)
    for user, n in db.all(
        f"SELECT _user, (properties->>'n')::int FROM {PROJECT}._all WHERE _collection = %s ORDER BY _received_at, 2",
        stream,
    ):
        in_order[user].append(n)
    assert dict(in_order) == {key: list(range(last)) for key in keys}
    # Every shard that was closed has ended, and each of the others is read.
    still_open = {shard["ShardId"] for shard in service.open_shards(stream)}
    there = {
        shard["ShardId"]: "open" if shard["ShardId"] in still_open else "ended" for shard in service.shards(stream)
    }
    wait_until(lambda: states(db, stream) == there, f"the shards are {there}")
    ended = db.all("SELECT DISTINCT state, lag_s FROM rakam.stat_source WHERE source = %s AND state = 'ended'", stream)
    assert ended == [("ended", 0)]
    drop(db, stream)


# -- a service that struggles ---------------------------------------------------------------------------------------


def test_a_seek_holds_for_the_shards_that_follow(db, project, kinesis):
    """A stream that was resharded: those that came of others begin where the seek says, too, not where the source once began."""
    stream = "sought"
    kinesis.create_stream(stream, 1)
    kinesis.send(stream, keyed(range(10)))
    kinesis.split(stream, kinesis.open_shards(stream)[0])
    kinesis.send(stream, keyed(range(10, 20)))
    time.sleep(1.1)
    between = int(time.time() * 1000)
    time.sleep(0.1)
    kinesis.send(stream, keyed(range(20, 30)))
    name = "seeker"
    create(db, kinesis, name, stream=stream, start=between)
    wait_for(db, name, list(range(20, 30)))
    wait_until(lambda: len(states(db, name)) == 3, "all shards are noted")
    db.admin.execute("SELECT rakam.seek_source(%s, %s, 'earliest', force => true)", (PROJECT, name))
    wait_for(db, name, sorted([*range(30), *range(20, 30)]))
    # And the other way round: nothing from before the moment is read of any shard.
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(between / 1000))
    db.admin.execute("SELECT rakam.seek_source(%s, %s, %s, force => true)", (PROJECT, name, moment))
    time.sleep(3)
    kinesis.send(stream, keyed([30]))
    expected = sorted([*range(30), *range(20, 30), *range(20, 31)])
    wait_for(db, name, expected)
    drop(db, name)


def test_expired_iterators_and_throttling(db, project, kinesis_fast, seed):
    with FaultProxy(kinesis_fast.endpoint, seed) as proxy:
        server = server_of(db, kinesis_fast, proxy)
        kinesis_fast.create_stream("struggle", 2)
        create(db, kinesis_fast, "struggle", server)
        throttled = {"aws_error": "ProvisionedThroughputExceededException"}
        proxy.set(
            {"match": {"target": "GetRecords"}, "every": 3, "fault": {"aws_error": "ExpiredIteratorException"}},
            {"match": {"target": "GetRecords"}, "every": 4, "fault": throttled},
            {"match": {"target": "GetShardIterator"}, "every": 2, "fault": throttled},
            {"match": {"target": "ListShards"}, "every": 2, "fault": {"aws_error": "LimitExceededException"}},
        )
        for n in range(0, 200, 20):
            kinesis_fast.send("struggle", keyed(range(n, n + 20)))
            wait_for(db, "struggle", list(range(n + 20)))
        assert all(fired > 0 for fired in proxy.fired())
        # Now and then is how a shard says that it is asked enough. What lasts is told, and how far behind nobody knows.
        proxy.set({"match": {"target": "GetRecords"}, "fault": throttled})
        wait_until(lambda: "ProvisionedThroughputExceeded" in error(db, "struggle"), "the throttling is told")
        lags = "SELECT count(lag_s) FROM rakam.stat_source WHERE source = 'struggle'"
        wait_until(lambda: db.one(lags) == 0, "how far behind is not known")
        proxy.clear()
        kinesis_fast.send("struggle", keyed(range(200, 220)))
        wait_for(db, "struggle", list(range(220)))
        wait_until(lambda: error(db, "struggle") == "", "nothing is told any more")
        drop(db, "struggle")
