"""Where literals that finders care about may occur: all of them looked for at once.

Each is looked for by four bytes, as two pairs: a table says which literals begin with a pair,
another which go on with it, and where both agree on a literal, it may be there. False alarms only
cost time; a literal that is there is never missed.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

KEYS: Mapping[str, tuple[str, ...]] = {
    "aws": ("AKIA", "ASIA", "ABIA", "ACCA"),
    "github": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    "gitlab": ("glpat-",),
    "slack": ("xoxa", "xoxb", "xoxe", "xoxo", "xoxp", "xoxr", "xoxs", "https://hooks.slack"),
    "stripe": ("sk_live_", "rk_live_", "pk_live_", "sk_test_", "rk_test_", "pk_test_", "whsec_"),
    "google": ("AIza", "ya29.", "GOCSPX-"),
    "openai": ("sk-",),
    "hugging_face": ("hf_",),
    "packages": ("npm_", "pypi-"),
    "sendgrid": ("SG.",),
    "clouds": ("dop_v1_", "shpat_", "dapi", "gsk_", "xai-"),
    "jwt": ("eyJ",),
    "pem": ("PRIVATE KEY",),
    "english": (
        *(" St.", " St,", " Ave", " Roa", " Rd", " Lan", " Ln", " Dri", " Dr.", " Dr,", " Bou"),
        *(" Blv", " Cou", " Ct", " Pla", " Squ", " Ter", " Par", " Pkw", " Way", " Clo", " Cre"),
        *(" Gar", " St\n", " Dr\n"),
    ),
}
WORDS: Mapping[str, tuple[str, ...]] = {
    "bearer": ("bear",),
    "spelt": ("[at]", "(at)", "{at}", "[at ", "(at ", "[ at", "( at", "arob", "[@]", "(@)"),
    "birth": (
        *("birt", "born", "dob", "d.o.", "gebo", "geb.", "urts", "aiss", "né ", "née", "cimi"),
        *("naci", "scit", "nato ", "nata ", "scim", "scid", "rodz"),
        *("出生", "生日", "生于", "生まれ", "生年", "рожд"),
    ),
    "english": ("reet",),
    "german": ("traß", "trasse", "tr. ", "latz", "weg ", "llee", "gass"),
    "romance": (
        *(" rue", "enue", "boul", " bd ", " av.", " pla", "chem", "llée", "mpas", "quai", "cour"),
        *("lle ", "c/ ", "nida", "avda", "laza", "aseo", "via ", "iale", "iazz", "orso", " rua"),
        *("praç",),
    ),
    "chinese": ("号",),
}
"""Parts of words, in any case."""
_CHUNK = 1 << 16
"""Bytes looked at together: what the tables say about them stays in the processor's cache."""


def places(raw: np.ndarray) -> dict[str, np.ndarray]:
    """Offsets in bytes at which something of `KEYS` and `WORDS` may begin.

    Args:
        raw: UTF-8 bytes.
    """
    first, second, names = _tables()
    # A literal of three bytes may end the text, and is looked for with any fourth.
    raw = np.append(raw, np.uint8(0))
    where, which = [], []
    for start in range(0, len(raw) - 3, _CHUNK):
        part = raw[start : start + _CHUNK + 3].astype(np.uint16)
        pairs = (part[:-1] << 8) | part[1:]
        hits = first[pairs[:-2]] & second[pairs[2:]]
        found = np.flatnonzero(hits)
        if len(found):
            where.append(found + start)
            which.append(hits[found])
    return _by_name(np.concatenate(where), np.concatenate(which), names) if where else {}


def _by_name(
    where: np.ndarray, which: np.ndarray, names: Sequence[tuple[str, np.uint64]]
) -> dict[str, np.ndarray]:
    masks = [(name, where[(which & bits) != 0]) for name, bits in names]
    return {name: found for name, found in masks if len(found)}


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, list[tuple[str, np.uint64]]]:
    """By pair of bytes, the literals that begin with it and those that go on with it, a bit each.

    There are more literals than bits: some share one, which makes alarms for both.
    """
    first, second = np.zeros(1 << 16, np.uint64), np.zeros(1 << 16, np.uint64)
    bits: dict[str, int] = {}
    count = 0
    for any_case, group in ((False, KEYS), (True, WORDS)):
        for name, literals in group.items():
            for literal in literals:
                bit = np.uint64(1 << count % 64)
                a, b, c, *d = literal.encode()[:4]
                first[_pairs(_cases(a, any_case), _cases(b, any_case))] |= bit
                fourth = _cases(d[0], any_case) if d else range(256)
                second[_pairs(_cases(c, any_case), fourth)] |= bit
                bits[name] = bits.get(name, 0) | int(bit)
                count += 1
    return first, second, [(name, np.uint64(mask)) for name, mask in bits.items()]


def _cases(byte: int, any_case: bool) -> Sequence[int]:
    letter = chr(byte)
    both = any_case and letter.isascii() and letter.isalpha()
    return (ord(letter.lower()), ord(letter.upper())) if both else (byte,)


def _pairs(firsts: Sequence[int], seconds: Sequence[int]) -> list[int]:
    return [one << 8 | other for one in firsts for other in seconds]
