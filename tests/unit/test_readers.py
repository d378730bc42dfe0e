"""Blocks, documents, sources: nothing lost, nothing doubled, bad input named or counted."""

import bz2
import gzip
import itertools
import json
import lzma
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import readers
from data_tools.errors import UserError
from data_tools.readers import (
    Block,
    clean_lines,
    documents_of,
    is_blank,
    line_blocks,
    read_rows,
    row_blocks,
)
from data_tools.sources import Format, OnError, Policy, Source, find_sources

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    ".xz": lzma.compress,
}


def policy(on_error: OnError = "fail") -> Policy:
    return Policy(on_error, Counter())


def source_of(path: Path, format: Format = "text") -> Source:
    (source,) = find_sources([str(path)], format, policy())
    return source


def documents(block: Block, source: Source, rule: Policy) -> list[Any]:
    """Of a text block, what stands between blank lines."""
    if source.format != "text":
        return list(documents_of(block, source, "text", rule))
    lines = clean_lines(block, source, rule).split(b"\n")
    groups = itertools.groupby(lines, key=is_blank)
    return [b"\n".join(group).decode() for blank, group in groups if not blank]


# --- blocks ---------------------------------------------------------------------------------------

TEXTS = st.lists(
    st.sampled_from([b"\n", b"\n", b"\r\n", b"\r", b" ", b"\t", b"a", b"bc", b"\xc3\xa9", b"def "]),
    min_size=1,
    max_size=80,
).map(b"".join)


