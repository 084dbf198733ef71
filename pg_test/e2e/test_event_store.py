"""Event stores: what is collected goes out to Kafka or Kinesis, each committed event once, none that was rolled back, the events
of a key in their order; whatever is killed or away meanwhile."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import struct
import threading
import time
from collections import defaultdict

import fastavro
import psycopg
import pytest
from harness.database import collect, collect_batch, refused, wait_until

CLIENTS = 8
# The heavy forms are for a release: eight clients for a minute, and a broker that is away for a whole minute (60).
ROUNDS = int(os.environ.get("RAKAM_EVENT_STORE_ROUNDS", "40"))
OUTAGE_S = float(os.environ.get("RAKAM_EVENT_STORE_OUTAGE_S", "1"))


def framed(db, project: str, value: bytes) -> dict:
    """A record in rakam's framing as any reader with the schema reads it: what follows the body is not looked at."""
    assert value[0] == 0xA7
    (version,) = struct.unpack(">I", value[1:5])
    for (schema,) in db.all(
        "SELECT avro_schema FROM rakam.schema_versions WHERE project = %s AND version = %s", project, version
    ):
        try:
            parsed = fastavro.parse_schema(without_ids(schema))
            return fastavro.schemaless_reader(io.BytesIO(value[5:]), parsed)
        except (ValueError, IndexError, EOFError, StopIteration):
            continue
    raise AssertionError(f"no schema of version {version} reads the record")


def without_ids(schema: dict) -> dict:
    keep = ("name", "type", "default")
    fields = [{k: v for k, v in field.items() if k in keep} for field in schema["fields"]]
    return {"type": "record", "name": schema["name"], "fields": fields}


def schema_of(db, project: str, collection: str, version: int) -> dict:
    schema = db.one(
        "SELECT avro_schema FROM rakam.schema_versions WHERE project = %s AND collection = %s AND version = %s",
        project,
        collection,
        version,
    )
    return fastavro.parse_schema(without_ids(schema))


class Reader:
    """Decodes records, with each schema asked for once."""

    def __init__(self, db, project: str):
        self.db, self.project = db, project
        self.schemas: dict[tuple[str, int], dict] = {}

    def read(self, collection: str, value: bytes) -> dict:
        assert value[0] == 0xA7
        (version,) = struct.unpack(">I", value[1:5])
        key = (collection, version)
        if key not in self.schemas:
            self.schemas[key] = schema_of(self.db, self.project, collection, version)
        body = io.BytesIO(value[5:])
        event = fastavro.schemaless_reader(body, self.schemas[key])
        assert body.read() == b"", "nothing follows the body"
        return event


def headers(message) -> dict[str, str]:
    return {name: value.decode() for name, value in message.headers() or []}


def records(db, kafka, project: str, topic: str) -> list[tuple[int, dict[str, str], str | None, dict]]:
    """Partition, headers, key and event of each record of a topic, by partition and in their order."""
    reader = Reader(db, project)
    found = []
    for partition, messages in kafka.read(topic).items():
        for message in messages:
            named = headers(message)
            key = message.key().decode() if message.key() is not None else None
            found.append((partition, named, key, reader.read(named["rakam-collection"], message.value())))
    return found


def once(found: list[tuple[int, dict[str, str], str | None, dict]]) -> list[tuple[int, str | None, dict]]:
    """The records without the copies that a relay left which died: the first of each mark."""
    seen: set[tuple[int, str, str]] = set()
    kept = []
    for partition, named, key, event in found:
        mark = (partition, named["rakam-origin"], named["rakam-publish-seq"])
        if mark not in seen:
            seen.add(mark)
            kept.append((partition, key, event))
    return kept


def published(db, project: str) -> bool:
    """Whether nothing waits any more."""
    return (
        db.one(
            "SELECT (SELECT count(*) FROM rakam_internal.outbox_0) + (SELECT count(*) FROM rakam_internal.outbox_1)"
            " + (SELECT count(*) FROM rakam_internal.outbox_2)"
            " + (SELECT count(*) FROM rakam_internal.outbox_batch JOIN rakam_internal.project USING (project_id)"
            "    WHERE name = %s)",
            project,
        )
        == 0
    )


def wait_published(db, project: str, timeout_s: float = 120) -> None:
    wait_until(lambda: published(db, project), f"everything of {project} is published", timeout_s)


@pytest.fixture(scope="module")
def server(db, kafka):
    kafka.create_server(db.admin, "k")
    return "k"


def project(db, name: str, server: str | None = "k", options: dict | None = None) -> str:
    db.project(name)
    db.admin.execute("SELECT rakam.set_event_store(%s, %s, %s)", (name, server, json.dumps(options or {})))
    return name


