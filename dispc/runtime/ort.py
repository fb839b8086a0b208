"""ONNX Runtime, imported in one place: a broken installation is one line that says how to repair it.

Raises:
    DispcError: on import, when ONNX Runtime cannot be used.
"""

from dispc.runtime.build import unusable
from dispc.support.errors import DispcError

if reason := unusable():
    raise DispcError(reason)

import onnxruntime as ort

__all__ = ["ort"]
