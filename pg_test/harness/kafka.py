"""A real Kafka broker, and what tests do with one: topics, records, transactions, and reading back what was committed."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    NewPartitions,
    NewTopic,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from psycopg import sql

from .database import wait_until
from .services import Services

# The broker may just be coming up again on a machine that is busy.
PATIENCE_S = 120
NO_LEADER_YET = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE)


class Record(NamedTuple):
    """A record to send. `partition` None: by the hash of the key. `time_ms` since 1970; 0: now."""

    value: bytes | None
    key: bytes | None = None
    partition: int | None = None
    time_ms: int = 0
    headers: tuple[tuple[str, bytes], ...] = ()


class Kafka(Services):
    """A broker of its own. `scram`: it lets in the user `rakam` with the password `rakam`, and whom `set_password` makes. `kept` as
    of `Services`."""

    def __init__(self, scram: bool = False, kept: Path | None = None):
        super().__init__(kept)
        self._settings = {"KAFKA_AUTH": "scram"} if scram else {}
        found = self.start("kafka", **self._settings)
        self.brokers = found["KAFKA_BOOTSTRAP_SERVERS"]
        # What every client needs, as librdkafka names it; quiet about a broker that tests kill.
        self.client = {"bootstrap.servers": self.brokers, "log_level": "0"}
        self.options = {"brokers": self.brokers}
        self.credentials: dict[str, str] = {}
        if scram:
            protocol = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "SCRAM-SHA-256"}
            self.client |= protocol | {"sasl.username": "rakam", "sasl.password": "rakam"}
            self.options |= protocol
            self.credentials = {"username": "rakam", "password": "rakam"}
        self.admin = AdminClient(self.client)

    def __exit__(self, *args: object) -> None:
        # It would take its time to put everything in order that is thrown away with it.
        self.crash()
        super().__exit__(*args)

    # -- the broker ----------------------------------------------------------------------------------------------

    def crash(self) -> None:
        """kill -9."""
        self._script("kafka", "crash", self._settings)

    def start_again(self) -> None:
        """After `crash`: on the same port, with the same data. Returns once it answers questions about topics."""
        self._script("kafka", "start", self._settings)
        self.wait_ready()

    def restart(self) -> None:
        """In good order, on the same port, with the same data."""
        self._script("kafka", "restart", self._settings)
        self.wait_ready()

    def halt(self) -> None:
        """The broker answers nobody until `go_on`; its connections stay open."""
        os.kill(self.pid("kafka"), signal.SIGSTOP)

    def go_on(self) -> None:
        # It may not run.
        with contextlib.suppress(OSError):
            os.kill(self.pid("kafka"), signal.SIGCONT)

    def wait_ready(self) -> None:
        def answers() -> bool:
            try:
                return bool(self.admin.list_topics(timeout=5).brokers)
            except KafkaException:
                return False

        wait_until(answers, "the broker answers", PATIENCE_S)

    def set_password(self, user: str, password: str, mechanism: str = "SCRAM-SHA-256") -> None:
        """Makes a user, or gives it another password. Whoever is in stays."""
        kind = ScramMechanism[mechanism.replace("-", "_")]
        info = ScramCredentialInfo(kind, 4096)
        change = UserScramCredentialUpsertion(user, info, password.encode())
        self._result(self.admin.alter_user_scram_credentials([change]))

    # -- topics --------------------------------------------------------------------------------------------------

    def create_topic(self, topic: str, partitions: int = 4, **config: str) -> None:
        """`config` with underscores for dots. Records are kept, however old they are."""
        settings = {"retention.ms": "-1"} | {name.replace("_", "."): value for name, value in config.items()}
        self._result(self.admin.create_topics([NewTopic(topic, partitions, 1, config=settings)]))
        self._await_partitions(topic, partitions)

    def add_partitions(self, topic: str, total: int) -> None:
        self._result(self.admin.create_partitions([NewPartitions(topic, total)]))
        self._await_partitions(topic, total)

    def delete_topic(self, topic: str) -> None:
        self._result(self.admin.delete_topics([topic]))
        wait_until(lambda: not self.partitions(topic), f"topic {topic} is gone", PATIENCE_S)

    def trim(self, topic: str, partition: int, before: int) -> None:
        """Deletes the records before an offset."""
        self._result(self.admin.delete_records([TopicPartition(topic, partition, before)]))

    def partitions(self, topic: str) -> int:
        # All topics: to ask for one may make it.
        found = self.admin.list_topics(timeout=PATIENCE_S).topics.get(topic)
        return len(found.partitions) if found and not found.error else 0

    def _await_partitions(self, topic: str, total: int) -> None:
        wait_until(lambda: self.partitions(topic) == total, f"topic {topic} has {total} partitions", PATIENCE_S)

    @staticmethod
    def _result(futures: dict) -> None:
        for future in futures.values():
            future.result(PATIENCE_S)

    # -- writing -------------------------------------------------------------------------------------------------

    def producer(self, **settings: str) -> Producer:
        """Idempotent: a record that is resent is there once. `settings` with underscores for dots."""
        given = {name.replace("_", "."): value for name, value in settings.items()}
        return Producer(self.client | {"enable.idempotence": "true", "linger.ms": "5", **given})

    def transactional(self, name: str, **settings: str) -> Producer:
        """One whose transactions are open from `begin_transaction` on; it fences older ones of the same name."""
        producer = self.producer(transactional_id=name, **settings)
        producer.init_transactions(PATIENCE_S)
        return producer

    def send(self, topic: str, records: Iterable[Record | bytes | str], producer: Producer | None = None) -> int:
        """Sends records and returns once the broker has all of them, in a transaction as far as the producer's is; how many."""
        producer = producer or self.producer()
        failed: list[KafkaError] = []

        def delivered(error: KafkaError | None, _: Message) -> None:
            if error is not None:
                failed.append(error)

        sent = 0
        for record in records:
            if isinstance(record, str):
                record = record.encode()
            if isinstance(record, bytes):
                record = Record(record)
            while True:
                try:
                    producer.produce(
                        topic,
                        record.value,
                        record.key,
                        -1 if record.partition is None else record.partition,
                        on_delivery=delivered,
                        timestamp=record.time_ms,
                        headers=list(record.headers),
                    )
                    break
                except BufferError:
                    producer.poll(0.1)
            sent += 1
        # An abort drops what was not sent yet, so that nothing would be aborted.
        left = producer.flush(PATIENCE_S)
        if failed:
            raise KafkaException(failed[0])
        assert left == 0, f"{left} records of {topic} were not taken within {PATIENCE_S} s"
        return sent

    def transaction(self, producer: Producer, topic: str, records: Iterable[Record | bytes | str], commit: bool) -> int:
        """One transaction with these records, committed or aborted."""
        producer.begin_transaction()
        sent = self.send(topic, records, producer)
        if commit:
            producer.commit_transaction(PATIENCE_S)
        else:
            producer.abort_transaction(PATIENCE_S)
        return sent

    # -- reading back --------------------------------------------------------------------------------------------

    def consumer(self, **settings: str) -> Consumer:
        given = {name.replace("_", "."): value for name, value in settings.items()}
        return Consumer(
            self.client
            | {
                "group.id": f"test-{uuid.uuid4()}",
                "isolation.level": "read_committed",
                "enable.auto.commit": "false",
                "enable.partition.eof": "true",
                "auto.offset.reset": "error",
                **given,
            }
        )

    def read(self, topic: str) -> dict[int, list[Message]]:
        """Every committed record that the topic has now, by partition and in its order."""
        consumer = self.consumer()
        try:
            found: dict[int, list[Message]] = {number: [] for number in range(self.partitions(topic))}
            begins = [TopicPartition(topic, number, self.ends(topic, number)[0]) for number in found]
            consumer.assign(begins)
            ended: set[int] = set()
            while len(ended) < len(found):
                for message in consumer.consume(10_000, 1):
                    error = message.error()
                    if error is None:
                        found[message.partition()].append(message)
                    elif error.code() == KafkaError._PARTITION_EOF:
                        ended.add(message.partition())
                    else:
                        raise KafkaException(error)
            return found
        finally:
            consumer.close()

    def ends(self, topic: str, partition: int) -> tuple[int, int]:
        """The oldest offset and the one behind the last record that is committed."""
        consumer = self.consumer()

        def asked() -> tuple[int, int] | None:
            try:
                return consumer.get_watermark_offsets(TopicPartition(topic, partition), PATIENCE_S)
            except KafkaException as error:
                # Of a topic that is new, or after a restart, the broker may not know yet that it is the leader.
                if error.args[0].code() not in NO_LEADER_YET:
                    raise
            return None

        try:
            return wait_until(asked, f"the leader of {topic}/{partition}", PATIENCE_S)
        finally:
            consumer.close()

    # -- the extension -------------------------------------------------------------------------------------------

    def create_server(self, connection, server: str, **options: str) -> None:
        """A server of the broker, and the user mapping of its owner, who is the present user."""
        create_server(connection, server, "kafka", self.options | options, self.credentials)


def create_server(
    connection, server: str, kind: str, options: dict[str, str], credentials: dict[str, str] | None = None
) -> None:
    """CREATE SERVER of a source, and the user mapping of its owner, who is the present user."""

    def pairs(given: dict[str, str]) -> sql.Composable:
        each = [sql.SQL("{} {}").format(sql.Identifier(k), sql.Literal(v)) for k, v in given.items()]
        return sql.SQL(" OPTIONS ({})").format(sql.SQL(", ").join(each)) if each else sql.SQL("")

    name = sql.Identifier(server)
    connection.execute(
        sql.SQL("CREATE SERVER {} TYPE {} FOREIGN DATA WRAPPER rakam_source").format(name, sql.Literal(kind))
        + pairs(options)
    )
    if credentials:
        connection.execute(sql.SQL("CREATE USER MAPPING FOR CURRENT_USER SERVER {}").format(name) + pairs(credentials))
