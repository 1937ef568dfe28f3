"""The Python API on a tiny model: results, streaming, errors that name the field, and an engine that survives."""

from __future__ import annotations

import _thread
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from setpoint import LLM, SamplingParams
from setpoint.errors import ConfigError, ContextLengthError, EngineDeadError, ModelNotFoundError, RequestError
from setpoint.runtime.cpu.runner import CpuRunner
from tiny_models import EOS, TINY_MODELS, write_gguf

GREEDY = SamplingParams(temperature=0, max_tokens=24)
SEEDED = SamplingParams(temperature=1.5, seed=7, max_tokens=24)
PROMPTS = ["hello", "the other one, rather longer than the first", "an", "theorem " * 20, "hello there"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(TINY_MODELS["llama"], tmp_path_factory.mktemp("llm") / "llama.gguf")


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(str(path), num_threads=1, seed=3) as made:
        yield made


def test_a_prompt_is_continued(llm: LLM) -> None:
    [out] = llm.generate("hello", GREEDY)
    [completion] = out.outputs
    assert out.prompt == "hello"
    assert out.prompt_token_ids == llm.get_tokenizer().encode("hello")
    assert len(completion.token_ids) == 24
    assert (completion.finish_reason, completion.stop_reason, completion.index) == ("length", None, 0)
    assert completion.text == llm.get_tokenizer().decode(completion.token_ids, continuation=True)
    assert out.finished
    assert 0 < out.metrics.time_to_first_token_s <= out.metrics.total_s
    assert out.metrics.decode_tokens_per_s > 0


def test_text_and_token_ids_are_the_same_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    [by_text, by_ids] = [llm.generate([prompt], GREEDY)[0] for prompt in ("hello", ids)]
    assert by_ids.prompt is None
    assert by_text.outputs == by_ids.outputs


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_several_prompts_keep_their_order_and_equal_their_solo_runs(llm: LLM, params: SamplingParams) -> None:
    together = llm.generate(PROMPTS, params)
    assert [out.prompt for out in together] == PROMPTS
    alone = [llm.generate(prompt, params)[0] for prompt in PROMPTS]
    assert [out.outputs for out in together] == [out.outputs for out in alone]


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    outs = llm.generate(["hello", "hello"], [GREEDY, SamplingParams(temperature=0, max_tokens=3)])
    assert [len(out.outputs[0].token_ids) for out in outs] == [24, 3]
    assert outs[0].outputs[0].token_ids[:3] == outs[1].outputs[0].token_ids


def test_a_seed_repeats_and_another_one_differs(llm: LLM) -> None:
    first, again, other = (
        llm.generate("hello", SamplingParams(temperature=1.5, seed=seed, max_tokens=24))[0].outputs[0].token_ids
        for seed in (7, 7, 8)
    )
    assert first == again != other


def test_n_continuations_differ_and_repeat(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.5, seed=7, max_tokens=16)
    [out] = llm.generate("hello", params)
    assert [completion.index for completion in out.outputs] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in out.outputs}) == 4
    assert llm.generate("hello", params)[0].outputs == out.outputs


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    [free] = llm.generate("hello", GREEDY)
    text, ids = free.outputs[0].text, free.outputs[0].token_ids
    stop = text[len(text) // 2 :][:2]
    at = text.index(stop)
    [out] = llm.generate("hello", SamplingParams(temperature=0, max_tokens=24, stop=[stop]))
    completion = out.outputs[0]
    assert completion.text == text[:at]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == ids[: len(completion.token_ids)]
    assert len(completion.token_ids) < 24
    kept = SamplingParams(temperature=0, max_tokens=24, stop=[stop], include_stop_str_in_output=True)
    assert llm.generate("hello", kept)[0].outputs[0].text == text[: at + len(stop)]


def test_a_stop_string_among_several_continuations_stops_only_its_own(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.5, seed=7, max_tokens=24)
    free = llm.generate("hello", params)[0].outputs
    stop = next(piece for piece in (free[1].text[i : i + 3] for i in range(20)) if piece not in free[0].text)
    stopped = llm.generate("hello", SamplingParams(n=3, temperature=1.5, seed=7, max_tokens=24, stop=[stop]))[0].outputs
    assert stopped[0] == free[0]
    assert (stopped[1].finish_reason, stopped[1].text) == ("stop", free[1].text.partition(stop)[0])


def test_a_stop_token_is_counted_and_not_shown(llm: LLM) -> None:
    [free] = llm.generate("hello", GREEDY)
    ids = free.outputs[0].token_ids
    token = ids[5]
    [out] = llm.generate("hello", SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[token]))
    completion = out.outputs[0]
    assert completion.token_ids == ids[: ids.index(token) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", token)
    assert completion.text == llm.get_tokenizer().decode(completion.token_ids[:-1], continuation=True)


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=1)
    [out] = llm.generate("hello there", params)
    completion = out.outputs[0]
    assert completion.logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    assert all(entry.rank == 1 and len(entry.top_ids) == 3 for entry in completion.logprobs)  # greedy
    assert completion.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in completion.logprobs))
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    assert [entry.token_id for entry in out.prompt_logprobs[1:] if entry] == out.prompt_token_ids[1:]
    assert llm.generate("hello there", GREEDY)[0].outputs[0].logprobs is None


