"""Where calibrations are kept: one JSON file for each machine, model and engine configuration in the cache.

A file is evidence, not authority: bounded, checked field by field, and it counts only for what it names.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from setpoint.config import cache_directory
from setpoint.tune.documents import DocumentError, from_document
from setpoint.tune.probe.calibrate import SCHEMA, Calibration
from setpoint.tune.probe.machine import MachineIdentity

MAX_FILE_BYTES = 1 << 18
STALE_S = 14 * 86400.0


def calibration_path(machine: MachineIdentity, fingerprint: str) -> Path:
    key = json.dumps([asdict(machine), fingerprint], sort_keys=True).encode()
    return cache_directory() / "machines" / f"{hashlib.sha256(key).hexdigest()[:16]}.steps.json"


def load_calibration(machine: MachineIdentity, fingerprint: str, report: Callable[[str], None]) -> Calibration | None:
    """What was measured here for this model and configuration. What cannot be trusted is told and counts as none."""
    path = calibration_path(machine, fingerprint)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise DocumentError(f"larger than {MAX_FILE_BYTES} bytes")
        found = from_document(Calibration, json.loads(content))
        if found.schema != SCHEMA:
            raise DocumentError(f"schema {found.schema} instead of {SCHEMA}")
        if found.machine != machine or found.fingerprint != fingerprint:
            raise DocumentError("of another machine or model")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        report(f"the measurement in {path} does not count ({str(error)[:100]})")
        return None
    return found


def store_calibration(calibration: Calibration) -> Path:
    """Whole or not at all."""
    path = calibration_path(calibration.machine, calibration.fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(calibration), file)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path
