r"""Documents from sources, in blocks that depend on the input alone.

A block is the unit of work: a few MiB of whole documents. For text and JSON lines, block k of a
file holds what lies between cut k and the next cut there is, where cut k is the first document
boundary in window k, bytes [k*W, (k+1)*W) of the uncompressed file (W = `block_bytes`); if a whole
window holds no boundary but a line end, the cut is that line end and the document is counted as
cut; without either there is no block k, or an empty one. A worker finds the cuts of its block by
itself, so a large plain file is read in ranges by many workers; a compressed or remote file is read
as a stream. Rows (Parquet, CSV, Arrow, hub data sets, Python iterables) are grouped until they hold
W characters.

Line ends are "\n", "\r\n" and "\r", nothing else: U+0085 and U+2028 are text. A line of white space
is blank.
"""

import codecs
import csv
import io
import itertools
import json
import lzma
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.sources import (
    BadInputError,
    Format,
    Policy,
    Source,
    is_damage,
    open_stream,
    read_head,
)

Document = str | list[str]
"""Text with a paragraph a line, or a list of sentences."""

MAX_LINE_BYTES = 64 << 20
READ_BYTES = 65_536
ROWS_AT_ONCE = 256
# Two line ends with only ASCII white space between them; "\r\n" is one line end.
_BLANK_LINE = re.compile(rb"(?>\r\n|\r|\n)[ \t\x0b\x0c]*(?>\r\n|\r|\n)")
_LINE_END = re.compile(rb"(?>\r\n|\r|\n)")


@dataclass(frozen=True)
class Block:
    """Whole documents of one source; `payload` is None where the worker reads it by itself."""

    source_index: int
    index: int
    payload: bytes | list[Any] | None
    num_bytes: int  # of the source on disk, for progress
    is_cut: bool = False  # begins in the middle of a document
    offset: int = 0  # first byte (uncompressed) or row
    is_last: bool = False  # of its source
    counts: Counter[str] = field(default_factory=Counter)  # losses found while reading


# --- blocks of lines ------------------------------------------------------------------------------


def line_blocks(
    source: Source, source_index: int, block_bytes: int, policy: Policy, first: int = 0
) -> Iterator[Block]:
    """The blocks of a text or JSON-lines source, numbered from `first`.

    Args:
        first: for a seekable source, the window to begin with; then only the first block, which
            may be empty, is that of its window.

    Raises:
        UserError: the file is not what it was when the build was planned, or a line is too long.
    """
    if source.is_seekable and os.path.getsize(source.path) != source.num_bytes:
        raise UserError(f"{source.path}: changed while it was read; start the build again")
    payload = bytearray()
    is_cut = is_full = False
    index, offset, seen, counted = first, 0, first * block_bytes, 0
    windows = _windows(source, block_bytes, policy, first)
    for number, (window, raw_bytes, is_damaged) in enumerate(windows, first):
        cut: tuple[int, bool] | None = (0, False)
        if number:
            cut = _cut(window, source.format, len(window) == block_bytes)
        if number > first and not is_full:
            payload += window[: cut[0] if cut else None]
        if cut:
            if number > first:
                num_bytes = raw_bytes - counted
                yield Block(source_index, index, bytes(payload), num_bytes, is_cut, offset)
                index, counted = index + 1, raw_bytes
            offset, is_cut, is_full = seen + cut[0], cut[1], False
            payload = bytearray(window[cut[0] :])
        elif number == first:  # what it holds belongs to a block before
            break
        elif len(payload) > MAX_LINE_BYTES and not is_full:
            policy.bad(
                "documents_too_long",
                f"{source.path}: no line end within {MAX_LINE_BYTES >> 20} MiB; is this a text "
                f"file? Break the line",
            )
            policy.counts["documents_read"] += 1
            is_full, payload = True, _whole_lines(payload)
        seen += len(window)
        if is_damaged:  # then this window is the last
            payload = _whole_lines(payload)
    rest = max(source.num_bytes - counted, 0)
    yield Block(source_index, index, bytes(payload), rest, is_cut, offset, is_last=True)


def _windows(
    source: Source, window_bytes: int, policy: Policy, first: int
) -> Iterator[tuple[bytes, int, bool]]:
    """Windows of a stream, the raw bytes read so far, and whether damage ends the stream."""
    total = first * window_bytes
    is_ended = is_damaged = False
    with open_stream(source) as (stream, raw):
        if first:
            stream.seek(total)
        while not is_ended:
            window = bytearray()
            while len(window) < window_bytes and not is_ended:
                try:
                    part = stream.read(min(READ_BYTES, window_bytes - len(window)))
                except Exception as error:
                    is_damaged = is_damage(error)
                    if not is_damaged:
                        raise OSError(f"{source.path}: reading failed ({error})") from error
                    policy.bad(
                        "sources_truncated",
                        f"{source.path}: damaged or truncated after {total + len(window)} "
                        f"uncompressed bytes ({error}); fetch the file again",
                    )
                    part = b""
                is_ended = not part
                window += part
            total += len(window)
            if window or is_damaged:
                yield bytes(window), raw.tell(), is_damaged


