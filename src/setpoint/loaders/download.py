"""One file over HTTPS: resumed, verified against a pinned SHA-256, and visible only when it is whole."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx

from setpoint.errors import ModelDownloadError

Progress = Callable[[str, int, int], None]  # (label, bytes done, bytes in total)

CHUNK = 1 << 20
SPARE_BYTES = 64 << 20  # left free on the disk after a download


def silent(label: str, done: int, total: int) -> None:
    """The progress of somebody who does not want to see it."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(directory: Path, num_bytes: int) -> None:
    """Raise ModelDownloadError unless `directory` has room for `num_bytes`."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes + SPARE_BYTES:
        raise ModelDownloadError(
            f"not enough disk space: {num_bytes / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free; "
            "free some or set SETPOINT_CACHE_DIR to another disk"
        )


def download(url: str, target: Path, *, sha256: str, size: int, progress: Progress = silent) -> None:
    """Fetch `url` into `target`. An interrupted download goes on from its `.part` file.

    Raises ModelDownloadError: no network, an HTTP error, no space, or a wrong digest (the partial file is removed).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    require_space(target.parent, size - have)
    if have < size:
        _fetch(url, part, have, size, target.name, progress)
    if part.stat().st_size != size or sha256_of(part) != sha256:
        part.unlink()
        raise ModelDownloadError(f"{target.name} does not have the expected SHA-256; it was removed, try again")
    part.replace(target)


def _fetch(url: str, part: Path, have: int, size: int, label: str, progress: Progress) -> None:
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=httpx.Timeout(30.0)) as response:
            if response.status_code not in (200, 206):
                raise ModelDownloadError(f"downloading {label} failed with HTTP status {response.status_code}")
            resumed = have if response.status_code == 206 else 0  # 200: the server sends the file from its start
            with part.open("ab" if resumed else "wb") as file:
                done = resumed
                for chunk in response.iter_bytes(CHUNK):
                    done += len(chunk)
                    if done > size:
                        raise ModelDownloadError(f"{label} is larger than the {size} bytes that were announced")
                    file.write(chunk)
                    progress(label, done, size)
                file.flush()
                os.fsync(file.fileno())
    except httpx.HTTPError as error:
        raise ModelDownloadError(
            f"downloading {label} failed ({type(error).__name__}); check the network and run it again: it resumes"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelDownloadError(
                f"the disk is full while downloading {label}; free some space and run the command again: it resumes"
            ) from error
        raise ModelDownloadError(f"cannot write {label}: {error.strerror}") from error
