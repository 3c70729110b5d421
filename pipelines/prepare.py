"""STAGE prepare: raw files to a corpus of training rows.

Ray Data streams the partitions of the sources twice: read, clean and index; then, knowing which
documents stay and with an encoder learnt from a sample of them, encode and write shards. What
comes out depends on the files and the recipe alone, never on how many tasks worked on it.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster import progress
from cluster.config import ImageData, RunConfig, TextData
from cluster.errors import HeliostatError, SourceError
from cluster.session import open_store, session
from cluster.stages import BY_VERB, StageResult, fingerprint, resolved
from cluster.storage import Artifact, FileEntry, Staging, Store
from cluster.version import code_version
from pipelines import families
from pipelines.data import (
    contamination,
    corpus_report,
    documents,
    duplicates_lines,
    duplicates_near,
    images,
    live,
    outliers,
    partitions,
    sources,
    streaming,
)
from pipelines.data.choice import (
    NOBODY,
    Chosen,
    Left,
    choose,
    from_first_line,
    left_out,
    lines_before_each,
    nothing_usable,
)
from pipelines.data.contamination import Evaluations
from pipelines.data.corpus import PART_BITS, SPLITS, Split
from pipelines.data.counting import cost_of_packing, headline, metrics, summed
from pipelines.data.partitions import Cleaned, Encoding, Shard
from pipelines.data.sampling import sample
from pipelines.data.scratch import Scratch
from pipelines.data.sealing import Sealing
from pipelines.data.sources import Listing, SourceFile
from pipelines.families.base import Encoder

Page = Callable[[str, Mapping[str, Any]], bytes]
"""From the corpus's name and its `report.json`."""


def inputs(config: RunConfig) -> dict[str, Any]:
    """What decides, beside the recipe, whether a corpus is still up to date."""
    return _listed(config, _listing(config))


def _listed(config: RunConfig, found: Listing) -> dict[str, Any]:
    """What a corpus is made from, in short: sources, evaluation sets, a tokenizer that was given,
    and whether rows are stored."""
    listed = sources.summary(config.data.sources, found)
    if isinstance(config.data, TextData):
        listed |= contamination.summary(config.data.decontaminate)
        if path := config.data.tokenizer.path:
            from pipelines.data import existing_tokenizer

            listed["data.tokenizer.path"] = existing_tokenizer.digest(path)
    if config.train.input == "stream":
        listed["train.input"] = "stream"
    return listed


def check(config: RunConfig) -> None:
    """
    Raises:
        SourceError: if a source is missing or has no file of the recipe's kind.
        ConfigError: if a function that the recipe names cannot be imported.
        UsageError: if the corpus is to be encrypted and there is no key.
    """
    _listing(config)
    documents.check(config.data)
    _check_key(config)


def _check_key(config: RunConfig) -> str | None:
    """The name of the key that the corpus is encrypted with; None for a corpus in the clear."""
    return Sealing(config.data.encrypt).key_name


def run(config: RunConfig) -> StageResult:
    found = _listing(config)
    documents.check(config.data)
    key_name = _check_key(config)
    everything = sources.partition(found.files, config.data.partition_bytes)
    streamed = config.train.input == "stream"
    parts = live.sampled(everything, config) if streamed else everything
    store = open_store(config)
    with (
        session(config),
        streaming.set_up(config.prepare.labels),
        progress.bar("prepare", 2 * len(parts), "partitions") as bar,
        _staged(store, config, found) as staging,
    ):
        scratch = Scratch(staging, Sealing(config.data.encrypt))
        evaluations = contamination.begin(config.data, scratch)
        data, fences = outliers.settle(config.data, parts, config.prepare.tasks)
        read = _read(config, data, staging, parts, bar)
        tasks = config.prepare.tasks
        cleaned, shortened = duplicates_lines.thin(read, config.data, scratch, tasks)
        index = partitions.indexed(cleaned)
        near = duplicates_near.find(index, config.data, scratch, tasks)
        chosen = choose(config, index, left_out(found.rejects, cleaned), near)
        encoder, page = _fit(config, staging, chosen)
        detail: dict[str, Any] = {"encryption_key": key_name} if key_name else {}
        detail |= {"fences": fences} if fences else {}
        if streamed:
            detail |= live.plan(everything, parts, chosen.splits["train"], encoder)
            chosen = chosen.only_heldout()
        shards, lineage = _encode(config, staging, chosen, encoder, cleaned, bar)
        quarantine = _quarantine(staging, chosen.left, cleaned)
        others = [*lineage, quarantine, *_overlaps(staging, evaluations, cleaned)]
        if shortened:
            others.append(staging.write_json("lines.json", {"shortened": shortened}))
        artifact = _commit(config, staging, found, chosen, encoder, shards, others, detail, page)
    return StageResult(artifact, headline(artifact.manifest.metrics), artifact.manifest.metrics)


