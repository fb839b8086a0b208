"""ONNX Runtime, imported in one place: where its installation is broken, with one line that says what mends it.

Raises:
    DispcError: on import, when ONNX Runtime cannot be used.
"""

from dispc.runtime.build import unusable
from dispc.support.errors import DispcError

if reason := unusable():
    raise DispcError(reason)

import onnxruntime as ort

__all__ = ["ort"]
