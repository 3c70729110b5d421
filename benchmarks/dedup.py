"""Near duplicates: MB/s per core from JSON lines to the ids that go, against two peers.

    python -m venv peers && peers/bin/pip install -r benchmarks/requirements.txt
    python benchmarks/dedup.py [--mb 24] [--rounds 3] --peers peers/bin/python

The corpus is installed Python source without exact copies, and 5 % of it once more with edits. All
sides take 5-grams of words, 14 bands of 8 rows, and run in a process of their own, one after the
other in each round; seconds are CPU seconds of that process after its imports (ours: and a table
of characters, 0.2 s once per process). datatrove runs its signature, bucket and cluster stages,
with words split at white space: its own tokenizers are slower.

Recall is of planted pairs with an exact Jaccard similarity of 0.8 or more; precision is the share
of dropped documents that are 0.7 alike or more to some other, counted exactly in plain Python.
"""

import argparse
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

SIDES = ("heliostat", "datasketch", "datatrove")
NGRAM, BANDS, ROWS = 5, 14, 8
SHARDS = 8
PLANTED = 0.05
WORD = re.compile(r"\w+")


def seconds() -> float:
    """CPU seconds of this process and its children."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def documents(shard: Path) -> Iterator[dict[str, str]]:
    with shard.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


# ------------------------------------------------------------------ sides


def heliostat(shards: list[Path], folder: Path) -> Callable[[], list[int]]:
    import numpy as np
    import pyarrow as pa

    from cluster.config import DedupSection
    from cluster.storage import Store
    from pipelines.data import duplicates_near as near
    from pipelines.data import ranges
    from pipelines.data.scratch import Scratch

    settings = DedupSection(near=True, ngram=NGRAM, permutations=BANDS * ROWS, bands=BANDS)

    near.redundant([near.pairs(near.bands(["warm"], np.zeros(1, np.int64), settings), 1.0)])

    def find() -> list[int]:
        scratch, count = Scratch(Store(str(folder)).stage("corpus", "bench")), 0
        for part, shard in enumerate(shards):
            rows = list(documents(shard))
            count += len(rows)
            ids = np.array([int(row["id"]) for row in rows])
            table = pa.table({"document": ids, "text": [row["text"] for row in rows]})
            near.leave(scratch, part, table, settings)
        spans = ranges.cut(count * settings.bands, near.RANGE_ROWS)
        names = [near._name(part) for part in range(len(shards))]
        tables = (ranges.read(scratch, names, span) for span in spans)
        return near.redundant(near.pairs(t, settings.threshold) for t in tables).tolist()

    return find


def datasketch(shards: list[Path], folder: Path) -> Callable[[], list[int]]:
    from datasketch import MinHash, MinHashLSH

    def find() -> list[int]:
        index, parents = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS)), {}
        for shard in shards:
            for row in documents(shard):
                words = WORD.findall(row["text"].lower())
                grams = {" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}
                signature = MinHash(num_perm=BANDS * ROWS)
                signature.update_batch([gram.encode() for gram in grams])
                number = int(row["id"])
                parents[number] = number
                for other in index.query(signature):
                    one, two = root(parents, number), root(parents, other)
                    parents[max(one, two)] = min(one, two)
                index.insert(number, signature)
        return [number for number in parents if root(parents, number) != number]

    return find


def root(parents: dict[int, int], number: int) -> int:
    while parents[number] != number:
        parents[number] = number = parents[parents[number]]
    return number


def datatrove(shards: list[Path], folder: Path) -> Callable[[], list[int]]:
    import numpy as np
    from datatrove.executor import LocalPipelineExecutor as Executor
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.utils.word_tokenizers import WordTokenizer
    from loguru import logger

    class Split(WordTokenizer):
        """Its own ones for English take spaCy or NLTK, and far longer."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    logger.remove()
    settings = minhash.MinhashConfig(
        n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS, seed=1
    )

    def run(steps: list[object], tasks: int, name: str) -> None:
        Executor(
            pipeline=steps, tasks=tasks, workers=1, logging_dir=str(folder / "log" / name)
        ).run()

    def find() -> list[int]:
        signatures, buckets, removed = (str(folder / n) for n in ("sig", "buckets", "removed"))
        reader = JsonlReader(str(shards[0].parent))
        words = Split()
        run(
            [reader, minhash.MinhashDedupSignature(signatures, settings, language=words)],
            len(shards),
            "1",
        )
        run([minhash.MinhashDedupBuckets(signatures, buckets, config=settings)], BANDS, "2")
        run([minhash.MinhashDedupCluster(buckets, removed, config=settings)], 1, "3")
        dropped = []
        for path in sorted(Path(removed).glob("*.remove")):
            number = int(path.name.split(".")[0])
            ids = [int(row["id"]) for row in documents(shards[number])]
            dropped += [ids[i] for i in np.fromfile(path, "<u4").tolist()]
        return dropped

    return find


# ------------------------------------------------------------------ corpus and truth


