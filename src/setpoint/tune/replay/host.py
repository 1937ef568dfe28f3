"""Who used this machine's CPUs during a run: client, engine (if it is here), hypervisor, or somebody else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from setpoint.tune.measure import MachineUse

_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Ticks since the start of the machine, of the CPUs that this process may use."""

    total: int
    busy: int
    steal: int
    ours: int  # of the busy ones: client and engine
    has_engine: bool


def cpu_times(client: Iterable[int], engine: int | None, proc: Path = Path("/proc")) -> CpuTimes | None:
    """None where there is no such thing."""
    try:
        text = (proc / "stat").read_text()
        processes = _processes(proc)
    except OSError:
        return None
    allowed = os.sched_getaffinity(0) if proc == Path("/proc") else None
    total = busy = steal = 0
    for line in text.splitlines():
        name, *fields = line.split()
        if not name.startswith("cpu") or name == "cpu" or (allowed is not None and int(name[3:]) not in allowed):
            continue
        user, nice, system, idle, iowait, irq, softirq, stolen = map(int, (*fields, *"0000")[:8])
        busy += user + nice + system + irq + softirq
        steal += stolen
        total += user + nice + system + idle + iowait + irq + softirq + stolen
    roots = {*client, *(() if engine is None else (engine,))}
    ours = sum(ticks for pid, (_, ticks) in processes.items() if _descends(pid, roots, processes))
    return CpuTimes(total, busy, steal, ours, engine in processes)


def machine_use(before: CpuTimes | None, after: CpuTimes | None) -> MachineUse | None:
    """None if a run was too short to tell."""
    if before is None or after is None or after.total - before.total < 20:
        return None
    total = after.total - before.total
    others = (after.busy - before.busy - (after.ours - before.ours)) / total
    known = before.has_engine and after.has_engine
    return MachineUse((after.steal - before.steal) / total, max(0.0, others) if known else None)


def listener(port: int, proc: Path = Path("/proc")) -> int | None:
    """The process that listens on this port of this machine, if we may see it."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for directory in proc.glob("[0-9]*") if inodes else ():
        try:
            if any(os.readlink(link) in inodes for link in (directory / "fd").iterdir()):
                return int(directory.name)
        except OSError:
            continue
    return None


def cpus_beside(engine: int | None, proc: Path = Path("/proc")) -> list[int]:
    """CPUs for the client: those that no thread of the engine is bound to; empty if there are none, or no engine."""
    if engine is None:
        return []
    taken: set[int] = set()
    try:
        for status in (proc / str(engine) / "task").glob("*/status"):
            line = next(line for line in status.read_text().splitlines() if line.startswith("Cpus_allowed_list:"))
            taken |= _cpu_list(line.partition(":")[2].strip())
    except (OSError, StopIteration):
        return []
    return sorted(os.sched_getaffinity(0) - taken)


def _cpu_list(text: str) -> set[int]:
    """`0-3,8` as a set."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _processes(proc: Path) -> dict[int, tuple[int, int]]:
    """pid -> parent, ticks of it and of its children that have ended."""
    found = {}
    for path in proc.glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[int(path.parent.name)] = (int(fields[1]), sum(map(int, fields[11:15])))
    return found


def _descends(pid: int, roots: set[int], processes: dict[int, tuple[int, int]]) -> bool:
    seen = 0
    while pid in processes and seen < 64:
        if pid in roots:
            return True
        pid, seen = processes[pid][0], seen + 1
    return False
