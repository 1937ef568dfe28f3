"""`setpoint models` against a hub on the loopback interface."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopback import Hub, Loopback, serving
from setpoint.cli.main import main
from setpoint.loaders.hub_client import HubClient

Capture = pytest.CaptureFixture[str]
REPOSITORIES = {"org/model": {"a-Q4_0.gguf": b"GGUF content"}}


@pytest.fixture
def hub() -> Iterator[Loopback]:
    with serving(Hub(REPOSITORIES, private={"org/model": "hf_secret"})) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path, hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the user's own caches is seen or touched."""
    monkeypatch.setenv("SETPOINT_CACHE_DIR", str(tmp_path / "setpoint"))
    client = HubClient(hub.url, tmp_path / "hub", "hf_secret")
    monkeypatch.setattr("setpoint.loaders.hub.HubClient", lambda: client)
    return tmp_path


def test_list_pull_path_rm(cache: Path, capsys: Capture) -> None:
    assert main(["models", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["source"] for row in rows} == {"smollm2-135m": "not pulled", "gemma3-270m": "not pulled"}

    assert main(["models", "path", "org/model"]) == 3
    assert "setpoint models pull" in capsys.readouterr().err
    assert main(["models", "pull", "org/model"]) == 0
    out, err = capsys.readouterr()
    path = Path(out.rstrip("\n"))
    assert path.read_bytes() == b"GGUF content"
    assert "downloading org/model" in err
    assert main(["models", "path", "org/model"]) == 0
    assert capsys.readouterr().out == f"{path}\n"

    assert main(["models", "list"]) == 0
    assert any(line.startswith("org/model ") for line in capsys.readouterr().out.splitlines())
    assert main(["models", "rm", "org/model"]) == 0
    assert "freed" in capsys.readouterr().out
    assert not path.exists()
    assert main(["models", "rm", "org/model"]) == 3


def test_paths_are_the_users_own(cache: Path, capsys: Capture) -> None:
    mine = cache / "mine.gguf"
    mine.write_bytes(b"GGUF")
    assert main(["models", "path", str(mine)]) == 0
    assert capsys.readouterr().out == f"{mine}\n"
    for name in (str(mine), str(cache), "..", "/"):
        assert main(["models", "rm", name]) == 3
        assert "file of yours" in capsys.readouterr().err
    assert mine.exists()


def test_a_broken_cache_does_not_break_the_list(cache: Path, capsys: Capture) -> None:
    (cache / "hub").write_text("not a directory")
    (cache / "setpoint").write_text("not a directory either")
    assert main(["models", "list"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out
    assert main(["models", "pull", "smollm2-135m"]) == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("setpoint: cannot store")


def test_cache_shows_and_clears(cache: Path, capsys: Capture) -> None:
    assert main(["models", "cache"]) == 0
    assert capsys.readouterr().out.split() == ["0.0", "MB", "in", "0", "files"]
    directory = cache / "setpoint" / "packed"
    directory.mkdir(parents=True)
    kept = directory / "model-0123.packed"
    kept.write_bytes(bytes(2_000_000))
    (directory / "model-4567.packed.89.writing").write_bytes(b"half")
    (directory / "notes.txt").write_bytes(b"somebody's")
    assert main(["models", "cache", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["path"], row["bytes"]) == (str(kept), 2_000_000)
    assert main(["models", "cache"]) == 0
    assert "2.0 MB" in capsys.readouterr().out
    assert main(["models", "cache", "--clear"]) == 0
    assert capsys.readouterr().out == "freed 2.0 MB\n"
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]
