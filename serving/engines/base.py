"""What an engine is: the narrow interface between HTTP and whatever computes the answer.

An engine takes a request and yields events. It knows nothing of HTTP; the ingress knows nothing of
models. Everything that crosses is plain frozen data, because it travels between processes. This
module imports no torch.
"""

from collections.abc import AsyncIterator, Mapping
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
    presence_penalty: float = 0.0
    """Taken from the logit of every token that was generated already."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time that it was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    logprobs: int | None = None
    """Report each token's log-probability and those of this many likeliest ones; None for none."""


@dataclass(frozen=True)
class Chat:
    """A conversation, which the model's own chat template turns into a prompt."""

    messages: tuple[Mapping[str, Any], ...]


Prompt = str | tuple[int, ...] | Chat


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence. A call with several prompts or choices is as many requests."""

    id: str
    prompt: Prompt
    sampling: SamplingParameters
    echo: bool = False
    """Begin the text with the prompt; with `logprobs`, report the prompt's too."""
    whole: bool = False
    """Nobody looks before the last event: tokens after the first may come as one."""


@dataclass(frozen=True)
class TextRequest:
    """What the model's tokenizer makes of a prompt; the model itself is not asked."""

    id: str
    prompt: Prompt


@dataclass(frozen=True)
class PredictionRequest:
    id: str
    inputs: tuple[Any, ...]
    """What the family's predictor takes, one answer each."""


Request = GenerationRequest | PredictionRequest | TextRequest


@dataclass(frozen=True)
class Likelihood:
    """A token and how likely it was."""

    id: int
    text: str
    """The token alone; bytes that are no character are U+FFFD."""
    raw: bytes
    """What it stands for; a character may be spread over several tokens."""
    logprob: float | None
    """Natural logarithm, of the model's own distribution: before penalties, bias, temperature and
    cuts. None for a prompt's first token, which nothing precedes."""


@dataclass(frozen=True)
class TokenLogprob:
    token: Likelihood
    top: tuple[Likelihood, ...]
    """The likeliest tokens in this place, most likely first."""


@dataclass(frozen=True)
class Started:
    """The request was accepted; it may still wait for a place."""

    model: str
    """Artifact that answers, `model/gpt-demo@3`."""
    prompt_tokens: int = 0
    text: str = ""
    """The prompt, where echo was asked for."""


@dataclass(frozen=True)
class PromptScored:
    """Comes before the first `Tokens` where echo and logprobs were asked for."""

    logprobs: tuple[TokenLogprob, ...]
    """One for each token of the prompt."""


@dataclass(frozen=True)
class Tokens:
    """Text of one or more new tokens; empty while a character or a stop string is undecided."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """Where asked for: of the tokens whose text is out. They lag behind `ids` while text is held
    back, and tokens that only spell a stop string or the end of text never come."""


@dataclass(frozen=True)
class Finished:
    reason: Literal["stop", "length"]
    completion_tokens: int
    """Tokens generated, the end-of-text token included."""
    cached_tokens: int = 0
    """Tokens of the prompt that did not have to be read: another prompt began with them."""


@dataclass(frozen=True)
class Predicted:
    answers: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Encoded:
    """The answer to a `TextRequest`."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    """Each token's own text; bytes that are no character are U+FFFD."""
    text: str
    """All of them together."""


@dataclass(frozen=True)
class Failed:
    """The request ends without an answer; the fields become the HTTP error."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None
    """Seconds."""


Event = Started | PromptScored | Tokens | Finished | Predicted | Encoded | Failed


def is_last(event: Event) -> bool:
    return isinstance(event, Finished | Predicted | Encoded | Failed)


@dataclass(frozen=True)
class Stats:
    """Of this moment; `_total` counts from the engine's start."""

    running: int
    waiting: int
    queued_tokens: int = 0
    """Work that was accepted: prompt tokens still to read and answer tokens still allowed."""
    cache_tokens: int = 0
    """Tokens whose keys and values are held, for running requests and for prefixes to reuse."""
    cache_capacity: int = 0
    """Most tokens that can be held; 0 where nothing is."""
    prompt_tokens_total: int = 0
    """Of prompts that were accepted."""
    cached_tokens_total: int = 0
    """The part of them that did not have to be read (prefix hits)."""
    completion_tokens_total: int = 0


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
