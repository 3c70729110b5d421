"""Made-up personal values, from the public definitions of what they are; check digits by hand.

Nothing here knows how they are found. Each maker takes a `random.Random` and returns the way a
careful writer puts the value down; `personal_texts` is careless with it afterwards.
"""

import base64
import string
import uuid
from collections.abc import Callable
from datetime import date, timedelta
from random import Random

Maker = Callable[[Random], str]


def some(rng: Random, alphabet: str, count: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(count))


def digits(rng: Random, count: int) -> str:
    return some(rng, string.digits, count)


def grouped(text: str, *sizes: int, by: str = " ") -> str:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return by.join([*pieces, text[at:]] if text[at:] else pieces)


# ------------------------------------------------------------------ mail, phone

FIRST = [
    "anna",
    "bob",
    "chen",
    "diego",
    "emma",
    "fatima",
    "georg",
    "hana",
    "ivan",
    "julie",
    "karl",
    "lucia",
    "mei",
    "noah",
    "olga",
]
LAST = [
    "smith",
    "mueller",
    "dupont",
    "garcia",
    "wang",
    "rossi",
    "kowalski",
    "silva",
    "jansen",
    "brown",
    "li",
    "novak",
    "weber",
]
HOSTS = [
    "example.com",
    "mail.example.org",
    "example.net",
    "firma.example.de",
    "exemple.fr",
    "example.cn",
]
HOSTS += ["correo.example.es", "posta.example.it", "example.co.uk", "uni-example.edu", "example.io"]


def email(rng: Random) -> str:
    first, last = rng.choice(FIRST), rng.choice(LAST)
    name = rng.choice(
        [f"{first}.{last}", f"{first[0]}{last}", f"{first}_{last}{rng.randint(1, 99)}"]
        + [f"{last}+list", f"{first.title()}.{last.title()}", f"{first}-{last}", f"{first}{last}"]
    )
    return f"{name}@{rng.choice(HOSTS)}"


def us_phone(rng: Random) -> str:
    area = rng.choice(["212", "415", "617", "305", "206", "312", "713", "404", "646", "503"])
    return f"{area}{rng.randint(2, 9)}{rng.choice('023456789')}{digits(rng, 5)}"


def cn_mobile(rng: Random) -> str:
    return rng.choice(
        ["130", "135", "138", "139", "150", "158", "159", "176", "186", "188", "189"]
    ) + digits(rng, 8)


def de_mobile(rng: Random) -> str:
    return rng.choice(["151", "160", "170", "171", "175", "176"]) + digits(rng, 8)[:8]


def international(rng: Random) -> str:
    us, cn, de = us_phone(rng), cn_mobile(rng), rng.choice(["170", "171", "175"]) + digits(rng, 7)
    fr = rng.choice(["61", "62", "66", "68", "76", "78"]) + digits(rng, 7)
    es, gb = "6" + digits(rng, 8), "77" + digits(rng, 8)
    return rng.choice(
        [f"+1 {grouped(us, 3, 3, 4)}", f"+1-{grouped(us, 3, 3, 4, by='-')}", f"+1{us}"]
        + [f"+1 ({us[:3]}) {us[3:6]}-{us[6:]}", f"+1.{grouped(us, 3, 3, 4, by='.')}"]
        + [f"+86 {cn}", f"+86 {grouped(cn, 3, 4, 4)}", f"+86-{cn}", f"+86{cn}", f"0086 {cn}"]
        + [f"+49 {grouped(de, 3, 7)}", f"+49 (0){grouped(de, 3, 7)}", f"+49{de}", f"0049 {de}"]
        + [f"+33 {grouped(fr, 1, 2, 2, 2, 2)}", f"+33{fr}", f"+34 {grouped(es, 3, 3, 3)}"]
        + [f"+44 {grouped(gb, 4, 6)}", f"+44 {grouped(gb, 4, 3, 3)}"]
    )


def us_national(rng: Random) -> str:
    us = us_phone(rng)
    return rng.choice([f"({us[:3]}) {us[3:6]}-{us[6:]}", grouped(us, 3, 3, 4, by="-")])


def cn_national(rng: Random) -> str:
    cn = cn_mobile(rng)
    return rng.choice([cn, cn, grouped(cn, 3, 4, 4), grouped(cn, 3, 4, 4, by="-")])


def de_national(rng: Random) -> str:
    mobile = rng.choice(["170", "171", "175"]) + digits(rng, 7)
    return rng.choice([f"0{grouped(mobile, 3, 7)}", f"0{mobile[:3]}/{mobile[3:]}"])


