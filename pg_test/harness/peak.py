"""How much memory a worker took at most, by /proc, read until the process has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .cluster import Cluster

# Between two looks: what a process takes and gives back in its last moment is not seen.
PAUSE_S = 0.005
SEARCH_S = 0.05
# For how long a process has to be there to be seen, however slow the looks are.
SEEN_S = 0.3


class Peak(NamedTuple):
    """Bytes. `resident` is VmHWM, which never falls: pages of the program and of shared memory that the worker has touched
    are in it. `private` is the largest RssAnon that was seen: what the worker has for itself."""

    resident: int = 0
    private: int = 0

    def beyond(self, other: Peak) -> Peak:
        return Peak(self.resident - other.resident, self.private - other.private)


def peak_bytes(cluster: Cluster, kind: str, call: Callable[[], object]) -> Peak:
    """The largest peaks of workers whose title contains `kind` and that begin during the call."""
    ended = threading.Event()
    before = set(cluster.processes())
    peaks: dict[int, Peak] = {}

    def look() -> None:
        while not ended.is_set():
            for pid, title in cluster.processes().items():
                if pid not in before and kind in title:
                    peaks.setdefault(pid, Peak())
            # Looking for new ones costs more than looking at those.
            until = time.monotonic() + SEARCH_S
            while time.monotonic() < until and not ended.wait(PAUSE_S):
                for pid, peak in peaks.items():
                    peaks[pid] = _larger(peak, _taken(pid))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        call()
    finally:
        ended.set()
        watcher.join()
    largest = Peak()
    for peak in peaks.values():
        largest = _larger(largest, peak)
    return largest


def _larger(one: Peak, other: Peak) -> Peak:
    return Peak(*map(max, one, other))


def _taken(pid: int) -> Peak:
    """Nothing once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return Peak()
    kilobytes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return Peak(*(int(kilobytes.get(name, "0").split()[0]) << 10 for name in ("VmHWM", "RssAnon")))
