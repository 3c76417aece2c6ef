"""Which days, or hours, does a pull cover, and how is it cut?

A window is from `start` up to, not including, `end`. AppsFlyer takes whole days as dates, both included, and a part of
a day as times, of which the last is not included (so its clients assume). It must not know what is pulled.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


@dataclass(frozen=True)
class Window:
    start: datetime
    end: datetime

    @classmethod
    def of_days(cls, first: date, last: date) -> Window:
        """From the start of `first` to the end of `last`."""
        midnight = datetime.min.time()
        return cls(datetime.combine(first, midnight), datetime.combine(last, midnight) + DAY)

    @property
    def is_of_days(self) -> bool:
        return all((moment.hour, moment.minute, moment.second) == (0, 0, 0) for moment in (self.start, self.end))

    @property
    def day_count(self) -> int:
        """How many days it touches."""
        return (self.last_day - self.start.date()).days + 1

    @property
    def last_day(self) -> date:
        return (self.end - timedelta(seconds=1)).date()

    @property
    def first(self) -> str:
        """As AppsFlyer takes it in `from`."""
        return self.start.strftime("%Y-%m-%d" if self.is_of_days else TIME_FORMAT)

    @property
    def last(self) -> str:
        """As AppsFlyer takes it in `to`."""
        return self.last_day.isoformat() if self.is_of_days else self.end.strftime(TIME_FORMAT)

    @property
    def file_part(self) -> str:
        """For a file's name: 20261101-20261130, or 20261101T1200-20261101T1800."""
        if self.is_of_days:
            return f"{self.start:%Y%m%d}-{self.last_day:%Y%m%d}"
        return f"{self.start:%Y%m%dT%H%M%S}-{self.end:%Y%m%dT%H%M%S}"

    def as_dict(self) -> dict[str, str]:
        return {"from": self.first, "to": self.last}

    def chunks(self, days: int) -> list[Window]:
        """Pieces of at most so many days, counted from the start, so that they are the same whenever it is cut."""
        pieces, start = [], self.start
        while start < self.end:
            end = min(self.end, datetime.combine(start.date(), datetime.min.time()) + days * DAY)
            pieces.append(Window(start, end))
            start = end
        return pieces

    def halves(self) -> list[Window]:
        """Two halves, cut at a midnight or else at a full hour; none where it is an hour or less."""
        length = self.end - self.start
        if length <= HOUR:
            return []
        unit = DAY if self.is_of_days and length > DAY else HOUR
        middle = self.start + max(1, length // unit // 2) * unit
        return [Window(self.start, middle), Window(middle, self.end)]

    def from_day(self, first: date) -> Window:
        """Without what is before that day."""
        return Window(max(self.start, datetime.combine(first, datetime.min.time())), self.end)


def utc_today() -> date:
    return datetime.now(timezone.utc).date()
