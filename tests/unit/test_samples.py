"""The samples of an epoch against what the module's docstring promises, checked one by one."""

import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import UserError
from data_tools.hashing import derive_key
from data_tools.samples import (
    MAX_SURPLUS,
    MIN_SEGMENT_B_TOKENS,
    MIN_SHORT_TOKENS,
    NEXT,
    NO_PAIR,
    RANDOM,
    SampleOptions,
    Segments,
    build_index,
    check_pairs_possible,
    corpus_of,
    resolve,
)
from data_tools.shards import Shard, write_shard

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "index.py"
original_procedure = runpy.run_path(str(BENCHMARK))["original_procedure"]
IS_CONTINUATION = np.arange(100) >= 80  # of a vocabulary of 100
Documents = list[list[int]]  # sentence lengths


def make_shard(path: Path, documents: Documents, *, wide: bool = False, seed: int = 0) -> Shard:
    """A shard of random tokens; every sentence begins with a word."""
    lengths = np.array([n for document in documents for n in document], np.int32)
    tokens = np.random.default_rng(seed).integers(5, 100, int(lengths.sum()))
    starts = np.cumsum(lengths) - lengths
    tokens[starts] = 5 + np.arange(len(starts)) % 70
    sentences = np.array([len(document) for document in documents], np.int64)
    write_shard(path, [(tokens, lengths, sentences)], np.dtype(np.int32 if wide else np.uint16))
    return Shard(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)  # thousands of tiny files
        yield tmp_path_factory.mktemp("samples")


def random_documents(count: int, sentences: int, tokens: int, seed: int = 0) -> Documents:
    generator = np.random.default_rng(seed)
    return [
        generator.integers(1, tokens, generator.integers(1, sentences + 1)).tolist()
        for _ in range(count)
    ]


def rows_of(array: np.ndarray) -> list[tuple[int, ...]]:
    """(sentence, offset, length of A, length of B, label) of every sample, as documented."""
    words = array.astype(np.int64)
    columns = (words[:, 0], words[:, 1] & 0xFFFF, words[:, 1] >> 16, words[:, 2] & 0xFFFF)
    return list(zip(*(c.tolist() for c in (*columns, words[:, 2] >> 16)), strict=True))


DOCUMENTS = st.lists(
    st.lists(st.integers(1, 12) | st.integers(1, 90), max_size=8)
    | st.lists(st.integers(3, 9), min_size=10, max_size=60),
    min_size=1,
    max_size=25,
).filter(any)


