from __future__ import annotations

from setpoint.tune.replay.urgency import become_urgent


def _refused() -> str:
    raise PermissionError("not you")


def test_the_first_way_that_is_allowed_is_taken() -> None:
    assert become_urgent([_refused, lambda: "second", lambda: "third"]) == "second"


def test_a_user_without_rights_still_gets_a_client() -> None:
    assert become_urgent([_refused, _refused]) == "none"
