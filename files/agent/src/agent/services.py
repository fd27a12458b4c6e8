"""What a worker consists of while it serves: made once by app.py, and handed to the routes by `services(request)`."""

from dataclasses import dataclass

from fastapi import Request
from langgraph.store.base import BaseStore

from agent.access.auth import Authenticator
from agent.access.in_flight import InFlight
from agent.access.rate_limit import RateLimiter
from agent.llm.graph import Agent
from agent.readiness import Readiness
from agent.retention import RetentionMetrics
from agent.runs.assistants import Assistants
from agent.runs.crons import Crons
from agent.runs.engine import Engine
from agent.runs.followers import Followers
from agent.runs.quota import Quota
from agent.runs.threads import Threads
from agent.settings import Settings
from agent.tools.toolbox import Toolbox


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    tools: Toolbox
    graph: Agent
    # Items and memories that outlive threads.
    store: BaseStore
    authenticator: Authenticator
    limiter: RateLimiter
    threads: Threads
    quota: Quota
    assistants: Assistants
    crons: Crons
    answers: InFlight
    engine: Engine
    followers: Followers
    readiness: Readiness
    retention: RetentionMetrics


def services(request: Request) -> Services:
    """Those of the application that this request came to."""
    found: Services = request.app.state.services
    return found