@settings(max_examples=200, deadline=None)
@given(
    documents=DOCUMENTS,
    length=st.integers(16, 70),
    seed=st.integers(0, 5),
    short=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_every_token_is_used_once_and_every_cut_is_where_it_should_be(
    documents: Documents, length: int, seed: int, short: float, folder: Path
) -> None:
    shard = make_shard(folder / "property", documents, seed=seed)
    options = SampleOptions(length, short_seq_prob=short)
    target = length - 3
    (array,) = build_index([shard], IS_CONTINUATION, options, seed, 0).arrays
    ends = np.cumsum(shard.sentence_lengths, dtype=np.int64)
    document_ends = np.append(0, ends)[shard.document_index[1:]]
    sentence_ends = set(ends.tolist())
    position = balance = 0
    for sentence, offset, size_a, size_b, label in rows_of(array):
        start = ends[sentence] - shard.sentence_lengths[sentence] + offset
        assert start == position
        assert 0 <= offset < shard.sentence_lengths[sentence]
        assert 0 < size_a + size_b <= target
        document_end = document_ends[np.searchsorted(document_ends, start, "right")]
        position += size_a + (size_b if label == NEXT else 0)
        assert position <= document_end
        if label == NO_PAIR:
            assert size_b == 0
            inside = range(start + 1, min(position, document_end))
            assert not sentence_ends.intersection(inside)
        else:
            assert size_b > 0
            assert start + size_a in sentence_ends
            balance += 1 if label == RANDOM else -1
        if position < document_end and IS_CONTINUATION[shard.tokens[position]]:
            taken = position - start - (size_a if label == NEXT else 0)
            assert IS_CONTINUATION[shard.tokens[position - taken // 2 : position]].all()
        elif label == NEXT and short == 0 and position < document_end:
            next_word = position + 1
            while next_word < document_end and IS_CONTINUATION[shard.tokens[next_word]]:
                next_word += 1
            assert next_word - start > target or position in sentence_ends
    assert position == len(shard.tokens)
    assert abs(balance) <= MAX_SURPLUS + 8


@settings(max_examples=100, deadline=None)
@given(documents=DOCUMENTS, length=st.integers(16, 70), seed=st.integers(0, 5))
def test_windows_for_mlm_alone_fill_the_sequence_and_use_every_token_once(
    documents: Documents, length: int, seed: int, folder: Path
) -> None:
    shard = make_shard(folder / "windows", documents, seed=seed)
    options = SampleOptions(length, short_seq_prob=0.0, is_paired=False)
    (array,) = build_index([shard], IS_CONTINUATION, options, 0, 0).arrays
    found = [(offset, size) for _, offset, size, _, label in rows_of(array) if label == NO_PAIR]
    assert len(found) == len(array)
    expected = []
    position = 0
    for document in documents:
        stop = position + sum(document)
        while position < stop:
            cut = min(position + length - 2, stop)
            while cut < stop and IS_CONTINUATION[shard.tokens[cut]]:
                cut -= 1
                if 2 * (cut - position) < length - 2:  # a word of half a sequence: cut inside
                    cut = position + length - 2
                    break
            expected.append(cut - position)
            position = cut
    assert [size for _, size in found] == expected


# --- labels and lengths over a whole epoch --------------------------------------------------------

SHAPES = {
    "long": (300, 300, 40),
    "abstracts": (6_000, 16, 50),
    "paragraphs": (20_000, 4, 60),
    "mostly_one_sentence": (40_000, 1, 40),
}


@pytest.fixture(scope="module", params=SHAPES)
def epoch(request: pytest.FixtureRequest, folder: Path) -> tuple[str, Segments, int]:
    """Segments of a shuffled corpus of one shape in two shards, at length 128."""
    count, sentences, tokens = SHAPES[request.param]
    documents = random_documents(count, sentences, tokens)
    if request.param == "mostly_one_sentence":
        documents = [d if n % 4 else [*d, 12, 30] for n, d in enumerate(documents)]
    half = len(documents) // 2
    shards = [
        make_shard(folder / f"{request.param}{n}", part, seed=n)
        for n, part in enumerate((documents[:half], documents[half:]))
    ]
    index = build_index(shards, IS_CONTINUATION, SampleOptions(128), 0, 0)
    corpus = corpus_of(shards, IS_CONTINUATION)
    segments = resolve(corpus, index, np.arange(len(index)), derive_key(0, 0, 0))
    return request.param, segments, sum(len(shard.tokens) for shard in shards)


def test_exactly_half_of_the_pairs_are_random(epoch: tuple[str, Segments, int]) -> None:
    _, segments, _ = epoch
    pairs = segments.label != NO_PAIR
    assert abs((segments.label[pairs] == RANDOM).mean() - 0.5) < 0.005


def test_no_length_tells_the_label(epoch: tuple[str, Segments, int]) -> None:
    _, segments, _ = epoch
    pairs = np.flatnonzero(segments.label != NO_PAIR)
    length_a, length_b = segments.length_a[pairs], segments.length_b[pairs]
    is_random = segments.label[pairs] == RANDOM
    cells = (length_a // 8) * 100 + (length_a + length_b) // 8
    train = np.arange(len(pairs)) % 2 == 0
    votes = np.bincount(cells[train], np.where(is_random[train], 1.0, -1.0), cells.max() + 1)
    accuracy = ((votes[cells[~train]] > 0) == is_random[~train]).mean()
    assert accuracy < 0.53


def test_no_token_is_lost_in_a_large_corpus(epoch: tuple[str, Segments, int]) -> None:
    _, segments, num_tokens = epoch
    used = segments.length_a.sum() + segments.length_b[segments.label == NEXT].sum()
    assert used == num_tokens


@pytest.mark.parametrize("name", ["long", "abstracts"])
@pytest.mark.parametrize("length", [128, 512])
def test_samples_are_better_filled_than_by_the_original_procedure(
    name: str, length: int, folder: Path
) -> None:
    documents = random_documents(*SHAPES[name])
    original = original_procedure(documents, length, seed=0)
    shards = [make_shard(folder / "filled", documents)]
    index = build_index(shards, IS_CONTINUATION, SampleOptions(length), 0, 0)
    corpus = corpus_of(shards, IS_CONTINUATION)
    segments = resolve(corpus, index, np.arange(len(index)), derive_key(0, 0, 0))
    ours = segments.length_a + segments.length_b
    assert ours.mean() > original[:, :2].sum(axis=1).mean()
    assert (original[:, 2] == RANDOM).mean() > 0.52  # its flaw


@pytest.mark.parametrize("is_paired", [True, False])
@pytest.mark.parametrize("length", [128, 129])
def test_short_lengths_are_as_frequent_as_asked_and_all_equally_likely(
    length: int, is_paired: bool, folder: Path
) -> None:
    shard = make_shard(folder / "ones", [[1] * 500_000] * 4)
    options = SampleOptions(length, short_seq_prob=0.3, is_paired=is_paired)
    (array,) = build_index([shard], np.zeros(100, np.bool_), options, 0, 0).arrays
    target = length - (3 if is_paired else 2)
    sizes = np.array([a + b for _, _, a, b, _ in rows_of(array)])
    short = sizes[(sizes < target) & (sizes >= MIN_SHORT_TOKENS)]
    count = target - MIN_SHORT_TOKENS + 1  # lengths a short sample may have, `target` among them
    assert abs(len(short) / len(sizes) - 0.3 * (count - 1) / count) < 0.01
    frequencies = np.bincount(short - MIN_SHORT_TOKENS, minlength=count - 1) / len(short)
    assert abs(frequencies * (count - 1) - 1).max() < 0.5
    assert abs((short % 2).mean() - 0.5) < 0.02


def test_lengths_labels_and_split_points_are_drawn_apart(folder: Path) -> None:
    shard = make_shard(folder / "apart", [[1] * 400_000] * 5)
    options = SampleOptions(128, short_seq_prob=0.5)
    (array,) = build_index([shard], np.zeros(100, np.bool_), options, 0, 0).arrays
    rows = np.array([row for row in rows_of(array) if row[4] != NO_PAIR], np.float64)
    total, share, label = (
        rows[:, 2] + rows[:, 3],
        rows[:, 2] / (rows[:, 2] + rows[:, 3]),
        rows[:, 4],
    )
    assert abs(np.corrcoef([total, share, label])[:2, 2]).max() < 0.02
    long = total >= 64
    assert abs(np.corrcoef(total[long], share[long])[0, 1]) < 0.06
    assert abs(np.corrcoef(total[1:], total[:-1])[0, 1]) < 0.02


def test_epochs_and_seeds_differ_and_repeat(folder: Path) -> None:
    shards = [make_shard(folder / f"many{n}", random_documents(50, 9, 30, n)) for n in range(3)]

    def index(seed: int, epoch: int, threads: int = 1) -> list[bytes]:
        options = SampleOptions(64)
        built = build_index(shards, IS_CONTINUATION, options, seed, epoch, num_threads=threads)
        return [array.tobytes() for array in built.arrays]

    assert index(0, 0) == index(0, 0, threads=3)
    assert len({tuple(index(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_an_index_is_kept_and_used_again(folder: Path) -> None:
    shards = [make_shard(folder / f"kept{n}", random_documents(50, 9, 30, n)) for n in range(2)]
    arguments: tuple[Any, ...] = (shards, IS_CONTINUATION, SampleOptions(64), 0, 0)
    in_memory = build_index(*arguments)
    written = build_index(*arguments, directory=folder / "index")
    for a, b in zip(in_memory.arrays, written.arrays, strict=True):
        assert a.tobytes() == b.tobytes()
        assert b.itemsize * b.shape[1] == 12
    before = [path.stat().st_mtime_ns for path in sorted((folder / "index").iterdir())]
    build_index(*arguments, directory=folder / "index")
    assert [path.stat().st_mtime_ns for path in sorted((folder / "index").iterdir())] == before


# --- the random segment ---------------------------------------------------------------------------


def naive_document(shards: list[Shard], shard: int, position: int) -> tuple[int, int, int]:
    """(document, first token, end) of the document that holds a token position."""
    ends = np.append(0, np.cumsum(shards[shard].sentence_lengths, dtype=np.int64))
    bounds = ends[shards[shard].document_index]
    document = int(np.searchsorted(bounds, position, "right")) - 1
    return document, int(bounds[document]), int(bounds[document + 1])


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(DOCUMENTS, min_size=1, max_size=3).filter(
        lambda parts: sum(bool(document) for part in parts for document in part) >= 2
    ),
    length=st.integers(16, 70),
    wide=st.booleans(),
)
def test_a_random_segment_is_whole_sentences_begun_in_another_document(
    parts: list[Documents], length: int, wide: bool, folder: Path
) -> None:
    shards = [
        make_shard(folder / f"random{n}", part, wide=wide, seed=n) for n, part in enumerate(parts)
    ]
    index = build_index(shards, IS_CONTINUATION, SampleOptions(length), 0, 0)
    wanted = np.concatenate([array[:, 2] & 0xFFFF for array in index.arrays]).astype(int)
    corpus = corpus_of(shards, IS_CONTINUATION)
    segments = resolve(corpus, index, np.arange(len(index)), derive_key(0, 0, 0))
    starts = [np.cumsum(s.sentence_lengths, dtype=np.int64) - s.sentence_lengths for s in shards]
    for n in range(len(index)):
        shard_a, start_a, length_a, shard_b, start_b, length_b, label = (f[n] for f in segments)
        document_a, _, end_a = naive_document(shards, shard_a, start_a)
        assert start_a + length_a <= end_a
        if label != RANDOM:
            assert (shard_b, start_b) == (shard_a, start_a + length_a)
            assert length_b == wanted[n]
            continue
        document_b, first_b, end_b = naive_document(shards, shard_b, start_b)
        assert (shard_b, document_b) != (shard_a, document_a)
        assert start_b in starts[shard_b]
        stop = start_b + length_b
        assert stop <= end_b
        assert 0 < length_b <= wanted[n]
        if stop == end_b:
            assert length_b == wanted[n] or start_b == first_b
        else:
            following = shards[shard_b].tokens[stop : start_b + wanted[n]]
            assert IS_CONTINUATION[following[1:]].all()
            if IS_CONTINUATION[shards[shard_b].tokens[stop]]:
                assert length_b == wanted[n]


def test_random_segments_are_drawn_over_the_whole_corpus_by_sentence(folder: Path) -> None:
    documents = [[10] * 20] * 30 + [[10] * 40] * 30
    shards = [make_shard(folder / f"whole{n}", documents, seed=n) for n in range(3)]
    index = build_index(shards, IS_CONTINUATION, SampleOptions(48), 0, 0)
    counts: Counter[tuple[int, int]] = Counter()
    corpus = corpus_of(shards, IS_CONTINUATION)
    for epoch in range(10):
        drawn = resolve(corpus, index, np.arange(len(index)), derive_key(epoch, 0, 0))
        for n in np.flatnonzero(drawn.label == RANDOM):
            document, _, _ = naive_document(shards, drawn.shard_b[n], drawn.start_b[n])
            counts[(int(drawn.shard_b[n]), document)] += 1
    total = sum(counts.values())
    for shard in range(3):
        for document, sentences in enumerate(documents):
            expected = total * len(sentences) / (3 * 30 * 60)
            assert abs(counts[(shard, document)] - expected) < 6 * expected**0.5


def test_a_corpus_that_is_nearly_one_document_still_gives_random_segments(folder: Path) -> None:
    shards = [make_shard(folder / "giant", [[], [10] * 20_000, [], [7], []])]
    index = build_index(shards, IS_CONTINUATION, SampleOptions(64), 0, 0)
    corpus = corpus_of(shards, IS_CONTINUATION)
    drawn = resolve(corpus, index, np.arange(len(index)), derive_key(0, 0, 0))
    others = drawn.start_b[(drawn.label == RANDOM) & (drawn.start_a < 200_000)]
    assert len(others) > 1_000
    assert (others == 200_000).all()


def test_a_sample_does_not_depend_on_the_batch_it_is_resolved_in(folder: Path) -> None:
    shards = [make_shard(folder / f"batch{n}", random_documents(99, 9, 30, n)) for n in range(2)]
    index = build_index(shards, IS_CONTINUATION, SampleOptions(64), 0, 0)
    corpus, key = corpus_of(shards, IS_CONTINUATION), derive_key(0, 0, 0)
    whole = np.array(resolve(corpus, index, np.arange(len(index)), key))
    order = np.random.default_rng(0).permutation(len(index))
    for part in np.array_split(order, 7):
        assert (np.array(resolve(corpus, index, part, key)) == whole[:, part]).all()
    other = np.array(resolve(corpus, index, np.arange(len(index)), derive_key(0, 1, 0)))
    is_random = whole[6] == RANDOM
    assert (other[:, ~is_random] == whole[:, ~is_random]).all()
    assert (other[4, is_random] != whole[4, is_random]).mean() > 0.9


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[5, 5, 5]], r"holds 1 document\(s\) with text; NSP needs at least two"),
        ([[5], [6], [7]], "every document has one sentence"),
        ([[5, 5], [], []], "holds 1 document"),
    ],
)
def test_pairs_that_cannot_be_formed_are_a_clear_error(
    documents: Documents, message: str, folder: Path
) -> None:
    shard = make_shard(folder / "few", documents)
    with pytest.raises(UserError, match=message):
        check_pairs_possible([shard], "corpus")
    check_pairs_possible([make_shard(folder / "enough", [[5, 5], [5]])], "corpus")


def test_a_sentence_too_long_for_the_index_is_a_clear_error(folder: Path) -> None:
    shard = make_shard(folder / "endless", [[70_000], [5]])
    with pytest.raises(UserError, match="a sentence of 70000 tokens"):
        build_index([shard], IS_CONTINUATION, SampleOptions(128), 0, 0)


def test_segments_of_b_are_not_tiny_where_there_is_a_choice(
    epoch: tuple[str, Segments, int],
) -> None:
    _, segments, _ = epoch
    pairs = segments.label != NO_PAIR
    assert (segments.length_b[pairs] < MIN_SEGMENT_B_TOKENS).mean() < 0.12
