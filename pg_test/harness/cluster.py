"""Private PostgreSQL clusters with the extension, as a class and as a command (scripts/cluster.sh).

A cluster lives in ``$RAKAM_STATE/clusters/NAME``. Its server runs as ``postgres`` when this process is root, as the
present user otherwise. Over its Unix socket, in a folder that only its owner and root can enter, it trusts any
database role; over TCP it listens on the loopback address only and asks for the password in the file ``password``.

Only the standard library is imported at the top: the command works before the Python environment exists.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Everything a test may want to change is an argument of `start`; these hold for every cluster. The memory and worker
# settings are PostgreSQL's own defaults on purpose: the extension has to live with them.
SETTINGS = {
    "shared_preload_libraries": "rakam",
    "timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    "log_checkpoints": "off",
    "max_prepared_transactions": "20",
    "wal_level": "replica",
    "max_wal_senders": "4",
}

ENVIRONMENT = {"LANG": "C.UTF-8", "TZ": "UTC", "PATH": "/usr/local/bin:/usr/bin:/bin"}


class ClusterError(Exception):
    """A program of the server failed; the text holds its output."""


def state_folder() -> Path:
    """As scripts/lib.sh has it, which also explains why root's is elsewhere."""
    if "RAKAM_STATE" in os.environ:
        return Path(os.environ["RAKAM_STATE"])
    if os.geteuid() == 0:
        return Path("/var/cache/rakam")
    cache = os.environ.get("RAKAM_CACHE", os.path.expanduser("~/.cache/rakam"))
    return Path(cache) / "state"


def server_bindir(profile: str) -> Path:
    """The programs of the private PostgreSQL that scripts/build.sh installed the extension into."""
    found = sorted(state_folder().glob(f"postgresql-*/{profile}/usr/lib/postgresql/*/bin"))
    if not found:
        raise ClusterError(f"no server for profile {profile}: run scripts/setup.sh and scripts/build.sh first")
    return found[0]