def fr_national(rng: Random) -> str:
    return grouped(
        rng.choice(["0142", "0144", "0478", "0556", "0612", "0668"]) + digits(rng, 6),
        2,
        2,
        2,
        2,
        2,
        by=rng.choice(" .-"),
    )


def es_national(rng: Random) -> str:
    return grouped("6" + digits(rng, 8), 3, 3, 3, by=rng.choice([" ", "-", ""]))


# ------------------------------------------------------------------ money


def luhn_digit(body: str) -> str:
    total = 0
    for place, digit in enumerate(reversed(body)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return str(-total % 10)


def card(rng: Random) -> str:
    prefix, length = rng.choice(
        [("4", 16), ("51", 16), ("55", 16), ("2221", 16), ("34", 15), ("37", 15), ("6011", 16)]
        + [("3530", 16), ("622126", 16), ("6225", 19), ("4", 16)]
    )
    body = prefix + digits(rng, length - 1 - len(prefix))
    number = body + luhn_digit(body)
    sizes = (4, 6, 5) if length == 15 else (4, 4, 4, 4, 3)[: (length + 3) // 4]
    return rng.choice([number, grouped(number, *sizes), grouped(number, *sizes, by="-")])


def number_of(text: str) -> int:
    """Letters are worth 10 to 35 (ISO 13616)."""
    return int("".join(str(int(c, 36)) for c in text))


def iban(rng: Random) -> str:
    country = rng.choice(["DE", "FR", "ES", "GB", "NL", "AT", "CH"])
    body = {
        "DE": lambda: digits(rng, 18),
        "AT": lambda: digits(rng, 16),
        "NL": lambda: "ABNA" + digits(rng, 10),
        "CH": lambda: digits(rng, 17),
        "GB": lambda: "NWBK" + digits(rng, 14),
        "FR": lambda: _rib(digits(rng, 21)),
        "ES": lambda: _ccc(digits(rng, 8), digits(rng, 10)),
    }[country]()
    check = 98 - number_of(body + country + "00") % 97
    number = f"{country}{check:02d}{body}"
    return rng.choice([number, grouped(number, *[4] * (len(number) // 4))])


def _rib(body: str) -> str:
    """French key: bank, counter and account weigh 89, 15 and 3."""
    key = 97 - (89 * int(body[:5]) + 15 * int(body[5:10]) + 3 * int(body[10:])) % 97
    return f"{body}{key:02d}"


def _ccc(bank: str, account: str) -> str:
    """Spanish control digits, mod 11 with weights of powers of two."""

    def control(ten: str) -> str:
        digit = 11 - sum(int(d) * 2**n for n, d in enumerate(ten)) % 11
        return str({10: 1, 11: 0}.get(digit, digit))

    return bank + control("00" + bank) + control(account) + account


# ------------------------------------------------------------------ national ids


def day(rng: Random) -> date:
    return date(1940, 1, 1) + timedelta(days=rng.randrange(23_000))


def us_ssn(rng: Random) -> str:
    area = rng.choice([rng.randint(1, 665), rng.randint(667, 899)])
    return f"{area:03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}"


def cn_id(rng: Random) -> str:
    place = rng.choice(
        ["110105", "310104", "440106", "330106", "510107", "420106", "320102", "610103"]
    )
    body = f"{place}{day(rng):%Y%m%d}{rng.randint(1, 999):03d}"
    weights = [2 ** (17 - n) % 11 for n in range(17)]
    left = sum(int(d) * w for d, w in zip(body, weights, strict=True)) % 11
    number = body + "10X98765432"[left]
    return rng.choice([number, number, number.lower(), grouped(number, 6, 8, 4)])


def fr_nir(rng: Random) -> str:
    born = day(rng)
    body = f"{rng.choice('12')}{born:%y%m}{rng.randint(1, 19):02d}{rng.randint(1, 900):03d}"
    body += f"{rng.randint(1, 999):03d}"
    number = f"{body}{97 - int(body) % 97:02d}"
    return rng.choice([number, grouped(number, 1, 2, 2, 2, 3, 3, 2)])


def es_dni(rng: Random) -> str:
    number = digits(rng, 8)
    letter = "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23]
    return rng.choice([f"{number}-{letter}", f"{grouped(number, 2, 3, 3, by='.')}-{letter}"])


def es_nie(rng: Random) -> str:
    first, rest = rng.randrange(3), digits(rng, 7)
    letter = "TRWAGMYFPDXBNJZSQVHLCKE"[int(f"{first}{rest}") % 23]
    return rng.choice([f"{'XYZ'[first]}{rest}{letter}", f"{'XYZ'[first]}-{rest}-{letter}"])


_ODD = dict(
    zip(
        string.digits + string.ascii_uppercase,
        [1, 0, 5, 7, 9, 13, 15, 17, 19, 21]
        + [1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25]
        + [24, 23],
        strict=True,
    )
)


def it_cf(rng: Random) -> str:
    born = day(rng)
    names = rng.choice(["RSSMRA", "BNCLRA", "VRDGPP", "FRRNNA", "CLMMRC"])
    body = f"{names}{born:%y}{'ABCDEHLMPRST'[born.month - 1]}{born.day:02d}"
    body += rng.choice(["H501", "F205", "L219", "A944"])
    total = sum(
        _ODD[c] if n % 2 == 0 else (int(c) if c.isdigit() else ord(c) - 65)
        for n, c in enumerate(body)
    )
    return body + string.ascii_uppercase[total % 26]


def nl_bsn(rng: Random) -> str:
    while True:
        body = str(rng.randint(1, 9)) + digits(rng, 7)
        left = sum(int(d) * w for d, w in zip(body, range(9, 1, -1), strict=True)) % 11
        if left < 10:
            return f"{body}{left}"


def de_idnr(rng: Random) -> str:
    """Ten digits of which one comes twice, then ISO 7064 mod 11, 10."""
    kept = rng.sample(string.digits, 9)
    body = [*kept, rng.choice(kept)]
    rng.shuffle(body)
    while body[0] == "0":
        rng.shuffle(body)
    product = 10
    for digit in body:
        total = (int(digit) + product) % 10 or 10
        product = total * 2 % 11
    number = "".join(body) + str((11 - product) % 10)
    return rng.choice([number, grouped(number, 2, 3, 3, 3)])


def pl_pesel(rng: Random) -> str:
    born = day(rng)
    body = f"{born:%y%m%d}{digits(rng, 4)}"
    weights = (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)
    return body + str(-sum(int(d) * w for d, w in zip(body, weights, strict=True)) % 10)


def gb_nino(rng: Random) -> str:
    letters = rng.choice(["AB", "JK", "LM", "PX", "SY", "WE", "CE", "HR"])
    number = digits(rng, 6)
    written = rng.choice([number, f" {grouped(number, 2, 2, 2)} "])
    return f"{letters}{written}{rng.choice('ABCD')}"


def br_cpf(rng: Random) -> str:
    body = digits(rng, 9)
    for _ in range(2):
        weights = range(len(body) + 1, 1, -1)
        left = sum(int(d) * w for d, w in zip(body, weights, strict=True)) * 10 % 11
        body += str(left % 10)
    return f"{grouped(body[:9], 3, 3, 3, by='.')}-{body[9:]}"


# ------------------------------------------------------------------ machines, secrets


def ip(rng: Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(
            [
                "2001:db8:" + ":".join(f"{rng.randrange(1 << 16):x}" for _ in range(6)),
                f"fe80::{rng.randrange(4096, 1 << 16):x}:{rng.randrange(4096, 1 << 16):x}",
                f"2a02:8{rng.randrange(256):02x}::{rng.randrange(4096, 1 << 16):x}",
            ]
        )
    first = rng.choice([10, 172, 192, 203, 198, 81, 93, 8, 114])
    return f"{first}." + ".".join(str(rng.randint(0, 254)) for _ in range(3))


def mac(rng: Random) -> str:
    octets = [f"{rng.randrange(256):02x}" for _ in range(5)] + [f"{rng.randrange(160, 256):02x}"]
    text = rng.choice(":-").join(octets)
    return rng.choice([text, text.upper()])


def url(rng: Random) -> str:
    secret = some(rng, string.ascii_letters + string.digits + "!*-_", rng.randint(6, 14))
    scheme = rng.choice(["https", "http", "ftp", "postgresql", "mongodb+srv", "amqp"])
    return f"{scheme}://{rng.choice(FIRST)}:{secret}@{rng.choice(HOSTS)}/{rng.choice(LAST)}"


_B62 = string.ascii_letters + string.digits


def key(rng: Random) -> str:
    return rng.choice(
        [
            "AKIA" + some(rng, string.ascii_uppercase + "234567", 16),
            "ghp_" + some(rng, _B62, 36),
            f"xoxb-{digits(rng, 12)}-{digits(rng, 12)}-{some(rng, _B62, 24)}",
            "sk_live_" + some(rng, _B62, 24),
            "AIza" + some(rng, _B62 + "-_", 34) + some(rng, _B62, 1),
            "sk-proj-" + some(rng, _B62, 48),
            "glpat-" + some(rng, _B62, 20),
            ".".join(
                [_b64('{"alg":"HS256","typ":"JWT"}'), _b64(f'{{"sub":"{digits(rng, 10)}"}}')]
                + [some(rng, _B62, 43)]
            ),
        ]
    )


def _b64(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def assigned_key(rng: Random) -> str:
    """A secret without any mark of its own."""
    return rng.choice([some(rng, "0123456789abcdef", 40), some(rng, _B62, 32)])


def private_key(rng: Random) -> str:
    kind = rng.choice(["RSA PRIVATE KEY", "PRIVATE KEY", "EC PRIVATE KEY", "OPENSSH PRIVATE KEY"])
    lines = [some(rng, _B62 + "+/", 64) for _ in range(rng.randint(3, 8))]
    return "\n".join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----"])


# ------------------------------------------------------------------ what is not personal


def isbn(rng: Random) -> str:
    body = "978" + digits(rng, 9)
    check = -sum(int(d) * (3 if n % 2 else 1) for n, d in enumerate(body)) % 10
    return rng.choice(
        [f"ISBN {grouped(f'{body}{check}', 3, 1, 2, 6, 1, by='-')}", f"ISBN {body}{check}"]
    )


def moment(rng: Random) -> str:
    on = day(rng).replace(year=rng.randint(2000, 2025), day=rng.randint(1, 28))
    clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:{rng.randint(0, 59):02d}"
    return rng.choice(
        [f"{on} {clock}", f"{on}T{clock}Z", f"{on:%d.%m.%Y}", f"{on:%d/%m/%Y %H:%M}"]
        + [f"{on:%Y%m%d%H%M%S}", str(rng.randint(10**9, 17 * 10**8)), f"{on:%Y%m%d}"]
        + [str(rng.randint(10**12, 17 * 10**11)), f"[{on} {clock},{digits(rng, 3)}]"]
    )


def digest(rng: Random) -> str:
    alphabet = "0123456789abcdef"
    identifier = str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return rng.choice(
        [some(rng, alphabet, n) for n in (7, 32, 40, 64)]
        + [identifier, f"sha256:{some(rng, alphabet, 64)}"]
    )


def version(rng: Random) -> str:
    parts = [str(rng.randint(0, 20)) for _ in range(rng.choice([2, 3, 4]))]
    return rng.choice(["v", "version ", "Version ", "==", "release "]) + ".".join(parts)


def price(rng: Random) -> str:
    whole, cents = rng.randint(1, 9_999_999), digits(rng, 2)
    return rng.choice(
        [
            f"${whole:,}.{cents}",
            f"{whole:,} EUR".replace(",", "."),
            f"{whole:,} €".replace(",", " "),
        ]
        + [f"¥{whole}", f"{whole}.{cents} USD", f"CHF {whole:,}.–".replace(",", "'")]
    )


def order(rng: Random) -> str:
    number = digits(rng, rng.randint(6, 17))
    named = rng.choice(
        ["order {}", "Order no. {}", "invoice #{}", "tracking number {}", "Bestellnummer {}"]
        + [
            "Rechnungsnummer: {}",
            "commande n° {}",
            "facture {}",
            "pedido {}",
            "订单号{}",
            "快递单号：{}",
        ]
    )
    return named.format(number)


def measures(rng: Random) -> str:
    """A row of a table."""
    return " ".join(
        rng.choice(
            [f"{rng.random():.6f}", f"{rng.uniform(-9e3, 9e3):.2f}", str(rng.randint(0, 99999))]
        )
        for _ in range(rng.randint(3, 8))
    )


def place(rng: Random) -> str:
    return f"{rng.uniform(-90, 90):.6f}, {rng.uniform(-180, 180):.6f}"


def code(rng: Random) -> str:
    return rng.choice(
        [
            "@dataclass(frozen=True)",
            f"x[{rng.randint(0, 9)}::{rng.randint(2, 9)}]",
            f"0x{rng.getrandbits(64):016x}",
            "std::vector<int>::iterator",
            f"token = tokens[{rng.randint(0, 99)}]",
            f"RATE = {rng.random():.16f}",
            f"seed={rng.getrandbits(31)}",
            f"range({rng.randint(1, 99)}, {rng.randint(100, 99999)})",
            f"{rng.randint(1, 9)}e-{rng.randint(1, 20)}",
            "password = os.environ['SERVICE_PASSWORD']",
            "api_key: str | None = None",
            f"y = a @ b.T  # {rng.randint(1, 64)} x {rng.randint(1, 64)}",
        ]
    )
