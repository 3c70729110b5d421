"""A replica proves itself before it answers: it replays what publishing recorded.

Each record of a model's `prompts` holds a prompt, its tokens, the tokens that the published folder
continued it with when the likeliest was always taken, and the largest logits after the prompt. A
wrong tokenizer, damaged weights or a broken operator shows here, and not in somebody's answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import ServingError
from serving.engines.runner import Feed, Precision, Runner

TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-3, "bf16": 0.25, "int8": 0.5}
"""Largest difference of a logit that counts as rounding, relative to the logits' standard
deviation. Measured on small random weights, which are the harder case: 1e-5, 0.12 and 0.32."""
AGREEMENT: Mapping[Precision, float] = {"fp32": 1.0, "bf16": 0.95, "int8": 0.9}
"""Least share of recorded tokens that are likeliest again. In fp32 a tie may fall either way."""


def check(model: str, runner: Runner, records: Sequence[Mapping[str, Any]]) -> None:
    """
    Args:
        model: id of the artifact, for the message.
        records: the artifact's `prompts`; older ones may lack `logits`.

    Raises:
        ServingError: if tokens or logits differ beyond the bounds of the runner's precision.
    """
    agreed = recorded = 0
    for record in records:
        prompt, answer = list(record["tokens"]), list(record["greedy"])
        if len(prompt) + len(answer) > runner.context_length:
            continue  # served with a shorter context than the model can
        _same_tokens(model, runner, record)
        rows = runner.forward([], [Feed(0, 0, (*prompt, *answer), len(answer) + 1)]).cpu()
        bound = TOLERANCE[runner.precision] * float(rows[0].std())
        _same_logits(model, rows[0], record, bound)
        for row, token in zip(rows, answer, strict=False):
            # Not `argmax`: of two that are equal but for rounding either is right.
            agreed += bool(row[token] >= row.max() - min(bound, 1e-3 * float(row.std())))
            recorded += 1
    if agreed < AGREEMENT[runner.precision] * recorded:
        raise ServingError(
            f"{model} does not continue its recorded prompts as it did when it was published: "
            f"{agreed} of {recorded} tokens agree, at least {AGREEMENT[runner.precision]:.0%} must"
        )


def _same_tokens(model: str, runner: Runner, record: Mapping[str, Any]) -> None:
    tokens = list(record["tokens"])
    # Publishing keeps the end of a prompt that is longer than the model's context.
    found = list(runner.encode(record["prompt"]))[-len(tokens) :]
    if found != tokens:
        raise ServingError(
            f"{model}: its tokenizer splits the recorded prompt {record['prompt'][:40]!r} into "
            f"{found[:8]}..., and {tokens[:8]}... was recorded: publish the model again"
        )


def _same_logits(model: str, row: Any, record: Mapping[str, Any], bound: float) -> None:
    for token, logit in record.get("logits", ()):
        apart = abs(float(row[token]) - logit)
        if not apart <= bound:
            raise ServingError(
                f"{model}: the logit of token {token} after the recorded prompt "
                f"{record['prompt'][:40]!r} is {float(row[token]):.4f} and was {logit:.4f} when it "
                f"was published: {apart:.2g} apart, at most {bound:.2g} is rounding"
            )
