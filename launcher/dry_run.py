"""`bert-cpt train --dry-run`: everything but the training."""

import json

import numpy as np
import torch

from bert_cpt.batches import BatchShape, PackedBatch
from bert_cpt.config import Config
from bert_cpt.train import phase_loader
from launcher.plan import GIB, Plan


def dry_run(config: Config, num_ranks: int) -> str:
    """The resolved TOML and DeepSpeed JSON, the plan, and the first batch of the first rank.

    Raises:
        UserError: the run would not start, or its first batch is damaged.
    """
    device, memory = "cpu", None
    if torch.cuda.is_available():
        device, memory = "cuda", torch.cuda.get_device_properties(0).total_memory / GIB
    plan = Plan(config, num_gpus=num_ranks, gpu_memory_gib=memory)
    phase = config.phases[0]
    resolved = plan.setup.settle_precision(device).resolved(
        train_batch_size=phase.train_batch_size, micro_batch_size=phase.micro_batch_size,
        world_size=num_ranks, max_grad_norm=config.optimizer.max_grad_norm,
    )  # fmt: skip
    shape = BatchShape(phase.train_batch_size, phase.micro_batch_size, num_ranks, rank=0)
    batch = phase_loader(config, phase, plan.setup.corpora).step(0, shape)[0]
    figures = figures_of(batch)
    tokenizer = plan.setup.corpora[0].tokenizer
    figures["sample 0"] = tokenizer.decode(batch.input_ids[: batch.cu_seqlens[1]])
    sections = {
        "resolved configuration": config.as_toml(),
        f"DeepSpeed on {device}": json.dumps(resolved, indent=1),
        f"plan for {num_ranks} rank(s)": plan.as_text(),
        "first batch of the first rank": "\n".join(f"{k:<14}{v}" for k, v in figures.items()),
    }
    return "\n\n".join(f"# {title}\n{text.rstrip()}" for title, text in sections.items())


def figures_of(batch: PackedBatch) -> dict[str, str]:
    """Figures of a batch; whether its ids are possible was checked when it was made."""
    lengths = np.diff(batch.cu_seqlens)
    random = int((batch.next_sentence_label == 1).sum())
    return {
        "samples": f"{len(lengths)}, {lengths.min()} to {lengths.max()} tokens",
        "tokens": f"{batch.num_tokens}, {len(batch.masked_labels) / batch.num_tokens:.1%} masked",
        "pairs": f"{batch.num_pairs}, {random} of them random",
    }
