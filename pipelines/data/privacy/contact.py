"""E-mail addresses and phone numbers."""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import phonenumbers
from phonenumbers import PhoneMetadata

from pipelines.data.privacy import context, mail_scripts, numbers
from pipelines.data.privacy.spans import Evidence, Span
from pipelines.data.privacy.view import View

# ------------------------------------------------------------------ e-mail

_LETTER = "A-Za-z0-9\u00c0-\u024f"
_LOCAL_REVERSED = re.compile(rf"[{_LETTER}_+-](?:[{_LETTER}._%+'-]{{0,62}}[{_LETTER}_])?")
_AROUND_DOMAIN = re.compile(
    rf"[ \t]{{0,2}}\n?[ \t]{{0,2}}((?:[{_LETTER}](?:[{_LETTER}-]{{0,62}}[{_LETTER}])?\.){{1,8}}"
    rf"(?:xn--[a-z0-9-]+|[A-Za-z]{{2,24}}))(?![{_LETTER}_])"
)
_MAX_GAP = 4
_TELLING = re.compile(r"[._\d]")
_SPELT = re.compile(
    rf"(?<![{_LETTER}])[{_LETTER}_](?:[{_LETTER}._%+-]{{0,62}}[{_LETTER}_])?"
    r" ?[\[({] ?(?:at|@|arobase) ?[\])}] ?"
    rf"(?:[{_LETTER}](?:[{_LETTER}-]{{0,62}})"
    r"(?:\.| ?[\[({] ?(?:dot|punkt|point|punto) ?[\])}] ?))"
    rf"{{1,8}}[A-Za-z]{{2,24}}(?![{_LETTER}])",
    re.IGNORECASE,
)
# Where spaces stand around the sign, only ends that are more often a domain than a word count.
_KNOWN_END = re.compile(
    r"\.(?:com|net|org|edu|gov|info|biz|de|fr|es|it|nl|io|cn|uk|eu|at|ch|be|pl|pt|jp|br|ru|se|us|ca|au)$",
    re.IGNORECASE,
)
_MAIL_WORDS = context.words(
    *("e-?mails?", "mails?", "courriels?", "correos?", "correo electrónico", "mél", "posta"),
    *("邮箱", "邮件", "电邮", "信箱", "メール", "contact", "kontakt"),
)


def emails(view: View) -> Iterator[Span]:
    text = view.text
    at = text.find("@")
    while at >= 0:
        span = _email_at(view, at) or mail_scripts.email_at(view, at)
        if span:
            yield span
        at = text.find("@", at + 1)
    for start, end in view.around("spelt"):
        for match in _SPELT.finditer(text, start, end):
            yield Span(match.start(), match.end(), "email")


def _email_at(view: View, at: int) -> Span | None:
    text = view.text
    domain = _AROUND_DOMAIN.match(text, at + 1)
    if not domain:
        return None
    front = text[max(0, at - 70) : at]
    close = front.rstrip(" \t\n")
    # Reversed, because a match that must end somewhere is found by trying every beginning.
    local = _LOCAL_REVERSED.match(close[::-1])
    if not local or len(front) - len(close) > _MAX_GAP:
        return None
    start = at - (len(front) - len(close)) - local.end()
    name = text[start : start + local.end()]
    if len(close) < len(front) or domain.start(1) > at + 1:
        telling = _TELLING.search(name) or context.named(view, start, _MAIL_WORDS)
        if not telling or not _KNOWN_END.search(domain[1]):
            return None
    elif name == "git" and text[domain.end() : domain.end() + 1] in (":", "/"):
        return None  # the account that serves a repository: nobody's address
    return Span(start, domain.end(), "email")


# ------------------------------------------------------------------ phone

