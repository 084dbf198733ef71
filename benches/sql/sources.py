"""The chapter about sources: topics that were filled before into the lake, and how fresh a topic is that is being written.

A topic is filled before it is read, so that nothing but the consumers and what follows them is measured. Their CPU is that of
the consumer processes with all their threads, their memory what was resident at most, shared memory that they touched
included. All else that the server does for the events by itself (digest, merges, flushes while the topic is read, and a
called flush of the rest) is beside it. RAKAM_SOURCE_EVENTS and RAKAM_FRESH_S set how much there is to do.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

import fastavro
import psycopg
from confluent_kafka import Consumer, Producer, TopicPartition
from harness.cluster import ROOT
from harness.database import wait_until
from harness.kafka import Kafka, Record
from measure import TICKS, cpu_s, reaped_cpu_s

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


class Read(NamedTuple):
    """A topic, read: events for each CPU-second of the consumers, and by the clock."""

    per_cpu_s: float
    per_s: float


def sources(bench) -> None:
    """Events and MiB for each CPU-second of the consumers, beside a client that only counts and a loader by COPY."""
    counter = _build_counter()
    bench.db.project(PROJECT)
    with Kafka() as kafka:
        kafka.create_server(bench.db.admin, "k")
        read = {}
        for kind, (encode, with_id, options) in KINDS.items():
            size = _fill(kafka, kind, encode, with_id)
            read[kind] = _consume(bench, kafka, kind, size, options)
        for kind in ("json", "avro"):
            with_id, without = read[f"{kind}_with_id"].per_cpu_s, read[kind].per_cpu_s
            bench.table.add(
                f"source, {kind} with an `_id`, events per CPU-second (speed ratio)",
                f"{with_id:,.0f}", f"without {without:,.0f}", with_id / without, "≥ 0.7",
            )  # fmt: skip
        ours = read["json"].per_cpu_s
        counted = EVENTS / _cpu_s([counter, kafka.brokers, "json", str(PARTITIONS), str(EVENTS)])
        loaded = EVENTS / _load_by_copy(bench, kafka)
        for what, theirs in (("rdkafka, counting only", counted), ("Python, COPY", loaded)):
            bench.table.add(
                "source, json, events per CPU-second (speed ratio)",
                f"{ours:,.0f}", f"{what}: {theirs:,.0f}", ours / theirs, "",
            )  # fmt: skip
        _freshness(bench, kafka, read["json"].per_s / 2)


def _build_counter() -> Path:
    """The program of benches/counter, built as the extension is."""
    is_dev = os.environ["RAKAM_PROFILE"] == "dev"
    manifest = ROOT / "benches" / "counter" / "Cargo.toml"
    release = [] if is_dev else ["--release"]
    subprocess.run(["cargo", "build", "--locked", "--quiet", "--manifest-path", manifest, *release], check=True)
    return Path(os.environ["CARGO_TARGET_DIR"]) / ("debug" if is_dev else "release") / "counter"


def _cpu_s(command: list) -> float:
    """CPU-seconds of a program."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, command
    return usage.ru_utime + usage.ru_stime


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


def _consumers(bench) -> dict[int, float]:
    """The CPU-seconds of each consumer that lives."""
    pids = bench.db.all("SELECT pid FROM rakam.stat_worker WHERE kind = 'consumer' AND pid IS NOT NULL")
    return {pid: cpu_s(pid) for (pid,) in pids}


def _workers_cpu_s(bench) -> float:
    """The CPU-seconds of all that rakam does by itself in this server, also of workers that have ended."""
    living = [pid for pid, title in bench.cluster.processes().items() if ": rakam " in title]
    return reaped_cpu_s(bench.cluster.pid) + sum(map(cpu_s, living))


