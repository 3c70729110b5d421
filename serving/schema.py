"""What everything over HTTP shares: the error, a model's card, limits, and reading a body.

Unknown fields are ignored, as OpenAI's conventions have it. Fields that are known but not supported
are refused by name: an answer that quietly leaves out what was asked for is a wrong answer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from serving.engines.base import Failed


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        param: the field that is wrong.
        code: a word for programs.
        retry_after: seconds after which trying again makes sense.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)

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
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(
                    self.status, "invalid_request_error" if self.status < 500 else "server_error"
                ),
                "param": self.param,
                "code": self.code,
            }
        }


_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
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
    chat: bool = False
    """Whether it has a chat template."""
    deployment: str = ""
    """Serve's name for the deployment that answers; empty where it is the id."""

    def body(self) -> dict[str, Any]:
        """The conventions' four fields, and those that our page and scripts go by."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "heliostat",
            "artifact": self.artifact,
            "route": self.route,
            "context_length": self.context_length,
            "chat": self.chat,
        }


@dataclass(frozen=True)
class Limits:
    max_tokens: int
    """Largest `max_tokens`."""
    choices: int
    """Most sequences (prompts times n) or inputs in one request."""


class Body(BaseModel):
    """A request body: strict types, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


AnyBody = TypeVar("AnyBody", bound=Body)


def tree_of(body: bytes) -> dict[str, Any]:
    """
    Raises:
        RequestError: 400 for what is no JSON object of text.
    """
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


def refuse_unsupported(tree: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """
    Args:
        neutral: fields that are known and not supported, with the values that ask for nothing.

    Raises:
        RequestError: 400, naming the first that asks for something.
    """
    for name, values in neutral.items():
        # `False == 0` in Python, and logprobs 0 asks for something that logprobs false does not.
        if name in tree and not any(
            tree[name] == value and isinstance(tree[name], bool) == isinstance(value, bool)
            for value in values
        ):
            raise RequestError(
                400, f"{name} is not supported: leave it out", param=name, code="unsupported"
            )


def validated(
    schema: type[AnyBody], tree: dict[str, Any], unions: Mapping[str, str] | None = None
) -> AnyBody:
    """
    Args:
        unions: what fields of several types must be; Pydantic would explain the types one by one.

    Raises:
        RequestError: 400, naming the field, what is wrong and what is allowed.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        field = str(problem["loc"][0]) if problem["loc"] else None
        known = (unions or {}).get(field or "")
        if problem["type"] == "missing" and (known is None or len(problem["loc"]) == 1):
            path = ".".join(map(str, problem["loc"]))
            raise RequestError(
                400, f"you must provide {path}", param=field, code="missing_required_parameter"
            ) from None
        message = known or problem["msg"][0].lower() + problem["msg"][1:]
        raise RequestError(400, f"{field}: {message}", param=field, code="invalid_value") from None
