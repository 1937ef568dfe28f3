"""Names of models: what is understood, and what is refused before anything is looked up."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint.errors import ModelNotFoundError
from setpoint.loaders.download import Progress, silent
from setpoint.loaders.hub import find_model, resolve_model
from setpoint.loaders.hub_client import HubClient, choose_files
from setpoint.loaders.names import HubName, parse_hub_name

REFUSED = [
    "",
    "org",
    "org/../x",
    "../org/x",
    "/etc/nothing-here",
    "org/name\0",
    "\0",
    "$(id)",
    "org/$(id)",
    "`id`/x",
    "org/%2e%2e",
    "%2e%2e/x",
    "org/name:../../secret.gguf",
    "org/name:/etc/passwd",
    "org/name:%2e%2e/x.gguf",
    "org/name:$(id)",
    "org/name:a//b.gguf",
    "org/name:.hidden.gguf",
    "org/name:",
    "org/name@",
    "org/name@../main",
    "org/name@refs//x",
    "org/name@-x",
    "org/name\n",
    "org/na--me",
    "org/na..me",
    "org/name.git",
    "org/name-",
    "-org/name",
    "a/b/c",
    "org/größe",
    "directory/missing.gguf",
    "https://example.org/model",
    "~nobody-of-that-name/x",
    "x" * 5000,
    "org/" + "x" * 97,
]


class Unreachable(HubClient):
    """Fails the test when it is asked anything."""

    def pull(self, asked: HubName, progress: Progress = silent) -> Path:
        raise AssertionError(f"asked for {asked}")

    def find(self, asked: HubName) -> Path:
        return self.pull(asked)


@pytest.mark.parametrize("name", REFUSED, ids=lambda name: ascii(name[:24]))
def test_a_name_that_is_none_is_refused_without_asking_anybody(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no model") as caught:
        resolve_model(name, tmp_path, hub=Unreachable())
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert find_model(name, tmp_path, hub=Unreachable()) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubName("org/name")),
        ("org/name:Q4_K_M", HubName("org/name", "Q4_K_M")),
        ("org/name:a file.gguf", HubName("org/name", "a file.gguf")),
        ("org/name:sub/a.gguf@v1.0", HubName("org/name", "sub/a.gguf", "v1.0")),
        ("org/name@refs/pr/1", HubName("org/name", None, "refs/pr/1")),
        ("0rg.a/na_me-1.5B", HubName("0rg.a/na_me-1.5B")),
    ],
)
def test_parts_of_a_hub_name(text: str, expected: HubName) -> None:
    assert parse_hub_name(text) == expected
    assert str(expected) == text


@given(st.text(alphabet="aA0./\\:@-_%$ \0\n~", max_size=24))
def test_no_part_of_an_accepted_name_leads_out_of_a_directory(text: str) -> None:
    name = parse_hub_name(text)
    if name is not None:
        for part in (name.repository, name.file or "", name.revision or ""):
            assert ".." not in part
            assert not part.startswith("/")
            assert not set(part) & set("\\\0\n%$~")
        assert name.repository.count("/") == 1


def chosen(name: str, *files: str) -> list[str]:
    asked = parse_hub_name(name)
    assert asked is not None
    return choose_files(asked, files)


def test_a_directory_is_its_weights_and_settings() -> None:
    files = chosen(
        "org/name",
        "README.md",
        "config.json",
        "consolidated.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modeling_custom.py",
        "onnx/model.safetensors",
        "pytorch_model.bin",
        "chat_template.jinja",
        "tokenizer.json",
    )
    assert set(files) == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "chat_template.jinja",
        "tokenizer.json",
    }


def test_a_gguf_is_found_by_name_and_by_quantization() -> None:
    files = ("a-Q4_K_M.gguf", "a-Q4_K_S.gguf", "a-bf16.gguf", "a-f16.gguf", "mmproj-a-f16.gguf", "config.json")
    assert chosen("org/name:a-Q4_K_S.gguf", *files) == ["a-Q4_K_S.gguf"]
    assert chosen("org/name:q4_k_m", *files) == ["a-Q4_K_M.gguf"]
    assert chosen("org/name:F16", *files) == ["a-f16.gguf"]
    assert chosen("org/name", "only.gguf", "mmproj-only.gguf", "README.md") == ["only.gguf"]


def test_a_split_gguf_is_all_its_parts() -> None:
    parts = [f"Q8/a-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    files = ("b.gguf", *reversed(parts))
    assert chosen("org/name:Q8", *files) == parts
    assert chosen(f"org/name:{parts[1]}", *files) == parts
    assert chosen("org/name", *parts) == parts


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("org/name", ("a-Q4_0.gguf", "a-Q8_0.gguf"), "several GGUF files.*a-Q4_0.gguf, a-Q8_0.gguf"),
        ("org/name:Q4_K", ("a-Q4_K_M.gguf", "a-Q4_K_S.gguf"), "several"),
        ("org/name:Q6_K", ("a-Q4_0.gguf",), "no GGUF file 'Q6_K'.*a-Q4_0.gguf"),
        ("org/name:pytorch_model.bin", ("pytorch_model.bin",), "no GGUF file"),
        ("org/name", ("pytorch_model.bin", "config.json"), "neither safetensors nor GGUF.*pytorch_model.bin"),
        ("org/name", (), "neither"),
        ("org/name", ("../../x.gguf", "/etc/y.gguf"), "neither"),
    ],
)
def test_what_cannot_be_chosen_is_listed(name: str, files: tuple[str, ...], message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        chosen(name, *files)
