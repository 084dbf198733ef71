"""Sources share the time of a consumer: one whose mapper is slow goes on in small batches, and the others have their turns."""

from __future__ import annotations

import json
import time

import pytest
from harness.avro import container, schema
from harness.database import wait_until

# The mappers of a batch have four times as long as one of their calls.
LIMIT_S = 1
ALLOWANCE_S = 4 * LIMIT_S


@pytest.fixture(scope="module")
def world(db, kafka):
    """A project whose mappers are slow, another one, and one consumer for both."""
    for project in ("slow", "quick"):
        db.project(project)
    # Each of them has a name that says how long an event takes.
    for name, seconds in {"dawdles": 0.2, "hangs": 60}.items():
        db.admin.execute(
            f"CREATE FUNCTION slow.{name}(event jsonb) RETURNS jsonb LANGUAGE plpgsql AS"
            f" $$BEGIN PERFORM pg_sleep({seconds}); RETURN event; END$$"
        )
    kafka.create_server(db.admin, "k")
    db.configure(max_consumers=1, mapper_timeout=f"{LIMIT_S}s", source_refresh="300ms")
    yield
    db.configure(max_consumers=None, mapper_timeout=None, source_refresh=None)


def create(db, project: str, name: str, server: str = "k", **options) -> None:
    db.admin.execute("SELECT rakam.create_source(%s, %s, %s, %s)", (project, name, server, json.dumps(options)))


def drop(db, **sources: str) -> None:
    for name, project in sources.items():
        db.admin.execute("SELECT rakam.drop_source(%s, %s)", (project, name))


def set_mapper(db, collection: str | None, name: str | None) -> None:
    function = name and f"slow.{name}(jsonb)"
    db.admin.execute("SELECT rakam.set_mapper('slow', %s, %s::regprocedure)", (collection, function))


def numbers(first: int, last: int) -> list[str]:
    return [json.dumps({"n": n}) for n in range(first, last)]


def count(db, project: str, collection: str) -> int:
    return db.one(f"SELECT count(*) FROM {project}._all WHERE _collection = %s", collection)


def found(db, collection: str) -> list[int]:
    """The events of the slow project that are there, in order."""
    query = "SELECT (properties->>'n')::int FROM slow._all WHERE _collection = %s ORDER BY 1"
    return [n for (n,) in db.all(query, collection)]


def errors(db, source: str) -> list[str]:
    return [error for (error,) in db.all("SELECT error FROM rakam.dead_letter WHERE source = %s", source)]


