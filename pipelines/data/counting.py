"""What encoders counted, added up."""

from collections.abc import Iterable, Mapping
from typing import Any


def summed(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers added up by name, also inside of mappings."""
    total: dict[str, Any] = {}
    for count in counts:
        for name, value in count.items():
            if isinstance(value, Mapping):
                total[name] = summed([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return dict(sorted(total.items()))


def cost_of_packing(counts: Mapping[str, int], documents: int) -> dict[str, float]:
    """Shares of the tokens that are padding, and of the documents that are cut; empty where nothing
    was packed."""
    if "padding" not in counts:
        return {}
    return {
        "padding_share": counts["padding"] / (counts["tokens"] + counts["padding"]),
        "cut_share": counts["cut_documents"] / max(documents, 1),
    }


def metrics(splits: Mapping[Any, Mapping[str, Any]], counts: Mapping[str, Any]) -> dict[str, float]:
    figures = {
        "documents": counts["documents"],
        "train_rows": splits["train"]["rows"],
        "bytes": counts["bytes"],
        "dropped": sum(counts["dropped"].values()),
        "quarantined": sum(counts["quarantined"].values()),
        "personal": sum(counts["personal"].values()),
    }
    if counts.get("tokens"):
        figures["bytes_per_token"] = counts["bytes"] / counts["tokens"]
    return figures


def headline(metrics: Mapping[str, float]) -> str:
    """The key figures of a corpus, for a person."""
    parts = [f"{metrics['documents']:,} documents", f"{metrics['bytes'] / 1e6:.1f} MB"]
    if "bytes_per_token" in metrics:
        parts.append(f"{metrics['bytes_per_token']:.1f} bytes per token")
    if metrics["quarantined"]:
        parts.append(f"{metrics['quarantined']:,} unreadable")
    return ", ".join(parts)
