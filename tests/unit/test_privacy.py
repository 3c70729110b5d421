"""De-identification: what is found, what is left alone, and what stands instead."""

import importlib.util
import re
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config.privacy import PrivacySection
from cluster.config.tokenizer import TokenizerSection
from cluster.errors import ConfigError, PrivacyError
from pipelines.data import tokenizer, vocabulary
from pipelines.data.privacy import scrub
from pipelines.data.privacy.scrub import Scrubbed, Scrubber
from pipelines.data.privacy.spans import Evidence, Span, resolve
from pipelines.data.privacy.view import look
from tests.personal_texts import KINDS, Draft, documents

SCRUBBER = Scrubber(PrivacySection())
KEY = "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dE3fG5hI7jK9lM1nO3pQ5rS7tU9vW1xY3z"
CUT_OFF = "\n".join(["-----BEGIN RSA PRIVATE KEY-----", *[KEY] * 3])
"""A block without its end."""


def scrubbed(text: str, **changes: Any) -> str:
    scrubber = Scrubber(PrivacySection(**changes)) if changes else SCRUBBER
    return scrubber.scrub(text).text


def found(text: str) -> list[tuple[str, str]]:
    return [(span.type, text[span.start : span.end]) for span in SCRUBBER.scrub(text).spans]


# ------------------------------------------------------------------ what is found


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Mail Bob.Smith@example.com now.", "Mail [EMAIL_1] now."),
        ("Écris à zoé@bücher.example.fr.", "Écris à [EMAIL_1]."),
        ("邮箱：zhang.wei＠example.cn，谢谢", "邮箱：[EMAIL_1]，谢谢"),
        ("jane (at) example (dot) org", "[EMAIL_1]"),
        ("我的手机是１３８１２３４５６７８。", "我的手机是[PHONE_1]。"),
        ("call +1 (415) 555-2671 or 415-555-2671", "call [PHONE_1] or [PHONE_2]"),
        ("Tel.: 030/12345678, Handy 0170\n1234567", "Tel.: [PHONE_1], Handy [PHONE_2]"),
        ("卡号 4111 1111\n1111 1111。", "卡号 [CARD_1]。"),
        ("by 3782\u2013822463\u200b\u201310005 today", "by [CARD_1] today"),
        ("IBAN DE89 3704 0044 0532 0130 00!", "IBAN [IBAN_1]!"),
        ("身份证11010519491231002x号", "身份证[NATIONAL_ID_1]号"),
        ("SSN 123-45-6789, BSN: 111222333", "SSN [NATIONAL_ID_1], BSN: [NATIONAL_ID_2]"),
        ("DNI 12345678Z y NIE X-1234567-L", "DNI [NATIONAL_ID_1] y NIE [NATIONAL_ID_2]"),
        ("from 192.168.1.17 and 2001:db8::ff00:42:8329", "from [IP_1] and [IP_2]"),
        ("00:1A:2B:3C:4D:5E is up", "[MAC_1] is up"),
        ("see https://bob:hunter2@host.example/x.", "see [URL_1]."),
        ("id AKIAIOSFODNN7EXAMPLE", "id [KEY_1]"),
        ('"token": "c8a3b6f1e94d2270ab35cd12"', '"token": "[KEY_1]"'),
        ("密码：c8a3b6f1e94d2270ab35cd12", "密码：[KEY_1]"),
        ("born January 5, 1980 in Rome", "born [BIRTH_DATE_1] in Rome"),
        ("他出生于1990年1月15日。", "他出生于[BIRTH_DATE_1]。"),
        ("geboren am 5. März 1971", "geboren am [BIRTH_DATE_1]"),
        ("in der Hauptstraße 12, 10115 Berlin, oben", "in der [ADDRESS_1], oben"),
        ("地址：北京市朝阳区建国路88号3号楼1203室。", "地址：[ADDRESS_1]。"),
        ("12 rue de la Paix, 75002 Paris.", "[ADDRESS_1]."),
        ("Au 3 bd Carnot\n42000 Saint-Étienne, oui", "Au [ADDRESS_1], oui"),
        ("5 cours Mirabeau, 13100 Aix-en-Provence.", "[ADDRESS_1]."),
        ("To 742 Evergreen Terrace, Springfield, IL 62704.", "To [ADDRESS_1]."),
        # national numbers: made up, with right check digits
        ("AHV-Nr. 756.9217.0769.85, ok", "AHV-Nr. [NATIONAL_ID_1], ok"),
        ("Personnummer 811228-9874 i Lund", "Personnummer [NATIONAL_ID_1] i Lund"),
        ("Henkilötunnus 131052-308T.", "Henkilötunnus [NATIONAL_ID_1]."),
        ("CPR-nr. 211062-5629, tak", "CPR-nr. [NATIONAL_ID_1], tak"),
        ("NIF 501 964 843, Lisboa", "NIF [NATIONAL_ID_1], Lisboa"),
        ("T.C. Kimlik No: 17291716060", "T.C. Kimlik No: [NATIONAL_ID_1]"),
        ("Rijksregisternummer 85.07.30-033.28, ja", "Rijksregisternummer [NATIONAL_ID_1], ja"),
        ("NISS 85073003328", "NISS [NATIONAL_ID_1]"),
        ("주민등록번호: 900101-1234568입니다", "주민등록번호: [NATIONAL_ID_1]입니다"),
        ("con CURP BOXW310820HNERXN09.", "con CURP [NATIONAL_ID_1]."),
        ("Aadhaar: 2341 2341 2346", "Aadhaar: [NATIONAL_ID_1]"),
        ("आधार संख्या 2341 2341 2346 है", "आधार संख्या [NATIONAL_ID_1] है"),
        # keys of services
        (f"登录用hf_{KEY[:34]}。", "登录用[KEY_1]。"),
        (f"npm_{KEY[:36]} is set", "[KEY_1] is set"),
        (f"pypi-AgEIcHlwaS5vcmcC{KEY} end", "[KEY_1] end"),
        (f"SG.{KEY[:22]}.{KEY[:43]},", "[KEY_1],"),
        (f"Authorization: Bearer {KEY[:30]}", "Authorization: Bearer [KEY_1]"),
        (f"令牌 bearer {KEY[:30]}。", "令牌 bearer [KEY_1]。"),
        (f"密钥：\n{CUT_OFF}\n谢谢。", "密钥：\n[PRIVATE_KEY_1]\n谢谢。"),
        (f'"pem": "{CUT_OFF}"'.replace("\n", "\\n"), '"pem": "[PRIVATE_KEY_1]"'),
    ],
)
def test_values_are_replaced(text: str, left: str) -> None:
    assert scrubbed(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "order 4111111111111111 and Bestellnummer 4012888888881881",
        "ISBN 978-3-16-148410-0, 2024-01-15 10:30:00, 20240115103000",
        "version 10.0.0.12, v1.2.3.4, Chrome/120.0.6099.109",
        "sha1 da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "550e8400-e29b-41d4-a716-446655440000",
        "1.4142135623730951 3.141592653589793 2.718281828459045",
        "a[::2], std::dec::abc, 12:34:56, ::1, 127.0.0.1, 255.255.255.0",
        "git@github.com:org/repo.git, y = a @ b.T, @functools.cache",
        "token = tokenize(source), password = getpass.getpass()",
        "https://user:<password>@host/ and http://host:8080/a@b",
        "价格12,345.67元，订单号：13812345678，版本2.10.3.1",
        "The 1990-01-15 release; published 5 March 1971",
        "rue de la Paix; 12 Monkeys; 第88号",
        "0x1F600 1_000_000 1e-10 0o755",
        "[EMAIL_1] [NAME] [1] [A_2]",
    ],
)
def test_what_is_not_personal_stays(text: str) -> None:
    assert scrubbed(text) == text


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("请发邮件至张三@例子.中国谢谢", "张三@例子.中国"),
        ("联系邮箱：用户@example.com。", "用户@example.com"),
        ("我的邮箱是李雷123@例子.中国，谢谢", "李雷123@例子.中国"),
        ("请联系zhang@例子.公司谢谢", "zhang@例子.公司"),
        ("张三＠例子．中国", "张三＠例子．中国"),
        ("почта: иван@почта.рф.", "иван@почта.рф"),
        ("メールは田中@例え.みんな まで", "田中@例え.みんな"),
        ("값은 홍길동@예시.한국 입니다", "홍길동@예시.한국"),
    ],
)
def test_addresses_in_letters_that_are_not_latin(text: str, address: str) -> None:
    assert scrubbed(text) == text.replace(address, "[EMAIL_1]")


