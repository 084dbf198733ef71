"""A directory on a disk that is full now and then. A small file system of its own would need root, and more than that in
a container: this takes a library preloaded into the server (``full_disk.c``)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cluster import Cluster

SOURCE = Path(__file__).with_name("full_disk.c")


class FullDisk:
    """Has the server that is started next refuse writes below `root` while :meth:`full` lasts."""

    def __init__(self, cluster: Cluster, root: Path):
        folder = cluster.make_folder("full-disk")
        self.flag = folder / "full"
        library = folder / "full_disk.so"
        # The compiler that builds the extension's dependencies is there.
        subprocess.run(
            ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"],
            check=True,
        )
        library.chmod(0o755)
        cluster.server_environment.update(
            LD_PRELOAD=str(library), FULL_DISK_ROOT=str(root), FULL_DISK_FLAG=str(self.flag)
        )

    @contextmanager
    def full(self) -> Iterator[None]:
        self.flag.touch()
        try:
            yield
        finally:
            self.flag.unlink()
