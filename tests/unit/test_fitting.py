"""What would not fit the machines never becomes a trial."""

import pickle
from dataclasses import replace

from cluster import loading
from cluster.config import RunConfig
from cluster.planner import Machines
from pipelines import families
from tests.hunting import TINY
from tests.tuning import NO_SEARCH
from tune import space
from tune.fitting import Planned, shared
from tune.searchers import Asked, possible

MIB = 2**20
SMALL = Machines(1, 1, "CPU", 64 * MIB, None, None, None)


def recipe(*overrides: str) -> RunConfig:
    wide = "tune.space.model.intermediate_size=choice[64, 65536]"
    rate = "tune.space.train.learning_rate=uniform(0.001, 0.1)"
    return loading.load("gpt-demo", [*TINY, *NO_SEARCH, wide, rate, *overrides])


def planned(config: RunConfig, machines: Machines) -> Planned:
    return Planned(families.load(config.family).expected_facts(config), machines)


def test_a_model_that_does_not_fit_is_no_point_of_the_search() -> None:
    config = recipe("tune.search=random", "tune.trials=4")
    fits = planned(config, SMALL)
    searched = space.parse(config, fits)
    asked = Asked(searched, 40)
    widths = [asked.suggest(str(n))["values"]["model.intermediate_size"] for n in range(6)]
    assert widths == [64] * 6
    # Rates that differ are not planned again.
    assert 1 <= len(fits._known) <= 2
    grid = possible(replace(searched, config=recipe("tune.search=grid")))
    assert {point["model.intermediate_size"] for point in grid} == {64}
    wide = {"model.intermediate_size": 65536}
    assert "a worker would hold" in str(searched.reason_against(wide))
    large = replace(searched, fits=planned(config, replace(SMALL, memory=2**34)))
    assert large.reason_against(wide) is None


def test_it_travels_with_the_search() -> None:
    config = recipe()
    fits = pickle.loads(pickle.dumps(planned(config, SMALL)))
    assert "a worker would hold" in str(
        fits(loading.changed(config, {"model.intermediate_size": 65536}))
    )


def test_trials_at_once_share_the_machines() -> None:
    config = recipe("train.workers=1", "tune.gpus_per_worker=0.25")
    assert shared(SMALL, config, at_once=4).memory == 16 * MIB
    gpu = replace(SMALL, device="H100", memory=80 * 2**30)
    assert shared(gpu, config, at_once=4).memory == 20 * 2**30
