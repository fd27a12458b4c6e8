"""The current time, which a model cannot know."""

import functools
from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo, available_timezones

from langchain_core.tools import BaseTool, StructuredTool, ToolException


@functools.cache
def _zones() -> dict[str, str]:
    return {name.lower(): name for name in available_timezones() if "/" in name}


def current_time(zone: str) -> str:
    name = "UTC"
    place: tzinfo = UTC
    if zone.strip().upper() != "UTC":
        # ZoneInfo looks a name up as a path below the zone database: it gets only names that are known to be there.
        known = _zones().get(zone.strip().lower())
        if known is None:
            raise ToolException("the zone must be UTC or a name of the IANA time zone database such as Europe/Berlin")
        name, place = known, ZoneInfo(known)
    now = datetime.now(place)
    return f"{now.isoformat(timespec='seconds')} {now:%A} ({name})"


def clock_tool() -> BaseTool:
    async def run(zone: str = "UTC") -> str:
        return current_time(zone)

    return StructuredTool.from_function(
        coroutine=run,
        name="current_time",
        description="Get the current date, time and day of the week in a time zone such as UTC or Europe/Berlin.",
        handle_tool_error=True,
        metadata={"idempotent": True},
    )
