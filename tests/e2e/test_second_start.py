"""The second start of a model maps what the first one packed, and says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from setpoint import LLM, SamplingParams
from setpoint.assemble import weight_cache

PROMPTS = ["The capital of France is", "def fibonacci(n):"]
PARAMS = [SamplingParams(temperature=0, max_tokens=16), SamplingParams(temperature=0, max_tokens=8, logprobs=3)]


@pytest.mark.parametrize("model", ["smollm2_path", "gemma3_path"])
def test_a_second_start_uses_the_cache(
    model: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Path = request.getfixturevalue(model)
    monkeypatch.setenv("SETPOINT_CACHE_DIR", str(tmp_path))
    answers, phases = [], []
    for _ in range(2):
        with LLM(str(path), max_model_len=512, max_num_seqs=4) as llm:
            phases.append(set(llm._assembly.phases))
            answers.append([out.outputs for out in llm.generate(PROMPTS, PARAMS)])
        assert len(weight_cache().files()) == 1
    assert answers[0] == answers[1]
    assert "weights" in phases[0]
    assert "cached weights" in phases[1]
