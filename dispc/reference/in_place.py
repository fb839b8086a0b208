"""`dispc.apply_masks`: a loaded transformers model becomes the pruned one, for any trainer."""

from typing import Any

from dispc.masks import Masks
from dispc.model.config import DecoderConfig
from dispc.model.families import find_family
from dispc.reference import masked
from dispc.support.errors import UnsupportedModelError


def apply_masks(model: Any, masks: Masks) -> Any:
    """Make a transformers model compute the pruned function, in place, and return it.

    Every block then reads, works in and adds to the positions of `masks` only, and no gradient reaches a weight outside
    of the sets. Such weights are set to zero, and stay so under any optimiser: what `model.save_pretrained` writes is
    what `dispc.recover` writes, ready for `dispc compile` with the same masks beside it. Call it once, before or after
    moving the model to a device, and after peft's `get_peft_model`, whose adapters are then masked too.

    Args:
        model: a causal language model of a supported family, in any floating dtype, on any device; or peft's around it.
        masks: of the same sizes.

    Raises:
        UnsupportedModelError: when the family is not supported or packs projections, or the model has masks already.
        MasksError: when the masks belong to another model.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(inner, "dispc_masks", None):
        raise UnsupportedModelError("this model has masks applied already; load it again for other ones")
    family = find_family(inner.config.to_dict())
    if family.packed:
        raise UnsupportedModelError(
            f"{family.model_type} packs several projections into one weight, which this function cannot mask; "
            "dispc recover trains such a model"
        )
    masks.check(DecoderConfig.from_pretrained(inner.config, family))
    masked.zero_outside(inner, family, masks)
    masked.mask_forward(inner, family, masks)
    inner.dispc_masks = masks.sha256()
    return model
