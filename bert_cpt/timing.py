"""Where the time of a step goes, what was done in it, and what the hardware could do at best."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import BertConfig

if TYPE_CHECKING:
    from bert_cpt.config import Phase
    from bert_cpt.engine import StepTotals
    from bert_cpt.world import World


class Stopwatch:
    """Seconds by name between laps.

    On CUDA work is asynchronous: a lap records an event, and elapsed times are read only when they
    are asked for, so that no lap waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.lap("")

    def lap(self, name: str) -> None:
        """Count the time since the last lap under `name`; an empty name discards it."""
        mark: Any = time.perf_counter()
        if self.is_cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((name, mark))

    def read(self) -> dict[str, float]:
        """Totals since the last read; waits for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for (_, before), (name, after) in pairwise(self._marks):
            totals[name] += before.elapsed_time(after) / 1000 if self.is_cuda else after - before
        self._marks = self._marks[-1:]
        totals.pop("", None)
        return dict(totals)


class CommunicationMeter:
    """Bytes and seconds of DeepSpeed's collectives, counted at its communication backend.

    Seconds are those of the stream (or, on a CPU, the thread) that waits; they are part of the
    backward pass and the optimizer's time, and may overlap with computation.
    """

    METHODS = (
        "all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "reduce_scatter_tensor",
        "all_gather_into_tensor", "all_gather_coalesced", "all_gather",
    )  # fmt: skip

    def __init__(self, device: torch.device) -> None:
        from deepspeed.comm import comm

        self.watch = Stopwatch(device)
        self.num_bytes = 0
        self.is_on = False  # only during a training step
        backend: Any = comm.cdb
        for name in self.METHODS:
            plain = MethodType(getattr(type(backend), name), backend)
            setattr(backend, name, partial(self._metered, name, plain))

    def _metered(self, name: str, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.is_on:
            return plain(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.num_bytes += max((tensor.nbytes for tensor in tensors), default=0)
        self.watch.lap("")
        result = plain(*args, **kwargs)
        self.watch.lap(name)
        return result

    def read(self) -> tuple[float, int]:
        """(seconds, bytes) since the last read; waits for the device."""
        total, self.num_bytes = self.num_bytes, 0
        return sum(self.watch.read().values()), total


class Interval:
    """What happened in the steps since the last log line."""

    def __init__(self, world: World, ceiling: float) -> None:
        """`ceiling`: floating-point operations a second of this rank's matrix product."""
        self.world, self.ceiling = world, ceiling
        self.watch = Stopwatch(world.device)
        self.meter = CommunicationMeter(world.device)
        self.steps: list[tuple[Phase, StepTotals, float]] = []
        self.step_seconds = self.wait_seconds = 0.0
        self.last: dict[str, float] = {}

    def timed(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Pass batches on, counting the time spent waiting for them."""
        while True:
            self.watch.lap("")
            start = time.perf_counter()
            item = next(steps, None)
            if item is None:
                return
            self.wait_seconds += time.perf_counter() - start
            self.watch.lap("data")
            yield item

    @contextmanager
    def step(self) -> Iterator[None]:
        """One optimizer step."""
        start = time.perf_counter()
        self.meter.is_on = True
        yield
        self.meter.is_on = False
        self.step_seconds = time.perf_counter() - start

    def add(self, phase: Phase, totals: StepTotals, rate: float, norm: float) -> None:
        """Count a step that is done."""
        self.steps.append((phase, totals, self.step_seconds))
        self.last = {"learning_rate": rate, "grad_norm": norm}

    def read(self, config: BertConfig) -> tuple[dict[str, Any], float]:
        """The figures of a log line, and seconds a step; begins a new interval.

        `tokens_per_second` counts real tokens of all ranks, never padding.
        """
        phases, totals, step_seconds = zip(*self.steps, strict=True)
        sums = type(totals[0])(*map(sum, zip(*totals, strict=True)))
        tokens, pairs = sums.num_tokens, sums.num_pairs
        positions = sum(phase.train_batch_size * phase.sequence_length for phase in phases)
        seconds = sum(step_seconds) + self.wait_seconds
        communication_seconds, communication_bytes = self.meter.read()
        flops = flops_per_token(
            config, mean_square_length=sums.num_squares / tokens,
            masked_share=sums.num_masked / tokens,
            mean_length=tokens / sum(phase.train_batch_size for phase in phases),
        )  # fmt: skip
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.world.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.world.device) / 2**30
        values = {
            "mlm_loss": sums.mean_mlm_loss,
            "nsp_loss": sums.mean_nsp_loss if pairs else None,
            "mlm_accuracy": sums.mlm_correct / max(sums.num_masked, 1),
            "nsp_accuracy": sums.nsp_correct / pairs if pairs else None,
            **self.last,
            "tokens_per_second": tokens / seconds,
            "positions_per_second": positions / seconds,
            "fill": tokens / positions,
            "mfu": tokens / seconds * flops / (self.ceiling * self.world.world_size),
            "data_wait_share": self.wait_seconds / seconds,
            "time_share": {name: spent / seconds for name, spent in self.watch.read().items()},
            "communication_share": communication_seconds / seconds,
            "communication_bytes_per_step": communication_bytes / len(totals),
            "peak_memory_gib": peak,
        }
        self.steps, self.wait_seconds = [], 0.0
        return values, seconds / len(totals)


def flops_per_token(
    config: BertConfig, *, mean_square_length: float, masked_share: float, mean_length: float
) -> float:
    """Floating-point operations of forward and backward pass per real token.

    F = 3 [L (8H^2 + 4HI) + 4 L a H + p (2H^2 + 2HV) + (2H^2 + 4H) / s]

    Args:
        mean_square_length: a, sum of squared sample lengths over the sum of lengths.
        masked_share: p, masked tokens over tokens.
        mean_length: s, tokens of a sample.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    encoder = layers * (8 * hidden**2 + 4 * hidden * inner)
    attention = 4 * layers * mean_square_length * hidden
    head = masked_share * (2 * hidden**2 + 2 * hidden * config.vocab_size)
    pair = (2 * hidden**2 + 4 * hidden) / mean_length
    return 3 * (encoder + attention + head + pair)


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, measured here and now."""
    size, repeats = (8192, 10) if device.type == "cuda" else (512, 4)
    a = torch.randn(size, size, device=device).to(dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.timeit(repeats).mean for _ in range(3))
