"""LangGraph's client, as a user would have it, and what the tests do with it again and again."""

from typing import Any

import psycopg
from langgraph_sdk import get_sync_client
from langgraph_sdk.client import SyncLangGraphClient
from psycopg.rows import dict_row

from agent.keys import create, revoke
from servers import PROXY_SECRET, Agent, Postgres

ASSISTANT_ID = "fe096781-5601-53d2-b2f6-0d3403f7e9ca"


def headers(user: str = "tester") -> dict[str, str]:
    return {"X-Forwarded-User": user, "X-Proxy-Secret": PROXY_SECRET}


def make_key(postgres: Postgres, name: str, limits: dict[str, int] | None = None) -> str:
    """An API key, as the operator makes one."""
    with psycopg.connect(postgres.admin("agent"), row_factory=dict_row) as connection:
        revoke(connection, name)
        key: str = create(connection, name, limits or {})["key"]
    return key


def connect(agent: Agent, user: str = "tester", *, key: str | None = None, url: str | None = None) -> SyncLangGraphClient:
    return get_sync_client(url=url or agent.url, api_key=key, headers=None if key else headers(user))


def say(client: SyncLangGraphClient, thread_id: str | None, text: str, **how: Any) -> Any:
    """Say something and wait for the answer."""
    messages = {"messages": [{"role": "user", "content": text}]}
    return client.runs.wait(thread_id, "agent", input=messages, **how)


def texts(client: SyncLangGraphClient, thread_id: str) -> list[str]:
    return [message["content"] for message in client.threads.get_state(thread_id)["values"]["messages"]]