_BREAK = re.compile(r"\s+")
_GAP = r"[ \t.\-/()]{0,3}(?:\n[ \t(]{0,4})?"
_NO_WORD = r"(?![A-Za-wyz0-9_]|x(?!\d))"
_EXTENSION = re.compile(
    r"(?: ?,? ?(?:ext\.?|extension|Durchwahl|poste|分机) ?|x)\d{1,6}(?!\w)", re.IGNORECASE
)
_INTERNATIONAL = re.compile(
    r"(?<![A-Za-z0-9_+])(?<!\d[.,:])\(?(?:\+[ ]?|00[ \-]?)\(?[1-9]"
    rf"(?:{_GAP}\d){{6,14}}{_NO_WORD}(?![.,]\d)",
    re.ASCII,
)
_NATIONAL = re.compile(rf"{numbers.START}\(?\d(?:{_GAP}\d){{6,13}}{_NO_WORD}(?![.,]\d)", re.ASCII)
_WORDS = context.words(
    *(
        "tele?(?:phone|fono?|foon|fax)?s?",
        "phone(?:s|[ _]?n(?:o|umbers?))?",
        "mobiles?",
        "mob",
        "cell(?:ular)?",
        "fax",
    ),
    *("ph", "call(?: (?:me|us))?(?: (?:at|on))?", "text(?: me)? (?:at|on)", "whats ?app", "ring"),
    *("handy(?:nummer)?", "telefon\\w*", "rufnummer", "mobil\\w*", "festnetz", "tél(?:éphone)?"),
    *("portable", "appel\\w*", "joindre", "teléfono", "tel[eé]fono", "tfno", "móvil", "celular"),
    *("llam\\w+", "cellulare", "telefone", "telemóvel", "komórka", "dial", "hotline"),
    *(
        "电话",
        "手机号?码?",
        "联系方式",
        "致电",
        "拨打",
        "座机",
        "传真",
        "热线",
        "電話",
        "携帯",
        "号码",
    ),
)
_SURE_WORDS = context.words(
    *("tel", "telephone", "phone(?:[ _]?n(?:o|umber))?", "fax", "telefon(?:nummer)?", "tél"),
    *("téléphone", "teléfono", "telefono", "telefone", "电话", "電話", "手机号?码?", "传真"),
)
_GROUPED, _SHORTEST = 3, 8
_DATE = re.compile(
    r"(?:19|20)\d\d[-/.](?:0\d|1[0-2])[-/.][0-3]\d|[0-3]?\d[-/.][01]?\d[-/.](?:19|20)\d\d"
)
_GROUPS = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """A way to write national numbers that tells them from other numbers."""

    region: str
    digits: re.Pattern[str]
    groups: frozenset[_GROUPS]
    sign: re.Pattern[str] = re.compile("")
    """Something that must be among the separators."""


def _form(region: str, digits: str, groups: set[_GROUPS], sign: str = "") -> Form:
    start, end = r"(?<![A-Za-z0-9_+])(?<!\d[.,\-/])", _NO_WORD + r"(?![.,\-/]\d)"
    pattern = re.compile(f"{start}{digits}{end}".replace("~", _GAP), re.ASCII)
    return Form(region, pattern, frozenset(groups), re.compile(sign))


_FORMS = (
    _form("US", r"(?:1[-. ])?\(?[2-9](?:~\d){9}", {(3, 3, 4), (1, 3, 3, 4)}, r"[-.(]"),
    _form("CN", r"1[3-9](?:~\d){9}", {(11,), (3, 4, 4), (3, 8), (1,) * 11}),
    _form("CN", r"\(?0[1-9](?:~\d){8,10}", {(3, 8), (4, 8), (4, 7), (3, 4, 4), (4, 4, 4)}, r"[-)]"),
    _form("FR", r"0[1-9](?:~\d){8}", {(2,) * 5}),
    _form("DE", r"01[5-7](?:~\d){8,9}", {(4, 7), (4, 8), (4, 3, 4), (4, 4, 4), (4, 4, 3)}),
    _form(
        "DE", r"\(?0[2-9](?:~\d){7,10}", {(m, n) for m in (3, 4, 5) for n in range(4, 9)}, r"[/)]"
    ),
    _form("GB", r"07(?:~\d){9}", {(5, 6), (5, 3, 3)}),
    _form("GB", r"\(?0[12](?:~\d){9}", {(3, 4, 4), (4, 3, 4)}),
)


