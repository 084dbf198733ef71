"""Chapters about the lake: reading a bucket, an outage of it, and a manifest of many files."""

from __future__ import annotations

import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import manifest
from harness.database import one, wait_until
from harness.duck_s3 import DuckS3
from harness.services import Services
from measure import interleaved, wall_s

# Added to every answer of the bucket, as the network would.
LATENCY_MS = 30
# Years of flights: one is five megabytes.
YEARS = int(os.environ.get("RAKAM_BUCKET_YEARS", "8"))
FILES = 100_000
CLIENTS = 4
OUTAGE_S = int(os.environ.get("RAKAM_OUTAGE_S", "60"))


def bucket(bench) -> None:
    """The same scans cold and warm from a bucket, from a directory, and by DuckDB over the same objects."""
    with Services() as services:
        env = services.start("s3")
        services.start("faultproxy", FAULTPROXY_TARGET=env["S3_ENDPOINT_URL"])
        _bucket(bench, services)


def _bucket(bench, services: Services) -> None:
    db, env = bench.db, services.env
    bench.load()
    _storage(db, env, "far")
    columns = one(
        db.admin,
        "SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute WHERE attrelid = 'flights.departure'::regclass"
        " AND attnum > 0 AND attname NOT IN ('_id', '_received_at', '_extra', '_time') AND NOT attisdropped",
    )
    for project, storage in (("near", "lake"), ("far", "far")):
        db.project(project, storage)
        db.admin.execute("SELECT rakam.collect(%s, 'departure', %s)", (project, json.dumps(bench.events[0])))
        db.tick()
        db.wait_column(f"{project}.departure", "time_hour")
        for year in range(YEARS):
            db.admin.execute(
                f"INSERT INTO {project}.departure (_time, {columns}) SELECT _time - interval '{364 * year} days', {columns}"
                " FROM heap_plain"
            )
        db.flush(project)
    count, size = db.admin.execute("SELECT count(*), sum(bytes) FROM rakam.data_files WHERE project = 'far'").fetchone()
    print(f"  far: {count} files, {float(size) / 1e6:.1f} MB", flush=True)
    paths = [path for (path,) in db.all("SELECT path FROM rakam.data_files WHERE project = 'far'")]
    duck = DuckS3(env, env["FAULTPROXY_URL"])
    services.faults([{"match": {"method": "GET"}, "fault": {"delay_ms": LATENCY_MS}}])
    queries = {
        "by carrier, all": "SELECT carrier, count(*), sum(distance) FROM {t} GROUP BY 1 ORDER BY 1",
        "wide filter, all": "SELECT count(*), sum(air_time), max(dest) FROM {t} WHERE distance > 2000 AND origin = 'JFK'",
        "one month, all columns": "SELECT * FROM {t} WHERE _time >= '2013-07-01' AND _time < '2013-08-01' AND dep_delay > 120",
    }
    fresh = 0

    def cold(query: str) -> float:
        nonlocal fresh
        fresh += 1
        with db.cluster.connect(db.name) as session:
            session.execute(f"SET rakam.cache_dir = 'rakam_cache_bench/{fresh}'")
            session.execute("SELECT 1 FROM near.departure WHERE false")
            return wall_s(lambda: session.execute(query.format(t="far.departure")).fetchall())

    session = db.connect()
    session.execute("SET TimeZone = 'UTC'")
    for name, query in queries.items():
        theirs = query.format(t=f"read_parquet({paths!r}, union_by_name = true)").replace(
            "SELECT *", "SELECT * EXCLUDE (_xid)"
        )

        def ours(table: str, query=query) -> float:
            return wall_s(lambda: session.execute(query.format(t=table)).fetchall())

        if "count(*)" in query:
            rows = session.execute(query.format(t="far.departure")).fetchall()
            assert rows == session.execute(query.format(t="near.departure")).fetchall()
            assert len(rows) == len(duck.run(theirs)[1])
        for _ in range(3):
            ours("far.departure")
        taken = interleaved(
            bench.repetitions,
            cold=lambda query=query: cold(query),
            warm=lambda ours=ours: ours("far.departure"),
            near=lambda ours=ours: ours("near.departure"),
            duck=lambda theirs=theirs: duck.run(theirs)[0],
        )
        shown = {key: f"{value * 1000:.0f} ms" for key, value in taken.items()}
        bench.table.add(
            f"bucket, {name}: cold", shown["cold"], f"DuckDB {shown['duck']}", taken["cold"] / taken["duck"], "≤ 1.0"
        )
        bench.table.add(
            f"bucket, {name}: warm", shown["warm"], f"file:// {shown['near']}", taken["warm"] / taken["near"], ""
        )
        bench.table.add(
            f"bucket, {name}: cold against warm",
            shown["cold"],
            f"warm {shown['warm']}",
            taken["cold"] / taken["warm"],
            "",
        )
    duck.close()
    services.faults([])


def outage(bench) -> None:
    """What collecting takes while the bucket is away, and how long the backlog takes to drain afterwards."""
    with Services() as services:
        env = services.start("s3")
        services.start("faultproxy", FAULTPROXY_TARGET=env["S3_ENDPOINT_URL"])
        _outage(bench, services)


