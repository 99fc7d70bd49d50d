"""YAML by the types of the configuration: a text key keeps what is written, and no number is read as another one.

YAML 1.1 reads an unquoted 010 as 8, 1:30 as 90, 1_000 as 1000 and `no` as false. Here only unambiguous numbers are numbers;
the rest is text, which numeric keys reject.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Hashable
from typing import Any

import yaml

from .fields import below, inner, required

NULLS = ("", "~", "null", "Null", "NULL")
TAG = "tag:yaml.org,2002:"
INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*|0x[0-9a-fA-F]+|0b[01]+)")
FLOAT = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)


class Ambiguous(ValueError):
    """A number that is read in more than one way; `key` has it."""

    def __init__(self, key: str, text: str, wanted: str) -> None:
        super().__init__(f"{key} must be {wanted}, got {text}")


class Loader(yaml.SafeLoader):
    """SafeLoader, with these numbers, without dates, and without a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [(key.value, key) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, (name, key) in enumerate(names):
            if key.tag != f"{TAG}merge" and name in (other for other, _ in names[:i]):
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"found the key {name!r} twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, words) for tag, words in known if tag not in (f"{TAG}int", f"{TAG}float", f"{TAG}timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(f"{TAG}int", re.compile(f"(?:{INT.pattern})$"), list("-+0123456789"))
Loader.add_implicit_resolver(f"{TAG}float", re.compile(f"(?:{FLOAT.pattern})$"), list("-+0123456789."))


def read(text: str, hint: Any) -> Any:
    """A YAML document as plain containers, for a key of this annotation. Raises yaml.YAMLError, Ambiguous."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(_typed(node, hint, ""))
    finally:
        loader.dispose()


def value(text: str, hint: Any, key: str) -> Any:
    """The value of an override `key=text`: of a text key as it is written, of others as in a file."""
    text = text.strip()
    if text in NULLS:
        return None
    if required(hint) is str and text[0] not in "'\"":
        return text
    try:
        return read(f"{key}: {text}", dict[str, hint])[key]
    except yaml.YAMLError:
        return text


def _typed(node: yaml.Node, hint: Any, key: str) -> yaml.Node:
    """The node, with the tags that the types ask for; a copy, for anchors may stand at keys of several types."""
    hint = required(hint)
    if isinstance(node, yaml.MappingNode):
        return yaml.MappingNode(node.tag, _pairs(node, hint, key), node.start_mark, node.end_mark)
    if isinstance(node, yaml.SequenceNode):
        each = inner(hint) if typing.get_origin(hint) is list else Any
        items = [_typed(item, each, f"{key}.{i}" if key else str(i)) for i, item in enumerate(node.value)]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)
    return _scalar(node, hint, key)


def _pairs(node: yaml.MappingNode, hint: Any, key: str) -> list[tuple[yaml.Node, yaml.Node]]:
    named = dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict
    pairs = []
    for name, item in node.value:
        if name.tag == f"{TAG}merge":
            pairs.append((name, _typed(item, list[hint] if isinstance(item, yaml.SequenceNode) else hint, key)))
            continue
        whole = f"{key}.{name.value}" if key else str(name.value)
        is_text = named and isinstance(name, yaml.ScalarNode)
        label = yaml.ScalarNode(f"{TAG}str", name.value, name.start_mark, name.end_mark) if is_text else name
        pairs.append((label, _typed(item, below(hint, str(name.value), free=True), whole)))
    return pairs


def _scalar(node: yaml.Node, hint: Any, key: str) -> yaml.Node:
    tag, text = node.tag.removeprefix(TAG), node.value
    if hint is str and tag in ("int", "float", "bool"):
        return yaml.ScalarNode(f"{TAG}str", text, node.start_mark, node.end_mark)
    if hint is bool and tag in ("int", "str") and text not in ("0", "1") and _digits(text):
        raise Ambiguous(key, text, "true or false")
    if hint in (int, float) and tag == "str" and _digits(text) and not (INT.fullmatch(text) or FLOAT.fullmatch(text)):
        kind = "an integer" if hint is int else "a number"
        raise Ambiguous(key, text, f"{kind} without leading zeros, underscores, colons and blanks")
    return node


def _digits(text: str) -> bool:
    """Whether it would pass for a number somewhere: with Python's int and float, or in YAML 1.1."""
    return bool(re.fullmatch(r"\s*[-+]?[\d_:.]*\d[\d_:.]*(?:[eE][-+]?\d+)?\s*", text))
