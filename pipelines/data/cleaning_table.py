"""Rules for rows of tables: cells that are missing, of a wrong type, or far out.

They decide by the other columns whether a row's text stays. Bounds come from the recipe, or from
all rows of the corpus (`outliers`): what is far out must not depend on which rows were read
together.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from cluster.config.cleaning import Columns
from pipelines.data.cleaning import Document, Drop, Rule

BOOLEANS = {"true", "false", "yes", "no", "0", "1", "是", "否"}


def columns(settings: Columns) -> Rule:
    missing = {word.lower() for word in settings.missing}

    def rule(document: Document) -> str | Drop:
        if document.cells is None:
            return document.text
        return _first_fault(document.cells, settings, missing) or document.text

    return rule


def _first_fault(cells: Mapping[str, Any], settings: Columns, missing: set[str]) -> Drop | None:
    """No value is told: it may be a person's."""
    for name in settings.required:
        if cell_of(cells, name, missing) is None:
            return Drop("columns.required", name)
    for name, kind in settings.types.items():
        cell = cell_of(cells, name, missing)
        if cell is not None and not _is(kind, cell):
            return Drop("columns.types", f"{name} is no {kind}")
    for name, (low, high) in settings.bounds.items():
        cell = cell_of(cells, name, missing)
        if cell is None:
            continue
        number = number_of(cell)
        if number is None:
            return Drop("columns.types", f"{name} is no number")
        if not low <= number <= high:
            return Drop("columns.bounds", f"{name} is not from {low:g} to {high:g}")
    return None


def cell_of(cells: Mapping[str, Any], name: str, missing: set[str]) -> str | None:
    """What a row has in a column; None for nothing, however it is written."""
    value = cells.get(name)
    text = "" if value is None else str(value).strip()
    return None if text.lower() in missing else text


def _is(kind: str, cell: str) -> bool:
    if kind == "boolean":
        return cell.lower() in BOOLEANS
    if kind == "date":
        return _is_date(cell)
    number = number_of(cell)
    return number is not None and (kind == "number" or number.is_integer())


def number_of(cell: str) -> float | None:
    """Full-width digits are digits too; NaN and infinity are no numbers."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def _is_date(cell: str) -> bool:
    try:
        datetime.fromisoformat(cell)
    except ValueError:
        return False
    return True
