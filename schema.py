"""JSON from outside, read within limits and against a table of its fields: name -> Rule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from files import MAX_JSON, DataError, read_text

MAX_DEPTH = 32
REQUIRED = object()
LARGEST = 1.7e308


class Rule(NamedTuple):
    """The values that a field may have; `one | other` allows both."""

    words: str  # for errors, after "must be"
    fits: Callable[[Any], bool]
    default: Any = REQUIRED  # for a file without the field

    def __or__(self, other: Rule) -> Rule:
        return Rule(f"{self.words} or {other.words}", lambda value: self.fits(value) or other.fits(value))

    def or_else(self, default: Any) -> Rule:
        """The same rule for a field that may be missing."""
        return self._replace(default=default)


def number(
    kind: type = float, least: float = -LARGEST, most: float = LARGEST, above: float = -math.inf,
    below: float = math.inf,
) -> Rule:  # fmt: skip
    """Finite numbers within the bounds: whole ones for `int`, which are floats too; no booleans."""
    bounds = {"at least": least, "at most": most, "above": above, "below": below}
    stated = [f"{name} {bound:g}" for name, bound in bounds.items() if abs(bound) < LARGEST]
    words = f"a {'whole' if kind is int else 'finite'} number {' and '.join(stated)}".rstrip()
    kinds = {int} if kind is int else {int, float}
    return Rule(
        words, lambda value: type(value) in kinds and least <= value <= most and above < value < below
    )


def one_of(*values: Any) -> Rule:
    fits = {(type(value), value) for value in values}
    words = f"one of {', '.join(map(str, values))}" if len(values) > 1 else json.dumps(*values)
    return Rule(words, lambda value: isinstance(value, str | int | float) and (type(value), value) in fits)


def many(rule: Rule, least: int = 0, most: float = math.inf) -> Rule:
    """Lists, or our tuples, of `least` to `most` values."""
    length = f"{least} " if least == most else f"at most {most} " if most < math.inf else ""
    return Rule(
        f"a list of {length}values, each {rule.words}",
        lambda value: isinstance(value, list | tuple)
        and least <= len(value) <= most
        and all(map(rule.fits, value)),
    )


def by_name(rule: Rule) -> Rule:
    """Objects with any names."""
    return Rule(
        f"an object of values, each {rule.words}",
        lambda value: isinstance(value, Mapping) and all(map(rule.fits, value.values())),
    )


def record(fields: Mapping[str, Rule]) -> Rule:
    """Objects with these fields, and perhaps others."""
    required = [name for name, rule in fields.items() if rule.default is REQUIRED]
    return Rule(
        f"an object with {', '.join(required)}" if required else "an object",
        lambda value: isinstance(value, Mapping)
        and value.keys() >= set(required)
        and all(rule.fits(value[name]) for name, rule in fields.items() if name in value),
    )


NULL = Rule("null", lambda value: value is None)
TEXT = Rule("a text", lambda value: isinstance(value, str))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
OBJECT = Rule("a JSON object", lambda value: isinstance(value, Mapping))


def read_json(path: Path, fields: Mapping[str, Rule] = MappingProxyType({}), closed: bool = False) -> dict:
    """The JSON object of a file, as `checked`. Raises DataError, in one line."""
    return checked(read_value(path, OBJECT), fields, path, closed)


def read_value(path: Path, rule: Rule, limit: int = MAX_JSON) -> Any:
    """The value in a JSON file. Raises DataError, in one line."""
    value = parse_json(read_text(path, limit), path)
    if not rule.fits(value):
        raise DataError(f"{path}: is {shown(value)}; it must be {rule.words}")
    return value


def parse_json(text: str, where: object) -> Any:
    """The value of a JSON text without NaN and infinities, names given twice, or more than MAX_DEPTH levels.

    Raises DataError for any other.
    """
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refused, parse_float=_finite)
        level, depth = [value], 0
        while level:
            if (depth := depth + 1) > MAX_DEPTH:
                raise RecursionError
            level = [inner for outer in level if isinstance(outer, dict | list)
                     for inner in (outer.values() if isinstance(outer, dict) else outer)]  # fmt: skip
    except RecursionError as error:
        raise DataError(f"{where}: more than {MAX_DEPTH} levels of JSON; fetch it again") from error
    except ValueError as error:
        raise DataError(f"{where}: cannot be read as JSON ({error}); correct it or fetch it again") from error
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} stands in it twice")
    return values


def _finite(digits: str) -> float:
    return _refused(digits) if math.isinf(value := float(digits)) else value


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no finite number")


def checked(
    values: Mapping[str, Any], fields: Mapping[str, Rule], where: object, closed: bool = False
) -> dict[str, Any]:
    """The values, with defaults for those that are missing.

    Raises DataError for a value that breaks its rule, for a missing one without a default, and, if `closed`,
    for a name that `fields` lacks.
    """
    defaults = {name: rule.default for name, rule in fields.items() if name not in values}
    missing = [name for name, default in defaults.items() if default is REQUIRED]
    if missing:
        raise DataError(f"{where}: lacks {', '.join(missing)}; add it: {fields[missing[0]].words}")
    if closed and (unknown := [shown(name) for name in values if name not in fields]):
        raise DataError(f"{where}: {', '.join(unknown)}: no such field; remove it")
    check(values, fields, where)
    return {**defaults, **values}


def check(values: Mapping[str, Any], fields: Mapping[str, Rule], where: object) -> None:
    """Raise DataError for the first value that breaks its rule in `fields`; other names are left alone."""
    for name, value in values.items():
        if name in fields and not fields[name].fits(value):
            raise DataError(f"{where}: {name} is {shown(value)}; it must be {fields[name].words}")


def shown(value: Any, length: int = 80) -> str:
    """The value as JSON in at most `length` characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= length else f"{text[: length - 4]} ..."
