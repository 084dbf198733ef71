"""Sources of files: each new object under a prefix once, in a directory and in a bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.database import wait_until
from harness.kafka import create_server
from harness.lake import make_storage


@pytest.fixture(params=["directory", "bucket"])
def place(request, db):
    """A storage, and how objects are put into it."""
    name = f"lake_{request.param}"
    if request.param == "directory":
        folder = make_storage(db, name)

        def put(path: str, content: bytes) -> None:
            file = Path(folder) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            for part in [file, *file.parents]:
                if part == Path(folder):
                    break
                part.chmod(0o755)
    else:
        there = request.getfixturevalue("s3").storage(f"sources/{db.name}")
        there.create(db.admin, name)
        put = there.put
    return name, put


def events(first: int, count: int) -> bytes:
    return b"".join(json.dumps({"n": n}).encode() + b"\n" for n in range(first, first + count))


def test_each_new_object_once(db, place):
    storage, put = place
    project = f"p_{storage}"
    db.project(project)
    put("in/day=1/a.ndjson", events(0, 10))
    put("in/bad.avro", b"Obj")
    put("in/_SUCCESS", b"")
    put("in/.hidden.ndjson", events(1000, 10))
    put("other/z.ndjson", events(2000, 10))
    create_server(db.admin, f"f_{storage}", "files", {"storage": storage})
    options = {"prefix": "in", "collection": "page"}
    db.admin.execute("SELECT rakam.create_source(%s, 'files', %s, %s)", (project, f"f_{storage}", json.dumps(options)))

    def count() -> int:
        if db.one("SELECT to_regclass(%s) IS NULL", f"{project}.page"):
            return 0
        return db.one(f"SELECT count(*) FROM {project}.page")

    wait_until(lambda: count() == 10, "the first object")
    # While one cannot be read others come.
    put("in/day=2/b.csv", b"n\n10\n11\n")
    put("in/day=2/c.ndjson", events(12, 5))
    wait_until(lambda: count() == 17, "objects that come later")
    states = "SELECT split, state FROM rakam.offsets WHERE project = %s ORDER BY split"
    expected = [
        ("in/bad.avro", "stopped"),
        ("in/day=1/a.ndjson", "ended"),
        ("in/day=2/b.csv", "ended"),
        ("in/day=2/c.ndjson", "ended"),
    ]
    wait_until(lambda: db.all(states, project) == expected, "the states of all objects")
    error = db.one("SELECT last_error FROM rakam.stat_source WHERE project = %s AND split = 'in/bad.avro'", project)
    assert "bad.avro" in error
    db.wait_column(f"{project}.page", "n")
    assert db.one(f"SELECT array_agg(n::int ORDER BY n) FROM {project}.page") == list(range(17))
