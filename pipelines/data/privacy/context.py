"""Words around a find: those that name it, and those that say it is something else."""

import re

from pipelines.data.privacy.view import View

_REACH = 60
"""Characters in front of a find that are looked at."""
_NUMBER = r"(?:\s*(?:no|nr|n|num|number|nummer|numéro|número|id|code|key|ref))?"
_THINGS = (
    r"order|invoice|tracking|ticket|isbn(?:-1[03])?|issn|ean|upc|gtin|sku|asin|doi|part|serial"
    r"|build|version|ver|rev|revision|release|commit|sha\d*|md5|hash|checksum|timestamp|unix time"
    r"|batch|lot|model|article|item|product|case|bug|issue|port|page|bestell\w*|rechnungs\w*"
    r"|artikel\w*|auftrags\w*|sendungs\w*|vorgangs\w*|aktenzeichen|commande|facture|référence|réf"
    r"|colis|suivi|pedido|factura|referencia|envío|ordine|fattura"
    r"|订单\w*|单号|编号|货号|运单\w*|快递单?\w*|发票\w*|版本\w*|流水号|批次|型号|序列号|时间戳|书号"
)
_OTHER = re.compile(
    rf"(?:(?<![^\W\d_])(?:{_THINGS}){_NUMBER}|[#№])[\s.:=#°'\"(-]{{0,4}}$", re.IGNORECASE
)


def words(*alternatives: str) -> re.Pattern[str]:
    """Matches one of the words at the end of what stands in front, with little between."""
    joined = "|".join(alternatives)
    return re.compile(rf"(?<![A-Za-z])(?:{joined})(?![A-Za-z])[^\d\0]{{0,24}}$", re.IGNORECASE)


def before(view: View, start: int) -> str:
    """What stands in front, no further back than the last surrogate or empty line."""
    text = view.text[max(0, start - _REACH) : start]
    return text[max(text.rfind("\0"), text.rfind("\n\n")) + 1 :]


def named(view: View, start: int, pattern: re.Pattern[str]) -> bool:
    """Whether a word of `pattern` says what stands at `start`."""
    return pattern.search(before(view, start)) is not None


def other(view: View, start: int) -> bool:
    """Whether a word says that it is a number of something: an order, a version, a hash."""
    return _OTHER.search(before(view, start)) is not None
