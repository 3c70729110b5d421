"""STAGE prepare: raw files to a corpus of training rows.

Ray Data streams the partitions of the sources twice: read, clean and index; then, knowing which
documents stay and with an encoder learnt from a sample of them, encode and write shards. What
comes out depends on the files and the recipe alone, never on how many tasks worked on it.
"""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import progress
from cluster.config import RunConfig, TextData
from cluster.errors import SourceError
from cluster.session import open_store, session
from cluster.stages import BY_VERB, StageResult, fingerprint, resolved
from cluster.storage import Artifact, FileEntry, Staging, Store
from pipelines import families
from pipelines.data import cleaning, documents, duplicates, images, sources, streaming
from pipelines.data.cleaning import Rejected
from pipelines.data.corpus import Split
from pipelines.data.documents import Leavings
from pipelines.data.sources import Listing, Reject, SourceFile
from pipelines.families.base import Encoder

SPLITS: tuple[Split, ...] = ("train", "heldout")
SCRATCH = "scratch"
"""Folder of cleaned documents inside of the version that is being written; gone at the commit."""
LINEAGE_ROWS = 1 << 16
"""Rows per row group of a lineage file."""


@dataclass(frozen=True)
class Chosen:
    """Which documents go where."""

    splits: Mapping[Split, pa.Table]
    """Index of each split (columns `documents.INDEX`), sorted by document id."""
    leavings: Leavings

    @property
    def labels(self) -> list[str]:
        """Labels of the training documents, sorted; empty for text."""
        return _labels(self.splits["train"])


@dataclass(frozen=True)
class Shard:
    """What one partition and split became."""

    split: Split
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    entry: FileEntry
    counts: Mapping[str, int]
    """What the encoder counted, such as `tokens` and `padding`."""


def inputs(config: RunConfig) -> dict[str, Any]:
    """The listing of the sources, which decides whether a corpus is still up to date."""
    return sources.summary(config.data.sources, _listing(config))


def check(config: RunConfig) -> None:
    """
    Raises:
        SourceError: if a source is missing or has no file of the recipe's kind.
        ConfigError: if a rule of the user's own cannot be imported.
    """
    _listing(config)
    _check_rules(config)


def _check_rules(config: RunConfig) -> None:
    """A rule that cannot be imported is found before a session is opened."""
    if isinstance(config.data, TextData):
        cleaning.rules(config.data)


def run(config: RunConfig) -> StageResult:
    found = _listing(config)
    _check_rules(config)
    parts = sources.partition(found.files, config.data.partition_bytes)
    store = open_store(config)
    with (
        session(config),
        streaming.quiet(),
        progress.bar("prepare", 2 * len(parts), "partitions") as bar,
        _staged(store, config.name) as staging,
    ):
        chosen = _read(config, staging, found, parts, bar)
        encoder = _fit(config, staging, chosen)
        shards, lineage = _encode(config, staging, chosen, encoder, bar)
        staging.store.filesystem.delete_dir(f"{staging.path}/{SCRATCH}")
        artifact = _commit(config, staging, found, chosen, encoder, shards, lineage)
    return StageResult(artifact, _headline(artifact), artifact.manifest.metrics)


def _listing(config: RunConfig) -> Listing:
    return sources.listing(config.data.sources, config.data.kind)


@contextmanager
def _staged(store: Store, name: str) -> Iterator[Staging]:
    """A version of the corpus that is gone unless it was committed."""
    staging = store.stage("corpus", name)
    try:
        yield staging
    except BaseException:
        staging.abandon()
        raise


# ------------------------------------------------------------------ read, clean, choose


