"""JSON that others wrote is read whole, or refused in one line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispc.support.errors import DispcError
from dispc.support.files import write_json
from dispc.support.inputs import read_object
from dispc.support.printable import is_text

ANY = st.text(st.characters())  # halves of surrogate pairs are among them
VALUES = st.recursive(ANY | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(ANY, inner))


@given(content=st.dictionaries(ANY, VALUES))
def test_half_a_surrogate_pair_is_refused_and_any_other_text_is_read(
    content: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    read = json.loads(path.read_text())  # two halves that follow each other are a character
    if is_text(json.dumps(read, ensure_ascii=False)):
        assert read_object(path, DispcError) == read
    else:
        with pytest.raises(DispcError, match="half of a surrogate pair"):
            read_object(path, DispcError)


@given(value=VALUES)
def test_what_we_write_we_can_read(value: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "ours.json"
    write_json(path, {"value": value})
    assert "value" in read_object(path, DispcError)
