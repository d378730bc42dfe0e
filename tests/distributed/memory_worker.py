"""One rank of short trainings: `memory_worker.py CONFIG RUN [RUN ...]`, a RUN being overrides.

Rank 0 prints, as its last line, the bytes of all tensors that live between the backward pass and
the update of the second step, when weights, gradients and optimizer state are all there.
"""

import gc
import json
import os
import sys

import torch

from bert_cpt import train
from bert_cpt.engine import Engine

plain_update = Engine.update


def tensor_bytes() -> int:
    """Bytes of the distinct storages of all tensors."""
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def run(config: str, overrides: list[str]) -> int:
    found = []

    def update(self, step, *arguments):
        if step == 1:
            found.append(tensor_bytes())
        return plain_update(self, step, *arguments)

    Engine.update = update
    before = tensor_bytes()
    assert train.main(["--config", config, *overrides]) == 0
    return found[0] - before


if __name__ == "__main__":
    sizes = [run(sys.argv[1], given.split()) for given in sys.argv[2:]]
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(sizes))
