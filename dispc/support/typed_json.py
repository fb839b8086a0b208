"""Dataclasses as JSON objects, and JSON objects as dataclasses, with the type of every field checked."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dispc.support.errors import DispcError

T = TypeVar("T")
OMITTED = "omitted"
OPTIONAL = {OMITTED: "where None"}
"""Metadata of a field that JSON has only where it is not None."""
UNSTORED = {OMITTED: "always"}
"""Metadata of a field that JSON never has."""


def to_json(value: Any) -> Any:
    """Dicts, lists and scalars for a value made of dataclasses, mappings, lists and tuples."""
    if is_dataclass(value):
        named = {each: getattr(value, each.name) for each in fields(value)}
        return {each.name: to_json(one) for each, one in named.items() if _stored(each, one)}
    if isinstance(value, Mapping):
        return {key: to_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    return value


def from_json(kind: type[T], content: object, where: object, error: type[DispcError]) -> T:
    """The dataclass `kind` of a JSON object. Keys that it has no field for are passed over.

    Fields may be scalars, `Literal`s, `X | None`, `tuple[X, ...]`, mappings from strings, and such dataclasses. Where a
    float is expected, null is NaN: JSON has no figure that is not finite.

    Raises:
        error: naming `where` and the first field that is missing or of another type, such as `lowering.name`.
    """
    try:
        value: T = _read(kind, content, "")
    except _MalformedError as malformed:
        raise error(f"{where}: {malformed.place or 'an object'} is missing or malformed") from None
    return value


class _MalformedError(Exception):
    def __init__(self, place: str) -> None:
        self.place = place.removeprefix(".")


def _stored(each: "Field[Any]", value: object) -> bool:
    rule = each.metadata.get(OMITTED)
    return rule is None or (rule == "where None" and value is not None)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (Any, object):
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        (only,) = (each for each in arguments if each is not NoneType)
        return _read(only, value, place)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], one, f"{place}[{number}]") for number, one in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: _read(arguments[1], one, f"{place}.{key}") for key, one in value.items()}
    if is_dataclass(kind) and isinstance(kind, type):
        return _read_dataclass(kind, value, place)
    if kind is float and value is None:
        return math.nan
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise _MalformedError(place)


def _read_dataclass(kind: type, value: Any, place: str) -> Any:
    content = value if isinstance(value, Mapping) else {}  # so that the error names the first field
    given, hints = {}, _hints(kind)
    for each in fields(kind):
        if each.metadata.get(OMITTED) == "always":
            continue
        inner = f"{place}.{each.name}"
        if each.name in content:
            given[each.name] = _read(hints[each.name], content[each.name], inner)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise _MalformedError(inner)
    if not isinstance(value, Mapping):
        raise _MalformedError(place)
    return kind(**given)