def test_the_next_token_is_the_most_likely_of_the_prompt(llm: LLM) -> None:
    """A continuation fed back as prompt: its tokens have rank 1."""
    [out] = llm.generate("hello", GREEDY)
    longer = out.prompt_token_ids + out.outputs[0].token_ids
    [scored] = llm.generate([longer], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    assert scored.prompt_logprobs is not None
    assert [entry.rank for entry in scored.prompt_logprobs[len(out.prompt_token_ids) :] if entry] == [1] * 24


def test_forbidden_words_do_not_appear(llm: LLM) -> None:
    [free] = llm.generate("hello", GREEDY)
    word = next(piece for piece in free.outputs[0].text if piece.isascii() and piece.isalnum())
    [out] = llm.generate("hello", SamplingParams(temperature=0, max_tokens=24, bad_words=[word]))
    assert out.outputs[0].token_ids != free.outputs[0].token_ids
    spelled = llm.get_tokenizer().encode(word)
    assert not set(spelled) & set(out.outputs[0].token_ids)


def test_min_tokens_holds_back_stop_strings(llm: LLM) -> None:
    [free] = llm.generate("hello", GREEDY)
    stop = free.outputs[0].text[0]
    held = SamplingParams(temperature=0, max_tokens=24, stop=[stop], min_tokens=10)
    assert len(llm.generate("hello", held)[0].outputs[0].token_ids) >= 10


def test_without_detokenizing_there_are_only_ids(llm: LLM) -> None:
    [out] = llm.generate("hello", SamplingParams(temperature=0, max_tokens=24, detokenize=False))
    assert out.outputs[0].text == ""
    assert out.outputs[0].token_ids == llm.generate("hello", GREEDY)[0].outputs[0].token_ids


def test_what_streams_is_the_final_text(llm: LLM) -> None:
    pieces: dict[int, list[str]] = {}
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, stop=["zz"])
    outs = llm.generate(PROMPTS, params, on_text=lambda index, piece: pieces.setdefault(index, []).append(piece))
    assert {index: "".join(texts) for index, texts in pieces.items()} == {
        index: out.outputs[0].text for index, out in enumerate(outs) if out.outputs[0].text
    }
    assert max(map(len, pieces.values())) > 5


def test_chat_renders_the_template(llm: LLM) -> None:
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "hello"}]
    [out] = llm.chat(messages, GREEDY)
    assert out.prompt == "system: short\nuser: hello\nassistant:"
    several = llm.chat([messages, messages[1:]], GREEDY)
    assert several[0].outputs == out.outputs
    assert several[1].prompt == "user: hello\nassistant:"
    long = llm.chat(messages)[0]  # without a limit: until the end token or the end of the context
    length = len(long.prompt_token_ids) + len(long.outputs[0].token_ids)
    ended = long.outputs[0].token_ids[-1] == EOS
    assert (long.outputs[0].finish_reason == "stop") if ended else (length == llm.config.max_model_len)


def test_the_same_prompt_again_comes_from_the_cache(llm: LLM) -> None:
    prompt = "a prompt of several blocks " * 8
    [cold] = llm.generate(prompt, GREEDY)
    [warm] = llm.generate(prompt, GREEDY)
    assert warm.num_cached_tokens > 0
    assert warm.outputs == cold.outputs