def _listing(config: RunConfig) -> Listing:
    data = config.data
    found = sources.listing(data.sources, data.kind, documents.readings(data))
    if not found.files:
        raise SourceError(nothing_usable(config, left_out(found.rejects, ())))
    return found


@contextmanager
def _staged(store: Store, config: RunConfig, found: Listing) -> Iterator[Staging]:
    """A version of the corpus. What was done of it stays when the run is killed or interrupted:
    the same command goes on from there. A run that failed leaves nothing."""
    listed = _listed(config, found)
    told = (fingerprint(BY_VERB["prepare"], config, None, listed), code_version())
    same = " ".join([*told, _check_key(config) or ""]).strip()
    staging = store.stage("corpus", config.name, run=same, resume=True)
    try:
        yield staging
    except HeliostatError:
        staging.abandon()
        raise


# ------------------------------------------------------------------ read and clean


def _read(
    config: RunConfig,
    data: TextData | ImageData,
    staging: Staging,
    parts: Sequence[Sequence[SourceFile]],
    bar: progress.Bar,
) -> list[Cleaned]:
    """First pass: cleaned documents to scratch files. In order of partition."""
    task = functools.partial(partitions.read, data=data, staging=staging)
    # The largest first: what is worked on last should be small.
    order = sorted(enumerate(parts), key=lambda part: -sum(file.wanted for file in part[1]))
    sizes = [sum(file.wanted for file in files) for _, files in order]
    answers = streaming.over_partitions(order, task, config.prepare.tasks, sizes)
    cleaned: list[Cleaned] = []
    for done, part in enumerate(answers, start=1):
        cleaned.append(part)
        bar.update(done, "read")
    return sorted(cleaned, key=lambda part: part.partition)


def _overlaps(
    staging: Staging, found: Evaluations | None, cleaned: Sequence[Cleaned]
) -> list[FileEntry]:
    """Which documents overlapped with what, and where."""
    if found is None:
        return []
    lines_before = lines_before_each(cleaned)
    overlaps = (
        from_first_line(overlap, lines_before.get(part.partition, {}))
        for part in cleaned
        for overlap in part.overlaps
    )
    documents = sum((part.contaminated for part in cleaned), Counter[str]())
    tree = contamination.report(found, documents, overlaps)
    return [staging.write_json("contamination.json", tree)]


# ------------------------------------------------------------------ fit


def _fit(config: RunConfig, staging: Staging, chosen: Chosen) -> tuple[Encoder, Page]:
    """The encoder, and the report with some documents, from a sample of the training documents."""
    data = config.data
    limit = data.tokenizer_bytes if data.kind == "text" else images.SAMPLE_BYTES
    wanted = list(_by_part(sample(chosen.splits["train"], limit)).items())
    task = functools.partial(partitions.load, scratch=Scratch(staging, Sealing(data.encrypt)))
    # Ray may put answers on disk: what is encrypted does not travel in the clear.
    answers = (
        map(task, wanted)
        if data.encrypt
        else streaming.over_partitions(wanted, task, config.prepare.tasks)
    )
    pieces = list(answers)
    collected = pa.concat_tables(pieces).sort_by("digest")
    encoder = families.load(config.family).fit_encoder(config, collected, chosen.labels)
    page = functools.partial(
        corpus_report.page,
        lengths=corpus_report.length_bins(chosen.splits["train"]),
        # The report is not encrypted.
        samples=[] if data.encrypt else corpus_report.samples(collected),
    )
    return encoder, page


def _by_part(index: pa.Table) -> dict[int, np.ndarray]:
    """Document ids by the part that they lie in."""
    ids = np.sort(index.column("document").to_numpy())
    if not len(ids):
        return {}
    numbers, starts = np.unique(documents.part_of(ids), return_index=True)
    return dict(zip(numbers.tolist(), np.split(ids, starts[1:]), strict=True))


def _bytes_by_part(chosen: Chosen) -> Counter[int]:
    sizes = Counter[int]()
    for index in chosen.splits.values():
        parts = documents.part_of(index.column("document").to_numpy())
        numbers, which = np.unique(parts, return_inverse=True)
        sums = np.bincount(which, index.column("bytes").to_numpy(), len(numbers))
        sizes.update(dict(zip(numbers.tolist(), sums.tolist(), strict=True)))
    return sizes


# ------------------------------------------------------------------ encode


