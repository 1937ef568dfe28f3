"""Saved KV blocks: what is read is what was written, by us, for this model; everything else was never there."""

from __future__ import annotations

import contextlib
import os
import random
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_support import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.engine.disk_store import DiskStore, open_directory
from setpoint.engine.disk_tier import READ_AHEAD, DiskTier
from setpoint.engine.host_tier import BlockName, BlockRecord
from setpoint.engine.lower_tiers import Fetched, Wanted
from setpoint.errors import ConfigError

ROOT = bytes(32)
SIZE = 3000  # one page with its head


def record(number: int, parent: bytes = ROOT, group: int = 0) -> BlockRecord:
    key = number.to_bytes(32, "big")
    return BlockRecord((key, group), parent, b"tok%d" % number, random.Random(number).randbytes(SIZE))


def chain(first: int, length: int) -> list[BlockRecord]:
    records = [record(first)]
    for number in range(first + 1, first + length):
        records.append(record(number, records[-1].name[0]))
    return records


def opened(path: Path, fingerprint: str = "model", limit: int = 1 << 20, reserved_bytes: int = 0) -> DiskStore:
    store = DiskStore(path, open_directory(path), fingerprint, limit, reserved_bytes=reserved_bytes)
    store.scan()
    return store


def load(store: DiskStore, item: BlockRecord) -> bytes | None:
    found = store.load(item.name, item.parent, item.tokens, SIZE)
    store.check_integrity()
    return found


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name not in ("secret", "writer"))


def test_what_was_saved_is_read_by_the_next_process(tmp_path: Path) -> None:
    items = [record(1), record(2), record(2, group=1)]
    store = opened(tmp_path / "kv")
    for item in items:
        store.save(item)
    following = opened(tmp_path / "kv")
    assert [load(following, item) for item in items] == [item.payload for item in items]
    assert following.num_bytes == store.num_bytes == 3 * 4096


def test_another_model_finds_nothing_and_evicts_first_what_is_not_its_own(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for item in chain(1, 4):
        store.save(item)
    store.close()
    other = opened(tmp_path, "another model", limit=6 * 4096)
    assert load(other, record(1)) is None
    for item in chain(11, 6):
        other.save(item)
    other.check_integrity()
    assert [load(other, item) for item in chain(11, 6)] == [item.payload for item in chain(11, 6)]
    assert len(files(tmp_path)) == 6


@pytest.mark.parametrize("offset", [0, 20, 60, 100, 140, 160, 300, SIZE])
def test_a_changed_byte_is_found_and_the_file_is_removed(tmp_path: Path, offset: int) -> None:
    store = opened(tmp_path)
    store.save(record(1))
    (file,) = files(tmp_path)
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)
    assert load(store, record(1)) is None
    assert files(tmp_path) == []
    assert store.num_dropped == 1


@settings(deadline=None, max_examples=scaled(30))
@given(content=st.one_of(st.binary(max_size=200), st.integers(0, SIZE + 200)))
def test_no_content_of_a_file_is_believed(tmp_path_factory: pytest.TempPathFactory, content: bytes | int) -> None:
    """Rubbish, and the truth cut anywhere or with something behind it."""
    path = tmp_path_factory.mktemp("kv")
    store = opened(path)
    store.save(record(1))
    (file,) = files(path)
    whole = file.read_bytes()
    bad = content if isinstance(content, bytes) else (whole + bytes(50))[: content + 100]
    file.write_bytes(bad)
    assert load(opened(path), record(1)) == (record(1).payload if bad == whole else None)


def test_a_file_of_another_secret_name_or_kind_is_not_believed(tmp_path: Path) -> None:
    mine, theirs = opened(tmp_path / "mine"), opened(tmp_path / "theirs")
    theirs.save(record(1))
    mine.save(record(2))
    (forged,), (own,) = files(tmp_path / "theirs"), files(tmp_path / "mine")
    (own.parent / forged.name).write_bytes(forged.read_bytes())  # planted
    (own.parent / forged.name.replace("1-", "3-", 1)).write_bytes(own.read_bytes())  # renamed
    linked = own.parent / f"{record(4).name[0].hex()}-{ROOT.hex()}-0"
    linked.symlink_to(own)
    os.mkfifo(own.parent / f"{record(5).name[0].hex()}-{ROOT.hex()}-0")
    found = opened(tmp_path / "mine")
    assert [load(found, record(number)) for number in (1, 3, 4, 5)] == [None] * 4
    assert load(found, record(2)) == record(2).payload


def test_a_lookup_with_other_tokens_or_another_parent_finds_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path)
    item = record(1)
    store.save(item)
    assert store.load(item.name, b"x" * 32, item.tokens, SIZE) is None
    assert store.load(item.name, item.parent, b"other", SIZE) is None


