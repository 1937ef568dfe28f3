"""The reference pages say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_those_of_this_code(generate: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, f"{capsys.readouterr().out}: run `make docs`"


def test_a_stale_page_is_noticed_and_written_anew(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "REFERENCE", tmp_path / "reference")
    monkeypatch.setattr(generate, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text((DOCS.parent / "README.md").read_text())
    assert generate.main(["--check"]) == 1
    assert not (tmp_path / "reference").exists()
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    for page in (tmp_path / "reference").iterdir():
        assert page.read_text() == (DOCS / "reference" / page.name).read_text()
    knobs = tmp_path / "reference" / "knobs.md"
    knobs.write_text(knobs.read_text().replace("64", "65"))
    assert generate.main(["--check"]) == 1
