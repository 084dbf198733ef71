"""The services that tests of sources rest on do what those tests take for granted, seen without rakam."""

from __future__ import annotations

import io

import fastavro
import pytest
from confluent_kafka import KafkaException
from harness import avro
from harness.buckets import FaultProxy
from harness.kafka import Record
from harness.kinesis import hash_range


def values(read: dict) -> dict:
    return {partition: [message.value() for message in messages] for partition, messages in read.items()}


def test_kafka_keeps_what_was_committed(private_kafka):
    broker = private_kafka
    broker.create_topic("t", 2)
    broker.send("t", [Record(b"plain", partition=1)])
    writer = broker.transactional("writer")
    for text, commit in [("kept", True), ("aborted", False), ("also kept", True)]:
        broker.transaction(writer, "t", [Record(text.encode(), partition=0)], commit)
    # An older producer of the name may not write any more.
    writer.begin_transaction()
    broker.transactional("writer")
    writer.produce("t", b"fenced", partition=0)
    with pytest.raises(KafkaException):
        writer.commit_transaction(30)
    expected = {0: [b"kept", b"also kept"], 1: [b"plain"]}
    assert values(broker.read("t")) == expected
    # Markers take offsets: three records, three markers.
    assert broker.ends("t", 0) == (0, 6)
    broker.crash()
    broker.start_again()
    assert values(broker.read("t")) == expected
    broker.trim("t", 0, 4)
    broker.add_partitions("t", 3)
    assert values(broker.read("t")) == {0: [b"also kept"], 1: [b"plain"], 2: []}
    broker.delete_topic("t")
    assert broker.partitions("t") == 0


def test_avro_of_others(kafka):
    schema = avro.schema("Click", n="long", page="string")
    event = {"n": 7, "page": "a"}
    framed = avro.confluent(9, schema, event)
    assert framed[:5] == b"\0\0\0\0\x09"
    # By the union's branches: 1, then 7 as 14; 1, then the length 1 as 2 and the text.
    assert framed[5:] == bytes([2, 14, 2, 2]) + b"a"
    kafka.create_topic("avro", 1)
    kafka.send("avro", [avro.container(schema, [event, event])])
    [message] = kafka.read("avro")[0]
    assert list(fastavro.reader(io.BytesIO(message.value()))) == [event, event]


@pytest.mark.parametrize("engine", ["kinesis", "kinesis_fast"])
def test_kinesis_keeps_records_through_resharding(engine, request):
    service = request.getfixturevalue(engine)
    service.create_stream("s", 1)
    [first] = service.open_shards("s")
    sent = service.send("s", [(str(n), b"%d" % n) for n in range(30)])
    assert {shard for shard, _ in sent} == {first["ShardId"]}
    service.split("s", first)
    left, right = service.open_shards("s")
    assert hash_range(left)[1] + 1 == hash_range(right)[0]
    assert {left["ParentShardId"], right["ParentShardId"]} == {first["ShardId"]}
    service.send("s", [(str(n), b"%d" % n) for n in range(30, 60)])
    service.merge("s", left, right)
    service.send("s", [("x", b"60")])
    read = {shard: [record["Data"] for record in records] for shard, records in service.read("s").items()}
    [last] = service.open_shards("s")
    assert read[first["ShardId"]] == [b"%d" % n for n in range(30)]
    assert read[last["ShardId"]] == [b"60"]
    between = read[left["ShardId"]] + read[right["ShardId"]]
    assert sorted(map(int, between)) == list(range(30, 60))


def test_a_throttled_stream_takes_everything_once(kinesis_fast, seed):
    service = kinesis_fast
    service.create_stream("throttled", 2)
    with FaultProxy(service.endpoint, seed) as proxy:
        throttle = {"aws_error": "ProvisionedThroughputExceededException"}
        proxy.set(
            {"match": {"target": "PutRecords"}, "every": 3, "fault": throttle},
            {"match": {"target": "PutRecords"}, "every": 2, "fault": {"partial": 0.5}},
        )
        service.send("throttled", [(str(n), b"%d" % n) for n in range(1200)], service.client_of(proxy.url))
        assert all(proxy.fired())
    read = [int(record["Data"]) for records in service.read("throttled").values() for record in records]
    assert sorted(read) == list(range(1200))
