"""Storages in S3 buckets: options, credentials and their secrecy, TLS, encryption, faults, cancel."""

from __future__ import annotations

import json
import secrets
import threading
import time
from pathlib import Path

import psycopg
import pytest
from harness.buckets import S3, create_storage
from harness.database import collect, collect_batch, refused, wait_until
from psycopg import sql


@pytest.fixture(scope="module", autouse=True)
def no_cache(db):
    """Every read is one of the store."""
    db.admin.execute("ALTER SYSTEM SET rakam.cache_size = 0")
    db.admin.execute("SELECT pg_reload_conf()")
    yield
    db.admin.execute("ALTER SYSTEM RESET rakam.cache_size")
    db.admin.execute("SELECT pg_reload_conf()")


@pytest.fixture(scope="module")
def quick(db):
    """Failing calls are given up after a second."""
    db.admin.execute("ALTER SYSTEM SET rakam.storage_timeout = '1s'")
    db.admin.execute("SELECT pg_reload_conf()")
    wait_until(lambda: db.connect().execute("SHOW rakam.storage_timeout").fetchone() == ("1s",), "the setting")
    yield
    db.admin.execute("ALTER SYSTEM RESET rakam.storage_timeout")
    db.admin.execute("SELECT pg_reload_conf()")


@pytest.fixture
def lake(request, db, s3):
    """A project of its own in a prefix of its own: its name."""
    return make(db, s3, request.node.name)


def make(db, s3, name: str, endpoint: str | None = None, **options: str) -> str:
    """A project and its storage, both named after a test."""
    short = "t_" + "".join(c if c.isalnum() else "_" for c in name.removeprefix("test_").lower())[:36].strip("_")
    there = s3.storage(f"bucket/{short}", endpoint)
    there.options.update(options)
    there.create(db.admin, short)
    db.project(short, short)
    return short


def fill(db, project: str, collection: str, count: int, first: int = 0) -> None:
    events = [(collection, {"n": n}) for n in range(first, first + count)]
    _, rejected, _, errors = collect_batch(db.admin, project, events)
    assert rejected == 0, errors


@pytest.mark.parametrize(
    ("options", "sqlstate", "hint"),
    [
        ("url 's3://b/p', nonsense 'x'", "HV00D", "region"),
        ("url 's3://b/p', region ''", "22023", ""),
        ("url 's3://b/p', endpoint 'http://127.0.0.1:1'", "22023", "allow_http"),
        ("url 's3://b/p', endpoint 'hunter2'", "22023", "https://"),
        ("url 's3://b/p', allow_http 'perhaps'", "22023", "true"),
        ("url 's3://b/p', sse 'rot13'", "22023", "AES256"),
        ("url 's3://b/p', sse_kms_key_id 'hunter2'", "22023", "sse"),
        ("url 's3://key:hunter2@b/p'", "22023", ""),
        ("url 's3://'", "22023", ""),
        ("url 's3://b/p?sig=hunter2'", "22023", ""),
        ("url 'gs://b/p', sse 'AES256'", "22023", "endpoint"),
        ("url 'az://b/p', region 'x'", "22023", "endpoint"),
        ("url 'file:///tmp/x', region 'x'", "22023", "url"),
        ("url 'hdfs://namenode/x'", "0A000", "bucket"),
        ("url 's3://b/p', access_key_id 'hunter2'", "HV00D", "region"),
        ("region 'x'", "HV00J", "url"),
    ],
)
def test_options_that_do_not_work_are_refused(db, options, sqlstate, hint):
    with pytest.raises(psycopg.Error) as caught:
        db.admin.execute(f"CREATE SERVER broken FOREIGN DATA WRAPPER rakam OPTIONS ({options})")
    assert caught.value.sqlstate == sqlstate, caught.value
    assert hint in (caught.value.diag.message_hint or ""), caught.value.diag.message_hint
    assert "hunter2" not in f"{caught.value.diag.message_primary}{caught.value.diag.message_hint}"


