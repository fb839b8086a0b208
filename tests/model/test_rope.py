"""What config.json says about rotary positions that dispc has to tell the user."""

from typing import Any

import pytest

from dispc.model.families import FAMILIES
from dispc.model.rope import read_ropes, unreached_positions


@pytest.mark.parametrize(
    ("scaling", "positions", "reach"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}, 160, None),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}, 40, "160"),
        ({"rope_type": "yarn", "factor": 4.0}, 160, "640"),  # as model cards tell it, with the old limit left
        ({"rope_type": "linear", "factor": 4.0}, 160, None),
        (None, 160, None),
    ],
)
def test_yarn_beyond_the_positions_that_the_config_allows_is_said(
    scaling: dict[str, Any] | None, positions: int, reach: str | None
) -> None:
    raw = {"model_type": "llama", "max_position_embeddings": positions, "rope_scaling": scaling}
    said = unreached_positions(read_ropes(raw, FAMILIES["llama"]), positions)
    assert (said is None) == (reach is None)
    assert reach is None or (reach in (said or "") and f"is {positions}" in (said or ""))
