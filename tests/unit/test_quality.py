"""What the published heuristics throw out, in scripts with and without spaces."""

import pytest

from pipelines.data import language, quality, words
from pipelines.data.cleaning import Drop
from pipelines.data.cleaning_code import _data_characters
from pipelines.data.cleaning_html import page_text
from tests.prose import CHINESE, ENGLISH, doc, made


@pytest.mark.parametrize(
    ("step", "text", "reason"),
    [
        ("gopher_quality", "太短了。", "gopher_quality.min_words"),
        ("gopher_quality", "1234 5678 " * 90, "gopher_quality.min_alphabetic_words"),
        ("gopher_quality", "天地玄黄宇宙洪荒" * 20, "gopher_quality.min_stop_words"),
        ("gopher_quality", "aaa bbb ccc ddd " * 20, "gopher_quality.min_stop_words"),
        ("gopher_repetition", "同一行。\n" * 9, "gopher_repetition.max_duplicate_lines"),
        ("gopher_repetition", "看看太阳" * 40, "gopher_repetition.max_top_ngram"),
        ("gopher_repetition", "see the sun " * 40, "gopher_repetition.max_top_ngram"),
        ("c4_quality", "首页\n登录\n注册\n" * 9, "c4_quality.min_sentences"),
        ("c4_quality", CHINESE + "Lorem ipsum dolor.", "c4_quality.lorem_ipsum"),
        ("fineweb_quality", "首页\n新闻\n体育。\n" * 9, "fineweb_quality.max_short_lines"),
        ("fineweb_quality", CHINESE.replace("。", ""), "fineweb_quality.min_end_marks"),
        ("repetition", "哈哈" * 2000, "repetition.min_ratio"),
        ("symbol_ratio", "====----****！！！！好" * 9, "symbol_ratio.max"),
    ],
)
def test_what_is_no_prose_goes(step: str, text: str, reason: str) -> None:
    assert made(step, doc(text)) == Drop(reason)


def test_c4_keeps_only_the_lines_that_are_sentences() -> None:
    menu = (
        "首页 | 登录\n请启用 javascript 才能继续浏览本网站的内容。\n"
        + CHINESE
        + "阅读我们的隐私政策，谢谢您。\n"
    )
    assert made("c4_quality", doc(menu)) == CHINESE.strip()


def test_two_characters_of_chinese_are_a_word() -> None:
    assert words.words("定日镜，跟随 the sun。").count == 2 + 5 / 2
    assert words.words("don't stop, it's 3.5 km").all == ["don't", "stop,", "it's", "3.5", "km"]
    assert words.width("定日镜 a") == 8
    assert (
        words.words("ประเทศไทย").mostly_unspaced and not words.words("한국어 문장").mostly_unspaced
    )


def test_languages_are_told_apart() -> None:
    texts = {
        "zh": "你好，世界。今天天气很好。",
        "en": ENGLISH,
        "de": "Der Spiegel folgt der Sonne und wirft ihr Licht auf einen Turm in der Wüste.",
        "ja": "ヘリオスタットは太陽を追いかけて光を一点に集めます。",
        "ru": "Зеркало следует за солнцем и весь день отражает его свет на вершину башни.",
        "ar": "تتبع المرآة الشمس طوال اليوم وتعكس ضوءها على قمة البرج في الصحراء.",
    }
    assert {code: language.identify(text)[0] for code, text in texts.items()} == {
        code: code for code in texts
    }
    assert language.identify("2024-01-01 12:30 http://x.example/页") == ("und", 0.0)


def test_a_page_becomes_its_text() -> None:
    page = (
        "<!DOCTYPE html><html><head><title>x</title><style>p{}</style></head><body>"
        "<nav>首页 | About</nav><h1>标题</h1><p>第一段：<b>定日镜</b>。\n second\tline</p>"
        "<ul><li>one</li> <li>二</li></ul><pre>def f():\n    return 1</pre>"
        "<table><tr><td>a</td><td>b</td></tr></table><script>evil()</script><!-- no -->"
        "&lt;tag&gt; &amp; 字<footer>© 版权所有</footer></body></html>"
    )
    assert page_text(page) == (
        "标题\n第一段：定日镜。 second line\n\none\n二\ndef f():\n    return 1\n\na\tb\n<tag> & 字"
    )
    assert page_text("<main><p>只有这里</p></main><p>not this</p>") == "只有这里"


