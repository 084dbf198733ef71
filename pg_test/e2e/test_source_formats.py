"""What a record of a source becomes: an event of its collection in either road, or a dead letter that can be tried again
(SPEC: sources). Real topics; the broker has 1 partition a topic, so that offsets say which record it was."""

from __future__ import annotations

import io
import json
import random
import struct
import threading
from decimal import Decimal

import fastavro
import psycopg
import pytest
from harness.database import collect, has_column, one, refused, wait_until
from harness.kafka import Record

PROJECT = "acme"
# From so many events of a collection in a batch on they become a chunk of their own.
MANY = 600
# Records of poison are larger than those that Kafka takes by default.
LARGE = "8000000"


@pytest.fixture(scope="module")
def server(db, keys, kafka):
    kafka.create_server(db.admin, "k")
    return "k"


class Stream:
    """A topic, and the source that reads it into the collection of its name."""

    def __init__(self, db, kafka, name: str, **config: str):
        self.db, self.kafka, self.name = db, kafka, name
        kafka.create_topic(name, 1, max_message_bytes=LARGE, **config)

    def start(self, project: str = PROJECT, **options) -> Stream:
        given = json.dumps({"topics": [self.name]} | options)
        self.db.admin.execute("SELECT rakam.create_source(%s, %s, 'k', %s)", (project, self.name, given))
        return self

    def send(self, *records, wait: bool = True) -> None:
        """Sends records, and waits until all that the topic has is stored."""
        self.kafka.send(self.name, records, self.kafka.producer(message_max_bytes=LARGE))
        if wait:
            self.wait()

    def wait(self) -> None:
        end = self.kafka.ends(self.name, 0)[1]
        wait_until(lambda: self.offset() == end, f"source {self.name} is read up to {end}")

    def offset(self) -> int | None:
        return self.db.one("SELECT next_offset::int8 FROM rakam.offsets WHERE source = %s", self.name)

    def letters(self) -> list[tuple[int, str]]:
        """Offset and SQLSTATE of each."""
        rows = self.db.all(
            "SELECT off::int8, error FROM rakam.dead_letter WHERE source = %s ORDER BY off, id", self.name
        )
        return [(offset, error.rsplit("(SQLSTATE ", 1)[1][:5]) for offset, error in rows]

    def replay(self) -> int:
        return self.db.one("SELECT rakam.replay_dead_letters(%s, %s)", PROJECT, self.name)


@pytest.fixture
def stream(db, kafka, server, request):
    name = request.node.name.split("[")[0].removeprefix("test_")[:50]
    made = Stream(db, kafka, name)
    yield made
    db.admin.execute("SELECT rakam.set_schema_mode(%s, 'open')", (PROJECT,))


def events(db, collection: str, order: str = "_time, _id") -> list[dict]:
    """Every event, with what lies in `_extra`, without what the server adds."""
    found = db.all(f"SELECT properties FROM acme._all WHERE _collection = %s ORDER BY {order}", collection)
    return [{k: v for k, v in row[0].items() if not k.startswith("_")} for row in found]


def count(db, collection: str) -> int:
    return db.one("SELECT count(*) FROM acme._all WHERE _collection = %s", collection)


def read(session: psycopg.Connection, query: str) -> list[tuple]:
    return session.execute(query).fetchall()


def confluent(schema_id: int, schema: dict, value: dict) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, schema, value)
    return b"\0" + struct.pack(">I", schema_id) + out.getvalue()


def register(db, source: str, schema_id: int, schema: dict | str, project: str = PROJECT) -> None:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    db.admin.execute("SELECT rakam.register_avro_schema(%s, %s, %s, %s)", (project, source, schema_id, text))


def record_schema(**fields) -> dict:
    return {"type": "record", "name": "e", "fields": [{"name": n, "type": t} for n, t in fields.items()]}


# -- JSON ------------------------------------------------------------------------------------------------------------


