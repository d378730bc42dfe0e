"""BERT with its pre-training heads: loaded with a report, run on packed batches.

The model is transformers' own, untouched; this module only decides where work is done. In packed
mode the encoder sees one stream of real tokens, the MLM head only the masked positions, the NSP
head each sequence's own [CLS]. In padded mode everything is computed as transformers does it, as a
reference.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining
from transformers.utils import logging as transformers_logging

from bert_cpt.attention import NAME as PACKED_ATTENTION
from bert_cpt.attention import Packing
from data_tools.errors import UserError

if TYPE_CHECKING:  # the model runs where neither numba nor pydantic is installed
    from bert_cpt.batches import PackedBatch

Bert = BertForPreTraining | BertForMaskedLM


# --- loading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of the model came from the checkpoint and which did not.

    Attributes:
        loaded: tensors that came from the checkpoint.
        new: tensors of the model that the checkpoint lacks; they start at random.
        ignored: tensors of the checkpoint that the model has no place for.
    """

    checkpoint: str
    init: str
    num_parameters: int
    loaded: list[str]
    new: list[str]
    ignored: list[str]

    def as_text(self) -> str:
        """A few plain lines for a person."""
        if self.init == "scratch":
            size = f"{self.num_parameters / 1e6:.1f} M parameters"
            return f"model: {size}, all new (the configuration is that of {self.checkpoint})"
        text = (
            f"model: {self.num_parameters / 1e6:.1f} M parameters; {len(self.loaded)} tensors from "
            f"{self.checkpoint}, {len(self.new)} start new, {len(self.ignored)} of it ignored"
        )
        for what in ("new", "ignored"):
            if names := getattr(self, what):
                text += f"\n  {what}: {', '.join(names_of(names))}"
        if any(name.startswith("cls.predictions") for name in self.new):
            text += (
                "\n  the checkpoint is an encoder without an MLM head: the head starts at random, "
                "so the first MLM loss is about ln(vocabulary) and falls quickly"
            )
        return text

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def names_of(names: Iterable[str]) -> list[str]:
    """Tensor names without .weight and .bias, each once."""
    return list(dict.fromkeys(name.rsplit(".", 1)[0] for name in sorted(names)))


def load_bert_config(checkpoint: str) -> BertConfig:
    """The configuration of a BERT checkpoint; raises UserError if it is none."""
    path = Path(checkpoint)
    is_local = path.exists() or path.is_absolute() or checkpoint.startswith(".")
    if is_local and not (path / "config.json").is_file():
        what = "holds no config.json" if path.is_dir() else "no such directory"
        raise UserError(f"{checkpoint}: {what}; expected a BERT checkpoint")
    try:
        content, _ = BertConfig.get_config_dict(checkpoint)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        where = "no BERT checkpoint here or on the hub"
        raise UserError(f"{checkpoint}: {where} ({reason})") from error
    if (kind := content.get("model_type", "bert")) != "bert":
        raise UserError(f"{checkpoint}: a {kind} model; expected a BERT checkpoint")
    try:
        return BertConfig.from_dict(content)
    except Exception as error:  # transformers validates with exceptions of many kinds
        raise UserError(f"{checkpoint}/config.json: {error}") from error


def load_model(
    checkpoint: str,
    *,
    init: str = "checkpoint",
    nsp: bool = True,
    seed: int = 0,
    hidden_dropout: float | None = None,
    attention_dropout: float = 0.0,
) -> tuple[Bert, LoadReport]:
    """Load BERT in fp32 with its pre-training heads.

    Args:
        checkpoint: directory or hub name; weights must be safetensors (nothing is unpickled).
        init: "checkpoint", or "scratch" for new weights of the same configuration.
        nsp: with the NSP head (BertForPreTraining), or without (BertForMaskedLM).
        seed: of weights that start new; the same on every rank.

    Raises:
        UserError: no BERT checkpoint, or tensors of other shapes than its configuration says.
    """
    config = load_bert_config(checkpoint)
    config.attention_probs_dropout_prob = attention_dropout
    if hidden_dropout is not None:
        config.hidden_dropout_prob = hidden_dropout
    model_class: type[Bert] = BertForPreTraining if nsp else BertForMaskedLM
    model: Bert
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if init == "scratch":
            model, ignored = model_class(config), []
            new = [name for name, _ in model.named_parameters()]
        else:
            model, info = from_pretrained(model_class, checkpoint, config=config)
            _check_loaded(checkpoint, info)
            new, ignored = info["missing_keys"], info["unexpected_keys"]
    names = {name for name, _ in model.named_parameters()}
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    new = sorted(names & set(new))
    loaded = sorted(names - set(new))
    return model, LoadReport(checkpoint, init, num_parameters, loaded, new, sorted(ignored))