@pytest.mark.parametrize("scheme", ["s3", "s3a", "gs", "gcs", "az", "azure", "abfss"])
def test_every_scheme_is_taken(db, scheme):
    name = f"scheme_{scheme}"
    db.admin.execute(f"CREATE SERVER {name} FOREIGN DATA WRAPPER rakam OPTIONS (url '{scheme}://bucket/prefix')")
    db.admin.execute(f"DROP SERVER {name}")


@pytest.mark.parametrize(
    ("options", "sqlstate"),
    [
        ("password 'hunter2'", "HV00D"),
        ("access_key_id 'hunter2'", "22023"),
        ("secret_access_key 'hunter2'", "22023"),
        ("access_key_id 'hunter2', secret_access_key ''", "22023"),
        ("access_key_id 'hunter2', secret_access_key 'hunter2', account_key 'hunter2'", "22023"),
        ("account_name 'a', account_key 'hunter2', sas_token 'sig=hunter2'", "22023"),
        ("account_name 'a', sas_token 'hunter2'", "22023"),
    ],
)
def test_credentials_that_do_not_work_are_refused(db, options, sqlstate):
    db.admin.execute("CREATE SERVER IF NOT EXISTS mapped FOREIGN DATA WRAPPER rakam OPTIONS (url 's3://b/p')")
    with pytest.raises(psycopg.Error) as caught:
        db.admin.execute(f"CREATE USER MAPPING FOR CURRENT_USER SERVER mapped OPTIONS ({options})")
    assert caught.value.sqlstate == sqlstate
    assert caught.value.diag.message_hint
    assert "hunter2" not in f"{caught.value.diag.message_primary}{caught.value.diag.message_hint}"


def test_only_admins_name_storages(db, lake):
    outsider = db.login(lake, "admin")
    db.admin.execute(sql.SQL("ALTER SERVER {} OWNER TO postgres").format(sql.Identifier(lake)))
    with refused("42501"):
        outsider.execute("CREATE SERVER own FOREIGN DATA WRAPPER rakam OPTIONS (url 's3://b/p')")
    with refused("42501"):
        outsider.execute(f"ALTER SERVER {lake} OPTIONS (SET url 's3://elsewhere/p')")


def set_secret(db, server: str, secret: str) -> None:
    db.admin.execute(
        sql.SQL("ALTER USER MAPPING FOR CURRENT_USER SERVER {} OPTIONS (SET secret_access_key {})").format(
            sql.Identifier(server), sql.Literal(secret)
        )
    )


def test_credentials_change_without_a_restart_and_are_never_shown(db, cluster, s3_strict, quick):
    """A session and the resident worker go on with new credentials, a repeatable-read transaction too. Neither the right
    secret nor a wrong one is in the log, in an error, in EXPLAIN or in a view."""
    project = make(db, s3_strict, "credentials")
    mark = cluster.log_mark()
    reader = db.login(project, "read", "admin")
    fill(db, project, "c", 100)
    db.flush(project, "c")
    query = f"SELECT sum(n) FROM {project}.c"
    shown = [str(reader.execute(f"EXPLAIN (ANALYZE, VERBOSE) {query}").fetchall())]
    snapshot = db.connect(autocommit=False)
    snapshot.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    assert snapshot.execute(query).fetchone() == (4950,)

    wrong = secrets.token_hex(16)
    set_secret(db, project, wrong)
    fill(db, project, "c", 100, 100)
    with pytest.raises(psycopg.Error) as caught:
        reader.execute(query)
    assert caught.value.sqlstate == "58030", caught.value
    shown.append(str(caught.value.diag.message_primary) + str(caught.value.diag.message_hint) + str(caught.value))
    with pytest.raises(psycopg.Error) as caught:
        db.flush(project, "c")
    assert caught.value.sqlstate == "58030"
    assert "access denied" in str(caught.value)
    shown.append(str(caught.value))

    set_secret(db, project, s3_strict.secret)
    assert reader.execute(query).fetchone() == (19_900,)
    assert snapshot.execute(query).fetchone() == (4950,)
    snapshot.close()
    db.flush(project, "c")
    assert db.tiers(project, "c") == {"inbox": 0, "hot": 0, "cold": 200}

    db.admin.execute("SELECT 1")
    views = ("projects", "collections", "data_files", "stat_collection", "stat_worker", "stat_progress", "audit_log")
    for view in views:
        shown.append(str(db.all(f"SELECT v::text FROM rakam.{view} v")))
    shown.append(str(db.all("SELECT h::text FROM rakam.health() h")))
    shown.append(str(db.all("SELECT query FROM pg_stat_activity")))
    for catalog in ("pg_foreign_server", "pg_user_mappings", "pg_foreign_table"):
        shown.append(str(reader.execute(f"SELECT c::text FROM {catalog} c").fetchall()))
    with refused("42501"):
        reader.execute("SELECT umoptions FROM pg_user_mapping")
    shown.append(cluster.log_since(mark))
    for text in shown:
        assert s3_strict.secret not in text
        assert wrong not in text


