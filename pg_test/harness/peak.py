"""How much memory a worker took at most: VmHWM of /proc, which never falls, read until the process has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from .cluster import Cluster

# Between two looks: what a process takes and gives back in its last moment is not seen.
PAUSE_S = 0.005


def peak_bytes(cluster: Cluster, kind: str, call: Callable[[], object]) -> int:
    """The largest peak of the resident memory of workers whose title contains `kind` and that begin during the call. It
    counts pages of the program and of shared memory that the worker has touched."""
    ended = threading.Event()
    before = set(cluster.processes())
    peaks: dict[int, int] = {}
    others: set[int] = set(before)

    def look() -> None:
        postmaster = cluster.pid
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children")
        while not ended.wait(PAUSE_S):
            for pid in map(int, children.read_text().split()):
                if pid not in others:
                    peaks[pid] = max(peaks.get(pid, 0), _high_water(pid, kind, others))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        call()
    finally:
        ended.set()
        watcher.join()
    return max(peaks.values(), default=0)


def _high_water(pid: int, kind: str, others: set[int]) -> int:
    """Zero for processes of another kind, which are then known, and for those that have ended."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_text()
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    if kind not in title:
        # It has its title a moment after it was forked.
        if "rakam" in title:
            others.add(pid)
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
