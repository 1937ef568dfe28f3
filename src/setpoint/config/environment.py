"""What this process finds around it. Only this module reads environment variables (huggingface-hub reads its own)."""

from __future__ import annotations

import os
from pathlib import Path

from setpoint.config.resolve import Machine
from setpoint.errors import ConfigError


def this_machine() -> Machine:
    """CPUs this process may use and memory that is free now (container limit included)."""
    return Machine(len(os.sched_getaffinity(0)), _available_memory())


def _available_memory() -> int:
    available = 1 << 62
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min(available, available_in_container(Path("/sys/fs/cgroup")))


def available_in_container(group: Path) -> int:
    """What the memory limit of a cgroup (version 2) leaves, counting as free what the kernel drops when it must."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if not limit.isdigit():
            return 1 << 62
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 1 << 62
    droppable = sum(int(statistics.get(name, 0)) for name in ("active_file", "inactive_file", "slab_reclaimable"))
    return max(int(limit) - max(used - droppable, 0), 0)


def cache_directory() -> Path:
    """Where downloads and repacked weights live: SETPOINT_CACHE_DIR, else the user's cache directory."""
    own = os.environ.get("SETPOINT_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "setpoint"


def spare_library_threads() -> None:
    """numpy's linear algebra starts a thread per CPU as it is imported: 50 ms for what nothing here uses."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def api_key_from_environment() -> str | None:
    return os.environ.get("SETPOINT_API_KEY") or None


def log_level() -> str:
    level = os.environ.get("SETPOINT_LOG_LEVEL", "info").lower()
    if level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"SETPOINT_LOG_LEVEL is {level!r}; choose one of debug, info, warning, error")
    return level