def test_collected_events_go_to_a_topic_of_their_collection(db, kafka, server):
    project(db, "topics")
    collect(db.admin, "topics", "pageview", {"_user": "ann", "url": "/a", "load": 12.5, "n": 9007199254740993})
    collect(db.admin, "topics", "pageview", {"url": "/größe", "tags": ["a", None], "at": "2026-01-02T03:04:05Z"})
    stored = collect_batch(
        db.admin, "topics", [("signup", {"_user": "ann", "plan": "x"}), ("signup", {"_user": "bob"})]
    )
    assert stored[:2] == (2, 0)
    wait_published(db, "topics")
    views = records(db, kafka, "topics", "topics.pageview")
    assert len(views) == 2
    by_url = {event["url"]: (named, key, event) for _, named, key, event in views}
    named, key, event = by_url["/a"]
    assert (key, named["rakam-collection"]) == ("ann", "pageview")
    assert (event["_user"], event["load"], event["n"]) == ("ann", 12.5, 9007199254740993)
    assert event["_received_at"] is not None and event["_time"] == event["_received_at"]
    _, key, event = by_url["/größe"]
    assert key is None
    assert event["tags"] == ["a", None]
    assert event["at"].isoformat() == "2026-01-02T03:04:05+00:00"
    signups = records(db, kafka, "topics", "topics.signup")
    assert sorted(event["_user"] for *_, event in signups) == ["ann", "bob"]
    # They are not stored here, but their tables are there for whoever reads them back.
    wait_until(lambda: db.one("SELECT to_regclass('topics.pageview')"), "the table")
    assert db.one("SELECT count(*) FROM topics.pageview") == 0
    assert db.one("SELECT event_store FROM rakam.projects WHERE project = 'topics'") == {"server": "k"}


def test_what_is_not_committed_is_not_sent(db, kafka, server):
    project(db, "commits", options={"topic": "commits"})
    writer = db.connect(autocommit=False)
    collect(writer, "commits", "e", {"n": "rolled back"})
    writer.rollback()
    collect(writer, "commits", "e", {"n": "kept 1"})
    writer.execute("SAVEPOINT s")
    collect(writer, "commits", "e", {"n": "rolled back to"})
    writer.execute("ROLLBACK TO s")
    collect(writer, "commits", "e", {"n": "kept 2"})
    writer.commit()
    writer.execute(
        "DO $$ BEGIN PERFORM rakam.collect('commits', 'e', '{\"n\": \"kept 3\"}');"
        " BEGIN PERFORM rakam.collect('commits', 'e', '{\"n\": \"caught\"}'); RAISE 'x';"
        " EXCEPTION WHEN OTHERS THEN NULL; END; END $$"
    )
    writer.commit()
    collect(writer, "commits", "e", {"n": "prepared"})
    writer.execute("PREPARE TRANSACTION 'store one'")
    writer.commit()
    collect(writer, "commits", "e", {"n": "prepared in vain"})
    writer.execute("PREPARE TRANSACTION 'store two'")
    writer.commit()
    collect(writer, "commits", "e", {"n": "kept 4"})
    writer.commit()
    wait_until(lambda: len(records(db, kafka, "commits", "commits")) == 4, "what was committed")
    db.admin.execute("ROLLBACK PREPARED 'store two'")
    db.admin.execute("COMMIT PREPARED 'store one'")
    wait_until(lambda: len(records(db, kafka, "commits", "commits")) == 5, "what was prepared and committed")
    wait_published(db, "commits")
    found = [event["n"] for *_, event in records(db, kafka, "commits", "commits")]
    assert sorted(found) == ["kept 1", "kept 2", "kept 3", "kept 4", "prepared"]


def test_rights_and_options(db, kafka, server):
    db.project("rights")
    writer, owner = db.login("rights", "write"), db.login("rights", "admin")
    call = "SELECT rakam.set_event_store(%s, %s, %s)"
    with refused("42501"):
        writer.execute(call, ("rights", "k", "{}"))
    with refused("42501"):
        owner.execute(call, ("topics", "k", "{}"))
    with refused("42501"):
        owner.execute(call, ("nobody", "k", "{}"))
    # Not without USAGE on the server.
    with refused("42501"):
        owner.execute(call, ("rights", "k", "{}"))
    db.admin.execute("GRANT USAGE ON FOREIGN SERVER k TO login_rights_admin")
    with refused("42704"):
        owner.execute(call, ("rights", "no_server", "{}"))
    with refused("22004"):
        owner.execute(call, (None, "k", "{}"))
    for options in ('{"stream": "x"}', '{"topic": 1}', '{"topic": "a b"}', '{"topic": "{user}"}', "[]"):
        with refused("22023"):
            owner.execute(call, ("rights", "k", options))
    with refused("22023"):
        owner.execute(call, ("rights", None, '{"topic": "x"}'))
    owner.execute(call, ("rights", "k", '{"topic": "r.{collection}.{project}"}'))
    assert db.one("SELECT event_store FROM rakam.projects WHERE project = 'rights'") == {
        "server": "k",
        "topic": "r.{collection}.{project}",
    }
    # Nobody reads what waits, nor what other projects have.
    for table in ("outbox_0", "outbox_batch", "outbox_restored", "origin_seen"):
        assert writer.execute("SELECT has_table_privilege('rakam_internal.' || %s, 'SELECT')", (table,)).fetchone() == (
            False,
        )
    rows = writer.execute(
        "SELECT p.name FROM rakam_internal.event_store JOIN rakam_internal.project p USING (project_id)"
    )
    assert rows.fetchall() == [("rights",)]
    with pytest.raises(psycopg.Error) as error:
        db.admin.execute(
            "CREATE SERVER lossy TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers 'x', acks '1')"
        )
        db.admin.execute(call, ("rights", "lossy", "{}"))
    assert error.value.sqlstate == "22023"


