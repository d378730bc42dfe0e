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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from bert_cpt.batches import sample_lengths
from bert_cpt.config import Config, Phase
from bert_cpt.metrics import format_seconds
from bert_cpt.model import freeze
from bert_cpt.setup import check_setup
from bert_cpt.timing import flops_per_token
from bert_cpt.train import phase_loader
from data_tools.errors import UserError
from data_tools.shards import ShardSet

GIB = 2**30
RESERVED_BYTES = int(
    1.5 * GIB
)  # CUDA context, NCCL, fragmentation: an allowance, not a measurement
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default for reduce_bucket_size
SMALL_ELEMENTS = 100_000  # and for stage3_param_persistence_threshold
NUM_PROFILED = 2000


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: all, those that are trained, those that ZeRO 3 keeps whole."""

    total: int
    trained: int
    small: int


@dataclass(frozen=True)
class Profile:
    """What samples of a phase look like, from the first shard of every corpus.

    Attributes:
        mean_length: tokens of a sample.
        mean_square_length: sum of squared lengths over the sum of lengths.
        epoch_samples: samples of one epoch of each corpus.
    """

    mean_length: float
    mean_square_length: float
    epoch_samples: list[int]


@dataclass(frozen=True)
class Choice:
    """One ZeRO stage in one precision: bytes on the device of a rank, and what a step sends."""

    stage: int
    precision: str
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    buffer_bytes: int
    activation_bytes: int
    sent_bytes: int
    largest_micro_batch: int | None
    is_configured: bool

    @property
    def state_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.buffer_bytes + self.activation_bytes + RESERVED_BYTES


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
    parameters: Parameters, *, stage: int, precision: str, world_size: int, offloads: bool = False
) -> tuple[int, int, int]:
    """Bytes of (weights, gradients, optimizer) on the device of one rank."""
    size = 4 if precision == "fp32" else 2
    total, trained = parameters.total, parameters.trained
    if stage == 0:
        return 4 * total, 4 * trained, 8 * trained
    weights = size * total if stage < 3 else size * (total // world_size + parameters.small)
    gradients = size * trained if stage == 1 else size * trained // world_size
    return weights, gradients, 0 if offloads else 12 * trained // world_size


def activation_bytes(
    config: Config, bert: BertConfig, *, num_tokens: int, num_samples: int, precision: str
) -> int:
    """Bytes that a forward pass keeps for the backward pass, and the largest temporaries."""
    size = 4 if precision == "fp32" else 2
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
    return int(num_tokens * (encoder + rest + head)) + 4 * size * hidden * num_samples


def sent_bytes(
    parameters: Parameters, *, stage: int, precision: str, world_size: int, num_micro_batches: int
) -> int:
    """Bytes that one rank sends in an optimizer step."""
    size = 4 if precision == "fp32" else 2
    times = {0: 2, 1: 3, 2: 2 * num_micro_batches + 1, 3: 2 * num_micro_batches}[stage]
    return times * size * parameters.trained * (world_size - 1) // world_size


def profile_samples(config: Config, phase: Phase, corpora: list[ShardSet]) -> Profile:
    """Build the index of the first shard of every corpus and look at some samples."""
    firsts = []
    for corpus in corpora:
        first = copy.copy(corpus)
        first.shards = corpus.shards[:1]
        firsts.append(first)
    stream = phase_loader(config, phase, firsts).stream
    lengths = sample_lengths(stream.take(0, NUM_PROFILED)[0]).astype(np.float64)
    shares = [c.manifest.num_tokens / max(1, len(c.shards[0].tokens)) for c in corpora]
    sizes = [len(index.get(0)) for index in stream.indexes]
    return Profile(
        mean_length=float(lengths.mean()),
        mean_square_length=float((lengths**2).sum() / lengths.sum()),
        epoch_samples=[round(n * share) for n, share in zip(sizes, shares, strict=True)],
    )


def measured_rate(run_dir: Path) -> float | None:
    """Tokens a second and rank in the last log interval of a run; None if there is none."""
    try:
        ranks = len(json.loads((run_dir / "environment.json").read_text())["ranks"])
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        records = [r for r in map(json.loads, lines) if r["kind"] == "train"]
        return float(records[-1]["tokens_per_second"]) / ranks
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


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
        self.bert, corpora = self.setup.bert_config, self.setup.corpora
        config.check_world_size(num_gpus)
        self.parameters = count_parameters(config, self.bert)
        self.profiles = [profile_samples(config, phase, corpora) for phase in config.phases]
        self.largest = max(
            config.phases, key=lambda phase: phase.micro_batch_size * phase.sequence_length
        )
        self.tokens = [
            round(phase.steps * phase.train_batch_size * profile.mean_length)
            for phase, profile in self._phases()
        ]
        self.seconds = self._seconds(tflops, measured_rate(measured_in) if measured_in else None)
        self.choices = list(self._choices())

    def _phases(self) -> Iterator[tuple[Phase, Profile]]:
        return zip(self.config.phases, self.profiles, strict=True)

    def _seconds(self, tflops: float | None, rate: float | None) -> float | None:
        if tflops is None:
            return sum(self.tokens) / (rate * self.num_gpus) if rate else None
        flops = 0.0
        for (_, profile), num_tokens in zip(self._phases(), self.tokens, strict=True):
            flops += num_tokens * flops_per_token(
                self.bert,
                mean_square_length=profile.mean_square_length,
                masked_share=self.config.objective.mlm_probability,
                mean_length=profile.mean_length,
            )
        return flops / (tflops * 1e12 * self.num_gpus)

    # --- memory ---

    @property
    def precision(self) -> str:
        """As configured; "auto" is taken for half precision, as on any GPU."""
        enabled = [
            k for k in ("bf16", "fp16") if self.setup.ds_content.get(k, {}).get("enabled", False)
        ]
        return enabled[0] if enabled else "fp32"

    def _choices(self) -> Iterator[Choice]:
        zero = self.setup.ds_content["zero_optimization"]
        configured = (zero["stage"], self.precision)
        half = self.precision if self.precision != "fp32" else "bf16"
        for precision in ("fp32", half):
            for stage in range(4) if precision == "fp32" else range(1, 4):
                yield self._choice(stage, precision, zero, (stage, precision) == configured)

    def _choice(self, stage: int, precision: str, zero: dict[str, Any], is_own: bool) -> Choice:
        device = zero.get("offload_optimizer", {}).get("device", "none")
        offloads = device != "none" and is_own
        size, phase = 4 if precision == "fp32" else 2, self.largest
        has_two = zero.get("overlap_comm", stage == 3) and stage in (1, 2)
        elements = zero.get("reduce_bucket_size", BUCKET_ELEMENTS) if stage else 0
        weights, gradients, optimizer = state_bytes(
            self.parameters,
            stage=stage, precision=precision, world_size=self.num_gpus, offloads=offloads,
        )  # fmt: skip
        buffers = int(elements) * size * (2 if has_two else 1)
        accumulation = phase.train_batch_size // (phase.micro_batch_size * self.num_gpus)
        return Choice(
            stage, precision, weights, gradients, optimizer, buffers,
            activation_bytes=self._activations(phase.micro_batch_size, precision),
            sent_bytes=sent_bytes(
                self.parameters, stage=stage, precision=precision, world_size=self.num_gpus,
                num_micro_batches=accumulation,
            ),
            largest_micro_batch=self._largest(weights + gradients + optimizer + buffers, precision),
            is_configured=is_own,
        )  # fmt: skip

    def _activations(self, micro_batch: int, precision: str) -> int:
        num_tokens = micro_batch * self.largest.sequence_length  # the worst case: all samples full
        return activation_bytes(
            self.config, self.bert,
            num_tokens=num_tokens, num_samples=micro_batch, precision=precision,
        )  # fmt: skip

    def _largest(self, taken: int, precision: str) -> int | None:
        if self.memory_bytes is None:
            return None
        room = self.memory_bytes - taken - RESERVED_BYTES
        share = self.largest.train_batch_size // self.num_gpus
        fitting = (n for n in range(share, 0, -1) if share % n == 0)
        return next((n for n in fitting if self._activations(n, precision) <= room), 0)

    @property
    def configured(self) -> Choice:
        return next(choice for choice in self.choices if choice.is_configured)

    def check_fits(self) -> None:
        """Raise UserError if the configured run does not fit the stated memory."""
        if self.memory_bytes is not None and self.configured.total_bytes > self.memory_bytes:
            raise UserError(
                f"needs about {self.configured.total_bytes / GIB:.1f} GiB a GPU, but there are "
                f"{self.memory_bytes / GIB:.1f} GiB; {self.recommendation()}"
            )

    def recommendation(self) -> str:
        """A ZeRO stage and a micro-batch for the configured precision, and why."""
        choices = [choice for choice in self.choices if choice.precision == self.precision]
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
        micro = best.largest_micro_batch or 0
        reason = "the lowest that fits, and so the one that sends least"
        if micro < most:
            reason += f" ({most} would fit with a higher one, which gains little)"
        elif micro == self.largest.train_batch_size // self.num_gpus:
            reason += "; the micro-batch is the whole share of a GPU, nothing is accumulated"
        return f"ZeRO {best.stage} with train.micro_batch_size={micro}: {reason}"

    # --- output ---

    @property
    def num_samples(self) -> int:
        return sum(phase.steps * phase.train_batch_size for phase in self.config.phases)

    def epochs(self) -> list[float]:
        """Passes over each corpus."""
        weights = np.array([corpus.weight for corpus in self.config.data.corpora])
        shares = weights / weights.sum()
        result = np.zeros(len(shares))
        for phase, profile in self._phases():
            drawn = phase.steps * phase.train_batch_size * shares
            result += drawn / np.maximum(1, np.array(profile.epoch_samples))
        return [round(float(value), 3) for value in result]

    def disk_bytes(self) -> int:
        """Checkpoints that are kept, one being written, and the final model."""
        keep = self.config.checkpoint
        every = int(np.lcm(keep.interval, keep.keep_every)) if keep.keep_every else 0
        count = keep.keep_last + 1 + (self.config.total_steps // every if every else 0)
        return (12 * count + 4) * self.parameters.total

    def as_dict(self) -> dict[str, Any]:
        """All figures, for --json."""
        return {
            "num_gpus": self.num_gpus,
            "parameters": asdict(self.parameters),
            "steps": self.config.total_steps,
            "samples": self.num_samples,
            "tokens": sum(self.tokens),
            "epochs": self.epochs(),
            "hours": self.seconds and self.seconds / 3600,
            "gpu_hours": self.seconds and self.seconds * self.num_gpus / 3600,
            "disk_bytes": self.disk_bytes(),
            "reserved_bytes": RESERVED_BYTES,
            "choices": [
                asdict(c) | {"state_bytes": c.state_bytes, "total_bytes": c.total_bytes}
                for c in self.choices
            ],
            "recommendation": self.recommendation(),
        }

    def as_text(self) -> str:
        """The same for people."""
        config, seconds = self.config, self.seconds
        hours = "unknown; give --tflops (achieved by one GPU) or --measured RUN_DIR"
        if seconds is not None:
            hours = f"{format_seconds(seconds)}, {seconds * self.num_gpus / 3600:.1f} GPU-hours"
        corpora = zip(config.data.corpora, self.epochs(), strict=True)
        passes = ", ".join(f"{value:.2f} of {corpus.path}" for corpus, value in corpora)
        fill = self.profiles[0].mean_length / config.phases[0].sequence_length
        rows = [
            f"model         {self.parameters.total / 1e6:.1f} M parameters, "
            f"{self.parameters.trained / 1e6:.1f} M trained",
            f"steps         {config.total_steps:,} on {self.num_gpus} GPU(s)",
            f"samples       {self.num_samples:,}, {sum(self.tokens) / 1e6:,.1f} M tokens "
            f"(samples are {100 * fill:.0f} % full)",
            f"epochs        {passes}",
            f"time          {hours}",
            f"disk          {self.disk_bytes() / GIB:.2f} GiB for checkpoints and the final model",
            "",
            f"GiB a GPU with micro-batches of {self.largest.micro_batch_size} x "
            f"{self.largest.sequence_length}:",
            f"{'ZeRO':<6}{'':<6}{'weights':>9}{'grads':>8}{'optim':>8}{'buffers':>9}{'activ.':>8}"
            f"{'total':>8}{'sent/step':>11}{'largest':>9}",
        ]
        for c in self.choices:
            largest = "-" if c.largest_micro_batch is None else str(c.largest_micro_batch)
            parts = (c.weights_bytes, c.gradients_bytes, c.optimizer_bytes, c.buffer_bytes)
            w, g, o, b = (part / GIB for part in parts)
            rows.append(
                f"{c.stage:<6}{c.precision:<6}{w:>9.2f}{g:>8.2f}{o:>8.2f}{b:>9.2f}"
                f"{c.activation_bytes / GIB:>8.2f}{c.total_bytes / GIB:>8.2f}"
                f"{c.sent_bytes / GIB:>11.2f}{largest:>9}{'  <- configured' * c.is_configured}"
            )
        rows += [
            f"totals hold {RESERVED_BYTES / GIB:.1f} GiB for CUDA, NCCL and fragmentation; "
            f"largest: micro-batch that fits",
            "",
            f"recommended   {self.recommendation()}",
        ]
        return "\n".join(rows)
