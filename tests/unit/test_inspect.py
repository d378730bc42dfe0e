"""`inspect` against counting by hand, `verify` against every kind of damage."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from data_tools import inspect as module
from data_tools import open_shards, write_shards
from data_tools.inspect import statistics
from data_tools.tokenizer import load_tokenizer
from launcher.cli import app
from tests.conftest import generated_documents


@pytest.fixture(scope="module")
def corpus(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with some [UNK] and one-sentence documents."""
    documents = [*generated_documents(300), ["Lulu ~ dodo."], ["~"]]
    directory = tmp_path_factory.mktemp("inspect") / "shards"
    write_shards(documents, directory, tokenizer=tiny_tokenizer)
    return directory


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_statistics_are_those_counted_by_hand(corpus: Path, tiny_tokenizer: Path) -> None:
    documents = [*generated_documents(300), ["Lulu ~ dodo."], ["~"]]
    tokenizer = load_tokenizer(tiny_tokenizer)
    encoded = [
        [e.tokens for e in tokenizer.reference.encode_batch(document)] for document in documents
    ]
    tokens = [t for document in encoded for sentence in document for t in sentence]
    words: list[str] = []
    for token in tokens:
        if token.startswith("##"):
            words[-1] += token[2:]
        else:
            words.append(token)
    found = statistics(open_shards(corpus))
    assert found["num_documents"] == 302
    assert found["num_tokens"] == found["counted_tokens"] == len(tokens)
    assert found["one_sentence_documents"] == 2
    assert found["unknown_share"] == pytest.approx(tokens.count("[UNK]") / len(tokens))
    assert found["pieces_per_word"] == pytest.approx(len(tokens) / len(words))
    counts = Counter(words)
    assert [n for _, n in found["frequent_words"]] == [n for _, n in counts.most_common(20)]
    assert all(counts[word] == n for word, n in found["frequent_words"])
    lengths = [len(sentence) for document in encoded for sentence in document]
    assert found["sentence_tokens"]["max"] == max(lengths)
    assert found["sentence_tokens"]["mean"] == pytest.approx(np.mean(lengths), abs=0.01)
    assert found["sentence_tokens"]["bins"]["10-19"] == sum(10 <= n < 20 for n in lengths)
    assert sum(found["sentence_tokens"]["bins"].values()) == len(lengths)
    sizes = [sum(map(len, document)) for document in encoded]
    assert found["document_tokens"]["bins"]["128-255"] == sum(128 <= n < 256 for n in sizes)
    for length in ("128", "512"):
        samples = found["samples"][length]
        assert 0 < samples["fill"] <= 1
        assert abs(samples["random_share"] - 0.5) < 0.05
        assert samples["samples_per_epoch"] >= 302


def test_samples_of_a_large_corpus_are_estimated(
    corpus: Path, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_tools.build import BuildOptions, build

    lines = [json.dumps({"text": document}) + "\n" for document in generated_documents(900)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    tokenizer = load_tokenizer(tiny_tokenizer)
    options = BuildOptions(shard_tokens=10_000)
    build([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer, "tiny", options)
    shards = open_shards(tmp_path / "out")
    assert len(shards.shards) > 5
    whole = statistics(shards)["samples"]["128"]
    monkeypatch.setattr(module, "INDEXED_TOKENS", 15_000)
    part = statistics(shards)["samples"]["128"]
    assert part["samples_per_epoch"] == pytest.approx(whole["samples_per_epoch"], rel=0.05)
    assert part["samples_per_epoch"] != whole["samples_per_epoch"]


def test_inspect_shows_bars_words_and_example_pairs_with_masks(corpus: Path) -> None:
    result = run("inspect", corpus, "--samples", 4)
    assert result.exit_code == 0
    assert "302 documents" in result.stdout
    assert "####" in result.stdout
    assert "most frequent words: " in result.stdout
    assert "at length 512: " in result.stdout
    assert result.stdout.count("[CLS]") == 4
    assert result.stdout.count("masked: ") == 4
    assert "[MASK]" in result.stdout
    assert "B is random" in result.stdout or "B follows A" in result.stdout


def test_inspect_json_is_one_document_on_standard_output(corpus: Path) -> None:
    result = run("inspect", corpus, "--json")
    content = json.loads(result.stdout)
    assert content["num_documents"] == 302
    assert len(content["examples"]) == 3
    assert content["counts"]["documents_read"] == 302


@pytest.mark.parametrize("documents", [["One lulu."], ["Lulu.", "Dodo."], [["Lu.", "Do."]]])
def test_inspect_serves_corpora_without_pairs(
    documents: list[str], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    write_shards(documents, tmp_path / "out", tokenizer=tiny_tokenizer)
    result = run("inspect", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    samples = json.loads(result.stdout)["samples"]["128"]
    assert samples["random_share"] is None
    assert samples["without_pair_share"] == 1


# --- verify ---------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "bin_byte": (lambda d: flip(d / "shard_00000.bin", 100), "shard_00000.bin: its SHA-256"),
    "idx_byte": (lambda d: flip(d / "shard_00000.idx", 40), "shard_00000.idx: its SHA-256"),
    "bin_size": (
        lambda d: (d / "shard_00000.bin").write_bytes(b"12"),
        "shard_00000.bin: 2 bytes, the manifest says",
    ),
    "idx_missing": (lambda d: (d / "shard_00000.idx").unlink(), "shard_00000.idx: missing"),
    "tokenizer_missing": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer_damaged": (lambda d: flip(d / "tokenizer.json", 3), "tokenizer.json"),
    "manifest_damaged": (lambda d: flip(d / "manifest.json", 1), "manifest.json: not a manifest"),
}


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "copy"
    directory.mkdir()
    for path in corpus.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def test_verify_accepts_what_shard_wrote(copy: Path) -> None:
    result = run("verify", copy)
    assert result.exit_code == 0
    assert "all files are as the manifest says" in result.stdout


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_names_the_damaged_file_and_exits_with_1(name: str, copy: Path) -> None:
    damage, message = DAMAGES[name]
    damage(copy)
    result = run("verify", copy)
    assert result.exit_code == 1
    assert f"damaged: {copy}/" in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_verify_finds_ids_and_tokenizers_that_the_hashes_do_not_tell(copy: Path) -> None:
    path = copy / "shard_00000.bin"
    tokens = np.frombuffer(path.read_bytes(), "<u2").copy()
    tokens[5] = 60_000
    path.write_bytes(tokens.tobytes())
    manifest = json.loads((copy / "manifest.json").read_text())
    import hashlib

    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    manifest["shards"][0]["bin_sha256"] = digest
    manifest["tokenizer"]["identity"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = run("verify", copy)
    assert result.exit_code == 1
    assert "holds token ids from 0 to 60000" in result.stderr
    assert "not the tokenizer the manifest names" in result.stderr


def test_verify_without_a_corpus_is_wrong_use(tmp_path: Path) -> None:
    result = run("verify", tmp_path)
    assert result.exit_code == 2
    assert "holds no manifest.json" in result.stderr
