"""The SQL of README.md works as printed: every ```sql block, in order, in a new database, as psql runs it."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest
from harness.cluster import ROOT
from harness.database import Database

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


def test_every_block_runs(fresh, cluster):
    lake = cluster.make_folder("readme-lake")
    assert len(blocks()) >= 8
    for number, (heading, text) in enumerate(blocks()):
        script = text.replace("/var/lib/rakam/lake", str(lake))
        began = time.monotonic()
        done = subprocess.run(
            [*cluster.psql_command("readme"), "-X", "-v", "ON_ERROR_STOP=1", "-f", "-"],
            input=script,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"block {number} under {heading!r}:\n{done.stdout[-1500:]}\n{done.stderr}"
        if heading == "A minute with it":
            assert time.monotonic() - began < 60
            if "collect_batch" in text:
                assert "/pricing" in done.stdout
                assert re.search(r"/signup +\| +1 \| +240", done.stdout), done.stdout
    assert list(Path(lake).rglob("*.parquet"))


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
