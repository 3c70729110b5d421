"""Documents that share a row do not see each other, where they are not to."""

import numpy as np
import pytest
import torch

from cluster.config import RunConfig
from pipelines.data.packing import pack, to_table
from pipelines.families.base import Batch
from pipelines.families.causal_lm import FAMILY, restarting
from tests import fakes

FACTS = {"vocab_size": 61, "end_of_text": 0}
SEQUENCE = 16
# Lengths of documents: several in a row, one that fills more than two rows, an empty one, and
# some of a single token.
LENGTHS = (3, 5, 1, 0, 1, 4, 45, 2, 6, 1, 9)


def config(*overrides: str) -> RunConfig:
    return fakes.config(
        "gpt-demo",
        f"data.sequence_length={SEQUENCE}",
        "model.hidden_size=32",
        "model.layers=2",
        "model.heads=4",
        "model.kv_heads=2",
        "model.intermediate_size=48",
        # Large weights, so that what leaks is seen.
        "model.initializer_range=0.3",
        *overrides,
    )


def packed_rows() -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, 61, length).astype(np.uint16) for length in LENGTHS]
    table = to_table(pack(tokens, np.arange(len(tokens)), SEQUENCE, end_of_text=0))
    rows: list[dict[str, object]] = table.to_pylist()
    return rows


def model(settings: RunConfig) -> torch.nn.Module:
    torch.manual_seed(1)
    return FAMILY.build_model(settings, FACTS).eval()


def logits(built: torch.nn.Module, batch: Batch) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.inference_mode():
        answer: torch.Tensor = built(**inputs, use_cache=False).logits
    return answer


def batch_of(settings: RunConfig, rows: list[dict[str, object]]) -> Batch:
    return FAMILY.collate([FAMILY.example(settings, FACTS, row, None) for row in rows])


def segments(row: dict[str, object]) -> list[slice]:
    """Places of the row's documents in the model's input."""
    starts = [start for start in row["segment_starts"] if start < SEQUENCE]  # type: ignore[attr-defined]
    ends = [*starts[1:], min(int(row["used"]), SEQUENCE)]  # type: ignore[call-overload]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def worst_difference(settings: RunConfig, attention: str = "sdpa") -> float:
    """Between a document's logits in its row and alone, over all documents of all rows."""
    built, rows = model(settings), packed_rows()
    built.set_attn_implementation(attention)
    together = logits(built, batch_of(settings, rows))
    batch = batch_of(settings, rows)["input_ids"]
    differences = [
        float(
            (together[n, part] - logits(built, {"input_ids": batch[n : n + 1, part]})[0])
            .abs()
            .max()
        )
        for n, row in enumerate(rows)
        for part in segments(row)
    ]
    assert len(differences) > len(LENGTHS)  # the long one is in several rows
    return max(differences)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # the engine takes either
def test_packed_documents_predict_what_they_would_alone(attention: str) -> None:
    assert worst_difference(config("model.document_masking=true"), attention) < 1e-5


def test_without_masking_they_leak() -> None:
    """Else the test above could not fail."""
    assert worst_difference(config()) > 0.1


def test_a_change_in_one_document_stays_in_it() -> None:
    settings = config("model.document_masking=true")
    built, rows = model(settings), packed_rows()
    batch = batch_of(settings, rows[:1])
    before = logits(built, batch)
    part = segments(rows[0])[1]
    batch["input_ids"][0, part.start + 1] += 1
    changed = (logits(built, batch) - before).abs().amax(dim=-1)[0] > 0
    assert changed.nonzero().flatten().tolist() == list(range(part.start + 1, part.stop))


def test_gradients_do_not_cross_documents_either() -> None:
    settings = config("model.document_masking=true")
    rows = packed_rows()
    together = model(settings).train()
    FAMILY.loss(together, batch_of(settings, rows[:1])).backward()
    apart = model(settings).train()
    whole = batch_of(settings, rows[:1])
    for part in segments(rows[0]):
        alone = {key: whole[key][:, part] for key in ("input_ids", "labels")}
        FAMILY.loss(apart, alone).backward()
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([0], [0, 1, 2, 3, 4, 5]),
        ([0, 2], [0, 1, 0, 1, 2, 3]),
        ([0, 1, 2, 5], [0, 0, 0, 1, 2, 0]),
        ([0, 3, 6], [0, 1, 2, 0, 1, 2]),  # the last one begins at the token that is only a label
    ],
)
def test_positions_begin_anew_with_each_document(starts: list[int], expected: list[int]) -> None:
    assert restarting(np.array(starts), 6).tolist() == expected


def test_masking_is_off_unless_asked_for() -> None:
    row = packed_rows()[0]
    assert "position_ids" not in FAMILY.example(config(), FACTS, row, None)
