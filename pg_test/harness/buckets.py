"""S3 stores, buckets as storages, and a proxy between them and the server that injects faults."""

from __future__ import annotations

import functools
import json
import urllib.request
from typing import Any

from psycopg import sql

from .services import Services


class S3(Services):
    """An S3 store with one bucket. `engine`: `moto` takes any key, `fs` checks signatures."""

    def __init__(self, engine: str = "moto", tls: bool = False):
        super().__init__()
        found = self.start("s3", S3_ENGINE=engine, **({"S3_TLS": "1"} if tls else {}))
        self.endpoint = found["S3_ENDPOINT_URL"]
        self.bucket = found["S3_BUCKET"]
        self.key = found["AWS_ACCESS_KEY_ID"]
        self.secret = found["AWS_SECRET_ACCESS_KEY"]
        self.ca_file = found.get("S3_CA_FILE")

    def storage(self, prefix: str, endpoint: str | None = None) -> Bucket:
        return Bucket(self, prefix, endpoint or self.endpoint)

    def request(self, method: str, path: str, content: bytes | None = None) -> Any:
        """A request that moto takes without a signature; the answer with its headers."""
        headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"}
        if content is not None:
            headers["Content-Type"] = "application/octet-stream"
        asked = urllib.request.Request(f"{self.endpoint}/{path}", content, headers, method=method)
        return urllib.request.urlopen(asked, timeout=30)


class Bucket:
    """A prefix of an S3 bucket, as a storage."""

    def __init__(self, s3: S3, prefix: str, endpoint: str):
        self.s3 = s3
        self.prefix = prefix
        self.url = f"s3://{s3.bucket}/{prefix}"
        self.options = {"url": self.url, "endpoint": endpoint, "allow_http": "true", "region": "us-east-1"}
        self.credentials = {"access_key_id": s3.key, "secret_access_key": s3.secret}

    def create(self, connection, server: str) -> None:
        create_storage(connection, server, self.options, self.credentials)

    @functools.cached_property
    def filesystem(self):
        """The store as pyarrow sees it, past every proxy."""
        import pyarrow.fs

        scheme, _, where = self.s3.endpoint.partition("://")
        return pyarrow.fs.S3FileSystem(
            access_key=self.s3.key,
            secret_key=self.s3.secret,
            endpoint_override=where,
            scheme=scheme,
            region="us-east-1",
        )

    def put(self, path: str, content: bytes) -> str:
        """Writes an object; its URL."""
        with self.filesystem.open_output_stream(f"{self.s3.bucket}/{self.prefix}/{path}", compression=None) as out:
            out.write(content)
        return f"{self.url}/{path}"

    def get(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(f"{self.s3.bucket}/{self.prefix}/{path}", compression=None) as found:
            return found.read()

    def uploads(self) -> int:
        """How many uploads below the prefix nobody has completed. Of moto only."""
        with self.s3.request("GET", f"{self.s3.bucket}?uploads&prefix={self.prefix}") as answer:
            return answer.read().count(b"<UploadId>")

    def objects(self) -> dict[str, int]:
        """Every object below the prefix with its size, but those of rakam's own."""
        import pyarrow.fs

        root = f"{self.s3.bucket}/{self.prefix}"
        selector = pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        files = {info.path.removeprefix(f"{root}/"): info.size for info in found if info.is_file}
        return {path: size for path, size in files.items() if not path.startswith("_rakam/")}


class FaultProxy(Services):
    """In front of a store; the rules are those of faultproxy.py."""

    def __init__(self, target: str, seed: int = 1):
        super().__init__()
        self.url = self.start("faultproxy", FAULTPROXY_TARGET=target, FAULTPROXY_SEED=str(seed))["FAULTPROXY_URL"]

    def set(self, *rules: dict) -> None:
        self.faults(list(rules))

    def clear(self) -> None:
        self.faults([])

    def fired(self) -> list[int]:
        """How often each rule fired."""
        return [rule.get("fired", 0) for rule in self._rules()]

    def seen(self) -> int:
        """How many requests the rules were tried on."""
        return sum(rule.get("seen", 0) for rule in self._rules())

    def _rules(self) -> list[dict]:
        with urllib.request.urlopen(f"{self.url}/__faults", timeout=30) as answer:
            return json.load(answer)["rules"]


def create_storage(connection, server: str, options: dict[str, str], credentials: dict[str, str] | None = None) -> None:
    """CREATE SERVER, and the user mapping of its owner, who is the present user."""
    connection.execute(
        sql.SQL("CREATE SERVER {} FOREIGN DATA WRAPPER rakam OPTIONS ({})").format(
            sql.Identifier(server), _options(options)
        )
    )
    if credentials:
        connection.execute(
            sql.SQL("CREATE USER MAPPING FOR CURRENT_USER SERVER {} OPTIONS ({})").format(
                sql.Identifier(server), _options(credentials)
            )
        )


def _options(options: dict[str, str]) -> sql.Composable:
    return sql.SQL(", ").join(sql.SQL("{} {}").format(sql.Identifier(k), sql.Literal(v)) for k, v in options.items())
