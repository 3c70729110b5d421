"""Tests on a real local Ray."""

from tests.sessions import new_registry, ray_session, root

__all__ = ["new_registry", "ray_session", "root"]
