"""One optimizer step: packed, masked-only and fused, against the plain Hugging Face step, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/step.py --shards abstracts=DIR [--shards ...] [--json FILE]

Both make the same update from the same samples: forward and backward pass of both losses, gradient
clipping, AdamW. The plain step pads every sample to the sequence length, computes logits at every
position, and uses torch's default (unfused) AdamW. With `--original` the samples have the lengths
that the pair procedure of the original BERT gives on the same text, which leaves more padding; they
are cut out of the shard one after the other. Seconds are CPU seconds. The two alternate, so
that a noisy machine disturbs both alike; the ratio is the median over the pairs.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from index import original_procedure
from transformers import BertConfig, BertForPreTraining

from bert_cpt.batches import Loader, PackedBatch, SampleStream, assemble
from bert_cpt.config import OptimizerConfig
from bert_cpt.masking import mask_rule
from bert_cpt.model import PretrainingModel, pad, to_device
from bert_cpt.optim import parameter_groups
from data_tools import open_shards
from data_tools.samples import SampleOptions, Segments

SHAPES = {
    "6x384": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12},
    "BERT-mini (4x256)": {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4},
}


def bert(**shape: int) -> BertForPreTraining:
    torch.manual_seed(0)
    config = BertConfig(
        intermediate_size=4 * shape["hidden_size"], attention_probs_dropout_prob=0.0, **shape
    )
    return BertForPreTraining(config).train()


def batches_of(
    shards: Path, sequence_length: int, size: int, count: int, *, is_original: bool = False
) -> list[PackedBatch]:
    """The first samples of a run over these shards."""
    corpus = open_shards(shards)
    stream = SampleStream([corpus], [1.0], SampleOptions(sequence_length), seed=0)
    rule = mask_rule(corpus.tokenizer, "token", 0.15)
    loader = Loader(stream, rule)
    if is_original:
        shard = corpus.shards[0]
        documents = np.split(shard.sentence_lengths, shard.document_index[1:-1])[:2000]
        pairs = original_procedure([d.tolist() for d in documents], sequence_length, seed=0)
        pairs = np.random.default_rng(0).permutation(pairs)[: size * count]
        length_a, length_b, labels = pairs.T
        starts = np.append(0, np.cumsum(length_a + length_b)[:-1])
        where = np.zeros(len(pairs), np.int64)
        segments = (where, starts, length_a, where, starts + length_a, length_b, labels)
        keys = np.arange(len(pairs), dtype=np.uint64)
        return [
            assemble(
                stream.all_shards, rule, Segments(*(f[rows].copy() for f in segments)), keys[rows],
                np.arange(size),
            )
            for rows in np.arange(len(pairs)).reshape(-1, size)
        ]  # fmt: skip
    return [loader.samples(k * size, size) for k in range(count)]


class Plain:
    """The step most people run."""

    def __init__(self, model: BertForPreTraining, sequence_length: int) -> None:
        self.model, self.sequence_length = model, sequence_length
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)

    def step(self, batch: PackedBatch) -> float:
        labels, inputs = pad(to_device(batch, torch.device("cpu"), self.sequence_length))
        missing = self.sequence_length - labels.shape[1]
        labels = torch.nn.functional.pad(labels, (0, missing), value=-100)
        inputs = {k: torch.nn.functional.pad(v, (0, missing)) for k, v in inputs.items()}
        pairs = torch.from_numpy(batch.next_sentence_label)
        loss = self.model(**inputs, labels=labels, next_sentence_label=pairs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Packed:
    """The step of this project, without DeepSpeed around it."""

    def __init__(self, model: BertForPreTraining, sequence_length: int) -> None:
        self.model, self.sequence_length = PretrainingModel(model), sequence_length
        groups = parameter_groups(model, OptimizerConfig(), [])
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def step(self, batch: PackedBatch) -> float:
        sums = self.model(to_device(batch, torch.device("cpu"), self.sequence_length))
        loss = sums.mlm_loss / len(batch.masked_labels) + sums.nsp_loss / max(batch.num_pairs, 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def compare(
    shards: Path, shape: str, sequence_length: int, repeats: int, *, is_original: bool
) -> dict[str, float]:
    """Median seconds of both and the median ratio, over alternating steps on the same batches."""
    size = 4096 // sequence_length
    batches = batches_of(shards, sequence_length, size, repeats + 1, is_original=is_original)
    plain = Plain(bert(**SHAPES[shape]), sequence_length)
    packed = Packed(bert(**SHAPES[shape]), sequence_length)
    seconds: dict[str, list[float]] = {"plain": [], "packed": []}
    for number, batch in enumerate(batches):
        for name, one in (("plain", plain), ("packed", packed)):
            start = time.process_time()
            one.step(batch)
            if number:  # the first pair warms up
                seconds[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["packed"], strict=True)]
    tokens = sum(batch.num_tokens for batch in batches)
    return {
        "plain_seconds": statistics.median(seconds["plain"]),
        "packed_seconds": statistics.median(seconds["packed"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "fill": tokens / (len(batches) * size * sequence_length),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--original", action="store_true", help="lengths of the original pairs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32")
    print(f"{'model':<20}{'text':<12}{'length':>7}{'fill':>7}{'plain s':>9}{'ours s':>8}  ratio")
    rows = []
    for given in options.shards:
        name, _, path = given.partition("=")
        for shape in SHAPES:
            for length in (128, 512):
                row = compare(
                    Path(path), shape, length, options.repeats, is_original=options.original
                )
                rows.append({"model": shape, "text": name, "sequence_length": length} | row)
                spread = f"{row['ratio']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})"
                print(
                    f"{shape:<20}{name:<12}{length:>7}{row['fill']:>7.2f}"
                    f"{row['plain_seconds']:>9.2f}{row['packed_seconds']:>8.2f}  {spread}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