def _consume(bench, kafka: Kafka, topic: str, size: int, options: dict) -> Read:
    """Reads the topic with a source."""
    db = bench.db
    wait_until(lambda: not _consumers(bench), "the consumers of the topic before have ended", 60)
    all_before = _workers_cpu_s(bench)
    given = json.dumps({"topics": [topic]} | options)
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
    stored = "SELECT coalesce(sum(next_offset), 0)::int8 FROM rakam.offsets WHERE source = %s"
    seen: set[int] = set()
    began, looks = time.perf_counter(), [(0.0, 0)]

    def is_stored() -> bool:
        seen.update(_consumers(bench))
        looks.append((time.perf_counter() - began, db.one(stored, topic)))
        return looks[-1][1] >= EVENTS

    wait_until(is_stored, f"{topic} is stored", 3600, 0.05)
    consumers = _consumers(bench)
    assert seen == set(consumers), "a consumer has ended meanwhile: its CPU is not known"
    cpu = sum(consumers.values())
    peak = max(map(_peak_mib, consumers))
    assert db.one(f"SELECT count(*) FROM {PROJECT}.{topic}") == EVENTS
    db.flush(PROJECT, topic)
    beside = _workers_cpu_s(bench) - all_before - sum(_consumers(bench).values())
    db.admin.execute("SELECT rakam.drop_source(%s, %s)", (PROJECT, topic))
    # By the clock from the first batch on: that workers start and find the partitions is not its rate.
    first = next(look for look in looks if look[1] > 0)
    last = looks[-1]
    per_s = (last[1] - first[1]) / (last[0] - first[0]) if last[1] > first[1] else EVENTS / last[0]
    mib = size / 2**20
    bench.table.add(
        f"source, {topic} ({size / EVENTS:,.0f} bytes an event): events per CPU-second of the consumer",
        f"{EVENTS / cpu:,.0f}", f"{per_s:,.0f}/s by {len(consumers)} consumers", EVENTS / cpu / 50_000,
        "≥ 50,000" if topic == "json" else "",
    )  # fmt: skip
    bench.table.add(
        f"source, {topic}: MiB per CPU-second of the consumer", f"{mib / cpu:.1f} MiB",
        f"peak RSS {peak:.0f} MiB; digest, merges and flush {beside / EVENTS * 1e6:.1f} µs of CPU an event",
        mib / cpu / 50, "≥ 50 MiB" if topic == "json" else "",
    )  # fmt: skip
    return Read(EVENTS / cpu, per_s)


