"""A broker that asks who is there: SASL/SCRAM with the credentials of the server's owner, for sources and event stores. Passwords
are told to the broker's own mechanism and to nobody else."""

from __future__ import annotations

import json

import pytest
from conftest import available
from harness.database import collect, wait_until
from harness.kafka import Kafka

WRONG, RIGHT, NEXT = "wr0ng-pa55word", "r1ght-pa55word", "n3xt-pa55word"


@pytest.fixture(scope="module")
def guarded():
    with available(lambda: Kafka(scram=True)) as broker:
        yield broker


def stored(db, project: str) -> list[int]:
    return [n for (n,) in db.all(f"SELECT (properties->>'n')::int FROM {project}._all ORDER BY 1")]


def source_error(db, project: str) -> str:
    return db.one("SELECT max(last_error) FROM rakam.stat_source WHERE project = %s", project) or ""


def store_error(db) -> str:
    detail = "SELECT detail FROM rakam.health() WHERE \"check\" = 'event stores' AND status = 'error'"
    return db.one(f"SELECT ({detail})") or ""


def processes(db) -> list[tuple]:
    return db.all(
        "SELECT kind, pid, restarts FROM rakam.stat_worker WHERE kind IN ('resident', 'consumer') ORDER BY 1, 2"
    )


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_events_come_and_go_with_the_right_password(cluster, db, guarded, mechanism):
    mark = cluster.log_mark()
    bits = mechanism[-3:]
    project, server, user = f"scram{bits}", f"k{bits}", f"user{bits}"
    guarded.set_password(user, RIGHT, mechanism)
    guarded.create_topic(f"in{bits}", 2)
    guarded.create_topic(f"out{bits}", 1)
    guarded.send(f"in{bits}", [json.dumps({"n": n}) for n in range(10)])
    db.project(project)
    protocol = f"brokers '{guarded.brokers}', \"security.protocol\" 'SASL_PLAINTEXT', \"sasl.mechanism\" '{mechanism}'"
    db.admin.execute(f"CREATE SERVER {server} TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS ({protocol})")
    mapping = f"USER MAPPING FOR CURRENT_USER SERVER {server} OPTIONS"
    db.admin.execute(f"CREATE {mapping} (username '{user}', password '{WRONG}')")

    # With a wrong one neither does anything, and both say why. To create them asks nobody.
    source = {"topics": [f"in{bits}"], "collection": "e"}
    db.admin.execute("SELECT rakam.create_source(%s, 'in', %s, %s)", (project, server, json.dumps(source)))
    db.admin.execute("SELECT rakam.set_event_store(%s, %s, %s)", (project, server, json.dumps({"topic": f"out{bits}"})))
    collect(db.admin, project, "e", {"n": 100})
    wait_until(lambda: "does not accept the credentials" in source_error(db, project), "the source says why")
    wait_until(lambda: "does not accept the credentials" in store_error(db), "the event store says why")
    assert stored(db, project) == []
    assert guarded.ends(f"out{bits}", 0) == (0, 0)
    before = processes(db)

    # The right one is taken as soon as it is there, by the processes that run.
    db.admin.execute(f"ALTER {mapping} (SET password '{RIGHT}')")
    wait_until(lambda: stored(db, project) == list(range(10)), "what the topic has is read")
    wait_until(lambda: guarded.ends(f"out{bits}", 0)[1] == 1, "what waited is sent")
    wait_until(lambda: source_error(db, project) == "" and store_error(db) == "", "nobody complains any more")

    # It changes, there and here.
    guarded.set_password(user, NEXT, mechanism)
    db.admin.execute(f"ALTER {mapping} (SET password '{NEXT}')")
    guarded.send(f"in{bits}", [json.dumps({"n": n}) for n in range(10, 20)])
    collect(db.admin, project, "e", {"n": 101})
    wait_until(lambda: stored(db, project) == list(range(20)), "more is read")
    wait_until(lambda: guarded.ends(f"out{bits}", 0)[1] == 2, "more is sent")
    assert set(before) <= set(processes(db))

    # Nobody is shown any of them.
    views = [name for (name,) in db.all("SELECT viewname FROM pg_views WHERE schemaname = 'rakam'")]
    log = cluster.log_since(mark)
    for password in (WRONG, RIGHT, NEXT):
        for view in views:
            assert db.one(f"SELECT count(*) FROM rakam.{view} v WHERE v::text LIKE %s", f"%{password}%") == 0, view
        assert db.one("SELECT count(*) FROM rakam.health() h WHERE h::text LIKE %s", f"%{password}%") == 0
        assert password not in log
    for statement in ("SELECT rakam.drop_source(%s, 'in')", "SELECT rakam.set_event_store(%s, NULL)"):
        db.admin.execute(statement, (project,))


def test_what_comes_out_goes_in_again(db, guarded):
    """Collected, sent and consumed by the same server; its user mapping is of its owner, not of who collects."""
    guarded.create_server(db.admin, "circle")
    guarded.create_topic("circle", 2)
    db.project("circle")
    db.admin.execute("SELECT rakam.set_event_store('circle', 'circle', '{\"topic\": \"circle\"}')")
    options = {"topics": ["circle"], "format": "avro"}
    db.admin.execute("SELECT rakam.create_source('circle', 'in', 'circle', %s)", (json.dumps(options),))
    writer = db.login("circle", "write")
    for n in range(20):
        collect(writer, "circle", "e", {"_user": f"u{n % 3}", "n": n})
    wait_until(lambda: stored(db, "circle") == list(range(20)), "all events are back")
    shown = writer.execute("SELECT umoptions FROM pg_user_mappings WHERE srvname = 'circle'").fetchall()
    assert shown == [(None,)]
    db.admin.execute("SELECT rakam.drop_source('circle', 'in')")
