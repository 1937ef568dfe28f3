"""The commands as processes with a tiny model: what is on stdout and stderr, exit codes, pipes and Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loopback import Hub, serving
from tiny_models import TINY_MODELS, write_directory, write_gguf

SETPOINT = [sys.executable, "-m", "setpoint.cli.main"]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(TINY_MODELS["llama"], tmp_path_factory.mktemp("cli") / "llama.gguf")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(TINY_MODELS["gemma3"], tmp_path_factory.mktemp("cli") / "gemma3")


def setpoint(*arguments: object, stdin: str | bytes = b"", code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run to the end; `code` is the exit code that is expected."""
    given = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run([*SETPOINT, *map(str, arguments)], input=given, capture_output=True, timeout=120)
    result = subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result


def error_of(*arguments: object, stdin: str | bytes = b"", code: int) -> str:
    """The one line that a failing command ends with."""
    done = setpoint(*arguments, stdin=stdin, code=code)
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("setpoint: ")
    return last


def test_generate_prints_the_text_and_tells_the_rest(gguf: Path) -> None:
    text = setpoint("generate", gguf, "hello", "--max-tokens", 12)
    assert text.stdout.endswith("\n")
    assert "tok/s, finish reason: length" in text.stderr
    assert len(text.stderr.splitlines()) == 1

    done = setpoint("generate", gguf, "--max-tokens", 12, "--json", stdin="hello\n")
    document = json.loads(done.stdout)
    assert done.stderr == ""
    assert document["text"] == text.stdout.removesuffix("\n")  # stdin and argument are the same prompt
    assert (document["finish_reason"], len(document["token_ids"])) == ("length", 12)
    assert document["metrics"]["time_to_first_token_s"] > 0


def test_generate_ends_the_text_before_the_statistics_in_one_pipe(gguf: Path) -> None:
    arguments = [*SETPOINT, "generate", str(gguf), "hello", "--max-tokens", "6"]
    both = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, text=True).stdout
    text = setpoint(*arguments[len(SETPOINT) :]).stdout
    assert both.startswith(text)
    assert "tok/s" in both[len(text) :]


def test_generate_of_a_chat_message_stops_and_repeats(directory: Path) -> None:
    arguments = ("generate", directory, "hello", "--chat", "--json", "--temperature", 1.2, "--seed", 5)
    first, again = (json.loads(setpoint(*arguments).stdout) for _ in range(2))
    assert first["token_ids"] == again["token_ids"]
    assert first["prompt_tokens"] > 5
    stop = first["text"][3]
    stopped = json.loads(setpoint(*arguments, "--stop", stop).stdout)
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    assert stopped["text"] == first["text"].partition(stop)[0]


def test_chat_answers_each_line_of_stdin(gguf: Path) -> None:
    flags = ("--max-tokens", 4, "--temperature", 0)
    done = setpoint("chat", gguf, *flags, stdin="hello\n/reset\nhello\n\n/nonsense\nan\n")
    assert "forgotten" in done.stderr
    assert "no command /nonsense" in done.stderr
    first = setpoint("chat", gguf, *flags, stdin="hello\n/exit\nnever read\n").stdout
    assert done.stdout.startswith(first * 2)  # forgotten: the same answer
    assert len(done.stdout) > len(first) * 2


def test_bench_engine_prints_a_table_and_ends_with_json(gguf: Path) -> None:
    shape = ("--prompt-tokens", 24, "--output-tokens", 4, "--batch", "1,3", "--repeat", 2)
    done = setpoint("bench", "engine", gguf, *shape)
    lines = done.stdout.splitlines()
    assert len(lines) == 4  # head, a row for each batch, the document
    document = json.loads(lines[-1])
    assert document["model"] == str(gguf)
    assert document["machine"]["threads"] >= 1
    assert [row["batch"] for row in document["rows"]] == [1, 3]
    expected = {"batch", "prompt_tokens", "output_tokens", "prefill_tok_s", "decode_tok_s", "ttft_ms", "tpot_ms"}
    for row in document["rows"]:
        assert set(row) == expected | {"weight_gb_s"}
        assert all(value > 0 for name, value in row.items() if name != "weight_gb_s")
    only = setpoint("bench", "engine", gguf, *shape, "--json").stdout.splitlines()
    assert len(only) == 1
    assert len(json.loads(only[0])["rows"]) == 2


def test_inspect_model_and_machine(gguf: Path, directory: Path) -> None:
    document = json.loads(setpoint("inspect", "model", directory, "--json").stdout)
    assert (document["family"], document["context"], document["vocabulary"]) == ("gemma3_text", 2048, 288)
    assert document["weights"]["F32"]["bytes"] == 4 * document["parameters"]
    assert document["chat_template"] is True
    shown = setpoint("inspect", "model", gguf).stdout
    assert "Repeat model.layers" in shown
    assert "0..1:" in shown  # equal layers are shown once
    machine = json.loads(setpoint("inspect", "machine", "--json").stdout)
    assert machine["kernels"][0] == "ref"
    assert machine["cpus"] >= 1
    assert setpoint("inspect", "machine").stdout


