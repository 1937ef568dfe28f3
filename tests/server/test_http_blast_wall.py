"""CR-1: an exception at any point, tied to one request, ends that request only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from canary import Canary, assert_clean
from house import House, chat, completion, events, until

from setpoint.server import endpoints, forms, generation, prepare

PATH, CHAT = "/v1/completions", "/v1/chat/completions"
ENGINE_POINTS = ("validate", "schedule", "allocate", "prepare", "forward", "sample", "commit", "deliver")
BOOM = "boom at /work/secret/file.py 0xdeadbeef99"


class Armed:
    """Raises at one engine point for requests that are marked; the mark is what the prompt looks like."""

    def __init__(self) -> None:
        self.point: str | None = None
        self.victims: set[str] = set()

    def __call__(self, point: str, request_id: str) -> None:
        if point == self.point and any(request_id.startswith(victim) for victim in self.victims):
            raise RuntimeError(BOOM)


@pytest.fixture(scope="module")
def armed() -> Armed:
    return Armed()


@pytest.fixture(scope="module")
def house(armed: Armed) -> Iterator[House]:
    with House(faults=armed) as mined:
        yield mined


def assert_500(response: Any) -> None:
    assert response.status_code == 500, response.text
    error = response.json()["error"]
    assert (error["reason"], error["type"]) == ("engine_error", "InternalServerError")
    assert "boom" not in response.text
    assert_clean(response.text)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("point", ENGINE_POINTS)
def test_engine_points(
    house: House, canary: Canary, armed: Armed, monkeypatch: pytest.MonkeyPatch, point: str, streaming: bool
) -> None:
    real_submit = generation.Generation.submit

    def submit(self: generation.Generation) -> None:
        if self.job.prompts[0].text == "victim":
            armed.victims.add(self.job.id)
        real_submit(self)

    monkeypatch.setattr(generation.Generation, "submit", submit)
    armed.point = point
    try:
        for _ in range(3):
            response = house.post(PATH, completion("victim", max_tokens=6, temperature=0, stream=streaming))
            if response.status_code == 200:  # struck after the first token: the stream says so
                assert streaming
                *_, error, done = events(response.text)
                assert error["error"]["reason"] == "engine_error"
                assert done == "[DONE]"
                assert_clean(response.text)
            else:
                assert_500(response)
    finally:
        armed.point = None
        armed.victims.clear()
    assert house.engine.is_alive
    assert house.post(PATH, completion("victim", max_tokens=2)).status_code == 200


def raising(original: Any, strikes: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if strikes(*args, **kwargs):
            raise RuntimeError(BOOM)
        return original(*args, **kwargs)

    return wrapper


def by_text(*args: Any, **kwargs: Any) -> bool:
    return "victim" in repr(args) + repr(kwargs)


SERVER_POINTS = {
    "parse": (endpoints, "parse_object", by_text),
    "wire": (endpoints, "parse", by_text),
    "tokenise": (prepare, "tokenise_text", by_text),
    "render": (prepare, "render", by_text),
    "resolve": (prepare, "_resolve", lambda context, params, ids, param: bytes(ids[1:7]) == b"victim"),
}


@pytest.mark.parametrize("point", SERVER_POINTS)
def test_server_points(house: House, canary: Canary, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    module, name, strikes = SERVER_POINTS[point]
    monkeypatch.setattr(module, name, raising(getattr(module, name), strikes))
    if point == "render":
        assert_500(house.post(CHAT, chat("victim", max_tokens=2)))
    else:
        assert_500(house.post(PATH, completion("victim", max_tokens=2)))


@pytest.mark.parametrize("streaming", [False, True])
def test_detokenise(house: House, canary: Canary, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    real = generation.TextStream

    def make(*args: Any, **kwargs: Any) -> Any:
        text_stream = real(*args, **kwargs)
        if kwargs["stop"] == ("victim",):
            text_stream.push = raising(text_stream.push, lambda *_, **__: True)
        return text_stream

    monkeypatch.setattr(generation, "TextStream", make)
    assert_500(house.post(PATH, completion(max_tokens=500, ignore_eos=True, stop="victim", stream=streaming)))
    until(lambda: house.engine.stats().num_running <= 1)  # the canary's at most


@pytest.mark.parametrize("streaming", [False, True])
def test_serialise(house: House, canary: Canary, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    def strikes(form: Any, *_: Any) -> bool:
        return bool(form._job.prompts[0].text == "victim")

    for name in ("body", "chunk"):
        monkeypatch.setattr(forms.CompletionForm, name, raising(getattr(forms.CompletionForm, name), strikes))
    assert_500(house.post(PATH, completion("victim", max_tokens=500, ignore_eos=True, stream=streaming)))
    until(lambda: house.engine.stats().num_running <= 1)


def test_a_failing_step_hits_its_entry_only(house: House, armed: Armed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests in one batch, one of them struck: every other one is as it is alone."""
    bodies = [completion(f"neighbour {i}", max_tokens=12, temperature=0, ignore_eos=True) for i in range(12)]
    alone = [house.post(PATH, body).json()["choices"] for body in bodies]
    real_submit = generation.Generation.submit

    def submit(self: generation.Generation) -> None:
        if self.job.prompts[0].text == "neighbour 5":
            armed.victims.add(self.job.id)
        real_submit(self)

    monkeypatch.setattr(generation.Generation, "submit", submit)
    armed.point = "forward"
    answers: dict[int, Any] = {}

    def ask(number: int) -> None:
        answers[number] = house.post(PATH, bodies[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    armed.point = None
    for number, answer in answers.items():
        if number == 5:
            assert_500(answer)
        else:
            assert answer.json()["choices"] == alone[number]
