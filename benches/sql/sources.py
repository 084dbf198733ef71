"""The chapter about sources: topics that were filled before into the lake, and how fresh a topic is that is being written."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import statistics
import struct
import threading
import time
from pathlib import Path

import fastavro
import psycopg
from confluent_kafka import Consumer, TopicPartition
from harness.database import wait_until
from harness.kafka import Kafka, Record
from measure import cpu_s, reaped_cpu_s

EVENTS = int(os.environ.get("RAKAM_SOURCE_EVENTS", "400000"))
PARTITIONS = 4
FRESH_S = int(os.environ.get("RAKAM_FRESH_S", "30"))
PROJECT = "streamed"
SCHEMA_ID = 1
WORDS = ["checkout", "landing page", "pricing", "search results", "documentation", "account settings", "Łódź", "news"]
# 30 properties, with their values about a kilobyte of JSON.
FIELDS = (
    [(f"amount_{n}", "double") for n in range(8)]
    + [(f"label_{n}", "string") for n in range(14)]
    + [(f"is_{n}", "boolean") for n in range(4)]
    + [(f"at_{n}", "string") for n in range(3)]
    + [("_user", "string")]
)
SCHEMA = {
    "type": "record",
    "name": "event",
    "fields": [{"name": name, "type": kind} for name, kind in [*FIELDS, ("_id", ["null", "string"])]],
}


def events(count: int, with_id: bool):
    """Events like each other, as those of one kind are, from a fixed seed."""
    numbers = random.Random(7)
    for n in range(count):
        event: dict = {}
        for name, kind in FIELDS:
            if kind == "double":
                event[name] = round(numbers.random() * 1000, 2)
            elif kind == "boolean":
                event[name] = numbers.random() < 0.5
            elif name.startswith("at_"):
                event[name] = f"2024-{numbers.randrange(1, 13):02}-{numbers.randrange(1, 29):02}T12:00:00Z"
            elif name == "_user":
                event[name] = f"user {numbers.randrange(100_000)}"
            else:
                event[name] = (
                    f"{numbers.choice(WORDS)} {numbers.randrange(1000)} of {numbers.choice(WORDS)}, {numbers.choice(WORDS)}"
                )
        if with_id:
            event["_id"] = f"{n:012x}-{numbers.getrandbits(64):016x}"
        yield event


def as_json(event: dict) -> bytes:
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()


def as_avro(event: dict) -> bytes:
    out = io.BytesIO(b"\0" + struct.pack(">I", SCHEMA_ID))
    out.seek(5)
    fastavro.schemaless_writer(out, PARSED, {"_id": None} | event)
    return out.getvalue()


PARSED = fastavro.parse_schema(SCHEMA)
KINDS = {
    "json": (as_json, False, {}),
    "json_with_id": (as_json, True, {}),
    "avro": (as_avro, False, {"format": "avro", "framing": "confluent"}),
    "avro_with_id": (as_avro, True, {"format": "avro", "framing": "confluent"}),
}


def sources(bench) -> None:
    """Events and MiB for each CPU-second of the consumer, beside a client that only counts and a loader by COPY."""
    bench.db.project(PROJECT)
    with Kafka() as kafka:
        kafka.create_server(bench.db.admin, "k")
        speed = {}
        for kind, (encode, with_id, options) in KINDS.items():
            size = _fill(kafka, kind, encode, with_id)
            speed[kind] = _consume(bench, kafka, kind, size, options)
        for kind in ("json", "avro"):
            ratio = speed[f"{kind}_with_id"] / speed[kind]
            bench.table.add(
                f"source, {kind} with an `_id`, events per CPU-second (speed ratio)",
                f"{speed[f'{kind}_with_id']:,.0f}", f"without {speed[kind]:,.0f}", ratio, "≥ 0.7",
            )  # fmt: skip
        counted = EVENTS / _in_child(_count, kafka.client, "json")
        bench.table.add(
            "source, json, events per CPU-second (speed ratio)",
            f"{speed['json']:,.0f}", f"librdkafka that only counts {counted:,.0f}", speed["json"] / counted, "",
        )  # fmt: skip
        loaded = EVENTS / _load_by_copy(bench, kafka)
        bench.table.add("the same", f"{speed['json']:,.0f}", f"Python, COPY {loaded:,.0f}", speed["json"] / loaded, "")
        _freshness(bench, kafka, speed["json"] / 2)


def _fill(kafka: Kafka, topic: str, encode, with_id: bool) -> int:
    """Fills a topic; the bytes of its records."""
    kafka.create_topic(topic, PARTITIONS)
    size = 0

    def records():
        nonlocal size
        for n, event in enumerate(events(EVENTS, with_id)):
            value = encode(event)
            size += len(value)
            yield Record(value, partition=n % PARTITIONS)

    kafka.send(
        topic, records(), kafka.producer(linger_ms="50", batch_size="1000000", queue_buffering_max_kbytes="65536")
    )
    return size


def _workers(bench) -> list[int]:
    return [
        pid for (pid,) in bench.db.all("SELECT pid FROM rakam.stat_worker WHERE kind = 'consumer' AND pid IS NOT NULL")
    ]


def _consume(bench, kafka: Kafka, topic: str, size: int, options: dict) -> float:
    """Reads the topic with a source; events for each CPU-second of the consumers."""
    db = bench.db
    before = {pid: cpu_s(pid) for pid in _workers(bench)}
    given = json.dumps({"topics": [topic]} | options)
    began = time.perf_counter()
    if options:
        # The source starts at once: what it reads before it knows the schema would be dead letters.
        with db.connect(autocommit=False) as session:
            session.execute("SELECT rakam.create_source(%s, %s, 'k', %s)", (PROJECT, topic, given))
            session.execute(
                "SELECT rakam.register_avro_schema(%s, %s, %s, %s)", (PROJECT, topic, SCHEMA_ID, json.dumps(SCHEMA))
            )
            session.commit()
    else:
        db.admin.execute("SELECT rakam.create_source(%s, %s, 'k', %s)", (PROJECT, topic, given))
    stored = "SELECT coalesce(sum(next_offset), 0) FROM rakam.offsets WHERE source = %s"
    wait_until(lambda: db.one(stored, topic) >= EVENTS, f"{topic} is stored", 3600, 0.05)
    took = time.perf_counter() - began
    after = {pid: cpu_s(pid) for pid in _workers(bench)}
    cpu = sum(spent - before.get(pid, 0) for pid, spent in after.items())
    peak = max(_peak_mib(pid) for pid in after)
    assert db.one(f"SELECT count(*) FROM {PROJECT}.{topic}") == EVENTS
    db.admin.execute("SELECT rakam.drop_source(%s, %s)", (PROJECT, topic))
    resident = db.worker_pid()
    assert resident is not None
    postmaster = _parent(resident)
    flush = -cpu_s(resident) - reaped_cpu_s(postmaster)
    db.flush(PROJECT, topic)
    flush += cpu_s(resident) + reaped_cpu_s(postmaster)
    mib = size / 2**20
    bench.table.add(
        f"source, {topic}: events per CPU-second of the consumer", f"{EVENTS / cpu:,.0f}",
        f"{EVENTS / took:,.0f}/s elapsed", EVENTS / cpu / 50_000, "≥ 50,000" if topic == "json" else "",
    )  # fmt: skip
    bench.table.add(
        f"source, {topic}: MiB per CPU-second of the consumer", f"{mib / cpu:.1f} MiB",
        f"peak {peak:.0f} MiB; flush {flush / EVENTS * 1e6:.1f} µs an event", mib / cpu / 50,
        "≥ 50 MiB" if topic == "json" else "",
    )  # fmt: skip
    return EVENTS / cpu


def _peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _in_child(work, *arguments) -> float:
    """CPU-seconds of work in a process of its own."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_measured, args=(theirs, work, arguments))
    child.start()
    spent = ours.recv()
    child.join()
    return spent


