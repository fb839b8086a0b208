"""Dataclasses come back from JSON as they were, and whatever has another type is named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispc.support.errors import ArtifactError
from dispc.support.typed_json import OPTIONAL, UNSTORED, from_json, to_json


@dataclass(frozen=True, kw_only=True)
class Inner:
    name: str
    share: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    on: bool
    side: Literal["left", "right"] = "left"
    inner: Inner
    rows: tuple[Inner, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)
    note: str | None = None
    anything: Any = None
    scratch: tuple[str, ...] = field(default=(), metadata=UNSTORED)


INNER = st.builds(Inner, name=st.text(), share=st.none() | st.floats(allow_nan=False, allow_infinity=False))
OUTER = st.builds(
    Outer,
    count=st.integers(),
    on=st.booleans(),
    side=st.sampled_from(["left", "right"]),
    inner=INNER,
    rows=st.lists(INNER).map(tuple),
    widths=st.dictionaries(st.text(), st.integers()),
    note=st.none() | st.text(),
    anything=st.none() | st.lists(st.integers()),
)


@given(OUTER)
def test_what_was_written_is_read_again(value: Outer) -> None:
    assert from_json(Outer, json.loads(json.dumps(to_json(value))), "file", ArtifactError) == value


def test_absent_and_unknown_keys() -> None:
    value = Outer(count=1, on=True, inner=Inner(name="a"), scratch=("seen",))
    content = to_json(value)
    assert content["inner"] == {"name": "a"} and content["note"] is None and "scratch" not in content
    assert from_json(Outer, content | {"newer": 1}, "file", ArtifactError).inner == value.inner


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"count": "1"}, "count"),
    ({"count": True}, "count"),
    ({"count": 1.5}, "count"),
    ({"on": 1}, "on"),
    ({"side": "top"}, "side"),
    ({"inner": None}, "inner.name"),
    ({"inner": {}}, "inner.name"),
    ({"inner": {"name": "a", "share": "half"}}, "inner.share"),
    ({"rows": {}}, "rows"),
    ({"rows": [{"name": "a"}, {"name": 2}]}, "rows[1].name"),
    ({"widths": {"read": "3"}}, "widths.read"),
    ({"widths": []}, "widths"),
    ({"note": 3}, "note"),
]


@pytest.mark.parametrize(("change", "place"), WRONG, ids=str)
def test_the_first_field_of_another_type_is_named(change: dict[str, Any], place: str) -> None:
    content = to_json(Outer(count=1, on=True, inner=Inner(name="a"))) | change
    with pytest.raises(ArtifactError) as raised:
        from_json(Outer, content, "file", ArtifactError)
    assert str(raised.value) == f"file: {place} is missing or malformed"


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_what_is_no_object_is_refused(content: object) -> None:
    with pytest.raises(ArtifactError, match="file: count is missing"):
        from_json(Outer, content, "file", ArtifactError)
