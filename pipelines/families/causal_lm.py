"""GPT-like language models: predict the next token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cluster.config import LlamaModel, RunConfig, TextData
from pipelines.families.base import (
    IGNORED,
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


class CausalLM:
    name = "causal_lm"
    payload: Payload = "text"
    route: Literal["completions", "classify"] = "completions"

    def fit_encoder(self, config: RunConfig, sample: pa.Table, labels: Sequence[str]) -> Encoder:
        from pipelines.data import tokenizer

        return tokenizer.fit(config, sample)

    def expected_facts(self, config: RunConfig) -> Facts:
        assert isinstance(config.data, TextData)
        return {"vocab_size": config.data.vocab_size, "end_of_text": 0}

    def blank(self, config: RunConfig, facts: Facts, rows: int) -> Batch:
        import torch

        assert isinstance(config.data, TextData) and isinstance(config.model, LlamaModel)
        shape = (rows, config.data.sequence_length)
        batch = {key: torch.zeros(shape, dtype=torch.int64) for key in ("input_ids", "labels")}
        if config.model.document_masking:
            batch["position_ids"] = torch.arange(shape[1]).expand(shape)
        return batch

    def build_model(self, config: RunConfig, facts: Facts) -> torch.nn.Module:
        from transformers import AutoModelForCausalLM, LlamaConfig

        from pipelines.families.losses import LossHead

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
        built = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")
        if config.train.loss_chunk:
            head = LossHead(built.get_output_embeddings(), config.train.loss_chunk)
            built.set_output_embeddings(head)
        return built

    def example(
        self, config: RunConfig, facts: Facts, row: Row, rng: np.random.Generator | None
    ) -> Example:
        from pipelines.data.augment import TokenRow, augment

        tokens = np.asarray(row["tokens"], dtype=np.int64)
        seen = TokenRow(tokens, tokens, int(row["used"]), np.asarray(row.get("segment_starts", ())))
        if rng is not None and config.train.augment.on:
            seen = augment(seen, config.train.augment, facts, rng)
        labels = seen.true[1:].copy()
        labels[seen.used - 1 :] = IGNORED
        example = {"input_ids": seen.shown[:-1], "labels": labels}
        assert isinstance(config.model, LlamaModel)
        if config.model.document_masking:
            example["position_ids"] = restarting(seen.starts, len(labels))
        return example

    def collate(self, examples: Sequence[Example]) -> Batch:
        import torch

        return {
            key: torch.from_numpy(np.stack([example[key] for example in examples]))
            for key in examples[0]
        }

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        from pipelines.families.losses import LossHead, cross_entropy

        inputs: dict[str, Any] = {key: batch[key] for key in batch if key != "labels"}
        # Otherwise stock models ignore position restarts, and keep keys and values for nothing.
        inputs["use_cache"] = False
        head = model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, LossHead):
            with head.predicting(batch["labels"]):
                loss: torch.Tensor = model(**inputs).logits
            return loss
        return cross_entropy(model(**inputs).logits, batch["labels"])

    def flops_per_prediction(self, config: RunConfig, facts: Facts) -> float | None:
        """6 N + 12 L d s (Chowdhery et al., arXiv:2204.02311, appendix B).

        N are the weights that multiply: all but the input embedding, whose rows are looked up, and
        the vectors. L layers of width d attend over s positions, as if without the causal mask.
        """
        model, data = config.model, config.data
        assert isinstance(model, LlamaModel) and isinstance(data, TextData)
        width = model.hidden_size
        keys_and_values = 2 * width * (width // model.heads) * model.kv_heads
        layer = 2 * width**2 + keys_and_values + 3 * width * model.intermediate_size
        weights = model.layers * layer + width * facts["vocab_size"]
        return 6.0 * weights + 12.0 * model.layers * width * data.sequence_length

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


def restarting(segment_starts: np.ndarray, length: int) -> np.ndarray:
    """Positions that begin at 0 with each document of a row; int64 [length].

    Stock models take a position that does not follow the one before it for the border of packed
    documents, and let no token attend across (transformers `find_packed_sequence_indices`). A
    document that began in the row before starts at 0 here: rotary positions count differences.
    """
    starts = np.zeros(length, dtype=np.int64)
    inside = np.asarray(segment_starts, dtype=np.int64)
    inside = inside[inside < length]
    starts[inside] = inside
    return np.arange(length) - np.maximum.accumulate(starts)


FAMILY = CausalLM()
