"""What a power cut does to a directory: everything that was not fsynced, bytes and names, may be gone.

:class:`Unsynced` preloads ``unsynced.c`` into a cluster's server, which journals what happens below the directory. With
the server dead, :meth:`Unsynced.cut` takes back what no fsync covered: names in reverse order, bytes beyond what was
synced of a file. Every other file of the server is left alone.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

from .cluster import Cluster

SOURCE = Path(__file__).with_name("unsynced.c")


class Unsynced:
    def __init__(self, cluster: Cluster, root: Path):
        self.root = root
        self.folder = cluster.make_folder("unsynced")
        self.graves = cluster.make_folder("unsynced/graves")
        self.journal = self.folder / "journal"
        self.library = self.folder / "unsynced.so"
        # The compiler that builds the extension's dependencies is there; it warns of nothing.
        subprocess.run(
            ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", self.library, SOURCE, "-ldl", "-pthread"],
            check=True,
        )
        self.library.chmod(0o755)
        cluster.server_environment.update(
            LD_PRELOAD=str(self.library),
            UNSYNCED_ROOT=str(root),
            UNSYNCED_JOURNAL=str(self.journal),
            UNSYNCED_GRAVES=str(self.graves),
        )

    def lines(self) -> list[list[str]]:
        if not self.journal.exists():
            return []
        return [line.split("\t") for line in self.journal.read_text().splitlines()]

    def cut(self, rng: random.Random) -> tuple[int, int]:
        """Takes back what was not synced; returns how many names and how many files' bytes. The server must be dead.

        Of the changes of names a file system keeps a prefix, most often an empty one here.
        """
        pending: list[list[str]] = []
        synced: dict[int, int] = {}
        for line in self.lines():
            kind, parts = line[0], line[1:]
            if kind == "C":
                synced[int(parts[1])] = 0
            if kind == "F":
                synced[int(parts[0])] = int(parts[1])
            elif kind == "S":
                pending = [op for op in pending if not _all_in(op, parts[0])]
            else:
                pending.append(line)
        kept = rng.choice([0, 0, 0, rng.randint(0, len(pending))])
        for op in reversed(pending[kept:]):
            self._undo(op)
        cut = 0
        for path in self.root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                found = path.stat()
                if found.st_size > synced.get(found.st_ino, found.st_size):
                    os.truncate(path, synced[found.st_ino])
                    cut += 1
        self.journal.unlink(missing_ok=True)
        for grave in self.graves.iterdir():
            grave.unlink()
        return len(pending) - kept, cut

    def _undo(self, op: list[str]) -> None:
        kind, parts = op[0], op[1:]
        path = Path(parts[0])
        if kind in "CL":
            path.unlink(missing_ok=True)
        elif kind == "M":
            shutil.rmtree(path, ignore_errors=True)
        elif kind == "U":
            _link(parts[1], path)
        elif kind == "R":
            old, new, grave = parts
            if Path(new).exists() and Path(old).parent.is_dir():
                os.rename(new, old)
            if grave:
                _link(grave, Path(new))


def _all_in(op: list[str], folder: str) -> bool:
    """Whether an fsync of the folder covers the names that the operation changed. A rename stays within its folder."""
    names = op[1:3] if op[0] == "R" else op[1:2]
    return all(os.path.dirname(name) == folder for name in names)


def _link(grave: str, path: Path) -> None:
    if path.parent.is_dir() and not path.exists():
        os.link(grave, path)
