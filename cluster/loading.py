"""Defaults <- recipe file <- dotted overrides, checked once, before anything heavy is imported.

Recipes are YAML with JSON's scalars (`true`, `1e-4` is a number, `yes` and `010` are text), without
anchors, tags or duplicate keys: what a reader would guess is what is read.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config import FAMILIES, RunConfig
from cluster.errors import ConfigError

MAX_RECIPE_BYTES = 1 << 17
MAX_DEPTH = 20
"""Levels of nesting; a recipe has three."""


class _PlainLoader(yaml.SafeLoader):
    """YAML 1.2's core scalars, no aliases, no tags, no duplicate keys."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.events.AliasEvent) or event.anchor is not None:
            raise ConfigError(
                f"YAML anchors and aliases are not supported: write the value out, line {line}"
            )
        if event.tag is not None:
            raise ConfigError(f"YAML tags are not supported: remove {event.tag}, line {line}")
        if self._depth == MAX_DEPTH:
            raise ConfigError(f"more than {MAX_DEPTH} levels of nesting, line {line}")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node))
            if key in seen:
                raise ConfigError(f"key {key!r} appears twice, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep=True)


_PlainLoader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in [
    ("tag:yaml.org,2002:bool", r"^(?:true|false)$", "tf"),
    ("tag:yaml.org,2002:null", r"^(?:null|~|)$", ["n", "~", ""]),
    ("tag:yaml.org,2002:int", r"^-?(?:0|[1-9][0-9]*)$", "-0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?$",
        "-0123456789",
    ),
]:
    _PlainLoader.add_implicit_resolver(_kind, re.compile(_pattern), list(_first))
# PyYAML's own constructor wants a sign or a dot in an exponent; Python's float does not.
_PlainLoader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(str(node.value)))


class _PlainDumper(yaml.SafeDumper):
    """Quotes the text that either reading of YAML, ours or the usual one, takes for a number."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        # Between other quotes YAML folds line breaks, and PyYAML forgets that these are some.
        style = '"' if set(text) & set("\n\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_PlainDumper.add_representer(str, _PlainDumper.represent_str)
for _first_character, _resolvers in _PlainLoader.yaml_implicit_resolvers.items():
    for _kind, _compiled in _resolvers:
        _PlainDumper.add_implicit_resolver(_kind, _compiled, [_first_character])


def load(recipe: str, overrides: Sequence[str] = (), *, fresh: bool = False) -> RunConfig:
    """Resolve a recipe.

    Args:
        recipe: name of a recipe that comes with Heliostat, or path of a YAML file.
        overrides: `section.key=value`, applied last, left to right.

    Raises:
        ConfigError: with one line per mistake, each naming the key and the cure.
    """
    tree = read_recipe(recipe)
    for override in overrides:
        _apply(tree, override)
    if fresh:
        tree["fresh"] = True
    return validate(tree)


def validate(tree: dict[str, Any]) -> RunConfig:
    _derive_kinds(tree)
    try:
        return RunConfig.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        problems = error.errors()
        # A wrong family leaves the unions below it without a tag: that is no second mistake.
        causes = [p for p in problems if p["type"] != "union_tag_not_found"] or problems
        raise ConfigError("; ".join(dict.fromkeys(map(_explain, causes)))) from None


def changed(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A config with other values, by dotted key.

    Raises:
        ConfigError: if they are refused.
    """
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        _set(tree, key, value)
    return validate(tree)


def recipes() -> dict[str, str]:
    """Names of the recipes that come with Heliostat, with their descriptions."""
    folder = resources.files("cluster") / "recipes"
    names = sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))
    return {name: str(read_recipe(name).get("description", "")) for name in names}


def read_recipe(recipe: str) -> dict[str, Any]:
    """The recipe's own tree, before defaults and overrides."""
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        return _parse_file(Path(os.path.expanduser(recipe)))
    path = resources.files("cluster") / "recipes" / f"{recipe}.yaml"
    if not path.is_file():
        known = [f.name[:-5] for f in (resources.files("cluster") / "recipes").iterdir()]
        raise ConfigError(f"no recipe {recipe!r}{nearest(recipe, known)}; see `heliostat recipes`")
    return _parse(path.read_bytes(), recipe)


