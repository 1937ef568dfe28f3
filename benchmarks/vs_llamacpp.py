"""Setpoint beside its rivals on the same files and token ids, in turn, as ratios and as shares of the machine.

    make bench-peers                                  the whole table (about half an hour), or
    python benchmarks/vs_llamacpp.py --rows prefill   a part of it; --quick for a first look; --sweep for the plots

Rivals live in environments of their own, built at the first run. For every row llama.cpp first looks for its best
settings. Then the engines take turns, the order alternating, with 50 ms probes of the machine on either side of every
sample; pairs whose probes differ, or that others disturbed, are repeated within bounds. The result goes to
benchmarks/results/DATE-peers.json; the last line printed is the same JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from peers import environments, report, scripts
from peers.environments import LLAMA_CPP, OPENVINO, VLLM, CannotInstall, Rival
from peers.files import model_file
from peers.hugging_face import hugging_face_directory
from peers.measure import (
    Engine,
    Machine,
    Prompts,
    agreement,
    measure_rows,
    next_token_agreement,
    noting_failure,
    say,
    serves,
)
from peers.rows import SWEEP, TABLE, Row, select
from peers.work import model_work
from peers.worker import Worker, WorkerDied
from setpoint.assemble import load_model
from setpoint.text.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"
MODELS_WITH_TEXT = ("smollm2", "gemma3")  # trained: greedy outputs mean something
TEXTS = (
    "The capital of France is",
    "Once upon a time there was a small village by the sea, and in that village",
    "To make bread you need flour, water, yeast and",
    "The three laws of thermodynamics say that",
)
GREEDY_TOKENS = 48
NEXT_TOKENS = 24
OTHER_DIALS: dict[str, tuple[list[tuple[str, list[Any]]], dict[str, Any]]] = {
    "openvino": ([("group", [0, 32])], {"group": 0}),
    "vllm": ([], {}),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="only rows whose name matches; several are separated by commas")
    parser.add_argument("--repeat", type=int, default=5, help="pairs of samples a row")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one repeat, no search for settings, no result file but --output",
    )
    parser.add_argument("--sweep", action="store_true", help="decode against batch and against context, for the plots")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=30, help="after this no sample is repeated for being doubtful")
    parser.add_argument("--output", type=Path, help="result file, instead of benchmarks/results/DATE-peers.json")
    parser.add_argument("--only-llama-cpp", action="store_true", help="leave out OpenVINO and vLLM")
    for rival in (LLAMA_CPP, OPENVINO, VLLM):
        parser.add_argument(f"--{_flag(rival)}-python", type=Path, help=f"a Python that has {rival.name} already")
    return parser.parse_args()


def _flag(rival: Rival) -> str:
    return rival.name.replace(".", "-")


def main() -> None:
    given = parse()
    if given.quick:
        given.repeat = 1
    rows = select(SWEEP if given.sweep else TABLE, given.rows)
    script_rows = [] if given.sweep else select(scripts.SCRIPT_ROWS, given.rows)
    if not rows and not script_rows:
        raise SystemExit("no row has such a name")
    began = time.monotonic()
    pythons, unavailable = prepare_rivals(rows, given)
    document: dict[str, Any] = {
        "question": "setpoint beside its rivals" + (", swept" if given.sweep else ""),
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/vs_llamacpp.py " + " ".join(sys.argv[1:]),
        "threads": given.threads,
        "repeat": given.repeat,
        "machine": None if given.quick else report.machine_record(),
        "unavailable": unavailable,
        "failed": {},
        "engines": {},
        "greedy": {},
        "rows": [],
        "scripts": None,
    }
    with tempfile.TemporaryDirectory() as directory:
        logs = Path(directory)
        threads = ["--threads", str(given.threads)]
        machine = Machine(Worker(Path(sys.executable), "probe_worker.py", threads, logs / "probe.log"))
        for model in dict.fromkeys(row.model for row in rows):
            of_model = [row for row in rows if row.model == model]
            share = (len(document["rows"]) + len(of_model)) / len(rows)  # later models get their time for repeats too
            deadline = began if given.quick else began + 60 * given.minutes * share
            try:
                measure_model(model, of_model, pythons, machine, given, deadline, logs, document)
            except WorkerDied as error:  # the other models' rows took minutes, too
                document["failed"][model] = str(error)
                say(f"{model} failed: {error}")
        machine.probe_worker.close()
    if script_rows:
        say("starts and overhead")
        document["scripts"] = scripts.measure(script_rows, given.repeat, pythons[LLAMA_CPP.name])
    document["minutes"] = round((time.monotonic() - began) / 60, 1)
    if document["rows"]:
        print(report.table(document["rows"], unavailable))
    if document["scripts"]:
        print(scripts.table(document["scripts"]["rows"]))
    line = json.dumps(document)
    if given.output or not given.quick:
        path = given.output or RESULTS / f"{document['date']}-peers{'-sweep' if given.sweep else ''}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        say(f"written to {path}")
    print(line)
    if document["failed"]:
        raise SystemExit(f"failed: {', '.join(document['failed'])}")


def prepare_rivals(rows: list[Row], given: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """The Python of each rival we can run, and why the others are missing. llama.cpp must be there."""
    pythons = {LLAMA_CPP.name: environments.prepare(LLAMA_CPP, given.llama_cpp_python)}
    unavailable: dict[str, str] = {}
    if not given.only_llama_cpp and any(row.other_rivals for row in rows):
        for rival in (OPENVINO, VLLM):
            try:
                pythons[rival.name] = environments.prepare(rival, getattr(given, f"{rival.name}_python"))
            except (CannotInstall, OSError) as error:
                unavailable[rival.name] = str(error)
                say(f"{rival.name} cannot be installed: {error}")
    return pythons, unavailable


def measure_model(
    model: str,
    rows: list[Row],
    pythons: dict[str, Path],
    machine: Machine,
    given: argparse.Namespace,
    deadline: float,
    logs: Path,
    document: dict[str, Any],
) -> None:
    say(f"{model}: loading")
    path = model_file(model, pythons[LLAMA_CPP.name])
    work = model_work(path)
    loaded = load_model(str(path))
    engines = start_engines(path, rows, pythons, given, logs, document)
    for engine in engines:
        document["engines"].setdefault(engine.name, {})[model] = engine.worker.about
    try:
        if not given.quick:
            tune(rows, engines, loaded.model.vocab_size)
        found = measure_rows(rows, engines, machine, loaded.model.vocab_size, given.repeat, deadline)
        document["rows"] += [report.row_document(measured, engines, work, given.repeat) for measured in found]
        if model.startswith(MODELS_WITH_TEXT):
            document["greedy"][model] = compare_outputs(engines, rows, loaded.tokenizer)
    finally:
        for engine in engines:
            engine.worker.close()


def start_engines(
    path: Path,
    rows: list[Row],
    pythons: dict[str, Path],
    given: argparse.Namespace,
    logs: Path,
    document: dict[str, Any],
) -> list[Engine]:
    context = max([row.prompt_tokens + row.steps for row in rows] + [8 * NEXT_TOKENS + GREEDY_TOKENS]) + 16
    limits = ["--context", str(context), "--batch", str(max(row.batch for row in rows))]
    limits += ["--threads", str(given.threads)]
    worker = Worker(Path(sys.executable), "setpoint_worker.py", [str(path), *limits], logs / "setpoint.log")
    engines = [Engine("setpoint", worker)]
    worker = Worker(
        pythons[LLAMA_CPP.name],
        "llama_cpp_worker.py",
        [str(path)],
        logs / "llama.log",
        os.environ | dict(LLAMA_CPP.run),
    )
    counts = sorted({1, given.threads // 2 or 1, given.threads}, reverse=True)
    defaults = {"flash_attention": True, "ubatch": 512, "threads": given.threads, "kv": "f16"}
    dials: list[tuple[str, list[Any]]] = [
        ("flash_attention", [True, False]),
        ("ubatch", [128, 256, 512]),
        ("threads", counts),
    ]
    engines.append(Engine("llama.cpp", worker, candidates=dials, defaults=defaults))
    for rival in (OPENVINO, VLLM):
        if rival.name in pythons and any(row.other_rivals for row in rows):
            script = f"{rival.name}_worker.py"
            file = hugging_face_directory(path) if rival is VLLM else path
            say(f"  loading {file.name} into {rival.name}")
            arguments = [str(file), *limits]
            try:
                worker = Worker(pythons[rival.name], script, arguments, logs / f"{rival.name}.log", os.environ)
            except WorkerDied as error:
                document["unavailable"][rival.name] = str(error)
                say(f"  {rival.name} cannot load {path.name}: {error}")
                continue
            engines.append(Engine(rival.name, worker, False, *OTHER_DIALS[rival.name]))
    return engines


def tune(rows: list[Row], engines: list[Engine], vocabulary: int) -> None:
    for row in rows:
        for engine in engines:
            if engine.candidates and serves(engine, row):
                with noting_failure(engine, row):
                    engine.tune(row, Prompts(row, vocabulary).copies())


def compare_outputs(engines: list[Engine], rows: list[Row], tokenizer: Tokenizer) -> dict[str, Any]:
    """Do the engines compute the same thing? Continuations against llama.cpp's, next tokens against everybody's."""
    prompts = [tokenizer.encode(text) for text in TEXTS]
    lengths = agreement(engines[0], engines[1], prompts, GREEDY_TOKENS, engines[1].settings(rows[0]))
    prose = tokenizer.encode(topics["assignment"])
    prefixes = [prose[:count] for count in range(8, 8 + 8 * NEXT_TOKENS, 8)]
    same = {
        engine.name: next_token_agreement(engines[0], engine, prefixes, engine.settings(rows[0]))
        for engine in engines[1:]
        if not engine.failures
    }
    say(f"  greedy tokens equal to llama.cpp's before the first difference: {lengths} of {GREEDY_TOKENS + 1}")
    say(f"  same next token after {NEXT_TOKENS} prefixes of prose: {same}")
    return {
        "tokens": GREEDY_TOKENS + 1,
        "equal_before_first_difference": lengths,
        "prefixes": NEXT_TOKENS,
        "same_next_token": same,
    }


if __name__ == "__main__":
    main()
