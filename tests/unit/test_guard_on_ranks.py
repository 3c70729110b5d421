"""The guard inside whole runs on two real gloo ranks: what spoils one rank's loss spoils no run."""

import math
from pathlib import Path
from typing import Any

import pytest

from cluster import loading
from cluster.journal import Event, Journal
from cluster.storage import Store
from tests import gloo, guarded
from tests.corpora import counting_corpus

NAN = float("nan")


def prepared(root: Path, *overrides: str) -> tuple[list[str], Any]:
    given = [f"storage.root={root}", "train.workers=2", *overrides]
    config = loading.load("gpt-demo", [*guarded.TINY, *given])
    counting_corpus(config, rows=800)
    return given, config


def events(root: Path, *names: str) -> list[Event]:
    return [e for e in Journal(Store(str(root)), guarded.RUN).events() if e.name in names]


def launched(cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Per case, what each rank has to say."""
    return [list(pair) for pair in zip(*gloo.launch(2, guarded.runs, cases), strict=True)]


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    cases, spoilt = [], {}
    for stage in (0, 1, 2, 3):
        given, config = prepared(
            tmp_path / str(stage), f"train.zero_stage={stage}", "train.steps=9"
        )
        document = guarded.documents_of(config, 5)[-1]  # the last rows are rank 1's
        spoilt[stage] = document
        bad = NAN if stage != 2 else math.inf
        cases.append({"overrides": given, "factors": {document: bad}, "ranks": (1,)})
    for stage, ranks in enumerate(launched(cases)):
        history = ranks[0]["history"]
        assert [row["skipped"] for row in history] == [0, 0, 0, 0, 0, 1, 0, 0, 0]
        assert not math.isfinite(history[5]["loss"]) and math.isfinite(history[6]["loss"])
        assert ranks[0]["finite"]
        for told in ranks:
            assert told["error"] == ""
            marks = told["marks"]
            assert marks[5] == marks[4], f"stage {stage}: a skipped step changed the state"
            if stage or told is ranks[0]:  # rank 0 alone saves what is whole on every rank
                assert len(set(marks)) == 8, f"stage {stage}: a good step changed nothing"
        (event,) = events(tmp_path / str(stage), "skipped_step", "loss_spike")
        assert (event.fields["step"], event.fields["batch"]) == (6, 5)
        assert f"row-{spoilt[stage]}.txt" in event.fields["documents"]
        assert event.fields["documents_in_batch"] == 8
        assert event.fields["loss"] in ("nan", "inf")


@pytest.mark.chaos
def test_policies(tmp_path: Path) -> None:
    """Three skipped in a row; a leap that stops, one that is rewound, one with nothing before."""
    policies = {"skips": "stop", "stop": "stop", "rewind": "rewind", "early": "rewind"}
    roots = {name: tmp_path / name for name in policies}
    cases = []
    for name, policy in policies.items():
        every = f"train.checkpoint_every={100 if name == 'early' else 10}"
        settings = ["train.steps=50", every, f"train.on_spike={policy}"]
        given, config = prepared(roots[name], *settings)
        batches = (34, 35, 36) if name == "skips" else (34, 35)
        factor = NAN if name == "skips" else 100.0
        spoilt = [d for batch in batches for d in guarded.documents_of(config, batch)]
        case = {"overrides": given, "factors": dict.fromkeys(spoilt, factor), "ranks": (0, 1)}
        cases.append(case)
    skips, stop, rewind, early = launched(cases)

    for told in skips:
        assert "step 37: loss or gradient was not finite in 3 steps in a row" in told["error"]
        assert f"row-{guarded.documents_of(config, 36)[0]}.txt" in told["error"]
    assert len(events(roots["skips"], "skipped_step")) == 3
    assert len(skips[0]["history"]) == 30  # what was committed last

    for told in stop:
        assert "step 36: the loss leapt to" in told["error"] and "row-" in told["error"]
    assert len(events(roots["stop"], "loss_spike")) == 1

    assert [told["error"] for told in rewind] == ["", ""]
    history = rewind[0]["history"]
    assert [row["step"] for row in history] == [float(n) for n in range(1, 51)]
    assert [row["batch"] for row in history] == [*range(30), *range(36, 56)]
    assert max(row["loss"] for row in history[20:]) < 10
    leap, back = events(roots["rewind"], "loss_spike", "rewound")
    assert leap.fields["step"] == 36 and back.name == "rewound"
    assert back.fields == {"step": 36, "to": 30, "batches_left_out": [30, 35]}

    assert all("no checkpoint from before it is left" in told["error"] for told in early)
    assert len(events(roots["early"], "loss_spike")) == 1 and not early[0]["history"]
