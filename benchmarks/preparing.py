"""The sides of benchmarks/prepare.py. Each prints one line of JSON: seconds of each chain.

`python benchmarks/preparing.py SIDE WORK`, where WORK is JSON: `shards`, `tokenizer` (a folder),
`out` (an empty folder). Ends with 7 where the side is not installed.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

CORES = 2
SEQUENCE = 1024
Work = dict[str, Any]
Seconds = dict[str, float]


def cleaned(text: str) -> str | None:
    """What Heliostat's default rules leave of a text; every side cleans with these."""
    from pipelines.data import cleaning

    result = cleaning.clean(cleaning.Document(text), RULES)
    return result if isinstance(result, str) else None


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def open_tokenizer(work: Work) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{work['tokenizer']}/tokenizer.json")


def parsed(path: str) -> list[str]:
    import orjson

    with open(path, "rb") as lines:
        return [orjson.loads(line)["text"] for line in lines]


# ------------------------------------------------------------------ bare loop


def bare(work: Work) -> Seconds:
    """Two forked processes: orjson, `encode_batch_fast`, uint16 to a file. Texts stay in memory
    between the passes."""
    import orjson  # noqa: F401  imported before the fork

    tokenizer = open_tokenizer(work)
    context = get_context("fork")
    began = time.perf_counter()
    pipes, processes = [], []
    for number in range(CORES):
        ours, theirs = context.Pipe()
        task = (work["shards"][number::CORES], tokenizer, f"{work['out']}/{number}.bin", theirs)
        processes.append(context.Process(target=bare_process, args=task))
        processes[-1].start()
        pipes.append(ours)
    seen: set[bytes] = set()
    for pipe in pipes:
        digests = pipe.recv()
        keep = [place for place, one in enumerate(digests) if one not in seen and not seen.add(one)]
        pipe.send(keep)
    spent = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    full = time.perf_counter() - began
    return {"full": full, "tokens": full - max(one for one in spent)}


def bare_process(shards: list[str], tokenizer: Any, out: str, pipe: Any) -> None:
    """Sends the digests of what it cleaned, gets which to keep, and in the end the seconds that
    belong to the full chain only."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = [text for path in shards for text in parsed(path)]
    began = time.perf_counter()
    kept = [text for text in map(cleaned, texts) if text is not None]
    pipe.send([digest(text) for text in kept])
    kept = [kept[place] for place in pipe.recv()]
    spent = time.perf_counter() - began
    import numpy as np

    with open(out, "wb") as stream:
        batch: list[str] = []
        for number, text in enumerate(kept, start=1):
            batch.append(text)
            if len(batch) < 64 and number < len(kept):
                continue
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                stream.write(np.array([*encoding.ids, 0], dtype=np.uint16).tobytes())
            batch = []
    pipe.send(spent)


def ceiling(work: Work) -> Seconds:
    """`encode_batch_fast` with threads of its own on texts in memory; ids are not even taken."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(CORES)}
    tokenizer = open_tokenizer(work)
    texts = [text for path in work["shards"] for text in parsed(path)]
    began = time.perf_counter()
    for first in range(0, len(texts), 256):
        tokenizer.encode_batch_fast(texts[first : first + 256], add_special_tokens=False)
    return {"tokens": time.perf_counter() - began}


# ------------------------------------------------------------------ Hugging Face datasets


