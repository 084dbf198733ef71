"""The SQL of README.md works as printed: every ```sql block, in order, in a new database, as psql runs it; and what leads
from nothing to a topic or a stream in the lake, with a real Kafka and a Kinesis in place of the addresses."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from harness.cluster import ROOT, Cluster
from harness.database import Database, wait_until

README = (ROOT / "README.md").read_text()


def blocks() -> list[tuple[str, str]]:
    """(heading, SQL) of each block."""
    found = []
    heading = ""
    for match in re.finditer(r"^#+ ([^\n]+)$|^```sql\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1]
        else:
            found.append((heading, match[2]))
    return found


@pytest.fixture(scope="module")
def fresh(cluster):
    database = Database(cluster, "readme")
    database.drop()
    database.create(extension=False)
    yield database
    database.drop()
    with cluster.connect() as postgres:
        postgres.execute("DROP ROLE IF EXISTS metabase")


def statements(block: str) -> list[str]:
    return [found.strip() for found in re.sub("--.*", "", block).split(";") if found.strip()]


def psql(cluster: Cluster, database: str, script: str) -> subprocess.CompletedProcess:
    command = [*cluster.psql_command(database), "-X", "-v", "ON_ERROR_STOP=1", "-f", "-"]
    return subprocess.run(command, input=script, capture_output=True, text=True)


def test_every_block_runs(fresh, cluster):
    lake = cluster.make_folder("readme-lake")
    assert len(blocks()) >= 8
    for number, (heading, text) in enumerate(blocks()):
        script = text.replace("/var/lib/rakam/lake", str(lake))
        if "create_source" in text:
            # There is nothing at these addresses: what comes of it the tests below see.
            script = ";".join(statements(text)[:-1])
        began = time.monotonic()
        done = psql(cluster, "readme", script)
        assert done.returncode == 0, f"block {number} under {heading!r}:\n{done.stdout[-1500:]}\n{done.stderr}"
        if heading == "A minute with it":
            assert time.monotonic() - began < 60
            if "collect_batch" in text:
                assert "/pricing" in done.stdout
                assert re.search(r"/signup +\| +1 \| +240", done.stdout), done.stdout
    assert list(Path(lake).rglob("*.parquet"))


def follow(cluster: Cluster, kind: str, replaced: dict[str, str], expected: int) -> None:
    """Runs the five statements that begin a source of a kind, in a new database of a server as it comes; the last one
    has to count so many events in the end."""
    (block,) = (text for _, text in blocks() if f"TYPE '{kind}'" in text and "create_source" in text)
    for written, real in replaced.items():
        assert block.count(written) == 1, f"{written} in {block}"
        block = block.replace(written, real)
    *begin, look = statements(block)
    assert len(begin) == 4
    name = f"readme_{kind}"
    database = Database(cluster, name)
    database.create(extension=False)
    for statement in begin:
        done = psql(cluster, name, statement)
        assert done.returncode == 0, f"{statement}: {done.stderr}"

    def shown() -> str:
        done = psql(cluster, name, look)
        return done.stdout + done.stderr

    wait_until(lambda: re.search(rf"^ +{expected}$", shown(), re.MULTILINE), lambda: f"{look}: {shown()}", 120, 0.2)
    database.close()


def test_from_nothing_to_a_topic_in_the_lake(private_cluster, kafka):
    kafka.create_topic("pageview", 2)
    kafka.send("pageview", [json.dumps({"page": f"/{n}"}) for n in range(300)])
    cluster = private_cluster("readme").restart()
    follow(cluster, "kafka", {"localhost:9092": kafka.brokers}, 300)
    # It goes on by itself, and so do topics of the pattern.
    kafka.create_topic("order_paid", 1)
    kafka.send("order_paid", [json.dumps({"amount": n}) for n in range(20)])
    database = Database(cluster, "readme_kafka")
    wait_until(
        lambda: (
            dict(database.all("SELECT _collection, count(*) FROM clicks._all GROUP BY 1"))
            == {"pageview": 300, "order_paid": 20}
        ),
        "events of both topics",
        120,
        0.2,
    )
    database.close()


def test_from_nothing_to_a_stream_in_the_lake(private_cluster, kinesis):
    kinesis.create_stream("readings", 2)
    kinesis.send("readings", [(f"device {n % 7}", json.dumps({"celsius": n / 10}).encode()) for n in range(200)])
    cluster = private_cluster("readme")
    # As on a machine that has keys of its own.
    cluster.server_environment = {
        "AWS_ACCESS_KEY_ID": kinesis.credentials["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": kinesis.credentials["secret_access_key"],
    }
    cluster.restart()
    options = ", ".join(f"{name} '{value}'" for name, value in kinesis.options.items())
    follow(cluster, "kinesis", {"region 'eu-central-1'": options}, 200)


def test_the_settings_table_is_complete(fresh):
    """Every setting of the extension is in the table with its default, and nothing else is."""
    fresh.admin.execute("LOAD 'rakam'")
    actual = {
        name: (value, unit)
        for name, value, unit in fresh.all("SELECT name, boot_val, unit FROM pg_settings WHERE name LIKE 'rakam.%'")
    }
    documented = dict(re.findall(r"^\| `(rakam\.[a-z_]+)` \| ([^|]+?) \|", README, re.MULTILINE))
    assert set(documented) == set(actual)
    for name, default in documented.items():
        boot, unit = actual[name]
        # A negative number is a choice of its own, without a unit.
        unit = "" if boot.startswith("-") else unit or ""
        assert base_units(default.strip("`")) == base_units(f"{boot}{unit}"), name


# In milliseconds and bytes.
UNITS = {
    "ms": 1,
    "s": 1_000,
    "min": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
    "B": 1,
    "kB": 1 << 10,
    "MB": 1 << 20,
    "GB": 1 << 30,
}


def base_units(setting: str) -> str | int:
    match = re.fullmatch(r"(\d+) ?(ms|s|min|h|d|B|kB|MB|GB)", setting)
    return int(match[1]) * UNITS[match[2]] if match else setting
