"""Example samples of a corpus, decoded for people to look at."""

from typing import Any

import numpy as np

from bert_cpt.batches import Loader, PackedBatch, SampleStream
from bert_cpt.masking import mask_rule
from data_tools.samples import SampleOptions, problem_of_pairs
from data_tools.shards import ShardSet
from data_tools.tokenizer import BulkTokenizer

LABELS = {0: "B follows A", 1: "B is random", -100: "no pair"}


def example_pairs(corpus: ShardSet, count: int, sequence_length: int = 128) -> list[dict[str, Any]]:
    """The first samples of a run with seed 0, with masks as a model sees them.

    Returns:
        label, text (masked words shown as [MASK] or what replaces them), and what was masked.
    """
    options = SampleOptions(sequence_length, is_paired=not problem_of_pairs(corpus.shards))
    stream = SampleStream([corpus], [1.0], options, seed=0)
    tokenizer = corpus.tokenizer
    loader = Loader(stream, mask_rule(tokenizer, "token", 0.15))
    batch = loader.samples(0, min(count, len(stream.indexes[0].get(0))))
    return [_example(batch, tokenizer, n) for n in range(len(batch.next_sentence_label))]


def _example(batch: PackedBatch, tokenizer: BulkTokenizer, number: int) -> dict[str, Any]:
    start, stop = (int(x) for x in batch.cu_seqlens[number : number + 2])
    inside = (batch.masked_positions >= start) & (batch.masked_positions < stop)
    original = tokenizer.decode(batch.masked_labels[inside])
    return {
        "label": LABELS[int(batch.next_sentence_label[number])],
        "num_tokens": stop - start,
        "num_masked": int(np.count_nonzero(inside)),
        "text": tokenizer.decode(batch.input_ids[start:stop]),
        "masked": original,
    }