def test_other_ways_in_stay_here(db, kafka, server):
    """COPY, INSERT and tracked tables write the table; collect is what the event store is for."""
    project(db, "mixed")
    db.admin.execute("SELECT rakam.create_collection('mixed', 'e')")
    db.admin.execute("SELECT rakam.add_field('mixed', 'e', 'n', 'bigint')")
    wait_until(lambda: db.one("SELECT to_regclass('mixed.e')"), "the table")
    db.wait_column("mixed.e", "n")
    db.admin.execute("INSERT INTO mixed.e (n) VALUES (1), (2)")
    assert db.one("SELECT count(*) FROM mixed.e") == 2
    collect(db.admin, "mixed", "e", {"n": 3})
    wait_published(db, "mixed")
    assert [event["n"] for *_, event in records(db, kafka, "mixed", "mixed.e")] == [3]
    # Back to Postgres: from the next call on.
    db.admin.execute("SELECT rakam.set_event_store('mixed', NULL)")
    assert db.one("SELECT event_store FROM rakam.projects WHERE project = 'mixed'") is None
    collect(db.admin, "mixed", "e", {"n": 4})
    assert db.one("SELECT count(*) FROM mixed.e") == 3
    assert len(records(db, kafka, "mixed", "mixed.e")) == 1


def clients(db, name: str, rounds: int, seed: int, stop: threading.Event | None = None) -> dict[str, list[int]]:
    """Eight clients that commit, roll back, and roll back to savepoints; what each user of theirs has committed, in order.
    `stop`: they go on until it is set, with pauses."""
    committed: dict[str, list[int]] = defaultdict(list)
    errors: list[Exception] = []

    def run(number: int) -> None:
        dice = random.Random(seed * 100 + number)
        session = db.connect(autocommit=False)
        counters: dict[str, int] = defaultdict(int)

        def event(user: str) -> dict:
            counters[user] += 1
            return {"_user": user, "n": counters[user]}

        try:
            for at in range(rounds) if stop is None else itertools.count():
                if stop is not None and stop.wait(dice.uniform(0, 0.1)):
                    return
                sent: list[tuple[str, int]] = []
                for _ in range(dice.randrange(1, 4)):
                    user = f"c{number}u{dice.randrange(3)}"
                    undo = dice.random() < 0.2
                    if undo:
                        session.execute("SAVEPOINT s")
                    if dice.random() < 0.5:
                        given = event(user)
                        collect(session, name, f"e{at % 3}", given)
                        now = [(user, given["n"])]
                    else:
                        several = [event(user) for _ in range(dice.randrange(1, 30))]
                        collect_batch(session, name, [(f"e{at % 3}", given) for given in several])
                        now = [(user, given["n"]) for given in several]
                    if undo:
                        session.execute("ROLLBACK TO s")
                    else:
                        sent += now
                if dice.random() < 0.2:
                    session.rollback()
                else:
                    session.commit()
                    for user, n in sent:
                        committed[user].append(n)
        except Exception as error:
            errors.append(error)
        finally:
            session.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    return committed