def test_few_records_and_many_are_the_same_events(db, stream):
    stream.start()
    stream.send(b'{"n": 1, "tags": ["a"], "userName": "ada"}')
    assert events(db, stream.name) == [{"n": 1, "tags": ["a"], "user_name": "ada"}]
    # Enough for a chunk: with a field that nobody has seen, and another type for one that is there.
    many = [json.dumps({"n": n, "since": "2020-01-02", "tags": "b"}) for n in range(2, MANY + 1)]
    stream.send(*many, b'{"n": "x"}')
    assert db.one("SELECT hot_events FROM rakam.stat_collection WHERE collection = %s", stream.name) >= MANY - 1
    wait_until(lambda: has_column(db.admin, f"acme.{stream.name}", "since"), "the new column")
    rows = read(
        db.admin,
        f"SELECT sum(n), count(since), count(*), count(*) FILTER (WHERE tags = '{{b}}') FROM acme.{stream.name}",
    )
    assert rows == [(MANY * (MANY + 1) / 2, MANY - 1, MANY + 1, MANY - 1)]
    assert db.all("SELECT field, count FROM rakam.invalid_value WHERE collection = %s", stream.name) == [("n", 1)]
    assert stream.letters() == []


def test_a_record_has_a_time(db, stream):
    stream.start()
    at = 1_700_000_000_123
    explicit = [Record(b'{"n": 1, "_time": 1600000000000}', time_ms=at)]
    stream.send(Record(b'{"n": 2}', time_ms=at), *explicit)
    stream.send(*[Record(b'{"n": 3, "_time": null}', time_ms=at)] * MANY, *explicit)
    found = read(
        db.admin,
        f"SELECT n, (extract(epoch FROM _time) * 1000)::int8, count(*) FROM acme.{stream.name} GROUP BY 1, 2 ORDER BY 1",
    )
    assert found == [(1, 1_600_000_000_000, 2), (2, at, 1), (3, at, MANY)]


def test_a_record_says_where_it_belongs(db, stream):
    stream.start()
    stream.send(
        b'{"_collection": "Routed", "n": 1}',
        b'{"collection": "enveloped", "properties": {"n": 2}}',
        b'{"collection": "enveloped", "properties": {"_collection": "routed", "n": 3}}',
        b'{"collection": "not one", "properties": {"n": 4}, "more": 1}',
        b'{"collection": "users", "properties": {}}',
        b'{"_collection": 5}',
    )
    assert [e["n"] for e in events(db, "routed", "properties->'n'")] == [1, 3]
    assert events(db, "enveloped") == [{"n": 2}]
    assert [e["collection"] for e in events(db, stream.name)] == ["not one"]
    assert stream.letters() == [(4, "42939"), (5, "22023")]
    # Of many, spelled in a way that nobody looks for.
    stream.send(*[b'{"_COLLECTION": "spelled", "n": 5}'] * MANY, *[b'{"n": 6}'] * MANY)
    assert (count(db, "spelled"), count(db, stream.name)) == (MANY, MANY + 1)


def test_the_shape_decides_what_an_envelope_is(db, kafka, server):
    enveloped = b'{"collection": "shaped", "properties": {"n": 1}}'
    flat = Stream(db, kafka, "shape_flat").start(shape="flat")
    flat.send(enveloped)
    assert events(db, "shape_flat") == [{"collection": "shaped", "properties": {"n": 1}}]
    envelope = Stream(db, kafka, "shape_envelope").start(shape="envelope", collection="elsewhere")
    envelope.send(enveloped, b'{"n": 1}', b"{")
    assert events(db, "shaped") == [{"n": 1}]
    assert envelope.letters() == [(1, "22023"), (2, "22P02")]
    one_place = Stream(db, kafka, "one.place").start(collection="elsewhere")
    one_place.send(b'{"n": 7}')
    assert events(db, "elsewhere") == [{"n": 7}]


@pytest.mark.parametrize("codec", ["gzip", "lz4", "snappy", "zstd"])
def test_compressed_records(db, kafka, server, codec):
    stream = Stream(db, kafka, f"compressed_{codec}").start()
    kafka.send(stream.name, [b'{"n": 1}'] * MANY, kafka.producer(compression_type=codec))
    stream.wait()
    assert count(db, stream.name) == MANY


