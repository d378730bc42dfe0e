"""The samples of an epoch: sentence pairs for NSP, windows for MLM alone.

The procedure is that of the original BERT (Devlin et al. 2019; google-research/bert,
create_pretraining_data): walk through a document, fill up to a target length (now and then a
shorter one), divide what was taken into A and B at a sentence end, and half the time put B's
sentences back and take B from another document. Where it differs, and why:

- A sample takes exactly its target length; what a cut leaves over begins the next sample, so no
  token is lost. A cut falls between words. The point between A and B is always a sentence end.
- Exactly half of the pairs are random. The original makes every lone sentence at the end of a
  document the A of a random pair (54.5 %); here free choices pay that back, within classes of equal
  length of A and of the pair, and a lone sentence gets the length of a pair seen before. So neither
  length tells the label, which in the original they do: most of all in short documents.
- A stretch without a sentence end inside (a sentence longer than the sequence) becomes a window
  without a next-sentence label.
- Random segments are drawn by sentence over the whole corpus, and begin early enough to be filled
  when their document is long enough.

The index of an epoch stores 12 bytes a sample, uint32[3]:

    word 0   sentence, in its shard, where A begins
    word 1   low half: token offset of A in that sentence; high half: length of A in tokens
    word 2   low half: length of B (wanted length, if random); high half: 0 next, 1 random, 2 none

A next B follows A; a random B is drawn when the sample is resolved, from (seed, epoch, sample).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from data_tools.errors import UserError
from data_tools.files import write_aside
from data_tools.hashing import derive_key, draw
from data_tools.shards import Shard

NEXT, RANDOM, NO_PAIR = 0, 1, 2
MIN_SHORT_TOKENS = 8
MIN_SEGMENT_B_TOKENS = 8  # where there is a choice
CLASSES = 16  # of lengths, within which the labels are balanced
MANY = 2  # more random pairs than true ones in a class, and the next free choice is a true one
MAX_SURPLUS = 16  # of random pairs, before lone sentences go without a pair
FILLED_DRAWS = 4  # documents tried for a B of full length


class Corpus(NamedTuple):
    """What the compiled functions see of a list of shards: addresses and sizes.

    The arrays that the addresses point to are kept alive by the `Shard` objects.
    """

    tokens: np.ndarray  # int64[n], addresses
    offsets: np.ndarray
    documents: np.ndarray
    num_sentences: np.ndarray  # int64[n]
    num_documents: np.ndarray
    num_tokens: np.ndarray
    first_sentence: np.ndarray  # int64[n + 1], running total
    is_continuation: np.ndarray  # bool[vocab_size]
    is_wide: bool  # int32 tokens, else uint16


def corpus_of(shards: Sequence[Shard], is_continuation: np.ndarray) -> Corpus:
    """The compiled view of shards that share one dtype."""
    assert len({shard.dtype for shard in shards}) == 1, "shards of one corpus share a dtype"
    sentences = np.array([shard.num_sentences for shard in shards], np.int64)
    return Corpus(
        tokens=_addresses([shard.tokens for shard in shards]),
        offsets=_addresses([shard.sentence_offsets for shard in shards]),
        documents=_addresses([shard.document_index for shard in shards]),
        num_sentences=sentences,
        num_documents=np.array([shard.num_documents for shard in shards], np.int64),
        num_tokens=np.array([len(shard.tokens) for shard in shards], np.int64),
        first_sentence=np.concatenate([np.zeros(1, np.int64), np.cumsum(sentences)]),
        is_continuation=is_continuation,
        is_wide=shards[0].dtype.itemsize == 4,
    )


def _addresses(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([array.ctypes.data for array in arrays], np.int64)


@dataclass(frozen=True)
class SampleOptions:
    """What decides the samples of an epoch, besides shards, seed and epoch number.

    Attributes:
        sequence_length: tokens of a sample with its special tokens.
        short_seq_prob: probability of a shorter target length.
        is_paired: NSP pairs; else one segment, for MLM alone.
    """

    sequence_length: int
    short_seq_prob: float = 0.1
    is_paired: bool = True


class EpochIndex:
    """The samples of one epoch over a list of shards; `len()` is their number.

    Attributes:
        arrays: uint32[n, 3] per shard (see the module's docstring).
        starts: int64[shards + 1], running total of samples.
    """

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays = arrays
        sizes = [len(array) for array in arrays]
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
        self.addresses = _addresses(arrays)

    def __len__(self) -> int:
        return int(self.starts[-1])


def problem_of_pairs(shards: Sequence[Shard]) -> str:
    """Why no true or no random pair can be formed, and what to do; empty if both can."""
    num_documents = sum(int((np.diff(shard.document_index) > 0).sum()) for shard in shards)
    if num_documents < 2:
        return (
            f"holds {num_documents} document(s) with text; NSP needs at least two, to take a "
            f"random second segment from another one: separate documents by blank lines, or train "
            f"with objective.nsp=false"
        )
    if not any((np.diff(shard.document_index) > 1).any() for shard in shards):
        return (
            "every document has one sentence; NSP needs a sentence that follows another: check "
            "--format and the splitter, or train with objective.nsp=false"
        )
    return ""


def check_pairs_possible(shards: Sequence[Shard], name: str) -> None:
    """Raise UserError if no true or no random pair can be formed."""
    if problem := problem_of_pairs(shards):
        raise UserError(f"{name}: {problem}")


def build_index(
    shards: Sequence[Shard],
    is_continuation: np.ndarray,
    options: SampleOptions,
    seed: int,
    epoch: int,
    *,
    directory: Path | None = None,
    num_threads: int = 1,
) -> EpochIndex:
    """The index of an epoch, a pure function of (shards, options, seed, epoch).

    Args:
        directory: where to keep the arrays, memory-mapped, one file a shard; None keeps them in
            memory. A file that is there is used: give each (options, seed, epoch) its own.

    Raises:
        UserError: a shard's index is damaged, or a sentence is longer than 65,535 tokens.
    """

    def of_shard(number: int) -> np.ndarray:
        path = directory / f"samples_{number:05d}.npy" if directory else None
        if path and path.exists():
            return np.load(path, mmap_mode="r")
        array = _shard_index(shards[number], number, is_continuation, options, seed, epoch)
        if path is None:
            return array
        with write_aside(path) as file:
            np.save(file, array)
        return np.load(path, mmap_mode="r")

    if directory:
        directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(num_threads) as pool:  # the compiled functions release the lock
        return EpochIndex(list(pool.map(of_shard, range(len(shards)))))


def _shard_index(
    shard: Shard,
    number: int,
    is_continuation: np.ndarray,
    options: SampleOptions,
    seed: int,
    epoch: int,
) -> np.ndarray:
    shard.check_structure()
    num_special = 3 if options.is_paired else 2
    target = options.sequence_length - num_special
    bound = shard.num_sentences + shard.num_documents + 2 * len(shard.tokens) // target + 1
    out = np.empty((bound, 3), np.uint32)
    key = derive_key(seed, epoch, number)
    short = int(options.short_seq_prob * 65536)
    count = _walk(
        shard.tokens, shard.sentence_lengths, shard.document_index, is_continuation,
        target, short, options.is_paired, key, out,
    )  # fmt: skip
    return out[:count]


@njit(cache=True, inline="always")
def _target_length(bits, target, short):
    """The target length of a sample: with probability short / 65536 a shorter one."""
    if np.int64(bits & np.uint64(0xFFFF)) >= short or target <= MIN_SHORT_TOKENS:
        return target
    span = np.uint64(target - MIN_SHORT_TOKENS + 1)
    return MIN_SHORT_TOKENS + np.int64((((bits >> np.uint64(16)) & np.uint64(0xFFFF)) * span) >> 16)


def _prefetch_at_address(typing_context, address):
    """Fetch a cache line; unlike a load, nothing waits for it."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [pointer, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


_prefetch_address: Any = intrinsic(_prefetch_at_address)


@njit(cache=True, inline="always")
def _prefetch(tokens, position):
    """Where the next cut will be: waiting for its tokens took more than half of the time."""
    _prefetch_address(tokens.ctypes.data + position * tokens.itemsize)


@njit(cache=True, inline="always")
def _word_start(tokens, is_continuation, start, stop):
    """The last position in (start, stop] where a word begins; `stop` if half the way has none."""
    position = stop
    while is_continuation[tokens[position]]:
        position -= 1
        if 2 * (position - start) < stop - start:
            return stop
    return position


@njit(cache=True, inline="always")
def _scaled(bits, count):
    """A number in [0, count) from 16 of the bits of a sample."""
    return np.int64((((bits >> np.uint64(32)) & np.uint64(0xFFFF)) * np.uint64(count)) >> 16)


@njit(cache=True, nogil=True)
def _walk(tokens, lengths, documents, is_continuation, target, short, is_paired, key, out):
    """The samples of a shard, as the module's docstring describes them; returns their number."""
    ends = np.empty(target + 1, np.int64)  # sentence ends inside the window, from its beginning
    # Random pairs less true ones, overall and in classes of length of A and length of the pair.
    overall = 0
    surplus = np.zeros((CLASSES, CLASSES), np.int64)
    totals = np.zeros((CLASSES, CLASSES), np.int64)  # the last pair's length of each class
    count = 0
    position = 0
    for document in range(len(documents) - 1):
        sentence = documents[document]
        left = 0
        for s in range(sentence, documents[document + 1]):
            left += lengths[s]
        offset = 0
        while left > 0:
            bits = draw(key, count)
            wanted = _target_length(bits, target, short)
            window = min(wanted, left)
            num_ends = 0
            s = sentence
            end = lengths[s] - offset
            while is_paired:
                if end < window:
                    ends[num_ends] = end
                    num_ends += 1
                    s += 1
                    end += lengths[s]
                elif num_ends == 0 and window < left and wanted < target:
                    wanted = target  # too short for a sentence end: try the full length
                    window = min(wanted, left)
                else:
                    break
            label = NO_PAIR
            size_a = window
            size_b = 0
            total = window
            row, column = 0, 0
            if num_ends > 0:
                while num_ends > 1 and window - ends[num_ends - 1] < MIN_SEGMENT_B_TOKENS:
                    num_ends -= 1
                size_a = ends[_scaled(bits, num_ends)]
                row = size_a * CLASSES // (target + 1)
                column = window * CLASSES // (target + 1)
                totals[row, column] = window
                balance = surplus[row, column]
                label = NEXT if bits >> np.uint64(63) else RANDOM
                if balance >= MANY or (overall >= 2 * MANY and balance >= 0):
                    label = NEXT
                elif balance <= -MANY or (overall <= -2 * MANY and balance <= 0):
                    label = RANDOM
                _prefetch(tokens, position + (window if label == NEXT else size_a) + target)
            elif is_paired and window == left and overall < MAX_SURPLUS:
                # A lone sentence: the longest pair that is not too often random, if it has a B.
                row = left * CLASSES // (target + 1)
                least = MAX_SURPLUS
                for k in range(CLASSES - 1, row - 1, -1):
                    is_longer = totals[row, k] >= left + MIN_SEGMENT_B_TOKENS
                    if is_longer and least >= MANY and surplus[row, k] < least:
                        label = RANDOM
                        least = surplus[row, k]
                        column = k
                        total = totals[row, k]
            if label == NEXT:
                stop = window
                if window < left and end > window:  # inside a sentence
                    begin = position + size_a
                    stop = _word_start(tokens, is_continuation, begin, position + window) - position
                size_b = stop - size_a
                surplus[row, column] -= 1
                overall -= 1
            elif label == RANDOM:
                size_b = total - size_a
                surplus[row, column] += 1
                overall += 1
            elif window < left:
                size_a = _word_start(tokens, is_continuation, position, position + window)
                size_a -= position
            out[count, 0] = sentence
            out[count, 1] = np.uint32(offset) | (np.uint32(size_a) << np.uint32(16))
            out[count, 2] = np.uint32(size_b) | (np.uint32(label) << np.uint32(16))
            count += 1
            taken = size_a + size_b if label == NEXT else size_a
            position += taken
            left -= taken
            offset += taken
            while left > 0 and offset >= lengths[sentence]:
                offset -= lengths[sentence]
                sentence += 1
        # Documents may have no sentence at all; `sentence` starts afresh with the next one.
    return count


# --- resolving ------------------------------------------------------------------------------------


class Segments(NamedTuple):
    """Where the tokens of some samples lie, int64[n] each; lengths in tokens.

    `label` is 0 for a true pair, 1 for a random one, 2 for none (then length_b is 0).
    """

    shard_a: np.ndarray
    start_a: np.ndarray
    length_a: np.ndarray
    shard_b: np.ndarray
    start_b: np.ndarray
    length_b: np.ndarray
    label: np.ndarray

    @property
    def sample_lengths(self) -> np.ndarray:
        """int64[n]: tokens of each sample with its special tokens."""
        return self.length_a + self.length_b + 2 + (self.length_b > 0)


def resolve(corpus: Corpus, index: EpochIndex, samples: np.ndarray, key: np.uint64) -> Segments:
    """Where the tokens of the given samples lie; random segments are drawn here.

    Args:
        samples: int64[n], sample numbers in [0, len(index)).
        key: of the epoch, from (seed, epoch); the draws of a sample depend on (key, sample) alone.
    """
    out = np.empty((7, len(samples)), np.int64)
    _resolve(corpus, index.addresses, index.starts, samples, key, out)
    return Segments(*out)


def _address_to_pointer(typing_context, address):
    """A void pointer from an int64 address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


_pointer: Any = intrinsic(_address_to_pointer)


@njit(cache=True, inline="always")
def token_at(corpus, shard, position):
    """Token id at a position of a shard."""
    if corpus.is_wide:
        return np.int64(carray(_pointer(corpus.tokens[shard]), (1 << 40,), np.int32)[position])
    return np.int64(carray(_pointer(corpus.tokens[shard]), (1 << 40,), np.uint16)[position])


@njit(cache=True, inline="always")
def _sentence_start(corpus, shard, sentence):
    """Token position at which a sentence begins."""
    offset = carray(_pointer(corpus.offsets[shard]), (1 << 40,), np.int64)[sentence]
    return offset >> 2 if corpus.is_wide else offset >> 1


@njit(cache=True, inline="always")
def _last_at_most(values, item):
    """The last k with values[k] <= item, for ascending values of which the first is so."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        if values[middle] <= item:
            low = middle
        else:
            high = middle
    return low


@njit(cache=True)
def _document_of(corpus, shard, sentence):
    """(first sentence, end) of the document that holds a sentence."""
    size = corpus.num_documents[shard] + 1
    documents = carray(_pointer(corpus.documents[shard]), (size,), np.int64)
    document = _last_at_most(documents, sentence)
    return documents[document], documents[document + 1]


@njit(cache=True, nogil=True)
def _resolve(corpus, index_addresses, index_starts, samples, key, out):
    for n in range(len(samples)):
        sample = samples[n]
        shard = _last_at_most(index_starts, sample)
        row = sample - index_starts[shard]
        words = carray(_pointer(index_addresses[shard]), (1 << 40,), np.uint32)
        sentence = np.int64(words[3 * row])
        second, third = np.int64(words[3 * row + 1]), np.int64(words[3 * row + 2])
        start = _sentence_start(corpus, shard, sentence) + (second & 0xFFFF)
        length_a, length_b, label = second >> 16, third & 0xFFFF, third >> 16
        out[0, n] = shard
        out[1, n] = start
        out[2, n] = length_a
        out[3, n] = shard
        out[4, n] = start + length_a
        out[5, n] = length_b
        out[6, n] = label
        if label != RANDOM:
            continue
        sample_key = draw(key, sample)
        own, own_end = _document_of(corpus, shard, sentence)
        own_size, own = own_end - own, own + corpus.first_sentence[shard]
        best = -1
        for attempt in range(FILLED_DRAWS):
            bits = draw(sample_key, attempt)
            drawn = np.int64(bits % np.uint64(corpus.first_sentence[-1] - own_size))
            if drawn >= own:
                drawn += own_size
            shard_b = _last_at_most(corpus.first_sentence, drawn)
            begin = drawn - corpus.first_sentence[shard_b]
            first, last = _document_of(corpus, shard_b, begin)
            final = corpus.num_tokens[shard_b]
            if last < corpus.num_sentences[shard_b]:
                final = _sentence_start(corpus, shard_b, last)
            start_b = _sentence_start(corpus, shard_b, begin)
            while final - start_b < length_b and begin > first:
                begin -= 1
                start_b = _sentence_start(corpus, shard_b, begin)
            available = min(final - start_b, length_b)
            if available > best:
                best = available
                out[3, n] = shard_b
                out[4, n] = start_b
                stop = start_b + available
                if stop < final:
                    at = stop
                    while at > start_b and corpus.is_continuation[token_at(corpus, shard_b, at)]:
                        at -= 1
                    if 2 * (at - start_b) > available:
                        stop = at
                out[5, n] = stop - start_b
            if available == length_b:
                break
