"""One page about a corpus, for a person: plain HTML that needs nothing else and opens anywhere.

Bars are boxes of HTML, not images: the browser has the fonts for every script, matplotlib has not.
The page follows from what it is given alone, byte for byte.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.counting import summed
from pipelines.data.documents import SHOWN_CHARACTERS

SAMPLES = 10
"""Documents that are shown before and after cleaning."""
MOST_BARS = 25

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --faint: #667380; --line: #d9dfe5;
  --bar: #2f6fde; --paper: #ffffff; --box: #f5f7f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --faint: #9aa5b1; --line: #36414c;
  --bar: #6b9bf2; --paper: #14191f; --box: #1c232b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p { margin: .25rem 0 .75rem; color: var(--faint); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0; }
.tile { background: var(--box); border-radius: 6px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; }
td, th { padding: .2rem .5rem; text-align: left; vertical-align: middle; font-weight: normal; }
th { color: var(--faint); font-size: .85rem; border-bottom: 1px solid var(--line); }
td.name { width: 16rem; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; width: 7.5rem; }
.bar { background: var(--bar); height: .8rem; border-radius: 2px; min-width: 2px; }
.columns { display: flex; align-items: flex-end; gap: 2px; height: 9rem;
  border-bottom: 1px solid var(--line); }
.columns div { flex: 1; background: var(--bar); border-radius: 2px 2px 0 0; }
.ticks { position: relative; height: 1.4rem; color: var(--faint); font-size: .8rem; }
.ticks span { position: absolute; white-space: nowrap; transform: translateX(-50%); }
.ticks span:first-child { transform: none; }
.ticks span:last-child { transform: translateX(-100%); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; margin-bottom: .75rem; }
@media (max-width: 45rem) { .pair { grid-template-columns: 1fr; } td.name { width: 9rem; } }
.place { margin: 1rem 0 .3rem; font-size: .85rem; overflow-wrap: anywhere; }
pre { margin: 0; background: var(--box); border-radius: 6px; padding: .6rem .8rem; font-size: 12px;
  line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15rem;
  overflow: auto; }
"""


@dataclass(frozen=True)
class Sample:
    """A document before and after cleaning."""

    place: str
    before: str | None
    """Types stand in it where personal data stood; None where that would not have hidden all."""
    after: str


def page(
    name: str,
    report: Mapping[str, Any],
    lengths: Sequence[tuple[float, int]],
    samples: Sequence[Sample],
) -> bytes:
    """The page.

    Args:
        report: `report.json`.
        lengths: of `length_bins`.
        samples: up to `SAMPLES`.
    """
    counts, facts = report["counts"], report["facts"]
    body = [
        f"<h1>{escape(name)}</h1>",
        _tiles(_headlines(report)),
        _sources(report["sources"]),
        _histogram(lengths),
        _bars("Left out", counts.get("dropped"), "documents", "Read, and not wanted, by reason."),
        _bars("Unreadable", counts.get("quarantined"), "files or rows", "See quarantine.jsonl."),
        _bars("Not looked at", counts.get("ignored"), "files", "No reader is for them."),
        _bars("Personal data", _personal(report), "replaced", "By type; values are kept nowhere."),
        _bars("Labels", counts.get("labels"), "documents", ""),
        _costs("Languages", _OF_LANGUAGES, counts.get("languages"), facts.get("by_language")),
        _costs("Scripts", _OF_SCRIPTS, counts.get("scripts"), facts.get("by_script")),
        _rows(report["splits"]),
        _samples(samples, bool(counts.get("personal"))),
    ]
    head = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    return (head + "\n".join(filter(None, body)) + "\n</body>\n</html>\n").encode()


def samples(documents: pa.Table) -> list[Sample]:
    """Up to `SAMPLES` documents to show, those first that cleaning changed.

    Args:
        documents: cleaned ones in order of `digest`; columns `path`, `row`, `text`, `before`.
    """
    if "before" not in documents.column_names:
        return []
    kept = documents.filter(pa.compute.is_valid(documents.column("before")))
    hidden = not kept.num_rows
    kept = documents.slice(0, SAMPLES) if hidden else kept
    found = [
        Sample(_place(row), row["before"], row["text"][:SHOWN_CHARACTERS])
        for row in kept.select(["path", "row", "text", "before"]).slice(0, 40 * SAMPLES).to_pylist()
    ]
    found.sort(key=lambda sample: sample.before == sample.after)
    return found[:SAMPLES]