def assert_all_once(db, kafka, name: str, topics: list[str], committed: dict[str, list[int]]) -> None:
    """Every committed event once, none else, and each key's in one partition of a topic and in its order."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    places: dict[tuple[str, str], set[int]] = defaultdict(set)
    for topic in topics:
        if kafka.partitions(topic) == 0:
            continue
        for partition, key, event in once(records(db, kafka, name, topic)):
            assert key == event["_user"]
            found[topic, key].append(int(event["n"]))
            places[topic, key].add(partition)
    got: dict[str, list[int]] = defaultdict(list)
    for (_, user), numbers in found.items():
        assert numbers == sorted(numbers), f"the events of {user} are in their order"
        got[user] += numbers
    assert all(len(numbers) == 1 for numbers in places.values()), "a key is in one partition"
    assert {user: sorted(numbers) for user, numbers in got.items()} == {
        user: sorted(numbers) for user, numbers in committed.items()
    }


def test_eight_clients_with_rollbacks(db, kafka, server):
    project(db, "eight")
    committed = clients(db, "eight", ROUNDS, 1)
    wait_published(db, "eight")
    assert_all_once(db, kafka, "eight", [f"eight.e{n}" for n in range(3)], committed)


def test_a_key_stays_where_it_is_when_partitions_are_added(db, kafka, server):
    project(db, "grown", options={"topic": "grown"})
    users = [f"u{n}" for n in range(50)]
    for n in range(3):
        collect_batch(db.admin, "grown", [("e", {"_user": user, "n": n}) for user in users])
    wait_published(db, "grown")
    before = {key: partition for partition, key, _ in once(records(db, kafka, "grown", "grown"))}
    assert len(set(before.values())) == 4
    kafka.add_partitions("grown", 7)
    # A relay that begins anew, with new metadata, goes on as the one before.
    kill_relay(db)
    for n in range(3, 6):
        collect_batch(db.admin, "grown", [("e", {"_user": user, "n": n}) for user in users])
    wait_published(db, "grown")
    after = once(records(db, kafka, "grown", "grown"))
    assert {key: partition for partition, key, _ in after} == before
    by_user = defaultdict(list)
    for _, key, event in after:
        by_user[key].append(event["n"])
    assert all(numbers == [0, 1, 2, 3, 4, 5] for numbers in by_user.values())
    # Said again, the event store looks at its topics anew.
    db.admin.execute("SELECT rakam.set_event_store('grown', 'k', '{\"topic\": \"grown\"}')")
    collect_batch(db.admin, "grown", [("e", {"_user": user, "n": 6}) for user in users])
    wait_published(db, "grown")
    now = {partition for partition, _, event in once(records(db, kafka, "grown", "grown")) if event["n"] == 6}
    assert max(now) > 3


def relay_pid(db) -> int | None:
    return db.one("SELECT max(pid) FROM rakam.stat_worker WHERE kind = 'relay'")


def kill_relay(db) -> None:
    if pid := relay_pid(db):
        db.admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
        wait_until(lambda: relay_pid(db) != pid, "the relay is gone")


@pytest.mark.parametrize("point", ["relay.after_assign", "relay.before_mark"])
def test_a_relay_that_dies_sends_again_under_the_same_mark(private_cluster, kafka, point):
    """kill -9 ends the whole server's sessions; everything goes on where it was."""
    from harness.database import Database

    cluster = private_cluster("relay")
    db = Database(cluster, "relay").create()
    kafka.create_server(db.admin, "k")
    name = "died_" + point.rsplit("_", 1)[-1]
    project(db, name, options={"topic": name})
    collect(db.admin, name, "e", {"_user": "u", "n": 0})
    wait_published(db, name)
    db.configure(failpoint=f"{point}=exit")
    collect_batch(db.admin, name, [("e", {"_user": f"u{n % 5}", "n": n}) for n in range(1, 200)])
    wait_until(lambda: crashed(db), "the relay has died")
    db.close()
    wait_until(lambda: reset_failpoint(db), "the server is there again", 120)
    # A relay that started before that may die once more.
    wait_until(lambda: published_after_a_crash(db, name), "what was left is published", 120)
    collect(db.admin, name, "e", {"_user": "u", "n": 200})
    wait_published(db, name)
    found = records(db, kafka, name, name)
    kept = once(found)
    if point == "relay.before_mark":
        assert len(found) > len(kept), "there are copies"
    assert sorted(int(event["n"]) for *_, event in kept) == list(range(201))
    sequences = {int(named["rakam-publish-seq"].split(".")[0]) for _, named, *_ in found}
    assert sequences == set(range(1, len(sequences) + 1)), "the numbers are dense"
    db.close()


def crashed(db) -> bool:
    try:
        db.admin.execute("SELECT 1")
        return False
    except psycopg.Error:
        return True


def reset_failpoint(db) -> bool:
    try:
        db.configure(failpoint=None)
        return True
    except (psycopg.Error, AssertionError):
        db.close()
        return False


def health(db) -> str:
    return db.one("SELECT status FROM rakam.health() WHERE \"check\" = 'event stores'")


def published_after_a_crash(db, project: str) -> bool:
    try:
        return published(db, project)
    except psycopg.Error:
        db.close()
        return False


def test_a_broker_that_is_away(db, kafka, server):
    """Collecting goes on, and everything that was committed comes through afterwards, in order; others are not held up."""
    project(db, "away")
    db.project("others")
    stop = threading.Event()
    committed: dict[str, list[int]] = {}
    collecting = threading.Thread(target=lambda: committed.update(clients(db, "away", 0, 2, stop)))
    collecting.start()
    try:
        wait_until(lambda: kafka.partitions("away.e0"), "the first events are there")
        # It is silent for a while, and then gone.
        kafka.halt()
        time.sleep(OUTAGE_S / 2)
        kafka.crash()
        gone = time.monotonic()
        wait_until(lambda: health(db) == "error", "the outage is told")
        for n in itertools.count(1):
            # Somebody else's events are digested as ever.
            collect(db.admin, "others", "e", {"n": n})
            wait_until(lambda n=n: sum(db.tiers("others", "e").values()) == n, "the event is there")
            wait_until(lambda: db.tiers("others", "e")["inbox"] == 0, "others are digested", 10)
            if time.monotonic() - gone >= OUTAGE_S / 2:
                break
            time.sleep(0.1)
    finally:
        stop.set()
        collecting.join()
        kafka.start_again()
    print(f"{sum(map(len, committed.values()))} events were committed")
    wait_published(db, "away")
    assert_all_once(db, kafka, "away", [f"away.e{n}" for n in range(3)], committed)
    wait_until(lambda: health(db) == "ok", "all is well again")