def test_tombstones_are_counted_and_skipped(db, stream):
    stream.start()
    stream.send(Record(None, b"k"), b'{"n": 1}', Record(None, b"k"))
    assert (events(db, stream.name), stream.letters()) == ([{"n": 1}], [])
    assert db.one("SELECT tombstones FROM rakam.sources WHERE source = %s", stream.name) == 2


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_a_time_that_cannot_be_hinders_nobody(db, kafka, server, many):
    stream = Stream(db, kafka, f"times_{many}".lower(), message_timestamp_after_max_ms=str(2**63 - 1)).start()
    copies = MANY if many else 1
    for time_ms in (9_300_000_000_000_000, 2**62):
        stream.send(*[Record(b'{"n": 1}', time_ms=time_ms)] * copies, Record(b"{", time_ms=time_ms))
    stream.send(Record(b'{"n": 1}'))
    assert count(db, stream.name) == 2 * copies + 1
    assert stream.letters() == [(copies, "22P02"), (2 * copies + 1, "22P02")]
    # There is no such time: they happened when they came.
    late = f"SELECT count(*) FROM acme.{stream.name} WHERE _time > now() + interval '1 day'"
    wait_until(lambda: db.one("SELECT to_regclass(%s)", f"acme.{stream.name}"), "the table")
    assert db.one(late) == 0
    assert stream.replay() == 0


def test_a_header_may_say_anything(db, stream):
    stream.start()
    for name in (b"a\0b", b"\xff\0", b"", b"users"):
        stream.send(*[Record(value, headers=(("rakam-collection", name),)) for value in (b'{"n": 1}', b"{")])
    assert count(db, stream.name) == 0
    assert [state for _, state in stream.letters()] == ["42602", "22P02"] * 3 + ["42939", "22P02"]
    # It is no other collection's when it is tried again.
    assert stream.replay() == 0
    stream.send(Record(b'{"n": 1}', headers=(("rakam-collection", "größe".encode()),)))
    assert count(db, "größe") == 1


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_copies_count_once_on_every_road(db, kafka, server, many):
    stream = Stream(db, kafka, f"copies_{many}".lower()).start()
    rounds = MANY if many else 3
    collect(db.admin, PROJECT, stream.name, {"_id": "0", "n": 0})
    ids = [json.dumps({"_id": str(n), "n": n}) for n in range(rounds)]
    stream.send(*ids, *ids)
    collect(db.admin, PROJECT, stream.name, {"_id": "1", "n": 1})
    stream.send(*ids)
    assert count(db, stream.name) == rounds
    db.tick()
    assert count(db, stream.name) == rounds
    duplicates = db.one("SELECT duplicates FROM rakam.stat_collection WHERE collection = %s", stream.name)
    assert duplicates == 2 * rounds + 2


def test_new_fields_of_a_flood_are_all_there(db, stream):
    stream.start()
    rounds = 8
    for n in range(rounds):
        stream.send(*[json.dumps({"n": n, f"field_{n}": n})] * MANY, wait=False)
    stream.wait()
    wait_until(
        lambda: all(has_column(db.admin, f"acme.{stream.name}", f"field_{n}") for n in range(rounds)), "all columns"
    )
    sums = ", ".join(f"count(field_{n})" for n in range(rounds))
    assert read(db.admin, f"SELECT {sums} FROM acme.{stream.name}") == [(MANY,) * rounds]


# -- who refuses events ----------------------------------------------------------------------------------------------


def test_a_fixed_schema_refuses_into_the_dead_letters(db, stream):
    stream.start()
    stream.send(b'{"n": 1}')
    db.tick()
    db.admin.execute("SELECT rakam.set_schema_mode(%s, 'fixed')", (PROJECT,))
    stream.send(b'{"n": 2}', b'{"n": 3, "new": 1}', b'{"_collection": "unheard_of"}')
    refused_here = [(2, "42703"), (3, "42703")]
    assert stream.letters() == refused_here
    stream.send(*[b'{"n": 4}'] * MANY, b'{"n": 5, "new": null}')
    assert stream.letters() == [*refused_here, (MANY + 4, "42703")]
    assert stream.replay() == 0
    db.admin.execute("SELECT rakam.add_field(%s, %s, 'new', 'bigint')", (PROJECT, stream.name))
    assert stream.replay() == 2
    assert stream.letters() == [(3, "42703")]
    db.admin.execute("SELECT rakam.set_schema_mode(%s, 'open')", (PROJECT,))
    assert stream.replay() == 1
    db.tick()
    assert (count(db, stream.name), count(db, "unheard_of")) == (MANY + 4, 1)


