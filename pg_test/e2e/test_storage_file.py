"""A `file://` storage: where files go, what they hold, and that DuckDB and pyarrow read the same from them as psql."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import duckdb
import psycopg
import pyarrow.compute
import pyarrow.parquet
import pytest
from harness.database import collect, collect_batch, notices_of, refused, wait_until

PROJECT = "acme"


@pytest.fixture(scope="module")
def lake(cluster, db) -> Path:
    folder = cluster.make_folder("lake")
    db.admin.execute(f"CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
    db.project(PROJECT, "lake")
    return folder


def files_of(db, collection: str) -> list[str]:
    paths = db.all("SELECT path FROM rakam.data_files WHERE collection = %s ORDER BY path", collection)
    assert all(path.startswith("file:///") for (path,) in paths)
    return [path.removeprefix("file://") for (path,) in paths]


def fill(db, collection: str, events: list[dict]) -> None:
    for start in range(0, len(events), 500):
        stored, rejected, _, errors = collect_batch(
            db.admin, PROJECT, [(collection, e) for e in events[start : start + 500]]
        )
        assert rejected == 0, errors[:3]
    db.flush(PROJECT, collection)


def test_creation_says_that_it_is_not_replicated(db, cluster):
    url = f"file://{cluster.make_folder('other-lake')}"
    told = notices_of(db.admin, f"CREATE SERVER other_lake FOREIGN DATA WRAPPER rakam OPTIONS (url '{url}')")
    assert any("not replicated" in notice.message for notice in told)


def test_files_are_where_the_manifest_says(db, lake):
    fill(db, "placed", [{"n": n, "_time": f"2026-01-{n % 28 + 1:02}T00:00:00Z"} for n in range(1_000)])
    paths = files_of(db, "placed")
    assert paths
    for path in paths:
        assert Path(path).is_relative_to(lake)
        assert Path(path).is_file()
    sizes = dict(db.all("SELECT path, bytes FROM rakam.data_files WHERE collection = 'placed'"))
    assert {f"file://{path}": Path(path).stat().st_size for path in paths} == sizes
    rows = sum(pyarrow.parquet.read_metadata(path).num_rows for path in paths)
    assert rows == 1_000 == db.one("SELECT count(*) FROM acme.placed")
    assert db.one("SELECT storage FROM rakam.projects WHERE project = 'acme'") == "lake"


def test_other_readers_agree(db, lake):
    events = [
        {
            "_user": f"u{n % 37}",
            "_id": f"i{n}",
            "_time": f"2026-02-{n % 28 + 1:02}T{n % 24:02}:00:00.{n % 1000:03}Z",
            "n": n,
            "flag": n % 3 == 0 if n % 5 else None,
            "text": f"größe {n % 11}" if n % 7 else None,
            "day": f"2026-03-{n % 28 + 1:02}",
            "at": f"2026-03-01T00:00:{n % 60:02}+02:00",
            "tags": ["a", None, f"t{n % 3}"],
            "scores": [n, n / 2],
            "deep": {"k": n % 4, "l": [1, {"m": None}]},
        }
        for n in range(3_000)
    ]
    fill(db, "read_by_others", events)
    paths = files_of(db, "read_by_others")
    columns = "count(*), count(DISTINCT _user), sum(n), count(flag), count(text), min(day), max(day)"
    reader = duckdb.connect()
    reader.execute("SET TimeZone = 'UTC'")
    theirs = reader.execute(f"SELECT {columns} FROM read_parquet(?)", [paths]).fetchone()
    ours = db.admin.execute(f"SELECT {columns} FROM acme.read_by_others").fetchone()
    assert theirs == ours
    by_user = "SELECT _user, count(*), sum(n), max(_time)::text FROM {} GROUP BY 1 ORDER BY 1"
    duck = reader.execute(by_user.format("read_parquet(?)"), [paths]).fetchall()
    psql = db.all("SELECT _user, count(*), sum(n), max(_time) FROM acme.read_by_others GROUP BY 1 ORDER BY 1")
    assert [row[:3] for row in duck] == [row[:3] for row in psql]
    table = pyarrow.parquet.read_table(paths)
    found = {row["_id"]: row for row in table.to_pylist()}
    mine = db.all("SELECT _id, _user, _time, n, flag, text, day, at, tags, scores, deep FROM acme.read_by_others")
    assert len(found) == len(mine) == 3_000
    names = ("_user", "_time", "n", "flag", "text", "day", "at", "tags", "scores")
    for identity, *values, deep in mine:
        row = found[identity]
        assert [row[name] for name in names] == values
        assert json.loads(row["deep"]) == deep


def test_parquet_is_made_for_pruning(db, lake):
    fill(
        db,
        "pruned",
        [{"_user": f"u{n}", "_id": f"i{n}", "n": n, "_time": 1_767_225_600_000 + n * 60_000} for n in range(5_000)],
    )
    for path in files_of(db, "pruned"):
        meta = pyarrow.parquet.read_metadata(path)
        group = meta.row_group(0)
        by_name = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
        assert by_name["n"].compression == "ZSTD"
        assert by_name["n"].statistics.has_min_max
        assert by_name["_time"].has_offset_index
        assert by_name["_time"].has_column_index
        schema = pyarrow.parquet.read_schema(path)
        ids = [field.metadata[b"PARQUET:field_id"] for field in schema]
        assert len(set(ids)) == len(ids)
        times = pyarrow.parquet.read_table(path, columns=["_time"])["_time"].to_pylist()
        assert times == sorted(times)
    plan = "\n".join(
        line
        for (line,) in db.all("EXPLAIN (ANALYZE, VERBOSE, COSTS OFF) SELECT n FROM acme.pruned WHERE _user = 'nobody'")
    )
    assert "Foreign Scan" in plan
    assert db.one("SELECT count(*) FROM acme.pruned WHERE _user = 'u77'") == 1
    assert db.one("SELECT count(*) FROM acme.pruned WHERE _user = 'nobody'") == 0


def test_periods_follow_the_volume(db, lake):
    """A day with enough events has a file of its own; thin days share a month's, thin months a year's."""
    busy = [{"n": n, "_time": "2026-05-05T12:00:00Z"} for n in range(10_000)]
    month = [{"n": n, "_time": f"2026-03-{n % 28 + 1:02}T12:00:00Z"} for n in range(11_000)]
    thin = [{"n": n, "_time": f"2025-{n % 12 + 1:02}-01T12:00:00Z"} for n in range(600)]
    fill(db, "periods", busy + month + thin)
    found = set(
        db.all("SELECT period, first_day::text, last_day::text FROM rakam.data_files WHERE collection = 'periods'")
    )
    assert found == {
        ("day", "2026-05-05", "2026-05-05"),
        ("month", "2026-03-01", "2026-03-31"),
        ("year", "2025-01-01", "2025-12-31"),
    }
    assert db.one("SELECT sum(n) FROM rakam.data_files WHERE collection = 'periods'") == 21_600
    assert db.one("SELECT count(*) FROM acme.periods WHERE _time >= '2026-01-01' AND _time < '2026-05-01'") == 11_000


def test_files_outside_the_range_are_not_opened(db, lake):
    for year in (2023, 2024, 2025):
        fill(db, "years", [{"n": n, "_time": f"{year}-06-01T00:00:00Z"} for n in range(100)])
    paths = files_of(db, "years")
    assert len(paths) == 3
    # A file that is gone hurts only the queries that need it.
    moved = [path for path in paths if "2023" in path or pyarrow.compute.min(read_times(path)).as_py().year == 2023]
    Path(moved[0]).rename(moved[0] + ".gone")
    try:
        assert db.one("SELECT count(*) FROM acme.years WHERE _time >= '2024-01-01'") == 200
        with refused("58P01"):
            db.admin.execute("SELECT sum(n) FROM acme.years")
    finally:
        Path(moved[0] + ".gone").rename(moved[0])
    assert db.one("SELECT sum(n) FROM acme.years") == 3 * 4_950


def read_times(path: str):
    return pyarrow.parquet.read_table(path, columns=["_time"])["_time"]


def test_dropped_projects_files_go(db, lake):
    db.project("leaving", "lake")
    for n in range(10):
        collect(db.admin, "leaving", "c", {"n": n})
    db.flush("leaving")
    path = db.one("SELECT path FROM rakam.data_files WHERE project = 'leaving'").removeprefix("file://")
    assert Path(path).exists()
    db.admin.execute("SET rakam.allow_project_drop = on")
    db.configure(file_retention=0)
    try:
        db.admin.execute("SELECT rakam.drop_project('leaving')")

        def gone() -> bool:
            db.tick()
            return not Path(path).exists()

        wait_until(gone, "the deletion of the project's file", pause_s=0.5)
    finally:
        db.admin.execute("RESET rakam.allow_project_drop")
        db.configure(file_retention=None)


@pytest.mark.parametrize(
    ("options", "sqlstate"),
    [
        ("url 'hdfs://namenode/x'", "0A000"),
        ("url 'ftp://x/y'", "0A000"),
        ("url 'not a url'", "22023"),
        ("nonsense 'x', url 'file:///tmp/x'", "22023"),
    ],
)
def test_servers_that_do_not_work_are_refused(db, lake, options, sqlstate):
    with pytest.raises(psycopg.Error) as caught:
        db.admin.execute(f"CREATE SERVER broken FOREIGN DATA WRAPPER rakam OPTIONS ({options})")
    # An unknown option of a wrapper has SQLSTATE HV00D in PostgreSQL's own wrappers.
    assert caught.value.sqlstate in (sqlstate, "HV00D"), caught.value
    assert caught.value.diag.message_hint


def test_a_storage_that_cannot_be_written_keeps_the_events(db, lake):
    for n in range(10):
        collect(db.admin, PROJECT, "blocked", {"n": n})
    db.flush(PROJECT, "blocked")
    aside = lake.with_name("lake-away")
    lake.rename(aside)
    lake.write_text("a file where the folder was")
    try:
        for n in range(10, 20):
            collect(db.admin, PROJECT, "blocked", {"n": n})
        with refused("58030"):
            db.flush(PROJECT, "blocked")
        # The digest goes on, whatever the storage does; a called tick tells of the storage all the same.
        with contextlib.suppress(psycopg.errors.IoError):
            db.tick()
        assert db.tiers(PROJECT, "blocked")["hot"] == 10
        assert db.one("SELECT count(*) FROM acme.blocked WHERE _time > now() + interval '1 day'") == 0
    finally:
        lake.unlink()
        aside.rename(lake)
    db.flush(PROJECT, "blocked")
    assert db.tiers(PROJECT, "blocked") == {"inbox": 0, "hot": 0, "cold": 20}
    assert db.one("SELECT sum(n) FROM acme.blocked") == 190
