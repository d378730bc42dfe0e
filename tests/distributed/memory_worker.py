"""One rank of short trainings: `memory_worker.py CONFIG RUN [RUN ...]`, a RUN being overrides.

Rank 0 prints, as its last line, the most bytes that all tensors took at the ends of the backward
passes from the second step on, when weights, gradients and optimizer state are all there.
"""

import gc
import json
import os
import sys

import torch
from deepspeed import DeepSpeedEngine

from bert_cpt import train

plain_step = DeepSpeedEngine.step


def tensor_bytes() -> int:
    """Bytes of the distinct storages of all tensors."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    # The collector does not know a gradient that nobody has asked for yet.
    tensors += [o.grad for o in tensors if o.is_leaf and o.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def run(config: str, overrides: list[str]) -> int:
    found = [0]

    def step(self):  # called after every backward pass
        if self.global_steps > 0:
            found.append(tensor_bytes())
        return plain_step(self)

    DeepSpeedEngine.step = step
    before = tensor_bytes()
    assert train.main(["--config", config, *overrides]) == 0
    return max(found) - before


if __name__ == "__main__":
    sizes = [run(sys.argv[1], given.split()) for given in sys.argv[2:]]
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(sizes))