@pytest.mark.parametrize("command", [("generate",), ("chat",), ("inspect", "model"), ("bench", "engine")], ids=" ".join)
def test_a_model_that_cannot_be_opened_is_one_line(command: tuple[str, ...], gguf: Path, tmp_path: Path) -> None:
    text = ("hello",) if command == ("generate",) else ()
    assert "no model" in error_of(*command, tmp_path / "missing.gguf", *text, code=3)
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(gguf.read_bytes()[:2000])
    assert "truncated.gguf" in error_of(*command, truncated, *text, code=3)


@pytest.mark.parametrize(
    ("name", "content"),
    [("zeros.gguf", bytes(64)), ("empty.gguf", b""), ("text.gguf", b"hello"), ("model.bin", b"\x80\x02}q\x00.")],
)
def test_a_file_that_is_no_model(name: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    assert name in error_of("generate", file, "hello", code=3)


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in error_of("generate", tmp_path, "hello", code=3)
    write_directory(TINY_MODELS["llama"], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY_MODELS["llama"].config | {"model_type": "mamba"}))
    assert "mamba" in error_of("generate", tmp_path, "hello", code=3)


def test_what_does_not_fit_the_context_is_one_line(gguf: Path) -> None:
    assert "2048 tokens" in error_of("generate", gguf, stdin="x" * 5000, code=2)
    assert "context" in error_of("generate", gguf, "hello", "--max-model-len", 4096, code=2)
    assert "context" in error_of("bench", "engine", gguf, "--prompt-tokens", 4096, code=2)


def test_a_reader_that_leaves_is_no_error(gguf: Path) -> None:
    command = " ".join([*SETPOINT, "generate", str(gguf), "hello", "--max-tokens", "1500"])
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | head -c 4"], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0
    assert len(done.stdout) == 4
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


def start(*arguments: object, **more: Any) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*SETPOINT, *map(str, arguments)], stdin=pipe, stdout=pipe, stderr=pipe, **more)


@pytest.mark.parametrize(
    "arguments",
    [("generate", "hello", "--max-tokens", 1900), ("bench", "engine", "--output-tokens", 1500, "--repeat", 50)],
    ids=["generate", "bench"],
)
def test_ctrl_c_is_130_without_a_traceback(arguments: tuple[object, ...], gguf: Path) -> None:
    verb = 2 if arguments[0] == "bench" else 1
    process = start(*arguments[:verb], gguf, *arguments[verb:])
    stream = process.stdout if arguments[0] == "generate" else process.stderr
    assert stream is not None
    os.read(stream.fileno(), 1)  # it has begun
    if arguments[0] == "bench":
        time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_ctrl_c_while_chat_waits_for_a_line(gguf: Path) -> None:
    process = start("chat", gguf)
    assert process.stderr is not None
    while b"/exit" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_a_narrow_locale_does_not_break_the_output(gguf: Path) -> None:
    narrow = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    process = start("generate", gguf, "hello", "--max-tokens", 12, env=narrow)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert out.isascii()


def test_the_hubs_environment_variables_are_honoured(tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN; then HF_HUB_OFFLINE."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {"HF_HOME": str(tmp_path / "home"), "SETPOINT_CACHE_DIR": str(tmp_path)}

    def pull(name: str, **environment: str) -> tuple[int, str, str]:
        process = start("models", "pull", name, env=clean | environment)
        out, errors = process.communicate(timeout=60)
        assert b"Traceback" not in errors
        return process.returncode, out.decode().strip(), errors.decode()

    repositories = {"org/model": {"a-Q4_0.gguf": b"GGUF content"}}
    with serving(Hub(repositories, private={"org/model": "hf_secret"})) as hub:
        assert pull("org/model", HF_ENDPOINT=hub.url)[0] == 3  # without the token
        code, path, _ = pull("org/model", HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret")
        assert code == 0
        assert path.startswith(str(tmp_path / "home"))
        assert Path(path).read_bytes() == b"GGUF content"
        hub.asked.clear()
        offline = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
        assert pull("org/model", **offline)[:2] == (0, path)
        code, _, errors = pull("org/other", **offline)
        assert code == 3
        assert "org/other is not in the local cache; HF_HUB_OFFLINE is set" in errors
        assert hub.asked == []


def test_ctrl_c_on_a_terminal_stops_the_answer_and_not_the_chat(gguf: Path) -> None:
    master, slave = pty.openpty()
    command = [*SETPOINT, "chat", str(gguf), "--max-tokens", "1900", "--temperature", "0"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    seen = ""

    def read_until(text: str) -> str:
        """What is shown up to `text` and after what was read before."""
        nonlocal seen
        while text not in seen:
            seen += os.read(master, 4096).decode(errors="replace")
        before, _, seen = seen.partition(text)
        return before

    try:
        read_until("> ")
        os.write(master, b"hello\n")
        read_until("hello\r\n")
        os.read(master, 1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        answer = read_until("[stopped]")
        assert "\x1b" not in answer  # a random model says anything; the terminal sees pictures of it
        read_until("> ")
        os.write(master, b"/exit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(master)
