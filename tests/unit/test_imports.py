"""The import law: who may know whom. Read from the syntax trees, so that lazy imports count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "setpoint"
EVERYTHING = {"config", "engine", "errors", "grammar", "loaders", "models", "quant", "runtime", "text"}
ALLOWED = {  # package -> the packages of ours it may import, besides itself
    "__init__": {"llm", "engine", "config", "errors"},
    "errors": set(),
    "config": {"errors"},
    "engine": {"config", "errors"},
    "models": {"errors"},
    "quant": set(),
    "text": {"errors", "_native"},
    "grammar": {"engine", "text", "errors"},
    "loaders": {"errors", "quant", "text", "_native"},
    "runtime": {"models", "loaders", "quant", "engine", "errors", "_native"},
    "assemble": EVERYTHING | {"_native", "__init__"},
    "llm": {"assemble", "config", "engine", "errors", "loaders", "text"},
    "server": {"engine", "text", "grammar", "config", "errors"},
    "workload": {"errors"},
    "tune": {"engine", "runtime", "workload", "config", "errors", "_native"},
    "cli": EVERYTHING | {"assemble", "server", "tune", "workload", "llm", "_native", "__init__"},
}
STANDARD_OR_NUMPY = set(sys.stdlib_module_names) | {"numpy", "__future__"}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch", "transformers", "ray"}


def python_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


@cache
def syntax(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> set[str]:
    """Full dotted names of everything a file imports, wherever the import stands."""
    names: set[str] = set()
    for node in syntax(path):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_import_law(path: Path) -> None:
    package = package_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "setpoint":
            target = parts[1] if len(parts) > 1 else "__init__"
            known = target in ALLOWED or target == "_native"
            target = target if known else "__init__"  # `from setpoint import __version__`
            assert target == package or target in ALLOWED[package], f"{package} may not import {name}"
        assert parts[0] not in FORBIDDEN, f"{package} imports {name}"
        if package == "engine":
            assert parts[0] == "setpoint" or parts[0] in STANDARD_OR_NUMPY, f"engine imports {name}"


def test_only_the_fake_runtime_and_the_measure_know_each_other() -> None:
    for path in (SOURCE / "tune").rglob("*.py"):
        runtime = {name for name in imports(path) if name.startswith("setpoint.runtime")}
        assert all(name.startswith("setpoint.runtime.fake") for name in runtime)


POLICY = {"plan", "admit", "preempt", "evict", "draft", "pop", "grow", "can_admit", "order"}


def test_the_simulator_decides_nothing() -> None:
    """What plays the world around a scheduler has no method by which one decides, and changes none of its parts."""
    played = [SOURCE / "tune" / "simulate" / name for name in ("simulator.py", "arrivals.py", "recording.py")]
    deciding = ("planner", "committer", "roster", "kv_cache", "block_pool", "eviction", "queue_gate", "pacer")
    for path in (*played, SOURCE / "runtime" / "fake.py"):
        names = {node.name for node in syntax(path) if isinstance(node, ast.FunctionDef)}
        assert not names & POLICY, f"{path.name} defines {names & POLICY}"
        assert not {name for name in imports(path) for part in deciding if name.startswith(f"setpoint.engine.{part}")}


CLOCKS = {"time", "monotonic", "perf_counter", "sleep", "urandom", "default_rng", "SystemRandom", "now"}
MAY_READ = {  # (file, name): why
    ("blast_wall.py", "perf_counter"),  # what moving blocks took
    ("disk_store.py", "time"),  # ages of files
    ("disk_tier.py", "monotonic"),  # default of its clock: a thread of its own
    ("engine.py", "monotonic"),  # default of the engine's clock
    ("loop.py", "sleep"),  # the end of an engine whose disk is behind
    ("prefix_tree.py", "urandom"),  # secret of the keys: decides nothing
    ("speculator.py", "perf_counter"),  # default of its clock
}


def test_the_engine_reads_no_clock_and_no_dice_of_its_own() -> None:
    """Under a virtual clock the same inputs give the same plans."""
    read = set()
    for path in (SOURCE / "engine").rglob("*.py"):
        for node in syntax(path):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in ("time", "os", "random", "datetime") and node.attr in CLOCKS:
                    read.add((path.name, node.attr))
                assert node.value.id != "random" or node.attr == "Random", f"{path.name}: unseeded random numbers"
    assert read <= MAY_READ


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_dynamic_code_and_one_reader_of_the_environment(path: Path) -> None:
    for node in syntax(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
            assert path == SOURCE / "config" / "environment.py", f"{path.name}:{node.lineno} reads the environment"
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False, f"{path.name}:{node.lineno}"


def test_import_setpoint_is_light() -> None:
    """`import setpoint` loads none of the heavy packages, and `--help` not even typer."""
    heavy = {"torch", "ray", "fastapi", "transformers", "numpy", "typer", "rich", "jinja2", "tokenizers", "llguidance"}
    code = (
        "import sys; import setpoint, setpoint.cli.main as main; main.main(['--help']);"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(SOURCE.parent)}
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_public_name_exists() -> None:
    import setpoint

    for name in setpoint.__all__:
        if name != "LLM" and name not in ("RequestOutput", "CompletionOutput"):  # these load the runtime's package
            assert getattr(setpoint, name) is not None
    assert set(setpoint.__all__) == set(dir(setpoint))