def test_an_open_transaction_holds_up_no_other_store(db, kafka, server):
    """Who is about to change a store of his holds up what is sent to it, at most."""
    for name in ("held", "free"):
        kafka.create_topic(f"{name}.e", 1)
        project(db, name)
        collect(db.admin, name, "e", {"n": 1})
    wait_published(db, "held")
    session = db.connect(autocommit=False)
    for change in ("NULL, '{}'", "'k', '{}'", "'k', '{\"topic\": \"other\"}'"):
        before = kafka.ends("free.e", 0)[1]
        session.execute(f"SELECT rakam.set_event_store('held', {change})")
        for name in ("held", "free"):
            collect(db.admin, name, "e", {"n": 2})
        wait_until(lambda before=before: kafka.ends("free.e", 0)[1] == before + 1, "the other store's event is there")
        session.rollback()
    wait_published(db, "held")
    assert len(records(db, kafka, "held", "held.e")) == 4


def test_stores_whose_brokers_are_away_leave_room_for_others(db, kafka, server):
    """However many of them wait: there are only so many places."""
    db.admin.execute(
        "CREATE SERVER nobody TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers '127.0.0.1:1')"
    )
    away = [f"gone{n:02}" for n in range(24)]
    for name in away:
        project(db, name, "nobody")
        collect(db.admin, name, "e", {"n": 1})
    kafka.create_topic("reached.e", 1)
    project(db, "reached")
    failing = "SELECT count(*) FROM rakam_internal.event_store WHERE last_error IS NOT NULL"
    wait_until(lambda: db.one(failing) >= len(away), "all have failed", 180)
    for n in range(1, 4):
        collect(db.admin, "reached", "e", {"n": n})
        wait_until(lambda n=n: kafka.ends("reached.e", 0)[1] == n, "the one whose broker is there", 15)
    db.admin.execute("SET rakam.allow_project_drop = on")
    for name in away:
        db.admin.execute("SELECT rakam.drop_project(%s)", (name,))
    db.admin.execute("RESET rakam.allow_project_drop")


def test_a_store_that_is_taken_again_goes_on_in_its_order(db, kafka, server):
    """What was collected before and waits comes first, also when events stayed here in between, or the server was renamed
    or made anew."""
    away, there = "'127.0.0.1:1'", f"'{kafka.brokers}'"
    kafka.create_server(db.admin, "k_old")
    kafka.create_topic("taken.e", 3)
    project(db, "taken", "k_old")
    numbers = itertools.count()
    users = [f"u{n}" for n in range(5)]

    def send() -> None:
        n = next(numbers)
        collect_batch(db.admin, "taken", [("e", {"_user": user, "n": n}) for user in users])

    def choose(server: str | None, **options: str) -> None:
        db.admin.execute("SELECT rakam.set_event_store('taken', %s, %s)", (server, json.dumps(options)))

    send()
    wait_published(db, "taken")
    db.admin.execute(f"ALTER SERVER k_old OPTIONS (SET brokers {away})")
    send()
    choose(None)
    collect(db.admin, "taken", "here", {"n": 1})
    choose("k_old", topic="{project}.{collection}")
    send()
    db.admin.execute("ALTER SERVER k_old RENAME TO k_new")
    choose("k_new")
    send()
    db.admin.execute("ALTER SERVER k_new RENAME TO k_last")
    db.tick()
    with refused("2BP01"):
        db.admin.execute("DROP SERVER k_last")
    db.admin.execute("DROP SERVER k_last CASCADE")
    send()
    wait_until(
        lambda: "was dropped" in (db.one("SELECT last_error FROM rakam.stat_worker WHERE kind = 'relay'") or ""),
        "the missing server is told",
    )
    kafka.create_server(db.admin, "k_last")
    db.admin.execute(f"ALTER SERVER k_last OPTIONS (SET brokers {away})")
    choose("k_last")
    send()
    db.admin.execute(f"ALTER SERVER k_last OPTIONS (SET brokers {there})")
    wait_published(db, "taken")
    found = records(db, kafka, "taken", "taken.e")
    assert len({named["rakam-origin"] for _, named, *_ in found}) == 1
    by_user = defaultdict(list)
    for _, key, event in once(found):
        by_user[key].append(event["n"])
    sent = next(numbers)
    assert dict(by_user) == {user: list(range(sent)) for user in users}
    assert db.one("SELECT count(*) FROM taken.here") == 1


def test_a_refused_record_stops_no_other_and_changes_no_order(db, kafka, server):
    # So much that it is sent in several pieces, of which the broker would take the last one.
    kafka.create_topic("pieces.e", 1, max_message_bytes="100000")
    kafka.create_topic("pieces.rules", 1, cleanup_policy="compact")
    project(db, "pieces")

    def text() -> str:
        return "".join(random.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=60_000))

    events = [{"_user": "u", "n": n, "text": text() if n < 17 else "x"} for n in range(20)]
    stored = collect_batch(db.admin, "pieces", [("e", event) for event in events])
    assert stored[:2] == (20, 0)
    # A compacted topic takes nothing without a key.
    keyed = [{"_user": f"u{n}", "n": n} | ({"_user": None} if n % 10 == 5 else {}) for n in range(40)]
    collect_batch(db.admin, "pieces", [("rules", event) for event in keyed])
    wait_published(db, "pieces")
    assert [event["n"] for *_, event in records(db, kafka, "pieces", "pieces.e")] == list(range(20))
    kept = [event["n"] for *_, event in records(db, kafka, "pieces", "pieces.rules")]
    assert kept == [n for n in range(40) if n % 10 != 5]
    letters = db.all("SELECT payload, error FROM rakam.dead_letter WHERE project = 'pieces' ORDER BY id")
    assert [json.loads(payload)["n"] for payload, _ in letters] == [5, 15, 25, 35]
    assert all("does not take the record" in error for _, error in letters)


