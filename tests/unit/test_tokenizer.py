"""The tokenizer: round trip of anything, determinism, and control tokens out of reach."""

import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import RunConfig
from pipelines.data import tokenizer
from pipelines.data.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, TextEncoder
from tests import fakes

TEXTS = [
    "def main() -> None:\n    print('hello world')\n" * 20,
    "床前明月光,疑是地上霜。举头望明月,低头思故乡。\n" * 20,
    "Ελληνικά, русский, العربية, हिन्दी, 한국어 and 日本語 in one 🌞 line\r\n" * 20,
]


def config(*overrides: str) -> RunConfig:
    return fakes.config("gpt-demo", "data.vocab_size=400", "data.sequence_length=16", *overrides)


def sample(texts: list[str]) -> pa.Table:
    return pa.table({"document": pa.array(range(len(texts)), pa.int64()), "text": texts})


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return tokenizer.fit(config(), sample(TEXTS))


@given(text=st.text())
def test_round_trip_of_any_text(encoder: TextEncoder, text: str) -> None:
    (ids,) = tokenizer.encode_texts(encoder.tokenizer, [text])
    assert encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert END_OF_TEXT_ID not in ids


def test_every_byte_is_a_token_of_its_own(encoder: TextEncoder) -> None:
    text = bytes(range(128)).decode() + "".join(chr(c) for c in range(128, 0x3000, 7))
    (ids,) = tokenizer.encode_texts(encoder.tokenizer, [text])
    assert encoder.tokenizer.decode(ids.tolist()) == text
    bare = tokenizer.fit(config("data.vocab_size=257"), sample(["z" * 50]))
    (ids,) = tokenizer.encode_texts(bare.tokenizer, ["汉字 <|endoftext|>"])
    assert len(ids) == len("汉字 <|endoftext|>".encode())


def test_control_token_that_a_user_spells_out_stays_text(encoder: TextEncoder) -> None:
    spelled = f"文 {END_OF_TEXT}{END_OF_TEXT} end"
    # even where the training text is full of it
    trained = tokenizer.fit(config("data.vocab_size=2000"), sample([spelled * 100]))
    for one in (encoder, trained):
        (ids,) = tokenizer.encode_texts(one.tokenizer, [spelled])
        assert END_OF_TEXT_ID not in ids
        assert one.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == spelled


def test_training_is_deterministic_and_facts_tell_the_true_size(encoder: TextEncoder) -> None:
    assert tokenizer.fit(config(), sample(TEXTS)) == encoder
    assert encoder.facts()["vocab_size"] == 400
    small = tokenizer.fit(config("data.vocab_size=5000"), sample(["短文 short"]))
    assert 257 < small.facts()["vocab_size"] < 300
    assert encoder.facts()["end_of_text"] == 0
    assert encoder.facts()["bytes_per_token"] > 1.5


def test_rows_hold_the_documents_and_the_encoder_travels(encoder: TextEncoder) -> None:
    travelled = pickle.loads(pickle.dumps(encoder))
    rows = travelled.encode(sample(TEXTS))
    assert rows.equals(encoder.encode(sample(TEXTS)))
    stream: list[int] = []
    for row in rows.to_pylist():
        stream += row["tokens"][1 if stream else 0 : row["used"]]
    assert stream[0] == stream[-1] == END_OF_TEXT_ID
    texts = encoder.tokenizer.decode(stream, skip_special_tokens=False).split(END_OF_TEXT)
    assert texts == ["", *TEXTS, ""]
    documents = {d for row in rows.to_pylist() for d in row["segment_documents"]}
    assert documents == {0, 1, 2}


def test_batches_do_not_change_the_tokens(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = encoder.encode(sample(TEXTS))
    monkeypatch.setattr(tokenizer, "BATCH_CHARACTERS", 1)
    assert encoder.encode(sample(TEXTS)).equals(at_once)


def test_saved_folder_opens_with_transformers(encoder: TextEncoder, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    encoder.save(tmp_path)
    # A published folder has the model's config beside it.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    opened = AutoTokenizer.from_pretrained(tmp_path)
    spelled = f"低头思故乡 {END_OF_TEXT} naïve\r\n\tok"
    (ids,) = tokenizer.encode_texts(encoder.tokenizer, [spelled])
    assert opened(spelled)["input_ids"] == ids.tolist()
    assert opened.decode(opened(spelled)["input_ids"]) == spelled
    assert opened.eos_token_id == opened.bos_token_id == opened.pad_token_id == END_OF_TEXT_ID
    assert opened.model_max_length == 16
    assert len(opened) == encoder.facts()["vocab_size"]
