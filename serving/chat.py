"""`heliostat chat`: talk with a served model in the terminal. Standard library only."""

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ServingError, UsageError

KEY = "HELIOSTAT_API_KEY"
HELP = "/reset begins again, /system TEXT sets the tone, Ctrl-C stops an answer, Ctrl-D ends."


@dataclass
class Conversation:
    """What was said so far, and how to ask for more.

    Args:
        url: of the service, without `/v1`.
        options: fields of each request: `max_tokens`, `temperature`, `seed`.
    """

    url: str
    model: Mapping[str, Any]
    """Its card, as `/v1/models` shows it."""
    key: str | None
    options: Mapping[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the answer as they come; a base model continues the text.

        Raises:
            ServingError: with the service's own words.
        """
        body: dict[str, Any] = {"model": self.model["id"], "stream": True, **self.options}
        if not self.model["chat"]:
            yield from _pieces(self.url + "/v1/completions", {**body, "prompt": text}, self.key)
            return
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        try:
            body["messages"] = self.messages
            for piece in _pieces(self.url + "/v1/chat/completions", body, self.key):
                answer.append(piece)
                yield piece
        finally:
            # An answer that was stopped was still said; a question without any is taken back.
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.messages.pop()


def choose(url: str, name: str | None, key: str | None) -> Mapping[str, Any]:
    """The card of a model.

    Raises:
        ServingError: if the service does not answer.
        UsageError: if it has no such model.
    """
    with _opened(f"{url}/v1/models", None, key) as answer:
        cards = [c for c in json.load(answer)["data"] if c["route"] == "completions"]
    found = next((c for c in cards if name in (None, c["id"])), None)
    if found is None:
        served = ", ".join(c["id"] for c in cards) or "none that writes"
        raise UsageError(f"{url} has no model {name or ''}: it has {served}")
    return found


def talk(url: str, name: str | None, key: str | None, options: Mapping[str, Any]) -> None:
    """Read questions from the terminal, or from a pipe, until they end.

    Raises:
        ServingError: if the service does not answer.
        UsageError: if it has no such model.
    """
    key = key or os.environ.get(KEY)
    url = url.rstrip("/").removesuffix("/v1")
    conversation = Conversation(url, choose(url, name, key), key, options)
    terminal = sys.stdin.isatty()
    if terminal:
        kind = "answers" if conversation.model["chat"] else "continues what you write"
        print(f"{conversation.model['artifact']} {kind}. {HELP}", file=sys.stderr)
    for text in _questions(terminal):
        if text == "/reset":
            conversation.messages.clear()
        elif text.startswith("/system "):
            conversation.messages[:] = [{"role": "system", "content": text[8:]}]
        elif text:
            _show(conversation.ask(text), terminal)


def _questions(terminal: bool) -> Iterator[str]:
    if terminal:
        import readline  # noqa: F401 (importing it gives `input` a history and editing)
    while True:
        try:
            yield input("> " if terminal else "").strip()
        except EOFError:
            return


def _show(pieces: Iterable[str], terminal: bool) -> None:
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]" if terminal else "", end="")
    except ServingError as error:
        if not terminal:
            raise
        print(f"heliostat: {error}", file=sys.stderr, end="")
    print(flush=True)


def _pieces(url: str, body: Mapping[str, Any], key: str | None) -> Iterator[str]:
    with _opened(url, body, key) as answer:
        for line in answer:
            content = line.strip().removeprefix(b"data: ")
            if not content or content == b"[DONE]":
                continue
            event = json.loads(content)
            if "error" in event:
                raise ServingError(event["error"]["message"])
            for choice in event["choices"]:
                yield choice.get("text") or choice.get("delta", {}).get("content") or ""


def _opened(url: str, body: Mapping[str, Any] | None, key: str | None) -> Any:
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=600)
    except urllib.error.HTTPError as error:
        raise ServingError(_words(error)) from None
    except (OSError, ValueError) as error:
        raise ServingError(f"{url} does not answer: {error}") from None


def _words(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url} answered {error.code}"
