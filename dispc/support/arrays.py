"""What the arrays that pass between rooms are called."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tokens = npt.NDArray[np.int64]
"""Token ids, and whatever else models read beside them: masks and positions."""