def _read(
    config: RunConfig,
    staging: Staging,
    found: Listing,
    parts: Sequence[Sequence[SourceFile]],
    bar: progress.Bar,
) -> Chosen:
    """First pass: cleaned documents to scratch files, and which of them stay.

    Raises:
        SourceError: if nothing usable remains, or a split would be empty.
    """
    task = functools.partial(_read_partition, config=config, staging=staging)
    answers = streaming.over_partitions(list(enumerate(parts)), task, config.prepare.tasks)
    index, leavings = [], [Leavings(found.rejects)]
    for done, (part, left) in enumerate(answers, start=1):
        index.append(part)
        leavings.append(left)
        bar.update(done, "read")
    return choose(config, pa.concat_tables(index), documents.together(leavings))


def _read_partition(
    work: tuple[int, Sequence[SourceFile]], *, config: RunConfig, staging: Staging
) -> tuple[pa.Table, Leavings]:
    """In a worker: the index of a partition's cleaned documents, and what was left out."""
    partition, files = work
    read = documents.read(files, config.data, partition)
    filesystem = staging.store.filesystem
    filesystem.create_dir(f"{staging.path}/{SCRATCH}", recursive=True)
    pq.write_table(read.table, _scratch(staging, partition), filesystem=filesystem)
    return read.table.select(documents.INDEX), read.leavings


def _scratch(staging: Staging, partition: int) -> str:
    return f"{staging.path}/{SCRATCH}/part-{partition:05d}.parquet"


def choose(config: RunConfig, index: pa.Table, leavings: Leavings) -> Chosen:
    """Duplicates out, then each document to its split. Pure.

    Raises:
        SourceError: if nothing usable remains, or a split would be empty.
    """
    if not index.num_rows:
        raise SourceError(_nothing_usable(config, leavings))
    fraction = config.data.heldout_fraction
    unique = duplicates.unique(index)
    drops = Counter(duplicate=index.num_rows - unique.num_rows)
    digests = unique.column("digest").to_pylist()
    held = pa.array([is_heldout(digest, config.seed, fraction) for digest in digests])
    train, heldout = unique.filter(pc.invert(held)), unique.filter(held)
    if labels := _labels(train):
        known = heldout.filter(pc.is_in(heldout.column("label"), pa.array(labels)))
        drops["label_not_in_training"] = heldout.num_rows - known.num_rows
        heldout = known
    if not train.num_rows or not heldout.num_rows:
        raise SourceError(_empty_split(fraction, unique.num_rows, heldout.num_rows))
    together = documents.together([leavings, Leavings(drops=drops)])
    return Chosen({"train": train, "heldout": heldout}, together)


def is_heldout(digest: bytes, seed: int, fraction: float) -> bool:
    """By content, so that a document stays on its side when others come and go."""
    keyed = hashlib.blake2b(digest, digest_size=8, key=seed.to_bytes(8)).digest()
    return int.from_bytes(keyed) < fraction * 2**64


def _labels(index: pa.Table) -> list[str]:
    return sorted(label for label in index.column("label").unique().to_pylist() if label)


def _nothing_usable(config: RunConfig, leavings: Leavings) -> str:
    reasons = leavings.reasons + leavings.drops
    counted = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(4)) or "no documents"
    example = f"; such as {leavings.rejects[0].file}" if leavings.rejects else ""
    return (
        f"data.sources hold no usable {config.data.kind} ({counted}{example}): "
        "give others, or loosen the limits in data"
    )


def _empty_split(fraction: float, total: int, heldout: int) -> str:
    empty = "training" if heldout else "held-out"
    cure = "a smaller" if heldout else "a larger"
    return (
        f"data.heldout_fraction {fraction:g} of {total} different documents leaves no {empty} "
        f"document: give more documents or {cure} data.heldout_fraction"
    )


# ------------------------------------------------------------------ fit


def _fit(config: RunConfig, staging: Staging, chosen: Chosen) -> Encoder:
    data = config.data
    limit = data.tokenizer_bytes if data.kind == "text" else images.SAMPLE_BYTES
    wanted = list(_by_partition(sample(chosen.splits["train"], limit)).items())
    task = functools.partial(_load, staging=staging)
    pieces = list(streaming.over_partitions(wanted, task, config.prepare.tasks))
    collected = pa.concat_tables(pieces).sort_by("digest")
    return families.load(config.family).fit_encoder(config, collected, chosen.labels)