def test_several_storages_in_one_database(db, s3, s3_strict):
    one, two = make(db, s3, "several_one"), make(db, s3_strict, "several_two")
    db.project("several_local")
    for number, project in enumerate((one, two, "several_local")):
        fill(db, project, "c", 100, 100 * number)
        db.flush(project, "c")
    query = f"SELECT sum(n) FROM (SELECT n FROM {one}.c UNION ALL SELECT n FROM {two}.c UNION ALL SELECT n FROM several_local.c) u"
    assert db.one(query) == sum(range(300))
    assert {storage for (storage,) in db.all("SELECT storage FROM rakam.projects")} >= {one, two, "rakam_local"}


@pytest.mark.parametrize(
    ("name", "options", "headers"),
    [
        ("plain_key", {"sse": "AES256"}, {"x-amz-server-side-encryption": "AES256"}),
        (
            "kms",
            {"sse": "aws:kms", "sse_kms_key_id": "alias/rakam", "sse_bucket_key": "true"},
            {"x-amz-server-side-encryption": "aws:kms", "x-amz-server-side-encryption-aws-kms-key-id": "alias/rakam"},
        ),
    ],
)
def test_objects_are_encrypted_as_asked(db, s3, name, options, headers):
    project = make(db, s3, f"sse_{name}", **options)
    fill(db, project, "c", 10)
    db.flush(project, "c")
    path = db.one("SELECT path FROM rakam.data_files WHERE project = %s", project).removeprefix("s3://")
    with s3.request("HEAD", path) as answer:
        assert headers.items() <= {key.lower(): value for key, value in answer.headers.items()}.items()
    assert db.one(f"SELECT sum(n) FROM {project}.c") == 45


def test_tls(db, cluster, quick):
    with S3(tls=True) as store:
        # Where the server may read it.
        authority = cluster.make_folder("tls") / "ca.pem"
        authority.write_text(Path(store.ca_file).read_text())
        authority.chmod(0o644)
        trusted = make(db, store, "tls", ca_file=str(authority))
        fill(db, trusted, "c", 10)
        db.flush(trusted, "c")
        assert db.one(f"SELECT sum(n) FROM {trusted}.c") == 45
        untrusted = make(db, store, "tls_untrusted")
        fill(db, untrusted, "c", 10)
        with refused("58030", message="certificate is not trusted"):
            db.flush(untrusted, "c")


def test_a_missing_bucket_and_a_missing_object(db, s3, lake, quick):
    fill(db, lake, "c", 10)
    db.flush(lake, "c")
    (path,) = s3.storage(f"bucket/{lake}").objects()
    store = s3.storage(f"bucket/{lake}").filesystem
    store.move(f"{s3.bucket}/bucket/{lake}/{path}", f"{s3.bucket}/aside")
    with refused("58P01", hint="Try again; if the file stays away, see what rakam.check_storage()"):
        db.admin.execute(f"SELECT sum(n) FROM {lake}.c")
    store.move(f"{s3.bucket}/aside", f"{s3.bucket}/bucket/{lake}/{path}")
    assert db.one(f"SELECT sum(n) FROM {lake}.c") == 45

    there = s3.storage("p")
    there.options["url"] = "s3://no-such-bucket/p"
    there.create(db.admin, "no_bucket")
    db.project("no_bucket", "no_bucket")
    fill(db, "no_bucket", "c", 10)
    with refused("58030", message="bucket does not exist"):
        db.flush("no_bucket", "c")
    assert db.one("SELECT sum(n) FROM no_bucket.c") == 45


