"""Small expressions over config keys: `4 * model.hidden_size`, `train.schedule == linear`. Pure.

Python's own grammar, of which only arithmetic, comparisons, `and`, `or`, `not` and a few functions
mean anything. A bare word that is no key is text: `linear`.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "round": round,
    "int": int,
    "float": float,
    "abs": abs,
}
_BINARY: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, several: item in several,
    ast.NotIn: lambda item, several: item not in several,
}
_UNARY: Mapping[type[ast.AST], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
LONGEST = 500
"""Characters. Python's parser takes memory that grows fast with nesting."""


@dataclass(frozen=True)
class Formula:
    """An expression that was found to be one."""

    text: str
    keys: tuple[str, ...]
    """Config keys that it reads, each once, in order of appearance."""
    tree: ast.expr

    def __reduce__(self) -> Any:
        return parse, (self.text,)

    def value(self, known: Mapping[str, Any]) -> Any:
        """
        Args:
            known: dotted key -> value, for all of `keys`.

        Raises:
            ConfigError: if it cannot be computed from these values.
        """
        try:
            return _value(self.tree, known)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ConfigError(f"tune.space: {self.text!r} cannot be computed: {error}") from None


def parse(text: str) -> Formula:
    """
    Raises:
        ConfigError: naming what is no part of such an expression.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"tune.space: an expression of {len(text)} characters: {LONGEST} at most")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(f"tune.space: {text!r} is no expression of keys and numbers") from None
    _check(tree, text)
    return Formula(text, tuple(dict.fromkeys(_keys(tree))), tree)


def _check(node: ast.AST, text: str) -> None:
    known = (
        ast.BinOp,
        ast.UnaryOp,
        ast.BoolOp,
        ast.Compare,
        ast.Constant,
        ast.Name,
        ast.List,
        ast.Tuple,
    )
    if _dotted(node) is not None:
        return
    operators = [getattr(node, "op", None), *getattr(node, "ops", [])]
    strange = [
        o for o in operators if o and type(o) not in {**_BINARY, **_UNARY, ast.And: 0, ast.Or: 0}
    ]
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name not in FUNCTIONS or node.keywords:
            raise ConfigError(
                f"tune.space: {text!r} calls {name}: only {', '.join(FUNCTIONS)} are known"
            )
    elif not isinstance(node, known) or strange:
        raise ConfigError(
            f"tune.space: {text!r} holds {ast.unparse(node)!r}: only arithmetic, comparisons, and, "
            "or, not have a meaning"
        )
    for child in _children(node):
        _check(child, text)


def _children(node: ast.AST) -> list[ast.expr]:
    """Parts that are expressions; the name of a called function is none."""
    if isinstance(node, ast.Call):
        return list(node.args)
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


def _keys(node: ast.AST) -> list[str]:
    dotted = _dotted(node)
    if dotted is not None:
        return [dotted]
    return [key for child in _children(node) for key in _keys(child)]


def _dotted(node: ast.AST) -> str | None:
    """`train.warmup_steps` of two names or more."""
    if not isinstance(node, ast.Attribute):
        return None
    if isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    below = _dotted(node.value)
    return None if below is None else f"{below}.{node.attr}"


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    dotted = _dotted(node)
    if dotted is not None:
        return known[dotted]
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None}.get(node.id, node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, known) for item in node.elts]
    if isinstance(node, ast.UnaryOp):
        return _UNARY[type(node.op)](_value(node.operand, known))
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_value(node.left, known), _value(node.right, known))
    if isinstance(node, ast.BoolOp):
        wanted = isinstance(node.op, ast.Or)
        return (
            any(_value(v, known) for v in node.values)
            if wanted
            else all(_value(v, known) for v in node.values)
        )
    if isinstance(node, ast.Compare):
        sides = [_value(side, known) for side in (node.left, *node.comparators)]
        pairs = zip(node.ops, sides, sides[1:], strict=False)
        return all(_BINARY[type(op)](left, right) for op, left, right in pairs)
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return FUNCTIONS[node.func.id](*(_value(argument, known) for argument in node.args))


__all__ = ["FUNCTIONS", "Formula", "parse"]
