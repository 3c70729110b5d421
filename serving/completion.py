"""What a request for text may say: completions, chats, tokens of a text and text of tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from serving.engines.base import Chat, Prompt, SamplingParameters
from serving.schema import Body, Limits, RequestError, refuse_unsupported, tree_of, validated

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_MESSAGES = 4096
DEFAULT_MAX_TOKENS = 16
"""As the conventions have it for completions. A chat goes on while there is room."""


@dataclass(frozen=True)
class Completion:
    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParameters
    n: int = 1
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    chat: bool = False
    fill: bool = False
    """As many tokens as fit; `max_tokens` of the sampling says nothing then."""


@dataclass(frozen=True)
class Text:
    """A prompt to make tokens of, or tokens to make text of."""

    model: str
    prompt: Prompt


Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Positive = Annotated[int, Field(ge=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class _StreamOptions(Body):
    include_usage: bool | None = None


class _GenerationBody(Body):
    """What completions and chats share."""

    model: str
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = None
    user: str | None = None


class _CompletionBody(_GenerationBody):
    # None at all scores or echoes the prompt.
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    prompt: str | list[str] | list[Token] | list[list[Token]] = ""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class _Part(Body):
    type: str
    text: str | None = None


class _Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(max_length=MAX_MESSAGES)] | None = None
    # Refused by name: a conversation without them would be another one.
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None


class _ChatBody(_GenerationBody):
    messages: Annotated[list[_Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class _TokenizeBody(Body):
    model: str
    prompt: str | None = None
    messages: Annotated[list[_Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None


class _DetokenizeBody(Body):
    model: str
    tokens: list[Token]


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "moderation": (None,),
    "parallel_tool_calls": (None,),
    "reasoning_effort": (None, "none"),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "verbosity": (None, "medium"),
    # Those of other servers that speak this language.
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "stop_token_ids": (None, []),
    "include_stop_str_in_output": (None, False),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "repetition_penalty": (None, 1),
    "length_penalty": (None, 1),
    "use_beam_search": (None, False),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "json_schema": (None,),
    "grammar": (None, ""),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
}
"""Fields that we know and do not support, with the values that ask for nothing."""

HARMLESS = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "user",
)
"""Fields of the conventions that are ignored: labels and hints, without which the answer is the
same one."""

_UNIONS: Mapping[str, str] = {
    "prompt": "must be a string, a list of strings, token ids, or a list of lists of token ids",
    "stop": (
        f"must be a string or up to {MAX_STOPS} strings, each of 1 to {MAX_STOP_CHARACTERS} "
        "characters"
    ),
    "messages": (
        f"must be 1 to {MAX_MESSAGES} objects with a role (system, developer, user, assistant) and "
        "a content (a string, or a list of text parts)"
    ),
    "logit_bias": f"must map up to {MAX_BIASES} token ids to numbers from -100 to 100",
}


def parse_completion(body: bytes, limits: Limits) -> Completion:
    """
    Raises:
        RequestError: 400, naming the field, what is wrong and what is allowed.
    """
    tree = tree_of(body)
    refuse_unsupported(tree, _NEUTRAL)
    if tree.get("logprobs") is False:
        del tree["logprobs"]  # what chats say for none
    asked = validated(_CompletionBody, tree, _UNIONS)
    prompts = _prompts(asked.prompt)
    default = min(DEFAULT_MAX_TOKENS, limits.max_tokens)
    return _completion(
        asked, prompts, limits, default, asked.logprobs, echo=bool(asked.echo), chat=False
    )


def parse_chat(body: bytes, limits: Limits) -> Completion:
    """
    Raises:
        RequestError: 400, naming the field, what is wrong and what is allowed.
    """
    tree = tree_of(body)
    refuse_unsupported(tree, _NEUTRAL)
    asked = validated(_ChatBody, tree, _UNIONS)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise RequestError(
            400, "top_logprobs is only allowed with logprobs: true", param="top_logprobs"
        )
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    return _completion(asked, (_chat(asked.messages),), limits, 0, logprobs, echo=False, chat=True)


def parse_tokenize(body: bytes) -> Text:
    """
    Raises:
        RequestError: 400, unless there is either a prompt or messages.
    """
    asked = validated(_TokenizeBody, tree_of(body), _UNIONS)
    if (asked.prompt is None) == (asked.messages is None):
        raise RequestError(400, "give either prompt or messages", param="prompt")
    prompt = asked.prompt if asked.messages is None else _chat(asked.messages)
    return Text(asked.model, prompt if prompt is not None else "")


def parse_detokenize(body: bytes) -> Text:
    """
    Raises:
        RequestError: 400, naming the field.
    """
    unions = {"tokens": "must be a list of token ids"}
    asked = validated(_DetokenizeBody, tree_of(body), unions)
    return Text(asked.model, tuple(asked.tokens))


def _completion(
    asked: _GenerationBody,
    prompts: tuple[Prompt, ...],
    limits: Limits,
    default_tokens: int,
    logprobs: int | None,
    *,
    echo: bool,
    chat: bool,
) -> Completion:
    n = asked.n or 1
    if len(prompts) * n > limits.choices:
        raise RequestError(
            400,
            f"{len(prompts)} prompts times n {n} are {len(prompts) * n} sequences and this "
            f"service answers {limits.choices} in one request: split it",
            param="n" if n > 1 else "prompt",
        )
    if asked.stream_options is not None and not asked.stream:
        raise RequestError(
            400, "stream_options is only allowed with stream: true", param="stream_options"
        )
    tokens = _max_tokens(asked, limits)
    return Completion(
        model=asked.model,
        prompts=prompts,
        sampling=_sampling(asked, default_tokens if tokens is None else tokens, logprobs),
        fill=chat and tokens is None,
        n=n,
        echo=echo,
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        chat=chat,
    )


def _max_tokens(asked: _GenerationBody, limits: Limits) -> int | None:
    # The newer name goes first where both are given.
    given = [(name, getattr(asked, name)) for name in ("max_completion_tokens", "max_tokens")]
    given = [(name, wanted) for name, wanted in given if wanted is not None]
    for name, wanted in given:
        if wanted > limits.max_tokens:
            raise RequestError(
                400,
                f"{name} {wanted} is above {limits.max_tokens}, the most that this service allows",
                param=name,
            )
    return given[0][1] if given else None


def _sampling(asked: _GenerationBody, tokens: int, logprobs: int | None) -> SamplingParameters:
    stop = asked.stop
    return SamplingParameters(
        max_tokens=tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(asked.top_k or 0, 0),
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        seed=asked.seed,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=_biases(asked.logit_bias or {}),
        logprobs=logprobs,
    )


def _biases(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    wrong = next((key for key in given if not (key.isascii() and key.isdigit())), None)
    if wrong is not None or any(len(key) > 10 for key in given):
        raise RequestError(
            400, f"logit_bias: {_UNIONS['logit_bias']}", param="logit_bias", code="invalid_value"
        )
    return tuple((int(key), value) for key, value in given.items())


def _prompts(prompt: Any) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise RequestError(400, "prompt is an empty list: give at least one", param="prompt")
    if isinstance(prompt[0], int):
        return (tuple(prompt),)
    return tuple(p if isinstance(p, str) else tuple(p) for p in prompt)


def _chat(messages: list[_Message]) -> Chat:
    return Chat(tuple(_message(message, at) for at, message in enumerate(messages)))


def _message(message: _Message, at: int) -> dict[str, str]:
    content = message.content
    other = next((n for n in ("tool_calls", "function_call", "audio") if getattr(message, n)), None)
    if other is not None:
        raise RequestError(
            400,
            f"messages[{at}]: {other} is not supported: leave it out",
            param="messages",
            code="unsupported",
        )
    if isinstance(content, list):
        other = next((part.type for part in content if part.type != "text"), None)
        if other is not None or any(part.text is None for part in content):
            raise RequestError(
                400,
                f"messages[{at}]: parts of type {other or 'text without text'} are not supported: "
                "give text",
                param="messages",
                code="unsupported",
            )
        content = "".join(part.text or "" for part in content)
    if content is None and message.role != "assistant":
        raise RequestError(400, f"messages[{at}]: you must provide content", param="messages")
    # The conventions' newer word for the same; templates know the older one.
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": content or ""}
