"""What answers look like: OpenAI's conventions, one writer for completions and one for chats."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from serving.engines.base import Encoded, Likelihood, TokenLogprob
from serving.schema import ModelCard

Tree = dict[str, Any]
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI's own value."""


class Style(Protocol):
    """How the choices of an answer are written."""

    prefix: str
    """Of the answer's id."""
    whole_object: str
    chunk_object: str

    def whole(
        self, index: int, text: str, scores: Sequence[TokenLogprob] | None, reason: str
    ) -> Tree: ...

    def opening(self, index: int) -> Tree | None:
        """First chunk of a choice; None where the style has none."""
        ...

    def piece(
        self, index: int, text: str, scores: Sequence[TokenLogprob] | None, offset: int
    ) -> Tree:
        """
        Args:
            offset: characters of this choice that were sent before.
        """
        ...

    def ending(self, index: int, reason: str) -> Tree: ...


class TextStyle:
    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def whole(
        self, index: int, text: str, scores: Sequence[TokenLogprob] | None, reason: str
    ) -> Tree:
        return _text_choice(index, text, _columns(scores, 0), reason)

    def opening(self, index: int) -> Tree | None:
        return None

    def piece(
        self, index: int, text: str, scores: Sequence[TokenLogprob] | None, offset: int
    ) -> Tree:
        return _text_choice(index, text, _columns(scores, offset), None)

    def ending(self, index: int, reason: str) -> Tree:
        return _text_choice(index, "", None, reason)


class ChatStyle:
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(
        self, index: int, text: str, scores: Sequence[TokenLogprob] | None, reason: str
    ) -> Tree:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": _rows(scores),
            "finish_reason": reason,
        }

    def opening(self, index: int) -> Tree | None:
        return _chat_chunk(index, {"role": "assistant", "content": ""}, None, None)

    def piece(
        self, index: int, text: str, scores: Sequence[TokenLogprob] | None, offset: int
    ) -> Tree:
        return _chat_chunk(index, {"content": text}, _rows(scores), None)

    def ending(self, index: int, reason: str) -> Tree:
        return _chat_chunk(index, {}, None, reason)


def _text_choice(index: int, text: str, logprobs: Tree | None, reason: str | None) -> Tree:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _chat_chunk(index: int, delta: Tree, logprobs: Tree | None, reason: str | None) -> Tree:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _columns(scores: Sequence[TokenLogprob] | None, offset: int) -> Tree | None:
    """Of a completion. `text_offset` counts characters of the choice's own text."""
    if scores is None:
        return None
    offsets = []
    for score in scores:
        offsets.append(offset)
        offset += len(score.token.text)
    return {
        "tokens": [score.token.text for score in scores],
        "token_logprobs": [_logprob(score.token) for score in scores],
        "top_logprobs": [_best(score) for score in scores],
        "text_offset": offsets,
    }


def _best(score: TokenLogprob) -> dict[str, float | None] | None:
    """Text -> log-probability of the likeliest tokens, and always of the chosen one."""
    if score.token.logprob is None:
        return None
    return {one.text: _logprob(one) for one in (*score.top, score.token)}


def _rows(scores: Sequence[TokenLogprob] | None) -> Tree | None:
    """Of a chat."""
    if scores is None:
        return None
    content = [
        {**_row(score.token), "top_logprobs": [_row(one) for one in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}


def _row(token: Likelihood) -> Tree:
    return {"token": token.text, "logprob": _logprob(token), "bytes": list(token.raw)}


def _logprob(token: Likelihood) -> float | None:
    value = token.logprob
    return value if value is None or math.isfinite(value) else LEAST_LOGPROB


def usage_body(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> Tree:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def classification_body(model: str, answers: Sequence[Tree]) -> Tree:
    data = [{"index": index, **answer} for index, answer in enumerate(answers)]
    return {"object": "list", "model": model, "data": data}


def tokens_body(card: ModelCard, encoded: Encoded) -> Tree:
    return {
        "model": card.id,
        "count": len(encoded.ids),
        "max_model_len": card.context_length,
        "tokens": list(encoded.ids),
        "token_strs": list(encoded.pieces),
    }


def text_body(card: ModelCard, encoded: Encoded) -> Tree:
    return {"model": card.id, "prompt": encoded.text}
