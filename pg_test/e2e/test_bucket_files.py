"""Files in buckets: loaded, written and attached as files on the server are, whatever the store does meanwhile."""

from __future__ import annotations

import gzip
import json
import secrets
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pyarrow
import pyarrow.parquet
import pytest
from harness.buckets import Bucket
from harness.database import in_background, one, refused, wait_until
from harness.event_files import EXPECTED, FORMATS, ROWS, SUMMARY
from psycopg import sql

PROJECT = "acme"


@pytest.fixture(scope="module")
def bucket(db, s3) -> Bucket:
    """A storage in a bucket, which two projects share."""
    there = s3.storage("files")
    there.create(db.admin, "files_bucket")
    db.project(PROJECT, "files_bucket")
    db.project("other", "files_bucket")
    return there


@pytest.fixture
def through(db, bucket, fault_proxy):
    """The storage behind a proxy with rules, and calls that are given up after some seconds."""
    endpoint = sql.SQL("ALTER SERVER files_bucket OPTIONS (SET endpoint {})")
    db.admin.execute(endpoint.format(sql.Literal(fault_proxy.url)))
    yield fault_proxy
    db.admin.execute(endpoint.format(sql.Literal(bucket.s3.endpoint)))


@pytest.fixture
def quick(db):
    """Failing calls are given up after a second."""
    db.configure(storage_timeout="1s")
    yield
    db.configure(storage_timeout=None)


@pytest.fixture
def no_cache(db):
    """Every read is one of the store."""
    db.configure(cache_size="0")
    yield
    db.configure(cache_size=None)


def load(session, collection: str, url: str, format: str | None = None, options: dict | None = None) -> int:
    text = json.dumps(options or {})
    return one(session, "SELECT rakam.copy_from(%s, %s, %s, %s, %s)", PROJECT, collection, url, format, text)


def save(session, query: str, url: str, format: str | None = None) -> int:
    return one(session, "SELECT rakam.copy_to(%s, %s, %s, %s)", PROJECT, query, url, format)


def attach(session, name: str, url: str, format: str | None = None) -> None:
    session.execute("SELECT rakam.attach(%s, %s, %s, %s)", (PROJECT, name, url, format))


def made(tmp_path, name: str) -> bytes:
    FORMATS[name](tmp_path / name)
    return (tmp_path / name).read_bytes()


def lines(rows: int, first: int = 0, width: int = 1_000) -> bytes:
    """CSV of so many bytes a row, and some more, that no compression makes small."""
    text = ["_time,n,word\n"]
    text += [f"2025-{n % 12 + 1:02}-01,{n},{secrets.token_hex(width // 2)}\n" for n in range(first, first + rows)]
    return "".join(text).encode()


def counted(db, table: str) -> tuple:
    return db.admin.execute(f"SELECT count(*), count(DISTINCT n), sum(n)::bigint FROM acme.{table}").fetchone()


def whole(rows: int) -> tuple:
    return rows, rows, sum(range(rows))


# -- loads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_load_is_that_of_the_same_file_on_the_server(db, bucket, cluster, tmp_path, name):
    content = made(tmp_path, name)
    local = cluster.make_folder("bucket-files") / name
    local.write_bytes(content)
    here, there = (f"{where}_{name.split('.', 1)[0]}" for where in ("here", "there"))
    assert load(db.admin, here, f"file://{local}") == ROWS
    assert load(db.admin, there, bucket.put(f"formats/{name}", content)) == ROWS
    assert db.admin.execute(SUMMARY.format(there)).fetchone() == EXPECTED
    fields = "SELECT field, type FROM rakam.fields WHERE collection = %s ORDER BY 1"
    assert db.all(fields, there) == db.all(fields, here)
    rows = "SELECT _time, _user, n, price, ok, day, note, _extra FROM acme.{}"
    differ = f"({rows.format(here)}) EXCEPT ALL ({rows.format(there)})"
    assert db.all(differ) == []
    # After a success the same call loads again.
    assert load(db.admin, there, f"{bucket.url}/formats/{name}") == ROWS
    assert db.one(f"SELECT count(*) FROM acme.{there}") == 2 * ROWS


