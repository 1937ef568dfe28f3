"""What this machine can do at most, as measured by `setpoint probe`: the record, and where it is kept.

One JSON file a machine in the cache directory. A file is evidence, not authority: it is bounded, checked field by
field, and counts only when it names the machine it is read on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from setpoint.config import cache_directory, this_machine
from setpoint.tune.documents import DocumentError, from_document

SCHEMA = 1
MAX_FILE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class MachineIdentity:
    """What must be equal for a measurement to mean this machine."""

    cpu_model: str
    cpu_family: int
    cpu_model_number: int
    cpu_stepping: int
    architecture: str
    virtual: bool  # a guest of a hypervisor, whose CPUs may share cores
    num_cpus: int  # that this process may use
    instruction_sets: tuple[str, ...]
    memory_gib: int
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    l3_cpus: int  # CPUs that share one L3


@dataclass(frozen=True, slots=True)
class Rate:
    """Of repeated slices: the median is what to plan with, the best is what to call a ceiling."""

    median: float
    p10: float
    best: float


@dataclass(frozen=True, slots=True)
class Ceilings:
    """With `threads` pinned threads, all of them together. None: this CPU or its caches do not allow the measurement.

    A multiplication and its addition count as two operations; reads are sequential, 1 GB = 1e9 bytes.
    """

    threads: int
    int8_gops: Rate | None
    int16_gops: Rate | None
    bf16_gflops: Rate | None
    fp32_gflops: Rate | None
    l1_read_gb_s: Rate | None
    l2_read_gb_s: Rate | None
    l3_read_gb_s: Rate | None
    dram_read_gb_s: Rate
    barrier_median_us: float
    barrier_p99_us: float


@dataclass(frozen=True, slots=True)
class Noise:
    """How far equal slices lie apart, and who else used the CPUs meanwhile (fractions of all CPU time)."""

    slices: int
    spread: float  # (90th - 10th percentile) / median
    steal_fraction: float
    others_fraction: float


@dataclass(frozen=True, slots=True)
class MachineRecord:
    """One measurement of one machine."""

    schema: int
    identity: MachineIdentity
    measured_at_unix_s: float
    slice_ms: float
    rounds: int
    ceilings: tuple[Ceilings, ...]  # ascending by threads
    noise: Noise

    def __post_init__(self) -> None:
        threads = [ceilings.threads for ceilings in self.ceilings]
        if not threads or threads != sorted(set(threads)) or threads[0] < 1:
            raise DocumentError("ceilings: thread counts must ascend from 1")

    @property
    def age_s(self) -> float:
        return max(time.time() - self.measured_at_unix_s, 0.0)

    def at(self, threads: int) -> Ceilings:
        """The ceilings of the most threads measured that are not more than `threads`."""
        return max(
            (c for c in self.ceilings if c.threads <= threads), key=lambda c: c.threads, default=self.ceilings[0]
        )


def this_identity() -> MachineIdentity:
    from setpoint import _native  # a record can be read without it

    facts = _cpu_facts()
    caches = _native.Probe().caches
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return MachineIdentity(
        cpu_model=facts.get("model name", "unknown CPU")[:200],
        cpu_family=_number(facts.get("cpu family")),
        cpu_model_number=_number(facts.get("model")),
        cpu_stepping=_number(facts.get("stepping")),
        architecture=platform.machine(),
        virtual="hypervisor" in facts.get("flags", "").split(),
        num_cpus=this_machine().num_cpus,
        instruction_sets=tuple(_native.cpu_features()),
        memory_gib=round(pages / (1 << 30)),
        l1_bytes=caches["l1_bytes"],
        l2_bytes=caches["l2_bytes"],
        l3_bytes=caches["l3_bytes"],
        l3_cpus=caches["l3_cpus"],
    )


def _cpu_facts() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    facts: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return facts
    for line in text.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    return facts


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


def record_path(identity: MachineIdentity) -> Path:
    key = json.dumps(asdict(identity), sort_keys=True).encode()
    return cache_directory() / "machines" / f"{hashlib.sha256(key).hexdigest()[:16]}.json"


def load(report: Callable[[str], None]) -> MachineRecord | None:
    """This machine's record, or None. A file that cannot be trusted is reported in one line and counts as none."""
    identity = this_identity()
    path = record_path(identity)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise DocumentError(f"larger than {MAX_FILE_BYTES} bytes")
        record = from_document(MachineRecord, _parsed(content))
        if record.schema != SCHEMA:
            raise DocumentError(f"schema {record.schema} instead of {SCHEMA}")
        if record.identity != identity:
            raise DocumentError("of another machine")
    except FileNotFoundError:
        return None
    except (OSError, DocumentError) as error:
        report(f"the measurement in {path} does not count ({error})")
        return None
    return record


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"not JSON: {str(error)[:100]}") from None


def store(record: MachineRecord) -> Path:
    """Write the record where `load` finds it; a reader sees the old file or the new one, never a part."""
    path = record_path(record.identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(record), file, indent=1)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path
