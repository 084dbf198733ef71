"""Ratios against heap tables and DuckDB, all in one run on one machine. benches/README.md has the method.

benches/sql/run.sh                 everything
benches/sql/run.sh collect idle    some of: collect batch sources files size scan bucket outage compact floor idle manifest

RAKAM_HISTORY_ROWS (default 10,000,000) sets the size of the history that `files` loads, RAKAM_SOURCE_EVENTS (default 400,000)
how many records the topics of `sources` have, RAKAM_FRESH_S (default 30) for how many seconds its last topic is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "pg_test"), str(ROOT / "demo"), str(Path(__file__).parent)]

import clickstream  # noqa: E402
import duckdb  # noqa: E402
import lake  # noqa: E402
import pyarrow  # noqa: E402
from harness import flights  # noqa: E402
from harness.cluster import Cluster  # noqa: E402
from harness.database import Database, one  # noqa: E402
from measure import Table, cpu_s, interleaved, reaped_cpu_s, thread_cpu_s, wakeups, wall_s  # noqa: E402

import sources  # noqa: E402

# The last three leave what others stumble over: storages that are away, and files that were made up.
CHAPTERS = [
    "collect",
    "batch",
    "sources",
    "files",
    "size",
    "scan",
    "compact",
    "floor",
    "idle",
    "bucket",
    "outage",
    "manifest",
]
CLICKS = 120_000
HISTORY = int(os.environ.get("RAKAM_HISTORY_ROWS", "10000000"))
BATCH = 500
IDLE_S = 30
FLIGHT_COLUMNS = {
    **dict.fromkeys(
        ["year", "month", "day", "dep_time", "sched_dep_time", "dep_delay", "arr_time", "sched_arr_time", "arr_delay",
         "flight", "air_time", "distance", "hour", "minute"], "double precision"),
    **dict.fromkeys(["carrier", "origin", "dest"], 'text COLLATE "C"'),
    "time_hour": "timestamptz",
}  # fmt: skip


class Bench:
    def __init__(self, repetitions: int):
        self.repetitions = repetitions
        self.table = Table()
        self.cluster = Cluster("bench")
        self.cluster.destroy()
        self.cluster.start()
        self.db = Database(self.cluster, "bench").create()
        self.db.admin.execute(
            f"CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{self.cluster.make_folder('lake')}')"
        )
        self.duck = duckdb.connect()
        self.duck.execute("SET TimeZone = 'UTC'")
        self.events = list(flights.events())
        self.loaded = False

    def run(self, chapters: list[str]) -> None:
        for chapter in chapters:
            print(f"{chapter}", flush=True)
            getattr(self, chapter)()
        print(f"\n{self.machine()}\n\n{self.table.markdown()}")
        self.db.close()
        self.cluster.destroy()

    def machine(self) -> str:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        cores = Path("/proc/cpuinfo").read_text().count("model name")
        version = one(self.db.admin, "SHOW server_version")
        return f"{cores} × {cpu.split(':')[1].strip()}; PostgreSQL {version}; DuckDB {duckdb.__version__}"

    # -- collecting ----------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """One event per transaction against one row per transaction, the same jsonb, commits as configured by default."""
        self.db.project("single")
        self.db.admin.execute(
            "CREATE TABLE heap_single (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body jsonb)"
        )
        session = self.db.connect()
        session.execute("PREPARE ours (jsonb) AS SELECT rakam.collect('single', 'departure', $1)")
        session.execute("PREPARE theirs (jsonb) AS INSERT INTO heap_single (body) VALUES ($1)")
        bodies = [json.dumps(event).replace("'", "''") for event in self.events[:1_000]]
        session.execute(f"EXECUTE ours ('{bodies[0]}')")
        self.db.tick()
        pid = session.info.backend_pid
        for commit in ("on", "off"):
            session.execute(f"SET synchronous_commit = {commit}")

            def rate(name: str) -> float:
                return len(bodies) / wall_s(lambda: [session.execute(f"EXECUTE {name} ('{body}')") for body in bodies])

            def backend_cpu(name: str) -> float:
                before = cpu_s(pid)
                for body in bodies * 4:  # the kernel counts in steps of 10 ms
                    session.execute(f"EXECUTE {name} ('{body}')")
                return (cpu_s(pid) - before) / (4 * len(bodies)) * 1e6

            speed = interleaved(self.repetitions, ours=lambda: rate("ours"), theirs=lambda: rate("theirs"))
            self.table.add(
                f"collect(), one per transaction, synchronous_commit {commit}",
                f"{speed['ours']:,.0f}/s", f"INSERT {speed['theirs']:,.0f}/s", speed["ours"] / speed["theirs"], "≥ 0.8",
            )  # fmt: skip
        cost = interleaved(self.repetitions, ours=lambda: backend_cpu("ours"), theirs=lambda: backend_cpu("theirs"))
        self.table.add(
            "the same, backend CPU per event (speed ratio)",
            f"{cost['ours']:.0f} µs", f"INSERT {cost['theirs']:.0f} µs", cost["theirs"] / cost["ours"], "≥ 0.8",
        )  # fmt: skip

    def batch(self) -> None:
        """collect_batch against COPY of the same typed columns, by backend CPU; the workers' CPU beside it."""
        self.db.project("batched")
        columns = ", ".join(
            f"{name} {kind}" for name, kind in {"_time": "timestamptz", "_user": "text", **FLIGHT_COLUMNS}.items()
        )
        self.db.admin.execute(f"CREATE TABLE heap_batch ({columns})")
        session = self.db.connect()
        pid = session.info.backend_pid
        part = self.events[:50_000]
        texts = [
            json.dumps([{"collection": "departure", "properties": event} for event in part[start : start + BATCH]])
            for start in range(0, len(part), BATCH)
        ]
        names = ["_time", "_user", *FLIGHT_COLUMNS]
        lines = "".join("\t".join("\\N" if e[n] is None else str(e[n]) for n in names) + "\n" for e in part)
        session.execute("SELECT rakam.collect_batch('batched', %s)", (texts[0],))
        self.db.flush("batched")

        def send(call: str) -> float:
            before = thread_cpu_s(pid)
            for text in texts:
                session.execute(f"SELECT {call}", (text,))
            return (thread_cpu_s(pid) - before) / len(part) * 1e6

        def copy() -> float:
            before = thread_cpu_s(pid)
            with session.cursor() as cursor, cursor.copy(f"COPY heap_batch ({', '.join(names)}) FROM STDIN") as stream:
                stream.write(lines)
            return (thread_cpu_s(pid) - before) / len(part) * 1e6

        workers_before = self.workers_cpu()
        events_before = self.db.one("SELECT count(*) FROM batched.departure")
        cost = interleaved(
            self.repetitions,
            text=lambda: send("rakam.collect_batch('batched', %s::text)"),
            jsonb=lambda: send("rakam.collect_batch('batched', %s::jsonb)"),
            jsonb_in=lambda: send("jsonb_array_length(%s::jsonb)"),
            copy=copy,
        )
        cost["jsonb that is there already"] = cost["jsonb"] - cost["jsonb_in"]
        self.db.tick()
        digest = self.workers_cpu() - workers_before
        events = self.db.one("SELECT count(*) FROM batched.departure") - events_before
        workers_before = self.workers_cpu()
        self.db.flush("batched")
        flush = self.workers_cpu() - workers_before
        for kind, goal in (("text", "≥ 1"), ("jsonb that is there already", "≥ 0.6"), ("jsonb", "")):
            self.table.add(
                f"collect_batch {kind}, {BATCH} events a call, backend CPU per event (speed ratio)",
                f"{cost[kind]:.1f} µs", f"COPY typed {cost['copy']:.1f} µs", cost["copy"] / cost[kind], goal,
            )  # fmt: skip
        self.table.add("the server's own reading of jsonb, in the last row", f"{cost['jsonb_in']:.1f} µs", "", None, "")
        for what, cpu in (("digest and merge", digest), ("flush", flush)):
            self.table.add(f"{what}, worker CPU per event", f"{cpu / events * 1e6:.1f} µs", "", None, "")
        self.bulk(names, part)
        self.costs(part[:20_000])

    def costs(self, events: list[dict]) -> None:
        """What an `_id`, a mapper and a hundred fields add to collect_batch: CPU of the backend, and of digest and merge."""
        self.db.project("costs")
        self.db.admin.execute(
            "CREATE FUNCTION costs.noted(event jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE"
            """ AS $$ SELECT event || '{"noted": true}' $$"""
        )
        self.db.admin.execute("SELECT rakam.set_mapper('costs', 'mapped', 'costs.noted(jsonb)')")
        session = self.db.connect()
        pid = session.info.backend_pid
        hundred = {f"field_{n}": n for n in range(100)}
        kinds = {
            "plain": lambda n, event: event,
            "identified": lambda n, event: {**event, "_id": f"{self.rounds}-{n:032}"},
            "mapped": lambda n, event: event,
            "wide": lambda n, event: {**event, **hundred},
        }
        digests: dict[str, list[float]] = {kind: [] for kind in kinds}
        self.rounds = 0

        def send(kind: str) -> float:
            self.rounds += 1
            items = [{"collection": kind, "properties": kinds[kind](n, event)} for n, event in enumerate(events)]
            texts = [json.dumps(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
            self.db.tick()
            workers, before = self.workers_cpu(), thread_cpu_s(pid)
            for text in texts:
                session.execute("SELECT rakam.collect_batch('costs', %s::text)", (text,))
            taken = thread_cpu_s(pid) - before
            self.db.tick()
            digests[kind].append((self.workers_cpu() - workers) / len(events) * 1e6)
            return taken / len(events) * 1e6

        for kind in kinds:
            send(kind)
            digests[kind].clear()
        cost = interleaved(self.repetitions, **{kind: lambda kind=kind: send(kind) for kind in kinds})
        digest = {kind: statistics.median(values) for kind, values in digests.items()}
        for kind, what in (
            ("identified", "with an `_id`"),
            ("mapped", "through a mapper in SQL"),
            ("wide", "with 100 more fields"),
        ):
            for who, taken in (("backend", cost), ("digest and merge, worker", digest)):
                self.table.add(
                    f"collect_batch text, {what}: {who} CPU per event (cost ratio)",
                    f"{taken[kind]:.1f} µs", f"without {taken['plain']:.1f} µs", taken[kind] / taken["plain"], "",
                )  # fmt: skip

    def bulk(self, names: list[str], events: list[dict]) -> None:
        """COPY and INSERT … SELECT of the same rows into a collection and into a heap table of the same types."""
        self.db.project("loaded")
        self.db.admin.execute("SELECT rakam.create_collection('loaded', 'departure')")
        for name, kind in FLIGHT_COLUMNS.items():
            self.db.admin.execute(
                "SELECT rakam.add_field('loaded', 'departure', %s, %s)", (name, kind.removesuffix(' COLLATE "C"'))
            )
        self.db.tick()
        self.db.admin.execute("CREATE TABLE heap_bulk (LIKE heap_batch)")
        columns = ", ".join(names)
        lines = "".join("\t".join("\\N" if e[n] is None else str(e[n]) for n in names) + "\n" for e in events)
        session = self.db.connect()
        pid = session.info.backend_pid

        def copy(table: str, form: str, data: str | bytes) -> float:
            before = cpu_s(pid)
            with (
                session.cursor() as cursor,
                cursor.copy(f"COPY {table} ({columns}) FROM STDIN (FORMAT {form})") as stream,
            ):
                stream.write(data)
            return (cpu_s(pid) - before) / len(events) * 1e6

        def insert(table: str) -> float:
            before = cpu_s(pid)
            session.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM heap_once")
            return (cpu_s(pid) - before) / len(events) * 1e6

        self.db.admin.execute("CREATE TABLE heap_once (LIKE heap_batch)")
        copy("heap_once", "text", lines)
        with session.cursor() as cursor, cursor.copy(f"COPY heap_once ({columns}) TO STDOUT (FORMAT binary)") as stream:
            rows = b"".join(bytes(block) for block in stream)
        for what, call in (
            ("COPY text", lambda table: copy(table, "text", lines)),
            ("COPY binary", lambda table: copy(table, "binary", rows)),
            ("INSERT … SELECT", insert),
        ):
            cost = interleaved(
                self.repetitions,
                ours=lambda call=call: call("loaded.departure"),
                heap=lambda call=call: call("heap_bulk"),
            )
            self.table.add(
                f"{what}, backend CPU per event (speed ratio)",
                f"{cost['ours']:.1f} µs", f"heap {cost['heap']:.1f} µs", cost["heap"] / cost["ours"], "≥ 1",
            )  # fmt: skip
        loaded = self.db.one("SELECT count(*) FROM loaded.departure")
        assert loaded == self.db.one("SELECT count(*) FROM heap_bulk"), "the two hold the same rows"
        workers_before = self.workers_cpu()
        self.db.flush("loaded")
        cpu = self.workers_cpu() - workers_before
        self.table.add("flush of what COPY stored, worker CPU per event", f"{cpu / loaded * 1e6:.1f} µs", "", None, "")

    def workers_cpu(self) -> float:
        """CPU of the resident worker, and of the task workers that have ended since the server started."""
        return sum(cpu_s(pid) for pid in self.workers()) + reaped_cpu_s(self.cluster.pid)

    def workers(self) -> list[int]:
        return [pid for pid, title in self.cluster.processes().items() if "rakam" in title]

    # -- files ---------------------------------------------------------------------------------------------------

    def files(self) -> None:
        """Flights over three years in no order: copy_from against COPY into a heap table and DuckDB writing Parquet."""
        folder = self.cluster.make_folder("history")
        flown = pyarrow.Table.from_pylist(self.events)
        self.duck.register("flown", flown)
        columns = ", ".join(["_user", *(c for c in FLIGHT_COLUMNS if c != "time_hour")])
        shift = "to_years((k % 3)::int - 1) + to_minutes((k * 7)::int)"
        self.duck.execute(
            f"""COPY (SELECT _time::timestamptz + {shift} AS _time, {columns}, time_hour::timestamptz + {shift} AS time_hour
                     FROM flown, range({HISTORY} // {len(self.events)} + 1) t(k) ORDER BY hash(k, flight, _time, _user)
                     LIMIT {HISTORY}) TO '{folder}/history.parquet' (FORMAT parquet, COMPRESSION zstd)"""
        )
        self.duck.unregister("flown")
        rows = f"read_parquet('{folder}/history.parquet')"
        self.duck.execute(f"COPY (SELECT * FROM {rows}) TO '{folder}/history.csv' (HEADER)")
        typed = ", ".join(
            f"{name} {kind}" for name, kind in {"_time": "timestamptz", "_user": "text", **FLIGHT_COLUMNS}.items()
        )
        names = ", ".join(["_time", "_user", *(c for c in FLIGHT_COLUMNS if c != "time_hour"), "time_hour"])
        taken = {}
        self.db.admin.execute(f"CREATE TABLE heap_history ({typed})")
        taken["heap"] = wall_s(
            lambda: self.db.admin.execute(
                f"COPY heap_history ({names}) FROM '{folder}/history.csv' (FORMAT csv, HEADER)"
            )
        )
        for kind in ("parquet", "csv"):
            project = f"history_{kind}"
            self.db.project(project, "lake")
            call = f"SELECT rakam.copy_from('{project}', 'departure', 'file://{folder}/history.{kind}')"
            before = self.workers_cpu()
            taken[kind] = wall_s(lambda call=call: self.db.admin.execute(call))
            cpu = self.workers_cpu() - before
            duck = wall_s(
                lambda kind=kind: self.duck.execute(
                    f"COPY (SELECT * FROM '{folder}/history.{kind}') TO '{folder}/copy.parquet' (FORMAT parquet, COMPRESSION zstd)"
                )
            )
            speed = f"{HISTORY / taken[kind]:,.0f}/s"
            goal = "≥ 3" if kind == "parquet" else "≥ 1.5"
            self.table.add(
                f"copy_from {kind}, {HISTORY:,} events", speed, f"COPY csv into heap {HISTORY / taken['heap']:,.0f}/s",
                taken["heap"] / taken[kind], goal,
            )  # fmt: skip
            self.table.add(
                f"copy_from {kind}", speed, f"DuckDB to Parquet {HISTORY / duck:,.0f}/s", duck / taken[kind], ""
            )
            self.table.add(f"copy_from {kind}, worker CPU per event", f"{cpu / HISTORY * 1e6:.2f} µs", "", None, "")
            before = self.workers_cpu()
            flush = wall_s(lambda project=project: self.db.flush(project))
            cpu = self.workers_cpu() - before
            files, small = self.db.admin.execute(
                "SELECT count(*), count(*) FILTER (WHERE bytes < pg_size_bytes(current_setting('rakam.target_file_size')) / 2)"
                " FROM rakam.data_files WHERE project = %s", (project,),
            ).fetchone()  # fmt: skip
            self.table.add(
                f"its flush, {flush:.0f} s: worker CPU per event", f"{cpu / HISTORY * 1e6:.2f} µs", "", None, ""
            )
            self.table.add("files; below half the target size", f"{files}; {small}", "", None, "≤ 40")
        shutil.rmtree(folder)

    # -- size ----------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Both data sets in files of the storage `lake`, and the flights in heap tables with and without indexes."""
        if self.loaded:
            return
        self.loaded = True
        self.json_bytes = {}
        for project, source in (
            ("flights", [("departure", event) for event in self.events]),
            ("shop", list(clickstream.events(CLICKS))),
        ):
            self.db.project(project, "lake")
            self.json_bytes[project] = 0
            for start in range(0, len(source), BATCH):
                items = [
                    json.dumps({"collection": c, "properties": p}, separators=(",", ":"))
                    for c, p in source[start : start + BATCH]
                ]
                self.json_bytes[project] += sum(
                    len(json.dumps(p, separators=(",", ":"))) + 1 for _, p in source[start : start + BATCH]
                )
                self.db.admin.execute("SELECT rakam.collect_batch(%s, %s)", (project, f"[{','.join(items)}]"))
            self.db.flush(project)
            print(f"  {project}: {len(source):,} events loaded", flush=True)
        for heap in ("heap_plain", "heap_indexed"):
            self.db.admin.execute(f"CREATE TABLE {heap} AS SELECT * FROM flights.departure")
        self.db.admin.execute("CREATE INDEX ON heap_indexed (_time)")
        self.db.admin.execute("CREATE INDEX ON heap_indexed (_user)")
        self.db.admin.execute("VACUUM ANALYZE heap_plain, heap_indexed")

    def paths(self, project: str, collection: str | None = None) -> list[str]:
        rows = self.db.all(
            "SELECT path FROM rakam.data_files WHERE project = %s AND (%s::text IS NULL OR collection = %s)",
            project, collection, collection,
        )  # fmt: skip
        return [path.removeprefix("file://") for (path,) in rows]

    def size(self) -> None:
        self.load()
        folder = Path(tempfile.mkdtemp())
        for project in ("flights", "shop"):
            ours = sum(Path(path).stat().st_size for path in self.paths(project))
            duck = csv = 0
            for (collection,) in self.db.all("SELECT collection FROM rakam.collections WHERE project = %s", project):
                source = f"read_parquet({self.paths(project, collection)!r}, union_by_name = true)"
                target = folder / f"{project}-{collection}.parquet"
                # The same rows and columns, but our internal one, in the order in which they are stored.
                self.duck.execute(
                    f"COPY (SELECT * EXCLUDE (_xid) FROM {source} ORDER BY _time) TO '{target}' (FORMAT parquet, COMPRESSION zstd)"
                )
                duck += target.stat().st_size
                self.duck.execute(
                    f"COPY (SELECT * EXCLUDE (_xid, _extra, _received_at) FROM {source}) TO '{target}.csv' (HEADER)"
                )
                csv += Path(f"{target}.csv").stat().st_size
            if project == "flights":
                csv = flights.csv_bytes()
            heap = self.db.one("SELECT pg_total_relation_size('heap_plain')") if project == "flights" else None
            megabytes = f"{ours / 1e6:.1f} MB"
            self.table.add(
                f"size, {project}",
                megabytes,
                f"JSON {self.json_bytes[project] / 1e6:.1f} MB",
                ours / self.json_bytes[project],
                "≤ 0.11",
            )
            self.table.add(f"size, {project}", megabytes, f"CSV {csv / 1e6:.1f} MB", ours / csv, "≤ 0.17")
            self.table.add(
                f"size, {project}", megabytes, f"DuckDB zstd Parquet {duck / 1e6:.1f} MB", ours / duck, "≤ 1.1"
            )
            if heap:
                self.table.add(f"size, {project}", megabytes, f"heap table {heap / 1e6:.1f} MB", ours / heap, "")
        shutil.rmtree(folder)

    # -- reading -------------------------------------------------------------------------------------------------

    def scan(self) -> None:
        self.load()
        session = self.db.connect()
        session.execute("SET TimeZone = 'UTC'")
        self.duck.execute(
            f"CREATE VIEW departure AS SELECT * FROM read_parquet({self.paths('flights')!r}, union_by_name = true)"
        )
        a_user = "N725MQ"
        queries = {
            "point: events of one user": f"SELECT count(*), sum(distance) FROM {{t}} WHERE _user = '{a_user}'",
            "point: a user that is not there": "SELECT count(*) FROM {t} WHERE _user = 'nobody'",
            "point: one minute": "SELECT flight, _user FROM {t} WHERE _time = '2013-07-04 12:00:00+00'",
            "range: one day, all columns": "SELECT * FROM {t} WHERE _time >= '2013-07-04' AND _time < '2013-07-05'",
            "range: one week, two sums": "SELECT count(*), sum(distance), sum(dep_delay) FROM {t} WHERE _time >= '2013-07-01' AND _time < '2013-07-08'",
            "range: one month by carrier": "SELECT carrier, count(*), avg(dep_delay) FROM {t} WHERE _time >= '2013-07-01' AND _time < '2013-08-01' GROUP BY 1",
            "full: filter on a number": "SELECT count(*) FROM {t} WHERE distance > 2000 AND origin = 'JFK'",
            "full: count": "SELECT count(*) FROM {t}",
        }
        for name, query in queries.items():

            def ours(query=query) -> float:
                return wall_s(lambda: session.execute(query.format(t="flights.departure")).fetchall())

            def heap(table: str, query=query) -> float:
                return wall_s(lambda: session.execute(query.format(t=table)).fetchall())

            def duck(query=query) -> float:
                return wall_s(lambda: self.duck.execute(query.format(t="departure")).fetchall())

            same = session.execute(query.format(t="heap_plain")).fetchall()
            assert sorted(map(str, same)) == sorted(
                map(str, session.execute(query.format(t="flights.departure")).fetchall())
            )
            taken = interleaved(
                max(self.repetitions, 7),
                ours=ours,
                plain=lambda: heap("heap_plain"),
                indexed=lambda: heap("heap_indexed"),
                duck=duck,
            )
            shown = f"{taken['ours'] * 1000:.1f} ms"
            for other, label, goal in (
                ("plain", "heap", ""),
                ("indexed", "heap with indexes", ""),
                ("duck", "DuckDB, same files", "≤ 1.0"),
            ):
                self.table.add(
                    f"time, {name}", shown, f"{label} {taken[other] * 1000:.1f} ms", taken["ours"] / taken[other], goal
                )

    def sources(self) -> None:
        sources.sources(self)

    def bucket(self) -> None:
        lake.bucket(self)

    def outage(self) -> None:
        lake.outage(self)

    def manifest(self) -> None:
        lake.many_files(self)

    def compact(self) -> None:
        """Bytes of files written per CPU-second: the flush of chunks, the merge of its files, DuckDB writing the same rows."""
        flushed_bytes = flushed_cpu = merged_bytes = merged_cpu = written_bytes = written_cpu = 0.0
        own = os.getpid()
        for repetition in range(self.repetitions):
            project = f"compacted{repetition}"
            self.db.project(project, "lake")
            self.db.admin.execute("SELECT rakam.create_collection(%s, 'departure')", (project,))
            # Six parts that lie over each other in time, as flushes of one day do.
            for part in range(6):
                events = self.events[part::6]
                for start in range(0, len(events), 5_000):
                    batch = [{"collection": "departure", "properties": e} for e in events[start : start + 5_000]]
                    self.db.admin.execute("SELECT rakam.collect_batch(%s, %s)", (project, json.dumps(batch)))
                self.db.tick()
                before = self.workers_cpu()
                self.db.flush(project)
                flushed_cpu += self.workers_cpu() - before
            flushed_bytes += self.bytes_of(project)
            parts = self.paths(project)
            before = self.workers_cpu()
            self.db.admin.execute("SELECT rakam.compact(%s)", (project,))
            merged_cpu += self.workers_cpu() - before
            merged_bytes += self.bytes_of(project)
            with tempfile.TemporaryDirectory() as folder:
                target = f"{folder}/all.parquet"
                before = cpu_s(own)
                # The merged files are gone from the manifest, and kept for rakam.file_retention.
                self.duck.execute(
                    f"COPY (SELECT * FROM read_parquet(?) ORDER BY _time) TO '{target}' (FORMAT parquet, COMPRESSION zstd)",
                    [parts],
                )
                written_cpu += cpu_s(own) - before
                written_bytes += Path(target).stat().st_size
        duck = written_bytes / written_cpu
        for what, size, cpu in (("flush", flushed_bytes, flushed_cpu), ("compaction", merged_bytes, merged_cpu)):
            ours = size / cpu
            self.table.add(
                f"{what}, files written per CPU-second (speed ratio)", f"{ours / 2**20:.1f} MiB",
                f"DuckDB, files to one sorted file {duck / 2**20:.1f} MiB", ours / duck, "",
            )  # fmt: skip

    def bytes_of(self, project: str) -> int:
        return one(self.db.admin, "SELECT sum(bytes)::int8 FROM rakam.data_files WHERE project = %s", project)

    def floor(self) -> None:
        """The least that a query costs: one event, warm."""
        self.db.project("floor")
        self.db.admin.execute("SELECT rakam.collect('floor', 'c', '{\"n\": 1}')")
        self.db.flush("floor")
        self.db.admin.execute("CREATE TABLE heap_floor AS SELECT * FROM floor.c")
        session = self.db.connect()

        def query(table: str) -> float:
            return wall_s(lambda: session.execute(f"SELECT n FROM {table} WHERE n = 1").fetchall()) * 1000

        for _ in range(20):
            query("floor.c")
        taken = interleaved(101, ours=lambda: query("floor.c"), theirs=lambda: query("heap_floor"))
        self.table.add("floor query, warm", f"{taken['ours']:.2f} ms", f"heap {taken['theirs']:.2f} ms", None, "≤ 5 ms")

    # -- doing nothing -------------------------------------------------------------------------------------------

    def idle(self) -> None:
        time.sleep(15)  # let the last digest, merge and vacuum end
        pids = self.workers()
        before = [(cpu_s(pid), wakeups(pid)) for pid in pids]
        time.sleep(IDLE_S)
        after = [(cpu_s(pid), wakeups(pid)) for pid in pids]
        cpu = sum(b[0] - a[0] for a, b in zip(before, after, strict=True)) / IDLE_S
        woken = sum(b[1] - a[1] for a, b in zip(before, after, strict=True)) / IDLE_S
        self.table.add(f"idle, {len(pids)} processes: CPU of one core", f"{cpu:.2%}", "", None, "≤ 0.5 %")
        self.table.add("idle: wake-ups", f"{woken:.1f}/s", "", None, "≤ 2/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ratios against heap tables and DuckDB.")
    parser.add_argument(
        "chapters", nargs="*", choices=[*CHAPTERS, []], help=f"some of {', '.join(CHAPTERS)}; all by default"
    )
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    Bench(arguments.repetitions).run(arguments.chapters or CHAPTERS)