def test_the_outbox_is_bounded(private_cluster):
    from harness.database import Database

    cluster = private_cluster("full", {"rakam.max_hot_bytes": "16MB"})
    db = Database(cluster, "full").create()
    db.admin.execute("CREATE SERVER k TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers '127.0.0.1:1')")
    project(db, "full")
    db.project("others")
    text = "x" * 20_000

    def fill() -> bool:
        try:
            for _ in range(20):
                collect(db.admin, "full", "e", {"text": "".join(random.choices("abcdefghij", k=20_000)) + text[:1]})
        except psycopg.Error as error:
            assert error.sqlstate == "53100"
            return True
        return False

    wait_until(fill, "the outbox is full", 120)
    # That is nobody else's matter.
    collect(db.admin, "others", "e", {"n": 1})
    assert db.one("SELECT count(*) FROM others._all") == 1
    # What waits for a broker that never was stays, also when the project's events are stored here again.
    db.admin.execute("SELECT rakam.set_event_store('full', NULL)")
    collect(db.admin, "full", "e", {"n": 1})
    assert db.one("SELECT n > 0 FROM (SELECT count(*) AS n FROM rakam_internal.outbox_0) o") is True
    db.close()


def test_space_is_given_back(db, kafka, server):
    project(db, "space")
    size = "SELECT sum(pg_total_relation_size('rakam_internal.outbox_' || k)) FROM generate_series(0, 2) k"
    for n in range(12):
        texts = ["".join(random.choices("abcdefghij", k=20_000)) for _ in range(100)]
        collect_batch(db.admin, "space", [("e", {"n": n, "text": text}) for text in texts])
    wait_published(db, "space")
    wait_until(lambda: db.one(size) < 2_000_000, "the outbox is small again", 120)


def test_poison_does_not_stop_the_rest(db, kafka, server):
    kafka.create_topic("poison.small", 2, max_message_bytes="20000")
    project(db, "poison")
    collect(db.admin, "poison", "small", {"_user": "u", "n": 1})
    collect(
        db.admin, "poison", "small", {"_user": "u", "n": 2, "text": "".join(random.choices("abcdefghij", k=60_000))}
    )
    collect(db.admin, "poison", "small", {"_user": "u", "n": 3})
    # A collection whose name no topic can have goes out under one that can.
    collect(db.admin, "poison", "größe", {"_user": "u", "n": 4})
    wait_published(db, "poison")
    assert [event["n"] for _, _, event in once(records(db, kafka, "poison", "poison.small"))] == [1, 3]
    odd = records(db, kafka, "poison", "poison.gr_uf6__udf_e")
    assert {named["rakam-collection"] for _, named, *_ in odd} == {"größe"}
    assert [event["n"] for *_, event in once(odd)] == [4]
    letters = db.all("SELECT source, payload, error FROM rakam.dead_letter WHERE project = 'poison'")
    assert len(letters) == 1
    source, payload, error = letters[0]
    assert source is None and json.loads(payload)["n"] == 2 and "bytes" in error
    # A replay sends it again; into Postgres where the project's events stay there by then.
    db.admin.execute("SELECT rakam.set_event_store('poison', NULL)")
    assert db.one("SELECT rakam.replay_dead_letters('poison')") == 1
    assert db.one("SELECT count(*) FROM poison.small") == 1


def test_kinesis(db, kinesis):
    kinesis.create_stream("out", 2)
    kinesis.create_server(db.admin, "n")
    project(db, "stream", "n", {"stream": "out"})
    with refused("22023"):
        db.admin.execute("SELECT rakam.set_event_store('stream', 'n', '{}')")
    with refused("22023"):
        db.admin.execute("SELECT rakam.set_event_store('stream', 'n', %s)", ('{"stream": "x", "topic": "y"}',))
    for n in range(5):
        collect_batch(db.admin, "stream", [("e", {"_user": f"u{user}", "n": n}) for user in range(10)])
    collect(db.admin, "stream", "other", {"n": 1})
    wait_published(db, "stream")
    by_user = defaultdict(list)
    for found in kinesis.read("out").values():
        for record in found:
            event = framed(db, "stream", record["Data"])
            if event.get("_user"):
                assert record["PartitionKey"] == event["_user"]
                by_user[event["_user"]].append(event["n"])
    assert dict(by_user) == {f"u{user}": [0, 1, 2, 3, 4] for user in range(10)}


def test_there_and_back(db, kafka, server):
    """Collected by eight clients, sent to Kafka, consumed back and queried: every committed event once."""
    for n in range(3):
        kafka.create_topic(f"back.e{n}")
    project(db, "back")
    options = {"topics": ["^back[.]e.*"], "format": "avro"}
    db.admin.execute("SELECT rakam.create_source('back', 'in', 'k', %s)", (json.dumps(options),))
    committed = clients(db, "back", ROUNDS, 4)
    assert_stored_once(db, "back", committed)