def _encode(
    config: RunConfig,
    staging: Staging,
    chosen: Chosen,
    encoder: Encoder,
    cleaned: Sequence[Cleaned],
    bar: progress.Bar,
) -> tuple[list[Shard], list[FileEntry]]:
    """Second pass: shards of both splits in order of part, and the lineage files."""
    members = {split: _by_part(index) for split, index in chosen.splits.items()}
    sizes = _bytes_by_part(chosen)
    lines_before = lines_before_each(cleaned)
    work = [
        Encoding(
            part,
            {split: members[split].get(part, NOBODY) for split in SPLITS},
            lines_before.get(part >> PART_BITS, {}),
            cleaned[part >> PART_BITS].source,
        )
        for part in sorted(sizes, key=lambda part: (-sizes[part], part))
    ]
    task = functools.partial(
        partitions.encode,
        scratch=Scratch(staging, Sealing(config.data.encrypt)),
        encoder=encoder,
        row_group_rows=config.data.row_group_rows,
    )
    shards: list[Shard] = []
    lineage: list[FileEntry] = []
    # A partition may have become several parts, or none: the bar's second half is a share.
    half = bar.total // 2
    tasks, shares = config.prepare.tasks, [sizes[piece.part] for piece in work]
    for written, origin in streaming.over_partitions(work, task, tasks, shares):
        shards += written
        lineage.append(origin)
        bar.update(half + half * len(lineage) // len(work), "encode")
    return sorted(shards, key=lambda shard: (shard.split, shard.part)), lineage


# ------------------------------------------------------------------ commit


def _commit(
    config: RunConfig,
    staging: Staging,
    found: Listing,
    chosen: Chosen,
    encoder: Encoder,
    shards: Sequence[Shard],
    others: Sequence[FileEntry],
    detail: Mapping[str, Any],
    page: Page,
) -> Artifact:
    facts = encoder.facts()
    splits = {split: _split_detail(split, chosen, shards) for split in SPLITS}
    counts = _counts(found, chosen, shards)
    listed = _listed(config, found)
    report = {"counts": counts, "splits": splits, "facts": facts, "sources": listed}
    with TemporaryDirectory(prefix="heliostat-") as folder:
        encoder.save(Path(folder))
        files = staging.copy_tree(Path(folder), "encoder/")
    files += [*others, *(shard.entry for shard in shards)]
    files.append(staging.write_json("report.json", report))
    files.append(staging.write("report.html", page(staging.id, report)))
    rejected = b"".join(_line(asdict(one)) for one in chosen.left.sample)
    files.append(staging.write("rejected.jsonl", rejected))
    Scratch(staging).leave_only(files)
    return staging.commit(
        files,
        fingerprint=fingerprint(BY_VERB["prepare"], config, None, listed),
        config=resolved(config),
        metrics=metrics(splits, counts),
        detail={"facts": facts, "splits": splits, "counts": counts, **detail},
        inputs=listed,
    )


def _quarantine(staging: Staging, left: Left, cleaned: Sequence[Cleaned]) -> FileEntry:
    """Files that could not be read, then the rows of each partition."""
    scratch, lines_before = Scratch(staging), lines_before_each(cleaned)

    def lines() -> Iterator[bytes]:
        for reject in left.files:
            yield _line(asdict(reject))
        for partition in cleaned:
            before = lines_before.get(partition.partition, {})
            for part in partition.with_rejects:
                for line in scratch.lines(partitions.rejects_name(part)):
                    tree = json.loads(line)
                    yield _line({**tree, "row": tree["row"] + before.get(tree["file"], 0)})

    return staging.write_with("quarantine.jsonl", lambda stream: stream.writelines(lines()))


def _line(tree: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(tree, ensure_ascii=False)}\n".encode()


def _split_detail(split: Split, chosen: Chosen, shards: Sequence[Shard]) -> dict[str, Any]:
    own = [shard for shard in shards if shard.split == split]
    index = chosen.splits[split]
    counts = summed(shard.counts for shard in own)
    return {
        "rows": sum(sum(shard.row_groups) for shard in own),
        "bytes": _bytes(index),
        "documents": index.num_rows,
        "files": [
            {"path": s.entry.path, "row_groups": list(s.row_groups), "source": s.source}
            for s in own
        ],
        **counts,
        **cost_of_packing(counts, index.num_rows),
    }


def _counts(found: Listing, chosen: Chosen, shards: Sequence[Shard]) -> dict[str, Any]:
    return {
        "files": len(found.files),
        "file_bytes": sum(file.size for file in found.files),
        "ignored": dict(sorted(found.ignored.items())),
        "documents": sum(index.num_rows for index in chosen.splits.values()),
        "bytes": sum(map(_bytes, chosen.splits.values())),
        "dropped": dict(sorted(chosen.left.drops.items())),
        "quarantined": dict(sorted(chosen.left.reasons.items())),
        "personal": dict(sorted(chosen.left.personal.items())),
        **summed(shard.counts for shard in shards),
    }


def _bytes(index: pa.Table) -> int:
    return pc.sum(index.column("bytes")).as_py() or 0
