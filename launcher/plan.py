"""`bert-cpt plan`: what a run needs and what it costs, before any GPU is taken.

Bytes of weights, gradients and optimizer are those that DeepSpeed 0.19 was seen to keep, with b
bytes of a parameter (4 in fp32, 2 in fp16 and bf16), P parameters, T of them trained, N ranks:

    ZeRO    weights               gradients    optimizer    sent by a rank in a step
    0       4 P                   4 T          8 T          2 b T
    1       b P                   b T          12 T / N     3 b T
    2       b P                   b T / N      12 T / N     (2 micro-batches + 1) b T
    3       b P / N + b (small)   b T / N      12 T / N     2 micro-batches b T

all of the last column times (N - 1) / N. Stages 1 to 3 hold fp32 weights beside b-byte ones even
when b is 4. Small parameters stay whole at stage 3. Activations are what autograd saves.
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from bert_cpt.config import Config, Phase
from bert_cpt.ds_config import resolve_precision
from bert_cpt.model import freeze
from bert_cpt.setup import check_setup
from bert_cpt.timing import flops_per_token
from bert_cpt.train import phase_loader
from data_tools.errors import UserError
from data_tools.shards import ShardSet

GIB = 2**30
RESERVED_BYTES = 3 * GIB // 2  # CUDA context, NCCL, fragmentation: allowed for, not measured
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default for reduce_bucket_size
SMALL_ELEMENTS = 100_000  # and for stage3_param_persistence_threshold
NUM_PROFILED = 2000
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


class Parameters(NamedTuple):
    """Numbers of parameters: all, those that are trained, those that ZeRO 3 keeps whole."""

    total: int
    trained: int
    small: int


class Choice(NamedTuple):
    """One ZeRO stage in one precision: bytes on the device of a rank, and what a step sends."""

    stage: int
    precision: str
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    buffer_bytes: int
    activation_bytes: int
    total_bytes: int
    sent_bytes: int
    largest_micro_batch: int | None


def count_parameters(config: Config, bert_config: BertConfig) -> Parameters:
    """Count without allocating the model."""
    with torch.device("meta"):
        model_class = BertForPreTraining if config.objective.nsp else BertForMaskedLM
        model = model_class(bert_config)
    freeze(model, embeddings=config.model.freeze_embeddings, num_layers=config.model.frozen_layers)
    parameters = list(model.parameters())
    return Parameters(
        total=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        small=sum(p.numel() for p in parameters if p.numel() <= SMALL_ELEMENTS),
    )


def state_bytes(
    parameters: Parameters, *, stage: int, precision: str, num_ranks: int, num_micro_batches: int
) -> tuple[int, int, int, int]:
    """The table above: bytes of weights, gradients and optimizer, and those sent in a step."""
    size, n, (total, trained, small) = BYTES[precision], num_ranks, parameters
    weights = (4 * total, size * total, size * total, size * (total // n + small))
    gradients = (4 * trained, size * trained, size * trained // n, size * trained // n)
    optimizer = (8 * trained, *[12 * trained // n] * 3)
    times = (2, 3, 2 * num_micro_batches + 1, 2 * num_micro_batches)
    sent = times[stage] * size * trained * (n - 1) // n
    return weights[stage], gradients[stage], optimizer[stage], sent


def activation_bytes(config: Config, bert: BertConfig, num_tokens: int, precision: str) -> int:
    """Bytes that a forward pass keeps of a sample, and the largest temporaries."""
    size = BYTES[precision]
    hidden, inner = bert.hidden_size, bert.intermediate_size
    dropout = config.model.hidden_dropout
    has_dropout = bert.hidden_dropout_prob > 0 if dropout is None else dropout > 0
    masks = 2 * hidden if has_dropout else 0  # a byte an element
    # inputs of: q, k, v; attention (3); its output; both LayerNorms; MLP (2); GELU
    layer = size * (8 * hidden + 2 * inner) + masks + 4 * bert.num_attention_heads
    layers = bert.num_hidden_layers
    encoder = layer * layers
    if config.model.gradient_checkpointing:
        encoder = size * hidden * layers + layer
    rest = 2 * size * hidden + masks // 2 + size * (2 * inner + 4 * hidden)
    share = config.objective.mlm_probability if config.model.attention == "packed" else 1.0
    # logits, the same in fp32, their softmax, its gradient
    logits = bert.vocab_size * (8 if precision == "fp32" else 10)
    head = share * (logits + 4 * size * hidden)
    return int(num_tokens * (encoder + rest + head)) + 4 * size * hidden


def profile_samples(
    config: Config, phase: Phase, corpora: list[ShardSet]
) -> tuple[float, float, list[int]]:
    """Build the index of the first shard of every corpus and look at some samples.

    Returns:
        Tokens of a sample; squared lengths over lengths, summed; samples in an epoch of a corpus.
    """
    firsts = [copy.copy(corpus) for corpus in corpora]
    for first in firsts:
        first.shards = first.shards[:1]
    stream = phase_loader(config, phase, firsts).stream
    lengths = stream.take(0, NUM_PROFILED)[0].sample_lengths.astype(np.float64)
    shares = [c.manifest.num_tokens / max(1, len(c.shards[0].tokens)) for c in corpora]
    sizes = [len(index.get(0)) for index in stream.indexes]
    epochs = [round(n * share) for n, share in zip(sizes, shares, strict=True)]
    return float(lengths.mean()), float((lengths**2).sum() / lengths.sum()), epochs


def measured_rate(run_dir: Path) -> float:
    """Tokens a second and rank in the last log interval of a run."""
    try:
        ranks = len(json.loads((run_dir / "environment.json").read_text())["ranks"])
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        rates = [r["tokens_per_second"] for r in map(json.loads, lines) if r["kind"] == "train"]
        return float(rates[-1]) / ranks
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"--measured {run_dir}: no run directory with measured steps") from error


class Plan:
    """Everything that `bert-cpt plan` says about a configuration."""

    def __init__(
        self,
        config: Config,
        *,
        num_gpus: int = 1,
        gpu_memory_gib: float | None = None,
        tflops: float | None = None,
        measured_in: Path | None = None,
    ) -> None:
        """Read the configuration, checkpoint and shards; raises UserError if one is wrong.

        Args:
            tflops: achieved by one GPU; without it the rate is that of the run `measured_in`.
        """
        self.config, self.num_gpus = config, num_gpus
        self.memory_bytes = int(gpu_memory_gib * GIB) if gpu_memory_gib else None
        self.setup = check_setup(config)
        self.bert = self.setup.bert_config
        config.check_world_size(num_gpus)
        self.parameters = count_parameters(config, self.bert)
        self.largest = max(config.phases, key=lambda p: p.micro_batch_size * p.sequence_length)
        self._count(tflops, measured_rate(measured_in) if measured_in else None)
        self.ds_config = resolve_precision(  # "auto" as on a GPU of today
            config.train.deepspeed_config, self.setup.ds_content,
            device="cuda", has_bf16=True, has_fp16=True,
        )  # fmt: skip
        half = "fp16" if self.ds_config.precision == "fp16" else "bf16"
        fp32 = [self._choice(stage, "fp32") for stage in range(4)]
        self.choices = fp32 + [self._choice(stage, half) for stage in range(1, 4)]
        own = (self.ds_config.stage, self.ds_config.precision)
        self.configured = next(choice for choice in self.choices if choice[:2] == own)

    def _count(self, tflops: float | None, rate: float | None) -> None:
        """Samples, tokens, passes over each corpus, and seconds if a rate is known."""
        config, flops, self.samples, self.tokens = self.config, 0.0, 0, 0
        weights = np.array([corpus.weight for corpus in config.data.corpora])
        passes = np.zeros(len(weights))
        for phase in config.phases:
            length, square, epoch = profile_samples(config, phase, self.setup.corpora)
            samples = phase.steps * phase.train_batch_size
            passes += samples * weights / weights.sum() / np.maximum(1, epoch)
            tokens = round(samples * length)
            flops += tokens * flops_per_token(
                self.bert, mean_square_length=square, mean_length=length,
                masked_share=config.objective.mlm_probability,
            )  # fmt: skip
            self.samples += samples
            self.tokens += tokens
        self.epochs = [round(float(value), 3) for value in passes]
        self.seconds = self.tokens / (rate * self.num_gpus) if rate else None
        if tflops is not None:
            self.seconds = flops / (tflops * 1e12 * self.num_gpus)

    def _choice(self, stage: int, precision: str) -> Choice:
        zero, phase = self.ds_config.content["zero_optimization"], self.largest
        share = phase.train_batch_size // self.num_gpus
        weights, gradients, optimizer, sent = state_bytes(
            self.parameters, stage=stage, precision=precision, num_ranks=self.num_gpus,
            num_micro_batches=share // phase.micro_batch_size,
        )  # fmt: skip
        if self.ds_config.offloads_optimizer and stage:
            optimizer = 0
        num_buffers = 2 if zero.get("overlap_comm", False) and stage in (1, 2) else min(1, stage)
        bucket = int(zero.get("reduce_bucket_size", BUCKET_ELEMENTS))
        buffers = num_buffers * bucket * BYTES[precision]
        fixed = weights + gradients + optimizer + buffers + RESERVED_BYTES
        # The worst case: all samples are full.
        sample = activation_bytes(self.config, self.bert, phase.sequence_length, precision)
        largest = None
        if self.memory_bytes is not None:
            most = min(share, (self.memory_bytes - fixed) // sample)
            largest = next((n for n in range(most, 0, -1) if share % n == 0), 0)
        own = phase.micro_batch_size * sample
        return Choice(
            stage, precision, weights, gradients, optimizer, buffers, own, own + fixed,
            sent, largest,
        )  # fmt: skip

    def check_fits(self) -> None:
        """Raise UserError if the configured run does not fit the stated memory."""
        if self.memory_bytes is not None and self.configured.total_bytes > self.memory_bytes:
            raise UserError(
                f"needs about {self.configured.total_bytes / GIB:.1f} GiB a GPU, but there are "
                f"{self.memory_bytes / GIB:.1f} GiB; {self.recommendation()}"
            )

    def recommendation(self) -> str:
        """A ZeRO stage and a micro-batch for the configured precision, and why."""
        precision = self.ds_config.precision
        choices = [choice for choice in self.choices if choice.precision == precision]
        if self.memory_bytes is None:
            return (
                f"ZeRO {choices[0].stage} sends least; give --gpu-memory-gib to see whether it "
                f"fits and with which micro-batch"
            )
        most = max(choice.largest_micro_batch or 0 for choice in choices)
        if not most:
            return (
                "no ZeRO stage fits: take more GPUs, model.gradient_checkpointing=true, a shorter "
                "data.sequence_length or ds_configs/zero2_offload_fp16.json"
            )
        best = next(choice for choice in choices if 2 * (choice.largest_micro_batch or 0) >= most)
        micro = best.largest_micro_batch
        reason = "the lowest that fits, and so the one that sends least"
        if micro != most:
            reason += f" ({most} would fit with a higher one, which gains little)"
        return f"ZeRO {best.stage} with train.micro_batch_size={micro}: {reason}"

    # --- output ---

    def disk_bytes(self) -> int:
        """Checkpoints that are kept, one being written, and the final model."""
        keep = self.config.checkpoint
        every = int(np.lcm(keep.interval, keep.keep_every)) if keep.keep_every else 0
        count = keep.keep_last + 1 + (self.config.total_steps // every if every else 0)
        return (12 * count + 4) * self.parameters.total

    def as_dict(self) -> dict[str, Any]:
        """All figures, for --json."""
        hours = None if self.seconds is None else self.seconds / 3600
        return {
            "num_gpus": self.num_gpus,
            "parameters": self.parameters._asdict(),
            "steps": self.config.total_steps,
            "samples": self.samples,
            "tokens": self.tokens,
            "epochs": self.epochs,
            "hours": hours,
            "gpu_hours": hours and hours * self.num_gpus,
            "disk_bytes": self.disk_bytes(),
            "reserved_bytes": RESERVED_BYTES,
            "configured": self.choices.index(self.configured),
            "choices": [choice._asdict() for choice in self.choices],
            "recommendation": self.recommendation(),
        }

    def as_text(self) -> str:
        """The same for people."""
        config, seconds, count, largest = self.config, self.seconds, self.parameters, self.largest
        time = "unknown; give --tflops (achieved by one GPU) or --measured RUN_DIR"
        if seconds is not None:
            gpu_hours = seconds * self.num_gpus / 3600
            time = f"{tqdm.format_interval(seconds)}, {gpu_hours:.1f} GPU-hours"
        full = sum(p.steps * p.train_batch_size * p.sequence_length for p in config.phases)
        passes = zip(config.data.corpora, self.epochs, strict=True)
        rows = [
            f"model         {count.total / 1e6:.1f} M parameters, {count.trained / 1e6:.1f} M of "
            f"them trained",
            f"steps         {config.total_steps:,} on {self.num_gpus} GPU(s)",
            f"samples       {self.samples:,}, {self.tokens / 1e6:,.1f} M tokens "
            f"(samples are {self.tokens / full:.0%} full)",
            "epochs        " + ", ".join(f"{n:.2f} of {corpus.path}" for corpus, n in passes),
            f"time          {time}",
            f"disk          {self.disk_bytes() / GIB:.2f} GiB for checkpoints and the final model",
            "",
            f"GiB a GPU, micro-batches of {largest.micro_batch_size} x {largest.sequence_length}:",
            "ZeRO          weights   grads   optim buffers  activ.   total sent/step largest",
        ]
        for choice in self.choices:
            rows.append(
                f"{choice.stage:<6}{choice.precision:<7}"
                + "".join(f"{number / GIB:8.2f}" for number in choice[2:9])
                + f"{'-' if choice[-1] is None else choice[-1]:>10}"
                + "  <- configured" * (choice is self.configured)
            )
        rows += [
            f"totals hold {RESERVED_BYTES / GIB:.1f} GiB for CUDA, NCCL and fragmentation; "
            f"largest: micro-batch that fits",
            "",
            f"recommended   {self.recommendation()}",
        ]
        return "\n".join(rows)
