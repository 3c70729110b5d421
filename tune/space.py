"""What `tune.space` says: which keys are searched, over which values. Pure.

A *point* is one choice for every key that is searched there: dotted key -> value. What draws the
values is the caller's (`Draw`), so that a grid, chance and Optuna go through the same space.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, TypeAdapter, ValidationError

from cluster import loading
from cluster.config import RunConfig
from cluster.errors import ConfigError
from cluster.stages import flat, resolved
from tune import formula
from tune.formula import Formula

Point = dict[str, Any]
Fits = Callable[[RunConfig], str | None]
"""Why a config does not fit the machines; None where it does, or nobody can tell."""
SEARCHED = ("model", "train")
"""Sections that a trial may differ in: the rest is decided before it begins."""
NEVER = {
    "train.steps": "how long a trial trains is tune.steps",
    "train.input": "every trial sees the same rows in the same order",
    "train.heldout_every": "tune.report_every is it",
    "train.heldout_rows": "tune.heldout_rows is it",
}
IN_FLIGHT = (
    "train.learning_rate",
    "train.final_learning_rate",
    "train.weight_decay",
    "train.beta1",
    "train.beta2",
    "train.epsilon",
    "train.gradient_clip",
    "train.augment",
)
"""Keys that a run may change on its way, which population-based training does."""
MOST_POINTS = 100_000
_CALL = re.compile(r"^(uniform|loguniform|randint|lograndint|derive)\s*\((.*)\)$", re.DOTALL)
_CHOICE = re.compile(r"^choice\s*(\[.*\])$", re.DOTALL)


def everything_fits(config: RunConfig) -> str | None:
    """Where nobody plans memory: what does not fit is found out by a trial, which fails."""
    return None


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included."""

    low: float
    high: float
    whole: bool
    log: bool = False
    step: int = 1
    """Of whole numbers on a linear scale."""

    def points(self, number: int) -> list[Any]:
        """Up to so many values, evenly spread on its scale, both ends among them."""
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        places = [ends[0] + (ends[1] - ends[0]) * n / (number - 1) for n in range(number)]
        values = [math.exp(place) if self.log else place for place in places]
        values[0], values[-1] = self.low, self.high
        if not self.whole:
            return list(dict.fromkeys(values))
        low, step = int(self.low), self.step
        stepped = [low + round((value - low) / step) * step for value in values]
        return list(dict.fromkeys(v for v in stepped if v <= self.high))

    def holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        whole = isinstance(value, int) and (value - int(self.low)) % self.step == 0
        return self.low <= value <= self.high and (whole or not self.whole)


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    options: tuple[Any, ...]

    def points(self, number: int) -> list[Any]:
        return list(self.options)

    def holds(self, value: Any) -> bool:
        return any(type(o) is type(value) and o == value for o in self.options)


@dataclass(frozen=True)
class Derived:
    """A value that follows from others."""

    formula: Formula


Domain = Range | Choice | Derived


@dataclass(frozen=True)
class Dimension:
    key: str
    domain: Domain
    condition: Formula | None
    text: str
    """As the recipe has it."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Keys that must be known before it."""
        own = self.domain.formula.keys if isinstance(self.domain, Derived) else ()
        return (*own, *(self.condition.keys if self.condition else ()))


@dataclass(frozen=True)
class Free:
    """A key with values to choose from."""

    key: str
    domain: Range | Choice


class Draw(Protocol):
    """What chooses a value for a key."""

    def __call__(self, key: str, domain: Range | Choice) -> Any: ...


