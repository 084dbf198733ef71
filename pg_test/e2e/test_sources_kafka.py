"""A life with topics: starts, seeks, pauses, patterns, new partitions, splits that stop, and who reads what when a consumer
is stopped or the server is killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from datetime import UTC, datetime

import psycopg
import pytest
from harness.database import Database, refused, wait_until
from harness.kafka import Record

PROJECT = "acme"


@pytest.fixture(scope="module")
def server(db, kafka):
    db.project(PROJECT)
    kafka.create_server(db.admin, "k")
    db.configure(source_refresh="300ms")
    yield "k"
    db.configure(source_refresh=None)


def create(db, name: str, **options) -> None:
    db.admin.execute("SELECT rakam.create_source(%s, %s, 'k', %s)", (PROJECT, name, json.dumps(options)))


def drop(db, *names: str) -> None:
    for name in names:
        db.admin.execute("SELECT rakam.drop_source(%s, %s)", (PROJECT, name))


def numbers(first: int, last: int, ids: bool = False) -> list[str]:
    return [json.dumps({"n": n} | ({"_id": f"i{n}"} if ids else {})) for n in range(first, last)]


def stored(db, collection: str) -> list[int]:
    """The events that are there, in order."""
    try:
        return [n for (n,) in db.all(f"SELECT n::bigint FROM {PROJECT}.{collection} ORDER BY 1")]
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):
        return []


def wait_for(db, collection: str, expected: list[int]) -> None:
    wait_until(lambda: stored(db, collection) == expected, f"{len(expected)} events of {collection}", 120)


def caught_up(db, source: str) -> None:
    lag = "SELECT bool_and(lag_records = 0) FROM rakam.stat_source WHERE source = %s"
    wait_until(lambda: db.one(lag, source), f"source {source} has caught up", 120)


def states(db, source: str) -> dict[str, str]:
    return dict(db.all("SELECT split, state FROM rakam.offsets WHERE source = %s", source))


def seek(db, source: str, target: str, force: bool = False) -> None:
    db.admin.execute("SELECT rakam.seek_source(%s, %s, %s, force => %s)", (PROJECT, source, target, force))


# -- where reading begins -------------------------------------------------------------------------------------------


def test_starts(db, kafka, server):
    kafka.create_topic("starts", 2)
    kafka.send(
        "starts",
        [Record(text.encode(), partition=n % 2, time_ms=1_000_000 + n) for n, text in enumerate(numbers(0, 20))],
    )
    for name, start, expected in [
        ("from_earliest", "earliest", range(20)),
        ("from_latest", "latest", []),
        ("from_time", 1_000_010, range(10, 20)),
        ("from_offsets", {"starts/0": 5, "starts/1": "9"}, [10, 12, 14, 16, 18, 19]),
    ]:
        create(db, name, topics=["starts"], collection=name, start=start)
        wait_until(lambda name=name: len(states(db, name)) == 2, f"the partitions of {name}")
        caught_up(db, name)
        wait_for(db, name, list(expected))
    kafka.send("starts", numbers(20, 30))
    for name, before in [("from_earliest", range(20)), ("from_latest", []), ("from_time", range(10, 20))]:
        wait_for(db, name, [*before, *range(20, 30)])
    # Each reads on its own.
    assert db.one("SELECT sum(next_offset) FROM rakam.offsets WHERE source = 'from_latest'") == 30
    drop(db, "from_earliest", "from_latest", "from_time", "from_offsets")


def test_new_topics_and_partitions_are_found(db, kafka, server):
    kafka.create_topic("grow_a", 1)
    create(db, "grow", topics=["^grow_.*"], collection="grown", start="latest")
    wait_until(lambda: states(db, "grow") == {"grow_a/0": "open"}, "the first topic")
    kafka.create_topic("grow_b", 1)
    kafka.send("grow_b", numbers(0, 5))
    wait_for(db, "grown", list(range(5)))
    kafka.add_partitions("grow_a", 3)
    kafka.send("grow_a", [Record(text.encode(), partition=2) for text in numbers(5, 9)])
    # What came to be after the start is read whole.
    wait_for(db, "grown", list(range(9)))
    assert set(states(db, "grow")) == {"grow_a/0", "grow_a/1", "grow_a/2", "grow_b/0"}
    drop(db, "grow")


def test_a_missing_topic_is_told_until_it_comes(db, kafka, server):
    create(db, "early", topics=["comes_later"])
    error = "SELECT last_error FROM rakam.stat_source WHERE source = 'early'"
    wait_until(lambda: db.one(error) == 'topic "comes_later" does not exist', "the missing topic is told")
    kafka.create_topic("comes_later", 1)
    kafka.send("comes_later", numbers(0, 3))
    wait_for(db, "comes_later", [0, 1, 2])
    wait_until(lambda: db.one(error) is None, "it is told no more")
    drop(db, "early")


def test_an_unreachable_broker_is_told_and_restarts_nothing(db, server):
    db.admin.execute(
        "CREATE SERVER away TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers '127.0.0.1:1')"
    )
    db.admin.execute("SELECT rakam.create_source(%s, 'away', 'away', %s)", (PROJECT, json.dumps({"topics": ["t"]})))
    error = "SELECT last_error FROM rakam.stat_source WHERE source = 'away'"
    wait_until(lambda: db.one(error), "the broker that is away is told")
    before = db.all("SELECT pid, restarts FROM rakam.stat_worker WHERE kind = 'consumer' ORDER BY 1")
    health = db.one("SELECT status FROM rakam.health() WHERE \"check\" = 'sources'")
    assert health == "warning"
    with refused("58030"):
        seek(db, "away", "latest")
    assert db.all("SELECT pid, restarts FROM rakam.stat_worker WHERE kind = 'consumer' ORDER BY 1") == before
    drop(db, "away")
    db.admin.execute("DROP SERVER away")


def test_nothing_of_a_dropped_source_is_stored(db, kafka, server):
    kafka.create_topic("dropped", 2)
    kafka.send("dropped", numbers(0, 20_000))
    create(db, "dropped", topics=["dropped"])
    wait_until(lambda: stored(db, "dropped"), "it is being read")
    drop(db, "dropped")
    then = len(stored(db, "dropped"))
    # Somebody else's records come after whatever was on its way.
    kafka.create_topic("others", 1)
    kafka.send("others", numbers(0, 3))
    create(db, "others", topics=["others"])
    wait_for(db, "others", [0, 1, 2])
    assert len(stored(db, "dropped")) == then
    # Another one of the name begins anew.
    create(db, "dropped", topics=["dropped"], collection="again")
    wait_for(db, "again", list(range(20_000)))
    drop(db, "dropped", "others")


def test_an_open_transaction_holds_up_no_other_source(db, kafka, server):
    """Who is about to change a source, or to drop a project, holds up what is read for it, at most."""
    db.project("going")
    for topic in ("going", "kept", "free"):
        kafka.create_topic(topic, 2)
    db.admin.execute(
        "SELECT rakam.create_source('going', 'going', 'k', '{\"topics\": [\"going\"], \"collection\": \"e\"}')"
    )
    create(db, "kept", topics=["kept"], collection="kept")
    create(db, "free", topics=["free"], collection="free")
    everywhere = "SELECT count(*) FROM going._all"
    counts = itertools.count(1)

    def send() -> int:
        for topic in ("going", "kept", "free"):
            kafka.send(topic, numbers(0, 4))
        return 4 * next(counts)

    def is_read(expected: int) -> bool:
        return len(stored(db, "free")) == expected

    expected = send()
    wait_until(lambda n=expected: db.one(everywhere) == n and len(stored(db, "kept")) == n, "all are read")
    session = db.connect(autocommit=False)
    session.execute("SET rakam.allow_project_drop = on")
    session.commit()
    for change in (
        "rakam.pause_source('acme', 'kept')",
        "rakam.drop_source('acme', 'kept')",
        "rakam.drop_project('going')",
        "rakam.set_event_store('going', NULL)",
    ):
        session.execute(f"SELECT {change}")
        # Several times: what is noted of the others' progress, too.
        for _ in range(3):
            expected = send()
            wait_until(lambda expected=expected: is_read(expected), f"the other source goes on beside {change}", 30)
            caught_up(db, "free")
        session.rollback()
        wait_until(lambda n=expected: db.one(everywhere) == n and len(stored(db, "kept")) == n, "all are read")
    drop(db, "kept", "free")
    db.admin.execute("SELECT rakam.drop_source('going', 'going')")


# -- seeking --------------------------------------------------------------------------------------------------------


def test_seeking_back_counts_nothing_twice(db, kafka, server):
    kafka.create_topic("with_ids", 2)
    kafka.send("with_ids", numbers(0, 50, ids=True))
    create(db, "with_ids", topics=["with_ids"])
    wait_for(db, "with_ids", list(range(50)))
    # What the caller itself holds up is told, not waited for.
    session = db.connect(autocommit=False)
    noted = db.all("SELECT split, next_offset FROM rakam.offsets WHERE source = 'with_ids' ORDER BY 1")
    for change, target in [
        ("pause_source", "earliest"),
        # It changes no split, but the source.
        ("resume_source", '{"with_ids/0": 25}'),
    ]:
        session.execute(f"SELECT rakam.{change}(%s, 'with_ids')", (PROJECT,))
        with refused("55P03", hint="transaction"):
            session.execute("SELECT rakam.seek_source(%s, 'with_ids', %s)", (PROJECT, target))
        session.rollback()
    assert db.all("SELECT split, next_offset FROM rakam.offsets WHERE source = 'with_ids' ORDER BY 1") == noted
    epochs = "SELECT sum(epoch) FROM rakam.offsets WHERE source = 'with_ids'"
    before = db.one(epochs)
    seek(db, "with_ids", "earliest")
    assert db.one(epochs) > before
    caught_up(db, "with_ids")
    wait_until(
        lambda: db.one("SELECT sum(next_offset) FROM rakam.offsets WHERE source = 'with_ids'") == 50, "read again"
    )
    kafka.send("with_ids", numbers(50, 60, ids=True))
    wait_for(db, "with_ids", list(range(60)))
    duplicates = "SELECT duplicates FROM rakam.stat_collection WHERE collection = 'with_ids'"
    wait_until(lambda: db.one(duplicates) == 50, "the copies are counted")
    # Beyond the window nobody knows the copies.
    db.configure(dedupe_window="1s")
    time.sleep(1.1)
    with refused("55000", hint="force"):
        seek(db, "with_ids", "earliest")
    db.configure(dedupe_window=None)
    drop(db, "with_ids")


def test_seeking_without_ids_is_refused_unless_forced(db, kafka, server):
    kafka.create_topic("no_ids", 2)
    kafka.send("no_ids", [Record(text.encode(), partition=0) for text in numbers(0, 10)])
    create(db, "no_ids", topics=["no_ids"])
    wait_for(db, "no_ids", list(range(10)))
    for target in ["earliest", "2000-01-01", '{"no_ids/0": 9}']:
        with refused("55000", hint="force"):
            seek(db, "no_ids", target)
    # Of the other partition nothing was read, and forward nothing is read again.
    seek(db, "no_ids", '{"no_ids/1": 0, "no_ids/0": 10}')
    seek(db, "no_ids", "latest")
    with refused("42704"):
        seek(db, "no_ids", '{"no_ids/7": 0}')
    for target in ["never", '{"no_ids/0": -1}', "[]"]:
        with refused("22023"):
            seek(db, "no_ids", target)
    seek(db, "no_ids", '{"no_ids/0": 8}', force=True)
    wait_for(db, "no_ids", sorted([*range(10), 8, 9]))
    drop(db, "no_ids")


# -- splits that stop -----------------------------------------------------------------------------------------------


def test_a_topic_made_anew_stops_its_split(db, kafka, server):
    alerts = db.connect()
    alerts.execute("LISTEN rakam_alert")
    kafka.create_topic("anew", 1)
    kafka.send("anew", numbers(0, 10))
    create(db, "anew", topics=["anew"])
    wait_for(db, "anew", list(range(10)))
    db.admin.execute("SELECT rakam.pause_source(%s, 'anew')", (PROJECT,))
    kafka.delete_topic("anew")
    kafka.create_topic("anew", 1)
    kafka.send("anew", numbers(100, 120))
    db.admin.execute("SELECT rakam.resume_source(%s, 'anew')", (PROJECT,))
    wait_until(lambda: states(db, "anew") == {"anew/0": "stopped"}, "the split stops")
    assert stored(db, "anew") == list(range(10))
    (error,) = db.all("SELECT last_error FROM rakam.stat_source WHERE source = 'anew'")[0]
    assert "made anew" in error
    health = db.one("SELECT status || detail FROM rakam.health() WHERE \"check\" = 'sources'")
    assert health.startswith("error") and "anew/0" in health
    told = [json.loads(notice.payload) for notice in alerts.notifies(timeout=5, stop_after=1)]
    assert [(alert["source"], alert["split"]) for alert in told] == [("anew", "anew/0")]
    seek(db, "anew", "earliest", force=True)
    wait_for(db, "anew", [*range(10), *range(100, 120)])
    drop(db, "anew")


def test_a_truncated_split_stops_and_the_others_go_on(db, kafka, server):
    kafka.create_topic("cut", 2)
    create(db, "cut", topics=["cut"])
    kafka.send("cut", [Record(text.encode(), partition=0) for text in numbers(0, 5)])
    wait_for(db, "cut", list(range(5)))
    db.admin.execute("SELECT rakam.pause_source(%s, 'cut')", (PROJECT,))
    kafka.send("cut", [Record(text.encode(), partition=n % 2) for n, text in enumerate(numbers(5, 15))])
    kafka.trim("cut", 0, 8)
    db.admin.execute("SELECT rakam.resume_source(%s, 'cut')", (PROJECT,))
    wait_until(lambda: states(db, "cut") == {"cut/0": "stopped", "cut/1": "open"}, "the truncated split stops")
    wait_for(db, "cut", [*range(5), 6, 8, 10, 12, 14])
    # Forward: nothing counts twice, so nothing need be forced.
    seek(db, "cut", '{"cut/0": 8}')
    wait_for(db, "cut", [*range(5), 6, 8, 10, 11, 12, 13, 14])
    drop(db, "cut")


# -- who reads ------------------------------------------------------------------------------------------------------


def test_a_stopped_consumer_is_replaced_and_stores_nothing_afterwards(private_cluster, kafka):
    cluster = private_cluster("stopped", {"rakam.source_refresh": "300ms"})
    db = Database(cluster, "stopped").create()
    db.project(PROJECT)
    kafka.create_server(db.admin, "k")
    kafka.create_topic("stopped", 4)
    create(db, "stopped", topics=["stopped"])
    consumers = (
        "SELECT pid FROM rakam.stat_worker WHERE kind = 'consumer' AND target = '2 splits' AND state = 'running'"
    )
    wait_until(lambda: len(db.all(consumers)) == 2, "the splits are shared by two", 120)
    held = "SELECT array_agg(split) FROM rakam_internal.source_split WHERE holder = %s"
    commits = (
        "SELECT min(last_commit_at), extract(epoch FROM min(last_commit_at) - %s)::float8"
        " FROM rakam.stat_source WHERE split = ANY (%s)"
    )
    total = 0

    def send() -> None:
        nonlocal total
        records = [Record(text.encode(), partition=n % 4) for n, text in enumerate(numbers(total, total + 2_000))]
        kafka.send("stopped", records)
        total += 2_000

    for (pid,) in db.all(consumers):
        send()
        # Not while it holds what a query needs: stopped like that, any process of a server stops others.
        wait_for(db, "stopped", list(range(total)))
        splits = db.one(held, pid)
        os.kill(pid, signal.SIGSTOP)
        stopped = db.one("SELECT clock_timestamp()")
        send()

        def taken_over(stopped=stopped, splits=splits) -> float | None:
            first, after = db.all(commits, stopped, splits)[0]
            return after if first > stopped else None

        # Taken for dead after 5 s without a beat, found so within a second; the rest is reaching the broker.
        after = wait_until(taken_over, "the first commits of who has its splits now", 30)
        print(f"stopped: its splits go on after {after:.1f} s")
        assert after < 10
        os.kill(pid, signal.SIGCONT)
        wait_for(db, "stopped", list(range(total)))
    wait_until(lambda: len(db.all(consumers)) == 2, "the splits are shared again")
    assert stored(db, "stopped") == list(range(total))


def test_a_killed_server_goes_on_where_it_was(private_cluster, kafka):
    cluster = private_cluster("killed", {"rakam.source_refresh": "300ms"})
    db = Database(cluster, "killed").create()
    db.project(PROJECT)
    kafka.create_server(db.admin, "k")
    kafka.create_topic("killed", 3)
    create(db, "killed", topics=["killed"])
    producer = kafka.producer()
    for turn in range(3):
        for start in range(turn * 3_000, (turn + 1) * 3_000, 100):
            kafka.send("killed", numbers(start, start + 100), producer)
            if start == turn * 3_000 + 1_500:
                os.kill(db.one("SELECT pid FROM rakam.stat_worker WHERE kind = 'consumer' LIMIT 1"), signal.SIGKILL)
                killed = datetime.now(UTC)
                # This connection ends with all others.
                wait_until(lambda: not answers(db), "the crash")
        wait_until(lambda: answers(db), "the server is there again")
        # The server recovers, which is quick for so little; its workers come back, and theirs.
        first = wait_until(lambda killed=killed: commit_after(db, killed), "the first commit after it", 30)
        after = (first - killed).total_seconds()
        print(f"killed: its splits go on after {after:.1f} s")
        assert after < 10
        wait_for(db, "killed", list(range((turn + 1) * 3_000)))


def commit_after(db, moment: datetime) -> datetime | None:
    """The newest commit of a source, if it is younger."""
    newest = db.one("SELECT max(last_commit_at) FROM rakam.stat_source")
    return newest if newest and newest > moment else None


def answers(db) -> bool:
    try:
        return db.one("SELECT true")
    except psycopg.OperationalError:
        db.close()
        return False


def test_a_fast_shutdown_waits_for_no_broker(private_cluster, kafka):
    cluster = private_cluster("shutdown")
    db = Database(cluster, "shutdown").create()
    db.project(PROJECT)
    kafka.create_server(db.admin, "k")
    db.admin.execute(
        "CREATE SERVER away TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers '127.0.0.1:1')"
    )
    create(db, "here", topics=["^nothing_.*"])
    db.admin.execute("SELECT rakam.create_source(%s, 'away', 'away', %s)", (PROJECT, json.dumps({"topics": ["t"]})))
    # Both are looked at together: while one is known, the other one's broker is being waited for.
    begun = "SELECT begun_at FROM rakam_internal.source WHERE name = 'here'"
    wait_until(lambda: db.one(begun), "the topics of the broker that is there are known")
    db.close()
    began = time.monotonic()
    cluster.stop()
    assert time.monotonic() - began < 10
    assert "terminated by signal" not in cluster.log.read_text()


def test_one_tick_finds_and_reads_where_no_consumers_are(private_cluster, kafka):
    cluster = private_cluster("called", {"shared_preload_libraries": "", "rakam.source_refresh": "1s"})
    db = Database(cluster, "called").create()
    db.project(PROJECT)
    kafka.create_server(db.admin, "k")
    for topic in ("called_a", "called_b"):
        kafka.create_topic(topic, 3)
        kafka.send(topic, numbers(0, 700))
    create(db, "called", topics=["^called_.*"], collection="called")
    db.tick()
    assert stored(db, "called") == sorted([*range(700)] * 2)
    # What has come since: records, a partition and a topic.
    kafka.add_partitions("called_a", 4)
    kafka.send("called_a", [Record(text.encode(), partition=n % 4) for n, text in enumerate(numbers(700, 720))])
    kafka.create_topic("called_c", 1)
    kafka.send("called_c", numbers(720, 730))
    db.tick()
    assert stored(db, "called") == sorted([*[*range(700)] * 2, *range(700, 730)])
    assert db.one("SELECT count(*) FROM rakam_internal.source_split WHERE holder IS NOT NULL") == 0


# -- back-pressure --------------------------------------------------------------------------------------------------


def test_nothing_is_read_while_the_hot_tier_is_full(db, kafka, server):
    kafka.create_topic("pressed", 1)
    create(db, "pressed", topics=["pressed"])
    kafka.send("pressed", numbers(0, 10))
    wait_for(db, "pressed", list(range(10)))
    db.configure(max_hot_bytes="1")
    error = "SELECT last_error FROM rakam.stat_source WHERE source = 'pressed'"
    wait_until(lambda: "hot tier is full" in (db.one(error) or ""), "the source waits")
    kafka.send("pressed", numbers(10, 20))
    time.sleep(1.5)
    assert stored(db, "pressed") == list(range(10))
    db.configure(max_hot_bytes=None)
    wait_for(db, "pressed", list(range(20)))
    wait_until(lambda: db.one(error) is None, "nothing is told any more")
    drop(db, "pressed")