def test_the_budget_holds_and_prefixes_are_eaten_from_their_ends(tmp_path: Path) -> None:
    store = opened(tmp_path, limit=8 * 4096)
    old, new = chain(1, 5), chain(11, 5)
    for item in old:
        store.save(item)
    for item in new:
        store.save(item)
        store.check_integrity()
        assert store.num_bytes <= 8 * 4096
    assert [load(store, item) is not None for item in old] == [True, True, True, False, False]
    assert all(load(store, item) for item in new)


def test_what_was_read_goes_later(tmp_path: Path) -> None:
    store = opened(tmp_path, limit=4 * 4096)
    for number in range(4):
        store.save(record(number))
    store.touch(record(0).name)
    store.save(record(9))
    assert [load(store, record(number)) is not None for number in (0, 1, 2, 3, 9)] == [True, False, True, True, True]
    store.close()
    store = opened(tmp_path, limit=4 * 4096)  # the order survives
    store.save(record(10))
    assert load(store, record(0)) is not None
    assert load(store, record(2)) is None


def test_one_process_writes_and_the_next_takes_over_within_one_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened(tmp_path, limit=6 * 4096)
    for item in chain(1, 4):
        first.save(item)
    assert not caplog.records
    second = opened(tmp_path, limit=6 * 4096)
    assert len(caplog.records) == 1
    assert "another process writes" in caplog.text
    assert [load(second, item) for item in chain(1, 4)] == [item.payload for item in chain(1, 4)]
    with pytest.raises(BlockingIOError):
        second.save(record(50))
    for item in chain(11, 4):  # what the second has listed goes
        first.save(item)
    assert len(files(tmp_path)) == 6
    assert load(second, record(4)) is None
    first.close()
    second.save(record(50))
    assert second.num_bytes == 6 * 4096 == 4096 * len(files(tmp_path))
    assert load(second, chain(11, 4)[0]) == chain(11, 4)[0].payload  # written by the first after the second began
    with pytest.raises(BlockingIOError):
        first.save(record(51))
    assert len(caplog.records) == 1


@settings(deadline=None, max_examples=scaled(30))
@given(turns=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["save", "load", "restart"]), st.integers(1, 12))))
def test_processes_on_one_directory_stay_within_one_budget(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[int, str, int]]
) -> None:
    path, limit = tmp_path_factory.mktemp("kv"), 5
    stores = [opened(path, limit=limit * 4096) for _ in range(3)]
    for number, what, length in turns:
        store, item = stores[number], chain(1, length)[-1]
        if what == "save":
            with contextlib.suppress(BlockingIOError):
                store.save(item)
        elif what == "load":
            assert load(store, item) in (None, item.payload)
        else:
            store.close()
            stores[number] = opened(path, limit=limit * 4096)
        assert sum(store._lock is not None for store in stores) <= 1
        assert len(files(path)) <= limit
        stores[number].check_integrity()
    for store in stores:
        store.close()


def test_only_the_owner_may_read_and_names_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    store = opened(path)
    store.save(record(1))
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for file in path.rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file.name


def test_a_directory_that_others_may_write_or_a_bad_secret_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="kv-disk-path"):
        open_directory(shared)
    path = tmp_path / "kv"
    secret = open_directory(path)
    assert open_directory(path) == secret
    (path / "secret").write_bytes(b"short")
    with pytest.raises(ConfigError, match="secret"):
        open_directory(path)