@settings(max_examples=500, deadline=None)
@given(data=TEXTS, block_bytes=st.integers(1, 40), format=st.sampled_from(["text", "jsonl"]))
def test_workers_and_streams_cut_alike_and_lose_no_byte(
    data: bytes, block_bytes: int, format: Format, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes(data)
    source = Source(str(path), format, len(data))
    count = -(-len(data) // block_bytes)
    by_worker = [next(line_blocks(source, 0, block_bytes, policy(), n)) for n in range(count)]
    streamed = list(line_blocks(source, 0, block_bytes, policy()))

    def filled(blocks: list[Block]) -> list[tuple[Any, ...]]:
        return [(b.payload, b.offset, b.is_cut) for b in blocks if b.payload]

    assert filled(streamed) == filled(by_worker)
    assert [b.index for b in by_worker] == list(range(count))
    assert [b.index for b in streamed] == list(range(len(streamed)))
    assert [b.is_last for b in streamed] == [False] * (len(streamed) - 1) + [True]
    assert b"".join(bytes(b.payload) for b in streamed) == data
    position = 0
    for block in filter(lambda block: block.payload, streamed):
        assert block.offset == position
        position += len(block.payload or b"")


@settings(max_examples=200, deadline=None)
@given(data=TEXTS, block_bytes=st.integers(20, 60))
def test_documents_do_not_depend_on_the_blocks_unless_one_is_cut(
    data: bytes, block_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "documents.txt"
    path.write_bytes(data)
    source = Source(str(path), "text", len(data))

    def documents_in(size: int) -> tuple[list[Any], bool]:
        blocks = list(line_blocks(source, 0, size, policy()))
        found = [d for b in blocks for d in documents(b, source, policy())]
        return found, any(b.is_cut for b in blocks)

    whole, _ = documents_in(10_000)
    pieces, is_cut = documents_in(block_bytes)
    lines = [line for document in pieces for line in document.split("\n")]
    assert lines == [line for document in whole for line in document.split("\n")]
    assert is_cut or pieces == whole


def test_a_document_longer_than_a_block_is_cut_at_a_line_end_and_marked(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {n}\n" for n in range(100)))
    blocks = [b for b in line_blocks(source_of(path), 0, 64, policy()) if b.payload]
    assert len(blocks) > 5
    assert [b.is_cut for b in blocks] == [False] + [True] * (len(blocks) - 1)
    assert all(b.payload.endswith(b"\n") for b in blocks)  # type: ignore[union-attr]


@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_an_endless_line_is_an_error_or_a_counted_loss(
    format: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    path = tmp_path / "endless.txt"
    path.write_bytes(b'{"text": "a"}\n' * 3 + b"x" * 1000 + b"\n" + b'{"text": "b"}\n' * 30)
    source = source_of(path, format)
    with pytest.raises(UserError, match="no line end within"):
        list(line_blocks(source, 0, 50, policy()))
    skipping = policy("skip")
    streamed = list(line_blocks(source, 0, 50, skipping))
    assert skipping.counts == {"documents_too_long": 1, "documents_read": 1}
    text = b"".join(bytes(b.payload) for b in streamed)
    assert text == b'{"text": "a"}\n' * 3 + b'{"text": "b"}\n' * 30
    again = policy("skip")
    count = -(-source.num_bytes // 50)
    by_worker = [next(line_blocks(source, 0, 50, again, n)) for n in range(count)]
    assert [b.payload for b in by_worker if b.payload] == [b.payload for b in streamed if b.payload]
    assert again.counts == skipping.counts


def test_a_file_that_changes_during_the_build_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    source = source_of(path)
    path.write_text("one\n")
    with pytest.raises(UserError, match="changed while it was read"):
        next(line_blocks(source, 0, 100, policy()))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.text(max_size=9) | st.lists(st.text(max_size=3), max_size=3) | st.none()
        | st.integers() | st.lists(st.integers(), max_size=2),
        max_size=30,
    ),
    size=st.integers(1, 20),
)  # fmt: skip
def test_rows_are_grouped_in_order_whatever_they_hold(rows: list[Any], size: int) -> None:
    blocks = list(row_blocks(((row, n + 1) for n, row in enumerate(rows)), 0, size, len(rows)))
    assert [row for b in blocks for row in b.payload] == rows  # type: ignore[union-attr]
    assert [b.index for b in blocks] == list(range(len(blocks)))
    assert sum(b.num_bytes for b in blocks) == len(rows)


# --- compression ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_of_several_members_are_read_whole(suffix: str, tmp_path: Path) -> None:
    text = b"".join(b"Document %d.\nLine.\n\n" % n for n in range(2_000))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESSORS[suffix](text) + COMPRESSORS[suffix](text))
    blocks = list(line_blocks(source_of(path), 0, 1_000, policy()))
    assert b"".join(bytes(b.payload) for b in blocks) == text + text
    assert sum(b.num_bytes for b in blocks) == path.stat().st_size
    (tmp_path / "plain.txt").write_bytes(text + text)
    plain = list(line_blocks(source_of(tmp_path / "plain.txt"), 0, 1_000, policy()))
    assert [b.payload for b in blocks] == [b.payload for b in plain]


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_a_truncated_compressed_file_is_an_error_or_keeps_its_whole_lines(
    suffix: str, format: Format, tmp_path: Path
) -> None:
    text = b"".join(b'{"text": "Document %d has %d."}\n\n' % (n, n * n) for n in range(60_000))
    data = COMPRESSORS[suffix](text)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: len(data) * 2 // 3])
    source = source_of(path, format)
    with pytest.raises(UserError, match=r"damaged or truncated after .* bytes"):
        list(line_blocks(source, 0, 10_000, policy()))
    skipping = policy("skip")
    found = b"".join(bytes(b.payload) for b in line_blocks(source, 0, 10_000, skipping))
    assert skipping.counts == {"sources_truncated": 1}
    assert text.startswith(found)
    assert found.endswith(b"\n")
    assert len(found) > 100_000 or suffix == ".bz2"  # bz2 decodes 900 kB or nothing


def test_a_failing_disk_is_not_taken_for_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n")
    source = source_of(path)

    class Broken:
        def read(self, _: int) -> bytes:
            raise OSError(5, "Input/output error")

    from contextlib import contextmanager

    @contextmanager
    def broken_stream(_: Source) -> Any:
        yield Broken(), Broken()

    monkeypatch.setattr(readers, "open_stream", broken_stream)
    skipping = policy("skip")
    with pytest.raises(OSError, match="Input/output error"):
        list(line_blocks(source, 0, 10, skipping))
    assert not skipping.counts


# --- documents ------------------------------------------------------------------------------------


def read(
    data: bytes, format: Format, on_error: OnError, tmp_path: Path
) -> tuple[list[Any], Policy]:
    path = tmp_path / "input"
    path.write_bytes(data)
    rule = policy(on_error)
    source = Source(str(path), format, len(data))
    blocks = line_blocks(source, 0, 1 << 20, rule)
    return [d for b in blocks for d in documents(b, source, rule)], rule


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a\nb\n\nc", ["a\nb", "c"]),
        (b"a\r\nb\r\n\r\nc\r\n", ["a\nb", "c"]),
        (b"a\rb\r\rc\r", ["a\nb", "c"]),
        (b"a\n \t \nb\n\xc2\xa0\nc", ["a", "b", "c"]),
        ("a\x85b\u2028c\n".encode(), ["a\x85b\u2028c"]),
        (b"\xef\xbb\xbfa\n\n\n\n\nb", ["a", "b"]),
        (b"\n\n a", [" a"]),
    ],
    ids=["lf", "crlf", "cr", "white_space_lines", "other_line_ends", "mark", "leading"],
)
def test_blank_lines_separate_documents(data: bytes, expected: list[str], tmp_path: Path) -> None:
    found, rule = read(data, "text", "fail", tmp_path)
    assert found == expected
    assert rule.counts["byte_order_marks_removed"] == data.startswith(b"\xef")


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (b"caf\xe9 noir", "lines_invalid_utf8", "line 4: invalid UTF-8, byte 0xe9 at column 4"),
        (b"ab\0c", "lines_with_nul", "line 4: NUL byte at column 3; remove it"),
        (b"a\0b\0c\0", "lines_with_nul", "is this UTF-16"),
    ],
)
def test_a_bad_line_is_named_or_counted(
    line: bytes, kind: str, message: str, tmp_path: Path
) -> None:
    data = b"one\r\n\r\ntwo\n" + line + b"\nthree\n\nfour"
    with pytest.raises(UserError, match=message) as caught:
        read(data, "text", "fail", tmp_path)
    assert "--on-error skip" in str(caught.value)
    found, rule = read(data, "text", "skip", tmp_path)
    assert found == ["one", "two\nthree", "four"]
    assert rule.counts == {kind: 1}