@pytest.mark.parametrize(
    "text",
    [
        "装饰器@app.route('/')",
        "找@李四。中国队赢了",
        "价格@三.五",
        "回复@张三：你好",
        "用@dataclass.de(x)",
    ],
)
def test_signs_in_chinese_text_that_are_no_addresses(text: str) -> None:
    assert scrubbed(text) == text


@dataclass
class Measured:
    """Of one type: a value is found if a span of the type covers it whole; a span is right if most
    of it is a value of any type."""

    hits: int = 0
    labels: int = 0
    right: int = 0
    spans: int = 0

    @property
    def recall(self) -> float:
        return self.hits / self.labels

    @property
    def precision(self) -> float:
        return self.right / self.spans


def measured(drafts: list[Draft], results: list[Scrubbed]) -> dict[str, Measured]:
    """By type, and all of them as `all`."""
    types: defaultdict[str, Measured] = defaultdict(Measured)
    for draft, result in zip(drafts, results, strict=True):
        for label in draft.labels:
            covered = any(
                s.type == label.type and s.start <= label.start and label.end <= s.end
                for s in result.spans
            )
            for one in (types[label.type], types["all"]):
                one.hits, one.labels = one.hits + covered, one.labels + 1
        for s in result.spans:
            right = any(
                min(s.end, label.end) - max(s.start, label.start) >= 0.8 * (s.end - s.start)
                for label in draft.labels
            )
            for one in (types[s.type], types["all"]):
                one.right, one.spans = one.right + right, one.spans + 1
    return types


