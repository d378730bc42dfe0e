"""Samples in order, dealt evenly, masked and packed: from memory-mapped shards to arrays.

The n-th sample of a run is a pure function of (shards, options, seed, n): the corpus by a fixed
pattern of the weights, its epoch and place by counting, the place in the epoch by a keyed
permutation that is computed, never stored. So the state of the data is one integer, and neither the
number of ranks nor of threads changes a sample.

A batch is packed: the tokens of its samples stand back to back in one stream, without padding;
`cu_seqlens` says where each begins.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from bert_cpt.masking import MaskRule, apply_masks, choose_masks
from data_tools.errors import UserError
from data_tools.hashing import derive_key, draw, draws
from data_tools.samples import (
    RANDOM,
    Corpus,
    EpochIndex,
    SampleOptions,
    Segments,
    build_index,
    corpus_of,
    resolve,
    token_at,
)

if TYPE_CHECKING:  # the arrays need no manifest
    from data_tools.shards import Shard, ShardSet

PATTERN = 1000  # weights are rounded to 1 / PATTERN
WAIT_SECONDS = 1800  # for another rank to write the index of an epoch
PERMUTATION, SEGMENT_B, MASKS = 1, 2, 3  # streams of an epoch's key


@dataclass
class PackedBatch:
    """Samples packed into one stream of T real tokens.

    Attributes:
        input_ids, token_type_ids, position_ids: int32[T].
        cu_seqlens: int32[n + 1], where each sample begins; the last entry is T.
        masked_positions: int32[M], ascending positions in the stream.
        masked_labels: int64[M], the true ids there.
        next_sentence_label: int64[n]: 0 B follows A, 1 random, -100 no pair.
        sample_numbers: int64[n], numbers of the samples in the run.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    masked_positions: np.ndarray
    masked_labels: np.ndarray
    next_sentence_label: np.ndarray
    sample_numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.sample_numbers)

    @property
    def num_tokens(self) -> int:
        return int(self.cu_seqlens[-1])

    @property
    def num_pairs(self) -> int:
        return int((self.next_sentence_label >= 0).sum())


# --- order ----------------------------------------------------------------------------------------


@njit(cache=True)
def permute(key, positions, size):
    """Entries of a keyed permutation of [0, size): int64[n] -> int64[n].

    A four-round Feistel network on the smallest even number of bits that holds `size`, walked until
    it lands inside (Black & Rogaway 2002).
    """
    half = 1
    while (1 << (2 * half)) < size:
        half += 1
    mask = (1 << half) - 1
    result = np.empty(len(positions), np.int64)
    for n in range(len(positions)):
        value = positions[n]
        while True:
            left, right = value >> half, value & mask
            for round_number in range(4):
                mixed = np.int64(draw(draw(key, round_number), right) >> np.uint64(33)) & mask
                left, right = right, left ^ mixed
            value = (left << half) | right
            if value < size:
                break
        result[n] = value
    return result


def mixing_pattern(weights: Sequence[float]) -> np.ndarray:
    """int64[PATTERN]: the corpus of each sample, every corpus spread evenly (by its weight).

    Raises:
        UserError: a weight is so small that it would never be drawn.
    """
    shares = np.array(weights, np.float64) / sum(weights)
    counts = np.floor(shares * PATTERN).astype(np.int64)
    for largest in np.argsort(counts - shares * PATTERN, kind="stable")[: PATTERN - counts.sum()]:
        counts[largest] += 1
    if (counts == 0).any():
        k = int(np.flatnonzero(counts == 0)[0])
        share = f"weight {weights[k]} of corpus {k} is less than 1/{PATTERN} of {sum(weights)}"
        raise UserError(f"data.corpora: {share}; raise it or leave the corpus out")
    # The j-th of n samples of a corpus stands at (j + 1/2) / n of the pattern, as near as may be.
    places = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners[np.argsort(places, kind="stable")]


