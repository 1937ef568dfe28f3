"""`setpoint models` and the environment of the hub, against a hub on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Hub, Loopback, serving

from setpoint.cli.main import main
from setpoint.loaders.hub_client import HubClient

Capture = pytest.CaptureFixture[str]
SOURCE = Path(__file__).parents[2] / "src"
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


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with our environment less what the hub's library reads."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", f"from setpoint.cli.main import main\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        env=kept | {"PYTHONPATH": str(SOURCE)} | environment,
    )


def test_the_hubs_environment_variables_are_honoured(hub: Loopback, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN; then HF_HUB_OFFLINE with nobody there."""
    home = {"HF_HOME": str(tmp_path / "home"), "SETPOINT_CACHE_DIR": str(tmp_path)}
    done = run("print(main(['models', 'pull', 'org/model']))", HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret", **home)
    path, code = done.stdout.split()
    assert code == "0"
    assert path.startswith(str(tmp_path / "home"))

    hub.asked.clear()
    done = run(
        "print(main(['models', 'pull', 'org/model'])); print(main(['models', 'pull', 'org/other']))",
        HF_ENDPOINT=hub.url,
        HF_HUB_OFFLINE="1",
        **home,
    )
    assert done.stdout.split() == [path, "0", "3"]
    assert "org/other is not in the local cache; HF_HUB_OFFLINE is set" in done.stderr
    assert hub.asked == []
