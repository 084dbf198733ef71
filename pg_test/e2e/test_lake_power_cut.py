"""A `file://` storage through power cuts: at each, every byte and name that was not fsynced is taken back.

Processes die at a named step of a flush, a rewrite or a deletion, or all of them at a random moment; PostgreSQL's own files
keep what it wrote, as they would. Afterwards no acknowledged event is lost, none is there twice, no object is missing or
cut short, and none is left that nobody knows.

RAKAM_POWER_CUTS (default 4) sets the number of seeded runs; the full run is 100 (its ledger: power_cuts.txt).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psycopg
from harness.cluster import Cluster
from harness.database import Database, wait_until
from harness.unsynced import Unsynced

RUNS = int(os.environ.get("RAKAM_POWER_CUTS", "4"))
LEDGER = os.environ.get("RAKAM_POWER_CUT_LEDGER")

# Where a process can die.
POINTS = [
    "flush.after_intent", "flush.after_upload", "flush.before_commit", "rewrite.after_intent", "rewrite.after_upload",
    "rewrite.before_commit", "gc.after_object", "owner.before_put", "owner.after_put", "check.after_list",
]  # fmt: skip

SETTINGS = {
    "rakam.file_retention": "0",
    "rakam.min_file_events": "50",
    # A process that dies takes the server with it, as the power would.
    "restart_after_crash": "off",
}

WRITES = """
import os, sys
def put(name, data, sync):
    fd = os.open(name, os.O_CREAT | os.O_WRONLY)
    os.write(fd, data)
    if sync:
        os.fsync(fd)
    os.close(fd)