def test_replayed_records_are_charged(db, kafka, server):
    db.project("replayed")
    db.admin.execute("SELECT rakam.set_schema_mode('replayed', 'fixed')")
    stream = Stream(db, kafka, "replayed").start(project="replayed")
    stream.send(*[json.dumps({"n": n, "text": "x" * 1_000}) for n in range(5)])
    assert stream.letters() == [(n, "42703") for n in range(5)]
    db.admin.execute("SELECT rakam.set_schema_mode('replayed', 'open')")
    quota = "SELECT rakam.set_quota('replayed', NULL, %s, NULL, NULL)"
    replay = "SELECT rakam.replay_dead_letters('replayed', 'replayed')"
    db.admin.execute(quota, (2_500,))
    assert [db.one(replay) for _ in range(2)] == [2, 0]
    # What there was no room for stays as it came, and what was not tried says what it said.
    assert stream.letters() == [(2, "53400"), (3, "42703"), (4, "42703")]
    assert db.one("SELECT bool_and(is_record) FROM rakam_internal.dead_letter WHERE source = 'replayed'")
    db.admin.execute(quota, (None,))
    assert db.one(replay) == 3
    assert db.one("SELECT count(*) FROM replayed._all") == 5
    assert db.one("SELECT count(DISTINCT properties->'n') FROM replayed._all") == 5


def test_a_quota_lets_a_source_wait_and_lose_nothing(db, kafka, server):
    db.project("bounded")
    db.admin.execute("SELECT rakam.set_quota('bounded', 200, NULL, NULL, NULL)")
    stream = Stream(db, kafka, "slowed").start(project="bounded")
    stream.send(*[b'{"n": 1}'] * MANY)
    assert db.one("SELECT count(*) FROM bounded._all") == MANY
    assert stream.letters() == []


def test_a_quota_of_bytes_lets_a_source_wait_and_lose_nothing(db, kafka, server):
    db.project("daily")
    db.admin.execute("SELECT rakam.set_quota('daily', NULL, 20000, NULL, NULL)")
    db.admin.execute("CREATE SEQUENCE daily.calls")
    db.admin.execute(
        "CREATE FUNCTION daily.called(event jsonb) RETURNS jsonb LANGUAGE sql AS"
        " $$SELECT event || jsonb_build_object('call', nextval('daily.calls'))$$"
    )
    db.admin.execute("SELECT rakam.set_mapper('daily', 'mapped', 'daily.called(jsonb)')")
    # All of it is there when the source begins: its first batch would be more than the day takes.
    stream = Stream(db, kafka, "daily")
    texts = [json.dumps({"n": n, "text": "x" * 80}) for n in range(400)]
    texts += [json.dumps({"n": n, "_collection": "mapped", "text": "x" * 80}) for n in range(400, 440)]
    stream.send(*texts, wait=False)
    stream.start(project="daily")
    told = "SELECT last_error FROM rakam.stat_source WHERE source = 'daily'"
    wait_until(lambda: db.one(told), "the source says that it waits")
    assert db.one(told) == 'project "daily" has reached its quota of 20000 bytes per day'
    used = "SELECT sum(bytes) FROM rakam_internal.usage JOIN rakam_internal.project USING (project_id) WHERE name = 'daily'"
    db.tick()
    waits = stream.offset()
    assert 0 < waits < 200 and db.one("SELECT count(*) FROM daily._all") == waits
    assert 0 < db.one(used) <= 20_000
    raised = db.one("SELECT clock_timestamp()")
    db.admin.execute("SELECT rakam.set_quota('daily', NULL, 10000000, NULL, NULL)")
    stream.wait()
    wait_until(lambda: db.one(told) is None, "it waits no more")
    assert db.one("SELECT count(DISTINCT properties->'n') FROM daily._all") == len(texts)
    assert db.one("SELECT count(*) FROM daily._all") == len(texts)
    assert db.one("SELECT last_value FROM daily.calls") == 40
    # The batch that waited was not decoded anew each time it was tried: it was received before it could be stored.
    assert db.one("SELECT count(*) FROM daily._all WHERE _received_at < %s", raised) > waits


def test_a_quota_of_a_source_leaves_room_for_collect(db, kafka, server):
    """A large first batch would use up the quota of minutes to come."""
    db.project("slow")
    db.admin.execute("SELECT rakam.set_quota('slow', 50, NULL, NULL, NULL)")
    stream = Stream(db, kafka, "slow")
    stream.send(*[b'{"n": 1}'] * 300, wait=False)
    stream.start(project="slow")
    stream.wait()
    batches = db.all("SELECT count(*) FROM slow._all GROUP BY _received_at")
    assert max(batches)[0] <= 50

    def collected() -> bool:
        try:
            collect(db.admin, "slow", "e", {"n": 1})
            return True
        except psycopg.errors.ConfigurationLimitExceeded:
            return False

    wait_until(collected, "room for collect", 10)
    assert db.one("SELECT count(*) FROM slow._all") == 301


