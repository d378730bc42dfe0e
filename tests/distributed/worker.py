"""One rank of several trainings in a row: `worker.py CONFIG RUN [RUN ...]`.

Several runs a process save the start of torch and DeepSpeed. A RUN is a list of overrides; it may
say `stop_at=K` (stop as a signal would, after step K), `fail_at=K` (NaN in a weight before it),
`unwritable=K` (no checkpoint of step K can be written) or `clock=jumps`.
Rank 0 prints the exit codes as its last line.
"""

import gc
import json
import os
import random
import sys
import time

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from deepspeed.accelerator import get_accelerator

from bert_cpt import stopping, train
from bert_cpt.checkpoint import Checkpointer
from bert_cpt.engine import Engine

# This engine's fp16 path on a CPU: DeepSpeed refuses it for speed, not for correctness.
type(get_accelerator()).is_fp16_supported = lambda self: True

gc.freeze()  # what was imported need not be looked through after every run
plain_time = time.time
plain_forward_backward = Engine.forward_backward
plain_write = Checkpointer._write


def run(config: str, arguments: list[str]) -> int:
    names = ("stop_at=", "fail_at=", "unwritable=", "clock=")
    special = dict(a.split("=") for a in arguments if a.startswith(names))
    overrides = [a for a in arguments if a.split("=")[0] not in special]
    stop_at, fail_at, unwritable = (int(special.get(name[:-1], -1)) for name in names[:3])

    def forward_backward(self, batches, step, wants_stop, watch):
        if step == fail_at:
            with torch.no_grad():
                next(self.bert.bert.encoder.layer[0].parameters()).fill_(float("nan"))
        return plain_forward_backward(self, batches, step, step + 1 == stop_at, watch)

    def write(self, tensors, state):
        if state.train.global_step == unwritable:
            raise OSError(28, "No space left on device")
        plain_write(self, tensors, state)

    Engine.forward_backward, Checkpointer._write = forward_backward, write
    if "clock" in special:
        generator = random.Random(0)
        time.time = lambda: generator.uniform(0, 4e9)
    try:
        return train.main(["--config", config, *overrides])
    finally:
        Engine.forward_backward, Checkpointer._write = plain_forward_backward, plain_write
        time.time = plain_time
        gc.collect()


if __name__ == "__main__":
    assert stopping.BEAT_SECONDS > 0
    codes = [run(sys.argv[1], given.split()) for given in sys.argv[2:]]
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(codes))