def test_patterns_and_relative_paths(db, bucket):
    for path in ("2023/a.data", "2023/b.data", "2024/a.data", "2024/.hidden.data", "2024/deep/er/a.data"):
        bucket.put(f"years/{path}", f"year,path\n{path[:4]},{path}\n".encode())
    for project in (PROJECT, "other"):
        bucket.put(f"{project}/own/x.csv", f"n,whose\n1,{project}\n".encode())
    bucket.put("years/[1].data", b"year,path\n1,bracket\n")
    with refused("22023", hint="format"):
        load(db.admin, "globbed", f"{bucket.url}/years/*/*.data")
    url = bucket.url.replace("s3://", "S3A://") + "/years/"
    assert load(db.admin, "globbed", url + "*/*.data", "csv") == 3
    assert load(db.admin, "globbed", url + "**/a.data", "CSV") == 3
    assert load(db.admin, "globbed", url + "20?[34]/b.data", "csv") == 1
    assert load(db.admin, "globbed", url + "[1].data", "csv") == 1
    assert db.all("SELECT path, count(*) FROM acme.globbed GROUP BY 1 ORDER BY 1") == [
        ("2023/a.data", 2), ("2023/b.data", 2), ("2024/a.data", 2), ("2024/deep/er/a.data", 1), ("bracket", 1),
    ]  # fmt: skip
    writer = db.login(PROJECT, "write")
    assert load(writer, "relative", "own/*.csv") == 1
    assert db.all("SELECT whose FROM acme.relative") == [(PROJECT,)]
    for path in ("../other/own/x.csv", "/own/x.csv", "own/../../other/own/x.csv", ""):
        with refused("22023"):
            load(writer, "relative", path)
    for path in ("other/own/x.csv", "own/none.csv", "none/*.csv", "own"):
        with refused("58P01", message="no file matches"):
            load(writer, "relative", path)
    with refused("58P01", hint="match"):
        load(db.admin, "globbed", url + "*.csv")


def test_more_objects_than_a_page_of_a_list(db, bucket):
    count = 1_050
    with ThreadPoolExecutor(8) as pool:
        there = f"{bucket.s3.bucket}/{bucket.prefix}/many"
        put = lambda n: bucket.s3.request("PUT", f"{there}/{n:04}.csv", f"n\n{n}\n".encode()).close()  # noqa: E731
        list(pool.map(put, range(count)))
    attach(db.admin, "many", f"{bucket.url}/many")
    assert counted(db, "many") == whole(count)
    assert load(db.admin, "some", f"{bucket.url}/many/104*.csv") == 10
    assert db.one("SELECT sum(n) FROM acme.some") == sum(range(1040, count))


def test_bad_rows_are_told_with_file_and_line(db, bucket):
    url = bucket.put("bad/bad.csv", b"n,name\n1,a\n2\n3,c,d\n")
    assert load(db.admin, "bad", url) == 1
    errors = db.all("SELECT error FROM rakam.invalid_value WHERE collection = 'bad' ORDER BY 1")
    assert [error for (error,) in errors] == [
        'file "bad/bad.csv", line 3: expected 2 columns, found 1',
        'file "bad/bad.csv", line 4: expected 2 columns, found 3',
    ]
    with refused("22P04", message="bad.parquet"):
        load(db.admin, "bad", bucket.put("bad/bad.parquet", b"PAR1 is not enough"))
    cut = gzip.compress(lines(100))[:20_000]
    with refused("58030", message="short.csv.gz"):
        load(db.admin, "bad", bucket.put("bad/short.csv.gz", cut))


# -- exports -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "x.ndjson", "x.csv.gz", "x.ndjson.zst"])
def test_what_is_written_is_loaded_again(db, bucket, name):
    query = "SELECT g AS n, 'größe, \"' || g AS t, CASE WHEN g % 3 > 0 THEN g / 8.0::float8 END AS f FROM generate_series(0, 9999) g"
    url = f"{bucket.url}/round/{name}"
    assert save(db.admin, query, url) == 10_000
    collection = name.replace(".", "_")
    assert load(db.admin, collection, url) == 10_000
    assert db.all(f"(SELECT n, t, f FROM acme.{collection}) EXCEPT ALL ({query})") == []
    # Nothing is ever replaced.
    with refused("58P02", message="exists already"):
        save(db.admin, query, url)
    assert save(db.login(PROJECT, "read"), "SELECT 1 AS n", f"round/{name}") == 1
    assert bucket.objects().keys() >= {f"round/{name}", f"acme/round/{name}"}


