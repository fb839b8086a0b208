"""Under torchrun: models whose parameters the processes share compute what whole ones do.

Prints a line per variant: the process, the largest difference of the logits, the share of the parameters that it keeps,
and whether the head is the embedding again.
"""

import sys

import harness
import torch

from dispc.learn.distributed import Processes
from dispc.reference.masked import load_reference, mask_model


def main() -> None:
    processes = Processes.join("cpu")
    for variant in sys.argv[1:]:
        checkpoint = harness.checkpoint(variant)
        ids = torch.from_numpy(harness.TOKENS)[None]
        shared = mask_model(checkpoint.empty_model(torch.float32), checkpoint, None)
        processes.place(shared, checkpoint.config, checkpoint.parameter)
        kept = sum(parameter.to_local().numel() for parameter in shared.parameters())
        whole = load_reference(checkpoint, None)
        with torch.inference_mode(False), torch.no_grad():
            off = (shared(input_ids=ids).logits - whole(input_ids=ids).logits).abs().max()
            tied = shared.get_input_embeddings().weight is shared.get_output_embeddings().weight
        share = kept / sum(parameter.numel() for parameter in whole.parameters())
        sys.stdout.write(f"{processes.rank} {variant} {float(off):.1e} {share:.2f} {tied}\n")  # at once, not by words
        sys.stdout.flush()


if __name__ == "__main__":
    main()
