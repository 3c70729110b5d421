"""Prompts and chats to tokens, and tokens back, for vocabularies of bytes and of characters."""

import random
from pathlib import Path
from typing import Any

import pytest

from serving.engines.base import Chat
from serving.engines.text import TextStream
from serving.engines.tokenizer import PromptError, Tokenizer
from tests import tiny_model

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def of_bytes(folder: Path, template: str | None = None) -> Tokenizer:
    from transformers import AutoTokenizer

    tiny_model.write(folder)
    if template is not None:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return Tokenizer(folder)


def of_characters(folder: Path) -> Tokenizer:
    """A vocabulary in the manner of SentencePiece: spaces are U+2581, the rest falls to bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "你", "▁a"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(folder)
    return Tokenizer(folder)


@pytest.mark.parametrize("make", [of_bytes, of_characters])
def test_the_text_of_an_answer_is_what_its_tokens_decode_to(make: Any, tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    for text in ("a b", "ab 你好 aa", "x𝒳y"):
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer.pieces())
        pieces = [stream.push(token)[0] for token in ids] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert all("\ufffd" not in piece for piece in pieces)
        assert b"".join(tokenizer.piece(t)[1] for t in ids).decode().strip() == text


def test_bytes_in_any_order_read_as_the_tokenizer_reads_them(tmp_path: Path) -> None:
    tokenizer, rng = of_bytes(tmp_path), random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(257) for _ in range(40)]
        stream = TextStream(tokenizer.pieces())
        text = "".join(stream.push(token)[0] for token in ids) + stream.flush()
        assert text == tokenizer.decode(ids)


def test_a_chat_is_rendered_by_the_models_own_template(tmp_path: Path) -> None:
    tokenizer = of_bytes(tmp_path, TEMPLATE)
    chat = Chat(({"role": "user", "content": "你好"}, {"role": "assistant", "content": "a"}))
    assert tokenizer.decode(tokenizer.encode(chat)) == "user: 你好\nassistant: a\nassistant:"
    with pytest.raises(PromptError, match="refuses the messages: no robots"):
        tokenizer.encode(Chat(({"role": "robot", "content": "b"},)))


def test_a_base_model_refuses_chats_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="use /v1/completions"):
        of_bytes(tmp_path).encode(Chat(({"role": "user", "content": "a"},)))


def test_an_empty_prompt_is_the_beginning_of_a_text(tmp_path: Path) -> None:
    tokenizer = of_bytes(tmp_path)
    assert tokenizer.encode("") == (256,) and tokenizer.decode((256,)) == ""
    assert tokenizer.piece(256) == ("<|endoftext|>", b"<|endoftext|>")
