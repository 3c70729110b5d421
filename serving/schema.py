"""What a request may say and what an answer looks like: OpenAI's conventions, and no HTTP.

Unknown fields are ignored, as the conventions have it. Fields that are known but not supported are
refused by name: an answer that quietly leaves out what was asked for is a wrong answer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.engines.base import Failed, SamplingParameters

MAX_BODY_BYTES = 1 << 20
MAX_STOPS = 16
DEFAULT_MAX_TOKENS = 16
"""As the conventions have it for completions."""


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        param: the field that is wrong.
        code: a word for programs.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @staticmethod
    def of(failed: Failed) -> "RequestError":
        return RequestError(
            failed.status,
            failed.message,
            param=failed.param,
            code=failed.code,
            retry_after=failed.retry_after,
        )

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass(frozen=True)
class ModelCard:
    """A model in service."""

    id: str
    """Name that requests give."""
    artifact: str
    """`model/gpt-demo@3`."""
    created: int
    """Unix time, seconds."""
    route: Literal["completions", "classify"]
    context_length: int | None = None

    def body(self) -> dict[str, Any]:
        """The conventions' four fields, and three that our page and scripts go by."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "heliostat",
            "artifact": self.artifact,
            "route": self.route,
            "context_length": self.context_length,
        }


@dataclass(frozen=True)
class Limits:
    max_tokens: int
    """Largest `max_tokens`."""
    choices: int
    """Most sequences (prompts times n) or inputs in one request."""


@dataclass(frozen=True)
class Completion:
    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    sampling: SamplingParameters
    n: int
    echo: bool
    stream: bool
    include_usage: bool


@dataclass(frozen=True)
class Classification:
    model: str
    inputs: tuple[Any, ...]
    """What image predictors take: `{"image": BASE64}` or `{"pixels": [[0..255, ...], ...]}`."""


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


Body = TypeVar("Body", bound=_Body)
Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _StreamOptions(_Body):
    include_usage: bool | None = None


class _CompletionBody(_Body):
    model: str
    prompt: str | list[str] | list[Token] | list[list[Token]] = ""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    echo: bool | None = None
    user: str | None = None


class _ImageInput(_Body):
    image: str | None = None
    pixels: list[list[Any]] | None = None


class _ClassifyBody(_Body):
    model: str
    inputs: Annotated[list[_ImageInput], Field(min_length=1)]


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "min_p": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
}
"""Fields that we know and do not support, with the values that ask for nothing."""

_UNIONS: Mapping[str, str] = {
    "prompt": "must be a string, a list of strings, token ids, or a list of lists of token ids",
    "stop": f"must be a string or up to {MAX_STOPS} strings of 1 to 256 characters",
}
"""Fields of several types, of which Pydantic would explain one after the other."""


def parse_completion(body: bytes, limits: Limits) -> Completion:
    """
    Raises:
        RequestError: 400, naming the field, what is wrong and what is allowed.
    """
    tree = _tree(body)
    _refuse_unsupported(tree)
    asked = _validated(_CompletionBody, tree)
    prompts = _prompts(asked.prompt)
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
    usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    return Completion(
        model=asked.model,
        prompts=prompts,
        sampling=_sampling(asked, limits),
        n=n,
        echo=bool(asked.echo),
        stream=bool(asked.stream),
        include_usage=usage,
    )


def parse_classification(body: bytes, limits: Limits) -> Classification:
    """
    Raises:
        RequestError: 400, naming the input that cannot be used.
    """
    asked = _validated(_ClassifyBody, _tree(body))
    if len(asked.inputs) > limits.choices:
        raise RequestError(
            400,
            f"{len(asked.inputs)} inputs, and this service answers {limits.choices} in one "
            "request: split it",
            param="inputs",
        )
    return Classification(
        asked.model, tuple(_image(item, index) for index, item in enumerate(asked.inputs))
    )


def _sampling(asked: _CompletionBody, limits: Limits) -> SamplingParameters:
    wanted = asked.max_tokens
    if wanted is not None and wanted > limits.max_tokens:
        raise RequestError(
            400,
            f"max_tokens {wanted} is above {limits.max_tokens}, the most that this service allows",
            param="max_tokens",
        )
    stop = asked.stop
    if stop == "":
        raise RequestError(400, "stop: give at least one character, or null", param="stop")
    return SamplingParameters(
        max_tokens=min(DEFAULT_MAX_TOKENS, limits.max_tokens) if wanted is None else wanted,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(asked.top_k or 0, 0),
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        seed=asked.seed,
    )


def _prompts(prompt: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise RequestError(400, "prompt is an empty list: give at least one", param="prompt")
    if isinstance(prompt[0], int):
        return (tuple(prompt),)
    return tuple(p if isinstance(p, str) else tuple(p) for p in prompt)


def _image(item: _ImageInput, index: int) -> Any:
    where = f"inputs[{index}]"
    if (item.image is None) == (item.pixels is None):
        raise RequestError(400, f"{where}: give either image or pixels", param="inputs")
    if item.pixels is not None:
        return {"pixels": item.pixels}
    # Browsers hand out data URLs; what stands before the comma says what the bytes say themselves.
    return {"image": (item.image or "").rpartition(",")[2]}


def _tree(body: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        # A lone surrogate is legal in JSON's grammar and is no text: it cannot be encoded.
        json.dumps(tree, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise RequestError(400, "the body is not valid UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        problem = str(error)[:200] if isinstance(error, json.JSONDecodeError) else "not usable"
        raise RequestError(400, f"the body is not JSON: {problem}") from None
    if not isinstance(tree, dict):
        raise RequestError(400, "the body must be a JSON object")
    return tree


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _refuse_unsupported(tree: Mapping[str, Any]) -> None:
    for name, neutral in _NEUTRAL.items():
        # `False == 0` in Python, and logprobs 0 asks for something that logprobs false does not.
        if name in tree and not any(
            tree[name] == value and isinstance(tree[name], bool) == isinstance(value, bool)
            for value in neutral
        ):
            raise RequestError(
                400, f"{name} is not supported: leave it out", param=name, code="unsupported"
            )


def _validated(schema: type[Body], tree: dict[str, Any]) -> Body:
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        field = str(problem["loc"][0]) if problem["loc"] else None
        if problem["type"] == "missing":
            path = ".".join(map(str, problem["loc"]))
            raise RequestError(
                400, f"you must provide {path}", param=field, code="missing_required_parameter"
            ) from None
        message = _UNIONS.get(field or "", problem["msg"][0].lower() + problem["msg"][1:])
        raise RequestError(400, f"{field}: {message}", param=field, code="invalid_value") from None


def completion_body(
    identity: str, created: int, model: str, choices: list[dict[str, Any]]
) -> dict[str, Any]:
    """A completion or, with partial choices, one chunk of a streamed one."""
    return {
        "id": identity,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
    }


def choice_body(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def usage_body(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def classification_body(model: str, answers: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    data = [{"index": index, **answer} for index, answer in enumerate(answers)]
    return {"object": "list", "model": model, "data": data}
