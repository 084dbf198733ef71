"""Kafka and Kinesis into the lake while everything breaks: every record that was committed is an event once, and no other is.

A run publishes events without an `_id`, so that nothing but the positions tells one from its copy, in JSON or Avro by turns.
Meanwhile consumers, the postmaster and the broker are killed, consumers are stopped until another one has their splits and
then go on, the bucket of the storage misbehaves, partitions or shards are added, and the events get fields that are new. What
has to be there the service itself is asked at the end, by a client that is not ours: of each partition as many events, with the
same numbers and checksums.

RAKAM_SOURCE_RUNS (default 2) and RAKAM_SOURCE_EVENTS (3000) are the runs with Kafka and the events of each, the full run is
200 of 50000; RAKAM_KINESIS_RUNS (1) and RAKAM_KINESIS_EVENTS (1200) those with Kinesis, the full run is 60 of 10000. RAKAM_LEDGER names
a file to which each run appends a line: see ledger/README.md. RAKAM_SOURCE_WHOLE (20000) events are in a topic before it is
read with nothing that breaks; the full run is 2000000, which takes minutes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import psycopg
import pytest
from botocore.exceptions import BotoCoreError, ClientError
from confluent_kafka import KafkaException
from conftest import available
from harness import avro
from harness.buckets import FaultProxy
from harness.cluster import Cluster
from harness.database import Database, wait_until
from harness.kafka import Kafka, Record
from harness.kinesis import Kinesis, hash_range
from test_bucket_crash import faults as bucket_faults
from test_bucket_crash import steady

RUNS = int(os.environ.get("RAKAM_SOURCE_RUNS", "2"))
EVENTS = int(os.environ.get("RAKAM_SOURCE_EVENTS", "3000"))
KINESIS_RUNS = int(os.environ.get("RAKAM_KINESIS_RUNS", "1"))
KINESIS_EVENTS = int(os.environ.get("RAKAM_KINESIS_EVENTS", "1200"))
WHOLE = int(os.environ.get("RAKAM_SOURCE_WHOLE", "20000"))
LEDGER = os.environ.get("RAKAM_LEDGER")
PARTITIONS = 4
# They outlive the postmaster.
SETTINGS = {
    "rakam.flush_interval": "1s",
    "rakam.min_file_events": "1",
    "rakam.storage_timeout": "5s",
    "rakam.source_refresh": "500ms",
}
# What one of these events has; the second schema has a field more.
FIELDS = {"part": "long", "n": "long", "value": "long", "aborted": "boolean"}
SCHEMAS = {1: avro.schema("Click", **FIELDS), 2: avro.schema("Click", **FIELDS, grown="string")}
# For a machine that is busy.
PATIENCE_S = 300


class Events:
    """Makes events, and reads what was made of them."""

    def __init__(self, form: str, rng: random.Random):
        self.form = form
        self.rng = rng
        self.made = 0
        self.has_grown = False

    def make(self, part: int, aborted: bool = False) -> tuple[int, bytes]:
        """The number of a new event, and the record."""
        self.made += 1
        event = {"part": part, "n": self.made, "value": self.rng.randrange(1_000_000), "aborted": aborted}
        if self.has_grown:
            event["grown"] = f"g{self.made}"
        if self.form == "json":
            return self.made, json.dumps(event).encode()
        schema_id = 2 if self.has_grown else 1
        return self.made, avro.confluent(schema_id, SCHEMAS[schema_id], event)

    def read(self, record: bytes) -> tuple[int, int, int]:
        """Part, number and value."""
        event = json.loads(record) if self.form == "json" else avro.read_confluent(SCHEMAS, record)
        assert not event["aborted"], f"the service gives an event of an aborted transaction: {event}"
        return event["part"], event["n"], event["value"]


class Publisher(threading.Thread):
    """Publishes events until it has made enough; what breaks it is part of the test, so it begins again."""

    def __init__(self, events: Events, count: int):
        super().__init__(daemon=True)
        self.events = events
        self.count = count
        # So that there is something to publish at each step.
        self.limit = 0
        self.rng = events.rng
        self.acknowledged: set[int] = set()
        self.aborted: set[int] = set()
        self.failures = 0
        self.unexpected: Exception | None = None

    def run(self) -> None:
        try:
            while self.events.made < self.count:
                if self.events.made < self.limit:
                    self.publish()
                time.sleep(self.rng.uniform(0, 0.05))
        except Exception as error:
            self.unexpected = error

    def publish(self) -> None:
        raise NotImplementedError

    def during(self, steps: list, rng: random.Random) -> None:
        """Takes these steps while it publishes, and waits for its end."""
        self.start()
        try:
            for at, step in enumerate(steps):
                self.limit = self.count * (at + 1) // len(steps)
                begun = self.count * (at + rng.random()) / len(steps)
                wait_until(lambda begun=begun: self.events.made >= begun or self.unexpected, "events", PATIENCE_S)
                step()
            self.join(PATIENCE_S)
            assert not self.is_alive(), f"after {PATIENCE_S} s {self.events.made} events of {self.count} are published"
            assert self.unexpected is None, self.unexpected
        finally:
            self.count = 0


class KafkaPublisher(Publisher):
    """In transactions, of which some are aborted, and without; a producer that failed is fenced by the next one."""

    def __init__(self, broker: Kafka, topic: str, events: Events, count: int):
        super().__init__(events, count)
        self.broker = broker
        self.topic = topic
        self.partitions = PARTITIONS
        self.transactional = None
        self.plain = None

    def publish(self) -> None:
        shape = self.rng.choices(["plain", "commit", "abort"], [3, 5, 2])[0]
        size = min(self.rng.choice([1, 5, 50, 200]), self.limit - self.events.made)
        parts = [self.rng.randrange(self.partitions) for _ in range(size)]
        made = [(part, *self.events.make(part, shape == "abort")) for part in parts]
        numbers = {number for _, number, _ in made}
        records = [Record(value, partition=part) for part, _, value in made]
        try:
            if shape == "plain":
                self.plain = self.plain or self.broker.producer()
                self.broker.send(self.topic, records, self.plain)
            else:
                self.transactional = self.transactional or self.broker.transactional(f"publisher-{self.topic}")
                self.broker.transaction(self.transactional, self.topic, records, shape == "commit")
            if shape != "abort":
                self.acknowledged |= numbers
        except KafkaException:
            # Whether it was committed nobody knows but the broker.
            self.failures += 1
            self.transactional = self.plain = None
            time.sleep(0.2)
        if shape == "abort":
            self.aborted |= numbers


class KinesisPublisher(Publisher):
    """Through a proxy that takes a part of the records only, or loses answers: a record may be there twice."""

    def __init__(self, service: Kinesis, stream: str, proxy: FaultProxy, events: Events, count: int):
        super().__init__(events, count)
        self.service = service
        self.stream = stream
        self.client = service.client_of(proxy.url)

    def publish(self) -> None:
        size = min(self.rng.choice([1, 5, 50, 100]), self.limit - self.events.made)
        made = [self.events.make(0) for _ in range(size)]
        try:
            self.service.send(self.stream, [(f"k{number % 97}", value) for number, value in made], self.client)
            self.acknowledged |= {number for number, _ in made}
        except (ClientError, BotoCoreError):
            self.failures += 1
            time.sleep(0.1)


class Trouble:
    """What is done to the server and to the service, each as often as it happened."""

    def __init__(self, cluster: Cluster, db: Database, rng: random.Random):
        self.cluster = cluster
        self.db = db
        self.rng = rng
        self.done: Counter = Counter()

    def consumers(self) -> list[int]:
        return [pid for pid, title in self.cluster.processes().items() if "rakam consumer" in title]

    def kill_consumer(self) -> None:
        if pids := self.consumers():
            self.cluster.kill9(self.rng.choice(pids))
            self.done["kills"] += 1

    def kill_postmaster(self) -> None:
        self.cluster.kill9_postmaster()
        self.cluster.start()
        self.done["kills"] += 1

    def stop_consumer(self) -> None:
        """A consumer is stopped wherever it is, until others have what it read, and then goes on as if nothing was."""
        pids = self.consumers()
        if not pids:
            return
        pid = self.rng.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        try:
            before = self.epochs()
            deadline = time.monotonic() + 15
            # It may have been stopped where everybody waits for it: then it goes on without having been replaced.
            while time.monotonic() < deadline:
                after = self.epochs()
                if before and after and any(after.get(split, 0) > epoch for split, epoch in before.items()):
                    self.done["takeovers"] += 1
                    break
                time.sleep(0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.done["stops"] += 1

    def epochs(self) -> dict[str, int]:
        with contextlib.suppress(psycopg.Error), self.db.cluster.connect(self.db.name) as session:
            session.execute("SET statement_timeout = '1s'")
            return dict(session.execute("SELECT split, epoch FROM rakam.offsets").fetchall())
        return {}


class Run:
    """A database with the project `acme` in the bucket and a source `clicks`, the events that come through it, and what is done
    to both."""

    def __init__(self, cluster: Cluster, storage, form: str, rng: random.Random):
        with cluster.connect() as session:
            for name, value in SETTINGS.items():
                session.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            session.execute("SELECT pg_reload_conf()")
        self.cluster = cluster
        self.rng = rng
        self.form = form
        self.db = Database(cluster, "sources").create()
        storage.create(self.db.admin, "lake")
        self.db.project("acme", "lake")
        self.events = Events(form, rng)
        self.trouble = Trouble(cluster, self.db, rng)

    def begin(self, **what: object) -> None:
        """Creates the source, of the server `k`."""
        framing = {"framing": "confluent"} if self.form == "avro" else {}
        options = {"collection": "clicks", "format": self.form, **framing, **what}
        self.db.one("SELECT rakam.create_source('acme', 'clicks', 'k', %s)", json.dumps(options))
        self.register(1)
        self.db.close()

    def register(self, schema_id: int) -> None:
        if self.form == "avro":
            call = "SELECT rakam.register_avro_schema('acme', 'clicks', %s, %s)"
            steady(self.db, call, schema_id, json.dumps(SCHEMAS[schema_id]))

    def grow(self) -> None:
        """Later events have a field that is new."""
        self.register(2)
        self.events.has_grown = True

    def suffer(self, publisher: Publisher, proxy: FaultProxy, faults: list[dict], steps: list) -> int:
        """Publishes through all of it; how many faults the proxy has made."""
        proxy.set(*faults)
        self.rng.shuffle(steps)
        steps.insert(self.rng.randrange(len(steps)), self.grow)
        publisher.during(steps, self.rng)
        fired = sum(proxy.fired())
        proxy.clear()
        self.cluster.wait_ready()
        return fired

    def published(self, records: Iterable[bytes]) -> Counter:
        """The events of what the service has."""
        return Counter(map(self.events.read, records))

    def note(self, seed: int, run: int, *cells: object) -> None:
        """A line of the ledger."""
        if LEDGER:
            with Path(LEDGER).open("a") as ledger:
                # Lost and doubled: the run would have failed.
                ledger.write("\t".join(map(str, [seed, run, *cells, 0, 0])) + "\n")


def sums(rows) -> dict[int, tuple[int, int, int]]:
    """Count, sum and checksum of each part."""
    found: dict[int, tuple[int, int, int]] = {}
    for row in rows:
        add(found, row)
    return found


def add(found: dict[int, tuple[int, int, int]], row: tuple[int, int, int]) -> None:
    part, number, value = row
    count, total, check = found.get(part, (0, 0, 0))
    found[part] = (count + 1, total + number, check + value * (number % 1000 + 1))


# JSON's numbers are double precision.
SUMS = (
    "SELECT part::int, count(*)::bigint, sum(n::bigint)::bigint, sum(value::bigint * (n::bigint % 1000 + 1))::bigint"
    " FROM acme.clicks GROUP BY part"
)


def check(db: Database, publisher: Publisher, expected: Counter) -> None:
    """Waits until as many events are there as were published, and compares."""
    count = expected.total()

    def arrived() -> bool:
        return steady(db, "SELECT to_regclass('acme.clicks') IS NOT NULL") and (
            steady(db, "SELECT count(*) FROM acme.clicks") >= count
        )

    try:
        wait_until(arrived, f"{count} events", PATIENCE_S, 0.2)
    except AssertionError as late:
        told = db.all(
            "SELECT split, state, lag_records, last_error, next_offset FROM rakam.stat_source JOIN rakam.offsets USING (split, state)"
        )
        there = {part: found[0] for part, *found in db.all(SUMS)}
        wanted = {part: found[0] for part, found in sums(expected.elements()).items()}
        raise AssertionError(f"{late}: of {wanted} there are {there}; {told}") from None
    for column in ("part", "n", "value", "grown"):
        db.wait_column("acme.clicks", column)
    found = Counter(map(tuple, db.all("SELECT part, n, value FROM acme.clicks")))
    lost, doubled = expected - found, found - expected
    assert not lost and not doubled, (
        f"{lost.total()} lost, as {sorted(lost)[:3]}; {doubled.total()} too many, as {sorted(doubled)[:3]}"
    )
    assert {part: tuple(rest) for part, *rest in db.all(SUMS)} == sums(expected.elements())
    assert db.one("SELECT count(*) FROM acme.clicks WHERE aborted") == 0
    assert db.one("SELECT count(*) FROM rakam.dead_letter") == 0
    # What the service itself has, held against what the publisher was told.
    there = {number for _, number, _ in expected}
    assert publisher.acknowledged <= there
    assert not publisher.aborted & there


@pytest.fixture(scope="module")
def mortal_kafka():
    """A broker that these tests may kill."""
    with available(Kafka) as broker:
        yield broker


@pytest.mark.parametrize("run", range(RUNS))
def test_kafka_exactly_once(private_cluster, s3, mortal_kafka, seed, run):
    rng = random.Random(seed * 1_000 + run)
    broker, topic = mortal_kafka, f"clicks-{seed}-{run}"
    form = ["json", "avro"][run % 2]
    with FaultProxy(s3.endpoint, rng.randrange(2**31)) as proxy:
        it = Run(private_cluster("source-crash"), s3.storage(f"kafka/{seed}-{run}", proxy.url), form, rng)
        broker.create_topic(topic, PARTITIONS)
        broker.create_server(it.db.admin, "k")
        it.begin(topics=[topic])
        publisher = KafkaPublisher(broker, topic, it.events, EVENTS)
        trouble = it.trouble
        faults = bucket_faults(rng)

        def kill_broker() -> None:
            broker.crash()
            time.sleep(rng.uniform(0, 2))
            broker.start_again()
            trouble.done["broker"] += 1

        def restart_broker() -> None:
            broker.restart()
            trouble.done["broker"] += 1

        def add_partitions() -> None:
            broker.add_partitions(topic, publisher.partitions + 1)
            publisher.partitions += 1
            trouble.done["partitions"] += 1

        steps = [trouble.kill_consumer, trouble.kill_postmaster, trouble.stop_consumer, add_partitions]
        steps += [rng.choice([kill_broker, restart_broker])]
        fired = it.suffer(publisher, proxy, faults, steps)
        messages = itertools.chain.from_iterable(broker.read(topic).values())
        expected = it.published(message.value() for message in messages)
        check(it.db, publisher, expected)
        # Positions are at the ends of the logs, markers of transactions and all.
        wait_at_ends(it.db, broker, topic)
        it.note(
            seed, run, form,
            *(trouble.done[what] for what in ("kills", "stops", "takeovers", "broker", "partitions")),
            fired, expected.total(), len(publisher.aborted),
        )  # fmt: skip
        it.db.close()
        broker.delete_topic(topic)


def wait_at_ends(db: Database, broker: Kafka, topic: str) -> None:
    ends = {f"{topic}/{part}": broker.ends(topic, part)[1] for part in range(broker.partitions(topic))}

    def positions() -> dict[str, int]:
        # NULL: nothing of it is read yet.
        return dict(db.all("SELECT split, coalesce(next_offset, 0) FROM rakam.offsets"))

    wait_until(lambda: positions() == ends, lambda: f"the positions are at {ends}, not {positions()}", PATIENCE_S)


def test_a_topic_is_stored_once_and_whole(private_cluster, kafka, seed):
    """Many events that are there before, and nothing that breaks: what is produced while it is read the runs above have."""
    events, topic = Events("json", random.Random(seed)), f"whole-{seed}"
    kafka.create_topic(topic, PARTITIONS)
    produced: dict[int, tuple[int, int, int]] = {}

    def records() -> Iterator[Record]:
        for n in range(WHOLE):
            part = n % PARTITIONS
            number, record = events.make(part)
            # Not kept: two million do not go into memory.
            add(produced, events.read(record))
            yield Record(record, partition=part)

    kafka.send(topic, records(), kafka.producer(linger_ms="50"))
    db = Database(private_cluster("source-whole"), "whole").create()
    db.project("acme")
    kafka.create_server(db.admin, "k")
    options = json.dumps({"topics": [topic], "collection": "clicks"})
    db.one("SELECT rakam.create_source('acme', 'clicks', 'k', %s)", options)
    began = time.monotonic()
    patience_s = PATIENCE_S + WHOLE / 1_000
    stored = "SELECT coalesce(sum(next_offset), 0) FROM rakam.offsets"
    wait_until(lambda: db.one(stored) >= WHOLE, lambda: f"{db.one(stored)} of {WHOLE} are stored", patience_s, 0.2)
    took_s = time.monotonic() - began
    wait_at_ends(db, kafka, topic)
    for column in ("part", "n", "value"):
        db.wait_column("acme.clicks", column)
    assert {part: tuple(rest) for part, *rest in db.all(SUMS)} == produced
    db.flush("acme")
    assert {part: tuple(rest) for part, *rest in db.all(SUMS)} == produced
    assert db.one("SELECT count(DISTINCT (part, n)) FROM acme.clicks") == WHOLE
    assert db.one("SELECT count(*) FROM rakam.dead_letter") == 0
    print(f"{WHOLE:,} events in {PARTITIONS} partitions, once whole, {took_s:.0f} s after the source was created")
    db.close()
    kafka.delete_topic(topic)


def kinesis_faults(rng: random.Random) -> list[dict]:
    """What the service does in a run: throttling, iterators that expire, records taken in part, answers lost."""

    def chance() -> float:
        return rng.choice([0.05, 0.1, 0.2])

    def refused(call: str, error: str) -> dict:
        return {"match": {"target": call}, "chance": chance(), "fault": {"aws_error": error}}

    throttled = "ProvisionedThroughputExceededException"
    return [
        refused("GetRecords", throttled),
        refused("GetRecords", "ExpiredIteratorException"),
        refused("GetShardIterator", throttled),
        refused("ListShards", "LimitExceededException"),
        refused("PutRecords", throttled),
        {"match": {"target": "PutRecords"}, "chance": chance(), "fault": {"partial": 0.3}},
        {"match": {"target": "PutRecords"}, "chance": 0.02, "fault": {"reset": "after"}},
        {"match": {"target": "GetRecords"}, "chance": chance(), "fault": {"reset": "before"}},
        {"match": {"target": "GetRecords"}, "chance": chance(), "fault": {"reset": "after"}},
        {"match": {"target": "GetRecords"}, "chance": chance(), "fault": {"truncate": 20}},
    ]


@pytest.mark.parametrize("run", range(KINESIS_RUNS))
def test_kinesis_exactly_once(private_cluster, s3, seed, run, request):
    rng = random.Random(seed * 1_000 + run)
    service: Kinesis = request.getfixturevalue(["kinesis", "kinesis_fast"][run % 2])
    form = ["json", "avro"][run // 2 % 2]
    stream = f"clicks-{seed}-{run}"
    with FaultProxy(service.endpoint, rng.randrange(2**31)) as proxy:
        it = Run(private_cluster("source-crash"), s3.storage(f"kinesis/{seed}-{run}"), form, rng)
        service.create_stream(stream, 2)
        service.create_server(it.db.admin, "k", proxy)
        it.begin(stream=stream)
        publisher = KinesisPublisher(service, stream, proxy, it.events, KINESIS_EVENTS)
        trouble = it.trouble

        def split() -> None:
            service.split(stream, rng.choice(service.open_shards(stream)))
            trouble.done["splits"] += 1

        def merge() -> None:
            shards = service.open_shards(stream)
            at = rng.randrange(len(shards) - 1)
            assert hash_range(shards[at])[1] + 1 == hash_range(shards[at + 1])[0]
            service.merge(stream, shards[at], shards[at + 1])
            trouble.done["merges"] += 1

        steps = [trouble.kill_consumer, trouble.kill_postmaster, trouble.stop_consumer, split, split, merge]
        fired = it.suffer(publisher, proxy, kinesis_faults(rng), steps)
        records = itertools.chain.from_iterable(service.read(stream).values())
        expected = it.published(record["Data"] for record in records)
        check(it.db, publisher, expected)
        closed = {s["ShardId"] for s in service.shards(stream)} - {s["ShardId"] for s in service.open_shards(stream)}
        wait_until(
            lambda: (
                {split for (split,) in it.db.all("SELECT split FROM rakam.offsets WHERE state = 'ended'")} == closed
            ),
            f"the shards {closed} have ended",
            PATIENCE_S,
        )
        it.note(
            seed, run, service.engine, form,
            *(trouble.done[what] for what in ("kills", "stops", "takeovers", "splits", "merges")),
            fired, expected.total(),
        )  # fmt: skip
        it.db.close()
