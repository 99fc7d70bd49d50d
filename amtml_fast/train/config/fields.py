"""What the configuration's classes say about a key: its type, the range of its numbers, the keys beside it."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

RANGE, HOME, KEYS_OF = "range", "home", "keys of"  # of a field's metadata


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`. above: `low` itself is left out; below: `high` is."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (value > self.low if self.above else value >= self.low)
            and (value < self.high if self.below else value <= self.high)
        )

    def __str__(self) -> str:
        if math.isfinite(self.high):
            return f"in {'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"
        return f"{self.low} or more"


def within(allowed: Range) -> dict[str, Any]:
    """Metadata: the field's number, or every number of its list, must be in the range; null is allowed."""
    return {RANGE: allowed}


def keys_of(schema: type) -> dict[str, Any]:
    """Metadata of a mapping of free keys, which are those of another class."""
    return {KEYS_OF: schema}


# Of numbers without a bound of their own: a square of theirs is a float32 number.
FINITE, NOT_NEGATIVE, POSITIVE = within(Range(-1e18, 1e18)), within(Range(0, 1e18)), within(Range(1e-18, 1e18))
WHOLE, COUNT, SHARE, SEED = within(Range(0)), within(Range(1)), within(Range(0, 1)), within(Range(0, 2**63 - 1))
PATH = {HOME: True}  # a file or a folder, in which ~ stands for the home folder


def leaves(config: Any, key: str = "") -> Iterator[tuple[str, Any, Any, dataclasses.Field[Any]]]:
    """(dotted key, value, the object it is set on, its field) of everything in a configuration that is no section."""
    for one in dataclasses.fields(config):
        value, name = getattr(config, one.name), f"{key}.{one.name}" if key else one.name
        inner = {"": value} if dataclasses.is_dataclass(value) else value
        inner = dict(enumerate(inner)) if isinstance(inner, list) else inner
        if isinstance(inner, dict) and inner and all(map(dataclasses.is_dataclass, inner.values())):
            for place, section in inner.items():
                yield from leaves(section, f"{name}.{place}" if place != "" else name)
        else:
            yield name, value, config, one


def out_of_range(config: Any, key: str = "") -> str | None:
    """What to say of the first number that is not in its range; None: all are."""
    for name, value, _, one in leaves(config, key):
        allowed = one.metadata.get(RANGE)
        for each in value if isinstance(value, list) else [value]:
            if allowed is not None and each is not None and each not in allowed:
                return f"{name} must be {allowed}, got {each}"
    return None


def hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def inner(hint: Any) -> Any:
    """The type inside Optional[...] or list[...], or the type itself."""
    if typing.get_origin(hint) is list or optional(hint):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def required(hint: Any) -> Any:
    """The annotation without its null."""
    return inner(hint) if optional(hint) else hint


def keys(schema: type) -> list[str]:
    """Every valid dotted key of a configuration class; list positions are left out."""
    names: list[str] = []
    for name, hint in hints(schema).items():
        names.append(name)
        if dataclasses.is_dataclass(inner(hint)):
            names += [f"{name}.{rest}" for rest in keys(typing.cast(type, inner(hint)))]
    return names


def hint_at(schema: type, key: str, *, free: bool = False) -> Any:
    """The annotation at a dotted key; Any below free mappings and where there is no such key.

    free: below a mapping whose keys are another class's, that class's.
    """
    hint: Any = schema
    for part in parts(key):
        hint = required(hint)
        if part.isdigit() and typing.get_origin(hint) is list:
            hint = inner(hint)
        else:
            hint = below(hint, part, free=free)
    return hint


def parts(key: str) -> list[str]:
    """The names and numbers of a dotted key, teachers[0].hint."""
    return re.sub(r"\[(\w+)\]", r".\1", key).split(".")


def below(hint: Any, name: str, *, free: bool) -> Any:
    """The annotation of a key of this name in a mapping of this annotation."""
    if dataclasses.is_dataclass(hint):
        schema = typing.cast(type, hint)
        own = {one.name: one.metadata.get(KEYS_OF) for one in dataclasses.fields(schema)} if free else {}
        return own.get(name) or hints(schema).get(name, Any)
    return typing.get_args(hint)[1] if typing.get_origin(hint) is dict else Any


def wanted(schema: type, key: str) -> str:
    """The type at a dotted key, in words; empty if it may be anything."""
    hint = hint_at(schema, key)
    if hint is Any:
        return ""
    null = " or null" if optional(hint) else ""
    hint = required(hint)
    if typing.get_origin(hint) is None and isinstance(hint, type):
        name = "a mapping of keys" if dataclasses.is_dataclass(hint) else hint.__name__
    else:
        name = re.sub(r"\b(typing|amtml_fast(?:\.\w+)+)\.", "", str(hint))
    return f"{name}{null}"
