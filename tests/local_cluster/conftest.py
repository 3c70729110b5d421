"""Tests on a real local Ray."""

from tests.sessions import ray_session, root

__all__ = ["ray_session", "root"]
