"""How much memory a worker took at most: VmHWM of /proc, which never falls, read until the process has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from .cluster import Cluster

# Between two looks: what a process takes and gives back in its last moment is not seen.
PAUSE_S = 0.005
SEARCH_S = 0.05


def peak_bytes(cluster: Cluster, kind: str, call: Callable[[], object]) -> int:
    """The largest peak of the resident memory of workers whose title contains `kind` and that begin during the call, in
    bytes. It counts pages of the program and of shared memory that the worker has touched."""
    ended = threading.Event()
    before = set(cluster.processes())
    peaks: dict[int, int] = {}

    def look() -> None:
        while not ended.is_set():
            for pid, title in cluster.processes().items():
                if pid not in before and kind in title:
                    peaks.setdefault(pid, 0)
            # Looking for new ones costs more than looking at those.
            until = time.monotonic() + SEARCH_S
            while time.monotonic() < until and not ended.wait(PAUSE_S):
                for pid, peak in peaks.items():
                    peaks[pid] = max(peak, _high_water(pid))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        call()
    finally:
        ended.set()
        watcher.join()
    return max(peaks.values(), default=0)


def _high_water(pid: int) -> int:
    """Zero once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
