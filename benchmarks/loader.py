"""Samples a CPU second, pairs to packing, against Megatron's BERT data set and HF's collator.

    python benchmarks/loader.py --shards DIR [--json FILE]

All read the same shard and make finished training samples of the same length. Megatron's data set
(pip install --no-deps megatron-core; left out when absent) builds padded samples with n-gram masks
from the same `.bin/.idx`; transformers' MLM collator gets samples that are already paired and only
masks and pads them. One process, one thread, CPU time; the rounds alternate.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from bert_cpt.batches import BatchShape, Loader, SampleStream
from bert_cpt.masking import MODES, Masking, mask_rule
from data_tools import open_shards
from data_tools.samples import SampleOptions
from data_tools.shards import ShardSet

BATCH = 256
Rate = Callable[[float], float]  # seconds to spend -> samples a CPU second


def timed(make: Callable[[int], int]) -> Rate:
    """Repeat `make(round)`, which returns the number of samples it made."""
    rounds = iter(range(1 << 40))
    make(next(rounds))

    def rate(seconds: float) -> float:
        start, samples = time.process_time(), 0
        while (spent := time.process_time() - start) < seconds:
            samples += make(next(rounds))
        return samples / spent

    return rate


def ours(corpus: ShardSet, length: int, masking: Masking) -> Rate:
    stream = SampleStream([corpus], [1.0], SampleOptions(length), seed=0)
    tokenizer = corpus.tokenizer
    rule = mask_rule(tokenizer, masking, 0.15)
    loader = Loader(stream, rule)
    shape = BatchShape(BATCH, 32, 1, 0)
    return timed(lambda n: sum(len(batch) for batch in loader.step(n * BATCH, shape)))


def megatron(corpus: ShardSet, length: int) -> Rate | None:
    try:
        from megatron.core.datasets import bert_dataset, indexed_dataset
        from megatron.core.datasets.utils import Split
    except ImportError:
        return None
    if not torch.distributed.is_initialized():
        store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    tokenizer = corpus.tokenizer
    names = {index: token for token, index in tokenizer.vocabulary.items()}
    config = bert_dataset.BERTMaskedWordPieceDatasetConfig(
        random_seed=0, sequence_length=length, path_to_cache=tempfile.mkdtemp(),
        split="1,0,0", masking_probability=0.15, short_sequence_probability=0.1,
        masking_max_ngram=1, masking_do_full_word=False, masking_do_permutation=False,
        masking_use_longer_ngrams=False, masking_use_geometric_distribution=False,
        classification_head=True,
        tokenizer=SimpleNamespace(
            inv_vocab=names, vocab=tokenizer.vocabulary, vocab_size=tokenizer.vocab_size,
            cls=tokenizer.cls_id, sep=tokenizer.sep_id, mask=tokenizer.mask_id,
            pad=tokenizer.pad_id, unique_identifiers={"class": "WordPiece"},
        ),
    )  # fmt: skip
    prefix = str(corpus.shards[0].prefix)
    data = indexed_dataset.IndexedDataset(prefix)
    documents = np.arange(len(data.document_indices) - 1, dtype=np.int32)
    samples = bert_dataset.BERTMaskedWordPieceDataset(
        data, prefix, documents, 100_000, Split.train, config
    )
    return timed(lambda n: len([samples[(n * 16 + k) % len(samples)] for k in range(16)]))


def collator(corpus: ShardSet, length: int) -> Rate:
    definition = str(corpus.directory / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=definition, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    stream = SampleStream([corpus], [1.0], SampleOptions(length), seed=0)
    rule = mask_rule(corpus.tokenizer, "token", 0.15)
    batch = Loader(stream, rule).samples(0, 4096)
    batch.input_ids[batch.masked_positions] = batch.masked_labels
    rows = [
        {
            "input_ids": batch.input_ids[a:b].tolist(),
            "token_type_ids": batch.token_type_ids[a:b].tolist(),
        }
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
    ]
    return timed(lambda n: len(collate(rows[n * 32 % 4096 : n * 32 % 4096 + 32])["input_ids"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus = open_shards(options.shards)
    results = []
    for length in (128, 512):
        systems: dict[str, Rate | None] = {
            f"bert-cpt, {masking} masks": ours(corpus, length, masking) for masking in MODES
        }
        systems["megatron-core BERT data set"] = megatron(corpus, length)
        systems["transformers MLM collator"] = collator(corpus, length)
        present = {name: rate for name, rate in systems.items() if rate is not None}
        rounds = [
            {name: rate(1.0) for name, rate in present.items()} for _ in range(options.rounds)
        ]
        for name in present:
            values = sorted(one[name] for one in rounds)
            row = {"length": length, "system": name, "samples_per_cpu_second": values}
            results.append(row)
            print(
                f"{length:>4} {name:<32}{statistics.median(values):>12,.0f} samples/s "
                f"({values[0]:,.0f}-{values[-1]:,.0f})",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
