"""DuckDB with its extension for S3, in a process of its own: packages have the extension for this version only, which is not
the one that the tests import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from pathlib import Path

PACKAGES = ["duckdb==1.5.5", "duckdb-extension-httpfs==1.5.5"]
PROCESS = Path(__file__).with_name("duck_s3_process.py")


def install() -> Path:
    """The environment's Python; it is made when it is not there."""
    services = Path(os.environ.get("RAKAM_SERVICES_DIR", Path.home() / ".cache/rakam-services"))
    folder = services / "cache/venv-duckdb-s3"
    done = folder / ".installed"
    if not done.exists() or done.read_text() != " ".join(PACKAGES):
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip = [folder / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES]
        subprocess.run(pip, check=True)
        done.write_text(" ".join(PACKAGES))
    return folder / "bin/python"


class DuckS3:
    """`environment` names an S3 service as pg_test/services/s3.sh does; every query asks it anew."""

    def __init__(self, environment: dict[str, str], endpoint: str):
        self.process = subprocess.Popen(
            [install(), PROCESS],
            env={**os.environ, **environment, "DUCK_ENDPOINT": endpoint},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, query: str) -> tuple[float, list]:
        """Seconds, and rows whose values are texts."""
        self.process.stdin.write(json.dumps({"query": query}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["seconds"], answer["rows"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
