"""The hub's protocol over loopback: what is fetched, what is kept, what is sent to whom, and every way it fails."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import pytest

from loopback import COMMIT, Answer, Asked, Hub, Loopback, closed_port_url, file_answer, serving
from setpoint.errors import ModelDownloadError, ModelError, ModelNotFoundError
from setpoint.loaders import hub as hub_module
from setpoint.loaders.aliases import Alias
from setpoint.loaders.hub import find_model, list_models, remove_model, resolve_model
from setpoint.loaders.hub_client import HubClient

DIRECTORY = {
    "README.md": b"# a model",
    "config.json": b"{}",
    "model.safetensors": b"weights" * 100,
    "modeling_custom.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "tokenizer.json": b"{}",
}
REPOSITORIES = {
    "org/directory": DIRECTORY,
    "org/single": {"a-Q4_0.gguf": b"GGUF single", "README.md": b""},
    "org/several": {"a-Q4_0.gguf": b"GGUF four", "a-Q8_0.gguf": b"GGUF eight"},
    "org/split": {f"a-{number:05}-of-00003.gguf": b"GGUF part %d" % number for number in (1, 2, 3)},
    "org/pickle": {"pytorch_model.bin": b"pickle", "config.json": b"{}"},
    "org/private": {"a.gguf": b"GGUF private"},
}


@pytest.fixture
def hub() -> Iterator[Loopback]:
    with serving(Hub(REPOSITORIES, private={"org/private": "hf_secret"})) as server:
        yield server


@pytest.fixture
def client(hub: Loopback, tmp_path: Path) -> HubClient:
    return HubClient(hub.url, tmp_path / "hub")


def offline(tmp_path: Path) -> HubClient:
    """The same cache, but nobody answers."""
    return HubClient(closed_port_url(), tmp_path / "hub")


def test_a_directory_holds_data_and_no_code(client: HubClient, tmp_path: Path) -> None:
    path = resolve_model("org/directory", tmp_path, hub=client)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (path / "model.safetensors").read_bytes() == DIRECTORY["model.safetensors"]


def test_the_bytes_are_told_and_nothing_is_printed(
    client: HubClient, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[str, int, int]] = []
    resolve_model("org/split", tmp_path, hub=client, progress=lambda *news: told.append(news))
    total = sum(map(len, REPOSITORIES["org/split"].values()))
    assert told[-1] == ("org/split", total, total)
    assert all(done <= of for _, done, of in told)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("org/single", b"GGUF single"),
        ("org/several:a-Q8_0.gguf", b"GGUF eight"),
        ("org/several:Q4_0", b"GGUF four"),
        (f"org/several:q8_0@{COMMIT}", b"GGUF eight"),
        ("org/single@main", b"GGUF single"),
    ],
)
def test_one_gguf_file(client: HubClient, hub: Loopback, tmp_path: Path, name: str, content: bytes) -> None:
    path = resolve_model(name, tmp_path, hub=client)
    assert path.suffix == ".gguf"
    assert path.read_bytes() == content
    fetched = {request.path for request in hub.asked if request.method == "GET" and "/resolve/" in request.path}
    assert len(fetched) == 1  # and nothing beside it


def test_a_split_gguf_is_fetched_whole_and_opened_by_its_first_part(client: HubClient, tmp_path: Path) -> None:
    path = resolve_model("org/split", tmp_path, hub=client)
    assert path.name == "a-00001-of-00003.gguf"
    parts = sorted(path.parent.iterdir())
    assert [part.read_bytes() for part in parts] == [b"GGUF part 1", b"GGUF part 2", b"GGUF part 3"]


def test_what_is_here_is_not_fetched_again_and_works_offline(client: HubClient, hub: Loopback, tmp_path: Path) -> None:
    first = resolve_model("org/several:Q4_0", tmp_path, hub=client)
    hub.asked.clear()
    assert resolve_model("org/several:Q4_0", tmp_path, hub=client) == first
    assert not any("/resolve/" in request.path for request in hub.asked if request.method == "GET")
    assert resolve_model("org/several:Q4_0", tmp_path, hub=offline(tmp_path)) == first
    assert find_model("org/several:Q4_0", tmp_path, hub=offline(tmp_path)) == first
    assert find_model("org/several:Q8_0", tmp_path, hub=offline(tmp_path)) is None
    with pytest.raises(ModelDownloadError, match="not in the local cache; the hub cannot be reached"):
        resolve_model("org/several:Q8_0", tmp_path, hub=offline(tmp_path))
    with pytest.raises(ModelDownloadError, match="not in the local cache"):
        resolve_model("org/directory", tmp_path, hub=offline(tmp_path))


def test_a_directory_works_offline_and_a_damaged_one_is_said_to_be_incomplete(
    client: HubClient, tmp_path: Path
) -> None:
    path = resolve_model("org/directory", tmp_path, hub=client)
    assert resolve_model("org/directory", tmp_path, hub=offline(tmp_path)) == path
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelDownloadError, match="not in the local cache"):
        resolve_model("org/directory", tmp_path, hub=offline(tmp_path))
    assert resolve_model("org/directory", tmp_path, hub=client) == path
    assert (path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/nothing", "no such path here, and the hub has none"),
        ("org/nothing:Q4_0", "HF_TOKEN"),
        ("org/private", "HF_TOKEN"),
        ("org/single@v9", "no revision 'v9'"),
        ("org/single:b.gguf", "no GGUF file 'b.gguf'; it has: a-Q4_0.gguf"),
        ("org/several", "several GGUF files"),
        ("org/pickle", "neither safetensors nor GGUF"),
    ],
)
def test_what_the_hub_has_not(client: HubClient, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        resolve_model(name, tmp_path, hub=client)
    assert "\n" not in str(caught.value)


def test_the_token_opens_a_private_repository(hub: Loopback, tmp_path: Path) -> None:
    client = HubClient(hub.url, tmp_path / "hub", token="hf_secret")
    assert resolve_model("org/private", tmp_path, hub=client).read_bytes() == b"GGUF private"


def test_the_token_is_not_sent_to_another_host(tmp_path: Path) -> None:
    with serving(lambda asked: file_answer(asked, b"GGUF private")) as storage:
        with serving(Hub(REPOSITORIES, private={"org/private": "hf_secret"}, stored_elsewhere=storage.url)) as hub:
            client = HubClient(hub.url, tmp_path / "hub", token="hf_secret")
            assert resolve_model("org/private", tmp_path, hub=client).read_bytes() == b"GGUF private"
        assert [request.method for request in storage.asked] == ["GET"]
        assert "authorization" not in storage.asked[0].headers
        assert any("authorization" in request.headers for request in hub.asked)


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (500, {}, "HTTP status 500.*try again later"),
        (503, {}, "HTTP status 503"),
        (429, {}, "HTTP status 429"),
        (403, {}, "HTTP status 403.*HF_TOKEN"),
        (403, {"X-Error-Code": "GatedRepo"}, "owner's consent"),
        (200, {}, "failed"),  # not the document that was expected
    ],
)
def test_a_hub_that_fails(
    hub: Loopback, client: HubClient, tmp_path: Path, status: int, headers: dict[str, str], message: str
) -> None:
    hub.answer = lambda asked: Answer(status, b"[[", headers)
    with pytest.raises(ModelDownloadError, match=message) as caught:
        resolve_model("org/single", tmp_path, hub=client)
    assert "\n" not in str(caught.value)


def test_a_file_shorter_than_announced_is_not_kept(hub: Loopback, tmp_path: Path) -> None:
    honest = Hub(REPOSITORIES)

    def lying(asked: Asked) -> Answer:
        answer = honest(asked)
        if asked.method == "GET" and "/resolve/" in asked.path:
            return replace(answer, body=answer.body[:4])
        return answer

    hub.answer = lying
    client = HubClient(hub.url, tmp_path / "hub")
    with pytest.raises(ModelDownloadError):
        resolve_model("org/single", tmp_path, hub=client)
    assert find_model("org/single", tmp_path, hub=client) is None


def test_a_full_disk(client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ModelDownloadError, match="No space left on device; set HF_HOME"):
        resolve_model("org/single", tmp_path, hub=client)


def test_list_and_remove(client: HubClient, tmp_path: Path) -> None:
    assert list_models(tmp_path, hub=client) == []
    resolve_model("org/single", tmp_path, hub=client)
    resolve_model("org/directory", tmp_path, hub=client)
    assert [(model.name, model.source) for model in list_models(tmp_path, hub=client)] == [
        ("org/directory", "hub"),
        ("org/single", "hub"),
    ]
    assert remove_model("org/directory", tmp_path, hub=client) >= len(DIRECTORY["model.safetensors"])
    assert [model.name for model in list_models(tmp_path, hub=client)] == ["org/single"]
    with pytest.raises(ModelNotFoundError, match="not on this machine"):
        remove_model("org/directory", tmp_path, hub=client)


def test_a_broken_cache_lists_what_is_whole_and_can_be_removed(client: HubClient, tmp_path: Path) -> None:
    resolve_model("org/single", tmp_path, hub=client)
    cache = tmp_path / "hub"
    (cache / "models--org--no-snapshots").mkdir()
    (cache / "models--org--file").write_text("a file")
    (cache / "nonsense").mkdir()
    path = resolve_model("org/several:Q4_0", tmp_path, hub=client)
    path.resolve().unlink()  # a dangling link stays
    assert [model.name for model in list_models(tmp_path, hub=client)] == ["org/single"]
    assert remove_model("org/no-snapshots", tmp_path, hub=client) == 0
    remove_model("org/several", tmp_path, hub=client)
    assert not (cache / "models--org--several").exists()
    shutil.rmtree(cache)
    cache.write_text("not a directory")
    assert list_models(tmp_path, hub=client) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/single:a-Q4_0.gguf", "give org/single"),
        ("org/single@main", "give org/single"),
        ("smollm2-135m", "not on this machine"),
        ("../escape", "no model"),
    ],
)
def test_what_cannot_be_removed(client: HubClient, tmp_path: Path, name: str, message: str) -> None:
    resolve_model("org/single", tmp_path, hub=client)
    with pytest.raises(ModelNotFoundError, match=message):
        remove_model(name, tmp_path, hub=client)
    assert find_model("org/single", tmp_path, hub=client) is not None


def test_a_path_of_the_user_is_used_and_never_removed(client: HubClient, tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(file), tmp_path, hub=client) == file
    assert resolve_model(str(tmp_path), tmp_path, hub=client) == tmp_path
    for path in (file, tmp_path):
        with pytest.raises(ModelNotFoundError, match="file of yours"):
            remove_model(str(path), tmp_path, hub=client)
    assert file.exists()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelNotFoundError, match=r"not a \.gguf file"):
        resolve_model(str(tmp_path / "notes.txt"), tmp_path, hub=client)


PINNED = Alias(
    "pinned", "a-Q4_0.gguf", "a" * 64, 11, "Apache-2.0", wheels=(), repository="org/single"
)  # its digest is set in the tests


def test_an_alias_takes_the_hubs_copy_only_with_the_pinned_digest(
    client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = replace(PINNED, sha256=sha256(b"GGUF single").hexdigest())
    models = tmp_path / "models"
    monkeypatch.setitem(hub_module.ALIASES, "pinned", right)
    path = resolve_model("pinned", models, hub=client)
    assert path.read_bytes() == b"GGUF single"
    assert resolve_model("pinned", models, hub=offline(tmp_path)) == path  # also without a network
    assert find_model("pinned", models, hub=offline(tmp_path)) == path

    monkeypatch.setitem(hub_module.ALIASES, "pinned", PINNED)
    assert find_model("pinned", models, hub=client) is None
    with pytest.raises(ModelDownloadError):  # there are no wheels to take it from
        resolve_model("pinned", models, hub=client)

    monkeypatch.setitem(hub_module.ALIASES, "pinned", right)
    assert remove_model("pinned", models, hub=client) >= len(b"GGUF single")
    with pytest.raises(ModelNotFoundError):
        remove_model("pinned", models, hub=client)


def test_a_failing_removal_is_one_line(client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_model("org/single", tmp_path, hub=client)

    def refuse(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(ModelError, match="cannot remove 'org/single': Permission denied"):
        remove_model("org/single", tmp_path, hub=client)
