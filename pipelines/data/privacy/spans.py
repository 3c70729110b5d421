"""What finders find, and which of it counts where finds overlap."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Evidence(IntEnum):
    """How sure a finder is; the surer find wins."""

    FORM = 1
    """It has the form, and a library takes it for valid."""
    CHECKED = 2
    """Its check digits hold, or its form belongs to nothing else."""
    NAMED = 3
    """A word in front says what it is."""


@dataclass(frozen=True)
class Span:
    """Where something personal stands. It does not hold the value, so it may be shown."""

    start: int
    """First character."""
    end: int
    """One past the last character."""
    type: str
    evidence: Evidence = Evidence.CHECKED


def resolve(found: Iterable[Span]) -> list[Span]:
    """Spans without overlap, by place.

    Overlapping finds become one span over all that they cover, so that no rest of a value stays;
    its type is that of the widest of them, then the surest, then the first by place and name.
    """
    united: list[Span] = []
    group: list[Span] = []
    end = -1
    for span in sorted(found, key=lambda span: (span.start, span.end, span.type)):
        if group and span.start >= end:
            united.append(_united(group))
            group = []
        end = max(end, span.end) if group else span.end
        group.append(span)
    return [*united, _united(group)] if group else united


def _united(group: list[Span]) -> Span:
    if len(group) == 1:
        return group[0]
    best = max(group, key=lambda span: (span.end - span.start, span.evidence))
    start, end = min(span.start for span in group), max(span.end for span in group)
    return Span(start, end, best.type, best.evidence)


def canonical(value: str) -> str:
    """One spelling for the same value: without separators, in lower case."""
    return _SEPARATORS.sub("", value).lower()


_SEPARATORS = re.compile(r"[\s\-/().\0]")
