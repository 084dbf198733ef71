"""The services of pg_test/services: started apart from all others and stopped at the end, as a test wants them, or kept."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "services"


class Unavailable(RuntimeError):
    """What a service runs on is not on this machine; the text says what. Its tests are skipped."""


class Services:
    """A set of services. `env` holds what the started ones say a client needs. With `kept`, a folder, they outlive this
    object: the next one of that folder finds them."""

    def __init__(self, kept: Path | None = None) -> None:
        self.env: dict[str, str] = {}
        self._started: list[tuple[str, dict[str, str]]] = []
        self._run = kept or Path(tempfile.mkdtemp(prefix="rakam-services-"))

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *_: object) -> None:
        for name, settings in reversed(self._started):
            self._script(name, "stop", settings)
        shutil.rmtree(self._run, ignore_errors=True)

    def start(self, name: str, **settings: str) -> dict[str, str]:
        """Starts `name`.sh with these variables; what it prints is added to `env`."""
        printed = self._script(name, "start", settings)
        self._started.append((name, settings))
        for line in printed.splitlines():
            variable, _, value = line.removeprefix("export ").partition("=")
            if variable:
                self.env[variable] = shlex.split(value)[0] if value else ""
        return self.env

    def stop(self, name: str) -> None:
        """Stops `name`.sh if it runs."""
        self._script(name, "stop", {})

    def pid(self, name: str) -> int:
        """The process that the script of this name started."""
        return int((self._run / f"{name}.pid").read_text().split()[0])

    def faults(self, rules: list[dict]) -> None:
        """Replaces the rules of the proxy."""
        request = urllib.request.Request(
            f"{self.env['FAULTPROXY_URL']}/__faults/rules", json.dumps(rules).encode(), method="POST"
        )
        urllib.request.urlopen(request).close()

    def requests(self) -> int:
        """How many requests the proxy has seen."""
        with urllib.request.urlopen(f"{self.env['FAULTPROXY_URL']}/__faults") as found:
            return json.load(found)["requests"]

    def _script(self, name: str, verb: str, settings: dict[str, str]) -> str:
        done = subprocess.run(
            [SCRIPTS / f"{name}.sh", verb],
            env={**os.environ, **settings, "RAKAM_SERVICES_RUN": str(self._run)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode == 4:
            raise Unavailable(done.stderr.strip().splitlines()[-1])
        if done.returncode:
            raise RuntimeError(f"{name}.sh {verb}: {done.stdout}{done.stderr}")
        return done.stdout
