r"""Documents from sources, in blocks that depend on the input alone.

A block is the unit of work: a few MiB of whole documents. For text and JSON lines, block k of a
file holds what lies between its k-th and (k+1)-th cut, where cut k is the first document boundary
in bytes [k*W, (k+1)*W) of the uncompressed file (W = `block_bytes`); if a whole window holds no
boundary but a line end, the cut is that line end and the document is counted as cut. A worker finds
the cuts of its block by itself, so a large plain file is read in ranges by many workers; a
compressed or remote file is read as a stream. Rows (Parquet, CSV, Arrow, hub data sets, Python
iterables) are grouped until they hold W characters.

Line ends are "\n", "\r\n" and "\r", nothing else: U+0085 and U+2028 are text. A line of white space
is blank.
"""

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.errors import UserError
from data_tools.sources import Format, Policy, Source, is_damage, open_file, open_stream, read_head

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


# --- blocks of lines ------------------------------------------------------------------------------


def num_windows(source: Source, block_bytes: int) -> int:
    """Number of blocks of a seekable source."""
    return -(-source.num_bytes // block_bytes)


def read_block(
    source: Source, source_index: int, index: int, block_bytes: int, policy: Policy
) -> Block:
    """Block `index` of a seekable source; its payload is empty when no document begins there.

    Raises:
        UserError: the file is not what it was when the build was planned, or a line is too long.
    """
    with open_file(source.path) as file:
        if file.seek(0, io.SEEK_END) != source.num_bytes:
            raise UserError(f"{source.path}: changed while it was read; start the build again")
        cut: tuple[int, bool] | None = (0, False)
        if index:
            cut = _find_cut(file, index, source, block_bytes)
        num_bytes = min(block_bytes, source.num_bytes - index * block_bytes)
        if cut is None:
            return Block(source_index, index, b"", num_bytes)
        start, is_cut = cut
        number, end = index, None
        while end is None and number + 1 < num_windows(source, block_bytes):
            number += 1
            end = _find_cut(file, number, source, block_bytes)
            if (number + 1) * block_bytes - start > MAX_LINE_BYTES:
                break
        stop = end[0] if end else min((number + 1) * block_bytes, source.num_bytes)
        file.seek(start)
        payload = file.read(stop - start)
        if end is None and _is_too_long(source, len(payload), policy):
            payload = _whole_lines(payload)
    return Block(source_index, index, payload, num_bytes, is_cut, start)


def _find_cut(
    file: BinaryIO, number: int, source: Source, block_bytes: int
) -> tuple[int, bool] | None:
    """What `_cut` finds in a window, as a position in the file; reads no more than it needs."""
    size = READ_BYTES
    while True:
        size = min(size, block_bytes)
        file.seek(number * block_bytes)
        window = file.read(size)
        is_read = len(window) < size or size == block_bytes
        cut = _cut(window, source.format, len(window) == block_bytes)
        if is_read and cut is None:
            return None
        if cut and (is_read or cut[0] < len(window)):  # "\r" at its end may be half of "\r\n"
            return number * block_bytes + cut[0], cut[1]
        size *= 4


def stream_blocks(
    source: Source, source_index: int, block_bytes: int, policy: Policy
) -> Iterator[Block]:
    """All blocks of a text or JSON-lines source, read from its beginning to its end."""
    payload = bytearray()
    is_cut = is_full = False
    index = offset = seen = counted = 0
    for number, (window, raw_bytes, is_damaged) in enumerate(_windows(source, block_bytes, policy)):
        cut: tuple[int, bool] | None = (0, False)
        if number:
            cut = _cut(window, source.format, len(window) == block_bytes)
            if not is_full:
                payload += window if cut is None else window[: cut[0]]
        if cut is None:
            if not is_full and _is_too_long(source, len(payload), policy):
                is_full, payload = True, bytearray(_whole_lines(payload))
        else:
            if number:
                num_bytes = raw_bytes - counted
                yield Block(source_index, index, bytes(payload), num_bytes, is_cut, offset)
                counted = raw_bytes
            index, offset, is_cut, is_full = number, seen + cut[0], cut[1], False
            payload = bytearray(window[cut[0] :])
        seen += len(window)
        if is_damaged:  # then this window is the last
            payload = bytearray(_whole_lines(payload))
    rest = max(source.num_bytes - counted, 0)
    yield Block(source_index, index, bytes(payload), rest, is_cut, offset)


def _windows(
    source: Source, window_bytes: int, policy: Policy
) -> Iterator[tuple[bytes, int, bool]]:
    """Windows of a stream, the raw bytes read so far, and whether damage ends the stream."""
    total = 0
    is_ended = is_damaged = False
    with open_stream(source) as (stream, raw):
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


def _is_too_long(source: Source, num_bytes: int, policy: Policy) -> bool:
    """Whether a line without an end is; that is an error, or a document left out and counted."""
    if num_bytes <= MAX_LINE_BYTES:
        return False
    policy.bad(
        "documents_too_long",
        f"{source.path}: no line end within {MAX_LINE_BYTES >> 20} MiB; is this a text file? Break "
        f"the line",
    )
    policy.counts["documents_read"] += 1
    return True


def _whole_lines(payload: bytes | bytearray) -> bytes:
    return bytes(payload[: max(payload.rfind(b"\n"), payload.rfind(b"\r")) + 1])


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
    size = index = first = counted = seen = 0
    for number, (document, seen) in enumerate(rows):
        batch.append(document)
        size += _size_of(document)
        if size >= block_bytes:
            yield Block(source_index, index, batch, seen - counted, offset=first)
            batch, size, index, first, counted = [], 0, index + 1, number + 1, seen
    yield Block(source_index, index, batch, max(num_bytes - counted, 0), offset=first)


def _size_of(document: Any) -> int:
    if isinstance(document, list):
        return sum(len(part) for part in document if isinstance(part, str))
    return len(document) if isinstance(document, str) else 0


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
            raise UserError(
                f"{source.path}: no column {text_field!r}; it has {', '.join(batch)}: give "
                f"--text-field"
            )
        yield batch[text_field]


def _read_csv(source: Source, text_field: str, policy: Policy) -> Iterator[tuple[Any, int]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    delimiter = "\t" if ".tsv" in Path(source.path).suffixes else ","
    with open_stream(source) as (stream, raw):
        # Bad bytes are found, and named or counted, with the document they stand in.
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{source.path}, line {reader.line_num + 1}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                policy.bad("documents_bad_csv", f"{where}: {error}; mend the quotes")
                policy.counts["documents_read"] += 1
                continue
            except Exception as error:
                if not is_damage(error):
                    raise OSError(f"{where}: reading failed ({error})") from error
                policy.bad("sources_truncated", f"{where}: damaged or truncated ({error})")
                return
            if header is None:
                header = row
                if text_field not in header:
                    raise UserError(
                        f"{source.path}: no column {text_field!r} in the header line; it has "
                        f"{', '.join(header[:20])}: give --text-field"
                    )
                column = header.index(text_field)
            elif row:
                yield (row[column] if column < len(row) else None), raw.tell()


# --- documents of a block -------------------------------------------------------------------------


def clean_lines(block: Block, source: Source, policy: Policy) -> bytes:
    r"""The payload of a text block as valid UTF-8 with "\n" line ends, bad lines left out."""
    data = _without_mark(block, policy)
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b"\0" not in data and _is_utf8(data):
        return data
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


def _is_utf8(data: bytes) -> bool:
    """By pieces: one rare character would make the whole decoded text four times as large."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for at in range(0, len(data), READ_BYTES):
            decoder.decode(data[at : at + READ_BYTES])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _is_good(line: bytes, number: int, block: Block, source: Source, policy: Policy) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        byte, column = line[error.start], error.start + 1
        message = (
            f"invalid UTF-8, byte 0x{byte:02x} at column {column}; convert the file (`iconv -f "
            f"WINDOWS-1252 -t UTF-8` if it is Windows text)"
        )
        policy.bad("lines_invalid_utf8", partial(_located, source, block, number, message))
        return False
    if b"\0" not in line:
        return True
    hint = " (is this UTF-16?)" if line.count(b"\0") > len(line) // 3 else ""
    message = f"NUL byte at column {line.index(0) + 1}{hint}; remove it"
    policy.bad("lines_with_nul", partial(_located, source, block, number, message))
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
    """The documents of a text, JSON-lines or row block; counts those read and those left out."""
    if source.format == "text":
        lines = clean_lines(block, source, policy).split(b"\n")
        for blank, group in itertools.groupby(lines, key=is_blank):
            if not blank:
                policy.counts["documents_read"] += 1
                yield b"\n".join(group).decode()
        return
    values: Iterable[tuple[int, Any]]
    if isinstance(block.payload, list):
        values = enumerate(block.payload)
    else:
        values = _json_values(block, source, text_field, policy)
    for number, value in values:
        policy.counts["documents_read"] += 1
        problem = _problem(value, text_field)
        if problem is None:
            yield value
        else:
            kind, message = problem
            policy.bad(kind, partial(_located, source, block, number, message))


def is_blank(line: bytes) -> bool:
    """Whether a line of UTF-8 holds nothing but white space, of Unicode's kinds too."""
    return not line.strip() or (not line.isascii() and not line.decode().strip())


_MISSING = object()


@dataclass(frozen=True)
class _BadLine:
    """Stands for a line of JSON lines without a document."""

    kind: str
    message: str


def _problem(value: Any, text_field: str) -> tuple[str, str] | None:
    """(kind, message) if a value is no document."""
    if isinstance(value, str):
        texts = [value]
    elif isinstance(value, list) and all(isinstance(part, str) for part in value):
        texts = value
    elif isinstance(value, _BadLine):
        return value.kind, value.message
    elif value is None or value is _MISSING:
        hint = "name the field with --text-field or mend the line"
        return "documents_missing_text", f"no text in the field {text_field!r}; {hint}"
    else:
        shown = repr(value)[:80]
        message = f"the field {text_field!r} holds {type(value).__name__} {shown}, not text"
        return "documents_text_not_string", f"{message}; mend the line"
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = repr(text[error.start])
            return "documents_invalid_unicode", f"{found} is no character; mend the line"
    return None


def _json_values(
    block: Block, source: Source, text_field: str, policy: Policy
) -> Iterator[tuple[int, Any]]:
    lines = _without_mark(block, policy).splitlines()  # bytes: splits at \n, \r\n, \r only
    for number, line in enumerate(lines):
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except (UnicodeDecodeError, RecursionError, ValueError) as error:
            is_utf8 = not isinstance(error, UnicodeDecodeError)
            kind = "documents_bad_json" if is_utf8 else "documents_invalid_utf8"
            shown = line[:60].decode(errors="backslashreplace")
            yield number, _BadLine(kind, f"not JSON ({error}): {shown}...; mend the line")
            continue
        if isinstance(value, dict):
            yield number, value.get(text_field, _MISSING)
        else:
            found = f"{type(value).__name__} instead of an object"
            message = f'{found}; expected {{"{text_field}": "..."}} on each line'
            yield number, _BadLine("documents_bad_json", message)


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
