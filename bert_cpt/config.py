"""The typed training configuration: one TOML file, `section.key=value` overrides, strict keys.

The TOML owns WHAT is trained; a DeepSpeed JSON (`train.deepspeed_config`, see `ds_config`) owns HOW
it runs. Imports neither torch nor deepspeed: a bad value dies on the login node within a second.
Intervals are in optimizer steps; relative paths are relative to the working directory.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_tools.errors import UserError

MAX_CONFIG_BYTES = 1 << 20
Positive = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunConfig(_Section):
    output_dir: Path = Field(description="run directory; shared by all nodes")
    seed: int = Field(0, ge=0, description="of pairs, masks, order, dropout and new weights")


class CorpusConfig(_Section):
    path: Path = Field(description="directory written by `bert-cpt shard`")
    weight: float = Field(1.0, gt=0, description="share of the samples, relative to the others")


class DataConfig(_Section):
    corpora: list[CorpusConfig] = Field(
        min_length=1, description="shards to train on, with weights"
    )
    heldout: dict[str, Path] = Field({}, description="name -> shards to evaluate on")
    heldout_samples: Positive = Field(512, description="samples of each held-out set to evaluate")
    sequence_length: int = Field(128, ge=16, le=512, description="tokens, special ones included")
    short_seq_prob: Probability = Field(0.1, description="probability of a shorter sample")


class ObjectiveConfig(_Section):
    nsp: bool = Field(True, description="next sentence prediction beside MLM; false: MLM only")
    masking: Literal["token", "whole_word", "span"] = Field("token", description="unit of a mask")
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="share of tokens masked")


class ModelConfig(_Section):
    init_checkpoint: str = Field(description="directory or hub name of a BERT checkpoint")
    init: Literal["checkpoint", "scratch"] = Field(
        "checkpoint", description="scratch: only the configuration is taken, weights start new"
    )
    attention: Literal["packed", "padded"] = Field(
        "packed", description="packed: no work on padding; padded: the plain reference"
    )
    hidden_dropout: Probability | None = Field(None, description="none: the checkpoint's")
    attention_dropout: Probability = Field(0.0, description="0 lets packed attention run fast")
    gradient_checkpointing: bool = Field(False, description="recompute activations, less memory")
    freeze_embeddings: bool = Field(False, description="keep the embeddings as they are")
    frozen_layers: int = Field(0, ge=0, description="keep this many lowest layers as they are")
    compile: bool = Field(False, description="torch.compile the encoder")


class OptimizerConfig(_Section):
    name: Literal["adamw", "lamb"] = Field("adamw", description="lamb: CUDA, fp32 and ZeRO 0 only")
    learning_rate: float = Field(5e-5, gt=0, description="peak, of the top layer")
    weight_decay: float = Field(0.01, ge=0, description="not on biases and LayerNorm")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    max_grad_norm: float = Field(1.0, ge=0, description="clipping threshold; 0: no clipping")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate factor from each layer to the one below"
    )
    new_head_factor: float = Field(
        1.0, gt=0, description="learning rate factor of heads that start new"
    )


class ScheduleConfig(_Section):
    warmup_steps: int = Field(0, ge=0, description="linear rise from 0 to the peak")
    decay: Literal["linear", "cosine", "constant"] = Field("linear", description="after warm-up")
    end_factor: Probability = Field(0.0, description="of the peak, at the last step")


class PhaseConfig(_Section):
    steps: Positive = Field(description="optimizer steps of the phase")
    sequence_length: int = Field(ge=16, le=512, description="tokens, special ones included")
    train_batch_size: Positive | None = Field(None, description="none: as in [train]")
    micro_batch_size: Positive | None = Field(None, description="none: as in [train]")


class TrainConfig(_Section):
    steps: int = Field(0, ge=0, description="optimizer steps; or give phases")
    train_batch_size: Positive = Field(256, description="sequences a step, over all ranks")
    micro_batch_size: Positive = Field(32, description="sequences a rank and forward pass")
    phases: list[PhaseConfig] = Field([], description="phases of different length, in order")
    deepspeed_config: Path = Field(
        Path("ds_configs/zero1_auto.json"), description="DeepSpeed JSON; ds_configs/ are shipped"
    )
    max_seconds: Positive | None = Field(None, description="save and stop before this time is up")


class CheckpointConfig(_Section):
    interval: Positive = Field(1000, description="steps between checkpoints")
    keep_last: Positive = Field(2, description="newest checkpoints to keep")
    keep_every: int = Field(0, ge=0, description="keep multiples of this step for good; 0: none")


class LoggingConfig(_Section):
    interval: Positive = Field(10, description="steps between log lines")
    evaluation_interval: int = Field(0, ge=0, description="steps between evaluations; 0: none")
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online when logged in, else offline"
    )
    wandb_project: str = Field("bert-cpt", description="W&B project")
    wandb_name: str | None = Field(None, description="W&B run name; none: the run directory's")


class Phase(BaseModel):
    """A resolved phase: `steps` steps from `first_step`, on samples from `first_sample` on."""

    model_config = ConfigDict(frozen=True)

    number: int
    first_step: int
    steps: int
    first_sample: int
    sequence_length: int
    train_batch_size: int
    micro_batch_size: int

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps


class Config(_Section):
    """Everything that decides what a run trains."""

    run: RunConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Config":
        if bool(self.train.steps) == bool(self.train.phases):
            raise ValueError("give either train.steps or [[train.phases]], one of the two")
        if self.schedule.warmup_steps > self.total_steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} is more than all "
                f"{self.total_steps} steps"
            )
        for phase in self.phases:
            if phase.train_batch_size % phase.micro_batch_size:
                raise ValueError(
                    f"train.train_batch_size={phase.train_batch_size} is no multiple of "
                    f"train.micro_batch_size={phase.micro_batch_size}"
                )
        return self

    @property
    def phases(self) -> list[Phase]:
        """The phases in order; one if none are given."""
        given = self.train.phases or [
            PhaseConfig(steps=self.train.steps, sequence_length=self.data.sequence_length)
        ]
        phases: list[Phase] = []
        step = sample = 0
        for number, phase in enumerate(given):
            sizes = self.train.model_dump(include={"train_batch_size", "micro_batch_size"})
            values = sizes | phase.model_dump(exclude_none=True)
            phases.append(Phase(number=number, first_step=step, first_sample=sample, **values))
            step += phase.steps
            sample += phase.steps * phases[-1].train_batch_size
        return phases

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.train.phases) or self.train.steps

    def check_world_size(self, world_size: int) -> None:
        """Raise UserError unless every phase divides among `world_size` ranks."""
        for phase in self.phases:
            unit = phase.micro_batch_size * world_size
            if (batch := phase.train_batch_size) % unit:
                raise UserError(
                    f"train.train_batch_size={batch} does not divide into micro-batches of "
                    f"{phase.micro_batch_size} on {world_size} ranks; set it to a multiple of "
                    f"{unit}, such as {max(unit, batch // unit * unit)}, or that to another size"
                )

    def as_toml(self) -> str:
        """The resolved configuration as TOML."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply `section.key=value` overrides, validate.

    Raises:
        UserError: the file is missing or no TOML, or a key or value is wrong; the message names it.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB; is this a config?")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a TOML configuration") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(content, override)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Config)}") from error


