"""What an engine is: the narrow interface between HTTP and whatever computes the answer.

An engine takes a request and yields events. It knows nothing of HTTP; the ingress knows nothing of
models. Everything that crosses is plain frozen data, because it travels between processes. This
module imports no torch.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class SamplingParameters:
    max_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Smallest set of likeliest tokens that holds this probability."""
    top_k: int = 0
    """Likeliest tokens that are drawn from; 0 for all."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these would appear in the text."""
    seed: int | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence. A call with several prompts or choices is as many requests."""

    id: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParameters
    echo: bool = False
    """Begin the text with the prompt."""


@dataclass(frozen=True)
class PredictionRequest:
    id: str
    inputs: tuple[Any, ...]
    """What the family's predictor takes, one answer each."""


Request = GenerationRequest | PredictionRequest


@dataclass(frozen=True)
class Started:
    """The request was accepted; it may still wait for a place."""

    model: str
    """Artifact that answers, `model/gpt-demo@3`."""
    prompt_tokens: int = 0
    text: str = ""
    """The prompt, where echo was asked for."""


@dataclass(frozen=True)
class Tokens:
    """Text of one or more new tokens; empty while a character or a stop string is undecided."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    reason: Literal["stop", "length"]
    completion_tokens: int
    """Tokens generated, the end-of-text token included."""


@dataclass(frozen=True)
class Predicted:
    answers: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Failed:
    """The request ends without an answer; the fields become the HTTP error."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None
    """Seconds."""


Event = Started | Tokens | Finished | Predicted | Failed


def is_last(event: Event) -> bool:
    return isinstance(event, Finished | Predicted | Failed)


@dataclass(frozen=True)
class Stats:
    running: int
    waiting: int


class Engine(Protocol):
    def submit(self, request: Any) -> AsyncIterator[Event]:
        """Events of one request: `Started` and what follows, or a single `Failed`.

        Closing the iterator early cancels the request.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Give up a request within one step; unknown ones are ignored."""
        ...

    def stats(self) -> Stats: ...

    def check(self) -> None:
        """
        Raises:
            ServingError: if the engine cannot answer any more.
        """
        ...

    def close(self) -> None:
        """Take no more; threads end once what is running has finished."""
        ...


OVERLOADED = Failed(
    503,
    "the model is busy and its queue is full: try again in a second",
    code="overloaded",
    retry_after=1,
)