def test_a_document_of_bad_lines_alone_is_a_counted_loss(tmp_path: Path) -> None:
    found, rule = read(b"one\n\n\xff\n\xfe\n\ntwo", "text", "skip", tmp_path)
    assert found == ["one", "two"]
    assert rule.counts == {
        "documents_read": 1, "documents_without_valid_lines": 1, "lines_invalid_utf8": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (b'{"text": "a', "documents_bad_json", "line 2: not JSON"),
        (b"plain text", "documents_bad_json", "line 2: not JSON"),
        (b'["a"]', "documents_bad_json", "list instead of an object"),
        (b'{"text": "\xff"}', "documents_invalid_utf8", "line 2: not JSON"),
        (b"[" * 100_000, "documents_bad_json", "line 2: not JSON"),
        (b'{"body": "a"}', "documents_missing_text", "no text in the field 'text'"),
        (b'{"text": null}', "documents_missing_text", "--text-field"),
        (b'{"text": 7}', "documents_text_not_string", "holds int 7, not text"),
        (b'{"text": ["a", 7]}', "documents_text_not_string", "holds list"),
        (b'{"text": {"a": 1}}', "documents_text_not_string", "holds dict"),
        (rb'{"text": "a\ud800"}', "documents_invalid_unicode", r"'\\ud800' is no character"),
        (b'{"text": "\xed\xa0\x80"}', "documents_invalid_unicode", "is no character"),
    ],
)
def test_a_bad_json_line_is_named_or_counted(
    line: bytes, kind: str, message: str, tmp_path: Path
) -> None:
    data = b'{"text": "one"}\n' + line + b'\n\n  \n{"text": ["two.", "three."]}'
    with pytest.raises(UserError, match=message):
        read(data, "jsonl", "fail", tmp_path)
    found, rule = read(data, "jsonl", "skip", tmp_path)
    assert found == ["one", ["two.", "three."]]
    assert rule.counts == {"documents_read": 3, kind: 1}


def test_the_line_number_of_an_error_counts_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = [b'{"text": "%d"}\r\n' % n for n in range(5_000)]
    lines[4_321] = b"broken\r\n"
    path.write_bytes(gzip.compress(b"".join(lines)))
    source = source_of(path, "auto")
    blocks = list(line_blocks(source, 0, 1_000, policy()))
    with pytest.raises(UserError, match="line 4322: not JSON"):
        _ = [d for block in blocks for d in documents_of(block, source, "text", policy())]


def test_skipping_a_million_bad_lines_does_not_read_the_file_again_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the position of an error is only sought for its message")

    monkeypatch.setattr(readers, "_located", never)
    _, rule = read(b"\xff\n" * 1_000, "text", "skip", tmp_path)
    assert rule.counts["lines_invalid_utf8"] == 1_000
    _, rule = read(b"{\n" * 1_000, "jsonl", "skip", tmp_path)
    assert rule.counts["documents_bad_json"] == 1_000


# --- tables ---------------------------------------------------------------------------------------

TEXT_ROWS = [f'Row {n} naïve.\nSecond, "quoted" line.' for n in range(1_000)]