def test_only_pages_are_parsed() -> None:
    text = "if a <b> and c </b>: 好"
    assert made("html_to_text", doc(text, ".md")) == text
    assert (
        made("html_to_text", doc(f"  <!doctype HTML><p>{CHINESE}", ".txt"))
        == CHINESE.replace("\n", " ").strip()
    )


@pytest.mark.timeout(60)
def test_a_page_that_nests_deeply_ends() -> None:
    assert page_text("<div>" * 20_000 + "深处" + "</div>" * 20_000) == "深处"


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("ä½\u00a0å¥½ï¼Œä¸–ç•Œ", "你好，世界"),
        ("cafÃ© dâ€™or", "café d’or"),
        ("全角 ＡＢＣ “引号” ﬁ 不变", "全角 ＡＢＣ “引号” ﬁ 不变"),
        ("Ã la carte", "à la carte"),
    ],
)
def test_mojibake_is_repaired_and_nothing_else(broken: str, whole: str) -> None:
    assert made("repair_mojibake", doc(broken)) == whole


def test_boilerplate_goes_and_prose_about_it_stays() -> None:
    prose = "本文讨论隐私政策的历史，" + "以及它为什么越来越长。" * 20
    text = f"{prose}\nAll rights reserved.\n京ICP备12345678号\n尾"
    assert made("boilerplate_lines", doc(text)) == f"{prose}\n尾"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("/* @generated */\nint x;\n", "code.generated"),
        ("var a=1;" * 400, "code.max_line"),
        ("\n".join(["x" * 150] * 9), "code.max_mean_line"),
        ("\n".join(["({[;;]})"] * 9), "code.min_alphanumeric"),
        ("d = (\n" + "".join(f'"{"aGVsaW9zdGF0" * 6}"\n' for _ in range(9)), "code.max_data"),
        ("d = [" + ",\n".join(["0x00ff, 0x01, 0x22"] * 40), "code.max_data"),
    ],
)
def test_code_that_nobody_wrote_goes(text: str, reason: str) -> None:
    assert made("code", doc(text, ".c")) == Drop(reason)
    assert made("code", doc(text, ".md")) == text


def test_code_with_chinese_comments_stays() -> None:
    text = "# 把光投向一点\ndef aim(sun, tower):\n    return (sun + tower) / 2  # 平分线\n"
    assert made("code", doc(text, ".py")) == text


@pytest.mark.timeout(60)
def test_data_is_searched_for_in_time() -> None:
    for text in ("a" * 200_000, ("a" * 31 + " ") * 6000, ("b" * 40 + "!") * 5000, "0x1," * 50_000):
        _data_characters(text, 256)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"age": "30", "name": "王", "on": "2024-02-29"}, None),
        ({"age": "３０", "name": "李", "on": None}, None),
        ({"age": "30", "name": " N/A "}, "columns.required"),
        ({"age": "30"}, "columns.required"),
        ({"age": "thirty", "name": "x"}, "columns.types"),
        ({"age": "3.5", "name": "x"}, "columns.types"),
        ({"age": "nan", "name": "x"}, None),
        ({"age": "1e999", "name": "x"}, "columns.types"),
        ({"age": "300", "name": "x"}, "columns.bounds"),
        ({"age": "-1", "name": "x"}, "columns.bounds"),
        ({"age": 30, "name": 5, "on": "2023-02-29"}, "columns.types"),
        ({"age": "", "name": "x", "ok": "是"}, None),
        ({"age": "", "name": "x", "ok": "perhaps"}, "columns.types"),
    ],
)
def test_rows_are_judged_by_their_cells(cells: dict[str, str], reason: str | None) -> None:
    step = {
        "columns": {
            "required": ["name"],
            "types": {"age": "integer", "on": "date", "ok": "boolean"},
            "bounds": {"age": [0, 120]},
        }
    }
    assert made(step, doc("正文", cells=cells)) == ("正文" if reason is None else Drop(reason))


def test_no_cell_is_told() -> None:
    dropped = made({"columns": {"types": {"age": "integer"}}}, doc("文", cells={"age": "秘密"}))
    assert isinstance(dropped, Drop) and "秘密" not in dropped.measured


def test_stop_words_are_asked_of_no_other_script() -> None:
    assert quality._stop_words(words.words("এটি একটি বাংলা বাক্য")) == float("inf")
