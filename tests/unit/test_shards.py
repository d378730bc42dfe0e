"""The byte layout against a naive reader and Megatron's own; damage; adopted data sets."""

import os
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_tools import UserError, open_shards, write_shards
from data_tools.shards import Shard, read_manifest, write_shard
from data_tools.tokenizer import load_tokenizer
from launcher.cli import app
from tests.conftest import generated_documents

Corpus = list[list[list[int]]]  # documents of sentences of ids


def naive_read(prefix: Path) -> Corpus:
    """Read PREFIX.bin and .idx by the documented offsets, with `struct` alone."""
    index = prefix.with_name(prefix.name + ".idx").read_bytes()
    data = prefix.with_name(prefix.name + ".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    (version,) = struct.unpack_from("<Q", index, 9)
    assert version == 1
    code = index[17]
    kind, size = {4: ("i", 4), 8: ("H", 2)}[code]
    num_sentences, num_bounds = struct.unpack_from("<QQ", index, 18)
    lengths = struct.unpack_from(f"<{num_sentences}i", index, 34)
    offsets = struct.unpack_from(f"<{num_sentences}q", index, 34 + 4 * num_sentences)
    bounds = struct.unpack_from(f"<{num_bounds}q", index, 34 + 12 * num_sentences)
    assert len(index) == 34 + 12 * num_sentences + 8 * num_bounds
    assert len(data) == size * sum(lengths)
    sentences = [
        list(struct.unpack_from(f"<{length}{kind}", data, offset))
        for length, offset in zip(lengths, offsets, strict=True)
    ]
    return [sentences[a:b] for a, b in pairwise(bounds)]


def write(prefix: Path, corpus: Corpus, dtype: type = np.uint16) -> None:
    run = (
        np.array([i for document in corpus for s in document for i in s], dtype),
        np.array([len(s) for document in corpus for s in document], np.int32),
        np.array([len(document) for document in corpus], np.int64),
    )
    write_shard(prefix, [run], np.dtype(dtype))


CORPORA = st.lists(
    st.lists(st.lists(st.integers(0, 65_535), min_size=1, max_size=5), max_size=4), max_size=8
)


@settings(max_examples=60, deadline=None)
@given(corpus=CORPORA, wide=st.booleans())
def test_a_naive_reader_finds_what_was_written(
    corpus: Corpus, wide: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = tmp_path_factory.getbasetemp() / "shard"
    write(prefix, corpus, np.int32 if wide else np.uint16)
    assert naive_read(prefix) == corpus
    shard = Shard(prefix)
    shard.check_structure()
    found = [shard.sentence(n).tolist() for n in range(shard.num_sentences)]
    assert found == [sentence for document in corpus for sentence in document]
    assert shard.num_documents == len(corpus)


def test_runs_of_documents_are_joined(tmp_path: Path) -> None:
    runs = [
        (np.array([1, 2, 3]), np.array([1, 2]), np.array([2])),
        (np.array([4]), np.array([1]), np.array([1])),
    ]
    record = write_shard(tmp_path / "a", runs, np.dtype(np.uint16))
    assert naive_read(tmp_path / "a") == [[[1], [2, 3]], [[4]]]
    assert (record.num_documents, record.num_sentences, record.num_tokens) == (2, 3, 4)


def test_megatron_core_reads_our_shards(tiny_shards: Path) -> None:
    indexed_dataset = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset",
        reason="needs `pip install --no-deps megatron-core` (and torch)",
    )
    (record,) = read_manifest(tiny_shards).shards
    prefix = tiny_shards / record.name
    theirs = indexed_dataset.IndexedDataset(str(prefix))
    sentences = [sentence for document in naive_read(prefix) for sentence in document]
    assert len(theirs) == record.num_sentences
    assert all(theirs[n].tolist() == sentence for n, sentence in enumerate(sentences))
    assert theirs.document_indices.tolist() == Shard(prefix).document_index.tolist()


def test_megatron_core_writes_what_we_read(tmp_path: Path) -> None:
    indexed_dataset = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset",
        reason="needs `pip install --no-deps megatron-core` (and torch)",
    )
    import torch

    corpus = [[[1, 2, 3], [4]], [[5, 6]]]
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for document in corpus:
        for sentence in document:
            builder.add_item(torch.tensor(sentence))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    assert naive_read(tmp_path / "a") == corpus
    write(tmp_path / "b", corpus)
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / (name + suffix) for name in "ba")
        assert ours.read_bytes() == theirs.read_bytes()