def write_table(path: Path, rows: list[Any]) -> Path:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": list(range(len(rows))), "text": rows})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=100)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(["id", "text"])
            writer.writerows(enumerate(rows))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv", ".tsv"])
def test_tables_give_their_text_column_in_order(suffix: str, tmp_path: Path) -> None:
    source = source_of(write_table(tmp_path / f"a{suffix}", TEXT_ROWS), "auto")
    assert [value for value, _ in read_rows(source, "text", policy())] == TEXT_ROWS
    with pytest.raises(UserError, match=r"no column 'body'.* id, text.*--text-field"):
        list(read_rows(source, "body", policy()))


def test_a_table_of_sentence_lists_gives_lists(tmp_path: Path) -> None:
    rows = [["One.", "Two."], ["Three."]]
    source = source_of(write_table(tmp_path / "a.parquet", rows), "auto")
    assert [value for value, _ in read_rows(source, "text", policy())] == rows


def test_a_table_that_is_none_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 but no table")
    with pytest.raises(UserError, match=r"a\.parquet: unreadable as parquet after row 0"):
        list(read_rows(source_of(path, "auto"), "text", policy()))
    skipping = policy("skip")
    assert list(read_rows(source_of(path, "auto"), "text", skipping)) == []
    assert skipping.counts == {"sources_truncated": 1}


def test_damage_in_the_middle_of_a_table_is_an_error_or_counted(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.arrow", TEXT_ROWS)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = source_of(path, "auto")
    with pytest.raises(UserError, match=r"unreadable as arrow after row \d+"):
        list(read_rows(source, "text", policy()))
    skipping = policy("skip")
    found = [value for value, _ in read_rows(source, "text", skipping)]
    assert found == TEXT_ROWS[: len(found)]
    assert skipping.counts == {"sources_truncated": 1}


class FailingTable:
    """What `datasets` returns, when the network fails after some rows."""

    column_names = None

    def iter(self, _: int) -> Any:
        yield {"text": ["one", "two"]}
        raise ConnectionError("connection reset")


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_failing_network_is_never_a_counted_loss(
    on_error: OnError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: FailingTable())
    with pytest.raises(OSError, match="some/name: reading failed after row 2"):
        list(read_rows(Source("some/name", "hub"), "text", policy(on_error)))


def test_a_hub_name_holds_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: Any, **options: Any) -> FailingTable:
        asked.append((args, options["split"]))
        return FailingTable()

    monkeypatch.setattr("datasets.load_dataset", load)
    for name in ("a/b", "a/b:config", "a/b:config:validation", "a/b::test"):
        next(read_rows(Source(name, "hub"), "text", policy()))
    assert asked == [
        (("a/b", None), "train"), (("a/b", "config"), "train"),
        (("a/b", "config"), "validation"), (("a/b", None), "test"),
    ]  # fmt: skip


def test_an_unknown_hub_name_is_a_clear_error() -> None:
    with pytest.raises(UserError, match=r"no-such/data: unreadable as hub.*check the name"):
        list(read_rows(Source("no-such/data", "hub"), "text", policy()))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (b'2,"open quote', "documents_bad_csv"),
        (b'2,"a"b', "documents_bad_csv"),
        (b"2,caf\xe9", "documents_invalid_unicode"),
        (b"2", "documents_missing_text"),
    ],
)
def test_a_bad_csv_row_is_named_or_counted(row: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfid,text\n1,one\n\n" + row + b"\n")
    source = source_of(path, "auto")

    def run(rule: Policy) -> list[Any]:
        blocks = row_blocks(read_rows(source, "text", rule), 0, 100)
        return [d for b in blocks for d in documents_of(b, source, "text", rule)]

    with pytest.raises(UserError, match=r"line 4|row 2"):
        run(policy())
    skipping = policy("skip")
    assert run(skipping) == ["one"]
    assert skipping.counts == {"documents_read": 2, kind: 1}


def test_documents_from_python_are_checked() -> None:
    block = Block(0, 0, ["text", ["a", "b"], 7], 0, offset=10)
    with pytest.raises(UserError, match=r"python, row 13: .* holds int 7, not text"):
        list(documents_of(block, Source("python", "hub"), "text", policy()))


# --- sources --------------------------------------------------------------------------------------


def test_directories_and_globs_are_sorted_and_pass_over_unknown_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.txt", "a.jsonl.gz", "sub/c.parquet", "README", ".hidden.txt", ".git/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(b"{}") if name.endswith("gz") else b"text")
    rule = policy()
    found = find_sources([str(tmp_path)], "auto", rule)
    assert [(Path(s.path).name, s.format, s.compression) for s in found] == [
        ("a.jsonl.gz", "jsonl", "gzip"), ("b.txt", "text", ""), ("c.parquet", "parquet", ""),
    ]  # fmt: skip
    assert rule.counts == {"sources_passed_over": 1}
    assert "README" in caplog.text
    assert [s.path for s in find_sources([f"{tmp_path}/**/*.txt"], "auto", policy())] == [
        str(tmp_path / "b.txt")
    ]
    (named,) = find_sources([str(tmp_path / "README")], "auto", policy())
    assert named.format == "text"


