import json
from pathlib import Path

import pytest

from cluster import cli
from cluster.journal import Journal, newest_run, runs
from cluster.storage import Store


def here(*arguments: str) -> int:
    return cli._guarded(lambda: cli.app(list(arguments), standalone_mode=False))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def test_events_come_back_in_order_as_they_were_written(store: Store) -> None:
    journal = Journal(store, "gpt-demo-0123456789")
    journal.write("launch", step=0, workers=2)
    journal.write("skipped_step", step=17, loss=float("nan"), documents=["a.py", "词.txt"])
    first, second = journal.events()
    assert (first.name, first.fields) == ("launch", {"step": 0, "workers": 2})
    assert second.fields == {"step": 17, "loss": "nan", "documents": ["a.py", "词.txt"]}
    assert first.nanoseconds < second.nanoseconds
    assert "skipped_step" in second.line() and "词.txt" in second.line()
    assert json.loads(second.json())["loss"] == "nan"


def test_the_newest_run_of_a_name_is_found_and_no_other_names(store: Store) -> None:
    for run in ("gpt-demo-aaaaaaaaaa", "gpt-demo-bbbbbbbbbb", "gpt-demo-2-cccccccccc"):
        Journal(store, run).write("launch", step=0)
    Journal(store, "gpt-demo-aaaaaaaaaa").write("worker_lost")  # still the older run
    assert newest_run(store, "gpt-demo") == "gpt-demo-bbbbbbbbbb"
    assert newest_run(store, "gpt-demo-2") == "gpt-demo-2-cccccccccc"
    assert newest_run(store, "gpt") is None
    assert len(runs(store)) == 3


def test_the_command_prints_by_recipe_and_by_run(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"storage.root={store.uri}"
    Journal(store, "gpt-demo-aaaaaaaaaa").write("launch", step=0)
    Journal(store, "gpt-demo-bbbbbbbbbb").write("launch", step=20)
    assert here("journal", "gpt-demo", root) == 0
    assert "step=20" in capsys.readouterr().out
    assert here("journal", "gpt-demo-aaaaaaaaaa", root, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    event = json.loads(line)
    assert event["event"] == "launch" and event["step"] == 0 and event["at"] > 1e18


def test_a_run_that_is_not_there_is_named(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert here("journal", "gpt-demo", f"storage.root={store.uri}") == 3
    assert "no run of gpt-demo has a journal" in capsys.readouterr().err
    assert here("journal", "nonesuch", f"storage.root={store.uri}") == 3
    assert here("journal", "gpt-demo", "no.such.key=1") == 3
    assert "unknown key" in capsys.readouterr().err