@dataclass(frozen=True)
class Space:
    config: RunConfig
    """The recipe as it is."""
    dimensions: tuple[Dimension, ...]
    """Each behind those that it reads."""
    fits: Fits = everything_fits

    @cached_property
    def base(self) -> dict[str, Any]:
        """The recipe's own values, by dotted key."""
        return flat(resolved(self.config))

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "dimensions": self.dimensions, "fits": self.fits}

    @property
    def free(self) -> list[Free]:
        """What is really searched: all but what is derived."""
        return [Free(d.key, d.domain) for d in self.dimensions if not isinstance(d.domain, Derived)]

    def point(self, draw: Draw) -> Point:
        """
        Raises:
            ConfigError: if a derived value cannot be computed.
        """
        known, point = dict(self.base), Point()
        for dimension in self.dimensions:
            if dimension.condition is not None and not dimension.condition.value(known):
                continue
            value = self._drawn(dimension, draw, known)
            known[dimension.key] = point[dimension.key] = value
        return point

    def _drawn(self, dimension: Dimension, draw: Draw, known: Mapping[str, Any]) -> Any:
        if not isinstance(dimension.domain, Derived):
            return draw(dimension.key, dimension.domain)
        value = dimension.domain.formula.value(known)
        # 4 * 0.5 is 2.0 to Python, and a number of layers to the schema.
        whole = isinstance(value, float) and value.is_integer()
        return int(value) if whole and isinstance(self.base.get(dimension.key), int) else value

    def grid(self, points: int) -> Iterator[Point]:
        """Every combination once, ranges at some of their values; those that cannot be are there.

        Raises:
            ConfigError: if there are more than anybody could try.
        """
        axes = [dimension.domain.points(points) for dimension in self.free]
        if math.prod(map(len, axes)) > MOST_POINTS:
            raise ConfigError(
                f"tune.search grid over tune.space has {math.prod(map(len, axes))} combinations: "
                "name fewer values, or take tune.search=tpe"
            )
        seen: set[str] = set()
        keys = [dimension.key for dimension in self.free]
        for values in product(*axes):
            chosen = dict(zip(keys, values, strict=True))
            point = self.point(lambda key, domain, chosen=chosen: chosen[key])
            if str(sorted(point.items())) not in seen:
                seen.add(str(sorted(point.items())))
                yield point

    def own_point(self) -> Point | None:
        """The recipe's own values, where the space holds them."""
        try:
            point = self.point(lambda key, domain: self.base[key])
        except ConfigError:
            return None
        domains = {d.key: d.domain for d in self.free}
        held = (key not in domains or domains[key].holds(point[key]) for key in point)
        same = all(point[key] == self.base[key] for key in point)
        return point if all(held) and same else None

    def build(self, point: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> RunConfig:
        """The recipe with a point's values.

        Raises:
            ConfigError: if the schema refuses the combination.
        """
        return loading.changed(self.config, {**point, **(more or {})})

    def reason_against(self, point: Mapping[str, Any]) -> str | None:
        """Why a point cannot be trained; None where it can."""
        try:
            return self.fits(self.build(point))
        except ConfigError as error:
            return str(error)


def parse(config: RunConfig, fits: Fits = everything_fits) -> Space:
    """
    Raises:
        ConfigError: naming the key, what is wrong with it, and the cure.
    """
    if not config.tune.space:
        raise ConfigError(
            "tune.space is empty: say what to search, such as "
            "tune.space.train.learning_rate='loguniform(1e-4, 1e-2)'"
        )
    base = flat(resolved(config))
    dimensions = [_dimension(key, given) for key, given in config.tune.space.items()]
    for dimension in dimensions:
        _check_key(dimension, base, config)
        for key in dimension.reads:
            if key not in base:
                raise ConfigError(f"tune.space.{dimension.key} reads {_unknown(key, base)}")
        _check_values(dimension, config)
    if config.tune.scheduler == "pbt":
        _check_in_flight(dimensions)
    if all(isinstance(d.domain, Derived) for d in dimensions):
        raise ConfigError("tune.space only derives: name a key with values to choose from")
    return Space(config, tuple(_ordered(dimensions)), fits)


def _dimension(key: str, given: Any) -> Dimension:
    if isinstance(given, list):
        return Dimension(key, _choice(key, given), None, f"choice{given}")
    text, _, condition = given.strip().partition(" if ")
    where = formula.parse(condition) if condition else None
    return Dimension(key, _domain(key, text.strip()), where, given)


def _domain(key: str, text: str) -> Domain:
    chosen = _CHOICE.match(text)
    if chosen:
        options = loading.value(chosen[1], f"tune.space.{key}")
        return _choice(key, options)
    called = _CALL.match(text)
    if not called:
        raise ConfigError(
            f"tune.space.{key}: {text!r} is none of uniform(a, b), loguniform(a, b), "
            "randint(a, b), lograndint(a, b), choice[a, b], derive(formula)"
        )
    name, inside = called[1], called[2]
    return Derived(formula.parse(inside)) if name == "derive" else _range(key, name, inside)


def _choice(key: str, options: Sequence[Any]) -> Choice:
    if not options:
        raise ConfigError(f"tune.space.{key}: choice[] holds nothing: name what to choose from")
    texts = [repr(option) for option in options]
    if len(set(texts)) < len(texts):
        raise ConfigError(f"tune.space.{key}: choice{list(options)} names a value twice")
    return Choice(tuple(options))


def _range(key: str, name: str, inside: str) -> Range:
    label = f"tune.space.{key}: {name}({inside})"
    numbers = loading.value(f"[{inside}]", f"tune.space.{key}")
    whole = "int" in name
    kinds = int if whole else (int, float)
    least = (2, 3) if name == "randint" else (2,)
    if not all(isinstance(n, kinds) and not isinstance(n, bool) for n in numbers):
        raise ConfigError(f"{label} needs {'whole ' if whole else ''}numbers")
    if len(numbers) not in least or not all(math.isfinite(n) for n in numbers):
        raise ConfigError(f"{label} needs a least and a greatest, such as {name}(1, 8)")
    low, high, step = numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else 1
    log = name.startswith("log")
    if low >= high:
        raise ConfigError(f"{label} is empty: {low} is not below {high}")
    if log and low <= 0:
        raise ConfigError(f"{label} is on a logarithmic scale, which has no {low}: begin above 0")
    if step < 1:
        raise ConfigError(f"{label} has a step of {step}: take 1 or more")
    return Range(low, high, whole, log, step)


def _check_key(dimension: Dimension, base: Mapping[str, Any], config: RunConfig) -> None:
    key = dimension.key
    if key not in base:
        raise ConfigError(f"tune.space: {_unknown(key, base)}")
    if key.split(".")[0] not in SEARCHED:
        raise ConfigError(
            f"tune.space.{key}: a trial may differ in {' and '.join(SEARCHED)} only, the rest is "
            "decided before it begins"
        )
    if key in NEVER or key == "model.kind":
        raise ConfigError(f"tune.space.{key} is not searched: {NEVER.get(key, 'the family is it')}")


def _unknown(key: str, base: Mapping[str, Any]) -> str:
    if key in set(loading.dotted_keys()):
        return f"{key} belongs to another family than this recipe's"
    return f"unknown key {key}{loading.nearest(key, [k for k in base if _is_searched(k)])}"


def _is_searched(key: str) -> bool:
    return key.split(".")[0] in SEARCHED and key not in NEVER


def _check_values(dimension: Dimension, config: RunConfig) -> None:
    """Each bound and each choice as the schema takes the key, whatever the other keys are."""
    domain = dimension.domain
    if isinstance(domain, Derived):
        return
    values = (domain.low, domain.high) if isinstance(domain, Range) else domain.options
    adapter = _adapter(config, dimension.key)
    for value in values:
        taken = value
        if isinstance(domain, Range):
            taken = int(value) if domain.whole else float(value)
        try:
            adapter.validate_json(json.dumps(taken), strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ConfigError(
                f"tune.space.{dimension.key}: {reason[0].lower()}{reason[1:]}, not {taken!r}"
            ) from None


def _adapter(config: RunConfig, key: str) -> TypeAdapter[Any]:
    """What checks the values of one key."""
    *sections, leaf = key.split(".")
    model: BaseModel = config
    for section in sections:
        model = getattr(model, section)
    info = type(model).model_fields[leaf]
    kind: Any = info.annotation
    for mark in info.metadata:
        kind = Annotated[kind, mark]
    return TypeAdapter(kind)


def _check_in_flight(dimensions: Sequence[Dimension]) -> None:
    for dimension in dimensions:
        if not dimension.key.startswith(IN_FLIGHT) or dimension.condition is not None:
            raise ConfigError(
                f"tune.space.{dimension.key}: tune.scheduler pbt changes values in a run that goes "
                f"on, which only {', '.join(IN_FLIGHT)} can, without conditions"
            )


def _ordered(dimensions: Sequence[Dimension]) -> list[Dimension]:
    """Each behind those that it reads, else as they came.

    Raises:
        ConfigError: if some read each other in a circle.
    """
    waiting, done = list(dimensions), list[Dimension]()
    while waiting:
        open_keys = {dimension.key for dimension in waiting}
        ready = [d for d in waiting if not open_keys & set(d.reads)]
        if not ready:
            circle = ", ".join(dimension.key for dimension in waiting)
            raise ConfigError(f"tune.space: {circle} read each other in a circle")
        done += ready[:1]
        waiting.remove(ready[0])
    return done
