"""The life of objects in a bucket, as test_lake.py has it of a directory: orphans, uploads that nobody ends, the fence."""

from __future__ import annotations

import json
import uuid

import psycopg
import pytest
from harness.buckets import create_storage
from harness.database import Database, refused, wait_until
from harness.lake import check, files, fill, health, stat


@pytest.fixture
def lake(lake_cluster, s3):
    """A database of its own with the storage `lake`, a bucket, and the project `acme` on it; and the bucket."""
    db = Database(lake_cluster, "lake_bucket")
    db.drop()
    db.create()
    bucket = s3.storage(f"lake-{uuid.uuid4().hex[:8]}")
    bucket.create(db.admin, "lake")
    db.project("acme", "lake")
    yield db, bucket
    db.drop()


def key(bucket, path: str) -> str:
    return f"{bucket.s3.bucket}/{bucket.prefix}/{path}"


def delete(bucket, path: str) -> None:
    bucket.s3.request("DELETE", key(bucket, path)).close()


def write(bucket, path: str, content: bytes) -> None:
    bucket.s3.request("PUT", key(bucket, path), content).close()


def begin_upload(bucket, path: str) -> None:
    bucket.s3.request("POST", f"{key(bucket, path)}?uploads", b"").close()


def test_a_bucket_compared_with_its_manifest(lake):
    db, bucket = lake
    fill(db)
    db.flush()
    fill(db, first=100)
    db.flush()
    assert (check(db), set(bucket.objects())) == ([], files(db))
    missing, corrupt = sorted(files(db))
    whole, lost = bucket.get(corrupt), bucket.get(missing)
    name = corrupt.rsplit("/", 1)[1]
    foreign = "acme/018f3c5e-0000-7000-8000-00000badf00d.parquet"
    # Somebody's file; a copy under another name; one that another installation wrote.
    write(bucket, "acme/stray.parquet", b"x" * 7)
    write(bucket, f"acme/seen/{name}", whole)
    write(bucket, foreign, b"theirs")
    delete(bucket, missing)
    write(bucket, corrupt, whole[:-1])
    # Uploads of ours that a crash left, of another installation, and of people: moto says of all that they began in 2010.
    for path in (f"acme/{name}", foreign, "acme/people.parquet"):
        begin_upload(bucket, path)
    assert bucket.uploads() == 3
    assert check(db) == sorted([
        ("acme/stray.parquet", "orphan", 7),
        (f"acme/seen/{name}", "orphan", len(whole)),
        (corrupt, "corrupt", len(whole) - 1),
        (missing, "missing", len(lost)),
    ])  # fmt: skip
    assert bucket.uploads() == 1
    assert stat(db)["orphans"] == 2
    assert "1 are corrupt" in health(db, "storage contents")[0][1]
    db.tick()
    assert stat(db)["orphans"] == 0
    assert set(bucket.objects()) == {corrupt, foreign}
    write(bucket, missing, lost)
    write(bucket, corrupt, whole)
    assert check(db) == []
    assert db.one("SELECT sum(n) FROM acme.seen") == sum(range(200))


def test_what_is_out_of_use_goes(lake):
    """Merged, expired and dropped files; what copy_to wrote and what is attached stays."""
    db, bucket = lake
    for first in range(0, 400, 100):
        fill(db, first=first)
        fill(db, collection="old", first=first)
        db.flush()
    assert len(files(db)) == 8
    db.all("SELECT * FROM rakam.compact('acme')")
    assert len(files(db)) == 2
    assert db.one("SELECT rakam.copy_to('acme', 'SELECT 1 AS one', 'mine.parquet')") == 1
    write(bucket, "acme/theirs/x.parquet", bucket.get("acme/mine.parquet"))
    db.admin.execute("SELECT rakam.attach('acme', 'theirs', 'theirs')")
    db.admin.execute("SELECT rakam.set_retention('acme', 'old', '1 day')")
    db.all("SELECT * FROM rakam.compact('acme', 'old')")
    db.tick()
    kept = {"acme/mine.parquet", "acme/theirs/x.parquet"}
    assert (check(db), set(bucket.objects())) == ([], files(db) | kept)
    assert (db.one("SELECT sum(n) FROM acme.seen"), db.one("SELECT count(*) FROM acme.old")) == (sum(range(400)), 0)
    db.admin.execute("SELECT rakam.detach('acme', 'theirs')")
    assert [path for path, _, _ in check(db)] == ["acme/theirs/x.parquet"]
    db.tick()
    assert set(bucket.objects()) == files(db) | {"acme/mine.parquet"}


