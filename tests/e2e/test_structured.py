"""Structured output of real models: valid, and the same tokens whatever the engine does on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from engine_support import AlwaysDraft

from setpoint import LLM, SamplingParams, StructuredOutputs
from setpoint.engine.request import Request
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.errors import RequestError

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 24},
        "year": {"type": "integer", "minimum": 1900, "maximum": 2030},
        "genre": {"enum": ["drama", "comedy", "horror"]},
        "cast": {"type": "array", "items": {"type": "string", "maxLength": 16}, "minItems": 1, "maxItems": 3},
    },
    "required": ["title", "year", "genre", "cast"],
    "additionalProperties": False,
}
EXPRESSION: dict[str, Any] = {
    "$defs": {
        "term": {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": 99},
                {
                    "type": "object",
                    "properties": {
                        "op": {"enum": ["+", "*"]},
                        "left": {"$ref": "#/$defs/term"},
                        "right": {"$ref": "#/$defs/term"},
                    },
                    "required": ["op", "left", "right"],
                    "additionalProperties": False,
                },
            ]
        }
    },
    "type": "array",
    "items": {"$ref": "#/$defs/term"},
    "minItems": 1,
    "maxItems": 2,
}
PROMPT = "Here is a film as JSON:\n"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 250}
CASES: dict[str, dict[str, Any]] = {
    "schema": {"json": SCHEMA},
    "compact schema": {"json": SCHEMA, "disable_any_whitespace": True},
    "regex": {"regex": r"(The|A) [a-z]{3,12} (is|was) [0-9]{1,4}\."},
    "choice": {"choice": ["New York", "New Orleans", "Newcastle"]},
    "structural tag": {
        "structural_tag": {  # a trigger that the model will write
            "triggers": [" is", " has"],
            "structures": [
                {"begin": " is", "schema": {"enum": [True, False, "not known so far"]}, "end": " (so they say)"},
                {"begin": " has <genre>", "schema": SCHEMA["properties"]["genre"], "end": "</genre>"},
            ],
        }
    },
    "grammar": {"grammar": 'start: "[" item ("," item)* "]"\nitem: /[a-z]{1,5}/ | start'},
}


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_path), max_model_len=512, max_num_seqs=8) as made:
        yield made


def scheduler_of(llm: LLM) -> Scheduler:
    return llm._assembly.engine._scheduler


def tokens_of(llm: LLM, params: SamplingParams, prompt: str = PROMPT) -> list[list[int]]:
    return [completion.token_ids for completion in llm.generate([prompt], params)[0].outputs]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_is_valid(llm: LLM, temperature: float) -> None:
    for schema in (SCHEMA, EXPRESSION):
        params = SamplingParams(structured_outputs={"json": schema}, temperature=temperature, max_tokens=400, seed=5)
        completion = llm.generate([PROMPT], params)[0].outputs[0]
        assert completion.finish_reason == "stop"
        jsonschema.validate(json.loads(completion.text), schema)


def test_regex_and_choice_are_matched_in_full(llm: LLM) -> None:
    for seed in range(4):
        for pattern in (r"[A-Z]{3}-[0-9]{4}", r"(yes|no), (because|although) [a-z ]{1,20}\."):
            params = SamplingParams(structured_outputs=StructuredOutputs(regex=pattern), max_tokens=60, seed=seed)
            assert re.fullmatch(pattern, llm.generate([PROMPT], params)[0].outputs[0].text)
    params = SamplingParams(structured_outputs=CASES["choice"], temperature=0.0)
    assert llm.generate(["The largest city of the USA is "], params)[0].outputs[0].text in CASES["choice"]["choice"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forced_tokens_change_nothing(llm: LLM, case: str, temperature: float) -> None:
    """Jumping, drawing one by one, and the exact path that logprobs take: the same tokens."""
    scheduler = scheduler_of(llm)
    params = SamplingParams(structured_outputs=CASES[case], temperature=temperature, max_tokens=120, seed=3)
    jumped = tokens_of(llm, params)
    before = scheduler.counters.forced_tokens
    scheduler.limits = replace(scheduler.limits, jump_forward=False)
    try:
        assert tokens_of(llm, params) == jumped
        assert scheduler.counters.forced_tokens == before
    finally:
        scheduler.limits = replace(scheduler.limits, jump_forward=True)
    assert tokens_of(llm, replace(params, logprobs=2)) == jumped


def test_a_tag_follows_every_trigger(llm: LLM) -> None:
    """Free text, of a model that was not asked for tags; each trigger is the beginning of a whole tag, or the cut."""
    rest = re.compile(r'(true|false|"not known so far") \(so they say\)')
    num_found = 0
    for seed in range(4):
        params = SamplingParams(structured_outputs=CASES["structural tag"], temperature=1.0, max_tokens=100, seed=seed)
        for text in (output.text for output in llm.generate(["The film is", "My cat"], params)[0].outputs):
            *tags, last = text.split(" is")[1:] or [""]
            assert all(rest.match(tag) for tag in tags), text
            num_found += len(tags) + bool(rest.match(last))
    assert num_found > 0


def test_company_changes_nothing(llm: LLM) -> None:
    """Batched with others, structured or not, several of each: what each gets alone."""
    jobs = [
        (
            f"{PROMPT}{number}",
            SamplingParams(structured_outputs=fields, temperature=1.0, n=2, seed=number, max_tokens=60),
        )
        for number, fields in enumerate([*CASES.values(), None])
    ]
    together = llm.generate([prompt for prompt, _ in jobs], [params for _, params in jobs])
    for output, (prompt, params) in zip(together, jobs, strict=True):
        assert [completion.token_ids for completion in output.outputs] == tokens_of(llm, params, prompt)


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_masks_computed_while_the_model_runs_change_nothing(llm: LLM, jump: bool, logprobs: int | None) -> None:
    scheduler = scheduler_of(llm)
    params = [
        SamplingParams(
            structured_outputs=fields,
            temperature=temperature,
            n=1 + seed % 2,
            seed=seed,
            max_tokens=60,
            logprobs=logprobs,
        )
        for seed, fields in enumerate([*CASES.values(), None])
        for temperature in (0.0, 1.0)
        if temperature or seed % 2 == 0
    ]
    planner, limits, outputs = scheduler._planner, scheduler.limits, []
    scheduler.limits = replace(limits, jump_forward=jump)
    try:
        for planner.late_masks in (False, True):
            found = llm.generate([PROMPT] * len(params), params)
            outputs.append([completion for output in found for completion in output.outputs])
    finally:
        planner.late_masks = llm._assembly.engine._runner.info.late_masks
        scheduler.limits = limits
    assert outputs[0] == outputs[1]


def repeat(token_ids: list[int], max_drafts: int) -> list[int]:
    """Drafts what followed the last token before, or something silly."""
    for begin in range(len(token_ids) - 2, -1, -1):
        if token_ids[begin] == token_ids[-1]:
            return token_ids[begin + 1 : begin + 1 + max_drafts]
    return [5, 6, 7][:max_drafts]


@pytest.mark.parametrize("late_masks", [False, True])
def test_chunks_drafts_and_preemption_change_nothing(llm: LLM, late_masks: bool) -> None:
    """A scheduler of our own around the real runner, few blocks, small steps, and drafts that are sometimes right."""
    assembly = llm._assembly
    params = [
        SamplingParams(structured_outputs=fields, temperature=temperature, seed=seed, max_tokens=60)
        for seed, fields in enumerate(CASES.values())
        for temperature in (0.0, 1.0)
    ]
    alone = [tokens_of(llm, one)[0] for one in params]
    runner = assembly.engine._runner
    prompt = llm.get_tokenizer().encode(PROMPT)
    for limits in (
        SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=7, max_drafts=3),
        SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=64, max_drafts=2, jump_forward=False),
    ):
        info = replace(runner.info, late_masks=late_masks)
        scheduler = Scheduler(info, limits, seed=0, speculator=AlwaysDraft(repeat))
        for number, one in enumerate(params):
            grammar = assembly.grammars.compile(StructuredOutputs.of(one.structured_outputs))
            scheduler.add(
                Request(str(number), prompt, one, eos_token_ids=llm.get_tokenizer().eos_token_ids, grammar=grammar), 0.0
            )
        found: dict[str, list[int]] = {}
        step = 0
        while scheduler.has_work:
            if step % 17 == 16 and len(scheduler.running) > 1:
                scheduler._roster.preempt(scheduler.running[-1])
            plan = scheduler.schedule(float(step))
            for event in scheduler.commit(plan, runner.execute(plan), float(step)):
                assert event.error is None
                found.setdefault(event.request_id, []).extend(event.token_ids)
            scheduler.check_integrity()
            step += 1
        assert [found[str(number)] for number in range(len(params))] == alone
        assert scheduler.counters.speculation.draft_tokens > 0
        assert scheduler.counters.preemptions > 0


def test_penalties_and_bias_work_within_the_grammar(llm: LLM) -> None:
    params = SamplingParams(
        structured_outputs=StructuredOutputs(regex="[ab]{20}"),
        temperature=0.0,
        max_tokens=30,
        logit_bias={llm.get_tokenizer().encode("b", add_special_tokens=False)[0]: 50.0},
    )
    text = llm.generate([PROMPT], params)[0].outputs[0].text
    assert re.fullmatch("[ab]{20}", text)
    assert text.count("b") > 10


def test_errors_come_before_anything_runs(llm: LLM) -> None:
    before = scheduler_of(llm).counters.prompt_tokens
    for fields, param in (
        ({"regex": "["}, "structured_outputs.regex"),
        ({"json": {"type": "nothing"}}, "structured_outputs.json"),
        ({"json": {"type": "object"}, "choice": ["a"]}, "structured_outputs"),
    ):
        with pytest.raises(RequestError) as caught:
            llm.generate([PROMPT], SamplingParams(structured_outputs=fields))
        assert caught.value.param == param
    assert scheduler_of(llm).counters.prompt_tokens == before


def test_gemma_ends_by_any_of_its_end_tokens(gemma3_path: Path) -> None:
    """Another vocabulary, five times as large, and more than one token that ends a text."""
    with LLM(str(gemma3_path), max_model_len=256, max_num_seqs=2) as gemma:
        params = SamplingParams(structured_outputs={"json": SCHEMA}, temperature=1.0, max_tokens=200, seed=1)
        completion = gemma.generate([PROMPT], params)[0].outputs[0]
        assert completion.finish_reason == "stop"
        jsonschema.validate(json.loads(completion.text), SCHEMA)
        listed = SamplingParams(structured_outputs={"regex": "a+"}, temperature=0.0, max_tokens=40)
        assert re.fullmatch("a+", gemma.generate([PROMPT], listed)[0].outputs[0].text)
