"""MLM masks: single tokens, whole words, spans of words.

A masked position is replaced by [MASK] 80 % of the time, by a random token 10 %, and left as it is
10 % (Devlin et al. 2019). Special tokens, [UNK] among them, are never masked and never inserted.
Every draw is a hash of the sample's key: masks depend on (seed, epoch, sample) alone.

All functions are compiled and work on one sample inside a larger array; see `batches.assemble`.
"""

from typing import Literal, NamedTuple

import numpy as np
from numba import njit

from data_tools.hashing import below, draw
from data_tools.tokenizer import BulkTokenizer

Masking = Literal["token", "whole_word", "span"]
MODES: dict[Masking, int] = {"token": 0, "whole_word": 1, "span": 2}
CONTINUATION, SPECIAL = np.uint8(1), np.uint8(2)
SPAN_STOP = 0.2  # a span ends after each word with this probability (Joshi et al. 2020)
MAX_SPAN_WORDS = 10
MAX_SPAN_DRAWS = 200


class MaskRule(NamedTuple):
    """What decides the masks of a sample, besides its tokens and its key."""

    mode: int
    probability: float
    mask_id: int
    cls_id: int
    sep_id: int
    flags: np.ndarray  # uint8[vocab_size]: CONTINUATION, SPECIAL
    replacements: np.ndarray  # int32[n], ids that may replace a token


def mask_rule(tokenizer: BulkTokenizer, masking: Masking, probability: float) -> MaskRule:
    """The rule for a tokenizer."""
    flags = np.where(tokenizer.is_continuation, CONTINUATION, np.uint8(0))
    flags[list(tokenizer.special_ids)] |= SPECIAL
    return MaskRule(
        MODES[masking], probability, tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id,
        flags, tokenizer.replacement_ids,
    )  # fmt: skip


@njit(cache=True, inline="always")
def mask_budget(rule, num_maskable):
    """How many tokens of a sample are masked: the rounded share, at least one."""
    if num_maskable == 0:
        return 0
    return max(1, int(rule.probability * num_maskable + 0.5))


@njit(cache=True, inline="always")
def _corrupted(rule, token, choice_bits, replacement_bits):
    """What stands at a masked position: [MASK], a random token, or the token itself."""
    choice = below(choice_bits, 10)
    if choice < 8:
        return np.int64(rule.mask_id)
    if choice == 8:
        return np.int64(rule.replacements[below(replacement_bits, len(rule.replacements))])
    return np.int64(token)


@njit(cache=True)
def choose_masks(rule, ids, start, length_a, length_b, key, marks, words):
    """Choose the masked positions of one sample.

    Args:
        ids: the token array; A's tokens begin at `start` + 1, B's one [SEP] after them.
        marks: uint8[>= sample length], zero; on return 1 at chosen positions relative to `start`,
            and above 1 where a span shares one decision (its number + 1).
        words: int32[>= sample length + 1], scratch.

    Returns:
        The number of chosen positions.
    """
    candidates = 0
    if rule.mode == 0:
        stop_a, begin_b = 1 + length_a, 2 + length_a
        for at in range(1, begin_b + length_b):
            if (at < stop_a or at >= begin_b) and not (rule.flags[ids[start + at]] & SPECIAL):
                words[candidates] = at
                candidates += 1
        budget = mask_budget(rule, candidates)
        for rank in range(candidates - budget, candidates):  # Floyd 1987: a uniform subset
            drawn = words[below(draw(key, rank), rank + 1)]
            if marks[drawn]:
                drawn = words[rank]
            marks[drawn] = 1
        return budget
    num_words, candidates = _find_words(rule, ids, start, length_a, length_b, words)
    budget = mask_budget(rule, candidates)
    if rule.mode == 1:
        return _mark_words(words, num_words, budget, key, marks)
    return _mark_spans(words, num_words, budget, key, marks)


@njit(cache=True)
def _find_words(rule, ids, start, length_a, length_b, words):
    """Beginnings of words as position * 512 + length; a word never spans two segments.

    Words are numbered in order; a word with a special token is left out. Returns the number of
    words and of their tokens.
    """
    num_words, num_tokens = 0, 0
    for segment in range(2):
        at = 1 if segment == 0 else 2 + length_a
        stop = at + (length_a if segment == 0 else length_b)
        while at < stop:
            end = at + 1
            special = rule.flags[ids[start + at]] & SPECIAL
            while end < stop and rule.flags[ids[start + end]] & CONTINUATION:
                end += 1
            if not special:
                words[num_words] = at * 512 + (end - at)
                num_words += 1
                num_tokens += end - at
            at = end
    return num_words, num_tokens


@njit(cache=True)
def _mark_words(words, num_words, budget, key, marks):
    """Whole words in random order, each taken if it still fits the budget."""
    chosen = 0
    for rank in range(num_words):
        if chosen >= budget:
            break
        other = rank + below(draw(key, rank), num_words - rank)
        words[rank], words[other] = words[other], words[rank]
        position, size = words[rank] // 512, words[rank] % 512
        if chosen + size <= budget or (chosen == 0 and rank == num_words - 1):
            for at in range(position, position + size):
                marks[at] = 1
            chosen += size
    return chosen


@njit(cache=True)
def _mark_spans(words, num_words, budget, key, marks):
    """Spans of whole neighbouring words of geometric length (SpanBERT)."""
    chosen, spans, counter = 0, 0, 0
    for _ in range(MAX_SPAN_DRAWS):
        if chosen >= budget or num_words == 0:
            break
        size = 1
        while size < MAX_SPAN_WORDS and below(draw(key, counter), 1000) >= SPAN_STOP * 1000:
            size += 1
            counter += 1
        first = below(draw(key, counter + 1), num_words)
        counter += 2
        began = False
        for rank in range(first, min(num_words, first + size)):
            position, length = words[rank] // 512, words[rank] % 512
            is_neighbour = rank == first or (
                words[rank - 1] // 512 + words[rank - 1] % 512 == position
            )
            fits = chosen + length <= budget or chosen == 0
            if marks[position] or not is_neighbour or not fits:
                break
            if not began:
                began = True
                spans = spans % 254 + 1
            for at in range(position, position + length):
                marks[at] = spans + 1 if spans < 255 else 1
            chosen += length
    return chosen


@njit(cache=True)
def apply_masks(rule, ids, start, length, key, marks, positions, labels, count):
    """Corrupt the marked tokens of a sample, record their positions and true ids, clear `marks`.

    Returns:
        The number of masked positions recorded so far.
    """
    key = draw(key, 1 << 20)  # not the stream that chose the positions
    for at in range(length):
        mark = marks[at]
        if mark:
            marks[at] = 0
            token = ids[start + at]
            positions[count] = start + at
            labels[count] = token
            decision = draw(key, 2 * at) if mark == 1 else draw(key, (1 << 20) + mark)
            ids[start + at] = _corrupted(rule, token, decision, draw(key, 2 * at + 1))
            count += 1
    return count