def test_recall_and_precision_on_generated_documents() -> None:
    """benchmarks/privacy.py measures another set of as many; every type is measured alone, too."""
    drafts = documents(2000, seed=20)
    types = measured(drafts, [SCRUBBER.scrub(draft.text) for draft in drafts])
    assert set(types) == {*KINDS, "private_key", "all"}
    assert all(one.labels > 90 for one in types.values()), types
    assert {name: one for name, one in types.items() if one.recall < 0.99} == {}
    assert {name: one for name, one in types.items() if one.precision < 0.95} == {}


def test_addresses_in_the_promised_forms_are_found() -> None:
    drafts = documents(300, seed=22, kinds=("address",))
    found = measured(drafts, [SCRUBBER.scrub(draft.text) for draft in drafts])["address"]
    assert found.labels > 600 and found.recall >= 0.99 and found.precision >= 0.95, found


def test_generated_documents_are_done_after_once() -> None:
    for draft in documents(300, seed=20):
        once = SCRUBBER.scrub(draft.text)
        again = SCRUBBER.scrub(once.text)
        assert again.text == once.text and not again.spans, draft.text


def test_source_code_is_hardly_touched() -> None:
    """Modules about numbers, colours, times, tables of characters and random state."""
    names = ["calendar", "colorsys", "decimal", "fractions", "html.entities", "ipaddress", "random"]
    names += ["statistics", "stringprep", "this", "token", "turtle", "encodings.cp1252", "opcode"]
    counts: Counter[str] = Counter()
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec and spec.origin
        counts += SCRUBBER.scrub(Path(spec.origin).read_text("utf-8")).counts
    # `ipaddress` shows addresses, and authors sign with theirs.
    assert set(counts) <= {"email", "ip"}, counts


# ------------------------------------------------------------------ surrogates


def test_the_same_value_has_the_same_surrogate_in_a_document() -> None:
    text = "4111 1111 1111 1111, a@example.com, 4111111111111111, A@example.com, b@example.com"
    assert scrubbed(text) == "[CARD_1], [EMAIL_1], [CARD_1], [EMAIL_1], [EMAIL_2]"
    assert scrubbed(text, style="plain") == "[CARD], [EMAIL], [CARD], [EMAIL], [EMAIL]"


def test_numbers_that_a_document_has_already_are_not_given_again() -> None:
    assert scrubbed("[EMAIL_3] writes to a@example.com") == "[EMAIL_3] writes to [EMAIL_4]"


def test_only_the_types_that_are_asked_for() -> None:
    text = "a@example.com, +14155552671"
    assert scrubbed(text, types=("phone",)) == "a@example.com, [PHONE_1]"


def test_national_phone_numbers_of_the_regions_that_are_asked_for() -> None:
    text = "Tel: (415) 555-2671"
    assert scrubbed(text, phone_regions=("US",)) == "Tel: [PHONE_1]"
    assert scrubbed(text, phone_regions=("FR",)) == text


def test_spans_are_those_of_the_text_as_it_came() -> None:
    text = "邮箱 a\u200b@example.com（ＩＤ）电话１３８\u200b１２３４５６７８ end"
    assert found(text) == [
        ("email", "a\u200b@example.com"),
        ("phone", "１３８\u200b１２３４５６７８"),
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([draft.text for draft in documents(40, seed=3)]),
            st.text(alphabet="0123456789 .-+()@/:\n年月日号路a１\u200bé[]_E", max_size=40),
        ),
        max_size=4,
    ).map("".join)
)
def test_twice_changes_nothing(text: str) -> None:
    once = SCRUBBER.scrub(text)
    assert SCRUBBER.scrub(once.text).text == once.text
    ends = [0]
    for span in once.spans:
        assert ends[-1] <= span.start < span.end <= len(text)
        ends.append(span.end)