SLOW_DOWN = {"s3_error": "SlowDown", "status": 503}
BROKEN = {"s3_error": "InternalError", "status": 500}
# What a store does to writers, at each of the requests that a small object and one in parts need.
WRITE_FAULTS = {
    "throttled": ("small", {"match": {"method": "PUT"}, "times": 3, "fault": SLOW_DOWN}),
    "broken": ("small", {"match": {"method": "PUT"}, "times": 2, "fault": BROKEN}),
    "reset before": ("small", {"match": {"method": "PUT"}, "times": 2, "fault": {"reset": "before"}}),
    "answer lost": ("small", {"match": {"method": "PUT"}, "times": 1, "fault": {"reset": "after"}}),
    "slow": ("small", {"match": {"method": "PUT"}, "times": 1, "fault": {"delay_ms": 300}}),
    "part lost": ("large", {"match": {"method": "PUT"}, "times": 1, "fault": {"reset": "after"}}),
    "begin lost": ("large", {"match": {"method": "POST", "path": "uploads"}, "times": 1, "fault": {"reset": "after"}}),
    "end lost": ("large", {"match": {"method": "POST", "path": "uploadId"}, "times": 1, "fault": {"reset": "after"}}),
    "end throttled": ("large", {"match": {"method": "POST", "path": "uploadId"}, "times": 2, "fault": SLOW_DOWN}),
}


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_faults_while_writing(db, s3, fault_proxy, fault):
    """Nothing is lost, doubled or left behind, whatever the store does; what may pass is tried again by the same call."""
    project = make(db, s3, f"w_{fault}", fault_proxy.url)
    size, rule = WRITE_FAULTS[fault]
    # Noise is not compressed: large is more than one part.
    noise = 9_000 if size == "large" else 10
    for start in range(0, 1_000, 500):
        events = [("c", {"n": start + n, "noise": secrets.token_urlsafe(noise)}) for n in range(500)]
        collect_batch(db.admin, project, events)
    fault_proxy.set(rule)
    db.flush(project)
    assert fault_proxy.fired() == [rule["times"]]
    fault_proxy.clear()
    found = db.admin.execute(f"SELECT count(*), sum(n), count(DISTINCT noise) FROM {project}.c").fetchone()
    assert found == (1_000, 499_500, 1_000)
    files = dict(db.all("SELECT path, bytes FROM rakam.data_files WHERE project = %s", project))
    there = s3.storage(f"bucket/{project}")
    assert {f"{there.url}/{path}": bytes for path, bytes in there.objects().items()} == files
    assert (max(files.values()) > 8 << 20) == (size == "large")


READ_FAULTS = {
    "throttled": {"times": 3, "fault": SLOW_DOWN},
    "broken": {"times": 2, "fault": BROKEN},
    "reset before": {"times": 2, "fault": {"reset": "before"}},
    "answer lost": {"times": 2, "fault": {"reset": "after"}},
    "cut short": {"times": 3, "fault": {"truncate": 500}},
    "slow": {"times": 2, "fault": {"bandwidth": 200_000}},
}


@pytest.fixture(scope="module")
def to_read(db, s3):
    """A project that is read through proxies: its storage's address is changed for each."""
    project = make(db, s3, "read_through_proxies")
    events = [("c", {"n": n, "noise": secrets.token_hex(20)}) for n in range(1_000)]
    collect_batch(db.admin, project, events)
    db.flush(project)
    return project


def through(db, server: str, endpoint: str) -> None:
    db.admin.execute(
        sql.SQL("ALTER SERVER {} OPTIONS (SET endpoint {})").format(sql.Identifier(server), sql.Literal(endpoint))
    )


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_faults_while_reading(db, to_read, fault_proxy, fault):
    through(db, to_read, fault_proxy.url)
    fault_proxy.set({"match": {"method": "GET"}, **READ_FAULTS[fault]})
    found = db.admin.execute(f"SELECT count(*), sum(n), count(DISTINCT noise) FROM {to_read}.c").fetchone()
    assert found == (1_000, 499_500, 1_000)