@pytest.mark.parametrize(
    ("name", "data", "kind", "message"),
    [
        ("a.txt", b"", "sources_empty", "is empty"),
        ("a.txt", b" \n\t\r\n\n", "sources_empty", "only white space"),
        ("a.txt.gz", gzip.compress(b""), "sources_empty", "only white space"),
        ("a.txt.xz", lzma.compress(b" \n" * 100), "sources_empty", "only white space"),
        ("a.txt.gz", b"plain text", "sources_misnamed", "holds no gzip data"),
        ("a.txt", gzip.compress(b"text"), "sources_misnamed", "holds gzip data"),
        (
            "a.jsonl.zst",
            gzip.compress(b"text"),
            "sources_misnamed",
            "named like zstd but holds gzip",
        ),
        ("a.txt", "text".encode("utf-16"), "sources_utf16", "iconv -f UTF-16"),
        ("a.txt.gz", gzip.compress("text".encode("utf-16")), "sources_utf16", "UTF-16"),
        ("a.csv", "a,text".encode("utf-16"), "sources_utf16", "UTF-16"),
    ],
)
def test_a_bad_file_is_named_at_once_or_counted(
    name: str, data: bytes, kind: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        find_sources([str(path)], "auto", policy())
    assert str(path) in str(caught.value)
    skipping = policy("skip")
    assert find_sources([str(path)], "auto", skipping) == []
    assert skipping.counts == {kind: 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.txt", "no such file or directory"),
        ("nothing*.txt", "no such file or directory"),
        ("memory://no/such.txt", "no such file or directory"),
        ("memory://no/such*.txt", "no such file or directory"),
        ("nosuchprotocol://x/y", "cannot be opened"),
    ],
)
def test_a_missing_input_is_a_clear_error(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_sources([given], "auto", policy())


def test_a_directory_of_unknown_files_is_an_error_after_a_skipped_input(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="holds no files"):
        find_sources([str(tmp_path / "data")], "auto", policy())
    (tmp_path / "data" / "README").write_text("x")
    with pytest.raises(UserError, match="no file of a known kind"):
        find_sources([str(tmp_path / "empty.txt"), str(tmp_path / "data")], "auto", policy("skip"))


def test_an_input_named_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(UserError, match="named twice"):
        find_sources([str(path), f"{tmp_path}/*.txt"], "auto", policy())


def test_urls_are_read_through_fsspec(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    text = b"".join(b"Document %d.\n\n" % n for n in range(500))
    memory.pipe("/corpus/a.txt", text)
    memory.pipe("/corpus/b.txt.gz", gzip.compress(text))
    found = find_sources(["memory://corpus/*.txt*"], "auto", policy())
    assert [(s.path, s.compression) for s in found] == [
        ("memory:///corpus/a.txt", ""), ("memory:///corpus/b.txt.gz", "gzip"),
    ]  # fmt: skip
    assert found[0].num_bytes == len(text)
    for source in found:
        blocks = list(line_blocks(source, 0, 1_000, policy()))
        assert b"".join(bytes(b.payload) for b in blocks) == text


@pytest.mark.parametrize(
    ("text", "is_presplit"),
    [
        ("A first sentence.\nA second one.\n\nA third one.\nAnd a fourth.\n", True),
        ("A paragraph. With sentences. In it.\nOne more. Like it.\n\nAnd. So. On.\nEnd.", False),
        ("One document a line. It has sentences.\n\nAnother document. Here.\n", False),
        ("One sentence a document.\n\nAnother.\n", False),
    ],
)
def test_text_is_recognised_as_split_or_not(text: str, is_presplit: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join([text] * 50))
    split = lambda line: [s for s in line.split(". ") if s]  # noqa: E731
    assert readers.looks_presplit(source_of(path), split) is is_presplit


def test_json_lines_keep_every_kind_of_line_end_inside_text(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\x85d", "e\nf"]
    data = "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts).encode()
    found, _ = read(data, "jsonl", "fail", tmp_path)
    assert found == texts
