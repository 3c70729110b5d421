"""Pages to text: markup, wrongly decoded characters, lines that are on every page.

HTML is parsed by selectolax (MIT, no further packages, Lexbor in C). trafilatura finds the main
text of a news page better, and brings ten packages; what is left of menus here, `boilerplate_lines`
and the line rules of `c4_quality` take out.
"""

import functools
import re
from typing import TYPE_CHECKING, Any

from cluster.config.base import Section
from cluster.config.cleaning import BoilerplateLines, HtmlToText
from pipelines.data.cleaning import Document, Drop, Rule

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

HTML_EXTENSIONS = frozenset({".html", ".htm", ".xhtml"})
_PAGE = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?(?:<!doctype\s+html|<html[\s>])", re.IGNORECASE)
# What a reader does not read, or reads on every page of the site.
_SILENT = """
    script style noscript template svg math iframe object form button select textarea head
    nav header footer aside
"""
_BLOCK_TAGS = """
    address article blockquote br caption dd details div dl dt fieldset figcaption figure h1 h2 h3
    h4 h5 h6 hr li main ol p pre section summary table tbody tfoot thead tr ul
"""
_BLOCKS = frozenset(_BLOCK_TAGS.split())
_PARAGRAPHS = frozenset({"p", "pre"})
_CELLS = frozenset({"td", "th"})
_KEPT = "\0"
"""Stands for a space of preformatted text, which no rule about spaces is for."""
_SPACE = re.compile(r"[ \t\r\f\n]+")
_AROUND_BREAKS = re.compile(r"[ \t]*\n[ \t]*")
_BREAKS = re.compile(r"\n{3,}")


def html_to_text(settings: HtmlToText) -> Rule:
    """Text of a page, a line per block, without scripts, menus and forms."""

    def rule(document: Document) -> str | Drop:
        page = document.extension in HTML_EXTENSIONS or _PAGE.match(document.text[:2000])
        if not page and not settings.everywhere:
            return document.text
        return page_text(document.text)

    return rule


def page_text(html: str) -> str:
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(html)
    tree.strip_tags(_SILENT.split(), recursive=False)
    root = tree.css_first("main") or tree.css_first("article") or tree.body
    if root is None:
        return ""
    pieces = [""]
    _gather(root, pieces)
    text = _AROUND_BREAKS.sub("\n", "".join(pieces)).replace(_KEPT, " ")
    return _BREAKS.sub("\n\n", text).strip()


def _gather(root: Any, pieces: list[str]) -> None:
    """Text of everything below a node, in order; a stack of our own, for pages nest deeply."""
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, plain = stack.pop()
        if isinstance(node, str):
            if node != "\n" or not pieces[-1].endswith("\n"):
                pieces.append(node)
        elif node.tag == "-text":
            _add_text(node.text_content or "", plain, pieces)
        else:
            edge = "\n" if node.tag in _BLOCKS else "\t" if node.tag in _CELLS else ""
            if edge == "\n" and not pieces[-1].endswith("\n"):
                pieces.append(edge)
            if edge:
                stack.append(("\n\n" if node.tag in _PARAGRAPHS else edge, False))
            inside = plain or node.tag == "pre"
            children = list(node.iter(include_text=True))
            stack += [(child, inside) for child in reversed(children)]


def _add_text(text: str, plain: bool, pieces: list[str]) -> None:
    if plain:
        pieces.append(text.replace(" ", _KEPT))
    elif text.strip() or not pieces[-1].endswith("\n"):
        pieces.append(_SPACE.sub(" ", text))


# ------------------------------------------------------------------ mojibake


def repair_mojibake(settings: Section) -> Rule:
    """UTF-8 that was read as another encoding, back to what it was: `ä½\u00a0å¥½` to `你好`.

    ftfy only where it is sure; quotes, ligatures and full-width forms stay what they are.
    """
    from ftfy import fix_text

    config = _only_encoding()
    return lambda document: (
        document.text if document.text.isascii() else fix_text(document.text, config)
    )


@functools.cache
def _only_encoding() -> "TextFixerConfig":
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )


# ------------------------------------------------------------------ boilerplate

PHRASES = """
    all rights reserved|copyright ©|© copyright|terms of use|terms of service|privacy policy
    cookie policy|uses cookies|use cookies|accept cookies|enable javascript|javascript is disabled
    sign up for our newsletter|subscribe to our newsletter|share on facebook|share on twitter
    share this|click here to|read more »|skip to content|skip to main content|back to top
    版权所有|保留所有权利|著作权归|隐私政策|隐私权政策|使用条款|服务条款|免责声明|扫码关注|扫一扫
    关注公众号|关注我们|点击查看更多|点击这里|返回顶部|上一篇|下一篇|相关阅读|责任编辑|请启用javascript
    icp备|公网安备|版權所有|隱私權政策|回到頂端|転載禁止|無断転載|プライバシーポリシー|利用規約
"""


def boilerplate_lines(settings: BoilerplateLines) -> Rule:
    """Short lines that speak of cookies, rights and menus, in English, Chinese and Japanese.

    The English ones begin with those of C4 (Raffel et al. 2020, section 2.2).
    """
    known = [p.strip() for line in PHRASES.split("\n") for p in line.split("|") if p.strip()]
    phrases = re.compile("|".join(map(re.escape, [*known, *settings.phrases])), re.IGNORECASE)

    def rule(document: Document) -> str | Drop:
        if not phrases.search(document.text):
            return document.text
        lines = document.text.split("\n")
        kept = [x for x in lines if len(x) > settings.max_characters or not phrases.search(x)]
        return "\n".join(kept)

    return rule
