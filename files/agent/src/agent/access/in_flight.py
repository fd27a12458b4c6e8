"""How much of large answers may be on the way to one owner's clients at once.

A client that asks and does not read leaves its answer in this process. Small ones fit the buffers of the connection.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from agent.errors import MIB, RateLimited

SMALL_BYTES = 64 * 1024
# From here on, reading costs as much as a turn: it is counted like one, and few do it at once.
LARGE_BYTES = MIB
LOADING = 2
MAX_BYTES = 32 * MIB
# For how long a client may read nothing of a large answer.
STALL_SECONDS = 30.0


class InFlight:
    def __init__(self) -> None:
        self._sent: Counter[str] = Counter()
        # Held while something large is read and made into an answer.
        self.loading = asyncio.Semaphore(LOADING)

    @contextmanager
    def of(self, owner: str, size: int) -> Iterator[None]:
        """While an answer of so many bytes is sent. Raises RateLimited where too many are not read yet."""
        if size <= SMALL_BYTES:
            yield
            return
        if self._sent[owner] and self._sent[owner] + size > MAX_BYTES:
            raise RateLimited("Too many large answers are on their way and not read yet. Try again later.", retry_after=1)
        self._sent[owner] += size
        try:
            yield
        finally:
            self._sent[owner] -= size
            if not self._sent[owner]:
                del self._sent[owner]
