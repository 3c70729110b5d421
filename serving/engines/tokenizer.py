"""A published tokenizer as engines need it: prompts and chats to tokens, and tokens back."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.engines.base import Chat, Prompt
from serving.engines.text import BytePieces, DecodedPieces, Pieces

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How vocabularies of whole characters write a byte that is in none of them."""


class PromptError(ValueError):
    """A prompt that cannot become tokens; the text says why and what to do."""


class Tokenizer:
    """
    Args:
        folder: a published model.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._bytes = _byte_alphabet(self._tokenizer)
        self._special = frozenset(self._tokenizer.all_special_ids)
        self._pieces: dict[int, tuple[str, bytes]] = {}

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """
        Raises:
            PromptError: for a chat, where the model has no chat template or refuses the messages.
        """
        if isinstance(prompt, tuple):
            return prompt
        if isinstance(prompt, Chat):
            text = self._rendered(prompt)
            return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)
        ids = tuple(self._tokenizer(prompt).input_ids)
        # The conventions take an empty prompt for the beginning of a text.
        begin = self._tokenizer.bos_token_id
        return ids if ids or begin is None else (begin,)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def pieces(self) -> Pieces:
        """What decodes one answer while it comes, to the same text as `decode`."""
        if self._bytes:
            return BytePieces(lambda t: b"" if t in self._special else self.piece(t)[1])
        return DecodedPieces(self.decode)

    def piece(self, token: int) -> tuple[str, bytes]:
        """A token's own text and bytes; a special token's are its name."""
        if token not in self._pieces:
            raw = self._raw(token)
            self._pieces[token] = (raw.decode("utf-8", errors="replace"), raw)
        return self._pieces[token]

    def _raw(self, token: int) -> bytes:
        symbol = self._tokenizer.convert_ids_to_tokens(token)
        if symbol is None:
            return b""  # rows that pad an embedding stand for nothing
        if token in self._special:
            return symbol.encode()
        if self._bytes and all(character in self._bytes for character in symbol):
            return bytes(self._bytes[character] for character in symbol)
        if byte := BYTE_TOKEN.fullmatch(symbol):
            return bytes([int(byte[1], 16)])
        # Most vocabularies of whole characters write a space before a word as U+2581.
        return symbol.replace("\u2581", " ").encode()

    def _rendered(self, chat: Chat) -> str:
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise PromptError(
                "this is a base model without a chat template: use /v1/completions, or publish a "
                "model that was tuned on conversations"
            )
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in chat.messages],
                add_generation_prompt=True,
                tokenize=False,
            )
        except TemplateError as error:
            raise PromptError(f"the model's chat template refuses the messages: {error}") from None


def _byte_alphabet(tokenizer: Any) -> dict[str, int]:
    """Character -> byte, for vocabularies that spell bytes with printable characters (GPT-2's);
    empty for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or "ByteLevel" not in repr(backend.decoder):
        return {}
    # GPT-2's rule: printable characters of Latin-1 stand for themselves, the rest for the
    # characters from 256 on, in order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}