def _apply_override(content: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.strip().split(".")
    if not separator or not all(keys):
        raise UserError(f"{override!r}: expected section.key=value, as in train.steps=200")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text  # a bare word is a string
    table = content
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UserError(f"{override!r}: {key!r} is a value, not a section")
    table[keys[-1]] = value


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """All of a validation error in one line: key, value, what was expected."""
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = [name for name, _, _ in describe_fields(schema)]
            known += schema.model_fields
            name = re.sub(r"\.\d+\b", "", where)
            section = name.rpartition(".")[0]
            close = difflib.get_close_matches(name, known, 1, 0.7)
            near = close or [key for key in known if key.startswith(section + ".")]
            hint = f"did you mean {' or '.join(map(repr, near or schema.model_fields))}?"
            parts.append(f"unknown key {where!r}; {hint}")
        elif item["type"] == "missing":
            parts.append(f"{where} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = f"={item['input']!r}" if where else ""
            parts.append(f"{where}{given}: {message}" if where else message)
    return "; ".join(parts)


def describe_fields(
    schema: type[BaseModel] | None = None, prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """(section.key, default, description) of every field, for `bert-cpt train --help`."""
    for key, field in (schema or Config).model_fields.items():
        parts = (field.annotation, *get_args(field.annotation))
        nested = [p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)]
        if nested:
            yield from describe_fields(nested[0], f"{prefix}{key}.")
        else:
            default = "required" if field.is_required() else str(field.default)
            yield prefix + key, default, field.description or ""


def shipped(relative: Path) -> Path:
    """A path as given, or the file of that name that comes with this package (ds_configs/...).

    Raises:
        UserError: neither exists.
    """
    if relative.exists():
        return relative
    package = Path(__file__).parent
    for root in (package, package.parent):  # installed, and in a checkout
        if not relative.is_absolute() and (root / relative).exists():
            return root / relative
    raise UserError(f"{relative}: no such file, here or among the shipped ones")
