"""`tune.space`: what it says, what it refuses in one line, and the points in it."""

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import loading
from cluster.config import RunConfig
from cluster.errors import ConfigError
from tests.tuning import NO_SEARCH
from tune import space
from tune.space import Choice, Range, Space

LAYERS = "tune.space.model.layers=choice[1, 2]"


def config(*overrides: str, recipe: str = "gpt-demo") -> RunConfig:
    return loading.load(recipe, [*NO_SEARCH, *overrides])


def parsed(*overrides: str, recipe: str = "gpt-demo") -> Space:
    return space.parse(config(*overrides, recipe=recipe))


def grid(*overrides: str, points: int = 3) -> list[dict[str, Any]]:
    return list(parsed(*overrides).grid(points))


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("uniform(0, 0.3)", Range(0, 0.3, whole=False)),
        ("loguniform(1e-4, 1e-2)", Range(1e-4, 1e-2, whole=False, log=True)),
        ("choice[0.1, 0.2]", Choice((0.1, 0.2))),
    ],
)
def test_what_a_person_writes_is_what_is_meant(text: str, domain: Any) -> None:
    (dimension,) = parsed(f"tune.space.train.weight_decay={text}").dimensions
    assert (dimension.key, dimension.domain) == ("train.weight_decay", domain)


def test_whole_numbers_have_both_ends_and_a_step() -> None:
    (layers,) = parsed("tune.space.model.layers=randint(2, 8, 3)").free
    assert layers.domain == Range(2, 8, whole=True, step=3)
    assert layers.domain.points(9) == [2, 5, 8]
    (wide,) = parsed("tune.space.model.intermediate_size=lograndint(16, 1024)").free
    assert wide.domain.points(3) == [16, 128, 1024]


def test_a_list_is_a_choice_and_so_is_a_list_of_lists() -> None:
    lists = "tune.space={model.hidden_sizes: [[8, 8, 8], [8, 8, 16]]}"
    made = parsed(lists, recipe="digits-cnn")
    assert [p["model.hidden_sizes"] for p in made.grid(3)] == [[8, 8, 8], [8, 8, 16]]


def test_words_are_choices_too() -> None:
    found = grid("tune.space.train.schedule=choice[cosine, linear]")
    assert [point["train.schedule"] for point in found] == ["cosine", "linear"]


def test_a_condition_searches_a_key_only_where_it_holds() -> None:
    found = grid(
        "tune.space.train.final_learning_rate=choice[0.1, 0.2] if train.schedule == linear",
        "tune.space.train.schedule=choice[constant, linear]",
    )
    assert found == [
        {"train.schedule": "constant"},
        {"train.schedule": "linear", "train.final_learning_rate": 0.1},
        {"train.schedule": "linear", "train.final_learning_rate": 0.2},
    ]


def test_a_derived_key_follows_whatever_it_reads() -> None:
    found = grid(
        "tune.space.model.intermediate_size=derive(2 * model.hidden_size)",
        "tune.space.model.hidden_size=choice[64, 128]",
    )
    assert [point["model.intermediate_size"] for point in found] == [128, 256]
    whole = grid(
        "tune.space.model.intermediate_size=derive(model.hidden_size * 0.5)",
        "tune.space.model.hidden_size=choice[64]",
    )
    assert type(whole[0]["model.intermediate_size"]) is int


def test_what_cannot_be_is_told_before_it_costs_anything() -> None:
    made = parsed("tune.space.train.global_batch=choice[16, 15]", "train.workers=2")
    assert made.reason_against({"train.global_batch": 16}) is None
    assert "15 does not divide by train.workers 2" in str(
        made.reason_against({"train.global_batch": 15})
    )
    narrow = space.parse(made.config, fits=lambda one: "too large" if one.model else None)
    assert narrow.reason_against({"train.global_batch": 16}) == "too large"


def test_the_recipes_own_values_are_a_point_where_the_space_holds_them() -> None:
    assert parsed(LAYERS).own_point() == {"model.layers": 2}
    assert parsed("tune.space.model.layers=choice[1, 3]").own_point() is None
    assert parsed("tune.space.train.learning_rate=loguniform(1e-4, 1e-3)").own_point() is None


def test_a_space_travels() -> None:
    made = parsed(LAYERS, "tune.space.train.beta1=uniform(0.8, 0.9) if model.layers == 2")
    again = pickle.loads(pickle.dumps(made))
    assert list(again.grid(2)) == list(made.grid(2))


