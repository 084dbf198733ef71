"""100,000 files in the manifest of one collection: a query of one day looks at that day's, by the index made for it; one of
all days looks at the statistics of a few at a time."""

from __future__ import annotations

import json
import time

import pytest
from harness import manifest
from harness.database import collect, one, refused
from harness.peak import SEEN_S, peak_bytes

FILES = 100_000
PROJECT = "many"
READER = "login_many_read"
# Of so many fields the statistics of a file are some 9 kB.
WIDE_FILES, WIDE_FIELDS, WIDE_VALUE = 5_000, 100, "x" * 40


@pytest.fixture(scope="module")
def many(db):
    db.project(PROJECT)
    # Real files, one a year, of events that no statistics of the others admit.
    for year in (2023, 2024, 2025):
        collect(db.admin, PROJECT, "hit", {"n": year, "_time": f"{year}-03-04T05:06:07Z"})
    db.flush(PROJECT)
    collect(db.admin, PROJECT, "hit", {"n": 5, "_time": "2022-01-01T00:00:00Z"})
    db.flush(PROJECT)
    assert db.one("SELECT count(*) FROM rakam.data_files WHERE project = %s", PROJECT) == 4
    manifest.fill(db, PROJECT, "hit", FILES)
    db.login(PROJECT, "read", name=READER).close()
    return db


def scans(db, session) -> dict[str, int]:
    """How often the session's transaction began to scan the table, and each of its indexes."""
    relations = db.all(
        "SELECT c.relname, c.oid FROM pg_class c WHERE c.relname IN ('data_file', 'data_file_period', 'data_file_collection')"
    )
    return {name: one(session, "SELECT pg_stat_get_xact_numscans(%s)", oid) for name, oid in relations}


def explained(session, query: str) -> dict:
    plan = one(session, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT json) {query}")[0]
    return plan["Plan"] | {"Planning Buffers": plan["Planning"]}


@pytest.mark.parametrize("analyzed", [False, True])
@pytest.mark.parametrize("role", ["postgres", READER])
def test_a_day_is_found_among_many_files(many, role, analyzed):
    if analyzed:
        many.admin.execute("ANALYZE rakam_internal.data_file, rakam_internal.data_file_stat")
    session = many.connect(role)
    for year in (2023, 2024, 2025):
        query = f"SELECT n FROM many.hit WHERE _time >= '{year}-03-04' AND _time < '{year}-03-05' AND n > 100"
        with session.transaction():
            assert session.execute(query).fetchall() == [(year,)]
            begun = scans(many, session)
        # One for each kind of period; the planner looks at the ends of the index, too.
        assert begun.pop("data_file_period") >= 3
        assert set(begun.values()) == {0}
        plan = explained(session, query)
        assert plan["Files Read"] == 1
        assert plan["Files"] == FILES + 4
        # 92 of the day, few of its month and year: the rest was skipped before anything of it was looked at.
        assert FILES - 120 < plan["Files Skipped by Period"] < FILES - 80
        # A row, its statistics and the way to both, of each that is left. Planning reads no file's row at all.
        pages = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        assert pages < 1500, json.dumps(plan)
        planning = plan["Planning Buffers"]
        assert planning["Shared Hit Blocks"] + planning["Shared Read Blocks"] < 300


def test_open_ranges_find_every_file(many):
    """The ends of time are no dates: what is open stays open."""
    plan = explained(many.admin, "SELECT n FROM many.hit WHERE _time < '2022-06-01' AND n > 0")
    assert (plan["Files Read"], plan["Files Skipped by Period"]) == (1, FILES + 3)
    plan = explained(many.admin, "SELECT n FROM many.hit WHERE _time > '2025-03-04 05:06:06' AND n > 100")
    assert plan["Files Read"] == 1  # the year's
    plan = explained(many.admin, "SELECT n FROM many.hit WHERE _time >= '2025-12-31' AND n > 100")
    assert plan["Files Read"] == 0
    assert plan["Files Skipped by Period"] > FILES - 120
    assert many.one("SELECT n FROM many.hit WHERE _time > '-infinity' AND _time < '2022-02-01'") == 5
    assert many.one("SELECT count(*) FROM many.hit WHERE _time = 'infinity'") == 0
    # Far apart from all files, before and after the dates that a month or a year can begin with.
    for day in ("4713-01-01 BC", "294276-12-31"):
        assert many.one(f"SELECT count(*) FROM many.hit WHERE _time = '{day}'") == 0


def test_without_a_range_of_time_statistics_skip_files(many):
    plan = explained(many.admin, "SELECT n FROM many.hit WHERE n > 100")
    assert (plan["Files"], plan["Files Read"]) == (FILES + 4, 3)
    assert (plan["Files Skipped by Period"], plan["Files Skipped by Statistics"]) == (0, FILES + 1)
    assert many.all("SELECT n FROM many.hit WHERE n > 100 ORDER BY n") == [(2023,), (2024,), (2025,)]
    session = many.connect()
    session.execute("SET statement_timeout = '20ms'")
    with refused("57014"):
        session.execute("SELECT count(*) FROM many.hit WHERE n > 100")


def test_statistics_of_many_files_take_little_memory(db):
    db.project("wide")
    collect(db.admin, "wide", "hit", {f"f{n}": WIDE_VALUE for n in range(WIDE_FIELDS)})
    db.flush("wide")
    db.wait_column("wide.hit", "f0")
    manifest.fill(db, "wide", "hit", WIDE_FILES)
    stored = "SELECT sum(octet_length(stats)) FROM rakam_internal.data_file_stat s JOIN rakam_internal.project p USING (project_id)"
    total = db.one(f"{stored} WHERE p.name = 'wide'")
    db.login("wide", "read", name="login_wide_read").close()

    def peak(condition: str) -> int:
        def read() -> None:
            session = db.connect("login_wide_read")
            time.sleep(SEEN_S)
            assert one(session, f"SELECT count(*) FROM wide.hit WHERE {condition}") == 0
            session.close()

        return peak_bytes(db.cluster, "login_wide_read", read).private

    took = peak("f0 = 'none'") - peak("_time < '1990-01-01'")
    assert took < total, f"{took >> 20} MB for {total >> 20} MB of statistics"
