"""Dates of birth: dates that a word next to them says are one."""

import datetime as dt
import re
from collections.abc import Iterator

from pipelines.data.privacy.spans import Evidence, Span
from pipelines.data.privacy.view import View

# First letters of months in English, German, French, Spanish, Italian, Portuguese, Dutch, Polish.
_MONTHS = {
    start: month
    for month, starts in enumerate(
        (
            *("jan jän ene gen sty", "feb fév fev lut", "mar mär maa", "apr avr abr kwi"),
            *("may mai mag mei maj", "jun juin giu cze", "jul juil lug lip", "aug aoû ago sie"),
            *("sep set wrz", "oct okt ott out paź", "nov lis", "dec dez déc dic gru"),
        ),
        start=1,
    )
    for start in starts.split()
}
_G = r"[ \t\n]{0,3}"
_YEAR = r"(?P<y>(?:18|19|20)\d\d)"
_NAME = r"(?P<month>[^\W\d_]{3,12})\.?"
_DATES = tuple(
    re.compile(rf"(?<!\d){form}(?!\d)", re.IGNORECASE)
    for form in (
        rf"{_YEAR}{_G}[-/.年]{_G}(?P<m>\d{{1,2}}){_G}[-/.月]{_G}(?P<d>\d{{1,2}})(?:{_G}[日号])?",
        rf"(?P<d>\d{{1,2}}){_G}[-/.]{_G}(?P<m>\d{{1,2}}){_G}[-/.]{_G}(?P<y>(?:18|19|20)?\d\d)",
        rf"(?P<d>\d{{1,2}})(?:st|nd|rd|th|er|º|\.)?{_G}(?:of |de |d')?{_G}{_NAME}{_G},?"
        rf"(?:del? )?{_G}{_YEAR}",
        rf"{_NAME}{_G}(?P<d>\d{{1,2}})(?:st|nd|rd|th)?{_G},?{_G}{_YEAR}",
        r"(?P<y>(?:19|20)\d\d)(?P<m>[01]\d)(?P<d>[0-3]\d)",
    )
)
_BEFORE = re.compile(
    r"(?:birth(?:day|[- ]?date)?|(?<![a-z])born|(?<![a-z])d\.?o\.?b\b\.?|geburts(?:datum|tag)"
    r"|(?<![a-z])geb(?:oren|\.)|naissance|(?<![^\W\d_])née?s?|nacimiento|nacid[oa]s?|nascita"
    r"|(?<![a-z])nat[oa]|nascimento|nascid[oa]|urodz\w*"
    r"|出生(?:日期|年月日?|于|时间)?|生日|生于|生年月日|рожд\w*)"
    r"(?P<gap>[^\d\0]{0,24})",
    re.IGNORECASE,
)
_NEXT_TO_NAME = re.compile(r"[^\W\d_]{3,12}\.?[ \t\n]{0,3}$")
_AFTER = re.compile(r"[ ,\n]{0,2}(?:出生|生まれ|geboren\b|born\b|né[e]?\b)", re.IGNORECASE)
_DATE_WITH_BORN = re.compile(
    r"(?:\d{4}[-/.年]|\d{1,2}[./ ])[^\0]{4,24}?(?=[ ,]?(?:出生|生まれ|geboren\b))"
)


def birth_dates(view: View) -> Iterator[Span]:
    for start, end in view.around("birth"):
        for word in _BEFORE.finditer(view.text, start, end):
            span = _date_within(view.text, word.end(), word.start("gap"))
            if span:
                yield span
        for date in _DATE_WITH_BORN.finditer(view.text, start, end):
            span = _date_within(view.text, date.start(), date.start())
            if span and _AFTER.match(view.text, span.end):
                yield span


def _date_within(text: str, digit: int, gap: int) -> Span | None:
    """A date whose first number is at `digit`, or whose month's name is in the gap before it."""
    for form in _DATES:
        match = form.match(text, digit)
        if not match and "month" in form.groupindex:
            name = _NEXT_TO_NAME.search(text[gap:digit])
            match = form.match(text, gap + name.start()) if name else None
        if match and _is_date(match):
            return Span(match.start(), match.end(), "birth_date", Evidence.NAMED)
    return None


def _is_date(match: re.Match[str]) -> bool:
    parts = match.groupdict()
    day, year = int(parts["d"]), int(parts["y"])
    month = int(parts["m"]) if "m" in parts else _month(parts["month"])
    if month > 12:
        day, month = month, day
    try:
        dt.date(year if year > 99 else 1900 + year, month, day)
    except ValueError:
        return False
    return True


def _month(name: str) -> int:
    lowered = name.lower()
    return _MONTHS.get(lowered[:4]) or _MONTHS.get(lowered[:3]) or 0
