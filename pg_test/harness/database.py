"""A database with the extension in a private cluster, and what the tests do with one all the time."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from .cluster import Cluster

_reloads = itertools.count(1)

# The roles that creating a project makes, by the default of `rakam.role_prefix`. Roles outlive their database.
PROJECT_ROLES = r"^rakam_[a-z][a-z0-9_]*_(read|write|admin)$"


def wait_until(
    condition: Callable[[], Any], what: str | Callable[[], str], timeout_s: float = 60, pause_s: float = 0.02
) -> Any:
    """Calls until the answer is true and returns it; fails with `what` (or what it says then) once the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what if isinstance(what, str) else what()}")
        time.sleep(pause_s)


class Database:
    """One database. `admin` is a superuser's autocommit connection to it."""

    def __init__(self, cluster: Cluster, name: str):
        self.cluster = cluster
        self.name = name
        self._admin: psycopg.Connection | None = None
        self._open: list[psycopg.Connection] = []

    def create(self, extension: bool = True) -> Database:
        with self.cluster.connect() as postgres:
            postgres.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(self.name)))
        if extension:
            self.admin.execute("CREATE EXTENSION rakam")
        return self

    def drop(self) -> None:
        """Removes the database and the roles that its projects left in the cluster."""
        self.close()
        with self.cluster.connect() as postgres:
            # A prepared transaction that a failed test left behind would keep the database.
            left = postgres.execute("SELECT gid FROM pg_prepared_xacts WHERE database = %s", (self.name,)).fetchall()
        for (gid,) in left:
            with self.cluster.connect(self.name) as session:
                session.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
        with self.cluster.connect() as postgres:
            postgres.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(self.name)))
            drop_project_roles(postgres)

    def close(self) -> None:
        for connection in [*self._open, *filter(None, [self._admin])]:
            connection.close()
        self._open.clear()
        self._admin = None

    # -- sessions ------------------------------------------------------------------------------------------------

    @property
    def admin(self) -> psycopg.Connection:
        if self._admin is None or self._admin.closed:
            self._admin = self.cluster.connect(self.name)
        return self._admin

    def connect(self, role: str = "postgres", autocommit: bool = True, **more) -> psycopg.Connection:
        """A session that is closed with the database."""
        connection = self.cluster.connect(self.name, user=role, autocommit=autocommit, **more)
        self._open.append(connection)
        return connection

    def login(self, project: str, *kinds: str, name: str | None = None, autocommit: bool = True) -> psycopg.Connection:
        """A session of a login role that is a member of the project's roles of these kinds (read, write, admin)."""
        role = name or f"login_{project}_{'_'.join(kinds)}"
        self.make_login(role)
        for kind in kinds:
            self.admin.execute(
                sql.SQL("GRANT {} TO {}").format(sql.Identifier(f"rakam_{project}_{kind}"), sql.Identifier(role))
            )
        return self.connect(role, autocommit)

    def make_login(self, role: str) -> None:
        if self.one("SELECT count(*) FROM pg_roles WHERE rolname = %s", role) == 0:
            self.admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))

    # -- statements ----------------------------------------------------------------------------------------------

    def one(self, query: str, *values: Any) -> Any:
        """The first column of the first row, as superuser."""
        return one(self.admin, query, *values)

    def all(self, query: str, *values: Any) -> list[tuple]:
        return self.admin.execute(query, values or None).fetchall()

    def project(self, name: str, storage: str | None = None) -> dict[str, Any]:
        """Creates a project and returns its keys."""
        columns = ("project", "key_id", "read_key", "write_key", "master_key")
        row = self.admin.execute("SELECT * FROM rakam.create_project(%s, %s)", (name, storage)).fetchone()
        return dict(zip(columns, row, strict=True))

    def tick(self) -> None:
        self.admin.execute("SELECT rakam.tick()")

    def flush(self, project: str | None = None, collection: str | None = None) -> list[tuple]:
        return self.admin.execute("SELECT * FROM rakam.flush(%s, %s)", (project, collection)).fetchall()

    def tiers(self, project: str, collection: str) -> dict[str, int]:
        """How many events of a collection are in the inbox, in chunks and in data files."""
        row = self.admin.execute(
            "SELECT inbox_events, hot_events, cold_events FROM rakam.stat_collection"
            " WHERE project = %s AND collection = %s",
            (project, collection),
        ).fetchone()
        return dict(zip(("inbox", "hot", "cold"), row or (0, 0, 0), strict=True))

    def wait_column(self, table: str, column: str) -> None:
        """Waits until the foreign table has the column: without ticks, so that the worker has to do it."""
        wait_until(lambda: has_column(self.admin, table, column), f"column {column} of {table}")

    def configure(self, **settings: Any) -> None:
        """Changes settings of rakam for the whole server (None: back to what they were) and waits until the postmaster,
        whose children later workers are, this session and the workers that stay have them."""
        # A worker that shows the new name has read the file that has the other settings, too.
        marker = f"reload {next(_reloads)}"
        for name, value in settings.items():
            change = sql.SQL("SET {} = {}") if value is not None else sql.SQL("RESET {}")
            parts = [sql.Identifier("rakam", name)] + ([sql.Literal(str(value))] if value is not None else [])
            self.admin.execute(sql.SQL("ALTER SYSTEM ") + change.format(*parts))
        self.admin.execute(sql.SQL("ALTER SYSTEM SET application_name = {}").format(sql.Literal(marker)))
        self.admin.execute("SELECT pg_reload_conf()")
        old = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name <> %s"
            " AND (pid = pg_backend_pid() OR backend_type IN ('rakam launcher', 'rakam resident'))"
        )
        wait_until(lambda: self.one(old, marker) == 0, f"the settings {settings} everywhere")

    def worker_pid(self) -> int | None:
        """The resident worker of this database."""
        return self.one(
            "SELECT max(pid) FROM rakam.stat_worker WHERE kind = 'resident' AND database = current_database()"
        )


