"""The parameters that a run has for the model, as far as the agent has to know them."""

from collections.abc import Mapping, Sequence
from typing import Any


def client_tools(parameters: Mapping[str, Any]) -> frozenset[str]:
    """The names of the tools that the run's client has, and runs itself."""
    return frozenset(tool["function"]["name"] for tool in parameters.get("tools", ()))


def with_own_tools(parameters: Mapping[str, Any], own: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parameters for a call of the model, which is offered the agent's own tools as well.

    It is not where its answer must be a call of the client's or have a form of the client's: a model that is held to a
    form cannot write a call of a tool.
    """
    if not own or "tool_choice" in parameters or "response_format" in parameters or "structured_outputs" in parameters:
        return dict(parameters)
    if "tools" not in parameters:
        return {**parameters, "tools": own}
    theirs = client_tools(parameters)
    return {**parameters, "tools": [*(tool for tool in own if tool["function"]["name"] not in theirs), *parameters["tools"]]}