def test_a_large_result_goes_up_in_parts(db, bucket):
    """And is no orphan."""
    rows = 150_000
    query = "SELECT g AS n, sha512(g::text::bytea)::text AS noise FROM generate_series(0, 149999) g"
    assert save(db.admin, query, "large/x.csv") == rows
    assert bucket.objects()["acme/large/x.csv"] > 2 * (8 << 20)
    assert bucket.uploads() == 0
    text = bucket.get("acme/large/x.csv").decode().splitlines()
    assert len(text) == rows + 1
    assert load(db.admin, "large", "large/x.csv") == rows
    assert counted(db, "large") == whole(rows)
    listed = db.all("SELECT path FROM rakam.check_storage('files_bucket')")
    assert ("acme/large/x.csv",) not in listed


def test_an_unfinished_object_is_taken_back(db, bucket):
    wide = "repeat(sha512(g::text::bytea)::text, 60)"
    for query in (f"SELECT {wide}, 1 / (4000 - g) FROM generate_series(1, 4000) g", "SELECT missing"):
        with pytest.raises(psycopg.Error):
            save(db.admin, query, "unfinished/x.csv")
        wait_until(lambda: bucket.uploads() == 0, "the end of the upload")
    for end in ("cancel", "terminate"):
        # Two thousand rows are more than a part, so that one is under way soon.
        query = f"SELECT {wide}, CASE WHEN g > 3000 THEN pg_sleep(0.1) END FROM generate_series(1, 100000) g"
        session, thread, outcome = in_background(db, lambda s, query=query: save(s, query, "unfinished/x.csv"))
        wait_until(lambda: bucket.uploads() == 1, "the upload")
        if end == "cancel":
            session.cancel()
        else:
            db.admin.execute("SELECT pg_terminate_backend(%s)", (session.info.backend_pid,))
        thread.join(30)
        assert isinstance(outcome[0], psycopg.Error)
        wait_until(lambda: bucket.uploads() == 0, "its removal")
    assert not [path for path in bucket.objects() if "unfinished" in path]


# -- attached tables ---------------------------------------------------------------------------------------------


def table_of(rows: int) -> pyarrow.Table:
    days = [f"2024-{n % 12 + 1:02}-{n % 28 + 1:02}" for n in range(rows)]
    return pyarrow.table({
        "n": pyarrow.array(range(rows), pyarrow.int64()),
        "f": [n / 7 if n % 5 else None for n in range(rows)],
        "t": [secrets.token_hex(20) if n % 11 else None for n in range(rows)],
        "d": pyarrow.array(days).cast(pyarrow.date32()),
        "words": [[str(n), None] for n in range(rows)],
    })  # fmt: skip


CONDITIONS = ["true", "n > 19990", "n = 5", "f IS NULL", "t > 'f'", "d = '2024-05-05'", "n + 1 = 500", "year = 2024"]


def test_an_attached_bucket_is_its_twin(db, bucket, cluster, tmp_path):
    here = cluster.make_folder("bucket-attached")
    table = table_of(20_000)
    for year, part in ((2023, table.slice(0, 9_000)), (2024, table.slice(9_000))):
        path = here / f"year={year}/x.parquet"
        path.parent.mkdir()
        pyarrow.parquet.write_table(part, path, row_group_size=1_000)
        bucket.put(f"twin/year={year}/x.parquet", path.read_bytes())
    bucket.put("twin/_SUCCESS", b"")
    attach(db.admin, "twin", f"{bucket.url}/twin")
    attach(db.admin, "twin_here", f"file://{here}")
    db.admin.execute("CREATE TABLE twin AS SELECT * FROM acme.twin_here")
    columns = "SELECT attname, atttypid::regtype::text FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
    assert db.all(columns, "acme.twin") == db.all(columns, "twin")
    for query in ("(TABLE acme.twin) EXCEPT ALL (TABLE twin)", "(TABLE twin) EXCEPT ALL (TABLE acme.twin)"):
        assert db.all(query) == []
    for pushdown in ("on", "off"):
        db.admin.execute(f"SET rakam.enable_pushdown = {pushdown}")
        for condition in CONDITIONS:
            query = "SELECT array_agg(n ORDER BY n), count(t), min(d) FROM {} WHERE " + condition
            assert db.all(query.format("acme.twin")) == db.all(query.format("twin")), f"{condition}, {pushdown}"
    db.admin.execute("RESET rakam.enable_pushdown")
    assert db.one("SELECT count(*) FROM acme.twin a JOIN acme.twin b USING (n) JOIN twin c USING (n)") == 20_000
    assert len(db.all("SELECT FROM acme.twin LIMIT 7")) == 7
    explain = "EXPLAIN (ANALYZE, FORMAT json) SELECT t FROM acme.{} WHERE n >= 19990"
    keys = ("Files Read", "Row Groups Read", "Row Groups Skipped by Statistics")
    scans = [db.one(explain.format(name))[0]["Plan"] for name in ("twin", "twin_here")]
    assert [scans[0][key] for key in keys] == [scans[1][key] for key in keys] == [2, 1, 19]


