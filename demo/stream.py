"""The demo's chapter about Kafka: a topic into the lake while it is being written, with the consumer killed in the middle; then
what a project collects out to topics, and back in.

The broker is a real one. It goes on running after the demo, as the cluster does, so that its topics can be written by hand; the
next demo begins with an empty one.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

import clickstream
import psycopg
from harness.database import collect, wait_until
from harness.kafka import Kafka, Record
from harness.services import Services
from show import note, title

if TYPE_CHECKING:
    from demo import Demo

CLICKS = 30_000
PARTITIONS = 4
# Events sent at once, and the pause behind them.
AT_ONCE = 500
PAUSE_S = 0.05
COLLECTED = 4_000
ROUNDS = 10
# For a slow machine.
PATIENCE_S = 300

COUNTS = (
    "SELECT _collection, count(*), count(DISTINCT properties->>'serial') AS serials FROM {}._all GROUP BY 1 ORDER BY 1"
)


def chapter(demo: Demo) -> None:
    title("Kafka: a topic into the lake, each record once, also when the consumer is killed")
    folder = demo.cluster.make_folder("services")
    # That of the last demo has what a database read that is gone.
    Services(folder).stop("kafka")
    try:
        kafka = Kafka(kept=folder)
    except RuntimeError as reason:
        note(f"left out, there is no broker: {str(reason).strip().splitlines()[-1]}")
        return
    into(demo, kafka)
    out_and_back(demo, kafka)


def numbered(count: int) -> list[tuple[str, dict]]:
    """Clicks without an `_id`, so that only the positions tell one from its copy."""
    events = enumerate(clickstream.events(count))
    return [
        (collection, {name: value for name, value in properties.items() if name != "_id"} | {"serial": f"{n}"})
        for n, (collection, properties) in events
    ]


class Publisher(threading.Thread):
    """Writes events to a topic, steadily; the second half once it may."""

    def __init__(self, kafka: Kafka, topic: str, events: list[tuple[str, dict]]):
        super().__init__(daemon=True)
        self.kafka = kafka
        self.topic = topic
        self.events = events
        self.sent = 0
        self.may_finish = threading.Event()

    def run(self) -> None:
        producer = self.kafka.producer()
        events = iter(self.events)
        while part := list(itertools.islice(events, AT_ONCE)):
            self.sent += self.kafka.send(
                self.topic,
                [
                    Record(
                        json.dumps({"collection": collection, "properties": properties}).encode(),
                        key=properties["_user"].encode(),
                    )
                    for collection, properties in part
                ],
                producer,
            )
            time.sleep(PAUSE_S)
            if self.sent >= len(self.events) // 2:
                self.may_finish.wait(PATIENCE_S)


def into(demo: Demo, kafka: Kafka) -> None:
    kafka.create_topic("clickstream", PARTITIONS)
    demo.psql("SELECT project, write_key FROM rakam.create_project('stream', 'lake')")
    demo.psql(
        f"CREATE SERVER broker TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers '{kafka.brokers}')"
    )
    demo.psql("""SELECT rakam.create_source('stream', 'clicks', 'broker', '{"topics": ["clickstream"]}')""")
    events = numbered(CLICKS)
    publisher = Publisher(kafka, "clickstream", events)
    publisher.start()
    wait_until(lambda: stored(demo, "clicks") >= CLICKS // 3, "a third of the topic is stored", PATIENCE_S)
    demo.psql("SELECT split, lag_records, round(records_per_s) AS per_s FROM rakam.stat_source WHERE source = 'clicks'")
    before, consumers = stored(demo, "clicks"), readers(demo)
    publisher.may_finish.set()
    os.kill(min(consumers), signal.SIGKILL)
    killed = time.monotonic()
    note(f"kill -9 of a consumer, with {before:,} of {publisher.sent:,} records stored; PostgreSQL recovers from it")
    wait_until(lambda: readers(demo) - consumers, "there are new consumers", PATIENCE_S)
    note(f"{time.monotonic() - killed:.1f} s later new ones have the partitions, and go on where the stored events end")
    publisher.join(PATIENCE_S)
    wait_until(lambda: stored(demo, "clicks") >= CLICKS, "all is stored", PATIENCE_S)
    demo.psql("SELECT split, next_offset, state FROM rakam.offsets WHERE source = 'clicks' ORDER BY 1")
    demo.psql(COUNTS.format("stream"))
    compare(demo, "stream", events)
    note(f"the topic has {CLICKS:,} events, each is there once; and in data files:")
    demo.psql("SELECT * FROM rakam.flush('stream')")


def out_and_back(demo: Demo, kafka: Kafka) -> None:
    title(
        "And out: what a project collects goes to topics as Avro, what is rolled back does not; consumed back it is read"
    )
    demo.psql("SELECT project, write_key FROM rakam.create_project('live')")
    demo.psql("SELECT rakam.set_event_store('live', 'broker')")
    demo.psql("""SELECT rakam.create_source('live', 'back', 'broker', '{"topics": ["^live[.]"], "format": "avro"}')""")
    events = numbered(COLLECTED)
    demo.send("live", events, COLLECTED)
    session = demo.db.connect(autocommit=False)
    collect(session, "live", "pageview", {"serial": "rolled back"})
    session.rollback()
    session.close()
    count = "SELECT count(*) FROM live._all"
    wait_until(lambda: demo.db.one(count) >= COLLECTED, "all came back", PATIENCE_S)
    demo.psql(COUNTS.format("live"))
    compare(demo, "live", events)
    topics = {name: sum(kafka.ends(name, part)[1] for part in range(kafka.partitions(name))) for name in names(events)}
    note(f"records in the topics: {', '.join(f'{name} {topics[name]:,}' for name in sorted(topics))}")
    taken_ms = []
    for n in range(ROUNDS):
        began = time.perf_counter()
        collect(demo.db.admin, "live", "pageview", {"serial": f"round {n}"})
        seen = f"SELECT count(*) FROM live.pageview WHERE serial = 'round {n}'"
        wait_until(lambda seen=seen: demo.db.one(seen), "the event came back", PATIENCE_S, 0.005)
        taken_ms.append((time.perf_counter() - began) * 1000)
    note(f"from collect() through the topic into a query's answer: median {statistics.median(taken_ms):.0f} ms")


def names(events: list[tuple[str, dict]]) -> set[str]:
    return {f"live.{collection}" for collection, _ in events}


def stored(demo: Demo, source: str) -> int:
    """The records of a source that are stored; 0 while the server recovers."""
    try:
        return int(demo.db.one("SELECT coalesce(sum(next_offset), 0) FROM rakam.offsets WHERE source = %s", source))
    except psycopg.OperationalError:
        demo.db.close()
        return 0


def readers(demo: Demo) -> set[int]:
    """The consumers that have partitions; none while the server recovers."""
    try:
        found = demo.db.all("SELECT pid FROM rakam.stat_worker WHERE kind = 'consumer' AND target <> '0 splits'")
    except psycopg.OperationalError:
        demo.db.close()
        return set()
    return {pid for (pid,) in found}


def compare(demo: Demo, project: str, events: list[tuple[str, dict]]) -> None:
    sent = Counter(collection for collection, _ in events)
    found = demo.db.all(COUNTS.format(project))
    if found != [(collection, sent[collection], sent[collection]) for collection in sorted(sent)]:
        sys.exit(f"project {project} has {found}, sent were {dict(sent)}")
