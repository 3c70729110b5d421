"""What a person sees without a terminal: few lines, true figures, text as it is."""

import pytest

from cluster import progress
from cluster.progress import Bar


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(progress._state, "console", None)
    monkeypatch.setitem(progress._state, "stderr", False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_text_is_never_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[bold]x[/bold] [/no] :smile:", "中文 [1, 2]", "a" * 300):
        progress.say(text)
        assert capsys.readouterr().out == text + "\n"


def test_everything_moves_to_stderr_for_json(capsys: pytest.CaptureFixture[str]) -> None:
    progress.to_stderr()
    progress.say("for a person")
    progress.table("title", ("a", "b"), [("1", "[x]")])
    progress.write_json_line("{}")
    out, err = capsys.readouterr()
    assert out == "{}\n" and "for a person" in err and "[x]" in err


def test_a_bar_prints_now_and_then_and_once_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.bar("pretrain", 100, "steps") as bar:
        for step in range(101):
            clock[0] += 1.0
            bar.update(step, f"loss {step}")
        bar.update(100)
    lines = capsys.readouterr().out.splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[0] == "pretrain: 9/100 steps, 1.0 steps/s, 91 s left loss 9"
    assert lines[-1].startswith("pretrain: 100/100 steps") and "loss 100" in lines[-1]


def test_a_bar_of_unknown_length_is_as_quiet(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.bar("prepare", 0, "files") as bar:
        for done in range(50):
            clock[0] += 1.0
            bar.update(done)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "left" not in lines[0] and lines[0].startswith("prepare: 9 files")


def test_the_rate_of_a_continued_run_counts_only_this_run(clock: list[float]) -> None:
    bar = Bar("pretrain", 1000, "steps")
    bar.update(900)
    clock[0] += 10.0
    assert bar.describe(910, clock[0]) == "910/1000 steps, 1.0 steps/s, 90 s left"


def test_nothing_is_divided_by_zero(clock: list[float]) -> None:
    bar = Bar("prepare", 0, "files")
    bar.update(0)
    assert bar.describe(0, clock[0]) == "0 files, 0.0 files/s"