def from_pretrained(model_class: type, checkpoint: str, **options: Any) -> tuple[Any, Any]:
    """An fp32 model from safetensors, and transformers' loading info; quiet, no remote code.

    Raises:
        UserError: there are no weights that can be read.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # "seems corrupted" for a plain encoder
    transformers_logging.disable_progress_bar()
    try:
        loader: Any = model_class
        return loader.from_pretrained(
            checkpoint, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True, **options,
        )  # fmt: skip
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise UserError(
            f"{checkpoint}: cannot be loaded ({reason}); expected a model.safetensors: pickled "
            f"weights (.bin) are not read, transformers' save_pretrained converts them"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check_loaded(checkpoint: str, info: Any) -> None:
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        shapes = f"{name} has shape {tuple(found)}, its config.json asks for {tuple(expected)}"
        raise UserError(f"{checkpoint}: {shapes}; they do not belong together")
    if "bert.embeddings.word_embeddings.weight" in info["missing_keys"]:
        raise UserError(f"{checkpoint}: holds no BERT encoder (no word embeddings)")


def freeze(model: Bert, *, embeddings: bool, num_layers: int) -> int:
    """Keep the embeddings and the lowest layers as they are; returns the number of parameters kept.

    The MLM decoder is tied to the word embeddings, so it is kept with them.
    """
    frozen: list[nn.Module] = [model.bert.embeddings] if embeddings else []
    for module in [*frozen, *model.bert.encoder.layer[:num_layers]]:
        module.requires_grad_(False)
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


# --- batches on the device ------------------------------------------------------------------------


class DeviceBatch(NamedTuple):
    """A `PackedBatch` as tensors on a device (see there for shapes)."""

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    masked_positions: Tensor
    masked_labels: Tensor
    next_sentence_label: Tensor
    lengths: tuple[int, ...]
    max_length: int


def to_device(batch: PackedBatch, device: torch.device, max_length: int) -> DeviceBatch:
    """Copy a batch to a device, without waiting for it."""

    tensors = [torch.from_numpy(getattr(batch, name)) for name in DeviceBatch._fields[:7]]
    if device.type == "cuda":
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    lengths = tuple(np.diff(batch.cu_seqlens).tolist())
    return DeviceBatch._make([*tensors, lengths, max_length])


# --- forward --------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Sums over a batch; losses are differentiable, the counts of right answers are not."""

    mlm_loss: Tensor  # float32 scalar, summed over masked positions
    nsp_loss: Tensor  # float32 scalar, summed over pairs
    mlm_correct: Tensor
    nsp_correct: Tensor


class PretrainingModel(nn.Module):
    """BERT and its two losses on a packed batch."""

    def __init__(self, bert: Bert, attention: str = "packed") -> None:
        super().__init__()
        self.model: Any = bert
        self.is_packed = attention == "packed"
        self.has_nsp = isinstance(bert, BertForPreTraining)
        if self.is_packed:
            bert.set_attn_implementation(PACKED_ATTENTION)

    def forward(self, batch: DeviceBatch) -> Sums:
        """Sums of both losses, so that the caller can normalise over ranks and micro-batches."""
        logits, labels, pair_logits = (self._packed if self.is_packed else self._padded)(batch)
        mlm_loss, mlm_correct = _loss_sum(logits, labels)
        if pair_logits is None:
            zero = torch.zeros_like(mlm_loss)
            return Sums(mlm_loss, zero, mlm_correct, zero)
        nsp_loss, nsp_correct = _loss_sum(pair_logits, batch.next_sentence_label)
        return Sums(mlm_loss, nsp_loss, mlm_correct, nsp_correct)

    def _packed(self, batch: DeviceBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """MLM logits, their labels, NSP logits."""
        packing = Packing(batch.cu_seqlens, batch.lengths, batch.max_length)
        hidden = self.model.bert(
            batch.input_ids[None],
            token_type_ids=batch.token_type_ids[None],
            position_ids=batch.position_ids[None],
            packing=packing,
        ).last_hidden_state[0]
        logits = self.model.cls.predictions(hidden[batch.masked_positions])
        if not self.has_nsp:
            return logits, batch.masked_labels, None
        # The pooler takes the first position of each row: rows of one position, each a [CLS].
        pooled = self.model.bert.pooler(hidden[batch.cu_seqlens[:-1]][:, None])
        return logits, batch.masked_labels, self.model.cls.seq_relationship(pooled)

    def _padded(self, batch: DeviceBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        labels, inputs = pad(batch)
        output = self.model(**inputs)
        logits = output.prediction_logits if self.has_nsp else output.logits
        pair_logits = output.seq_relationship_logits if self.has_nsp else None
        return logits.flatten(0, 1), labels.flatten(), pair_logits


def _loss_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy in fp32 summed over labels that are not -100, and how many are right."""
    loss = cross_entropy(logits.float(), labels, reduction="sum")
    return loss, (logits.argmax(-1) == labels).sum()


def pad(batch: DeviceBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch as transformers wants it.

    Returns:
        labels int64[n, longest] (-100 where not masked), and input_ids, token_type_ids,
        attention_mask, each int64[n, longest].
    """
    longest = max(batch.lengths)
    starts = batch.cu_seqlens[:-1].long()
    sizes = batch.cu_seqlens[1:].long() - starts
    offsets = torch.arange(longest, device=starts.device)
    mask = offsets[None] < sizes[:, None]
    flat_labels = torch.full_like(batch.input_ids, -100, dtype=torch.int64)
    flat_labels[batch.masked_positions.long()] = batch.masked_labels

    def spread(flat: Tensor, filler: int) -> Tensor:
        rows = torch.full(mask.shape, filler, dtype=torch.int64, device=flat.device)
        rows[mask] = flat.long()
        return rows

    inputs = {
        "input_ids": spread(batch.input_ids, 0),
        "token_type_ids": spread(batch.token_type_ids, 0),
        "attention_mask": mask.long(),
    }
    return spread(flat_labels, -100), inputs