def one(connection: psycopg.Connection, query: str, *values: Any) -> Any:
    row = connection.execute(query, values or None).fetchone()
    return None if row is None else row[0]


def in_background(db: Database, call):
    """Runs a call in a session of its own; its session, and a place for its outcome."""
    session = db.connect()
    outcome: list = []

    def run() -> None:
        try:
            outcome.append(call(session))
        except psycopg.Error as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return session, thread, outcome


def collect(connection: psycopg.Connection, project: str, collection: str, properties: dict | str) -> None:
    text = properties if isinstance(properties, str) else json.dumps(properties)
    connection.execute("SELECT rakam.collect(%s, %s, %s::jsonb)", (project, collection, text))


def collect_batch(connection: psycopg.Connection, project: str, events: Iterable[tuple[str, dict]]) -> tuple:
    """Sends (collection, properties) pairs in one call and returns (stored, rejected, rejected_indexes, errors)."""
    text = json.dumps([{"collection": collection, "properties": properties} for collection, properties in events])
    row = connection.execute("SELECT * FROM rakam.collect_batch(%s, %s)", (project, text)).fetchone()
    assert row is not None
    return row


def has_column(connection: psycopg.Connection, table: str, column: str) -> bool:
    return bool(
        one(
            connection,
            "SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = %s AND NOT attisdropped",
            table,
            column,
        )
    )


def drop_project_roles(postgres: psycopg.Connection) -> None:
    """Drops the roles of projects and the tests' logins that no database needs any more."""
    roles = postgres.execute(
        "SELECT rolname FROM pg_authid r WHERE (rolname ~ %s OR rolname ~ '^login_') AND NOT EXISTS"
        " (SELECT FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid = r.oid AND dbid <> 0)",
        (PROJECT_ROLES,),
    ).fetchall()
    for (role,) in roles:
        postgres.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


class Notice(NamedTuple):
    severity: str | None
    message: str
    hint: str


def notices_of(connection: psycopg.Connection, statement: str) -> list[Notice]:
    """Runs a statement and returns what the server told besides its result."""
    told: list[Notice] = []

    def note(diagnostics: psycopg.errors.Diagnostic) -> None:
        # Valid during this call only.
        told.append(Notice(diagnostics.severity, diagnostics.message_primary or "", diagnostics.message_hint or ""))

    connection.add_notice_handler(note)
    try:
        connection.execute(statement)
    finally:
        connection.remove_notice_handler(note)
    return told


@contextmanager
def refused(sqlstate: str, *, hint: str | None = None, message: str | None = None):
    """The block must fail with this SQLSTATE; `hint` and `message` are texts that the error must contain."""
    try:
        yield
    except psycopg.Error as error:
        diagnostics = error.diag
        told = f"{error.sqlstate} {diagnostics.message_primary!r}, hint {diagnostics.message_hint!r}"
        assert error.sqlstate == sqlstate, f"expected {sqlstate}, got {told}"
        if hint is not None:
            assert hint in (diagnostics.message_hint or ""), f"hint without {hint!r}: {told}"
        if message is not None:
            assert message in (diagnostics.message_primary or ""), f"message without {message!r}: {told}"
        return
    raise AssertionError(f"expected SQLSTATE {sqlstate}, but the statement succeeded")
