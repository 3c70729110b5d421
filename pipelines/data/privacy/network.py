"""Addresses of machines, and URLs that carry a password."""

import ipaddress
import re
from collections.abc import Iterator

from pipelines.data.privacy import context
from pipelines.data.privacy.numbers import candidates
from pipelines.data.privacy.spans import Span
from pipelines.data.privacy.view import View

_IPV4 = re.compile(
    r"(?<![A-Za-z0-9_.\-])\d{1,3}[ ]?\.[ ]?\d{1,3}\.[ ]?\d{1,3}\.[ \n]?\d{1,3}"
    r"(?![A-Za-z0-9_])(?!\.\d)(?!-\w)",
    re.ASCII,
)
_IPV6 = re.compile(
    r"(?<![A-Za-z0-9_.])(?<!::)(?<![0-9A-Fa-f]:)(?:[0-9A-Fa-f]{0,4}:){2,7}(?:(?:\d{1,3}\.){3}\d{1,3}|[0-9A-Fa-f]{1,4})?"
    r"(?![A-Za-z0-9_:])",
    re.ASCII,
)
_MAC = re.compile(
    r"(?<![A-Za-z0-9_])(?<![0-9A-Fa-f][:\-])"
    r"[0-9A-Fa-f]{2}([:\-])(?:[0-9A-Fa-f]{2}\1){4}[0-9A-Fa-f]{2}"
    r"(?![A-Za-z0-9_])(?![:\-.][0-9A-Fa-f])",
    re.ASCII,
)
_VERSION = re.compile(
    r"(?:(?<![a-z])v(?:er(?:sion|\.)?)?|version(?:s|en|es)?|版本号?|release|build|firmware|==|>=|<=|~=|[a-z]\-)"
    r"[\s:=\"'(v.]{0,4}$",
    re.IGNORECASE,
)
_MASK = re.compile(r"255\.255\.|0\.")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{1,15}$")
_LOGIN = re.compile(
    r"://([^\s/?#@:'\"<>\0]{0,100}:[^\s/@'\"<>\0]{1,200})@[^\s'\"<>()\[\]{}\0\u3000-\u9fff]+"
)
_LONGEST_LOGIN = 310
_TEMPLATE = re.compile(r"[{}<>$%]|\.\.\.")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_TRAILING = ".,;:!?"


def addresses(view: View) -> Iterator[Span]:
    """IP addresses, of either version, but those that are nobody's."""
    if view.text.count(".") >= 3:
        yield from _ipv4(view)
    for match in candidates(_IPV6, view.text, view.colons):
        if _is_ipv6(match[0]):
            yield Span(match.start(), match.end(), "ip")


def _ipv4(view: View) -> Iterator[Span]:
    for match in candidates(_IPV4, view.text, view.quads):
        try:
            address = ipaddress.IPv4Address(re.sub(r"\s", "", match[0]))
        except ValueError:
            continue
        spaced = re.search(r"\s", match[0])
        if address.is_loopback or address.is_multicast or _MASK.match(match[0]):
            continue
        front = context.before(view, match.start())
        if _VERSION.search(front) or context.other(view, match.start()):
            continue
        if spaced and not re.search(r"(?i)\bip|地址", front):
            continue
        yield Span(match.start(), match.end(), "ip")


def _is_ipv6(text: str) -> bool:
    """`::2` is a slice and `dec::ab` a name in many languages: an address has more to it."""
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return False
    groups = [group for group in text.split(":") if group]
    wide = any(len(group) >= 3 and re.search(r"\d", group) for group in groups)
    telling = len(groups) >= 3 or (len(groups) == 2 and len(groups[0]) == 4)
    return wide and telling and not address.is_loopback and not address.is_unspecified


def macs(view: View) -> Iterator[Span]:
    for match in candidates(_MAC, view.text, [*view.colons, *view.hyphens]):
        text = match[0]
        letters = re.search(r"[A-Fa-f]", text)
        if (letters or ":" in text) and len(set(text)) > 2:
            yield Span(match.start(), match.end(), "mac")


def urls(view: View) -> Iterator[Span]:
    """URLs with a password, whole: paths and queries of such hold secrets too."""
    at = view.text.find("@")
    while at >= 0:
        colon = view.text.rfind("://", max(0, at - _LONGEST_LOGIN), at)
        if colon >= 0 and (span := _url(view.text, colon)):
            yield span
        at = view.text.find("@", at + 1)


def _url(text: str, colon: int) -> Span | None:
    scheme = _SCHEME.search(text[max(0, colon - 16) : colon])
    match = _LOGIN.match(text, colon)
    if not scheme or not match or (_TEMPLATE.search(match[1]) and not _ESCAPE.search(match[1])):
        return None
    length = len(match[0].rstrip(_TRAILING))
    return Span(colon - len(scheme[0]), colon + length, "url")
