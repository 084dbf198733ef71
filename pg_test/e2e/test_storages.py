"""One suite for every kind of storage: what is flushed, read, deleted, written anew and collected as garbage is the same."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow.fs
import pyarrow.parquet
import pytest
from harness.buckets import create_storage
from harness.database import collect_batch, wait_until


class Place(NamedTuple):
    project: str
    storage: str
    url: str
    # Path below the storage's root → size, of what lies there.
    objects: Callable[[], dict[str, int]]
    # To read it with pyarrow, and the root there; None: inside Postgres.
    filesystem: pyarrow.fs.FileSystem | None
    root: str


def local(db) -> Place:
    def objects() -> dict[str, int]:
        return dict(db.all("SELECT path, sum(length(data))::int8 FROM rakam_internal.local_object GROUP BY 1"))

    return Place("of_local", "rakam_local", "", objects, None, "")


def directory(cluster, db) -> Place:
    folder: Path = cluster.make_folder("storages")
    create_storage(db.admin, "directory", {"url": f"file://{folder}"})

    def objects() -> dict[str, int]:
        found = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        return {path: size for path, size in found.items() if not path.startswith("_rakam/")}

    return Place("of_directory", "directory", f"file://{folder}/", objects, pyarrow.fs.LocalFileSystem(), str(folder))


def bucket(db, s3, name: str) -> Place:
    there = s3.storage(f"storages/{name}")
    there.create(db.admin, name)
    root = f"{s3.bucket}/{there.prefix}"
    return Place(f"of_{name}", name, f"{there.url}/", there.objects, there.filesystem, root)


@pytest.fixture(scope="module", params=["local", "directory", "moto", "strict"])
def place(request, cluster, db) -> Place:
    if request.param == "local":
        made = local(db)
    elif request.param == "directory":
        made = directory(cluster, db)
    elif request.param == "moto":
        made = bucket(db, request.getfixturevalue("s3"), "moto")
    else:
        made = bucket(db, request.getfixturevalue("s3_strict"), "strict")
    db.project(made.project, made.storage)
    return made


@pytest.fixture(scope="module", autouse=True)
def no_retention(db):
    db.admin.execute("ALTER SYSTEM SET rakam.file_retention = 0")
    db.admin.execute("SELECT pg_reload_conf()")
    yield
    db.admin.execute("ALTER SYSTEM RESET rakam.file_retention")
    db.admin.execute("SELECT pg_reload_conf()")


def fill(db, place: Place, collection: str, events: list[dict]) -> None:
    for start in range(0, len(events), 500):
        part = [(collection, event) for event in events[start : start + 500]]
        _, rejected, _, errors = collect_batch(db.admin, place.project, part)
        assert rejected == 0, errors[:3]
    db.flush(place.project, collection)


def manifest(db, place: Place) -> dict[str, int]:
    """The project's files as the manifest has them: path below the storage's root → size."""
    found = db.all("SELECT path, bytes FROM rakam.data_files WHERE project = %s", place.project)
    assert all(path.startswith(place.url) for path, _ in found)
    return {path.removeprefix(place.url): size for path, size in found}


def nothing_else(db, place: Place) -> None:
    """After garbage was collected there is what the manifest says, with its sizes."""

    def clean() -> bool:
        db.tick()
        return of_project(place) == manifest(db, place)

    wait_until(clean, "the objects of the manifest and no others", 30, 0.2)


def of_project(place: Place) -> dict[str, int]:
    return {path: size for path, size in place.objects().items() if path.startswith(f"{place.project}/")}


def test_from_flush_to_garbage(db, place):
    events = [
        {"n": n, "_user": f"u{n % 20}", "_time": f"2026-0{n % 3 + 1}-{n % 28 + 1:02}T00:00:00Z", "text": f"größe {n}"}
        for n in range(3_000)
    ]
    fill(db, place, "c", events)
    assert of_project(place) == manifest(db, place) != {}
    table = f"{place.project}.c"
    query = f"SELECT count(*), sum(n), count(DISTINCT _user), min(text) FROM {table}"
    whole = db.admin.execute(query).fetchone()
    assert whole == (3_000, 4_498_500, 20, "größe 0")
    assert db.one(f"SELECT sum(n) FROM {table} WHERE _time >= '2026-02-01' AND _time < '2026-03-01'") == sum(
        range(1, 3_000, 3)
    )
    assert db.one(f"SELECT count(*) FROM {table} WHERE _user = 'u7'") == 150

    # Hidden at once, gone from the files with the next flush, and the old objects with the garbage.
    before = of_project(place)
    assert db.one("SELECT rakam.delete_events(%s, 'c', '_user = ''u7''')", place.project) == 150
    assert db.one(f"SELECT count(*) FROM {table}") == 2_850
    with db.connect(autocommit=False) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert reader.execute(f"SELECT count(*) FROM {table}").fetchone() == (2_850,)
        db.flush(place.project, "c")
        db.tick()
        # Nobody's files go away under a snapshot that may read them.
        assert reader.execute(f"SELECT count(*), sum(n) FROM {table}").fetchone() == (
            2_850,
            4_498_500 - sum(range(7, 3_000, 20)),
        )
    nothing_else(db, place)
    assert not set(of_project(place)) & set(before)
    assert db.one(f"SELECT count(*) FROM {table} WHERE _user = 'u7'") == 0


def test_other_readers_agree(db, place):
    if place.filesystem is None:
        return
    fill(db, place, "read", [{"n": n, "text": f"t{n % 9}"} for n in range(1_000)])
    paths = [f"{place.root}/{path}" for path in manifest(db, place) if "/read/" in path]
    tables = [pyarrow.parquet.read_table(path, filesystem=place.filesystem) for path in paths]
    theirs = {(row["n"], row["text"]) for table in tables for row in table.to_pylist()}
    assert theirs == set(db.all(f"SELECT n, text FROM {place.project}.read"))
    assert len(theirs) == 1_000


def test_a_large_file_goes_up_in_parts(db, place):
    """Nothing of it can be compressed, so that one file is several parts."""
    events = [{"n": n, "noise": secrets.token_urlsafe(9_000)} for n in range(1_000)]
    fill(db, place, "large", events)
    sizes = [size for path, size in manifest(db, place).items() if "/large/" in path]
    assert max(sizes) > 8 << 20
    nothing_else(db, place)
    assert db.one(f"SELECT sum(n) FROM {place.project}.large") == sum(range(1_000))
    assert db.one(f"SELECT noise FROM {place.project}.large WHERE n = 999") == events[-1]["noise"]


def test_a_dropped_project_leaves_nothing(db, place):
    """Last of the module for each place."""
    db.admin.execute("SET rakam.allow_project_drop = on")
    db.admin.execute("SELECT rakam.drop_project(%s)", (place.project,))

    def gone() -> bool:
        db.tick()
        return not of_project(place)

    wait_until(gone, "the deletion of the project's objects", 30, 0.2)
