"""The stage "facts" of gpu_minutes.py: the GPU, its driver, versions, what `dispc doctor` says, a large copy.

.venv/bin/python benchmarks/gpu_facts.py cuda
"""

import json
import sys

from gpu_device import describe_device


def main(device: str) -> None:
    print(json.dumps({"stage": "facts"} | describe_device(device)), flush=True)
    from dispc.runtime.doctor import examine

    print(json.dumps({"stage": "doctor", "doctor": examine().as_dict()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
