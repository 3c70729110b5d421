"""Finished checkpoints without a training run: real encoders, real shards, chosen weights."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster import loading
from cluster.config import RunConfig
from cluster.stages import resolved
from cluster.storage import Artifact, Store
from pipelines import families
from pipelines.training.engine import TAG

TRAIN = [f"def add_{n}(a, b):\n    return a + b + {n}\n\n" for n in range(40)]
HELDOUT = [
    "import os\n\n\ndef add(a, b):\n    return a\n",
    "# 定日镜跟随太阳，把光投向一点。\n" * 3,
]


def text_config(root: Path, **sections: object) -> RunConfig:
    tree = loading.read_recipe("gpt-demo")
    tree["storage"] = {"root": str(root)}
    tree["data"] |= {"vocab_size": 300, "sequence_length": 32}
    tree["model"] |= {"hidden_size": 32, "layers": 1, "intermediate_size": 48}
    tree["evaluate"] = {"sample_tokens": 8, "prompt": "def ", "batch": 4}
    return loading.validate(tree | sections)


def image_config(root: Path, **sections: object) -> RunConfig:
    tree = loading.read_recipe("digits-cnn")
    tree["storage"] = {"root": str(root)}
    tree["data"] |= {"image_size": 12}
    tree["model"] = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    return loading.validate(tree | sections)


def documents(texts: Sequence[str]) -> pa.Table:
    return pa.table({"document": pa.array(range(len(texts)), pa.int64()), "text": list(texts)})


def pictures(number: int, seed: int = 0) -> pa.Table:
    """Bright squares: left half is class 零, right half is class one."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for place in range(number):
        image = rng.integers(0, 60, (16, 16, 1)).astype(np.uint8)
        right = place % 2
        image[4:12, 1 + 8 * right : 7 + 8 * right] = 230
        images.append(image.tobytes())
        labels.append(("零", "one")[right])
    side = pa.array([16] * number, pa.int32())
    return pa.table(
        {
            "document": pa.array(range(number), pa.int64()),
            "pixels": pa.array(images, pa.binary()),
            "height": side,
            "width": side,
            "channels": pa.array([1] * number, pa.int32()),
            "label": labels,
        }
    )


def corpus(config: RunConfig, train: pa.Table, heldout: pa.Table, size: int = 0) -> Artifact:
    """Commit a corpus of document tables.

    Args:
        size: bytes of the held-out documents.
    """
    labels = sorted(set(train.column("label").to_pylist())) if "label" in train.schema.names else []
    encoder = families.load(config.family).fit_encoder(config, train, labels)
    staging = Store(config.storage.root).stage("corpus", config.name)
    files, splits = [], {}
    for split, table, bytes_ in (("train", train, 1), ("heldout", heldout, size)):
        rows = encoder.encode(table)
        raw = io.BytesIO()
        pq.write_table(rows, raw, row_group_size=5)
        path = f"{split}/part-00000.parquet"
        files.append(staging.write(path, raw.getvalue()))
        groups = [min(5, rows.num_rows - start) for start in range(0, rows.num_rows, 5)]
        splits[split] = {"bytes": bytes_, "files": [{"path": path, "row_groups": groups}]}
    with tempfile.TemporaryDirectory() as folder:
        encoder.save(Path(folder))
        files += staging.copy_tree(Path(folder), "encoder/")
    files.append(staging.write_json("report.json", {"documents": 42, "dropped": {"short": 1}}))
    return staging.commit(
        files,
        fingerprint="f",
        config=resolved(config),
        detail={"facts": encoder.facts(), "splits": splits},
    )


def text_corpus(config: RunConfig) -> Artifact:
    size = sum(len(text.encode()) for text in HELDOUT)
    return corpus(config, documents(TRAIN), documents(HELDOUT), size)


def checkpoint(
    config: RunConfig, source: Artifact, weights: dict[str, torch.Tensor] | None = None
) -> Artifact:
    """Commit a finished checkpoint as ZeRO stage 0 lays it out; by default of other weights than
    the untrained model's."""
    if weights is None:
        torch.manual_seed(99)
        facts = source.manifest.detail["facts"]
        weights = families.load(config.family).build_model(config, facts).state_dict()
    raw = io.BytesIO()
    torch.save({"module": weights}, raw)
    history = [
        {"step": float(s), "loss": 3.0 + 4.0 / s, "learning_rate": 1e-3 / s, "gradient_norm": 1.0}
        for s in range(1, 30)
    ]
    staging = Store(config.storage.root).stage("checkpoint", config.name)
    files = [
        staging.write(f"{TAG}/mp_rank_00_model_states.pt", raw.getvalue()),
        staging.write_json("history.json", history),
    ]
    return staging.commit(
        files,
        fingerprint="f",
        config=resolved(config),
        parents=(source,),
        metrics={"loss": 3.0},
        detail={"run": f"{config.name}-1", "zero_stage": 0, "step": 29, "seconds": 1.0},
    )