def sync(folder):
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
root = sys.argv[1]
put(root + "/whole", b"12345", True)
put(root + "/replaced", b"old", True)
put(root + "/removed", b"kept", True)
put(root + "/empty", b"12345", False)
sync(root)
put(root + "/nameless", b"12345", True)
put(root + "/new", b"new", True)
os.rename(root + "/new", root + "/replaced")
os.unlink(root + "/removed")
os.mkdir(root + "/sub")
put(root + "/sub/x", b"12345", True)
sync(root + "/sub")
os.link(root + "/whole", root + "/linked")
"""


def test_the_harness_takes_back_what_was_not_synced(cluster):
    """The tool itself: else the test below would prove nothing."""
    fake = Cluster(f"{cluster.name}-cut")
    fake.destroy()
    root = fake.make_folder("storage")
    tool = Unsynced(fake, root)
    environment = {**os.environ, **fake.server_environment}
    subprocess.run([sys.executable, "-c", WRITES, str(root)], env=environment, check=True)
    names = {"whole", "replaced", "empty", "nameless", "sub", "linked"}
    assert {path.name for path in root.iterdir()} == names

    class Everything(random.Random):
        def choice(self, options):
            return options[0]

    assert tool.cut(Everything())[1] == 1
    assert {path.name: path.read_text() for path in root.iterdir()} == {
        "whole": "12345", "replaced": "old", "removed": "kept", "empty": "",
    }  # fmt: skip
    fake.destroy()


class Load(threading.Thread):
    """Collects until the server is gone, and remembers what was acknowledged."""

    def __init__(self, db: Database, first: int, rng: random.Random):
        super().__init__(daemon=True)
        self.db, self.rng = db, rng
        self.next = first
        self.acknowledged: list[int] = []
        self.unknown: list[int] = []
        self.ended = threading.Event()

    def run(self) -> None:
        numbers: list[int] = []
        try:
            with self.db.cluster.connect(self.db.name) as session:
                while not self.ended.is_set():
                    numbers = list(range(self.next, self.next + self.rng.choice([1, 20, 200])))
                    self.next += len(numbers)
                    session.execute("SELECT rakam.collect_batch('acme', %s)", (events(numbers),))
                    self.acknowledged += numbers
                    numbers = []
                    time.sleep(0.01)
        except psycopg.Error:
            self.unknown += numbers


def events(numbers: list[int]) -> str:
    """Over three months, so that a flush writes several files."""
    return json.dumps(
        [
            {"collection": "seen", "properties": {"n": n, "_time": f"2026-0{n % 3 + 1}-{n % 28 + 1:02}T00:00:00Z"}}
            for n in numbers
        ]
    )


def test_nothing_is_lost_by_power_cuts(private_cluster, seed):
    cluster = private_cluster("cuts", SETTINGS)
    folder = cluster.make_folder("storage")
    tool = Unsynced(cluster, folder)
    cluster.restart(SETTINGS_OF_ALL := {**SETTINGS, "rakam.digest_interval": "100ms"})
    db = Database(cluster, "cuts").create()
    db.admin.execute(f"CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.project("acme", "lake")
    acknowledged: set[int] = set()
    possible: set[int] = set()
    told: Counter[str] = Counter()
    for run in range(RUNS):
        rng = random.Random(f"{seed}/{run}")
        point = POINTS[run % len(POINTS)] if rng.random() < 0.8 else None
        what = f"seed {seed}, run {run}, {point or 'all processes'}"
        load = Load(db, run * 100_000, rng)
        load.start()
        die(db, cluster, rng, point, run)
        load.ended.set()
        load.join(30)
        acknowledged.update(load.acknowledged)
        possible.update(load.unknown)
        db.close()
        names, cut = tool.cut(rng)
        told["names taken back"] += names
        told["files cut"] += cut
        told[point or "all processes"] += 1
        cluster.start(SETTINGS_OF_ALL)
        found = Counter(n for (n,) in db.all("SELECT n FROM acme.seen"))
        lost = acknowledged - found.keys()
        doubled = [n for n, times in found.items() if times > 1]
        invented = found.keys() - acknowledged - possible
        assert not (lost or doubled or invented), f"{what}: {len(lost)} lost, {doubled[:5]} doubled, {invented}"
        twice = "SELECT key FROM acme.trimmed GROUP BY 1 HAVING count(*) > 1"
        assert db.one("SELECT to_regclass('acme.trimmed')") is None or db.all(twice) == [], what
        # What came from an unanswered call is a fact from now on.
        acknowledged.update(found.keys())
        problems = [row for row in check(db) if row[1] != "orphan"]
        assert problems == [], f"{what}: {problems}"
        db.flush("acme")
        check(db)
        db.tick()
        assert check(db) == [], what
        # The background merges files meanwhile: what they were made of goes with the next round.
        wait_until(lambda: settled(db, folder), f"{what}: the files of the manifest and no others")
        assert db.one("SELECT owner FROM rakam.stat_lake WHERE storage = 'lake'") == "this database", what
        told["events"] = len(acknowledged)
    print(dict(told))
    if LEDGER:
        with open(LEDGER, "a") as ledger:
            ledger.write(f"seed {seed}, {RUNS} runs: 0 lost, 0 doubled, 0 missing, 0 orphans; {dict(told)}\n")
    db.close()


def die(db: Database, cluster: Cluster, rng: random.Random, point: str | None, run: int) -> None:
    """Works on the collection until the server dies."""
    time.sleep(rng.uniform(0.1, 0.6))
    if point is None:
        threading.Timer(rng.uniform(0.2, 1.5), cluster.kill9_postmaster).start()
    turn = itertools.count()

    def dead() -> bool:
        if cluster.running and cluster.processes():
            with contextlib.suppress(psycopg.Error):
                work(db, f"{run}-{next(turn)}", point)
        return not cluster.running or not cluster.processes()

    # The background may do what a step is there for before it has read that it is to die of it: so more than once.
    wait_until(dead, f"the death of the server at {point}", 120, 0.1)
    db.close()
    auto = cluster.data / "postgresql.auto.conf"
    auto.write_text("".join(line for line in auto.read_text().splitlines(True) if "failpoint" not in line))


def work(db: Database, turn: str, point: str | None) -> None:
    """Files to be written anew, and one to be deleted; then every step at which a process can die."""
    db.flush("acme")
    trimmed = [{"collection": "trimmed", "properties": {"key": f"{turn}-{k}", "k": k}} for k in range(20)]
    db.admin.execute("SELECT rakam.collect_batch('acme', %s)", (json.dumps(trimmed),))
    db.flush("acme", "trimmed")
    db.admin.execute("SELECT rakam.collect('acme', 'doomed', '{\"n\": 1}')")
    db.flush("acme", "doomed")
    if point is not None:
        db.admin.execute("UPDATE rakam_internal.storage_state SET renewed_at = now() - interval '1 hour'")
        db.admin.execute(f"ALTER SYSTEM SET rakam.failpoint = '{point}=exit'")
        db.admin.execute("SELECT pg_reload_conf()")
    db.admin.execute("SELECT rakam.drop_collection('acme', 'doomed')")
    db.admin.execute("SELECT rakam.delete_events('acme', 'trimmed', 'k >= 10')")
    for _ in range(3):
        db.flush("acme")
        db.tick()
        check(db)


def settled(db: Database, folder: Path) -> bool:
    db.tick()
    return objects(folder) == {path for (path,) in db.all("SELECT path FROM rakam_internal.data_file")}


def check(db: Database) -> list[tuple]:
    return db.all("SELECT path, problem, bytes FROM rakam.check_storage('lake')")


def objects(folder: Path) -> set[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if not path.startswith("_rakam/")}
