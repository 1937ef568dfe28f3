"""Fixtures that several suites share: tiny models of every family on disk, and the two real ones."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tiny_models import TINY_MODELS, TinyModel, write_directory, write_gguf

UNPICKLED: list[str] = []
SOURCE = str(Path(__file__).parents[1] / "src" / "setpoint")


def _watch_for_pickle(event: str, arguments: tuple[object, ...]) -> None:
    """Remember every class that was unpickled on behalf of our code."""
    if event != "pickle.find_class":
        return
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCE):
            UNPICKLED.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {arguments}")
            return
        frame = frame.f_back  # type: ignore[assignment]


sys.addaudithook(_watch_for_pickle)

# A shell starts background jobs with SIGINT ignored, and children inherit that: the tests of Ctrl-C need the default.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Zero pickle, seen at run time over the whole suite."""
    if UNPICKLED:
        print("setpoint unpickled:", *UNPICKLED, sep="\n  ", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def models_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session", params=sorted(TINY_MODELS))
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return TINY_MODELS[request.param]


@pytest.fixture(scope="session")
def tiny_directory(tiny: TinyModel, models_root: Path) -> Path:
    """The tiny model as a Hugging Face directory."""
    return write_directory(tiny, models_root / tiny.name)


@pytest.fixture(scope="session")
def tiny_gguf(tiny: TinyModel, models_root: Path) -> Path:
    """The tiny model as GGUF in F32."""
    return write_gguf(tiny, models_root / f"{tiny.name}.gguf")


@pytest.fixture(scope="session")
def tiny_q8(tiny: TinyModel, models_root: Path) -> Path:
    """The tiny model as GGUF, quantized where its rows allow it: the fast path."""
    return write_gguf(tiny, models_root / f"{tiny.name}-q8.gguf", format="Q8_0")


def _real_model(alias: str) -> Path:
    from setpoint.assemble import models_directory
    from setpoint.loaders.hub import resolve_model

    return resolve_model(alias, models_directory())


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1, downloaded once into the user's cache (98 MB)."""
    return _real_model("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma-3-270M Q4_K_M, downloaded once into the user's cache (253 MB)."""
    return _real_model("gemma3-270m")
