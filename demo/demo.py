"""What rakam does, on real data: freshness, tiers, size, a query and its plan, isolation, files that others can read, a
bucket that goes away and comes back, Kafka with a consumer that is killed.

Project `flights` keeps 336,776 real departures in the default storage, inside Postgres; project `shop` keeps a generated
clickstream of 120,000 events in a folder (a `file://` storage); `web` one of 40,000 in a bucket (far.py); `stream` and `live`
have what came out of topics (stream.py). Everything shown is sent to the server as it is printed.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "pg_test")]

import clickstream  # noqa: E402
import duckdb  # noqa: E402
import far  # noqa: E402
import stream  # noqa: E402
from harness import flights  # noqa: E402
from harness.cluster import Cluster  # noqa: E402
from harness.database import Database  # noqa: E402
from show import note, title  # noqa: E402

CLICKS = 120_000
BATCH = 400
FRESHNESS_ROUNDS = 50

# The demo shows within a minute what otherwise takes its time: chunks after a second instead of thirty, new topics after a
# second instead of ten.
SETTINGS = {"rakam.digest_max_age": "1s", "rakam.source_refresh": "1s"}


class Demo:
    def __init__(self) -> None:
        self.cluster = Cluster("demo")
        self.cluster.start(SETTINGS)
        self.db = Database(self.cluster, "demo")
        # What was sent of each project.
        self.json_bytes: dict[str, int] = {}

    def psql(self, statement: str, user: str = "postgres") -> str:
        """Runs a statement in psql and shows both, an error included."""
        prompt = "demo=#" if user == "postgres" else f"demo ({user})=>"
        print(f"\033[2m{prompt}\033[0m {statement}", flush=True)
        done = subprocess.run(
            [
                *self.cluster.psql_command("demo", user),
                "-X",
                "-P",
                "pager=off",
                "-v",
                "VERBOSITY=verbose",
                "-c",
                statement,
            ],
            capture_output=True,
            text=True,
        )
        # With SQLSTATEs, without the server's source lines.
        told = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("LOCATION:")]
        text = "\n".join(told).replace("NOTICE:  00000: ", "NOTICE:  ")
        print(text.rstrip(), flush=True)
        return text

    def run(self) -> None:
        began = time.monotonic()
        self.prepare()
        self.freshness()
        self.load()
        self.tiers()
        self.size()
        self.query()
        self.isolation()
        self.files()
        far.chapter(self)
        stream.chapter(self)
        title("Health")
        self.psql('SELECT "check", status, detail FROM rakam.health()')
        events = self.db.one("SELECT sum(events) FROM rakam.stat_collection")
        title(f"Done: {events:,} events in {time.monotonic() - began:.0f} s. Go on with")
        print(f"   {' '.join(self.cluster.psql_command('demo'))}")
        note("SELECT origin, count(*), avg(dep_delay) FROM flights.departure GROUP BY 1;")
        note("stop it with: demo/run.sh stop")

    def prepare(self) -> None:
        title("Two projects: one inside Postgres, one in a folder of Parquet files")
        self.db.drop()
        self.db.create(extension=False)
        self.psql("CREATE EXTENSION rakam")
        lake = self.cluster.make_folder("lake")
        # Files of an earlier run belong to a database that is gone.
        for path in sorted(lake.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        self.psql(f"CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{lake}')")
        self.psql("SELECT project, write_key FROM rakam.create_project('flights')")
        self.psql("SELECT project, write_key FROM rakam.create_project('shop', 'lake')")
        self.db.login("shop", "read", name="shop_analyst")

    def freshness(self) -> None:
        title(
            "An event is there for the next statement: in its own transaction, and for every other session after commit"
        )
        writer, reader = self.db.connect(autocommit=False), self.db.connect()
        send = "SELECT rakam.collect('shop', 'hello', %s)"
        count = "SELECT count(*) FROM shop.hello WHERE n = %s"
        self.psql("SELECT rakam.create_collection('shop', 'hello')")
        self.db.admin.execute("SELECT rakam.add_field('shop', 'hello', 'n', 'bigint')")
        self.db.tick()
        latencies_ms = []
        for n in range(FRESHNESS_ROUNDS):
            writer.execute(send, (json.dumps({"n": n}),))
            inside = writer.execute(count, (n,)).fetchone()[0]
            before = reader.execute(count, (n,)).fetchone()[0]
            committed = time.perf_counter()
            writer.commit()
            after = reader.execute(count, (n,)).fetchone()[0]
            latencies_ms.append((time.perf_counter() - committed) * 1000)
            if (inside, before, after) != (1, 0, 1):
                sys.exit(
                    f"event {n}: {inside} inside its transaction, {before} elsewhere before the commit, {after} after it"
                )
        note(
            f"{FRESHNESS_ROUNDS} events: each seen by its own transaction, by nobody else before the commit, by everybody after it"
        )
        note(
            f"from before the commit to the other session's answer: median {statistics.median(latencies_ms):.1f} ms,"
            f" slowest {max(latencies_ms):.1f} ms"
        )

    def load(self) -> None:
        title(f"Sending {flights.COUNT:,} flights and {CLICKS:,} clicks, {BATCH} in a call, while the tiers fill")
        departures = ((flights.COLLECTION, properties) for properties in flights.events())
        self.send("flights", departures, flights.COUNT)
        self.send("shop", clickstream.events(CLICKS), CLICKS)

    def send(self, project: str, events: Iterable[tuple[str, dict]], total: int) -> list[float]:
        """Sends events in batches, one transaction each, and returns how long each took, in milliseconds."""
        connection = self.db.connect()
        began = shown = time.monotonic()
        sent = 0
        taken_ms = []
        for batch in batches(events, BATCH):
            items = []
            for collection, properties in batch:
                text = json.dumps(properties, separators=(",", ":"))
                self.json_bytes[project] = self.json_bytes.get(project, 0) + len(text) + 1
                items.append(f'{{"collection":"{collection}","properties":{text}}}')
            before = time.perf_counter()
            stored, rejected = connection.execute(
                "SELECT stored, rejected FROM rakam.collect_batch(%s, %s)", (project, f"[{','.join(items)}]")
            ).fetchone()
            taken_ms.append((time.perf_counter() - before) * 1000)
            if rejected:
                sys.exit(f"{rejected} events of project {project} were rejected")
            sent += stored
            if time.monotonic() - shown >= 1 or sent == total:
                shown = time.monotonic()
                inbox, hot, cold = self.db.admin.execute(
                    "SELECT coalesce(sum(inbox_events), 0), coalesce(sum(hot_events), 0), coalesce(sum(cold_events), 0)"
                    " FROM rakam.stat_collection WHERE project = %s",
                    (project,),
                ).fetchone()
                note(
                    f"{project}: {sent:,} of {total:,} sent, {sent / (shown - began):,.0f}/s;"
                    f" inbox {inbox:,}, chunks {hot:,}, files {cold:,}"
                )
        return taken_ms

    def tiers(self) -> None:
        title("Digest and flush: the same events, now in data files; no query ever sees a difference")
        before = self.db.one("SELECT count(*) FROM flights.departure")
        self.psql("SELECT * FROM rakam.flush()")
        after = self.db.one("SELECT count(*) FROM flights.departure")
        note(f"flights.departure has {before:,} events before the flush and {after:,} after it")
        if (before, after) != (flights.COUNT, flights.COUNT):
            sys.exit(f"{flights.COUNT:,} flights were sent")
        self.psql(
            "SELECT project, collection, events, inbox_events, hot_events, cold_events, files, pg_size_pretty(cold_bytes) AS size"
            " FROM rakam.stat_collection ORDER BY 1, 2"
        )

    def size(self) -> None:
        title("Size of the flights, the columns rakam adds included")
        stored = self.db.one("SELECT sum(bytes) FROM rakam.data_files WHERE project = 'flights'")
        for name, size in (("JSON", self.json_bytes["flights"]), ("CSV", flights.csv_bytes())):
            note(f"{name:5} {size / 1e6:7.1f} MB   {size / float(stored):4.1f} times the data files")
        note(f"files {float(stored) / 1e6:7.1f} MB")

    def query(self) -> None:
        title("A query reads files and recent events through one table")
        self.psql(
            "SELECT carrier, count(*) AS flights, round(avg(dep_delay)::numeric, 1) AS delay FROM flights.departure"
            " WHERE _time >= '2013-07-01' AND _time < '2013-08-01' AND origin = 'JFK' GROUP BY 1 ORDER BY 2 DESC LIMIT 5"
        )
        self.psql(
            "EXPLAIN (ANALYZE, VERBOSE, COSTS OFF) SELECT count(*), avg(dep_delay) FROM flights.departure"
            " WHERE _time >= '2013-07-01' AND _time < '2013-08-01' AND origin = 'JFK'"
        )

    def isolation(self) -> None:
        title("The analyst of project shop and the flights")
        analyst = "shop_analyst"
        self.psql("SELECT count(*) FROM shop.pageview", analyst)
        told = self.psql("SELECT count(*) FROM flights.departure", analyst)
        if "42501" not in told:
            sys.exit("the analyst of shop could read the flights")
        note("nor by a foreign table of one's own that names the other project:")
        self.db.admin.execute(f"CREATE SCHEMA own AUTHORIZATION {analyst}")
        self.db.admin.execute(f"GRANT USAGE ON FOREIGN SERVER rakam TO {analyst}")
        self.psql(
            "CREATE FOREIGN TABLE own.forged (_time timestamptz) SERVER rakam"
            " OPTIONS (project 'flights', collection 'departure')",
            analyst,
        )
        told = self.psql("SELECT count(*) AS flights_seen FROM own.forged", analyst)
        if "\n            0\n" not in told:
            sys.exit("a forged foreign table showed another project's events")
        self.db.admin.execute(f"REVOKE USAGE ON FOREIGN SERVER rakam FROM {analyst} CASCADE")

    def files(self) -> None:
        title("The files of project shop, read by DuckDB without Postgres")
        self.psql(
            "SELECT collection, period, first_day, last_day, n, pg_size_pretty(bytes) AS size, right(path, 44) AS path"
            " FROM rakam.data_files WHERE project = 'shop' ORDER BY 1, 3 LIMIT 6"
        )
        paths = [
            path.removeprefix("file://")
            for (path,) in self.db.all(
                "SELECT path FROM rakam.data_files WHERE project = 'shop' AND collection = 'purchase'"
            )
        ]
        question = "SELECT count(*), round(sum(amount)::numeric, 2), count(DISTINCT _user) FROM "
        theirs = (
            duckdb.connect()
            .execute("SELECT count(*), round(sum(amount), 2), count(DISTINCT _user) FROM read_parquet(?)", [paths])
            .fetchone()
        )
        ours = self.db.admin.execute(f"{question}shop.purchase").fetchone()
        note(f"purchases, revenue, buyers: DuckDB {theirs}, psql ({ours[0]}, {ours[1]}, {ours[2]})")
        if [float(value) for value in theirs] != [float(value) for value in ours]:
            sys.exit("DuckDB and psql disagree")


def batches(events: Iterable[tuple[str, dict]], size: int) -> Iterator[list[tuple[str, dict]]]:
    iterator = iter(events)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


if __name__ == "__main__":
    Demo().run()