def test_one_thread_and_a_name_to_look_up(db, bucket):
    """What a reader waits for may need a thread of the same kind."""
    content = "n\n" + "".join(f"{n}\n" for n in range(100_000))
    for part in range(3):
        bucket.put(f"one/{part}.csv.gz", gzip.compress(content.encode(), 1))
    pyarrow.parquet.write_table(table_of(2_000), where := pyarrow.BufferOutputStream())
    bucket.put("one-parquet/x.parquet", where.getvalue().to_pybytes())
    there = bucket.s3.storage("files/one", bucket.s3.endpoint.replace("127.0.0.1", "localhost"))
    there.create(db.admin, "by_name")
    db.configure(threads="1")
    try:
        session = db.connect()
        attach(session, "by_name", f"{bucket.url}/one")
        attach(session, "one_parquet", f"{bucket.url}/one-parquet")
        assert one(session, "SELECT count(*) FROM acme.by_name") == 300_000
        assert one(session, "SELECT sum(a.n) FROM acme.by_name a JOIN acme.one_parquet b USING (n)") == 3 * sum(
            range(2000)
        )
        assert load(session, "one_thread", f"{bucket.url}/one/0.csv.gz") == 100_000
    finally:
        db.configure(threads=None)


def test_objects_come_go_and_change(db, bucket, no_cache):
    bucket.put("living/a.ndjson", b'{"n": 1, "t": "x"}\n')
    attach(db.admin, "living", f"{bucket.url}/living/")
    assert db.all("SELECT n, t FROM acme.living") == [(1, "x")]
    bucket.put("living/b.ndjson", b'{"n": 2, "unknown": true}\n')
    assert db.all("SELECT n, t FROM acme.living ORDER BY n") == [(1, "x"), (2, None)]
    bucket.put("living/a.ndjson", b'{"n": 9, "t": "y"}\n')
    assert db.all("SELECT n, t FROM acme.living ORDER BY n") == [(2, None), (9, "y")]
    for path in ("a.ndjson", "b.ndjson"):
        bucket.filesystem.delete_file(f"{bucket.s3.bucket}/files/living/{path}")
    # A tool may have left the mark of a folder, which is an empty one then.
    assert db.one("SELECT count(*) FROM acme.living") == 0
    bucket.s3.request("DELETE", f"{bucket.s3.bucket}/files/living/").close()
    with refused("58P01", message="living"):
        db.all("SELECT n FROM acme.living")
    # Replaced while it is read: no row of the new one follows rows of the old one.
    rows = 50_000
    content = lines(rows)
    bucket.put("changing/x.csv", content)
    attach(db.admin, "changing", f"{bucket.url}/changing/*.csv")
    session = db.connect(autocommit=False)
    session.execute("DECLARE c CURSOR FOR SELECT n FROM acme.changing")
    assert len(session.execute("FETCH 10 FROM c").fetchall()) == 10
    bucket.put("changing/x.csv", content.replace(b"\n2025-", b"\n2026-"))
    with refused("58030", message="was changed while it was read", hint="again"):
        session.execute("FETCH ALL FROM c")
    session.rollback()
    assert counted(db, "changing") == whole(rows)


