"""Repacked weights on disk, so that the next start maps them instead of packing again.

A file is a header, the checksums of the image's chunks and, from a multiple of the chunk size on, the image. The
header holds the source's digest, the layout version and the shape and place of every matrix. It is not read but
compared with the one that this start would write: no number of the file is ever used.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from setpoint import _native

MAGIC = b"setpoint packed\n"
SUFFIX = ".packed"
WRITING = ".writing"
SMALLEST_BYTES = 16 << 20  # what is packed in a few milliseconds needs no file
STALE_S = 3600.0  # a file half written so long ago has lost its writer
FREE_SHARE = 2  # a file takes at most one part in so many of the disk's free space

log = logging.getLogger("setpoint.weights")


@dataclass(frozen=True, slots=True)
class CachedWeights:
    """One file of the cache, for people."""

    path: Path
    num_bytes: int
    used: float  # seconds since the epoch


class WeightCache:
    """The files of `directory`, together at most `limit_bytes`; those used least recently go first.

    Never raises for what is on the disk or not: a cache that cannot be used is one warning, and the weights are packed.
    """

    def __init__(self, directory: Path, limit_bytes: int, *, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.directory = directory
        self._limit = limit_bytes
        self._smallest = smallest_bytes

    def wants(self, num_bytes: int) -> bool:
        return self._smallest <= num_bytes <= self._limit

    def load(self, source: WeightSource, store: _native.WeightStore, num_threads: int) -> bool:
        """Fill `store` from the file made of `source`; False when there is none, or none that is sound."""
        header = _header(source, store)
        path = self._path(source, header)
        try:
            with open(path, "rb", opener=_open_plain) as file:
                if not _is_sound(file, header, store):
                    log.warning("the cached weights %s are damaged; packing again", path.name)
                    return False
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
                checksums = np.frombuffer(file.read(8 * store.num_chunks), np.uint64).tolist()
                if not store.load(file.fileno(), _image_offset(header, store), checksums, num_threads):
                    log.warning("the cached weights %s are damaged; packing again", path.name)
                    return False
                with contextlib.suppress(OSError):  # on a disk for reading only
                    os.utime(file.fileno())
        except FileNotFoundError:
            return False
        except OSError as error:
            log.warning("the cached weights cannot be read: %s", error.strerror)
            return False
        return True

    def save(self, source: WeightSource, store: _native.WeightStore, stop: threading.Event) -> None:
        """Write the packed `store` for the next start, unless `stop` is set meanwhile."""
        header = _header(source, store)
        path = self._path(source, header)
        size = _image_offset(header, store) + store.image.nbytes
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._make_room(size, path)
            disk = os.statvfs(self.directory)
            if size > disk.f_bavail * disk.f_frsize // FREE_SHARE:
                log.warning("the disk is too full to cache the packed weights (%d MB)", size // 1_000_000)
                return
            _write(path, header, store, stop)
        except OSError as error:
            log.warning("the packed weights cannot be cached: %s", error.strerror)

    def files(self) -> list[CachedWeights]:
        """What is there, the most recently used first."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.directory.iterdir():
                with contextlib.suppress(OSError):
                    status = path.lstat()
                    if path.suffix == SUFFIX:
                        found.append(CachedWeights(path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda file: file.used, reverse=True)

    def clear(self) -> int:
        """Remove every file; returns the bytes that were freed. Processes that use one keep it until they end."""
        freed = sum(_remove(file) for file in self.files())
        self._remove_stale(0.0)
        return freed

    def _path(self, source: WeightSource, header: bytes) -> Path:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).strip("-.")[:64]
        return self.directory / f"{name}-{hashlib.sha256(header).hexdigest()[:24]}{SUFFIX}"

    def _make_room(self, size: int, path: Path) -> None:
        self._remove_stale(STALE_S)
        kept = [file for file in self.files() if file.path != path]
        total = size + sum(file.num_bytes for file in kept)
        while kept and total > self._limit:
            file = kept.pop()
            total -= file.num_bytes
            _remove(file)

    def _remove_stale(self, age_s: float) -> None:
        for path in self.directory.glob(f"*{WRITING}"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime >= age_s:
                    path.unlink()


@dataclass(frozen=True, slots=True)
class WeightSource:
    """What was packed: `digest` changes whenever the files do."""

    name: str
    digest: str


def _header(source: WeightSource, store: _native.WeightStore) -> bytes:
    digest, description = source.digest.encode(), store.description
    return MAGIC + struct.pack("<QQ", len(digest), len(description)) + digest + description


def _image_offset(header: bytes, store: _native.WeightStore) -> int:
    unit = store.CHUNK_BYTES
    return -(-(len(header) + 8 * store.num_chunks) // unit) * unit


def _is_sound(file: BinaryIO, header: bytes, store: _native.WeightStore) -> bool:
    size = _image_offset(header, store) + store.image.nbytes
    return os.fstat(file.fileno()).st_size == size and file.read(len(header)) == header


def _open_plain(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _write(path: Path, header: bytes, store: _native.WeightStore, stop: threading.Event) -> None:
    """All or nothing: other processes see the whole file or none."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{WRITING}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            checksums = np.array(store.checksums(1), np.uint64)
            for offset, part in _parts(header + checksums.tobytes(), store):
                if stop.is_set():
                    return
                file.seek(offset)
                while part:
                    part = part[file.write(part) :]
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _parts(start: bytes, store: _native.WeightStore) -> Iterator[tuple[int, memoryview]]:
    unit, image = store.CHUNK_BYTES, store.image.data
    yield 0, memoryview(start)
    offset = -(-len(start) // unit) * unit
    for begin in range(0, len(image), unit):
        yield offset + begin, image[begin : begin + unit]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(file: CachedWeights) -> int:
    try:
        file.path.unlink()
    except OSError:
        return 0
    return file.num_bytes