def test_a_store_that_stays_broken_is_a_clean_error(db, to_read, fault_proxy, quick):
    through(db, to_read, fault_proxy.url)
    session = db.connect()
    for fault in (SLOW_DOWN, {"reset": "before"}, {"truncate": 100}, {"s3_error": "AccessDenied", "status": 403}):
        fault_proxy.set({"match": {"method": "GET"}, "fault": fault})
        with refused("58030", hint="storage"):
            session.execute(f"SELECT count(noise) FROM {to_read}.c")
    fault_proxy.clear()
    assert session.execute(f"SELECT count(noise) FROM {to_read}.c").fetchone() == (1_000,)


def test_cancel_while_the_store_hangs(db, to_read, fault_proxy):
    """A query and a flush that wait for an answer which does not come end with the cancel, not with a timeout."""
    through(db, to_read, fault_proxy.url)
    fault_proxy.set({"fault": {"delay_ms": 120_000}})
    collect(db.admin, to_read, "hanging", {"n": 1})
    for statement in (f"SELECT count(noise) FROM {to_read}.c", f"SELECT rakam.flush('{to_read}', 'hanging')"):
        session = db.connect()
        ended: list[psycopg.Error] = []

        def run(session=session, statement=statement, ended=ended) -> None:
            try:
                session.execute(statement)
            except psycopg.Error as error:
                ended.append(error)

        before = fault_proxy.seen()
        waiting = threading.Thread(target=run)
        waiting.start()
        wait_until(lambda before=before: fault_proxy.seen() > before, "a request")
        began = time.monotonic()
        session.cancel()
        waiting.join(30)
        assert not waiting.is_alive()
        assert time.monotonic() - began < 20
        assert ended[0].sqlstate == "57014", ended
    fault_proxy.clear()
    db.flush(to_read)
    assert db.one(f"SELECT count(*) FROM {to_read}.hanging") == 1


def test_an_outage_stops_nobody(db, s3, fault_proxy, quick):
    """Collecting and hot reads go on, cold reads say what is wrong; then the backlog drains."""
    project = make(db, s3, "outage", fault_proxy.url)
    fill(db, project, "c", 100)
    db.flush(project, "c")
    fault_proxy.set({"fault": {"reset": "before"}})
    fill(db, project, "c", 100, 100)
    fill(db, project, "hot", 100)
    wait_until(lambda: db.one("SELECT to_regclass(%s) IS NOT NULL", f"{project}.hot"), "the table")
    assert db.one(f"SELECT sum(n) FROM {project}.hot") == sum(range(100))
    assert db.one(f"SELECT count(*) FROM {project}.c WHERE _time > now() + interval '1 day'") == 0
    with refused("58030", hint="can be reached"):
        db.admin.execute(f"SELECT sum(n) FROM {project}.c")
    with refused("58030", hint="collecting goes on meanwhile"):
        db.flush(project, "hot")
    assert db.one(f"SELECT sum(n) FROM {project}.hot") == sum(range(100))
    fault_proxy.clear()

    def drained() -> bool:
        try:
            db.flush(project)
        except psycopg.errors.IoError:
            return False
        return True

    wait_until(drained, "the backlog's end")
    assert db.one(f"SELECT sum(n) FROM {project}.c") == sum(range(200))
    assert db.tiers(project, "hot") == {"inbox": 0, "hot": 0, "cold": 100}


def test_a_service_accounts_key_is_not_shown(db):
    """It is JSON of many lines, and a wrong one is refused when it is used."""
    key = json.dumps({"client_email": "x", "private_key": "hunter2", "private_key_id": "hunter2"}, indent=1)
    create_storage(db.admin, "google", {"url": "gs://bucket/p"}, {"service_account_key": key})
    db.project("google_project", "google")
    fill(db, "google_project", "c", 1)
    with pytest.raises(psycopg.Error) as caught:
        db.flush("google_project", "c")
    assert caught.value.sqlstate in ("22023", "58030")
    assert "hunter2" not in str(caught.value)