BAD = {
    "train.lr=uniform(0, 1)": r"unknown key train\.lr .*did you mean",
    "model.depths=choice[[1]]": "model.depths belongs to another family",
    "train.learning_rate=uniform(0.2, 0.1)": r"is empty: 0\.2 is not below 0\.1",
    "model.layers=randint(4, 4)": "is empty: 4 is not below 4",
    "train.learning_rate=loguniform(0, 0.1)": "logarithmic scale, which has no 0: begin above 0",
    "train.learning_rate=loguniform(-1, 0.1)": "logarithmic scale",
    "model.layers=lograndint(0, 4)": "logarithmic scale",
    "model.layers=choice[]": "holds nothing",
    "model.layers=choice[2, 2]": "names a value twice",
    "model.layers=choice[2, two]": "model.layers: .*not 'two'",
    "model.layers=uniform(1, 4)": "model.layers: .*not 1.0",
    "model.layers=randint(0, 4)": "model.layers: .*not 0",
    "train.learning_rate=uniform(0.1, 20)": "less than or equal to 10, not 20.0",
    "train.schedule=choice[cosin]": "train.schedule: .*'cosine'.*not 'cosin'",
    "train.learning_rate=uniform(a, b)": "needs numbers",
    "train.learning_rate=uniform(1)": "needs a least and a greatest",
    "model.layers=randint(1.5, 4)": "needs whole numbers",
    "model.layers=randint(1, 4, 0)": "step of 0",
    "train.learning_rate=normal(0, 1)": "none of uniform",
    "train.learning_rate=0.1": "0.1 leaves nothing to search",
    "data.vocab_size=choice[300]": "may differ in model and train only",
    "seed=randint(1, 9)": "may differ in model and train only",
    "train.steps=randint(1, 9)": "how long a trial trains is tune.steps",
    "model.kind=choice[llama]": "is not searched",
    "model.layers=derive(4 *)": "is no expression",
    "model.layers=derive(open('x'))": "calls open: only",
    "model.layers=derive(model.leyers)": r"reads unknown key model\.leyers \(did you mean",
    "model.layers=choice[1] if model.layers > 1": "read each other in a circle",
    "model.layers=derive(2)": "only derives",
}


@pytest.mark.parametrize("given_", BAD)
def test_bad_input_is_one_line_with_the_cure(given_: str) -> None:
    with pytest.raises(ConfigError, match=BAD[given_]) as caught:
        parsed(f"tune.space.{given_}")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("tune.trials=0", "tune.trials: .*not 0"),
        (
            "tune.objectives={accuracy: max}",
            "no trial reports 'accuracy': take one of heldout_loss",
        ),
        ("tune.objectives={}", "names none"),
        ("tune.scheduler=pbt", "take tune.search=random"),
        ("tune.money=5", "needs tune.price_per_hour"),
        ("tune.folds=1", "leaves nothing to train on"),
        ("tune.objectives={loss: min, parameters: min}", "take tune.scheduler=none"),
    ],
)
def test_settings_that_mean_nothing_are_refused(override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config(override)


def test_an_empty_space_says_how_to_fill_it() -> None:
    with pytest.raises(ConfigError, match=r"tune.space is empty: .*loguniform\(1e-4, 1e-2\)"):
        space.parse(config())


def test_a_run_that_goes_on_changes_only_what_it_can() -> None:
    pbt = ("tune.scheduler=pbt", "tune.search=random")
    parsed("tune.space.train.weight_decay=uniform(0, 1)", *pbt)
    with pytest.raises(ConfigError, match=r"tune.space.model.layers: tune.scheduler pbt changes"):
        parsed(LAYERS, *pbt)


def test_a_grid_that_nobody_could_try_is_refused() -> None:
    keys = ("beta1", "beta2", "weight_decay")
    many = [f"tune.space.train.{key}=uniform(0.1, 0.2)" for key in keys]
    with pytest.raises(ConfigError, match="1000000 combinations"):
        grid(*many, points=100)


@given(st.floats(1e-6, 10), st.floats(1e-6, 10), st.integers(2, 9), st.booleans())
def test_points_of_a_range_lie_in_it(one: float, other: float, number: int, log: bool) -> None:
    low, high = sorted((one, other))
    if low == high:
        return
    made = Range(low, high, whole=False, log=log)
    found = made.points(number)
    assert found == sorted(found) and found[0] == low and found[-1] == high
    assert all(made.holds(value) for value in found)
