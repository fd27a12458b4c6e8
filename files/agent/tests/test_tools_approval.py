"""The answers to a question for approval, in each form that clients send."""

from typing import Any

import pytest

from agent.errors import InvalidRequest
from agent.tools.approval import Approval, check_answer


@pytest.mark.parametrize(
    ("answer", "approve", "reason"),
    [
        ({"approve": True}, True, None),
        ({"approve": False, "reason": "no"}, False, "no"),
        ({"decisions": [{"type": "approve"}]}, True, None),
        ({"decisions": [{"type": "reject", "message": "no"}]}, False, "no"),
        ([{"type": "accept", "args": None}], True, None),
        ([{"type": "accept", "args": {"action": "x", "args": {}}}], True, None),
        ([{"type": "ignore", "args": None}], False, None),
        ([{"type": "response", "args": "do something else"}], False, "do something else"),
        ({"type": "approve"}, True, None),
        ([{"approve": True}], True, None),
    ],
)
def test_forms(answer: Any, approve: bool, reason: str | None) -> None:
    check_answer(answer)
    read = Approval.model_validate(answer)
    assert (read.approve, read.reason) == (approve, reason)


@pytest.mark.parametrize(
    "answer",
    [
        "yes",
        None,
        True,
        [],
        {},
        {"decisions": []},
        {"decisions": [{"type": "approve"}, {"type": "approve"}]},
        {"decisions": [{"type": "approve"}], "more": 1},
        {"decisions": [{"type": "edit", "edited_action": {"name": "x", "args": {}}}]},
        [{"type": "edit", "args": {"action": "x", "args": {}}}],
        [{"type": "accept"}, {"type": "accept"}],
        {"approve": "yes"},
        {"type": "perhaps"},
    ],
)
def test_what_is_none(answer: Any) -> None:
    with pytest.raises(InvalidRequest, match="must be"):
        check_answer(answer)
