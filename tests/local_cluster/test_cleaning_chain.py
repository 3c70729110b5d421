"""Everything that may drop a document or a line, on a real Ray: one corpus, by two workers."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage import Artifact
from pipelines import prepare
from tests import fakes

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]

QUESTION = "已知一面定日镜整天跟随太阳转动，请问它把阳光反射到高塔顶端的哪一个点上最为合适？"
MENU = "首页 | 新闻 | 体育 | 财经 | 联系我们 | 版权声明 | 隐私政策 | 站点地图"


def poem(seed: int) -> str:
    return "".join(map(chr, random.Random(seed).choices(range(0x4E00, 0x8E00), k=200)))


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("pile")
    texts = {f"{n:02d}": f"{MENU}\n{poem(n)}" for n in range(30)}
    texts |= {f"near-{n}": f"{MENU}\n{poem(n)[:-3]}尾巴变" for n in range(4)}
    texts |= {"secret": f"{poem(40)}机密", "test": f"{poem(41)}\n{QUESTION}\n{poem(42)}"}
    texts |= {"english": "The mirror follows the sun and throws its light at one point. " * 3}
    for name, text in texts.items():
        (top / f"{name}.txt").write_text(text, "utf-8")
    (top / "page.html").write_text(f"<html><nav>菜单</nav><p>{poem(50)}</p></html>", "utf-8")
    return top


def test_every_reason_to_drop_is_counted_once(pile: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "题.jsonl").write_text(json.dumps({"q": QUESTION}), "utf-8")
    rule = "{custom: 'tests.prose:no_secrets'}"
    config = fakes.config(
        "gpt-demo",
        f"data.sources=[{pile}]",
        f"data.cleaning=[html_to_text, compose, {{language: [zh, ja]}}, {rule}]",
        "data.dedup.near=true",
        "data.dedup.lines=5",
        f"data.decontaminate.sources=[{tmp_path}]",
        "data.decontaminate.ngram=8",
        "data.heldout_fraction=0.3",
        "data.vocab_size=400",
        "data.partition_bytes=6000",
        "prepare.tasks=2",
        root=root,
    )
    artifact = prepare.run(config).artifact
    assert artifact is not None
    artifact.verify()
    counts = artifact.read_json("report.json")["counts"]
    dropped = {"contaminated": 1, "language.keep": 1, "near_duplicate": 4, "secret": 1}
    assert counts["dropped"] == dropped and counts["documents"] == 31
    assert artifact.read_json("lines.json") == {"shortened": 33}
    (overlap, *_) = artifact.read_json("contamination.json")["overlaps"]
    assert overlap["file"].endswith("test.txt") and overlap["start"] == 201
    rejected = artifact.read_bytes("rejected.jsonl").decode()
    assert "机密" not in rejected and '"secret"' in rejected
    kept = [e.path for e in artifact.manifest.files if e.path.startswith("documents/")]
    paths = pa.concat_tables([pq.read_table(artifact.file(p), columns=["path"]) for p in kept])
    names = {Path(path).name for path in paths.column("path").to_pylist()}
    assert {"00.txt", "page.html"} <= names and "near-0.txt" not in names


COMMON = "See the handbook of the observatory for the whole story of each of these mirrors."
STOP = ("the", "of", "and", "to", "that", "with", "be", "have")
NOUNS = ("mirror", "tower", "light", "sun", "field", "motor", "angle", "cloud", "morning", "valley")
ZH = "的了是在和有这不我们他会也就"


def prose(seed: int, count: int = 120) -> str:
    """Sentences that any rule of quality lets pass, different ones for each seed."""
    chance = random.Random(seed)
    made = [
        chance.choice(NOUNS if n % 2 else STOP) + chance.choice("aeiou") * (n % 2)
        for n in range(count)
    ]
    return " ".join(word if n % 9 else f"{word}.\n" for n, word in enumerate(made, start=1))


def chinese(seed: int) -> str:
    chance = random.Random(seed)
    pairs = "".join(chance.choice(ZH) + poem(chance.randrange(10**9))[:3] for _ in range(80))
    return "。\n".join(pairs[n : n + 20] for n in range(0, len(pairs), 20))


def full_pile(top: Path) -> None:
    """Something for every step of the recipe, beside documents that stay."""
    texts = {f"a-{n:02d}": f"{COMMON}\n{prose(n)}" for n in range(24)}
    texts |= {f"b-{n:02d}": chinese(n) for n in range(6)}
    texts |= {"copy": texts["a-03"], "near": texts["a-04"].replace(prose(4)[-30:], "another end.")}
    texts |= {"asked": f"{prose(50)}\n{QUESTION}\n{prose(51)}"}
    texts |= {"french": "Le miroir suit le soleil toute la journée et renvoie sa lumière. " * 6}
    texts |= {"short": prose(60, 20), "signs": "#*! {}= <>; //(" * 40 + prose(61, 20)}
    texts |= {"again": "the mirror of the tower and the sun\n" * 60}
    texts |= {"names": " ".join(random.Random(1).choices(NOUNS, k=120))}
    texts |= {"person": f"{prose(70)}\nMail to li.wei@example.com, 手机：13812345678."}
    texts |= {"menu": f"{prose(80)}\nThis site uses cookies. All rights reserved."}
    for name, text in texts.items():
        (top / f"{name}.txt").write_text(text, "utf-8")
    (top / "page.html").write_text(f"<html><script>x</script><p>{prose(90)}</p></html>", "utf-8")
    (top / "broken.txt").write_bytes(b"\xc3\x28\xfd" * 100)


def full_chain(folder: Path, tasks: int) -> Artifact:
    """What the recipe makes of a folder's files, by so many workers."""
    config = fakes.config(
        "corpus-demo",
        f"data.sources=[{folder}/pile]",
        f"data.decontaminate.sources=[{folder}/题.jsonl]",
        "data.dedup.lines=5",
        "data.heldout_fraction=0.3",
        "data.vocab_size=500",
        "data.partition_bytes=4000",
        f"prepare.tasks={tasks}",
        root=folder / str(tasks),
    )
    artifact = prepare.run(config).artifact
    assert artifact is not None
    return artifact


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory, ray_session: object) -> tuple[Path, Artifact]:
    folder = tmp_path_factory.mktemp("full")
    (folder / "pile").mkdir()
    full_pile(folder / "pile")
    (folder / "题.jsonl").write_text(json.dumps({"q": QUESTION}), "utf-8")
    return folder, full_chain(folder, 1)