def test_kept_blocks_are_those_of_one_content(db, bucket):
    """Blocks are found again under the version of an object only."""
    first, second = lines(1_000, 1_000), lines(1_000, 2_000)
    assert len(first) == len(second)
    bucket.put("kept/x.csv", first)
    attach(db.admin, "kept", f"{bucket.url}/kept")
    for _ in range(2):
        assert db.one("SELECT sum(n) FROM acme.kept") == sum(range(1_000, 2_000))
    bucket.put("kept/x.csv", second)
    assert db.one("SELECT sum(n) FROM acme.kept") == sum(range(2_000, 3_000))


# -- rights ------------------------------------------------------------------------------------------------------


def test_who_may_name_which_object(db, bucket):
    bucket.put("rights/x.csv", b"secret\n1\n")
    url = f"{bucket.url}/rights/x.csv"
    writer, admin = db.login(PROJECT, "write"), db.login(PROJECT, "admin", name="bucket_admin")
    db.make_login("bucket_outsider")
    db.admin.execute("GRANT USAGE ON FOREIGN SERVER files_bucket TO bucket_outsider")
    outsider = db.connect("bucket_outsider")
    db.admin.execute("GRANT pg_read_server_files, pg_write_server_files TO login_acme_write")
    # The right to files of the server is none to those of a bucket, and what is not there is told in the same words.
    hint = "USAGE"
    for bad in (url, "s3://elsewhere/rights/x.csv", "gs://elsewhere/x.csv", f"s3://{bucket.s3.bucket}/other/x.csv"):
        with refused("42501", message=f'permission denied for file "{bad}"', hint=hint):
            load(writer, "rights", bad)
        with refused("42501", message=f'permission denied for file "{bad}"', hint=hint):
            attach(admin, "rights_table", bad)
        with refused("42501", message=f'permission denied for file "{bad}"', hint=hint):
            save(admin, "SELECT 1", bad)
    for call in (lambda: load(outsider, "rights", url), lambda: save(outsider, "SELECT 1", url)):
        with refused("42501", message='permission denied for project "acme"'):
            call()
    # A superuser is no exception: what is in no storage has no credentials.
    with refused("42501"):
        load(db.admin, "rights", "s3://elsewhere/x.csv")
    for bad, state in (
        ("hdfs://namenode/x.csv", "0A000"),
        ("s3://key:hunter2@b/x.csv", "22023"),
        (bucket.url, "42501"),
    ):
        with refused(state):
            load(db.admin, "rights", bad)
    with refused("22023"):
        load(db.admin, "rights", f"{bucket.url}/rights/../rights/x.csv")
    db.admin.execute("GRANT USAGE ON FOREIGN SERVER files_bucket TO login_acme_write, bucket_admin")
    assert load(writer, "rights", url) == 1
    attach(admin, "rights_table", url)
    db.admin.execute("REVOKE USAGE ON FOREIGN SERVER files_bucket FROM login_acme_write, bucket_admin")
    with refused("42501"):
        load(writer, "rights", url)
    # The right is asked when the files are attached; the project's readers read them then, and nobody else.
    assert one(db.login(PROJECT, "read"), "SELECT secret FROM acme.rights_table") == 1
    with refused("42501"):
        outsider.execute("SELECT * FROM acme.rights_table")
    reader = db.login("other", "read")
    with refused("42501"):
        reader.execute("SELECT * FROM acme.rights_table")


def test_a_storage_that_is_moved_widens_nothing(db, bucket):
    for place in ("moved-1", "moved-2"):
        bucket.put(f"{place}/x/a.csv", b"n\n1\n")
    first = bucket.s3.storage("files/moved-1")
    first.create(db.admin, "moved_bucket")
    attach(db.admin, "moved", f"{first.url}/x")
    assert db.one("SELECT n FROM acme.moved") == 1
    db.admin.execute(f"ALTER SERVER moved_bucket OPTIONS (SET url 's3://{bucket.s3.bucket}/files/moved-2')")
    with refused("58030", message='storage "moved_bucket"', hint="attach"):
        db.admin.execute("SELECT n FROM acme.moved")
    db.admin.execute("DROP SERVER moved_bucket CASCADE")
    with refused("58030"):
        db.admin.execute("SELECT n FROM acme.moved")


