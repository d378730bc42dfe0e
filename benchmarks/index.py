"""The pair index: samples per second and core, fill, share of random pairs, and what lengths tell.

    python benchmarks/index.py CORPUS_DIR [--copies 20]

CORPUS_DIR holds `pubmed_ccby_train.txt.gz` (articles) and `pubmed_abstracts_train.txt.gz`. The
speed is measured on COPIES copies of the articles, so large that fixed costs vanish; it is the best
of five epochs, in CPU time. Fill, share and the guess are measured on the corpora themselves, ours
against the procedure of the original BERT.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MIN_SHORT = 2


def original_procedure(
    documents: Sequence[Sequence[int]], sequence_length: int, seed: int, short_seq_prob: float = 0.1
) -> np.ndarray:
    """Pairs as the original BERT makes them (Devlin et al. 2019), on sentence lengths alone.

    Returns:
        int64[n, 3]: length of A, of B, and 1 for a random B.
    """
    generator = random.Random(seed)
    longest = sequence_length - 3
    pairs = []
    for number, document in enumerate(documents):
        target = longest
        if generator.random() < short_seq_prob:
            target = generator.randint(MIN_SHORT, longest)
        at = 0
        chunk: list[int] = []
        while at < len(document):
            chunk.append(document[at])
            at += 1
            if at < len(document) and sum(chunk) < target:
                continue
            split = generator.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
            length_a = sum(chunk[:split])
            is_random = len(chunk) == 1 or generator.random() < 0.5
            if is_random:
                at -= len(chunk) - split  # B's sentences are put back
                length_b = _random_segment(documents, number, target - length_a, generator)
            else:
                length_b = sum(chunk[split:])
            while length_a + length_b > longest:  # one token at a time, from the longer
                length_a, length_b = (
                    (length_a - 1, length_b) if length_a > length_b else (length_a, length_b - 1)
                )
            pairs.append((length_a, length_b, int(is_random)))
            chunk = []
    return np.array(pairs)


def _random_segment(
    documents: Sequence[Sequence[int]], own: int, wanted: int, generator: random.Random
) -> int:
    """Length of whole sentences of another document, from a random one on."""
    other = own
    for _ in range(10):
        other = generator.randrange(len(documents))
        if other != own and documents[other]:
            break
    length = 0
    for sentence in documents[other][generator.randrange(len(documents[other])) :]:
        length += sentence
        if length >= wanted:
            break
    return length
