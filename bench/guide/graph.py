"""The graph of the peers: a ReAct loop of a model and two tools, by hand.

The scripted model of the bench never calls a tool; the tools are here for their descriptions, which go out with each request.
"""

from __future__ import annotations

import os
from typing import Any

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode


@tool
def search(query: str) -> str:
    """Search the web for current information. Use this when you need up-to-date facts, news or data not in your training set."""
    return f"Nothing was found for: {query}"


@tool
def calculate(expression: str) -> str:
    """Evaluate a mathematical expression. The input should be an expression like '2 + 2' or 'sqrt(144)'."""
    return f"Cannot evaluate: {expression}"


TOOLS = [search, calculate]
MODEL = ChatOpenAI(
    base_url=os.environ["VLLM_BASE_URL"],
    api_key=lambda: "not-needed",
    model=os.environ["VLLM_MODEL"],
    temperature=0.7,
    max_completion_tokens=2048,
).bind_tools(TOOLS)


async def agent(state: MessagesState) -> dict[str, Any]:
    return {"messages": [await MODEL.ainvoke(state["messages"])]}


def after_agent(state: MessagesState) -> str:
    return "tools" if getattr(state["messages"][-1], "tool_calls", None) else END


def build() -> StateGraph[Any, Any, Any, Any]:
    graph: StateGraph[Any, Any, Any, Any] = StateGraph(MessagesState)
    graph.add_node("agent", agent)
    graph.add_node("tools", ToolNode(TOOLS))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", after_agent, ["tools", END])
    graph.add_edge("tools", "agent")
    return graph


# What langgraph.json names: `langgraph dev` brings a checkpointer of its own.
graph = build().compile()
