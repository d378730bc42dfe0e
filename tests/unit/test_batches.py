"""Order, mixing, dealing, packing: a sample is a function of its number, whatever the run is."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_cpt.batches import (
    PATTERN,
    BatchShape,
    Loader,
    PackedBatch,
    SampleStream,
    deal,
    mixing_pattern,
    permute,
)
from bert_cpt.masking import mask_rule
from data_tools import open_shards, write_shards
from data_tools.errors import UserError
from data_tools.hashing import derive_key
from data_tools.samples import SampleOptions
from data_tools.shards import ShardSet
from tests.conftest import generated_documents

OPTIONS = SampleOptions(64)


@pytest.fixture(scope="module")
def corpus(tiny_shards: Path) -> ShardSet:
    return open_shards(tiny_shards)


@pytest.fixture(scope="module")
def second_corpus(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    directory = tmp_path_factory.mktemp("second") / "shards"
    write_shards(generated_documents(50, seed=5), directory, tokenizer=tiny_checkpoint)
    return open_shards(directory)


def loader_of(*corpora: ShardSet, seed: int = 3, weights: tuple[float, ...] = (1.0,)) -> Loader:
    stream = SampleStream(corpora, weights, OPTIONS, seed)
    tokenizer = corpora[0].tokenizer
    rule = mask_rule(tokenizer, "token", 0.15)
    return Loader(stream, rule)


def rows_of(batch: PackedBatch) -> dict[int, tuple[object, ...]]:
    """Everything about each sample, by its number."""
    rows = {}
    for n, number in enumerate(batch.sample_numbers.tolist()):
        start, stop = batch.cu_seqlens[n : n + 2]
        inside = (batch.masked_positions >= start) & (batch.masked_positions < stop)
        rows[number] = (
            batch.input_ids[start:stop].tolist(),
            batch.token_type_ids[start:stop].tolist(),
            batch.position_ids[start:stop].tolist(),
            (batch.masked_positions[inside] - start).tolist(),
            batch.masked_labels[inside].tolist(),
            int(batch.next_sentence_label[n]),
        )
    return rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**60))
def test_the_order_of_an_epoch_is_a_permutation(size: int, seed: int) -> None:
    order = permute(derive_key(seed, 0, 0), np.arange(size), size)
    assert sorted(order.tolist()) == list(range(size))


def test_the_permutation_looks_random() -> None:
    size = 10_000
    order = permute(derive_key(1, 0, 0), np.arange(size), size)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.05
    assert (np.abs(np.diff(order)) == 1).mean() < 0.01
    other = permute(derive_key(2, 0, 0), np.arange(size), size)
    assert (order == other).mean() < 0.01


@pytest.mark.parametrize("weights", [[1.0], [9.0, 1.0], [0.5, 0.3, 0.2], [1.0, 1.0, 1.0]])
def test_mixing_is_exact_and_even(weights: list[float]) -> None:
    pattern = mixing_pattern(weights)
    assert len(pattern) == PATTERN
    shares = np.array(weights) / sum(weights)
    counts = np.bincount(pattern, minlength=len(weights))
    assert np.abs(counts - shares * PATTERN).max() < 1
    for k, share in enumerate(shares):
        seen = np.cumsum(pattern == k)
        assert np.abs(seen - share * np.arange(1, PATTERN + 1)).max() <= 2, "no clumps"


def test_a_weight_too_small_to_be_drawn_is_an_error() -> None:
    with pytest.raises(UserError, match="less than 1/1000"):
        mixing_pattern([1.0, 1e-5])


def test_every_batch_holds_its_share_of_each_corpus(
    corpus: ShardSet, second_corpus: ShardSet
) -> None:
    stream = SampleStream([corpus, second_corpus], [3.0, 1.0], OPTIONS, 0)
    first_of_second = stream.first_shard[1]
    for first in (0, 64, 640):
        segments, _ = stream.take(first, 64)
        assert abs(int((segments.shard_a >= first_of_second).sum()) - 16) <= 1
        is_second = segments.shard_a >= first_of_second
        assert ((segments.shard_b >= first_of_second) == is_second).all(), "B from the same corpus"


def test_an_epoch_shows_every_token_once_and_the_next_one_other_pairs(corpus: ShardSet) -> None:
    stream = SampleStream([corpus], [1.0], OPTIONS, 1)
    size = len(stream.indexes[0].get(0))
    segments, _ = stream.take(0, size)
    is_next = segments.label == 0
    primary = int(segments.length_a.sum() + segments.length_b[is_next].sum())
    assert primary == corpus.manifest.num_tokens
    again, _ = stream.take(size, size)
    overlap = set(zip(segments.start_a, segments.length_a, strict=True)) & set(
        zip(again.start_a, again.length_a, strict=True)
    )
    assert len(overlap) < size / 2
    assert stream.indexes[0].epoch_of(size + 1)[0] == 1


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (2, 4), (4, 2), (1, 16)])
def test_ranks_and_micro_batches_never_change_a_sample(
    corpus: ShardSet, second_corpus: ShardSet, world_size: int, micro: int
) -> None:
    loader = loader_of(corpus, second_corpus, weights=(2.0, 1.0))
    expected = rows_of(loader.samples(32, 16))
    found: dict[int, tuple[object, ...]] = {}
    for rank in range(world_size):
        for batch in loader.step(32, BatchShape(16, micro, world_size, rank)):
            assert len(batch.sample_numbers) == micro
            rows = rows_of(batch)
            assert not found.keys() & rows.keys()
            found |= rows
    assert found == expected


def test_a_stream_can_be_entered_anywhere(corpus: ShardSet) -> None:
    whole = rows_of(loader_of(corpus).samples(0, 300))
    late = rows_of(loader_of(corpus).samples(250, 50))
    assert {number: whole[number] for number in late} == late


def test_the_background_thread_yields_the_same_steps_and_stops_when_dropped(
    corpus: ShardSet,
) -> None:
    loader, shape = loader_of(corpus), BatchShape(16, 4, 1, 0)
    steps = loader.steps(0, 64, shape)
    for number, batches in enumerate(steps):
        expected = loader.step(16 * number, shape)
        assert [rows_of(b) for b in batches] == [rows_of(b) for b in expected]
    assert number == 3
    endless = loader.steps(0, 1 << 40, shape)
    next(endless)
    endless.close()


def test_an_error_in_the_background_reaches_the_consumer(
    corpus: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(corpus)
    monkeypatch.setattr(loader.stream, "take", lambda first, count: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(loader.steps(0, 64, BatchShape(16, 4, 1, 0)))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 2**32))
def test_dealing_uses_every_sample_once_in_bins_of_equal_count(
    num_bins: int, size: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(3, 512, num_bins * size)
    bins = deal(lengths, num_bins)
    assert sorted(bins.ravel().tolist()) == list(range(num_bins * size))
    assert (np.diff(bins, axis=1) > 0).all()


@pytest.mark.parametrize(("sequence_length", "limit"), [(128, 0.02), (512, 0.05)])
def test_ranks_get_equally_many_tokens(
    corpus: ShardSet, sequence_length: int, limit: float
) -> None:
    stream = SampleStream([corpus], [1.0], SampleOptions(sequence_length), 0)
    for first in range(0, 4 * 256, 256):
        lengths = stream.take(first, 256)[0].sample_lengths
        totals = lengths[deal(lengths, 8)].sum(axis=1)
        assert totals.max() / totals.mean() - 1 < limit


def test_a_packed_batch_is_laid_out_as_bert_expects(corpus: ShardSet) -> None:
    loader = loader_of(corpus)
    tokenizer = corpus.tokenizer
    segments, _ = loader.stream.take(0, 64)
    batch = loader.samples(0, 64)
    restored = batch.input_ids.copy()
    restored[batch.masked_positions] = batch.masked_labels
    for n in range(64):
        start, stop = batch.cu_seqlens[n : n + 2]
        ids = restored[start:stop].tolist()
        shard = corpus.shards[segments.shard_a[n]]
        begin, size = segments.start_a[n], segments.length_a[n]
        a = shard.tokens[begin : begin + size].tolist()
        expected = [tokenizer.cls_id, *a, tokenizer.sep_id]
        types = [0] * len(expected)
        if segments.length_b[n]:
            shard = corpus.shards[segments.shard_b[n]]
            begin, size = segments.start_b[n], segments.length_b[n]
            b = shard.tokens[begin : begin + size].tolist()
            expected += [*b, tokenizer.sep_id]
            types += [1] * (len(b) + 1)
        assert ids == expected
        assert batch.token_type_ids[start:stop].tolist() == types
        assert batch.position_ids[start:stop].tolist() == list(range(len(expected)))
        assert len(expected) <= 64


def test_the_index_on_disk_gives_the_same_samples_and_is_written_once(
    corpus: ShardSet, tmp_path: Path
) -> None:
    in_memory = SampleStream([corpus], [1.0], OPTIONS, 3).take(0, 100)
    for is_builder in (True, False):
        stream = SampleStream(
            [corpus], [1.0], OPTIONS, 3, directory=tmp_path, is_builder=is_builder
        )
        on_disk = stream.take(0, 100)
        assert all((a == b).all() for a, b in zip(in_memory[0], on_disk[0], strict=True))
        assert (in_memory[1] == on_disk[1]).all()


def test_a_token_id_outside_the_vocabulary_names_the_damage(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "shards"
    write_shards(generated_documents(20), directory, tokenizer=tiny_checkpoint)
    path = directory / "shard_00000.bin"
    data = bytearray(path.read_bytes())
    data[1::2] = b"\xff" * len(data[1::2])
    path.write_bytes(data)
    with pytest.raises(UserError, match="outside the vocabulary"):
        loader_of(open_shards(directory)).samples(0, 16)
