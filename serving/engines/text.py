"""Tokens to text while they come: no character is ever cut, no stop string ever leaks."""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

UNDECIDED = "\ufffd"
"""What decoders put for bytes that are not, or not yet, a character."""


class Pieces(Protocol):
    """Decodes one sequence of tokens, character by character."""

    def push(self, token: int) -> str:
        """The characters that are now certain."""
        ...

    def flush(self) -> str:
        """What an unfinished character at the end is shown as."""
        ...

    @property
    def settled(self) -> bool:
        """Whether no character is unfinished."""
        ...


class BytePieces:
    """For vocabularies whose tokens are bytes: the text is those bytes as UTF-8.

    Args:
        raw: a token's bytes.
    """

    def __init__(self, raw: Callable[[int], bytes]) -> None:
        self._raw = raw
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._raw(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    @property
    def settled(self) -> bool:
        return not self._decoder.getstate()[0]


class DecodedPieces:
    """For any tokenizer, through its own decoder.

    Args:
        decode: token ids to text; bytes of an unfinished character become U+FFFD.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._sent = 0
        self.settled = True

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        # At most the last character is undecided. It lacks a byte or more of its four, and shows
        # as one U+FFFD or, with decoders that fall back to bytes, as one for each byte.
        open_bytes = min(3, len(text) - len(text.rstrip(UNDECIDED)))
        certain = text[: len(text) - open_bytes]
        fresh = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        self.settled = certain == text
        if self.settled and text:
            self._window = self._tail()
            self._sent = len(self._decode(self._window))
        return fresh

    def _tail(self) -> list[int]:
        """The last tokens that are text by themselves.

        Decoders that treat the first token apart (a leading space) need one before the next, and
        those that fall back to bytes all the bytes of a character.
        """
        tails = (self._window[-count:] for count in range(1, 5))
        return next((t for t in tails if UNDECIDED not in self._decode(t)), self._window[-1:])

    def flush(self) -> str:
        rest = self._decode(self._window)[self._sent :]
        self._window, self._sent, self.settled = [], 0, True
        return rest


class TextStream:
    """The text of one answer.

    Args:
        stop: strings before which the text ends.
    """

    def __init__(self, pieces: Pieces, stop: Sequence[str] = ()) -> None:
        self._pieces = pieces
        self._stop = tuple(stop)
        self._held = ""

    @property
    def settled(self) -> bool:
        """Whether all text so far is out."""
        return not self._held and self._pieces.settled

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string has ended it."""
        return self._release(self._pieces.push(token))

    def flush(self) -> str:
        """What was held back when the sequence ends by itself."""
        text, stopped = self._release(self._pieces.flush())
        return text if stopped else text + self._take_held()

    def _release(self, fresh: str) -> tuple[str, bool]:
        if not self._stop:
            return fresh, False
        text = self._held + fresh
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _take_held(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
