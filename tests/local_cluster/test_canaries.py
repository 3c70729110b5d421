"""A thousand planted values: none is in anything that `prepare` leaves behind."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from cluster.storage import Artifact
from pipelines import prepare
from pipelines.data.privacy.spans import canonical
from pipelines.data.tokenizer import open_tokenizer
from tests import fakes, personal_texts, personal_values

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]
COUNT = 1000


def planted(folder: Path) -> list[str]:
    """Documents with values in several files, some of them damaged; the values, by type."""
    rng, drafts, labels = Random(11), [], 0
    while labels < COUNT:
        draft = personal_texts.document(rng, rng.choice(list(personal_texts.PLAIN)))
        draft.text += " ".join(rng.choice(personal_texts.PLAIN["zh"]) for _ in range(4))
        labels += len(draft.labels)
        drafts.append(draft)
    values = [d.text[label.start : label.end] for d in drafts for label in d.labels]
    half = len(drafts) // 2
    rows = [json.dumps({"text": draft.text}) for draft in drafts[:half]]
    lost = [personal_values.email(rng) for _ in range(4)]
    broken = [f'{{"text": "{lost[0]}"', f'{{"note": "{lost[1]}"}}', f'{{"text": "{lost[2]}"}}']
    (folder / "lines.jsonl").write_text("\n".join([*rows, *broken]), encoding="utf-8")
    for number, draft in enumerate(drafts[half:]):
        # Line breaks are part of some values: no translation of them.
        (folder / f"{number:04d}.txt").write_bytes(draft.text.encode())
    (folder / "latin.txt").write_bytes(f"naïve {lost[3]}".encode("latin-1"))
    return [*values, *lost]


def left(corpus: Artifact, logs: Path) -> Iterator[tuple[str, str]]:
    """Everything that stays: files as they are, rows as text, what Ray logged."""
    tokenizer = open_tokenizer(corpus.read_bytes("encoder/tokenizer.json").decode())
    for path in sorted(Path(corpus.store.base).rglob("*")):
        if path.is_file():
            yield str(path), path.read_bytes().decode("utf-8", "replace")
        if path.suffix == ".parquet" and path.parent.name in ("train", "heldout"):
            rows = pq.read_table(path).column("tokens").to_pylist()
            yield f"{path} decoded", tokenizer.decode([t for row in rows for t in row[:-1]])
    for path in logs.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes().decode("utf-8", "replace")


def test_no_planted_value_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pile = tmp_path / "pile"
    pile.mkdir()
    values = planted(pile)
    config = fakes.config(
        "gpt-demo",
        f"data.sources=[{pile}]",
        *("data.vocab_size=2000", "data.sequence_length=64", "data.partition_bytes=40000"),
        root=tmp_path / "root",
    )
    corpus = prepare.run(config).artifact
    assert corpus is not None
    counts = corpus.read_json("report.json")["counts"]
    assert sum(counts["personal"].values()) >= COUNT and counts["quarantined"]
    assert {"email", "phone", "card", "iban", "national_id", "key"} <= counts["personal"].keys()

    logs = Path(os.environ["RAY_TMPDIR"])
    shown = "".join(capfd.readouterr())
    for place, text in [*left(corpus, logs), ("shown", shown)]:
        found = [number for number, value in enumerate(values) if value in text]
        assert not found, f"{len(found)} values in {place}"
    # Surrogates have the word too: [PRIVATE_KEY_1].
    together = "\n".join(map(canonical, values)).replace("private", " ")
    vocabulary = open_tokenizer(corpus.read_bytes("encoder/tokenizer.json").decode()).get_vocab()
    learnt = [token for token in vocabulary if len(token) >= 7 and canonical(token) in together]
    assert not learnt