def test_many_processes_agree_on_one_secret(tmp_path: Path) -> None:
    secrets = []
    threads = [threading.Thread(target=lambda: secrets.append(open_directory(tmp_path / "kv"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(secrets) == 8
    assert len(set(secrets)) == 1


# --- the thread --------------------------------------------------------------------------------------------------


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    made = DiskTier(DiskStore(tmp_path, open_directory(tmp_path), "model", 1 << 20, reserved_bytes=0), [SIZE, SIZE])
    assert made.wait_until_scanned(10)
    yield made
    made.close(1)


def fetched(tier: DiskTier, *items: BlockRecord) -> list[Fetched]:
    arrived = threading.Event()
    tier.on_progress = arrived.set
    tier.fetch([Wanted(item.name, item.parent, item.tokens) for item in items])
    found: list[Fetched] = []
    while len(found) < len(items):
        assert arrived.wait(10)
        arrived.clear()
        found += tier.take_fetched()
    return found


def test_blocks_go_through_the_thread_and_back(tier: DiskTier) -> None:
    items = chain(1, 20)
    assert all(tier.store(item) for item in items)
    assert all(item.name in tier for item in items)
    assert [answer.payload for answer in fetched(tier, *items, record(99))] == [*(i.payload for i in items), None]


def test_the_kernel_reads_ahead_of_the_block_that_is_read(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    items = chain(1, 40)
    for item in items:
        tier.files.save(item)
    expected: list[BlockName] = []
    ahead: list[int] = []
    read = tier.files.load

    def load(name: BlockName, *rest: Any) -> bytes | None:
        ahead.append(len(expected) - len(ahead))
        return read(name, *rest)

    monkeypatch.setattr(tier.files, "expect", expected.append)
    monkeypatch.setattr(tier.files, "load", load)
    fetched(tier, *items)
    assert expected == [item.name for item in items]
    assert ahead == [READ_AHEAD + 1] * (40 - READ_AHEAD) + list(range(READ_AHEAD, 0, -1))


def test_expecting_what_is_not_there_does_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.save(record(1))
    store.expect(record(2).name)
    files(tmp_path)[0].unlink()
    store.expect(record(1).name)
    assert load(store, record(1)) is None


def test_what_nobody_waits_for_any_more_is_not_read(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    items = chain(1, 4)
    for item in items:
        tier.files.save(item)
    reading, go_on = threading.Event(), threading.Event()
    read = tier.files.load

    def load(*arguments: Any) -> bytes | None:
        reading.set()
        assert go_on.wait(10)
        return read(*arguments)

    monkeypatch.setattr(tier.files, "load", load)
    tier.fetch([Wanted(item.name, item.parent, item.tokens) for item in items])
    assert reading.wait(10)
    tier.forget([item.name for item in items[1:]])
    tier.fetch([Wanted(items[3].name, items[3].parent, items[3].tokens)])  # wanted again, by somebody else
    go_on.set()
    found: list[BlockName] = []
    deadline = time.monotonic() + 10
    while items[3].name not in found and time.monotonic() < deadline:
        found += [answer.name for answer in tier.take_fetched()]
    assert set(found) == {items[0].name, items[3].name}


def test_closing_writes_what_was_stored(tmp_path: Path) -> None:
    tier = DiskTier(DiskStore(tmp_path, open_directory(tmp_path), "model", 1 << 20, reserved_bytes=0), [SIZE])
    for item in chain(1, 20):
        tier.store(item)
    tier.close(10)
    assert not tier.store(record(99))
    following = opened(tmp_path)
    assert all(load(following, item) == item.payload for item in chain(1, 20))


def test_a_thread_whose_directory_another_writes_reads_and_writes_when_that_has_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = opened(tmp_path)
    other.save(record(1))
    now = [0.0]
    files = DiskStore(tmp_path, open_directory(tmp_path), "model", 1 << 20, reserved_bytes=0)
    tier = DiskTier(files, [SIZE], clock=lambda: now[0])
    assert tier.wait_until_scanned(10)
    assert [answer.payload for answer in fetched(tier, record(1))] == [record(1).payload]
    for number, stays in ((2, False), (3, False), (4, True)):
        now[0] += 100.0
        if stays:
            other.close()
        written = threading.Event()
        tier.on_progress = written.set
        assert tier.store(record(number))
        assert written.wait(10)
        assert tier.takes_more == stays
        assert (record(number).name in tier) == stays
    tier.close(1)
    assert len(caplog.records) == 1
    last = opened(tmp_path)
    last.save(record(5))  # the thread has given the directory up
    last.close()


@pytest.mark.parametrize("trouble", ["full", "read-only", "gone"])
def test_a_disk_that_takes_nothing_is_one_log_line(
    tmp_path: Path, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kv"
    secret = open_directory(path)
    reserved = 1 << 62 if trouble == "full" else 0
    if trouble == "read-only":  # root may write anywhere: a file in the folder's place refuses even root
        (path / DiskStore(path, secret, "model", 1 << 20)._folder.name).write_bytes(b"")
    if trouble == "gone":
        (path / "secret").unlink()
        path.rmdir()
    now = [0.0]
    tier = DiskTier(DiskStore(path, secret, "model", 1 << 20, reserved_bytes=reserved), [SIZE], clock=lambda: now[0])
    for number in range(3):
        now[0] += 100.0
        stored = threading.Event()
        tier.on_progress = stored.set
        assert tier.takes_more
        tier.store(record(number))
        assert stored.wait(10)
        assert not tier.takes_more
        assert not tier.store(record(50))
        assert record(number).name not in tier
    assert [answer.payload for answer in fetched(tier, record(0))] == [None]
    assert len([line for line in caplog.records if "cannot be saved" in line.message]) == 1
    tier.close(1)
