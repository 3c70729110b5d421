"""The schema describes itself, and every key is read somewhere."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster import loading
from cluster.config import RunConfig
from cluster.config.base import Section
from cluster.errors import ConfigError
from cluster.loading import dotted_keys, section_classes

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "pipelines", "serving", "tune")


def fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        sections = section_classes(info.annotation)
        if not sections:
            yield prefix + name, info
        for section in sections:
            yield from fields(section, f"{prefix}{name}.")


@cache
def attributes_read() -> set[str]:
    """Names that are read as attributes anywhere outside of the schema itself."""
    schema = ROOT / "cluster" / "config"
    files = [f for p in PACKAGES for f in (ROOT / p).rglob("*.py") if schema not in f.parents]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_dotted_keys_names_every_key() -> None:
    keys = list(dotted_keys())
    assert set(keys) == {key for key, _ in fields()}
    assert {"name", "train.steps", "data.vocab_size", "data.image_size", "serve.port"} <= set(keys)
    assert not {"train", "data", "model"} & set(keys)


@pytest.mark.parametrize(("key", "info"), list(fields()), ids=lambda value: str(value)[:40])
def test_every_key_is_described(key: str, info: FieldInfo) -> None:
    assert info.description, f"{key} needs a description below it"
    assert info.description.rstrip().endswith((".", "?")), f"{key}: {info.description}"


# `heliostat recipes` reads it from the file, before there is a config.
READ_FROM_THE_FILE = {"description"}


@pytest.mark.parametrize("key", sorted(set(dotted_keys()) - READ_FROM_THE_FILE))
def test_no_key_is_dead(key: str) -> None:
    """A knob that nobody reads would be obeyed by nobody."""
    assert key.rsplit(".", 1)[-1] in attributes_read(), f"nothing reads {key}"


def test_sections_are_frozen_strict_and_closed() -> None:
    found = {RunConfig}
    waiting = [RunConfig]
    while waiting:
        for info in waiting.pop().model_fields.values():
            new = set(section_classes(info.annotation)) - found
            found |= new  # type: ignore[arg-type]
            waiting += new  # type: ignore[arg-type]
    assert len(found) >= 10
    assert all(issubclass(section, Section) for section in found)
    config = loading.load("gpt-demo")
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 5  # type: ignore[misc]


def test_bf16_weights_need_a_master_copy() -> None:
    with pytest.raises(ConfigError, match="take zero_stage 1, or precision autocast"):
        loading.load("gpt-demo", ["train.precision=bf16", "train.zero_stage=0"])