def hugging_face(work: Work) -> Seconds:
    import datasets

    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = open_tokenizer(work)

    def clean(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        texts = [text for text in map(cleaned, batch["text"]) if text is not None]
        return {"text": texts, "digest": [digest(text) for text in texts]}

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        encoded = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [[*one.ids, 0] for one in encoded]}

    def pack(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        stream = [number for ids in batch["ids"] for number in ids]
        rows = len(stream) // SEQUENCE
        return {"tokens": [stream[r * SEQUENCE : (r + 1) * SEQUENCE] for r in range(rows)]}

    def mapped(data: Any, task: Callable[..., Any]) -> Any:
        columns = data.column_names
        return data.map(task, batched=True, num_proc=CORES, remove_columns=columns)

    began = time.perf_counter()
    raw = datasets.load_dataset(
        "json", data_files=work["shards"], split="train", cache_dir=work["out"], num_proc=CORES
    )
    loaded = time.perf_counter()
    kept = mapped(raw, clean)
    seen: set[bytes] = set()
    places = [
        place
        for place, one in enumerate(kept["digest"])
        if one not in seen and not seen.add(one)  # type: ignore[func-returns-value]
    ]
    kept = kept.select(places).remove_columns("digest")
    chosen = time.perf_counter()
    mapped(mapped(kept, tokenise), pack).to_parquet(f"{work['out']}/rows.parquet")
    full = time.perf_counter() - began
    return {"full": full, "tokens": full - (chosen - loaded)}


# ------------------------------------------------------------------ datatrove


def datatrove(work: Work) -> Seconds:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup.exact_dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    logger.remove()
    folder, out = str(Path(work["shards"][0]).parent), Path(work["out"])
    config = ExactDedupConfig(content_getter=_content)

    def executed(name: str, tasks: int, *steps: Any) -> float:
        began = time.perf_counter()
        LocalPipelineExecutor(
            pipeline=list(steps),
            tasks=tasks,
            workers=min(tasks, CORES),
            logging_dir=str(out / "logs" / name),
            start_method="fork",
        ).run()
        return time.perf_counter() - began

    def reader() -> Any:
        return JsonlReader(folder, glob_pattern="*.jsonl")

    def writer(name: str) -> Any:
        return DocumentTokenizer(
            str(out / name),
            tokenizer_name_or_path=f"{work['tokenizer']}/tokenizer.json",
            local_working_dir=str(out / f"{name}-local"),
            eos_token="<|endoftext|>",
            shuffle_documents=False,
            batch_size=64,
        )

    shards, signatures, copies = len(work["shards"]), str(out / "signatures"), str(out / "copies")
    tokens = executed("tokens", shards, reader(), writer("plain"))
    full = executed(
        "signatures", shards, reader(), _cleaning, ExactDedupSignature(signatures, config)
    )
    full += executed("copies", 1, ExactFindDedups(signatures, copies, config))
    steps = (reader(), _cleaning, ExactDedupFilter(copies, config), writer("unique"))
    full += executed("unique", shards, *steps)
    return {"full": full, "tokens": tokens}


def _content(document: Any) -> bytes:
    raw: bytes = document.text.encode()
    return raw


def _cleaning(documents: Iterator[Any], rank: int, world_size: int) -> Iterator[Any]:
    for document in documents:
        text = cleaned(document.text)
        if text is not None:
            document.text = text
            yield document


# ------------------------------------------------------------------ Heliostat


def heliostat(work: Work) -> Seconds:
    """`prepare` as it is. Ray runs already, and has prepared a few documents, when the clock
    starts; `tokens` is its second pass, from cleaned documents on disk to shards, which reads its
    input from Parquet in place of JSON lines."""
    from cluster import loading, progress
    from cluster.session import session
    from pipelines import prepare

    progress.to_stderr()
    folder = str(Path(work["shards"][0]).parent)
    few = Path(work["out"]) / "few"
    few.mkdir()
    lines = Path(work["shards"][0]).read_text("utf-8").splitlines()[:200]
    (few / "a.jsonl").write_text("\n".join(lines[:100]), encoding="utf-8")
    (few / "b.jsonl").write_text("\n".join(lines[100:]), encoding="utf-8")
    common = [
        f"storage.root={work['out']}/root",
        f"data.sequence_length={SEQUENCE}",
        f"data.tokenizer.path={work['tokenizer']}",
        f"ray.cpus={CORES}",
        "data.privacy.apply=never",  # which no other side does
    ]
    spent: list[float] = []

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = encode(*arguments, **options)
        spent.append(time.perf_counter() - began)
        return result

    encode, prepare._encode = prepare._encode, timed
    warm = ["name=warm", "data.heldout_fraction=0.2", "data.partition_bytes=1000000"]
    config = loading.load("gpt-demo", [f"data.sources=[{folder}/*.jsonl]", *common])
    with session(config):
        prepare.run(loading.load("gpt-demo", [f"data.sources=[{few}]", *common, *warm]))
        began = time.perf_counter()
        prepare.run(config)
        full = time.perf_counter() - began
    return {"full": full, "tokens": spent[-1]}


def _rules() -> Any:
    from cluster import loading
    from pipelines.data import cleaning

    return cleaning.rules(loading.load("gpt-demo", []).data)  # type: ignore[arg-type]


SIDES: dict[str, Callable[[Work], Seconds]] = {
    "bare": bare,
    "ceiling": ceiling,
    "datasets": hugging_face,
    "datatrove": datatrove,
    "heliostat": heliostat,
}

if __name__ == "__main__":
    RULES = _rules()
    try:
        measured = SIDES[sys.argv[1]](json.loads(sys.argv[2]))
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(7)
    print(json.dumps(measured))