def test_missing_buckets_and_wrong_credentials(db, bucket, s3, s3_strict, quick):
    nowhere = s3.storage("p")
    nowhere.options["url"] = "s3://no-such-bucket/p"
    nowhere.create(db.admin, "nowhere")
    strict = s3_strict.storage("strict")
    strict.credentials["secret_access_key"] = wrong = secrets.token_hex(20)
    strict.create(db.admin, "strict_bucket")
    # The same bucket name in two stores: which one is meant is told by the prefix.
    url = strict.put("x.csv", b"n\n1\n")
    for there, reason in (("s3://no-such-bucket/p/x.csv", "the bucket does not exist"), (url, "access denied")):
        for call in (
            lambda there=there: load(db.admin, "denied", there),
            lambda there=there: attach(db.admin, "denied", there),
            lambda there=there: load(db.admin, "denied", there.replace("x.csv", "*.csv")),
        ):
            with pytest.raises(psycopg.Error) as caught:
                call()
            assert caught.value.sqlstate == "58030", caught.value
            assert reason in str(caught.value)
            assert caught.value.diag.message_hint
            for secret in (wrong, strict.credentials["access_key_id"]):
                assert secret not in f"{caught.value}{caught.value.diag.message_hint}"
        with pytest.raises(psycopg.Error) as caught:
            save(db.admin, "SELECT 1", there.replace("x.csv", "new.csv"))
        assert caught.value.sqlstate == "58030", caught.value
    change = sql.SQL("ALTER USER MAPPING FOR CURRENT_USER SERVER strict_bucket OPTIONS (SET secret_access_key {})")
    db.admin.execute(change.format(sql.Literal(s3_strict.secret)))
    assert load(db.admin, "allowed", url) == 1
    attach(db.admin, "allowed_table", url)
    assert db.one("SELECT n FROM acme.allowed_table") == 1
    assert save(db.admin, "SELECT 1 AS n", f"{strict.url}/new.csv") == 1


# -- faults ------------------------------------------------------------------------------------------------------

SLOW_DOWN = {"s3_error": "SlowDown", "status": 503}
READ_FAULTS = {
    "throttled": {"every": 2, "times": 4, "fault": SLOW_DOWN},
    "reset before": {"every": 2, "times": 4, "fault": {"reset": "before"}},
    "answer lost": {"every": 2, "times": 4, "fault": {"reset": "after"}},
    "cut short": {"every": 2, "times": 4, "fault": {"truncate": 500}},
}


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_faults_while_reading(db, bucket, through, no_cache, fault):
    rows = 6_000
    name = fault.replace(" ", "_")
    content = lines(rows)
    there = {"x.csv": content, "x.csv.gz": gzip.compress(content, 1)}
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table_of(5_000), sink, row_group_size=500)
    there["x.parquet"] = sink.getvalue().to_pybytes()
    for path, bytes in there.items():
        bucket.put(f"faults/{name}/{path}", bytes)
        count = 5_000 if path == "x.parquet" else rows
        collection = f"{name}_{path.replace('.', '_')}"
        rule = {"match": {"method": "GET"}, **READ_FAULTS[fault]}
        through.set(rule)
        assert load(db.admin, collection, f"{bucket.url}/faults/{name}/{path}") == count
        assert through.fired()[0] > 0
        assert counted(db, collection) == whole(count)
        through.set(rule)
        attach(db.admin, f"{collection}_table", f"{bucket.url}/faults/{name}/{path}")
        assert counted(db, f"{collection}_table") == whole(count)
    through.clear()


WRITE_FAULTS = {
    "throttled": ("small", {"match": {"method": "PUT"}, "times": 2, "fault": SLOW_DOWN}),
    "answer lost": ("small", {"match": {"method": "PUT"}, "times": 1, "fault": {"reset": "after"}}),
    "part reset": ("large", {"match": {"method": "PUT"}, "times": 1, "fault": {"reset": "before"}}),
    "part lost": ("large", {"match": {"method": "PUT"}, "times": 1, "fault": {"reset": "after"}}),
    "begin lost": ("large", {"match": {"method": "POST", "path": "uploads"}, "times": 1, "fault": {"reset": "after"}}),
    "end lost": ("large", {"match": {"method": "POST", "path": "uploadId"}, "times": 1, "fault": {"reset": "after"}}),
    "end throttled": ("large", {"match": {"method": "POST", "path": "uploadId"}, "times": 2, "fault": SLOW_DOWN}),
}


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_faults_while_writing(db, bucket, through, fault):
    size, rule = WRITE_FAULTS[fault]
    rows = 80_000 if size == "large" else 100
    query = f"SELECT g AS n, sha512(g::text::bytea)::text AS noise FROM generate_series(1, {rows}) g"
    url = f"{bucket.url}/written/{fault.replace(' ', '_')}.csv"
    through.set(rule)
    assert save(db.admin, query, url) == rows
    assert through.fired() == [rule["times"]]
    through.clear()
    text = bucket.get(url.removeprefix(bucket.url + "/")).decode().splitlines()
    assert text[1:] == [f"{n},{noise}" for n, noise in db.all(query)]
    assert bucket.uploads() == 0


