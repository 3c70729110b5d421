"""The next token of every running request, from one matrix of logits.

A row's token depends on its own logits, parameters and random numbers, never on its neighbours.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serving.engines.base import SamplingParameters

if TYPE_CHECKING:
    import torch

CANDIDATES = 256
"""Likeliest tokens that top-p looks at first. A trained model seldom spreads more widely; where it
does, the row is sorted as a whole. Costs a sixth of sorting 8,192 tokens."""
Ranked = tuple[list[int], list[float]]
"""Tokens with their log-probabilities, likeliest first."""


@dataclass
class Drawing:
    """What choosing needs to know of one request."""

    sampling: SamplingParameters
    counts: dict[int, int] = field(default_factory=dict)
    """Times that each token was generated; kept where penalties ask for it."""
    _random: random.Random | None = None

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def adjusts(self) -> bool:
        """Whether the logits are changed before a token is chosen."""
        asked = self.sampling
        return bool(asked.logit_bias) or self.penalises and bool(self.counts)

    @property
    def penalises(self) -> bool:
        return self.sampling.presence_penalty != 0 or self.sampling.frequency_penalty != 0

    def note(self, token: int) -> None:
        if self.penalises:
            self.counts[token] = self.counts.get(token, 0) + 1

    def uniform(self) -> float:
        """The request's next random number, in [0, 1)."""
        if self._random is None:
            seed = self.sampling.seed
            # Without a seed nobody can guess it. Python takes the absolute value of a seed: -1 and
            # 1 must differ.
            self._random = random.Random(secrets.randbits(64) if seed is None else seed % 2**64)
        return self._random.random()


def choose(logits: torch.Tensor, drawings: Sequence[Drawing]) -> list[int]:
    """One token for each row of fp32 logits [rows, vocabulary]."""
    if any(drawing.adjusts for drawing in drawings):
        logits = adjusted(logits, drawings)
    tokens: list[int] = logits.argmax(-1).tolist()
    sampled = [row for row, drawing in enumerate(drawings) if not drawing.greedy]
    whole = [row for row in sampled if not _cuts(drawings[row].sampling)]
    for rows, draw in ((whole, _draw_whole), (sorted(set(sampled) - set(whole)), _draw_cut)):
        if rows:
            picked = logits if len(rows) == len(drawings) else logits[rows]
            for row, token in zip(
                rows, draw(picked.cpu(), [drawings[r] for r in rows]), strict=True
            ):
                tokens[row] = token
    return tokens


def adjusted(logits: torch.Tensor, drawings: Sequence[Drawing]) -> torch.Tensor:
    """A copy with bias added and penalties taken off, as the API's reference defines them:
    `logit - frequency_penalty * count - presence_penalty * (count > 0)`."""
    import torch

    logits = logits.clone()
    for row, drawing in zip(logits, drawings, strict=True):
        asked = drawing.sampling
        changes = dict(asked.logit_bias)
        for token, count in drawing.counts.items():
            lowered = asked.presence_penalty + asked.frequency_penalty * count
            changes[token] = changes.get(token, 0.0) - lowered
        inside = {token: change for token, change in changes.items() if token < len(row)}
        if inside:
            where = torch.tensor(list(inside), device=row.device)
            row.index_add_(0, where, torch.tensor(list(inside.values()), device=row.device))
    return logits


def logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[tuple[float, Ranked]]:
    """For each row of logits [rows, vocabulary]: the token's log-probability, and the `top`
    likeliest tokens with theirs."""
    import torch

    scores = logits.log_softmax(-1)
    own = scores.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1)
    values, ids = scores.topk(min(top, scores.shape[-1]))
    ranked = zip(ids.tolist(), values.tolist(), strict=True)
    return list(zip(own.tolist(), ranked, strict=True))


def _cuts(sampling: SamplingParameters) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1


def _draw_whole(logits: torch.Tensor, drawings: Sequence[Drawing]) -> list[int]:
    """From softmax(logits / temperature)."""
    return _pick(_scaled(logits, drawings).softmax(-1), drawings)


def _draw_cut(logits: torch.Tensor, drawings: Sequence[Drawing]) -> list[int]:
    """The same, cut to the top k and then to the top p.

    The nucleus is the smallest set of likeliest tokens with at least `top_p` of the probability
    (Holtzman et al. 2020); the likeliest token always remains.
    """
    import torch

    vocabulary = logits.shape[-1]
    width = min(CANDIDATES, vocabulary)
    scaled = _scaled(logits, drawings)
    values, ids = scaled.topk(width)
    held = (values.exp().sum(-1) / scaled.exp().sum(-1)).tolist()
    chosen = torch.empty(len(drawings), dtype=torch.long)
    wide = [
        row
        for row, drawing in enumerate(drawings)
        if width < vocabulary and not _suffices(drawing.sampling, width, held[row])
    ]
    near = [row for row in range(len(drawings)) if row not in set(wide)]
    if near:
        some = [drawings[row] for row in near]
        kept = _nucleus(values[near], scaled[near].exp().sum(-1), some)
        places = torch.tensor(_pick(kept, some)).unsqueeze(1)
        chosen[near] = ids[near].gather(1, places).squeeze(1)
    if wide:
        some = [drawings[row] for row in wide]
        ranked, tokens = scaled[wide].sort(descending=True, stable=True)
        places = torch.tensor(_pick(_nucleus(ranked, ranked.exp().sum(-1), some), some))
        chosen[wide] = tokens.gather(1, places.unsqueeze(1)).squeeze(1)
    return chosen.tolist()


def _suffices(sampling: SamplingParameters, width: int, held: float) -> bool:
    """Whether the cut lies within the first `width` candidates, which hold this probability."""
    if sampling.top_k:
        return sampling.top_k <= width
    return sampling.top_p <= held * (1 - 1e-5)


def _scaled(logits: torch.Tensor, drawings: Sequence[Drawing]) -> torch.Tensor:
    """(logits - largest) / temperature: the subtraction first, so that a tiny temperature cannot
    overflow."""
    import torch

    temperatures = torch.tensor([[drawing.sampling.temperature] for drawing in drawings])
    return (logits - logits.amax(-1, keepdim=True)) / temperatures.clamp(min=1e-30)


def _nucleus(
    values: torch.Tensor, total: torch.Tensor, drawings: Sequence[Drawing]
) -> torch.Tensor:
    """Weights of ranked candidates, zero outside the cuts; [rows, candidates].

    Args:
        values: scaled logits, descending.
        total: sum of exp(value) over the whole vocabulary, [rows].
    """
    import torch

    count = values.shape[-1]
    ks = torch.tensor([[d.sampling.top_k or count] for d in drawings])
    weights = values.exp() * (torch.arange(count) < ks)
    # A top k redefines the whole; without one the whole is the vocabulary.
    limited = torch.tensor([d.sampling.top_k > 0 for d in drawings])
    whole = torch.where(limited, weights.sum(-1), total).unsqueeze(1)
    before = weights.cumsum(-1) - weights
    ps = torch.tensor([[max(d.sampling.top_p, 1e-9)] for d in drawings])
    return weights * (before < ps * whole) if bool((ps < 1).any()) else weights


def _pick(weights: torch.Tensor, drawings: Sequence[Drawing]) -> list[int]:
    """Index of the weight that each request's random number falls on; [rows, n] -> rows."""
    import torch

    sums = weights.double().cumsum(-1)
    uniform = torch.tensor([[drawing.uniform()] for drawing in drawings], dtype=torch.float64)
    # `right`: the first sum above the number, so that a weight of zero is never taken.
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True).squeeze(1).tolist()