def sample(index: pa.Table, limit: int) -> pa.Table:
    """About `limit` bytes of documents, at least one, chosen by digest: any mix of sources."""
    ordered = index.sort_by("digest")
    sizes = ordered.column("bytes").to_numpy()
    return ordered.filter(pa.array(np.cumsum(sizes) - sizes < limit))


def _load(work: tuple[int, np.ndarray], *, staging: Staging) -> pa.Table:
    """In a worker: some cleaned documents of a partition, in order of id."""
    partition, ids = work
    table = pq.read_table(_scratch(staging, partition), filesystem=staging.store.filesystem)
    return table.filter(pc.is_in(table.column("document"), pa.array(ids)))


def _by_partition(index: pa.Table) -> dict[int, np.ndarray]:
    """Document ids by the partition that they lie in."""
    ids = np.sort(index.column("document").to_numpy())
    partitions, starts = np.unique(ids >> 32, return_index=True)
    return dict(zip(partitions.tolist(), np.split(ids, starts[1:]), strict=True))


# ------------------------------------------------------------------ encode


def _encode(
    config: RunConfig, staging: Staging, chosen: Chosen, encoder: Encoder, bar: progress.Bar
) -> tuple[list[Shard], list[FileEntry]]:
    """Second pass: shards of both splits, and the lineage files."""
    members = {split: _by_partition(index) for split, index in chosen.splits.items()}
    nobody = np.array([], dtype=np.int64)
    work = [
        (partition, {split: members[split].get(partition, nobody) for split in SPLITS})
        for partition in sorted(set(members["train"]) | set(members["heldout"]))
    ]
    task = functools.partial(
        _encode_partition,
        staging=staging,
        encoder=encoder,
        row_group_rows=config.data.row_group_rows,
    )
    shards: list[Shard] = []
    lineage: list[FileEntry] = []
    before = bar.total - len(work)
    for written, origin in streaming.over_partitions(work, task, config.prepare.tasks):
        shards += written
        lineage.append(origin)
        bar.update(before + len(lineage), "encode")
    return sorted(shards, key=lambda shard: shard.entry.path), lineage


def _encode_partition(
    work: tuple[int, Mapping[Split, np.ndarray]],
    *,
    staging: Staging,
    encoder: Encoder,
    row_group_rows: int,
) -> tuple[list[Shard], FileEntry]:
    """In a worker: the shards of one partition, and its lineage file."""
    # One core per task: threads of the tokenizer's own would only fight over it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    partition, members = work
    name = f"part-{partition:05d}.parquet"
    shards: list[Shard] = []
    lineage: list[pa.Table] = []
    for split in SPLITS:
        table = _load((partition, members[split]), staging=staging)
        if not table.num_rows:
            continue
        rows = encoder.encode(table)
        entry = _write_parquet(staging, rows, f"{split}/{name}", row_group_rows)
        groups = _row_groups(rows.num_rows, row_group_rows)
        shards.append(Shard(split, groups, entry, _counted(rows)))
        origin = table.select(["document", "path", "row", "bytes"])
        lineage.append(origin.append_column("split", pa.array([split] * table.num_rows)))
    everything = pa.concat_tables(lineage).sort_by("document")
    return shards, _write_parquet(staging, everything, f"documents/{name}", LINEAGE_ROWS)


def _row_groups(rows: int, size: int) -> tuple[int, ...]:
    return tuple(min(size, rows - start) for start in range(0, rows, size))


def _counted(rows: pa.Table) -> dict[str, int]:
    counts: dict[str, int] = json.loads((rows.schema.metadata or {}).get(b"counts", b"{}"))
    return counts


