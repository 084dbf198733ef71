"""The demo's chapter about a bucket: a clickstream in an S3 service of this machine, an outage of it, what goes on meanwhile,
the recovery, and the same objects read by DuckDB.

Between server and service is a proxy that makes the outage: it resets every connection. Both go on running after the
demo, as the cluster does, so that project `web` can be queried; the service keeps its objects in memory.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import clickstream
import psycopg
from harness import duck_s3
from harness.duck_s3 import DuckS3
from harness.services import Services
from show import note, title

if TYPE_CHECKING:
    from demo import Demo

CLICKS = 40_000
# Events of these days come after the first half was written: no file has any of them.
LATE = "2026-03-20"
# For how long calls to the store are repeated while it is away; otherwise half a minute.
PATIENCE = "2s"
# A slow machine may need some of it; the storage is asked again after at most 15 s.
RECOVERY_S = 300


def chapter(demo: Demo) -> None:
    title("The clickstream in a bucket: an S3 service on this machine, behind a proxy that can fail")
    note("the first time, the service and a DuckDB with its S3 extension are installed with pip")
    services = Services(demo.cluster.make_folder("services"))
    # Those of the last demo have objects of a database that is gone.
    for name in ("faultproxy", "s3"):
        services.stop(name)
    services.start("s3")
    duck_s3.install()
    services.start("faultproxy", FAULTPROXY_TARGET=services.env["S3_ENDPOINT_URL"])
    events = list(clickstream.events(CLICKS))
    half = CLICKS // 2
    calm_ms = fill(demo, services, events[:half])
    outage(demo, services, events[half:], calm_ms)
    recovery(demo, services, events)
    others(demo, services)


def fill(demo: Demo, services: Services, events: list[tuple[str, dict]]) -> list[float]:
    """A project in the bucket, with events in files."""
    env = services.env
    demo.psql(
        f"CREATE SERVER bucket FOREIGN DATA WRAPPER rakam OPTIONS (url 's3://{env['S3_BUCKET']}/demo',"
        f" endpoint '{env['FAULTPROXY_URL']}', allow_http 'true', region '{env['AWS_REGION']}')"
    )
    demo.psql(
        "CREATE USER MAPPING FOR CURRENT_USER SERVER bucket OPTIONS"
        f" (access_key_id '{env['AWS_ACCESS_KEY_ID']}', secret_access_key '{env['AWS_SECRET_ACCESS_KEY']}')"
    )
    demo.psql("SELECT project, write_key FROM rakam.create_project('web', 'bucket')")
    taken_ms = demo.send("web", events, len(events))
    demo.psql("SELECT * FROM rakam.flush('web')")
    demo.psql(
        "SELECT collection, period, first_day, n, pg_size_pretty(bytes) AS size, left(path, 62) || '…' AS path"
        " FROM rakam.data_files WHERE project = 'web' ORDER BY 1, 3 LIMIT 4"
    )
    return taken_ms


def outage(demo: Demo, services: Services, events: list[tuple[str, dict]], calm_ms: list[float]) -> None:
    title("The bucket goes away: collecting goes on, and so do queries of recent events")
    demo.db.configure(storage_timeout=PATIENCE)
    services.faults([{"fault": {"reset": "before"}}])
    note("from now on every connection to the store is reset")
    taken_ms = demo.send("web", events, len(events))
    note(
        f"a call with {len(events) // len(taken_ms)} events takes {statistics.median(taken_ms):.1f} ms (median);"
        f" before the outage it took {statistics.median(calm_ms):.1f} ms"
    )
    recent = sum(collection == "pageview" and properties["_time"] >= LATE for collection, properties in events)
    demo.psql(f"SELECT count(*) FROM web.pageview WHERE _time >= '{LATE}'")
    found = demo.db.one(f"SELECT count(*) FROM web.pageview WHERE _time >= '{LATE}'")
    note(f"{recent:,} such pageviews were sent during the outage, and none before")
    if found != recent:
        sys.exit(f"{found:,} of {recent:,} recent pageviews are seen during the outage")
    note("a query that needs the files says what is wrong, and so does a flush; its events stay where they are:")
    told = demo.psql("SELECT country, count(*) FROM web.pageview GROUP BY 1")
    told += demo.psql("SELECT * FROM rakam.flush('web')")
    if told.count("58030") != 2:
        sys.exit("the outage went unnoticed")
    demo.psql(
        "SELECT \"check\", status, detail, hint FROM rakam.health() WHERE \"check\" = 'storage' AND status <> 'ok'"
    )
    demo.psql(
        "SELECT storage, reachable, pg_size_pretty(pending_bytes) AS pending, last_error FROM rakam.stat_lake"
        " WHERE storage = 'bucket'"
    )


def recovery(demo: Demo, services: Services, events: list[tuple[str, dict]]) -> None:
    title("The bucket is back: the backlog drains, and every event is there once")
    services.faults([])
    demo.db.configure(storage_timeout=None)
    began = shown = time.monotonic()
    while not drained(demo):
        if time.monotonic() - began > RECOVERY_S:
            sys.exit(f"the backlog was not written within {RECOVERY_S} s")
        if time.monotonic() - shown >= 2:
            shown = time.monotonic()
            note("the storage is being asked again …")
        time.sleep(0.5)
    note(f"written {time.monotonic() - began:.1f} s after the outage")
    demo.psql(
        "SELECT collection, events, inbox_events, hot_events, cold_events, files FROM rakam.stat_collection"
        " WHERE project = 'web' ORDER BY 1"
    )
    sent = Counter(collection for collection, _ in events)
    stored = dict(demo.db.all("SELECT _collection, count(*) FROM web._all GROUP BY 1"))
    note(f"sent: {', '.join(f'{name} {sent[name]:,}' for name in sorted(sent))}")
    if stored != sent:
        sys.exit(f"the bucket's project has {stored}")
    demo.psql("SELECT count(*) AS problems FROM rakam.check_storage('bucket')")
    if demo.db.one("SELECT count(*) FROM rakam.check_storage('bucket') WHERE problem <> 'orphan'"):
        sys.exit("files are missing or harmed")


def drained(demo: Demo) -> bool:
    """Writes what waits, if the storage answers again."""
    try:
        demo.db.flush("web")
    except psycopg.errors.IoError:
        return False
    waiting = demo.db.all("SELECT inbox_events, hot_events FROM rakam.stat_collection WHERE project = 'web'")
    return not any(itertools.chain.from_iterable(waiting))


def others(demo: Demo, services: Services) -> None:
    title("The same objects, read by DuckDB from the bucket")
    duck = DuckS3(services.env, services.env["S3_ENDPOINT_URL"])
    for what, query, collection in (
        ("purchases, revenue, buyers", "count(*), round(sum(amount)::numeric, 2), count(DISTINCT _user)", "purchase"),
        (
            "pageviews, users, first, last",
            "count(*), count(DISTINCT _user), min(_time)::date, max(_time)::date",
            "pageview",
        ),
    ):
        paths = demo.db.all("SELECT path FROM rakam.data_files WHERE project = 'web' AND collection = %s", collection)
        files = [path for (path,) in paths]
        their_query = query.replace("::numeric", "")
        _, (theirs,) = duck.run(f"SELECT {their_query} FROM read_parquet({files!r}, union_by_name = true)")
        ours = [str(value) for value in demo.db.all(f"SELECT {query} FROM web.{collection}")[0]]
        note(f"{what}: DuckDB {', '.join(theirs)}; psql {', '.join(ours)}")
        if list(map(plain, theirs)) != list(map(plain, ours)):
            sys.exit("DuckDB and psql disagree")
    duck.close()


def plain(text: str) -> float | str:
    """Numbers without what their type adds."""
    try:
        return float(text)
    except ValueError:
        return text
