"""An encrypted corpus: read with its key, refused cleanly without, and in the clear nowhere."""

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ArtifactError, ConfigError, HeliostatError, UsageError
from cluster.storage import Artifact, Store
from pipelines import prepare
from pipelines.data import lineage, scratch, sealing
from pipelines.data.corpus import Corpus
from pipelines.data.sealing import VARIABLE
from tests import fakes, observed_data

KEY, OTHER = "0a" * 32, "0b" * 32
SECRET = "这是绝密的内容 top secret content"


def recipe(folder: Path, *overrides: str) -> Any:
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for n in range(40):
        (texts / f"{SECRET[:6]}-{n}.txt").write_text(f"{n} {SECRET} " * 30, encoding="utf-8")
    sizes = ["data.vocab_size=300", "data.sequence_length=16", "data.partition_bytes=9000"]
    split = ["data.heldout_fraction=0.3", "data.encrypt=true", f"data.sources=[{texts}]"]
    return fakes.config("gpt-demo", *sizes, *split, *overrides, root=folder / "root")


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, KEY)
    return KEY


def prepared(folder: Path, *overrides: str) -> Artifact:
    return observed_data.prepared(recipe(folder, *overrides))[0]


def test_rows_and_lineage_are_as_without_encryption(tmp_path: Path, key: str) -> None:
    sealed, plain = prepared(tmp_path), prepared(tmp_path, "data.encrypt=false", "name=plain")
    rows = [list(map(str, Corpus(artifact).rows("train"))) for artifact in (sealed, plain)]
    assert rows[0] == rows[1] and rows[0]
    places = [
        lineage.documents(Corpus(artifact), "train", range(5)) for artifact in (sealed, plain)
    ]
    assert places[0] == places[1] and SECRET[:6] in places[0][0]


def test_nothing_of_a_text_is_on_the_disk(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch.Scratch, "leave_only", lambda self, files: None)
    root = Path(prepared(tmp_path).path)
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix == ".parquet"]
    assert {path.parent.name for path in files} == {"train", "heldout", "documents", "scratch"}
    for path in files:
        raw = path.read_bytes()
        assert raw[:4] == raw[-4:] == b"PARE"
        assert not any(word.encode() in raw for word in (SECRET[:6], "secret", "texts/"))
    assert not any(KEY.encode() in path.read_bytes() for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, f"{VARIABLE} is not set"),
        (OTHER, "another key"),
        ("short", "has 5 characters"),
        ("钥" * 64, "not 64 hexadecimal"),
    ],
)
def test_a_wrong_or_missing_key_is_one_clear_line(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch, given: str | None, message: str
) -> None:
    made = prepared(tmp_path)
    if given is None:
        monkeypatch.delenv(VARIABLE)
    else:
        monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(UsageError, match=message) as caught:
        Corpus(Store(made.store.root).artifact("corpus", made.name, 1))
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    if given != OTHER:
        with pytest.raises(UsageError, match=message):
            prepare.check(recipe(tmp_path))
        with pytest.raises(HeliostatError, match=message):
            prepared(tmp_path, "name=other")
        assert list((tmp_path / "root" / "corpus").iterdir()) == [Path(made.path)]


def test_a_file_that_was_exchanged_is_refused(tmp_path: Path, key: str) -> None:
    made = prepared(tmp_path)
    first, second = sorted(Path(made.path).glob("train/*.parquet"))[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(ArtifactError, match="cannot be read"):
        Corpus(made).row_groups("train").read(0)


def test_an_unknown_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.encrypt"):
        recipe(tmp_path, "data.encrypt=please")


def test_keys_are_told_apart_without_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for given in (KEY, OTHER):
        monkeypatch.setenv(VARIABLE, given)
        names.add(sealing.Sealing(on=True).key_name)
    assert len(names) == 2 and not any(name and name in KEY + OTHER for name in names)