# --- damage ---------------------------------------------------------------------------------------

DAMAGES = {
    "no_bin": lambda bin_, idx: (None, idx),
    "no_idx": lambda bin_, idx: (bin_, None),
    "short_bin": lambda bin_, idx: (bin_[:-1], idx),
    "long_bin": lambda bin_, idx: (bin_ + b"\0\0", idx),
    "empty_bin": lambda bin_, idx: (b"", idx),
    "short_idx": lambda bin_, idx: (bin_, idx[:-3]),
    "empty_idx": lambda bin_, idx: (bin_, b""),
    "header_alone": lambda bin_, idx: (bin_, idx[:34]),
    "magic": lambda bin_, idx: (bin_, b"X" + idx[1:]),
    "version": lambda bin_, idx: (bin_, idx[:9] + b"\2" + idx[10:]),
    "dtype": lambda bin_, idx: (bin_, idx[:17] + b"\6" + idx[18:]),
    "too_many": lambda bin_, idx: (bin_, idx[:18] + b"\xff" * 8 + idx[26:]),
    "length": lambda bin_, idx: (bin_, idx[:34] + b"\0\0\0\0" + idx[38:]),
    "negative_length": lambda bin_, idx: (bin_, idx[:34] + b"\xff" * 4 + idx[38:]),
    "offset": lambda bin_, idx: (bin_, idx[:50] + b"\7" + idx[51:]),
    "document": lambda bin_, idx: (bin_, idx[:-16] + b"\x63" + idx[-15:]),
    "last_document": lambda bin_, idx: (bin_, idx[:-8] + b"\1" + idx[-7:]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_a_clear_error_that_names_the_file(name: str, tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2], [3]], [[4]], [[5]]])
    contents = DAMAGES[name]((tmp_path / "a.bin").read_bytes(), (tmp_path / "a.idx").read_bytes())
    for suffix, content in zip((".bin", ".idx"), contents, strict=True):
        path = tmp_path / f"a{suffix}"
        path.unlink() if content is None else path.write_bytes(content)

    def read() -> None:
        Shard(tmp_path / "a").check_structure()

    with pytest.raises(UserError, match=f"{tmp_path}/a"):
        read()


def test_every_flipped_byte_of_an_index_is_found_or_harmless(tmp_path: Path) -> None:
    corpus = [[[1, 2], [3]], [[4]], [[5]]]
    write(tmp_path / "a", corpus)
    whole = (tmp_path / "a.idx").read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        (tmp_path / "a.idx").write_bytes(damaged)
        try:
            shard = Shard(tmp_path / "a")
            shard.check_structure()
        except UserError:
            continue
        sizes = [len(shard.sentence(n)) for n in range(shard.num_sentences)]
        assert sum(sizes) == len(shard.tokens)
        assert (np.diff(shard.document_index) >= 0).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no manifest.json"),
        (b"{", "not a manifest"),
        (b"\xff", "not a manifest"),
        (b"{}", "not a manifest"),
        (b'"name": "shard_00000"', b'"name": "../shard_00000"'),
        (b'"version": 1', b'"version": 7'),
        (b'"num_tokens"', b'"num_tokens_"'),
    ],
)
def test_a_bad_manifest_is_a_clear_error(
    content: bytes | None, message: str | bytes, tiny_shards: Path, tmp_path: Path
) -> None:
    good = (tiny_shards / "manifest.json").read_bytes()
    if isinstance(message, bytes):
        assert content is not None
        assert content in good
        content, message = good.replace(content, message), "manifest|version 7"
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_shards(tmp_path)


