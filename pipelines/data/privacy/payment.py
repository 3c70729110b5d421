"""Payment cards (Luhn and issuers' ranges) and bank accounts (IBAN)."""

import re
from collections.abc import Iterator

from stdnum import iban, luhn

from pipelines.data.privacy import context, numbers
from pipelines.data.privacy.spans import Evidence, Span
from pipelines.data.privacy.view import View

# ISO/IEC 7812 ranges as the issuers publish them: first digits, lengths.
_ISSUERS = (
    (re.compile(r"4"), {13, 16, 19}),  # Visa
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), {16}),  # Mastercard
    (re.compile(r"3[47]"), {15}),  # American Express
    (re.compile(r"6011|64[4-9]|65"), {16, 19}),  # Discover
    (re.compile(r"35(?:2[89]|[3-8])"), {16, 19}),  # JCB
    (re.compile(r"30[0-5]|309|36|3[89]"), {14, 16}),  # Diners Club
    (re.compile(r"62|81"), {16, 17, 18, 19}),  # UnionPay
    (re.compile(r"50(?:18|20|38)|5893|6304|6759|676[1-3]"), {12, 13, 14, 15, 16, 17, 18, 19}),
    (re.compile(r"220[0-4]"), {16, 17, 18, 19}),  # Mir
)
_GROUPINGS: set[tuple[int, ...]] = {
    *((4, 4, 4, n) for n in (1, 2, 3, 4)),
    *((4, 4, 4, 4, n) for n in (1, 2, 3)),
    *((n,) for n in range(12, 20)),
    *((4, 6, 5), (4, 6, 4), (6, 13), (6, 10), (8, 8)),
}
_SHORTEST = 12
_CARD = re.compile(numbers.START + numbers.digits("11,18") + r"(?!\w)", re.ASCII)
_CARD_WORDS = context.words(
    *(
        "cards?(?: ?numbers?)?",
        "(?:credit|debit|bank) ?cards?(?: ?numbers?)?",
        "visa",
        "master ?card",
        "amex",
        "american express",
        "pan",
    ),
    *("karten?\\w*", "kreditkarte\\w*", "carte", "cb", "tarjeta", "carta", "cartão"),
    *("卡号", "银行卡", "信用卡", "储蓄卡", "借记卡", "卡", "カード"),
)
_IBAN = re.compile(
    r"(?<![A-Za-z0-9])[A-Z]{2}[ \n]?\d[ \n]?\d(?:[ \t\n.\-]{0,3}[A-Z0-9]){11,30}(?![A-Za-z0-9])",
    re.ASCII,
)
_SPACE = re.compile(r"\s")
_LOWER_IBAN = re.compile(_IBAN.pattern, re.ASCII | re.IGNORECASE)
_IBAN_WORDS = context.words(
    "iban", "konto\\w*", "account", "compte", "cuenta", "conto", "账号", "账户"
)


def cards(view: View) -> Iterator[Span]:
    for match in numbers.candidates(_CARD, view.text, numbers.windows(view, 12)):
        for text in numbers.shortened(match[0]):
            digits = numbers.only_digits(text)
            if len(digits) < _SHORTEST or not luhn.is_valid(digits):
                continue
            start, end = match.start(), match.start() + len(text)
            if context.named(view, start, _CARD_WORDS):
                yield Span(start, end, "card", Evidence.NAMED)
                break
            if is_issued(digits) and _like_a_card(text) and not context.other(view, start):
                yield Span(start, end, "card")
                break


def is_issued(digits: str) -> bool:
    """Whether an issuer has numbers that begin so and are that long."""
    return any(len(digits) in lengths and prefix.match(digits) for prefix, lengths in _ISSUERS)


def _like_a_card(text: str) -> bool:
    return any(
        sizes in _GROUPINGS or numbers.one_by_one(sizes) for sizes in numbers.groupings(text)
    )


def ibans(view: View) -> Iterator[Span]:
    for pattern in (_IBAN, _LOWER_IBAN):
        for match in numbers.candidates(pattern, view.text, view.numbers):
            start = match.start()
            if pattern is _LOWER_IBAN and not context.named(view, start, _IBAN_WORDS):
                continue
            for text in numbers.shortened(match[0]):
                if iban.is_valid(_SPACE.sub("", text)):
                    yield Span(start, start + len(text), "iban")
                    break