def _outage(bench, services: Services) -> None:
    db = bench.db
    _storage(db, services.env, "away")
    db.project("through", "away")
    # Files all the time, so that the bucket is needed all the time.
    db.configure(flush_max_age="1s", flush_interval="1s")
    _collect_for(db, 1)
    there = _collect_for(db, OUTAGE_S)
    services.faults([{"fault": {"reset": "before"}}])
    away = _collect_for(db, OUTAGE_S)
    waiting = db.one("SELECT pending_bytes FROM rakam.stat_lake WHERE storage = 'away'")
    reachable = "SELECT reachable FROM rakam.stat_lake WHERE storage = 'away'"
    wait_until(lambda: db.one(reachable) is False, "the outage being noticed", 60, 0.2)
    services.faults([])
    cold = "SELECT inbox_events + hot_events = 0 FROM rakam.stat_collection WHERE project = 'through'"
    drained = wall_s(lambda: wait_until(lambda: db.one(cold), "the backlog's end", 300, 0.2))
    sent = db.one("SELECT sum(n) FROM sent")
    assert db.all("SELECT count(*), count(DISTINCT (client, n)) FROM through.hit") == [(sent, sent)]
    db.configure(flush_max_age=None, flush_interval=None)
    for name, at in (("median", 0.5), ("p99", 0.99)):
        before, after = (sorted(taken)[int(len(taken) * at)] * 1000 for taken in (there, away))
        bench.table.add(
            f"collect() by {CLIENTS} clients for {OUTAGE_S} s with the bucket away, {name}",
            f"{after:.2f} ms", f"there {before:.2f} ms", after / before, "",
        )  # fmt: skip
    bench.table.add(
        f"until the backlog of {len(away):,} events, {float(waiting) / 1e6:.1f} MB, is in the bucket",
        f"{drained:.1f} s", "", None, "",
    )  # fmt: skip


def _collect_for(db, seconds: float) -> list[float]:
    """Seconds that each collect took, one event a transaction; how many each client sent is in the table `sent`."""
    db.admin.execute("CREATE TABLE IF NOT EXISTS sent (n bigint)")
    first = db.one("SELECT coalesce(sum(n), 0) FROM sent")
    end = time.monotonic() + seconds

    def client(number: int) -> list[float]:
        taken = []
        with db.cluster.connect(db.name, autocommit=True) as session:
            session.execute("PREPARE send (jsonb) AS SELECT rakam.collect('through', 'hit', $1)")
            while time.monotonic() < end:
                body = json.dumps({"client": number, "n": int(first) + len(taken)})
                taken.append(wall_s(lambda body=body: session.execute(f"EXECUTE send ('{body}')")))
            session.execute("INSERT INTO sent VALUES (%s)", (len(taken),))
        return taken

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [one for taken in pool.map(client, range(CLIENTS)) for one in taken]


def _storage(db, env: dict[str, str], name: str) -> None:
    """A storage behind the fault proxy."""
    db.admin.execute(
        f"CREATE SERVER {name} FOREIGN DATA WRAPPER rakam OPTIONS (url 's3://{env['S3_BUCKET']}/{name}',"
        f" endpoint '{env['FAULTPROXY_URL']}', allow_http 'true', region 'us-east-1')"
    )
    db.admin.execute(
        f"CREATE USER MAPPING FOR postgres SERVER {name} OPTIONS"
        f" (access_key_id '{env['AWS_ACCESS_KEY_ID']}', secret_access_key '{env['AWS_SECRET_ACCESS_KEY']}')"
    )


def many_files(bench) -> None:
    """A query of one day where the manifest has many files: what finding the day's files takes."""
    db = bench.db
    db.project("many")
    for year in (2023, 2024, 2025):
        event = json.dumps({"n": year, "_time": f"{year}-03-04T05:06:07Z"})
        db.admin.execute("SELECT rakam.collect('many', 'hit', %s)", (event,))
        db.admin.execute("SELECT rakam.collect('many', 'few', %s)", (event,))
    db.flush("many")
    manifest.fill(db, "many", "hit", FILES)
    db.admin.execute("VACUUM ANALYZE rakam_internal.data_file, rakam_internal.data_file_stat")
    reader = db.login("many", "read")

    def explained(table: str, where: str) -> dict:
        return one(reader, f"EXPLAIN (ANALYZE, FORMAT json) SELECT n FROM many.{table} WHERE {where}")[0]

    def memory() -> int:
        status = Path(f"/proc/{reader.info.backend_pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) << 10

    for year in (2023, 2024, 2025):
        where = f"_time >= '{year}-03-04' AND _time < '{year}-03-05' AND n > 5000"
        for table in ("few", "hit"):
            explained(table, where)
        times = {table: [] for table in ("few", "hit")}
        for _ in range(max(bench.repetitions, 21)):
            for table, taken in times.items():
                found = explained(table, where)
                taken.append(found["Planning Time"] + found["Execution Time"])
        many, few = statistics.median(times["hit"]), statistics.median(times["few"])
        bench.table.add(
            f"one day of {year} among {FILES:,} files, planning and pruning",
            f"{many:.1f} ms", f"of 3 files {few:.1f} ms", None, "≤ 20 ms",
        )  # fmt: skip
    day = memory()
    began = wall_s(lambda: explained("hit", "n > 5000"))
    bench.table.add(
        f"all {FILES:,} files pruned by statistics, no range of time",
        f"{began * 1000:.0f} ms, {(memory() - day) / 1e6:+.0f} MB kept", "", None, "",
    )  # fmt: skip
    bench.table.add("memory of the session after queries of one day", f"{day / 1e6:.0f} MB", "", None, "")
