"""Held-out evaluation: MLM loss, perplexity and accuracy, NSP accuracy, on fixed samples and masks.

Samples and masks depend on the shards alone (15 % of single tokens, full-length samples, one seed),
so figures of different checkpoints, runs and numbers of ranks are comparable.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel
from tqdm import tqdm

from bert_cpt.batches import Loader, SampleStream
from bert_cpt.masking import mask_rule
from bert_cpt.model import DeviceBatch, PretrainingModel, Sums, load_model, names_of, to_device
from bert_cpt.world import World
from data_tools.errors import UserError
from data_tools.samples import SampleOptions, check_pairs_possible
from data_tools.shards import ShardSet, open_shards
from data_tools.tokenizer import load_tokenizer

EVALUATION_SEED = 20_181_011
MASK_SHARE = 0.15


class Evaluation(BaseModel):
    """Figures on one held-out set; losses in nats. NSP figures are None without pairs."""

    mlm_loss: float
    perplexity: float
    mlm_accuracy: float
    nsp_loss: float | None
    nsp_accuracy: float | None
    num_samples: int
    num_tokens: int
    num_masked: int
    num_pairs: int

    def as_text(self) -> str:
        nsp = "-" if self.nsp_accuracy is None else f"{self.nsp_accuracy:.1%}"
        return (
            f"mlm {self.mlm_loss:.4f}, perplexity {self.perplexity:.1f}, mlm accuracy "
            f"{self.mlm_accuracy:.1%}, nsp accuracy {nsp}"
        )


def heldout_loader(corpus: ShardSet, *, sequence_length: int, is_paired: bool) -> Loader:
    """The fixed samples of a held-out set."""
    if is_paired:
        check_pairs_possible(corpus.shards, str(corpus.directory))
    options = SampleOptions(sequence_length, short_seq_prob=0.0, is_paired=is_paired)
    stream = SampleStream([corpus], [1.0], options, EVALUATION_SEED)
    return Loader(stream, mask_rule(corpus.tokenizer, "token", MASK_SHARE))


def evaluate(
    forward: Callable[[DeviceBatch], Sums],
    corpus: ShardSet,
    *,
    sequence_length: int,
    is_paired: bool,
    num_samples: int,
    batch_size: int,
    world: World,
) -> Evaluation:
    """Evaluate a model on the first `num_samples` samples of a held-out set, on all ranks.

    Every rank calls `forward` equally often (ZeRO-3 gathers parameters inside it); what the samples
    are does not depend on the number of ranks.
    """
    loader = heldout_loader(corpus, sequence_length=sequence_length, is_paired=is_paired)
    num_samples = min(num_samples, len(loader.stream.indexes[0].get(0)))
    num_batches = -(-num_samples // batch_size)
    rounds = range(-(-num_batches // world.world_size))
    totals = torch.zeros(8, dtype=torch.float64, device=world.device)
    is_shown = None if world.is_main else True
    for number in tqdm(rounds, desc="evaluating", leave=False, disable=is_shown):
        mine = number * world.world_size + world.rank
        first = min(mine, num_batches - 1) * batch_size  # past the end: done, but not counted
        batch = loader.samples(first, min(batch_size, num_samples - first))
        with torch.no_grad():
            sums = forward(to_device(batch, world.device, sequence_length))
        counts = (len(batch.masked_labels), batch.num_pairs, batch.num_tokens, len(batch))
        if mine < num_batches:
            totals[:4] += torch.stack([value.double() for value in sums])
            totals[4:] += torch.tensor(counts, device=world.device)
    mlm, nsp, mlm_right, nsp_right, masked, pairs, tokens, samples = world.sum(totals.tolist())
    loss = mlm / max(masked, 1)
    return Evaluation(
        mlm_loss=loss,
        perplexity=math.exp(min(loss, 700)),
        mlm_accuracy=mlm_right / max(masked, 1),
        nsp_loss=nsp / pairs if pairs else None,
        nsp_accuracy=nsp_right / pairs if pairs else None,
        num_samples=int(samples), num_tokens=int(tokens), num_masked=int(masked),
        num_pairs=int(pairs),
    )  # fmt: skip


@contextmanager
def eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """Dropout off, and as it was afterwards."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def evaluate_checkpoint(
    checkpoint: str,
    data: Mapping[str, Path],
    *,
    sequence_length: int = 128,
    num_samples: int = 512,
    batch_size: int = 32,
    device: torch.device | None = None,
) -> tuple[dict[str, Evaluation], list[str]]:
    """Evaluate a Hugging Face checkpoint on several held-out sets.

    Returns:
        The figures by name, and the tensors of the model that the checkpoint lacks.

    Raises:
        UserError: no BERT checkpoint, no shards, or shards of another tokenizer.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpora = {name: open_shards(path) for name, path in data.items()}
    for corpus in corpora.values():
        check_tokenizer(checkpoint, corpus)
    bert, report = load_model(checkpoint)
    limit = bert.config.max_position_embeddings
    if sequence_length > limit:
        raise UserError(f"--sequence-length {sequence_length}: the checkpoint has only {limit}")
    model, world, results = PretrainingModel(bert).to(device), World(0, 1, device), {}
    with eval_mode(model):
        for name, corpus in corpora.items():
            results[name] = evaluate(
                model, corpus, sequence_length=sequence_length, is_paired=True,
                num_samples=num_samples, batch_size=batch_size, world=world,
            )  # fmt: skip
    return results, report.new


def evaluation_table(results: Mapping[str, Evaluation], new: list[str]) -> str:
    """The figures as a table for people; `new` are tensors that the checkpoint lacks."""
    width = max(16, *(len(name) + 2 for name in results))
    lines = [
        f"{name:<{width}}{r.as_text()} ({r.num_samples} samples)" for name, r in results.items()
    ]
    if new:
        heads = ", ".join(names_of(new))
        lines.append(f"the checkpoint lacks {heads}: random here, and so are their figures")
    return "\n".join(lines)


def check_tokenizer(checkpoint: str, corpus: ShardSet) -> None:
    """Raise UserError if the shards were written with another tokenizer than the checkpoint's."""
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.identity == corpus.manifest.tokenizer.identity:
        return
    ours, theirs = tokenizer.vocabulary.items(), corpus.tokenizer.vocabulary.items()
    detail = f"{len(ours & theirs)} of {len(theirs)} entries agree"
    if ours == theirs:
        detail = "the vocabularies are equal, the normalisation (case, accents) is not"
    raise UserError(
        f"{corpus.directory}: written with the tokenizer {corpus.manifest.tokenizer.name!r}, not "
        f"that of {checkpoint} ({detail}); shard the corpus again with --tokenizer {checkpoint}"
    )