@pytest.mark.parametrize(
    ("prompts", "params", "field"),
    [
        ("", GREEDY, "prompt"),
        ([[]], GREEDY, "prompt"),
        ([[1, 2, 1 << 20]], GREEDY, "prompt"),
        ([[-1]], GREEDY, "prompt"),
        ([[1.5]], GREEDY, "prompt"),
        ([True], GREEDY, "prompt"),
        ([5, 6], GREEDY, "prompt"),
        ([b"bytes"], GREEDY, "prompt"),
        (["half \ud800"], GREEDY, "prompt"),
        (["a", "b"], [GREEDY], "params"),
        (["a"], [{"temperature": 0}], "params"),
        ("hello", SamplingParams(max_tokens=4096), "max_tokens"),
        ("hello", SamplingParams(stop_token_ids=[1 << 20]), "stop_token_ids"),
        ("hello", SamplingParams(logit_bias={1 << 20: 1}), "logit_bias"),
        ("hello", SamplingParams(top_k=100_000), "top_k"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(llm: LLM, prompts: object, params: object, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, params)  # type: ignore[arg-type]
    assert caught.value.param == field
    assert llm.generate("hello", GREEDY)[0].finished


def test_one_bad_prompt_among_good_ones_runs_nothing(llm: LLM) -> None:
    told: list[str] = []
    with pytest.raises(ContextLengthError):
        llm.generate(["hello", "x" * 10_000], GREEDY, on_text=lambda index, piece: told.append(piece))
    assert told == []


def test_an_empty_conversation_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="messages"):
        llm.chat([])


def idle(llm: LLM) -> bool:
    """Whether the engine holds nothing any more."""
    stats = llm._assembly.engine.stats()
    return stats.num_running == stats.num_waiting == 0


def until_idle(llm: LLM) -> None:
    deadline = time.monotonic() + 10
    while not idle(llm):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_exception_while_streaming_leaves_a_usable_engine(llm: LLM) -> None:
    def leave(index: int, piece: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=500), on_text=leave)
    until_idle(llm)
    assert llm.generate("hello", GREEDY)[0].outputs == llm.generate("hello", GREEDY)[0].outputs


def test_ctrl_c_leaves_a_usable_engine(llm: LLM) -> None:
    before = llm.generate("hello", GREEDY)[0].outputs
    seen: list[str] = []

    def interrupt(index: int, piece: str) -> None:
        seen.append(piece)
        if len(seen) == 3:
            _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello"] * 8, SamplingParams(temperature=0, max_tokens=1500), on_text=interrupt)
    until_idle(llm)
    assert llm.generate("hello", GREEDY)[0].outputs == before


def test_threads_take_turns(llm: LLM) -> None:
    expected = [llm.generate(prompt, GREEDY)[0].outputs for prompt in PROMPTS]
    got: dict[int, object] = {}

    def ask(number: int) -> None:
        got[number] = llm.generate(PROMPTS[number], GREEDY)[0].outputs

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(len(PROMPTS))] == expected


def test_more_prompts_than_the_queue_holds(path: Path) -> None:
    knobs = {"max_num_queued_reqs": 2, "max_num_queued_tokens": 64, "max_num_seqs": 2, "num_threads": 1}
    prompts = [f"hello {number} " * (1 + number % 7) for number in range(24)]
    with LLM(str(path), **knobs) as small:
        outs = small.generate(prompts, SamplingParams(temperature=0, max_tokens=4))
        assert [out.prompt for out in outs] == prompts
        assert [len(out.outputs[0].token_ids) for out in outs] == [4] * 24
        assert idle(small)


def lasting_threads() -> set[threading.Thread]:
    """Without those that read weights ahead of a start, and end by themselves."""
    return {thread for thread in threading.enumerate() if thread.name != "setpoint-read-ahead"}


def test_closing_twice_and_using_it_afterwards(path: Path) -> None:
    llm = LLM(str(path), num_threads=1)
    threads = lasting_threads()
    llm.close()
    llm.close()
    assert len(threads - lasting_threads()) == 1
    with pytest.raises(EngineDeadError):
        llm.generate("hello", GREEDY)