def test_quotas_of_collections_and_fields_refuse_single_events(db, kafka, server):
    db.project("narrow")
    db.admin.execute("SELECT rakam.set_quota('narrow', NULL, NULL, 1, 1)")
    stream = Stream(db, kafka, "first").start(project="narrow")
    stream.send(b'{"n": 1}')
    db.tick()
    stream.send(b'{"n": 2, "m": 2}', b'{"_collection": "second"}', *[b'{"n": 3}'] * MANY)
    assert stream.letters() == [(1, "53400"), (2, "53400")]
    assert db.one("SELECT count(*) FROM narrow._all") == MANY + 1


def test_mappers_run_in_the_consumer(db, stream):
    db.admin.execute("SELECT rakam.create_collection(%s, %s)", (PROJECT, stream.name))
    owner = db.login(PROJECT, "admin")
    owner.execute(
        "CREATE FUNCTION acme.halve(event jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$BEGIN"
        " IF event->'n' = '0' THEN RETURN NULL; END IF;"
        " RETURN event || jsonb_build_object('half', 10 / (event->>'n')::int, 'by', current_user); END$$"
    )
    owner.execute("SELECT rakam.set_mapper(%s, %s, 'acme.halve(jsonb)')", (PROJECT, stream.name))
    stream.start()
    stream.send(b'{"n": 5}', b'{"n": 0}', b'{"n": "x"}', *[b'{"n": 2}'] * MANY)
    found = events(db, stream.name)
    role = one(owner, "SELECT current_user")
    assert sorted({(e["n"], e["half"], e["by"]) for e in found}) == [(2, 5, role), (5, 2, role)]
    assert len(found) == MANY + 1
    letters = db.all(
        "SELECT off::int8, convert_from(payload, 'UTF8')::jsonb->>'n', error FROM rakam.dead_letter WHERE source = %s",
        stream.name,
    )
    assert [(offset, n) for offset, n, _ in letters] == [(2, "x")]
    assert "mapper acme.halve(jsonb)" in letters[0][2]
    assert stream.replay() == 0
    owner.execute(
        "CREATE OR REPLACE FUNCTION acme.halve(event jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT event || ''{\"half\": 0}'''"
    )
    assert stream.replay() == 1
    db.tick()
    assert count(db, stream.name) == MANY + 2
    owner.execute("SELECT rakam.set_mapper(%s, %s, NULL)", (PROJECT, stream.name))


# -- Avro ------------------------------------------------------------------------------------------------------------

FIRST = record_schema(n="long", name=["null", "string"])
SECOND = record_schema(
    n="long", name=["null", "string"], price="double", at={"type": "long", "logicalType": "timestamp-millis"}
)


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_confluent_records_of_any_schema(db, kafka, server, many):
    stream = Stream(db, kafka, f"confluent_{many}".lower()).start(format="avro", framing="confluent")
    copies = MANY if many else 1
    register(db, stream.name, 7, FIRST)
    big = 9_007_199_254_740_993
    stream.send(*[confluent(7, FIRST, {"n": big, "name": "a"})] * copies)
    # What a number is, the writer's schema says: on either road.
    declared = "SELECT type FROM rakam.fields WHERE collection = %s AND field = %s"
    assert db.one(declared, stream.name, "n") == "bigint"
    register(db, stream.name, 8, SECOND)
    newer = {"n": 2, "name": None, "price": 1.5, "at": 1_700_000_000_000}
    stream.send(*[confluent(8, SECOND, newer), confluent(7, FIRST, {"n": 3, "name": "c"})] * copies)
    wait_until(lambda: has_column(db.admin, f"acme.{stream.name}", "at"), "the new columns")
    rows = read(
        db.admin, f"SELECT n, name, price, at::text, count(*) FROM acme.{stream.name} GROUP BY 1, 2, 3, 4 ORDER BY 1"
    )
    at = one(db.admin, "SELECT to_timestamp(1700000000)::text")
    assert rows == [(2, None, 1.5, at, copies), (3, "c", None, None, copies), (big, "a", None, None, copies)]
    assert db.one(declared, stream.name, "at") == "timestamp with time zone"
    assert stream.letters() == []


