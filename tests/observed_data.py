"""What a config makes of data and models, without a cluster.

Each observer runs real functions in the working directory, which must be empty, and returns
something that compares.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster import chain, session
from cluster.config import RunConfig, TextData
from cluster.config.tokenizer import TokenizerSection
from cluster.session import Session, open_store
from cluster.stages import BY_VERB, fingerprint, resolved
from cluster.storage import Artifact
from pipelines import families, prepare
from pipelines.data import sealing, vocabulary
from pipelines.data.corpus import Corpus
from pipelines.data.tokenizer import TextEncoder
from pipelines.training import engine
from tests import fakes

patched = pytest.MonkeyPatch.context
FACTS = {"vocab_size": 97, "end_of_text": 0}
IMAGE_FACTS = {"labels": ["零", "one"], "channels": 1, "image_size": 8, "mean": [0.5], "std": [0.2]}
CLUSTER = Session(ours=True, dashboard="", cpus=8, gpus=0, nodes=("a",))


@contextlib.contextmanager
def joined(config: RunConfig) -> Iterator[Session]:
    """Stands for a connected Ray."""
    yield CLUSTER


# ------------------------------------------------------------------ artifacts, chain, Ray


def place(config: RunConfig) -> list[str]:
    """Where an artifact lies."""
    fakes.commit(open_store(config), name=config.name)
    return sorted(str(path) for path in Path().rglob("COMMIT"))


def decision(config: RunConfig) -> str:
    """What `up` does about a stage that is finished."""
    stage = BY_VERB["evaluate"]
    newest = fakes.commit(
        open_store(config),
        stage.makes or "",
        config=resolved(config),
        fingerprint=fingerprint(stage, config, None, {}),
    )
    return chain.decide(stage, config, newest.manifest, None, {}).action


def family(config: RunConfig) -> tuple[str, str]:
    """The model that is built, and how it is served."""
    found = families.load(config.family)
    return type(found.build_model(config, FACTS | IMAGE_FACTS)).__name__, found.route


def ray_init(config: RunConfig) -> list[dict[str, Any]]:
    """What Ray is started or joined with."""
    import ray

    calls: list[dict[str, Any]] = []
    with patched() as patch:
        patch.setenv("RAY_AUTH_TOKEN", "token")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(ray, "is_initialized", lambda: False)
        patch.setattr(ray, "init", lambda **options: calls.append(options))
        patch.setattr(ray, "shutdown", lambda: None)
        patch.setattr(session, "_describe", lambda config, ours: CLUSTER)
        with session.session(config):
            return calls


def growth(config: RunConfig) -> dict[str, float]:
    """What the cluster that is joined counts as, beside what is there."""
    import ray._private.state

    with patched() as patch:
        told = "get_max_resources_from_cluster_config"
        patch.setattr(ray._private.state.state, told, lambda: None)
        return session._limits(config)


# ------------------------------------------------------------------ prepare


class Blocks:
    """A Ray Data set that maps in this process."""

    def __init__(self, blocks: list[Any], asked: list[Any]) -> None:
        self.blocks, self._asked = blocks, asked

    def map_batches(self, task: Callable[[Any], Any], *, compute: Any, **options: Any) -> "Blocks":
        from ray.data import DataContext

        labels = DataContext.get_current().execution_options.label_selector
        self._asked.append((compute.size, labels))
        answers = [answer for block in self.blocks for answer in task(block)]
        return Blocks(answers, self._asked)

    def iter_batches(self, **options: Any) -> Iterator[Any]:
        return iter(self.blocks)


def prepared(config: RunConfig) -> tuple[Artifact, list[Any]]:
    """A corpus of the files in the working directory, and how wide and where Ray Data works."""
    import ray.data

    asked: list[Any] = []
    with patched() as patch:
        patch.setattr(prepare, "session", joined)
        patch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
        patch.setattr(ray.data, "from_blocks", lambda blocks: Blocks(blocks, asked))
        artifact = prepare.run(config).artifact
    assert artifact is not None
    return artifact, asked


def _prepared_texts(config: RunConfig) -> tuple[Artifact, list[Any]]:
    for folder, texts in (("docs", 80), ("more", 7)):
        Path(folder).mkdir()
        for n in range(texts):
            text = f"第{n}篇：定日镜跟随太阳，把光投向一点。def f{n}(x):\n    return x + {n}\n"
            Path(f"{folder}/{folder}-{n}.txt").write_text(text * (1 + n % 9), encoding="utf-8")
    assert isinstance(config.data, TextData)
    if given := config.data.tokenizer.path:
        trained = vocabulary.train(["given 定日镜 " * 9], 300, TokenizerSection())
        TextEncoder(trained.to_str(), 16, 1.0).save(Path(given))
    return prepared(config)


def corpus(config: RunConfig) -> Artifact:
    return _prepared_texts(config)[0]


def counts(config: RunConfig) -> Any:
    """Files read, documents that stay and that are dropped."""
    found = corpus(config).manifest.detail["counts"]
    return {key: found[key] for key in ("files", "documents", "dropped")}


def texts_of_a_table(config: RunConfig) -> Any:
    """Size of the documents that rows of two columns of text become."""
    Path("docs").mkdir()
    rows = [{"text": f"第{n}行" * 20, "body": f"line {n} " * 30} for n in range(80)]
    Path("docs/a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return prepared(config)[0].manifest.detail["counts"]["bytes"]


def encryption(config: RunConfig) -> set[bytes]:
    """How the Parquet files of a corpus begin."""
    with patched() as patch:
        patch.setenv(sealing.VARIABLE, "0f" * 32)
        made = corpus(config)
    paths = [entry.path for entry in made.manifest.files if entry.path.endswith(".parquet")]
    return {made.read_bytes(path)[:4] for path in paths}


def personal(config: RunConfig) -> Any:
    """Personal values taken out, by type, and how much text is left."""
    Path("docs").mkdir()
    for n in range(300):
        text = f"{n} 王芳写信给 wang{n}@example.cn，或致电 (415) 555-26{n % 90 + 10}。"
        Path(f"docs/{n}.txt").write_text(text, encoding="utf-8")
    found = prepared(config)[0].manifest.detail["counts"]
    return found["personal"], found["bytes"]


def wang(text: str) -> list[tuple[int, int, str]]:
    """The least that finds a name."""
    return [(at, at + 2, "name")] if (at := text.find("王芳")) >= 0 else []


def contamination(config: RunConfig) -> Any:
    """Documents that go because evaluation sets hold a piece of them, and what is told of it."""
    Path("tests").mkdir()
    question = "第3篇：定日镜跟随太阳，把光投向一点"
    Path("tests/题.jsonl").write_text(f'{{"question": "{question}"}}\n', encoding="utf-8")
    artifact, _ = _prepared_texts(config)
    told = [f.path for f in artifact.manifest.files if f.path == "contamination.json"]
    found = artifact.read_json(told[0])["overlaps"][:3] if told else None
    return artifact.manifest.detail["counts"]["dropped"], found


def lines(config: RunConfig) -> Any:
    """Documents and bytes that stay when some of their lines are those of others."""
    Path("docs").mkdir()
    for n in range(30):
        own = f"第{n}篇文章的正文，只有这一篇里才有这样的一行文字，编号是{n}。"
        pages = [own, "本站所有内容未经许可不得转载，请联系管理员。" if n < 9 else own + "续"]
        pages += [
            "",
            "短行",
            f"第{n % 12}页的页脚文字，十二页之后又从头开始，周而复始。",
            "",
            own + "完",
        ]
        Path(f"docs/{n}.txt").write_text("\n".join(pages), encoding="utf-8")
    found = prepared(config)[0].manifest.detail["counts"]
    return found["documents"], found["bytes"], found["dropped"]


def near(config: RunConfig) -> Any:
    """Documents that go as near duplicates of others, which are edited more and more."""
    Path("docs").mkdir()
    rng = np.random.default_rng(0)
    for n in range(30):
        words = rng.integers(0x4E00, 0x9000, 150)
        for copy in range(2):
            Path(f"docs/{n}-{copy}.txt").write_text("".join(map(chr, words)), encoding="utf-8")
            words[rng.choice(150, n // 2 + 1, replace=False)] = 0x9001 + n
    artifact, _ = prepared(config)
    return artifact.manifest.detail["counts"]["dropped"]


def splits(config: RunConfig) -> Any:
    """Documents of each split."""
    found = corpus(config).manifest.detail["splits"]
    return {split: (found[split]["documents"], found[split]["bytes"]) for split in found}


def row_groups(config: RunConfig) -> Any:
    """Rows of each row group of each shard."""
    found = corpus(config).manifest.detail["splits"]["train"]["files"]
    return [file["row_groups"] for file in found]


def tokenizer(config: RunConfig) -> str:
    return hashlib.sha256(corpus(config).read_bytes("encoder/tokenizer.json")).hexdigest()


def rows(config: RunConfig) -> list[int]:
    """How full each training row is."""
    return [int(row["used"]) for row in Corpus(corpus(config)).rows("train")]


def row_width(config: RunConfig) -> int:
    return len(next(Corpus(corpus(config)).rows("train"))["tokens"])


def ray_data_tasks(config: RunConfig) -> list[Any]:
    """How many tasks Ray Data may run at once, and on which nodes."""
    return _prepared_texts(config)[1]


def pictures(config: RunConfig) -> Any:
    """Size of the rows of pixels that pictures become."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for n in range(24):
        folder = Path("docs") / ("零", "one")[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 10, 3), np.uint8)).save(folder / f"{n}.png")
    artifact, _ = prepared(config)
    facts = Corpus(artifact).facts
    return (
        facts["image_size"],
        len(facts["mean"]),
        len(next(Corpus(artifact).rows("train"))["pixels"]),
    )


