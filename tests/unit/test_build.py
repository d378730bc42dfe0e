"""The build: the same bytes however it is run, killed or continued; nothing lost uncounted."""

import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from data_tools import UserError, open_shards, write_shards
from data_tools import files as files_module
from data_tools.build import BuildOptions, build
from data_tools.finish import lost_documents
from data_tools.sentences import make_splitter
from data_tools.shards import Manifest
from data_tools.tokenizer import BulkTokenizer, load_tokenizer
from launcher.cli import app
from tests.conftest import generated_documents

SMALL = BuildOptions(block_bytes=8_192, shard_tokens=10_000)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> BulkTokenizer:
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One large text file, JSON lines, a table, a compressed file and five small ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory = tmp_path_factory.mktemp("inputs")
    texts = [" ".join(document) for document in generated_documents(900, seed=1)]
    (directory / "a.txt").write_text("\n\n".join(texts[:300]))
    lines = [json.dumps({"text": text}) + "\n" for text in texts[300:500]]
    (directory / "b.jsonl").write_text("".join(lines))
    pq.write_table(pa.table({"text": texts[500:600]}), directory / "c.parquet")
    (directory / "d.txt.gz").write_bytes(gzip.compress("\n\n".join(texts[600:800]).encode()))
    for n in range(5):
        part = "\n\n".join(texts[800 + 20 * n : 820 + 20 * n])
        (directory / f"e{n}.txt.gz").write_bytes(gzip.compress(part.encode()))
    return [str(path) for path in sorted(directory.iterdir())]


