"""Long tests that kill, damage and stall: `make test-chaos`."""

from pathlib import Path

import pytest

from tests.sessions import new_registry, ray_session, root

__all__ = ["new_registry", "ray_session", "root"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marked by where they are; hours where others have minutes."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.chaos)
            item.add_marker(pytest.mark.timeout(3600))