def _cut(window: bytes, format: Format, is_whole: bool) -> tuple[int, bool] | None:
    """Where the block of this window begins, and whether inside a document; None if nowhere."""
    match = (_LINE_END if format == "jsonl" else _BLANK_LINE).search(window)
    if match:
        return match.end(), False
    if format == "jsonl" or not is_whole:
        return None
    match = _LINE_END.search(window)
    return (match.end(), True) if match else None


def _whole_lines(payload: bytearray) -> bytearray:
    return payload[: max(payload.rfind(b"\n"), payload.rfind(b"\r")) + 1]


# --- blocks of rows -------------------------------------------------------------------------------


def row_blocks(
    rows: Iterable[tuple[Any, int]], source_index: int, block_bytes: int, num_bytes: int = 0
) -> Iterator[Block]:
    """Group rows into blocks of about `block_bytes` characters.

    Args:
        rows: (document, raw bytes read so far).
        num_bytes: raw size of the source.
    """
    batch: list[Any] = []
    size = index = first = counted = 0
    for number, (document, seen) in enumerate(rows):
        batch.append(document)
        parts = document if isinstance(document, list) else [document]
        size += sum(len(str(part)) for part in parts)
        if size >= block_bytes:
            yield Block(source_index, index, batch, seen - counted, offset=first)
            batch, size, index, first, counted = [], 0, index + 1, number + 1, seen
    rest = max(num_bytes - counted, 0)
    yield Block(source_index, index, batch, rest, offset=first, is_last=True)


def read_rows(source: Source, text_field: str, policy: Policy) -> Iterator[tuple[Any, int]]:
    """(value of the text field, raw bytes read so far) of every row of a table or hub data set.

    Raises:
        UserError: there is no such data set or column, or the file is damaged.
        OSError: the network failed.
    """
    if source.format == "csv":
        yield from _read_csv(source, text_field, policy)
        return
    num_rows = 0
    try:
        for values in _batches_of(source, text_field):
            yield from ((value, 0) for value in values)
            num_rows += len(values)
    except UserError:
        raise
    except Exception as error:  # of `datasets`, or of what it reads with
        what = f"{type(error).__name__}: {str(error)[:200]}"
        if source.is_remote and num_rows:
            raise OSError(f"{source.path}: reading failed after row {num_rows} ({what})") from error
        message = f"{source.path}: unreadable as {source.format} after row {num_rows} ({what})"
        if source.is_remote:
            raise UserError(f"{message}; check the name and the network") from error
        policy.bad("sources_truncated", f"{message}; write or fetch the file again")


def _batches_of(source: Source, text_field: str) -> Iterator[list[Any]]:
    import datasets

    datasets.disable_progress_bars()
    if source.format == "hub":
        name, _, rest = source.path.partition(":")
        config, _, split = rest.partition(":")
        table = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    else:
        table = datasets.load_dataset(
            source.format, data_files=[source.path], split="train", streaming=True
        )
    if text_field in (table.column_names or []):
        table = table.select_columns(text_field)
    for batch in table.iter(ROWS_AT_ONCE):
        if text_field not in batch:
            raise UserError(_no_column(source, text_field, batch))
        yield batch[text_field]


