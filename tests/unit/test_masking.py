"""Masks: what is chosen, what replaces it, and that nothing else changes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_cpt.masking import CONTINUATION, MODES, SPECIAL, MaskRule, apply_masks, choose_masks

CLS, SEP, MASK, UNK, FIRST_WORD, VOCABULARY = 1, 2, 3, 4, 10, 200
FIRST_PIECE = 150  # ids from here on continue a word


def rule(mode: str, probability: float = 0.15) -> MaskRule:
    flags = np.zeros(VOCABULARY, np.uint8)
    flags[[0, CLS, SEP, MASK, UNK]] = SPECIAL
    flags[FIRST_PIECE:] = CONTINUATION
    replacements = np.arange(FIRST_WORD, VOCABULARY, dtype=np.int32)
    return MaskRule(MODES[mode], probability, MASK, CLS, SEP, flags, replacements)


def mask(
    mode: str, segment_a: list[int], segment_b: list[int], key: int, probability: float = 0.15
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(original ids, masked ids, positions, labels) of one sample that begins at position 5."""
    ids = [CLS, *segment_a, SEP] + ([*segment_b, SEP] if segment_b else [])
    start = 5
    stream = np.array([0] * start + ids, np.int32)
    original = stream.copy()
    marks, words = np.zeros(len(ids), np.uint8), np.zeros(len(ids) + 1, np.int32)
    positions, labels = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int64)
    the_rule = rule(mode, probability)
    a, b = len(segment_a), len(segment_b)
    choose_masks(the_rule, stream, start, a, b, np.uint64(key), marks, words)
    count = apply_masks(
        the_rule, stream, start, len(ids), np.uint64(key), marks, positions, labels, 0
    )
    assert not marks.any(), "the scratch array is left clean for the next sample"
    return original, stream, positions[:count], labels[:count]


tokens = st.integers(FIRST_WORD, VOCABULARY - 1) | st.just(UNK)
segments = st.lists(tokens, min_size=1, max_size=60)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(MODES)), segments, segments | st.just([]), st.integers(0, 2**63))
def test_only_ordinary_tokens_are_masked_and_labels_are_the_originals(
    mode: str, segment_a: list[int], segment_b: list[int], key: int
) -> None:
    original, masked, positions, labels = mask(mode, segment_a, segment_b, key)
    assert (np.diff(positions) > 0).all()
    assert (labels == original[positions]).all()
    assert not np.isin(original[positions], [0, CLS, SEP, MASK, UNK]).any()
    assert not np.isin(masked[positions], [0, CLS, SEP, UNK]).any()
    untouched = np.ones(len(original), bool)
    untouched[positions] = False
    assert (masked[untouched] == original[untouched]).all()


@settings(max_examples=200, deadline=None)
@given(segments, segments, st.integers(0, 2**63), st.floats(0.01, 0.9))
def test_token_masks_are_the_rounded_share_and_at_least_one(
    segment_a: list[int], segment_b: list[int], key: int, probability: float
) -> None:
    _, _, positions, _ = mask("token", segment_a, segment_b, key, probability)
    candidates = sum(token != UNK for token in segment_a + segment_b)
    expected = 0 if candidates == 0 else max(1, int(probability * candidates + 0.5))
    assert len(positions) == expected


def words_of(segment: list[int], first: int) -> list[list[int]]:
    """Positions of each whole word; a segment always begins a word."""
    words: list[list[int]] = []
    for offset, token in enumerate(segment):
        if offset == 0 or token < FIRST_PIECE:
            words.append([])
        words[-1].append(first + offset)
    return words


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["whole_word", "span"]), segments, segments, st.integers(0, 2**63))
def test_whole_word_and_span_masks_take_whole_words(
    mode: str, segment_a: list[int], segment_b: list[int], key: int
) -> None:
    _, _, positions, _ = mask(mode, segment_a, segment_b, key)
    chosen = set(positions.tolist())
    words = words_of(segment_a, 6) + words_of(segment_b, 7 + len(segment_a))
    for word in words:
        assert chosen >= set(word) or not chosen & set(word)


def test_a_leading_piece_of_b_is_not_joined_to_the_last_word_of_a() -> None:
    taken = Counter()
    for key in range(400):
        _, _, positions, _ = mask("whole_word", [20], [160, 30, 31, 32, 33, 34, 35], key, 0.13)
        taken[tuple(positions.tolist())] += 1
    assert all(not {6, 8} <= set(positions) for positions in taken), "6 is A, 8 the piece of B"
    assert {(6,), (8,)} <= set(taken)


@pytest.mark.parametrize("mode", ["token", "whole_word"])
def test_every_position_is_chosen_equally_often(mode: str) -> None:
    counts: Counter[int] = Counter()
    trials = 8000
    for key in range(trials):
        _, _, positions, _ = mask(mode, list(range(20, 40)), list(range(40, 60)), key)
        counts.update(positions.tolist())
    expected = trials * 6 / 40
    assert len(counts) == 40
    for count in counts.values():
        assert abs(count - expected) < 5 * np.sqrt(expected)


def test_replacements_are_80_10_10() -> None:
    kinds: Counter[str] = Counter()
    drawn: Counter[int] = Counter()
    for key in range(3000):
        _, masked, positions, labels = mask("token", [20] * 60, [21] * 60, key)
        for at, label in zip(positions, labels, strict=True):
            if masked[at] == MASK:
                kinds["mask"] += 1
            elif masked[at] == label:
                kinds["same"] += 1
            else:
                kinds["random"] += 1
                drawn[int(masked[at])] += 1
    total = kinds.total()
    assert kinds["mask"] / total == pytest.approx(0.8, abs=0.01)
    assert kinds["random"] / total == pytest.approx(0.1, abs=0.01)
    assert kinds["same"] / total == pytest.approx(0.1, abs=0.01)
    assert min(drawn) >= FIRST_WORD
    assert len(drawn) > 180, "replacements come from the whole ordinary vocabulary"


def test_tokens_of_a_span_share_one_decision() -> None:
    is_mask = []
    for key in range(500):
        _, masked, positions, _ = mask("span", list(range(20, 120)), [30] * 30, key, 0.08)
        breaks = np.flatnonzero(np.diff(positions) > 1) + 1
        is_mask += [set((masked[run] == MASK).tolist()) for run in np.split(positions, breaks)]
    # Two spans may stand side by side, so a few runs mix decisions.
    assert np.mean([len(decisions) == 1 for decisions in is_mask]) > 0.9
    assert np.mean([len(decisions) == 1 and True in decisions for decisions in is_mask]) > 0.7


def test_masks_depend_on_the_key_alone() -> None:
    same = [mask("token", list(range(20, 90)), [21], 7)[2].tolist() for _ in range(2)]
    other = mask("token", list(range(20, 90)), [21], 8)[2].tolist()
    assert same[0] == same[1] != other
