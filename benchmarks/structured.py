"""What structured output costs and whether it holds what it promises.

    python benchmarks/structured.py [--model smollm2-135m] [--parts compile,overhead,late,jump,valid] [--outputs 1000]
        [--speculation off] [--num-threads 1]

compile: every schema of `structured_schemas.py` as a client's first request meets it (a trial in the worker process,
then in the server), and from the cache. overhead: greedy decoding without a mask, with one that forbids no text, and
within JSON, in turn; and the masks of real outputs alone. late: masks made with the plan and while the model runs, in
turn; that may pay where threads leave a CPU idle. jump: the same outputs of compact JSON with forced tokens
taken at once and drawn one by one, in turn; the tokens must be equal. valid: outputs of all schemas at temperature 0.7,
in batches, each validated by the jsonschema library; those cut by max_tokens are counted apart. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from typing import Any

import jsonschema

from setpoint import LLM, SamplingParams
from setpoint.engine.structured_outputs import StructuredOutputs
from setpoint.grammar.compiler import GrammarCompiler
from structured_schemas import EXAMPLES, SCHEMAS

MAX_TOKENS = 900
TEMPERATURE = 0.7
ENDLESS = {"type": "array", "items": {"type": "object", "properties": {"text": {"type": "string"}}}, "minItems": 99}
FORMATS = jsonschema.FormatChecker()


def prompt_of(name: str) -> str:
    example = EXAMPLES.get(name)
    shown = "" if example is None else f"{example}\n\nHere is another {name}:\n"
    return f"Here is an example of {name} as JSON:\n{shown}"


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "mean": round(statistics.fmean(ordered), 4),
        "p50": round(statistics.median(ordered), 4),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 4),
        "max": round(ordered[-1], 4),
    }


def compile_times(llm: LLM) -> dict[str, Any]:
    """Milliseconds."""
    compiler = GrammarCompiler(llm.get_tokenizer(), llm._assembly.engine.limits.vocab_size)
    first, new, cached = 0.0, [], []
    for number, schema in enumerate(SCHEMAS.values()):
        wanted = StructuredOutputs(json=schema)
        for times in (new, cached):
            began = time.perf_counter()
            compiler.compile(wanted)
            times.append((time.perf_counter() - began) * 1e3)
        if number == 0:
            first = new.pop()
    compiler.close()
    return {"first_ms": round(first, 1), "new_ms": spread(new), "cached_ms": spread(cached), "schemas": len(SCHEMAS)}


def mask_times(llm: LLM) -> dict[str, Any]:
    """Microseconds for the masks of one output of every schema, and for taking its tokens."""
    compiler, masks, advances, forced = llm._assembly.grammars, [], [], []
    for name, schema in SCHEMAS.items():
        wanted = StructuredOutputs(json=schema)
        params = SamplingParams(structured_outputs=wanted, max_tokens=200, temperature=1.0, seed=1)
        tokens = llm.generate([prompt_of(name)], params)[0].outputs[0].token_ids
        constraint = compiler.compile(wanted).start(())
        for token in tokens:
            if token in llm.get_tokenizer().special_ids:
                break
            began = time.perf_counter()
            constraint.mask()
            masked = time.perf_counter()
            constraint.advance(token)
            advanced = time.perf_counter()
            constraint.forced()
            masks.append((masked - began) * 1e6)
            advances.append((advanced - masked) * 1e6)
            forced.append((time.perf_counter() - advanced) * 1e6)
    return {"masks": len(masks), "mask_us": spread(masks), "advance_us": spread(advances), "forced_us": spread(forced)}


def seconds_per_token(llm: LLM, batch: int, params: SamplingParams) -> tuple[float, list[list[int]]]:
    prompts = [f"{number} days ago, the ship left the harbour and" for number in range(batch)]
    outputs = llm.generate(prompts, params)
    slowest = max(output.metrics.total_s - output.metrics.time_to_first_token_s for output in outputs)
    tokens = [output.outputs[0].token_ids for output in outputs]
    return slowest / (len(tokens[0]) - 1), tokens


def overhead(llm: LLM, repeat: int) -> dict[str, Any]:
    """Seconds a token without a mask, with one that forbids no text, and with those of JSON; one by one, no jumps."""
    plain = SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True)
    variants = {
        "plain": plain,
        "any text": replace(plain, structured_outputs=StructuredOutputs(regex="(?s:.*)")),
        "json": replace(plain, structured_outputs=StructuredOutputs(json=ENDLESS)),
    }
    set_jump(llm, False)
    result: dict[str, Any] = {}
    for batch in (1, 8, 32):
        times: dict[str, list[float]] = {name: [] for name in variants}
        tokens: dict[str, list[list[int]]] = {}
        for turn in range(repeat + 1):
            for name, params in variants.items():
                seconds, tokens[name] = seconds_per_token(llm, batch, params)
                if turn:  # the first warms up
                    times[name].append(seconds)
        figures: dict[str, Any] = {f"{name} ms": round(statistics.median(t) * 1e3, 3) for name, t in times.items()}
        for name in ("any text", "json"):
            ratios = [after / before for before, after in zip(times["plain"], times[name], strict=True)]
            figures[f"{name} ratio"] = round(statistics.median(ratios), 3)
            figures[f"{name} ratios"] = [round(ratio, 3) for ratio in ratios]
        figures["any text has the same tokens"] = tokens["plain"] == tokens["any text"]
        result[f"batch {batch}"] = figures
    set_jump(llm, True)
    return result


def late(llm: LLM, repeat: int) -> dict[str, Any]:
    """Milliseconds a token within JSON: masks made with the plan, or by a thread while the model runs, in turn."""
    params = SamplingParams(
        temperature=0.0, max_tokens=96, ignore_eos=True, structured_outputs=StructuredOutputs(json=ENDLESS)
    )
    planner, runner = llm._assembly.engine._scheduler._planner, llm._assembly.engine._runner
    set_jump(llm, False)
    result: dict[str, Any] = {"by the rule": runner.info.late_masks}
    for batch in (1, 8, 32):
        times: dict[bool, list[float]] = {False: [], True: []}
        tokens: dict[bool, list[list[int]]] = {}
        for turn in range(repeat + 1):
            for on in (False, True) if turn % 2 else (True, False):
                planner.late_masks = on
                seconds, tokens[on] = seconds_per_token(llm, batch, params)
                if turn:  # the first warms up
                    times[on].append(seconds)
        if tokens[True] != tokens[False]:
            raise SystemExit("late masks change the output")
        ratios = [after / before for before, after in zip(times[False], times[True], strict=True)]
        result[f"batch {batch}"] = {
            "planned ms": round(statistics.median(times[False]) * 1e3, 3),
            "late ms": round(statistics.median(times[True]) * 1e3, 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    planner.late_masks = runner.info.late_masks
    set_jump(llm, True)
    return result


def set_jump(llm: LLM, on: bool) -> None:
    scheduler = llm._assembly.engine._scheduler
    scheduler.limits = replace(scheduler.limits, jump_forward=on)


def jump(llm: LLM, repeat: int) -> dict[str, Any]:
    """Seconds for one output of every schema, one after the other."""
    names = list(SCHEMAS)
    jobs = [
        SamplingParams(
            structured_outputs=StructuredOutputs(json=SCHEMAS[name], disable_any_whitespace=True),
            temperature=0.0,
            max_tokens=200,
        )
        for name in names
    ]
    seconds: dict[str, dict[bool, list[float]]] = {name: {True: [], False: []} for name in names}
    counters = llm._assembly.engine.stats
    num_tokens = num_forced = 0
    for turn in range(repeat + 1):
        for name, params in zip(names, jobs, strict=True):
            tokens = {}
            for on in (False, True):
                set_jump(llm, on)
                before = counters().counters
                output = llm.generate([prompt_of(name)], params)[0]
                after = counters().counters
                tokens[on] = output.outputs[0].token_ids
                if turn:
                    seconds[name][on].append(output.metrics.total_s)
                if on and turn == 1:
                    num_tokens += after.generation_tokens - before.generation_tokens
                    num_forced += after.forced_tokens - before.forced_tokens
            if tokens[True] != tokens[False]:
                raise SystemExit(f"{name}: jump-forward changes the output")
    set_jump(llm, True)
    ratios = {
        name: statistics.median(without / with_jump for without, with_jump in zip(s[False], s[True], strict=True))
        for name, s in seconds.items()
    }
    total = {on: sum(statistics.median(s[on]) for s in seconds.values()) for on in (False, True)}
    best = sorted(ratios, key=lambda name: -ratios[name])
    return {
        "outputs": len(names),
        "same_tokens": True,
        "tokens": num_tokens,
        "forced": num_forced,
        "off_s": round(total[False], 3),
        "on_s": round(total[True], 3),
        "speed_up": round(total[False] / total[True], 3),
        "speed_ups": spread(list(ratios.values())) | {"min": round(min(ratios.values()), 3)},
        "most": {name: round(ratios[name], 2) for name in best[:5]},
        "least": {name: round(ratios[name], 2) for name in best[-5:]},
    }


def exact(value: Any) -> Any:
    """JSON, parsed, with its numbers as they are written: 0.07 is a multiple of 0.01, their nearest doubles are not."""
    return json.loads(value if isinstance(value, str) else json.dumps(value), parse_float=Decimal)


def validity(llm: LLM, num_outputs: int) -> dict[str, Any]:
    names = list(SCHEMAS)
    validators = {name: jsonschema.Draft202012Validator(exact(SCHEMAS[name]), format_checker=FORMATS) for name in names}
    jobs = [names[number % len(names)] for number in range(num_outputs)]
    params = [
        SamplingParams(
            structured_outputs=StructuredOutputs(json=SCHEMAS[name]),
            temperature=TEMPERATURE,
            seed=seed,
            max_tokens=MAX_TOKENS,
        )
        for seed, name in enumerate(jobs)
    ]
    began = time.perf_counter()
    outputs = llm.generate([prompt_of(name) for name in jobs], params)
    seconds = time.perf_counter() - began
    endings: Counter[str] = Counter()
    truncated: Counter[str] = Counter()
    invalid = []
    for name, output in zip(jobs, outputs, strict=True):
        completion = output.outputs[0]
        if completion.finish_reason == "length":
            endings["truncated"] += 1
            truncated[name] += 1
            continue
        try:
            validators[name].validate(exact(completion.text))
            endings["valid"] += 1
        except (ValueError, jsonschema.ValidationError) as error:
            endings["invalid"] += 1
            invalid.append({"schema": name, "text": completion.text[:200], "error": str(error).splitlines()[0]})
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "outputs": num_outputs,
        "schemas": len(names),
        "valid": endings["valid"],
        "invalid": endings["invalid"],
        "truncated": endings["truncated"],
        "truncated_by_schema": dict(truncated),
        "failures": invalid[:10],
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--parts", default="compile,overhead,late,jump,valid")
    parser.add_argument("--outputs", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--speculation", default="off", help="the method of --speculative-config")
    parser.add_argument("--num-threads", type=int, default=None, help="compute threads; default: one per CPU")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    result: dict[str, Any] = {
        "benchmark": "structured",
        "model": arguments.model,
        "speculation": arguments.speculation,
        "num_threads": arguments.num_threads,
    }
    speculation = json.dumps({"method": arguments.speculation})
    with LLM(
        arguments.model,
        max_model_len=1024,
        max_num_seqs=32,
        enable_prefix_caching=False,
        speculative_config=speculation,
        num_threads=arguments.num_threads,
    ) as llm:
        if "compile" in parts:
            result["compile"] = compile_times(llm)
        if "overhead" in parts:
            result["masks"] = mask_times(llm)
            result["overhead"] = overhead(llm, arguments.repeat)
        if "late" in parts:
            result["late_masks"] = late(llm, arguments.repeat)
        if "jump" in parts:
            result["jump_forward"] = jump(llm, arguments.repeat)
        if "valid" in parts:
            result["validity"] = validity(llm, arguments.outputs)
    for part, values in result.items():
        print(f"{part}: {json.dumps(values, indent=1)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