def test_a_schema_is_registered_once(db, stream):
    stream.start(format="avro", framing="confluent")
    register(db, stream.name, 1, FIRST)
    register(db, stream.name, 1, FIRST)
    register(db, stream.name, 1, json.dumps(FIRST, indent=2))
    for schema_id, schema, sqlstate in [
        (1, SECOND, "42710"),
        (-1, FIRST, "22023"),
        (2, '"long"', "22023"),
        (2, "{", "22023"),
        (2, '{"type": "record", "name": "e", "fields": [{"name": "a", "type": "unheard"}]}', "22023"),
    ]:
        with refused(sqlstate):
            register(db, stream.name, schema_id, schema)
    with refused("42704"):
        register(db, "unheard_of", 1, FIRST)
    with refused("22004"):
        db.admin.execute("SELECT rakam.register_avro_schema(%s, %s, 1, NULL)", (PROJECT, stream.name))
    writer = db.login(PROJECT, "write")
    with refused("42501"):
        writer.execute("SELECT rakam.register_avro_schema(%s, %s, 3, '{}')", (PROJECT, stream.name))


def test_an_unknown_schema_waits_in_the_dead_letters(db, stream):
    stream.start(format="avro", framing="confluent")
    register(db, stream.name, 1, FIRST)
    stream.send(
        confluent(2, SECOND, {"n": 1, "name": None, "price": 1, "at": 0}),
        confluent(1, FIRST, {"n": 2, "name": None}),
        confluent(1, FIRST, {"n": 3, "name": "cut off"})[:-2],
        b"{}",
    )
    assert stream.letters() == [(0, "42704"), (2, "22P03"), (3, "22P03")]
    assert stream.replay() == 0
    register(db, stream.name, 2, SECOND)
    assert stream.replay() == 1
    db.tick()
    assert sorted(e["n"] for e in events(db, stream.name)) == [1, 2]
    assert stream.letters() == [(2, "22P03"), (3, "22P03")]


