"""The DeepSpeed engine behind a small surface: one optimizer step, and its state by parameter name.

Everything that depends on DeepSpeed's inner workings stands here: how it scales losses, where ZeRO
keeps fp32 weights and moments, what it calls the loss scaler.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bert_cpt.batches import PackedBatch
from bert_cpt.config import Config, Phase
from bert_cpt.ds_config import DeepSpeedConfig
from bert_cpt.model import PretrainingModel, Sums, to_device
from bert_cpt.optim import learning_rate_factor, make_optimizer, parameter_groups, set_learning_rate
from bert_cpt.world import World
from data_tools.hashing import derive_key

Lap = Callable[[str], None]  # counts the time since the last one under a name

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
DROPOUT = 7  # stream of the run's seed


class StepTotals(NamedTuple):
    """Sums over all ranks and micro-batches of one optimizer step."""

    mlm_loss: float
    nsp_loss: float
    mlm_correct: float
    nsp_correct: float
    num_masked: float
    num_pairs: float
    num_tokens: float
    num_squares: float  # squared sample lengths, for the cost of attention
    stop_votes: float

    @property
    def mean_mlm_loss(self) -> float:
        return self.mlm_loss / max(self.num_masked, 1)

    @property
    def mean_nsp_loss(self) -> float:
        return self.nsp_loss / max(self.num_pairs, 1)


class Engine:
    """A `PretrainingModel` under DeepSpeed."""

    def __init__(
        self,
        model: PretrainingModel,
        config: Config,
        ds_config: DeepSpeedConfig,
        world: World,
        new_parameters: list[str],
    ) -> None:
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        self.config = config
        self.world = world
        self.precision = ds_config.precision
        self.stage = ds_config.stage
        self.bert = model.model
        self.parameters = dict(self.bert.named_parameters())
        original = {name: p.detach().clone() for name, p in self.parameters.items()}
        # Half precision would round what is not trained; checkpoints keep the original.
        self.frozen = {n: original[n] for n, p in self.parameters.items() if not p.requires_grad}
        groups = parameter_groups(self.bert, config.optimizer, new_parameters)
        phase = config.phases[0]
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(groups, config.optimizer, ds_config, world.device),
            config=ds_config.resolved(
                train_batch_size=phase.train_batch_size,
                micro_batch_size=phase.micro_batch_size,
                world_size=world.world_size,
                max_grad_norm=config.optimizer.max_grad_norm,
            ),
            dist_init_required=False,
        )
        if self.precision != "fp32":  # DeepSpeed's fp32 weights come from the rounded ones
            for name, parameter in self._trained():
                value = original[name].to(world.device)
                deepspeed.utils.safe_set_full_fp32_param(parameter, value)

    # --- one optimizer step ---

    def start_phase(self, phase: Phase) -> None:
        """Take over the batch sizes of a phase."""
        self.max_length = phase.sequence_length
        self.engine.train()  # transformers loads models in evaluation mode
        self.engine.set_train_micro_batch_size(phase.micro_batch_size)
        self.engine.set_train_batch_size(phase.train_batch_size)

    def forward_backward(
        self, batches: list[PackedBatch], step: int, wants_stop: bool, lap: Lap
    ) -> StepTotals:
        """Accumulate the gradients of this rank's micro-batches.

        The losses are normalised by the masked tokens and pairs of the whole step, over all ranks:
        DeepSpeed averages gradients over ranks, so the local sums are multiplied by their number.
        Dropout depends on (seed, step, rank), so a resumed run repeats it.
        """
        world = self.world
        key = derive_key(self.config.run.seed, DROPOUT * (1 << 32) + step, world.rank)
        torch.manual_seed(int(key >> 1))
        own = [(0, 0, 0, 0.0, wants_stop)]
        for b in batches:
            squares = float((np.diff(b.cu_seqlens) ** 2.0).sum())
            own.append((len(b.masked_labels), b.num_pairs, b.num_tokens, squares, False))
        counts = torch.tensor(own, dtype=torch.float64, device=world.device).sum(0)
        if world.world_size > 1:
            dist.all_reduce(counts)
        divisors = counts[:2].clamp(min=1).float()
        step_sums: list[Tensor] = []
        for number, batch in enumerate(batches):
            result: Sums = self.engine(to_device(batch, world.device, self.max_length))
            loss = result.mlm_loss / divisors[0]
            if result.nsp_loss.requires_grad:
                loss = loss + result.nsp_loss / divisors[1]
            lap("forward")
            self.engine.backward(loss * world.world_size, scale_wrt_gas=False)
            step_sums.append(torch.stack([value.detach().double() for value in result]))
            if number < len(batches) - 1:
                self.engine.step()  # counts the micro-batch; updates only at the last one
            lap("backward")
        self._last = list(zip(batches, step_sums, strict=True))
        sums = torch.stack(step_sums).sum(0)
        if world.world_size > 1:
            dist.all_reduce(sums)
        return StepTotals(*torch.cat([sums, counts]).tolist())

    def samples_with_bad_loss(self) -> list[int]:
        """Numbers of the samples in this rank's micro-batches whose loss was not finite."""
        bad = [batch for batch, sums in self._last if not torch.isfinite(sums[:2]).all()]
        return [int(number) for batch in bad for number in batch.sample_numbers]

    def update(self, step: int, lap: Lap) -> tuple[float, float, bool]:
        """Update the weights at a 0-based step; returns (learning rate, gradient norm, is applied).

        Not applied: fp16 skips a step whose gradients overflowed and lowers the loss scale. In fp32
        and bf16 gradients that are not finite are an error; the weights are not touched either.
        """
        factor = learning_rate_factor(step, self.config.total_steps, self.config.schedule)
        rate = set_learning_rate(self.engine.optimizer, self.config.optimizer.learning_rate, factor)
        if self.stage == 0:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                return rate, norm, False
            self.engine.step()
        else:
            try:
                self.engine.step()
            except Exception as error:  # DeepSpeed raises a bare Exception at its smallest scale
                if "loss scale already at minimum" not in str(error):
                    raise
                raise OverflowError(
                    f"the loss scale is at its minimum {self.loss_scale:g}"
                ) from error
            norm = float(self.engine.get_global_grad_norm() or 0.0)
        lap("optimizer")
        return rate, norm, bool(self.engine.was_step_applied())

    @property
    def loss_scale(self) -> float:
        """The current loss scale; 1 without fp16."""
        return float(self.engine.optimizer.loss_scale) if self.precision == "fp16" else 1.0

    # --- state by parameter name ---

    def gather(self, keep: bool) -> dict[str, dict[str, Tensor]]:
        """fp32 weights and moments of every parameter, on the CPU; called by all ranks.

        Args:
            keep: whether this rank wants them; the others take part and receive nothing.

        Returns:
            {"model", "exp_avg", "exp_avg_sq"} -> {Hugging Face name -> tensor}.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        has_moments = self.optimizer_step > 0  # not while every fp16 step so far was skipped
        if has_moments:
            self._link_moments()
        result: dict[str, dict[str, Tensor]] = {"model": {}, **{key: {} for key in MOMENTS}}
        if keep:
            result["model"] |= {name: value.cpu() for name, value in self.frozen.items()}
        for name, parameter in self._trained():
            weight = parameter if self.stage == 0 else safe_get_full_fp32_param(parameter)
            values = [weight, torch.zeros_like(weight), torch.zeros_like(weight)]
            if has_moments and self.stage == 0:
                state = self.engine.optimizer.state[parameter]
                values[1:] = [state[key] for key in MOMENTS]
            elif has_moments:
                values[1:] = [safe_get_full_optimizer_state(parameter, key) for key in MOMENTS]
            if keep:
                for key, value in zip(result, values, strict=True):
                    result[key][name] = value.detach().float().cpu().clone()
        return result

    def _trained(self) -> list[tuple[str, Tensor]]:
        """In the model's order, so that all ranks call the same collectives."""
        return [item for item in self.parameters.items() if item[0] not in self.frozen]

    def restore(
        self, moments: dict[str, Any], optimizer_step: int, scaler: dict[str, float] | None
    ) -> None:
        """Set moments, step count and loss scaler; the weights were loaded before DeepSpeed began.

        Args:
            moments: {"exp_avg", "exp_avg_sq"} -> a mapping from parameter name to tensor.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        self._allocate_moments()
        self._link_moments()
        for name, parameter in self._trained():
            for key in MOMENTS:
                value = moments[key].get_tensor(name).to(self.world.device)
                if self.stage == 0:
                    self.engine.optimizer.state[parameter][key].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)
        for state in self._basic_optimizer.state.values():
            if "step" in state:  # a tensor, or in DeepSpeed's optimizers a number
                state["step"] = 0 * state["step"] + optimizer_step
        if scaler and self.precision == "fp16":
            for field, value in scaler.items():
                setattr(self.engine.optimizer.loss_scaler, field, value)

    @property
    def _basic_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def _allocate_moments(self) -> None:
        """One step with zero gradients and learning rate 0: DeepSpeed allocates its state."""
        set_learning_rate(self.engine.optimizer, 0.0, 0.0)
        ids = np.zeros(1, np.int32)
        labels = np.zeros(1, np.int64)
        cu_seqlens = np.array([0, 1], np.int32)
        batch = PackedBatch(ids, ids, ids, cu_seqlens, ids, labels, labels, labels)
        for _ in range(self.engine.gradient_accumulation_steps()):
            result = self.engine(to_device(batch, self.world.device, 16))
            self.engine.backward(0.0 * (result.mlm_loss + result.nsp_loss), scale_wrt_gas=False)
            self.engine.step()

    def _link_moments(self) -> None:
        """Tell every parameter where its moments lie.

        DeepSpeed 0.19 does so after the first parameter group's first step, when the other groups
        have no moments yet.
        """
        if self.stage in (1, 2):
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            zero = self.engine.optimizer
            for group, flat in zip(
                zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
            ):
                lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)

    @property
    def optimizer_step(self) -> int:
        """Updates applied so far, as the optimizer counts them."""
        steps = [state["step"] for state in self._basic_optimizer.state.values() if "step" in state]
        return int(steps[0]) if steps else 0

    def scaler_state(self) -> dict[str, float] | None:
        """The dynamic loss scaler's state, or None without fp16."""
        if self.precision != "fp16":
            return None
        scaler = self.engine.optimizer.loss_scaler
        return {field: getattr(scaler, field) for field in SCALER_FIELDS if hasattr(scaler, field)}
