"""GPT-like language models: predict the next token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cluster.config import LlamaModel, RunConfig, TextData
from pipelines.families.base import (
    Batch,
    Encoder,
    Evaluation,
    EvaluationJob,
    Example,
    Facts,
    Payload,
    Predictor,
    Row,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

IGNORED = -100
"""Label of a position that is not predicted (padding), as PyTorch's cross entropy has it."""


class CausalLM:
    name = "causal_lm"
    payload: Payload = "text"
    route: Literal["completions", "classify"] = "completions"

    def fit_encoder(self, config: RunConfig, sample: pa.Table, labels: Sequence[str]) -> Encoder:
        from pipelines.data import tokenizer

        return tokenizer.fit(config, sample)

    def build_model(self, config: RunConfig, facts: Facts) -> torch.nn.Module:
        from transformers import AutoModelForCausalLM, LlamaConfig

        model, data = config.model, config.data
        assert isinstance(model, LlamaModel) and isinstance(data, TextData)
        shape = LlamaConfig(
            vocab_size=facts["vocab_size"],
            hidden_size=model.hidden_size,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            intermediate_size=model.intermediate_size,
            max_position_embeddings=data.sequence_length,
            rope_parameters={"rope_theta": model.rope_theta, "rope_type": "default"},
            initializer_range=model.initializer_range,
            tie_word_embeddings=model.tie_embeddings,
            bos_token_id=facts["end_of_text"],
            eos_token_id=facts["end_of_text"],
            pad_token_id=facts["end_of_text"],
        )
        return AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")

    def example(
        self, config: RunConfig, facts: Facts, row: Row, rng: np.random.Generator | None
    ) -> Example:
        tokens, used = np.asarray(row["tokens"], dtype=np.int64), int(row["used"])
        labels = tokens[1:].copy()
        labels[used - 1 :] = IGNORED
        return {"input_ids": tokens[:-1], "labels": labels}

    def collate(self, examples: Sequence[Example]) -> Batch:
        import torch

        return {
            key: torch.from_numpy(np.stack([example[key] for example in examples]))
            for key in ("input_ids", "labels")
        }

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        import torch.nn.functional as F  # noqa: N812 (the name that all of PyTorch's users know)

        # Without use_cache=False stock models ignore position restarts and keep keys and values.
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(),
            batch["labels"].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )

    def evaluate(self, job: EvaluationJob) -> Evaluation:
        from pipelines.evaluation import language

        return language.evaluate(job, loss=self.loss, count=self.count)

    def export(
        self, config: RunConfig, model: torch.nn.Module, encoder_folder: Path, target: Path
    ) -> dict[str, str]:
        from pipelines.families import huggingface

        huggingface.export(model, encoder_folder, target)
        return {"library_name": "transformers", "pipeline_tag": "text-generation"}

    def reopen(self, folder: Path) -> torch.nn.Module:
        from transformers import AutoModelForCausalLM

        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder)
        return model.eval()

    def predictor(self, folder: Path) -> Predictor:
        raise TypeError("a causal language model generates: serve it with the generation engine")


FAMILY = CausalLM()
