"""The command line without a model: help, flags, exit codes, and one line for every error."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import typer

from setpoint.cli import main as main_module
from setpoint.cli.console import DownloadBar, command_app, printable
from setpoint.cli.knobs import knob_fields, option
from setpoint.cli.main import COMMANDS, main
from setpoint.config import EngineConfig, ServerConfig, knob_of
from setpoint.errors import (
    ConfigError,
    EngineDeadError,
    ModelDownloadError,
    ModelNotFoundError,
    RequestError,
    SetpointError,
)

Capture = pytest.CaptureFixture[str]
PAGES = [
    ("serve",),
    ("chat",),
    ("generate",),
    ("bench", "engine"),
    ("probe",),
    ("inspect", "model"),
    ("inspect", "machine"),
    ("inspect", "knobs"),
    *(("models", verb) for verb in ("list", "pull", "path", "rm")),
]


def page(*command: str, capsys: Capture) -> str:
    """A help page with its line breaks taken out."""
    assert main([*command, "--help"]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_first_page_names_every_command_and_exit_code(capsys: Capture) -> None:
    for arguments in (["--help"], ["-h"], ["help"]):
        assert main(arguments) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert all(f"  {name}" in out for name in COMMANDS)
        assert all(f"{code} " in out for code in (0, 1, 2, 3, 4, 70, 130))
    assert main([]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize("command", PAGES, ids=" ".join)
def test_every_command_explains_itself(command: tuple[str, ...], capsys: Capture) -> None:
    text = page(*command, capsys=capsys)
    assert text.startswith(f"Usage: setpoint {' '.join(command)} [OPTIONS]")
    assert main(["help", *command]) == 0
    assert " ".join(capsys.readouterr().out.split()) == text


@pytest.mark.parametrize("command", [("serve",), ("chat",), ("generate",), ("bench", "engine")], ids=" ".join)
def test_every_knob_is_a_flag_with_its_help_and_bounds(command: tuple[str, ...], capsys: Capture) -> None:
    text = page(*command, capsys=capsys).replace("- ", "-")  # words are broken at hyphens
    classes = (EngineConfig, ServerConfig) if command == ("serve",) else (EngineConfig,)
    for config_class in classes:
        for declared in knob_fields(config_class):
            knob = knob_of(declared)
            assert f"--{declared.name.replace('_', '-')} " in text
            assert knob.help.replace("- ", "-") in text
            if knob.low is not None:
                assert f"[{knob.low}..{knob.high}" in text
            assert ", ".join(knob.choices) in text


def test_options_have_the_types_of_their_knobs() -> None:
    made = {declared.name: option(declared, EngineConfig) for declared in knob_fields(EngineConfig)}
    assert made["max_num_seqs"].annotation.__origin__ is int
    assert made["enable_prefix_caching"].annotation.__origin__ is bool
    assert made["isa"].annotation.__origin__ is str
    assert made["max_model_len"].default is None
    served = {declared.name: option(declared, ServerConfig) for declared in knob_fields(ServerConfig)}
    assert served["api_key"].annotation.__origin__ == list[str]
    assert served["shutdown_timeout"].annotation.__origin__ is float


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generte"], "no command 'generte'; did you mean 'generate'?"),
        (["\x1b]0;title"], r"no command '\x1b]0;title'; see `setpoint --help`"),
        (["generate", "m", "x", "--max-tokns", "3"], "--max-tokns; did you mean --max-tokens?"),
        (["bench", "engine", "m", "--bach", "3"], "--bach; did you mean --batch?"),
        (["models", "lst"], "'lst'"),
        (["generate"], "see `setpoint generate --help`"),
        (["models"], "see `setpoint models --help`"),
        (["generate", "m", "x", "--num-threads", "many"], "'--num-threads'"),
        (["generate", "m", "x", "--num-threads", "0"], "--num-threads is 0; it must be at least 1"),
        (["generate", "m", "x", "--isa", "sse9"], "--isa is 'sse9'; choose one of auto, ref"),
        (["generate", "m", "x", "--temperature", "9"], "temperature must be in [0, 2]"),
        (["generate", "m", "x", "--temperature", "nan"], "temperature must be in [0, 2]"),
        (["generate", "m", "x", "--max-tokens", "0"], "max_tokens"),
        (["generate", "m", "x", "--stop", ""], "stop"),
        (["generate", "m", ""], "the prompt is empty; give TEXT or pipe it in"),
        (["generate", "m", "caf\udce9"], "not valid UTF-8"),
        (["generate", "", "x"], "the model name is empty"),
        (["bench", "engine", "m", "--batch", "1,many"], "--batch"),
        (["bench", "engine", "m", "--batch", "0"], "--batch"),
        (["bench", "engine", "m", "--output-tokens", "1"], "--output-tokens"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("setpoint: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--trust-remote-code", "--trust-remote-code=true"])
@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
def test_remote_code_is_refused_in_so_many_words(command: str, flag: str, capsys: Capture) -> None:
    assert main([command, "m", flag]) == 2
    assert "Setpoint never runs code from a model directory" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_a_model_that_is_nowhere_is_exit_code_3(command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", stdin(b"hello"))
    port = ["--port", "0"] if command == "serve" else []
    assert main([command, "no-such-model.gguf", *port]) == 3
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("setpoint: no model 'no-such-model.gguf': give a .gguf file")


def failing(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def run_failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    module = ModuleType("a_command")
    app = command_app("Fails.")
    app.command()(failing(error))
    module.app = app  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_command", module)
    monkeypatch.setitem(main_module.COMMANDS, "fail", ("a_command", "Fails."))
    return main(["fail"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a flag"), 2),
        (RequestError("a field", param="n"), 2),
        (ModelNotFoundError("nowhere"), 3),
        (ModelDownloadError("no network"), 3),
        (EngineDeadError("dead"), 70),
        (SetpointError("two\nlines"), 70),
        (RuntimeError("a bug"), 70),
        (MemoryError(), 70),
        (OSError(errno.ENOSPC, "No space left on device"), 70),
        (typer.Exit(4), 4),
        (typer.Exit(0), 0),
        (SystemExit(1), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_error_has_its_exit_code_and_no_traceback(
    error: BaseException, code: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_failing(error, monkeypatch) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.count("\n") <= 1
    if isinstance(error, RuntimeError) and not isinstance(error, typer.Exit):
        assert "internal error: RuntimeError: a bug; SETPOINT_LOG_LEVEL=debug shows where" in err


def test_a_bug_shows_where_it_is_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETPOINT_LOG_LEVEL", "debug")
    with pytest.raises(RuntimeError, match="a bug"):
        run_failing(RuntimeError("a bug"), monkeypatch)


def stdin(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the prompt is empty"), (b"\n", "the prompt is empty"), (b"\xff\xfe", "not valid UTF-8")],
)
def test_a_prompt_from_stdin_is_checked(
    content: bytes, message: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin(content))
    assert main(["generate", "model.gguf"]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_from_stdin_loses_its_last_newline_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from setpoint.cli.generate import _read_stdin

    for content, prompt in ((b"a\n b\n", "a\n b"), (b"a\n\n", "a\n"), (b"a\r\n", "a"), ("größe".encode(), "größe")):
        monkeypatch.setattr(sys, "stdin", stdin(content))
        assert _read_stdin() == prompt


def test_inspect_knobs_lists_every_knob(capsys: Capture) -> None:
    assert main(["inspect", "knobs", "--json"]) == 0
    rows = {row["flag"]: row for row in json.loads(capsys.readouterr().out)}
    names = [declared.name for made in (EngineConfig, ServerConfig) for declared in knob_fields(made)]
    assert list(rows) == ["--" + name.replace("_", "-") for name in names]
    assert len(rows) <= 30  # the budget of the design
    assert rows["--max-num-seqs"]["low"] == 1
    assert rows["--isa"]["choices"][0] == "auto"
    assert all(row["help"] for row in rows.values())
    assert main(["inspect", "knobs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows)


def test_a_terminal_cannot_be_steered_by_what_is_printed() -> None:
    assert printable("a\x1b[31mb\x07\r\x9b\x7f\n\tc ü 世") == "a␛[31mb␇␍\ufffd␡\n\tc ü 世"


def test_a_download_is_told_in_tenths_when_nobody_watches(capsys: Capture) -> None:
    with DownloadBar() as bar:
        for done in range(0, 101_000_000, 1_000_000):
            bar("model.gguf", done, 100_000_000)
        bar("empty", 0, 0)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "downloading model.gguf: 0 of 100 MB"
    assert lines[10] == "downloading model.gguf: 100 of 100 MB"
    assert len(lines) == 12
