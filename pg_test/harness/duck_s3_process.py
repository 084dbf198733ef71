"""DuckDB over S3, as a process: one JSON object a line in ({"query": …}), one out ({"seconds": …, "rows": …}).

Runs with a DuckDB whose httpfs extension is in a package; every query has an instance of its own, so that nothing is
cached from the one before.
"""

from __future__ import annotations

import glob
import json
import os
import sys
import time

import duckdb


def connect() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config={"autoinstall_known_extensions": False})
    site = os.path.dirname(os.path.dirname(duckdb.__file__))
    (extension,) = glob.glob(f"{site}/duckdb_extension_httpfs/extensions/*/*.duckdb_extension")
    connection.execute(f"LOAD '{extension}'")
    connection.execute("SET TimeZone = 'UTC'")
    endpoint = os.environ["DUCK_ENDPOINT"].split("://")[1]
    connection.execute(
        f"CREATE SECRET (TYPE s3, KEY_ID '{os.environ['AWS_ACCESS_KEY_ID']}',"
        f" SECRET '{os.environ['AWS_SECRET_ACCESS_KEY']}', REGION 'us-east-1', ENDPOINT '{endpoint}',"
        " USE_SSL false, URL_STYLE 'path')"
    )
    return connection


for line in sys.stdin:
    query = json.loads(line)["query"]
    connection = connect()
    began = time.perf_counter()
    rows = connection.execute(query).fetchall()
    seconds = time.perf_counter() - began
    connection.close()
    print(json.dumps({"seconds": seconds, "rows": [[str(value) for value in row] for row in rows]}), flush=True)
