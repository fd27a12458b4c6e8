from datetime import UTC, datetime

import pytest
from langchain_core.tools import ToolException

from agent.tools.clock import current_time


@pytest.mark.parametrize("zone", ["UTC", "utc", " UTC ", "Europe/Berlin", "europe/berlin", "America/Argentina/Ushuaia"])
def test_known_zones(zone: str) -> None:
    time = datetime.fromisoformat(current_time(zone).split()[0])
    assert abs((time - datetime.now(UTC)).total_seconds()) < 5


def test_it_says_day_and_zone() -> None:
    assert current_time("asia/tokyo").endswith(" (Asia/Tokyo)")
    assert current_time("UTC").split()[1] in "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"


@pytest.mark.parametrize(
    "zone",
    [
        "",
        "Mars/Olympus",
        "../../etc/passwd",
        "/etc/passwd",
        "Europe/../../etc/passwd",
        "Europe",
        "posix/UTC\0",
        "x" * 9999,
    ],
)
def test_others_are_refused(zone: str) -> None:
    with pytest.raises(ToolException, match="IANA"):
        current_time(zone)