class Cluster:
    """One private cluster. Creating the object touches nothing; `start` makes what is missing."""

    def __init__(self, name: str, profile: str | None = None):
        self.name = name
        self.profile = profile or os.environ.get("RAKAM_PROFILE", "release")
        self.folder = state_folder() / "clusters" / name
        self.data = self.folder / "data"
        # Set in the server's own processes, for instance to preload a library into them.
        self.server_environment: dict[str, str] = {}
        self.log = self.folder / "server.log"
        self.user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        # A socket's path has at most 107 bytes, its name takes 20 of them.
        self.socket_dir = self.folder / "run"
        if len(str(self.socket_dir)) > 80:
            self.socket_dir = Path("/tmp") / f"rakam-{os.geteuid()}-{name}"

    # -- programs ------------------------------------------------------------------------------------------------

    def program(self, name: str) -> str:
        return str(server_bindir(self.profile) / name)

    def run(self, name: str, *arguments: str, check: bool = True, **more) -> subprocess.CompletedProcess:
        """Runs one of PostgreSQL's programs as the server's user and returns its output."""
        identity = {}
        if os.geteuid() == 0:
            entry = pwd.getpwnam(self.user)
            identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        done = subprocess.run(
            [self.program(name), *map(str, arguments)],
            cwd=self.folder,
            env={**ENVIRONMENT, "HOME": str(self.folder), **more.pop("env", {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            **identity,
            **more,
        )
        if check and done.returncode != 0:
            raise ClusterError(f"{name} {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}")
        return done

    def make_folder(self, name: str) -> Path:
        """A folder below the cluster's that the server may write to, for instance for a `file://` storage."""
        folder = self.folder / name
        self._make_owned(folder)
        return folder

    def _make_owned(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.geteuid() == 0:
            entry = pwd.getpwnam(self.user)
            os.chown(folder, entry.pw_uid, entry.pw_gid)

    # -- life ----------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        return int((self.folder / "port").read_text())

    @property
    def pid(self) -> int | None:
        """The postmaster's process id while it runs."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
        except (OSError, ValueError):
            return None
        return pid if _alive(pid) else None

    @property
    def running(self) -> bool:
        return self.pid is not None

    def start(self, settings: dict[str, str] | None = None, timeout_s: int = 60) -> Cluster:
        """Starts the server, making the cluster first if need be. A server older than its library is restarted."""
        if self.running:
            if settings is None and not self._stale():
                return self
            self.stop()
        if not (self.data / "PG_VERSION").exists():
            self._initialize()
        self._configure(settings or {})
        self._make_owned(self.socket_dir)
        # A killed postmaster that nobody has reaped yet looks alive to PostgreSQL, which then refuses to start.
        for lock in [self.data / "postmaster.pid", *self.socket_dir.glob(".s.PGSQL.*")]:
            lock.unlink(missing_ok=True)
        deadline = time.monotonic() + 10
        while True:
            mark = self.log_mark()
            done = self.run(
                "pg_ctl", "start", "-w", "-t", timeout_s, "-D", self.data, "-l", self.log,
                check=False, env=self.server_environment,
            )  # fmt: skip
            reason = self.log_since(mark) if done.returncode != 0 else ""
            if "Address already in use" in reason:
                # The server of another checkout, which looked for a free port when we did.
                (self.folder / "port").unlink()
                self._configure(settings or {})
            # The children of a killed postmaster take a moment to notice.
            elif "pre-existing shared memory block" not in reason:
                break
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if done.returncode != 0:
            tail = "".join(self.log.read_text(errors="replace").splitlines(True)[-20:]) if self.log.exists() else ""
            raise ClusterError(f"the server of cluster {self.name} did not start: {done.stdout}{done.stderr}{tail}")
        return self

    def _stale(self) -> bool:
        library = server_bindir(self.profile).parent / "lib" / "rakam.so"
        started = (self.data / "postmaster.pid").stat().st_mtime
        return library.exists() and library.stat().st_mtime > started

    def _initialize(self) -> None:
        self._make_owned(self.folder)
        password = self.folder / "password"
        password.touch(mode=0o600)
        password.write_text(secrets.token_urlsafe(18) + "\n")
        if os.geteuid() == 0:
            entry = pwd.getpwnam(self.user)
            os.chown(password, entry.pw_uid, entry.pw_gid)
        self.run(
            "initdb", "-D", self.data, "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8",
            "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password}",
        )  # fmt: skip
        with open(self.data / "postgresql.conf", "a") as conf:
            conf.write("include 'rakam.conf'\n")

    def _configure(self, settings: dict[str, str]) -> None:
        if not (self.folder / "port").exists():
            (self.folder / "port").write_text(f"{self._free_port()}\n")
        values = {
            **SETTINGS,
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.socket_dir),
            **settings,
        }
        conf = self.data / "rakam.conf"
        quoted = ((key, str(value).replace("'", "''")) for key, value in values.items())
        conf.write_text("".join(f"{key} = '{value}'\n" for key, value in quoted))
        conf.chmod(0o644)

    @staticmethod
    def _free_port() -> int:
        """A port that nothing listens on and no other cluster here has taken, outside the ephemeral range. Each state
        folder begins to look at another one: a server that is down for a moment keeps its port."""
        taken = {int(p.read_text()) for p in (state_folder() / "clusters").glob("*/port")}
        first = zlib.crc32(str(state_folder()).encode()) % 500
        for port in (5460 + (first + n) % 500 for n in range(500)):
            with socket.socket() as probe:
                if port not in taken and probe.connect_ex(("127.0.0.1", port)) != 0:
                    return port
        raise ClusterError("no free port between 5460 and 5960")

    def stop(self, mode: str = "fast", timeout_s: int = 60) -> None:
        if self.running:
            try:
                self.run("pg_ctl", "stop", "-w", "-t", timeout_s, "-m", mode, "-D", self.data)
            except ClusterError:
                # It may have been about to end anyway.
                if self.running:
                    raise

    def restart(self, settings: dict[str, str] | None = None, mode: str = "fast") -> Cluster:
        self.stop(mode)
        return self.start(settings)

    def destroy(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.socket_dir, ignore_errors=True)

    # -- faults --------------------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """The server's child processes: id and command line."""
        children = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
                if parent == self.pid:
                    title = (status.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    children[int(status.parent.name)] = title.strip()
            except (OSError, IndexError):
                continue
        return children

    def kill9_postmaster(self, timeout_s: float = 30) -> None:
        """Kills the postmaster as a power cut of one process would, and waits until its children have noticed."""
        pid = self.pid
        if pid is None:
            return
        children = list(self.processes())
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + timeout_s
        while any(_alive(child) for child in [pid, *children]):
            if time.monotonic() > deadline:
                raise ClusterError(f"children of the killed postmaster are still alive after {timeout_s} s")
            time.sleep(0.02)

    def kill9(self, pid: int) -> None:
        """Kills one child (the id is checked to be one's) and waits until the postmaster has noticed: from then on it
        takes no sessions until all of its children have gone and it has recovered."""
        mark = self.log_mark()
        if pid not in self.processes():
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while f"(PID {pid}) was terminated by signal" not in self.log_since(mark):
            if self.pid is None or time.monotonic() > deadline:
                raise ClusterError(f"the postmaster does not notice that process {pid} was killed")
            if pid not in self.processes() and time.monotonic() > deadline - 25:
                # It ended by itself at the same moment.
                return
            time.sleep(0.005)

    def wait_ready(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while self.run("pg_isready", "-q", "-h", self.socket_dir, "-p", self.port, check=False).returncode != 0:
            if time.monotonic() > deadline:
                raise ClusterError(f"cluster {self.name} does not accept connections after {timeout_s} s")
            time.sleep(0.05)

    # -- standby -------------------------------------------------------------------------------------------------

    def standby(self, name: str) -> Cluster:
        """A streaming standby of this cluster, not yet started."""
        other = Cluster(name, self.profile)
        other.destroy()
        other._make_owned(other.folder)
        self.run(
            "pg_basebackup", "-h", self.socket_dir, "-p", self.port, "-U", "postgres",
            "-D", other.data, "-R", "-X", "stream", "-c", "fast",
        )  # fmt: skip
        return other

    def promote(self) -> None:
        self.run("pg_ctl", "promote", "-w", "-D", self.data)

    # -- upgrade -------------------------------------------------------------------------------------------------

    def upgrade_from(self, old: Cluster) -> None:
        """Makes this cluster of another one, which is stopped, by pg_upgrade. It is not started."""
        self.destroy()
        self._initialize()
        self._configure({})
        self._make_owned(self.socket_dir)
        old.stop()
        programs = server_bindir(self.profile)
        done = self.run(
            "pg_upgrade", "-b", programs, "-B", programs, "-d", old.data, "-D", self.data, "-U", "postgres",
            "-s", self.socket_dir, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            logs = sorted((self.data / "pg_upgrade_output.d").rglob("*.*"))
            tails = "".join(log.read_text(errors="replace")[-4000:] for log in logs if log.suffix in (".log", ".txt"))
            raise ClusterError(f"pg_upgrade: {done.stdout}{done.stderr}{tails}")

    # -- clients -------------------------------------------------------------------------------------------------

    def connect(self, dbname: str = "postgres", user: str = "postgres", autocommit: bool = True, **more):
        """A psycopg connection over the socket. Statements are prepared where a test says so, not after five times."""
        import psycopg

        where = {"host": str(self.socket_dir), "port": self.port, "dbname": dbname, "user": user}
        return psycopg.connect(**{**where, "autocommit": autocommit, "prepare_threshold": None, **more})

    def psql_command(self, dbname: str = "postgres", user: str = "postgres") -> list[str]:
        return ["psql", "-h", str(self.socket_dir), "-p", str(self.port), "-U", user, dbname]

    def environment(self) -> dict[str, str]:
        """What libpq's programs need to find this cluster."""
        return {"PGHOST": str(self.socket_dir), "PGPORT": str(self.port), "PGUSER": "postgres"}

    # -- log -----------------------------------------------------------------------------------------------------

    def log_mark(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def log_since(self, mark: int = 0) -> str:
        with open(self.log, "rb") as log:
            log.seek(mark)
            return log.read().decode(errors="replace")


def _alive(pid: int) -> bool:
    try:
        # A zombie has ended; only its parent has not looked yet.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/cluster.sh", description="Private PostgreSQL clusters with rakam.")
    parser.add_argument("action", choices=["start", "stop", "restart", "destroy", "psql", "env", "log"])
    parser.add_argument("name")
    parser.add_argument("more", nargs="*", help="start, restart: setting=value …; psql: its arguments, after --")
    arguments = parser.parse_args()
    cluster = Cluster(arguments.name)
    settings = None
    if arguments.action in ("start", "restart") and arguments.more:
        settings = dict(pair.split("=", 1) for pair in arguments.more)
    if arguments.action == "start":
        cluster.start(settings)
        print(f"cluster {cluster.name} runs: {' '.join(cluster.psql_command())}")
    elif arguments.action == "stop":
        cluster.stop()
    elif arguments.action == "restart":
        cluster.restart(settings)
    elif arguments.action == "destroy":
        cluster.destroy()
    elif arguments.action == "env":
        for key, value in cluster.environment().items():
            print(f"export {key}='{value}'")
    elif arguments.action == "log":
        print(cluster.log)
    else:
        os.execvpe("psql", ["psql", *arguments.more], {**os.environ, **cluster.environment()})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ClusterError as error:
        sys.exit(f"error: {error}")
