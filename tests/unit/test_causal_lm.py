import numpy as np
import pytest
import torch

from pipelines.families.causal_lm import FAMILY, IGNORED
from tests import fakes

FACTS = {"vocab_size": 61, "end_of_text": 0}
TINY = [
    "data.sequence_length=8",
    "model.hidden_size=16",
    "model.layers=1",
    "model.heads=2",
    "model.kv_heads=1",
    "model.intermediate_size=32",
]


def row(tokens: list[int], used: int) -> dict[str, object]:
    return {"tokens": np.array(tokens, np.uint16), "used": np.int32(used)}


def test_every_real_token_after_the_first_is_predicted_once() -> None:
    config = fakes.config("gpt-demo", *TINY)
    example = FAMILY.example(config, FACTS, row([1, 2, 3, 4, 5, 6, 7, 8, 9], 9), None)
    assert example["input_ids"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert example["labels"].tolist() == [2, 3, 4, 5, 6, 7, 8, 9]


def test_padding_is_not_predicted() -> None:
    config = fakes.config("gpt-demo", *TINY)
    example = FAMILY.example(config, FACTS, row([1, 2, 3, 0, 0, 0, 0, 0, 0], 3), None)
    assert example["labels"].tolist() == [2, 3] + [IGNORED] * 6
    assert FAMILY.count(FAMILY.collate([example, example])) == 4


def test_loss_is_a_sum_over_predictions() -> None:
    config = fakes.config("gpt-demo", *TINY)
    torch.manual_seed(0)
    model = FAMILY.build_model(config, FACTS)
    examples = [
        FAMILY.example(config, FACTS, row(list(range(n, n + 9)), 9 - n), None) for n in range(3)
    ]
    whole = FAMILY.loss(model, FAMILY.collate(examples))
    parts = sum(FAMILY.loss(model, FAMILY.collate([example])) for example in examples)
    assert whole.item() == pytest.approx(float(parts), rel=1e-5)
    untrained = whole.item() / FAMILY.count(FAMILY.collate(examples))
    assert untrained == pytest.approx(np.log(61), rel=0.05)
