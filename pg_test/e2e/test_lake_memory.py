"""What compaction and `rakam.rebuild_catalog` cost: memory that does not grow with the data, and how often bytes are written.

RAKAM_LAKE_MEMORY_MB (default 9; the full run is 3,000) is about how large the larger of the two compactions is, in files of
a collection; RAKAM_LAKE_MEMORY_TARGET (1MB; 256MB) their target size. RAKAM_LAKE_MEMORY_FILES (300; 10,000) is how many
files are rebuilt, RAKAM_LAKE_MEMORY_FLUSHES (40; 1,000) how many small flushes of a day are compacted behind them. The full
run takes half an hour; its numbers are in benches/README.md.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pyarrow.parquet
import pytest
from harness.cluster import Cluster
from harness.database import Database, collect_batch, wait_until
from harness.numbered import make
from harness.peak import SEEN_S, Peak, peak_bytes

DATA_MB = int(os.environ.get("RAKAM_LAKE_MEMORY_MB", "9"))
TARGET = os.environ.get("RAKAM_LAKE_MEMORY_TARGET", "1MB")
FILES = int(os.environ.get("RAKAM_LAKE_MEMORY_FILES", "300"))
FLUSHES = int(os.environ.get("RAKAM_LAKE_MEMORY_FLUSHES", "40"))
MIB = 1 << 20
# The worker of a call.
TASK = "rakam task"
# What the code says of itself (crates/lake/src/merge.rs): batches of all inputs; of each input and column one page and a
# dictionary; of each file being written a row group.
BATCHES = 64 * MIB
PAGE, DICTIONARY, ROW_GROUP = 1 * MIB, 4 * MIB, 128 * MIB
MAX_INPUTS = 64
WRITTEN_AT_ONCE = 3
# An allocator keeps some of what was given back.
ALLOCATOR = 1.25
# Of a description and a list, a file (crates/lake/src/describe.rs); what is read of files at a time, and their ids.
PER_FILE = 1024
READ_AT_ONCE = 16 * MIB
# A flush that would write more files than so many takes coarser periods.
DAYS = 32
# Bytes of an event of `fill` in a file: hexadecimal digits compress to half.
EVENT_BYTES = 80


@pytest.fixture(scope="module")
def measured(request):
    """A cluster in which nothing is deleted, so that every file that was ever written can be counted."""
    from conftest import CLUSTER, SETTINGS

    cluster = Cluster(f"{CLUSTER}-memory")
    cluster.destroy()
    own = {"rakam.file_retention": "1d", "rakam.target_file_size": TARGET, "rakam.min_file_events": "1"}
    yield cluster.start({**SETTINGS, **own})
    cluster.destroy()


@pytest.fixture
def lake(measured, request):
    db = Database(measured, "memory")
    db.drop()
    db.create()
    folder = Path(measured.make_folder(f"storage-{request.node.name}"))
    db.admin.execute(f"CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.project("acme", "lake")
    yield db, folder
    db.configure(max_files_per_day=None)
    db.drop()


def paths(db: Database, collection: str) -> list[str]:
    found = db.all("SELECT path FROM rakam.data_files WHERE collection = %s ORDER BY path", collection)
    return [path.removeprefix("file://") for (path,) in found]


def peak_of(db: Database, call) -> Peak:
    """What the worker of a call takes at most; it stays until it has been seen."""
    db.admin.execute(f"ALTER DATABASE {db.name} SET rakam.failpoint = 'task.after_reply=sleep({int(SEEN_S * 1000)})'")
    try:
        peak = peak_bytes(db.cluster, TASK, call)
    finally:
        db.admin.execute(f"ALTER DATABASE {db.name} RESET rakam.failpoint")
    assert all(peak), "the worker has not been seen"
    return peak


def idle_worker(db: Database) -> Peak:
    """What a worker takes that has nothing to do."""
    return peak_of(db, db.tick)


def fill(db: Database, collection: str, megabytes: int, parts: int) -> None:
    """Events of one day that hardly compress, in files that lie over each other in time."""
    make(db, "acme", collection)
    for name in "abcd":
        db.admin.execute("SELECT rakam.add_field('acme', %s, %s, 'text')", (collection, name))
    db.tick()
    rows = megabytes * MIB // EVENT_BYTES // parts
    for part in range(parts):
        db.admin.execute(
            f"INSERT INTO acme.{collection} (_time, _user, n, a, b, c, d)"
            " SELECT '2026-03-03T00:00:00Z'::timestamptz + i %% 86000 * '1 second'::interval, 'u' || i %% 1000, i,"
            " md5(i::text), md5('b' || i), md5('c' || i), md5('d' || i) FROM generate_series(%s::bigint, %s::bigint) i",
            (part * rows, (part + 1) * rows - 1),
        )
        db.flush("acme", collection)


def promised(files: list[str], target: int) -> int:
    """The memory that merging these files may take by what the code says, whatever the order of the merges: of inputs
    those that need the most."""
    inputs = []
    for path in files:
        metadata = pyarrow.parquet.read_metadata(path)
        columns = [0] * metadata.num_columns
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                size = metadata.row_group(group).column(column).total_uncompressed_size
                columns[column] = max(columns[column], size)
        inputs.append(sum(min(size, PAGE + DICTIONARY) for size in columns))
    read = sum(sorted(inputs)[-MAX_INPUTS:])
    # A file is closed once it has the target's size, give or take a row group in encoded form.
    written = WRITTEN_AT_ONCE * (target + min(ROW_GROUP, target))
    return int((BATCHES + read + written) * ALLOCATOR)


def test_memory_of_compaction(measured, lake):
    """Within what the code promises, and no more for a collection that is three times as large."""
    db, _ = lake
    target = int(db.one("SELECT pg_size_bytes(current_setting('rakam.target_file_size'))"))
    # Nothing is merged before it is measured.
    db.configure(max_files_per_day=1_000)
    idle = idle_worker(db)
    taken = {}
    for collection, megabytes in (("small", DATA_MB // 3), ("large", DATA_MB)):
        fill(db, collection, megabytes, max(4, megabytes * MIB // (target // 4)))
        before = paths(db, collection)
        bound = promised(before, target)
        size = sum(Path(path).stat().st_size for path in before)
        events = db.one(f"SELECT count(*) FROM acme.{collection}")
        call = f"SELECT rakam.compact('acme', '{collection}')"
        peak = peak_of(db, lambda call=call: db.admin.execute(call))
        more = peak.beyond(idle)
        taken[collection] = more.resident
        after = paths(db, collection)
        assert len(after) < len(before)
        assert db.one(f"SELECT count(*) FROM acme.{collection}") == events
        print(
            f"{collection}: {len(before)} files of {size / MIB:.0f} MiB to {len(after)}; a worker takes"
            f" {idle.resident / MIB:.0f} MiB, compaction {more.resident / MIB:.0f} MiB more, promised {bound / MIB:.0f}"
        )
        assert more.resident <= bound
    # Merges are bounded by the target: of more files there are more of them, not larger ones.
    assert taken["large"] <= 1.5 * taken["small"] + 32 * MIB


def test_memory_of_a_rebuilt_catalog(measured, lake):
    db, folder = lake
    db.configure(max_files_per_day=1_000)
    make(db, "acme", "daily")
    db.tick()
    for first in range(0, FILES, DAYS):
        db.admin.execute(
            "INSERT INTO acme.daily (_time, n)"
            " SELECT '2023-01-01T12:00:00Z'::timestamptz + i %% 1000 * '1 day'::interval, i"
            " FROM generate_series(%s::int, %s::int) i",
            (first, min(FILES, first + DAYS) - 1),
        )
        db.flush("acme")
    files = db.one("SELECT count(*) FROM rakam.data_files")
    assert files == FILES
    # Their description is written behind the flush; it is complete with a tick.
    db.tick()
    db.drop()
    db.create()
    db.admin.execute(f"CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    idle = idle_worker(db)
    peak = peak_of(db, lambda: db.admin.execute("SELECT rakam.rebuild_catalog('lake')"))
    assert db.one("SELECT count(*) FROM rakam.data_files") == files
    assert db.one("SELECT sum(events) FROM rakam.stat_collection") == FILES
    bound = READ_AT_ONCE + files * PER_FILE
    more = peak.beyond(idle)
    print(
        f"{files} files: a worker takes {idle.private / MIB:.0f} MiB of its own, rebuild_catalog {more.private / MIB:.1f} MiB"
        f" more, promised {bound / MIB:.1f}; with shared memory {more.resident / MIB:.1f} MiB more"
    )
    # The rest are shared buffers with the rows that it writes.
    assert more.private <= bound


def test_bytes_that_are_written(measured, lake):
    """Small flushes of one day, compacted in the background: how many bytes are written for one of them."""
    db, folder = lake
    make(db, "acme", "page")
    db.tick()
    flushed = 0
    smallest = math.inf
    for number in range(FLUSHES):
        events = [
            ("page", {"n": number * 50 + n, "text": f"{number * n:x}", "_time": "2026-03-03T10:00:00Z"})
            for n in range(50)
        ]
        assert collect_batch(db.admin, "acme", events)[0] == len(events)
        ((_, _, _, size),) = db.flush("acme", "page")
        flushed += size
        smallest = min(smallest, size)
    most = db.one("SELECT current_setting('rakam.max_files_per_day')::int")
    wait_until(lambda: len(paths(db, "page")) <= most, "few files")
    written = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    half = db.one("SELECT pg_size_bytes(current_setting('rakam.target_file_size')) / 2")
    # crates/lake/src/compaction.rs
    factor = ((most + 1) * half / smallest) ** (1 / most)
    times = factor * math.log(half / smallest)
    print(
        f"{FLUSHES} flushes, {flushed:,} bytes of files, {written:,} bytes written: {written / flushed:.1f} times;"
        f" promised at most {1 + times:.1f} times until a file is not small any more"
    )
    assert written / flushed <= 1 + times
    assert db.one("SELECT count(*) FROM acme.page") == FLUSHES * 50
