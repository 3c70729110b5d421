"""One text in, the same text without personal data out, and where it was."""

import bisect
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from cluster.config.privacy import PrivacySection
from cluster.errors import ConfigError, PrivacyError
from pipelines.data.privacy import (
    addresses,
    birth,
    contact,
    national_ids,
    network,
    payment,
    secret_keys,
)
from pipelines.data.privacy.spans import Evidence, Span, resolve
from pipelines.data.privacy.surrogates import Names
from pipelines.data.privacy.view import SURROGATE, View, look
from pipelines.data.sources import BUILTINS

Finder = Callable[[View], Iterator[Span]]
Backend = Callable[[str], Iterable[tuple[int, int, str]]]
"""A reader of names: from a text, (start, end, type) of each, in characters."""

_TYPE = re.compile(r"[a-z][a-z_]{1,29}")


def applies(settings: PrivacySection, source: str) -> bool:
    """Whether files of a source, as the recipe names it, are to be de-identified."""
    return settings.apply == "always" or (settings.apply == "auto" and source not in BUILTINS)


@dataclass(frozen=True)
class Scrubbed:
    text: str
    spans: tuple[Span, ...] = ()
    """In the text as it came, by place; they do not overlap."""

    @property
    def counts(self) -> Counter[str]:
        return Counter(span.type for span in self.spans)


@dataclass(frozen=True)
class Scrubber:
    """The rules of a recipe, ready to use.

    Raises:
        ConfigError: if `ner` cannot be imported.
    """

    settings: PrivacySection
    finders: tuple[tuple[str, Finder], ...] = field(init=False)
    backend: Backend | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "finders", _finders(self.settings))
        object.__setattr__(self, "backend", _backend(self.settings.ner))

    def scrub(self, text: str) -> Scrubbed:
        """Put surrogates in the place of all that is found, until nothing more is.

        A surrogate hides a word that stood in the way of a rule, or an overlap: what comes out is
        looked at again, so that doing all of it twice changes nothing.

        Raises:
            PrivacyError: if a rule fails; the text is not part of the message.
        """
        names = Names(self.settings.style, text)
        edits = _Edits(text)
        found = self._named(text)
        while True:
            view = look(edits.text)
            found += [_placed(view, span) for span in self._find(view)]
            if not found:
                return Scrubbed(edits.text, edits.spans)
            edits.apply(resolve(found), names)
            found = []

    def _find(self, view: View) -> list[Span]:
        found: list[Span] = []
        for name, finder in self.finders:
            try:
                found.extend(finder(view))
            except Exception as error:
                raise PrivacyError(_failed(name, error)) from None
        return found

    def _named(self, text: str) -> list[Span]:
        """What the recipe's own reader of names finds, outside of surrogates."""
        if self.backend is None:
            return []
        try:
            answers = list(self.backend(text))
        except Exception as error:
            raise PrivacyError(_failed(f"data.privacy.ner {self.settings.ner}", error)) from None
        taken = [match.span() for match in SURROGATE.finditer(text)]
        spans = [self._checked(answer, len(text)) for answer in answers]
        return [
            s for s in spans if not any(s.start < end and start < s.end for start, end in taken)
        ]

    def _checked(self, answer: Any, length: int) -> Span:
        try:
            start, end, kind = answer
            if 0 <= start < end <= length and _TYPE.fullmatch(kind):
                return Span(int(start), int(end), kind, Evidence.FORM)
        except (TypeError, ValueError):
            pass
        raise PrivacyError(
            f"data.privacy.ner {self.settings.ner} must give (start, end, type) with "
            f"0 <= start < end <= {length} and a type of lower-case letters"
        )


def _failed(what: str, error: Exception) -> str:
    """The message of an error may quote what it stumbled over."""
    return f"{what} failed on a text with {type(error).__name__}"


def _placed(view: View, span: Span) -> Span:
    start, end = view.original(span.start, span.end)
    return Span(start, end, span.type, span.evidence)


class _Edits:
    """A text, what was replaced in it so far, and where that stands in the text as it came."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._done: list[tuple[Span, int, int]] = []
        """Span in the text as it came, and where its surrogate begins and ends in `text`."""

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(span for span, _, _ in self._done)

    def apply(self, found: list[Span], names: Names) -> None:
        """Replace spans of `text`, in order, none of which touches a surrogate."""
        pieces: list[str] = []
        done: list[tuple[Span, int, int]] = []
        cursor = length = 0
        old = iter([*self._done, None])
        earlier = next(old)
        for span in [*found, None]:
            while earlier and (span is None or earlier[1] < span.start):
                shift = length - cursor
                done.append((earlier[0], earlier[1] + shift, earlier[2] + shift))
                earlier = next(old)
            if span is None:
                break
            surrogate = names.of(span.type, look(self.text[span.start : span.end]).text)
            pieces += [self.text[cursor : span.start], surrogate]
            length += span.start - cursor + len(surrogate)
            cursor = span.end
            done.append((self._original(span), length - len(surrogate), length))
        self.text = "".join([*pieces, self.text[cursor:]])
        self._done = done

    def _original(self, span: Span) -> Span:
        at = bisect.bisect_right(self._done, span.start, key=lambda one: one[1]) - 1
        shift = self._done[at][0].end - self._done[at][2] if at >= 0 else 0
        return Span(span.start + shift, span.end + shift, span.type, span.evidence)


def _finders(settings: PrivacySection) -> tuple[tuple[str, Finder], ...]:
    known: dict[str, Finder] = {
        "email": contact.emails,
        "phone": functools.partial(contact.phones, regions=settings.phone_regions),
        "card": payment.cards,
        "iban": payment.ibans,
        "national_id": national_ids.national_ids,
        "ip": network.addresses,
        "mac": network.macs,
        "url": network.urls,
        "key": secret_keys.keys,
        "private_key": secret_keys.private_keys,
        "birth_date": birth.birth_dates,
        "address": addresses.postal,
    }
    return tuple((name, known[name]) for name in known if name in settings.types)


def _backend(path: str | None) -> Backend | None:
    if path is None:
        return None
    module, _, name = path.partition(":")
    try:
        found: Backend = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"data.privacy.ner {path} cannot be imported: {error}") from None
    return found