def test_an_owner_object_that_is_gone_or_spoilt_is_doubt(lake):
    db, bucket = lake
    fill(db)
    db.flush()
    owner = "_rakam/owner.json"

    def nonce() -> None:
        content = json.loads(bucket.get(owner))
        write(bucket, owner, json.dumps({**content, "nonce": str(uuid.uuid4())}).encode())

    for spoil in (lambda: delete(bucket, owner), lambda: write(bucket, owner, b"{}"), nonce):
        spoil()
        fill(db, collection="doomed", count=10)
        db.flush("acme", "doomed")
        doomed = files(db)
        db.admin.execute("SELECT rakam.drop_collection('acme', 'doomed')")
        (path,) = doomed - files(db)
        db.tick()
        assert path in bucket.objects()
        assert health(db, "storage owner")[0][0] == "warning"
        db.admin.execute("SELECT rakam.adopt_storage('lake')")
        db.tick()
        assert path not in bucket.objects()
        assert health(db, "storage owner") == []
    assert json.loads(bucket.get(owner))["epoch"] == 4


def test_a_write_of_the_owner_object_that_arrives_late(lake):
    """A session that renews the owner object is killed, and its write takes effect while the next one renews it, too."""
    db, bucket = lake
    fill(db)
    db.flush()
    doomed = files(db)
    db.admin.execute("SELECT rakam.drop_collection('acme', 'seen')")

    def renew(action: str) -> str:
        """The nonce that a session is about to write when `action` befalls it."""
        known = attempts(db)
        db.configure(failpoint=f"owner.before_put={action}")
        db.admin.execute("UPDATE rakam_internal.storage_state SET renewed_at = now() - interval '1 hour'")
        return wait_until(lambda: attempts(db)[len(known) :], "a new nonce")[0]

    late = renew("error")
    renew("sleep(60000)")
    content = json.loads(bucket.get("_rakam/owner.json"))
    assert content["nonce"] != late
    write(bucket, "_rakam/owner.json", json.dumps({**content, "nonce": late}).encode())
    db.configure(failpoint=None)
    wait_until(lambda: not doomed & set(bucket.objects()), "the objects of the dropped collection are gone")
    assert (stat(db)["owner"], health(db, "storage owner")) == ("this database", [])


def attempts(db: Database) -> list[str]:
    return db.one("SELECT next_nonces FROM rakam_internal.storage_state WHERE storage_id > 1")


def test_a_place_is_known_by_any_endpoint(lake):
    """Addresses of one bucket that are written differently are those of one storage."""
    db, bucket = lake
    port = bucket.s3.endpoint.rsplit(":", 1)[1].strip("/")
    for n, (endpoint, prefix, how) in enumerate(
        (
            (f"http://localhost:{port}/", "", "is the same place as"),
            (f"http://127.0.0.1:{port}//", "/", "is the same place as"),
            (f"http://LOCALHOST:{port}", "/deeper", "lies within"),
        )
    ):
        options = {**bucket.options, "url": f"s3a://{bucket.s3.bucket}/{bucket.prefix}{prefix}", "endpoint": endpoint}
        create_storage(db.admin, f"n{n}", options, bucket.credentials)
        with pytest.raises(psycopg.errors.InvalidParameterValue) as error:
            db.project("other", f"n{n}")
        assert error.value.diag.message_detail == f'It {how} the url of server "lake", which is in use.'
    options = {**bucket.options, "url": f"s3://{bucket.s3.bucket}/{bucket.prefix}x"}
    create_storage(db.admin, "beside", options, bucket.credentials)
    db.project("other", "beside")
    with refused("22023", message="overlaps"):
        db.admin.execute(f"ALTER SERVER beside OPTIONS (SET url '{bucket.url}/deeper')")


def test_a_store_without_conditional_writes_is_nobodys_and_described(lake_cluster, s3, fault_proxy):
    fault_proxy.set({"match": {"method": "PUT", "path": "_rakam/(probe|owner)"}, "fault": NO_CONDITIONS})
    db = Database(lake_cluster, "lake_unfenced")
    db.drop()
    db.create()
    try:
        bucket = s3.storage(f"unfenced-{uuid.uuid4().hex[:8]}", fault_proxy.url)
        bucket.create(db.admin, "lake")
        db.project("acme", "lake")
        for first in (0, 100):
            fill(db, first=first)
            db.flush()
            db.tick()
            assert db.one("SELECT standing FROM rakam_internal.storage_state") == "unfenced"
        assert "no conditional writes" in health(db, "storage owner")[0][1]
        with refused("0A000"):
            db.admin.execute("SELECT rakam.adopt_storage('lake')")
        assert db.one("SELECT standing FROM rakam_internal.storage_state") == "unfenced"
        # What lies there can be told from the bucket alone.
        assert db.one("SELECT count(*) FROM rakam_internal.description_due") == 0
        assert db.one("SELECT number > 0 FROM rakam_internal.description")
    finally:
        db.drop()


NO_CONDITIONS = {"s3_error": "NotImplemented", "status": 501}
