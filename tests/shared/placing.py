"""Under torchrun: models whose parameters the processes share compute what whole ones do.

Prints a line per variant: the process, the largest difference of the logits, the share of the parameters that it keeps,
and whether the head is the embedding again; at its very end, whether it has left the others.
"""

import atexit
import sys

import harness
import torch
import torch.distributed as dist

from dispc.learn.distributed import Processes
from dispc.reference.masked import load_reference, mask_model


def main() -> None:
    atexit.register(lambda: say(processes.rank, "left", not dist.is_initialized()))  # the first registered runs last
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
        say(processes.rank, variant, f"{float(off):.1e}", f"{share:.2f}", tied)


def say(*words: object) -> None:
    """Print a line at once: `print` writes word by word, and two processes share the stream."""
    sys.stdout.write(f"{' '.join(map(str, words))}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