def _place(row: Mapping[str, Any]) -> str:
    return row["path"] if row["row"] is None else f"{row['path']}:{row['row']}"


def length_bins(index: pa.Table) -> list[tuple[float, int]]:
    """Documents by their size in bytes: (lower edge, documents) per bin, bins that double, without
    gaps.

    Args:
        index: column `bytes`.
    """
    sizes = index.column("bytes").to_numpy()
    if not len(sizes):
        return []
    powers = np.log2(np.maximum(sizes, 1)).astype(int)
    low, high = int(powers.min()), int(powers.max())
    found = np.bincount(powers - low, minlength=high - low + 1)
    return [(2.0 ** (low + number), int(count)) for number, count in enumerate(found)]


def _headlines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts, facts, splits = report["counts"], report["facts"], report["splits"]
    tiles = [
        (f"{counts['documents']:,}", "documents kept"),
        (_size(counts["bytes"]), "of them"),
        (f"{counts.get('files', 0):,}", f"files, {_size(counts.get('file_bytes', 0))}"),
    ]
    dropped = counts.get("dropped", {})
    if copies := sum(n for reason, n in dropped.items() if "duplicate" in reason):
        whole = counts["documents"] + sum(dropped.values())
        tiles.append((f"{copies / whole:.1%}", "of documents were copies"))
    if counts.get("tokens"):
        tiles += [
            (f"{counts['tokens']:,}", "tokens"),
            (f"{facts['bytes_per_token']:.2f}", "bytes per token"),
            (f"{facts['vocab_size']:,}", "pieces in the vocabulary"),
        ]
    tiles.append((f"{splits['train']['rows']:,}", "training rows"))
    return tiles


def _tiles(tiles: Iterable[tuple[str, str]]) -> str:
    drawn = (
        f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in tiles
    )
    return f'<div class="tiles">{"".join(drawn)}</div>'


def _bars(title: str, values: Mapping[str, int] | None, unit: str, note: str) -> str:
    """A row per name, the largest first; what does not fit is added up."""
    ranked = sorted((values or {}).items(), key=lambda item: (-item[1], item[0]))
    if not ranked:
        return ""
    shown = ranked[:MOST_BARS]
    if rest := ranked[MOST_BARS:]:
        shown.append((f"{len(rest)} others", sum(count for _, count in rest)))
    most = max(count for _, count in shown)
    rows = (
        f'<tr><td class="name">{escape(name)}</td><td class="number">{count:,}</td>'
        f"<td>{_bar(count / max(most, 1))}</td></tr>"
        for name, count in shown
    )
    head = f'<tr><th></th><th class="number">{escape(unit)}</th><th></th></tr>'
    return _section(title, note, f"<table>{head}{''.join(rows)}</table>")