def _read_csv(source: Source, text_field: str, policy: Policy) -> Iterator[tuple[Any, int]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    delimiter = "\t" if ".tsv" in Path(source.path).suffixes else ","
    with open_stream(source) as (stream, raw):
        # Bad bytes are found, and named or counted, with the document they stand in.
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        column: int | None = None
        while True:
            where = f"{source.path}, line {reader.line_num + 1}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                policy.counts["documents_read"] += 1
                policy.bad("documents_bad_csv", f"{where}: {error}; mend the quotes")
                continue
            except (OSError, EOFError, lzma.LZMAError) as error:
                if not is_damage(error):
                    raise OSError(f"{where}: reading failed ({error})") from error
                policy.bad("sources_truncated", f"{where}: damaged or truncated ({error})")
                return
            if column is None:
                if text_field not in row:
                    raise UserError(_no_column(source, text_field, row))
                column = row.index(text_field)
            elif row:
                yield (row[column] if column < len(row) else None), raw.tell()


def _no_column(source: Source, text_field: str, columns: Iterable[str]) -> str:
    found = ", ".join(itertools.islice(columns, 20))
    return f"{source.path}: no column {text_field!r}; it has {found}: give --text-field"


# --- documents of a block -------------------------------------------------------------------------


def clean_lines(block: Block, source: Source, policy: Policy) -> bytes:
    r"""The payload of a text block as valid UTF-8 with "\n" line ends, bad lines left out."""
    data = _without_mark(block, policy)
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b"\0" not in data:
        try:
            data.decode()
            return data
        except UnicodeDecodeError:
            pass
    good = []
    numbered = enumerate(data.split(b"\n"))
    for is_blank, group in itertools.groupby(numbered, key=lambda pair: not pair[1].strip()):
        kept = [line for n, line in group if is_blank or _is_good(line, n, block, source, policy)]
        if not kept:
            policy.counts["documents_read"] += 1
            policy.counts["documents_without_valid_lines"] += 1
        good += kept
    return b"\n".join(good)


def _without_mark(block: Block, policy: Policy) -> bytes:
    data = block.payload
    assert isinstance(data, bytes)
    if block.offset or not data.startswith(codecs.BOM_UTF8):
        return data
    policy.counts["byte_order_marks_removed"] += 1
    return data[len(codecs.BOM_UTF8) :]


def _is_good(line: bytes, number: int, block: Block, source: Source, policy: Policy) -> bool:
    try:
        line.decode()
        if b"\0" not in line:
            return True
        hint = " (is this UTF-16?)" if line.count(b"\0") > len(line) // 3 else ""
        kind, message = "lines_with_nul", f"NUL byte at column {line.index(0) + 1}{hint}; remove it"
    except UnicodeDecodeError as error:
        byte, column = line[error.start], error.start + 1
        kind = "lines_invalid_utf8"
        message = (
            f"invalid UTF-8, byte 0x{byte:02x} at column {column}; convert the file (`iconv -f "
            f"WINDOWS-1252 -t UTF-8` if it is Windows text)"
        )
    policy.bad(kind, partial(_located, source, block, number, message))
    return False


def _located(source: Source, block: Block, number: int, message: str) -> str:
    """ "FILE, line N: MESSAGE", counting from the file's beginning: only done for an error."""
    if isinstance(block.payload, list):
        return f"{source.path}, row {block.offset + number + 1}: {message}"
    left, lines, last = block.offset, 0, b""
    with open_stream(source) as (stream, _):
        while left > 0 and (part := stream.read(min(1 << 20, left))):
            left -= len(part)
            # "\r\n" across two parts is one line end
            lines += len(_LINE_END.findall(part)) - (last == b"\r" and part[:1] == b"\n")
            last = part[-1:]
    return f"{source.path}, line {lines + number + 1}: {message}"


def documents_of(
    block: Block, source: Source, text_field: str, policy: Policy
) -> Iterator[Document]:
    """The documents of a JSON-lines or row block; counts those read and those left out."""
    rows = block.payload or []
    if isinstance(rows, bytes):
        rows = _without_mark(block, policy).splitlines()  # bytes: splits at \n, \r\n, \r only
    for number, row in enumerate(rows):
        if isinstance(row, bytes) and (not row or row.isspace()):
            continue
        policy.counts["documents_read"] += 1
        try:
            document = _checked(_json_value(row, text_field), text_field)
        except BadInputError as error:
            policy.bad(error.kind, partial(_located, source, block, number, str(error)))
        else:
            yield document


def is_blank(line: bytes) -> bool:
    """Whether a line of UTF-8 holds nothing but white space, of Unicode's kinds too."""
    return not line.decode().strip()


def _json_value(row: Any, text_field: str) -> Any:
    """What stands in the text field of a line of JSON; other rows are values already."""
    if not isinstance(row, bytes):
        return row
    try:
        value = json.loads(row)
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        is_utf8 = not isinstance(error, UnicodeDecodeError)
        kind = "documents_bad_json" if is_utf8 else "documents_invalid_utf8"
        shown = row[:60].decode(errors="backslashreplace")
        raise BadInputError(kind, f"not JSON ({error}): {shown}...; mend the line") from error
    if isinstance(value, dict):
        return value.get(text_field)
    found = f"{type(value).__name__} instead of an object"
    message = f'{found}; expected {{"{text_field}": "..."}} on each line'
    raise BadInputError("documents_bad_json", message)


def _checked(value: Any, text_field: str) -> Document:
    """The value, if it is a document; raises BadInputError."""
    if value is None:
        hint = "name the field with --text-field or mend the line"
        message = f"no text in the field {text_field!r}; {hint}"
        raise BadInputError("documents_missing_text", message)
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        shown = f"{type(value).__name__} {repr(value)[:80]}"
        message = f"the field {text_field!r} holds {shown}, not text; mend the line"
        raise BadInputError("documents_text_not_string", message)
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        found = repr(error.object[error.start])
        message = f"{found} is no character; mend the line"
        raise BadInputError("documents_invalid_unicode", message) from error
    return value


def looks_presplit(source: Source, split: Callable[[str], list[str]]) -> bool:
    """Whether a text file holds one sentence a line: measured on its first 256 KiB."""
    head, _ = read_head(source, 262_144)
    lines = [line.strip() for line in re.split("\r\n|\r|\n", head.decode(errors="replace"))]
    groups = [list(group) for filled, group in itertools.groupby(lines, key=bool) if filled]
    texts = [line for group in groups for line in group]
    if len(texts) <= len(groups):  # one line a document
        return False
    single = sum(len(split(line)) <= 1 for line in texts)
    return single >= 0.9 * len(texts)
