"""Model families: one module each behind the protocol in `base`."""

from importlib import import_module

from pipelines.families.base import Family


def load(name: str) -> Family:
    """The family of a recipe (`RunConfig.family`); its module is imported on first use."""
    family: Family = import_module(f"pipelines.families.{name}").FAMILY
    return family
