"""The tokenizer: round trip of anything, determinism, and control tokens out of reach."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from cluster.config import RunConfig
from cluster.errors import ConfigError, SourceError
from pipelines.data import scripts, tokenizer
from pipelines.data.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, TextEncoder, lossless
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


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    return tokenizer.fit(config(f"data.tokenizer.model={request.param}"), sample(TEXTS))


@settings(deadline=None)
@given(text=st.text())
def test_round_trip_of_any_text(encoder: TextEncoder, text: str) -> None:
    (ids,) = tokenizer.encode_texts(encoder.tokenizer, [text])
    assert encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert END_OF_TEXT_ID not in ids


def test_every_byte_is_a_token_of_its_own(encoder: TextEncoder) -> None:
    text = bytes(range(128)).decode() + "".join(chr(c) for c in range(128, 0x3000, 7))
    text += "长" * 500 + "x" * 500
    (ids,) = tokenizer.encode_texts(encoder.tokenizer, [text])
    assert encoder.tokenizer.decode(ids.tolist()) == text
    assert lossless(encoder.tokenizer)


@pytest.mark.parametrize("model", ["bpe", "wordpiece"])
def test_the_least_vocabulary_is_bytes(model: str) -> None:
    settings = config("data.vocab_size=257", f"data.tokenizer.model={model}")
    bare = tokenizer.fit(settings, sample(["z" * 50]))
    (ids,) = tokenizer.encode_texts(bare.tokenizer, ["汉字 <|endoftext|>"])
    assert len(ids) == len("汉字 <|endoftext|>".encode())


def test_control_token_that_a_user_spells_out_stays_text(encoder: TextEncoder) -> None:
    spelled = f"文 {END_OF_TEXT}{END_OF_TEXT} end"
    # even where the training text is full of it
    model = "data.tokenizer.model=unigram" if '"Unigram"' in encoder.serialized else "name=x"
    trained = tokenizer.fit(config("data.vocab_size=2000", model), sample([spelled * 100]))
    for one in (encoder, trained):
        (ids,) = tokenizer.encode_texts(one.tokenizer, [spelled])
        assert END_OF_TEXT_ID not in ids
        assert one.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == spelled


def test_training_is_deterministic(encoder: TextEncoder) -> None:
    model = json.loads(encoder.serialized)["model"]["type"].lower()
    again = tokenizer.fit(config(f"data.tokenizer.model={model}"), sample(TEXTS))
    assert again == encoder


def test_facts_tell_the_true_size_and_the_cost_of_each_script(encoder: TextEncoder) -> None:
    assert 257 < encoder.facts()["vocab_size"] <= 400
    small = tokenizer.fit(config("data.vocab_size=5000"), sample(["短文 short"]))
    assert 257 < small.facts()["vocab_size"] < 300
    assert encoder.facts()["end_of_text"] == 0
    assert encoder.facts()["bytes_per_token"] >= 1
    by_script = encoder.facts()["by_script"]
    assert {"Latin", "Han"} <= set(by_script)
    (ids,) = tokenizer.encode_texts(encoder.tokenizer, [TEXTS[1]])
    assert by_script["Han"]["bytes_per_token"] == len(TEXTS[1].encode()) / len(ids)
    assert by_script["Han"]["tokens_per_word"] == len(ids) / scripts.words(TEXTS[1])
    assert encoder.facts()["by_language"] == {}  # nothing said what it is


def test_languages_of_one_script_have_figures_of_their_own() -> None:
    english, german = "the mirror follows the sun " * 30, "der Spiegel folgt der Sonne " * 60
    table = sample([english, german, TEXTS[1]])
    table = table.append_column("language", pa.array(["en", "de", "zh"]))
    encoder = tokenizer.fit(config(), table)
    facts = encoder.facts()
    assert set(facts["by_language"]) == {"en", "de", "zh"}
    assert facts["by_language"]["zh"] == facts["by_script"]["Han"]
    for name, text in (("en", english), ("de", german)):
        (ids,) = tokenizer.encode_texts(encoder.tokenizer, [text])
        assert facts["by_language"][name]["bytes_per_token"] == len(text) / len(ids)
        assert facts["by_language"][name]["tokens_per_word"] == len(ids) / scripts.words(text)
    sizes = [len(text.encode()) for text in (english, german, TEXTS[1])]
    table = table.append_column("bytes", pa.array(sizes))
    rows = encoder.encode(table.append_column("script", pa.array(["Latin", "Latin", "Han"])))
    counts = json.loads(rows.schema.metadata[b"counts"])
    assert {name: one["bytes"] for name, one in counts["languages"].items()} == dict(
        zip(("en", "de", "zh"), sizes, strict=True)
    )
    assert counts["scripts"]["Latin"]["documents"] == 2


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


def test_further_control_tokens_stand_at_the_end() -> None:
    given = 'data.tokenizer.special_tokens=["<|mask|>", "<|用户|>"]'
    encoder = tokenizer.fit(config(given), sample(TEXTS))
    assert encoder.facts()["vocab_size"] == 400
    assert encoder.facts()["mask"] == 398
    (ids,) = tokenizer.encode_texts(encoder.tokenizer, ["a <|mask|> b <|用户|>"])
    assert max(ids) < 398
    with pytest.raises(ConfigError, match=r"vocab_size 257 is less than the 259"):
        config(given, "data.vocab_size=257")
    with pytest.raises(ConfigError, match="leave out data.tokenizer.model"):
        config("data.tokenizer.path=x", "data.tokenizer.model=unigram")


def test_an_existing_tokenizer_is_used_as_it_is(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    taken = tokenizer.fit(config(f"data.tokenizer.path={tmp_path}"), sample(TEXTS[:1]))
    assert taken.serialized == encoder.serialized
    assert taken.end_of_text == END_OF_TEXT_ID
    assert taken.encode(sample(TEXTS)).equals(encoder.encode(sample(TEXTS)))


def test_a_tokenizer_whose_model_knows_control_tokens_cannot_be_talked_into_them(
    tmp_path: Path,
) -> None:
    """As SentencePiece models do: `</s>` is a piece like any other, and the likeliest."""
    pieces = [("</s>", 0.0), *((chr(c), -3.0) for c in range(32, 127)), ("汉", -3.0), ("字", -3.0)]
    model = Tokenizer(models.Unigram(pieces, 0, False))
    model.add_special_tokens(["</s>"])
    model.enable_truncation(4)
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    encoder = tokenizer.fit(config(f"data.tokenizer.path={tmp_path}"), sample(["plain text"]))
    text = "汉字 </s></s> end"
    (ids,) = tokenizer.encode_texts(encoder.tokenizer, [text])
    assert encoder.end_of_text == 0 and 0 not in ids
    assert encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=False).replace(
        " ", ""
    ) == text.replace(" ", "")
    assert not encoder.facts()["lossless"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json: "),
        ({"tokenizer_config.json": "{}"}, "names no token that ends a text"),
        ({"tokenizer_config.json": "nonsense"}, "is not JSON"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_refused(
    encoder: TextEncoder, tmp_path: Path, files: dict[str, str], message: str
) -> None:
    if files and "tokenizer.json" not in files:
        encoder.save(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        tokenizer.fit(config(f"data.tokenizer.path={tmp_path}"), sample(TEXTS))


def test_segments_know_their_bytes(encoder: TextEncoder) -> None:
    table = sample(TEXTS).append_column("bytes", pa.array([len(t.encode()) for t in TEXTS]))
    rows = encoder.encode(table.append_column("script", pa.array(["Latin", "Han", "other"])))
    for row in rows.to_pylist():
        bounds = [*row["segment_starts"][1:], row["used"]]
        parts = zip(row["segment_documents"], row["segment_bytes"], bounds, strict=True)
        start = 0
        for (document, begin, end), place in zip(parts, row["segment_places"], strict=True):
            ids = row["tokens"][start + (place == 0) : end]
            inside = TEXTS[document].encode()[begin:]
            decoded = encoder.tokenizer.decode([i for i in ids if i], skip_special_tokens=False)
            clean = decoded.strip("\ufffd").encode()  # a row may begin or end inside of a character
            assert clean in inside[: len(clean) + 8]
            start = end
    counts = json.loads(rows.schema.metadata[b"counts"])
    assert counts["scripts"]["Han"]["bytes"] == len(TEXTS[1].encode())
    assert sum(one["tokens"] for one in counts["scripts"].values()) == counts["tokens"] - 4


@pytest.mark.parametrize(
    ("text", "script", "words"),
    [
        ("def main(): pass", "Latin", 3),
        ("床前明月光，疑是地上霜。", "Han", 10),
        ("これは日本語です", "Japanese", 8),
        ("Привет, мир", "Cyrillic", 2),
        ("안녕 하세요", "Hangul", 2),
        ("2024 年 naïve", "Latin", 3),
        ("123 … 🌞", "other", 1),
    ],
)
def test_script_and_words(text: str, script: str, words: int) -> None:
    assert (scripts.script(text), scripts.words(text)) == (script, words)
