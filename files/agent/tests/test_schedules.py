"""When a schedule's times are, by the clocks of its time zone."""

from datetime import UTC, datetime

import pytest

from agent.runs.schedules import parse

# The schedule, its time zone, the moment from which on, and its next times in UTC.
TIMES: list[tuple[str, str | None, str, list[str]]] = [
    ("* * * * *", None, "2026-11-28T10:00:00", ["2026-11-28T10:01", "2026-11-28T10:02"]),
    ("* * * * *", None, "2026-11-28T09:59:59", ["2026-11-28T10:00"]),
    ("*/20 * * * *", None, "2026-11-28T10:00:00", ["2026-11-28T10:20", "2026-11-28T10:40", "2026-11-28T11:00"]),
    ("5/20 * * * *", None, "2026-11-28T10:00:00", ["2026-11-28T10:05", "2026-11-28T10:25", "2026-11-28T10:45"]),
    ("0 9-17/4 * * MON-fri", None, "2026-11-27T14:00:00", ["2026-11-27T17:00", "2026-11-30T09:00"]),
    ("0 0 1,15 * *", None, "2026-11-28T00:00:00", ["2026-12-01T00:00", "2026-12-15T00:00"]),
    # Both kinds of days: either is enough.
    ("0 0 13 * 5", None, "2026-11-10T00:00:00", ["2026-11-13T00:00", "2026-11-20T00:00", "2026-11-27T00:00", "2026-12-04T00:00"]),
    ("0 0 13 * 5", None, "2026-12-11T00:00:00", ["2026-12-13T00:00"]),
    ("0 0 * * 7", None, "2026-11-28T00:00:00", ["2026-11-29T00:00"]),
    ("0 0 * * 0", None, "2026-11-28T00:00:00", ["2026-11-29T00:00"]),
    ("0 0 29 2 *", None, "2096-03-01T00:00:00", ["2104-02-29T00:00"]),
    ("@daily", None, "2026-12-31T12:00:00", ["2027-01-01T00:00"]),
    ("@Yearly", None, "2026-12-31T12:00:00", ["2027-01-01T00:00"]),
    ("  30   8 * jan *  ", None, "2026-11-28T00:00:00", ["2027-01-01T08:30"]),
    ("0 9 * * *", "Asia/Kolkata", "2026-11-28T00:00:00", ["2026-11-28T03:30"]),
    ("0 9 * * *", "Europe/Berlin", "2026-10-24T08:00:00", ["2026-10-25T08:00", "2026-10-26T08:00"]),
    # 2026-03-08 02:30 is skipped in New York: an hour later.
    ("30 2 * * *", "America/New_York", "2026-03-07T12:00:00", ["2026-03-08T07:30", "2026-03-09T06:30"]),
    # 2026-11-01 01:30 comes twice: once.
    ("30 1 * * *", "America/New_York", "2026-10-31T12:00:00", ["2026-11-01T05:30", "2026-11-02T06:30"]),
    # What is due each half hour goes on through both.
    ("*/30 * * * *", "America/New_York", "2026-11-01T05:00:00", ["2026-11-01T05:30", "2026-11-01T06:00", "2026-11-01T06:30", "2026-11-01T07:00"]),
    ("*/30 * * * *", "America/New_York", "2026-03-08T06:00:00", ["2026-03-08T06:30", "2026-03-08T07:00", "2026-03-08T07:30"]),
    # Here clocks are set by half an hour.
    ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T10:00:00", ["2026-04-04T14:45", "2026-04-05T15:15"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "zone", "since", "times"), TIMES)
def test_its_times(text: str, zone: str | None, since: str, times: list[str]) -> None:
    schedule, moment, found = parse(text, zone), datetime.fromisoformat(since).replace(tzinfo=UTC), []
    for _ in times:
        following = schedule.after(moment)
        assert following is not None
        assert following.tzinfo is UTC
        found.append(following.strftime("%Y-%m-%dT%H:%M"))
        moment = following
    assert found == times


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "five fields"),
        ("* * * *", "five fields"),
        ("* * * * * *", "A minute is the shortest"),
        ("@reboot", "five fields"),
        ("60 * * * *", "the minute must be"),
        ("* 24 * * *", "the hour must be"),
        ("* * 0 * *", "the day of the month must be"),
        ("* * * 13 *", "the month must be"),
        ("* * * * 8", "the day of the week must be"),
        ("* * * * mon-", "the day of the week must be"),
        ("* * * foo *", "the month must be"),
        ("*/0 * * * *", "the minute must be"),
        ("5-1 * * * *", "the minute must be"),
        (", * * * *", "the minute must be"),
        ("-1 * * * *", "the minute must be"),
        ("1.5 * * * *", "the minute must be"),
        ("\u0661 * * * *", "the minute must be"),
        ("1e1 * * * *", "the minute must be"),
        ("* * * * L", "the day of the week must be"),
        ("* * * * 5#2", "the day of the week must be"),
        ("0 0 31 2 *", "no such day"),
        ("9" * 150 + " * * * *", "the minute must be"),
    ],
)
def test_bad_schedules(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


@pytest.mark.parametrize("zone", ["", "Mars/Olympus", "../../etc/passwd", "/etc/localtime", "europe/berlin", "+02:00", "UTC+1", "a" * 64])
def test_bad_time_zones(zone: str) -> None:
    with pytest.raises(ValueError, match="timezone: must be a name of the IANA database"):
        parse("@daily", zone)