def phones(view: View, regions: Sequence[str]) -> Iterator[Span]:
    """
    Args:
        regions: countries (ISO 3166) whose numbers are known without their country code.
    """
    yield from _international(view)
    yield from _national(view, regions)
    for form in _FORMS:
        if form.region in regions:
            yield from _formatted(view, form)


def _international(view: View) -> Iterator[Span]:
    for match in numbers.candidates(_INTERNATIONAL, view.text, numbers.windows(view, 7)):
        start, written = match.start(), match[0]
        named, plus = context.named(view, start, _WORDS), "+" in written
        # Zeros in front of a bare number are too common in tables.
        if not plus and not named and (written.isdigit() or context.other(view, start)):
            continue
        texts = list(numbers.shortened(written))
        found = next((text for text in texts if _valid(_plus(text), None, text)), None)
        if found is None and (named or (plus and len(texts) >= _GROUPED)):
            found = next((text for text in texts if _possible(_plus(text), None)), None)
        if found:
            yield _span(view, start, found, Evidence.CHECKED)


def _plus(text: str) -> str:
    return "+" + numbers.only_digits(text).removeprefix("00")


def _national(view: View, regions: Sequence[str]) -> Iterator[Span]:
    for match in numbers.candidates(_NATIONAL, view.text, numbers.windows(view, 7)):
        start = match.start()
        if _DATE.match(match[0]) or not context.named(view, start, _WORDS):
            continue
        if context.other(view, start):
            continue
        texts = [(text, numbers.only_digits(text)) for text in numbers.shortened(match[0])]
        found = next((t for t, d in texts if any(_valid(d, region) for region in regions)), None)
        if found is None and context.named(view, start, _SURE_WORDS):
            found = next((t for t, d in texts if any(_possible(d, r) for r in regions)), None)
        if found:
            yield _span(view, start, found, Evidence.NAMED)


def _formatted(view: View, form: Form) -> Iterator[Span]:
    for match in numbers.candidates(form.digits, view.text, numbers.windows(view, 9)):
        text = match[0]
        if not form.sign.search(text) or not numbers.groupings(text) & form.groups:
            continue
        if context.other(view, match.start()) or _DATE.match(text):
            continue
        if _valid(numbers.only_digits(text), form.region):
            yield _span(view, match.start(), text, Evidence.FORM)


def _span(view: View, start: int, text: str, evidence: Evidence) -> Span:
    end = start + len(text)
    extension = _EXTENSION.match(view.text, end)
    return Span(start, extension.end() if extension else end, "phone", evidence)


def _possible(digits: str, region: str | None) -> bool:
    """Its length is one that the country has: numbers come into use before tables know them."""
    if len(digits) < _SHORTEST:
        return False
    try:
        return phonenumbers.is_possible_number(phonenumbers.parse(digits, region))
    except phonenumbers.NumberParseException:
        return False


def _valid(digits: str, region: str | None, written: str = "") -> bool:
    if region and not _may_be(digits, region):
        return False
    try:
        number = phonenumbers.parse(
            _BREAK.sub(" ", written) if "(0)" in written else digits, region
        )
    except phonenumbers.NumberParseException:
        return False
    return phonenumbers.is_valid_number(number)


def _may_be(digits: str, region: str) -> bool:
    """What the library's own table says of the region, before it is asked in full."""
    general, prefix = _plan(region)
    if prefix and digits.startswith(prefix) and general.fullmatch(digits[len(prefix) :]):
        return True
    return general.fullmatch(digits) is not None


@functools.cache
def _plan(region: str) -> tuple[re.Pattern[str], str]:
    plan = PhoneMetadata.metadata_for_region(region)
    if plan is None or plan.general_desc is None:
        return re.compile(r"(?!)"), ""
    return re.compile(
        plan.general_desc.national_number_pattern or r"(?!)"
    ), plan.national_prefix or ""
