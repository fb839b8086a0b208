"""onnx.checker with a schema for the one operator that ONNX Runtime keeps in ONNX's own domain."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx.defs import OpSchema

from dispc.support.dtypes import BY_ORT
from dispc.support.graph import SIMPLIFIED_NORM


def check_model(path: Path) -> None:
    """Run onnx.checker with full (strict) shape inference over a model file.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: when it refuses the model.
    """
    with _simplified_norm():
        onnx.checker.check_model(str(path), full_check=True)


@contextmanager
def _simplified_norm() -> Iterator[None]:
    """SimplifiedLayerNormalization(X, scale) -> Y, for as long as the body runs: the checker refuses every operator of
    the domain "" that it has no schema of, and takes those of com.microsoft unseen."""
    floats = list(BY_ORT)
    kinds = {"axis": OpSchema.AttrType.INT, "epsilon": OpSchema.AttrType.FLOAT, "stash_type": OpSchema.AttrType.INT}
    schema = OpSchema(
        SIMPLIFIED_NORM,
        "",
        1,
        inputs=[OpSchema.FormalParameter("X", "T"), OpSchema.FormalParameter("scale", "T")],
        outputs=[OpSchema.FormalParameter("Y", "T")],
        type_constraints=[("T", floats, "")],
        attributes=[OpSchema.Attribute(name, kind, "", required=False) for name, kind in kinds.items()],
    )
    onnx.defs.register_schema(schema)
    try:
        yield
    finally:
        onnx.defs.deregister_schema(SIMPLIFIED_NORM, 1, "")