def test_a_slow_mapper_delays_others_by_a_batch_at_most(db, kafka, world):
    events = 100
    for topic in ("dawdled", "prompt"):
        kafka.create_topic(topic, 1)
    set_mapper(db, "dawdled", "dawdles")
    kafka.send("dawdled", numbers(0, events))
    kafka.send("prompt", numbers(0, 1))
    create(db, "quick", "prompt", topics=["prompt"])
    wait_until(lambda: count(db, "quick", "prompt") == 1, "the first event of the other project")
    create(db, "slow", "dawdled", topics=["dawdled"])
    producer = kafka.producer()
    waits: list[float] = []
    give_up = time.monotonic() + 180
    while count(db, "slow", "dawdled") < events:
        assert time.monotonic() < give_up, f"{count(db, 'slow', 'dawdled')} of {events}"
        sent = len(waits) + 1
        kafka.send("prompt", numbers(sent, sent + 1), producer)
        began = time.monotonic()
        wait_until(lambda sent=sent: count(db, "quick", "prompt") == sent + 1, "an event of the other project")
        waits.append(time.monotonic() - began)
        time.sleep(0.3)
    print(
        f"waited at most {max(waits):.1f} s for a batch, {sum(waits) / len(waits):.1f} s on an average of {len(waits)}"
    )
    # The batch that showed how slow the mapper is, and the smaller ones that came then.
    assert max(waits) < ALLOWANCE_S + LIMIT_S + 5
    assert sorted(waits)[len(waits) // 2] < 3
    assert len(waits) > 5
    consumers = "SELECT count(*) FROM rakam.stat_worker WHERE kind = 'consumer' AND database = current_database()"
    assert db.one(consumers) == 1
    # That it is slow costs nothing but time.
    assert found(db, "dawdled") == list(range(events))
    assert errors(db, "dawdled") == []
    # And no longer than it is.
    set_mapper(db, "dawdled", None)
    kafka.send("dawdled", numbers(events, 5_000))
    wait_until(lambda: count(db, "slow", "dawdled") == 5_000, "the rest, quickly")
    assert found(db, "dawdled") == list(range(5_000))
    drop(db, dawdled="slow", prompt="quick")


@pytest.mark.parametrize("kind", ["csv", "ndjson"])
def test_a_file_is_read_in_small_batches(db, cluster, world, kind):
    rows = 30
    name = f"of_{kind}"
    folder = cluster.make_folder(name)
    cluster.make_folder(f"{name}/in")
    lines = ["n", *map(str, range(rows))] if kind == "csv" else numbers(0, rows)
    part = folder / "in/.a.part"
    part.write_text("\n".join(lines) + "\n")
    part.chmod(0o644)
    part.rename(folder / f"in/a.{kind}")
    db.admin.execute(f"CREATE SERVER {name} FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.admin.execute(
        f"CREATE SERVER {name}_files TYPE 'files' FOREIGN DATA WRAPPER rakam_source OPTIONS (storage '{name}')"
    )
    set_mapper(db, name, "dawdles")
    create(db, "slow", name, f"{name}_files", collection=name, prefix="in")
    wait_until(lambda: len(found(db, name)) == rows, "all rows")
    state = "SELECT state FROM rakam.offsets WHERE source = %s"
    wait_until(lambda: db.one(state, name) == "ended", "the end of the file")
    assert found(db, name) == list(range(rows))
    assert errors(db, name) == []
    drop(db, **{name: "slow"})


def test_what_of_one_record_takes_too_long_is_tried_again_by_a_call(db, kafka, world):
    events = 40
    kafka.create_topic("packed", 1)
    set_mapper(db, "packed", "dawdles")
    kafka.send("packed", [container(schema("e", n="long"), [{"n": n} for n in range(events)])])
    create(db, "slow", "packed", topics=["packed"], format="avro", framing="container")
    wait_until(lambda: db.one("SELECT next_offset FROM rakam.offsets WHERE source = 'packed'") == 1, "the record")
    late = errors(db, "packed")
    assert late and all("taken too long (SQLSTATE 57014)" in error for error in late)
    stored = found(db, "packed")
    assert stored == list(range(events - len(late)))
    # Who calls waits for as long as it takes, and so has each event.
    assert db.one("SELECT rakam.replay_dead_letters('slow', 'packed')") == len(late)
    assert found(db, "packed") == list(range(events))
    assert errors(db, "packed") == []
    drop(db, packed="slow")


def test_a_mapper_that_hangs_is_given_up_for_the_whole_batch(db, kafka, world):
    """However many collections its events belong to."""
    collections = 12
    kafka.create_topic("hung", 1)
    set_mapper(db, None, "hangs")
    kafka.send("hung", [json.dumps({"_collection": f"hung_{n}", "n": n}) for n in range(collections)])
    create(db, "slow", "hung", topics=["hung"])
    wait_until(lambda: len(errors(db, "hung")) == collections, "the dead letters")
    told = errors(db, "hung")
    assert all("(SQLSTATE 57014)" in error for error in told)
    assert sum("not called again after 3 timeouts" in error for error in told) >= collections // 2
    set_mapper(db, None, None)
    assert db.one("SELECT rakam.replay_dead_letters('slow', 'hung')") == collections
    numbered = "SELECT (properties->>'n')::int FROM slow._all WHERE _collection LIKE 'hung%' ORDER BY 1"
    assert [n for (n,) in db.all(numbered)] == list(range(collections))
    drop(db, hung="slow")
