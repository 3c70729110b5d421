"""Tokens to text while they come: no character is ever cut, no stop string ever leaks."""

from collections.abc import Callable, Sequence

UNDECIDED = "\ufffd"
"""What decoders put for bytes that are not, or not yet, a character."""


class TextStream:
    """Decodes one sequence.

    Args:
        decode: token ids to text; bytes of an unfinished character become U+FFFD.
        stop: strings before which the text ends.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._sent = 0
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string has ended it."""
        return self._release(self._advance(token))

    def flush(self) -> str:
        """What was held back when the sequence ends by itself."""
        rest = self._decode(self._window)[self._sent :]
        self._window, self._sent = [], 0
        text, stopped = self._release(rest)
        return text if stopped else text + self._take_held()

    def _advance(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        # At most the last character is undecided: an unfinished one decodes to one U+FFFD.
        certain = text.removesuffix(UNDECIDED)
        fresh = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        if certain == text and text:
            # Decoders that treat the first token apart (a leading space) need one before the next.
            self._window = self._window[-1:]
            self._sent = len(self._decode(self._window))
        return fresh

    def _release(self, fresh: str) -> tuple[str, bool]:
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