def test_a_manifest_of_other_shards_is_a_clear_error(tiny_shards: Path, tmp_path: Path) -> None:
    for path in tiny_shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write(tmp_path / "shard_00000", [[[1, 2]], [[3]]])
    with pytest.raises(UserError, match="do not belong together"):
        open_shards(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        open_shards(tmp_path / "nowhere")
    (tmp_path / "half" / ".build").mkdir(parents=True)
    with pytest.raises(UserError, match="run the same `bert-cpt shard` command again"):
        open_shards(tmp_path / "half")


# --- adopted data sets ----------------------------------------------------------------------------


def adopt(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["shard", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def megatron_set(tiny_tokenizer: Path, tmp_path: Path) -> Path:
    """PREFIX of a data set without a manifest."""
    documents = generated_documents(40)
    write_shards(documents, tmp_path / "ours", tokenizer=tiny_tokenizer)
    (tmp_path / "data").mkdir()
    prefix = tmp_path / "data" / "my-corpus_text_sentence"
    for suffix in (".bin", ".idx"):
        source = tmp_path / "ours" / f"shard_00000{suffix}"
        prefix.with_name(prefix.name + suffix).write_bytes(source.read_bytes())
    return prefix


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_a_megatron_data_set_is_adopted_in_place(
    suffix: str, megatron_set: Path, tiny_tokenizer: Path
) -> None:
    code, output = adopt("--adopt", f"{megatron_set}{suffix}", "--tokenizer", tiny_tokenizer)
    assert code == 0
    assert "40 documents" in output
    assert "[CLS]" not in output
    corpus = open_shards(megatron_set.parent)
    assert corpus.manifest.num_documents == 40
    assert not corpus.manifest.has_special_tokens
    assert corpus.tokenizer.identity == load_tokenizer(tiny_tokenizer).identity
    code, output = adopt("--adopt", megatron_set, "--tokenizer", tiny_tokenizer)
    assert code == 2
    assert "holds a manifest.json already" in output
    assert CliRunner().invoke(app, ["verify", str(megatron_set.parent)]).exit_code == 0


def test_several_data_sets_are_adopted_into_one_directory(
    megatron_set: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "second set_text_sentence"
    write(other, [[[30, 31], [32]], [[33]]])
    arguments = ("--adopt", megatron_set, "--adopt", other, "--tokenizer", tiny_tokenizer)
    code, output = adopt(*arguments)
    assert code == 2
    assert "several directories; give --output" in output
    os.chmod(other.parent, 0o555)
    code, output = adopt(*arguments, "--output", tmp_path / "adopted")
    assert code == 0
    corpus = open_shards(tmp_path / "adopted")
    assert corpus.manifest.num_documents == 42
    assert corpus.shards[1].sentence(0).tolist() == [30, 31]
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "adopted")]).exit_code == 0


def test_special_tokens_round_sentences_are_announced(tiny_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    write(tmp_path / "a", [[[cls, 30, sep], [cls, 31, sep]], [[cls, 32, sep]]])
    code, output = adopt("--adopt", tmp_path / "a", "--tokenizer", tiny_tokenizer)
    assert code == 0
    assert "its sentences hold [CLS] or [SEP]" in output
    assert open_shards(tmp_path).manifest.has_special_tokens
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path), "--samples", "0"])
    assert "WARNING: the sentences hold [CLS] or [SEP]" in shown.stdout


@pytest.mark.parametrize(
    ("corpus", "dtype", "message"),
    [
        ([[[60_000]]], np.uint16, "holds token ids from 0 to 60000, but the tokenizer has"),
        ([[[-1, 5]]], np.int32, "or made with another --tokenizer"),
        ([[[5] * 70_000]], np.uint16, "a sentence of 70000 tokens"),
    ],
)
def test_a_data_set_of_another_tokenizer_is_refused(
    corpus: Corpus, dtype: type, message: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    write(tmp_path / "a", corpus, dtype)
    code, output = adopt("--adopt", tmp_path / "a", "--tokenizer", tiny_tokenizer)
    assert code == 2
    assert message in output
    assert not (tmp_path / "manifest.json").exists()


def test_a_missing_or_damaged_data_set_is_refused(
    megatron_set: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    code, output = adopt("--adopt", tmp_path / "nowhere", "--tokenizer", tiny_tokenizer)
    assert code == 2
    assert "nowhere.idx: missing" in output
    path = megatron_set.with_name(megatron_set.name + ".bin")
    path.write_bytes(path.read_bytes()[:-2])
    code, output = adopt("--adopt", megatron_set, "--tokenizer", tiny_tokenizer)
    assert code == 2
    assert "truncated or damaged" in output
