"""National identity and tax numbers with check digits, as a table; python-stdnum checks them."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stdnum.be import nn
from stdnum.br import cpf
from stdnum.ch import ssn as ahv
from stdnum.cn import ric
from stdnum.de import idnr
from stdnum.dk import cpr
from stdnum.es import dni, nie
from stdnum.exceptions import ValidationError
from stdnum.fi import hetu
from stdnum.fr import nir
from stdnum.in_ import aadhaar
from stdnum.it import codicefiscale
from stdnum.kr import rrn
from stdnum.mx import curp
from stdnum.nl import bsn
from stdnum.pl import pesel
from stdnum.pt import nif
from stdnum.se import personnummer
from stdnum.tr import tckimlik
from stdnum.us import itin, ssn

from pipelines.data.privacy import context, numbers
from pipelines.data.privacy.spans import Evidence, Span
from pipelines.data.privacy.view import View

_BREAK = re.compile(r"\n[ \t]*")
_SPACES_AND_DOTS = re.compile(r"[\s.]")
Check = Callable[[str], bool]


@dataclass(frozen=True)
class Kind:
    least: int
    """Digits that stand together in it, letters aside."""
    pattern: re.Pattern[str]
    check: Check
    words: re.Pattern[str]
    unmistakable: re.Pattern[str] | None
    """Of the number as it is written: such a form needs no word in front of it."""


_PROVINCES = re.compile("1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[123]")
"""First two digits of GB/T 2260 codes."""


def _resident(text: str) -> bool:
    """GB 11643: place, date, check digit.

    `ric.is_valid` also asks that the county existed in the year of birth, which does not hold for
    people who were born before it was drawn and got their number from it later.
    """
    number = text.replace("-", "").upper()
    try:
        ric.get_birth_date(number)
    except ValidationError:
        return False
    return bool(_PROVINCES.match(number)) and number[-1] == ric.calc_check_digit(number)


def _nino(text: str) -> bool:
    """GOV.UK, National Insurance manual NIM39110: letters that are never given."""
    return text.upper()[:2] not in {"BG", "GB", "NK", "KN", "TN", "NT", "ZZ"}


def _social_security(text: str) -> bool:
    return ssn.is_valid(text) or itin.is_valid(text)


def _kind(
    least: int, pattern: str, check: Check, words: str, unmistakable: str | None = None
) -> Kind:
    return Kind(
        least,
        re.compile(rf"{numbers.START}(?:{pattern}){numbers.END}", re.ASCII),
        check,
        context.words(words),
        None if unmistakable is None else re.compile(unmistakable, re.ASCII),
    )


_D, _S = numbers.digits, numbers.SEPARATOR
_GAP = r"[ \-\n]{0,2}"
_ANY = r"[\s\S]*"
_ID = r"id|id ?(?:card|no|number)|national id|ausweis\w*|identi\w+"
_CODICE = r"(?:[A-Za-z]\s?){6}\d\s?\d\s?[A-Za-z]\s?\d\s?\d\s?[A-Za-z](?:\s?\d){3}\s?[A-Za-z]"
_NIR = _D(5, "[12]") + rf"{_S}(?:\d{_S}\d|2{_S}[AB]){_S}" + _D(8)
_NIR_FORM = (
    r"[\dAB]{15}|[\dAB]{13}[ \-]\d\d|\d([ .\-])\d\d\1\d\d\1[\dAB]{2}\1\d{3}\1\d{3}[ .\-]\d\d"
)
_DNI_FORM = r"[\d.\n]+ ?[-\n] ?[A-Z]|\d{8}[TRWAGMYPXBNJZSQVHCK]|\d\d\.\d{3}\.\d{3} ?[A-Z]"
_CN_FORM = r"\d{17}[\dXx]|\d{6}[ \-]\d{8}[ \-]\d{3}[\dXx]"
_NINO = r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z]" + _GAP + _D(6) + _GAP + "[A-D]"
_CPF_FORM = r"\d{3}\.\d{3}\.\d{3}-\d\d"
_BE_FORM = r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d"
_STEUER = r"steuer-?\s?id\w*|steuer\w*|idnr|identifikationsnummer|tin"
_SOCIAL = r"ssn|ss#|social security(?: number| no)?|itin|tax ?id|tin|seguro social|社会安全号"

KINDS = (
    _kind(9, _D(9), _social_security, _SOCIAL, r"\d{3}-\d\d-\d{4}"),
    _kind(17, _D(17) + rf"{_S}[\dXx]", _resident, rf"身份证\w*|证件\w*|{_ID}", _CN_FORM),
    _kind(8, _NIR, nir.is_valid, "sécurité sociale|nir|insee|sécu", _NIR_FORM),
    _kind(8, _D(8) + _GAP + "[A-Za-z]", dni.is_valid, rf"dni|nif|{_ID}", _DNI_FORM),
    _kind(7, r"[XYZxyz][ \-]?" + _D(7) + _GAP + "[A-Za-z]", nie.is_valid, "nie", _ANY),
    _kind(3, _CODICE, codicefiscale.is_valid, r"codice fiscale|c\.? ?f\.?", _ANY),
    _kind(9, _D(9), bsn.is_valid, "bsn|burgerservicenummer|sofinummer"),
    _kind(11, _D(11, "[1-9]"), idnr.is_valid, _STEUER, r"\d\d \d{3} \d{3} \d{3}"),
    _kind(11, _D(11), pesel.is_valid, "pesel"),
    _kind(6, _NINO, _nino, r"(?:nino|ni|national insurance)(?: number| no)?", _ANY),
    _kind(11, _D(11), cpf.is_valid, "cpf", _CPF_FORM),
    _kind(12, _D(12, "[2-9]"), aadhaar.is_valid, r"aadhaar\w*|uidai|uid|आधार\w*"),
    _kind(11, _D(11), nn.is_valid, r"rijksregister\w*|registre national|niss|insz", _BE_FORM),
    _kind(13, "756" + _S + _D(10), ahv.is_valid, r"ahv\w*|avs", r"756\.\d{4}\.\d{4}\.\d\d"),
    _kind(10, r"\d{6}(?:\d\d)?[-+]?\d{4}", personnummer.is_valid, "personnummer|pnr"),
    _kind(6, r"\d{6}[-+A-FU-Y]\d{3}[0-9A-Y]", hetu.is_valid, "hetu|henkilötunnus", _ANY),
    _kind(10, r"\d{6}-?\d{4}", cpr.is_valid, r"cpr\w*|personnummer"),
    _kind(9, _D(9), nif.is_valid, "nif|contribuinte"),
    _kind(11, _D(11, "[1-9]"), tckimlik.is_valid, r"t\.?c\.? ?kimlik\w*|kimlik\w*|tckn"),
    _kind(13, r"\d{6}-?[1-8]\d{6}", rrn.is_valid, "주민등록번호|주민번호|rrn"),
    _kind(6, r"[A-Z]{4}\d{6}[HM][A-Z]{5}[A-Z0-9]\d", curp.is_valid, "curp", _ANY),
)
"""US, CN, FR, ES (two), IT, NL, DE, PL, GB, BR, IN, BE, CH, SE, FI, DK, PT, TR, KR, MX."""


def national_ids(view: View) -> Iterator[Span]:
    for kind in KINDS:
        for match in numbers.candidates(kind.pattern, view.text, numbers.windows(view, kind.least)):
            evidence = _evidence(kind, view, match)
            if evidence and kind.check(_SPACES_AND_DOTS.sub("", match[0])):
                yield Span(match.start(), match.end(), "national_id", evidence)


def _evidence(kind: Kind, view: View, match: re.Match[str]) -> Evidence | None:
    if context.named(view, match.start(), kind.words):
        return Evidence.NAMED
    if kind.unmistakable is None or context.other(view, match.start()):
        return None
    written = (_BREAK.sub(by, match[0]) for by in ("", " "))
    return Evidence.CHECKED if any(map(kind.unmistakable.fullmatch, written)) else None
