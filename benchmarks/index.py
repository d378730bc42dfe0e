"""The pair index: samples per second and core, fill, share of random pairs, and what lengths tell.

    python benchmarks/index.py CORPUS_DIR TOKENIZER_DIR [--copies 20] [--rounds 5] [--json FILE]

CORPUS_DIR holds `pubmed_ccby_train.txt.gz` (articles) and `pubmed_abstracts_train.txt.gz`. The
speed is measured on COPIES copies of the articles, so large that fixed costs vanish, in CPU time
of one thread; every round is an epoch of its own. Megatron's C++ `build_mapping` runs in between on
the same shard (`pip install --no-deps megatron-core`; left out when it is absent).
Fill, share of random pairs and the guess are measured on the corpora themselves, ours against the
procedure of the original BERT. The guess is the AUC of the log-odds of a random pair in cells of
(length of A, length of the pair), counted on one epoch and scored on the next: 50 % means that the
lengths tell nothing.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_tools.build import BuildOptions, build
from data_tools.hashing import derive_key
from data_tools.samples import NO_PAIR, RANDOM, SampleOptions, build_index, corpus_of, resolve
from data_tools.shards import Shard, ShardSet, open_shards, write_shard
from data_tools.tokenizer import load_tokenizer

MIN_SHORT = 2
CORPORA = {"articles": "pubmed_ccby_train.txt.gz", "abstracts": "pubmed_abstracts_train.txt.gz"}
LENGTHS = (128, 512)
CELL = 8  # tokens


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


# --- speed ----------------------------------------------------------------------------------------


def samples_per_cpu_second(make: Callable[[int], int], number: int) -> float:
    start = time.process_time()
    count = make(number)
    return count / (time.process_time() - start)


def ours(shard: Shard, is_continuation: np.ndarray, length: int) -> Callable[[int], int]:
    options = SampleOptions(length)
    return lambda epoch: len(build_index([shard], is_continuation, options, 0, epoch))


def megatron(shard: Shard, length: int) -> Callable[[int], int] | None:
    try:
        from megatron.core.datasets import helpers_cpp
    except ImportError:
        return None
    arguments = (shard.document_index, shard.sentence_lengths, 1, 1 << 40, length - 3, 0.1)
    return lambda seed: len(helpers_cpp.build_mapping(*arguments, seed + 1, False, 2))


def speed(corpus: ShardSet, copies: int, rounds: int, work: Path) -> list[dict]:
    run = corpus.shards[0].documents(0, corpus.shards[0].num_documents)
    write_shard(work / "copies", [run] * copies, corpus.shards[0].dtype)
    shard = Shard(work / "copies")
    rows = []
    for length in LENGTHS:
        systems = {
            "bert-cpt": ours(shard, corpus.tokenizer.is_continuation, length),
            "Megatron build_mapping": megatron(shard, length),
        }
        present = {name: make for name, make in systems.items() if make}
        for make in present.values():
            make(0)  # compiles, and touches the pages
        rates: dict[str, list[float]] = {name: [] for name in present}
        for number in range(1, rounds + 1):
            for name, make in present.items():
                rates[name].append(samples_per_cpu_second(make, number))
        for name, found in rates.items():
            print(
                f"{length:4d} {name:<24}{statistics.median(found) / 1e6:6.1f} M samples/s "
                f"({min(found) / 1e6:.1f}-{max(found) / 1e6:.1f})",
                flush=True,
            )
            rows.append({"length": length, "system": name, "samples_per_cpu_second": found})
    return rows


# --- what the samples are like --------------------------------------------------------------------


def auc(seen: np.ndarray, pairs: np.ndarray) -> float:
    """Of guessing the labels of (length of A, length of B, is random) rows from those of `seen`."""
    size = 1_000_000
    counts = [np.bincount(cells_of(seen[seen[:, 2] == n]), minlength=size) for n in (0, 1)]
    scores = (np.log(counts[1] + 1) - np.log(counts[0] + 1))[cells_of(pairs)]
    _, rank, number = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(number) - (number - 1) / 2)[rank]
    is_random = pairs[:, 2] == 1
    num_random = int(is_random.sum())
    least = num_random * (num_random + 1) / 2
    return float((ranks[is_random].sum() - least) / (num_random * (~is_random).sum()))


def cells_of(pairs: np.ndarray) -> np.ndarray:
    return pairs[:, 0] // CELL * 1000 + (pairs[:, 0] + pairs[:, 1]) // CELL


def our_pairs(corpus: ShardSet, length: int, seed: int) -> tuple[np.ndarray, float]:
    """(length of A, of B, is random) of the pairs of an epoch, and the fill over all samples."""
    table = corpus.tokenizer.is_continuation
    index = build_index(corpus.shards, table, SampleOptions(length), seed, 0)
    view = corpus_of(corpus.shards, table)
    found = resolve(view, index, np.arange(len(index)), derive_key(seed, 0, 0))
    sizes = found.length_a + found.length_b + 2 + (found.length_b > 0)
    is_pair = found.label != NO_PAIR
    rows = np.stack([found.length_a, found.length_b, found.label == RANDOM], axis=1)
    return rows[is_pair], float(sizes.mean() / length)


def original_pairs(corpus: ShardSet, length: int, seed: int) -> tuple[np.ndarray, float]:
    documents = [
        shard.sentence_lengths[first:last].tolist()
        for shard in corpus.shards
        for first, last in zip(shard.document_index[:-1], shard.document_index[1:], strict=True)
    ]
    rows = original_procedure(documents, length, seed)
    return rows, float((rows[:, :2].sum(axis=1).mean() + 3) / length)


def quality(name: str, corpus: ShardSet, rounds: int) -> list[dict]:
    rows = []
    for length in LENGTHS:
        for system, make in (("original", original_pairs), ("bert-cpt", our_pairs)):
            found = [make(corpus, length, seed) for seed in range(rounds + 1)]
            fills = [fill for _, fill in found]
            shares = [float(pairs[:, 2].mean()) for pairs, _ in found]
            guesses = [auc(a, b) for (a, _), (b, _) in itertools.pairwise(found)]
            print(
                f"{name:<10}{length:4d} {system:<10} fill {spread(fills)} %, random "
                f"{spread(shares)} %, AUC of the lengths {spread(guesses)} %",
                flush=True,
            )
            row = {"corpus": name, "length": length, "system": system}
            rows.append(row | {"fill": fills, "random": shares, "auc": guesses})
    return rows


def spread(values: list[float]) -> str:
    return (
        f"{100 * statistics.median(values):.2f} ({100 * min(values):.2f}-{100 * max(values):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.tokenizer)
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, file in CORPORA.items():
            build([str(given.corpus / file)], work / name, tokenizer, "benchmark", BuildOptions())
        results["speed"] = speed(open_shards(work / "articles"), given.copies, given.rounds, work)
        results["samples"] = [
            row for name in CORPORA for row in quality(name, open_shards(work / name), given.rounds)
        ]
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
