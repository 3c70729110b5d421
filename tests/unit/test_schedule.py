import pytest

from cluster.config import TrainSection
from pipelines.training.schedule import learning_rate


def section(**changes: object) -> TrainSection:
    base = {"steps": 100, "warmup_steps": 10, "learning_rate": 0.5, "final_learning_rate": 0.1}
    return TrainSection.model_validate(base | changes)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warmup_rises_in_a_line_to_the_peak(kind: str) -> None:
    train = section(schedule=kind)
    rates = [learning_rate(train, step) for step in range(10)]
    assert rates == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert learning_rate(train, 10) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_falls_all_the_way_and_ends_at_the_final_share(kind: str) -> None:
    train = section(schedule=kind)
    rates = [learning_rate(train, step) for step in range(10, 100)]
    assert all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False))
    assert rates[-1] == pytest.approx(0.05)


def test_constant_stays() -> None:
    assert learning_rate(section(schedule="constant"), 99) == 0.5


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert learning_rate(section(warmup_steps=0), 0) == 0.5