def dump(config: RunConfig) -> str:
    """The resolved config as YAML that loads again."""
    return to_yaml(config.model_dump(mode="json", exclude={"fresh"}))


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Plain data as a recipe reads it."""
    text: str = yaml.dump(
        dict(tree), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=100
    )
    return text


def dotted_keys(schema: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every key that an override may name, union variants included."""
    for name, field in schema.model_fields.items():
        models = section_classes(field.annotation)
        if not models:
            yield prefix + name
        for model in models:
            yield from dotted_keys(model, f"{prefix}{name}.")


def value(text: str, label: str) -> Any:
    """What a recipe would read in some text: a number, a list, a word.

    Raises:
        ConfigError: naming the label.
    """
    try:
        return _read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from None


def _parse_file(path: Path) -> dict[str, Any]:
    try:
        # A pipe or a device has no end that could be checked.
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is not a file: give a recipe's name or its YAML file")
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_RECIPE_BYTES} bytes: not a recipe")
        return _parse(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from None


def _parse(raw: bytes, label: str) -> dict[str, Any]:
    try:
        tree = _read_yaml(raw.decode("utf-8"))
        tree = _undotted(tree) if isinstance(tree, dict) else tree
    except UnicodeDecodeError:
        raise ConfigError(f"{label} is not UTF-8: save it as UTF-8") from None
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{label} must be a mapping of sections, as `heliostat config` prints it")
    return tree


def _read_yaml(text: str) -> Any:
    """
    Raises:
        ConfigError: saying where it stops being plain YAML.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)  # noqa: S506 (a safe loader)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: Python refuses integers of thousands of digits.
        raise ConfigError(f"not plain YAML: {' '.join(str(error).split())[:300]}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = _read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"override {override[:80]!r}: {error}") from None
    _set(tree, key, value)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
        tree = child
    tree[leaf] = value


def _undotted(tree: dict[str, Any]) -> dict[str, Any]:
    """Keys such as `train.steps` in their sections, over what those say."""
    dotted = {key: tree.pop(key) for key in list(tree) if "." in key}
    for key, value in dotted.items():
        if not all(key.split(".")):
            raise ConfigError(f"key {key!r} is not of the form section.key")
        _set(tree, key, value)
    return tree


def _derive_kinds(tree: dict[str, Any]) -> None:
    """A family implies its data and model kinds; a recipe need not repeat them.

    Raises:
        ConfigError: for another kind than the family's.
    """
    kinds = FAMILIES.get(str(tree.get("family")))
    if kinds is None:
        return
    for section, kind in zip(("data", "model"), kinds, strict=True):
        node = tree.setdefault(section, {})
        if isinstance(node, dict):
            given = node.setdefault("kind", kind)
            if given != kind:
                # Here, since each key of another kind would be an error of its own.
                raise ConfigError(
                    f"family {tree['family']} needs {section}.kind {kind}, not {str(given)[:40]}"
                )


def _explain(problem: Any) -> str:
    key = _dotted(problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = [*RunConfig.model_fields, *dotted_keys()]
        if key in known:
            return f"{key} belongs to another family than this recipe's"
        return f"unknown key {key}{nearest(key, known)}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "json_invalid":
        return "the recipe holds half a surrogate pair (\\ud800 to \\udfff): write the character"
    if problem["type"] == "missing":
        return f"{key} is missing"
    given = repr(problem["input"])
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {given[:80]}"


def _dotted(location: tuple[int | str, ...]) -> str:
    """Pydantic's location without the union tags that it inserts after a discriminated field."""
    parts: list[str] = []
    models: list[type[BaseModel]] = [RunConfig]
    for item in location:
        fields = [m.model_fields[str(item)] for m in models if str(item) in m.model_fields]
        if not fields and any(_tag(m) == item for m in models):
            models = [m for m in models if _tag(m) == item]
            continue
        parts.append(str(item))
        models = [m for f in fields for m in section_classes(f.annotation)]
    return ".".join(parts)


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return None if field is None else str(field.default)


def section_classes(annotation: Any) -> list[type[BaseModel]]:
    """The section classes in an annotation, through unions and `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in section_classes(arg)]


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean ...?)` where one of them is close, else nothing."""
    leaf = word.rsplit(".", 1)[-1]
    close = (
        [k for k in known if k.endswith(f".{word}")]  # the section was left out
        or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
        or [
            k
            for k in known
            if difflib.SequenceMatcher(None, leaf, k.rsplit(".", 1)[-1]).ratio() > 0.8
        ]
    )
    return f" (did you mean {close[0]}?)" if close else ""