@dataclass
class EpochIndexes:
    """The sample indices of one corpus, epoch after epoch; at most two are kept in memory.

    With a `directory`, one process (`is_builder`) writes them and the others wait for the files.
    """

    shards: Sequence[Shard]
    is_continuation: np.ndarray
    options: SampleOptions
    seed: int
    directory: Path | None = None
    is_builder: bool = True
    num_threads: int = 1
    _starts: list[int] = field(default_factory=lambda: [0])  # first sample of each epoch
    _kept: dict[int, EpochIndex] = field(default_factory=dict)

    def epoch_of(self, position: int) -> tuple[int, int]:
        """(epoch, first sample of that epoch) of the `position`-th sample of the corpus."""
        while self._starts[-1] <= position:
            epoch = len(self._starts) - 1
            self._starts.append(self._starts[-1] + len(self.get(epoch)))
        epoch = int(np.searchsorted(self._starts, position, "right")) - 1
        return epoch, self._starts[epoch]

    def get(self, epoch: int) -> EpochIndex:
        """The index of an epoch, built or loaded."""
        if epoch not in self._kept:
            for old in [e for e in self._kept if abs(e - epoch) > 1]:
                del self._kept[old]
            self._kept[epoch] = self._build(epoch)
            if len(self._kept[epoch]) == 0:
                raise UserError(f"{self.shards[0].prefix.parent}: holds no sample")
        return self._kept[epoch]

    def _build(self, epoch: int) -> EpochIndex:
        directory = self.directory / f"epoch_{epoch:05d}" if self.directory else None
        if directory and not self.is_builder:
            wanted = [directory / f"samples_{n:05d}.npy" for n in range(len(self.shards))]
            deadline = time.monotonic() + WAIT_SECONDS
            while not all(path.exists() for path in wanted):
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{directory}: the first rank has not written the samples of epoch {epoch} "
                        f"within {WAIT_SECONDS} s; is the run directory shared by all nodes?"
                    )
                time.sleep(0.1)
        return build_index(
            self.shards, self.is_continuation, self.options, self.seed, epoch,
            directory=directory, num_threads=self.num_threads,
        )  # fmt: skip


class SampleStream:
    """The samples of a run, in order, over one or several weighted corpora."""

    def __init__(
        self,
        corpora: Sequence[ShardSet],
        weights: Sequence[float],
        options: SampleOptions,
        seed: int,
        *,
        directory: Path | None = None,
        **building: Any,
    ) -> None:
        """See `EpochIndexes` for the keyword arguments; corpora must share one tokenizer."""
        table = corpora[0].tokenizer.is_continuation
        self.seed = seed
        self.indexes = [
            EpochIndexes(
                corpus.shards, table, options, int(derive_key(seed, k, 0) >> np.uint64(1)),
                directory=directory / f"corpus_{k}" if directory else None, **building,
            )
            for k, corpus in enumerate(corpora)
        ]  # fmt: skip
        self.views = [corpus_of(corpus.shards, table) for corpus in corpora]
        self.shards = [shard for corpus in corpora for shard in corpus.shards]
        self.all_shards = corpus_of(self.shards, table)
        sizes = [len(corpus.shards) for corpus in corpora]
        self.first_shard = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.pattern = mixing_pattern(weights)
        is_of = self.pattern[None, :] == np.arange(len(corpora))[:, None]
        self.before = np.concatenate(
            [np.zeros((len(corpora), 1), np.int64), np.cumsum(is_of, axis=1)], axis=1
        )

    def corpus_counts(self, num_samples: int) -> np.ndarray:
        """int64[corpora]: how many of the first `num_samples` come from each corpus."""
        rounds, rest = divmod(num_samples, PATTERN)
        return rounds * self.before[:, -1] + self.before[:, rest]

    def take(self, first: int, count: int) -> tuple[Segments, np.ndarray]:
        """Segments and mask keys (uint64[count]) of samples `first` to `first + count` - 1."""
        owners = self.pattern[np.arange(first, first + count) % PATTERN]
        out = np.empty((7, count), np.int64)
        keys = np.empty(count, np.uint64)
        begin, end = self.corpus_counts(first), self.corpus_counts(first + count)
        for k, index in enumerate(self.indexes):
            rows = np.flatnonzero(owners == k)
            done, position = 0, int(begin[k])
            while position < end[k]:
                epoch, start = index.epoch_of(position)
                samples = index.get(epoch)
                stop = min(int(end[k]), start + len(samples))
                part = rows[done : done + stop - position]
                epoch_seed = int(derive_key(index.seed, epoch, 0) >> np.uint64(1))
                numbers = permute(
                    derive_key(epoch_seed, PERMUTATION, 0),
                    np.arange(position - start, stop - start),
                    len(samples),
                )
                key_b = derive_key(epoch_seed, SEGMENT_B, 0)
                out[:, part] = resolve(self.views[k], samples, numbers, key_b)
                out[0, part] += self.first_shard[k]
                out[3, part] += self.first_shard[k]
                keys[part] = draws(derive_key(epoch_seed, MASKS, 0), numbers)
                done += stop - position
                position = stop
        return Segments(*out), keys


# --- dealing --------------------------------------------------------------------------------------