def digests(output: Path) -> dict[str, str]:
    """SHA-256 of every file, hidden ones too."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


def shard_bytes(output: Path) -> list[bytes]:
    paths = sorted([*output.glob("*.bin"), *output.glob("*.idx")])
    return [path.read_bytes() for path in paths]


@pytest.fixture(scope="module")
def built(
    inputs: list[str], tokenizer: BulkTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What one worker makes of the inputs without being disturbed."""
    output = tmp_path_factory.mktemp("built") / "shards"
    manifest = build(inputs, output, tokenizer, "tiny", SMALL)
    assert manifest is not None
    assert manifest.num_documents == 900
    assert len(manifest.shards) >= 4
    return output


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    workers: int, inputs: list[str], tokenizer: BulkTokenizer, built: Path, tmp_path: Path
) -> None:
    build(inputs, tmp_path / "out", tokenizer, "tiny", SMALL, workers=workers)
    assert digests(tmp_path / "out") == digests(built)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_the_bytes_do_not_depend_on_the_number_of_ranks(
    world_size: int, inputs: list[str], tokenizer: BulkTokenizer, built: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments: tuple[Any, ...] = (inputs, output, tokenizer, "tiny", SMALL)
    for rank in reversed(range(world_size)):
        with pytest.raises(UserError, match=r"every rank first, then --finish"):
            build(*arguments, finish_only=True)
        assert build(*arguments, rank=rank, world_size=world_size) is None
    assert build(*arguments, finish_only=True) is not None
    assert digests(output) == digests(built)


def test_ranks_share_the_work(
    inputs: list[str], tokenizer: BulkTokenizer, built: Path, tmp_path: Path
) -> None:
    done = []
    for rank in range(2):
        output = tmp_path / f"rank{rank}"
        build(inputs, output, tokenizer, "tiny", SMALL, rank=rank, world_size=2)
        done.append({path.name for path in (output / ".build").glob("part_*.json")})
    assert not done[0] & done[1]
    assert min(map(len, done)) >= 0.3 * max(map(len, done))


def test_plain_and_compressed_text_give_the_same_shards(
    tokenizer: BulkTokenizer, tmp_path: Path
) -> None:
    text = "\n\n".join(" ".join(document) for document in generated_documents(400))
    shards = []
    for name, data in (("a.txt", text.encode()), ("a.txt.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        output = tmp_path / f"{name}.shards"
        build([str(tmp_path / name)], output, tokenizer, "tiny", SMALL)
        shards.append(shard_bytes(output))
    assert shards[0] == shards[1]


def test_text_lines_and_python_give_the_same_shards(
    tokenizer: BulkTokenizer, tmp_path: Path
) -> None:
    documents = generated_documents(50)
    (tmp_path / "a.txt").write_text("\n\n".join("\n".join(document) for document in documents))
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    (tmp_path / "b.jsonl").write_text("".join(lines))
    options = BuildOptions()
    build([str(tmp_path / "a.txt")], tmp_path / "a", tokenizer, "tiny", options)
    build([str(tmp_path / "b.jsonl")], tmp_path / "b", tokenizer, "tiny", options)
    write_shards(documents, tmp_path / "c", tokenizer=tokenizer)
    write_shards(("\n".join(d) for d in documents), tmp_path / "d", tokenizer=tokenizer)
    expected = shard_bytes(tmp_path / "a")
    assert all(shard_bytes(tmp_path / name) == expected for name in "bcd")


def test_without_shuffling_documents_keep_their_order(
    inputs: list[str], tokenizer: BulkTokenizer, built: Path, tmp_path: Path
) -> None:
    options = replace(SMALL, shuffle_seed=None)
    build(inputs, tmp_path / "out", tokenizer, "tiny", options)
    in_order = [document for shard in documents_by_shard(tmp_path / "out") for document in shard]
    texts = [" ".join(document) for document in generated_documents(900, seed=1)]
    expected = [e.ids for e in tokenizer.reference.encode_batch(texts)]
    assert [[i for sentence in document for i in sentence] for document in in_order] == expected
    shuffled = [document for shard in documents_by_shard(built) for document in shard]
    assert shuffled != in_order
    assert sorted(shuffled) == sorted(in_order)


def test_a_shuffled_shard_is_a_fair_sample_of_the_inputs(
    inputs: list[str], tokenizer: BulkTokenizer, built: Path
) -> None:
    texts = [" ".join(document) for document in generated_documents(900, seed=1)]
    number = {tuple(e.ids): n for n, e in enumerate(tokenizer.reference.encode_batch(texts))}
    for shard in documents_by_shard(built):
        places = [number[tuple(i for s in document for i in s)] / 900 for document in shard]
        assert abs(np.mean(places) - 0.5) < 0.15
        assert min(places) < 0.2
        assert max(places) > 0.8


def documents_by_shard(directory: Path) -> list[list[list[list[int]]]]:
    return [
        [
            [shard.sentence(s).tolist() for s in range(first, last)]
            for first, last in zip(shard.document_index[:-1], shard.document_index[1:], strict=True)
        ]
        for shard in open_shards(directory).shards
    ]


# --- killed and continued -------------------------------------------------------------------------


def in_child(function: Callable[[], None]) -> int:
    """Run `function` in a forked process; its exit code, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(120)
    return process.exitcode or 0


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("rename", [1, 2, 3, 20, 40, -9, -4, -3, -2, -1])
def test_a_build_killed_at_any_moment_continues_to_the_same_bytes(
    rename: int, when: str, num_renames: int, inputs: list[str], tokenizer: BulkTokenizer,
    built: Path, tmp_path: Path,
) -> None:  # fmt: skip
    output = tmp_path / "out"
    victim = rename if rename > 0 else num_renames + 1 + rename

    def run_and_die() -> None:
        done = 0
        replace_file = os.replace

        def replace_or_die(source: Path, target: Path) -> None:
            nonlocal done
            done += 1
            if done == victim and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            replace_file(source, target)
            if done == victim:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace_or_die  # type: ignore[assignment]
        build(inputs, output, tokenizer, "tiny", SMALL)

    assert in_child(run_and_die) == -signal.SIGKILL
    build(inputs, output, tokenizer, "tiny", SMALL)
    assert digests(output) == digests(built)


@pytest.fixture(scope="module")
def num_renames(
    inputs: list[str], tokenizer: BulkTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> int:
    """How many files a build of the inputs renames."""
    output = tmp_path_factory.mktemp("counted") / "shards"
    counted = multiprocessing.get_context("fork").Value("i", 0)

    def run() -> None:
        replace_file = os.replace

        def replace_and_count(source: Path, target: Path) -> None:
            counted.value += 1
            replace_file(source, target)

        os.replace = replace_and_count  # type: ignore[assignment]
        build(inputs, output, tokenizer, "tiny", SMALL)

    assert in_child(run) == 0
    return counted.value


def test_what_is_done_is_not_done_again(
    inputs: list[str], tokenizer: BulkTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    arguments: tuple[Any, ...] = (inputs, output, tokenizer, "tiny", SMALL)
    build(*arguments, rank=0, world_size=2)
    build(*arguments, rank=1, world_size=2)
    monkeypatch.setattr("data_tools.worker.BlockWorker._documents", None)
    monkeypatch.setattr("data_tools.readers.line_blocks", None)
    monkeypatch.setattr("data_tools.readers.read_rows", None)
    build(*arguments)
    monkeypatch.setattr("data_tools.build.finish", None)
    assert build(*arguments) is not None  # complete


@pytest.mark.parametrize("write", [1, 3, 30, 60])
def test_a_full_disk_is_a_clear_error_and_the_build_continues(
    write: int, inputs: list[str], tokenizer: BulkTokenizer, built: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output = tmp_path / "out"
    sync = os.fsync
    done = 0

    def sync_or_fail(descriptor: int) -> None:
        nonlocal done
        done += 1
        if done == write:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(files_module.os, "fsync", sync_or_fail)
    with pytest.raises(OSError, match="No space left"):
        build(inputs, output, tokenizer, "tiny", SMALL)
    assert not list(output.rglob("*.tmp"))
    assert not (output / "manifest.json").exists()
    build(inputs, output, tokenizer, "tiny", SMALL)
    assert digests(output) == digests(built)


@pytest.mark.parametrize("limit", [1_000, 8_000, 15_000])  # of the plan, a part, a shard
def test_a_build_continues_after_the_disk_would_take_no_more(
    limit: int, inputs: list[str], tokenizer: BulkTokenizer, built: Path, tmp_path: Path
) -> None:
    """The kernel itself refuses to write: every file is limited to `limit` bytes."""
    output = tmp_path / "out"

    def run_out_of_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            build(inputs, output, tokenizer, "tiny", SMALL)
        except OSError as error:
            os._exit(error.errno or 1)

    assert in_child(run_out_of_room) == errno.EFBIG
    assert not (output / "manifest.json").exists()
    assert not list(output.rglob("*.tmp"))
    build(inputs, output, tokenizer, "tiny", SMALL)
    assert digests(output) == digests(built)


def test_a_killed_command_leaves_no_process_and_continues(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    texts = [" ".join(document) for document in generated_documents(2_000)] * 40
    lines = [json.dumps({"text": f"{n} {text}"}) + "\n" for n, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(lines))  # 32 MB: 4 blocks

    def command(output: str, workers: int) -> list[str]:
        return [
            sys.executable, "-m", "launcher.cli", "shard", str(tmp_path / "a.jsonl"),
            "--output", str(tmp_path / output), "--tokenizer", str(tiny_tokenizer),
            "--workers", str(workers),
        ]  # fmt: skip

    subprocess.run(command("whole", 1), check=True, capture_output=True)
    process = subprocess.Popen(command("killed", 2), stderr=subprocess.DEVNULL)
    wait_for_parts(tmp_path / "killed", 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert not (tmp_path / "killed" / "manifest.json").exists()

    process = subprocess.Popen(command("killed", 2), stderr=subprocess.PIPE, text=True)
    wait_for_parts(tmp_path / "killed", 2)
    for worker in psutil.Process(process.pid).children(recursive=True):
        if "spawn_main" in " ".join(worker.cmdline()):
            worker.kill()
    _, errors = process.communicate(timeout=60)
    if process.returncode:  # else it was done before
        assert process.returncode == 1
        assert "error: a worker process died" in errors
        assert "Traceback" not in errors

    subprocess.run(command("killed", 2), check=True, capture_output=True)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def wait_for_parts(output: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (
            len(list(output.glob(".build/part_*.json"))) >= count
            or (output / "manifest.json").exists()
        ):
            return
        time.sleep(0.01)
    raise AssertionError("no parts were written")


# --- agreement with what lies in the output -------------------------------------------------------


def test_another_build_in_the_same_place_is_refused(
    inputs: list[str], tokenizer: BulkTokenizer, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    build(inputs, output, tokenizer, "tiny", SMALL, rank=0, world_size=2)
    other = replace(SMALL, max_sentence_tokens=100)
    with pytest.raises(UserError, match="unfinished build of other inputs or options"):
        build(inputs, output, tokenizer, "tiny", other)
    with pytest.raises(UserError, match="unfinished build of other inputs or options"):
        build(inputs[:-1], output, tokenizer, "tiny", SMALL)
    build(inputs, output, tokenizer, "tiny", SMALL)
    with pytest.raises(UserError, match="a corpus of other inputs or options"):
        build(inputs, output, tokenizer, "tiny", other)
    with pytest.raises(UserError, match="holds a corpus already"):
        write_shards(["a"], output, tokenizer=tokenizer)


def test_a_build_stopped_by_bad_input_continues_with_skip_to_the_same_bytes(
    tokenizer: BulkTokenizer, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": " ".join(d)}) for d in generated_documents(300)]
    lines[200] = "{"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    arguments: tuple[Any, ...] = ([str(path)], tmp_path / "out", tokenizer, "tiny")
    with pytest.raises(UserError, match="line 201: not JSON"):
        build(*arguments, SMALL)
    assert list((tmp_path / "out" / ".build").glob("part_*.json"))
    skipping = replace(SMALL, on_error="skip")
    build(*arguments, skipping)
    build([str(path)], tmp_path / "whole", tokenizer, "tiny", skipping)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    with pytest.raises(UserError, match="other inputs or options"):
        build(*arguments, SMALL)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_in_a_worker_is_the_same_clear_error(
    workers: int, tokenizer: BulkTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 3_000 + "oops\n")
    with pytest.raises(UserError, match=r"line 3001: not JSON .*use --on-error skip"):
        build([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer, "x", SMALL, workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_slow_tokenizer_is_announced(
    workers: int, tokenizer: BulkTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    definition = json.loads(tokenizer.definition)
    definition["pre_tokenizer"] = {"type": "Whitespace"}
    slow = BulkTokenizer(json.dumps(definition))
    (tmp_path / "a.txt").write_text("Ba bo. Da do.\n\nFa fo. Ga go.")
    build([str(tmp_path / "a.txt")], tmp_path / "out", slow, "slow", SMALL, workers=workers)
    assert "several times slower: its pre_tokenizer is Whitespace" in caplog.text


def test_a_difference_from_tokenizers_stops_the_build(
    tokenizer: BulkTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: BulkTokenizer, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = encode(self, text)
        return ids + 1, lengths

    encode = BulkTokenizer.encode_lines
    monkeypatch.setattr(BulkTokenizer, "encode_lines", wrong)
    (tmp_path / "a.txt").write_text("Ba bo. Da do.")
    with pytest.raises(AssertionError, match="ids differ from `tokenizers`"):
        build([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer, "tiny", SMALL)


# --- what comes out -------------------------------------------------------------------------------

SENTENCES = st.lists(st.sampled_from(["Ba", "dodo", "lulu", "É", "\u0301", "xx"]), max_size=40).map(
    lambda words: " ".join(words) + "."
)
GOOD = st.lists(SENTENCES, min_size=1, max_size=5) | st.text("Babo. \n\u200b", max_size=40)
BAD = st.sampled_from(["{", '{"text": 1}', '{"body": "x"}', r'{"text": "\ud800"}', "[1]"])


def naive_documents(texts: list[Any], tokenizer: BulkTokenizer, limit: int) -> list[Any]:
    """Sentences, ids and cuts, one document at a time, by the libraries that define them."""
    split = make_splitter("sentencex", "en")
    documents = []
    for text in texts:
        sentences = text if isinstance(text, list) else []
        for paragraph in [] if isinstance(text, list) else text.split("\n"):
            sentences = sentences + split(paragraph, Counter())
        pieces = [p for s in sentences for p in naive_pieces(s, tokenizer, limit)]
        documents.append([piece for piece in pieces if piece])
    return [document for document in documents if document]


def naive_pieces(sentence: str, tokenizer: BulkTokenizer, limit: int) -> list[list[int]]:
    """The ids of a sentence, word by word into pieces of at most `limit`; a longer word is cut."""
    encoding = tokenizer.reference.encode(sentence)
    words: list[list[int]] = []
    for index, token in zip(encoding.ids, encoding.tokens, strict=True):
        if token.startswith("##"):
            words[-1].append(index)
        else:
            words.append([index])
    pieces: list[list[int]] = [[]]
    for word in words:
        if len(pieces[-1]) + len(word) > limit:
            pieces.append([])
        for token in word:
            if len(pieces[-1]) == limit:
                pieces.append([])
            pieces[-1].append(token)
    return pieces


@settings(max_examples=60, deadline=None)
@example(rows=["BBBBB B"], limit=4)  # a word longer than the limit
@given(rows=st.lists(GOOD | BAD.map(lambda bad: (bad,)), max_size=12), limit=st.integers(4, 30))
def test_documents_in_are_documents_out_and_counted_losses(
    rows: list[Any], limit: int, tokenizer: BulkTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    directory = tmp_path_factory.mktemp("balance")
    lines = [row[0] if isinstance(row, tuple) else json.dumps({"text": row}) for row in rows]
    (directory / "a.jsonl").write_text("\n".join([json.dumps({"text": "Ba bo."}), *lines]))
    options = BuildOptions(
        on_error="skip", shuffle_seed=None, max_sentence_tokens=limit, block_bytes=100
    )
    arguments: tuple[Any, ...] = ([str(directory / "a.jsonl")], directory / "out", tokenizer, "x")
    manifest = build(*arguments, options)
    assert manifest is not None
    counts = Counter(manifest.counts)
    good = ["Ba bo.", *(row for row in rows if not isinstance(row, tuple))]
    expected = naive_documents(good, tokenizer, limit)
    (found,) = documents_by_shard(directory / "out")
    assert found == expected
    assert counts["documents_read"] == len(rows) + 1
    assert counts["documents_written"] == manifest.num_documents == len(expected)
    assert sum(lost_documents(counts).values()) == len(rows) + 1 - len(expected)
    assert counts["documents_without_tokens"] == len(good) - len(expected)
    assert counts["sentences"] == manifest.num_sentences == sum(map(len, expected))


def test_long_sentences_are_cut_at_word_boundaries_and_counted(
    tokenizer: BulkTokenizer, tmp_path: Path
) -> None:
    long = "Ba " * 5 + "dodolulu " * 40 + "bo."
    unbroken = "ba" + "do" * 49
    text = f"Ba bo.\n{long}\nDo lu.\n\nLu do.\n{unbroken}\nBo."
    (tmp_path / "a.txt").write_text(text)
    options = BuildOptions(format="sentences", max_sentence_tokens=16, shuffle_seed=None)
    manifest = build([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer, "x", options)
    assert manifest is not None
    assert manifest.counts["sentences_cut"] == 2
    assert manifest.num_documents == 2
    (documents,) = documents_by_shard(tmp_path / "out")
    sentences = [sentence for document in documents for sentence in document]
    expected = [i for line in text.split("\n") for i in tokenizer.reference.encode(line).ids]
    assert [i for sentence in sentences for i in sentence] == expected
    assert max(map(len, sentences)) <= 16
    first_document = [tokenizer.is_continuation[sentence[0]] for sentence in documents[0]]
    assert not any(first_document)


def test_documents_longer_than_a_block_are_counted_as_cut(
    tokenizer: BulkTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("Ba bo. Da do.\n" * 1_000 + "\nLu.\n")
    options = BuildOptions(block_bytes=4_000)
    manifest = build([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer, "x", options)
    assert manifest is not None
    assert manifest.counts["documents_cut"] == 2  # 14,000 bytes
    assert manifest.num_documents == 4


def test_a_line_without_tokens_is_counted_and_separates_nothing(
    tokenizer: BulkTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("Ba.\n\u200b\nBo.\n\n\u200b\n\x01\n\n\u3000\nDo.\n")
    options = BuildOptions(format="sentences")
    manifest = build([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer, "x", options)
    assert manifest is not None
    assert manifest.num_documents == 2
    assert manifest.counts["documents_without_tokens"] == 1
    assert manifest.counts["sentences_without_tokens"] == 3


def test_a_source_without_documents_is_counted(tokenizer: BulkTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ba bo.")
    (tmp_path / "b.txt").write_text("\n" * 100_000)
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    manifest = build(names, tmp_path / "out", tokenizer, "x", SMALL)
    assert manifest is not None
    assert manifest.counts["sources_without_documents"] == 1
    assert [source.num_documents for source in manifest.sources] == [1, 0]


# --- from Python ----------------------------------------------------------------------------------


def test_python_documents_are_consumed_lazily_by_workers(
    tokenizer: BulkTokenizer, tmp_path: Path
) -> None:
    documents = (f"Ba bo {n}. Da do." for n in range(1_000))
    manifest = write_shards(documents, tmp_path / "a", tokenizer=tokenizer, workers=2)
    assert manifest.num_documents == 1_000
    assert manifest.num_sentences == 2_000


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("one text", "expected a list of texts"),
        (["a", 7], "row 2: .* int 7, not text"),
        ([["a", 7]], "row 1: .* list"),
        ([None], "no text"),
        ([], "no document with any text"),
        (["", "  ", []], "no document with any text"),
        (["a\ud800"], "is no character"),
    ],
)
def test_bad_python_documents_are_clear_errors(
    documents: Any, message: str, tokenizer: BulkTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        write_shards(documents, tmp_path / "out", tokenizer=tokenizer)
    write_shards(["Ba bo."], tmp_path / "out", tokenizer=tokenizer)  # the place is free again


# --- the command ----------------------------------------------------------------------------------


def shard(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["shard", *map(str, arguments), "--workers", "1"])
    assert result.exit_code in (0, 1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result


LINES = [" ".join(document) for document in generated_documents(30, seed=3)]
TEXT = "\n\n".join(LINES).encode()
BAD_INPUTS: dict[str, tuple[str, bytes, str, str]] = {
    # name: file, content, what the message says, the count with --on-error skip
    "bad_line": ("a.jsonl", b'{"text": "Ba bo."}\n{"text": "a\n', "line 2", "documents_bad_json"),
    "missing_text": (
        "a.jsonl", b'{"text": "Ba."}\n{"id": 1}\n', "line 2", "documents_missing_text",
    ),
    "text_not_string": (
        "a.jsonl", b'{"text": "Ba."}\n{"text": 1}', "line 2", "documents_text_not_string",
    ),
    "invalid_utf8": (
        "a.txt", TEXT + b"\n\nBa bo.\nCaf\xe9 au lait.", "byte 0xe9", "lines_invalid_utf8",
    ),
    "nul_bytes": ("a.txt", TEXT + b"\n\nBa bo.\nDa\0do.", "NUL byte", "lines_with_nul"),
    "truncated": ("a.txt.gz", gzip.compress(TEXT * 100)[:-100], "truncated", "sources_truncated"),
    "bad_csv": ("a.csv", b'text\nBa bo.\n"open\n', "line 3", "documents_bad_csv"),
}  # fmt: skip
EMPTY_INPUTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", "is empty"),
    "blank_lines": ("a.txt", b"\n   \n\t\n\r\n\r\n", "only white space"),
    "misnamed_gz": ("a.txt.gz", TEXT, "holds no gzip data"),
    "hidden_gz": ("a.txt", gzip.compress(TEXT), "holds gzip data"),
    "utf16": ("a.txt", TEXT.decode().encode("utf-16"), "UTF-16"),
}
FINE_INPUTS: dict[str, tuple[str, bytes]] = {
    "crlf": ("a.txt", TEXT.replace(b"\n", b"\r\n")),
    "cr": ("a.txt", TEXT.replace(b"\n", b"\r")),
    "mark": ("a.txt", b"\xef\xbb\xbf" + TEXT),
    "no_final_newline": ("a.txt", TEXT),
    "blanks_with_spaces": ("a.txt", TEXT.replace(b"\n\n", b"\n \t \n")),
    "many_blanks": ("a.txt", b"\n\n" + TEXT.replace(b"\n\n", b"\n\n\r\n\n") + b"\n\n\n"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_stops_the_command_or_is_counted(
    name: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    file, data, message, kind = BAD_INPUTS[name]
    (tmp_path / file).write_bytes(data)
    common = (tmp_path / file, "--output", tmp_path / "out", "--tokenizer", tiny_tokenizer)
    stopped = shard(*common)
    assert stopped.exit_code == 2
    errors = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert file in errors[0]
    assert "--on-error skip" in errors[0]
    skipped = shard(*common, "--on-error", "skip")
    assert skipped.exit_code == 0, skipped.output
    manifest = open_shards(tmp_path / "out").manifest
    assert manifest.counts[kind] == 1
    assert kind.replace("_", " ") in skipped.stdout
    assert manifest.num_documents >= 1


@pytest.mark.parametrize("name", EMPTY_INPUTS)
def test_input_without_text_stops_the_command_or_is_counted(
    name: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    file, data, message = EMPTY_INPUTS[name]
    (tmp_path / file).write_bytes(data)
    (tmp_path / "good.txt").write_bytes(TEXT)
    common = ("--output", tmp_path / "out", "--tokenizer", tiny_tokenizer)
    stopped = shard(tmp_path / file, *common)
    assert stopped.exit_code == 2
    assert message in stopped.stderr
    nothing = shard(tmp_path / file, *common, "--on-error", "skip")
    assert nothing.exit_code == 2
    assert "no input holds any text" in nothing.stderr
    skipped = shard(tmp_path / file, tmp_path / "good.txt", *common, "--on-error", "skip")
    assert skipped.exit_code == 0
    manifest = open_shards(tmp_path / "out").manifest
    assert manifest.num_documents == 30
    assert sum(n for kind, n in manifest.counts.items() if kind.startswith("sources_")) == 1


@pytest.mark.parametrize("name", FINE_INPUTS)
def test_line_ends_and_marks_make_no_difference(
    name: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    file, data = FINE_INPUTS[name]
    for place, content in (("plain", TEXT), ("other", data)):
        (tmp_path / place).mkdir()
        (tmp_path / place / file).write_bytes(content)
        output = tmp_path / place / "out"
        result = shard(tmp_path / place / file, "--output", output, "--tokenizer", tiny_tokenizer)
        assert result.exit_code == 0
    assert shard_bytes(tmp_path / "other" / "out") == shard_bytes(tmp_path / "plain" / "out")
    assert open_shards(tmp_path / "other" / "out").manifest.num_documents == 30


@pytest.mark.parametrize("text", ["\u00a0\n\u3000\n \t\n", "\u200b\n\x01\n"])
def test_text_that_only_looks_like_text_is_a_clear_error(
    text: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(text)
    common = ("--output", tmp_path / "out", "--tokenizer", tiny_tokenizer)
    for on_error in ("fail", "skip"):
        result = shard(tmp_path / "a.txt", *common, "--on-error", on_error)
        assert result.exit_code == 2
        assert "no document with any text" in result.stderr
        assert not (tmp_path / "out" / "manifest.json").exists()


def test_special_tokens_in_the_text_become_plain_words(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("[CLS] ba [MASK] bo. [SEP] [PAD]\n[UNK] lu.\n\nDo. [MASK]\n")
    result = shard(tmp_path / "a.txt", "--output", tmp_path / "out", "--tokenizer", tiny_tokenizer)
    assert result.exit_code == 0
    tokenizer = load_tokenizer(tiny_tokenizer)
    special = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id}
    (found,) = open_shards(tmp_path / "out").shards
    assert not special & set(found.tokens.tolist())
    assert found.num_documents == 2


def test_one_sentence_documents_are_kept(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ba bo.\n\nDa do\n\nLu.")
    result = shard(tmp_path / "a.txt", "--output", tmp_path / "out", "--tokenizer", tiny_tokenizer)
    assert result.exit_code == 0
    assert "3 documents, 3 sentences" in result.stdout
    assert "lost or changed" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt"], "nowhere.txt: no such file or directory"),
        (["a.txt", "--tokenizer", "./nowhere"], "no such file or directory"),
        (["a.txt", "--output", "a.txt/x"], "--output a.txt/x: Not a directory"),
        (["a.txt", "--rank", "1"], "--rank and --world-size go together"),
        (["a.txt", "--rank", "2", "--world-size", "2"], "ranks count from 0"),
        (["a.txt", "--language", "English"], "expected a code like en"),
        (["a.txt", "--adopt", "x"], "--adopt takes the place of inputs"),
        ([], "expected INPUT... and --output DIR"),
    ],
)
def test_wrong_use_is_one_clear_line(
    arguments: list[str], message: str, tiny_tokenizer: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("Ba bo.")
    given = [] if "--tokenizer" in arguments else ["--tokenizer", str(tiny_tokenizer)]
    given += [] if "--output" in arguments else ["--output", "out"]
    result = shard(*arguments, *given)
    assert result.exit_code == 2
    assert f"error: {message}" in result.stderr.replace("\n", " ") or message in result.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}, "rank 1 of 3 is done"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "rank 0 of 2 is done"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, None),
    ],
)
def test_slurm_says_which_share_to_do(
    variables: dict[str, str], expected: str | None, tiny_tokenizer: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "a.txt").write_bytes(TEXT)
    common = (tmp_path / "a.txt", "--output", tmp_path / "out", "--tokenizer", tiny_tokenizer)
    result = shard(*common)
    assert result.exit_code == 0
    if expected is None:
        assert "30 documents" in result.stdout
        return
    assert expected in result.stdout
    others = [r for r in range(3) if f"rank {r} " not in expected]
    size = expected.split()[3]
    for rank in others:
        if rank < int(size):
            shard(*common, "--rank", rank, "--world-size", size)
    assert "30 documents" in shard(*common, "--finish").stdout


def test_a_full_disk_is_one_line_and_exit_1(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.txt").write_bytes(TEXT)
    monkeypatch.setattr(files_module.os, "fsync", full)
    result = shard(tmp_path / "a.txt", "--output", tmp_path / "out", "--tokenizer", tiny_tokenizer)
    assert result.exit_code == 1
    assert "No space left on device; mend that and run the same command again" in result.stderr


def test_inputs_over_http(tiny_tokenizer: Path, tmp_path: Path) -> None:
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        common = ("--output", tmp_path / "out", "--tokenizer", tiny_tokenizer)
        missing = shard(f"{url}/b.txt", *common)
        assert missing.exit_code == 2
        assert "b.txt: no such file or directory" in missing.stderr
        found = shard(f"{url}/a.txt.gz", *common)
        assert found.exit_code == 0, found.output
        assert "30 documents" in found.stdout
    finally:
        server.shutdown()


def test_a_hub_data_set_is_read_through_datasets(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": LINES, "id": list(range(30))})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: table.to_iterable_dataset())
    common = ("--output", tmp_path / "out", "--tokenizer", tiny_tokenizer)
    result = shard("some/name:en:train", *common, "--format", "hub")
    assert result.exit_code == 0, result.output
    manifest: Manifest = open_shards(tmp_path / "out").manifest
    assert manifest.num_documents == 30
    assert manifest.sources[0].path == "some/name:en:train"


def test_a_random_mixture_of_bad_files_never_ends_in_a_traceback(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    generator = random.Random(0)
    contents = [data for _, data, *_ in (*BAD_INPUTS.values(), *EMPTY_INPUTS.values())]
    names = ["a.txt", "b.jsonl", "c.csv", "d.txt.gz", "e.parquet", "f.arrow", "g.tsv", "h.json.xz"]
    for trial in range(30):
        directory = tmp_path / str(trial)
        directory.mkdir()
        for name in generator.sample(names, 3):
            data = bytearray(generator.choice(contents))
            for _ in range(generator.randint(0, 5)):
                if data:
                    data[generator.randrange(len(data))] = generator.randrange(256)
            (directory / name).write_bytes(data)
        common = ("--output", directory / "out", "--tokenizer", tiny_tokenizer)
        result = shard(directory, *common, "--on-error", "skip")
        assert result.exit_code in (0, 2)
        assert result.exit_code == 0 or "error: " in result.stderr