def _peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _asked(work, *arguments):
    """What work answers in a process of its own."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_answer, args=(theirs, work, arguments))
    child.start()
    theirs.close()
    answer = ours.recv()
    child.join()
    return answer


def _answer(pipe, work, arguments) -> None:
    pipe.send(work(*arguments))


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


def _load_by_copy(bench, kafka: Kafka) -> float:
    """CPU-seconds of what one would write: a consumer in Python that loads typed rows by COPY, client and server."""
    types = {"double": "double precision", "boolean": "boolean", "string": "text"}
    columns = ", ".join(f'"{name}" {"timestamptz" if name.startswith("at_") else types[kind]}' for name, kind in FIELDS)
    bench.db.admin.execute(f"CREATE TABLE loaded_by_copy ({columns})")
    return _asked(_copy, kafka.client, "json", bench.db.admin.info.dsn)


def _copy(client: dict, topic: str, dsn: str) -> float:
    """CPU-seconds that it takes, those of its session in the server included."""
    before = time.process_time()
    names = [name for name, _ in FIELDS]
    columns = ", ".join(f'"{name}"' for name in names)
    with psycopg.connect(dsn) as session:
        for values in _messages(client, topic):
            with session.cursor() as cursor, cursor.copy(f"COPY loaded_by_copy ({columns}) FROM STDIN") as copy:
                for value in values:
                    event = json.loads(value)
                    copy.write_row([event.get(name) for name in names])
            session.commit()
        return time.process_time() - before + cpu_s(session.info.backend_pid)


def _freshness(bench, kafka: Kafka, rate: float) -> None:
    """From the call that sends an event to the first look that sees it stored. Events and offsets commit together, so the
    offsets say what is visible. The clock begins once the source reads: what is sent before it does waits for its start."""
    topic = "fresh"
    kafka.create_topic(topic, PARTITIONS)
    bench.db.admin.execute(
        "SELECT rakam.create_source(%s, %s, 'k', %s)", (PROJECT, topic, json.dumps({"topics": [topic]}))
    )
    warm = [Record(as_json(event), partition=n % PARTITIONS) for n, event in enumerate(events(4_000, False))]
    kafka.send(topic, warm)
    wait_until(lambda: sum(_offsets(bench.db.admin, topic).values()) == len(warm), "the first events are stored", 120)
    shares = (
        "SELECT count(*) FILTER (WHERE target !~ '^0 ') = current_setting('rakam.max_consumers')::int"
        " FROM rakam.stat_worker WHERE kind = 'consumer'"
    )
    wait_until(lambda: bench.db.one(shares), "each consumer has a share of the partitions", 120)
    begins = _offsets(bench.db.admin, topic)
    looks: list[tuple[float, dict[int, int]]] = []
    done = threading.Event()

    def look() -> None:
        with bench.db.connect() as session:
            while not done.is_set():
                looks.append((time.perf_counter(), _offsets(session, topic)))
                time.sleep(0.01)

    watcher = threading.Thread(target=look)
    before, machine_before = _consumers(bench), _machine_s()
    watcher.start()
    try:
        # In a process of its own: this one is to look, and nothing else.
        sent = _asked(_produce, kafka.client, topic, rate)
        busy, idle = (after - at_first for after, at_first in zip(_machine_s(), machine_before, strict=True))
        cpu = sum(spent - before.get(pid, 0) for pid, spent in _consumers(bench).items())
        ends = {partition: begins[partition] + len(times) for partition, times in enumerate(sent)}
        wait_until(lambda: looks and looks[-1][1] == ends, f"all is visible: {ends}", 300)
    finally:
        done.set()
        watcher.join()
    taken = []
    for partition, times in enumerate(sent):
        at = 0
        for offset, when in enumerate(times, begins[partition]):
            while looks[at][1].get(partition, 0) <= offset:
                at += 1
            taken.append(looks[at][0] - when)
    taken.sort()
    p50, p99 = (taken[int(len(taken) * share)] for share in (0.5, 0.99))
    bench.table.add(
        f"source, produce → visible at {len(taken) / FRESH_S:,.0f} events/s, half of what json was read at",
        f"p99 {p99 * 1000:.0f} ms", f"p50 {p50 * 1000:.0f} ms, the longest {taken[-1] * 1000:.0f} ms", p99, "≤ 1 (s)",
    )  # fmt: skip
    bench.table.add(
        "meanwhile: CPU of the consumers, in cores", f"{cpu / FRESH_S:.2f}",
        f"the machine was {busy / (busy + idle):.0%} busy, broker and producer included", None, "",
    )  # fmt: skip
    bench.db.admin.execute("SELECT rakam.drop_source(%s, %s)", (PROJECT, topic))


def _offsets(session, topic: str) -> dict[int, int]:
    """What is stored of each partition."""
    rows = session.execute("SELECT split, next_offset::int8 FROM rakam.offsets WHERE source = %s", (topic,)).fetchall()
    return {int(split.rsplit("/")[-1]): offset or 0 for split, offset in rows}


def _machine_s() -> tuple[float, float]:
    """CPU-seconds in which all processors were busy, and in which they were not."""
    user, nice, system, idle, waiting, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(rest)) / TICKS, (idle + waiting) / TICKS


def _produce(client: dict, topic: str, rate: float) -> list[list[float]]:
    """Sends events at a rate; when each was sent, by partition and in the order in which they are there."""
    producer = Producer(client | {"enable.idempotence": "true", "linger.ms": "5"})
    values = [as_json(event) for event in events(10_000, False)]
    sent: list[list[float]] = [[] for _ in range(PARTITIONS)]
    failed = []

    def delivered(error, _) -> None:
        if error is not None:
            failed.append(error)

    total = 0
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < FRESH_S:
        while total < (now - began) * rate:
            partition = total % PARTITIONS
            sent[partition].append(time.perf_counter())
            producer.produce(topic, values[total % len(values)], partition=partition, on_delivery=delivered)
            total += 1
            if total % 500 == 0:
                producer.poll(0)
        producer.poll(0.002)
    assert producer.flush(120) == 0 and not failed, failed
    return sent