def _sources(sources: Mapping[str, Mapping[str, Any]]) -> str:
    entries = {name: tree for name, tree in sources.items() if "bytes" in tree}
    most = max((tree["bytes"] for tree in entries.values()), default=1)
    rows = (
        f'<tr><td class="name">{escape(name)}</td><td class="number">{tree["files"]:,}</td>'
        f'<td class="number">{_size(tree["bytes"])}</td>'
        f"<td>{_bar(tree['bytes'] / max(most, 1))}</td></tr>"
        for name, tree in sorted(entries.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    )
    head = '<tr><th></th><th class="number">files</th><th class="number">size</th><th></th></tr>'
    return _section("Sources", "", f"<table>{head}{''.join(rows)}</table>")


def _histogram(bins: Sequence[tuple[float, int]]) -> str:
    if not bins:
        return ""
    most = max(count for _, count in bins)
    drawn = "".join(
        f'<div style="height:{100 * count / most:.1f}%" title="{_size(low)} to {_size(2 * low)}: '
        f'{count:,} documents"></div>'
        for low, count in bins
    )
    ticks = "".join(
        f'<span style="left:{100 * place / len(bins):.1f}%">{_size(low)}</span>'
        for place, low in _ticks(bins)
    )
    body = f'<div class="columns">{drawn}</div><div class="ticks">{ticks}</div>'
    note = f"Documents by size; each column is twice as wide as the one before, up to {most:,}."
    return _section("Lengths", note, body)


def _ticks(bins: Sequence[tuple[float, int]]) -> list[tuple[int, float]]:
    """A few edges with their numbers, the outer ones among them."""
    edges = list(enumerate([low for low, _ in bins] + [2 * bins[-1][0]]))
    step = math.ceil((len(edges) - 1) / 8)
    inner = [edge for edge in edges[:-1:step] if edge[0] <= len(bins) - step / 2]
    return inner + edges[-1:]


_MEASURED = (
    "Tokens per word are measured on the tokenizer's sample; where no spaces stand between words, "
    "a character counts as one."
)
_OF_LANGUAGES = (
    "Told from the start of a document; ISO 639 codes. und: not sure; zxx: no language, such as "
    f"lists of codes; code: files of source code. {_MEASURED}"
)
_OF_SCRIPTS = f"By the script of most letters at the start of a document. {_MEASURED}"


def _costs(
    title: str,
    note: str,
    kept: Mapping[str, Mapping[str, int]] | None,
    measured: Mapping[str, Mapping[str, float]] | None,
) -> str:
    """What each script or language costs in tokens, the largest first; what does not fit is added
    up."""
    ranked = sorted((kept or {}).items(), key=lambda item: (-item[1]["bytes"], item[0]))
    if not ranked:
        return ""
    shown = ranked[:MOST_BARS]
    if rest := ranked[MOST_BARS:]:
        shown.append((f"{len(rest)} others", summed(one for _, one in rest)))
    most = max(one["bytes"] for _, one in shown)
    rows = "".join(_cost(name, one, (measured or {}).get(name, {}), most) for name, one in shown)
    heads = ("documents", "size", "bytes per token", "tokens per word")
    head = "".join(f'<th class="number">{text}</th>' for text in heads)
    return _section(title, note, f"<table><tr><th></th>{head}<th></th></tr>{rows}</table>")


def _cost(name: str, one: Mapping[str, int], measured: Mapping[str, float], most: int) -> str:
    fertility = measured.get("tokens_per_word")
    return (
        f'<tr><td class="name">{escape(name)}</td>'
        f'<td class="number">{one["documents"]:,}</td>'
        f'<td class="number">{_size(one["bytes"])}</td>'
        f'<td class="number">{one["bytes"] / max(one["tokens"], 1):.2f}</td>'
        f'<td class="number">{"" if fertility is None else f"{fertility:.2f}"}</td>'
        f"<td>{_bar(one['bytes'] / max(most, 1))}</td></tr>"
    )


def _rows(splits: Mapping[str, Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td class="name">{escape(name)}</td><td class="number">{split["documents"]:,}</td>'
        f'<td class="number">{_size(split["bytes"])}</td><td class="number">{split["rows"]:,}</td>'
        f'<td class="number">{_share(split, "padding_share")}</td>'
        f'<td class="number">{_share(split, "cut_share")}</td></tr>'
        for name, split in splits.items()
    )
    heads = ("documents", "size", "rows", "padding", "documents cut")
    head = "".join(f'<th class="number">{text}</th>' for text in heads)
    note = "Padding is a share of the tokens; a document is cut where it does not lie in one row."
    return _section("Rows", note, f"<table><tr><th></th>{head}</tr>{rows}</table>")


def _samples(samples: Sequence[Sample], personal: bool) -> str:
    if not samples:
        return ""
    note = f"{len(samples)} documents, chosen by their content's hash, from their beginning."
    if personal:
        note += " Where personal data stood, its type is shown."
    if any(sample.before is None for sample in samples):
        note += " Not shown as they were: personal data would have been seen in them."
    return _section("Before and after", note, "".join(map(_pair, samples)))


def _pair(sample: Sample) -> str:
    place = f'<div class="place">{escape(sample.place)}</div>'
    after = f"<pre>{escape(sample.after[:SHOWN_CHARACTERS])}</pre>"
    if sample.before is None:
        return place + after
    before = f"<pre>{escape(_visible(sample.before[:SHOWN_CHARACTERS]))}</pre>"
    return f'{place}<div class="pair">{before}{after}</div>'


def _visible(text: str) -> str:
    """Control characters as their pictures (Unicode block Control Pictures)."""
    return "".join(
        chr(0x2400 + ord(letter)) if ord(letter) < 32 and letter not in "\n\t" else letter
        for letter in text
    )


def _personal(report: Mapping[str, Any]) -> Mapping[str, int] | None:
    found: Mapping[str, int] | None = report["counts"].get("personal")
    return found


def _section(title: str, note: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>" + (f"<p>{escape(note)}</p>" if note else "") + body


def _bar(share: float) -> str:
    return f'<div class="bar" style="width:{100 * share:.1f}%"></div>'


def _share(split: Mapping[str, Any], name: str) -> str:
    return f"{split[name]:.1%}" if name in split else ""


def _size(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
