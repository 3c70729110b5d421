"""kill -9 of the driver and of workers all through `prepare`: the same bytes in the end."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.storage import Artifact
from pipelines import prepare
from tests import fakes, preparing

pytestmark = pytest.mark.usefixtures("ray_session")
PARTITIONS = 24


SHARED = "这一行在许多文件里都有，长得足以被算作重复的一行，所以只留下第一次。and some English\n"
QUESTION = "已知一面定日镜整天跟随太阳转动，请问它把阳光反射到高塔顶端的哪一个点上最为合适？"


def text_of(number: int) -> str:
    first = SHARED if number % 2 else f"{QUESTION}\n" if number % 60 == 4 else ""
    return (
        first
        + f"第{number}篇：定日镜跟随太阳。\ndef f{number}(x):\n    return x + {number}\n"
        * (20 + number % 9)
    )


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    """Files, one large file of lines that is cut, lines that are broken, and a near copy."""
    top = tmp_path / "pile"
    top.mkdir()
    for number in range(60):
        (top / f"{number:03d}.txt").write_text(text_of(number), encoding="utf-8")
    lines = [json.dumps({"text": text_of(n)}, ensure_ascii=False) for n in range(60, 300)]
    lines[7::50] = ["{broken"] * len(lines[7::50])
    (top / "near.txt").write_text(text_of(3)[:-5] + "尾巴", encoding="utf-8")
    (top / "large.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return top


def overrides(pile: Path, root: Path) -> list[str]:
    total = sum(path.stat().st_size for path in pile.iterdir())
    sizes = ["data.vocab_size=500", "data.sequence_length=32", "data.heldout_fraction=0.2"]
    cut = f"data.partition_bytes={total // PARTITIONS}"
    return [f"storage.root={root}", f"data.sources=[{pile}]", "prepare.tasks=1", cut, *sizes]


def made(given: list[str]) -> Artifact:
    artifact = prepare.run(fakes.config("gpt-demo", *given)).artifact
    assert artifact is not None
    artifact.verify()
    return artifact


def content(artifact: Artifact) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in artifact.manifest.files}


def far_enough(version: Path, kind: str, count: int) -> Callable[[], bool]:
    return lambda: len(preparing.records(version, kind)) >= count


def test_killed_again_and_again_it_ends_with_the_same_bytes(pile: Path, tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    undisturbed = made(overrides(pile, tmp_path / "quiet"))
    version = tmp_path / "killed" / "corpus" / "gpt-demo@1"
    given = overrides(pile, tmp_path / "killed")
    for kind in ("read", "encode"):
        for count in range(1, PARTITIONS, 4):
            before = preparing.records(version, kind)
            preparing.killed_driver(given, address, far_enough(version, kind, count))
            after = preparing.records(version, kind)
            assert before.items() <= after.items(), f"{kind} {count}: done twice"
    with preparing.WorkerHunter(5) as hunter:
        killed = made(given)
    assert len(hunter.killed) >= 2
    assert content(killed) == content(undisturbed)
    detail = killed.manifest.detail["counts"]
    assert detail["documents"] == 300 - 5 + 1 and detail["quarantined"] == {"not JSON": 5}


def test_the_full_chain_killed_at_each_of_its_passes(pile: Path, tmp_path: Path) -> None:
    """Lines, near duplicates and evaluation sets leave files between the passes."""
    import ray

    address = ray.get_runtime_context().gcs_address
    (sets := tmp_path / "题.jsonl").write_text(json.dumps({"q": QUESTION}), encoding="utf-8")
    chain = ["data.dedup.near=true", "data.dedup.lines=5", "data.packing=best_fit"]
    chain += [f"data.decontaminate.sources=[{sets}]", "data.decontaminate.ngram=8"]
    undisturbed = made([*overrides(pile, tmp_path / "quiet"), *chain])
    version = tmp_path / "killed" / "corpus" / "gpt-demo@1"
    given = [*overrides(pile, tmp_path / "killed"), *chain]
    # When the last part is thinned, near duplicates are looked for.
    for kind, counts in (("read", (2, 14)), ("thin", (2, 14, PARTITIONS)), ("encode", (2, 14))):
        for count in counts:
            before = preparing.records(version, kind)
            preparing.killed_driver(given, address, far_enough(version, kind, count))
            assert before.items() <= preparing.records(version, kind).items(), "done twice"
    with preparing.WorkerHunter(5) as hunter:
        killed = made(given)
    assert len(hunter.killed) >= 2
    assert content(killed) == content(undisturbed)
    dropped = killed.manifest.detail["counts"]["dropped"]
    assert dropped["contaminated"] == 5 and dropped["near_duplicate"] == 1
    assert killed.read_json("lines.json")["shortened"] > 100
