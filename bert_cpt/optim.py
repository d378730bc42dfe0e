"""Parameter groups, the optimizer, and the learning-rate schedule as a function of the step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bert_cpt.config import OptimizerConfig, ScheduleConfig
from bert_cpt.ds_config import DeepSpeedConfig
from bert_cpt.model import Bert
from data_tools.errors import UserError


def parameter_groups(
    model: Bert, config: OptimizerConfig, new: Iterable[str]
) -> list[dict[str, Any]]:
    """Trainable parameters by weight decay and learning-rate factor.

    No decay on biases and LayerNorm. Layer-wise decay (Howard & Ruder 2018): the heads and the top
    layer learn at the full rate, each layer below at `layer_decay` times that of the one above.

    Args:
        new: names of the parameters that start at random (`new_head_factor`).

    Returns:
        Groups with "params", "weight_decay" and "lr_factor"; order and content are the same on
        every rank.
    """
    is_new = set(new)
    num_layers = len(model.bert.encoder.layer)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = config.layer_decay ** (num_layers - _depth(name, num_layers))
        if name in is_new and len(is_new) < sum(1 for _ in model.parameters()):
            factor *= config.new_head_factor
        groups.setdefault((parameter.ndim > 1, factor), []).append(parameter)
    return [
        {"params": group, "weight_decay": config.weight_decay * has_decay, "lr_factor": factor}
        for (has_decay, factor), group in groups.items()
    ]


def _depth(name: str, num_layers: int) -> int:
    """0 for the embeddings, 1 to `num_layers` for the layers, `num_layers` for the heads."""
    if name.startswith("bert.embeddings."):
        return 0
    if name.startswith("bert.encoder.layer."):
        return int(name.split(".")[3]) + 1
    return num_layers


def make_optimizer(
    groups: list[dict[str, Any]],
    config: OptimizerConfig,
    ds_config: DeepSpeedConfig,
    device: torch.device,
) -> torch.optim.Optimizer:
    """AdamW (fused; on the CPU with its state there when it is offloaded) or LAMB.

    Raises:
        UserError: LAMB where DeepSpeed's is missing or would compute something else.
    """
    betas = (config.beta1, config.beta2)
    common: dict[str, Any] = {"lr": config.learning_rate, "betas": betas, "eps": config.epsilon}
    if config.name == "lamb":
        if device.type != "cuda":
            raise UserError("optimizer.name=lamb: DeepSpeed has LAMB on CUDA only; use adamw")
        if ds_config.stage or ds_config.precision != "fp32":
            raise UserError(
                f"optimizer.name=lamb with ZeRO stage {ds_config.stage} and {ds_config.precision}: "
                f"its trust ratio would be that of DeepSpeed's flat buffer, not of each tensor; "
                f"use ds_configs/zero0_fp32.json or adamw"
            )
        from deepspeed.ops.lamb import FusedLamb

        return FusedLamb(groups, **common)
    if ds_config.offloads_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    return torch.optim.AdamW(groups, fused=True, **common)


def learning_rate_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Share of the peak learning rate at a 0-based step: linear warm-up, then decay."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    if config.decay == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - config.end_factor) * progress


def set_learning_rate(
    optimizer: torch.optim.Optimizer, learning_rate: float, factor: float
) -> float:
    """Set the rate of every group; returns that of the top layer."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * factor * group["lr_factor"]
    return learning_rate * factor
