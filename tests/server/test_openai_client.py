"""The official OpenAI client against the server."""

from __future__ import annotations

import openai
import pytest
from house import MODEL, House, story

MESSAGES = [{"role": "user", "content": "tell me"}]


@pytest.fixture(scope="module")
def teller():
    with House(next_token=story) as house:
        yield house


def test_chat(teller: House) -> None:
    answer = teller.openai().chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=20)
    expected = teller.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 20}).json()
    assert answer.choices[0].message.content == expected["choices"][0]["message"]["content"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 20


def test_chat_stream(teller: House) -> None:
    client = teller.openai()
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=40)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_completion_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 40


def test_several_choices_stop_and_logprobs(teller: House) -> None:
    client = teller.openai()
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=2, stop="upon", max_completion_tokens=300)
    assert len(answer.choices) == 2
    assert all(choice.finish_reason == "stop" and "upon" not in choice.message.content for choice in answer.choices)
    scored = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, max_completion_tokens=3
    )
    assert [len(entry.top_logprobs) for entry in scored.choices[0].logprobs.content] == [2, 2, 2]


def test_completions_and_models(teller: House) -> None:
    client = teller.openai()
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=5, logprobs=1)
    assert len(answer.choices) == 2
    assert len(answer.choices[0].logprobs.tokens) == 5
    assert MODEL in [model.id for model in client.models.list()]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"temperature": 3}, openai.BadRequestError),
        ({"model": "other"}, openai.NotFoundError),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError),
    ],
)
def test_errors_raise(teller: House, fields: dict, error: type[Exception]) -> None:
    client = teller.openai(max_retries=2)
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 2, **fields})
    assert raised.value.body["param"] in ("temperature", "model", "tools")
    assert raised.value.body["message"]


def test_missing_feature_is_asked_for_once(teller: House) -> None:
    name = 'setpoint_requests_rejected_total{engine="0",model_name="tiny",reason="not_supported"}'
    before = teller.metrics().get(name, 0)
    with pytest.raises(openai.InternalServerError):
        teller.openai(max_retries=2).completions.create(model=MODEL, prompt="x", extra_body={"use_beam_search": True})
    assert teller.metrics()[name] == before + 1


def test_error_event_raises() -> None:
    """ST-2: a failure after the first token reaches the client as an exception, every time."""

    def fail_late(context: list[int]) -> int:
        if context[-4:] == [ord("a")] * 4:
            raise RuntimeError("broken")
        return ord("a")

    with House(next_token=fail_late, step_s=0.002) as house:
        client = house.openai(max_retries=2)
        for number in range(100):
            if number % 2:
                stream = client.completions.create(model=MODEL, prompt="x" * 30, max_tokens=100, stream=True)
            else:
                question = [{"role": "user", "content": "x" * 20}]
                stream = client.chat.completions.create(model=MODEL, messages=question, max_tokens=100, stream=True)
            assert next(stream).choices
            with pytest.raises(openai.APIError, match="failed while serving"):
                list(stream)
