"""One file over HTTPS: resumed, verified against a pinned SHA-256, and visible only when it is whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from setpoint.errors import ModelDownloadError

if TYPE_CHECKING:  # both are loaded when something is downloaded: they are slow to import
    import ssl

    import httpx

Progress = Callable[[str, int, int], None]  # (label, bytes done, bytes in total)

SPARE_BYTES = 64 << 20  # left free on the disk after a download
TIMEOUT_S = 30.0  # without a byte


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


@cache
def tls() -> ssl.SSLContext:
    """The system's trust store, as curl has it (a company's own authority is there), else the one httpx brings.

    Made once: it reads every root certificate.
    """
    import ssl

    system = ssl.create_default_context()
    if system.cert_store_stats()["x509_ca"]:
        return system
    import httpx

    return httpx.create_ssl_context()


def get(url: str, headers: Mapping[str, str]) -> AbstractContextManager[httpx.Response]:
    """A GET request whose body is read in the `with` block."""
    import httpx

    return httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S, verify=tls())


@contextmanager
def storing(name: str) -> Iterator[None]:
    """Turn what the disk answers into ModelDownloadError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelDownloadError(
                f"the disk is full while storing {name}; free some space and run the command again: it resumes"
            ) from error
        raise ModelDownloadError(
            f"cannot store {name}: {error.strerror or type(error).__name__}; set SETPOINT_CACHE_DIR to another place"
        ) from error


@contextmanager
def only_one_writer(target: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time write `target`; `wait` is called when another one is at it."""
    with target.with_name(target.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def download(url: str, target: Path, *, sha256: str, size: int, progress: Progress = silent) -> None:
    """Fetch `url` into `target`. An interrupted download goes on from its `.part` file.

    Raises ModelDownloadError: no network, an HTTP error, no space, or a wrong digest (the partial file is removed).
    """
    part = target.with_name(target.name + ".part")
    with storing(target.name):
        target.parent.mkdir(parents=True, exist_ok=True)
        if _size_of(part) > size:
            part.unlink()
        require_space(target.parent, size - _size_of(part))
        _fetch_all(url, part, size, target.name, progress)
        if sha256_of(part) != sha256:
            part.unlink()
            raise ModelDownloadError(f"{target.name} does not have the expected SHA-256; it was removed, try again")
        part.replace(target)


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _fetch_all(url: str, part: Path, size: int, label: str, progress: Progress) -> None:
    """Fetch until the part is whole; a cut connection is taken up again as long as each attempt brought some bytes."""
    import httpx

    have = _size_of(part)
    while have < size:
        try:
            _fetch(url, part, have, size, label, progress)
            failure: Exception | None = None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = error
        before, have = have, _size_of(part)
        if have <= before:
            what = "the server sent too little" if failure is None else type(failure).__name__
            raise ModelDownloadError(
                f"downloading {label} failed ({what}); check the network and run it again: it resumes"
            ) from failure


def _fetch(url: str, part: Path, have: int, size: int, label: str, progress: Progress) -> None:
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with get(url, headers) as response:
        if response.status_code == 416:  # the server's file ends before our part does
            part.unlink(missing_ok=True)
            raise ModelDownloadError(f"{label} changed on the server; the partial file was removed, try again")
        if response.status_code not in (200, 206):
            raise ModelDownloadError(f"downloading {label} failed with HTTP status {response.status_code}")
        # 200, or a range that starts elsewhere: the server sends the file from its start
        resumes = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status_code == 206 and not resumes:
            part.unlink(missing_ok=True)
            raise ModelDownloadError(f"the server sent another part of {label} than was asked for; try again")
        done = have if resumes else 0
        with part.open("ab" if resumes else "wb") as file:
            for chunk in response.iter_raw():
                done += len(chunk)
                if done > size:
                    part.unlink()
                    raise ModelDownloadError(f"{label} is larger than the {size} bytes that were announced; not kept")
                file.write(chunk)
                progress(label, done, size)
            file.flush()
            os.fsync(file.fileno())