def test_an_upload_that_fails_leaves_nothing(db, bucket, through, quick):
    query = "SELECT g AS n, sha512(g::text::bytea)::text AS noise FROM generate_series(1, 80000) g"
    through.set({"match": {"method": "PUT"}, "skip": 1, "fault": SLOW_DOWN})
    with refused("58030", message="503", hint="try again"):
        save(db.admin, query, f"{bucket.url}/failed/x.csv")
    through.clear()
    wait_until(lambda: bucket.uploads() == 0, "the end of the upload")
    assert not [path for path in bucket.objects() if "failed" in path]


def test_an_outage_in_the_middle_doubles_nothing(db, bucket, through, quick, no_cache):
    first, rows = 40_000, 45_000
    db.configure(flush_size="1MB")
    bucket.put("outage/x.csv", lines(first))
    bucket.put("outage/y.csv.gz", gzip.compress(lines(rows - first, first), 1))
    pattern = f"{bucket.url}/outage/*"
    seen = [0]
    try:
        for skip in (6, 6):
            through.set({"match": {"method": "GET", "path": "outage/[xy]"}, "skip": skip, "fault": {"reset": "before"}})
            with refused("58030", message="could not read file", hint="try again"):
                load(db.admin, "outage", pattern)
            stored = db.one("SELECT events::int FROM rakam.stat_collection WHERE collection = 'outage'")
            assert seen[-1] < stored < rows, "each attempt goes on from the one before"
            seen.append(stored)
        through.clear()
        assert load(db.admin, "outage", pattern) == rows
    finally:
        db.configure(flush_size=None)
    assert counted(db, "outage") == whole(rows)
    assert db.one("SELECT count(*) FROM rakam_internal.file_load") == 0
    through.set({"match": {"method": "GET"}, "fault": {"reset": "before"}})
    with refused("58030"):
        attach(db.admin, "outage_table", pattern)
    through.clear()
    attach(db.admin, "outage_table", pattern)
    through.set({"match": {"method": "GET", "path": "outage/[xy]"}, "skip": 3, "fault": SLOW_DOWN})
    with refused("58030", message="could not read file"):
        db.all("SELECT sum(n) FROM acme.outage_table")
    through.clear()
    assert counted(db, "outage_table") == whole(rows)


def test_a_cancel_does_not_wait_for_the_store(db, bucket, through, no_cache):
    url = bucket.put("cancel/x.csv", lines(10_000))
    attach(db.admin, "cancel", url)
    slow = {"match": {"method": "GET"}, "fault": {"delay_ms": 20_000}}
    calls = {
        "a load": lambda s: load(s, "cancelled", url),
        "a scan": lambda s: s.execute("SELECT sum(n) FROM acme.cancel").fetchall(),
        "an attach": lambda s: attach(s, "cancelled_table", f"{bucket.url}/cancel"),
        "an export": lambda s: save(s, "SELECT 1", f"{bucket.url}/cancel/new.csv"),
    }
    for what, call in calls.items():
        through.set({**slow, "match": {}} if what == "an export" else slow)
        session, thread, outcome = in_background(db, call)
        wait_until(lambda: through.fired()[0] > 0, f"{what} at the store")
        began = time.monotonic()
        session.cancel()
        thread.join(15)
        assert isinstance(outcome[0], psycopg.errors.QueryCanceled), what
        print(f"{what}: cancelled after {1000 * (time.monotonic() - began):.0f} ms")
        # The session is as good as new.
        through.clear()
        assert one(session, "SELECT count(*) FROM (SELECT n FROM acme.cancel LIMIT 10) s") == 10
        session.close()
    wait_until(lambda: not db.all("SELECT FROM rakam.stat_progress"), "the end of the load")
    assert "cancel/new.csv" not in bucket.objects()
