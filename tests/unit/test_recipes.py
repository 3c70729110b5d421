"""Every recipe that comes with Heliostat is complete, and says what it is."""

import pytest

from cluster import loading
from cluster.config import FAMILIES

NAMES = list(loading.recipes())


def test_there_is_a_recipe_for_every_family() -> None:
    assert {loading.load(name).family for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_and_describes_itself(name: str) -> None:
    config = loading.load(name)
    assert config.name == name
    assert config.description.endswith(".") and "\n" not in config.description
    assert not config.fresh


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_prints_as_one_that_loads(name: str) -> None:
    config = loading.load(name)
    assert loading.validate(loading._parse(loading.dump(config).encode(), name)) == config


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_holds_no_secret_and_no_private_place(name: str) -> None:
    """What ships is the same for everyone: storage and addresses are the user's own."""
    assert not loading.read_recipe(name).keys() & {"storage", "ray", "registry"}
