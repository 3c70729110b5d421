"""The model card: what a stranger needs to know before they use the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

OPENERS = {
    "text-generation": ("AutoModelForCausalLM", "AutoTokenizer"),
    "image-classification": ("AutoModelForImageClassification", "AutoImageProcessor"),
}
"""`pipeline_tag` -> the classes that open weights and preprocessing."""


@dataclass(frozen=True)
class Card:
    name: str
    description: str
    license: str
    fields: Mapping[str, str]
    """What the family adds to the YAML head; `pipeline_tag` among it."""
    config: Mapping[str, Any]
    """Dotted key -> value."""
    parameters: int
    corpus: Mapping[str, Any]
    """The corpus's own report: counts of files, documents, bytes, drops."""
    sources: Sequence[str]
    metrics: Mapping[str, float]
    report: str
    """The evaluation's text, Markdown."""
    ancestors: Sequence[tuple[str, str]]
    """Artifact id and SHA-256 of its manifest, nearest first."""
    code_version: str

    def render(self) -> str:
        """README.md."""
        body = [
            _head(self),
            f"# {self.name}",
            self.description or f"A model trained with Heliostat, `{self.name}`.",
            f"{self.parameters:,} parameters, trained from scratch by Heliostat "
            f"{self.code_version}.",
            "## How to open it",
            _opening(self.fields.get("pipeline_tag", "")),
            "## Evaluation",
            _table(("metric", "value"), [(k, f"{v:.6g}") for k, v in self.metrics.items()]),
            _deeper(self.report),
            "## Data",
            f"Sources: {', '.join(f'`{source}`' for source in self.sources)}. "
            f"Corpus: `{self._ancestor('corpus')}`.",
            _table(("count", "value"), flat(self.corpus)),
            "## Limits",
            _LIMITS,
            "## Where it comes from",
            _table(("artifact", "SHA-256 of its manifest"), self.ancestors),
            "## Config",
            _table(("key", "value"), [(k, _shown(v)) for k, v in self.config.items()]),
        ]
        return "\n\n".join(part for part in body if part) + "\n"

    def _ancestor(self, kind: str) -> str:
        return next((i for i, _ in self.ancestors if i.startswith(f"{kind}/")), "unknown")


_LIMITS = (
    "The model knows only its sources: what is rare or missing there it does badly, and what is "
    "wrong or unfair there it repeats. It is measured on held-out documents of the same sources, "
    "which says nothing about others. The data was not de-identified: names and whatever else the "
    "sources say about people may be in it, and a model may repeat passages that it has seen "
    "often. Nothing was done to make its answers safe or true."
)


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted key and shown value of every leaf of a JSON tree."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _shown(value)))
    return rows


def _head(card: Card) -> str:
    head = {
        "license": card.license,
        **card.fields,
        "tags": ["heliostat"],
        "datasets": list(card.sources),
        "metrics": list(card.metrics),
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _opening(tag: str) -> str:
    model, encoder = OPENERS.get(tag, ("AutoModel", "AutoConfig"))
    return "\n".join(
        [
            "```python",
            f"from transformers import {', '.join(sorted((model, encoder)))}",
            f'model = {model}.from_pretrained("PATH_OF_THIS_FOLDER")',
            f'encoder = {encoder}.from_pretrained("PATH_OF_THIS_FOLDER")',
            "```",
        ]
    )


def _table(header: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {header[0]} | {header[1]} |", "|:--|:--|"]
    lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _deeper(report: str) -> str:
    """The report's headings, one level down; lines inside of code blocks stay as they are."""
    lines, fence = [], ""
    for line in report.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if fence:
            fence = "" if line == fence else fence
        elif len(ticks) >= 3:
            fence = ticks
        elif line.startswith("#"):
            line = f"#{line}"
        lines.append(line)
    return "\n".join(lines)