def assert_stored_once(db, name: str, committed: dict[str, list[int]]) -> None:
    total = sum(len(numbers) for numbers in committed.values())

    def stored() -> int:
        return db.one(f"SELECT count(*) FROM {name}._all")

    wait_until(lambda: stored() >= total, f"{total} events of {name} are back", 120)
    rows = db.all(
        f"SELECT _user, array_agg((properties->>'n')::int ORDER BY (properties->>'n')::int) FROM {name}._all GROUP BY 1"
    )
    assert dict(rows) == {user: sorted(numbers) for user, numbers in committed.items()}


def usage(db, name: str) -> int:
    """The bytes that a project has used of the days of its quota."""
    return db.one(
        "SELECT coalesce(sum(bytes), 0)::int8 FROM rakam_internal.usage JOIN rakam_internal.project USING (project_id)"
        " WHERE name = %s",
        name,
    )


def stamping(db, name: str) -> None:
    """A mapper for all that a project collects, which leaves a trace each time it is called."""
    db.admin.execute(
        f"CREATE FUNCTION {name}.stamp(event jsonb) RETURNS jsonb LANGUAGE sql AS"
        f" $$SELECT event || jsonb_build_object('by', coalesce(event->>'by', '') || '{name};')$$"
    )
    db.admin.execute("SELECT rakam.set_mapper(%s, NULL, %s::regprocedure)", (name, f"{name}.stamp(jsonb)"))


@pytest.mark.parametrize("bounded", [False, True], ids=["unbounded", "bounded"])
def test_what_comes_back_is_neither_mapped_nor_charged_again(db, kafka, server, bounded):
    name = "bounded" if bounded else "unbounded"
    kafka.create_topic(f"{name}.e", 1)
    project(db, name)
    stamping(db, name)
    if bounded:
        db.admin.execute("SELECT rakam.set_quota(%s, 1000, 10000000, NULL, NULL)", (name,))
    # Many go straight into the hot tier, few through the inbox.
    collect_batch(db.admin, name, [("e", {"n": n}) for n in range(600)])
    wait_published(db, name)
    used = usage(db, name)
    assert (used > 0) == bounded
    options = {"topics": [f"{name}.e"], "format": "avro"}
    db.admin.execute("SELECT rakam.create_source(%s, 'in', 'k', %s)", (name, json.dumps(options)))
    wait_until(lambda: db.one(f"SELECT count(*) FROM {name}._all") == 600, "many are back")
    db.tick()
    assert usage(db, name) == used
    db.admin.execute("SELECT rakam.pause_source(%s, 'in')", (name,))
    collect_batch(db.admin, name, [("e", {"n": n}) for n in range(600, 603)])
    wait_published(db, name)
    used = usage(db, name)
    db.admin.execute("SELECT rakam.resume_source(%s, 'in')", (name,))
    wait_until(lambda: db.one(f"SELECT count(*) FROM {name}._all") == 603, "few are back")
    db.tick()
    assert usage(db, name) == used
    found = db.all(f"SELECT properties->>'by', count(DISTINCT properties->'n') FROM {name}._all GROUP BY 1")
    assert found == [(f"{name};", 603)]
    assert db.one("SELECT count(*) FROM rakam.dead_letter WHERE project = %s", name) == 0


def test_what_comes_of_another_project_is_mapped_here(db, kafka, server):
    kafka.create_topic("there.e", 1)
    project(db, "there")
    db.project("here")
    for name in ("there", "here"):
        stamping(db, name)
        # The same versions of the same schema, so that one reads what the other has written.
        db.admin.execute("SELECT rakam.create_collection(%s, 'e')", (name,))
        db.admin.execute("SELECT rakam.add_field(%s, 'e', 'n', 'bigint')", (name,))
        db.admin.execute("SELECT rakam.add_field(%s, 'e', 'by', 'text')", (name,))
    collect_batch(db.admin, "there", [("e", {"n": n}) for n in range(600)])
    wait_published(db, "there")
    db.admin.execute(
        'SELECT rakam.create_source(\'here\', \'in\', \'k\', \'{"topics": ["there.e"], "format": "avro",'
        ' "collection": "e"}\')'
    )
    wait_until(lambda: db.one("SELECT count(*) FROM here._all") == 600, "they are here")
    assert db.all("SELECT DISTINCT properties->>'by' FROM here._all") == [("there;here;",)]


def test_what_is_read_again_on_purpose_is_stored_again(db, kafka, server):
    """The marks tell copies of a relay, not what `seek_source` asks for."""
    kafka.create_topic("again.e", 1)
    project(db, "again")
    db.admin.execute(
        "SELECT rakam.create_source('again', 'in', 'k', '{\"topics\": [\"again.e\"], \"format\": \"avro\"}')"
    )
    collect_batch(db.admin, "again", [("e", {"n": n}) for n in range(10)])
    collect_batch(db.admin, "again", [("e", {"n": n, "_id": f"i{n}"}) for n in range(10)])
    wait_until(lambda: db.one("SELECT count(*) FROM again._all") == 20, "all are there")
    db.admin.execute("SELECT rakam.seek_source('again', 'in', 'earliest', true)")
    # Those with an _id once.
    wait_until(lambda: db.one("SELECT count(*) FROM again._all") == 30, "those without an _id are there twice")


