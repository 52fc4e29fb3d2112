"""Checks of AWS requests and responses against botocore's service model: what AWS would check of their shape."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import botocore.session


@cache
def service_model(service: str) -> Any:
    """botocore's model of a service."""
    return botocore.session.get_session().get_service_model(service)


@cache
def _pattern(text: str) -> re.Pattern[str]:
    for unicode_class, ours in (
        (r"\p{L}", r"\w"),
        (r"\p{Z}", r"\s"),
        (r"\p{N}", r"\d"),
        (r"\p{M}", r"\w"),
        (r"\p{S}", "$+<=>|~^`"),
        (r"\p{P}", r"!-#%-*,-/:;?@\[-\]_{}"),
    ):
        text = text.replace(unicode_class, ours)
    text = re.sub(r"\$\{\d+,\d+\}$", "", text)  # a length that got behind the end
    return re.compile(text.replace(r"\uD800\uDC00-\uDBFF\uDFFF", r"\U00010000-\U0010FFFF"))


def problems(value: Any, shape: Any, path: str = "") -> list[str]:
    """What is wrong with a value for a shape: unknown and missing members, types, enumerations, patterns, lengths."""
    check = _CHECKS.get(shape.type_name)
    return [] if check is None else check(value, shape, path or shape.name)


def _structure(value: Any, shape: Any, path: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{path}: {value!r} is no structure"]
    found = [f"{path}.{name}: unknown" for name in value if name not in shape.members]
    found += [f"{path}.{name}: missing" for name in shape.required_members if name not in value]
    for name, member in value.items():
        if name in shape.members:
            found += problems(member, shape.members[name], f"{path}.{name}")
    return found


def _list(value: Any, shape: Any, path: str) -> list[str]:
    if not isinstance(value, list):
        return [f"{path}: {value!r} is no list"]
    found = _size(len(value), shape, path, "entries")
    for number, member in enumerate(value):
        found += problems(member, shape.member, f"{path}[{number}]")
    return found


def _map(value: Any, shape: Any, path: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{path}: {value!r} is no map"]
    found = _size(len(value), shape, path, "entries")
    for key, member in value.items():
        found += problems(key, shape.key, f"{path}[{key}]") + problems(member, shape.value, f"{path}[{key}]")
    return found


def _string(value: Any, shape: Any, path: str) -> list[str]:
    if not isinstance(value, str):
        return [f"{path}: {value!r} is no string"]
    found = _size(len(value), shape, path, "characters")
    allowed, pattern = shape.metadata.get("enum"), shape.metadata.get("pattern")
    if allowed and value not in allowed:
        found.append(f"{path}: {value!r} is none of its {len(allowed)} values")
    if pattern and not _pattern(pattern).fullmatch(value):
        found.append(f"{path}: {value!r} does not match {pattern}")
    return found


def _number(value: Any, shape: Any, path: str) -> list[str]:
    whole = shape.type_name in ("integer", "long")
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return [f"{path}: {value!r} is no {shape.type_name}"]
    return _size(value, shape, path, "")


def _boolean(value: Any, shape: Any, path: str) -> list[str]:
    return [] if isinstance(value, bool) else [f"{path}: {value!r} is no boolean"]


def _timestamp(value: Any, shape: Any, path: str) -> list[str]:
    return [] if isinstance(value, (int, float)) else [f"{path}: {value!r} is no time in seconds"]


def _size(size: float, shape: Any, path: str, unit: str) -> list[str]:
    least, most = shape.metadata.get("min"), shape.metadata.get("max")
    if least is not None and size < least:
        return [f"{path}: {size} {unit} is less than {least}"]
    if most is not None and size > most:
        return [f"{path}: {size} {unit} is more than {most}"]
    return []


_CHECKS = {
    "structure": _structure,
    "list": _list,
    "map": _map,
    "string": _string,
    "integer": _number,
    "long": _number,
    "float": _number,
    "double": _number,
    "boolean": _boolean,
    "timestamp": _timestamp,
}