def _measured(pipe, work, arguments) -> None:
    before = time.process_time()
    work(*arguments)
    pipe.send(time.process_time() - before)


def _messages(client: dict, topic: str):
    """All values of a topic, in lists."""
    consumer = Consumer(
        client
        | {
            "group.id": "bench",
            "enable.auto.commit": "false",
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
        }
    )
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(PARTITIONS)])
    left = EVENTS
    while left:
        found = [message.value() for message in consumer.consume(10_000, 1) if not message.error()]
        left -= len(found)
        yield found
    consumer.close()


def _count(client: dict, topic: str) -> None:
    assert sum(map(len, _messages(client, topic))) == EVENTS


def _load_by_copy(bench, kafka: Kafka) -> float:
    """CPU-seconds of what one would write: a consumer in Python that loads typed rows by COPY, client and server."""
    types = {"double": "double precision", "boolean": "boolean", "string": "text"}
    columns = ", ".join(f'"{name}" {"timestamptz" if name.startswith("at_") else types[kind]}' for name, kind in FIELDS)
    bench.db.admin.execute(f"CREATE TABLE loaded_by_copy ({columns})")
    postmaster = _parent(bench.db.worker_pid())
    server = reaped_cpu_s(postmaster)
    client = _in_child(_copy, kafka.client, "json", bench.db.admin.info.dsn)
    # Its session has ended, and what it took is the postmaster's.
    return client + reaped_cpu_s(postmaster) - server


