"""Measuring: interleaved repetitions, medians, CPU of server processes from /proc, and the table of ratios."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """User and system time of a process, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def thread_cpu_s(pid: int) -> float:
    """The same of the main thread alone, to the nanosecond instead of the clock's tick."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def reaped_cpu_s(pid: int) -> float:
    """The same of the children of a process that have ended: of a postmaster, its finished workers and sessions."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[13]) + int(fields[14])) / TICKS


def wakeups(pid: int) -> int:
    """Voluntary context switches of all threads: how often something slept and was woken."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total


def wall_s(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def interleaved(repetitions: int, **calls: Callable[[], float]) -> dict[str, float]:
    """Median of each measure. They take turns, so that what else the machine does hits all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions):
        order = list(calls.items())
        if repetition % 2:
            order.reverse()
        for name, call in order:
            taken[name].append(call())
    return {name: statistics.median(values) for name, values in taken.items()}


@dataclass
class Table:
    """What was measured; printed as a Markdown table, so that a run can be pasted."""

    rows: list[tuple[str, str, str, str, str]] = field(default_factory=list)

    def add(self, what: str, ours: str, theirs: str, ratio: float | None, goal: str) -> None:
        shown = "" if ratio is None else f"{ratio:.2f}"
        self.rows.append((what, ours, theirs, shown, goal))
        print(f"  {what}: {ours} against {theirs or '-'}; ratio {shown or '-'} (goal {goal or '-'})", flush=True)

    def markdown(self) -> str:
        lines = ["| what | rakam | other | ratio | goal |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join(lines)
