"""One file over HTTP: resumed, verified, whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopback import Answer, Asked, Loopback, closed_port_url, file_answer, serving
from setpoint.errors import ModelDownloadError
from setpoint.loaders import download as download_module
from setpoint.loaders.download import Progress, download, silent

CONTENT = bytes(range(256)) * 40
DIGEST = sha256(CONTENT).hexdigest()


@pytest.fixture
def web() -> Iterator[Loopback]:
    with serving(lambda asked: file_answer(asked, CONTENT)) as server:
        yield server


def fetch(web: Loopback, target: Path, progress: Progress = silent) -> None:
    download(f"{web.url}/file", target, sha256=DIGEST, size=len(CONTENT), progress=progress)


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def cut_at(size: int, *, then: Callable[[Asked], Answer] | None = None, ranges: bool = True) -> Callable[..., Answer]:
    """The connection breaks after `size` bytes; later requests go to `then`."""
    count = iter(range(1000))

    def answer(asked: Asked) -> Answer:
        if next(count) and then is not None:
            return then(asked)
        return file_answer(asked, CONTENT, cut_after=size, ranges=ranges)

    return answer


def test_a_file_arrives_whole_with_its_progress(web: Loopback, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    told: list[tuple[str, int, int]] = []
    fetch(web, target, lambda *news: told.append(news))
    assert target.read_bytes() == CONTENT
    assert told[-1] == ("file", len(CONTENT), len(CONTENT))
    assert [file.name for file in target.parent.iterdir()] == ["file"]


def test_a_cut_connection_is_taken_up_where_it_broke(web: Loopback, tmp_path: Path) -> None:
    web.answer = cut_at(1000, then=lambda asked: file_answer(asked, CONTENT))
    fetch(web, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert web.ranges("/file") == [0, 1000]


def test_a_later_run_resumes(web: Loopback, tmp_path: Path) -> None:
    web.answer = cut_at(1000, then=lambda asked: Answer(200, CONTENT, cut_after=0))
    with pytest.raises(ModelDownloadError, match="run it again: it resumes"):
        fetch(web, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    web.asked.clear()
    web.answer = lambda asked: file_answer(asked, CONTENT)
    fetch(web, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(web.asked) == 1


def test_a_server_without_ranges_starts_over(web: Loopback, tmp_path: Path) -> None:
    part_of(tmp_path / "file").write_bytes(CONTENT[:1000])
    web.answer = lambda asked: file_answer(asked, CONTENT, ranges=False)
    fetch(web, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert web.ranges("/file") == [1000]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, len(CONTENT)), max_size=4), ranges=st.booleans())
def test_whatever_is_cut_the_result_is_the_file_or_nothing(tmp_path: Path, cuts: list[int], ranges: bool) -> None:
    target = tmp_path / "file"
    target.unlink(missing_ok=True)
    part_of(target).unlink(missing_ok=True)
    waiting = list(cuts)

    def answer(asked: Asked) -> Answer:
        return file_answer(asked, CONTENT, cut_after=waiting.pop() if waiting else None, ranges=ranges)

    with serving(answer) as web:
        for _ in range(len(cuts) + 1):
            try:
                fetch(web, target)
                break
            except ModelDownloadError:
                assert not target.exists()
    assert target.read_bytes() == CONTENT
    assert not part_of(target).exists()


@pytest.mark.parametrize(
    ("answer", "message", "kept"),
    [
        (lambda asked: Answer(404), "HTTP status 404", False),
        (lambda asked: Answer(body=b"x" * len(CONTENT)), "expected SHA-256", False),
        (lambda asked: Answer(body=CONTENT + b"x"), "larger than the", False),
        (lambda asked: Answer(body=CONTENT[:-1]), "run it again", True),
        (lambda asked: Answer(body=CONTENT[:-1], announced=False), "sent too little", True),
        (lambda asked: Answer(206, CONTENT[5:], {"Content-Range": "bytes 5-9/10"}), "another part", False),
        (lambda asked: Answer(302, headers={"Location": "/file"}), "TooManyRedirects", False),
        (lambda asked: Answer(302, headers={"Location": "http://["}), "failed", False),
    ],
    ids=["status", "digest", "larger", "shorter", "short-unannounced", "other-range", "loop", "bad-address"],
)
def test_a_wrong_answer_is_one_line_and_nothing_wrong_is_kept(
    web: Loopback, tmp_path: Path, answer: Callable[[Asked], Answer], message: str, kept: bool
) -> None:
    web.answer = answer
    with pytest.raises(ModelDownloadError, match=message) as caught:
        fetch(web, tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "file").exists()
    assert part_of(tmp_path / "file").exists() == kept


def test_a_part_that_the_server_cannot_continue_is_dropped(web: Loopback, tmp_path: Path) -> None:
    web.answer = lambda asked: file_answer(asked, CONTENT[:500])
    part_of(tmp_path / "file").write_bytes(CONTENT[:1000])
    with pytest.raises(ModelDownloadError, match="changed on the server"):
        fetch(web, tmp_path / "file")
    assert not part_of(tmp_path / "file").exists()


@pytest.mark.parametrize("left", [b"x" * (len(CONTENT) + 1), b"x" * 1000])
def test_a_wrong_part_from_before_heals_at_the_second_try(web: Loopback, tmp_path: Path, left: bytes) -> None:
    part_of(tmp_path / "file").write_bytes(left)
    if len(left) < len(CONTENT):
        with pytest.raises(ModelDownloadError, match="SHA-256"):
            fetch(web, tmp_path / "file")
    fetch(web, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(ModelDownloadError, match=r"ConnectError.*check the network"):
        download(f"{closed_port_url()}/file", tmp_path / "file", sha256=DIGEST, size=len(CONTENT))
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """A file that takes 100 bytes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> int:
        self.file.write(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_keeps_what_is_there(
    web: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_open = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *mode: FullDisk(whole_open(path, *mode)))
        with pytest.raises(ModelDownloadError, match=r"disk is full.*it resumes"):
            fetch(web, tmp_path / "file")
    assert part_of(tmp_path / "file").stat().st_size == 100
    fetch(web, tmp_path / "file")
    assert web.ranges("/file") == [0, 100]


def test_a_disk_without_room_is_refused_before_the_first_byte(
    web: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "SPARE_BYTES", 1 << 62)
    with pytest.raises(ModelDownloadError, match=r"not enough disk space.*SETPOINT_CACHE_DIR"):
        fetch(web, tmp_path / "file")
    assert web.asked == []


def test_a_place_that_cannot_be_written(web: Loopback, tmp_path: Path) -> None:
    (tmp_path / "file-in-the-way").write_text("")
    with pytest.raises(ModelDownloadError, match="cannot store"):
        fetch(web, tmp_path / "file-in-the-way" / "file")
