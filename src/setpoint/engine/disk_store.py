"""KV blocks as files of one directory, which survive a restart. Synchronous; belongs to one thread.

A file is named after the block's key, its parent's and its group: all of them keyed hashes, so names say nothing of
the text. Its head is not read but compared with the one that the reader expects, so no number of a file is ever used;
a keyed digest covers head, token ids and bytes. What does not fit is removed and was never there.

The directory holds the secret of the keys, and one folder for each fingerprint of what the bytes depend on. Eviction
takes the least recently used block that no other block continues: prefixes are eaten from their ends. One process at a
time writes and evicts, so that the budget is one budget; others read, and the next one takes over when it has ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import heapq
import hmac
import logging
import os
import re
import secrets
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setpoint.engine.host_tier import BlockName, BlockRecord
from setpoint.errors import ConfigError

MAGIC = b"setpoint kv 1\n\0\0"
SECRET_BYTES = 32
DIGEST_BYTES = 32
PAGE = 4096
RESERVED_BYTES = 1 << 30  # of the disk that stay free whatever the budget says
WRITING = ".writing"
STALE_S = 3600.0  # a file half written so long ago has lost its writer
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NAME = re.compile(r"([0-9a-f]{64})-([0-9a-f]{64})-(\d{1,3})")
_FOLDER = re.compile(r"[0-9a-f]{32}")

log = logging.getLogger("setpoint.kv")


def open_directory(path: Path) -> bytes:
    """Make `path` if it is not there; returns its secret. Raises ConfigError where others could write, OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ConfigError("--kv-disk-path can be written by others; give a directory of your own, with mode 0700")
    file = path / "secret"
    with contextlib.suppress(FileNotFoundError):
        return _read_secret(file)
    temporary = path / f"{secrets.token_hex(8)}{WRITING}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(SECRET_BYTES))
        os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(temporary, file)
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
    return _read_secret(file)


def _read_secret(file: Path) -> bytes:
    descriptor = os.open(file, _READ_FLAGS)
    try:
        status = os.fstat(descriptor)
        mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
        secret = os.read(descriptor, SECRET_BYTES + 1) if mine else b""
    finally:
        os.close(descriptor)
    if len(secret) != SECRET_BYTES:
        raise ConfigError("the secret in --kv-disk-path is damaged or readable by others; remove that directory")
    return secret


@dataclass(slots=True)
class _Entry:
    parent: bytes
    num_bytes: int  # on disk
    used: float


