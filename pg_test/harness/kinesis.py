"""Kinesis services, and what tests do with them: streams, records, resharding, and reading back what is there."""

from __future__ import annotations

import hashlib

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from .buckets import FaultProxy
from .database import wait_until
from .kafka import create_server
from .services import Services

# The hash keys of a stream are below it.
HASH_KEYS = 1 << 128


class Kinesis(Services):
    """A service of its own. `engine`: `mock` is nearer to the meaning (children, fan-out), `lite` far faster."""

    def __init__(self, engine: str = "mock"):
        super().__init__()
        self.engine = engine
        found = self.start("kinesis", KINESIS_ENGINE=engine)
        self.endpoint = found["KINESIS_ENDPOINT_URL"]
        self.options = {"region": found["AWS_REGION"], "endpoint": self.endpoint}
        self.credentials = {
            "access_key_id": found["AWS_ACCESS_KEY_ID"],
            "secret_access_key": found["AWS_SECRET_ACCESS_KEY"],
        }
        self.client = self.client_of(self.endpoint)

    def client_of(self, endpoint: str):
        """A client, of a proxy for instance, that repeats nothing by itself."""
        return boto3.client(
            "kinesis",
            endpoint_url=endpoint,
            region_name=self.options["region"],
            aws_access_key_id=self.credentials["access_key_id"],
            aws_secret_access_key=self.credentials["secret_access_key"],
            config=Config(retries={"max_attempts": 0}),
        )

    # -- streams -------------------------------------------------------------------------------------------------

    def create_stream(self, stream: str, shards: int = 1) -> None:
        self.client.create_stream(StreamName=stream, ShardCount=shards)
        self.wait_active(stream)

    def delete_stream(self, stream: str) -> None:
        self.client.delete_stream(StreamName=stream)
        wait_until(lambda: stream not in self.client.list_streams()["StreamNames"], f"stream {stream} is gone")

    def wait_active(self, stream: str) -> None:
        def active() -> bool:
            found = self.client.describe_stream_summary(StreamName=stream)["StreamDescriptionSummary"]
            return found["StreamStatus"] == "ACTIVE"

        wait_until(active, f"stream {stream} is active")

    def shards(self, stream: str) -> list[dict]:
        """All, in the order of their ids."""
        found = self.client.list_shards(StreamName=stream)
        shards = found["Shards"]
        while token := found.get("NextToken"):
            found = self.client.list_shards(NextToken=token)
            shards += found["Shards"]
        return sorted(shards, key=lambda shard: shard["ShardId"])

    def open_shards(self, stream: str) -> list[dict]:
        """Those that take records, in the order of their hash keys."""
        found = [s for s in self.shards(stream) if "EndingSequenceNumber" not in s["SequenceNumberRange"]]
        return sorted(found, key=hash_range)

    def split(self, stream: str, shard: dict) -> None:
        first, last = hash_range(shard)
        middle = str((first + last) // 2)
        self.client.split_shard(StreamName=stream, ShardToSplit=shard["ShardId"], NewStartingHashKey=middle)
        self.wait_active(stream)

    def merge(self, stream: str, shard: dict, next_shard: dict) -> None:
        """Of two shards beside each other, as `open_shards` has them."""
        self.client.merge_shards(
            StreamName=stream, ShardToMerge=shard["ShardId"], AdjacentShardToMerge=next_shard["ShardId"]
        )
        self.wait_active(stream)

    # -- records -------------------------------------------------------------------------------------------------

    def send(self, stream: str, records: list[tuple[str, bytes]], client=None) -> list[tuple[str, str]]:
        """Sends (partition key, data) pairs, again what the service did not take; the shard and the sequence number of
        each. Whether a call took effect whose answer was lost nobody knows, so that is the caller's to meet."""
        client = client or self.client
        placed: list[tuple[str, str]] = [("", "")] * len(records)
        for start in range(0, len(records), 500):
            left = list(range(start, min(start + 500, len(records))))

            def take(left: list[int] = left) -> bool:
                entries = [{"PartitionKey": records[n][0], "Data": records[n][1]} for n in left]
                try:
                    answers = client.put_records(StreamName=stream, Records=entries)["Records"]
                except ClientError as error:
                    if error.response["Error"]["Code"] == "ProvisionedThroughputExceededException":
                        return False
                    raise
                for n, answer in zip(list(left), answers, strict=True):
                    if "ErrorCode" not in answer:
                        placed[n] = (answer["ShardId"], answer["SequenceNumber"])
                        left.remove(n)
                return not left

            wait_until(take, f"stream {stream} takes records")
        return placed

    def read(self, stream: str) -> dict[str, list[dict]]:
        """Every record that each shard has now, in its order."""
        found: dict[str, list[dict]] = {}
        for shard in self.shards(stream):
            records = found.setdefault(shard["ShardId"], [])
            iterator = self.client.get_shard_iterator(
                StreamName=stream, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
            )["ShardIterator"]
            while iterator:
                answer = self.client.get_records(ShardIterator=iterator, Limit=10_000)
                records += answer["Records"]
                # kinesalite says 0 always, and gives all that there is at once.
                at_end = not answer["Records"] and answer["MillisBehindLatest"] == 0
                iterator = None if at_end else answer.get("NextShardIterator")
        return found

    # -- the extension -------------------------------------------------------------------------------------------

    def create_server(self, connection, server: str, proxy: FaultProxy | None = None, **options: str) -> None:
        """A server of the service, or of a proxy in front of it, and the user mapping of its owner, the present user."""
        there = {"endpoint": proxy.url} if proxy else {}
        create_server(connection, server, "kinesis", self.options | there | options, self.credentials)


def hash_key(partition_key: str) -> int:
    """By it the shard of a record is chosen."""
    return int.from_bytes(hashlib.md5(partition_key.encode()).digest())


def aggregate(records: list[tuple[str, bytes]], explicit: int | None = None) -> bytes:
    """Records (partition key, data) packed into one, as Amazon's producer library does; `explicit`: with this hash key."""

    def varint(n: int) -> bytes:
        out = b""
        while n >= 0x80:
            out += bytes([n & 0x7F | 0x80])
            n >>= 7
        return out + bytes([n])

    def field(number: int, value: bytes) -> bytes:
        return bytes([number << 3 | 2]) + varint(len(value)) + value

    message = b"".join(field(1, key.encode()) for key, _ in records)
    if explicit is not None:
        message += field(2, str(explicit).encode())
    for at, (_, data) in enumerate(records):
        hashed = b"" if explicit is None else bytes([2 << 3]) + varint(0)
        message += field(3, bytes([1 << 3]) + varint(at) + hashed + field(3, data))
    return b"\xf3\x89\x9a\xc2" + message + hashlib.md5(message).digest()


def hash_range(shard: dict) -> tuple[int, int]:
    """The first and the last hash key of a shard."""
    keys = shard["HashKeyRange"]
    return int(keys["StartingHashKey"]), int(keys["EndingHashKey"])
