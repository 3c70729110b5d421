"""Postal addresses that follow a form: number, street word, town and code. No promise beyond it."""

import re
from collections.abc import Iterator

from pipelines.data.privacy.spans import Evidence, Span
from pipelines.data.privacy.view import View

_UP, _LOW = "A-Z\u00c0-\u00de", "a-z\u00df-\u024f"
_NAME = rf"[{_UP}][{_LOW}'.\-]{{1,24}}"
_WORD = rf"[{_UP}][{_LOW}]{{1,30}}"
_JOIN = r"[ \t]?,?[ \t]?\n?[ \t]{0,4}"
_POSTCODE = r"(?:[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2})"


def _form(*parts: str) -> re.Pattern[str]:
    return re.compile("".join(parts))


_ENGLISH = _form(
    r"(?<![\w.,/\-])\d{1,5}[A-Za-z]?[ ](?:[NSEW]{1,2}\.? )?",
    rf"(?:(?:{_NAME}|\d{{1,3}}(?:st|nd|rd|th)) ){{1,3}}",
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Sq",
    r"|Terrace|Parkway|Pkwy|Way|Close|Crescent|Gardens)\b\.?",
    rf"(?:{_JOIN}(?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|#)\.? ?#?[A-Za-z0-9\-]{{1,6}})?",
    rf"(?:{_JOIN}{_NAME}(?: {_NAME}){{0,2}}",
    rf"{_JOIN}(?:[A-Z]{{2}}[ ]{{1,2}}\d{{5}}(?:-\d{{4}})?|{_POSTCODE}))?",
)
_GERMAN = _form(
    rf"(?<![\w\-])(?:{_WORD}(?:[ \-]{_WORD}){{0,2}}[ \-]?)?",
    r"(?:[Ss]traße|[Ss]trasse|[Ss]tr\.|[Pp]latz|[Ww]eg|[Aa]llee|[Gg]asse)",
    rf" \d{{1,4}} ?[a-z]?(?![\w.]){_JOIN}(?:D-|A-|CH-)?\d{{4,5}} ",
    rf"{_WORD}(?:[ \-](?:am |an der |im )?{_WORD}){{0,2}}",
)
_FRENCH = _form(
    r"(?<![\w.,/\-])\d{1,4}(?: ?(?:bis|ter))?,? ",
    r"(?:rue|avenue|av\.|boulevard|bd|place|chemin|allée|impasse|quai|cours) ",
    rf"[^\n\d,\0]{{2,50}}{_JOIN}\d{{5}} ",
    # Saint-Étienne, Aix-en-Provence
    rf"{_WORD}(?:[ \-](?:(?:sur|sous|en|d[eu]s?|l[aeè]s?|aux?)[ \-]){{0,2}}{_WORD}){{0,3}}",
)
_SPANISH = _form(
    r"(?<!\w)(?:[Cc]alle|[Cc]/|[Aa]venida|[Aa]vda\.?|[Pp]laza|[Pp]aseo|[Vv]ia|[Vv]iale|[Pp]iazza",
    r"|[Cc]orso|[Rr]ua|[Pp]raça) [^\n\d,\0]{2,50},? ?(?:n\.?º ?)?\d{1,4}",
    rf"(?:[ ,]{{1,2}}(?:\d{{1,2}}º|piso|bajo)[^\n\d,\0]{{0,12}})?{_JOIN}\d{{4,5}}(?:-\d{{3}})? ",
    rf"{_WORD}(?: (?:de |del |la )?{_WORD}){{0,3}}",
)
_HAN = "\u4e00-\u9fff"
_CHINESE = _form(
    rf"(?:[{_HAN}]{{2,6}}(?:省|自治区|特别行政区))?(?:[{_HAN}]{{2,6}}(?:市|州|盟|地区))?",
    rf"(?:[{_HAN}]{{1,6}}(?:区|县|旗|镇|乡|街道)){{0,2}}",
    rf"[{_HAN}]{{1,8}}(?:路|街|大道|巷|胡同|弄|道)(?:[{_HAN}]{{1,4}}(?:段|里))?[ ]?\d{{1,5}}[ ]?号",
    rf"(?:院|[{_HAN}]{{0,10}}(?:小区|大厦|公寓|花园|广场))?",
    r"(?:[ ]?\d{1,4}[ ]?(?:号楼|栋|幢|座|弄))?(?:[ ]?\d{1,3}[ ]?单元)?",
    r"(?:[ ]?\d{1,3}[ ]?(?:楼|层))?(?:[ ]?\d{1,5}[ ]?[室号])?",
)
_LEAD = re.compile(
    rf"^.*?(?:住在|地址是|地址为|位于|寄到|寄往|送到|送至|住址|地址|在|到|是|为)(?=[{_HAN}]{{4}})"
)
"""Words in front of a Chinese address that no space sets apart from it."""
_FORMS = {
    "english": (_ENGLISH,),
    "german": (_GERMAN,),
    "romance": (_FRENCH, _SPANISH),
    "chinese": (_CHINESE,),
}


def postal(view: View) -> Iterator[Span]:
    for name, forms in _FORMS.items():
        for start, end in view.around(name):
            for form in forms:
                for match in form.finditer(view.text, start, end):
                    lead = _LEAD.match(match[0]) if name == "chinese" else None
                    begin = match.start() + (lead.end() if lead else 0)
                    yield Span(begin, match.end(), "address", Evidence.FORM)
