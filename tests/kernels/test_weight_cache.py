"""Repacked weights on disk: the same bits as packed ones, and whatever is wrong with a file, they are packed again."""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from program_models import MODELS, MemoryCheckpoint, open_runner, run, same_bits, tokens_of
from test_greedy_head import open_greedy, random_head, read_in_full, tokens

from setpoint import _native
from setpoint.quant.formats import quantize
from setpoint.runtime.cpu.weight_cache import WeightCache, WeightSource

SOURCE = WeightSource("a model/of: mine", "digest")
SHAPES = (("Q4_0", 4000, 512), ("Q8_0", 40, 1024), ("F16", 17, 64), ("Q6_K", 1000, 2048))  # some 4 MB: three chunks
NEVER = threading.Event()


class Model:
    """Matrices in a store, not packed yet."""

    def __init__(self, shapes: tuple[tuple[str, int, int], ...] = SHAPES, *, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.formats = shapes
        self.raws = [quantize(name, random.standard_normal((n, k), np.float32)) for name, n, k in shapes]
        self.store = _native.WeightStore(sum(_native.packed_room(name, n, k, False) for name, n, k in shapes))
        self.weights = [self.add(i) for i in range(len(shapes))]

    def add(self, i: int) -> _native.Weight:
        name, _, k = self.formats[i]
        return self.store.add([(name, self.raws[i])], k, False)

    def packed(self) -> Model:
        self.store.pack(2)
        return self


@pytest.fixture(scope="module")
def packed() -> Model:
    return Model().packed()


@pytest.fixture
def cache(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path / "packed", 1 << 30, smallest_bytes=0)


@pytest.fixture
def saved(cache: WeightCache, packed: Model) -> Path:
    cache.save(SOURCE, packed.store, NEVER)
    [file] = cache.files()
    return file.path


def is_loaded(cache: WeightCache, model: Model) -> bool:
    return cache.load(SOURCE, model.store, 2)


def test_a_store_packs_the_same_bits_as_a_matrix_alone(packed: Model) -> None:
    for weight, raw, (name, _, k) in zip(packed.weights, packed.raws, SHAPES, strict=True):
        x = np.random.default_rng(1).standard_normal((3, k), np.float32)
        alone = _native.Weight.pack(name, raw, k)
        assert same_bits(_native.kernels_matmul("ref", weight, x), _native.kernels_matmul("ref", alone, x))
    one_thread = Model()
    one_thread.store.pack(1)
    assert np.array_equal(one_thread.store.image, packed.store.image)


def test_a_store_refuses_more_than_its_room() -> None:
    with pytest.raises(ValueError, match="room"):
        Model().add(0)


def test_what_was_saved_is_loaded(cache: WeightCache, saved: Path, packed: Model) -> None:
    model = Model(seed=7)  # other contents: nothing is packed
    assert is_loaded(cache, model)
    assert np.array_equal(model.store.image, packed.store.image)
    x = np.random.default_rng(1).standard_normal((2, 512), np.float32)
    assert same_bits(
        _native.kernels_matmul("ref", model.weights[0], x), _native.kernels_matmul("ref", packed.weights[0], x)
    )
    saved.unlink()  # as another process's eviction does: the memory stays
    assert np.array_equal(model.store.image, packed.store.image)


def test_the_file_is_for_its_owner_and_says_whose_weights_it_holds(saved: Path) -> None:
    assert saved.stat().st_mode & 0o777 == 0o600
    assert saved.parent.stat().st_mode & 0o777 == 0o700
    assert saved.name.startswith("a-model-of-mine-")


def test_weights_move_to_other_pages_under_the_eyes_of_their_readers(
    cache: WeightCache, saved: Path, packed: Model
) -> None:
    expected = packed.store.checksums(1)
    wrong, moved = [], threading.Event()
    for _ in range(20):
        model = Model(seed=7)
        assert is_loaded(cache, model)
        moved.clear()

        def watch(store: _native.WeightStore = model.store) -> None:
            while not moved.is_set():
                wrong.extend(store.checksums(1) != expected for _ in range(3))

        watchers = [threading.Thread(target=watch) for _ in range(2)]
        for watcher in watchers:
            watcher.start()
        for index in range(model.store.num_slices + 1):  # one too many does nothing
            model.store.move_to_huge_pages(index)
        moved.set()
        for watcher in watchers:
            watcher.join()
        assert not any(wrong)
        assert np.array_equal(model.store.image, packed.store.image)
    assert packed.store.num_slices == 0  # packed ones lie in huge pages from the beginning


@pytest.mark.parametrize(
    "other", [WeightSource(SOURCE.name, "another digest"), WeightSource("another name", SOURCE.digest)]
)
def test_another_source_has_another_file(cache: WeightCache, saved: Path, other: WeightSource) -> None:
    assert not cache.load(other, Model().store, 2)


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        file.write(content)


def first_difference(path: Path) -> int:
    """Where the checksums begin: behind the header, whose sizes are its second and third number."""
    digest, description = np.frombuffer(path.read_bytes()[16:32], np.uint64).tolist()
    return 32 + int(digest) + int(description)


DAMAGES = {
    "magic": lambda path: overwrite(path, 0, b"x"),
    "sizes of the header": lambda path: overwrite(path, 16, b"\xff" * 16),
    "digest": lambda path: overwrite(path, 32, b"D"),
    "layout version": lambda path: overwrite(path, 32 + len("digest"), b"\x7f"),
    "shape of the last matrix": lambda path: overwrite(path, first_difference(path) - 16, b"\x01"),
    "a checksum": lambda path: overwrite(path, first_difference(path), b"\xaa\xbb\xcc"),
    "first byte of the image": lambda path: overwrite(path, 2 << 20, bytes([path.read_bytes()[2 << 20] ^ 1])),
    "last byte of the image": lambda path: overwrite(path, -100, bytes([path.read_bytes()[-100] ^ 0x80])),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "truncated to the header": lambda path: os.truncate(path, 40),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_packed_again_with_one_line(
    damage: str, cache: WeightCache, saved: Path, packed: Model, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[damage](saved)
    model = Model()
    assert not is_loaded(cache, model)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "damaged" in record.getMessage()
    assert np.array_equal(model.packed().store.image, packed.store.image)
    cache.save(SOURCE, model.store, NEVER)
    assert is_loaded(cache, Model())


def test_a_file_of_other_shapes_is_not_taken_for_ours(cache: WeightCache, saved: Path, packed: Model) -> None:
    """The same bytes in total, but other matrices: as a name collision or a rename would bring it."""
    swapped = Model((SHAPES[1], SHAPES[0], *SHAPES[2:]))
    assert swapped.store.image.nbytes == packed.store.image.nbytes
    swapped.packed()
    cache.save(SOURCE, swapped.store, NEVER)
    [other] = [file.path for file in cache.files() if file.path != saved]
    os.replace(other, saved)
    assert not is_loaded(cache, Model())


@pytest.mark.parametrize("kind", ["symbolic link", "directory", "pipe"])
def test_only_a_plain_file_is_read(kind: str, cache: WeightCache, saved: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    os.replace(saved, moved)
    if kind == "symbolic link":
        saved.symlink_to(moved)
    elif kind == "directory":
        saved.mkdir()
    else:
        os.mkfifo(saved)
    assert not is_loaded(cache, Model())


def test_writers_at_once_leave_one_sound_file(cache: WeightCache, packed: Model) -> None:
    writers = [threading.Thread(target=cache.save, args=(SOURCE, packed.store, NEVER)) for _ in range(4)]
    for writer in writers:
        writer.start()
    loaded = []
    while any(writer.is_alive() for writer in writers):
        model = Model()
        if is_loaded(cache, model):  # from the first file that is whole
            loaded.append(np.array_equal(model.store.image, packed.store.image))
    assert all(loaded)
    assert is_loaded(cache, Model())
    assert [path.suffix for path in cache.directory.iterdir()] == [".packed"]


def test_a_writer_that_is_stopped_leaves_nothing(cache: WeightCache, packed: Model) -> None:
    stop = threading.Event()
    stop.set()
    cache.save(SOURCE, packed.store, stop)
    assert list(cache.directory.iterdir()) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_write_that_fails_midway_is_one_line(
    cache: WeightCache, packed: Model, caplog: pytest.LogCaptureFixture
) -> None:
    cache.save(SOURCE, packed.store, NEVER)
    assert [record.getMessage() for record in caplog.records] == ["the packed weights cannot be cached: File too large"]
    assert list(cache.directory.iterdir()) == []


def test_a_disk_that_is_nearly_full_is_left_alone(
    cache: WeightCache, packed: Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = os.statvfs("/")
    full = os.statvfs_result((*status[:3], 1000, 1000, *status[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    cache.save(SOURCE, packed.store, NEVER)
    assert ["too full" in record.getMessage() for record in caplog.records] == [True]
    assert list(cache.directory.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_one_line(packed: Model, caplog: pytest.LogCaptureFixture) -> None:
    cache = WeightCache(Path("/proc/setpoint"), 1 << 30)
    cache.save(SOURCE, packed.store, NEVER)
    assert len(caplog.records) == 1
    assert not is_loaded(cache, Model())
    assert (cache.files(), cache.clear()) == ([], 0)


def test_the_least_recently_used_go_first(cache: WeightCache, saved: Path, packed: Model) -> None:
    size = saved.stat().st_size
    small = WeightCache(cache.directory, 2 * size + size // 2, smallest_bytes=0)
    sources = [WeightSource(name, "digest") for name in ("first", "second", "third")]
    saved.unlink()
    for age, source in zip((300, 200), sources, strict=False):
        small.save(source, packed.store, NEVER)
        os.utime(small.files()[0].path, (time.time() - age,) * 2)
    assert small.load(sources[0], Model().store, 1)  # now the second is the oldest
    small.save(sources[2], packed.store, NEVER)
    assert [file.path.name.split("-")[0] for file in small.files()] == ["third", "first"]
    assert small.clear() == 2 * size
    assert small.files() == []


def test_only_what_pays_is_kept(cache: WeightCache) -> None:
    bounded = WeightCache(cache.directory, 100, smallest_bytes=10)
    assert [bounded.wants(size) for size in (9, 10, 100, 101)] == [False, True, True, False]
    assert not WeightCache(cache.directory, 0).wants(1 << 20)


def test_what_a_writer_left_that_died_is_removed(cache: WeightCache, saved: Path, packed: Model) -> None:
    left, fresh = (saved.with_name(f"{name}.writing") for name in ("left", "fresh"))
    left.write_bytes(b"x")
    fresh.write_bytes(b"x")
    os.utime(left, (time.time() - 7200,) * 2)
    cache.save(SOURCE, packed.store, NEVER)
    assert (left.exists(), fresh.exists()) == (False, True)


def test_a_runner_gives_the_same_logits_from_the_cache(cache: WeightCache) -> None:
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model, "Q8_0")
    logits = []
    for cached in (False, True):
        runner = open_runner(model, checkpoint, weight_cache=cache)
        logits.append(run(runner, tokens_of(40), [40]))
        assert runner.loading.cached is cached
        runner.close()  # the file is written by then
    plain = open_runner(model, checkpoint)
    logits.append(run(plain, tokens_of(40), [40]))
    assert same_bits(logits[0], logits[1])
    assert same_bits(logits[0], logits[2])


def test_greedy_rows_find_their_shortlist_in_the_cache(cache: WeightCache) -> None:
    head = random_head(1)
    for cached in (False, True):
        runner = open_greedy(head, weight_cache=cache)
        assert tokens(runner, [3, 2]) == read_in_full(runner, [3, 2])
        assert 0 < runner.program.head_retried_part < 1
        assert runner.step_bytes < runner.weight_bytes
        assert runner.loading.cached is cached
        runner.close()
