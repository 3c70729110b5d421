"""`up` decides what runs: fake stages, real artifacts, no Ray."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster import chain
from cluster.chain import Decision, between, decide, difference, execute, plan
from cluster.config import RunConfig
from cluster.errors import ConfigError, PortError, TrainingError, UsageError
from cluster.session import Session, open_store
from cluster.stages import BY_VERB, STAGES, fingerprint, resolved
from cluster.storage import Store
from tests import fakes

VERBS = [stage.verb for stage in STAGES if stage.enabled_by is None]
"""What `up` runs of a recipe that wants no search."""


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> fakes.Stages:
    """The real chain over fake stage modules, in a session that starts nothing."""

    @contextmanager
    def quiet(config: RunConfig) -> Iterator[Session]:
        yield Session(ours=True, dashboard="", cpus=2, gpus=0, nodes=("here",))

    made = fakes.Stages()
    monkeypatch.setattr(chain, "session", quiet)
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def actions(config: RunConfig, first: str | None = None) -> dict[str, str]:
    planned = plan(between(first, None), config, open_store(config))
    return {verb: decision.action for verb, decision in planned}


def test_between_bounds_the_chain() -> None:
    def verbs(first: str | None, last: str | None) -> list[str]:
        return [stage.verb for stage in between(first, last)]

    assert verbs(None, None) == [stage.verb for stage in STAGES]
    assert verbs("evaluate", None) == VERBS[2:]
    assert verbs(None, "pretrain") == ["prepare", "tune", "pretrain"]
    assert verbs("publish", "publish") == ["publish"]
    with pytest.raises(
        UsageError, match="no stage 'trian': the stages are prepare, tune, pretrain"
    ):
        between("trian", None)
    with pytest.raises(UsageError, match="no stage ''"):
        between(None, "")
    with pytest.raises(UsageError, match="--from serve comes after --to prepare"):
        between("serve", "prepare")


def test_difference_names_each_key() -> None:
    old = {"a": 1, "gone": "x", "same": [1]}
    new = {"a": 2, "same": [1], "new": None}
    assert difference(old, new) == ["a: 1 -> 2", "gone: x -> unset", "new: unset -> None"]
    assert difference(old, old) == []


def test_decide_knows_every_case(tmp_path: Path) -> None:
    store, config, pretrain = Store(str(tmp_path)), fakes.config(), BY_VERB["pretrain"]
    corpus, newer = fakes.commit(store, "corpus"), fakes.commit(store, "corpus")

    def made(complete: bool = True, **inputs: Any) -> Any:
        return fakes.commit(
            store,
            "checkpoint",
            parents=[corpus],
            complete=complete,
            config=resolved(config),
            fingerprint=fingerprint(pretrain, config, corpus, inputs),
        ).manifest

    done = made()
    assert decide(pretrain, config, None, corpus, {}) == Decision("run", "nothing made yet")
    assert decide(pretrain, config, done, corpus, {}).action == "skip"
    assert "demo@1 is up to date" in decide(pretrain, config, done, corpus, {}).reason
    resting = decide(pretrain, config, made(complete=False), corpus, {})
    assert resting == Decision("resume", "continue from checkpoint/demo@2")
    fed = decide(pretrain, config, done, newer, {})
    assert fed == Decision("run", "its input is new: corpus/demo@2")
    assert (
        decide(pretrain, config, done, corpus, {"listing": 2}).reason == "its inputs have changed"
    )
    fresh = fakes.config().model_copy(update={"fresh": True})
    assert decide(pretrain, fresh, done, corpus, {}) == Decision("run", "--fresh")
    assert decide(BY_VERB["serve"], config, None, None, {}).action == "run"


def test_a_changed_config_is_refused_with_both_ways_on(tmp_path: Path) -> None:
    store, old, pretrain = Store(str(tmp_path)), fakes.config(), BY_VERB["pretrain"]
    made = fakes.commit(store, "checkpoint", old.name, config=resolved(old)).manifest
    changed = fakes.config("gpt-demo", f"train.steps={old.train.steps + 1}", "seed=1")
    with pytest.raises(ConfigError) as caught:
        decide(pretrain, changed, made, None, {})
    steps = f"train.steps: {old.train.steps} -> {old.train.steps + 1}"
    for part in (f"seed: {old.seed} -> 1", steps, "name=gpt-demo-2", "--fresh"):
        assert part in str(caught.value)
    operational = fakes.config("gpt-demo", "train.workers=1", "serve.port=9000")
    assert decide(pretrain, operational, made, None, {}).action != "refuse"


def test_the_whole_chain_runs_once_then_skips(stages: fakes.Stages, tmp_path: Path) -> None:
    config = fakes.config(root=tmp_path)
    assert set(actions(config).values()) == {"run"} and stages.calls == []
    rows = execute(STAGES, config)
    assert stages.calls == VERBS == [row.stage for row in rows]
    assert {row.status for row in rows} == {"done"}
    assert rows[3].artifact == "model/gpt-demo@1" and rows[3].metrics == {"figure": 1.0}
    assert rows[4].url == "http://127.0.0.1:8000" and rows[4].artifact is None

    stages.calls.clear()
    again = execute(STAGES, config)
    assert stages.calls == ["serve"]
    assert [row.status for row in again] == ["skipped"] * 4 + ["done"]
    assert again[3].artifact == "model/gpt-demo@1" and again[3].metrics == {"figure": 1.0}


def test_the_table_is_shown_before_a_service_is_held_open(
    stages: fakes.Stages, tmp_path: Path
) -> None:
    """A served model stays for hours: what came before it must be on the screen by then."""
    order: list[str] = []
    stages.stay = lambda: order.append("held open")
    execute(STAGES, fakes.config(root=tmp_path), lambda rows: order.append(f"{len(rows)} rows"))
    assert order == ["5 rows", "held open"]


def test_what_follows_a_stage_that_runs_runs_too(stages: fakes.Stages, tmp_path: Path) -> None:
    config = fakes.config(root=tmp_path)
    execute(STAGES, config)
    assert list(actions(config).values()) == ["skip"] * 4 + ["run"]
    stages.inputs["source"] = "two"
    planned = dict(plan(STAGES, config, open_store(config)))
    assert planned["prepare"].reason == "its inputs have changed"
    assert planned["publish"] == Decision("run", "after evaluate")
    stages.calls.clear()
    rows = execute(STAGES, config)
    assert stages.calls == VERBS and rows[3].artifact == "model/gpt-demo@2"
    assert list(actions(config).values()) == ["skip"] * 4 + ["run"]


def test_fresh_makes_new_versions(stages: fakes.Stages, tmp_path: Path) -> None:
    config = fakes.config(root=tmp_path)
    execute(STAGES, config)
    changed = fakes.config("gpt-demo", f"train.steps={config.train.steps + 1}", root=tmp_path)
    fresh = changed.model_copy(update={"fresh": True})
    assert execute(STAGES, fresh)[3].artifact == "model/gpt-demo@2"
    assert list(actions(changed).values()) == ["skip"] * 4 + ["run"]


def test_an_interrupted_stage_is_continued(stages: fakes.Stages, tmp_path: Path) -> None:
    config = fakes.config(root=tmp_path)
    stages.interrupted.add("pretrain")
    with pytest.raises(TrainingError):
        execute(STAGES, config, lambda rows: pytest.fail("told as if it had ended well"))
    assert list(actions(config).values()) == ["skip", "resume", "run", "run", "run"]
    stages.calls.clear()
    execute(STAGES, config)
    assert stages.calls == VERBS[1:]


def test_a_late_stage_is_refused_before_the_first_one_runs(
    stages: fakes.Stages, tmp_path: Path
) -> None:
    """Hours of training must not end in a refusal that could have been told at once."""
    execute(STAGES, fakes.config(root=tmp_path))
    stages.calls.clear()
    stages.inputs["source"] = "two"
    changed = fakes.config("gpt-demo", "evaluate.max_rows=5", root=tmp_path)
    for attempt in (lambda: execute(STAGES, changed), lambda: actions(changed)):
        with pytest.raises(ConfigError, match=r"evaluate\.max_rows: \d+ -> 5"):
            attempt()
    stages.refused = "port 8000 is in use"
    with pytest.raises(PortError):
        execute(STAGES, fakes.config(root=tmp_path))
    assert stages.calls == []


def test_a_stage_alone_needs_what_comes_before_it(stages: fakes.Stages, tmp_path: Path) -> None:
    config = fakes.config(root=tmp_path)
    with pytest.raises(UsageError, match="run `heliostat publish` first"):
        execute(between("serve", "serve"), config)
    with pytest.raises(UsageError, match="run `heliostat prepare` first"):
        plan(between("pretrain", None), config, open_store(config))
    execute(between("prepare", "prepare"), config)
    assert list(actions(config, "pretrain").values()) == ["run"] * 4
    assert stages.calls == ["prepare"]


def test_names_do_not_share_artifacts(stages: fakes.Stages, tmp_path: Path) -> None:
    execute(STAGES, fakes.config(root=tmp_path))
    other = fakes.config("gpt-demo", "name=gpt-demo-2", root=tmp_path)
    assert set(actions(other).values()) == {"run"}


SEARCH = "tune.space.train.learning_rate=loguniform(1e-4, 1e-2)"


def test_a_search_runs_only_where_the_config_wants_one(
    stages: fakes.Stages, tmp_path: Path
) -> None:
    plain, tuned = (
        fakes.config("gpt-demo", f"tune.enabled={on}", SEARCH, root=tmp_path / on)
        for on in ("false", "true")
    )
    assert "tune" not in [row.stage for row in execute(STAGES, plain)]
    assert [row.stage for row in execute(STAGES, tuned)][:3] == ["prepare", "tune", "pretrain"]
    alone = execute(between("tune", "tune"), plain)
    assert [row.stage for row in alone] == ["tune"]


def test_what_a_search_found_is_what_is_trained(stages: fakes.Stages, tmp_path: Path) -> None:
    stages.overrides = {"train.learning_rate": 0.009}
    tuned = fakes.config("gpt-demo", "tune.enabled=true", SEARCH, root=tmp_path)
    assert dict(plan(STAGES, tuned, open_store(tuned)))["pretrain"].action == "run"
    execute(STAGES, tuned)
    made = open_store(tuned).latest("checkpoint", tuned.name)
    assert made is not None and made.manifest.config["train"]["learning_rate"] == 0.009
    assert {row.status for row in execute(STAGES, tuned)[:-1]} == {"skipped"}


def test_training_waits_for_the_search_that_it_wants(stages: fakes.Stages, tmp_path: Path) -> None:
    tuned = fakes.config("gpt-demo", "tune.enabled=true", SEARCH, root=tmp_path)
    execute(between("prepare", "prepare"), tuned)
    with pytest.raises(UsageError, match="run `heliostat tune` first, or give tune.enabled=false"):
        execute(between("pretrain", "pretrain"), tuned)
