"""Fixtures: one private cluster for the session, a new database with the extension for each module.

Where pytest-xdist runs files side by side, each of its processes is a session: with a cluster and services of its own.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.buckets import S3, FaultProxy  # noqa: E402
from harness.cluster import Cluster  # noqa: E402
from harness.database import Database  # noqa: E402
from harness.kafka import Kafka  # noqa: E402
from harness.kinesis import Kinesis  # noqa: E402
from harness.lake import make_storage  # noqa: E402
from harness.services import Unavailable  # noqa: E402

CLUSTER = "-".join(filter(None, (os.environ.get("RAKAM_TEST_CLUSTER", "e2e"), os.environ.get("PYTEST_XDIST_WORKER"))))
# Of all processes: they inherit it.
SEED = int(os.environ.setdefault("RAKAM_SEED", str(random.SystemRandom().randrange(1, 1_000_000))))

# Short intervals, so that a test sees every background step without waiting for it.
SETTINGS = {
    "rakam.digest_interval": "100ms",
    "rakam.digest_max_age": "1s",
    "rakam.rotation_interval": "2s",
    "max_connections": "100",
}


# Deletions are seen at once, not after three days.
AT_ONCE = {"rakam.file_retention": "0"}


def pytest_report_header(config) -> list[str]:
    # Side by side each process has one of its own.
    cluster = Cluster(f"{CLUSTER}-gw*" if config.getoption("numprocesses", None) else CLUSTER)
    return [
        f"cluster: {cluster.folder} ({cluster.profile}; log {cluster.log})",
        f"seed: {SEED} (RAKAM_SEED={SEED} repeats it)",
    ]


@pytest.fixture(scope="session")
def cluster():
    cluster = Cluster(CLUSTER)
    cluster.destroy()
    cluster.start(SETTINGS)
    yield cluster
    if os.environ.get("RAKAM_KEEP"):
        cluster.stop()
    else:
        cluster.destroy()


@pytest.fixture(scope="session")
def s3():
    """An S3 store that takes any key (moto)."""
    with S3() as store:
        yield store


@pytest.fixture(scope="session")
def s3_strict():
    """An S3 store that checks signatures (s3s-fs)."""
    with S3("fs") as store:
        yield store


def available(make):
    """What `make` makes; where the machine lacks what it runs on the test is skipped."""
    try:
        return make()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def kafka():
    """A real Kafka broker."""
    with available(Kafka) as broker:
        yield broker


@pytest.fixture
def private_kafka():
    """A broker of the test's own, which it may kill."""
    with available(Kafka) as broker:
        yield broker


@pytest.fixture(scope="session")
def kinesis():
    """A Kinesis service that is near to the meaning (kinesis-mock)."""
    with available(Kinesis) as service:
        yield service


@pytest.fixture(scope="session")
def kinesis_fast():
    """A Kinesis service that is fast and knows less (kinesalite)."""
    with available(lambda: Kinesis("lite")) as service:
        yield service


@pytest.fixture
def fault_proxy(s3):
    """A proxy in front of `s3`, at first without faults."""
    with FaultProxy(s3.endpoint, SEED) as proxy:
        yield proxy


@pytest.fixture
def private_cluster(request):
    """Makes further clusters, for tests that crash the server or change its settings; removed after the test."""
    made: list[Cluster] = []

    def make(suffix: str, settings: dict[str, str] | None = None) -> Cluster:
        cluster = Cluster(f"{CLUSTER}-{suffix}")
        cluster.destroy()
        made.append(cluster)
        return cluster.start({**SETTINGS, **(settings or {})})

    make.made = made
    yield make
    for cluster in made:
        cluster.destroy()


@pytest.fixture(scope="module")
def db(cluster, request):
    """A database with the extension, named after the module."""
    database = Database(cluster, request.module.__name__.rsplit(".", 1)[-1])
    database.drop()
    database.create()
    yield database
    database.drop()


@pytest.fixture(scope="module")
def keys(db, request):
    """The keys of the module's project."""
    return db.project(request.module.PROJECT)


@pytest.fixture(scope="module")
def writer(db, keys, request):
    return db.login(request.module.PROJECT, "write")


@pytest.fixture(scope="module")
def admin(db, keys, request):
    return db.login(request.module.PROJECT, "admin")


@pytest.fixture(scope="module")
def reader(db, keys, request):
    return db.login(request.module.PROJECT, "read")


@pytest.fixture
def fresh(db, request):
    """A project of its own for a test."""
    name = "p_" + request.node.name.split("[")[0].removeprefix("test_")[:30].strip("_")
    db.project(name)
    return name


@pytest.fixture(scope="session")
def lake_cluster():
    """A cluster in which files that are not used any more may go at once."""
    cluster = Cluster(f"{CLUSTER}-lake")
    cluster.destroy()
    yield cluster.start({**SETTINGS, **AT_ONCE})
    cluster.destroy()


@pytest.fixture
def lake(lake_cluster):
    """A database of its own with the storage `lake` and the project `acme` on it; and the storage's folder."""
    db = Database(lake_cluster, "lake")
    db.drop()
    db.create()
    folder = make_storage(db, "lake")
    db.project("acme", "lake")
    yield db, folder
    db.admin.execute("ALTER SYSTEM RESET ALL")
    db.admin.execute("SELECT pg_reload_conf()")
    db.drop()
    for left in lake_cluster.folder.glob("storage-*"):
        shutil.rmtree(left)


@pytest.fixture
def seed(request) -> int:
    """The run's seed, printed with a failure; the same for every test, so that one test alone repeats."""
    print(f"seed {SEED}")
    return SEED


@pytest.fixture(autouse=True)
def server_stays_up(request):
    """No test may crash the server behind its back: a restart of all processes shows in the log."""
    mark_of = {}
    if "cluster" in request.fixturenames or "db" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        mark_of[cluster] = cluster.log_mark()
    yield
    for cluster, mark in mark_of.items():
        log = cluster.log_since(mark)
        crashed = [line for line in log.splitlines() if "was terminated by signal" in line or "PANIC:" in line]
        assert not crashed, f"the server crashed during the test: {crashed}"