def test_surrogates_are_text_for_a_tokenizer() -> None:
    """Bytes like any other: they survive training and never become a control token."""
    text = scrubbed("写信给 a@example.com 或 b@example.com，卡号4111 1111 1111 1111。\n") * 20
    trained = tokenizer.open_tokenizer(vocabulary.train([text], 300, TokenizerSection()).to_str())
    ids = trained.encode(text, add_special_tokens=False).ids
    assert trained.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.END_OF_TEXT_ID not in ids
    assert "example" not in trained.to_str()


# ------------------------------------------------------------------ spans, view


def test_overlapping_finds_become_one_over_all_of_them() -> None:
    spans = [
        Span(0, 10, "phone", Evidence.FORM),
        Span(8, 20, "card"),
        Span(20, 25, "email"),
        Span(30, 40, "phone", Evidence.FORM),
        Span(30, 40, "national_id", Evidence.NAMED),
    ]
    assert [(s.start, s.end, s.type) for s in resolve(spans)] == [
        (0, 20, "card"),
        (20, 25, "email"),
        (30, 40, "national_id"),
    ]
    assert resolve(reversed(spans)) == resolve(spans)
    assert resolve([]) == []


def test_a_view_leads_back_to_the_text() -> None:
    text = "１\u200b２ \u0663\U0001d7d2–é。\U0001f600x"
    view = look(text)
    assert view.text == "12 34-é。\U0001f600x"
    assert text[slice(*view.original(0, 2))] == "１\u200b２"
    assert text[slice(*view.original(9, 10))] == "x"


# ------------------------------------------------------------------ names, failures


def tell_names(text: str) -> Iterator[tuple[int, int, str]]:
    for name in ("王芳", "Bob"):
        if (at := text.find(name)) >= 0:
            yield at, at + len(name), "name"


SECRET = "a@example.com has 4111 1111 1111 1111"
"""Not written out where a traceback would quote the line."""


def fail(text: str) -> list[Any]:
    raise ValueError(f"cannot read {text}")


def tell_nonsense(text: str) -> list[Any]:
    return [(0, len(text) + 1, "name")]


def test_names_are_found_by_a_function_of_the_recipe() -> None:
    text = "王芳 and Bob: a@example.com"
    assert scrubbed(text) == "王芳 and Bob: [EMAIL_1]"
    assert scrubbed(text, ner=f"{__name__}:tell_names") == "[NAME_1] and [NAME_2]: [EMAIL_1]"


class Entity:
    """As spaCy's `Span` has it."""

    def __init__(self, text: str, value: str, label: str) -> None:
        self.start_char, self.label_ = text.index(value), label
        self.end_char = self.start_char + len(value)


class Nlp:
    """As a pipeline of spaCy: called with a text, it gives a document with entities."""

    def __init__(self) -> None:
        self.ents: list[Entity] = []

    def __call__(self, text: str) -> "Nlp":
        known = {"王芳": "PERSON", "Bob Smith": "PERSON", "Berlin": "GPE"}
        self.ents = [Entity(text, *one) for one in known.items() if one[0] in text]
        return self


def test_the_reader_of_names_in_the_docs_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written as the docs have it, over something with the same face as spaCy."""
    loaded: list[str] = []

    def load(name: str, disable: list[str]) -> Nlp:
        loaded.append(name)
        return Nlp()

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    docs = (Path(__file__).parents[2] / "docs/data.md").read_text("utf-8")
    (code,) = [one for one in re.findall(r"```python\n(.*?)```", docs, re.S) if "spacy" in one]
    (tmp_path / "my_names.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    text = "王芳 met Bob Smith in Berlin: a@example.com. 王芳 left."
    # A model is asked for every name; this one tells of the first of each.
    left = "[NAME_1] met [NAME_2] in Berlin: [EMAIL_1]. 王芳 left."
    assert scrubbed(text, ner="my_names:find") == left
    assert scrubbed("Bob Smith", ner="my_names:find") == "[NAME_1]"
    assert loaded == ["en_core_web_sm"]
    monkeypatch.delitem(sys.modules, "my_names")


def test_a_function_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.privacy.ner nowhere:nothing cannot be imported"):
        Scrubber(PrivacySection(ner="nowhere:nothing"))


@pytest.mark.parametrize("function", ["fail", "tell_nonsense"])
def test_a_failure_does_not_show_the_text(function: str) -> None:
    scrubber = Scrubber(PrivacySection(ner=f"{__name__}:{function}"))
    with pytest.raises(PrivacyError) as raised:
        scrubber.scrub(SECRET)
    assert "4111" not in "".join(traceback.format_exception(raised.value))


def test_a_rule_that_fails_does_not_show_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub.contact, "emails", fail)
    with pytest.raises(PrivacyError, match="email failed on a text with ValueError") as raised:
        Scrubber(PrivacySection()).scrub(SECRET)
    assert "4111" not in "".join(traceback.format_exception(raised.value))
