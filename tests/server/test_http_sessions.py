"""Sessions over HTTP: kept, deleted by their owner, and told where a prompt diverged without telling anybody else."""

from __future__ import annotations

from typing import Any

import pytest
from house import House, completion, until

from setpoint.server.auth import KeyRing

ALICE, BOB = "alice-key-1", "bob-key-22"
SECRET = "the launch code is 7301 and nobody must know it, not even in passing"


def headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def usage(house: House, prompt: str, key: str = ALICE, **fields: Any) -> dict[str, Any]:
    response = house.post(
        "/v1/completions", completion(prompt, max_tokens=4, temperature=0, **fields), headers=headers(key)
    )
    assert response.status_code == 200, response.text
    assert "X-Setpoint-Ignored-Params" not in response.headers
    details: dict[str, Any] = response.json()["usage"]["prompt_tokens_details"]
    return details


@pytest.fixture
def house() -> Any:
    with House(keys=KeyRing([ALICE, BOB])) as opened:
        yield opened


def delete(house: House, session_id: str, key: str = ALICE) -> Any:
    with house.client() as client:
        return client.delete(f"/v1/sessions/{session_id}", headers=headers(key))


def test_a_session_is_deleted_once_and_by_its_owner(house: House) -> None:
    usage(house, "hello agent", session_id="a.b:c-1")
    missing = delete(house, "a.b:c-1", BOB)
    assert missing.status_code == 404
    assert missing.json()["error"] == {
        "message": "There is no such session.",
        "type": "NotFoundError",
        "param": "session_id",
        "code": 404,
        "reason": "not_found",
    }
    assert delete(house, "a.b:c-1").json() == {"id": "a.b:c-1", "object": "session", "deleted": True}
    assert delete(house, "a.b:c-1").status_code == 404
    assert delete(house, "never%20seen").status_code == 404
    assert delete(house, "x" * 300).status_code == 404
    with house.client() as client:
        assert client.delete("/v1/sessions/x").status_code == 401
        assert client.get("/v1/sessions/x", headers=headers(ALICE)).status_code == 405


@pytest.mark.parametrize("bad", ["", "a b", "ä", "x" * 129, 7, ["a"]])
def test_a_malformed_session_id_is_refused(house: House, bad: object) -> None:
    response = house.post("/v1/completions", completion("hi", session_id=bad), headers=headers(ALICE))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "session_id"


def test_a_diverging_prompt_is_shown_to_its_owner_only(house: House) -> None:
    before = usage(house, SECRET, session_id="agent")
    assert "prefix_divergence" not in before
    changed = SECRET.replace("7301", "9999")
    shown = usage(house, changed, session_id="agent")["prefix_divergence"]
    assert shown["cause"] == "text"
    assert shown["expected"].startswith("7301")
    assert shown["found"].startswith("9999")
    assert shown["lost_tokens"] >= 16
    for key, session_id in ((BOB, "agent"), (ALICE, "another")):
        assert "prefix_divergence" not in usage(house, changed + "!", key, session_id=session_id)
    salted = usage(house, SECRET, session_id="agent", cache_salt="user-2")
    assert salted["prefix_divergence"] == {
        "cause": "salt",
        "token_index": 0,
        "lost_tokens": salted["prefix_divergence"]["lost_tokens"],
    }
    page = house.get("/metrics", headers=headers(ALICE)).text
    assert 'setpoint_prefix_divergences_total{cause="text",engine="0",model_name="tiny"} 1.0' in page


def test_the_log_names_the_place_and_never_the_text(house: House) -> None:
    usage(house, SECRET, session_id="agent")
    usage(house, SECRET.replace("7301", "9999"), session_id="agent")
    until(lambda: sum(line.get("route") == "completions" for line in house.log_lines()) == 2)
    assert [line.get("prefix_divergence") for line in house.log_lines() if line["event"] == "request"] == [None, "text"]
    for word in ("7301", "9999", "launch"):
        assert word not in house.log.getvalue()


def test_a_stream_says_it_with_its_usage(house: House) -> None:
    usage(house, SECRET, session_id="agent")
    body = completion(SECRET.replace("7301", "9999"), max_tokens=2, stream=True, session_id="agent")
    body["stream_options"] = {"include_usage": True}
    text = house.post("/v1/completions", body, headers=headers(ALICE)).text
    assert '"cause":"text"' in text
