"""The beginning of a document as it came: what is said around personal values, never they."""

import html

import pytest

from cluster.config.privacy import PrivacySection
from pipelines.data.privacy import showing
from pipelines.data.privacy.scrub import Scrubber
from tests import personal_texts

SCRUBBER = Scrubber(PrivacySection())
ADDRESS = "anna.weber@example.org"


def shown(raw: str, cleaned: str | None = None, size: int = 600) -> str | None:
    text = raw if cleaned is None else cleaned
    return showing.beginning(raw, text, SCRUBBER.scrub(text), SCRUBBER, size)


def test_values_give_way_to_their_types() -> None:
    text = f"写信给 {ADDRESS}，\x07或致电 +49 170 1234567。Ende"
    assert shown(text) == "写信给 [EMAIL]，\x07或致电 [PHONE]。Ende"
    assert shown("nichts\r\n 没有") == "nichts\r\n 没有"


@pytest.mark.parametrize("size", range(1, 40))
def test_a_value_at_the_end_is_not_cut(size: int) -> None:
    for value in (ADDRESS, "eyJhbGciOiJIUzI1.eyJzdWIiOiIx" + "a1B2" * 2000):
        found = shown(f"邮箱是：{value} 谢谢" + "。" * 2000, size=size)
        assert found is not None and value[:2] not in found


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("".join(f"&#{ord(c)};" for c in ADDRESS), ADDRESS),
        ("<p>anna.weber<b>@</b>example.org</p>", ADDRESS),
        ('<a href="mailto:anna.weber%40example.org">Anna</a>', "Anna"),
        ("<i>4111</i> <i>1111</i> <i>1111</i> <i>1111</i>", "card 4111 1111 1111 1111"),
        ("邮箱 ａｎｎａ．weber&#64;example。org", f"邮箱 {ADDRESS}"),
    ],
)
def test_nothing_is_shown_where_a_value_hides(raw: str, cleaned: str) -> None:
    assert shown(f"Hello 你好 {raw} end", f"Hello 你好 {cleaned} end") is None


def test_no_value_of_generated_documents_is_shown() -> None:
    seen = 0
    for draft in personal_texts.documents(150, seed=5):
        values = [draft.text[label.start : label.end] for label in draft.labels]
        for raw in (draft.text, html.escape(draft.text)):
            found = shown(raw, draft.text)
            seen += found is not None
            assert not any(value in html.unescape(found or "") for value in values)
    assert seen > 200
