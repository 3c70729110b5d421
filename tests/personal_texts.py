"""Seeded documents in five languages, with personal values, traps, and labels of the values."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from tests import personal_values as values

ZERO_WIDTH = "\u200b\u2060\ufeff"


@dataclass(frozen=True)
class Label:
    start: int
    end: int
    type: str


@dataclass
class Draft:
    text: str = ""
    labels: list[Label] = field(default_factory=list)

    def add(self, sentence: str, kind: str = "", value: str = "") -> None:
        before, slot, after = sentence.partition("{}")
        self.text += before
        if slot:
            self.labels.append(Label(len(self.text), len(self.text) + len(value), kind))
        self.text += value + after


# ------------------------------------------------------------------ what is said, by language

PLAIN = {
    "en": ["The meeting went well.", "We looked at three of the plans.", "It rained all day."],
    "zh": ["会议进行得很顺利。", "我们讨论了三个方案。", "昨天下了一整天雨。"],
    "de": [
        "Das Treffen verlief gut.",
        "Wir sahen drei der Pläne an.",
        "Es regnete den ganzen Tag.",
    ],
    "fr": [
        "La réunion s'est bien passée.",
        "Nous avons vu trois plans.",
        "Il a plu toute la journée.",
    ],
    "es": ["La reunión fue bien.", "Vimos tres de los planes.", "Llovió todo el día."],
}
BARE = {
    "en": ["We have {} on file.", "She wrote down {} and left.", "Use {} from now on."],
    "zh": ["我们记录的是{}。", "她写下了{}就走了。", "以后请用{}，谢谢。"],
    "de": [
        "Bei uns steht {} in der Akte.",
        "Sie notierte {} und ging.",
        "Bitte ab jetzt {} nehmen.",
    ],
    "fr": ["Nous avons noté {} au dossier.", "Elle a écrit {} puis elle est partie."],
    "es": ["Tenemos anotado {} en la ficha.", "Ella apuntó {} y se fue."],
}
"""Nothing says what the value is."""
NAMED = {
    "email": {
        "en": ["Write to {} for more.", "E-mail: {}", "Contact <{}>, please."],
        "zh": ["请发邮件到{}。", "邮箱：{}", "联系邮箱{}，谢谢"],
        "de": ["Schreiben Sie an {}.", "E-Mail: {}"],
        "fr": ["Écrivez à {}.", "Courriel : {}"],
        "es": ["Escriba a {}.", "Correo: {}"],
    },
    "phone": {
        "en": ["Call me at {}.", "Phone: {}", "My mobile is {}, any time."],
        "zh": ["电话：{}", "我的手机是{}。", "请致电{}联系。"],
        "de": ["Tel.: {}", "Meine Handynummer ist {}.", "Telefon {} (tagsüber)"],
        "fr": ["Tél. : {}", "Mon téléphone est le {}.", "Appelez le {} le matin."],
        "es": ["Teléfono: {}", "Mi móvil es {}.", "Llame al {}."],
    },
    "card": {
        "en": ["Card number: {}", "Please charge my card {}.", "Paid by Visa {} today."],
        "zh": ["卡号：{}", "我的银行卡是{}。", "信用卡{}已扣款。"],
        "de": ["Kreditkarte: {}", "Karte {} belastet."],
        "fr": ["Carte bancaire : {}", "Débitez la carte {}."],
        "es": ["Tarjeta: {}", "Cargue la tarjeta {}."],
    },
    "iban": {
        "en": ["IBAN: {}", "Transfer it to {}."],
        "zh": ["国际账号{}。", "IBAN：{}"],
        "de": ["IBAN: {}", "Bitte auf {} überweisen."],
        "fr": ["IBAN : {}", "Virement sur {}."],
        "es": ["IBAN: {}", "Transferir a {}."],
    },
    "ip": {
        "en": ["Login from {} was refused.", "The host {} answered."],
        "zh": ["来自{}的登录被拒绝。", "主机IP：{}"],
        "de": ["Anmeldung von {} abgelehnt.", "Der Rechner {} antwortet."],
        "fr": ["Connexion depuis {} refusée.", "La machine {} répond."],
        "es": ["Acceso desde {} rechazado.", "El equipo {} responde."],
    },
    "birth_date": {
        "en": ["Born on {} in Leeds.", "Date of birth: {}", "DOB {}"],
        "zh": ["出生日期：{}", "他出生于{}，在上海。", "生日是{}"],
        "de": ["Geboren am {} in Ulm.", "Geburtsdatum: {}"],
        "fr": ["Date de naissance : {}", "Elle est née le {} à Lyon."],
        "es": ["Fecha de nacimiento: {}", "Nacida el {} en Jaén."],
    },
    "address": {
        "en": ["I live at {}.", "Address: {}.", "Ship it to {}, please."],
        "zh": ["地址：{}。", "我住在{}。", "请寄到{}，谢谢。"],
        "de": ["Anschrift: {}.", "Ich wohne in {}, ganz oben.", "Bitte an {} schicken."],
        "fr": ["Adresse : {}.", "J'habite {}, au fond.", "Livrez au {}."],
        "es": ["Dirección: {}.", "Vivo en {}, arriba.", "Envíelo a {}."],
    },
    "key": {
        "en": ["Deploy with {} tonight.", "key: {}"],
        "zh": ["密钥是{}。", "请用{}部署。"],
        "de": ["Schlüssel {} verwenden."],
        "fr": ["La clé est {}."],
        "es": ["La clave es {}."],
    },
}
ASSIGNED = ["api_key = '{}'", 'SECRET_TOKEN="{}"', "password: {}", '"client_secret": "{}",']
IDS: tuple[tuple[values.Maker, Sequence[str], bool], ...] = (
    (values.us_ssn, ["SSN: {}", "Her social security number is {}."], True),
    (values.cn_id, ["身份证号：{}", "身份证号码是{}，请核对。"], True),
    (values.fr_nir, ["N° de sécurité sociale : {}", "NIR {}"], True),
    (values.es_dni, ["DNI: {}", "con DNI {}."], True),
    (values.es_nie, ["NIE: {}", "con NIE {}."], True),
    (values.it_cf, ["Codice fiscale: {}", "C.F. {}"], True),
    (values.nl_bsn, ["BSN: {}", "Burgerservicenummer {}"], False),
    (values.de_idnr, ["Steuer-ID: {}", "Steueridentifikationsnummer {}"], False),
    (values.pl_pesel, ["PESEL: {}", "PESEL {}"], False),
    (values.gb_nino, ["NINO: {}", "National Insurance number {}."], True),
    (values.br_cpf, ["CPF: {}", "CPF {}"], True),
)
"""Maker, sentences, and whether the number may stand without a word that names it."""
NATIONAL_PHONES = {
    "en": values.us_national,
    "zh": values.cn_national,
    "de": values.de_national,
    "fr": values.fr_national,
    "es": values.es_national,
}
BARE_PHONES = ("en", "zh", "fr")
"""Where a national number is told by its form alone."""
TRAPS = (
    *(values.order, values.isbn, values.moment, values.digest, values.version, values.price),
    *(values.measures, values.place, values.code),
)
MONTHS = {
    "en": "January February March April May June July August September October November December",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre "
    "diciembre",
}


def birth_date(rng: Random, language: str) -> str:
    on = values.day(rng)
    if language == "zh":
        return rng.choice([f"{on.year}年{on.month}月{on.day}日", f"{on}", f"{on:%Y.%m.%d}"])
    month = MONTHS[language].split()[on.month - 1]
    long = {
        "en": rng.choice([f"{month} {on.day}, {on.year}", f"{on.day} {month} {on.year}"]),
        "de": f"{on.day}. {month} {on.year}",
        "fr": f"{on.day} {month} {on.year}",
        "es": f"{on.day} de {month} de {on.year}",
    }[language]
    return rng.choice([long, f"{on}", f"{on:%d/%m/%Y}", f"{on:%d.%m.%Y}"])


def address(rng: Random, language: str) -> str:
    """In the forms that the rules promise: number and street, town and code."""
    number, code = rng.randint(1, 199), f"{rng.randint(10_000, 89_999)}"
    town = {
        "en": rng.choice(["Springfield, IL", "Salem, OR", "Santa Clara, CA"]),
        "de": rng.choice(["Berlin", "Frankfurt am Main", "Köln"]),
        "fr": rng.choice(["Paris", "Lyon", "Saint-Étienne"]),
        "es": rng.choice(["Madrid", "Jaén", "Santiago de Compostela"]),
        "zh": rng.choice(["北京市朝阳区", "上海市浦东新区", "广东省深圳市南山区"]),
    }[language]
    street = {
        "en": rng.choice(["Evergreen Terrace", "Main Street", "N. Oak Ave.", "42nd St"]),
        "de": rng.choice(["Hauptstraße", "Goethestr.", "Lindenweg", "Karl-Marx-Allee"]),
        "fr": rng.choice(["rue de la Paix", "avenue Victor Hugo", "bd Saint-Michel"]),
        "es": rng.choice(["Calle Mayor", "Avda. de América", "Plaza de España"]),
        "zh": rng.choice(["建国路", "人民大道", "长安街", "中山北路"]),
    }[language]
    if language == "zh":
        rest = rng.choice(["", f"{rng.randint(1, 30)}号楼{rng.randint(101, 2909)}室"])
        return f"{town}{street}{number}号{rest}"
    end = f"{town} {code}" if language == "en" else f"{code} {town}"
    lines = rng.choice([", ", "\n"])
    if language in ("en", "fr"):
        return f"{number} {street}{lines}{end}"
    return f"{street} {number}{lines}{end}"


OF_LANGUAGE = {"birth_date": birth_date, "address": address}


# ------------------------------------------------------------------ carelessness


def careless(rng: Random, text: str) -> str:
    """The same value as people, scanners and line breaks leave it."""
    way = rng.choice(["as it is"] * 6 + ["wide", "break", "invisible", "hard spaces", "dashes"])
    if way == "wide":
        return "".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in text)
    if way == "hard spaces":
        return text.replace(" ", rng.choice("\u00a0\u2009\u3000"))
    if way == "dashes":
        return text.replace("-", rng.choice("\u2010\u2011\u2013"))
    if way == "invisible":
        at = rng.randrange(1, len(text))
        return text[:at] + rng.choice(ZERO_WIDTH) + text[at:]
    if way == "break":
        return _broken(rng, text)
    return text


def _broken(rng: Random, text: str) -> str:
    """Over the end of a line: in place of a space, after a dash, or between two digits."""
    if gaps := [m.start() for m in re.finditer(" ", text)]:
        at = rng.choice(gaps)
        return f"{text[:at]}\n{text[at + 1 :]}"
    places = [m.end() for m in re.finditer(r"(?<=\d)-?(?=\d)", text)]
    if not places:
        return text
    at = rng.choice(places)
    return f"{text[:at]}\n{text[at:]}"


def careless_email(rng: Random, text: str) -> str:
    name, _, host = text.partition("@")
    return rng.choice(
        [text] * 6
        + [text.upper(), f"{name}＠{host}", "".join(chr(ord(c) + 0xFEE0) for c in text)]
        + [f"{name}[at]{host}", f"{name} (at) {host.replace('.', ' (dot) ')}"]
        + ([f"{name} @ {host}", f"{name}@\n{host}"] if "." in name else [])
    )


# ------------------------------------------------------------------ documents

KINDS = ("email", "phone", "card", "iban", "national_id", "ip", "mac", "url", "key", "birth_date")
WEIGHTS = (5, 6, 4, 3, 7, 3, 2, 2, 3, 3)
"""Addresses are asked for by name: their forms are promised, and nothing that has no form."""


def documents(count: int, seed: int, kinds: Sequence[str] = KINDS) -> list[Draft]:
    rng = Random(seed)
    return [document(rng, rng.choice(list(PLAIN)), kinds) for _ in range(count)]


def document(rng: Random, language: str, kinds: Sequence[str] = KINDS) -> Draft:
    draft = Draft()
    wanted = ["value"] * rng.randint(0, 5) + ["trap"] * rng.randint(1, 4)
    wanted += ["plain"] * rng.randint(2, 6) + ["private_key"] * (rng.random() < 0.05)
    rng.shuffle(wanted)
    for what in wanted:
        _sentence(draft, rng, language, what, kinds)
        draft.text += rng.choice([" ", "\n", "\n\n"])
    return draft


def _sentence(draft: Draft, rng: Random, language: str, what: str, kinds: Sequence[str]) -> None:
    if what == "plain":
        draft.add(rng.choice(PLAIN[language]))
    elif what == "trap":
        trap = " ".join(rng.choice(TRAPS)(rng) for _ in range(rng.randint(1, 2)))
        draft.add(rng.choice([f"{trap} ", f"({trap}) ", f"{trap}\n"]))
    elif what == "private_key":
        draft.add("\n{}\n", what, values.private_key(rng))
    else:
        weights = WEIGHTS if kinds == KINDS else None
        _value(draft, rng, language, rng.choices(kinds, weights)[0])


def _value(draft: Draft, rng: Random, language: str, kind: str) -> None:
    named = NAMED.get(kind, BARE)
    sentences = named[language] if kind in NAMED else BARE[language]  # type: ignore[index]
    if kind == "email":
        value = careless_email(rng, values.email(rng))
    elif kind == "phone":
        if rng.random() < 0.5:
            value = values.international(rng)
            sentences = [*sentences, *BARE[language]]
        else:
            value = NATIONAL_PHONES[language](rng)
            sentences = [*sentences, *(BARE[language] if language in BARE_PHONES else ())]
        value = careless(rng, value)
    elif kind == "national_id":
        make, sentences, alone = rng.choice(IDS)
        sentences = [*sentences, *(BARE[language] if alone else ())]
        value = careless(rng, make(rng))
    elif kind in OF_LANGUAGE:
        value = OF_LANGUAGE[kind](rng, language)
    elif kind == "key" and rng.random() < 0.4:
        sentences, value = ASSIGNED, values.assigned_key(rng)
    else:
        value = getattr(values, kind)(rng)
        value = careless(rng, value) if kind in ("card", "iban") else value
        sentences = [*sentences, *BARE[language]]
    draft.add(rng.choice(list(sentences)), kind, value)
