"""A ReAct agent as a service."""

import os

# LangGraph reads this once, at import: without it a checkpoint row can name any class to be constructed.
os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")
