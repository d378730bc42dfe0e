"""The inputs of a build: which files, data sets and URLs there are, and streams of their bytes.

An input is looked at before the work begins, so that a missing, empty, misnamed or UTF-16 file is
reported at once. Compression is told by the name and checked against the content.
"""

import glob
import logging
import lzma
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

import fsspec

from data_tools.errors import UserError

logger = logging.getLogger(__name__)

Format = Literal["auto", "text", "sentences", "jsonl", "parquet", "csv", "arrow", "hub"]
OnError = Literal["fail", "skip"]
TEXT_FORMATS = ("text", "sentences", "jsonl")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
MAGICS = {"gzip": b"\x1f\x8b", "bz2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\0"}
SUFFIXES: dict[str, Format] = {
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
HEAD_BYTES = 65_536


@dataclass(frozen=True)
class Source:
    """One input: a file, a URL, a hub data set, or documents from Python.

    Attributes:
        path: as the user gave it, or as a directory or pattern was resolved.
        num_bytes: size on disk; 0 where unknown.
        modified: modification time in ns; 0 where unknown.
        compression: "gzip", "bz2", "zstd", "xz" or "".
    """

    path: str
    format: Format
    num_bytes: int = 0
    modified: int = 0
    compression: str = ""

    @property
    def is_remote(self) -> bool:
        """Whether a failure to read may be the network's."""
        return "://" in self.path or self.format == "hub"

    @property
    def is_seekable(self) -> bool:
        """Whether a worker can read any range of it by itself."""
        return self.format in TEXT_FORMATS and not self.compression and not self.is_remote


class BadInputError(UserError):
    """Bad data; `kind` is the name its count has in the manifest when it is skipped."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # it crosses process borders
        return type(self), (self.kind, str(self))


@dataclass
class Policy:
    """What to do with bad input: stop, or count and go on."""

    on_error: OnError
    counts: Counter[str]

    def bad(self, kind: str, message: str | Callable[[], str]) -> None:
        """Raise BadInputError, or count `kind` under `--on-error skip`.

        Args:
            message: or what gives it, where that takes a while (to find a line number).
        """
        if self.on_error == "fail":
            text = message if isinstance(message, str) else message()
            raise BadInputError(
                kind, f"{text}, or use --on-error skip to leave it out and count it"
            )
        self.counts[kind] += 1


# --- which inputs ---------------------------------------------------------------------------------


def find_sources(inputs: Iterable[str], format: Format, policy: Policy) -> list[Source]:
    """Resolve paths, directories, globs, URLs and hub names, sorted within each input.

    Raises:
        UserError: an input does not exist, holds nothing readable, or is misnamed, empty or UTF-16
            (the last three are counted instead under `--on-error skip`).
    """
    sources: list[Source] = []
    for given in inputs:
        if format == "hub":
            sources.append(Source(given, "hub"))
            continue
        paths, is_named = _expand(given)
        kinds = {path: _kind_of(path, format, is_named=is_named) for path in paths}
        passed_over = [path for path, kind in kinds.items() if kind is None]
        if len(passed_over) == len(paths):
            raise UserError(
                f"{given}: holds no file of a known kind ({', '.join(SUFFIXES)}); name the files "
                f"one by one, or give --format"
            )
        if passed_over:
            logger.warning(
                "%s: passed over %d file(s) of unknown kind (%s, ...); name them, or give --format",
                given, len(passed_over), passed_over[0],
            )  # fmt: skip
            policy.counts["sources_passed_over"] += len(passed_over)
        found = [_examine(path, kind, policy) for path, kind in kinds.items() if kind]
        sources += [source for source in found if source]
    doubled = [p for p, n in Counter(source.path for source in sources).items() if n > 1]
    if doubled:
        raise UserError(f"{doubled[0]}: named twice among the inputs; name each input once")
    return sources


def _expand(given: str) -> tuple[list[str], bool]:
    """The files an input stands for, sorted, and whether it names a single one."""
    with _as_user_error(given):
        filesystem, path = fsspec.core.url_to_fs(given)
        try:
            kind = filesystem.info(path)["type"]
        except FileNotFoundError:
            kind = "pattern" if glob.has_magic(path) else "nothing"
        if kind == "file":
            return [given], True
        found = filesystem.find(path) if kind == "directory" else []
        if kind == "pattern":
            found = [match for match in filesystem.glob(path) if filesystem.isfile(match)]
    if kind == "directory" and not found:
        raise UserError(f"{given}: the directory holds no files")
    root = path if kind == "directory" else re.split("[*?[]", path)[0]
    files = sorted(file for file in found if "/." not in "/" + file.removeprefix(root))
    if not files:
        raise UserError(f"{given}: no such file or directory")
    return [filesystem.unstrip_protocol(f) if "://" in given else f for f in files], False


@contextmanager
def _as_user_error(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every protocol of fsspec has its own
        raise UserError(
            f"{url}: cannot be opened ({type(error).__name__}: {error}); check the address, the "
            f"network, and that the protocol's package is installed"
        ) from error


def _kind_of(path: str, format: Format, *, is_named: bool) -> Format | None:
    """The format of a file; None for one to pass over, like a README among the data."""
    if format != "auto":
        return format
    stem, suffix = os.path.splitext(path)
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    return SUFFIXES.get(suffix.lower(), "text" if is_named else None)


def _examine(path: str, format: Format, policy: Policy) -> Source | None:
    """The source at `path`, or None if it is bad (and counted)."""
    compression = COMPRESSIONS.get(os.path.splitext(path)[1], "")
    size = modified = 0
    with open_raw(path) as file:
        if "://" in path:
            size = fsspec.open(path).fs.info(path).get("size") or 0
        else:
            status = os.stat(path)
            size, modified = status.st_size, status.st_mtime_ns
        head = file.read(HEAD_BYTES)
    source = Source(path, format, size, modified, compression)
    fault = _fault_of(source, head)
    if fault:
        kind, message = fault
        policy.bad(kind, f"{path}: {message}")
    return None if fault else source


def _fault_of(source: Source, head: bytes) -> tuple[str, str] | None:
    """What is wrong with a file that begins with `head`: (kind, message)."""
    if not head:
        return "sources_empty", "is empty; remove it from the inputs"
    if source.format not in (*TEXT_FORMATS, "csv"):
        return None
    named = source.compression
    actual = next((name for name, magic in MAGICS.items() if head.startswith(magic)), "")
    if actual != named:
        expected = f"named like {named}" if named else "not named as compressed"
        content = f"{actual} data" if actual else f"no {named} data (begins {head[:8]!r})"
        return "sources_misnamed", f"{expected} but holds {content}; rename the file to what it is"
    head, is_whole = read_head(source, HEAD_BYTES)
    if is_whole and not head.strip():
        return "sources_empty", "holds only white space; remove it from the inputs"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        message = f"UTF-16 (byte order mark {head[:2].hex()}); UTF-8 is expected: convert it with"
        return "sources_utf16", f"{message} `iconv -f UTF-16 -t UTF-8`"
    return None


# --- streams --------------------------------------------------------------------------------------


def open_raw(path: str) -> BinaryIO:
    """Open a file or URL for reading; raises UserError if that is impossible."""
    with _as_user_error(path):
        return cast(BinaryIO, fsspec.open(path, "rb").open() if "://" in path else open(path, "rb"))


@contextmanager
def open_stream(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(uncompressed stream, raw stream) of a file or URL."""
    raw = open_raw(source.path)
    with raw:
        if not source.compression:
            yield raw, raw
        elif source.compression == "xz":
            with lzma.open(raw) as stream:
                yield cast(BinaryIO, stream), raw
        else:
            import pyarrow

            # Reads concatenated members and notices truncation, for gzip, bz2 and zstd alike.
            file = pyarrow.PythonFile(raw, mode="r")
            yield cast(BinaryIO, pyarrow.CompressedInputStream(file, source.compression)), raw


def is_damage(error: Exception) -> bool:
    """Whether reading failed because of the data, not of the disk or the network."""
    if isinstance(error, (EOFError, lzma.LZMAError)):
        return True
    return isinstance(error, OSError) and error.errno is None  # as pyarrow's decompressors raise it


def read_head(source: Source, num_bytes: int) -> tuple[bytes, bool]:
    """The first uncompressed bytes of a source, and whether it holds no more."""
    head = bytearray()
    try:
        with open_stream(source) as (stream, _):
            while len(head) < num_bytes and (part := stream.read(num_bytes - len(head))):
                head += part
    except (OSError, EOFError, lzma.LZMAError) as error:
        if not is_damage(error):
            raise
        return bytes(head), False  # reported when the source is read
    return bytes(head), len(head) < num_bytes
