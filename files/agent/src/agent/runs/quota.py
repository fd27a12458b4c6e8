"""How much each owner may store. What a thread takes is kept in its row, and added up at most every few seconds.

Between two sums a worker adds what it let through itself, so an owner gets beyond the limit by no more than what the
other workers let through in that time.
"""

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import LiteralString

from agent.errors import MIB, StorageFull
from agent.storage.postgres import Database

KEEP_SECONDS = 5.0
# One who is at the limit deletes something and tries again.
KEEP_FULL_SECONDS = 1.0
MAX_OWNERS = 10_000
# A row with its entries in the indexes.
ROW_BYTES = 500
ITEMS = "items"
MAX_LABEL_BYTES = 200

MEASURED: LiteralString = f"""{ROW_BYTES} + octet_length(threads.metadata::text)
+ (SELECT coalesce(sum(octet_length(c.checkpoint::text) + octet_length(c.metadata::text)), 0) FROM checkpoints c WHERE c.thread_id = threads.thread_id)
+ (SELECT coalesce(sum(octet_length(b.blob)), 0) FROM checkpoint_blobs b WHERE b.thread_id = threads.thread_id)
+ (SELECT coalesce(sum(octet_length(w.blob)), 0) FROM checkpoint_writes w WHERE w.thread_id = threads.thread_id)
+ (SELECT coalesce(sum(octet_length(r.input::text) + coalesce(octet_length(r.result::text), 0)), 0) FROM runs r WHERE r.thread_id = threads.thread_id)
"""
USED: LiteralString = f"""
SELECT (SELECT coalesce(sum(bytes), 0) FROM threads WHERE owner = %(owner)s)
    + (SELECT coalesce(sum(pg_column_size(value) + {ROW_BYTES}), 0) FROM store WHERE prefix ~>=~ %(first)s AND prefix ~<~ %(last)s) AS used
"""


def items_of(owner: str) -> tuple[str, str]:
    """The namespace that all of an owner's items are in. A label takes no dot, and must fit an index."""
    label = owner.replace("%", "%25").replace(".", "%2E")
    if len(label.encode()) > MAX_LABEL_BYTES:
        label = hashlib.sha256(owner.encode()).hexdigest()
    return ITEMS, label


@dataclass(slots=True)
class Known:
    used: int
    until: float


class Quota:
    def __init__(self, database: Database, limit_mib: int) -> None:
        """limit_mib: of each owner, 0 for none"""
        self._database = database
        self._limit = limit_mib * MIB
        self._known: OrderedDict[str, Known] = OrderedDict()

    async def admit(self, owner: str, more: int = 0) -> None:
        """Let an owner store so many bytes more, or raise StorageFull."""
        if not self._limit:
            return
        known = self._known.get(owner)
        if known is None or known.until < time.monotonic():
            known = await self._ask(owner)
        if known.used + more > self._limit:
            raise StorageFull(known.used, more, self._limit)
        known.used += more

    def charge(self, owner: str, more: int) -> None:
        """So many bytes were stored."""
        if (known := self._known.get(owner)) is not None:
            known.used += more

    def forget(self, owner: str) -> None:
        """Something of the owner's was deleted."""
        self._known.pop(owner, None)

    async def _ask(self, owner: str) -> Known:
        first = ".".join(items_of(owner)) + "."
        rows = await self._database.rows(USED, {"owner": owner, "first": first, "last": first[:-1] + "/"})
        used = int(rows[0]["used"])
        known = Known(used, time.monotonic() + (KEEP_SECONDS if used < self._limit else KEEP_FULL_SECONDS))
        self._known[owner] = known
        self._known.move_to_end(owner)
        if len(self._known) > MAX_OWNERS:
            self._known.popitem(last=False)
        return known
