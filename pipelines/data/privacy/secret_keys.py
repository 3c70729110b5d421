"""Keys of programs and services: known prefixes, private key blocks, and what follows `key =`."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from pipelines.data.privacy.spans import Evidence, Span
from pipelines.data.privacy.view import View

# Probe (see `probes`) to patterns. Forms as the services document them.
_PATTERNS = {
    "aws": (r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}",),
    "github": (r"gh[pousr]_[A-Za-z0-9]{36,255}", r"github_pat_[A-Za-z0-9_]{22,255}"),
    "gitlab": (r"glpat-[\w-]{20,64}",),
    "slack": (
        r"xox[abeoprs]-[\w-]{10,255}",
        r"https://hooks\.slack\.com/services/[\w/]{20,100}",
    ),
    "stripe": (r"[srp]k_(?:live|test)_[A-Za-z0-9]{10,255}", r"whsec_[A-Za-z0-9+/=]{20,100}"),
    "google": (r"AIza[\w-]{35}", r"ya29\.[\w-]{20,500}", r"GOCSPX-[\w-]{28}"),
    "openai": (r"sk-(?:proj-|ant-[a-z0-9]+-|svcacct-|or-v1-|None-)?[\w-]{20,250}",),
    "hugging_face": (r"hf_[A-Za-z0-9]{30,60}",),
    "packages": (r"npm_[A-Za-z0-9]{36}", r"pypi-AgE[\w-]{50,500}"),
    "sendgrid": (r"SG\.[\w-]{20,24}\.[\w-]{39,50}",),
    "clouds": (
        r"dop_v1_[0-9a-f]{64}",
        r"shpat_[0-9a-fA-F]{32}",
        r"dapi[0-9a-f]{32}",
        r"gsk_[A-Za-z0-9]{40,60}",
        r"xai-[A-Za-z0-9]{60,100}",
    ),
    "jwt": (r"eyJ[\w-]{8,4000}\.eyJ[\w-]{8,8000}\.[\w-]{10,2000}",),
}
_KNOWN = {
    probe: tuple(re.compile(rf"(?<![A-Za-z0-9_]){p}(?![A-Za-z0-9_])", re.ASCII) for p in patterns)
    for probe, patterns in _PATTERNS.items()
}
_BLOCK = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[^\0]*?"
    r"(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    # A block that was cut off: as far as its lines look like base64.
    r"|(?![^\0]*-----END )(?:(?:\\n|\s)*[A-Za-z0-9+/=:, \-]{16,})+)"
)
_BEARER = re.compile(r"(?i)\bbearer[ ]+([A-Za-z0-9+/_.~\-]{16,}=*)", re.ASCII)
_NAME = re.compile(
    r"(?:key|token|secret|passw(?:or)?d|passwort|pwd|passphrase|credential|auth\w*|clave|contraseña"
    r"|mot ?de ?passe|mdp|密钥|密码|口令|令牌|秘钥)s?[\w\]\"'.\-)]{0,12}\s{0,3}"
    r"(?:[:=]|=>|:=|是|为)?[\s\"'`]{0,3}$",
    re.IGNORECASE,
)
_VALUE = re.compile(r"[A-Za-z0-9+/_.~\-]{16,512}={0,2}", re.ASCII)
_DIGIT, _LETTER = re.compile(r"[0-9]"), re.compile(r"[A-Za-z]")
_LONGEST = 2000
_MIN_ENTROPY = 3.3
"""Bits per character. Measured: random base64 and base62 of 20 characters have over 3.6, random
hexadecimal of 32 has over 3.3; names in source code of that length mostly less, or no digit."""


def keys(view: View) -> Iterator[Span]:
    for probe in view.probes.keys() & _KNOWN.keys():
        for place in view.probes[probe].tolist():
            yield from _known(view.text, place, _KNOWN[probe])
    for start, end in view.around("bearer"):
        for match in _BEARER.finditer(view.text, start, end + _LONGEST):
            if _random(match[1]):
                yield Span(match.start(1), match.end(1), "key", Evidence.NAMED)
    for start in view.assigned:
        yield from _assigned(view.text, start)


def _known(text: str, start: int, patterns: Sequence[re.Pattern[str]]) -> Iterator[Span]:
    for pattern in patterns:
        match = pattern.match(text, start)
        if match and _varied(match[0]):
            yield Span(match.start(), match.end(), "key")


def _assigned(text: str, start: int) -> Iterator[Span]:
    match = _VALUE.match(text, start)
    if not match or not _DIGIT.search(match[0]) or not _LETTER.search(match[0]):
        return
    if not _NAME.search(text[max(0, start - 40) : start]) or not _random(match[0]):
        return
    if text[match.end() : match.end() + 1] not in ("(", "["):
        yield Span(start, match.end(), "key", Evidence.NAMED)


def private_keys(view: View) -> Iterator[Span]:
    if "pem" in view.probes:
        for match in _BLOCK.finditer(view.text):
            if len(match[0]) > 100:
                yield Span(match.start(), match.end(), "private_key")


def _varied(text: str) -> bool:
    """`sk_test_xxxxxxxxxxxx` stands for a key."""
    return len(set(text)) > 8


def _random(text: str) -> bool:
    if not _DIGIT.search(text) or not _LETTER.search(text):
        return False
    if re.fullmatch(r"[A-Za-z_]+(?:[._-][A-Za-z_]+)*\d{0,4}", text):
        return False
    return entropy(text) >= _MIN_ENTROPY


def entropy(text: str) -> float:
    """Shannon entropy of its characters, in bits per character."""
    counts = Counter(text).values()
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts)