def make_corpus(folder: Path, size: int) -> tuple[int, list[tuple[int, int]]]:
    """Bytes of text, and the planted pairs."""
    rng, texts, seen, total = random.Random(0), [], set[str](), 0
    roots = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib")}
    paths = sorted(path for root in roots for path in Path(root).rglob("*.py"))
    rng.shuffle(paths)
    for path in paths:
        text = path.read_text("utf-8", "ignore").encode("utf-8", "ignore").decode()
        if 500 < len(text) < 200_000 and text not in seen:
            seen.add(text)
            texts.append(text)
            total += len(text.encode())
        if total > size:
            break
    pairs = []
    for origin in rng.sample(range(len(texts)), round(PLANTED * len(texts))):
        pairs.append((origin, len(texts)))
        texts.append(edited(texts[origin], rng))
    for shard in range(SHARDS):
        with (folder / f"{shard:05d}.jsonl").open("w", encoding="utf-8") as stream:
            for number in range(shard, len(texts), SHARDS):
                stream.write(json.dumps({"id": str(number), "text": texts[number]}) + "\n")
    return sum(len(text.encode()) for text in texts), pairs


def edited(text: str, rng: random.Random) -> str:
    """With some words replaced: up to about 4 %, so that 5-grams are 0.7 to 1 alike."""
    words = list(WORD.finditer(text))
    for match in sorted(
        rng.sample(words, int(len(words) * rng.uniform(0, 0.04))),
        reverse=True,
        key=lambda m: m.start(),
    ):
        text = text[: match.start()] + f"w{rng.randrange(10**6)}" + text[match.end() :]
    return text


def grams(text: str) -> set[int]:
    words = WORD.findall(text.lower())
    return {hash(gram) for gram in zip(*(words[i:] for i in range(NGRAM)), strict=False)}


def jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / max(len(one | other), 1)


def nearest(sets: dict[int, set[int]], wanted: set[int]) -> dict[int, float]:
    """Exact similarity of each wanted document to the one that is most like it."""
    holders = defaultdict(list)
    for number, own in sets.items():
        for gram in own:
            if gram % 16 == 0:
                holders[gram].append(number)
    found = {}
    for number in wanted:
        shared = Counter(
            other
            for gram in sets[number]
            if gram % 16 == 0 and len(holders[gram]) < 200
            for other in holders[gram]
            if other != number
        )
        close = (jaccard(sets[number], sets[other]) for other, _ in shared.most_common(5))
        found[number] = max(close, default=0.0)
    return found


# ------------------------------------------------------------------ the run


def side(name: str, folder: Path, peers: str) -> dict[str, object]:
    """Run a side in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as scratch:
        python = sys.executable if name == "heliostat" else peers
        command = [python, __file__, "--side", name, "--folder", str(folder)]
        command += ["--scratch", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_side(name: str, folder: Path, scratch: Path) -> None:
    find = globals()[name](sorted(folder.glob("*.jsonl")), scratch)
    began = seconds()
    dropped = find()
    print(json.dumps({"seconds": seconds() - began, "dropped": sorted(dropped)}))


def main(size: int, rounds: int, peers: str) -> None:
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as name:
        folder = Path(name)
        total, pairs = make_corpus(folder, size)
        results: dict[str, list[dict]] = {side: [] for side in SIDES}
        for number in range(rounds):
            for one in SIDES:
                results[one].append(side(one, folder, peers))
                used = results[one][-1]["seconds"]
                print(
                    f"round {number}: {one:<11} {total / 1e6 / used:7.2f} MB/s per core", flush=True
                )
        sets = {
            int(r["id"]): grams(r["text"]) for s in folder.glob("*.jsonl") for r in documents(s)
        }
    report(total, pairs, results, sets)


def report(
    total: int,
    pairs: list[tuple[int, int]],
    results: dict[str, list[dict]],
    sets: dict[int, set[int]],
) -> None:
    dropped = {name: set(runs[0]["dropped"]) for name, runs in results.items()}
    alike = nearest(sets, set.union(*dropped.values()))
    planted = [pair for pair in pairs if jaccard(sets[pair[0]], sets[pair[1]]) >= 0.8]
    figures: dict[str, float] = {"mb": total / 1e6, "documents": len(sets), "pairs": len(planted)}
    for name, runs in results.items():
        speeds = [total / 1e6 / run["seconds"] for run in runs]
        found = sum(one in dropped[name] or two in dropped[name] for one, two in planted)
        right = sum(alike[number] >= 0.7 for number in dropped[name])
        figures |= {
            f"{name}_mb_per_second": statistics.median(speeds),
            f"{name}_recall": found / max(len(planted), 1),
            f"{name}_precision": right / max(len(dropped[name]), 1),
            f"{name}_dropped": len(dropped[name]),
        }
    for peer in SIDES[1:]:
        ratios = [
            p["seconds"] / o["seconds"]
            for o, p in zip(results["heliostat"], results[peer], strict=True)
        ]
        figures[f"times_{peer}"] = statistics.median(ratios)
    for key, value in figures.items():
        print(f"{key:<28} {value:>10.3f}")
    print(json.dumps({"figures": {key: round(value, 4) for key, value in figures.items()}}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=float, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=sys.executable, help="Python that has the peers")
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--scratch", type=Path)
    given = parser.parse_args()
    if given.side:
        run_side(given.side, given.folder, given.scratch)
    else:
        main(int(given.mb * 1e6), given.rounds, given.peers)
