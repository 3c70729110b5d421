"""One answer while it grows: from tokens to the events that a caller sees. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from serving.engines.base import Event, Finished, SamplingParameters, TokenLogprob, Tokens
from serving.engines.text import TextStream


@dataclass
class Answer:
    """
    Args:
        text: decodes the tokens and holds back what may still become a stop string.
        end: tokens that end a text.
    """

    sampling: SamplingParameters
    text: TextStream
    end: frozenset[int]
    produced: list[int] = field(default_factory=list)
    cached: int = 0
    """Tokens of the prompt that were not read."""
    _held: list[TokenLogprob] = field(default_factory=list)
    """Of tokens whose text is not out yet."""

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.sampling.max_tokens - len(self.produced)

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> list[Event]:
        """The events of one more token; the last one is `Finished` where it ends the answer."""
        self.produced.append(token)
        if token in self.end:
            text = self.text.flush()
            return [Tokens(text, (token,), self._flushed()), self._finished("stop")]
        if logprob is not None:
            self._held.append(logprob)
        text, stopped = self.text.push(token)
        if stopped:
            return [Tokens(text, (token,), self._before(text)), self._finished("stop")]
        if not self.left:
            text += self.text.flush()
            return [Tokens(text, (token,), self._flushed()), self._finished("length")]
        return [Tokens(text, (token,), self._flushed() if self.text.settled else ())]

    def nothing(self) -> list[Event]:
        """The end of an answer of no tokens (`max_tokens` 0, to score a prompt)."""
        return [self._finished("length")]

    def _finished(self, reason: Literal["stop", "length"]) -> Finished:
        return Finished(reason, len(self.produced), self.cached)

    def _flushed(self) -> tuple[TokenLogprob, ...]:
        held, self._held = tuple(self._held), []
        return held

    def _before(self, text: str) -> tuple[TokenLogprob, ...]:
        """Of the held tokens those that have a part in the last text before a stop string."""
        kept, length = [], 0
        for entry in self._held:
            if length >= len(text):
                break
            kept.append(entry)
            length += len(entry.token.text)
        return tuple(kept)


def merged(tokens: Sequence[Tokens]) -> Tokens:
    """Several pieces as one."""
    return Tokens(
        "".join(piece.text for piece in tokens),
        tuple(token for piece in tokens for token in piece.ids),
        tuple(entry for piece in tokens for entry in piece.logprobs),
    )
