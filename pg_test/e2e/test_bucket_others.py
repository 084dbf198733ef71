"""A bucket as others find it: readers of Parquet beside rakam, and a database that has nothing but the bucket."""

from __future__ import annotations

import os
import uuid
from decimal import Decimal

import pyarrow.dataset
import pytest
from harness.database import Database, one, refused
from harness.duck_s3 import DuckS3
from harness.lake import check, fill, health, stat
from test_rebuild import content, delete, events, every_kind_of_change, rebuild


@pytest.fixture
def found(lake_cluster, s3):
    """Makes databases, one after the other, on one bucket."""
    bucket = s3.storage(f"others-{uuid.uuid4().hex[:8]}")
    made: list[Database] = []

    def make() -> Database:
        db = Database(lake_cluster, f"bucket_others_{len(made)}")
        db.drop()
        db.create()
        made.append(db)
        bucket.create(db.admin, "lake")
        return db

    yield make, bucket
    for db in made:
        db.drop()


SUMMARY = "SELECT count(*), count(DISTINCT _id), sum(n)::bigint, {first}, {last}, count(price), sum(price), count(flag) FROM {{}}"
OURS = SUMMARY.format(
    **{
        name: f"to_char({call}(_time) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')"
        for name, call in (("first", "min"), ("last", "max"))
    }
)
THEIRS = SUMMARY.format(
    **{
        name: f"strftime({call}(_time) AT TIME ZONE 'UTC', '%Y-%m-%d %H:%M:%S')"
        for name, call in (("first", "min"), ("last", "max"))
    }
)


def test_other_readers_read_the_same(found, s3):
    """DuckDB and pyarrow, from the very objects that the manifest names, before and after compaction."""
    make, bucket = found
    db = make()
    db.project("acme", "lake")
    db.admin.execute("SELECT rakam.create_collection('acme', 'page')")
    db.admin.execute("SELECT rakam.add_field('acme', 'page', 'price', 'numeric(12,3)')")
    for first in range(0, 2_000, 500):
        more = {"price": f"{first}.125", "tags": ["ä", None], "deep": {"k": first}} | ({"flag": True} if first else {})
        events(db, "acme", "page", range(first, first + 500), **more)
        db.flush("acme")
    environment = {"AWS_ACCESS_KEY_ID": s3.key, "AWS_SECRET_ACCESS_KEY": s3.secret}
    duck = DuckS3({**os.environ, **environment}, s3.endpoint)
    try:
        for _ in range(2):
            paths = [path for (path,) in db.all("SELECT path FROM rakam.data_files")]
            ours = db.admin.execute(OURS.format("acme.page")).fetchone()
            assert ours[:3] == (2_000, 2_000, sum(range(2_000)))
            assert ours[5:] == (2_000, Decimal(500 * (0 + 500 + 1_000 + 1_500)) + Decimal("0.125") * 2_000, 1_500)
            (row,) = duck.run(THEIRS.format(f"read_parquet({paths!r}, union_by_name = true)"))[1]
            assert row == [str(value) for value in ours]
            keys = [f"{s3.bucket}/{path.removeprefix(f's3://{s3.bucket}/')}" for path in paths]
            parts = [pyarrow.dataset.dataset(key, filesystem=bucket.filesystem, format="parquet") for key in keys]
            table = pyarrow.concat_tables([part.to_table() for part in parts], promote_options="default")
            assert table.num_rows == 2_000
            assert sorted(table["n"].to_pylist()) == list(range(2_000))
            assert {str(price) for price in table["price"].to_pylist()} == {f"{n}.125" for n in range(0, 2_000, 500)}
            assert table["tags"].to_pylist() == [["ä", None]] * 2_000
            assert {name for name in table.column_names if name.startswith("_")} >= {"_time", "_id", "_user"}
            db.all("SELECT * FROM rakam.compact('acme')")
    finally:
        duck.close()


def test_a_catalogue_comes_back_from_the_bucket_alone(found):
    """The same tables, rows and files; and the storage is still the lost database's until it is adopted."""
    make, bucket = found
    db = make()
    every_kind_of_change(db)
    before = content(db)
    db.drop()
    db = make()
    rebuild(db)
    after = content(db)
    for what in before:
        assert after[what] == before[what], what
    assert after.keys() == before.keys()
    assert one(db.login("acme", "read"), "SELECT count(*) FROM acme.page") == 400
    with refused("42501"):
        one(db.login("other", "read"), "SELECT count(*) FROM acme.page")
    # The new database writes and deletes nothing.
    objects = set(bucket.objects())
    fill(db, collection="doomed", count=10)
    db.flush("acme", "doomed")
    (doomed,) = set(bucket.objects()) - objects
    db.admin.execute("SELECT rakam.drop_collection('acme', 'doomed')")
    assert delete(db.admin, "acme", "page", "n::int % 10 = 5") > 0
    db.flush("acme", "page")
    check(db)
    db.tick()
    assert objects | {doomed} <= set(bucket.objects())
    assert health(db, "storage owner")[0][0] == "warning"
    assert stat(db)["owner"] not in (None, "this database")
    db.admin.execute("SELECT rakam.adopt_storage('lake')")
    check(db)
    db.tick()
    assert doomed not in bucket.objects()
    assert check(db) == []
    assert health(db, "storage owner") == []
