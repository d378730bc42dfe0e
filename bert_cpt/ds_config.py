"""The DeepSpeed JSON: a plain file people know, checked strictly and merged with the TOML.

Every key has one owner. What the TOML owns (batch sizes, clipping, optimizer, schedule) is absent
or "auto" here; DeepSpeed itself ignores unknown keys and takes an unfilled "auto" for a default,
both without a word, so this module refuses them. Imports neither torch nor deepspeed.
"""

import difflib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_tools.errors import UserError

Precision = Literal["fp32", "fp16", "bf16"]
MAX_JSON_BYTES = 1 << 20
HALVES: tuple[Precision, ...] = ("bf16", "fp16")

OWNED_BY_TOML = {
    "train_batch_size": "train.train_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.train_batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "[optimizer]",
    "scheduler": "[schedule]",
}
# Keys a run may set, by section. What is not here has no effect on this engine, or was removed from
# DeepSpeed, or breaks a promise of ours (its own checkpoints, its own data loader).
KNOWN = {
    "": "zero_optimization fp16 bf16 communication_data_type data_types prescale_gradients "
    "gradient_predivide_factor zero_force_ds_cpu_optimizer wall_clock_breakdown memory_breakdown "
    "comms_logger flops_profiler " + " ".join(OWNED_BY_TOML),
    "zero_optimization": "stage contiguous_gradients reduce_scatter reduce_bucket_size "
    "use_multi_rank_bucket_allreduce allgather_partitions allgather_bucket_size overlap_comm "
    "round_robin_gradients sub_group_size stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
    "stage3_use_all_reduce_for_fetch_params zero_hpz_partition_size zero_quantized_weights "
    "zero_quantized_gradients memory_efficient_linear offload_optimizer offload_param",
    "zero_optimization.offload_optimizer": "device pin_memory ratio buffer_count fast_init",
    "zero_optimization.offload_param": "device pin_memory buffer_count buffer_size max_in_cpu",
    "fp16": "enabled loss_scale initial_scale_power loss_scale_window hysteresis "
    "consecutive_hysteresis min_loss_scale",
    "bf16": "enabled immediate_grad_update",
    "data_types": "grad_accum_dtype",
    "comms_logger": "enabled verbose prof_all debug prof_ops",
    "flops_profiler": "enabled profile_step module_depth top_modules detailed output_file",
}


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A checked DeepSpeed configuration.

    Attributes:
        content: the JSON with everything resolved but the batch sizes.
        precision: of the forward and backward pass; the optimizer always keeps fp32.
    """

    content: dict[str, Any]
    precision: Precision

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.content["zero_optimization"]["stage"])

    @property
    def offloads_optimizer(self) -> bool:
        offload = self.content["zero_optimization"].get("offload_optimizer") or {}
        return offload.get("device", "none") != "none"

    def resolved(
        self, *, train_batch_size: int, micro_batch_size: int, world_size: int, max_grad_norm: float
    ) -> dict[str, Any]:
        """What `deepspeed.initialize` receives: nothing absent that has a surprising default."""
        return self.content | {
            "train_batch_size": train_batch_size,
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": train_batch_size // (micro_batch_size * world_size),
            "gradient_clipping": max_grad_norm,  # absent, it would be 1.0
            "steps_per_print": 1 << 40,  # we do the logging
            "zero_allow_untested_optimizer": True,
        }


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON.

    Raises:
        UserError: missing, no JSON, an unknown key, a key the TOML owns, or a combination that
            trains wrongly.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB; is this a config?")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_doubles)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a DeepSpeed JSON") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, expected a JSON object")
    _check_keys(path, content)
    for key, owner in OWNED_BY_TOML.items():
        if content.pop(key, "auto") != "auto":
            raise UserError(
                f'{path}: {key} belongs to {owner} in the TOML; remove it here or set it to "auto"'
            )
    zero = content.setdefault("zero_optimization", {})
    if zero.setdefault("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage={zero['stage']!r}; expected 0, 1, 2 or 3")
    return content


def resolve_precision(
    path: Path, content: dict[str, Any], *, device: str, has_bf16: bool, has_fp16: bool
) -> DeepSpeedConfig:
    """Settle `"enabled": "auto"` for this hardware and refuse what would train wrongly.

    "auto" is bf16 where the hardware has it, fp16 on older GPUs, fp32 on CPUs and with ZeRO 0.
    """
    is_zero_0 = content["zero_optimization"]["stage"] == 0
    asked = {name: content.get(name, {}).get("enabled", False) for name in HALVES}
    chosen = [name for name in HALVES if asked[name] is True]
    problem = "fp16 and bf16 are both enabled; enable one" if len(chosen) == 2 else ""
    if "auto" in asked.values() and not chosen and device == "cuda" and not is_zero_0:
        chosen = [n for n in HALVES if asked[n] == "auto" and (has_bf16 or n == "fp16")]
    precision: Precision = chosen[0] if chosen else "fp32"
    if precision != "fp32" and is_zero_0:
        problem = (
            f"{precision} with ZeRO stage 0 is refused: DeepSpeed does not scale the loss there "
            f"but divides by the scale, and trains wrongly without a word; set "
            f"zero_optimization.stage to 1"
        )
    elif not {"bf16": has_bf16, "fp16": has_fp16, "fp32": True}[precision]:
        problem = (
            f"{precision} is enabled, but this {device} cannot train in {precision}; use "
            f"ds_configs/zero1_auto.json or zero0_fp32.json"
        )
    if problem:
        raise UserError(f"{path}: {problem}")
    settled = {name: content.get(name, {}) | {"enabled": name == precision} for name in HALVES}
    return DeepSpeedConfig(content | settled, precision)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ValueError(f"key {name!r} stands there twice")
    return dict(pairs)


def _check_keys(path: Path, content: dict[str, Any], section: str = "") -> None:
    known = KNOWN[section].split()
    for key, value in content.items():
        name = f"{section}.{key}".removeprefix(".")
        if key not in known:
            close = difflib.get_close_matches(key, known, 1, 0.6)
            hint = f"did you mean {close[0]!r}?" if close else "it has no effect on this engine"
            raise UserError(f"{path}: unknown key {name!r}; {hint}")
        if name in KNOWN:
            if not isinstance(value, dict):
                raise UserError(f"{path}: {name!r} is {value!r}, expected an object")
            _check_keys(path, value, name)
        elif value == "auto" and name not in {*OWNED_BY_TOML, "fp16.enabled", "bf16.enabled"}:
            raise UserError(
                f'{path}: {name} is "auto", which nothing fills here; give a value or remove it'
            )
