"""What /metrics has before anything happened, and which routes its turns come from."""

import inspect
import re

import pytest
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families

from agent.api import chat, langgraph, openai, responses, runs
from agent.metrics import TURN_ROUTES, TURN_STATUSES, Metrics, failure_codes

SUBMITS = re.compile(r"await _?submit(_stateless)?\(")


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    found = metrics.registry.get_sample_value(name, labels)
    return None if found is None else float(found)


def test_routes_that_ask_for_a_turn() -> None:
    """Those that hand something to the engine: the alert about errors sees no others."""
    routes = [route for module in (chat, langgraph, openai, responses, runs) for route in module.router.routes if isinstance(route, APIRoute)]
    asking = [route for route in routes if SUBMITS.search(inspect.getsource(route.endpoint))]
    assert all(route.methods == {"POST"} for route in asking)
    assert {route.path for route in asking} == set(TURN_ROUTES)


@pytest.mark.parametrize("route", TURN_ROUTES)
@pytest.mark.parametrize("status", TURN_STATUSES)
def test_answers_begin_at_zero(route: str, status: int) -> None:
    assert value(Metrics(), "agent_http_requests_total", method="POST", route=route, status=str(status)) == 0


@pytest.mark.parametrize("outcome", ["ok", "internal_error", "model_failed", "model_unavailable", "shutting_down", "storage_unavailable", "turn_timeout"])
def test_turns_begin_at_zero(outcome: str) -> None:
    assert value(Metrics(), "agent_turns_total", outcome=outcome) == 0


def test_failures_are_those_that_are_not_the_clients() -> None:
    assert set(failure_codes()) == {"internal_error", "model_failed", "model_unavailable", "shutting_down", "storage_unavailable", "turn_timeout"}


def test_tools_begin_at_zero() -> None:
    metrics = Metrics()
    metrics.know_tools(["calculator"])
    assert [value(metrics, "agent_tool_calls_total", tool="calculator", status=status) for status in ("success", "error")] == [0, 0]


def test_all_of_it_can_be_read() -> None:
    assert {family.name for family in text_string_to_metric_families(Metrics().text().decode())} >= {"agent_http_requests", "agent_turns", "agent_model_tokens"}
