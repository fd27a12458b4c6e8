"""Schedules as cron writes them: five fields, to the minute, in a time zone."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo, available_timezones

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
# Name, least and greatest value, and the words for values from the least on.
FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, MONTHS),
    ("day of the week", 0, 7, DAYS),
)
NAMED = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
PART = re.compile(r"(?:(\*)|([0-9]{1,2}|[a-z]{3})(?:-([0-9]{1,2}|[a-z]{3}))?)(?:/([0-9]{1,2}))?")
# Clocks are never set by more than this.
SHIFT = timedelta(hours=3)
# The 29th of February may be eight years away.
YEARS_DAYS = 366 * 9


@dataclass(frozen=True, slots=True)
class Schedule:
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    # 0 is Sunday.
    weekdays: frozenset[int]
    # Both kinds of days are given, and either is enough.
    either: bool
    # The hours are not chosen: it goes on through hours that come twice, and has none in those that are skipped.
    through: bool
    zone: ZoneInfo

    def after(self, moment: datetime) -> datetime | None:
        """The first time after this moment, in UTC, or None where there is none in years.

        Where hours are chosen, a time that the clocks skip comes as much later, and one that comes twice counts once.
        """
        found: datetime | None = None
        until: datetime | None = None
        for wall in self._walls(moment.astimezone(self.zone).replace(tzinfo=None) - SHIFT):
            if until is not None and wall > until:
                break
            for instant in self._instants(wall):
                if instant > moment and (found is None or instant < found):
                    found = instant
                    until = until or wall + SHIFT
        return found

    def _walls(self, start: datetime) -> Iterator[datetime]:
        """What a clock on the wall shows, in order, from its start on."""
        midnight = start.replace(hour=0, minute=0, second=0, microsecond=0)
        for _ in range(YEARS_DAYS):
            if self._is_on(midnight):
                for hour in self.hours:
                    for minute in self.minutes:
                        wall = midnight.replace(hour=hour, minute=minute)
                        if wall >= start:
                            yield wall
            midnight += timedelta(days=1)

    def _is_on(self, day: datetime) -> bool:
        if day.month not in self.months:
            return False
        of_month, of_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return of_month or of_week if self.either else of_month and of_week

    def _instants(self, wall: datetime) -> list[datetime]:
        first, second = (wall.replace(tzinfo=self.zone, fold=fold).astimezone(UTC) for fold in (0, 1))
        if not self.through:
            return [first]
        return [each for each in dict.fromkeys((first, second)) if each.astimezone(self.zone).replace(tzinfo=None) == wall]


def parse(text: str, timezone: str | None = None) -> Schedule:
    """Raises ValueError with a sentence for whoever wrote it."""
    fields = NAMED.get(text.strip().lower(), text).lower().split()
    if len(fields) != len(FIELDS):
        names = ", ".join(name for name, *_ in FIELDS)
        raise ValueError(f"schedule: must have five fields ({names}) or be one of {', '.join(NAMED)}. A minute is the shortest time.")
    if timezone is not None and timezone not in _zones():
        raise ValueError("timezone: must be a name of the IANA database, such as Europe/Berlin.")
    minutes, hours, days, months, weekdays = (_values(field, *form) for field, form in zip(fields, FIELDS, strict=True))
    schedule = Schedule(
        minutes=tuple(sorted(minutes)),
        hours=tuple(sorted(hours)),
        days=days,
        months=months,
        weekdays=frozenset(day % 7 for day in weekdays),
        either=not fields[2].startswith("*") and not fields[4].startswith("*"),
        through=fields[1].startswith("*"),
        zone=ZoneInfo(timezone or "UTC"),
    )
    # No year has a 31st of February. 2000 had all the days that there are.
    if schedule.after(datetime(1999, 12, 31, tzinfo=UTC)) is None:
        raise ValueError("schedule: there is no such day.")
    return schedule


def _values(text: str, name: str, least: int, most: int, words: tuple[str, ...]) -> frozenset[int]:
    def number(word: str) -> int:
        value = words.index(word) + least if word in words else int(word) if word.isdecimal() else -1
        if not least <= value <= most:
            raise ValueError(problem)
        return value

    known = f", or {words[0]} to {words[-1]}" if words else ""
    problem = f"schedule: the {name} must be *, or numbers from {least} to {most}{known}, as in 1,5-7 or */2."
    found: set[int] = set()
    for part in text.split(","):
        match = PART.fullmatch(part)
        if match is None:
            raise ValueError(problem)
        star, first, last, step = match.groups()
        low = least if star else number(first)
        high = number(last) if last else most if star or step else low
        if low > high or step == "0" or step == "00":
            raise ValueError(problem)
        found |= set(range(low, high + 1, int(step or 1)))
    return frozenset(found)


@lru_cache(maxsize=1)
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())
