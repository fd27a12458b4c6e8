"""The turn that a call of the model belongs to."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """What a call of the model belongs to."""

    deadline: float  # on the event loop's clock
    notify: Callable[[dict[str, str]], None]


# The graph's step sets it. A model called outside of a turn has no deadline and nobody to tell.
TURN: ContextVar[Turn | None] = ContextVar("TURN", default=None)
