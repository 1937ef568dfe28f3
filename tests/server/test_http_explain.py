"""Explanations over HTTP: complete, for their owner only, while a request runs and after; the command that draws."""

from __future__ import annotations

import json
from typing import Any

import pytest
from house import House, completion, until

from setpoint.cli.main import main
from setpoint.engine.scheduler import SchedulerLimits
from setpoint.server.auth import KeyRing

ALICE, BOB = "alice-key-1", "bob-key-22"


def headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def house() -> Any:
    with House(keys=KeyRing([ALICE, BOB]), step_s=0.005, limits=SchedulerLimits(1, 64)) as opened:
        yield opened


def explained(house: House, request_id: str, key: str = ALICE) -> dict[str, Any]:
    response = house.get(f"/v1/requests/{request_id}/explain", headers=headers(key))
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def ask(house: House, prompt: str = "hello", **fields: Any) -> str:
    response = house.post("/v1/completions", completion(prompt, **fields), headers=headers(ALICE))
    assert response.status_code == 200, response.text
    request_id: str = response.json()["id"]
    return request_id


def assert_covers(document: dict[str, Any]) -> None:
    at = 0.0
    for span in document["path"]:
        assert span["start_s"] == pytest.approx(at, abs=1e-6)
        assert sum(span["parts"].values()) == pytest.approx(span["end_s"] - span["start_s"], abs=1e-6)
        at = span["end_s"]
    assert at == pytest.approx(document["e2e_s"], abs=1e-6)
    assert sum(document["causes"].values()) == pytest.approx(document["e2e_s"], abs=1e-5)


def test_a_finished_request_is_covered_from_its_arrival_to_its_answer(house: House) -> None:
    request_id = ask(house, "a longer prompt " * 10, max_tokens=6, ignore_eos=True)
    until(lambda: explained(house, request_id)["state"] == "finished")
    document = explained(house, request_id)
    assert_covers(document)
    assert explained(house, request_id) == document  # nothing moves any more
    kinds = [span["kind"] for span in document["path"]]
    assert kinds[0] == "prepare"
    assert kinds[-3:] == ["prefill", "decode", "delivery"]
    assert document["tokens"]["output"] == 6
    prefill = document["path"][kinds.index("prefill")]
    assert prefill["tokens"] == document["tokens"]["prompt"] > 64
    assert prefill["steps"] == 3
    assert 0 < document["ttft_s"] < document["e2e_s"]
    assert (document["finish_reason"], document["ending"], document["num_choices"]) == ("length", "ok", 1)
    assert 1 <= len(document["advice"]) <= 3
    assert all(any(character.isdigit() for character in sentence) for sentence in document["advice"])


def test_a_running_request_is_explained_and_so_is_one_that_waits_for_its_place(house: House) -> None:
    body = completion("go", max_tokens=400, ignore_eos=True, stream=True)
    with house.client() as client, client.stream("POST", "/v1/completions", json=body, headers=headers(ALICE)) as one:
        lines = one.iter_lines()  # closes the connection when it is gone
        first = json.loads(next(lines).removeprefix("data: "))["id"]
        running = explained(house, first)
        assert_covers(running)
        assert (running["state"], running["finish_reason"], running["path"][-1]["kind"]) == ("running", None, "decode")
        second_body = completion("wait", max_tokens=2)
        waiting = house.post("/v1/completions", second_body, headers=headers(ALICE))
        until(lambda: explained(house, waiting.json()["id"])["state"] == "finished")
        document = explained(house, waiting.json()["id"])
        assert explained(house, first)["state"] == "finished"
        assert list(lines)[-2] == "data: [DONE]"
    assert_covers(document)
    assert max(document["causes"], key=document["causes"].get) == "places"
    assert "--max-num-seqs (now 1)" in document["advice"][0]


def test_only_the_key_that_asked_may_read(house: House) -> None:
    request_id = ask(house, max_tokens=1)
    unknown = house.get("/v1/requests/cmpl-never/explain", headers=headers(BOB))
    others = house.get(f"/v1/requests/{request_id}/explain", headers=headers(BOB))
    assert unknown.status_code == others.status_code == 404
    assert unknown.json() == others.json()
    assert house.get(f"/v1/requests/{request_id}/explain").status_code == 401
    assert house.get(f"/v1/requests/{'x' * 300}/explain", headers=headers(ALICE)).status_code == 404
    assert house.get("/v1/requests/a%20b/explain", headers=headers(ALICE)).status_code == 404


def test_several_prompts_are_told_by_the_last_to_end(house: House) -> None:
    request_id = ask(house, ["one", "two"], max_tokens=3, n=2, ignore_eos=True, temperature=1)
    until(lambda: explained(house, request_id)["state"] == "finished")
    document = explained(house, request_id)
    assert document["num_choices"] == 4
    assert document["choice"] == 3  # one place: they run one after the other
    assert_covers(document)


def test_a_session_that_diverged_is_named_without_its_text(house: House) -> None:
    ask(house, "the first text of a session " * 4, max_tokens=1, session_id="s")
    request_id = ask(house, "the first text of a SECRET " * 4, max_tokens=1, session_id="s")
    document = explained(house, request_id)
    assert document["prefix_divergence"]["cause"] == "text"
    assert "SECRET" not in json.dumps(document)


def test_the_command_draws_what_the_server_says(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    request_id = ask(house, max_tokens=5, ignore_eos=True)
    until(lambda: explained(house, request_id)["state"] == "finished")
    assert main(["explain", request_id, "--url", house.url, "--api-key", ALICE]) == 0
    shown = capsys.readouterr().out
    assert request_id in shown
    assert "decode" in shown
    assert "█" in shown
    assert shown.splitlines()[-1].startswith("- ")
    assert main(["explain", request_id, "--url", house.url + "/v1/", "--api-key", ALICE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == explained(house, request_id)


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["cmpl-never", "--api-key", ALICE], 1, "knows no request"),
        (["cmpl-never"], 1, "wants a key"),
        (["a b", "--api-key", ALICE], 2, "REQUEST_ID"),
        (["cmpl-x", "--url", "http://127.0.0.1:9"], 1, "no server answers"),
        (["cmpl-x", "--url", "nonsense"], 2, "--url"),
    ],
)
def test_what_cannot_be_explained_is_one_line(
    house: House,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    word: str,
) -> None:
    monkeypatch.delenv("SETPOINT_API_KEY", raising=False)
    if "--url" not in arguments:
        arguments = [*arguments, "--url", house.url]
    assert main(["explain", *arguments]) == code
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1