def test_copies_are_stored_once(private_cluster, kafka):
    """A relay that dies between sending and noting, again and again, while a source reads what it sends."""
    from harness.database import Database

    cluster = private_cluster("copies")
    db = Database(cluster, "copies").create()
    kafka.create_server(db.admin, "k")
    kafka.create_topic("copies", 2)
    project(db, "copies", options={"topic": "copies"})
    db.admin.execute(
        "SELECT rakam.create_source('copies', 'in', 'k', '{\"topics\": [\"copies\"], \"format\": \"avro\"}')"
    )
    committed: dict[str, list[int]] = defaultdict(list)
    for n in range(3):
        db.configure(failpoint="relay.before_mark=exit")
        batch = [(f"u{user}", n * 100 + number) for user in range(20) for number in range(20)]
        collect_batch(db.admin, "copies", [("e", {"_user": user, "n": number}) for user, number in batch])
        for user, number in batch:
            committed[user].append(number)
        wait_until(lambda: crashed(db), "the relay has died")
        db.close()
        wait_until(lambda: reset_failpoint(db), "the server is there again", 120)
        # A relay that started before that may die once more.
        wait_until(lambda: published_after_a_crash(db, "copies"), "everything is published", 120)
    sent = sum(len(messages) for messages in kafka.read("copies").values())
    assert sent > sum(len(numbers) for numbers in committed.values()), "there are copies"
    assert_stored_once(db, "copies", committed)
    db.close()


def test_a_stream_and_back(db, kinesis):
    kinesis.create_stream("circle", 2)
    if not db.one("SELECT count(*) FROM pg_foreign_server WHERE srvname = 'n'"):
        kinesis.create_server(db.admin, "n")
    project(db, "circle", "n", {"stream": "circle", "partition_key": "_user"})
    db.admin.execute(
        "SELECT rakam.create_source('circle', 'in', 'n', '{\"stream\": \"circle\", \"format\": \"avro\"}')"
    )
    committed = clients(db, "circle", 4, 5)
    # The keys go on in other shards.
    shard = kinesis.open_shards("circle")[0]
    kinesis.split("circle", shard)
    for user in committed:
        collect(db.admin, "circle", "e0", {"_user": user, "n": 1_000_000})
        committed[user].append(1_000_000)
    assert_stored_once(db, "circle", committed)


def test_a_dump_carries_what_waits(cluster, db, kafka, server):
    """The batch under way keeps its marks, whoever sends it; what a copy collects has an origin of its own."""
    from harness.database import Database

    project(db, "dumped", options={"topic": "dumped"})
    collect(db.admin, "dumped", "e", {"_user": "u", "n": 1})
    wait_published(db, "dumped")
    db.admin.execute("ALTER SERVER k OPTIONS (SET brokers '127.0.0.1:1')")
    kill_relay(db)
    collect_batch(db.admin, "dumped", [("e", {"_user": "u", "n": 2}), ("new", {"_user": "u", "n": 3})])
    wait_until(lambda: db.one("SELECT count(*) FROM rakam_internal.outbox_batch") == 1, "the batch has its number")
    dump = cluster.make_folder("dump_event_store") / "whole.dump"
    cluster.run("pg_dump", "-Fc", "-f", dump, db.name, env=cluster.environment())
    there = f"ALTER SERVER k OPTIONS (SET brokers '{kafka.brokers}')"
    db.admin.execute(there)
    restored = Database(cluster, "event_store_copy").create(extension=False)
    try:
        done = cluster.run("pg_restore", "-d", restored.name, dump, env=cluster.environment())
        assert "error" not in done.stderr.lower(), done.stderr
        restored.admin.execute(there)
        wait_published(db, "dumped")
        wait_until(
            lambda: restored.one("SELECT count(*) FROM rakam_internal.outbox_restored") == 0, "rows are put back"
        )
        wait_published(restored, "dumped")
        found = records(db, kafka, "dumped", "dumped")
        assert sorted(event["n"] for *_, event in once(found)) == [1, 2, 3]
        assert len({named["rakam-origin"] for _, named, *_ in found}) == 1
        collect(restored.admin, "dumped", "e", {"_user": "u", "n": 4})
        wait_published(restored, "dumped")
        found = records(db, kafka, "dumped", "dumped")
        marks = {named["rakam-origin"]: named["rakam-publish-seq"] for _, named, _, event in found if event["n"] == 4}
        assert list(marks.values()) == ["1.0"]
        assert len({named["rakam-origin"] for _, named, *_ in found}) == 2
        # What the copy has from before it was one is its own as well.
        origins = "SELECT (former_origins || origin)::text[] FROM rakam_internal.event_store"
        assert set(
            restored.one(
                f"{origins} WHERE server = 'k' AND anchor IS NOT NULL AND options @> '{{\"topic\": \"dumped\"}}'"
            )
        ) == {named["rakam-origin"] for _, named, *_ in found}
    finally:
        restored.drop()