def _write_parquet(staging: Staging, table: pa.Table, path: str, row_group_rows: int) -> FileEntry:
    sink = pa.BufferOutputStream()
    # Dictionaries spread a page's values over two places: zstd alone packs tokens a fifth smaller.
    options = {"compression": "zstd", "use_dictionary": False}
    pq.write_table(table, sink, row_group_size=row_group_rows, **options)
    return staging.write(path, sink.getvalue().to_pybytes())


# ------------------------------------------------------------------ commit


def _commit(
    config: RunConfig,
    staging: Staging,
    found: Listing,
    chosen: Chosen,
    encoder: Encoder,
    shards: Sequence[Shard],
    lineage: Sequence[FileEntry],
) -> Artifact:
    facts = encoder.facts()
    splits = {split: _split_detail(split, chosen, shards) for split in SPLITS}
    counts = _counts(found, chosen, shards)
    listed = sources.summary(config.data.sources, found)
    report = {"counts": counts, "splits": splits, "facts": facts, "sources": listed}
    with TemporaryDirectory(prefix="heliostat-") as folder:
        encoder.save(Path(folder))
        files = staging.copy_tree(Path(folder), "encoder/")
    files += [
        *lineage,
        *(shard.entry for shard in shards),
        staging.write_json("report.json", report),
        staging.write("quarantine.jsonl", _json_lines(chosen.leavings.rejects)),
        staging.write("rejected.jsonl", _json_lines(chosen.leavings.sample)),
    ]
    return staging.commit(
        files,
        fingerprint=fingerprint(BY_VERB["prepare"], config, None, listed),
        config=resolved(config),
        metrics=_metrics(splits, counts),
        detail={"facts": facts, "splits": splits, "counts": counts},
        inputs=listed,
    )


def _json_lines(entries: Iterable[Reject | Rejected]) -> bytes:
    lines = (json.dumps(asdict(entry), ensure_ascii=False) for entry in entries)
    return "".join(f"{line}\n" for line in lines).encode()


def _split_detail(split: Split, chosen: Chosen, shards: Sequence[Shard]) -> dict[str, Any]:
    own = [shard for shard in shards if shard.split == split]
    index = chosen.splits[split]
    return {
        "rows": sum(sum(shard.row_groups) for shard in own),
        "bytes": pc.sum(index.column("bytes")).as_py(),
        "documents": index.num_rows,
        "files": [{"path": s.entry.path, "row_groups": list(s.row_groups)} for s in own],
        **_summed(shard.counts for shard in own),
    }


def _counts(found: Listing, chosen: Chosen, shards: Sequence[Shard]) -> dict[str, Any]:
    return {
        "files": len(found.files),
        "file_bytes": sum(file.size for file in found.files),
        "ignored": dict(sorted(found.ignored.items())),
        "documents": sum(index.num_rows for index in chosen.splits.values()),
        "bytes": sum(pc.sum(i.column("bytes")).as_py() for i in chosen.splits.values()),
        "dropped": dict(sorted(chosen.leavings.drops.items())),
        "quarantined": dict(sorted(chosen.leavings.reasons.items())),
        **_summed(shard.counts for shard in shards),
    }


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _metrics(
    splits: Mapping[Split, Mapping[str, Any]], counts: Mapping[str, Any]
) -> dict[str, float]:
    metrics = {
        "documents": counts["documents"],
        "train_rows": splits["train"]["rows"],
        "bytes": counts["bytes"],
        "dropped": sum(counts["dropped"].values()),
        "quarantined": sum(counts["quarantined"].values()),
    }
    if counts.get("tokens"):
        metrics["bytes_per_token"] = counts["bytes"] / counts["tokens"]
    return metrics


def _headline(artifact: Artifact) -> str:
    metrics = artifact.manifest.metrics
    parts = [f"{metrics['documents']:,} documents", f"{metrics['bytes'] / 1e6:.1f} MB"]
    if "bytes_per_token" in metrics:
        parts.append(f"{metrics['bytes_per_token']:.1f} bytes per token")
    if metrics["quarantined"]:
        parts.append(f"{metrics['quarantined']:,} unreadable")
    return ", ".join(parts)
