"""Hosts of their own, reached over SSH, on this one machine."""

from collections.abc import Iterator

import pytest

from tests import lab
from tests.launched import Launched, launched

ROLES = ("train", "train", "data")
"""Labels of the three hosts."""


@pytest.fixture(autouse=True, scope="session")
def _possible() -> None:
    if reason := lab.missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def three_hosts(_possible: None) -> Iterator[Launched]:
    """A cluster for the long tests; each leaves it whole."""
    with lab.lab(3) as hosts, launched(hosts, ROLES) as cluster:
        cluster.wait_for_nodes(3)
        yield cluster
