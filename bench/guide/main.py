"""The service of the guide: FastAPI, LangGraph and AsyncPostgresSaver, repaired just enough to start.

The repairs: from_conn_string() is a context manager and is entered; the tables are made once, by `python main.py`, because
two workers that run setup() at the same time make each other fail; the versions are those of today.
GUIDE_DURABILITY is async, which is the default that the guide leaves, or sync. /chat/stream is not in the guide: it is what
its author would write first, so that streams have a peer that stores them.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal, cast

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from pydantic import BaseModel

from graph import build

DATABASE_URL = os.environ["DATABASE_URL"]
DURABILITY = cast(Literal["sync", "async"], os.environ.get("GUIDE_DURABILITY", "async"))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncPostgresSaver.from_conn_string(DATABASE_URL) as saver:
        app.state.graph = build().compile(checkpointer=saver)
        yield


app = FastAPI(title="LangGraph Agent", lifespan=lifespan)


class ChatRequest(BaseModel):
    message: str
    thread_id: str | None = None


class ChatResponse(BaseModel):
    response: str
    thread_id: str


def turn(asked: ChatRequest) -> tuple[dict[str, Any], RunnableConfig, str]:
    thread_id = asked.thread_id or str(uuid.uuid4())
    return {"messages": [HumanMessage(content=asked.message)]}, {"configurable": {"thread_id": thread_id}}, thread_id


@app.post("/chat")
async def chat(asked: ChatRequest) -> ChatResponse:
    inputs, config, thread_id = turn(asked)
    try:
        state = await app.state.graph.ainvoke(inputs, config, durability=DURABILITY)
    except Exception as error:
        raise HTTPException(500, str(error)) from error
    return ChatResponse(response=state["messages"][-1].content, thread_id=thread_id)


@app.post("/chat/stream")
async def chat_stream(asked: ChatRequest) -> StreamingResponse:
    inputs, config, thread_id = turn(asked)

    async def events() -> AsyncIterator[str]:
        yield f"data: {json.dumps({'thread_id': thread_id})}\n\n"
        async for chunk, _ in app.state.graph.astream(inputs, config, stream_mode="messages", durability=DURABILITY):
            yield f"data: {json.dumps({'text': chunk.content})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


async def migrate() -> None:
    async with AsyncPostgresSaver.from_conn_string(DATABASE_URL) as saver:
        await saver.setup()


if __name__ == "__main__":
    asyncio.run(migrate())