def test_an_engine_that_nobody_closes_ends_with_its_last_reference(path: Path) -> None:
    llm = LLM(str(path), num_threads=1)
    engine = llm._assembly.engine
    del llm
    gc.collect()
    with pytest.raises(EngineDeadError):
        engine.check_alive()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"max_modellen": 64}, "max_modellen is not supported; did you mean max_model_len"),
        ({"tensor_parallel_size": 1}, "tensor_parallel_size is not supported"),
        ({"trust_remote_code": True}, "trust_remote_code is not supported"),
        ({"max_model_len": 1}, "--max-model-len is 1; it must be at least 16"),
        ({"max_model_len": 4096}, "longer than the model's context of 2048"),
        ({"num_threads": "2"}, "--num-threads"),
    ],
)
def test_a_knob_that_cannot_be_is_a_config_error(path: Path, knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(str(path), **knobs)


def test_a_model_that_is_nowhere() -> None:
    with pytest.raises(ModelNotFoundError):
        LLM("./nowhere.gguf")
    with pytest.raises(ConfigError, match="either a model or a config"):
        LLM()


REPEATED = "one two three four, one two three four, one two three four, one two"


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_every_method_of_speculation_gives_the_same_output(path: Path, params: SamplingParams) -> None:
    outputs = []
    for config in ("off", "auto", {"method": "draft", "model": str(path), "num_speculative_tokens": 4}):
        with LLM(str(path), num_threads=1, max_model_len=256, speculative_config=config) as made:
            outputs.append([out.outputs for out in made.generate([REPEATED, *PROMPTS[:3]], params)])
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_draft_model_with_another_vocabulary_is_refused(path: Path, smollm2_path: Path) -> None:
    with pytest.raises(ConfigError, match="another vocabulary"):
        LLM(str(path), speculative_config={"model": str(smollm2_path)})


def test_a_draft_model_that_cannot_be_loaded_leaves_nothing_running(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[CpuRunner] = []

    def out_of_memory(runner: CpuRunner) -> None:
        loaded.append(runner)
        wait(runner)
        if len(loaded) == 2:
            raise MemoryError

    wait = CpuRunner.wait_for_weights
    monkeypatch.setattr(CpuRunner, "wait_for_weights", out_of_memory)
    before = lasting_threads()
    config = {"method": "draft", "model": str(path)}
    with pytest.raises(MemoryError):
        LLM(str(path), num_threads=1, speculative_config=config, kv_disk_path=str(tmp_path / "kv"))
    assert (tmp_path / "kv").is_dir()
    assert lasting_threads() <= before
    assert [hasattr(runner, "program") for runner in loaded] == [False, False]


def test_a_draft_model_shares_the_memory_of_the_cache(path: Path) -> None:
    with pytest.raises(ConfigError, match="too small for two models"):
        LLM(str(path), max_model_len=512, kv_cache_memory_bytes=200_000, speculative_config={"model": str(path)})


# --- sessions ----------------------------------------------------------------------------------------------------


def lengthened(llm: LLM, number: int, length: int = 96) -> list[int]:
    vocabulary = llm.get_tokenizer()
    return [(31 * number + 7 * i) % (len(vocabulary) - 10) + 5 for i in range(length)]


def test_what_a_session_had_outlives_what_others_had(path: Path) -> None:
    with LLM(str(path), num_threads=1, max_model_len=256, kv_cache_memory_bytes=1 << 18) as small:
        kept = lengthened(small, 0)

        def cached_after_others(session_id: str | None) -> int:
            small.generate([kept], GREEDY, session_id=session_id)
            for number in range(1, 40):
                small.generate([lengthened(small, number)], GREEDY)
            return small.generate([[*kept, 9, 9]], GREEDY, session_id=session_id)[0].num_cached_tokens

        assert cached_after_others(None) == 0
        assert cached_after_others("agent") == 96
        assert small.delete_session("agent")
        assert not small.delete_session("agent")


def test_a_session_says_where_its_prompt_changed(llm: LLM) -> None:
    first, second = lengthened(llm, 50), lengthened(llm, 51)
    changed = [*first[:40], 3, *first[41:]]
    plain = llm.generate([first, second], GREEDY)
    named = llm.generate([first, second], GREEDY, session_id=["one", None])
    assert [out.outputs for out in named] == [out.outputs for out in plain]
    [out] = llm.generate([changed], GREEDY, session_id="one")
    assert out.prefix_divergence is not None
    assert (out.prefix_divergence.cause, out.prefix_divergence.token_index) == ("text", 40)
    assert llm.generate([changed], GREEDY)[0].prefix_divergence is None


@pytest.mark.parametrize("bad", ["", "x" * 129, ["one"], ["one", ""], ["one", 7]])
def test_a_session_that_is_none_is_refused_by_name(llm: LLM, bad: Any) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(["hello", "there"], GREEDY, session_id=bad)
    assert caught.value.param == "session_id"


def test_a_chat_has_a_session(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    submit = llm._assembly.engine.submit
    monkeypatch.setattr(
        llm._assembly.engine, "submit", lambda request: (seen.append(request.session_id), submit(request))
    )
    llm.chat([[{"role": "user", "content": "hello"}]] * 2, GREEDY, session_id=["a", None])
    assert sorted(seen) == ["", "a"]
