"""What speculation brings: tokens a second with it over without it, on five kinds of text, at batch 1, 4 and 16.

    python benchmarks/speculation.py [--model smollm2-135m] [--batches 1 4 16] [--repeat 5] [--rival-python PYTHON]

One engine; the number of drafts is a hot knob, so both sides of a pair run on the same memory within seconds, in
alternating order. Prompts are in the prefix cache before a measurement, which counts decoding only. Every run has a
cache salt of its own, so that no run can copy the answers of an earlier one. Outputs with and without drafts are
compared token by token. The rival decodes the same prompts at batch 1 with its prompt lookup and without. A ratio is
the pseudo-median of its pairs with a 95 % interval (Hodges and Lehmann); where the first pairs leave open on which
side of its goal it lies, `--more` further pairs are run. --output is written after every row. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import queue
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peers.worker import Worker
from setpoint.assemble import Assembly, build_engine, require_chat_template
from setpoint.config import EngineConfig
from setpoint.engine.events import Event
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.stats import SpeculationCounters
from setpoint.tune.statistics import Interval, hodges_lehmann
from speculation_work import Workload, workloads

SETTLING_S = 5.0  # a start moves weights into huge pages behind the first steps
RIVAL_DRAFTS = (2, 10)  # what its documentation recommends for CPUs and its default


@dataclass(frozen=True, slots=True)
class Run:
    rate: float  # tokens a second, first tokens not counted
    outputs: list[list[int]]
    drafted: int
    accepted: int
    steps: int
    saved_s: float


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        config = EngineConfig(
            model=args.model, max_num_seqs=max(args.batches), max_model_len=2048, speculative_config=args.config, seed=0
        )
        self.assembly: Assembly = build_engine(config, self.events.put)
        self.engine = self.assembly.engine
        self.engine.start()
        time.sleep(SETTLING_S)
        self.num_tokens = args.tokens
        self.max_drafts = self.scheduler.limits.max_drafts
        self._run = 0

    @property
    def scheduler(self) -> Any:
        return self.engine._scheduler

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        tokenizer = self.assembly.tokenizer
        return tokenizer.encode(require_chat_template(self.assembly).render(messages), add_special_tokens=False)

    def run(self, prompts: list[list[int]], temperature: float, drafts: bool) -> Run:
        self._run += 1
        salt = f"run {self._run}"
        self.scheduler.limits = replace(self.scheduler.limits, max_drafts=0)
        self._generate(prompts, salt, max_tokens=1, temperature=0.0)
        self.scheduler.limits = replace(self.scheduler.limits, max_drafts=self.max_drafts if drafts else 0)
        before, steps = self._speculation()
        outputs, seconds = self._generate(prompts, salt, max_tokens=self.num_tokens, temperature=temperature)
        after, later = self._speculation()
        num_tokens = sum(map(len, outputs)) - len(outputs)
        return Run(
            num_tokens / seconds,
            outputs,
            after.draft_tokens - before.draft_tokens,
            after.accepted_tokens - before.accepted_tokens,
            later - steps,
            after.saved_seconds - before.saved_seconds,
        )

    def _speculation(self) -> tuple[SpeculationCounters, int]:
        counters = self.engine.stats().counters
        return counters.speculation, counters.step_tokens.num_steps

    def _generate(
        self, prompts: list[list[int]], salt: str, max_tokens: int, temperature: float
    ) -> tuple[list[list[int]], float]:
        """Outputs, and the seconds from the first token of all to the last."""
        for number, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=number)
            eos = frozenset(self.assembly.tokenizer.eos_token_ids)
            self.engine.submit(
                Request(f"{salt} {max_tokens} {number}", prompt, params, cache_salt=salt, eos_token_ids=eos)
            )
        outputs: dict[str, list[int]] = {}
        open_requests, first, last = len(prompts), 0.0, 0.0
        while open_requests:
            for event in self.events.get():
                if event.error is not None:
                    raise event.error
                outputs.setdefault(event.request_id, []).extend(event.token_ids)
                first, last = first or event.time, event.time
                open_requests -= event.finish_reason is not None
        ordered = [outputs[f"{salt} {max_tokens} {number}"] for number in range(len(prompts))]
        return ordered, max(last - first, 1e-9)


def measure(bench: Bench, work: Workload, batch: int, args: argparse.Namespace, rival: Worker | None) -> dict[str, Any]:
    """The row of one workload at one batch size; exits where drafts change an output."""
    prompts = [bench.prompt(messages) for messages in work.conversations]
    groups = [prompts[i : i + batch] for i in range(0, len(prompts) - batch + 1, batch)]
    plain: list[Run] = []
    drafted: list[Run] = []
    rivals: dict[int, list[float]] = {}
    bench.run(groups[0], work.temperature, True)
    ratios: list[float] = []
    goal = work.goal if batch == 1 else 0.98
    for repeat in range(args.repeat + args.more):
        if repeat == args.repeat and not _is_open(ratios, goal):
            break
        group = groups[repeat % len(groups)]
        pair = {
            drafts: bench.run(group, work.temperature, drafts) for drafts in ((False, True), (True, False))[repeat % 2]
        }
        if pair[False].outputs != pair[True].outputs:
            raise SystemExit(f"{work.name}: drafts changed the output")
        plain.append(pair[False])
        drafted.append(pair[True])
        ratios.append(pair[True].rate / pair[False].rate)
        if rival is not None and batch == 1 and repeat < args.repeat:
            for drafts in (0, *RIVAL_DRAFTS):
                answer = rival.ask(
                    "decode", prompt=group[0], steps=args.tokens, temperature=work.temperature, drafts=drafts
                )
                rivals.setdefault(drafts, []).append(answer["tokens"] / max(answer["seconds"], 1e-9))
    middle = pseudo_median(ratios)
    num_drafted = sum(run.drafted for run in drafted)
    tokens = sum(sum(map(len, run.outputs)) for run in drafted)
    row: dict[str, Any] = {
        "workload": work.name,
        "batch": batch,
        "goal": goal,
        "ratio": middle.estimate,
        "ratio_low": middle.low,
        "ratio_high": middle.high,
        "ratios": ratios,
        "plain_tok_s": statistics.median(run.rate for run in plain),
        "drafted_tok_s": statistics.median(run.rate for run in drafted),
        "acceptance": sum(run.accepted for run in drafted) / num_drafted if num_drafted else None,
        "drafted_per_token": num_drafted / tokens,
        "tokens_per_sequence_step": tokens / batch / max(sum(run.steps for run in drafted), 1),
        "output_tokens": [sum(map(len, run.outputs)) for run in drafted],
        "saved_s": sum(run.saved_s for run in drafted),
    }
    if rivals:
        medians = {drafts: statistics.median(rates) for drafts, rates in rivals.items()}
        row["llama_cpp_tok_s"] = {str(drafts): rate for drafts, rate in medians.items()}
        row["llama_cpp_ratio"] = max(medians[k] for k in RIVAL_DRAFTS) / medians[0]
    return row


def pseudo_median(ratios: list[float]) -> Interval:
    logs = hodges_lehmann([math.log(ratio) for ratio in ratios])
    return Interval(*(math.exp(value) for value in (logs.estimate, logs.low, logs.high)))


def _is_open(ratios: list[float], goal: float) -> bool:
    middle = pseudo_median(ratios)
    return middle.low < goal < middle.high


def show(row: dict[str, Any]) -> None:
    acceptance = "-" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
    line = (
        f"{row['workload']:<18} batch {row['batch']:>2}  {row['ratio']:5.2f}x ({row['ratio_low']:.2f}-"
        f"{row['ratio_high']:.2f}, {len(row['ratios'])} pairs)  "
        f"goal {row['goal']:.2f}  {row['plain_tok_s']:7.1f} -> {row['drafted_tok_s']:7.1f} tok/s  accepted {acceptance}"
    )
    if "llama_cpp_ratio" in row:
        rates = ", ".join(f"{k}: {rate:.0f}" for k, rate in row["llama_cpp_tok_s"].items())
        line += f"  llama.cpp {row['llama_cpp_ratio']:.2f}x ({rates} tok/s)"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--config", default="auto", help="as --speculative-config")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--more", type=int, default=56)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--workloads", nargs="+", help="beginnings of their names")
    parser.add_argument("--rival-python", type=Path, help="Python of an environment with llama-cpp-python")
    args = parser.parse_args()
    bench = Bench(args)
    rival = None
    if args.rival_python is not None:
        from setpoint.assemble import models_directory
        from setpoint.loaders.hub import resolve_model

        path = resolve_model(args.model, models_directory())
        log = Path("/tmp") / "llama_cpp_lookup.log"
        rival = Worker(
            args.rival_python, "llama_cpp_lookup.py", [str(path), str(bench.assembly.config.num_threads)], log
        )
    rows: list[dict[str, Any]] = []
    document = {"benchmark": "speculation", "model": args.model, "config": args.config, "repeat": args.repeat}
    document |= {"more": args.more, "tokens": args.tokens}
    document |= {"machine": platform.processor() or platform.machine(), "rows": rows}
    try:
        for work in workloads(max(16, *args.batches)):
            if args.workloads and not any(work.name.startswith(name) for name in args.workloads):
                continue
            for batch in args.batches:
                rows.append(measure(bench, work, batch, args, rival))
                show(rows[-1])
                if args.output is not None:
                    args.output.write_text(json.dumps(document) + "\n")
    finally:
        if rival is not None:
            rival.close()
        bench.engine.shutdown()
    print(json.dumps(document))


if __name__ == "__main__":
    sys.exit(main())
