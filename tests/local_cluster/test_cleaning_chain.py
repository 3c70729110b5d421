"""Everything that may drop a document or a line, on a real Ray: one corpus, by two workers."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