class DiskStore:
    """At most `limit_bytes` in all folders together.

    `save` and `remove` raise OSError, the others do not; `save` raises BlockingIOError while another process writes.
    """

    def __init__(
        self, path: Path, secret: bytes, fingerprint: str, limit_bytes: int, *, reserved_bytes: int = RESERVED_BYTES
    ) -> None:
        self.num_bytes = 0
        self.num_dropped = 0  # damaged files
        self._path = path
        self._folder = path / hashlib.sha256(fingerprint.encode()).hexdigest()[:32]
        self._fingerprint = hashlib.sha256(fingerprint.encode()).digest()
        self._secret = secret
        self._limit = limit_bytes
        self._reserved = reserved_bytes
        self._lock: int | None = None  # descriptor; held = this process writes
        self._entries: dict[BlockName, _Entry] = {}
        self._continued: dict[BlockName, int] = {}  # how many entries have this one as their parent
        self._leaves: list[tuple[float, BlockName]] = []  # heap; an entry counts if its time is the current one
        self._foreign: list[tuple[float, int, Path]] = []  # of other fingerprints, newest first

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def scan(self) -> None:
        """Find what earlier processes left, and become the one that writes if there is none."""
        try:
            self._take_lock()
        except BlockingIOError:
            log.warning(
                "another process writes to --kv-disk-path: this one reads from it, and writes when that one ends"
            )
        except OSError:  # told when something is to be saved
            pass
        self._list()

    def close(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path / "writer", flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            raise
        self._lock = descriptor

    def _list(self) -> None:
        now = time.time()
        for folder in self._folders():
            for file in _files(folder):
                with contextlib.suppress(OSError):
                    status = file.stat(follow_symlinks=False)
                    match = _NAME.fullmatch(file.name)
                    if file.name.endswith(WRITING) and now - status.st_mtime >= STALE_S:
                        os.unlink(file.path)
                    elif match is not None and stat.S_ISREG(status.st_mode):
                        self._found(match, folder, file, status)
        self._foreign.sort(reverse=True)
        if self._lock is not None:
            self._make_room(0)

    def _folders(self) -> list[Path]:
        try:
            return [Path(entry.path) for entry in os.scandir(self._path) if _FOLDER.fullmatch(entry.name)]
        except OSError:
            return []

    def _found(self, match: re.Match[str], folder: Path, file: os.DirEntry[str], status: os.stat_result) -> None:
        num_bytes = _on_disk(status.st_size)
        if folder != self._folder:
            self._foreign.append((status.st_mtime, num_bytes, Path(file.path)))
            self.num_bytes += num_bytes
            return
        name = (bytes.fromhex(match[1]), int(match[3]))
        self._add(name, _Entry(bytes.fromhex(match[2]), num_bytes, status.st_mtime))

    # --- one block -----------------------------------------------------------------------------------------------

    def load(self, name: BlockName, parent: bytes, tokens: bytes, num_bytes: int) -> bytes | None:
        """The bytes of a block, if its file is whole and says what is expected."""
        entry = self._entries.get(name)
        if entry is None or entry.parent != parent:
            return None
        head = self._head(name, parent, tokens, num_bytes)
        file = self._file(name, parent)
        try:
            payload = _read(file, head, num_bytes, self._secret)
        except FileNotFoundError:  # removed by another process, which is its right
            self._forget(name)
            return None
        except OSError as error:
            log.warning("a saved KV block cannot be read: %s", error.strerror)
            self._forget(name)
            return None
        if payload is None:
            self.num_dropped += 1
            log.warning("a saved KV block is damaged; it is removed")
            with contextlib.suppress(OSError):
                self.remove(name)
        return payload

    def expect(self, name: BlockName) -> None:
        """It will be read soon: the kernel may begin, so that a disk has several reads to do at once."""
        entry = self._entries.get(name)
        if entry is not None:
            with contextlib.suppress(OSError):
                descriptor = os.open(self._file(name, entry.parent), _READ_FLAGS)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def touch(self, name: BlockName) -> None:
        """It was used now: it goes later."""
        entry = self._entries.get(name)
        if entry is not None:
            entry.used = time.time()
            self._push(name, entry)
            with contextlib.suppress(OSError):  # on a disk for reading only
                os.utime(self._file(name, entry.parent), follow_symlinks=False)

    def save(self, record: BlockRecord) -> None:
        name, parent = record.name, record.parent
        if self._lock is None:
            self._take_over()
        if name in self._entries:
            return
        head = self._head(name, parent, record.tokens, len(record.payload))
        size = _on_disk(len(head) + DIGEST_BYTES + len(record.payload))
        if not self._make_room(size):
            return
        self._folder.mkdir(mode=0o700, exist_ok=True)
        disk = os.statvfs(self._folder)
        if size > disk.f_bavail * disk.f_frsize - self._reserved:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write(self._file(name, parent), [head, _digest(self._secret, head, record.payload), record.payload])
        self._add(name, _Entry(parent, size, time.time()))

    def _take_over(self) -> None:
        """Write from now on. What is there is not what was there when this process began."""
        self._take_lock()
        self.num_bytes = 0
        for known in (self._entries, self._continued, self._leaves, self._foreign):
            known.clear()
        self._list()

    def remove(self, name: BlockName) -> None:
        entry = self._entries[name]
        self._forget(name)
        self._file(name, entry.parent).unlink(missing_ok=True)

    def _file(self, name: BlockName, parent: bytes) -> Path:
        return self._folder / f"{name[0].hex()}-{parent.hex()}-{name[1]}"

    def _head(self, name: BlockName, parent: bytes, tokens: bytes, num_bytes: int) -> bytes:
        sizes = struct.pack("<QQQ", name[1], len(tokens), num_bytes)
        return b"".join((MAGIC, self._fingerprint, sizes, name[0], parent, tokens))

    # --- the order of eviction -----------------------------------------------------------------------------------

    def _add(self, name: BlockName, entry: _Entry) -> None:
        self._entries[name] = entry
        self.num_bytes += entry.num_bytes
        parent = (entry.parent, name[1])
        self._continued[parent] = self._continued.get(parent, 0) + 1
        self._push(name, entry)

    def _forget(self, name: BlockName) -> None:
        entry = self._entries.pop(name)
        self.num_bytes -= entry.num_bytes
        parent = (entry.parent, name[1])
        self._continued[parent] -= 1
        if not self._continued[parent]:
            del self._continued[parent]
            before = self._entries.get(parent)
            if before is not None:
                self._push(parent, before)

    def _push(self, name: BlockName, entry: _Entry) -> None:
        if name in self._continued:
            return
        heapq.heappush(self._leaves, (entry.used, name))
        if len(self._leaves) > 4 * len(self._entries) + 64:  # mostly times that have passed
            leaves = (leaf for leaf in self._entries if leaf not in self._continued)
            self._leaves = [(self._entries[leaf].used, leaf) for leaf in leaves]
            heapq.heapify(self._leaves)

    def _make_room(self, num_bytes: int) -> bool:
        """Remove files until so many bytes are left in the budget; False where they never can be."""
        if num_bytes > self._limit:
            return False
        while self.num_bytes + num_bytes > self._limit and self._foreign:
            _, size, file = self._foreign.pop()
            self.num_bytes -= size
            with contextlib.suppress(OSError):
                file.unlink()
        while self.num_bytes + num_bytes > self._limit and self._leaves:
            used, name = heapq.heappop(self._leaves)
            entry = self._entries.get(name)
            if entry is not None and entry.used == used and name not in self._continued:
                self.remove(name)
        return self.num_bytes + num_bytes <= self._limit

    def check_integrity(self) -> None:
        """Raise AssertionError if counts and the order of eviction do not cover the entries."""
        foreign = sum(size for _, size, _ in self._foreign)
        if self.num_bytes != foreign + sum(entry.num_bytes for entry in self._entries.values()):
            raise AssertionError("the disk tier has lost count of its bytes")
        leaves = {name for name in self._entries if name not in self._continued}
        current = {name for used, name in self._leaves if name in leaves and self._entries[name].used == used}
        if leaves != current:
            raise AssertionError("a block would never be evicted from disk")


def _on_disk(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        yield from os.scandir(folder)
    except OSError:
        return


def _digest(secret: bytes, head: bytes, payload: bytes) -> bytes:
    return hmac.digest(secret, hashlib.sha256(payload).digest() + head, "sha256")


def _read(file: Path, head: bytes, num_bytes: int, secret: bytes) -> bytes | None:
    descriptor = os.open(file, _READ_FLAGS)
    try:
        status = os.fstat(descriptor)
        size = len(head) + DIGEST_BYTES + num_bytes
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return None
        if os.read(descriptor, len(head)) != head:
            return None
        digest = os.read(descriptor, DIGEST_BYTES)
        payload = os.read(descriptor, num_bytes)
    finally:
        os.close(descriptor)
    return payload if len(payload) == num_bytes and _digest(secret, head, payload) == digest else None


def _write(file: Path, parts: list[bytes]) -> None:
    """All or nothing: a reader sees the whole file or none. Not synced: a file torn by a crash is found damaged."""
    temporary = file.with_name(f"{secrets.token_hex(8)}{WRITING}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb", buffering=0) as opened:
            for part in parts:
                left = memoryview(part)
                while left:
                    left = left[opened.write(left) :]
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