def test_the_recipe_of_the_full_chain(by_one: tuple[Path, Artifact]) -> None:
    artifact = by_one[1]
    counts = artifact.read_json("report.json")["counts"]
    assert counts["dropped"] == {
        "contaminated": 1,
        "duplicate": 1,
        "gopher_quality.min_stop_words": 1,
        "language.keep": 1,
        "length.min": 1,
        "near_duplicate": 1,
        "repetition.min_ratio": 1,
        "symbol_ratio.max": 1,
    }
    assert counts["documents"] == 24 + 6 + 3 and counts["quarantined"] == {"not UTF-8": 1}
    assert counts["personal"] == {"email": 1, "phone": 1}
    assert artifact.read_json("lines.json") == {"shortened": 25}
    splits = artifact.manifest.detail["splits"]
    assert splits["train"]["padding_share"] > 0  # best fit
    vocabulary = artifact.read_bytes("encoder/tokenizer.json").decode()
    assert "cookie" not in vocabulary and "handbook" not in vocabulary


def test_bytes_of_the_full_chain_do_not_depend_on_the_workers(
    by_one: tuple[Path, Artifact],
) -> None:
    folder, artifact = by_one
    again = full_chain(folder, 3)
    found = [{entry.path: entry.sha256 for entry in a.manifest.files} for a in (artifact, again)]
    assert found[0] == found[1] and again.manifest.fingerprint == artifact.manifest.fingerprint
    parts = {path for path in found[0] if path.startswith("documents/")}
    assert len(parts) > 6, "several for each worker"