@njit(cache=True)
def deal(lengths, num_bins):
    """Deal samples to bins of equal count so that their tokens are as equal as can be.

    In rounds of one sample a bin, longest samples first: the longest of a round goes to the bin
    with the fewest tokens so far.

    Args:
        lengths: int64[n], n a multiple of `num_bins`.

    Returns:
        int64[num_bins, n / num_bins], sample numbers in ascending order within each bin.
    """
    order = np.argsort(-lengths, kind="mergesort")
    bins = np.empty((num_bins, len(lengths) // num_bins), np.int64)
    totals = np.zeros(num_bins, np.int64)
    for number in range(bins.shape[1]):
        for rank, emptiest in enumerate(np.argsort(totals, kind="mergesort")):
            sample = order[number * num_bins + rank]
            bins[emptiest, number] = sample
            totals[emptiest] += lengths[sample]
    for number in range(num_bins):
        bins[number].sort()
    return bins


# --- packing --------------------------------------------------------------------------------------


def assemble(
    corpus: Corpus, rule: MaskRule, segments: Segments, keys: np.ndarray, sample_numbers: np.ndarray
) -> PackedBatch:
    """Gather, mask and pack samples in one pass.

    Raises:
        UserError: a token id lies outside the vocabulary (a damaged shard).
    """
    lengths = segments.sample_lengths
    total = int(lengths.sum())
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    ids, types, positions = (np.empty(total, np.int32) for _ in range(3))
    masked = np.empty(total, np.int32)
    labels = np.empty(total, np.int64)
    next_labels = np.where(segments.label <= RANDOM, segments.label, -100)
    count, bad_shard = _assemble(
        corpus, rule, segments, keys, cu_seqlens, ids, types, positions, masked, labels
    )
    if bad_shard >= 0:
        problem = f"holds a token id outside the vocabulary of {len(rule.flags)}"
        raise UserError(f"shard {bad_shard}: {problem}; it is damaged: run `bert-cpt verify`")
    return PackedBatch(
        ids, types, positions, cu_seqlens, masked[:count].copy(), labels[:count].copy(),
        next_labels, sample_numbers,
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _assemble(corpus, rule, segments, keys, cu_seqlens, ids, types, positions, masked, labels):
    """Fill the arrays; returns (masked positions, shard with a bad token id or -1)."""
    longest = 0
    for n in range(len(keys)):
        longest = max(longest, cu_seqlens[n + 1] - cu_seqlens[n])
    marks = np.zeros(longest, np.uint8)
    words = np.empty(longest + 1, np.int32)
    limit = len(rule.flags)
    count = 0
    for n in range(len(keys)):
        start = np.int64(cu_seqlens[n])
        length_a, length_b = segments.length_a[n], segments.length_b[n]
        ids[start], types[start] = rule.cls_id, 0
        at = start + 1
        for segment in range(2 if length_b > 0 else 1):
            shard, source, length = segments.shard_a[n], segments.start_a[n], length_a
            if segment:
                shard, source, length = segments.shard_b[n], segments.start_b[n], length_b
            for k in range(length):
                token = token_at(corpus, shard, source + k)
                if token < 0 or token >= limit:
                    return count, shard
                ids[at + k] = token
            ids[at + length] = rule.sep_id
            for k in range(length + 1):
                types[at + k] = segment
            at += length + 1
        size = at - start
        for k in range(size):
            positions[start + k] = k
        choose_masks(rule, ids, start, length_a, length_b, keys[n], marks, words)
        count = apply_masks(rule, ids, start, size, keys[n], marks, masked, labels, count)
    return count, -1


# --- loading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchShape:
    """How the samples of an optimizer step are dealt."""

    train_batch_size: int
    micro_batch_size: int
    world_size: int
    rank: int

    @property
    def num_bins(self) -> int:
        return self.train_batch_size // self.micro_batch_size


@dataclass
class Loader:
    """Batches of a stream for one rank."""

    stream: SampleStream
    rule: MaskRule

    def samples(self, first: int, count: int) -> PackedBatch:
        """Samples `first` to `first + count` - 1, in order, as one batch."""
        segments, keys = self.stream.take(first, count)
        return self._pack(segments, keys, np.arange(count), first)

    def step(self, first: int, shape: BatchShape) -> list[PackedBatch]:
        """The micro-batches of this rank in the optimizer step that begins at sample `first`."""
        segments, keys = self.stream.take(first, shape.train_batch_size)
        bins = deal(segments.sample_lengths, shape.num_bins)
        mine = bins[shape.rank :: shape.world_size]
        return [self._pack(segments, keys, rows, first) for rows in mine]

    def _pack(
        self, segments: Segments, keys: np.ndarray, rows: np.ndarray, first: int
    ) -> PackedBatch:
        part = Segments(*(np.ascontiguousarray(field[rows]) for field in segments))
        return assemble(self.stream.all_shards, self.rule, part, keys[rows], rows + first)

    def steps(
        self, first: int, stop: int, shape: BatchShape, prefetch: int = 2
    ) -> Iterator[list[PackedBatch]]:
        """Optimizer steps from sample `first` on, made ahead by a background thread.

        The compiled functions release the interpreter's lock, so a thread is enough.
        """
        begins = iter(range(first, stop, shape.train_batch_size))
        with ThreadPoolExecutor(1, "loader") as thread:
            ahead: deque[Future[list[PackedBatch]]] = deque()
            try:
                while True:
                    for begin in islice(begins, prefetch + 1 - len(ahead)):
                        ahead.append(thread.submit(self.step, begin, shape))
                    if not ahead:
                        return
                    yield ahead.popleft().result()
            finally:
                thread.shutdown(wait=True, cancel_futures=True)
