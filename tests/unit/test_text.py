"""Tokens to text while they come."""

from collections.abc import Callable, Sequence

import pytest

from serving.engines.text import BytePieces, DecodedPieces, Pieces, TextStream

Factory = Callable[[], Pieces]


def _bytes_decode(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


BOTH = pytest.mark.parametrize(
    "pieces", [lambda: DecodedPieces(_bytes_decode), lambda: BytePieces(lambda b: bytes([b]))]
)
"""Through a decoder, and straight from the bytes."""


@BOTH
@pytest.mark.parametrize("text", ["你好，世界🌞", "naïve", "a\ufffdb", "plain"])
def test_no_character_is_cut_and_nothing_is_lost(pieces: Factory, text: str) -> None:
    stream = TextStream(pieces())
    seen = [stream.push(byte)[0] for byte in text.encode()] + [stream.flush()]
    assert "".join(seen) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in seen)
        # Each character comes as soon as its last byte is there.
        assert [p for p in seen if p] == list(text)


@BOTH
def test_bytes_that_are_no_text_come_out_as_the_decoder_shows_them(pieces: Factory) -> None:
    raw = bytes([0xFF, 0xE4, 0xBD, 0x41, 0xC3, 0x28, 0xF0, 0x9F])
    stream = TextStream(pieces())
    assert "".join([stream.push(b)[0] for b in raw]) + stream.flush() == _bytes_decode(raw)


@BOTH
@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("END",), "one EN two "), (("two", "one EN"), ""), (("世界",), None), (("zzz",), None)],
)
def test_a_stop_string_never_leaks(
    pieces: Factory, stop: tuple[str, ...], expected: str | None
) -> None:
    text = "one EN two END three"
    stream = TextStream(pieces(), stop)
    seen, ended = "", False
    for byte in text.encode():
        piece, ended = stream.push(byte)
        seen += piece
        if ended:
            break
    if expected is None:
        assert not ended and seen + stream.flush() == text
    else:
        assert ended and seen == expected


@BOTH
def test_a_chinese_stop_string_across_tokens(pieces: Factory) -> None:
    stream = TextStream(pieces(), ("世界",))
    seen = [stream.push(byte) for byte in "你好世界".encode()]
    assert "".join(piece for piece, _ in seen) == "你好"
    assert seen[-1][1]
