"""The next token from logits: cuts, seeds, penalties, and independence of neighbours."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from serving.engines.base import SamplingParameters
from serving.engines.sampling import CANDIDATES, Drawing, adjusted, choose, logprobs

LOGITS = torch.tensor([[0.0, 3.0, 2.0, 1.0]])


def drawing(**parameters: Any) -> Drawing:
    return Drawing(SamplingParameters(**({"max_tokens": 1} | parameters)))


def draws(logits: torch.Tensor, count: int = 300, **parameters: Any) -> Counter[int]:
    state = drawing(**({"seed": 0} | parameters))
    return Counter(choose(logits, [state])[0] for _ in range(count))


def test_sampling_follows_its_parameters() -> None:
    assert set(draws(LOGITS)) == {0, 1, 2, 3}
    assert set(draws(LOGITS, top_k=2)) == {1, 2}
    assert set(draws(LOGITS, top_k=10**9)) == {0, 1, 2, 3}
    assert set(draws(LOGITS, top_p=0.0)) == {1}
    assert set(draws(LOGITS, top_p=0.7)) == {1, 2}  # 0.64 alone is less than 0.7
    assert set(draws(LOGITS, top_k=2, top_p=0.7)) == {1}  # of the two it is 0.73
    assert set(draws(LOGITS, temperature=1e-30)) == {1}
    assert set(draws(LOGITS, temperature=0)) == {1}


@pytest.mark.parametrize(("temperature", "cuts"), [(1.0, {}), (0.5, {}), (1.0, {"top_p": 0.999})])
def test_tokens_come_as_often_as_their_probability(
    temperature: float, cuts: dict[str, float]
) -> None:
    expected = (LOGITS[0] / temperature).softmax(-1)
    seen = draws(LOGITS, 4000, temperature=temperature, **cuts)
    for token, probability in enumerate(expected.tolist()):
        deviation = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(seen[token] / 4000 - probability) < 5 * deviation + 1e-3


def test_a_nucleus_wider_than_the_candidates_is_taken_whole() -> None:
    flat = torch.zeros(1, 4 * CANDIDATES)
    assert len(draws(flat, 600, top_p=0.9)) > CANDIDATES
    assert max(draws(flat, 600, top_k=CANDIDATES + 9, top_p=0.5).values()) < 30


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 2000)
    kinds: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9},
        {"top_k": 5},
        {"temperature": 0},
        {"top_p": 0.999999, "temperature": 2.0},
        {"frequency_penalty": 1.0, "logit_bias": ((3, 50.0),)},
    ]
    together = [drawing(seed=row, **kind) for row, kind in enumerate(kinds)]
    alone = [drawing(seed=row, **kind) for row, kind in enumerate(kinds)]
    for _ in range(20):
        expected = [choose(logits[row : row + 1], [alone[row]])[0] for row in range(6)]
        assert choose(logits, together) == expected


def test_penalties_and_bias_are_the_formula() -> None:
    state = drawing(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((0, 2.0), (99, 1.0)))
    for token in (1, 1, 2):
        state.note(token)
    assert adjusted(LOGITS, [state])[0].tolist() == [2.0, 3 - 0.5 - 0.5, 2 - 0.5 - 0.25, 1.0]
    assert LOGITS[0].tolist() == [0.0, 3.0, 2.0, 1.0]
    assert choose(LOGITS, [drawing(logit_bias=((0, 99.0),))]) == [0]


def test_log_probabilities_are_those_before_any_change() -> None:
    [(own, (ids, values))] = logprobs(LOGITS, [3], 2)
    expected = LOGITS[0].log_softmax(-1)
    assert own == pytest.approx(float(expected[3]))
    assert ids == [1, 2] and values == pytest.approx([float(expected[1]), float(expected[2])])
