"""E-mail addresses with a name or domain in letters that are not Latin (RFC 6531, RFC 5890).

In a script without spaces, nothing tells where a name begins: it begins behind the last word that
leads to an address, such as 邮箱 or 发至, and is short.
"""

import re

from pipelines.data.privacy.spans import Span
from pipelines.data.privacy.view import View

_LATIN = "A-Za-z0-9\u00c0-\u024f"
_UNSPACED = "\u0e00-\u0e7f\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_SPACED = (
    "\u0370-\u03ff\u0400-\u052f\u0590-\u05ff\u0620-\u064a\u06a9-\u06cc\u0900-\u097f\uac00-\ud7af"
)
_ANY = f"{_LATIN}{_UNSPACED}{_SPACED}"
_OTHER = re.compile(f"[{_UNSPACED}{_SPACED}]")
_NAME_REVERSED = re.compile(rf"[{_ANY}_+-](?:[{_ANY}._%+-]{{0,62}}[{_ANY}_])?")
_LONGEST = 8
"""Characters of a name in a script without spaces: given and family names together."""
_LEADS = re.compile(
    "邮箱|邮件|邮址|信箱|电邮|地址|联系(?:人|方式)?|[发寄送][送信]*[至到给往]|写信?给|[至到给向请是为或和]"
    "|メールアドレス|メール|アドレス|まで|または|[はへに]"
)
# Top-level domains of the IANA root zone that stand for themselves in these scripts.
_ENDS = (
    *("中国", "中國", "中文网", "公司", "网络", "網絡", "网址", "网站", "在线", "集团", "信息"),
    *(
        "商城",
        "商店",
        "商标",
        "移动",
        "手机",
        "游戏",
        "娱乐",
        "餐厅",
        "招聘",
        "健康",
        "时尚",
        "购物",
    ),
    *("企业", "组织机构", "机构", "政府", "政务", "公益", "慈善", "世界", "广东", "佛山", "香港"),
    *("台湾", "台灣", "新加坡", "澳門", "澳门", "我爱你", "みんな", "ストア", "コム", "クラウド"),
    *("рф", "рус", "бел", "укр", "мкд", "срб", "бг", "қаз", "мон", "ею", "дети", "онлайн", "орг"),
    *("сайт", "ком", "москва", "ευ", "ελ", "한국", "닷컴", "닷넷", "ไทย", "คอม", "भारत"),
    *("شبكة", "موقع", "ایران", "السعودية", "امارات", "مصر", "ישראל", "קום"),
)
_LATIN_END = re.compile(rf"[{_LATIN}_][{_LATIN}._%+-]*$")
_LABEL = rf"[{_ANY}](?:[{_ANY}-]{{0,62}}[{_ANY}])?"
_KNOWN = "com|net|org|edu|gov|cn|tw|hk|jp|kr|ru|ua|de|fr|eu|info"
"""Of the Latin ones, those that are hardly the name of anything else."""
_DOMAIN = re.compile(
    rf"(?:{_LABEL}\.){{1,8}}(?:{'|'.join(sorted(_ENDS, key=len, reverse=True))}|{_KNOWN})"
    rf"(?![{_LATIN}{_SPACED}_])"
)
_REACH = 72


def email_at(view: View, at: int) -> Span | None:
    """The address around a sign, if one side of it is in such a script."""
    text = view.text
    if text[max(0, at - 1) : at + _REACH].isascii():
        return None
    domain = _DOMAIN.match(text, at + 1)
    reversed_name = _NAME_REVERSED.match(text[max(0, at - _REACH) : at][::-1])
    if not domain or not reversed_name:
        return None
    name = _trimmed(reversed_name[0][::-1], foreign=bool(_OTHER.search(domain[0])))
    if not name or not _OTHER.search(name + domain[0]):
        return None
    if text[domain.end() : domain.end() + 1] in ("(", "_"):
        return None  # a decorator of code
    return Span(at - len(name), domain.end(), "email")


def _trimmed(name: str, *, foreign: bool) -> str:
    """Without the words in front of it that no space parts from it.

    Args:
        foreign: whether the domain is of such a script too; in front of one that is not, Latin
            letters are all of the name, whatever stands before them.
    """
    latin = _LATIN_END.search(name)
    if latin and not foreign:
        return latin[0]
    end = latin.start() if latin else len(name)
    if not re.search(f"[{_UNSPACED}]", name[:end]):
        return name
    leads = [lead.end() for lead in _LEADS.finditer(name[:end]) if lead.end() < len(name)]
    return name[max([end - _LONGEST, 0, *leads]) :].lstrip(".-")