def test_containers(db, stream):
    stream.start(format="avro", framing="container")

    def container(schema, rows, codec="deflate"):
        out = io.BytesIO()
        fastavro.writer(out, schema, rows, codec=codec)
        return out.getvalue()

    good = container(FIRST, [{"n": n, "name": f"name {n}"} for n in range(MANY)])
    stream.send(
        good, container(SECOND, [{"n": -1, "name": None, "price": 2.5, "at": 0}], "null"), good[: len(good) // 2]
    )
    assert count(db, stream.name) == MANY + 1
    assert db.one("SELECT type FROM rakam.fields WHERE collection = %s AND field = 'n'", stream.name) == "bigint"
    assert stream.letters() == [(2, "22P03")]
    assert db.one("SELECT payload FROM rakam.dead_letter WHERE source = %s", stream.name) == good[: len(good) // 2]


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_our_own_framing_of_any_version(db, kafka, server, many):
    collection = f"framed_{many}".lower()
    copies = MANY if many else 2
    schemas = "SELECT avro_schema FROM rakam.schema_versions WHERE collection = %s AND version = %s"
    last = "SELECT max(version) FROM rakam.schema_versions WHERE collection = %s"

    def framed(version: int, value: dict) -> bytes:
        schema = fastavro.parse_schema(db.one(schemas, collection, version))
        out = io.BytesIO()
        fastavro.schemaless_writer(out, schema, {f["name"]: None for f in schema["fields"]} | value)
        return b"\xa7" + struct.pack(">I", version) + out.getvalue()

    collect(db.admin, PROJECT, collection, {"n": 0, "gone": "x"})
    db.tick()
    old = db.one(last, collection)
    older = framed(old, {"n": 1.5, "gone": "y", "_user": "ada"})
    db.admin.execute("SELECT rakam.drop_field(%s, %s, 'gone')", (PROJECT, collection))
    db.admin.execute("SELECT rakam.add_field(%s, %s, 'more', 'numeric(6, 2)')", (PROJECT, collection))
    new = db.one(last, collection)
    assert new > old
    newer = framed(new, {"n": 2.5, "more": Decimal("12.34"), "_id": "i"})
    stream = Stream(db, kafka, f"topic_{collection}").start(format="avro", framing="rakam", collection=collection)
    unknown = b"\xa7" + struct.pack(">I", 99) + older[5:]
    stream.send(
        *[older] * copies,
        *[newer] * copies,
        unknown,
        older[:-1],
        Record(older, headers=(("rakam-collection", b"nowhere"),)),
    )
    rows = read(db.admin, f"SELECT n, _user, more, count(*) FROM acme.{collection} GROUP BY 1, 2, 3 ORDER BY 1")
    # Copies of the second have an `_id`.
    assert rows == [(0, None, None, 1), (1.5, "ada", None, copies), (2.5, None, Decimal("12.34"), 1)]
    assert stream.letters() == [(2 * copies, "42704"), (2 * copies + 1, "22P03"), (2 * copies + 2, "42704")]
    assert (
        db.one(f"SELECT count(*) FROM acme.{collection} WHERE _received_at > now() - interval '1 hour'") == copies + 2
    )


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(cluster, db, keys):
    """A folder that is read through the server `files`."""
    folder = cluster.make_folder("formats")
    db.admin.execute(f"CREATE SERVER folder FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.admin.execute("CREATE SERVER files TYPE 'files' FOREIGN DATA WRAPPER rakam_source OPTIONS (storage 'folder')")
    return folder


def put(cluster, folder, name: str, text: str) -> str:
    """A file that is there as a whole at once, in a folder of its own; its path."""
    path = f"{name.split('.')[0]}/{name}"
    target = folder / path
    cluster.make_folder(target.parent.relative_to(cluster.folder).as_posix())
    part = target.with_name(f".{name}.part")
    part.write_text(text)
    part.chmod(0o644)
    part.rename(target)
    return path


def read_file(db, source: str, path: str) -> None:
    state = "SELECT state FROM rakam.offsets WHERE source = %s AND split = %s"
    wait_until(lambda: db.one(state, source, path) == "ended", f"{path} is read")


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_rows_of_files(cluster, db, folder, many):
    source = f"rows_{many}".lower()
    copies = MANY if many else 2
    path = put(
        cluster,
        folder,
        f"{source}.ndjson",
        '{"n": 1}\n{"n":\n{"n": 2, "_received_at": 1}\n' + '{"n": 3, "_id": "i"}\n' * copies,
    )
    given = json.dumps({"collection": source, "prefix": source})
    db.admin.execute("SELECT rakam.create_source(%s, %s, 'files', %s)", (PROJECT, source, given))
    read_file(db, source, path)
    assert sorted(e["n"] for e in events(db, source)) == [1, 3]
    letters = (
        "SELECT split, off::int8, convert_from(payload, 'UTF8') FROM rakam.dead_letter WHERE source = %s ORDER BY off"
    )
    assert db.all(letters, source) == [
        (path, 2, '{"n":'),
        (path, 3, '{"n": 2, "_received_at": 1}'),
    ]


def test_an_array_that_is_cut_off(cluster, db, folder):
    path = put(cluster, folder, "cut.json", '[{"n": 1},\n{"n": 2},\n{"n": ')
    given = json.dumps({"collection": "cut", "prefix": "cut"})
    db.admin.execute("SELECT rakam.create_source(%s, 'cut', 'files', %s)", (PROJECT, given))
    read_file(db, "cut", path)
    assert sorted(e["n"] for e in events(db, "cut")) == [1, 2]
    letters = "SELECT off::int8, convert_from(payload, 'UTF8'), error FROM rakam.dead_letter WHERE source = 'cut'"
    ((line, payload, error),) = db.all(letters)
    assert (line, payload) == (3, '{"n":')
    assert "not closed" in error, error


def test_a_file_with_a_column_of_the_servers(cluster, db, folder):
    path = put(cluster, folder, "reserved.csv", "n,_received_at\n1,2020-01-01\n2,2020-01-01\n")
    given = json.dumps({"collection": "reserved", "prefix": "reserved"})
    db.admin.execute("SELECT rakam.create_source(%s, 'reserved', 'files', %s)", (PROJECT, given))
    read_file(db, "reserved", path)
    assert db.one("SELECT count(*) FROM rakam.dead_letter WHERE source = 'reserved'") == 2
    assert count(db, "reserved") == 0


# -- poison ----------------------------------------------------------------------------------------------------------


def test_poison_is_put_aside_and_the_rest_flows(db, stream):
    stream.start()
    numbers = random.Random(4)
    noise = [numbers.randbytes(numbers.randrange(1, 300)) for _ in range(50)]
    deep = b"[" * (1 << 20) + b"]" * (1 << 20)
    poison = [*noise, deep, b'{"a":' * (1 << 19), b'{"a": "' + b"x" * (2 << 20) + b'"}', b'{"_received_at": 1}', b"[]", b"",
              b'{"a": "\\u0000"}', b'{"_id": "' + b"i" * 257 + b'"}', b"\xff\xfe{}"]  # fmt: skip
    records = []
    for n, bad in enumerate(poison):
        records += [bad, json.dumps({"n": n})]
    stream.send(*records)
    found = db.all("SELECT off::int8, payload FROM rakam.dead_letter WHERE source = %s ORDER BY off", stream.name)
    assert found == [(2 * n, bad) for n, bad in enumerate(poison)]
    assert sorted(e["n"] for e in events(db, stream.name)) == list(range(len(poison)))
    reasons = dict(stream.letters())
    first = 2 * len(noise)
    assert [reasons[first + 2 * n] for n in range(9)] == [
        "54000", "54000", "54000", "42939", "22023", "22P02", "22P05", "54000", "22021",
    ]  # fmt: skip
    assert stream.replay() == 0
    assert [offset for offset, _ in stream.letters()] == [2 * n for n in range(len(poison))]


def test_a_storm_of_poison_stops_nobody(db, stream):
    stream.start()
    storm = 20_000
    stream.send(*[b"{" + str(n).encode() for n in range(storm)], b'{"n": 1}')
    assert events(db, stream.name) == [{"n": 1}]
    assert db.one("SELECT count(DISTINCT off) FROM rakam.dead_letter WHERE source = %s", stream.name) == storm
    db.admin.execute("DELETE FROM rakam_internal.dead_letter WHERE source = %s", (stream.name,))


def test_a_collection_that_is_dropped_leaves_nothing_behind(db, stream):
    stream.start()
    stream.send(*[b'{"n": 1}'] * MANY)
    collection = db.one("SELECT collection_id FROM rakam_internal.collection WHERE name = %s", stream.name)
    db.configure(failpoint="stream.after_store=sleep(60000)")
    try:
        stream.send(*[b'{"n": 2}'] * MANY, wait=False)
        holds = (
            "SELECT count(*) FROM pg_locks WHERE relation = 'rakam_internal.hot_chunk'::regclass"
            " AND mode = 'RowExclusiveLock' AND pid IN (SELECT pid FROM rakam.stat_worker WHERE kind = 'consumer')"
        )
        wait_until(lambda: db.one(holds) > 0, "the batch is stored and not committed")
        with db.connect() as session:
            dropping = threading.Thread(
                target=session.execute, args=("SELECT rakam.drop_collection(%s, %s)", (PROJECT, stream.name))
            )
            dropping.start()
            waits = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND backend_type LIKE 'rakam %%'"
            )
            wait_until(lambda: db.one(waits) > 0, "the drop waits for the batch")
            db.configure(failpoint=None)
            dropping.join(60)
            assert not dropping.is_alive()
    finally:
        db.configure(failpoint=None)
    stream.wait()
    assert db.one("SELECT count(*) FROM rakam_internal.hot_chunk WHERE collection_id = %s", collection) == 0
    stream.send(b'{"n": 3}')
    assert events(db, stream.name) == [{"n": 3}]


def test_dead_letters_are_the_projects_own(db, stream):
    stream.start()
    stream.send(b"poison")
    seen = "SELECT count(*) FROM rakam.dead_letter WHERE source = %s"
    reader, writer = db.login(PROJECT, "read"), db.login(PROJECT, "write")
    assert (one(reader, seen, stream.name), one(writer, seen, stream.name)) == (1, 0)
    db.project("other")
    stranger = db.login("other", "admin")
    assert one(stranger, seen, stream.name) == 0
    with refused("42501"):
        stranger.execute("SELECT rakam.replay_dead_letters(%s, %s)", (PROJECT, stream.name))
    with refused("42704"):
        db.admin.execute("SELECT rakam.replay_dead_letters(%s, 'unheard_of')", (PROJECT,))