def _copy(client: dict, topic: str, dsn: str) -> None:
    names = [name for name, _ in FIELDS]
    columns = ", ".join(f'"{name}"' for name in names)
    with psycopg.connect(dsn) as session:
        for values in _messages(client, topic):
            with session.cursor() as cursor, cursor.copy(f"COPY loaded_by_copy ({columns}) FROM STDIN") as copy:
                for value in values:
                    event = json.loads(value)
                    copy.write_row([event.get(name) for name in names])
            session.commit()


def _freshness(bench, kafka: Kafka, rate: float) -> None:
    """From the call that sends an event to the first look that sees it stored. Events and offsets commit together, so the
    offsets say what is visible."""
    topic = "fresh"
    kafka.create_topic(topic, PARTITIONS)
    bench.db.admin.execute(
        "SELECT rakam.create_source(%s, %s, 'k', %s)", (PROJECT, topic, json.dumps({"topics": [topic]}))
    )
    producer = kafka.producer(linger_ms="5")
    values = [as_json(event) for event in events(10_000, False)]
    sent: dict[tuple[int, int], float] = {}
    looks: list[tuple[float, dict[int, int]]] = []
    done = threading.Event()

    def noted(at: float):
        def delivered(error, message) -> None:
            assert error is None, error
            sent[message.partition(), message.offset()] = at

        return delivered

    def look() -> None:
        with bench.db.connect() as session:
            while not done.is_set():
                rows = session.execute(
                    "SELECT split, next_offset::int8 FROM rakam.offsets WHERE source = 'fresh'"
                ).fetchall()
                looks.append((time.perf_counter(), {int(s.rsplit("/")[-1]): n or 0 for s, n in rows}))
                time.sleep(0.005)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        began = time.perf_counter()
        total = 0
        while (now := time.perf_counter()) - began < FRESH_S:
            while total < (now - began) * rate:
                producer.produce(
                    topic,
                    values[total % len(values)],
                    partition=total % PARTITIONS,
                    on_delivery=noted(time.perf_counter()),
                )
                total += 1
                if total % 500 == 0:
                    producer.poll(0)
            producer.poll(0.002)
        producer.flush(60)
        ends = {p: 1 + max(o for q, o in sent if q == p) for p in range(PARTITIONS)}
        wait_until(
            lambda: looks and all(looks[-1][1].get(p, 0) >= end for p, end in ends.items()), "all is visible", 120
        )
    finally:
        done.set()
        watcher.join()
    taken = []
    for partition in range(PARTITIONS):
        at = 0
        for offset, when in sorted((o, t) for (p, o), t in sent.items() if p == partition):
            while looks[at][1].get(partition, 0) <= offset:
                at += 1
            taken.append(looks[at][0] - when)
    taken.sort()
    p99 = taken[int(len(taken) * 0.99)]
    bench.table.add(
        f"source, produce → visible at {total / FRESH_S:,.0f} events/s", f"p99 {p99 * 1000:.0f} ms",
        f"p50 {statistics.median(taken) * 1000:.0f} ms", p99, "≤ 1 (s)",
    )  # fmt: skip
    bench.db.admin.execute("SELECT rakam.drop_source(%s, %s)", (PROJECT, topic))