def augmented(config: RunConfig) -> list[Any]:
    """Training pictures of one row."""
    row = {"pixels": np.arange(64, dtype=np.uint8) * 3, "label": 1}
    found = families.load(config.family)
    draws = [
        found.example(config, IMAGE_FACTS, row, np.random.default_rng(seed)) for seed in range(3)
    ]
    return [example["pixel_values"].tolist() for example in draws]


def changed_rows(config: RunConfig) -> list[Any]:
    """What the model reads and predicts of a training row."""
    tokens = np.random.default_rng(0).integers(1, 97, 33).astype(np.uint16)
    row = {"tokens": tokens, "used": 33, "segment_starts": np.array([0, 9, 20], np.int32)}
    facts = FACTS | {"mask": 96, "bytes": list(range(1, 60))}
    found = families.load(config.family).example(config, facts, row, np.random.default_rng(0))
    return [found["input_ids"].tolist(), found["labels"].tolist()]


# ------------------------------------------------------------------ models


def model(config: RunConfig) -> Any:
    facts = FACTS if config.family == "causal_lm" else IMAGE_FACTS
    return engine._build_model(config, families.load(config.family), facts)


def shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model(config).named_parameters()}


def spread(config: RunConfig) -> float:
    """Standard deviation of the initial weights."""
    weights = torch.cat([p.detach().flatten() for p in model(config).parameters() if p.dim() > 1])
    return round(float(weights.std()), 6)


def loss(config: RunConfig) -> float:
    """Of the untrained model on a row of three documents."""
    found = families.load(config.family)
    tokens = np.random.default_rng(0).integers(1, 97, 33).astype(np.uint16)
    row = {"tokens": tokens, "used": 33, "segment_starts": np.array([0, 9, 20], np.int32)}
    batch = found.collate([found.example(config, FACTS, row, None)])
    with torch.inference_mode():
        return float(found.loss(model(config).eval(), batch))


def strides(config: RunConfig) -> list[Any]:
    return [m.stride for m in model(config).modules() if isinstance(m, torch.nn.Conv2d)]


def saved_for_backward(config: RunConfig) -> tuple[int, int]:
    """Elements of the largest tensor that a loss keeps for its backward pass, and of all."""
    found, built, sizes = families.load(config.family), model(config), list[int]()
    tokens = torch.arange(64).reshape(1, 64) % 97
    hooks = torch.autograd.graph.saved_tensors_hooks

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with hooks(note, lambda tensor: tensor):
        found.loss(built.train(), {"input_ids": tokens, "labels": tokens})
    return max(sizes), sum(sizes)
