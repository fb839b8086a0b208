"""Quantised graphs of the tiny models."""

from typing import Any

import harness
import onnx_ir as ir

from dispc.masks import Masks
from dispc.quantisation import Quantisation

EMBEDDING = "model.embed_tokens.weight"


EVERYTHING = Quantisation(bits=4, block_size=16, symmetric=False, head=True, embedding=True)


def quantised_model(variant: str, masks: Masks, quantisation: Quantisation, **options: Any) -> ir.Model:
    return harness.rewritten(variant, masks, quantisation=quantisation, **options)
