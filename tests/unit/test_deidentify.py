"""`heliostat deidentify`: lines in, lines out, and every bad one named."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from cluster.config.privacy import PrivacySection
from pipelines import deidentify

ROOT = Path(__file__).parents[2]


def here(*arguments: str) -> int:
    return cli._guarded(lambda: cli.app(["deidentify", *arguments], standalone_mode=False))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    texts = [
        "王芳的邮箱是wang@example.cn。",
        "nothing here",
        "卡号４１１１ 1111 1111 1111！ wang@x",
    ]
    rows = [{"id": n, "text": text, "更多": [1.5, None]} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_is_rewritten_and_spans_are_those_of_the_old_one(source: Path) -> None:
    target = source.with_name("out.jsonl")
    assert here(str(source), str(target)) == 0
    before, after = lines(source), lines(target)
    assert [row["text"] for row in after] == [
        "王芳的邮箱是[EMAIL_1]。",
        "nothing here",
        "卡号[CARD_1]！ wang@x",
    ]
    assert after[0]["spans"] == [{"type": "email", "start": 6, "end": 21}]
    assert [row["spans"] for row in after[1:]] == [[], [{"type": "card", "start": 2, "end": 21}]]
    assert [row["更多"] for row in after] == [[1.5, None]] * 3
    assert before[0]["text"][6:21] == "wang@example.cn"
    assert sorted(path.name for path in source.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_comes_out_is_done(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once, twice = source.with_name("once.jsonl"), source.with_name("twice.jsonl")
    assert here(str(source), str(once)) == here(str(once), str(twice)) == 0
    assert [row["text"] for row in lines(once)] == [row["text"] for row in lines(twice)]
    assert "3 rows had a field `spans` of their own" in capsys.readouterr().out


def test_changes_of_the_rules(source: Path) -> None:
    target = source.with_name("out.jsonl")
    changes = ["data.privacy.types=[card]", "data.privacy.style=plain"]
    assert here(str(source), str(target), *changes) == 0
    assert [row["text"] for row in lines(target)][2] == "卡号[CARD]！ wang@x"
    assert "wang@example.cn" in lines(target)[0]["text"]
    assert here(str(source), str(target), "train.steps=3") == 3


def test_bad_lines_are_counted_and_named_without_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deidentify, "MAX_LINE_BYTES", 200)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = [
        (b'{"text": "secret@example.com"', "not JSON"),
        (b'["secret@example.com"]', "no field `text` that holds text"),
        (b'{"text": 4111111111111111}', "no field `text` that holds text"),
        ("定日镜 secret@example.com".encode("utf-16"), "not UTF-8"),
        (b'{"text": "' + b"4111 1111 1111 1111 " * 50 + b'"}', "a line over 200 bytes"),
        (b'{"text": "\\ud800 secret@example.com"}', "half a surrogate pair, which is not text"),
        (b'{"text": "secret@example.com", "x": 1e999}', "a number that JSON has no word for"),
    ]
    content = b"".join(line.replace(b"\n", b"") + b"\n" for line, _ in bad)
    source.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n' + content + b'{"text": "last"}')
    assert here(str(source), str(target)) == 0
    assert [row["text"] for row in lines(target)] == ["one", "last"]
    rejects = lines(deidentify.rejects_of(target))
    assert [(r["row"], r["reason"]) for r in rejects] == [
        (n, reason) for n, (_, reason) in enumerate(bad, start=3)
    ]
    shown = "".join(capsys.readouterr())
    assert f"rejected {source}:3: not JSON" in shown and "7 rejected lines" in shown
    for place in (shown, deidentify.rejects_of(target).read_text()):
        assert "secret" not in place and "4111" not in place


@pytest.mark.parametrize("content", [b"", b"\n\n", b"no json\n"])
def test_nothing_is_written_where_there_is_nothing(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(content)
    assert here(str(source), str(target)) == 3
    assert "nothing is written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_places_that_cannot_be(tmp_path: Path, source: Path) -> None:
    assert here(str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl")) == 3
    assert here(str(tmp_path), str(tmp_path / "out.jsonl")) == 3
    before = source.read_bytes()
    assert here(str(source), str(source)) == 3
    assert source.read_bytes() == before


def test_a_failure_leaves_what_was_there(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = source.with_name("out.jsonl")
    target.write_text("older\n")

    def fail(self: Any, text: str) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(deidentify.Scrubber, "scrub", fail)
    assert here(str(source), str(target)) == 1
    assert target.read_text() == "older\n"
    assert sorted(path.name for path in source.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_as_a_command_with_json(source: Path) -> None:
    target = source.with_name("out.jsonl")
    command = [sys.executable, "-m", "cluster.cli", "deidentify", str(source), str(target)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT)
    tally = json.loads(done.stdout)
    assert tally["rows"] == 3 and tally["types"] == {"email": 1, "card": 1}
    assert PrivacySection().apply == "auto"
